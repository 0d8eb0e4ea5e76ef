"""The arithmetic of starts and the queue in front of it."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import pytest

from oncewise.coordination.memory import World
from oncewise.core.pacing import Gcra, LocalLimiter, Pacer, PacerStats
from oncewise.errors import InternalError, QueueFull, QueueTimeout, ShuttingDown, StorageUnavailable
from tests.support.virtual_time import turns, virtual_loop, virtual_time

IDLE = PacerStats(waiting=0, running=0, tenants=0)
SPACING_S = 1.03
"""Between starts at 1 call/s: the guard is 3 %, at most 30 ms."""


def pacer(rate: float = 1.0, burst: int = 1, **limits: Any) -> Pacer:
    limits.setdefault("concurrency", 100)
    return Pacer(LocalLimiter(rate, burst, asyncio.get_running_loop().time), **limits)


class Calls:
    """Makes calls through a pacer and writes down when and for whom they started."""

    def __init__(self, line: Pacer, lasts_s: float = 0.0) -> None:
        self.line = line
        self.lasts_s = lasts_s
        self.started: list[tuple[float, str]] = []
        self.running = 0
        self.most_running = 0

    async def make(self, tenant: str = "acme") -> float:
        async with self.line.permit(tenant) as permit:
            self.started.append((asyncio.get_running_loop().time(), tenant))
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            try:
                await asyncio.sleep(self.lasts_s)
            finally:
                self.running -= 1
        return permit.queue_wait_s

    def begin(self, *tenants: str) -> list[asyncio.Task[float]]:
        return [asyncio.create_task(self.make(tenant)) for tenant in tenants]

    @property
    def times(self) -> list[float]:
        return [at_s for at_s, _ in self.started]

    @property
    def order(self) -> str:
        return "".join(tenant for _, tenant in self.started)


# -- the arithmetic ----------------------------------------------------------------------------------------------


def test_starts_are_spaced_by_the_rate_and_a_guard() -> None:
    """1 call/s means every 1.03 s: a provider judges arrivals, and the one before may have come late."""
    gcra = Gcra(1.0)
    assert [gcra.reserve(100.0) for _ in range(4)] == pytest.approx([100.0, 101.03, 102.06, 103.09])


@pytest.mark.parametrize(("rate", "spacing_s"), [(0.5, 2.03), (1.0, 1.03), (10.0, 0.103), (50.0, 0.0206)])
def test_the_guard_is_a_share_and_has_a_limit(rate: float, spacing_s: float) -> None:
    """3 % of the spacing, never more than 30 ms."""
    gcra = Gcra(rate)
    gcra.reserve(0.0)
    assert gcra.reserve(0.0) == pytest.approx(spacing_s)


def test_a_burst_may_come_together_after_a_pause() -> None:
    """Three at once, then the rate; a pause earns the burst again, but never more than that."""
    gcra = Gcra(10.0, burst=3)
    assert [gcra.reserve(0.0) for _ in range(5)] == pytest.approx([0.0, 0.0, 0.0, 0.103, 0.206])
    assert [gcra.reserve(60.0) for _ in range(4)] == pytest.approx([60.0, 60.0, 60.0, 60.103])


@pytest.mark.parametrize("rate", [0.3, 1.0, 1.9])
def test_a_burst_counts_for_nothing_above_the_rate(rate: float) -> None:
    """A provider of 1 call/s refuses the second of two at once, whatever the burst is set to."""
    gcra = Gcra(rate, burst=5)
    gcra.reserve(0.0)
    assert gcra.reserve(0.0) > 1.0 / rate


def test_a_reservation_that_is_given_back_is_free_again() -> None:
    """The next caller gets the very start that was not used."""
    gcra = Gcra(1.0)
    first, second = gcra.reserve(0.0), gcra.reserve(0.0)
    gcra.give_back()
    assert gcra.reserve(0.0) == pytest.approx(second)
    assert first == 0.0


def test_giving_back_never_earns_more_than_a_pause_would() -> None:
    """After reserve and give back the burst is what it was."""
    gcra = Gcra(2.0, burst=2)
    gcra.reserve(0.0)
    gcra.give_back()
    assert [gcra.reserve(0.0) for _ in range(3)] == pytest.approx([0.0, 0.0, 0.515])


@pytest.mark.parametrize(("rate", "burst"), [(1.0, 2), (2.0, 2), (10.0, 5), (20.0, 3), (40.0, 2), (100.0, 100)])
async def test_the_second_of_a_burst_has_no_more_starts_than_any_other(rate: float, burst: int) -> None:
    """20 calls/s are 20 in any second, also in the first one after a pause; and the rate is had all the same."""
    now_s, most = 0.0, int(rate)
    limiter = LocalLimiter(rate, burst, lambda: now_s)
    starts = []
    for now_s in (0.0, 100.0):
        starts += [round(now_s + await limiter.reserve(), 9) for _ in range(most * 5)]
    assert starts.count(0.0) == starts.count(100.0) == min(burst, most)
    assert all(later - sooner > 1.0 for sooner, later in zip(starts, starts[most:], strict=False))
    assert starts[most * 5 - 1] <= 5 * 1.03


async def test_a_start_that_is_given_back_leaves_room_in_its_second() -> None:
    """As if it had never been booked."""
    limiter = LocalLimiter(2.0, 2, lambda: 0.0)
    assert [await limiter.reserve() for _ in range(2)] == [0.0, 0.0]
    await limiter.give_back()
    assert [await limiter.reserve() for _ in range(2)] == pytest.approx([0.0, 1.03])


# -- the queue ---------------------------------------------------------------------------------------------------


@virtual_time
async def test_one_call_a_second_is_one_call_a_second() -> None:
    """Ten that ask at once start 1.03 s apart, at the configured rate and never faster."""
    calls = Calls(pacer(1.0, burst=2))
    waits = await asyncio.gather(*calls.begin(*["acme"] * 10))
    assert calls.times == pytest.approx([SPACING_S * n for n in range(10)])
    assert waits == pytest.approx(calls.times)


@virtual_time
async def test_a_free_start_is_had_at_once() -> None:
    """Nobody waits when nobody is before it."""
    calls = Calls(pacer())
    await asyncio.sleep(100)
    assert await calls.make() == 0.0


@virtual_time
async def test_no_more_calls_run_than_the_provider_takes() -> None:
    """Calls that last longer than the spacing wait for a place, not only for a start."""
    calls = Calls(pacer(10.0, concurrency=3), lasts_s=5.0)
    await asyncio.gather(*calls.begin(*["acme"] * 9))
    assert calls.most_running == 3
    assert calls.times == pytest.approx([0, 0.103, 0.206, 5.0, 5.103, 5.206, 10.0, 10.103, 10.206])


@virtual_time
async def test_starts_stay_apart_when_places_come_free_together() -> None:
    """A full house does not save up starts."""
    calls = Calls(pacer(1.0, concurrency=2), lasts_s=10.0)
    await asyncio.gather(*calls.begin(*["acme"] * 6))
    assert all(later - sooner >= SPACING_S - 1e-9 for sooner, later in zip(calls.times, calls.times[1:], strict=False))


@virtual_time
async def test_a_start_that_was_overslept_pushes_the_next_back() -> None:
    """A loop that stood still for 0.9 s must not make two calls within a second of each other."""
    calls = Calls(pacer(1.0))
    tasks = calls.begin(*["acme"] * 4)
    await turns(5)
    virtual_loop().oversleep(SPACING_S + 0.9)
    await asyncio.gather(*tasks)
    gaps = [later - sooner for sooner, later in zip(calls.times, calls.times[1:], strict=False)]
    assert calls.times[1] == pytest.approx(SPACING_S + 0.9)
    assert gaps[1:] == pytest.approx([SPACING_S] * 2)


@virtual_time
async def test_a_start_that_came_late_to_its_caller_pushes_the_next_back() -> None:
    """The loop stands still between the permit and whoever wakes to take it, or at any turn around that."""
    for pause in range(8):
        calls = Calls(pacer(1.0))
        tasks = calls.begin("acme", "acme")
        await turns(pause)
        virtual_loop().oversleep(0.5)
        await asyncio.gather(*tasks)
        assert calls.times[1] - calls.times[0] >= SPACING_S - 0.005


@virtual_time
async def test_a_pause_holds_every_start_back_and_its_end_is_no_burst() -> None:
    """What `Retry-After` says is exact, also for a start that was booked before; a shorter pause shortens nothing."""
    line = pacer(1.0)
    calls = Calls(line)
    first, *others = calls.begin(*["acme"] * 3)
    await first
    line.pause(10.0)
    line.pause(5.0)
    await asyncio.gather(*others)
    assert calls.times == pytest.approx([0.0, 10.0, 10.0 + SPACING_S])


@virtual_time
async def test_a_pause_may_become_longer_while_it_is_waited_for() -> None:
    """Two calls run and both are refused: the second refusal counts from when it came."""
    line = pacer(100.0)
    calls = Calls(line)
    line.pause(5.0)
    (waiting,) = calls.begin("a")
    await asyncio.sleep(2.0)
    line.pause(10.0)
    line.pause(1.0)
    await waiting
    assert calls.times == pytest.approx([12.0])


@virtual_time
async def test_tenants_take_turns() -> None:
    """One that queued a hundred does not keep the others waiting; within a tenant it is first come, first served."""
    calls = Calls(pacer(), lasts_s=0.0)
    tasks = calls.begin("x", *["a"] * 6, *["b"] * 2, *["c"] * 3)
    await asyncio.gather(*tasks)
    assert calls.order == "xabcabcacaaa", "the first found nobody waiting"
    waits = [task.result() for task in tasks[:6]]
    assert waits == sorted(waits)


@virtual_time
async def test_a_greedy_tenant_gets_no_more_than_its_share() -> None:
    """Ten tenants, one of which asks ten times as much: Jain's index of what was served is at least 0.95."""
    calls = Calls(pacer(10.0, max_wait_s=3600.0))
    tasks = calls.begin(*["0"] * 200, *[str(n) for n in range(1, 10) for _ in range(20)])
    await asyncio.sleep(0.103 * 150)
    served = Counter(tenant for _, tenant in calls.started)
    jain = sum(served.values()) ** 2 / (10 * sum(n * n for n in served.values()))
    assert sum(served.values()) >= 140
    assert jain >= 0.95
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert calls.line.stats() == IDLE


