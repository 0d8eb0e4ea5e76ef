"""Room for so many transactions at a time, first come, first served.

A busy database is waited for, however long the queue: whoever admits requests limits them. A database that stands still
is not: when no place has become free for a while, all who wait are turned away together, since each would find out the
same, each after as long.

Deliberately absent: connections.
"""

import asyncio
from collections import deque
from typing import Self

from oncewise.errors import StorageUnavailable

__all__ = ["Places"]


class Places:
    """Holds `size` at a time, each in an `async with` block.

    Args:
        size: How many.
        patience_s: Seconds without any place becoming free after which those who wait get `StorageUnavailable`.
    """

    def __init__(self, size: int, patience_s: float) -> None:
        self._free = size
        self._patience_s = patience_s
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._moved_s = float("-inf")
        self._watch: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        if self._free:
            self._free -= 1
            return self
        loop = asyncio.get_running_loop()
        place: asyncio.Future[None] = loop.create_future()
        if not self._waiting:
            # Patience begins with the first who waits: before, nothing had to move.
            self._moved_s = loop.time()
        self._waiting.append(place)
        if self._watch is None:
            self._watch = loop.call_later(self._patience_s, self._look)
        try:
            await place
        except asyncio.CancelledError:
            if place in self._waiting:
                self._waiting.remove(place)
            elif not place.cancelled() and place.exception() is None:
                # It was given in this very moment.
                self._pass_on()
            raise
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._moved_s = asyncio.get_running_loop().time()
        self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            # Its task may be cancelled, and not know it yet.
            if not place.done():
                place.set_result(None)
                return
        self._free += 1

    def moved_since(self, time_s: float) -> bool:
        """Whether a place has become free since then, by the loop's clock."""
        return self._moved_s > time_s

    def turn_away(self) -> None:
        """Tell all who wait that the database does not answer."""
        for place in self._waiting:
            if not place.done():
                place.set_exception(StorageUnavailable())
        self._waiting.clear()

    def _look(self) -> None:
        self._watch = None
        loop = asyncio.get_running_loop()
        left_s = self._moved_s + self._patience_s - loop.time()
        if left_s <= 0:
            self.turn_away()
        elif self._waiting:
            self._watch = loop.call_later(left_s, self._look)
