"""Clients and workers that act at the same time, step by step."""

from __future__ import annotations

import asyncio
import re

import pytest
from service_parts import FRAMES, SECONDS, Listener, Side, check_at_rest, new, run, serving

from trip_rt.serving import results, store
from trip_rt.serving import service as service_module
from trip_rt.serving.database import StoreUnavailable
from trip_rt.serving.jobs import Failure
from trip_rt.serving.protocol import (
    Made,
)
from trip_rt.serving.service import ENDS, Closing, Service
from trip_rt.serving.store import QueueFull
from trip_rt.serving.workers import DIED, HUNG


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
            assert found.state == "completed" and (await service.file(found, results.VIDEO)).is_file()
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


def test_a_job_that_was_just_taken_is_not_waited_for(tmp_path):
    """Nor before the next look at the queue, which is far off here."""

    async def test():
        async with serving(tmp_path) as service:
            side, first = Side(service, tmp_path), await service.add(new())
            queue = service._queues[first.model]
            queue.places[first.id], queue.wait = (0, 0.0), 4.0  # as a look finds it
            assert service.view(first)["queue"]["position"] == 0
            (claimed,) = await side.claim()
            assert service.view(await service.add(new()))["queue"]["position"] == 0
            waiting = await service._read(service._store.waiting, first.model)
            model = service.models[first.model]
            at_work = await service._at_work(model)
            late = service._queue_of(model, [(first.id, first.steps), *waiting], at_work)
            assert [place for place, _ in late.places.values()] == [0] and first.id not in late.places
            await side.make(claimed)

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
