"""Any history of asking, leaving and time passing: not too many, not too soon, nothing lost; GCRA by brute force."""

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oncewise.core.pacing import Gcra, LocalLimiter, Pacer, PacerStats
from oncewise.core.throttle import Throttle
from oncewise.errors import StorageUnavailable
from tests.support.virtual_time import run_virtual, turns, virtual_loop

TENANTS = ("a", "b", "c")
Op = tuple[str, int, int]

ops = st.lists(
    st.tuples(
        st.sampled_from(
            ["ask"] * 6 + ["leave", "leave", "leave-later", "pass", "pass", "oversleep", "refused", "away"]
        ),
        st.integers(0, 11),
        st.integers(0, 4),
    ),
    max_size=30,
)
limits = st.tuples(st.sampled_from([0.5, 1.0, 4.0, 20.0]), st.integers(1, 4), st.integers(1, 3))


@dataclass
class Caller:
    """One request of a tenant: when it asked, and when its call started."""

    tenant: str
    task: asyncio.Task[None] | None = None
    started_s: float | None = None


@dataclass
class Line:
    """A pacer and what was seen of it."""

    rate: float
    burst: int
    concurrency: int
    callers: list[Caller] = field(default_factory=list)
    started: list[Caller] = field(default_factory=list)
    running: int = 0

    def __post_init__(self) -> None:
        limiter = LocalLimiter(self.rate, self.burst, virtual_loop().time)
        self.pacer = Pacer(limiter, concurrency=self.concurrency, max_wait_s=1e6)

    async def call(self, caller: Caller, lasts_s: float) -> None:
        async with self.pacer.permit(caller.tenant, group=caller.tenant):
            caller.started_s = virtual_loop().time()
            self.started.append(caller)
            self.running += 1
            assert self.running <= self.concurrency
            try:
                await asyncio.sleep(lasts_s)
            finally:
                self.running -= 1

    async def play(self, history: list[Op]) -> None:
        for name, n, loop_turns in history:
            self.step(name, n)
            await (asyncio.sleep(n / 5) if name == "pass" else turns(loop_turns))
        await asyncio.gather(*(caller.task for caller in self.callers if caller.task), return_exceptions=True)
        assert self.pacer.stats() == PacerStats(0, 0, 0, self.pacer.stats().rate_share)
        await self.check_that_nothing_is_lost()
        self.check_spacing()
        self.check_order()
        await self.pacer.aclose()

    def step(self, name: str, n: int) -> None:
        if name == "ask":
            caller = Caller(TENANTS[n % len(TENANTS)])
            caller.task = asyncio.create_task(self.call(caller, n / 10))
            self.callers.append(caller)
        elif name in ("leave", "leave-later"):
            waiting = [caller for caller in self.callers if caller.task and not caller.task.done()]
            if waiting:
                cancel = waiting[n % len(waiting)].task.cancel
                # Later means: at the moment a start comes, between the permit and whoever wakes to take it.
                cancel() if name == "leave" else virtual_loop().call_later(n / 5, virtual_loop().call_soon, cancel)
        elif name == "oversleep":
            virtual_loop().oversleep(n / 10)
        elif name == "refused":
            self.pacer.slow_down(virtual_loop().time() - n / 10, n / 5 if n % 2 else None)
        elif name == "away":
            self.pacer.turn_away(TENANTS[n % len(TENANTS)], StorageUnavailable().failure())

    async def check_that_nothing_is_lost(self) -> None:
        """All places are free again: as many calls as may run at a time get through."""
        await asyncio.sleep(1000)
        probes = [Caller("probe") for _ in range(self.concurrency)]
        for probe in probes:
            probe.task = asyncio.create_task(self.call(probe, 1000.0))
        await asyncio.sleep(900)
        assert self.running == self.concurrency
        await asyncio.gather(*(probe.task for probe in probes if probe.task))

    def check_spacing(self) -> None:
        """In any stretch of time at most the burst and what the rate earns in it."""
        burst = max(1, min(self.burst, int(self.rate)))
        times = [caller.started_s or 0.0 for caller in self.started]
        for first in range(len(times)):
            for last in range(first + burst, len(times)):
                earned = (last - first + 1 - burst) / self.rate
                assert times[last] - times[first] >= earned - 0.005, "too soon"
        for first, next_second in zip(times, times[max(1, int(self.rate)) :], strict=False):
            assert next_second - first >= 0.995, "too many in a second"

    def check_order(self) -> None:
        """Within a tenant, first come is first served."""
        lanes = defaultdict(list)
        for caller in self.started:
            if caller in self.callers:
                lanes[caller.tenant].append(next(n for n, each in enumerate(self.callers) if each is caller))
        for lane in lanes.values():
            assert all(sooner < later for sooner, later in pairwise(lane))