@virtual_time
async def test_the_place_in_the_queue_is_the_number_of_starts_before_it() -> None:
    """`position` foretells what then happens, whoever's turn it is."""
    for newcomer in "abcd":
        calls = Calls(pacer(max_wait_s=3600.0))
        tasks = calls.begin(*"aabaacab")
        await turns(6)
        expected = calls.line.position(newcomer)
        already = len(calls.started)
        probe = Calls(calls.line)
        probe_task = asyncio.create_task(probe.make(newcomer))
        await probe_task
        assert sum(at_s < probe.times[0] for at_s in calls.times) - already == expected
        await asyncio.gather(*tasks)


@virtual_time
async def test_whoever_leaves_the_queue_costs_its_neighbours_nothing() -> None:
    """The start booked for a caller that left is used by the next; no place is held (C10)."""
    calls = Calls(pacer())
    tasks = calls.begin(*["acme"] * 4)
    await turns(5)
    for task in tasks[1:3]:
        task.cancel()
    await turns(2)
    assert calls.line.stats() == PacerStats(waiting=1, running=0, tenants=1)
    await tasks[3]
    assert calls.times == pytest.approx([0.0, SPACING_S])
    assert calls.line.stats() == IDLE


@virtual_time
async def test_a_place_knows_how_many_are_before_it() -> None:
    """When it joined the queue, and as it moves up; none once it has its permit."""
    line = pacer()
    first = line.permit("a")
    async with first:
        assert (first.ahead, first.position) == (0, 0)
        calls = Calls(line)
        tasks = calls.begin("a", "a", "b")
        await turns(3)
        last = line.permit("b")
        waiting = asyncio.create_task(last.__aenter__())
        await turns(3)
        assert (last.ahead, last.position) == (3, 3)
        await asyncio.sleep(2.5 * SPACING_S)
        assert (last.ahead, last.position) == (3, 1)
        await waiting
        assert (last.ahead, last.position) == (3, 0)
        await last.__aexit__()
    await asyncio.gather(*tasks)
    assert line.stats() == IDLE


