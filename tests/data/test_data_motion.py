"""The control of real videos: their own optical flow."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
from small_videos import write_video
from tiny import TINY

from trip_reference.data import motion
from trip_reference.data.cache import CachedClips
from trip_reference.data.command import main
from trip_reference.data.motion import motion_of
from trip_reference.demo_world import world
from trip_reference.demo_world.paths import render_places
from trip_rt.control import MOTION_UNIT
from trip_rt.errors import InputError

CONFIG = dataclasses.replace(TINY.trip, num_frames=8, height=128, width=128, vae_scale_factor=8)
SCENE = world.Scene("red", "star", 0.4, 0.5, 0.2, 0.1, "rings", 3)
PLACES = np.linspace([0.4, 0.5], [0.55, 0.45], 8)


@pytest.fixture(scope="module")
def frames():
    return render_places(SCENE, PLACES, 128)


def test_all_of_a_clip_moves_as_it_is_seen_to(frames, monkeypatch):
    monkeypatch.setattr(motion, "PATHS", 0)
    control = motion_of(frames, CONFIG, np.random.default_rng(0))
    assert control.shape == (3, 8, 16, 16) and control.dtype == np.float32
    np.testing.assert_allclose(control[:2, 0], 0, atol=0.02)
    x, y = (PLACES[-1] * 16).astype(int)
    across, down, known = control[:, -1, y, x]
    np.testing.assert_allclose([across, down], np.array([0.15, -0.05]) / MOTION_UNIT, atol=0.08)
    assert known > 0.8 and control[2].max() <= 1.001
    np.testing.assert_allclose(control[:2, :, 1, 1], 0, atol=0.02)  # a corner of the background


def test_a_point_is_followed_as_a_path_would_be_drawn(frames, monkeypatch):
    monkeypatch.setattr(motion, "PATHS", 1)
    last = np.stack([motion_of(frames, CONFIG, np.random.default_rng(seed))[:, -1] for seed in range(12)])
    moved = [map_[:2].reshape(2, -1)[:, map_[2].argmax()] / map_[2].max() for map_ in last]
    # Most of what is drawn lies on the star, as that is what moves.
    near = [np.abs(by - np.array([0.15, -0.05]) / MOTION_UNIT).max() < 0.15 for by in moved]
    assert sum(near) >= 8
    assert all(map_[2].max() > 0.5 and (map_[2] > 0.1).mean() < 0.5 for map_ in last)


def test_a_cache_of_videos_with_their_motion(trained, tmp_path, frames):
    (tmp_path / "data").mkdir()
    write_video(tmp_path / "data" / "a.mp4", list(frames), fps=4)
    entries = [{"video_path": "a.mp4", "text": "a red star moves"}]
    (tmp_path / "data" / "annotations.json").write_text(json.dumps(entries))
    given = ["cache", str(tmp_path / "data"), str(trained), "-o", str(tmp_path / "cache"), "--start", "first"]
    assert main([*given, "--motion"]) == 0
    cached = CachedClips(tmp_path / "cache")
    control = cached.clip(0, np.random.default_rng(0)).control
    assert control is not None and list(control.shape) == cached.index["control"] == [3, 3, 4, 4]
    assert control[:2, -1].abs().max() > 0.05


def test_without_opencv_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InputError, match=r"OpenCV is not installed; pip install 'trip-rt\[larger\]'"):
        motion.WithMotion([], CONFIG)
