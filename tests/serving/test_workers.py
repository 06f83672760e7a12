"""A slot for workers, with a worker that does as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import subprocess
from types import SimpleNamespace

import msgspec
import pytest
from service_parts import FRAMES, SECONDS, WAIT, Side, check_at_rest, decoded, framed, new, run, serving

from trip_rt.errors import InputError
from trip_rt.serving import protocol, results, workers
from trip_rt.serving.jobs import MOST_LOSSES
from trip_rt.serving.protocol import (
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
    Stepped,
)
from trip_rt.serving.workers import DIED, WorkerOptions, Workers


class Puppet:
    """The workers of a slot: each start opens a connection, over which the test speaks."""

    def __init__(self, service, folder, hang_s=None):
        self.service, self._folder = service, folder
        options = WorkerOptions(hang_s=hang_s)
        self.workers = Workers(service.models, options, str(folder / "clips"), 0)
        (self.slot,) = self.workers._slots
        self.slot.spawn = self._spawn
        self._started = asyncio.Queue()
        self.starts = 0

    def _spawn(self):
        self.slot._connection, theirs = socket.socketpair()
        self.starts += 1
        self._started.put_nowait(theirs)

    @contextlib.asynccontextmanager
    async def at_work(self):
        running = asyncio.create_task(self.workers.run(self.service))
        try:
            yield self
        finally:
            await self.workers.stop()
            await asyncio.gather(running, return_exceptions=True)

    async def start(self, ready=True):
        """The next worker."""
        self._reader, self._writer = await asyncio.open_connection(sock=await self._started.get())
        assert isinstance(await self.hear(), Open)
        if ready:
            self.say(Ready({"backend": "none"}, {}, 0.1, 0.1))

    async def hear(self):
        (length,) = struct.unpack(">I", await self._reader.readexactly(4))
        return protocol._for_worker.decode(await self._reader.readexactly(length))

    async def hears_nothing(self):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await self._reader.readexactly(1)

    async def given(self):
        """The ids of the clips that it is to make."""
        make = await self.hear()
        assert isinstance(make, Make)
        return [clip.job for clip in make.clips]

    def say(self, *messages):
        for message in messages:
            self.say_raw(framed(msgspec.msgpack.encode(message)))

    def say_raw(self, sent):
        self._writer.write(sent)

    def die(self):
        self._writer.close()

    async def finish(self, id, attempt=1):
        """Write the clip that it has."""
        job = await self.service.get(id, "")
        size = Side(self.service, self._folder).draw(job)
        self.say(Made(id, attempt, SECONDS, (), size, 100.0))
        while (await self.service.get(id, "")).state == "in_progress":
            await asyncio.sleep(0.01)

    async def state(self, id):
        job = await self.service.get(id, "")
        return job.state, job.attempt, job.losses


@contextlib.asynccontextmanager
async def puppet(folder, **options):
    async with serving(folder) as service, Puppet(service, folder, **options).at_work() as made:
        yield made


def test_the_next_job_is_handed_over_while_one_is_decoded(tmp_path):
    async def test():
        async with puppet(tmp_path) as worker:
            first, second = [(await worker.service.add(new())).id for _ in range(2)]
            await worker.start()
            assert await worker.given() == [first]
            await worker.hears_nothing()
            worker.say(Stepped((first,), 4), Denoised((first,)))
            assert await worker.given() == [second]
            worker.say(Decoded(first, FRAMES.shape, FRAMES.tobytes()))
            await worker.finish(first)
            assert [await worker.state(id) for id in (first, second)] == [("completed", 1, 0), ("in_progress", 1, 0)]
            await worker.service.cancel(second, "")
            assert await worker.hear() == Drop(second)
            worker.say(Denoised((second,)), Dropped(second, 1))
            third = (await worker.service.add(new())).id
            assert await worker.given() == [third]
            worker.say(Failed(third, 1, "engine_error", "it does not run"))
            while (await worker.state(third))[0] != "failed":
                await asyncio.sleep(0.01)
            check_at_rest(worker.service, tmp_path, f"{first}-1")

    run(test())


def test_a_job_after_a_loss_has_the_worker_for_itself(tmp_path):
    async def test():
        async with puppet(tmp_path) as worker:
            fatal, other = [(await worker.service.add(new())).id for _ in range(2)]
            for losses in range(MOST_LOSSES):
                await worker.start()
                assert await worker.given() == [fatal]
                worker.say(Denoised((fatal,)))
                if losses:
                    await worker.hears_nothing()
                    assert (await worker.state(other))[0] == "queued"
                else:
                    assert await worker.given() == [other]  # it pays for the first time alone
                worker.die()
            await worker.start()
            assert await worker.given() == [other]
            assert await worker.state(fatal) == ("failed", MOST_LOSSES, 3) and await worker.state(other) == (
                "in_progress",
                2,
                1,
            )
            await worker.finish(other, 2)
            assert await worker.state(other) == ("completed", 2, 1)

    run(test())


async def held_back(worker):
    """A job that is being decoded, and one after a loss, which is claimed and waits for the worker to be idle."""
    service = worker.service
    begun = (await service.add(new())).id
    await worker.start()
    assert await worker.given() == [begun]
    waiting = (await service.add(new())).id
    elsewhere = await service.claim(service.models["tiny"], lambda id: None)
    await service.lost(elsewhere[0][0], DIED)
    worker.say(Denoised((begun,)))
    await worker.hears_nothing()
    assert await worker.state(waiting) == ("in_progress", 2, 1)
    return begun, waiting


def test_a_job_after_a_loss_waits_for_the_worker_to_be_idle(tmp_path):
    async def test():
        async with puppet(tmp_path) as worker:
            begun, waiting = await held_back(worker)
            await worker.service.cancel(waiting, "")  # before the worker knows of it
            await worker.hears_nothing()
            await worker.finish(begun)
            assert await worker.given() == [waiting] and await worker.hear() == Drop(waiting)
            worker.say(Denoised((waiting,)), Dropped(waiting, 2))
            another = (await worker.service.add(new())).id
            assert await worker.given() == [another]
            await worker.finish(another)
            check_at_rest(worker.service, tmp_path, f"{begun}-1", f"{another}-1")

    run(test())


def test_a_job_that_was_not_handed_over_has_no_part_in_a_loss(tmp_path):
    async def test():
        async with puppet(tmp_path) as worker:
            begun, waiting = await held_back(worker)
            worker.die()
            await worker.start()
            assert await worker.given() == [begun]
            assert await worker.state(begun) == ("in_progress", 2, 1)
            assert await worker.state(waiting) == ("queued", 2, 1)

    run(test())


def test_what_was_begun_is_given_back_without_a_loss_at_the_end(tmp_path):
    async def test():
        async with serving(tmp_path) as service:
            async with Puppet(service, tmp_path).at_work() as worker:
                begun, queued = [(await service.add(new())).id for _ in range(2)]
                await worker.start()
                assert await worker.given() == [begun]
                finishing = asyncio.create_task(worker.workers.finish(0.3))
                await asyncio.sleep(0.1)
                worker.say(Denoised((begun,)))
                await worker.hears_nothing()
                await finishing
            assert await worker.state(begun) == ("queued", 1, 0) and await worker.state(queued) == ("queued", 0, 0)
            assert not service._running

    run(test())


def test_a_silent_worker_is_replaced(tmp_path):
    async def test():
        async with puppet(tmp_path, hang_s=0.3) as worker:
            await worker.start()
            await asyncio.sleep(1)  # it has nothing to say
            id = (await worker.service.add(new())).id
            assert await worker.given() == [id] and worker.starts == 1
            await worker.start()
            assert await worker.given() == [id] and worker.starts == 2
            assert await worker.state(id) == ("in_progress", 2, 1)

    run(test())


@pytest.mark.parametrize(
    "sent",
    [
        framed(b"garbage"),
        struct.pack(">I", protocol.MOST_BYTES + 1),
        framed(decoded((5, 32, 48, 3), b"too little")),
        framed(decoded((-1, -1, 1, 3), b"\0\0\0")),
    ],
    ids=["garbage", "too large", "frames of another size", "frames of no size"],
)
def test_a_worker_that_says_what_it_never_should_is_replaced(tmp_path, sent):
    async def test():
        async with puppet(tmp_path) as worker:
            id = (await worker.service.add(new())).id
            await worker.start()
            assert await worker.given() == [id]
            worker.say_raw(sent)
            await worker.start()
            assert await worker.given() == [id] and await worker.state(id) == ("in_progress", 2, 1)
            # Of jobs that are not this worker's, and of attempts that are no more, nothing is believed.
            size = 10
            for message in (
                Decoded("video_1", (1, 1, 1, 3), b"123"),
                Made(id, 1, SECONDS, (), size, 1.0),
                Dropped(id, 1),
            ):
                worker.say(message)
            await worker.hears_nothing()
            assert await worker.state(id) == ("in_progress", 2, 1)

    run(test())


def test_a_worker_that_is_lost_at_its_warm_up_leaves_no_draft(tmp_path):
    (slot,) = Workers({"tiny": SimpleNamespace(ready_workers=0, workers=1)}, WorkerOptions(), str(tmp_path), 0)._slots
    slot._process = subprocess.Popen(["sleep", "60"])
    left, others = (results.draft_path(tmp_path, name) for name in (f"warm-up-{slot._process.pid}", "warm-up-1"))
    for path in left, others:
        path.mkdir(parents=True)
    slot.kill()
    assert not left.exists() and others.exists()


def test_a_bundle_that_cannot_be_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_LONGEST_PAUSE", 0.01)

    async def test(messages):
        async with serving(tmp_path) as service:
            worker = Puppet(service, tmp_path)
            running = asyncio.create_task(worker.workers.run(service))
            for message in messages:
                await worker.start(ready=False)
                if message:
                    worker.say(message)
                worker.die()
            with pytest.raises(InputError) as error:
                await running
            await worker.workers.stop()
            return str(error.value)

    def said(messages):
        return asyncio.run(asyncio.wait_for(test(messages), WAIT))

    assert said([Refused("found no such folder")]) == "found no such folder"
    most = workers._MOST_STILLBORN
    assert said([None] * most).startswith(f"tiny: its worker ended {most} times before it was ready")