# -- what the provider says --------------------------------------------------------------------------------------


def rates(times: list[float], bounds_s: list[float]) -> list[float]:
    """Starts a second between these times."""
    return [
        round(sum(start_s <= at_s < end_s for at_s in times) / (end_s - start_s), 1)
        for start_s, end_s in pairwise(bounds_s)
    ]


@virtual_time
async def test_after_a_refusal_half_of_the_rate_is_used_and_given_back_second_by_second() -> None:
    """Nothing during the pause, then half, then 5 % more each second, and in ten seconds all of it."""
    line = pacer(100.0, max_waiting=10_000, max_wait_s=3600.0)
    calls = Calls(line)
    tasks = calls.begin(*["acme"] * 2500)
    await asyncio.sleep(2.0)
    line.slow_down(began_s=1.9, retry_after_s=3.0)
    assert line.stats().rate_share == 0.5
    await asyncio.gather(*tasks)
    # 100 starts a second are 97 with the guard.
    seen = rates(calls.times, [0, 2, 5, 6, 10, 15, 20])
    assert seen == pytest.approx([97, 0, 0.525 * 97, 0.65 * 97, 0.875 * 97, 97], abs=2)
    assert line.stats().rate_share == 1.0


@pytest.mark.parametrize("wait_s", [0.3, 7.0, 25.5])
@virtual_time
async def test_what_the_provider_says_is_kept_to_exactly(wait_s: float) -> None:
    """Not a moment less, and no more than the next start."""
    line = pacer(10.0)
    calls = Calls(line)
    tasks = calls.begin("acme", "acme")
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    line.slow_down(began_s=0.0, retry_after_s=wait_s)
    await asyncio.gather(*tasks)
    assert calls.times == pytest.approx([0.0, wait_s])


