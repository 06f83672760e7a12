"""What was saved is decoded and compared; failures leave nothing behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image

from trip_rt.accuracy import psnr
from trip_rt.errors import InputError
from trip_rt.video import output_format, save


def moving(frames=16, height=64, width=64):
    """A smooth colourful pattern drifting to the right."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    channels = [np.sin((x - 2 * t) / 9), np.cos(y / 11 + t / 7), np.sin((x + y) / 17)]
    return np.rint(127.5 + 110 * np.stack(channels, -1)).astype(np.uint8)


def decode_mp4(path):
    """Frames, and the stream's properties; the conversion is told what the file claims, as a browser would."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoded = list(container.decode(stream))
        frames = np.stack(
            [
                f.reformat(format="rgb24", src_colorspace=f.colorspace, src_color_range=f.color_range).to_ndarray()
                for f in decoded
            ]
        )
        context = stream.codec_context
        tags = (context.color_range, context.colorspace, context.color_primaries, context.color_trc)
        return (
            frames,
            stream.average_rate,
            context.pix_fmt,
            context.name,
            [int(tag) for tag in tags],
            stream.duration * stream.time_base,
        )


def decode_animation(path):
    with Image.open(path) as image:
        frames, durations = [], []
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            image.load()
            frames.append(np.asarray(image.convert("RGB")))
            durations.append(image.info.get("duration"))
        return np.stack(frames), durations, image.info.get("loop")


@pytest.mark.parametrize("size", [(64, 64), (63, 65), (8, 8), (144, 256)])
@pytest.mark.parametrize("fps", [8, 29.97])
def test_mp4(tmp_path, size, fps):
    path, source = tmp_path / "clip.mp4", moving(16, *size)
    save(source, path, fps)
    frames, rate, pixel_format, codec, tags, duration = decode_mp4(path)
    height, width = size
    assert frames.shape == (16, height + height % 2, width + width % 2, 3)
    assert psnr(frames[:, :height, :width], source, 255) >= 30
    assert float(rate) == pytest.approx(fps) and float(duration) == pytest.approx(16 / fps, abs=1e-3)
    assert (pixel_format, codec, tags) == ("yuv420p", "h264", [1, 1, 1, 1])
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_mp4_colours_are_bt709(tmp_path):
    for colour, yuv in {
        (255, 0, 0): (63, 102, 240),
        (255, 255, 255): (235, 128, 128),
        (0, 0, 0): (16, 128, 128),
    }.items():
        save(np.broadcast_to(np.array(colour, np.uint8), (4, 32, 32, 3)), tmp_path / "flat.mp4", 8)
        with av.open(str(tmp_path / "flat.mp4")) as container:
            frame = next(container.decode(video=0))
        assert [int(np.frombuffer(plane, np.uint8)[0]) for plane in frame.planes] == pytest.approx(yuv, abs=1)


@pytest.mark.parametrize("fps", [8, 10, 24])
def test_gif(tmp_path, fps):
    source = moving()
    save(source, tmp_path / "clip.gif", fps)
    frames, durations, loop = decode_animation(tmp_path / "clip.gif")
    assert frames.shape == source.shape and loop == 0
    assert sum(durations) == pytest.approx(16_000 / fps, abs=5) and max(durations) - min(durations) <= 10
    assert psnr(frames, source, 255) >= 29  # 255 colours for a clip that sweeps the whole colour cube


def test_gif_keeps_few_colours_exactly_and_steadily(tmp_path):
    source = np.full((6, 32, 32, 3), (250, 240, 10), np.uint8)
    for i in range(6):
        source[i, 8:16, 4 * i : 4 * i + 8] = (200, 0, 30)
    save(source, tmp_path / "clip.gif", 8)
    assert (decode_animation(tmp_path / "clip.gif")[0] == source).all()


def test_gif_palette_covers_large_clips(tmp_path):
    source = moving(16, 128, 128)
    save(source, tmp_path / "clip.gif", 8)
    assert psnr(decode_animation(tmp_path / "clip.gif")[0], source, 255) >= 27


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_a_still_clip_keeps_its_picture(tmp_path, suffix):
    source = np.repeat(moving(1), 16, 0)
    save(source, tmp_path / f"still{suffix}", 8)
    decoded = (
        decode_mp4(tmp_path / "still.mp4")[0] if suffix == ".mp4" else decode_animation(tmp_path / f"still{suffix}")[0]
    )
    assert psnr(decoded, source[: len(decoded)], 255) >= 30 and len(decoded) == (16 if suffix == ".mp4" else 1)


def test_webp(tmp_path):
    source = moving()
    save(source, tmp_path / "clip.webp", 24)
    frames, durations, loop = decode_animation(tmp_path / "clip.webp")
    assert frames.shape == source.shape and loop == 0
    assert sum(durations) == 667 and set(durations) == {41, 42}
    assert psnr(frames, source, 255) >= 30


def test_png_folder(tmp_path):
    source, folder = moving(12), tmp_path / "frames"
    save(source, folder, 8)
    assert sorted(os.listdir(folder)) == [f"frame_{i:04d}.png" for i in range(1, 13)]
    assert (np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]) == source).all()
    save(source[:3], folder, 8)
    assert len(os.listdir(folder)) == 3 and os.listdir(tmp_path) == ["frames"]
    assert folder.stat().st_mode == os.stat(tmp_path_mode(tmp_path)).st_mode

    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        save(source, folder, 8)
    assert len(os.listdir(folder)) == 4 and os.listdir(tmp_path) == ["frames"]


def tmp_path_mode(tmp_path):
    """A folder made the ordinary way, outside `tmp_path`, to compare permissions with."""
    plain = tmp_path.with_name(tmp_path.name + "_plain")
    plain.mkdir()
    return plain


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ""])
@pytest.mark.parametrize("frames", [1, 2])
def test_shortest_clips_and_overwriting(tmp_path, suffix, frames):
    path = tmp_path / f"clip{suffix}"
    save(moving(3), path, 8)
    save(moving(frames)[:, ::-1], path, 8)
    if suffix:
        decoded = decode_mp4(path)[0] if suffix == ".mp4" else decode_animation(path)[0]
        assert len(decoded) == frames
    assert os.listdir(tmp_path) == [path.name]


def test_output_follows_links_and_any_case(tmp_path):
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real" / "clip.GIF", tmp_path / "link.GIF")
    save(moving(2), tmp_path / "link.GIF", 8)
    assert (tmp_path / "link.GIF").is_symlink() and (tmp_path / "real" / "clip.GIF").is_file()


def test_output_format(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("v1.2")
    given = {
        "a.mp4": "mp4",
        "a.b.GIF": "gif",
        "a.webp": "webp",
        "frames": "png",
        "v1.2": "png",
        ".": "InputError",
        "v1.2/": "png",
    }
    for path, kind in given.items():
        if kind == "InputError":
            with pytest.raises(InputError, match=r"holds 'v1\.2'"):
                output_format(path)
        else:
            assert output_format(path) == kind
    assert os.listdir(tmp_path) == ["v1.2"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("clip.avi", r"'\.avi', expected a name ending in \.mp4, \.gif or \.webp, or a folder"),
        ("clip.png", "for PNG frames"),
        ("clip.a\nb", r"'\.a\?b'"),
        ("", "expected a name"),
        ("nowhere/clip.mp4", "nowhere, expected it to exist; create it"),
        ("file/clip.mp4", "create it"),
        ("file", "a file or device of that name"),
        ("folder.mp4", "found a folder"),
        ("/dev/full", "a file or device"),
        ("/proc/clip.mp4", "/proc/clip.mp4"),
        ("x" * 300 + ".mp4", "name too long"),
    ],
)
def test_unusable_outputs(tmp_path, monkeypatch, path, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(InputError, match=words) as caught:
        save(moving(2), path, 8)
    assert str(caught.value).isprintable() and path.replace("\n", "?") in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.mp4"]


def test_mp4_without_pyav_is_refused_early(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert output_format(tmp_path / "clip.gif") == "gif"
    with pytest.raises(InputError, match="pip install av"):
        output_format(tmp_path / "clip.mp4")


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1000])
def test_unusable_fps(tmp_path, fps):
    with pytest.raises(InputError, match=r"^fps: found"):
        save(moving(2), tmp_path / "clip.gif", fps)


def test_unusable_frames(tmp_path):
    for frames in (moving(2).astype(np.float32), moving(2)[0], moving(2)[:0]):
        with pytest.raises(ValueError, match="expected uint8"):
            save(frames, tmp_path / "clip.gif", 8)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(("name", "call"), [("clip.mp4", "replace"), ("frames", "rename"), ("clip.gif", "fsync")])
def test_a_failure_keeps_the_earlier_clip(tmp_path, monkeypatch, name, call, error):
    path = tmp_path / name
    save(moving(2), path, 8)
    before = sorted(path.iterdir()) if path.is_dir() else path.read_bytes()
    real, calls = getattr(os, call), []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == (2 if call == "rename" else 1):  # the second rename: the old folder is already out of the way
            raise error
        return real(*arguments)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else InputError) as caught:
        save(moving(3), path, 8)
    if caught.type is InputError:
        assert str(caught.value) == f"{path}: the disk is full; make room and try again"
    assert (sorted(path.iterdir()) if path.is_dir() else path.read_bytes()) == before
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("width", [64, 96, 128])
def test_equal_frames_give_equal_files(tmp_path, width):
    """Whatever fresh memory holds, which glibc fills as MALLOC_PERTURB_ says: x264 reads some that it never wrote."""
    code = f"""
import sys
import numpy as np
from trip_rt.video import save
grain = np.random.default_rng(0).normal(128, 40, (128, 256, 3)).clip(0, 255).astype(np.uint8)
save(np.stack([grain[i : i + 64, 3 * i : 3 * i + {width}] for i in range(12)]), sys.argv[1], 8)
"""
    for fill in ("0", "85", "200"):
        environment = {**os.environ, "PYTHONPATH": os.getcwd(), "MALLOC_PERTURB_": fill}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / f"{fill}.mp4")], check=True, env=environment)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_a_write_cut_short_leaves_nothing(tmp_path):
    """The kernel itself stops the write (RLIMIT_FSIZE), as a full disk does."""
    code = """
import resource, sys
import numpy as np
from trip_rt.errors import InputError
from trip_rt.video import save
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
for name in ("clip.mp4", "clip.gif", "clip.webp", "frames"):
    try:
        save(frames, name, 8)
    except InputError as error:
        print(error)
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    names = ("clip.mp4", "clip.gif", "clip.webp", "frames")
    assert ran.stdout.splitlines() == [
        f"{tmp_path / name}: the file is larger than files may be here; make room and try again" for name in names
    ]
    assert ran.stderr == "" and os.listdir(tmp_path) == []
