"""Retries, pacing and the breaker around one call, in virtual time, before a provider that fails by a script."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from oncewise.core.breaker import BreakerRules, Breakers
from oncewise.core.coalesce import Coalescer, Flight
from oncewise.core.pacing import LocalLimiter, Pacer
from oncewise.core.retry import RetryBudget
from oncewise.errors import (
    OncewiseError,
    ProviderError,
    ProviderProtocolError,
    ProviderRateLimited,
    ProviderTimeout,
    ProviderUnavailable,
    QueueFull,
)
from oncewise.model import ChatRequest, Usage
from oncewise.ports import TextDelta
from oncewise.service.attempts import Attempts, ProviderLane
from oncewise.testing import ScriptedProvider
from tests.support.virtual_time import turns, virtual_loop, virtual_time

ANSWER = "pong"


class Call(Attempts[str]):
    """Reads text, and writes down when each attempt started and how it ended."""

    def __init__(self, desk: "Desk", org_id: str, model: str) -> None:
        super().__init__(desk.lane, org_id, model, desk.chance)
        self.desk = desk
        self.text = ""
        self.outcomes: list[str] = []

    async def __call__(self, flight: Flight[str]) -> str:
        return await self.run(flight)

    @property
    def _shown(self) -> bool:
        return bool(self.text)

    def _usage(self, answer: str) -> Usage | None:
        return None

    async def _opened(self) -> None:
        self.desk.started.append(virtual_loop().time())

    async def _closed(self, outcome: str, usage: Usage | None) -> None:
        self.outcomes.append(outcome)

    async def _read(self) -> str:
        async for event in self._lane.provider.stream(ChatRequest("scripted", self._model, ())):
            self.text += event.text if isinstance(event, TextDelta) else ""
        return self.text


class Desk:
    """Makes calls; all that limits them can be chosen.

    Attributes:
        started: When each request to the provider was made.
    """

    def __init__(
        self,
        *failures: BaseException | tuple[int, BaseException],
        rate: float = 1e6,
        share: float = 100.0,
        chance: Callable[[], float] = lambda: 0.0,
        **limits: int,
    ) -> None:
        self.provider = ScriptedProvider(deltas=["po", "ng"])
        self.provider.failures = [each if isinstance(each, tuple) else (0, each) for each in failures]
        self.chance = chance
        self.started: list[float] = []
        self.flights = Coalescer(deadline_s=None, abandon_after_s=0.0)
        limiter = LocalLimiter(rate, 1, asyncio.get_running_loop().time)
        self.pacer = Pacer(limiter, **{"concurrency": 100, **limits})
        self.breakers = Breakers("acme")
        self.lane = ProviderLane(self.provider, self.pacer, "m", RetryBudget(share), breakers=self.breakers)

    async def call(self, key: str = "k", model: str = "m") -> str | OncewiseError:
        """What a requester gets of a call."""
        with self.flights.join(key, Call(self, "org", model)) as waiter:
            try:
                return await waiter.result()
            except OncewiseError as error:
                return error

    async def fail_often(self, times: int = 5) -> None:
        """Make calls that each fail for good in one attempt, and still count against the provider."""
        self.provider.failures = [(1, ProviderProtocolError())] * times
        for _ in range(times):
            assert isinstance(await self.call(), ProviderProtocolError)
        self.started.clear()


def gaps(times: Sequence[float]) -> list[float]:
    return [later - sooner for sooner, later in pairwise(times)]


# -- how often, and when -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ProviderError, ProviderProtocolError, ProviderTimeout])
@virtual_time
async def test_a_failure_is_tried_again_twice_and_not_more(error: type[OncewiseError]) -> None:
    """The third attempt may succeed; a fourth is never made, and everybody gets the error of the third."""
    desk = Desk(error(), error())
    assert await desk.call() == ANSWER
    assert len(desk.started) == 3
    desk = Desk(error("first"), error("second"), error("third"), error("never"))
    told = await asyncio.gather(*(desk.call() for _ in range(5)))
    assert {each.detail for each in told} == {"third"}
    assert len({id(each) for each in told}) == 5
    assert len(desk.started) == 3


@pytest.mark.parametrize("error", [ProviderError(retryable=False), QueueFull(), LookupError()])
@virtual_time
async def test_what_no_retry_will_mend_is_told_at_once(error: Exception) -> None:
    """The provider's own 400, and whatever is no failure of the provider."""
    desk = Desk(error, error)
    assert isinstance(await desk.call(), OncewiseError)
    assert len(desk.started) == 1