@given(ops, limits)
@example([("ask", 0, 0), ("ask", 0, 4), ("leave-later", 5, 0), ("ask", 0, 0)], (1.0, 1, 1))
@example([("ask", 9, 1), ("oversleep", 11, 0), ("ask", 9, 0), ("ask", 9, 0)], (1.0, 1, 2))
@example([("ask", 0, 2), ("oversleep", 1, 0), ("ask", 0, 0)], (0.5, 1, 1))
def test_histories(history: list[Op], limit: tuple[float, int, int]) -> None:
    """Concurrency and rate are kept, tenants' order is kept, and no place is lost to whoever leaves."""

    async def play() -> None:
        await Line(*limit).play(history)

    run_virtual(play())


class TokenBucket:
    """The same promise told as a bucket of tokens, in exact fractions: slow and obvious."""

    def __init__(self, spacing_s: Fraction, burst: int) -> None:
        self.spacing_s = spacing_s
        self.burst = Fraction(burst)
        self.tokens = self.burst
        self.at_s = Fraction(0)

    def _fill(self, now_s: Fraction) -> None:
        if now_s > self.at_s:
            self.tokens = min(self.burst, self.tokens + (now_s - self.at_s) / self.spacing_s)
            self.at_s = now_s

    def reserve(self, now_s: Fraction) -> Fraction:
        self._fill(now_s)
        self.tokens -= 1
        return max(now_s, self.at_s - min(Fraction(0), self.tokens) * self.spacing_s)

    def give_back(self) -> None:
        self.tokens += 1


MILLISECOND = Fraction(1, 1000)


@given(
    st.sampled_from([1, 2, 3, 5, 10, 40]),
    st.integers(1, 6),
    st.lists(st.tuples(st.sampled_from(["reserve", "reserve", "reserve", "back"]), st.integers(0, 3000)), max_size=40),
)
@example(2, 2, [("reserve", 0), ("back", 0), ("reserve", 0), ("reserve", 0), ("reserve", 0)])
def test_gcra_is_a_token_bucket(rate: int, burst: int, history: list[tuple[str, int]]) -> None:
    """One number of state promises the same starts as counting tokens does."""
    spacing_s = Fraction(1, rate) + min(Fraction(3, 100 * rate), Fraction(3, 100))
    gcra, bucket = Gcra(rate, burst), TokenBucket(spacing_s, min(burst, rate))
    now_s, reserved = Fraction(0), False
    for name, elapsed_ms in history:
        if name == "back":
            if reserved:
                gcra.give_back()
                bucket.give_back()
            reserved = False
            continue
        now_s += elapsed_ms * MILLISECOND
        assert gcra.reserve(float(now_s)) == pytest.approx(float(bucket.reserve(now_s)), abs=1e-9)
        reserved = True


refusals = st.lists(
    st.tuples(st.floats(0, 40), st.floats(0, 5), st.sampled_from([None, 0.0, 0.5, 12.0]), st.booleans()), max_size=30
)


@given(refusals)
@example([(0.0, 0.0, None, False)] * 9)
def test_the_share_of_the_rate_by_brute_force(history: list[tuple[float, float, float | None, bool]]) -> None:
    """Halved once for each refusal that was not under way already, 5 % more for each second after a pause, and never
    outside of 5 to 100 %; a pause is what the provider says, or 1 s doubling to 30."""
    throttle, now_s = Throttle(), 0.0
    share, clean_from_s, known_s, strikes = 1.0, 0.0, float("-inf"), 0
    for pass_s, ago_s, retry_after_s, accepted in history:
        now_s += pass_s
        share = min(1.0, share + 0.05 * max(0.0, now_s - max(clean_from_s, now_s - pass_s)))
        assert throttle.share(now_s) == pytest.approx(share)
        began_s = now_s - ago_s
        if accepted:
            throttle.accepted(began_s)
            strikes = 0 if began_s >= known_s else strikes
            continue
        pause_s = throttle.refused(began_s, now_s, retry_after_s)
        expected_s = retry_after_s or 0.0
        if began_s >= known_s:
            known_s, share = now_s, max(0.05, share / 2)
            if retry_after_s is None:
                expected_s, strikes = min(30.0, 2.0**strikes), strikes + 1
        assert pause_s == expected_s
        clean_from_s = max(clean_from_s, now_s + pause_s)


@given(st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.77, 0.99]), st.integers(1, 500))
def test_unused_starts_keep_the_share_to_within_one(share: float, calls: int) -> None:
    """Of all starts that were booked the share is used, at any time."""
    throttle = Throttle()
    throttle._share, throttle._clean_from_s = share, 1e9
    booked = sum(1 + throttle.starts_to_skip(0.0) for _ in range(calls))
    assert abs(booked - calls / share) <= 1.0
