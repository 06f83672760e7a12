"""What callers hand to an Animator: taken where its meaning is clear, else refused in one line."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
from PIL import Image

from trip_rt import Animator, InputError
from trip_rt.backends import EngineOptions
from trip_rt.settings import Speed

PROMPT = "a red ball rolls to the right"


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


@pytest.fixture(scope="module")
def clip(tiny_animator, picture):
    return tiny_animator(picture, PROMPT, seed=7)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_inference_steps": 0}, "steps: found 0"),
        ({"num_inference_steps": 1001}, "steps: found 1001"),
        ({"guidance_scale": float("nan")}, "guidance scale: found nan"),
        ({"guidance_scale": -1}, "guidance scale: found -1"),
        ({"speed": "ludicrous"}, "speed: found 'ludicrous', expected exact, balanced or fast"),
        ({"speed": Speed("euler")}, "solver: found 'euler'"),
        ({"seed": -1}, "seed: found -1"),
        ({"seed": 2**64}, "seed: found"),
        ({"fit": "stretch"}, "fit: found 'stretch'"),
        ({"negative_prompt": "\udcff"}, "undecodable"),
    ],
)
def test_settings_out_of_bounds(tiny_animator, picture, settings, says):
    with pytest.raises(InputError, match=says):
        tiny_animator(picture, PROMPT, **settings)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        *(
            ({name: value}, f"{name.replace('_', '.').removeprefix('num.inference.')}: found .*expected")
            for name, values in {
                "seed": [None, 1.5, "7", True, [1]],
                "num_inference_steps": ["5", 1.5, True, [4], 0, -(2**70)],
                "feature_reuse": [1.5, "2", None.__class__],
                "guidance_scale": ["3", [3], 10**400, 1j],
                "guidance_interval": [5, "01", (1,), (0, 1, 2), ("a", "b"), (0, float("nan"))],
                "speed": [5, ["fast"]],
                "solver": [7],
                "fit": [None, 3],
                "negative_prompt": [None, 5, b"a"],
                "settings": [{"speed": "fast"}, "fast"],
                "on_step": [5],
                "prompt": [None, "", "  ", [5], 5, b"a", "\ud800"],
            }.items()
            for value in values
        ),
    ],
)
def test_plain_mistakes_are_one_line(tiny_animator, picture, changes, says):
    with pytest.raises(InputError, match=says) as caught:
        tiny_animator(picture, **({"prompt": PROMPT} | changes))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([], "a ball", {"seeds": 7}), "seeds: found 7, expected a list"),
        (("photo.png", PROMPT, {}), "pictures: found 'photo.png', expected a list"),
        ((5, PROMPT, {}), "pictures: found 5, expected a list"),
        ((np.array(5), PROMPT, {}), "pictures: found"),
        (([np.zeros((16, 16), np.uint8)], None, {}), "prompts: found None, expected a list"),
        (([np.zeros((16, 16), np.uint8)], [PROMPT], {"seeds": ["1"]}), "seed: found '1'"),
    ],
)
def test_plain_mistakes_in_batches(tiny_animator, arguments, says):
    pictures, prompts, options = arguments
    with pytest.raises(InputError, match=says):
        tiny_animator.batch(pictures, prompts, **options)


@pytest.mark.parametrize("threads", [0, -1, 1.5, 10**9, "2", True])
def test_threads_out_of_bounds(threads):
    with pytest.raises(InputError, match=r"threads: found .*expected a whole number from 1 to 256"):
        EngineOptions(threads=threads)


def test_plain_mistakes_when_opening(tiny_bundle):
    for arguments, says in (
        ((None,), "bundle: found None"),
        ((tiny_bundle, 5), "backend: found 5"),
        ((tiny_bundle, int), "backend: found"),
        ((tiny_bundle, "auto", 5), "profile: found 5"),
        ((tiny_bundle, "auto", None, {"threads": 2}), "options: found a dict"),
    ):
        with pytest.raises(InputError, match=says):
            Animator(*arguments)


def test_arrays_of_the_wrong_kind(tiny_animator, picture):
    config = tiny_animator.config
    for latents in (None, np.zeros(config.latent_shape), np.zeros((1, *config.latent_shape), np.float32)):
        with pytest.raises(InputError, match=r"^latents: found .*expected"):
            list(tiny_animator.decode(latents))
    for pictures in (picture, picture[None], [picture], None):
        with pytest.raises(
            InputError, match=r"^pictures: found .*expected an? *array|^pictures: found .*expected uint8"
        ):
            tiny_animator.latents(pictures, [PROMPT], [0])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((5,), "output: found 5"),
        ((None,), "output: found None"),
        (("a.gif", "8"), "fps: found '8'"),
        (("a.gif", 0), "fps"),
    ],
)
def test_plain_mistakes_when_saving(clip, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says):
        clip.save(*arguments)
    assert not os.listdir()


def test_numbers_may_be_numpys(tiny_animator, picture, clip):
    made = tiny_animator(
        picture,
        PROMPT,
        seed=np.int64(7),
        num_inference_steps=np.int32(4),
        guidance_scale=np.float64(tiny_animator.config.guidance_scale),
    )
    assert (made.frames == clip.frames).all() and type(made.seed) is int


def test_one_sentence_is_for_all_pictures(tiny_animator, picture):
    pictures = [Image.fromarray(picture), io.BytesIO(_png(255 - picture)), picture / 255]
    clips = tiny_animator.batch(iter(pictures), PROMPT, seeds=np.arange(3), num_inference_steps=1)
    arrays = [picture, 255 - picture, picture]
    for seed, (made, array) in enumerate(zip(clips, arrays, strict=True)):
        alone = tiny_animator(array, PROMPT, seed=seed, num_inference_steps=1)
        assert made.prompt == PROMPT and (made.frames == alone.frames).all()


def _png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_uneven_batches(tiny_animator, picture):
    with pytest.raises(InputError, match="found 2 pictures, 1 prompts and 2 seeds"):
        tiny_animator.batch([picture] * 2, [PROMPT])