@virtual_time
async def test_a_provider_that_does_not_say_is_left_alone_for_longer_each_time() -> None:
    """1 s, doubling to 30 s, until it takes a call; then 1 s again."""
    line = pacer(1000.0)
    calls = Calls(line)
    for refusals in (7, 2):
        for _ in range(refusals):
            await calls.make()
            line.slow_down(calls.times[-1], None)
        await calls.make()
        line.accepted(calls.times[-1])
    gaps = [later - sooner for sooner, later in zip(calls.times, calls.times[1:], strict=False)]
    assert [round(gap) for gap in gaps] == [1, 2, 4, 8, 16, 30, 30, 0, 1, 2]


@virtual_time
async def test_whoever_waits_for_a_group_can_be_turned_away() -> None:
    """They alone, at once and with the reason; the others move up, and nothing of theirs is lost."""
    line = pacer()
    order: list[str] = []

    async def make(tenant: str, group: str) -> None:
        async with line.permit(tenant, group):
            order.append(tenant + group)

    tasks = [asyncio.create_task(make(*each)) for each in ("x1", "a1", "a2", "b2", "a1", "b1")]
    await turns(5)
    line.turn_away("2", StorageUnavailable(retry_after_s=9.0).failure())
    await turns(2)
    assert [type(task.exception()) for task in tasks[2:4]] == [StorageUnavailable] * 2
    assert tasks[2].exception() is not tasks[3].exception()
    await asyncio.gather(*tasks[:2], *tasks[4:])
    assert order == ["x1", "a1", "b1", "a1"]
    assert virtual_loop().time() == pytest.approx(3 * SPACING_S)
    assert line.stats() == IDLE


