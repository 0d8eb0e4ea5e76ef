"""The attempts at one call, in virtual time: which failures are tried again, when, and who else is held back."""

import asyncio
from typing import Any

import pytest

from oncewise.core.coalesce import Coalescer, Flight
from oncewise.core.pacing import LocalLimiter, Pacer
from oncewise.core.retry import RetryBudget
from oncewise.errors import (
    NotPersisted,
    OncewiseError,
    Overloaded,
    ProviderError,
    ProviderProtocolError,
    ProviderRateLimited,
    ProviderTimeout,
    StorageUnavailable,
)
from oncewise.model import Usage
from oncewise.service.attempts import MAX_PAUSE_S, TOTAL_S, Attempts, ProviderLane, remember_s
from oncewise.testing import ScriptedProvider
from tests.support.virtual_time import virtual_loop, virtual_time

PASSING, FINAL = ProviderError("passing"), ProviderError("final", retryable=False)


class Scripted(Attempts[str]):
    """A call whose attempts end as told: an error, a text, or seconds after which a text comes."""

    def __init__(self, lane: ProviderLane, *ends: OncewiseError | str | float) -> None:
        super().__init__(lane, "acme", chance=lambda: 1.0)
        self.ends = list(ends)
        self.shown = False
        self.at: list[float] = []
        self.record: list[str] = []

    @property
    def _shown(self) -> bool:
        return self.shown

    def _usage(self, answer: str) -> Usage:
        return Usage(1, len(answer))

    async def _opened(self) -> None:
        self.record.append("opened")

    async def _closed(self, outcome: str, usage: Usage | None) -> None:
        self.record.append(f"{outcome} {usage.completion_tokens if usage else '-'}")

    async def _read(self) -> str:
        self.at.append(asyncio.get_running_loop().time())
        self.record.append("read")
        end = self.ends.pop(0)
        if isinstance(end, OncewiseError):
            raise end
        if isinstance(end, str):
            return end
        await asyncio.sleep(end)
        return "late"


def lane(*, earned: int = 100, rate: float = 1000.0) -> ProviderLane:
    """A lane with a budget of a tenth of `earned`."""
    loop = asyncio.get_running_loop()
    budget = RetryBudget()
    for _ in range(earned):
        budget.called(loop.time())
    pacer = Pacer(LocalLimiter(rate, 1000, loop.time), concurrency=100, max_wait_s=1000.0)
    return ProviderLane(ScriptedProvider(), pacer, "m", budget)


async def outcome(call: Scripted) -> Any:
    flights = Coalescer(deadline_s=None)

    async def work(flight: Flight[str]) -> str:
        return await call.run(flight)

    with flights.join(object(), work) as waiter:
        try:
            return await waiter.result()
        except OncewiseError as error:
            return error.code, error.detail


@virtual_time
async def test_an_attempt_is_on_record_before_it_is_made_and_when_it_has_ended() -> None:
    """Money may be spent from the first on; a retry has a record of its own."""
    call = Scripted(lane(), PASSING, "pong")
    assert await outcome(call) == "pong"
    assert call.record == ["opened", "read", "provider_error -", "opened", "read", "ok 4"]


@pytest.mark.parametrize("error", [PASSING, ProviderProtocolError(), ProviderTimeout(), ProviderRateLimited()])
@virtual_time
async def test_a_failure_of_the_provider_that_may_pass_is_tried_again(error: OncewiseError) -> None:
    """Up to three attempts in all, with a pause that doubles."""
    call = Scripted(lane(), error, error, error, "never")
    assert (await outcome(call))[0] == error.code
    assert call.calls == 3


@pytest.mark.parametrize("error", [FINAL, StorageUnavailable(), Overloaded(), NotPersisted()])
@virtual_time
async def test_other_failures_are_not_tried_again(error: OncewiseError) -> None:
    """What will not pass, and what is not the provider's: another call would not mend it."""
    call = Scripted(lane(), error, "never")
    assert (await outcome(call))[0] == error.code
    assert call.calls == 1


