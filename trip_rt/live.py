"""An endless clip, shown at its own rate while its next frames are being made; its sentence may change as it plays."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trip_rt.animator import Animator
from trip_rt.errors import InputError
from trip_rt.images import Picture
from trip_rt.sampling.loop import Array
from trip_rt.settings import Settings, check_prompt
from trip_rt.video import check_fps

LATE = 0.5  # of a frame's time


@dataclass
class Pace:
    """How it went: frames `shown`, how many of them `late` by more than half a frame's time, and the seconds from each
    new sentence to its first frame."""

    shown: int = 0
    late: int = 0
    heard: list[float] = field(default_factory=list)


class _Frame(NamedTuple):
    picture: NDArray[np.uint8]  # [H, W, 3]
    latent: Array  # [C, h, w], clean
    sentence: int  # a count of those said


class _Ended(Exception):
    """Nobody takes frames any more."""


class _Overtaken(Exception):
    """Another sentence has come."""


class Live:
    """`frames()` shows a clip of `image` that never ends; `say` tells it what happens next.

    A clip's windows are made one after the other, each from the last frame of the one before (Animator.more), and the
    next one is begun while at most a window's frames are still to be shown. A new sentence drops those that cannot be
    shown before a window could be made: it begins at the earliest frame that will be ready in time. Its first window
    takes a third of the steps of the others, so that it is there sooner.

    The first window is made at once: InputError for all that a call of `animator` would refuse.
    """

    def __init__(
        self,
        animator: Animator,
        image: Picture,
        prompt: str,
        *,
        seed: int = 0,
        fps: float | None = None,
        settings: Settings | None = None,
    ):
        settings = Settings(speed="fast") if settings is None else settings
        if settings.num_frames is not None:
            raise InputError("num_frames: found one, expected none: a live clip has no end")
        if settings.size is not None:
            raise InputError("size: found one, expected none: a live clip is of the engines' size")
        self.fps = float(animator.config.fps if fps is None else fps)
        check_fps(self.fps)
        if animator.config.num_frames < 2:
            raise InputError("live: found engines of one frame, expected some that show a motion to go on with")
        self._animator, self._settings, self.pace = animator, settings, Pace()
        steps = len(settings.steps(animator.config))
        self._sooner = dataclasses.replace(settings, num_inference_steps=math.ceil(steps / 3))
        clip = animator(image, prompt, seed=seed, settings=settings)
        assert clip.latents is not None
        self._prompt, self._said, self._said_at = prompt, 0, 0.0
        self._waiting = deque(_frames(clip.frames, clip.latents, 0))  # to be shown
        self._first = self._last = self._waiting[0]
        self._seed, self._takes = seed, 0.0
        began = time.monotonic()  # how long it takes until a new sentence's first frames are there
        next(animator.decode(animator.more(self._first.latent, self._first.latent, prompt, seed, self._sooner)))
        self._takes = time.monotonic() - began
        self._shown, self._due = 0, 0.0  # frames that have left `_waiting`, and when the next one should
        self._made_for = 0  # the newest sentence with frames
        self._changed, self._ended = threading.Condition(), False
        self._failure: BaseException | None = None

    def say(self, prompt: str) -> None:
        """Go on by another sentence; InputError for what is none."""
        check_prompt(prompt)
        with self._changed:
            self._prompt, self._said, self._said_at = prompt, self._said + 1, time.monotonic()
            self._changed.notify_all()

    def frames(self) -> Generator[NDArray[np.uint8], None, None]:
        """uint8 [H, W, 3], each at its time. It ends when the caller stops taking them."""
        maker = threading.Thread(target=self._make, name="live", daemon=True)
        self._due, told = time.monotonic(), 0
        maker.start()
        try:
            while True:
                time.sleep(max(0.0, self._due - time.monotonic()))
                frame = self._next()
                now = time.monotonic()
                if now - self._due > LATE / self.fps:
                    self.pace.late += 1
                    self._due = now
                if frame.sentence > told:
                    told = frame.sentence
                    if told == self._said:
                        self.pace.heard.append(now - self._said_at)
                self.pace.shown += 1
                self._due += 1 / self.fps
                yield frame.picture
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            maker.join()

    def _next(self) -> _Frame:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._failure)
            if not self._waiting:
                assert self._failure
                raise self._failure
            self._last = self._waiting.popleft()
            self._shown += 1
            self._changed.notify_all()
            return self._last

    def _make(self) -> None:
        try:
            while True:
                with suppress(_Overtaken):
                    self._make_window()
        except _Ended:
            pass
        except BaseException as error:  # the caller's to see, where it takes its next frame
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _make_window(self) -> None:
        each = self._animator.config.num_frames - 1
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._said > self._made_for or len(self._waiting) <= each)
            prompt, said = self._prompt, self._said
            kept, is_new = len(self._waiting), said > self._made_for
            if is_new:  # as many as are shown until the new ones are there
                ready = time.monotonic() + self._takes
                kept = min(kept, max(0, math.ceil((ready - self._due) * self.fps)))
            origin = self._waiting[kept - 1] if kept else self._last
            cut = self._shown + kept  # what is shown so far, and what will be before the new frames
        self._go_on(said)
        began = time.monotonic()
        self._seed = (self._seed + 1) % 2**64
        settings = self._sooner if is_new else self._settings
        latents = self._animator.more(
            self._first.latent, origin.latent, prompt, self._seed, settings, lambda *_: self._go_on(said)
        )
        decoded = 0
        for pictures in self._animator.decode(latents):
            with self._changed:
                if not decoded:
                    if is_new:
                        self._takes = max(time.monotonic() - began, 0.9 * self._takes)
                    # Where it took longer than it used to, a frame or two are shown once more in another way.
                    while len(self._waiting) > max(0, cut - self._shown):
                        self._waiting.pop()
                    self._made_for = said
                chunk = latents[:, decoded : decoded + len(pictures)]
                self._waiting.extend(_frames(pictures, chunk, said))
                decoded += len(pictures)
                self._changed.notify_all()
            self._go_on(said)

    def _go_on(self, said: int) -> None:
        """Leave a window that nobody will see; not the last frames there are, for however many sentences."""
        if self._ended:
            raise _Ended
        if self._said > said and self._waiting:
            raise _Overtaken


def _frames(pictures: NDArray[np.uint8], latents: Array, sentence: int) -> list[_Frame]:
    """Of [n, H, W, 3] and [C, n, h, w]."""
    return [_Frame(*frame, sentence) for frame in zip(pictures, np.moveaxis(latents, 1, 0), strict=True)]