@virtual_time
async def test_the_first_delta_ends_all_retries() -> None:
    """What was shown is never replaced in silence."""
    desk = Desk((1, ProviderError()))
    assert isinstance(await desk.call(), ProviderError)
    assert len(desk.started) == 1
    desk = Desk((0, ProviderError()))
    assert await desk.call() == ANSWER


@virtual_time
async def test_the_wait_before_a_retry_is_jittered_over_its_whole_range() -> None:
    """From nothing to 1 s before the second attempt and to 2 s before the third, evenly."""
    waits = []
    dice = random.Random(7)
    for _ in range(400):
        desk = Desk(ProviderError(), ProviderError(), chance=dice.random)
        assert await desk.call() == ANSWER
        waits.append(gaps(desk.started))
    for at, most_s in ((0, 1.0), (1, 2.0)):
        found = sorted(each[at] for each in waits)
        assert found[0] < most_s / 20
        assert most_s * 0.95 < found[-1] <= most_s + 0.001
        assert found[200] == pytest.approx(most_s / 2, abs=most_s / 10)


@pytest.mark.parametrize("error", [ProviderRateLimited, ProviderUnavailable])
@pytest.mark.parametrize("wait_s", [0.25, 7.0, 61.0])
@virtual_time
async def test_what_the_provider_says_of_coming_again_is_kept_to_exactly(
    error: type[OncewiseError], wait_s: float
) -> None:
    """Neither shortened by the jitter nor longer than said, whatever the dice."""
    desk = Desk(error(retry_after_s=wait_s), chance=lambda: 0.5)
    assert await desk.call() == ANSWER
    assert gaps(desk.started) == pytest.approx([wait_s], abs=1e-3)


@virtual_time
async def test_a_wait_beyond_the_deadline_is_passed_on() -> None:
    """At once, with the provider's own figure: a caller can decide what we cannot."""
    for error in (ProviderUnavailable(retry_after_s=9999.0), ProviderRateLimited(retry_after_s=120.0)):
        desk = Desk(error)
        told = await desk.call()
        assert (told.code, told.retry_after_s, told.retryable) == (error.code, error.retry_after_s, True)
        assert (len(desk.started), virtual_loop().time()) == (1, 0.0)


@virtual_time
async def test_the_deadline_is_that_of_the_whole_call() -> None:
    """Attempts that take long leave less for the wait before the next."""
    desk = Desk(ProviderUnavailable(retry_after_s=60.0), ProviderUnavailable(retry_after_s=60.0))
    told = await desk.call()
    assert (told.code, told.retry_after_s, len(desk.started)) == ("provider_unavailable", 60.0, 2)


@virtual_time
async def test_retries_stay_within_the_budget_of_their_provider() -> None:
    """A tenth of the calls of the last minute and one each ten seconds, over all models; the others fail at once."""
    desk = Desk(share=0.1)
    for number in range(100):
        assert await desk.call(model=f"good{number}") == ANSWER
    desk.started.clear()
    desk.provider.failures = [(0, ProviderError())] * 1000
    await asyncio.gather(*(desk.call(f"k{number}", f"bad{number}") for number in range(50)))
    # 150 calls earn 15; each retry is one request more.
    assert len(desk.started) == 50 + 15
    desk = Desk(*[ProviderError()] * 1000, share=0.0)
    for number in range(25):
        await desk.call(f"k{number}", f"bad{number}")
        await asyncio.sleep(1.0)
    assert len(desk.started) == 25 + 3


@virtual_time
async def test_every_attempt_passes_the_pacer() -> None:
    """At 1 call/s nine requests for three answers need nine seconds; none is made beside the queue."""
    desk = Desk(*[ProviderError()] * 6, rate=1.0, max_wait_s=3600)
    assert await asyncio.gather(*(desk.call(key, key) for key in "abc")) == [ANSWER] * 3
    assert len(desk.started) == 9
    assert min(gaps(desk.started)) >= 1.0


@virtual_time
async def test_a_retry_waits_without_a_place_at_the_provider() -> None:
    """Others are served meanwhile, even by a provider that takes one call at a time."""
    desk = Desk(ProviderUnavailable(retry_after_s=10.0), concurrency=1)
    waiting = asyncio.create_task(desk.call("a"))
    await asyncio.sleep(1.0)
    assert await desk.call("b") == ANSWER
    assert virtual_loop().time() == pytest.approx(1.0, abs=0.01)
    assert await waiting == ANSWER


