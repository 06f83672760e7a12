"""The service: what clients may do with jobs, and what workers report of them. The routes and the workers on either
side know nothing of each other.

The store says what a job's state is. Here is what no store needs to know: who listens, how far the steps are, which
frames are decoded. All methods are called from the event loop; the store's run in threads, one of which writes.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from trip_rt.errors import InputError
from trip_rt.serving.database import StoreUnavailable
from trip_rt.serving.feed import Feed
from trip_rt.serving.jobs import FINISHED, MOST_LOSSES, STATES, Failure, Job, NewJob, Pictures
from trip_rt.serving.metrics import Metrics
from trip_rt.serving.models import Model
from trip_rt.serving.protocol import Made
from trip_rt.serving.results import VIDEO, Results, read_frames, remove_draft
from trip_rt.serving.store import JobStore
from trip_rt.serving.views import result_of, video

log = logging.getLogger("trip-serve")
Frames = NDArray[np.uint8]
P = ParamSpec("P")
T = TypeVar("T")

_PLACES_EVERY = 0.5  # seconds between two looks at the queue for those who wait in it
_PLACES_TOLD = 10  # of those nearer than that every place is told, of the others every tenth of the way
_NOTED_EVERY = 1.0  # seconds between two notes of a job's progress in the store
_TRIED_AGAIN_AFTER = 1.0  # seconds, where a change must be noted and the store cannot be written to
_EXPIRED_EVERY = 5.0  # seconds
ENDS = (*FINISHED, "deleted", "stopping")  # the events after which there are no more
SERVER_LOST = Failure("server_lost", f"the server ended {MOST_LOSSES} times while it made this clip")


@dataclass
class Running:
    """A job that a worker has. `drop` tells the worker that nobody wants it any more."""

    job: Job
    drop: Callable[[], None]
    steps_done: int = 0
    frames: list[Frames] = field(default_factory=list)  # those decoded so far, uint8 [n, H, W, 3]
    noted_at: float = 0.0
    cancelled_at: float | None = None


@dataclass
class Queue:
    """A model's queued jobs: the place and the expected wait in seconds of each, and the wait of one more."""

    places: dict[str, tuple[int, float]] = field(default_factory=dict)
    wait: float = 0.0


class Closing(Exception):
    """The server is going down and takes no more jobs."""


class NoRoom(Exception):
    """Results take as much of the disk as they may."""


