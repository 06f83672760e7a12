"""Clips longer than the engines': how windows cover them, what the loop makes of them, and clips that go on."""

import dataclasses
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny import tiny_model

from trip_rt import InputError, Settings, images
from trip_rt.accuracy import psnr
from trip_rt.config import ScheduleConfig
from trip_rt.sampling.loop import denoise, initial_noise
from trip_rt.sampling.solvers import solver_steps
from trip_rt.sampling.windows import (
    DRIFT,
    MOTION,
    anchored,
    denoise_windows,
    sentence_of_window,
    shuffled_noise,
    window_starts,
    window_weights,
)

PROMPT = "a red ball rolls to the right"
SCHEDULE = ScheduleConfig("scaled_linear", 0.00085, 0.022, 1000, "trailing", 0)
SHAPES = [(16, 16), (17, 16), (29, 16), (64, 16), (256, 16), (5, 2), (9, 3), (100, 24)]


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


@pytest.fixture(scope="module")
def long(tiny_animator, picture):
    return tiny_animator(picture, PROMPT, seed=7, num_frames=12)


@pytest.mark.parametrize(("num_frames", "length"), SHAPES)
def test_windows_cover_a_clip_and_share_a_quarter_with_their_neighbours(num_frames, length):
    starts = window_starts(num_frames, length)
    assert starts[0] == 0 and starts[-1] + length == num_frames
    share = max(1, length // 4)
    assert all(1 <= later - start <= length - share for start, later in pairwise(starts))
    # No more of them than it takes.
    assert (len(starts) - 2) * (length - share) + length < num_frames or len(starts) == 1


@pytest.mark.parametrize(("num_frames", "length"), SHAPES)
def test_a_frames_weights_add_up_to_one_and_fall_towards_a_windows_ends(num_frames, length):
    starts = window_starts(num_frames, length)
    weights, total = window_weights(starts, length), np.zeros(num_frames)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + length] += weight
        assert (weight > 0).all()
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert all(weight[0] <= 0.5 and weight[0] <= weight[1] for weight in weights[1:])
    assert weights[0][0] == weights[-1][-1] == 1


def test_sentences_share_the_windows():
    starts = window_starts(64, 16)
    assert [sentence_of_window(start, 16, 64, 1) for start in starts] == [0] * 5
    assert [sentence_of_window(start, 16, 64, 2) for start in starts] == [0, 0, 1, 1, 1]
    for num_frames, length in SHAPES:
        starts = window_starts(num_frames, length)
        for count in range(1, len(starts) + 1):
            told = [sentence_of_window(start, length, num_frames, count) for start in starts]
            assert told == sorted(told) and set(told) == set(range(count)), (num_frames, length, count)


def test_noise_begins_as_a_short_clips_and_goes_on_with_its_frames_in_other_orders():
    shape = (2, 4, 3, 3)
    noise, short = shuffled_noise([5, 9], shape, 11), initial_noise([5, 9], shape)
    assert noise.shape == (2, 2, 11, 3, 3) and noise.dtype == np.float32
    np.testing.assert_array_equal(noise[:, :, :4], short)
    for row in range(2):
        known = {short[row, :, frame].tobytes(): frame for frame in range(4)}
        order = [known[noise[row, :, frame].tobytes()] for frame in range(11)]
        assert all(set(order[block : block + 4]) == set(range(4)) for block in (0, 4))
    np.testing.assert_array_equal(shuffled_noise([9], shape, 11)[0], noise[1])  # a clip's own seed alone says it


def test_an_anchored_frame_forgets_drift_and_keeps_motion():
    picture = np.zeros((1, 4, 1, 3), np.float32)
    frame = np.stack([np.full(4, size, np.float32) for size in (DRIFT, (DRIFT + MOTION) / 2, MOTION)], 1)[None, :, None]
    np.testing.assert_allclose(anchored(frame, picture)[0, 0, 0], [0, frame[0, 0, 0, 1] / 2, MOTION], rtol=1e-6)
    assert anchored(frame, picture).dtype == np.float32


class Moving:
    """Networks that know how a clip goes on from the frame that they are given: by `context` each frame."""

    def __init__(self):
        self.asked = Counter()

    def give(self, first_frame, context):
        self.first_frame, self.pace = first_frame, context

    def unet(self, step, latents):
        self.latents = latents.copy()
        self.asked[step.timestep] += 1

    def fuse(self, step):
        frames = np.arange(self.latents.shape[2], dtype=np.float32)[:, None, None]
        clean = self.first_frame[:, :, None] + self.pace * frames
        return (self.latents - step.sqrt_alpha_bar * clean) / step.sqrt_one_minus_alpha_bar