def cancel_as_the_permit_comes(task: asyncio.Task[Any]) -> None:
    """Cancel a caller after it was given the next start and before it has woken to take it."""
    loop = asyncio.get_running_loop()
    loop.call_at(SPACING_S, loop.call_soon, task.cancel)


@virtual_time
async def test_a_permit_given_to_a_caller_that_is_leaving_goes_to_the_next() -> None:
    """Permit and cancel meet in one turn of the loop: neither the place nor the start is lost."""
    line = pacer(concurrency=1, max_wait_s=3600.0)
    calls = Calls(line)
    await calls.make()
    leaving, staying = calls.begin("a", "b")
    await turns(3)
    cancel_as_the_permit_comes(leaving)
    await staying
    assert leaving.cancelled()
    assert calls.times == pytest.approx([0.0, SPACING_S])
    assert line.stats() == IDLE


@virtual_time
async def test_a_permit_given_to_the_last_caller_as_it_leaves_is_free_again() -> None:
    """With nobody to take it the place must come free."""
    line = pacer(concurrency=1)
    calls = Calls(line)
    await calls.make()
    (leaving,) = calls.begin("a")
    await turns(3)
    cancel_as_the_permit_comes(leaving)
    await asyncio.wait([leaving])
    assert leaving.cancelled()
    assert (len(calls.started), line.stats()) == (1, IDLE)
    await calls.make()


@virtual_time
async def test_a_permit_that_nobody_is_left_to_take_does_not_stop_the_line() -> None:
    """It was handed on to one who leaves as well, while the next start waited for a place."""
    line = pacer(10_000.0, burst=10, concurrency=1)
    calls = Calls(line)
    before, first, second, third = calls.begin("x", "a", "b", "c")
    await before
    while not line.stats().running:
        await turns()
    first.cancel()
    await turns()
    second.cancel()
    third.cancel()
    await asyncio.wait([first, second, third])
    async with asyncio.timeout(1.0):
        await calls.make("d")
    assert (calls.order, line.stats()) == ("xd", IDLE)


@virtual_time
async def test_a_start_that_nobody_wants_any_more_is_given_back() -> None:
    """All leave before the start comes: whoever asks then gets it without waiting a spacing more."""
    calls = Calls(pacer())
    await calls.make()
    (leaving,) = calls.begin("acme")
    await turns(3)
    leaving.cancel()
    await asyncio.sleep(SPACING_S)
    await turns(3)
    assert await calls.make() == 0.0


@virtual_time
async def test_a_call_that_fails_gives_its_place_back() -> None:
    """However the block ends."""
    line = pacer(100.0, concurrency=1)

    async def fails() -> None:
        async with line.permit("acme"):
            raise LookupError

    for _ in range(3):
        with pytest.raises(LookupError):
            await fails()
    assert line.stats() == IDLE


@virtual_time
async def test_the_queue_is_bounded() -> None:
    """At the limit, yes; one above, `QueueFull` at once, with the time in which a place may come free."""
    calls = Calls(pacer(max_waiting=2, max_wait_s=14.0))
    await calls.make()
    tasks = calls.begin("a", "b")
    await turns(2)
    with pytest.raises(QueueFull) as caught:
        await calls.make("c")
    assert caught.value.retry_after_s == 7.0
    await asyncio.gather(*tasks)
    assert calls.line.stats() == IDLE


@virtual_time
async def test_one_tenant_cannot_fill_the_queue_for_the_others() -> None:
    """Full, it takes a newcomer of a tenant with less in it, and refuses the newest of the one with most."""
    calls = Calls(pacer(max_waiting=4, max_wait_s=3600.0))
    await calls.make("0")
    greedy = calls.begin(*"aaaa")
    await turns(2)
    modest = calls.begin(*"bbc")
    await turns(3)
    refused = [task for task in (*greedy, *modest) if task.done()]
    assert refused == greedy[1:]
    assert {type(task.exception()) for task in refused} == {QueueFull}
    assert calls.line.stats().waiting == 4
    await asyncio.gather(greedy[0], *modest)
    assert calls.order == "0abcb"
    assert calls.line.stats() == IDLE