class Service:
    """Jobs of `models`, kept in `store` and their files in `results`; `most_queued` may wait, and results may take
    `most_bytes`."""

    def __init__(
        self,
        models: dict[str, Model],
        store: JobStore,
        results: Results,
        metrics: Metrics,
        most_queued: int,
        most_bytes: int,
    ):
        self.models, self.metrics = models, metrics
        self._store, self._results = store, results
        self._most_queued, self._most_bytes = most_queued, most_bytes
        self._writer = ThreadPoolExecutor(1, "store-writer")  # SQLite has one writer; its others would only wait
        self._readers = ThreadPoolExecutor(4, "store-reader")
        self._running: dict[str, Running] = {}
        self._cancelled_early: set[str] = set()  # after a worker's claim of them, and before it is known here
        self._feeds: dict[str, Feed] = {}
        self._queues = {name: Queue() for name in models}
        self._queue_changed = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.began = time.time()
        self.closing = False

    async def start(self) -> None:
        """Take up what an earlier run left: its queue, and the results of completed jobs alone. InputError where the
        store does not answer."""
        try:
            given_back = await self._write(self._store.give_back_all, SERVER_LOST)
            completed = await self._read(self._store.completed)
        except StoreUnavailable as error:
            raise InputError(f"jobs: cannot write to the database ({error}); start again once it is free") from error
        known = {job.result["name"]: job.result["bytes"] for job in completed if job.result}
        await asyncio.to_thread(self._results.sweep, known)
        for job in given_back:
            log.info("given back", extra={"job": job.id, "state": job.state})
        self._spawn(self._keep_places())
        self._spawn(self._expire())

    async def close(self) -> None:
        """Finish what is being noted, tell all listeners, close the store."""
        self.closing = True
        for feed in self._feeds.values():
            feed.publish("stopping", {}, last=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._writer.shutdown()
        self._readers.shutdown()
        self._store.close()

    # What clients do.

    async def add(self, new: NewJob) -> Job:
        """A new job, or the one of the same idempotency key. Closing, NoRoom, QueueFull, OtherRequest,
        StoreUnavailable."""
        if self.closing:
            raise Closing
        if self._results.bytes >= self._most_bytes:
            raise NoRoom
        job, is_new = await self._write(self._store.add, new, self._most_queued)
        if is_new:
            self.metrics.created.labels(job.model).inc()
            log.info("queued", extra={"job": job.id, "model": job.model, "steps": job.steps})
            self._wake()
        return job

    async def get(self, id: str, owner: str | None) -> Job | None:
        return await self._read(self._store.get, id, owner)

    async def page(self, owner: str, after: str | None, limit: int, ascending: bool) -> tuple[list[Job], bool] | None:
        return await self._read(self._store.page, owner, after, limit, ascending)

    async def cancel(self, id: str, owner: str) -> Job | None:
        """Stop an unfinished job: the cancelled one; None where it is finished, or none of that owner's."""
        if (changed := await self._write(self._store.cancel, id, owner)) is None:
            return None
        before, after = changed
        self._stop_work(before)
        self._finish(after)
        return after

    async def delete(self, id: str, owner: str | None) -> bool:
        """Stop and forget a job, and remove its files; False where there is none of that owner's."""
        job = await self._write(self._store.delete, id, owner)
        if job is None:
            return False
        if job.result is not None:
            await asyncio.to_thread(self._results.remove, job.result["name"], job.result["bytes"])
        if not job.finished:
            self._stop_work(job)
            self.metrics.finished.labels(job.model, "cancelled").inc()
        if feed := self._feeds.pop(id, None):
            feed.publish("deleted", {"id": id}, last=True)
        log.info("deleted", extra={"job": id, "state": job.state})
        return True

    async def metrics_text(self) -> bytes:
        """All figures, in Prometheus's format."""
        counts = await self._read(self._store.counts)
        for name in self.models:
            for state in STATES:
                self.metrics.jobs.labels(name, state).set(counts.get((name, state), 0))
        self.metrics.result_bytes.set(self._results.bytes)
        return self.metrics.text()

    def view(self, job: Job) -> dict[str, Any]:
        """The job as clients see it."""
        running = self._running.get(job.id)
        steps_done = running.steps_done if running and job.state == "in_progress" else job.steps_done
        return video(job, steps_done, self._queue(job))

    def poll_after_ms(self, job: Job) -> int:
        """When it pays to ask again."""
        waits = self._queue(job)
        expected = waits["expected_wait_s"] if waits else self._expected_s(job)
        return int(min(max(250.0, expected * 500), 5000.0))

    def retry_after_s(self, model: str) -> int:
        """When a place in the queue is likely to be free."""
        chosen = self.models[model]
        return math.ceil(max(1.0, chosen.timing.expected_s(chosen.config.num_inference_steps)))

    async def events(self, job: Job, start: int = 0) -> AsyncIterator[tuple[int, str, Any]]:
        """Number, name and data of what happens to a job, from event `start` on, to one of ENDS. A `frame` has (index,
        uint8 [H, W, 3]); a job that is begun anew is `queued` once more."""
        feed = self._feed(job)
        now = await self.get(job.id, None)  # what came about before there was a feed, nobody told it
        if now is None or now.finished:
            self._feeds.pop(job.id, None)
            if not feed.closed:
                name, data = ("deleted", {"id": job.id}) if now is None else (now.state, self.view(now))
                feed.publish(name, data, last=True)
        async for event in feed.follow(start if start <= len(feed.events) else 0):
            yield event

    async def finished(self, job: Job) -> Job | None:
        """The job once it is finished; None where it was deleted, or the server is going down."""
        async for _, name, _ in self.events(job):
            if name in FINISHED:
                return await self.get(job.id, None)
        return None

    async def frames(self, job: Job) -> AsyncIterator[tuple[str, Any]]:
        """`frame` with (index, uint8 [H, W, 3]) of each frame as soon as it is decoded; `restart` where the job is
        begun anew; and `end` with what it ended in."""
        shown = 0
        async for _, name, data in self.events(job):
            if name == "frame":
                yield "frame", data
                shown += 1
            elif name == "queued" and shown:
                yield "restart", None
                shown = 0
            elif name == "completed" and not shown:  # it was before anybody listened
                found = await self.get(job.id, None)
                made = await asyncio.to_thread(read_frames, await self.file(found, VIDEO)) if found else []
                for numbered in enumerate(made):
                    yield "frame", numbered
            if name in ENDS:
                yield "end", name

    async def picture(self, job: Job) -> bytes | None:
        """The picture that a job's clip began with; None where the job was deleted."""
        return await self._read(self._store.picture, job.id)

    async def file(self, job: Job, name: str) -> Path:
        """The path of one of a completed job's files."""
        assert job.result is not None
        return await asyncio.to_thread(self._results.path, job.result["name"], name)

    # What workers report.

    @property
    def queue_changed(self) -> asyncio.Event:
        """Set once a job comes or comes back; ask for it before looking at the queue."""
        return self._queue_changed

    async def claim(self, model: Model, drop: Callable[[str], None]) -> list[tuple[Job, Pictures]]:
        """The next jobs for a worker of this model, with their pictures; none where none wait. `drop(id)` is called for
        one that is cancelled later."""
        while rows := await self._write(self._store.claim, model.name, model.profile.batch):
            wanted = [(job, pictures) for job, pictures in rows if job.id not in self._cancelled_early]
            self._cancelled_early.difference_update(job.id for job, _ in rows)
            for job, _ in wanted:
                self._running[job.id] = Running(job, functools.partial(drop, job.id))
                self._queues[model.name].places.pop(job.id, None)  # whoever comes next is not behind it
                self._tell(job.id, "in_progress", {"steps_done": 0, "steps": job.steps, "attempt": job.attempt})
            if wanted:
                return wanted
        return []

    def stepped(self, id: str, done: int) -> None:
        """A worker has done so many steps of a job."""
        if (running := self._running.get(id)) is None:
            return
        running.steps_done = done
        job = running.job
        expected_s = round(self._expected_s(job), 3)
        self._tell(id, "step", {"steps_done": done, "steps": job.steps, "expected_s": expected_s})
        if time.monotonic() - running.noted_at > _NOTED_EVERY:
            running.noted_at = math.inf  # until this note is done
            self._spawn(self._note(running))

    def decoded(self, id: str, frames: Frames) -> None:
        """A worker has decoded the next frames of a job."""
        if (running := self._running.get(id)) is None:
            return
        first = sum(map(len, running.frames))
        running.frames.append(frames)
        for index, frame in enumerate(frames, first):
            self._tell(id, "frame", (index, frame))
        total = running.job.request["num_frames"]
        self._tell(id, "decoding", {"frames_done": first + len(frames), "num_frames": total})

    async def made(self, job: Job, draft: str, made: Made) -> None:
        """A worker has written a job's result: the job is completed, or where it is no longer that attempt's, the
        result is removed."""
        model = self.models[job.model]
        denoise_s = made.seconds["denoise"]
        other_s = sum(made.seconds.values()) - denoise_s
        other_s *= model.config.num_frames / job.request["num_frames"]  # of a clip of the engines' own length …
        if job.request["size"] != model.size:  # … and size
            other_s = model.timing.other_s
        model.timing.measured(job.steps, denoise_s, other_s)
        self.metrics.made(job, made)
        result = result_of(draft, made, model.engine, model.parity)
        try:
            self._results.take(draft, made.bytes)
        except OSError as error:
            log.error("a result is gone: %s", error, extra={"job": job.id})
            await self.lost(job, Failure("storage", "the result could not be stored; ask again"))
            return
        done = await self._surely(self._store.complete, job, result)
        if done is None:
            self._results.remove(draft, made.bytes)
            self._let_go(job)
        else:
            self._finish(done)

    async def failed(self, job: Job, failure: Failure) -> None:
        """A job cannot be done."""
        if done := await self._surely(self._store.fail, job, failure):
            self._finish(done)
        else:
            self._let_go(job)

    def dropped(self, job: Job) -> None:
        """A worker has stopped working on a job that was cancelled."""
        running = self._running.get(job.id)
        if running is not None and running.cancelled_at is not None:
            self.metrics.cancel_seconds.observe(time.monotonic() - running.cancelled_at)
        self._let_go(job)

    async def lost(self, job: Job, loss: Failure | None, draft: str = "") -> None:
        """A job's worker is no more. `loss` says why, None that the job had no part in it."""
        if draft:
            remove_draft(self._results.folder, draft)
        given = await self._surely(self._store.give_back, job, loss)
        self._let_go(job)
        if given is not None and given.finished:
            self._finish(given)
        elif given is not None:
            log.warning("given back", extra={"job": job.id, "losses": given.losses})
            self._tell(job.id, "queued", self._queue(given))
            self._wake()

    # Between them.

    def _feed(self, job: Job) -> Feed:
        """The job's feed; a new one begins with where the job stands."""
        if (feed := self._feeds.get(job.id)) is not None:
            return feed
        feed = self._feeds[job.id] = Feed()
        if (running := self._running.get(job.id)) and not job.finished:
            done = {"steps_done": running.steps_done, "steps": job.steps, "attempt": running.job.attempt}
            feed.publish("in_progress", done)
            frames = [frame for chunk in running.frames for frame in chunk]
            for numbered in enumerate(frames):
                feed.publish("frame", numbered)
        elif job.state == "queued":
            feed.publish("queued", self._queue(job))
        if self.closing:
            feed.publish("stopping", {}, last=True)
        return feed

    def _tell(self, id: str, name: str, data: Any) -> None:
        """Those who listen to a job."""
        if feed := self._feeds.get(id):
            feed.publish(name, data)

    def _finish(self, job: Job) -> None:
        """Tell everybody what became of a job."""
        self.metrics.finished.labels(job.model, job.state).inc()
        seconds = round((job.finished_at or 0) - job.created_at, 3)
        failure = {"failure": job.failure.message} if job.failure else {}
        log.info(job.state, extra={"job": job.id, "attempt": job.attempt, "after_s": seconds} | failure)
        if job.state != "cancelled":  # else its worker has still to say that it has stopped
            self._let_go(job)
        if feed := self._feeds.pop(job.id, None):
            feed.publish(job.state, self.view(job), last=True)

    def _let_go(self, job: Job) -> None:
        """Forget the attempt."""
        if (running := self._running.get(job.id)) and running.job.attempt == job.attempt:
            del self._running[job.id]

    def _stop_work(self, job: Job) -> None:
        """Have the worker of a job that was in progress stop."""
        if job.state != "in_progress":
            return
        running = self._running.get(job.id)
        if running is None:
            self._cancelled_early.add(job.id)
        elif running.cancelled_at is None:
            running.cancelled_at = time.monotonic()
            running.drop()

    def _expected_s(self, job: Job) -> float:
        """Seconds until a running job is done."""
        model, running = self.models.get(job.model), self._running.get(job.id)
        return model.timing.expected_s(job.steps - (running.steps_done if running else 0)) if model else 0.0

    def _queue(self, job: Job) -> dict[str, Any] | None:
        """A queued job's place, 0 for the next one, and how long it will wait."""
        if job.state != "queued":
            return None
        queue = self._queues.get(job.model, Queue())
        position, wait = queue.places.get(job.id, (len(queue.places), queue.wait))
        return {"position": position, "expected_wait_s": round(wait, 1)}

    def _wake(self) -> None:
        self._queue_changed.set()
        self._queue_changed = asyncio.Event()

    async def _keep_places(self) -> None:
        """Look at the queues again and again, and tell those who wait in one when their place changes."""
        while True:
            for model in self.models.values():
                try:
                    waiting = await self._read(self._store.waiting, model.name)
                    at_work = await self._at_work(model)
                except StoreUnavailable:
                    continue
                queue = self._queues[model.name] = self._queue_of(model, waiting, at_work)
                for id, (position, wait) in queue.places.items():
                    feed = self._feeds.get(id)
                    if feed is None or not feed.listeners or id in self._running:
                        continue
                    name, data = feed.events[-1] if feed.events else ("", {})
                    # Far back a place matters less, and there are many who are told.
                    if name != "queued" or abs(data["position"] - position) > position // _PLACES_TOLD:
                        feed.publish("queued", {"position": position, "expected_wait_s": round(wait, 1)})
                        await asyncio.sleep(0)  # others have their turn
            await asyncio.sleep(_PLACES_EVERY)

    async def _at_work(self, model: Model) -> list[Job]:
        """The model's jobs that workers have."""
        return [entry.job for entry in self._running.values() if entry.job.model == model.name]

    def _queue_of(self, model: Model, waiting: list[tuple[str, int]], at_work: list[Job]) -> Queue:
        side_by_side = model.profile.batch * max(1, model.ready_workers)
        queue = Queue(wait=sum(map(self._expected_s, at_work)) / side_by_side)
        still_waiting = [(id, steps) for id, steps in waiting if id not in self._running]
        for position, (id, steps) in enumerate(still_waiting):
            queue.places[id] = position, queue.wait
            queue.wait += model.timing.expected_s(steps) / side_by_side
        return queue

    async def _expire(self) -> None:
        """Remove finished jobs whose time is over."""
        while True:
            try:
                for job in await self._read(self._store.expired):
                    await self.delete(job.id, None)
            except StoreUnavailable as error:
                log.warning("cannot look for expired jobs: %s", error)
            await asyncio.sleep(_EXPIRED_EVERY)

    async def _note(self, running: Running) -> None:
        """Note progress in the store; a job that is no longer this attempt's there is dropped."""
        try:
            is_ours = await self._write(self._store.step, running.job, running.steps_done)
            if not is_ours and self._running.get(running.job.id) is running:  # and not the next attempt
                self._stop_work(running.job)
        except StoreUnavailable:
            pass  # the next one will do
        finally:
            running.noted_at = time.monotonic()

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, query: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._in(self._readers, lambda: query(*args, **kwargs))

    async def _write(self, change: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._in(self._writer, lambda: change(*args, **kwargs))

    async def _in(self, threads: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        try:
            answer = asyncio.get_running_loop().run_in_executor(threads, call)
        except RuntimeError as error:  # shut down by `close`, while a request is still being answered
            raise Closing from error
        return await answer

    async def _surely(self, change: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same, again and again until the store can be written to."""
        while True:
            try:
                return await self._write(change, *args, **kwargs)
            except StoreUnavailable as error:
                log.error("cannot note a job's state, trying again: %s", error)
                await asyncio.sleep(_TRIED_AGAIN_AFTER)
