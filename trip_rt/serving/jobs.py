"""A job: what a client asked for and what became of it, as one small state machine.

    queued ──► in_progress ──► completed
      ▲ │         │ │ └──────► failed
      │ └─────────┼─┴────────► cancelled
      └───────────┘  given back by a worker that stopped or died

Every change of a job in progress names the attempt that it belongs to. One that comes late, from a worker that was
given up or after a cancel, finds another attempt or state there and changes nothing.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
FINISHED: tuple[State, ...] = ("completed", "failed", "cancelled")
MOST_ATTEMPTS = 3


@dataclass(frozen=True)
class Failure:
    """Why a job failed: a word for programs and a line for people."""

    code: str
    message: str


@dataclass(frozen=True)
class Job:
    """`number` is its place in the order of arrival, `id` what clients call it. `owner` is whose it is ("" where all
    are everybody's). `request` is plain JSON, as are `result` (of a completed job) and `failure` (of a failed one).
    `attempt` counts how often it was begun. Times are seconds since 1970."""

    number: int
    id: str
    owner: str
    model: str
    request: dict[str, Any]
    state: State
    attempt: int
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
