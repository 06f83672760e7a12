"""Keeps the workers alive and fed: a process for each slot of each model, replaced when it dies or hangs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trip_rt.errors import InputError
from trip_rt.serving.database import StoreUnavailable
from trip_rt.serving.jobs import Failure, Job, Pictures
from trip_rt.serving.models import Model
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
    ServerEnd,
    Stepped,
    ToServer,
)
from trip_rt.serving.results import remove_draft, warm_up_name
from trip_rt.serving.service import Service

log = logging.getLogger("trip-serve")
DIED = Failure("worker_lost", "the worker process died while it made this clip")
HUNG = Failure("worker_hung", "the worker process did not go on with this clip")

_OPENING = 1800.0  # seconds that a bundle may take to open and warm up
_LEAST_HANG, _HANG_STEPS = 30.0, 100  # a worker that says nothing for that long, or so many steps' time, hangs
_SHORT_LIFE, _LONGEST_PAUSE = 30.0, 60.0  # seconds: one that dies young and idle is followed after a growing pause
_MOST_STILLBORN = 5  # workers of a slot that end before any was ready
_SEEN_EVERY = 0.5  # seconds


@dataclass(frozen=True)
class WorkerOptions:
    """How workers run: their engines' backend, device and CPU threads; `gpus` are given to them in turn. `hang_s` is
    after how many silent seconds one is given up (None: by the measured time of a step)."""

    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None
    gpus: Sequence[str] = ()
    hang_s: float | None = None


class Workers:
    """All workers of a service. `lock` is a file that each of them holds open as long as it lives."""

    def __init__(self, models: dict[str, Model], options: WorkerOptions, results: str, lock: int):
        places = [model for model in models.values() for _ in range(model.workers)]
        self._slots = [_Slot(model, index, options, results, lock) for index, model in enumerate(places)]
        self._tasks: list[asyncio.Task[None]] = []

    def spawn(self) -> None:
        """Start all processes, before there is an event loop: they take longest to be ready."""
        for slot in self._slots:
            slot.spawn()

    async def run(self, service: Service) -> None:
        """Keep them going until `stop`; InputError where a bundle cannot be opened at all."""
        self._tasks = [asyncio.create_task(slot.run(service)) for slot in self._slots]
        await asyncio.gather(*self._tasks)

    async def finish(self, grace: float) -> None:
        """Hand over no more jobs, and wait for those at work, so many seconds at most."""
        for slot in self._slots:
            slot.stopping = True
        until = time.monotonic() + grace
        while time.monotonic() < until and any(slot.jobs for slot in self._slots):
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """End all processes, and give back what they had."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for slot in self._slots:
            await slot.end(None)

    def kill(self) -> None:
        for slot in self._slots:
            slot.kill()


