"""Clips larger than the engines': the picture's own detail, moved as the clip moves."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from trip_reference.demo_world import world
from trip_rt import InputError, Settings
from trip_rt.accuracy import psnr
from trip_rt.animate import main
from trip_rt.config import MOST_SIDE
from trip_rt.enlarge import enlarged

PROMPT = "a red ball rolls to the right"


def plain(frames, size):
    """The same by a bicubic filter."""
    larger = (Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC) for frame in frames)
    return np.stack([np.asarray(frame) for frame in larger])


@pytest.mark.parametrize(("motion", "gain"), [("left", 1.5), ("down", 2), ("spins", 0.2), ("grows", 2), ("still", 20)])
def test_the_object_is_sharper_and_the_background_is_the_pictures(motion, gain):
    scene = world.Scene("green", "square", 0.5, 0.45, 0.18, 0.1, "stripes", 3)
    small, truth = (world.render(scene, motion, 16, size) for size in (128, 256))
    large, bicubic = np.stack(list(enlarged(small, truth[0]))), plain(small, 256)
    assert large.shape == truth.shape and large.dtype == np.uint8
    near = np.stack([shape > 0.01 for shape in world.mask(scene, motion, 16, 256)])
    apart = ~near & ~near[:1]
    assert psnr(large[near], truth[near], 255, 100) > psnr(bicubic[near], truth[near], 255, 100) + gain
    assert psnr(large[apart], truth[apart], 255, 100) > 45


def test_a_clip_at_rest_is_the_picture_whatever_the_decoder_did_to_it():
    picture = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    dull = np.asarray(Image.fromarray(picture).resize((45, 30))) // 2
    for frame in enlarged([dull] * 3, picture):
        np.testing.assert_array_equal(frame, picture)


def test_what_comes_into_view_is_the_clips():
    picture, small = np.full((64, 64, 3), 100, np.uint8), np.full((2, 32, 32, 3), 100, np.uint8)
    small[1, 8:24, 8:24] = (250, 20, 20)
    _, frame = enlarged(small, picture)
    assert np.abs(frame[32, 32].astype(int) - (250, 20, 20)).max() <= 2
    np.testing.assert_array_equal(frame[:6], picture[:6])


def test_light_that_changes_everywhere_changes_the_picture():
    picture = np.random.default_rng(1).integers(60, 120, (64, 64, 3), np.uint8)
    small = np.asarray(Image.fromarray(picture).resize((32, 32), Image.Resampling.BOX))
    _, frame = enlarged([small, small + 20], picture)
    assert 14 < float(np.mean(frame.astype(float) - picture)) < 21


def test_frames_are_made_one_at_a_time():
    asked = []

    def frames():
        for index in range(3):
            asked.append(index)
            yield np.zeros((20, 20, 3), np.uint8)

    made = enlarged(frames(), np.zeros((40, 40, 3), np.uint8))
    assert [len(asked) for _ in made] == [1, 2, 3]
    assert next(enlarged([np.zeros((4, 6, 3), np.uint8)] * 2, np.zeros((8, 12, 3), np.uint8))).shape == (8, 12, 3)


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (130, 190, 3), np.uint8)


def test_a_call_and_a_stream_make_larger_clips(tiny_animator, picture):
    clip = tiny_animator(picture, PROMPT, seed=3, size="144x96", num_frames=7)
    assert clip.frames.shape == (7, 96, 144, 3) and clip.latents.shape[1] == 7
    streamed = np.stack(list(tiny_animator.stream(picture, PROMPT, seed=3, size="144x96", num_frames=7)))
    np.testing.assert_array_equal(streamed, clip.frames)
    own = tiny_animator(picture, PROMPT, seed=3, size="48x32")
    np.testing.assert_array_equal(own.frames, tiny_animator(picture, PROMPT, seed=3).frames)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("96x96", "size: found 96x96, expected the engines' own, 48x32, or a larger one of that shape, such as 96x64"),
        ("24x16", "or a larger one"),
        ("96", "expected WIDTHxHEIGHT such as 256x256"),
        ("x", "expected WIDTHxHEIGHT"),
        ("-96x64", "expected WIDTHxHEIGHT"),
        ("0x0", "expected WIDTHxHEIGHT"),
        ("9" * 5000 + "x1", "expected WIDTHxHEIGHT"),
        ((96, 64), "expected WIDTHxHEIGHT"),
        (f"{MOST_SIDE + 1}x{MOST_SIDE}", "up to 8192"),
        ("8160x5440", "GiB, expected at most 1"),
    ],
)
def test_a_size_that_cannot_be_is_refused(tiny_animator, picture, size, message):
    with pytest.raises(InputError, match=message):
        tiny_animator(picture, PROMPT, size=size, num_frames=20)


def test_a_clip_that_goes_on_is_not_enlarged_unasked(tiny_animator, picture):
    clip = tiny_animator(picture, PROMPT)
    with pytest.raises(InputError, match=r"size: found 96x64 for a clip that goes on.*enlarge.enlarged"):
        tiny_animator.extend(clip, PROMPT, size="96x64")


def test_without_opencv_a_line_says_what_to_install(tiny_animator, picture, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InputError, match=r"OpenCV is not installed; pip install 'trip-rt\[larger\]'"):
        tiny_animator(picture, PROMPT, size="96x64")
    assert Settings(size="96x64").picture_size(tiny_animator.config) == (64, 96)


def test_the_command_makes_larger_clips_and_goes_on(tiny_bundle, tmp_path, monkeypatch, picture, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture).save("photo.png")
    given = [str(tiny_bundle), "photo.png", PROMPT, "-o", "clip", "--size", "96x64"]
    assert main([*given, "--then", "it falls"]) == 0
    frames = sorted((tmp_path / "clip").glob("*.png"))
    assert len(frames) == 9 and {Image.open(path).size for path in frames} == {(96, 64)}
    assert "enlarge" in capsys.readouterr().out
    assert main([*given[:-1], "96x65"]) == 2
    assert main([*given[:3], *given[5:], "--live", "--seconds", "1"]) == 2
    told = capsys.readouterr().err
    assert "size: found 96x65" in told and "found --size beside --live" in told
