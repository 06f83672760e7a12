"""Clips longer than an engine's: overlapping windows in time, denoised side by side and fused in ε at every step.

A window goes on from the clip's own estimate of its first frame, which the window before it gives at the same step, so
motion continues and needs no second picture. What has hardly changed there is put back to the given picture, which
keeps a long clip from drifting.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from trip_rt.sampling.loop import Array, Networks, OnStep, initial_noise
from trip_rt.sampling.step import History, Step, advance, guide, hold_first_frame, predicted_clean

# RMS differences of a latent pixel from the picture's, of latents with unit variance: up to the first they are taken
# for drift and go, from the second on for motion and stay.
DRIFT, MOTION = 0.2, 0.5


class WindowNetworks(Networks, Protocol):
    """Networks that may be given another first frame and sentence between two calls."""

    def give(self, first_frame: Array, context: Array) -> None:
        """Take a clean frame [B, C, h, w] and a text's keys and values [2B, L, K] from now on."""


def window_starts(num_frames: int, length: int) -> list[int]:
    """First frames of the windows of `length` frames that cover `num_frames`, evenly spread; neighbours share at least
    a quarter of a window."""
    share = max(1, length // 4)
    count = 1 + -(-(num_frames - length) // (length - share))
    return [round(start) for start in np.linspace(0, num_frames - length, count)]


def window_weights(starts: Sequence[int], length: int) -> Array:
    """What each window's ε counts in each of its frames, [windows, length]: 1, rising and falling linearly where
    neighbours overlap; the weights of a frame add up to 1."""
    weights = np.ones((len(starts), length), np.float32)
    total = np.zeros(starts[-1] + length, np.float32)
    for earlier, (start, following) in enumerate(pairwise(starts)):
        shared = start + length - following
        rising = (np.arange(shared, dtype=np.float32) + 0.5) / shared
        weights[earlier, length - shared :] *= 1 - rising
        weights[earlier + 1, :shared] *= rising
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + length] += weight
    return np.stack([weight / total[start : start + length] for start, weight in zip(starts, weights, strict=True)])


def sentence_of_window(start: int, length: int, num_frames: int, sentences: int) -> int:
    """Which of several sentences, which share a clip equally, is told in the middle of a window."""
    return (2 * start + length) * sentences // (2 * num_frames)


def shuffled_noise(seeds: Sequence[int], shape: Sequence[int], num_frames: int) -> Array:
    """Noise [B, C, num_frames, h, w]: the short clip's of the same seeds, of `shape` [C, F, h, w], then its frames
    again and again, each time in another order (FreeNoise, Qiu et al. 2023)."""
    clips = []
    for seed, noise in zip(seeds, initial_noise(seeds, shape), strict=True):
        orders = np.random.Generator(np.random.Philox(key=np.array([seed, 1], np.uint64)))
        frames = list(range(shape[1]))
        while len(frames) < num_frames:
            frames.extend(orders.permutation(shape[1]).tolist())
        clips.append(noise[:, frames[:num_frames]])
    return np.stack(clips)


def anchored(frame: Array, picture: Array) -> Array:
    """`frame` [B, C, h, w] with what has hardly changed since `picture` put back to it."""
    change = frame - picture
    size = np.sqrt(np.square(change).mean(axis=1, keepdims=True))
    put: Array = picture + np.clip((size - DRIFT) / (MOTION - DRIFT), 0, 1) * change
    return put


def denoise_windows(
    networks: WindowNetworks,
    first_frame: Array,
    contexts: Sequence[Array],
    noise: Array,
    steps: Sequence[Step],
    length: int,
    on_step: OnStep | None = None,
) -> Array:
    """Clean latents [B, C, N, h, w] from `noise` of that shape, by networks for `length` frames, fewer than N; frame 1
    is held at `first_frame` [B, C, h, w]. `contexts` are the windows' sentences. Steps are whole ones: deep features of
    one window are none of another's. `on_step` counts the windows of all steps."""
    starts = window_starts(noise.shape[2], length)
    weights = window_weights(starts, length)[:, None, None, :, None, None]
    latents, history = noise.copy(), History()
    done = 0
    for step in steps:
        hold_first_frame(step, latents, first_frame, noise[:, :, 0])
        fused, total = np.zeros_like(latents), np.zeros((1, 1, noise.shape[2], 1, 1), np.float32)
        for start, weight, context in zip(starts, weights, contexts, strict=True):
            given = first_frame
            if start:
                noise_there = fused[:, :, start] / total[:, :, start]
                given = anchored(predicted_clean(step, latents[:, :, start], noise_there), first_frame)
            window = slice(start, start + length)
            networks.give(given, context)
            networks.unet(step, np.ascontiguousarray(latents[:, :, window]))
            fused[:, :, window] += weight * guide(step, networks.fuse(step), len(latents))
            total[:, :, window] += weight
            done += 1
            if on_step:
                on_step(done, len(steps) * len(starts))
        latents, history = advance(step, latents, fused, history)
    latents[:, :, 0] = first_frame
    return latents