@virtual_time
async def test_nothing_is_tried_again_once_something_was_shown() -> None:
    """Shown text is never replaced in silence."""
    call = Scripted(lane(), PASSING, "never")
    call.shown = True
    assert await outcome(call) == ("provider_error", "passing")
    assert call.calls == 1


@virtual_time
async def test_retries_stay_within_the_budget_of_the_provider() -> None:
    """Forty calls have earned four retries, and the twenty of now two more."""
    shared = lane(earned=40)
    calls = [Scripted(shared, PASSING, FINAL) for _ in range(20)]
    await asyncio.gather(*(outcome(call) for call in calls))
    assert sum(call.calls - 1 for call in calls) == 6


@virtual_time
async def test_the_pause_before_a_retry_is_what_the_provider_says() -> None:
    """Else jittered: with all chance, one second after the first and two after the second."""
    call = Scripted(lane(), ProviderError("down", retry_after_s=7.0), "pong")
    assert await outcome(call) == "pong"
    assert call.at == pytest.approx([0.0, 7.0], abs=0.01)

    call = Scripted(lane(), PASSING, PASSING, "pong")
    began_s = virtual_loop().time()
    await outcome(call)
    assert [at_s - began_s for at_s in call.at] == pytest.approx([0.0, 1.0, 3.0], abs=0.01)


@virtual_time
async def test_a_retry_that_would_come_too_late_is_not_waited_for() -> None:
    """Whoever waits is told now instead of after the deadline of the call."""
    call = Scripted(lane(), ProviderError("down", retry_after_s=TOTAL_S + 1), "never")
    assert (await outcome(call))[0] == "provider_error"
    assert virtual_loop().time() < 1.0


@virtual_time
async def test_a_call_has_its_time_retries_included() -> None:
    """120 s from the first start: the second attempt has what the first left."""
    call = Scripted(lane(), ProviderError("down", retry_after_s=30.0), 1000.0)
    assert (await outcome(call))[0] == "provider_timeout"
    assert virtual_loop().time() == pytest.approx(TOTAL_S, abs=0.1)


@pytest.mark.parametrize(("told_s", "held_s"), [(3.0, 3.0), (None, 1.0), (4000.0, MAX_PAUSE_S)])
@virtual_time
async def test_a_rate_limit_holds_every_call_of_the_lane_back(told_s: float | None, held_s: float) -> None:
    """For as long as the provider says, a second if it does not, and never for more than a minute."""
    shared = lane(earned=0)
    shared.budget.spend(0.0)  # or the refused call itself would be the next
    refused, other = Scripted(shared, ProviderRateLimited(retry_after_s=told_s)), Scripted(shared, "pong")
    assert (await outcome(refused))[0] == "provider_rate_limited"
    assert await outcome(other) == "pong"
    assert other.at == pytest.approx([held_s], abs=0.01)


@virtual_time
async def test_other_failures_hold_nobody_back() -> None:
    """One tenant's bad request says nothing about the next one's."""
    shared = lane()
    await outcome(Scripted(shared, FINAL))
    other = Scripted(shared, "pong")
    await outcome(other)
    assert other.at == pytest.approx([0.0], abs=0.01)


@pytest.mark.parametrize(
    ("error", "keep_s"),
    [
        (ProviderRateLimited(retry_after_s=3.0), 3.0),
        (ProviderRateLimited(retry_after_s=400.0), 5.0),
        (ProviderRateLimited(), 1.0),
        (Overloaded(retry_after_s=2.0), 2.0),
        (FINAL, 2.0),
        (PASSING, 0.0),
        (ProviderTimeout(), 0.0),
        (ProviderProtocolError(), 0.0),
        (StorageUnavailable(retry_after_s=4.0), 0.0),
    ],
)
def test_what_is_remembered_and_for_how_long(error: OncewiseError, keep_s: float) -> None:
    """A rate limit for what the provider says, at most 5 s; a refusal for good 2 s; nothing else."""
    assert remember_s(error.failure()) == keep_s
