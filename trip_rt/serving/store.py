"""Where jobs are kept: a table of a SQL database. SQLite's serves one machine, PostgreSQL's several.

Each method is one transaction. Every change says which state, and which attempt, it expects; `False` or None says that
another was quicker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Engine,
    Float,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    event,
    func,
    select,
)
from sqlalchemy.exc import SQLAlchemyError

from trip_rt.errors import InputError, one_line
from trip_rt.serving.jobs import FINISHED, MOST_ATTEMPTS, Failure, Job, State, new_id

_READS = "trip_rt_reads"  # the option of a connection that changes nothing
_WAIT = 30  # seconds that a transaction waits for another one's lock

_JOBS = Table(
    "jobs",
    MetaData(),
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("owner", String(64), nullable=False),
    Column("idempotency_key", String(255)),
    Column("model", String(200), nullable=False),
    Column("request", JSON, nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("attempt", Integer, nullable=False),
    Column("steps_done", Integer, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("expires_at", Float, index=True),
    Column("failure", JSON),
    Column("result", JSON),
    UniqueConstraint("owner", "idempotency_key"),
    sqlite_autoincrement=True,  # a number is not used again after its job is deleted: a client may page from there
)


class QueueFull(Exception):
    """As many jobs wait as may."""


class OtherRequest(Exception):
    """The idempotency key was used for another request."""


class JobStore:
    """`url` is SQLAlchemy's, such as sqlite:///jobs.db; `lifetime` is how many seconds a finished job is kept, `clock`
    the time. InputError where there is no database to be had."""

    def __init__(self, url: str, lifetime: float = 86400, clock: Callable[[], float] = time.time):
        self._lifetime, self._clock = lifetime, clock
        try:
            self._engine = _open(url)
            _JOBS.metadata.create_all(self._engine)
        except (SQLAlchemyError, ImportError, ValueError) as error:
            raise InputError(
                f"jobs: cannot open the database ({one_line(error)}), expected one such as sqlite:///jobs.db"
            ) from error

    def add(
        self,
        owner: str,
        model: str,
        request: dict[str, Any],
        steps: int,
        most_queued: int,
        idempotency_key: str | None = None,
    ) -> Job:
        """A new job at the queue's end, or the one that the same owner added with the same key. QueueFull where
        `most_queued` are waiting, OtherRequest where the key was for another request."""
        with self._transaction() as connection:
            if idempotency_key is not None:
                same = (_JOBS.c.owner == owner) & (_JOBS.c.idempotency_key == idempotency_key)
                if row := connection.execute(select(_JOBS).where(same)).first():
                    if (row.model, row.request) != (model, request):
                        raise OtherRequest
                    return _job(row)
            waiting = select(func.count()).where(_JOBS.c.state == "queued")
            if connection.execute(waiting).scalar_one() >= most_queued:
                raise QueueFull
            values = {
                "id": new_id(),
                "owner": owner,
                "idempotency_key": idempotency_key,
                "model": model,
                "request": request,
                "state": "queued",
                "attempt": 0,
                "steps_done": 0,
                "steps": steps,
                "created_at": self._clock(),
            }
            connection.execute(_JOBS.insert().values(values))
            return _job(connection.execute(select(_JOBS).where(_JOBS.c.id == values["id"])).one())

    def get(self, id: str, owner: str | None = None) -> Job | None:
        """The job of that id; None where there is none, or another's."""
        query = select(_JOBS).where(_JOBS.c.id == id)
        if owner is not None:
            query = query.where(_JOBS.c.owner == owner)
        with self._reading() as connection:
            row = connection.execute(query).first()
        return _job(row) if row else None

    def page(self, owner: str, after: str | None, limit: int, ascending: bool = False) -> tuple[list[Job], bool] | None:
        """Up to `limit` jobs of an owner's, newest first or oldest first, behind the job `after`, and whether there are
        more; None where `after` is no job of theirs."""
        number = _JOBS.c.number
        query = select(_JOBS).where(_JOBS.c.owner == owner).order_by(number if ascending else number.desc())
        with self._reading() as connection:
            if after is not None:
                found = select(number).where((_JOBS.c.id == after) & (_JOBS.c.owner == owner))
                place = connection.execute(found).scalar()
                if place is None:
                    return None
                query = query.where(number > place if ascending else number < place)
            rows = connection.execute(query.limit(limit + 1)).all()
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def ahead(self, job: Job) -> int:
        """How many jobs of the same model wait before a queued one."""
        before = (_JOBS.c.state == "queued") & (_JOBS.c.model == job.model) & (_JOBS.c.number < job.number)
        with self._reading() as connection:
            return int(connection.execute(select(func.count()).where(before)).scalar_one())

    def counts(self) -> dict[State, int]:
        """How many jobs there are in each state."""
        query = select(_JOBS.c.state, func.count()).group_by(_JOBS.c.state)
        with self._reading() as connection:
            return {row[0]: row[1] for row in connection.execute(query).all()}

    def claim(self, model: str, most: int = 1) -> list[Job]:
        """Up to `most` of the model's oldest queued jobs, which are in progress from now on."""
        oldest = select(_JOBS.c.id).where((_JOBS.c.state == "queued") & (_JOBS.c.model == model))
        oldest = oldest.order_by(_JOBS.c.number).limit(most).with_for_update(skip_locked=True)
        with self._transaction() as connection:
            ids = connection.execute(oldest).scalars().all()
            begun = {
                "state": "in_progress",
                "attempt": _JOBS.c.attempt + 1,
                "steps_done": 0,
                "started_at": self._clock(),
            }
            where = _JOBS.c.id.in_(ids) & (_JOBS.c.state == "queued")
            connection.execute(_JOBS.update().where(where).values(begun))
            query = select(_JOBS).where(_JOBS.c.id.in_(ids) & (_JOBS.c.state == "in_progress"))
            return [_job(row) for row in connection.execute(query.order_by(_JOBS.c.number)).all()]

    def step(self, job: Job, steps_done: int) -> bool:
        """Note progress; False where the job is no longer this attempt's, so that its work can stop."""
        return self._change(job, {"steps_done": steps_done})

    def complete(self, job: Job, result: dict[str, Any]) -> bool:
        """False where the job is no longer this attempt's: then its result is nobody's."""
        return self._change(job, self._end("completed") | {"result": result, "steps_done": job.steps})

    def fail(self, job: Job, failure: Failure) -> bool:
        """The job cannot be done; False as for `complete`."""
        return self._change(job, self._end("failed") | {"failure": vars(failure)})

    def give_back(self, job: Job, failure: Failure) -> bool:
        """Back to its place in the queue, or failed for that reason after MOST_ATTEMPTS; False as for `complete`."""
        if job.attempt >= MOST_ATTEMPTS:
            return self.fail(job, failure)
        return self._change(job, {"state": "queued", "steps_done": 0, "started_at": None})

    def give_back_all(self, failure: Failure) -> list[Job]:
        """The same with every job in progress, at a start after which no worker has one."""
        with self._reading() as connection:
            rows = connection.execute(select(_JOBS).where(_JOBS.c.state == "in_progress")).all()
        return [job for job in map(_job, rows) if self.give_back(job, failure)]

    def cancel(self, id: str) -> bool:
        """False where the job is finished, or is none."""
        running = _JOBS.c.state.not_in(FINISHED)
        return self._update((_JOBS.c.id == id) & running, self._end("cancelled"))

    def delete(self, id: str) -> bool:
        """Forget a finished job; False where it is not finished, or is none."""
        with self._transaction() as connection:
            where = (_JOBS.c.id == id) & _JOBS.c.state.in_(FINISHED)
            return connection.execute(_JOBS.delete().where(where)).rowcount == 1

    def expired(self) -> list[Job]:
        """Finished jobs whose time is over."""
        with self._reading() as connection:
            rows = connection.execute(select(_JOBS).where(_JOBS.c.expires_at <= self._clock())).all()
        return [_job(row) for row in rows]

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def _change(self, job: Job, values: dict[str, Any]) -> bool:
        where = (_JOBS.c.id == job.id) & (_JOBS.c.state == "in_progress") & (_JOBS.c.attempt == job.attempt)
        return self._update(where, values)

    def _update(self, where: Any, values: dict[str, Any]) -> bool:
        with self._transaction() as connection:
            return connection.execute(_JOBS.update().where(where).values(values)).rowcount == 1

    def _end(self, state: State) -> dict[str, Any]:
        now = self._clock()
        return {"state": state, "finished_at": now, "expires_at": now + self._lifetime}

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._engine.connect().execution_options(**{_READS: True}) as connection, connection.begin():
            yield connection


def _open(url: str) -> Engine:
    sqlite = url.startswith("sqlite:")
    engine = create_engine(url, connect_args={"timeout": _WAIT} if sqlite else {})
    if sqlite:

        @event.listens_for(engine, "connect")
        def connected(connection: Any, record: object) -> None:
            connection.isolation_level = None  # transactions are begun by us, below
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")  # a job that was promised outlives a power cut

        @event.listens_for(engine, "begin")
        def begun(connection: Connection) -> None:
            # Who will write has the lock from the start: of two that read first, one could never go on.
            reads = connection.get_execution_options().get(_READS)
            connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def _job(row: Row[Any]) -> Job:
    values = dict(row._mapping)
    del values["idempotency_key"]
    return Job(**values | {"failure": values["failure"] and Failure(**values["failure"])})
