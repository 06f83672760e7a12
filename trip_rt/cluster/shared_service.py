"""The service where workers are elsewhere: it follows in the database what they do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from trip_rt.cluster.roster import Roster
from trip_rt.cluster.shared_results import SharedResults
from trip_rt.cluster.store_end import SILENT_S
from trip_rt.serving.database import StoreUnavailable
from trip_rt.serving.jobs import MOST_LOSSES, Failure, Job
from trip_rt.serving.metrics import Metrics
from trip_rt.serving.models import Model
from trip_rt.serving.service import Service
from trip_rt.serving.store import JobStore

log = logging.getLogger("trip-serve")

LOST = Failure("worker_lost", f"{MOST_LOSSES} times the worker that made this clip fell silent")
_FOLLOWED_EVERY = 0.02  # seconds between two looks at the jobs that somebody listens to
_LOOKED_AFTER_EVERY = 1.0  # at the workers, and at what they left
_MEASURED_EVERY = 10.0  # what results take, for which all rows are read
_SWEPT_EVERY = 600.0  # at results that no job has
_SWEPT_TOGETHER = 500  # of them, in one query


class SharedService(Service):
    """As Service, one of as many as are wanted beside one `store`. No job is this service's own: a client may ask each
    time another one."""

    def __init__(
        self,
        models: dict[str, Model],
        store: JobStore,
        roster: Roster,
        results: SharedResults,
        metrics: Metrics,
        most_queued: int,
        most_bytes: int,
    ):
        super().__init__(models, store, results, metrics, most_queued, most_bytes)  # type: ignore[arg-type]
        self._roster, self._shared_results = roster, results
        self._seen: dict[str, tuple[str, int, int]] = {}  # state, attempt and steps of the jobs that are followed

    def begin(self) -> None:
        """Begin to look, in the running event loop. The database may come later."""
        for work, seconds in (
            (self._follow, _FOLLOWED_EVERY),
            (self._look_after, _LOOKED_AFTER_EVERY),
            (self._measure, _MEASURED_EVERY),
            (self._sweep, _SWEPT_EVERY),
        ):
            self._spawn(_again_and_again(work, seconds))
        self._spawn(self._keep_places())
        self._spawn(self._expire())

    def _stop_work(self, job: Job) -> None:
        """Nothing to do: its worker finds in the database that the job is no longer its own."""

    async def _at_work(self, model: Model) -> list[Job]:
        return await self._read(self._store.in_progress, model.name)

    async def _follow(self) -> None:
        """Tell those who listen what became of their jobs."""
        followed = {id: feed for id, feed in self._feeds.items() if feed.listeners and not feed.closed}
        if not followed:
            self._seen.clear()
            return
        there = {job.id: job for job in await self._read(self._store.several, list(followed))}
        self._seen = {id: seen for id, seen in self._seen.items() if id in followed}
        for id in followed:
            job = there.get(id)
            if job is None:
                self._end_feed(id, "deleted", {"id": id})
            elif job.finished:
                self._end_feed(id, job.state, self.view(job))
            else:
                self._tell_change(job)

    def _tell_change(self, job: Job) -> None:
        before, now = self._seen.get(job.id), (job.state, job.attempt, job.steps_done)
        if now == before:
            return
        self._seen[job.id] = now
        done = {"steps_done": job.steps_done, "steps": job.steps}
        if job.state == "queued":
            if before is not None:
                self._tell(job.id, "queued", self._queue(job))
        elif before is None or before[:2] != now[:2]:
            self._tell(job.id, "in_progress", done | {"attempt": job.attempt})
        else:
            expected_s = round(self._expected_s(job), 3)
            self._tell(job.id, "step", done | {"expected_s": expected_s})

    def _end_feed(self, id: str, name: str, data: object) -> None:
        if feed := self._feeds.pop(id, None):
            feed.publish(name, data, last=True)
        self._seen.pop(id, None)

    def _expected_s(self, job: Job) -> float:
        model = self.models.get(job.model)
        return model.timing.expected_s(job.steps - job.steps_done) if model else 0.0

    async def _look_after(self) -> None:
        """Know the workers, and give back the jobs of those that fell silent."""
        entries = await self._read(self._roster.entries)
        workers = len({entry.worker for entry in entries})
        for model in self.models.values():
            ready = [entry.ready for entry in entries if entry.model == model.name]
            model.ready_workers = workers  # each of them opens what is asked for
            self.metrics.ready_workers.labels(model.name).set(workers)
            if ready:
                model.engine, model.parity = ready[0]["engine"], ready[0]["parity"]
                for name in ("step_s", "other_s"):
                    setattr(model.timing, name, sum(one[name] for one in ready) / len(ready))
        for job in await self._write(self._store.give_back_silent, SILENT_S, LOST):
            log.warning("given back", extra={"job": job.id, "losses": job.losses, "state": job.state})

    async def _measure(self) -> None:
        """Know what all results take."""
        self._shared_results.bytes = await self._read(self._store.result_bytes)

    async def _sweep(self) -> None:
        """Remove results whose job is gone, or has another one, and forget workers that are no more."""
        await self._write(self._roster.sweep)
        names = await asyncio.to_thread(self._shared_results.names)
        for start in range(0, len(names), _SWEPT_TOGETHER):
            some = names[start : start + _SWEPT_TOGETHER]
            ids = {name: name.rpartition("-")[0] for name in some}
            jobs = {job.id: job for job in await self._read(self._store.several, set(ids.values()))}
            for name, id in ids.items():
                job = jobs.get(id)
                if job is None or (job.finished and (job.result or {}).get("name") != name):
                    await asyncio.to_thread(self._shared_results.remove, name, 0)


async def _again_and_again(work: Callable[[], Awaitable[None]], seconds: float) -> None:
    while True:
        try:
            await work()
        except (StoreUnavailable, OSError) as error:
            log.warning("cannot look at the jobs: %s", error)
        await asyncio.sleep(seconds)
