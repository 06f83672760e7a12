"""SIGTERM and Ctrl-C at random moments of whole commands: one line, the right exit code, nothing left behind.

TRIP_SIGNALS sets how many of each signal a command gets.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
DRAFTS = (".trip-", ".exporting-", ".saving-")
WORDS = {signal.SIGTERM: (143, "terminated"), signal.SIGINT: (130, "interrupted")}
TRAINING = [
    "--demo",
    "-o",
    "run",
    "--set",
    "model.preset=demo-small",
    "--set",
    "vae.steps=3",
    "--set",
    "data.clips=20",
    "--set",
    "run.save_every=1",
    "--set",
    "run.tracker=none",
    "--set",
    "data.validation=",
]


@pytest.mark.slow
@pytest.mark.parametrize("number", WORDS, ids=lambda number: number.name)
@pytest.mark.parametrize(("name", "longest"), [("animate", 5.0), ("export", 25.0), ("train", 12.0)])
def test_signals_at_random_moments(tiny_bundle, tiny_checkpoint, tmp_path, name, longest, number):
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "photo.png")
    clips = [{"image": "photo.png", "prompt": "a red ball rolls", "output": f"{i}.mp4"} for i in range(999)]
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, clips)), encoding="utf-8")
    arguments = {
        "animate": [str(tiny_bundle), "--batch", "clips.jsonl"],
        "export": [str(tiny_checkpoint), "-o", "bundle"],
        "train": TRAINING,
    }[name]
    given = set(os.listdir(tmp_path)) | {"temporary"}
    (tmp_path / "temporary").mkdir()
    for moment in np.random.default_rng(number).uniform(0.1, longest, int(os.environ.get("TRIP_SIGNALS", "2"))):
        code, err = _stopped(f"trip_{name}", arguments, tmp_path, number, moment)
        left = [path for path in tmp_path.rglob("*") if path.name.startswith(DRAFTS) or path.suffix == ".part"]
        assert not left and not os.listdir(tmp_path / "temporary"), (moment, left)
        expected, word = WORDS[number]
        assert code == expected and "Traceback" not in err and "Exception" not in err, (moment, code, err)
        last = err.splitlines()[-1]
        assert last == f"trip-{name}: {word}" or (name == "train" and "goes on from there" in last), (moment, err)
        if name == "export":  # else a later run would only find all of it finished
            _remove(tmp_path, given)


def _stopped(command, arguments, folder, number, moment):
    """Exit code and stderr of a command that gets the signal after so many seconds; all its processes end with it."""
    parts = ("", "kernels", "export", "engines")
    environment = {
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in parts),
        "TMPDIR": str(folder / "temporary"),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; from trip_rt.launch import {command}; sys.exit({command}())", *arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job would ignore it
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=moment)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return process.returncode, err


def _remove(folder, given):
    for path in folder.iterdir():
        if path.name not in given:
            subprocess.run(["rm", "-r", path], check=True)
