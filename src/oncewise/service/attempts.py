"""The attempts at one provider call: paced, retried within bounds, and never again once something was shown.

`Attempts` is what the call flights of threads and those of `/v1` have in common. A subclass says how the answer is read
and what is written down about each attempt.

Deliberately absent: who shares a call, and what becomes of its answer.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from oncewise.core.coalesce import Flight
from oncewise.core.pacing import Pacer
from oncewise.core.retry import RetryBudget, backoff_s
from oncewise.errors import Failure, OncewiseError, ProviderRateLimited, ProviderTimeout
from oncewise.model import Usage
from oncewise.ports import Provider

__all__ = ["Attempts", "ProviderLane", "remember_s"]

MAX_ATTEMPTS = 3
MAX_PAUSE_S = 60.0
TOTAL_S = 120.0
"""From the first start of a call to its end, retries included."""

_FROM_PROVIDER = frozenset({"provider_error", "provider_rate_limited", "provider_protocol", "provider_timeout"})

T = TypeVar("T")


def remember_s(failure: Failure) -> float:
    """How long a failed call answers equal requests: they would fail the same way, and cost."""
    if failure.code in ("provider_rate_limited", "overloaded"):
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


class Attempts(ABC, Generic[T]):
    """The work of one call flight, up to three requests to a provider.

    Attributes:
        calls: Requests made to the provider so far.
        queue_wait_s: Seconds the first attempt waited; None until it started.
    """

    def __init__(self, lane: ProviderLane, org_id: str, chance: Callable[[], float]) -> None:
        self.calls = 0
        self.queue_wait_s: float | None = None
        self._lane = lane
        self._org_id = org_id
        self._chance = chance
        self._ends_s = float("inf")

    async def run(self, flight: Flight[T]) -> T:
        """Make the call.

        Raises:
            OncewiseError: as `Provider.stream` and `Pacer.permit`.
        """
        loop = asyncio.get_running_loop()
        while True:
            try:
                return await self._attempt(flight)
            except OncewiseError as error:
                delay_s = self._retry_in_s(error, loop.time())
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

    def _retry_in_s(self, error: OncewiseError, now_s: float) -> float | None:
        """Seconds to wait before another attempt; None if there must be none."""
        if not self._may_retry(error):
            return None
        delay_s = error.retry_after_s
        if delay_s is None:
            delay_s = backoff_s(self.calls, self._chance())
        if now_s + delay_s >= self._ends_s or not self._lane.budget.spend(now_s):
            return None
        return delay_s

    def _may_retry(self, error: OncewiseError) -> bool:
        # Shown text is never replaced in silence: the first delta ends all retries.
        return error.code in _FROM_PROVIDER and error.retryable and not self._shown and 0 < self.calls < MAX_ATTEMPTS

    async def _attempt(self, flight: Flight[T]) -> T:
        async with self._lane.pacer.permit(self._org_id) as permit:
            await self._opened()
            self._begin(flight, permit.queue_wait_s)
            usage: Usage | None = None
            outcome = "cancelled"
            try:
                answer = await self._read_in_time()
                usage, outcome = self._usage(answer), "ok"
            except OncewiseError as error:
                outcome = error.code
                if error.code == ProviderRateLimited.code:
                    # For everyone: whoever called next would be refused as well, and prolong it with some providers.
                    self._lane.pacer.pause(min(error.retry_after_s or 1.0, MAX_PAUSE_S))
                raise
            finally:
                await self._closed(outcome, usage)
        return answer

    def _begin(self, flight: Flight[T], queue_wait_s: float) -> None:
        now_s = asyncio.get_running_loop().time()
        self.calls += 1
        flight.mark_running()
        if self.queue_wait_s is None:
            self._lane.budget.called(now_s)
            self._ends_s = now_s + TOTAL_S
            self.queue_wait_s = queue_wait_s
            self._started()

    async def _read_in_time(self) -> T:
        try:
            async with asyncio.timeout_at(self._ends_s):
                return await self._read()
        except TimeoutError:
            raise ProviderTimeout from None
