"""bench/beyond.py: what it tells, and what it holds clips to, with the truth in place of the model."""

import argparse

import beyond
import numpy as np
import pytest

from trip_reference.demo_world import world
from trip_reference.demo_world.paths import DemoPathClips, render_places
from trip_reference.demo_world.stories import render_story
from trip_rt import Animation
from trip_rt.control import places_along
from trip_rt.sampling.windows import sentence_of_window, window_starts, window_weights


class Truth:
    """An animator that renders what it is told."""

    config = argparse.Namespace(num_frames=16, height=64, width=64)

    def __init__(self, seed=beyond.FIRST_SEED):
        self.scene, self.seed = world.sample(seed, held_out=True)[0], seed
        self.phrases = {world.caption(self.scene, motion): motion for motion in world.MOTIONS}

    def __call__(self, picture, prompt, seed, speed, num_frames=16):
        self.__init__(seed)
        sentences = [prompt] if isinstance(prompt, str) else prompt
        starts = window_starts(num_frames, 16)
        weights = np.zeros((len(starts), num_frames))
        for row, start, weight in zip(weights, starts, window_weights(starts, 16), strict=True):
            row[start : start + 16] = weight
        told = [sentence_of_window(start, 16, num_frames, len(sentences)) for start in starts]
        self.story = [self.phrases[sentences[told[window]]] for window in weights.argmax(axis=0)[1:]]
        return self._clip()

    def extend(self, clip, prompt, speed, num_frames=15):
        self.story = [*self.story, *[self.phrases[prompt]] * num_frames]
        return self._clip()

    def _clip(self):
        return Animation(render_story(self.scene, self.story), 8, "", 0)


@pytest.mark.parametrize(("make", "length"), [("_at_once", 16), ("_windows", 64), ("_chained", 64), ("_chained", 40)])
def test_what_is_told_is_what_is_judged(make, length):
    figures = beyond._judged(Truth(), 2, length, getattr(beyond, make))
    assert figures["clips"] == 2 and figures["truth_psnr"] == figures["last_psnr"] == 100
    assert all(figures[demand] == 100 for demand in ("motion", "shape", "colour", "no jump"))
    assert figures["largest step"] < 2


def test_options_out_of_bounds(capsys):
    for name, found in {"clips": "3", "seconds": "1", "paths": "0", "scenes": "0"}.items():
        assert beyond.main(["bundle", f"--{name}", found]) == 2
        assert f"{name}: found {found}" in capsys.readouterr().err


def test_tables():
    row = {"clips": 4, "motion": 100.0, "shape": 75.0, "colour": 100.0, "no jump": 100.0}
    row |= {"truth_psnr": 30.0, "last_psnr": 29.0, "seconds": 1.5}
    text = beyond.longer_table({"ways": {"64 frames, windows": row}, "stream_peak_memory_mb": {"16": 459.4}})
    assert "| 64 frames, windows | 4 | 100.0 | 75.0 | 100.0 | 100.0 | 30.0 | 29.0 | 1.5 |" in text
    assert text.endswith("Peak memory of a process that streams one: 16 frames 459 MB.")
    after = {"p50": 0.4, "p95": 0.5, "p100": 0.6}
    figures = {"seconds": 60, "fps": 8.0, "shown": 479, "late": 0, "sentences": 29, "sentence_to_frame_s": after}
    assert "479 frames, 0 late; a new sentence is shown after 0.40 s (p95 0.50, 29 of them)" in beyond.live_table(
        figures
    )


class Steered:
    """An animator whose object goes along the path that it is given, and rests without one."""

    config = argparse.Namespace(num_frames=16, height=64, width=64)

    def path(self, points):
        return points

    def __call__(self, picture, prompt, seed, control, speed):
        clips = DemoPathClips(self.config, 100, beyond.FIRST_SEED, held_out=True)
        scene, points = clips.case(seed)
        points = np.repeat(points[:1], 2, axis=0) if control is None else control
        return Animation(render_places(scene, places_along(points, 16), 64), 8, prompt, seed)


def test_a_steered_clip_is_judged_by_its_path():
    figures = beyond.control(Steered(), argparse.Namespace(paths=12))
    steered, resting = figures["steered"], figures["by the sentence alone"]
    assert steered["mean"] == steered["most"] == 0 and steered["truth_psnr"] == 100
    assert steered["always within"] == steered["shape"] == steered["colour"] == 100
    assert resting["mean"] > 3 and resting["always within"] < 50 and resting["shape"] == 100
    assert "| steered | 0.0 | 0.0 | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 |" in beyond.control_table(figures)


def test_larger_clips_are_judged_at_their_size(monkeypatch):
    monkeypatch.setattr(beyond, "_peak_memory_mb", lambda *asked: float(len(asked)))
    figures = beyond.larger(Truth(), argparse.Namespace(scenes=3, bundle="bundle"))
    assert figures["size"] == "128x128" and set(figures["stream_peak_memory_mb"]) == {"64x64", "128x128", "512x512"}
    ours, bicubic = figures["by the picture"], figures["bicubic"]
    assert ours["motion"] == ours["shape"] == 100
    assert ours["object_psnr"] > bicubic["object_psnr"] > 20 and ours["background_psnr"] > 45
    text = beyond.larger_table(figures)
    assert text.startswith("| 3 scenes, 128x128 |") and text.endswith("128x128 3 MB, 512x512 3 MB.")
