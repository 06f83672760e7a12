"""A service without worker processes, and what stands in for its clients and workers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import struct
from pathlib import Path

import msgspec
import numpy as np

from trip_reference.presets import DEMO
from trip_rt.manifest import Profile
from trip_rt.serving import results
from trip_rt.serving.jobs import NewJob
from trip_rt.serving.metrics import Metrics
from trip_rt.serving.models import Model
from trip_rt.serving.protocol import (
    Made,
)
from trip_rt.serving.results import Results
from trip_rt.serving.service import ENDS, Service
from trip_rt.serving.store import JobStore

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)
SECONDS = {"denoise": 0.4, "decode": 0.1, "encode": 0.1}
WAIT = 20.0  # seconds until a test gives up


def run(test):
    """The coroutine, which must come to an end."""
    asyncio.run(asyncio.wait_for(test, WAIT))


def model(batch=1):
    config = dataclasses.replace(DEMO.trip, num_frames=5, height=32, width=48, num_inference_steps=4)
    return Model("tiny", Path("bundle"), Profile(5, 32, 48, batch, 5, 64, (1, 8, 4, 6), {}, {}, "", {}), config)


@contextlib.asynccontextmanager
async def serving(folder, batch=1, most_queued=100, clock=None):
    """A service without workers."""
    kept = JobStore(f"sqlite:///{folder / 'jobs.db'}", 60, **({"clock": clock} if clock else {}))
    service = Service({"tiny": model(batch)}, kept, Results(folder / "clips"), Metrics(), most_queued, 1 << 30)
    await service.start()
    try:
        yield service
    finally:
        await service.close()


def new(settings=None, key=None, owner=""):
    asked = settings or {}
    request = {"prompt": "a red ball rolls", "seed": 7, "size": "48x32", "num_frames": 5, "fps": 8.0, "settings": asked}
    return NewJob(owner, "tiny", request, b"a picture", 4, str(asked), str(request), key)


class Side:
    """What a worker does, one thing after another."""

    def __init__(self, service, folder):
        self._service, self._clips = service, folder / "clips"
        self.told_to_drop = []

    async def claim(self):
        return [job for job, _ in await self._service.claim(self._service.models["tiny"], self.told_to_drop.append)]

    def draw(self, job):
        with results.draft(self._clips, f"{job.id}-{job.attempt}", keep=True) as draft:
            return results.write(draft, FRAMES, 8)

    async def make(self, job):
        """All that comes after the claim."""
        for done in range(1, 5):
            self._service.stepped(job.id, done)
        running = self._service._running.get(job.id)
        decoded = sum(map(len, running.frames)) if running else 0
        for frames in np.split(FRAMES[decoded:], [2]):
            self._service.decoded(job.id, frames)
        size = self.draw(job)
        await self._service.made(job, f"{job.id}-{job.attempt}", Made(job.id, job.attempt, SECONDS, (), size, 100.0))


class Listener:
    """Hears all of a job's events."""

    def __init__(self, service, job, start=0):
        self.events = []
        self._task = asyncio.create_task(self._listen(service, job, start))

    async def _listen(self, service, job, start):
        async for event in service.events(job, start):
            self.events.append(event)

    @property
    def names(self):
        return [name for _, name, _ in self.events]

    async def end(self):
        """The names of all, of which one alone is an end, and comes last."""
        await self._task
        assert [name for name in self.names if name in ENDS] == self.names[-1:] != []
        numbers = [number for number, _, _ in self.events]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        return self.names


def check_at_rest(service, folder, *files):
    """Nothing is remembered of jobs that are no more, and the folder holds these results."""
    assert not service._running and not service._feeds and not service._cancelled_early
    assert sorted(os.listdir(folder / "clips")) == sorted([".drafts", *files])
    assert os.listdir(folder / "clips" / ".drafts") == []
    assert (service._results.bytes > 0) == bool(files)


def framed(body):
    return struct.pack(">I", len(body)) + body


def decoded(shape, pixels):
    """Frames of a size that they may not have."""
    return msgspec.msgpack.encode({"type": "Decoded", "job": "video_1", "shape": shape, "pixels": pixels})
