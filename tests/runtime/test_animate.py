"""trip-animate: what it makes, and that whatever is wrong costs one clear line, exit code 2 and no file."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from trip_rt.animate import main
from trip_rt.clip_requests import MAX_BATCH_FILE_MEGABYTES
from trip_rt.manifest import FORMAT_VERSION
from trip_rt.video import output_format

PROMPT = "a red ball rolls to the right"
ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "import sys; from trip_rt.animate import main; sys.exit(main())"]


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def complaints(self) -> list[str]:
        """What is on stderr beside the note of the backend."""
        return [line for line in self.err.splitlines() if not line.startswith(("backend: ", "arithmetic: "))]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An otherwise empty current folder with a picture in it."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).save("photo.png")
    return tmp_path


@pytest.fixture
def animate(here, capsys):
    def run(*args) -> Ran:
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as error:  # argparse's way
            code = error.code
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def refuse(animate, here):
    """Runs the command and asserts that it refuses cleanly; returns its one line."""

    def run(*args) -> str:
        before = {path: path.is_file() and path.read_bytes() for path in here.rglob("*")}
        ran = animate(*args)
        assert ran.code == 2 and ran.out == ""
        assert len(ran.complaints) == 1 and ran.err.endswith("\n"), ran.err
        assert {path: path.is_file() and path.read_bytes() for path in here.rglob("*")} == before
        line = ran.complaints[0]
        assert line.startswith("trip-animate: ") and line.isprintable()
        return line

    return run


@pytest.fixture
def bundle_copy(tiny_bundle, tmp_path_factory):
    return shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("copy") / "bundle")


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def frames_of(path):
    if Path(path).is_dir():
        return len(os.listdir(path))
    if Path(path).suffix == ".mp4":
        import av

        with av.open(str(path)) as container:
            return len(list(container.decode(video=0)))
    with Image.open(path) as image:
        image.load()
        return image.n_frames


def lines(*entries):
    return "\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.webp", "frames"])
def test_one_clip(animate, here, tiny_bundle, name):
    ran = animate(tiny_bundle, "photo.png", PROMPT, "-o", name, "--steps", 2)
    assert ran.code == 0 and ran.complaints == [] and ran.err.startswith("backend: onnxruntime (")
    first, last = ran.out.splitlines()
    assert first.startswith(f"{name}: 5 frames at 8 a second, made in ")
    assert last.startswith("1 clip in ") and all(stage in last for stage in ("load", "denoise", "decode", "save"))
    assert frames_of(name) == 5 and sorted(os.listdir()) == sorted([name, "photo.png"])


def test_json_and_every_option(animate, here, tiny_bundle):
    options = ["--steps", 2, "--guidance-scale", 3, "--seed", 5, "--fps", 12.5, "--negative-prompt", "blue"]
    options += ["--fit", "letterbox", "--backend", "onnxruntime", "--threads", 1, "--json"]
    options += ["--speed", "fast", "--solver", "dpm++", "--guidance-interval", "0.2,0.9", "--feature-reuse", 2]
    ran = animate(tiny_bundle, "photo.png", "-o", "clip.webp", PROMPT, *options, "--contact-sheet", "sheet.PNG")
    figures = json.loads(ran.out)
    assert ran.code == 0 and ran.complaints == [] and ran.out.count("\n") == 1
    assert figures["clips"] == [
        {"image": "photo.png", "prompt": PROMPT, "seed": 5, "output": "clip.webp", "frames": 5, "fps": 12.5}
    ]
    seconds = figures["seconds"]
    assert list(seconds) == ["total", "load", "denoise", "decode", "save"] and min(seconds.values()) > 0
    assert sum(seconds.values()) - seconds["total"] <= seconds["total"] + 0.01
    assert (figures["backend"], figures["reason"], figures["contact_sheet"], figures["arithmetic"]) == (
        "onnxruntime",
        "asked for, on cpu",
        "sheet.PNG",
        "fp32: onnxruntime without bf16 on this machine",
    )
    assert f"arithmetic: {figures['arithmetic']}\n" in ran.err
    with Image.open("sheet.PNG") as sheet:
        assert sheet.format == "PNG" and sheet.width > 5 * 48
    assert sorted(os.listdir()) == ["clip.webp", "photo.png", "sheet.PNG"]


def test_longer_clips(animate, here, tiny_bundle, tiny_animator):
    then = ["--steps", 2, "--then", "a red ball falls"]
    ran = animate(tiny_bundle, "photo.png", PROMPT, "-o", "clip.webp", *then, "--json")
    (clip,) = json.loads(ran.out)["clips"]
    assert (clip["frames"], clip["prompt"]) == (9, f"{PROMPT}; a red ball falls") and frames_of("clip.webp") == 9
    ran = animate(tiny_bundle, "photo.png", PROMPT, "-o", "frames", *then, "--frames", 12)
    assert ran.code == 0 and ran.out.startswith("frames: 12 frames at 8 a second") and frames_of("frames") == 12
    expected = tiny_animator("photo.png", [PROMPT, "a red ball falls"], num_inference_steps=2, num_frames=12)
    last = np.asarray(Image.open("frames/frame_0012.png"))
    assert np.abs(last.astype(int) - expected.frames[-1]).max() <= 1


def test_batch(animate, here, tiny_bundle, tiny_animator):
    entries = [
        {"image": "photo.png", "prompt": prompt, "output": f"{i}"}
        for i, prompt in enumerate((PROMPT, "a ball", PROMPT))
    ]
    Path("clips.jsonl").write_text(
        "\ufeff" + lines(entries[0], "", entries[1] | {"seed": 9}, entries[2], ""), encoding="utf-8"
    )
    ran = animate(
        tiny_bundle, "--batch", "clips.jsonl", "--seed", 4, "--json", "--steps", 2, "--contact-sheet", "sheet.png"
    )
    clips = json.loads(ran.out)["clips"]
    assert [(clip["output"], clip["prompt"], clip["seed"]) for clip in clips] == [
        ("0", PROMPT, 4),
        ("1", "a ball", 9),
        ("2", PROMPT, 4),
    ]
    for clip in clips:
        frames = np.stack([np.asarray(Image.open(path)) for path in sorted(Path(clip["output"]).iterdir())])
        assert (
            frames == tiny_animator("photo.png", clip["prompt"], seed=clip["seed"], num_inference_steps=2).frames
        ).all()
    with Image.open("sheet.png") as sheet:
        assert sheet.height > 3 * 32


def test_pictures_that_memory_is_not_kept_for_are_read_again(animate, here, tiny_bundle, monkeypatch):
    Path("clips.jsonl").write_text(
        lines(*({"image": "photo.png", "prompt": PROMPT, "output": f"{i}.gif"} for i in range(2)))
    )
    animate(tiny_bundle, "--batch", "clips.jsonl", "--steps", 1)
    kept = [Path(f"{i}.gif").read_bytes() for i in range(2)]
    monkeypatch.setattr("trip_rt.clip_requests.MAX_HELD_MEGABYTES", 0)
    animate(tiny_bundle, "--batch", "clips.jsonl", "--steps", 1)
    assert [Path(f"{i}.gif").read_bytes() for i in range(2)] == kept


def test_warnings_are_plain_and_said_once(animate, here, tiny_bundle):
    Path("clips.jsonl").write_text(
        lines(
            *(
                {"image": "photo.png", "prompt": prompt, "output": f"{i}.webp"}
                for i, prompt in enumerate((PROMPT, "word " * 10_000))
            )
        )
    )
    ran = animate(tiny_bundle, "--batch", "clips.jsonl", "--steps", 1, "--negative-prompt", "zyx")
    assert ran.code == 0 and len(ran.complaints) == 3
    assert all(
        line.startswith("trip-animate: warning: ") and len(line) < 150 and ".py" not in line for line in ran.complaints
    )
    assert "zyx" in ran.complaints[0] and "too long" in ran.complaints[1] and "word" in ran.complaints[2]


def test_an_earlier_clip_is_replaced(animate, here, tiny_bundle):
    for seed in (0, 1):
        Path("before").write_bytes(Path("clip.webp").read_bytes() if seed else b"")
        assert animate(tiny_bundle, "photo.png", PROMPT, "-o", "clip.webp", "--steps", 1, "--seed", seed).code == 0
    assert Path("before").read_bytes() != Path("clip.webp").read_bytes()


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("missing.png", None, "no such file"),
        ("cut.png", lambda: Path("photo.png").read_bytes()[:3000], "damaged"),
        ("tiny.png", lambda: png_header(1, 1), "1 x 1"),
        ("huge.png", lambda: png_header(20_000, 20_000), "megapixels"),
        ("text.png", lambda: b"this is no picture\n", "another kind of file"),
        ("empty.png", lambda: b"", "empty file"),
    ],
)
def test_bad_pictures(refuse, here, tiny_bundle, name, data, says):
    if data:
        Path(name).write_bytes(data())
    line = refuse(tiny_bundle, name, PROMPT, "-o", "clip.mp4")
    assert name in line and says in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--steps", "0"], "steps: found 0, expected 1 to 1000"),
        (["--steps", "1001"], "steps: found 1001"),
        (["--steps", "many"], "argument --steps"),
        (["--guidance-scale", "nan"], "guidance scale: found nan"),
        (["--guidance-scale", "101"], "guidance scale: found 101"),
        (["--guidance-interval", "0.5"], "found '0.5', expected two numbers such as 0.2,0.8"),
        (["--guidance-interval", "0.8,0.2"], "guidance interval: found 0.8 to 0.2"),
        (["--feature-reuse", "0"], "feature reuse: found 0, expected at least 1"),
        (["--solver", "euler"], "argument --solver"),
        (["--speed", "ludicrous"], "argument --speed"),
        (["--frames", "4"], "num_frames: found 4, expected at least 5"),
        (["--frames", "0"], "num_frames: found 0"),
        (["--then", " "], "prompt: found an empty one"),
        (["--frames", "5", "--then", "a ball falls"], "prompt: found 2 sentences for 5 frames"),
        (["--seed", "-1"], "seed: found -1"),
        (["--seed", str(2**64)], "seed: found"),
        (["--fps", "nan"], "fps: found nan"),
        (["--fps", "0"], "fps: found 0"),
        (["--threads", "0"], "threads: found 0"),
        (["--backend", "abacus"], "argument --backend"),
        (["--negative-prompt", "\udcff"], "undecodable"),
        (["--batch", "clips.jsonl"], "found --batch beside"),
        (["--contact-sheet", "sheet.jpg"], "ending in .png"),
        (["--contact-sheet", "no/sheet.png"], "in a folder"),
        (["--contact-sheet", "photo.png"], "would replace or disturb the picture"),
        (["--no-such-option"], "unrecognized arguments"),
        (["-o", "clip.avi"], "'.avi'"),
        (["-o", "clip"], "photo.png"),
        (["-o", "no/clip.mp4"], "found no folder"),
        (["-o", "new\nline/clip.mp4"], "found no folder"),
    ],
)
def test_bad_options(refuse, here, tiny_bundle, options, says):
    if options == ["-o", "clip"]:  # a folder with something else in it
        Path("clip").mkdir()
        shutil.copy("photo.png", "clip")
    assert says in refuse(tiny_bundle, "photo.png", PROMPT, "-o", "clip.mp4", *options)


@pytest.mark.parametrize("prompt", ["", " \t\n"])
def test_empty_prompts(refuse, tiny_bundle, prompt):
    assert "prompt: found an empty one" in refuse(tiny_bundle, "photo.png", prompt, "-o", "clip.mp4")


@pytest.mark.parametrize("args", [[], ["photo.png"], ["photo.png", PROMPT]])
def test_too_few_arguments(refuse, tiny_bundle, args):
    assert "expected IMAGE, PROMPT and -o CLIP or --live, or --batch FILE" in refuse(tiny_bundle, *args)


def test_undecodable_prompt(refuse, tiny_bundle):
    assert "undecodable" in refuse(tiny_bundle, "photo.png", os.fsdecode(b"a \xff ball"), "-o", "clip.mp4")


def test_a_folder_of_frames_does_not_swallow_its_own_picture(refuse, here, tiny_bundle):
    Path("frames").mkdir()
    shutil.copy("photo.png", "frames/frame_0001.png")
    assert "the picture of a clip" in refuse(tiny_bundle, "frames/frame_0001.png", PROMPT, "-o", "frames")


def test_missing_bundle(refuse, here):
    assert "no such folder" in refuse("no-bundle", "photo.png", PROMPT, "-o", "clip.mp4")
    assert "cannot be read" in refuse("x" * 300, "photo.png", PROMPT, "-o", "clip.mp4")


def test_bundle_without_manifest(refuse, bundle_copy):
    (bundle_copy / "manifest.json").unlink()
    assert "no (finished) bundle" in refuse(bundle_copy, "photo.png", PROMPT, "-o", "clip.mp4")


@pytest.mark.parametrize("pattern", ["unet-*.onnx", "unet-*.weights", "tokenizer.json", "manifest.json"])
def test_one_flipped_byte(refuse, bundle_copy, pattern):
    (path,) = bundle_copy.glob(pattern)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    line = refuse(bundle_copy, "photo.png", PROMPT, "-o", "clip.mp4")
    assert path.name in line and "damaged" in line


def test_newer_bundle(refuse, bundle_copy):
    path = bundle_copy / "manifest.json"
    path.write_text(
        path.read_text().replace(f'"format_version": {FORMAT_VERSION}', f'"format_version": {FORMAT_VERSION + 1}')
    )
    assert f"found format version {FORMAT_VERSION + 1}" in refuse(bundle_copy, "photo.png", PROMPT, "-o", "clip.mp4")


GOOD = {"image": "photo.png", "prompt": PROMPT, "output": "a.mp4"}


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ("{", "found no JSON"),
        ("[" * 100_000, "found no JSON"),
        ("[]", "found a JSON list"),
        ("\udcff", "found no JSON"),
        (GOOD | {"sed": 1}, "unknown key 'sed'"),
        ({"image": "photo.png", "prompt": PROMPT}, "found no output"),
        (GOOD | {"seed": "1"}, "seed: found a str"),
        (GOOD | {"seed": True}, "seed: found a bool"),
        (GOOD | {"prompt": None}, "prompt: found a NoneType"),
        (GOOD | {"output": "b.mp4", "seed": -1}, "seed: found -1"),
        (GOOD | {"output": "b.mp4", "prompt": " "}, "prompt: found an empty one"),
        (GOOD | {"output": "b.mp4", "prompt": "\ud800"}, "undecodable"),
        (GOOD | {"output": "b.mp4", "image": "\ud800.png"}, "image: found undecodable"),
        (GOOD | {"output": "\udcff.mp4"}, "output: found undecodable"),
        (GOOD | {"output": "b.mp4", "image": "no.png"}, "no.png: found no such file"),
        (GOOD | {"output": "b.mp4", "image": "a\0b"}, "cannot be read"),
        (GOOD | {"output": "b.avi"}, "'.avi'"),
        (GOOD | {"output": "a\0.mp4"}, "output: found"),
        (GOOD | {"output": "./a.mp4"}, "would replace or disturb another clip"),
    ],
)
def test_bad_batch_lines(refuse, here, tiny_bundle, second, says):
    Path("clips.jsonl").write_bytes(lines(GOOD, second).encode(errors="surrogateescape"))
    line = refuse(tiny_bundle, "--batch", "clips.jsonl")
    assert line.startswith("trip-animate: clips.jsonl, line 2: ") and says in line


def test_bad_batch_files(refuse, here, tiny_bundle):
    assert "no.jsonl: cannot be read" in refuse(tiny_bundle, "--batch", "no.jsonl")
    assert "cannot be read" in refuse(tiny_bundle, "--batch", ".")
    Path("clips.jsonl").write_text("\n \n")
    assert "clips.jsonl: found no clips" in refuse(tiny_bundle, "--batch", "clips.jsonl")
    with open("clips.jsonl", "wb") as file:
        file.truncate((MAX_BATCH_FILE_MEGABYTES << 20) + 1)
    assert "found more than 16 MB" in refuse(tiny_bundle, "--batch", "clips.jsonl")
    Path("clips.jsonl").write_text(lines(*(GOOD | {"output": f"{i}.gif"} for i in range(201))))
    assert "found 201 clips" in refuse(tiny_bundle, "--batch", "clips.jsonl", "--contact-sheet", "sheet.png")


def test_the_bar_is_for_terminals_only(here, tiny_bundle):
    terminal, its_end = pty.openpty()
    termios.tcsetwinsize(its_end, (24, 80))
    command = [*COMMAND, tiny_bundle, "photo.png", PROMPT, "-o", "clip.gif", "--json"]
    ran = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=its_end,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    os.close(its_end)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while data := os.read(terminal, 1 << 16):
            shown += data
    os.close(terminal)
    assert b"denoising" in shown and json.loads(ran.stdout)["clips"][0]["output"] == "clip.gif"


def test_a_full_disk(here, tiny_bundle):
    """The kernel itself stops writes (RLIMIT_FSIZE), first of the clip, then of the larger contact sheet."""
    code = """