# -- the provider's rate -----------------------------------------------------------------------------------------


@virtual_time
async def test_a_rate_limit_holds_everybody_back() -> None:
    """Whoever called next would be refused as well; afterwards half of the rate is used."""
    desk = Desk(ProviderRateLimited(retry_after_s=5.0), rate=10.0, max_wait_s=3600)
    await asyncio.gather(*(desk.call(f"k{number}", f"m{number}") for number in range(4)))
    assert gaps(desk.started)[0] == pytest.approx(5.0, abs=1e-3)
    assert min(gaps(desk.started)[1:]) >= 0.1
    assert desk.pacer.stats().rate_share < 0.6


@virtual_time
async def test_an_answer_ends_a_row_of_refusals() -> None:
    """Without a word from the provider the pause is 1 s each time, and 2 s only where one refusal follows another."""
    desk = Desk(*[ProviderRateLimited()] * 2)
    assert await desk.call() == ANSWER
    desk.provider.failures = [(0, ProviderRateLimited())]
    assert await desk.call() == ANSWER
    assert gaps(desk.started) == pytest.approx([1.0, 2.0, 0.0, 1.0], abs=1e-3)


@virtual_time
async def test_a_quota_that_is_used_up_stops_its_model_and_no_other() -> None:
    """Nobody waits an hour: who asks for that model, or queues for it, is told what is left, and no call is made."""
    desk = Desk(ProviderRateLimited(retry_after_s=3600.0), rate=1.0)
    desk.provider.delay_s = 0.5
    *same, other = (asyncio.create_task(desk.call(*each)) for each in (("a",), ("b",), ("c", "other")))
    told = await asyncio.gather(*same)
    assert [each.code for each in told] == ["provider_rate_limited"] * 2
    assert virtual_loop().time() == pytest.approx(0.5)  # the second too: it does not wait for its start
    assert desk.pacer.stats().rate_share == pytest.approx(0.5)
    assert await other == ANSWER
    assert len(desk.started) == 2
    await asyncio.sleep(1800.0 - virtual_loop().time())
    again = await desk.call("d")
    assert (again.code, again.retry_after_s) == ("provider_rate_limited", pytest.approx(1800.5))
    await asyncio.sleep(1800.5)
    assert await desk.call("e") == ANSWER


# -- the breaker -------------------------------------------------------------------------------------------------


@virtual_time
async def test_a_model_that_fails_is_left_alone() -> None:
    """Requests are refused at once, with a time to come again, and no call is made; other models are called."""
    desk = Desk()
    await desk.fail_often()
    told = await desk.call()
    assert (told.code, told.retryable, told.retry_after_s) == ("provider_unavailable", True, 5.0)
    assert desk.started == []
    assert virtual_loop().time() < 0.001
    assert await desk.call("k", "other") == ANSWER
    await asyncio.sleep(5.0)
    assert await desk.call() == ANSWER


@virtual_time
async def test_one_call_tries_a_model_that_failed() -> None:
    """The others are refused until it has ended; then all are let through."""
    desk = Desk()
    await desk.fail_often()
    await asyncio.sleep(5.0)
    desk.provider.gap_s = 1.0
    trial = asyncio.create_task(desk.call("trial"))
    await turns(5)
    told = await asyncio.gather(*(desk.call(f"k{number}") for number in range(9)))
    assert {each.code for each in told} == {"provider_unavailable"}
    assert await trial == ANSWER
    assert await asyncio.gather(*(desk.call(f"k{number}") for number in range(9))) == [ANSWER] * 9


@virtual_time
async def test_a_trial_that_fails_is_not_tried_again_by_its_own_flight() -> None:
    """It is told what happened; the next trial is ten seconds away."""
    desk = Desk()
    await desk.fail_often()
    await asyncio.sleep(5.0)
    desk.provider.failures = [(0, ProviderError("still down"))]
    assert (await desk.call()).detail == "still down"
    assert len(desk.started) == 1
    assert (await desk.call()).retry_after_s == 10.0


