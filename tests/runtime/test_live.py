"""Clips without end: which frames are shown, what a new sentence changes, and how it ends."""

import json
import subprocess
import sys
import threading
import time
from contextlib import closing
from itertools import islice

import numpy as np
import pytest

from trip_rt import InputError, Settings, terminal
from trip_rt.live import Live

PROMPT = "a red ball rolls to the right"
FAST = Settings(num_inference_steps=1)


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)


class Watched:
    """An animator whose `more` is seen, and may be slowed down or fail."""

    def __init__(self, animator, before_more=lambda prompt: None):
        self._animator, self._before_more, self.told = animator, before_more, []

    def __getattr__(self, name):
        return getattr(self._animator, name)

    def __call__(self, *args, **kwargs):
        return self._animator(*args, **kwargs)

    def more(self, first, last, prompt, *rest):
        self.told.append(prompt)
        self._before_more(prompt)
        return self._animator.more(first, last, prompt, *rest)


def shown(live, count):
    with closing(live.frames()) as frames:
        return np.stack(list(islice(frames, count)))


def test_frames_are_those_of_a_clip_that_goes_on(tiny_animator, picture):
    live = Live(tiny_animator, picture, PROMPT, seed=3, fps=60, settings=FAST)
    clip = tiny_animator(picture, PROMPT, seed=3, settings=FAST)
    for _ in range(3):
        clip = tiny_animator.extend(clip, PROMPT, settings=FAST)
    np.testing.assert_array_equal(shown(live, 14), clip.frames[:14])
    assert live.pace.shown == 14 and live.pace.heard == []
    assert not any(thread.name == "live" for thread in threading.enumerate())


def test_frames_are_not_shown_before_their_time(tiny_animator, picture):
    live = Live(tiny_animator, picture, PROMPT, fps=25, settings=FAST)
    began = time.monotonic()
    shown(live, 11)
    assert time.monotonic() - began >= 10 / 25 - 0.01


def test_a_new_sentence_replaces_what_is_not_shown_yet(tiny_animator, picture):
    animator = Watched(tiny_animator)
    live = Live(animator, picture, PROMPT, seed=3, fps=20, settings=FAST)
    plain = tiny_animator(picture, PROMPT, seed=3, settings=FAST)
    with closing(live.frames()) as frames:
        seen = list(islice(frames, 2))
        live.say("a red ball falls")
        live.say("a red ball grows")
        while not live.pace.heard:
            seen.append(next(frames))
            assert len(live._waiting) <= 2 * 4 and len(seen) < 400
        seen.extend(islice(frames, 5))
    assert len(live.pace.heard) == 1 and animator.told[-1] == "a red ball grows"
    same = [np.array_equal(one, other) for one, other in zip(seen, plain.frames, strict=False)]
    assert all(same[:2])
    assert "a red ball falls" not in animator.told[-2:]


def test_slow_engines_are_late_and_lose_nothing(tiny_animator, picture):
    animator = Watched(tiny_animator, lambda prompt: time.sleep(0.15))
    live = Live(animator, picture, PROMPT, seed=3, fps=100, settings=FAST)
    clip = tiny_animator.extend(tiny_animator(picture, PROMPT, seed=3, settings=FAST), PROMPT, settings=FAST)
    np.testing.assert_array_equal(shown(live, 9), clip.frames)
    assert live.pace.late >= 1


def test_what_fails_in_the_making_is_raised_where_frames_are_taken(tiny_animator, picture):
    calls = []

    def fail(prompt):
        calls.append(prompt)
        if len(calls) > 2:
            raise InputError("gpu: found none, expected one")

    live = Live(Watched(tiny_animator, fail), picture, PROMPT, fps=100, settings=FAST)
    with pytest.raises(InputError, match=r"^gpu: found none"):
        shown(live, 100)
    assert live.pace.shown == 9


def test_what_is_no_live_clip_is_refused(tiny_animator, picture):
    for changes, says in (
        ({"settings": Settings(num_frames=9)}, "num_frames: found one, expected none"),
        ({"settings": Settings(size="96x64")}, "size: found one, expected none"),
        ({"fps": 0}, "fps: found 0"),
        ({"seed": -1}, "seed: found -1"),
    ):
        with pytest.raises(InputError, match="^" + says):
            Live(tiny_animator, picture, PROMPT, **changes)
    live = Live(tiny_animator, picture, PROMPT, settings=FAST)
    with pytest.raises(InputError, match=r"^prompt: found an empty one"):
        live.say(" ")


def animate(*words, stdin=""):
    code = "import sys; from trip_rt.animate import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)


def test_the_command(tiny_bundle, picture, tmp_path):
    from PIL import Image

    Image.fromarray(picture).save(tmp_path / "photo.png")
    options = ["--live", "--seconds", 1, "--steps", 1, "--fps", 20, "--json"]
    given = [tiny_bundle, tmp_path / "photo.png", PROMPT, *options, "-o", tmp_path / "clip.webp"]
    ran = animate(*given, stdin="a red ball falls\n\n")
    figures = json.loads(ran.stdout)
    assert ran.returncode == 0 and figures["shown"] == 20 and figures["output"].endswith("clip.webp")
    assert "prompt: found an empty one" in ran.stderr
    with Image.open(tmp_path / "clip.webp") as clip:
        assert clip.n_frames == 20


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--live", "--frames", "9"], "found --frames beside --live"),
        (["--live", "--then", "a ball falls"], "found --then beside --live"),
        (["--live", "--contact-sheet", "a.png"], "found --contact-sheet beside --live"),
        (["--live", "-o", "clip.mp4"], "found no --seconds beside --live and -o"),
        (["--live", "-o", "clip.mp4", "--seconds", "600"], "found --seconds 600 beside --live and -o"),
        (["--live", "--seconds", "0"], "seconds: found 0"),
        (["--live", "--seed", "-1"], "seed: found -1"),
        (["-o", "clip.mp4", "--seconds", "3"], "found --seconds without --live"),
    ],
)
def test_options_that_do_not_fit(tiny_bundle, picture, tmp_path, monkeypatch, capsys, options, says):
    from PIL import Image

    from trip_rt.animate import main

    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture).save("photo.png")
    assert main([str(tiny_bundle), "photo.png", PROMPT, *options]) == 2
    assert says in capsys.readouterr().err


def test_a_picture_in_a_terminal():
    frame = np.zeros((4, 8, 3), np.uint8)
    frame[:2, :4], frame[2:, 4:] = (255, 0, 0), (0, 0, 255)
    lines = terminal.drawn(frame, 1).split("\r\n")
    assert len(lines) == 1 and lines[0].count("▀") == 4
    assert lines[0].count("\x1b[38;2;255;0;0m\x1b[48;2;0;0;0m▀") == 2
    assert lines[0].count("\x1b[38;2;0;0;0m\x1b[48;2;0;0;255m▀") == 2
    assert terminal.rows_of(128, 128, 80, 24) == 21 and terminal.rows_of(128, 128, 20, 100) == 10