import resource, sys
from trip_rt.animate import main
bundle, prompt = sys.argv[1:]
for limit in (600, 20_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    options = ["-o", "clip.gif", "--steps", "1", "--json", "--contact-sheet", "sheet.png"]
    print(main([bundle, "photo.png", prompt, *options]))
"""
    command = [sys.executable, "-c", code, tiny_bundle, PROMPT]
    ran = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
    )
    assert ran.stdout == "2\n2\n" and sorted(os.listdir()) == ["clip.gif", "photo.png"]
    note, clip, _, sheet = ran.stderr.splitlines()
    assert note.startswith("backend: ")
    assert [clip, sheet] == [
        f"trip-animate: {name}: the file is larger than files may be here; make room and try again"
        for name in (here / "clip.gif", "sheet.png")
    ]


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_keeps_the_finished_clips(here, tiny_bundle, number, code, word):
    Path("clips.jsonl").write_text(
        lines(*({"image": "photo.png", "prompt": PROMPT, "output": f"{i}.gif"} for i in range(99)))
    )
    process = subprocess.Popen(
        [*COMMAND, tiny_bundle, "--batch", "clips.jsonl"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job would ignore it
    )
    assert process.stdout.readline().startswith("0.gif: ")
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code and err.splitlines()[1:] == [f"trip-animate: {word}"] and "clips in" not in out
    made = sorted(set(os.listdir()) - {"clips.jsonl", "photo.png"})
    assert "0.gif" in made and all(output_format(name) == "gif" and frames_of(name) == 5 for name in made)


def test_output_that_nobody_takes():
    code = """
import sys
from trip_rt.command_line import CommandParser, main_of
def run(args):
    while True:
        print("figures", flush=True)
sys.exit(main_of(lambda: CommandParser("trip-test"), run)())
"""
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, env=environment
    )
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (141, "")


def test_trouble_on_the_way_is_one_line(animate, here, tiny_bundle, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trip_rt.animate.report", fail)
    ran = animate(tiny_bundle, "photo.png", PROMPT, "-o", "frames", "--steps", 1)
    assert ran.code == 1 and ran.complaints == ["trip-animate: cannot go on: [Errno 28] No space left on device"]