@virtual_time
async def test_a_trial_whose_caller_leaves_gives_its_place_to_the_next() -> None:
    """In the queue as well as in the call."""
    for seconds in (0.0, 0.5):
        desk = Desk(rate=1.0)
        await desk.fail_often()
        await asyncio.sleep(5.0)
        desk.provider.gap_s = 1.0
        trial = asyncio.create_task(desk.call("trial"))
        await turns(3)
        await asyncio.sleep(seconds)
        trial.cancel()
        await turns(5)
        assert await desk.call("next") == ANSWER


@virtual_time
async def test_who_waits_for_a_model_that_turns_out_to_fail_is_told_at_once() -> None:
    """Their starts go to those who wait for others."""
    desk = Desk(*[(1, ProviderError())] * 5, rate=1.0, max_wait_s=3600)
    calls = [asyncio.create_task(desk.call(f"k{number}")) for number in range(20)]
    other = asyncio.create_task(desk.call("x", "other"))
    told = await asyncio.gather(*calls)
    assert [each.code for each in told] == ["provider_error"] * 5 + ["provider_unavailable"] * 15
    assert virtual_loop().time() < 5.2
    assert await other == ANSWER
    assert len(desk.started) == 6
    assert virtual_loop().time() < 6.5


@pytest.mark.parametrize("lag_s", [-1e-10, 0.0, 1e-10])
@virtual_time
async def test_a_permit_that_came_as_the_breaker_opened_is_not_used(lag_s: float) -> None:
    """The two meet in one turn of the loop: whoever has the permit stands in no queue to be turned away from."""
    desk = Desk((0, ProviderError(retryable=True)), rate=1.0)
    desk.lane = replace(desk.lane, breakers=Breakers(rules=BreakerRules(failures=1)))
    desk.provider.delay_s = 1.03 + lag_s
    told = await asyncio.gather(desk.call("a"), desk.call("b"))
    assert [each.code for each in told] == ["provider_error", "provider_unavailable"]
    assert len(desk.started) == 1


@pytest.mark.parametrize(
    "harmless", [ProviderError(retryable=False), ProviderRateLimited(retry_after_s=0.0), asyncio.CancelledError()]
)
@virtual_time
async def test_a_tenants_own_mistakes_and_departures_shut_nobody_out(harmless: BaseException) -> None:
    """Bad requests, limits and cancellations, however many."""
    desk = Desk(*[(1, harmless)] * 50)
    for number in range(50):
        await desk.call(f"k{number}")
    assert await desk.call() == ANSWER


@virtual_time
async def test_an_answer_that_its_prompt_made_empty_or_endless_shuts_nobody_out() -> None:
    """The adapter knows, and says so; the caller of that prompt is told all the same."""
    empty = ProviderProtocolError()
    empty.self_inflicted = True
    desk = Desk(*[(0, empty)] * 60)
    for number in range(20):
        assert isinstance(await desk.call(f"k{number}"), ProviderProtocolError)
    assert await desk.call() == ANSWER


@virtual_time
async def test_an_answer_that_takes_all_its_time_shuts_nobody_out() -> None:
    """It came all along; one that never began is the provider's failure."""
    for first_s, blamed in ((1.0, False), (200.0, True)):
        desk = Desk()
        desk.provider.delay_s, desk.provider.gap_s = first_s, 0.0 if blamed else 100.0
        told = await asyncio.gather(*(desk.call(f"k{number}") for number in range(5)))
        assert {each.code for each in told} == {"provider_timeout"}
        assert (desk.breakers.stats(virtual_loop().time()).open == 1) is blamed


# -- the queue ---------------------------------------------------------------------------------------------------


@virtual_time
async def test_a_call_knows_its_place_in_the_queue() -> None:
    """Before it asks and once it started: none before it."""
    desk = Desk(rate=1.0)
    calls = [Call(desk, "org", "m") for _ in range(4)]
    assert calls[0].queue_position == calls[0].queued_behind == 0
    waiters = [desk.flights.join(number, call) for number, call in enumerate(calls)]
    await turns(5)
    assert [call.queue_position for call in calls] == [0, 0, 1, 2]
    await asyncio.sleep(1.5)
    assert [call.queue_position for call in calls] == [0, 0, 0, 1]
    assert [call.queued_behind for call in calls] == [0, 0, 1, 2], "the first did not have to queue"
    for waiter in waiters:
        await waiter.result()
        waiter.leave()
    assert [round(call.queue_wait_s or 0.0) for call in calls] == [0, 1, 2, 3]