@pytest.mark.parametrize("solver", ["ddim", "unipc"])
@pytest.mark.parametrize(("num_frames", "length"), SHAPES[1:])
def test_motion_goes_on_through_all_windows(solver, num_frames, length):
    networks, first = Moving(), initial_noise([1], (3, 2, 2))
    noise = shuffled_noise([0], (3, length, 2, 2), num_frames)
    steps, starts = solver_steps(SCHEDULE, 5, solver), window_starts(num_frames, length)
    told = []
    clean = denoise_windows(
        networks, first, [np.float32(0.7)] * len(starts), noise, steps, length, lambda *at: told.append(at)
    )
    expected = first[:, :, None] + 0.7 * np.arange(num_frames)[:, None, None]
    np.testing.assert_allclose(clean, expected, atol=2e-3)
    np.testing.assert_array_equal(clean[:, :, 0], first)
    assert set(networks.asked.values()) == {len(starts)}
    assert told == [(done, 5 * len(starts)) for done in range(1, 5 * len(starts) + 1)]


def test_windows_follow_their_own_sentences():
    paces = np.array([0.7, 0.7, -0.7, -0.7, -0.7], np.float32)
    first, noise = np.zeros((1, 1, 1, 1), np.float32), shuffled_noise([0], (1, 16, 1, 1), 64)
    clean = denoise_windows(Moving(), first, paces, noise, solver_steps(SCHEDULE, 5), 16)[0, 0, :, 0, 0]
    starts = window_starts(64, 16)
    both, pace = range(starts[2], starts[1] + 16), np.diff(clean)  # frames that both sentences have a say in
    np.testing.assert_allclose(pace[: both.start], 0.7, atol=1e-2)
    np.testing.assert_allclose(pace[both.stop :], -0.7, atol=1e-2)
    assert clean.argmax() in both and np.abs(pace).max() < 1.4


def test_one_window_is_the_loop_bit_for_bit():
    first, noise = initial_noise([1], (3, 2, 2)), initial_noise([0], (3, 6, 2, 2))
    networks, steps = Moving(), solver_steps(SCHEDULE, 4, "unipc")
    networks.give(first, np.float32(0.3))
    alone = denoise(networks, first, noise, steps)
    np.testing.assert_array_equal(denoise_windows(networks, first, [np.float32(0.3)], noise, steps, 6), alone)


class OfTheModel:
    """The PyTorch model as the loop's networks."""

    def __init__(self, model):
        self.model = model

    def give(self, first_frame, context):
        self.first_frame, self.text = torch.tensor(np.concatenate([first_frame] * 2)), context

    @torch.no_grad()
    def unet(self, step, latents):
        self.latents = torch.tensor(np.concatenate([latents] * 2))
        timestep = torch.tensor([step.timestep])
        self.residual = self.model.residual_unet(self.latents, self.first_frame, timestep, self.text)

    @torch.no_grad()
    def fuse(self, step):
        values = step.sqrt_alpha_bar, step.sqrt_one_minus_alpha_bar, step.timestep
        signal, sigma, timestep = (torch.tensor([value]) for value in values)
        return self.model.fusion(self.latents, self.first_frame, self.residual, signal, sigma, timestep).numpy()


def test_engines_make_the_clip_that_the_pytorch_model_makes(tiny_animator, picture):
    animator, model = tiny_animator, tiny_model()
    fitted = animator._fitted([picture], settings := Settings(num_frames=9, guidance_scale=2))
    sentences = [PROMPT, "a red ball falls"]
    with torch.no_grad():
        texts = [model.encode_text(torch.tensor(animator._tokenizer(["", sentence]))) for sentence in sentences]
        first = model.encode_image(torch.tensor(images.to_model(fitted))).numpy()
    length = animator.config.num_frames
    contexts = [texts[sentence_of_window(start, length, 9, 2)] for start in window_starts(9, length)]
    noise = shuffled_noise([7], animator.config.latent_shape, 9)
    steps = settings.steps(animator.config)
    expected = denoise_windows(OfTheModel(model), first, contexts, noise, steps, length)
    found = animator.latents(fitted, [sentences], [7], settings=settings)
    assert found.shape == expected.shape and psnr(found, expected, np.ptp(expected)) > 80


def test_a_long_clip(tiny_animator, picture, long):
    config, told = tiny_animator.config, []
    assert long.frames.shape == (12, config.height, config.width, 3)
    assert long.latents.shape == (config.latent_channels, 12, *config.latent_shape[2:])
    again = tiny_animator(picture, PROMPT, seed=7, num_frames=12, on_step=lambda *at: told.append(at))
    np.testing.assert_array_equal(again.frames, long.frames)
    assert told == [(done, 4 * 3) for done in range(1, 4 * 3 + 1)]  # four steps of three windows
    streamed = np.stack(list(tiny_animator.stream(picture, PROMPT, seed=7, num_frames=12)))
    np.testing.assert_array_equal(streamed, long.frames)
    np.testing.assert_array_equal(tiny_animator(picture, PROMPT, seed=7).frames[0], long.frames[0])
    other = tiny_animator(picture, [PROMPT, "a red ball falls"], seed=7, num_frames=12)
    assert other.prompt == f"{PROMPT}; a red ball falls" and (other.frames[-1] != long.frames[-1]).any()
    batch = tiny_animator.batch([picture] * 2, [PROMPT, [PROMPT, "a red ball falls"]], seeds=[7, 7], num_frames=12)
    for one, alone in zip(batch, (long, other), strict=True):
        np.testing.assert_array_equal(one.frames, alone.frames)


