"""The next best thing while the best is away: limits of all workers kept by Redis, else by the database, else alone.

The first that answers counts, in an order of preference. Two of them do not know of each other's bookings, so when
workers change from one to the other some of those may meet. The harm is bounded: what one process starts is never
closer together than the rate, whatever it is told, and never more at a time than the limit.

Deliberately absent: which there are, and in which order. That may change while the process runs: one that is alone on
its database need not ask it.
"""

from collections.abc import Callable, Sequence

from oncewise.core.pacing import Starts
from oncewise.errors import CoordinationUnavailable
from oncewise.ports import CallSlots, SharedLimiter

__all__ = ["FallbackLimiter", "FallbackSlots"]


class FallbackLimiter:
    """Books starts with the first limiter that answers.

    Args:
        limiters: Those to ask now, best first.
        own: What this process alone may start; the same rate.
        clock_s: The clock of `own`.
    """

    def __init__(
        self, limiters: Callable[[], Sequence[SharedLimiter]], own: Starts, clock_s: Callable[[], float]
    ) -> None:
        self._limiters = limiters
        self._own = own
        self._clock_s = clock_s
        self._used: SharedLimiter | None = None

    async def reserve(self) -> float:
        """See `StartLimiter.reserve`."""
        delay_s = await self._reserve()
        now_s = self._clock_s()
        # Counted here as well: a limiter that lost its state would let the next start come at once.
        return self._own.reserve(now_s + delay_s) - now_s

    async def _reserve(self) -> float:
        for limiter in self._limiters():
            try:
                delay_s = await limiter.reserve()
            except CoordinationUnavailable:
                continue
            self._used = limiter
            return delay_s
        self._used = None
        return 0.0

    def take_now(self) -> bool:
        """See `AtHand.take_now`: with nobody to ask, the own starts say it all."""
        if self._limiters():
            return False
        self._used = None
        return self._own.take(self._clock_s())

    async def give_back(self) -> None:
        """See `StartLimiter.give_back`."""
        self._own.give_back()
        try:
            if self._used is not None:
                await self._used.give_back()
        except CoordinationUnavailable:
            return

    async def pause(self, for_s: float) -> None:
        """See `SharedLimiter.pause`; every limiter that answers is told."""
        for limiter in self._limiters():
            try:
                await limiter.pause(for_s)
            except CoordinationUnavailable:
                continue


class FallbackSlots:
    """Takes slots from the first that answers; from none if none does.

    Args:
        slots: Those to ask now, best first.
    """

    def __init__(self, slots: Callable[[], Sequence[CallSlots]]) -> None:
        self._slots = slots
        self._taken: list[CallSlots | None] = []

    async def take(self) -> None:
        """See `CallSlots.take`."""
        for slots in self._slots():
            try:
                await slots.take()
            except CoordinationUnavailable:
                continue
            self._taken.append(slots)
            return
        self._taken.append(None)

    def take_now(self) -> bool:
        """See `AtHand.take_now`: with nobody to ask, slots are not counted."""
        if self._slots():
            return False
        self._taken.append(None)
        return True

    def give_back(self) -> None:
        """See `CallSlots.give_back`."""
        slots = self._taken.pop(0) if self._taken else None
        if slots is not None:
            slots.give_back()
