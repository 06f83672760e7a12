"""A job: what a client asked for and what became of it, as one small state machine.

    queued ──► in_progress ──► completed
      ▲ │         │ │ └──────► failed
      │ └─────────┼─┴────────► cancelled
      └───────────┘  given back by a worker that stopped or was lost

Every change of a job in progress names the attempt that it belongs to. One that comes late, from a worker that was
given up or after a cancel, finds another attempt or state there and changes nothing.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

State = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
STATES: tuple[State, ...] = get_args(State)
FINISHED: tuple[State, ...] = ("completed", "failed", "cancelled")
MOST_LOSSES = 4  # of workers or servers over one job, which is then given up


@dataclass(frozen=True)
class Failure:
    """Why a job failed: a word for programs and a line for people."""

    code: str
    message: str


class Pictures(NamedTuple):
    """The files that a clip is made from, as PNGs: the one that it began with and, where it goes on from another clip,
    the frame that it goes on from."""

    picture: bytes
    origin: bytes | None


@dataclass(frozen=True)
class NewJob:
    """What a job is made of.

    `owner` is whose it is ("" where all are everybody's). `request` is plain JSON, `picture` a file that the server
    itself wrote, as is `origin`, the frame that a clip goes on from (None where it begins with the picture). Jobs of
    one `model` and `batch_key` can be made together. `fingerprint` hashes what the client sent: the same
    `idempotency_key` with another one is a mistake.
    """

    owner: str
    model: str
    request: dict[str, Any]
    picture: bytes
    steps: int
    batch_key: str
    fingerprint: str
    idempotency_key: str | None = None
    origin: bytes | None = None


@dataclass(frozen=True)
class Job:
    """`number` is its place in the order of arrival, `id` what clients call it. `request` is plain JSON, as are
    `result` (of a completed job) and `failure` (of a failed one). `attempt` counts how often it was begun, `losses`
    how often a worker was lost over it. Times are seconds since 1970."""

    number: int
    id: str
    owner: str
    model: str
    request: dict[str, Any]
    state: State
    attempt: int
    losses: int
    steps_done: int
    steps: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    expires_at: float | None
    failure: Failure | None
    result: dict[str, Any] | None

    @property
    def finished(self) -> bool:
        return self.state in FINISHED


def new_id() -> str:
    """One that nobody guesses: 128 random bits."""
    return f"video_{secrets.token_hex(16)}"
