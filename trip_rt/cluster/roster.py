"""Which workers there are: a table in which each notes, again and again, that it lives and what it has open."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import JSON, Column, Float, MetaData, String, Table, func, select

from trip_rt.serving.database import Database

_WORKERS = Table(
    "workers_1",
    MetaData(),
    Column("worker", String(64), primary_key=True),
    Column("model", String(200), primary_key=True),
    Column("heard_at", Float, nullable=False, index=True),
    Column("ready", JSON, nullable=False),
)


@dataclass(frozen=True)
class Entry:
    """A model that a worker has had open: the fields of protocol.Ready."""

    worker: str
    model: str
    ready: dict[str, Any]


class Roster:
    """A worker that was not heard for `silent_s` is no more. Every method may raise StoreUnavailable."""

    def __init__(self, database: Database, silent_s: float, clock: Callable[[], float] = time.time):
        database.have(_WORKERS)
        self._database, self._silent_s, self._clock = database, silent_s, clock

    def note(self, worker: str, model: str, ready: dict[str, Any]) -> None:
        """A worker has opened a model."""
        row = {"worker": worker, "model": model, "heard_at": self._clock(), "ready": ready}
        with self._database.transaction() as connection:
            connection.execute(_WORKERS.delete().where(_is(worker) & (_WORKERS.c.model == model)))
            connection.execute(_WORKERS.insert().values(row))

    def heard(self, worker: str) -> None:
        """A worker lives."""
        with self._database.transaction() as connection:
            connection.execute(_WORKERS.update().where(_is(worker)).values(heard_at=self._clock()))

    def entries(self) -> list[Entry]:
        """All that live now."""
        query = select(_WORKERS.c.worker, _WORKERS.c.model, _WORKERS.c.ready).where(_WORKERS.c.heard_at > self._since())
        with self._database.reading() as connection:
            return [Entry(*row) for row in connection.execute(query).all()]

    def count(self) -> int:
        """How many live now."""
        query = select(func.count(_WORKERS.c.worker.distinct())).where(_WORKERS.c.heard_at > self._since())
        with self._database.reading() as connection:
            return int(connection.execute(query).scalar_one())

    def remove(self, worker: str) -> None:
        """A worker has ended."""
        with self._database.transaction() as connection:
            connection.execute(_WORKERS.delete().where(_is(worker)))

    def sweep(self) -> None:
        """Forget those that are no more."""
        with self._database.transaction() as connection:
            connection.execute(_WORKERS.delete().where(_WORKERS.c.heard_at <= self._since()))

    def _since(self) -> float:
        return self._clock() - self._silent_s


def _is(worker: str) -> Any:
    return _WORKERS.c.worker == worker
