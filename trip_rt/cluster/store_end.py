"""The server as a worker sees it, where that is a database which many machines share.

A worker claims its jobs from the table by itself, and says there again and again that it has them. One that is lost
falls silent, and whoever serves clients gives its jobs back: nobody hands jobs over, so nobody's end loses one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec

from trip_rt.cluster.roster import Roster
from trip_rt.cluster.shared_results import SharedResults
from trip_rt.errors import EngineError
from trip_rt.serving.database import StoreUnavailable
from trip_rt.serving.jobs import Failure, Job, Pictures
from trip_rt.serving.models import Model
from trip_rt.serving.protocol import (
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
    ToServer,
    ToWorker,
)
from trip_rt.serving.results import draft_path
from trip_rt.serving.store import JobStore
from trip_rt.serving.views import result_of
from trip_rt.serving.workers import clip_of, draft_name, hangs_after

log = logging.getLogger("trip-serve")
P = ParamSpec("P")
T = TypeVar("T")

HEARD_EVERY = 2.0  # seconds between two notes that a worker lives and has its jobs; at each it learns of cancels
SILENT_S = 10.0  # after which it is lost
_COUNTED_EVERY = 10.0  # seconds between two counts of the workers
# Notes of progress, of all workers together, and as rarely as that of one: at each it learns of a cancel, too.
_NOTES_A_SECOND, _NOTED_EVERY = 500, 0.2
# Looks at an empty queue, of all workers together: whoever looks first takes the job, so that a job waits as short a
# time for one of many workers that look rarely as for one that looks often, and the database has no more to do.
_LOOKS_A_SECOND = 200
_PATIENCE = 2.0  # seconds that a job of another model waits for before a worker changes models
_TRIED_AGAIN_AFTER = 1.0  # seconds, where a change must be noted and the store does not answer


@dataclass(frozen=True)
class EngineChoice:
    """How bundles are opened: the fields of protocol.Open."""

    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None


class StoreEnd:
    """`worker` is a name of its own, `drafts` a folder of this machine. Jobs of all `models` are made, those of the one
    that is open first; another one's have waited for _PATIENCE before they are."""

    def __init__(
        self,
        worker: str,
        models: dict[str, Model],
        store: JobStore,
        roster: Roster,
        results: SharedResults,
        choice: EngineChoice,
        drafts: Path,
    ):
        self._worker, self._models, self._store, self._roster = worker, models, store, roster
        self._results, self._choice, self._drafts = results, choice, drafts
        self._outbox: queue.SimpleQueue[ToWorker | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}  # the worker's
        self._steps: dict[str, int] = {}  # done of each since that was noted
        self._ready: dict[str, Ready] = {}
        self._model = next(iter(models))  # that is open, or will be
        self._openings: queue.SimpleQueue[str] = queue.SimpleQueue()  # models that the worker was told to open
        self._hungry, self._idle, self._opened = threading.Event(), threading.Event(), threading.Event()
        self._stopping, self._stopped = threading.Event(), threading.Event()
        self._idle.set()
        self._claimer = threading.Thread(target=self._claim_jobs, name="claim jobs", daemon=True)
        self._heard = time.monotonic()
        self._colleagues = 1  # workers that there are
        self._refusal = ""  # why the worker cannot open its first bundle

    # The worker's.

    def receive(self) -> ToWorker | None:
        return self._outbox.get()

    def send(self, message: ToServer) -> None:
        self._heard = time.monotonic()
        match message:
            case Stepped(jobs, done):  # between two steps: the store is told by another thread
                with self._lock:
                    self._steps |= dict.fromkeys(jobs, done)
            case Denoised():
                self._hungry.set()
            case Made() | Failed() | Dropped():
                self._answered(message)
            case Ready():
                self._note_ready(self._openings.get(), message)
            case Refused(reason):
                log.error("worker refused: %s", reason, extra={"model": self._openings.get()})
                if not self._ready:
                    self._refusal = reason
                    self._opened.set()

    # Its owner's.

    def start(self) -> None:
        """Have the first model opened, and claim jobs from then on. EngineError where it cannot be."""
        self._have_opened(self._model)
        self._claimer.start()
        threading.Thread(target=self._keep_alive, name="keep alive", daemon=True).start()
        self._opened.wait()
        if self._refusal:
            raise EngineError(self._refusal)

    @property
    def hangs(self) -> bool:
        """Whether the worker has jobs and has been silent about them for too long."""
        ready = self._ready.get(self._model)
        allowed = hangs_after(ready.step_s if ready else 0.0)
        return bool(self._jobs) and time.monotonic() - self._heard > allowed

    def stop(self, grace: float) -> None:
        """Claim no more, give what is being made so many seconds, and give the rest back."""
        until = time.monotonic() + grace
        self._stopping.set()
        self._hungry.set()
        self._claimer.join(grace)  # what it has claimed is ours to give back
        self._idle.wait(max(0.0, until - time.monotonic()))
        self._stopped.set()
        with self._lock:
            jobs, self._jobs = list(self._jobs.values()), {}
        for job in jobs:
            self._surely(self._store.give_back, job)
        with contextlib.suppress(StoreUnavailable):
            self._roster.remove(self._worker)

    # Between them.

    def _have_opened(self, model: str) -> None:
        chosen, choice = self._models[model], self._choice
        place = str(chosen.bundle), chosen.profile.name
        self._openings.put(model)
        self._outbox.put(Open(*place, choice.backend, choice.device, choice.threads, str(self._drafts)))

    def _note_ready(self, model: str, ready: Ready) -> None:
        if model not in self._ready:
            self._surely(self._roster.note, self._worker, model, msgspec.to_builtins(ready))
            log.info("worker ready", extra={"model": model, "backend": ready.engine["backend"]})
        self._ready[model] = ready
        self._opened.set()
        if not self._jobs:
            self._hungry.set()

    def _claim_jobs(self) -> None:
        while True:
            self._hungry.wait()
            if self._stopping.is_set():
                return
            if any(job.losses for job in list(self._jobs.values())):  # one that a worker was lost over goes alone
                self._idle.wait()
            try:
                claimed = self._claim()
            except StoreUnavailable as error:
                log.error("cannot look for jobs: %s", error)
                time.sleep(_TRIED_AGAIN_AFTER)
                continue
            if not claimed:
                time.sleep(self._colleagues / _LOOKS_A_SECOND * random.uniform(0.5, 1.5))
                continue
            if claimed[0][0].losses:
                self._idle.wait()
            self._hand_over(claimed)

    def _claim(self) -> list[tuple[Job, Pictures]]:
        """The next jobs: of the open model, unless another one's have waited for long."""
        if len(self._models) == 1:
            return self._store.claim(self._model, self._models[self._model].profile.batch)
        since = self._store.waiting_since()
        waiting = sorted((created, name) for name, created in since.items() if name in self._models)
        if not waiting:
            return []
        created, name = waiting[0]
        if self._model in since and time.time() - created < _PATIENCE:
            name = self._model
        return self._store.claim(name, self._models[name].profile.batch)

    def _hand_over(self, claimed: list[tuple[Job, Pictures]]) -> None:
        model = claimed[0][0].model
        with self._lock:
            self._hungry.clear()
            self._idle.clear()
            self._heard = time.monotonic()
            self._jobs |= {job.id: job for job, _ in claimed}
        if model != self._model:
            self._model = model
            self._have_opened(model)
        clips = tuple(clip_of(job, pictures) for job, pictures in claimed)
        self._outbox.put(Make(clips, claimed[0][0].request["settings"]))

    def _answered(self, message: Made | Failed | Dropped) -> None:
        job = self._jobs.get(message.job)
        if job is None or job.attempt != message.attempt:
            return
        if isinstance(message, Made):
            self._made(job, message)
        elif isinstance(message, Failed):
            self._surely(self._store.fail, job, Failure(message.code, message.message))
        with self._lock:
            self._jobs.pop(job.id, None)
            self._steps.pop(job.id, None)
            if not self._jobs:
                self._idle.set()

    def _made(self, job: Job, made: Made) -> None:
        name = draft_name(job)
        draft = draft_path(self._drafts, name)
        try:
            self._results.put(draft, name)
        except OSError as error:
            log.error("a result is gone: %s", error, extra={"job": job.id})
            shutil.rmtree(draft, ignore_errors=True)
            self._surely(self._store.give_back, job, Failure("storage", "the result could not be stored; ask again"))
            return
        ready = self._ready[job.model]
        if self._surely(self._store.complete, job, result_of(name, made, ready.engine, ready.parity)) is None:
            self._results.remove(name, made.bytes)

    def _keep_alive(self) -> None:
        """Tell the store of progress, and that this worker lives and has its jobs, until `stop` is done."""
        heard = counted = -math.inf
        while not self._stopped.wait(max(_NOTED_EVERY, self._colleagues / _NOTES_A_SECOND)):
            if self.hangs:
                continue  # its jobs are given back, and it is replaced
            try:
                self._note_steps()
                if time.monotonic() - heard > HEARD_EVERY:
                    heard = time.monotonic()
                    self._renew()
                if time.monotonic() - counted > _COUNTED_EVERY:
                    counted = time.monotonic()
                    self._colleagues = max(1, self._roster.count())
            except StoreUnavailable as error:
                log.error("cannot say that this worker lives: %s", error)

    def _note_steps(self) -> None:
        with self._lock:
            steps, self._steps = self._steps, {}
            jobs = [(self._jobs[id], done) for id, done in steps.items() if id in self._jobs]
        for job, done in jobs:
            if not self._store.step(job, done):
                self._drop(job.id)

    def _renew(self) -> None:
        with self._lock:
            jobs = list(self._jobs.values())
        ours = self._store.renew(jobs)
        self._roster.heard(self._worker)
        for job in jobs:
            if job.id not in ours:
                self._drop(job.id)

    def _drop(self, id: str) -> None:
        if id in self._jobs:
            self._outbox.put(Drop(id))

    def _surely(self, change: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same, again and again until the store answers."""
        while True:
            try:
                return change(*args, **kwargs)
            except StoreUnavailable as error:
                log.error("cannot note a job's state, trying again: %s", error)
                time.sleep(_TRIED_AGAIN_AFTER)
