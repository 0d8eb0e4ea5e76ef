"""Tasks that nobody waits for: what one worker tells another, and what is given back.

No request can cancel one, and none fails for anybody: the other side may be away, and whoever depends on what was said
looks for himself after a while.

Deliberately absent: work that must be done. That has an owner who awaits it.
"""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from contextvars import Context
from typing import Any

from oncewise.errors import OncewiseError

__all__ = ["Errands"]


class Errands:
    """The errands of one owner, who closes them.

    Args:
        at_most: Errands under way at a time; further ones are dropped.
    """

    def __init__(self, at_most: int = 10_000) -> None:
        self._at_most = at_most
        self._tasks: set[asyncio.Task[None]] = set()

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do `work` beside everything else; deliberate errors end it in silence."""
        if len(self._tasks) >= self._at_most:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(_quietly(work), context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def aclose(self, patience_s: float = 1.0) -> None:
        """Give what is under way a moment, then end it."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=patience_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)


async def _quietly(work: Coroutine[Any, Any, Any]) -> None:
    with suppress(OncewiseError):
        await work
