"""A worker: holds the engines of a bundle and makes the clips that the server hands it, in a process of its own.

Three threads: one runs the engines, one listens to the server, one encodes what is decoded while the engines are at
work on the next clips. It ends with the server, whatever ends that.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import socket
import sys
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trip_rt.animator import Animator
from trip_rt.backends import EngineOptions
from trip_rt.errors import EngineError, InputError, one_line
from trip_rt.process_memory import peak_memory_mb
from trip_rt.serving import results
from trip_rt.serving.protocol import (
    Clip,
    Decoded,
    Denoised,
    Drop,
    Dropped,
    Failed,
    Made,
    Make,
    Open,
    Ready,
    Refused,
    Server,
    Stepped,
    WorkerEnd,
)
from trip_rt.settings import Settings

Frames = NDArray[np.uint8]
_NICE = 5


class _AllDropped(Exception):
    """Nobody wants any of these clips any more."""


def open_animator(opening: Open) -> Animator:
    """The engines that the server asks for; InputError or EngineError where they cannot be opened."""
    options = EngineOptions(opening.device, opening.threads)  # type: ignore[arg-type]
    return Animator(opening.bundle, opening.backend, opening.profile, options)


class Worker:
    """Answers the server's messages until it is gone.

    `opener` opens a bundle; of those that were, the `kept` last used stay open.
    """

    def __init__(self, server: Server, opener: Callable[[Open], Animator] = open_animator, kept: int = 1):
        self._server, self._opener, self._kept = server, opener, kept
        self._inbox: queue.SimpleQueue[Open | Make] = queue.SimpleQueue()
        self._unencoded: queue.Queue[tuple[Clip, Frames, dict[str, float], tuple[str, ...]]] = queue.Queue(maxsize=1)
        self._open: OrderedDict[Open, tuple[Animator, Ready]] = OrderedDict()
        self._mine: set[str] = set()  # jobs handed over and not yet answered
        self._dropped: set[str] = set()  # of these, those that nobody wants any more

    def run(self) -> int:
        """Exit code 2 where the first bundle cannot be opened; otherwise it does not return."""
        opening = self._server.receive()
        if not isinstance(opening, Open):
            return 0
        self._inbox.put(opening)
        folder = Path(opening.results)
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._encode, args=[folder], daemon=True).start()
        animator: Animator | None = None
        was_ever_open, refusal = False, ""
        while True:
            message = self._inbox.get()
            try:
                if isinstance(message, Open):
                    animator = None
                    animator = self._opened(message)
                    was_ever_open = True
                elif animator is None:
                    raise EngineError(refusal)
                else:
                    self._make(animator, message)
            except _AllDropped:
                assert isinstance(message, Make)
                self._server.send(Denoised(_jobs(message)))
                for clip in message.clips:
                    self._answer(clip, Dropped(clip.job, clip.attempt))
            except (InputError, EngineError) as error:
                refusal = one_line(error, 2000)
                if isinstance(message, Open):
                    self._server.send(Refused(refusal))
                    if not was_ever_open:
                        return 2
                    continue
                code = "invalid_request" if isinstance(error, InputError) else "engine_error"
                self._server.send(Denoised(_jobs(message)))
                for clip in message.clips:
                    self._answer(clip, Failed(clip.job, clip.attempt, code, refusal[:500]))

    def _opened(self, opening: Open) -> Animator:
        """The engines of a bundle, warm; the server is told that they are ready."""
        if opening not in self._open:
            while len(self._open) >= self._kept:  # before there are more: memory holds as many, and no more
                self._open.popitem(last=False)[1][0].close()
            animator = self._opener(opening)
            self._open[opening] = animator, self._warmed_up(animator, Path(opening.results))
        self._open.move_to_end(opening)
        animator, ready = self._open[opening]
        self._server.send(ready)
        return animator

    def _listen(self) -> None:
        while (message := self._server.receive()) is not None:
            if isinstance(message, Drop):
                self._dropped.update({message.job} & self._mine)
                continue
            if isinstance(message, Make):
                self._mine.update(_jobs(message))
            self._inbox.put(message)
        os._exit(0)  # the server is gone: whatever the engines are doing is nobody's

    def _warmed_up(self, animator: Animator, folder: Path) -> Ready:
        """Make a clip of two steps and the files of one, so that the first that is asked for takes no longer than the
        others, and measure."""
        config = animator.config
        grey = np.full((1, config.height, config.width, 3), 128, np.uint8)
        moments: list[float] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of words that a model does not know
            for _ in range(2):
                began = time.perf_counter()
                latents = animator.latents(
                    grey, ["."], [0], num_inference_steps=2, on_step=lambda *_: moments.append(time.perf_counter())
                )
            # What is faster here is measured now, and not while a clip waits.
            animator.latents(grey, ["."], [0], num_inference_steps=1, arithmetic="auto")
        denoised = time.perf_counter()
        frames = np.concatenate(list(animator.decode(latents[0])))
        with results.draft(folder, results.warm_up_name(os.getpid())) as draft:
            results.write(draft, frames, config.fps)
        step_s = moments[-1] - moments[-2]
        other_s = time.perf_counter() - denoised + max(0.0, moments[-2] - began - step_s)
        parity = animator.profile.parity.get(animator.backend, {})
        return Ready({"backend": animator.backend, **animator.describe()}, parity, step_s, other_s)

    def _make(self, animator: Animator, make: Make) -> None:
        jobs = _jobs(make)
        began = time.perf_counter()
        pictures = np.stack([_pixels(clip.picture) for clip in make.clips])
        controls = [None if clip.path is None else animator.path(clip.path) for clip in make.clips]

        def stepped(done: int, total: int) -> None:
            if self._dropped.issuperset(jobs):
                raise _AllDropped
            self._server.send(Stepped(jobs, done))

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            settings, (clip, *_) = Settings(**make.settings), make.clips
            if clip.origin is not None:
                origin = _pixels(clip.origin)
                latents = animator.follow(
                    pictures[0], origin, clip.prompt, clip.seed, settings=settings, on_step=stepped
                )[None]
            else:
                latents = animator.latents(
                    pictures,
                    [clip.prompt for clip in make.clips],
                    [clip.seed for clip in make.clips],
                    controls=controls,
                    settings=settings,
                    on_step=stepped,
                )
        said = tuple(dict.fromkeys(one_line(warning.message, 500) for warning in caught))
        seconds = {"denoise": time.perf_counter() - began}
        self._server.send(Denoised(jobs))
        for clip, clean, picture in zip(make.clips, latents, pictures, strict=True):
            began = time.perf_counter()
            chunks: list[Frames] = []
            for chunk in animator.decode(clean, picture):
                if clip.job in self._dropped:
                    break
                self._server.send(Decoded(clip.job, chunk.shape, chunk.tobytes()))
                chunks.append(chunk)
            if clip.job in self._dropped:
                self._answer(clip, Dropped(clip.job, clip.attempt))
            else:
                decoded = seconds | {"decode": time.perf_counter() - began}
                self._unencoded.put((clip, np.concatenate(chunks), decoded, said))

    def _encode(self, folder: Path) -> None:
        while True:
            clip, frames, seconds, said = self._unencoded.get()
            if clip.job in self._dropped:
                self._answer(clip, Dropped(clip.job, clip.attempt))
                continue
            began = time.perf_counter()
            try:
                with results.draft(folder, clip.draft, keep=True) as draft:
                    size = results.write(draft, frames, clip.fps)
            except (InputError, OSError) as error:
                self._answer(clip, Failed(clip.job, clip.attempt, "storage", one_line(error, 500)))
                continue
            seconds = {name: round(value, 4) for name, value in seconds.items()}
            seconds["encode"] = round(time.perf_counter() - began, 4)
            self._answer(clip, Made(clip.job, clip.attempt, seconds, said, size, peak_memory_mb()))

    def _answer(self, clip: Clip, answer: Made | Failed | Dropped) -> None:
        """The last that the server hears of a clip."""
        self._mine.discard(clip.job)
        self._dropped.discard(clip.job)
        self._server.send(answer)


def _jobs(make: Make) -> tuple[str, ...]:
    return tuple(clip.job for clip in make.clips)


def _pixels(png: bytes) -> Frames:
    with Image.open(BytesIO(png), formats=["PNG"]) as image:
        return np.asarray(image.convert("RGB"))


def _end_with_parent() -> None:
    """On Linux, have the system end this process with the one that started it, even while an engine holds Python's
    lock."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def end_with_thread(error: threading.ExceptHookArgs) -> None:
    """End the process where one of its threads fails: the server replaces it, and would only find it hanging."""
    threading.__excepthook__(error)
    os._exit(1)


def main() -> int:
    """`python -m trip_rt.serving.worker FD`: serve the server at the other end of that socket."""
    _end_with_parent()
    threading.excepthook = end_with_thread
    # Both reach every process of a terminal or a service; what becomes of the work is the server's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(_NICE)  # an answer to a client takes a millisecond, and should not wait for a step
    try:
        return Worker(WorkerEnd(socket.socket(fileno=int(sys.argv[1])))).run()
    except OSError:  # the server is gone
        return 0


if __name__ == "__main__":
    sys.exit(main())