@virtual_time
async def test_a_timeout_during_a_pause_says_when_the_pause_is_over() -> None:
    """Coming again before it would be in vain."""
    calls = Calls(pacer(max_wait_s=5.0))
    calls.line.pause(30.0)
    (waiting,) = calls.begin("a")
    await asyncio.wait([waiting])
    error = waiting.exception()
    assert isinstance(error, QueueTimeout)
    assert error.retry_after_s == pytest.approx(25.0)


@virtual_time
async def test_waiting_is_bounded() -> None:
    """After `max_wait_s` the caller gets `QueueTimeout` and its place in the queue is gone."""
    calls = Calls(pacer(concurrency=1, max_wait_s=5.0), lasts_s=60.0)
    running, waiting = calls.begin("a", "b")
    await asyncio.wait([waiting])
    assert virtual_loop().time() == pytest.approx(5.0)
    assert isinstance(waiting.exception(), QueueTimeout)
    assert calls.line.stats() == PacerStats(waiting=0, running=1, tenants=0)
    await running


@virtual_time
async def test_closing_tells_who_waits_and_leaves_who_runs() -> None:
    """Waiters get `ShuttingDown`, so do newcomers; running calls end by themselves; no task is left."""
    calls = Calls(pacer(concurrency=1), lasts_s=5.0)
    running, *waiting = calls.begin("a", "b", "c")
    await turns(5)
    await calls.line.aclose()
    assert virtual_loop().time() == 0.0
    assert asyncio.all_tasks() - {running, *waiting} == {asyncio.current_task()}
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(each) for each in results] == [ShuttingDown] * 2
    with pytest.raises(ShuttingDown):
        await calls.make()
    await running
    assert calls.line.stats() == IDLE
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await calls.line.aclose()


@virtual_time
async def test_closing_while_a_waiter_leaves_reports_nothing() -> None:
    """The refusal of a caller that is being cancelled is not an exception nobody retrieved."""
    calls = Calls(pacer(concurrency=1), lasts_s=5.0)
    running, waiting = calls.begin("a", "b")
    await turns(3)
    closing = asyncio.create_task(calls.line.aclose())
    await turns()
    waiting.cancel()
    await asyncio.wait([waiting, closing])
    assert waiting.cancelled()
    await running


class Refusing:
    """A limiter whose first reservations fail."""

    def __init__(self, error: Exception, failures: int = 1) -> None:
        self.error = error
        self.failures = failures

    async def reserve(self) -> float:
        await asyncio.sleep(0)
        if self.failures:
            self.failures -= 1
            raise self.error
        return 0.0

    async def give_back(self) -> None:
        """Nothing to do."""


@pytest.mark.parametrize(
    ("error", "told"), [(StorageUnavailable(), StorageUnavailable), (LookupError(), InternalError)]
)
@virtual_time
async def test_a_limiter_that_fails_is_told_to_everyone_who_waits(error: Exception, told: type[Exception]) -> None:
    """Nobody waits out its patience for a pump that is gone, and the next request finds a new one."""
    calls = Calls(Pacer(Refusing(error), concurrency=3))
    results = await asyncio.gather(*calls.begin("a", "a", "b"), return_exceptions=True)
    assert [type(each) for each in results] == [told] * 3
    assert virtual_loop().time() == 0.0
    assert await calls.make() == 0.0
    assert calls.line.stats() == IDLE


@virtual_time
async def test_the_pump_has_nothing_of_the_request_that_started_it() -> None:
    """It outlives that request; its context would carry one tenant's variables into the waiting of others."""
    tenant: ContextVar[str] = ContextVar("tenant", default="nobody")
    seen: list[str] = []

    class Looking:
        async def reserve(self) -> float:
            seen.append(tenant.get())
            return 0.0

        async def give_back(self) -> None:
            """Nothing to do."""

    tenant.set("acme")
    await Calls(Pacer(Looking(), concurrency=1)).make()
    assert seen == ["nobody"]


