"""The service's parts, driven step by step: what is told to whom, what workers say, and what happens to jobs between
clients and workers that act at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import socket
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from trip_reference.presets import DEMO
from trip_rt.errors import InputError
from trip_rt.manifest import Profile
from trip_rt.serving import protocol, results, store, workers
from trip_rt.serving import service as service_module
from trip_rt.serving.feed import Feed
from trip_rt.serving.jobs import MOST_LOSSES, Failure, NewJob
from trip_rt.serving.metrics import Metrics
from trip_rt.serving.models import Model, read_models
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
    WorkerEnd,
)
from trip_rt.serving.results import Results
from trip_rt.serving.service import ENDS, Closing, Service
from trip_rt.serving.store import JobStore, QueueFull, StoreUnavailable
from trip_rt.serving.workers import DIED, HUNG, WorkerOptions, Workers

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
    request = {"prompt": "a red ball rolls", "seed": 7, "fps": 8.0, "settings": asked}
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


# The feed.


def test_all_who_follow_are_told_of_all():
    async def test():
        feed, heard = Feed(), {}

        async def follow(name, start=0):
            heard[name] = [event async for event in feed.follow(start)]

        early = [asyncio.create_task(follow(f"early {i}")) for i in range(50)]
        await asyncio.sleep(0)
        assert feed.listeners == 50
        feed.publish("a", 1)
        feed.publish("b", 2)
        await asyncio.sleep(0)
        late = [asyncio.create_task(follow("late")), asyncio.create_task(follow("resumed", 1))]
        ahead = asyncio.create_task(follow("ahead", 3))
        await asyncio.sleep(0)
        feed.publish("c", 3)
        feed.publish("d", 4, last=True)
        await asyncio.gather(*early, *late, ahead)
        whole = [(0, "a", 1), (1, "b", 2), (2, "c", 3), (3, "d", 4)]
        assert heard == {f"early {i}": whole for i in range(50)} | {
            "late": whole,
            "resumed": whole[1:],
            "ahead": whole[3:],
        }
        await follow("afterwards")
        assert heard["afterwards"] == whole and feed.listeners == 0

    run(test())


def test_who_stops_following_is_not_counted():
    async def test():
        feed = Feed()
        task = asyncio.create_task(anext(feed.follow()))
        await asyncio.sleep(0)
        assert feed.listeners == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert feed.listeners == 0

    run(test())


# What server and worker tell each other.

CLIP = Clip("video_1", 2, b"\x89PNG", "a red ball rolls", 2**64 - 1, 8.0, "video_1-2")
TO_WORKER = [
    Open("bundle", "48x32-5f-b1", "auto", "cpu", None, "clips"),
    Make((CLIP, CLIP), {"speed": "fast", "guidance_interval": [0.1, 0.9]}),
    Drop("video_1"),
]
TO_SERVER = [
    Ready({"backend": "onnxruntime"}, {"components": {}}, 0.5, 0.1),
    Refused("found no bundle"),
    Stepped(("video_1", "video_2"), 3),
    Denoised(("video_1",)),
    Decoded("video_1", (5, 32, 48, 3), FRAMES.tobytes()),
    Made("video_1", 2, SECONDS, ("a word is not known",), 10_000, 123.4),
    Dropped("video_1", 2),
    Failed("video_1", 2, "engine_error", "it does not run"),
]


def test_messages_arrive_as_they_were_sent():
    async def test():
        ours, theirs = socket.socketpair()
        server, worker = await ServerEnd.of(ours), WorkerEnd(theirs)
        for message in TO_WORKER:
            await server.send(message)
            assert await asyncio.to_thread(worker.receive) == message
        for message in TO_SERVER:
            await asyncio.to_thread(worker.send, message)
            assert await server.receive() == message
        server.close()
        assert await asyncio.to_thread(worker.receive) is None
        theirs.close()

    run(test())


def framed(body):
    return struct.pack(">I", len(body)) + body


def decoded(shape, pixels):
    """Frames of a size that they may not have."""
    return msgspec.msgpack.encode({"type": "Decoded", "job": "video_1", "shape": shape, "pixels": pixels})


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\0\0",
        b"\0\0\0\x10short",
        framed(b"no MessagePack"),
        framed(msgspec.msgpack.encode({"type": "Unknown"})),
        framed(msgspec.msgpack.encode(TO_WORKER[2])),
        framed(msgspec.msgpack.encode({"type": "Made", "job": 1})),
        framed(decoded((5, 32, 48, 3), b"too little")),
        struct.pack(">I", protocol.MOST_BYTES + 1),
    ],
    ids=[
        "nothing",
        "half a length",
        "half a body",
        "garbage",
        "unknown",
        "the wrong way",
        "a wrong type",
        "too few",
        "too large",
    ],
)
def test_who_says_what_it_never_should_is_gone(sent):
    async def test():
        ours, theirs = socket.socketpair()
        server = await ServerEnd.of(ours)
        theirs.sendall(sent)
        if len(sent) != 4:  # what is too large is refused before it is read
            theirs.close()
        assert await server.receive() is None
        server.close()
        theirs.close()

    run(test())


@pytest.mark.parametrize("sent", [b"", b"\0\0", b"\0\0\0\x10short"])
def test_a_server_that_is_gone(sent):
    ours, theirs = socket.socketpair()
    with theirs:
        ours.sendall(sent)
        ours.close()
        assert WorkerEnd(theirs).receive() is None


def test_a_server_that_was_killed_before_it_had_read_all():
    ours, theirs = socket.socketpair()
    with theirs:
        worker = WorkerEnd(theirs)
        worker.send(TO_SERVER[0])
        ours.close()  # which the other side sees as a connection that was reset
        assert worker.receive() is None
        with pytest.raises(OSError):
            worker.send(TO_SERVER[0])


# Models.


def test_names_of_models(tiny_bundle, tmp_path):
    (tmp_path / "odd@name").symlink_to(tiny_bundle)
    (tmp_path / "other").symlink_to(tiny_bundle)
    found = read_models(
        [str(tiny_bundle), f"a={tiny_bundle}", f"b={tiny_bundle}@48x32-5f-b1", f"c={tmp_path / 'odd@name'}"], 3
    )
    assert list(found) == [tiny_bundle.resolve().name, "a", "b", "c"]
    for each in found.values():
        assert (each.size, each.workers, each.profile.name) == ("48x32", 3, "48x32-5f-b1")
        assert each.bundle == tiny_bundle.resolve() and each.seconds(8) == "0.625" and each.seconds(3) == "1.66667"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{bundle}", "{bundle}"], r"model: found two called .*, expected a name for each; write NAME="),
        (["a={bundle}", "a={bundle}"], r"model: found two called a, expected a name for each; write NAME="),
        (["{bundle}@1x1-1f-b1"], r"profile: found '1x1-1f-b1', the bundle has 48x32-5f-b1; "),
        (["a={bundle}/none"], r".*none: found no such folder, expected a bundle; "),
        (["a\tb={bundle}"], r"model: found the name 'a\\tb', expected up to 100 printable characters"),
        (["a" * 101 + "={bundle}"], r"model: found the name 'a{100}', expected up to 100 printable characters"),
    ],
)
def test_what_is_no_model(tiny_bundle, arguments, message):
    with pytest.raises(InputError) as error:
        read_models([argument.format(bundle=tiny_bundle) for argument in arguments], 1)
    assert re.match(message, str(error.value)) and str(error.value).isprintable()


def test_how_long_a_clip_takes():
    timing = model().timing
    timing.step_s, timing.other_s = 0.5, 1.0
    assert timing.expected_s(4) == 3.0
    for _ in range(100):
        timing.measured(4, 4.0, 0.5)
    assert timing.expected_s(4) == pytest.approx(4.5)


# Files.


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (5, 3, 2), (16, 4, 4)])
def test_a_spritesheet_has_all_frames_row_by_row(count, columns, rows):
    frames = np.stack([np.full((4, 6, 3), 10 * index + 1, np.uint8) for index in range(count)])
    sheet = np.asarray(results.spritesheet(frames))
    assert sheet.shape == (4 * rows, 6 * columns, 3)
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        cell = sheet[4 * row : 4 * row + 4, 6 * column : 6 * column + 6]
        assert (cell == (10 * index + 1 if index < count else 0)).all()


def test_a_large_spritesheet_is_scaled_down():
    assert results.spritesheet(np.zeros((9, 1000, 2000, 3), np.uint8)).size == (4096, 2048)


def test_a_draft_is_kept_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), results.draft(tmp_path, "broken", keep=True) as draft:
        (draft / "video.mp4").write_bytes(b"half")
        raise KeyError
    with results.draft(tmp_path, "tried") as draft:
        (draft / "video.mp4").write_bytes(b"whole")
    assert os.listdir(tmp_path / ".drafts") == []
    with results.draft(tmp_path, "made", keep=True) as draft:
        size = results.write(draft, FRAMES, 8)
    kept = Results(tmp_path)
    kept.take("made", size)
    path = kept.path("made", results.VIDEO)
    assert kept.bytes == size == sum(file.stat().st_size for file in path.parent.iterdir())
    assert len(results.read_frames(path)) == 5 and os.listdir(tmp_path / ".drafts") == []
    with Image.open(kept.path("made", results.THUMBNAIL)) as image:
        assert image.size == (48, 32) and image.format == "WEBP"
    with pytest.raises(OSError):
        kept.take("made", size)
    kept.remove("made", size)
    assert kept.bytes == 0 and os.listdir(tmp_path) == [".drafts"]


def test_a_sweep_leaves_what_is_known(tmp_path):
    for name in ("known", "unknown", ".drafts/half"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "video.mp4").write_bytes(b"a video")
    kept = Results(tmp_path)
    kept.sweep({"known": 7})
    assert sorted(os.listdir(tmp_path)) == [".drafts", "known"] and os.listdir(tmp_path / ".drafts") == []
    assert kept.bytes == 7 and (tmp_path / "known" / "video.mp4").read_bytes() == b"a video"


# Clients and workers at the same time.


def test_a_job_and_all_that_is_told_of_it(tmp_path):
    async def test():
        async with serving(tmp_path) as service:
            side, job = Side(service, tmp_path), await service.add(new())
            listener = Listener(service, job)
            await asyncio.sleep(0.1)
            (claimed,) = await side.claim()
            assert (claimed.id, claimed.state, claimed.attempt) == (job.id, "in_progress", 1)
            await side.make(claimed)
            names = await listener.end()
            steps, chunks = ["step"] * 4, [*(["frame"] * 2), "decoding", *(["frame"] * 3), "decoding"]
            assert names == ["queued", "in_progress", *steps, *chunks, "completed"]
            frames = [data for _, name, data in listener.events if name == "frame"]
            assert [index for index, _ in frames] == list(range(5))
            assert all((frame == FRAMES[index]).all() for index, frame in frames)
            done = await service.get(job.id, "")
            view = service.view(done)
            assert view == listener.events[-1][2] and view["progress"] == 100 and view["inference_time_s"] == 0.6
            resumed = Listener(service, done, start=3)  # the feed is gone: the end alone
            assert await resumed.end() == ["completed"]
            assert [name async for name, _ in service.frames(done)] == ["frame"] * 5 + ["end"]
            check_at_rest(service, tmp_path, f"{job.id}-1")

    run(test())


async def moved(service, side, job, state):
    """The job, brought so far."""
    if state in ("queued", "cancelled while queued", "deleted while queued"):
        pass
    elif state == "given back":
        await side.claim()
        service.decoded(job.id, FRAMES[:2])
        await service.lost(await service.get(job.id, ""), DIED)
    else:
        (claimed,) = await side.claim()
        if state == "decoding":
            service.stepped(job.id, 4)
            service.decoded(job.id, FRAMES[:2])
        elif state == "completed":
            await side.make(claimed)
        elif state == "failed":
            await service.failed(claimed, Failure("engine_error", "it does not run"))
    if state.startswith("cancelled"):
        assert await service.cancel(job.id, "")
    if state.startswith("deleted"):
        assert await service.delete(job.id, "")
    return job


STATES = (
    *("queued", "in_progress", "decoding", "given back", "completed", "failed"),
    *("cancelled", "cancelled while queued", "deleted", "deleted while queued"),
)


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled", "deleted", "stopping"])
@pytest.mark.parametrize("state", STATES)
def test_a_listener_is_told_one_end_whenever_it_comes(tmp_path, state, end):
    async def test():
        async with serving(tmp_path) as service:
            side, job = Side(service, tmp_path), await service.add(new())
            await moved(service, side, job, state)
            is_over = state.split()[0] in ENDS
            stale = Listener(service, job)  # which knows the job as it was at first
            fresh = Listener(service, await service.get(job.id, "") or job)
            if not is_over:
                await asyncio.sleep(0.05)
                if end in ("completed", "failed"):
                    begun = await service.get(job.id, "")
                    if begun.state == "queued":
                        (begun,) = await side.claim()
                    await (side.make(begun) if end == "completed" else service.failed(begun, DIED))
                elif end == "cancelled":
                    assert await service.cancel(job.id, "")
                elif end == "deleted":
                    assert await service.delete(job.id, "")
                else:
                    await service.close()
            expected = state.split()[0] if is_over else end
            for listener in (stale, fresh):
                names = await listener.end()
                assert names[-1] == expected
                if expected == "completed":
                    indices = [data[0] for _, name, data in listener.events if name == "frame"]
                    assert is_over or indices[-5:] == list(range(5))

    # A service is closed once: its own end has nothing left to do.
    run(_closed_once(test))


async def _closed_once(test):
    close, closed = Service.close, set()

    async def once(self):
        if self not in closed:
            closed.add(self)
            await close(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Service, "close", once)
        await test()


def test_a_cancel_and_a_claim_at_the_same_time(tmp_path):
    async def test():
        async with serving(tmp_path) as service:
            side = Side(service, tmp_path)
            for number in range(40):
                job = await service.add(new())
                both = [service.cancel(job.id, ""), side.claim()]
                answers = await asyncio.gather(*(both if number % 2 else both[::-1]))
                cancelled, claimed = answers if number % 2 else answers[::-1]
                assert cancelled and (await service.get(job.id, "")).state == "cancelled"
                assert side.told_to_drop == [each.id for each in claimed]
                for each in claimed:
                    service.dropped(each)
                side.told_to_drop.clear()
            check_at_rest(service, tmp_path)

    run(test())


@pytest.mark.parametrize("way", ["cancel", "delete"])
def test_what_is_made_after_a_cancel_is_nobodys(tmp_path, way):
    async def test():
        async with serving(tmp_path) as service:
            side, job = Side(service, tmp_path), await service.add(new())
            (claimed,) = await side.claim()
            assert await getattr(service, way)(job.id, "") and side.told_to_drop == [job.id]
            await side.make(claimed)  # it was too late to stop
            found = await service.get(job.id, "")
            assert found is None if way == "delete" else found.state == "cancelled"
            assert not await service.cancel(job.id, "") and side.told_to_drop == [job.id]
            check_at_rest(service, tmp_path)

    run(test())


@pytest.mark.parametrize("way", ["cancel", "delete"])
def test_a_worker_lost_after_a_cancel_brings_nothing_back(tmp_path, way):
    async def test():
        async with serving(tmp_path) as service:
            side, job = Side(service, tmp_path), await service.add(new())
            (claimed,) = await side.claim()
            side.draw(claimed)
            assert await getattr(service, way)(job.id, "")
            await service.lost(claimed, DIED, f"{job.id}-1")
            assert await side.claim() == []
            check_at_rest(service, tmp_path)

    run(test())


def test_a_cancel_is_timed_until_the_work_has_stopped(tmp_path):
    async def test():
        async with serving(tmp_path) as service:
            side, job = Side(service, tmp_path), await service.add(new())
            (claimed,) = await side.claim()
            await service.cancel(job.id, "")
            assert b"trip_cancel_seconds_count 0.0" in await service.metrics_text()
            await asyncio.sleep(0.05)
            service.dropped(claimed)
            text = (await service.metrics_text()).decode()
            assert "trip_cancel_seconds_count 1.0" in text
            assert float(re.search(r"trip_cancel_seconds_sum (\S+)", text)[1]) >= 0.05
            check_at_rest(service, tmp_path)

    run(test())


def test_a_lost_attempt_does_nothing_to_the_next(tmp_path):
    async def test():
        async with serving(tmp_path) as service:
            first, second = Side(service, tmp_path), Side(service, tmp_path)
            job = await service.add(new())
            (lost,) = await first.claim()
            running = service._running[job.id]
            await service.lost(lost, HUNG)
            (claimed,) = await second.claim()
            assert (claimed.attempt, claimed.losses) == (2, 1)
            await service._note(running)  # of progress, which was under way
            size = first.draw(lost)
            await service.made(lost, f"{job.id}-1", Made(job.id, 1, SECONDS, (), size, 100.0))
            await service.failed(lost, DIED)
            service.dropped(lost)
            assert second.told_to_drop == [] and (await service.get(job.id, "")).state == "in_progress"
            await second.make(claimed)
            assert (await service.get(job.id, "")).state == "completed"
            check_at_rest(service, tmp_path, f"{job.id}-2")

    run(test())


def test_frames_begin_anew_with_the_next_attempt(tmp_path):
    async def test():
        async with serving(tmp_path) as service:
            side, job, heard = Side(service, tmp_path), await service.add(new()), []

            async def look():
                async for name, data in service.frames(job):
                    heard.append((name, data[0] if name == "frame" else data))

            looking = asyncio.create_task(look())
            (claimed,) = await side.claim()
            service.decoded(job.id, FRAMES[:2])
            await asyncio.sleep(0.05)
            await service.lost(claimed, DIED)
            (claimed,) = await side.claim()
            await side.make(claimed)
            await looking
            again = [("frame", index) for index in range(5)]
            assert heard == [*again[:2], ("restart", None), *again, ("end", "completed")]

    run(test())


def test_events_go_on_from_a_number(tmp_path):
    async def test():
        async with serving(tmp_path) as service:
            side, job = Side(service, tmp_path), await service.add(new())
            whole = Listener(service, job)
            await asyncio.sleep(0.05)
            (claimed,) = await side.claim()
            service.stepped(job.id, 1)
            later, too_far = Listener(service, claimed, start=2), Listener(service, claimed, start=99)
            await asyncio.sleep(0.05)
            await side.make(claimed)
            assert len(await whole.end()) > 8
            await later.end()
            await too_far.end()
            assert later.events == whole.events[2:] and too_far.events == whole.events

    run(test())


def test_a_completion_is_noted_once_the_store_can_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "_TRIED_AGAIN_AFTER", 0.01)
    fails, job_of = iter([True, True]), store._job

    def broken(row):
        if next(fails, False):
            raise StoreUnavailable("the disk is full")
        return job_of(row)

    async def test():
        async with serving(tmp_path) as service:
            side, job = Side(service, tmp_path), await service.add(new())
            (claimed,) = await side.claim()
            monkeypatch.setattr(store, "_job", broken)  # what is read after the change, in the same transaction
            await side.make(claimed)
            assert next(fails, None) is None
            found = await service.get(job.id, "")
            assert found.state == "completed" and service.file(found, results.VIDEO).is_file()
            check_at_rest(service, tmp_path, f"{job.id}-1")

    run(test())


def test_what_has_expired_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "_EXPIRED_EVERY", 0.01)
    now = [1000.0]

    async def test():
        async with serving(tmp_path, clock=lambda: now[0]) as service:
            side, job = Side(service, tmp_path), await service.add(new())
            await side.make((await side.claim())[0])
            waiting = await service.add(new())
            now[0] += 59
            await asyncio.sleep(0.1)
            assert await service.get(job.id, "")
            now[0] += 2
            while await service.get(job.id, ""):
                await asyncio.sleep(0.01)
            assert (await service.get(waiting.id, "")).state == "queued"
            await asyncio.sleep(0.1)
            check_at_rest(service, tmp_path)

    run(test())


def test_a_service_that_closes(tmp_path):
    async def test():
        async with serving(tmp_path, most_queued=1) as service:
            job = await service.add(new(key="one"))
            with pytest.raises(QueueFull):
                await service.add(new())
            assert (await service.add(new(key="one"))).id == job.id
            waiting, listener = asyncio.create_task(service.finished(job)), Listener(service, job)
            await asyncio.sleep(0.05)
        assert (await listener.end())[-1] == "stopping" and await waiting is None
        with pytest.raises(Closing):
            await service.add(new())
        with pytest.raises(Closing):  # of a request that is still being answered
            await service.get(job.id, "")

    run(test())


def test_places_in_the_queue_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "_PLACES_EVERY", 0.01)

    async def test():
        async with serving(tmp_path) as service:
            service.models["tiny"].timing.step_s = 1.0
            side, jobs = Side(service, tmp_path), [await service.add(new()) for _ in range(3)]
            await asyncio.sleep(0.1)
            listener = Listener(service, jobs[2])
            await asyncio.sleep(0.1)
            for _ in range(2):
                await side.make((await side.claim())[0])
                await asyncio.sleep(0.1)
            places = [data["position"] for _, name, data in listener.events if name == "queued"]
            assert places == [2, 1, 0] and listener.events[0][2]["expected_wait_s"] == 8.0
            await service.cancel(jobs[2].id, "")
            assert (await listener.end())[-1] == "cancelled"

    run(test())


def test_jobs_of_the_same_settings_are_made_together(tmp_path):
    async def test():
        async with serving(tmp_path, batch=2) as service:
            side = Side(service, tmp_path)
            settings = [{}, {"speed": "fast"}, {}, {}, {"speed": "fast"}]
            ids = [(await service.add(new(each))).id for each in settings]
            claims = [[ids.index(job.id) for job in await side.claim()] for _ in range(4)]
            assert claims == [[0, 2], [1, 4], [3], []]
            jobs = [await service.get(id, "") for id in ids]
            await service.cancel(ids[0], "")
            assert side.told_to_drop == [ids[0]]
            service.dropped(jobs[0])
            for job in (jobs[2], jobs[3]):
                await service.lost(job, DIED)
            assert [[ids.index(job.id) for job in await side.claim()] for _ in range(3)] == [[2], [3], []]

    run(test())


# A slot for workers, with a worker that does as it is told.


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
