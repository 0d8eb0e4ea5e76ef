"""A limit for each of many waits, with one timer for all of them.

`asyncio.timeout_at` makes a timer and takes it back for every wait. For the pieces of an answer that is as much work as
reading them, and nearly no timer ever fires. Here the timer is left alone while the moment it stands for moves on, and
looks again when it fires.

Deliberately absent: how long anybody should wait.
"""

import asyncio
import math
from typing import Self

__all__ = ["Patience"]


class Patience:
    """Limits the waits of the task that makes it, one after the other.

    Used as `with patience.until(moment_s):` around each wait, and ended when nothing is left to wait for.
    """

    __slots__ = ("_before", "_is_over", "_loop", "_task", "_timer", "_until_s")

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  only a task can be cancelled
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._until_s = math.inf  # while nobody waits
        self._is_over = False
        self._before = 0

    def until(self, until_s: float) -> Self:
        """A block that ends with `TimeoutError` at that moment, by the event loop's clock. Blocks do not nest."""
        if self._timer is None or self._timer.when() > until_s:
            self.end()
            self._timer = self._loop.call_at(until_s, self._look)
        self._until_s = until_s
        return self

    def end(self) -> None:
        """Take the timer back."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def __enter__(self) -> None:
        self._before = self._task.cancelling()

    def __exit__(self, kind: type[BaseException] | None, *_raised: object) -> None:
        self._until_s = math.inf
        if self._is_over:
            self._is_over = False
            # As with asyncio.timeout: if somebody else cancelled the task as well, that is what ends it.
            if self._task.uncancel() <= self._before and kind is asyncio.CancelledError:
                raise TimeoutError

    def _look(self) -> None:
        self._timer = None
        if self._until_s <= self._loop.time():
            self._is_over = True
            self._task.cancel()
        elif self._until_s < math.inf:
            self._timer = self._loop.call_at(self._until_s, self._look)
