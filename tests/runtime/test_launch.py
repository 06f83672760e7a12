"""Commands as they begin and end: signals at any moment, and standard streams that are closed or full."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import trip_rt
from trip_rt import launch, signals

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red ball rolls to the right"


def command(name):
    """The console script as pip writes it, from these sources."""
    return [sys.executable, "-c", f"import sys; from trip_rt.launch import {name}; sys.exit({name}())"]


def environment():
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "export", "engines"))
    }


def test_every_command_is_there():
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    for name, entry in scripts.items():
        module, _, function = entry.partition(":")
        assert module == "trip_rt.launch" and function == name.replace("-", "_")
        assert callable(getattr(launch, function))


COMMANDS = ("animate", "export", "parity", "evaluate", "data", "serve", "train", "imagine")


@pytest.mark.parametrize("name", [f"trip_{name}" for name in COMMANDS])
def test_every_command_runs(name):
    ran = subprocess.run([*command(name), "--help"], capture_output=True, text=True, env=environment())
    assert ran.returncode == 0 and "example" in ran.stdout and ran.stderr == ""


def test_little_is_imported_before_signals_are_answered():
    code = "import sys; before = set(sys.modules); import trip_rt.launch; print(*set(sys.modules) - before)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert not {"numpy", "argparse", "msgspec", "json"} & set(ran.stdout.split())


def test_the_packages_names_are_all_there():
    for name in trip_rt.__all__:
        assert getattr(trip_rt, name) is not None and name in dir(trip_rt)
    with pytest.raises(AttributeError, match="no attribute 'Animater'"):
        trip_rt.Animater  # noqa: B018


SLOW_LIBRARY = """
import sys, time
from trip_rt import launch
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            print("importing", flush=True)
            time.sleep(30)
sys.meta_path.insert(0, Slow())
sys.exit(launch.trip_animate())
"""


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_while_libraries_are_imported(number, code, word):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_LIBRARY, "bundle"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job would ignore it
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (code, f"trip-animate: {word}\n")


SLOW_END = """
import atexit, sys, time
from trip_rt import launch
def wait():
    print("ending", flush=True)
    time.sleep(30)
atexit.register(wait)
sys.exit(launch.trip_animate())
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_libraries_shut_down(number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_END, "nowhere", "a.png", PROMPT, "-o", "a.gif"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "ending\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code and len(err.splitlines()) == 2


@pytest.fixture
def here(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48), (200, 30, 30)).save("photo.png")
    return tmp_path


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(here, tiny_bundle, closed):
    """What is printed goes nowhere: not into the clip, which would get the number of the stream."""
    from trip_rt.images import load_image

    arguments = [str(tiny_bundle), "photo.png", PROMPT, "-o", "frames", "--steps", "1"]
    script = f'exec "$@" {closed}'
    ran = subprocess.run(
        ["bash", "-c", script, "bash", *command("trip_animate"), *arguments],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert ran.returncode == 0 and "Traceback" not in ran.stderr
    assert sorted(os.listdir()) == ["frames", "photo.png"]
    assert all(load_image(path, 32, 48).any() for path in sorted(Path("frames").iterdir()))


def test_output_that_the_disk_has_no_room_for(here, tiny_bundle):
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [*command("trip_animate"), tiny_bundle, "photo.png", PROMPT, "-o", "a.gif", "--steps", "1"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
    assert ran.returncode == 1 and ran.stderr.splitlines()[1:] == [
        "trip-animate: cannot go on: [Errno 28] No space left on device"
    ]


def test_a_signal_at_once(here, tiny_bundle):
    """Before Python itself has started, SIGTERM ends it without a word; from there on with one line."""
    for delay in (0.03, 0.06, 0.1, 0.2, 0.4):
        process = subprocess.Popen(
            [*command("trip_animate"), tiny_bundle, "photo.png", PROMPT, "-o", "a.gif", "--steps", "1000"],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL),
        )
        time.sleep(delay)
        process.terminate()
        _, err = process.communicate(timeout=30)
        assert process.returncode in (143, -signal.SIGTERM) and "Traceback" not in err


def test_a_line_is_written_with_its_end_at_once(monkeypatch):
    # print() writes the end by itself: a signal between the two would leave its own line on the same one.
    written = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append, flush=lambda: None))
    launch.note("ready")
    assert written == ["ready\n"]


def test_a_signal_waits_for_a_library_that_is_being_loaded(tmp_path, monkeypatch):
    # As OpenVINO's and ONNX Runtime's would, this one takes any exception for something that is missing.
    source = """import os, signal
try:
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000): pass
except BaseException as error:
    raise ImportError("broken") from error
"""
    (tmp_path / "slow_library.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)

    def body():
        signals.import_library("slow_library")
        return 0

    assert launch.until_stopped("trip-animate", body) == 143
    assert "slow_library" in sys.modules


def test_handlers_that_python_did_not_set_stay(monkeypatch):
    """A host written in another language has its own, which Python knows as None and cannot give back."""
    set_ = []
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *arguments: set_.append(arguments))
    assert signals.import_library("json") is sys.modules["json"]
    assert not set_