@virtual_time
async def test_nested_permits_of_one_caller_need_two_places() -> None:
    """No hidden re-entrancy: a second permit is a second call."""
    line = pacer(100.0, concurrency=2)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(line.permit("acme"))
        await stack.enter_async_context(line.permit("acme"))
        assert line.stats().running == 2
    assert line.stats() == IDLE


# -- several pacers under one limit ------------------------------------------------------------------------------


class Sharing:
    """Pacers of several workers for one provider, and the starts they gave."""

    def __init__(self, workers: int, rate: float = 1.0, concurrency: int = 100) -> None:
        self.world = World()
        self.starts: list[float] = []
        self.running = self.most = 0
        self.pacers = [self.pacer(number, rate, concurrency) for number in range(workers)]

    def pacer(self, number: int, rate: float, concurrency: int) -> Pacer:
        worker = self.world.worker(str(number))
        limiter = worker.limiter("p", rate=rate, burst=1)

        def tell(for_s: float) -> None:
            self.told = asyncio.ensure_future(limiter.pause(for_s))
            for other in self.pacers:
                other.hold(for_s)

        slots = worker.slots("p", limit=concurrency)
        return Pacer(limiter, concurrency=concurrency, max_wait_s=600.0, slots=slots, on_pause=tell)

    async def call(self, number: int, takes_s: float = 0.0) -> None:
        async with self.pacers[number % len(self.pacers)].permit("acme"):
            self.starts.append(asyncio.get_running_loop().time())
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                await asyncio.sleep(takes_s)
            finally:
                self.running -= 1

    async def aclose(self) -> None:
        for pacer in self.pacers:
            await pacer.aclose()


@virtual_time
async def test_pacers_of_several_workers_keep_one_rate() -> None:
    """Four workers, twenty calls, one call a second."""
    sharing = Sharing(4)
    await asyncio.gather(*(sharing.call(number) for number in range(20)))
    gaps = [after - before for before, after in pairwise(sharing.starts)]
    assert min(gaps) >= 1.0
    assert sharing.starts[-1] == pytest.approx(19 * Gcra(1.0).spacing_s, abs=0.5)
    await sharing.aclose()


@virtual_time
async def test_a_pause_holds_the_starts_that_other_workers_had_booked() -> None:
    """And when it ends they do not all start at once."""
    sharing = Sharing(4)
    calls = [asyncio.create_task(sharing.call(number)) for number in range(12)]
    await asyncio.sleep(1.5)
    before = len(sharing.starts)
    sharing.pacers[2].pause(30.0)
    await asyncio.gather(*calls)
    after = sharing.starts[before:]
    assert after[0] >= 31.5
    assert min(later - earlier for earlier, later in pairwise(after)) >= 1.0
    assert after[-1] <= 31.5 + 14.0
    await sharing.aclose()


@virtual_time
async def test_pacers_of_several_workers_run_no_more_calls_than_the_limit() -> None:
    """Three at a time over four workers; and every slot comes back."""
    sharing = Sharing(4, rate=1000.0, concurrency=3)
    await asyncio.gather(*(sharing.call(number, takes_s=1.0) for number in range(20)))
    assert sharing.most == 3
    await asyncio.sleep(1.0)
    assert sharing.world.slots["p"] == set()
    await sharing.aclose()


@virtual_time
async def test_whoever_leaves_a_queue_leaves_no_slot_behind() -> None:
    """Before its start, at it, and with nobody else in the queue."""
    sharing = Sharing(2, rate=10.0, concurrency=2)
    for patience_s in (0.0, 0.0001, 0.05, 0.11):
        calls = [asyncio.create_task(sharing.call(number, takes_s=0.05)) for number in range(6)]
        await asyncio.sleep(patience_s)
        for call in calls[::2]:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.sleep(1.0)
        assert sharing.world.slots["p"] == set()
    await sharing.aclose()
    assert sharing.most <= 2


