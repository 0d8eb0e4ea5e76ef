"""The attempts at one provider call: paced, retried within bounds, and never again once something was shown.

`Attempts` is what the call flights of threads and those of `/v1` have in common. A subclass says how the answer is read
and what is written down about each attempt.

How an attempt ends is told to whoever can learn from it: the model's breaker, and the pacer where the provider refused
for its rate. A wait that the provider names and that nobody would sit out concerns the model alone: limits of that kind
(so many tokens a day) are a model's, and a pacer that kept to them would stop all others.

Deliberately absent: who shares a call, and what becomes of its answer.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from oncewise.core.breaker import Breakers
from oncewise.core.coalesce import Flight
from oncewise.core.pacing import Pacer, Permit, Place
from oncewise.core.retry import RetryBudget, backoff_s
from oncewise.errors import Failure, OncewiseError, ProviderRateLimited, ProviderTimeout
from oncewise.model import Usage
from oncewise.ports import Provider

__all__ = ["Attempts", "ProviderLane", "remember_s"]

MAX_ATTEMPTS = 3
MAX_PAUSE_S = 60.0
"""Longer than anybody waits for a start."""
TOTAL_S = 120.0
"""From the first start of a call to its end, retries included."""

_FAILED = frozenset({"provider_error", "provider_protocol", "provider_timeout", "provider_unavailable"})
_FROM_PROVIDER = _FAILED | {"provider_rate_limited"}

T = TypeVar("T")


def remember_s(failure: Failure) -> float:
    """How long a failed call answers equal requests: they would fail the same way, and cost."""
    if failure.code in ("provider_rate_limited", "provider_unavailable", "overloaded"):
        return min(failure.retry_after_s or 1.0, 5.0)
    if failure.code == "provider_error" and not failure.retryable:
        return 2.0
    return 0.0


@dataclass(frozen=True, slots=True)
class ProviderLane:
    """One provider with what limits the calls to it. Made once per provider, by the composition root.

    Attributes:
        meta: What stored answers say of this provider, e.g. that it is the demo.
    """

    provider: Provider
    pacer: Pacer
    default_model: str
    budget: RetryBudget
    meta: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    breakers: Breakers = field(default_factory=Breakers)


class Attempts(ABC, Generic[T]):
    """The work of one call flight, up to three requests to a provider.

    Attributes:
        calls: Requests made to the provider so far.
        queue_wait_s: Seconds the first attempt waited; None until it started.
    """

    def __init__(self, lane: ProviderLane, org_id: str, model: str, chance: Callable[[], float]) -> None:
        self.calls = 0
        self.queue_wait_s: float | None = None
        self._lane = lane
        self._org_id = org_id
        self._model = model
        self._place: Place | None = None
        self._chance = chance
        self._ends_s = float("inf")

    @property
    def queue_position(self) -> int:
        """Calls that the provider's pacer starts before this one, as it looks now; 0 once this one started."""
        return 0 if self._place is None else self._place.position

    @property
    def queued_behind(self) -> int:
        """How many those were when this one joined the queue."""
        return 0 if self._place is None else self._place.ahead

    async def run(self, flight: Flight[T]) -> T:
        """Make the call.

        Raises:
            OncewiseError: as `Breakers.begin`, `Pacer.permit` and `Provider.stream`.
        """
        while True:
            made = self.calls
            try:
                return await self._attempt(flight)
            except OncewiseError as error:
                # A refusal of ours, without a call, is final: it says itself when to come again.
                delay_s = self._retry_in_s(error) if self.calls > made else None
                if delay_s is None:
                    raise
                await asyncio.sleep(delay_s)

    # -- what a subclass says ------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def _shown(self) -> bool:
        """Whether anything of the answer may have been seen."""

    @abstractmethod
    async def _read(self) -> T:
        """Make one request and read its answer."""

    @abstractmethod
    def _usage(self, answer: T) -> Usage | None:
        """The provider's own figures."""

    def _started(self) -> None:
        """The provider is about to be called for the first time."""

    async def _opened(self) -> None:
        """A request to the provider is about to be made."""

    async def _closed(self, outcome: str, usage: Usage | None) -> None:
        """It ended: `ok`, or an error code."""

    # -- one attempt ---------------------------------------------------------------------------------------------

    def _retry_in_s(self, error: OncewiseError) -> float | None:
        """Seconds to wait before another attempt; None if there must be none."""
        now_s = asyncio.get_running_loop().time()
        if not self._may_retry(error):
            return None
        delay_s = error.retry_after_s
        if delay_s is None:
            delay_s = backoff_s(self.calls, self._chance())
        # Neither a start nor the budget is for an attempt that would be refused here.
        if now_s + delay_s >= self._ends_s or delay_s < self._lane.breakers.wait_s(self._model, now_s):
            return None
        if not self._lane.budget.spend(now_s):
            return None
        return delay_s

    def _may_retry(self, error: OncewiseError) -> bool:
        # Shown text is never replaced in silence: the first delta ends all retries.
        return error.code in _FROM_PROVIDER and error.retryable and not self._shown and self.calls < MAX_ATTEMPTS

    async def _attempt(self, flight: Flight[T]) -> T:
        """One attempt, unless the model is better left alone; tells its breaker how that ended."""
        breakers, clock_s = self._lane.breakers, asyncio.get_running_loop().time
        period = breakers.begin(self._model, clock_s())
        good: bool | None = None
        try:
            self._place = self._lane.pacer.permit(self._org_id, self._model)
            async with self._place as permit:
                breakers.check(self._model, period, clock_s())
                answer = await self._call(flight, permit)
            good = True
        except OncewiseError as error:
            good = False if error.code in _FAILED and error.retryable and not error.self_inflicted else None
            raise
        finally:
            opened = breakers.end(self._model, period, clock_s(), good=good)
            if opened is not None:
                self._lane.pacer.turn_away(self._model, opened)
        return answer

    async def _call(self, flight: Flight[T], permit: Permit) -> T:
        await self._opened()
        began_s = self._begin(flight, permit.queue_wait_s)
        usage: Usage | None = None
        outcome = "cancelled"
        try:
            answer = await self._read_in_time()
            usage, outcome = self._usage(answer), "ok"
            self._lane.pacer.accepted(began_s)
        except OncewiseError as error:
            outcome = error.code
            if outcome == ProviderRateLimited.code:
                self._slow_down(began_s, error.retry_after_s)
            raise
        finally:
            await self._closed(outcome, usage)
        return answer

    def _slow_down(self, began_s: float, retry_after_s: float | None) -> None:
        # For everyone: whoever called next would be refused as well, and prolong it with some providers.
        lane = self._lane
        if retry_after_s is None or retry_after_s <= MAX_PAUSE_S:
            lane.pacer.slow_down(began_s, retry_after_s)
            return
        lane.pacer.slow_down(began_s, 0.0)
        held = lane.breakers.hold(self._model, asyncio.get_running_loop().time(), retry_after_s)
        lane.pacer.turn_away(self._model, held)

    def _begin(self, flight: Flight[T], queue_wait_s: float) -> float:
        now_s = asyncio.get_running_loop().time()
        self.calls += 1
        flight.mark_running()
        if self.queue_wait_s is None:
            self._lane.budget.called(now_s)
            self._ends_s = now_s + TOTAL_S
            self.queue_wait_s = queue_wait_s
            self._started()
        return now_s

    async def _read_in_time(self) -> T:
        try:
            async with asyncio.timeout_at(self._ends_s):
                return await self._read()
        except TimeoutError:
            late = ProviderTimeout()
            late.self_inflicted = self._shown
            raise late from None