def test_as_many_frames_as_the_engines_have_are_a_plain_clip(tiny_animator, picture):
    plain = tiny_animator(picture, PROMPT, seed=7)
    count = tiny_animator.config.num_frames
    np.testing.assert_array_equal(tiny_animator(picture, PROMPT, seed=7, num_frames=count).frames, plain.frames)


@pytest.mark.parametrize(
    ("prompt", "changes", "says"),
    [
        (PROMPT, {"num_frames": 4}, "num_frames: found 4, expected at least 5"),
        (PROMPT, {"num_frames": 0}, "num_frames: found 0, expected a whole number from 1 to 4096"),
        (PROMPT, {"num_frames": 4097}, "num_frames: found 4097"),
        (PROMPT, {"num_frames": 12.0}, "num_frames: found 12"),
        ([PROMPT, PROMPT], {}, "prompt: found 2 sentences for 5 frames, which are 1 of these engines' windows"),
        ([PROMPT] * 4, {"num_frames": 12}, "prompt: found 4 sentences for 12 frames"),
        ([], {"num_frames": 12}, "prompt: found no sentence"),
        ([PROMPT, " "], {"num_frames": 12}, "prompt: found an empty one"),
        (7, {}, "prompt: found 7"),
    ],
)
def test_bad_lengths_and_sentences(tiny_animator, picture, prompt, changes, says):
    with pytest.raises(InputError, match="^" + says.replace("'", ".")):
        tiny_animator(picture, prompt, **changes)


def test_a_clip_goes_on(tiny_animator, picture):
    config, told = tiny_animator.config, []
    clip = tiny_animator(picture, PROMPT, seed=7)
    longer = tiny_animator.extend(clip, "a red ball falls", on_step=lambda *at: told.append(at))
    each = config.num_frames - 1
    assert longer.frames.shape[0] == config.num_frames + each and longer.latents.shape[1] == len(longer.frames)
    np.testing.assert_array_equal(longer.frames[: config.num_frames], clip.frames)
    np.testing.assert_array_equal(longer.latents[:, : config.num_frames], clip.latents)
    assert (longer.prompt, longer.seed, longer.fps) == (f"{PROMPT}; a red ball falls", 8, clip.fps)
    assert told == [(done, 4) for done in range(1, 5)]
    # The new frames are those of a run that begins at the last one, as decoded from the same latents.
    decoded = np.concatenate(list(tiny_animator.decode(longer.latents)))
    assert np.abs(decoded.astype(int) - longer.frames).max() <= 1


def test_a_clip_goes_on_for_any_number_of_frames(tiny_animator, picture):
    clip, told = tiny_animator(picture, PROMPT, seed=7), []
    longer = tiny_animator.extend(clip, PROMPT, num_frames=10, on_step=lambda *at: told.append(at))
    assert len(longer.frames) == len(clip.frames) + 10 and longer.seed == 10 and longer.prompt == PROMPT
    assert told == [(done, 12) for done in range(1, 13)]
    step = tiny_animator.extend(clip, PROMPT)
    twice = tiny_animator.extend(tiny_animator.extend(step, PROMPT), PROMPT, num_frames=2)
    np.testing.assert_array_equal(twice.frames, longer.frames)
    other = tiny_animator.extend(clip, PROMPT, seed=99)
    assert (other.frames[-1] != step.frames[-1]).any() and other.seed == 99


def test_a_clip_of_frames_alone_goes_on_too(tiny_animator, picture):
    clip = tiny_animator(picture, PROMPT, seed=7)
    bare = tiny_animator.extend(dataclasses.replace(clip, latents=None), PROMPT)
    assert bare.latents is None and len(bare.frames) == 9
    np.testing.assert_array_equal(bare.frames[:5], clip.frames)
    new = tiny_animator.follow(clip.frames[0], clip.frames[-1], PROMPT, 8)
    np.testing.assert_array_equal(np.concatenate(list(tiny_animator.decode(new))), bare.frames[5:])
    with pytest.raises(InputError, match=r"^last: found uint8"):
        tiny_animator.follow(clip.frames[0], clip.frames[-1, :16], PROMPT, 8)


def test_what_cannot_go_on_is_refused(tiny_animator, picture):
    clip = tiny_animator(picture, PROMPT, seed=7)
    for wrong, says in (
        (clip.frames, "animation: found a ndarray, expected an Animation"),
        (dataclasses.replace(clip, frames=clip.frames[:, :16]), "animation.frames: found uint8"),
        (dataclasses.replace(clip, latents=clip.latents[:, :2]), "animation.latents: found float32"),
    ):
        with pytest.raises(InputError, match="^" + says):
            tiny_animator.extend(wrong, PROMPT)
    for prompt, changes, says in (
        ("", {}, "prompt: found an empty one"),
        (PROMPT, {"num_frames": 0}, "num_frames: found 0"),
        (PROMPT, {"seed": -1}, "seed: found -1"),
    ):
        with pytest.raises(InputError, match="^" + says):
            tiny_animator.extend(clip, prompt, **changes)
