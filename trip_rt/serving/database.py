"""The SQL database that a server keeps its tables in: SQLite's serves one machine, PostgreSQL's several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, Table, create_engine, event
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from trip_rt.errors import InputError, one_line

_READS = "trip_rt_reads"  # the option of a connection that changes nothing
_WAIT = 5  # seconds that a transaction waits for another one's lock
_POSTGRES = "postgresql:"
_KEPT = 2  # connections of a process that stay open: a server of many workers has few for each


class StoreUnavailable(Exception):
    """The database does not answer now: another program has locked it, the disk is full. Nothing was changed."""


class Database:
    """`url` is SQLAlchemy's, such as sqlite:///jobs.db or postgresql://user@host/name. InputError where there is no
    database to be had."""

    def __init__(self, url: str):
        with _openable():
            self._engine = _open(url)

    def have(self, table: Table) -> None:
        """Make the table where it is missing; InputError where the database does not answer."""
        with _openable():
            try:
                table.create(self._engine, checkfirst=True)
            except SQLAlchemyError:  # of many processes that start at once, another made it
                table.create(self._engine, checkfirst=True)

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """All of it or nothing; StoreUnavailable where the database does not answer."""
        with _available(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """The same, for what changes nothing."""
        with (
            _available(),
            self._engine.connect().execution_options(**{_READS: True}) as connection,
            connection.begin(),
        ):
            yield connection

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


@contextmanager
def _openable() -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, ImportError, ValueError) as error:
        raise InputError(
            f"jobs: cannot open the database ({one_line(error)}), expected one such as sqlite:///jobs.db or"
            " postgresql://user@host/name"
        ) from error


@contextmanager
def _available() -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise
    except DBAPIError as error:
        raise StoreUnavailable(one_line(error.orig)) from error


def _open(url: str) -> Engine:
    if url.startswith(_POSTGRES):
        return create_engine(
            url.replace(_POSTGRES, "postgresql+psycopg:", 1),
            pool_pre_ping=True,
            pool_size=_KEPT,
            connect_args={"prepare_threshold": None},  # statements that are prepared do not go through every pooler
        )
    if not url.startswith("sqlite:"):
        return create_engine(url)
    engine = create_engine(url, connect_args={"timeout": _WAIT})

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