class _Slot:
    """One worker after another, for one model."""

    def __init__(self, model: Model, index: int, options: WorkerOptions, results: str, lock: int):
        self._model, self._index, self._options, self._results, self._lock = model, index, options, results, lock
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._server_end: ServerEnd | None = None
        self._service: Service | None = None
        self._ready = self._was_ever_ready = False
        self._stillborn = 0
        self._heard = 0.0
        self._hungry = asyncio.Event()
        self._answers: set[asyncio.Task[None]] = set()
        self._claim: asyncio.Task[list[tuple[Job, Pictures]]] | None = None  # of what is not yet handed over
        self._dropped_early: set[str] = set()  # of that, what nobody wants any more
        self._idle = asyncio.Event()  # while the worker has no jobs
        self._idle.set()
        self.jobs: dict[str, Job] = {}  # the worker's
        self.stopping = False

    def spawn(self) -> None:
        """Start the process."""
        ours, theirs = socket.socketpair()
        environment = dict(os.environ)
        if self._options.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._options.gpus[self._index % len(self._options.gpus)]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trip_rt.serving.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(), self._lock),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C of a terminal is the server's alone
                env=environment,
            )
        self._connection = ours

    async def run(self, service: Service) -> None:
        self._service = service
        pause = 0.0
        while not self.stopping:
            began = time.monotonic()
            if self._process is None:
                self.spawn()
            loss = await self._live(service)
            # A job is given up after some losses, so that workers cannot die over jobs for ever.
            needs_pause = not self.jobs and time.monotonic() - began < _SHORT_LIFE
            await self.end(loss)
            self._stillborn += not self._was_ever_ready
            if self._stillborn == _MOST_STILLBORN:
                raise InputError(
                    f"{self._model.name}: its worker ended {_MOST_STILLBORN} times before it was ready, expected"
                    " it to open the bundle; see the lines above"
                )
            service.metrics.lost_workers.labels(self._model.name).inc()
            log.error("worker lost", extra={"model": self._model.name, "why": loss.code})
            pause = min(_LONGEST_PAUSE, 2 * pause + 0.5) if needs_pause else 0.0
            await asyncio.sleep(pause)

    async def _live(self, service: Service) -> Failure:
        """Serve the process until it dies or hangs; which of the two it was."""
        assert self._connection is not None
        self._server_end, self._connection = await ServerEnd.of(self._connection), None
        self._heard = time.monotonic()
        tasks = [asyncio.create_task(work) for work in (self._listen(service), self._feed(service), self._watch())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result() or DIED
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(self, service: Service) -> Failure:
        assert self._server_end is not None
        options, model = self._options, self._model
        profile, bundle = model.profile.name, str(model.bundle)
        await self._say(Open(bundle, profile, options.backend, options.device, options.threads, self._results))
        while (message := await self._server_end.receive()) is not None:
            self._heard = time.monotonic()
            self._hear(service, message)
        return DIED

    def _hear(self, service: Service, message: ToServer) -> None:
        model = self._model
        if isinstance(message, Stepped):
            for id in self.jobs.keys() & set(message.jobs):
                service.stepped(id, message.done)
        elif isinstance(message, Decoded):
            if message.job in self.jobs:
                service.decoded(message.job, np.frombuffer(message.pixels, np.uint8).reshape(message.shape))
        elif isinstance(message, Denoised):
            self._hungry.set()
        elif isinstance(message, Made | Failed | Dropped):
            if (job := self.jobs.get(message.job)) and job.attempt == message.attempt:
                self._answered(service, job, message)
        elif isinstance(message, Ready):
            model.engine, model.parity = message.engine, message.parity
            if not self._was_ever_ready:
                model.timing.step_s, model.timing.other_s = message.step_s, message.other_s
            self._set_ready(True)
            self._was_ever_ready = True
            self._hungry.set()
            log.info("worker ready", extra={"model": model.name, "backend": message.engine["backend"]})
        elif isinstance(message, Refused):
            if not self._was_ever_ready:
                raise InputError(message.message)
            log.error("worker refused: %s", message.message, extra={"model": model.name})

    def _answered(self, service: Service, job: Job, message: Made | Failed | Dropped) -> None:
        """A job is done with: note it while the worker goes on. Until it is noted, the job is this slot's."""

        async def note() -> None:
            if isinstance(message, Made):
                await service.made(job, draft_name(job), message)
            elif isinstance(message, Failed):
                await service.failed(job, Failure(message.code, message.message))
            else:
                service.dropped(job)
            self.jobs.pop(job.id, None)
            if not self.jobs:
                self._idle.set()

        task = asyncio.create_task(note())
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _feed(self, service: Service) -> None:
        """Hand over the next jobs whenever the worker wants some. One that a worker was lost over has the worker for
        itself, so that it costs no other job a loss."""
        while True:
            await self._hungry.wait()
            if any(job.losses for job in self.jobs.values()):
                await self._idle.wait()
            changed = service.queue_changed
            if self.stopping:
                await asyncio.sleep(_SEEN_EVERY)
                continue
            try:
                # It goes on if the worker dies meanwhile: what it claims must not be forgotten.
                self._claim = asyncio.create_task(service.claim(self._model, self._drop))
                claimed = await asyncio.shield(self._claim)
            except StoreUnavailable as error:
                log.error("cannot look for jobs: %s", error)
                await asyncio.sleep(1)
                continue
            if not claimed:
                await changed.wait()
                continue
            if claimed[0][0].losses:
                await self._idle.wait()
            if self.stopping:
                continue  # `end` gives them back
            self._claim = None
            self._hungry.clear()
            self._idle.clear()
            self._heard = time.monotonic()
            self.jobs |= {job.id: job for job, _ in claimed}
            clips = tuple(clip_of(job, pictures) for job, pictures in claimed)
            await self._say(Make(clips, claimed[0][0].request["settings"]))
            for id in list(self._dropped_early):  # the worker knows them only now
                self._drop(id)
            self._dropped_early.clear()

    async def _watch(self) -> Failure:
        """Ends when the worker has been silent for too long."""
        while True:
            await asyncio.sleep(_SEEN_EVERY)
            if not self._ready:
                allowed = _OPENING
            elif self._options.hang_s is not None:
                allowed = self._options.hang_s
            else:
                allowed = hangs_after(self._model.timing.step_s)
            waits = self.jobs or not self._ready
            if waits and time.monotonic() - self._heard > allowed:
                return HUNG

    async def end(self, loss: Failure | None) -> None:
        """Kill the process, and give back what it had."""
        self.kill()
        self._hungry.clear()
        await asyncio.gather(*self._answers, return_exceptions=True)
        assert self._service is not None
        if self._claim is not None:
            with contextlib.suppress(StoreUnavailable):
                for job, _ in await self._claim:
                    await self._service.lost(job, None)  # which had no part in it
            self._claim = None
        for job in list(self.jobs.values()):
            await self._service.lost(job, loss, draft_name(job))
        self.jobs.clear()
        self._idle.set()
        self._dropped_early.clear()

    def kill(self) -> None:
        """End the process at once."""
        self._set_ready(False)
        for end in (self._server_end, self._connection):
            if end is not None:
                end.close()
        self._server_end = self._connection = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            remove_draft(Path(self._results), warm_up_name(self._process.pid))
            self._process = None

    def _drop(self, id: str) -> None:
        if id not in self.jobs:
            self._dropped_early.add(id)
            return
        task = asyncio.create_task(self._say(Drop(id)))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _say(self, message: Any) -> None:
        if self._server_end is not None:
            with contextlib.suppress(OSError):  # that it is gone is seen where it is listened to
                await self._server_end.send(message)

    def _set_ready(self, ready: bool) -> None:
        self._model.ready_workers += ready - self._ready
        self._ready = ready
        if self._service is not None:
            self._service.metrics.ready_workers.labels(self._model.name).set(self._model.ready_workers)


def hangs_after(step_s: float) -> float:
    """The seconds of silence after which a worker with jobs, whose steps take `step_s`, hangs."""
    return max(_LEAST_HANG, _HANG_STEPS * step_s)


def draft_name(job: Job) -> str:
    """Of the folder that this attempt at a job writes to."""
    return f"{job.id}-{job.attempt}"


def clip_of(job: Job, pictures: Pictures) -> Clip:
    """What a worker is told of a job."""
    request = job.request
    path = request.get("path")
    points = None if path is None else tuple((x, y) for x, y in path)
    return Clip(
        job.id,
        job.attempt,
        pictures.picture,
        request["prompt"],
        request["seed"],
        request["fps"],
        draft_name(job),
        points,
        pictures.origin,
    )
