"""Where jobs are kept: a table of a SQL database.

Each method is one transaction, `give_back_all` one for each job. Every change says which state, and which attempt, it
expects; `False` or None says that another was quicker.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    ColumnElement,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    String,
    Table,
    UniqueConstraint,
    and_,
    func,
    or_,
    select,
)
from sqlalchemy.exc import IntegrityError

from trip_rt.serving.database import Database
from trip_rt.serving.jobs import FINISHED, MOST_LOSSES, Failure, Job, NewJob, Pictures, State, new_id

_JOBS = Table(
    "jobs_2",  # the layout's version: one of another version is left alone
    MetaData(),
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("owner", String(64), nullable=False),
    Column("idempotency_key", String(255)),
    Column("fingerprint", String(64), nullable=False),
    Column("model", String(200), nullable=False),
    Column("batch_key", String(64), nullable=False),
    Column("request", JSON, nullable=False),
    Column("picture", LargeBinary, nullable=False),
    Column("origin", LargeBinary),
    Column("state", String(16), nullable=False, index=True),
    Column("attempt", Integer, nullable=False),
    Column("losses", Integer, nullable=False),
    Column("steps_done", Integer, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("heard_at", Float),  # when a worker last said that it has the job
    Column("finished_at", Float),
    Column("expires_at", Float, index=True),
    Column("failure", JSON),
    Column("result", JSON),
    Column("result_bytes", Integer),
    UniqueConstraint("owner", "idempotency_key"),
    sqlite_autoincrement=True,  # a number is not used again after its job is deleted: a client may page from there
)
_QUEUED = select(func.count()).where(_JOBS.c.state == "queued")
_ROW = [_JOBS.c[field.name] for field in dataclasses.fields(Job)]
_FILES = [_JOBS.c[name] for name in Pictures._fields]


class QueueFull(Exception):
    """As many jobs wait as may."""


class OtherRequest(Exception):
    """The idempotency key was used for another request."""


class JobStore:
    """`url` is of a Database; `lifetime` is how many seconds a finished job is kept, `clock` the time. InputError where
    there is no database to be had; every method may raise StoreUnavailable."""

    def __init__(self, url: str, lifetime: float = 86400, clock: Callable[[], float] = time.time):
        self._lifetime, self._clock = lifetime, clock
        self.database = Database(url)
        self.database.have(_JOBS)

    def add(self, new: NewJob, most_queued: int) -> tuple[Job, bool]:
        """A new job at the queue's end, and True; or the one that the same owner added with the same key, and False.
        QueueFull where `most_queued` are waiting, OtherRequest where the key was for another request."""
        try:
            return self._add(new, most_queued)
        except IntegrityError:  # another server has added the key's job since we looked
            return self._add(new, most_queued)

    def _add(self, new: NewJob, most_queued: int) -> tuple[Job, bool]:
        with self.database.transaction() as connection:
            if new.idempotency_key is not None:
                same = (_JOBS.c.owner == new.owner) & (_JOBS.c.idempotency_key == new.idempotency_key)
                if row := connection.execute(select(*_ROW, _JOBS.c.fingerprint).where(same)).first():
                    if row.fingerprint != new.fingerprint:
                        raise OtherRequest
                    return _job(row), False
            if connection.execute(_QUEUED).scalar_one() >= most_queued:
                raise QueueFull
            values = vars(new) | {
                "id": new_id(),
                "state": "queued",
                "attempt": 0,
                "losses": 0,
                "steps_done": 0,
                "created_at": self._clock(),
            }
            connection.execute(_JOBS.insert().values(values))
            return _job(connection.execute(select(*_ROW).where(_JOBS.c.id == values["id"])).one()), True

    def get(self, id: str, owner: str | None = None) -> Job | None:
        """The job of that id; None where there is none, or another's."""
        with self.database.reading() as connection:
            row = connection.execute(select(*_ROW).where(_is(id, owner))).first()
        return _job(row) if row else None

    def picture(self, id: str) -> bytes | None:
        """The picture that a job's clip began with; None where there is no such job."""
        with self.database.reading() as connection:
            return connection.execute(select(_JOBS.c.picture).where(_JOBS.c.id == id)).scalar()

    def several(self, ids: Collection[str]) -> list[Job]:
        """The jobs of these ids that there are."""
        with self.database.reading() as connection:
            rows = connection.execute(select(*_ROW).where(_JOBS.c.id.in_(ids))).all()
        return [_job(row) for row in rows]

    def page(self, owner: str, after: str | None, limit: int, ascending: bool = False) -> tuple[list[Job], bool] | None:
        """Up to `limit` jobs of an owner's, newest first or oldest first, behind the job `after`, and whether there are
        more; None where `after` is no job of theirs."""
        number = _JOBS.c.number
        query = select(*_ROW).where(_JOBS.c.owner == owner).order_by(number if ascending else number.desc())
        with self.database.reading() as connection:
            if after is not None:
                place = connection.execute(select(number).where(_is(after, owner))).scalar()
                if place is None:
                    return None
                query = query.where(number > place if ascending else number < place)
            rows = connection.execute(query.limit(limit + 1)).all()
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def waiting(self, model: str) -> list[tuple[str, int]]:
        """Id and steps of each of the model's queued jobs, the next one first."""
        query = select(_JOBS.c.id, _JOBS.c.steps).where((_JOBS.c.state == "queued") & (_JOBS.c.model == model))
        with self.database.reading() as connection:
            return [(row[0], row[1]) for row in connection.execute(query.order_by(_JOBS.c.number)).all()]

    def queued(self) -> int:
        """How many jobs wait, of all models."""
        with self.database.reading() as connection:
            return int(connection.execute(_QUEUED).scalar_one())

    def in_progress(self, model: str) -> list[Job]:
        """The model's jobs that workers have."""
        where = (_JOBS.c.state == "in_progress") & (_JOBS.c.model == model)
        with self.database.reading() as connection:
            rows = connection.execute(select(*_ROW).where(where)).all()
        return [_job(row) for row in rows]

    def waiting_since(self) -> dict[str, float]:
        """When the oldest queued job of each model that has any was created."""
        query = select(_JOBS.c.model, func.min(_JOBS.c.created_at)).where(_JOBS.c.state == "queued")
        with self.database.reading() as connection:
            return {row[0]: row[1] for row in connection.execute(query.group_by(_JOBS.c.model)).all()}

    def counts(self) -> dict[tuple[str, State], int]:
        """How many jobs there are of each model and state."""
        query = select(_JOBS.c.model, _JOBS.c.state, func.count()).group_by(_JOBS.c.model, _JOBS.c.state)
        with self.database.reading() as connection:
            return {(row[0], row[1]): row[2] for row in connection.execute(query).all()}

    def completed(self) -> list[Job]:
        """All jobs that have a result."""
        with self.database.reading() as connection:
            rows = connection.execute(select(*_ROW).where(_JOBS.c.state == "completed")).all()
        return [_job(row) for row in rows]

    def result_bytes(self) -> int:
        """Of all results together."""
        with self.database.reading() as connection:
            return int(connection.execute(select(func.sum(_JOBS.c.result_bytes))).scalar() or 0)

    def claim(self, model: str, most: int = 1) -> list[tuple[Job, Pictures]]:
        """The model's oldest queued job and up to `most` in all that can be made together with it, with their pictures,
        which are in progress from now on. One that a worker was lost over goes alone, so that it costs no other job a
        loss."""
        waits = (_JOBS.c.state == "queued") & (_JOBS.c.model == model)
        oldest = select(_JOBS.c.id, _JOBS.c.batch_key, _JOBS.c.losses).where(waits).order_by(_JOBS.c.number).limit(1)
        with self.database.transaction() as connection:
            first = connection.execute(oldest.with_for_update(skip_locked=True)).first()
            if first is None:
                return []
            ids = [first.id]
            if most > 1 and not first.losses:
                like = waits & (_JOBS.c.batch_key == first.batch_key) & (_JOBS.c.losses == 0)
                more = select(_JOBS.c.id).where(like).order_by(_JOBS.c.number).limit(most)
                ids = list(connection.execute(more.with_for_update(skip_locked=True)).scalars())
            begun = {
                "state": "in_progress",
                "attempt": _JOBS.c.attempt + 1,
                "steps_done": 0,
                "started_at": self._clock(),
                "heard_at": self._clock(),
            }
            connection.execute(_JOBS.update().where(_JOBS.c.id.in_(ids) & waits).values(begun))
            query = select(*_ROW, *_FILES).where(_JOBS.c.id.in_(ids) & (_JOBS.c.state == "in_progress"))
            rows = connection.execute(query.order_by(_JOBS.c.number)).all()
            return [(_job(row), Pictures(row.picture, row.origin)) for row in rows]

    def step(self, job: Job, steps_done: int) -> bool:
        """Note progress; False where the job is no longer this attempt's, so that its work can stop."""
        return self._change(job, {"steps_done": steps_done, "heard_at": self._clock()}) is not None

    def renew(self, jobs: Collection[Job]) -> set[str]:
        """Note that a worker still has these jobs; the ids of those that are still their attempts'."""
        ours = or_(*(and_(_JOBS.c.id == job.id, _JOBS.c.attempt == job.attempt) for job in jobs))
        where = ours & (_JOBS.c.state == "in_progress")
        if not jobs:
            return set()
        with self.database.transaction() as connection:
            connection.execute(_JOBS.update().where(where).values(heard_at=self._clock()))
            return set(connection.execute(select(_JOBS.c.id).where(where)).scalars())

    def complete(self, job: Job, result: dict[str, Any]) -> Job | None:
        """The completed job; None where it is no longer this attempt's: then its result is nobody's."""
        size = {"result_bytes": result.get("bytes")}
        values = self._end("completed") | size | {"result": result, "steps_done": job.steps}
        return self._change(job, values)

    def fail(self, job: Job, failure: Failure) -> Job | None:
        """The job cannot be done: the failed job; None as for `complete`."""
        values = self._end("failed") | {"failure": vars(failure)}
        return self._change(job, values)

    def give_back(self, job: Job, loss: Failure | None = None) -> Job | None:
        """Back to its place in the queue. `loss` says how its worker was lost, after MOST_LOSSES of which the job has
        failed. None as for `complete`."""
        if loss is not None and job.losses + 1 >= MOST_LOSSES:
            return self.fail(job, loss)
        losses = job.losses + (loss is not None)
        values = {"state": "queued", "steps_done": 0, "started_at": None, "losses": losses}
        return self._change(job, values)

    def give_back_silent(self, seconds: float, loss: Failure) -> list[Job]:
        """The same with every job in progress that no worker has said it has for so many seconds."""
        silent = (_JOBS.c.state == "in_progress") & (_JOBS.c.heard_at <= self._clock() - seconds)
        with self.database.reading() as connection:
            rows = connection.execute(select(*_ROW).where(silent)).all()
        return [given for given in (self.give_back(_job(row), loss) for row in rows) if given]

    def give_back_all(self, loss: Failure) -> list[Job]:
        """The same with every job in progress, at a start after which no worker has one."""
        return self.give_back_silent(-math.inf, loss)

    def cancel(self, id: str, owner: str) -> tuple[Job, Job] | None:
        """The job before and after it was cancelled; None where it is finished or there is none of that owner's."""
        with self.database.transaction() as connection:
            where = _is(id, owner) & _JOBS.c.state.not_in(FINISHED)
            row = connection.execute(select(*_ROW).where(where).with_for_update()).first()
            if row is None:
                return None
            connection.execute(_JOBS.update().where(_JOBS.c.id == id).values(self._end("cancelled")))
            return _job(row), _job(connection.execute(select(*_ROW).where(_JOBS.c.id == id)).one())

    def delete(self, id: str, owner: str | None = None) -> Job | None:
        """Forget a job: what it was until then; None where there is none of that owner's."""
        with self.database.transaction() as connection:
            row = connection.execute(select(*_ROW).where(_is(id, owner)).with_for_update()).first()
            connection.execute(_JOBS.delete().where(_is(id, owner)))
        return _job(row) if row else None

    def expired(self) -> list[Job]:
        """Finished jobs whose time is over."""
        with self.database.reading() as connection:
            rows = connection.execute(select(*_ROW).where(_JOBS.c.expires_at <= self._clock())).all()
        return [_job(row) for row in rows]

    def close(self) -> None:
        """Close all connections."""
        self.database.close()

    def _change(self, job: Job, values: dict[str, Any]) -> Job | None:
        """The changed job, read in the same transaction: where that fails, nothing was changed."""
        where = (_JOBS.c.id == job.id) & (_JOBS.c.state == "in_progress") & (_JOBS.c.attempt == job.attempt)
        with self.database.transaction() as connection:
            if connection.execute(_JOBS.update().where(where).values(values)).rowcount != 1:
                return None
            return _job(connection.execute(select(*_ROW).where(_JOBS.c.id == job.id)).one())

    def _end(self, state: State) -> dict[str, Any]:
        now = self._clock()
        return {"state": state, "finished_at": now, "expires_at": now + self._lifetime}


def _is(id: str, owner: str | None) -> ColumnElement[bool]:
    return _JOBS.c.id == id if owner is None else (_JOBS.c.id == id) & (_JOBS.c.owner == owner)


def _job(row: Row[*tuple[Any, ...]]) -> Job:
    values = {field.name: row._mapping[field.name] for field in dataclasses.fields(Job)}
    return Job(**values | {"failure": values["failure"] and Failure(**values["failure"])})