@virtual_time
async def test_a_pacer_that_closes_while_it_waits_for_a_slot_has_taken_none() -> None:
    """The others go on."""
    sharing = Sharing(2, rate=1000.0, concurrency=1)
    holding = asyncio.create_task(sharing.call(0, takes_s=5.0))
    await asyncio.sleep(0.1)
    waiting = asyncio.create_task(sharing.call(1))
    await asyncio.sleep(0.1)
    await sharing.pacers[1].aclose()
    with pytest.raises(ShuttingDown):
        await waiting
    await holding
    await sharing.call(0)
    assert sharing.world.slots["p"] == set()
    await sharing.aclose()


# -- without the queue -------------------------------------------------------------------------------------------


@virtual_time
async def test_nobody_queues_before_whom_nobody_waits() -> None:
    """A burst is started where it asks, without a turn of the event loop; the one after it has to wait."""
    line = pacer(10.0, burst=3)
    permits = []
    for _ in range(3):
        entering = line.permit("acme").__aenter__()
        with pytest.raises(StopIteration) as done:
            entering.send(None)
        permits.append(done.value.value)
    assert [permit.queue_wait_s for permit in permits] == [0.0] * 3
    assert line.stats().running == 3
    started_s = virtual_loop().time()
    async with line.permit("acme"):
        assert virtual_loop().time() > started_s + 0.09


@virtual_time
async def test_nobody_passes_those_who_wait() -> None:
    """Neither when a start is free for a moment before it is handed out, nor when a permit is."""
    calls = Calls(pacer(100.0, burst=100, concurrency=1), lasts_s=1.0)
    tasks = calls.begin("a", "b")
    await asyncio.sleep(1.0)
    tasks += calls.begin("c")
    await asyncio.gather(*tasks)
    assert calls.order == "abc"


@virtual_time
@pytest.mark.parametrize("held", ["pause", "throttle", "concurrency", "closing"])
async def test_a_free_start_is_not_taken_at_once_while(held: str) -> None:
    """What holds the queue holds the first of it too."""
    line = pacer(1.0, concurrency=0 if held == "concurrency" else 9)
    if held == "pause":
        line.pause(5.0)
    elif held == "throttle":
        line.slow_down(0.0, 0.0)
    elif held == "closing":
        await line.aclose()
    entering = asyncio.create_task(line.permit("acme").__aenter__())
    await turns(1)
    assert line.stats().running == 0
    await line.aclose()
    with pytest.raises(ShuttingDown):
        await entering


@virtual_time
async def test_a_limit_that_others_share_is_always_asked() -> None:
    """They may have used what looks free from here."""

    class Elsewhere:
        asked = 0

        async def reserve(self) -> float:
            self.asked += 1
            return 0.0

        async def give_back(self) -> None:
            raise AssertionError

    limiter = Elsewhere()
    async with Pacer(limiter, concurrency=1).permit("acme"):
        assert limiter.asked == 1


@virtual_time
async def test_a_number_of_calls_that_others_share_is_always_asked() -> None:
    """They may run as many as there may be."""
    slots = Slots()
    async with pacer(slots=slots).permit("acme"):
        assert (slots.held, slots.asked) == (1, 1)
    assert slots.held == 0


class Slots:
    """Counts."""

    def __init__(self) -> None:
        self.held = 0
        self.asked = 0

    async def take(self) -> None:
        self.asked += 1
        self.held += 1

    def give_back(self) -> None:
        self.held -= 1


class SlotsAtHand(Slots):
    """Counts, and knows that nobody else does."""

    def take_now(self) -> bool:
        self.held += 1
        return True


@virtual_time
async def test_a_slot_at_hand_is_given_back_where_no_start_is_free() -> None:
    """The second call has one when its start comes, and not before."""
    slots = SlotsAtHand()
    line = pacer(slots=slots)
    calls = Calls(line, lasts_s=10.0)
    tasks = calls.begin("a", "b")
    await turns(1)
    assert (slots.held, slots.asked) == (1, 0)
    await asyncio.sleep(5.0)
    assert (slots.held, slots.asked) == (2, 1)
    await asyncio.gather(*tasks)
    assert slots.held == 0
