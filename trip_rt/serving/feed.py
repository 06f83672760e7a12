"""What happens to a job, for all who listen to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any


class Feed:
    """A list of events that grows until it is closed; each listener is told of all from where it begins. The event loop
    alone touches it."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.listeners = 0
        self.closed = False
        self._changed = asyncio.Event()

    def publish(self, name: str, data: Any, last: bool = False) -> None:
        """Add an event; `last` closes the feed."""
        self.events.append((name, data))
        self.closed = self.closed or last
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self, start: int = 0) -> AsyncIterator[tuple[int, str, Any]]:
        """Number, name and data of each event from number `start` on, until the feed is closed."""
        self.listeners += 1
        try:
            while True:
                changed = self._changed
                while start < len(self.events):
                    yield start, *self.events[start]
                    start += 1
                if self.closed:
                    return
                await changed.wait()
        finally:
            self.listeners -= 1
