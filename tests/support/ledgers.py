"""The real ledger, watched and disturbed: its methods are counted, held up or failed as a test says."""

import asyncio
from collections import Counter, defaultdict
from typing import Any

__all__ = ["DisturbedLedger", "Gate"]


class Gate:
    """Where calls of one method wait.

    Attributes:
        reached: Set once a call stands before it.
        open: Lets it, and all after it, pass.
    """

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def pass_through(self) -> None:
        self.reached.set()
        await self.open.wait()


class DisturbedLedger:
    """Wraps a `TurnLedger`.

    Attributes:
        calls: How often each method was called.
    """

    def __init__(self, ledger: Any) -> None:
        self.calls: Counter[str] = Counter()
        self._ledger = ledger
        self._before: dict[str, Gate] = {}
        self._after: dict[str, Gate] = {}
        self._failures: defaultdict[str, list[Exception]] = defaultdict(list)

    def hold_before(self, method: str) -> Gate:
        """Keep calls of a method from the database."""
        return self._before.setdefault(method, Gate())

    def hold_after(self, method: str) -> Gate:
        """Keep the outcome of a method from its caller; the transaction is done."""
        return self._after.setdefault(method, Gate())

    def fail(self, method: str, error: Exception, times: int = 1) -> None:
        """Let the next calls of a method fail, without any transaction."""
        self._failures[method] += [error] * times

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._ledger, name)

        async def disturbed(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            if self._failures[name]:
                raise self._failures[name].pop(0)
            if name in self._before:
                await self._before[name].pass_through()
            result = await method(*args, **kwargs)
            if name in self._after:
                await self._after[name].pass_through()
            return result

        return disturbed
