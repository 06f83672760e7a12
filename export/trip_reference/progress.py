"""How far something slow has come: a bar on a terminal, lines elsewhere, as in the log file of a job."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from trip_rt.launch import note

EVERY = 10.0  # seconds between lines, the first and the last excepted

T = TypeVar("T")


class Progress:
    """`done` of `total` units so far; where `shown` is false, nothing is seen. A context that ends the bar."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0, shown: bool = True):
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self._bar = tqdm(total=total, initial=done, desc=label, unit=unit, disable=None if shown else True)
        self._lines = shown and self._bar.disable  # tqdm disables itself where there is no terminal
        self._first, self._began, self._said = done, time.monotonic(), -EVERY

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        """One more is done."""
        self.done += 1
        self._bar.update()

    def say(self, figures: str = "") -> None:
        """Show the figures with the progress."""
        if not self._bar.disable:
            self._bar.set_postfix_str(figures)
        seconds = time.monotonic() - self._began
        if self._lines and (seconds - self._said >= EVERY or self.done == self.total):
            self._said = seconds
            rate = (self.done - self._first) / seconds if seconds else 0.0
            left = f"{_clock((self.total - self.done) / rate)} left" if rate else ""
            place = f"{self.label}: {self.unit} {self.done} of {self.total}"
            note(", ".join(filter(None, (place, figures, left))))


def shown_progress(items: Iterable[T], total: int, label: str, unit: str) -> Iterator[T]:
    """The items, each counted when the next is asked for."""
    with Progress(label, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()
            progress.say()


def _clock(seconds: float) -> str:
    """90 → 1:30."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
