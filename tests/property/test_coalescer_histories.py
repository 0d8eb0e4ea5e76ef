"""Any history of arrivals, departures and landings: one flight a key, one outcome a waiter, nothing left behind."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from oncewise.core.coalesce import Coalescer, CoalescerStats, Flight, FlightLanded, Landed, Outcome, Waiter
from oncewise.errors import (
    Failure,
    FlightCancelled,
    FlightFailed,
    Overloaded,
    ProviderError,
    ShuttingDown,
    TurnCancelled,
    WaitTimeout,
)
from oncewise.model import Role
from tests.support.virtual_time import run_virtual, turns

KEYS = ("a", "b", "c")
MAX_FLIGHTS = 3
MAX_WAITERS = 4
REMEMBERED_S = 1.0
STOPPED = TurnCancelled().failure()

Op = tuple[str, int, int]
"""What happens, to which of those there are, and how many turns of the loop go by afterwards."""

ops = st.lists(
    st.tuples(
        st.sampled_from(
            ["arrive"] * 6
            + ["leave", "leave", "land", "land", "fail", "break", "self-cancel"]
            + ["forget", "cancel", "withdraw", "sleep", "impatient", "close"]
        ),
        st.integers(0, 7),
        st.integers(0, 4),
    ),
    max_size=40,
)
tables = st.fixed_dictionaries(
    {
        "abandon_after_s": st.sampled_from([None, 0.0, 1.0]),
        "running": st.booleans(),
        "tidy": st.integers(0, 3),
        "remembers": st.booleans(),
    }
)


@dataclass
class Run:
    """One piece of work that was begun."""

    flight: Flight[Any]
    end: asyncio.Future[Any]


@dataclass
class Caller:
    """One request and what it got: exactly one of these, in the end."""

    waiter: Waiter[Any]
    task: asyncio.Task[None] | None = None
    got: list[Outcome[Any] | type[BaseException]] = field(default_factory=list)


class History:
    """Plays a list of operations and checks each step against what must hold."""

    def __init__(self, *, abandon_after_s: float | None, running: bool, tidy: int, remembers: bool) -> None:
        self.landed: list[FlightLanded] = []
        self.flights = Coalescer(
            abandon_after_s=abandon_after_s,
            deadline_s=100.0,
            remember=self._remember if remembers else lambda _: 0.0,
            max_flights=MAX_FLIGHTS,
            max_waiters=MAX_WAITERS,
            listener=self._listen,
        )
        self.running = running
        self.tidy = tidy
        self.runs: list[Run] = []
        self.callers: list[Caller] = []
        self.started: list[Flight[Any]] = []
        self.current: dict[str, Flight[Any]] = {}
        self.closing: list[asyncio.Task[None]] = []

    def _remember(self, failure: Failure) -> float:
        assert failure not in (STOPPED, FlightCancelled().failure())
        return REMEMBERED_S

    def _listen(self, event: object) -> None:
        assert isinstance(event, FlightLanded)
        self.landed.append(event)

    async def work(self, flight: Flight[Any]) -> Any:
        run = Run(flight, asyncio.get_running_loop().create_future())
        self.runs.append(run)
        if self.running:
            flight.mark_running()
        try:
            return await run.end
        finally:
            await turns(self.tidy)

    # -- operations ----------------------------------------------------------------------------------------------

    async def play(self, history: list[Op]) -> None:
        steps: dict[str, Callable[[int], None]] = {
            "arrive": lambda n: self.arrive(KEYS[n % len(KEYS)]),
            "impatient": lambda n: self.arrive(KEYS[n % len(KEYS)], patience_s=0.25),
            "leave": lambda n: self.with_caller(n, lambda caller: caller.task and caller.task.cancel()),
            "withdraw": lambda n: self.with_caller(n, lambda caller: caller.waiter.withdraw(STOPPED)),
            "land": lambda n: self.with_run(n, lambda run: run.end.set_result(id(run.flight))),
            "fail": lambda n: self.with_run(n, lambda run: run.end.set_exception(ProviderError())),
            "break": lambda n: self.with_run(n, lambda run: run.end.set_exception(LookupError())),
            "self-cancel": lambda n: self.with_run(n, lambda run: run.end.cancel()),
            "forget": lambda n: self.forget(KEYS[n % len(KEYS)]),
            "cancel": lambda n: self.with_run(n, lambda run: self.flights.cancel(run.flight, STOPPED)),
            "sleep": lambda _: None,
            "close": lambda n: self.close(n / 4),
        }
        for name, n, loop_turns in history:
            steps[name](n)
            self.check()
            await (asyncio.sleep(0.3) if name == "sleep" else turns(loop_turns))
            self.check()
        await self.finish()

    def arrive(self, key: str, patience_s: float | None = None) -> None:
        known = self.attached(key)
        try:
            waiter = self.flights.join(key, self.work)
        except ShuttingDown:
            assert self.closing
            assert known is None
            return
        except Overloaded:
            assert len(self.aloft()) == MAX_FLIGHTS if known is None else known.waiters == MAX_WAITERS
            return
        if known is not None:
            assert waiter.flight is known
            assert waiter.role is Role.FOLLOWER
        elif waiter.role is Role.LEADER:
            assert waiter.flight not in self.started
            self.started.append(waiter.flight)
            self.current[key] = waiter.flight
        else:
            assert waiter.role is Role.REPLAYED
            assert isinstance(waiter.flight.outcome, Failure)
        caller = Caller(waiter)
        caller.task = asyncio.create_task(self.wait(caller, patience_s))
        # A task cancelled before its first step never enters its `with`.
        caller.task.add_done_callback(lambda _: waiter.leave())
        self.callers.append(caller)

    async def wait(self, caller: Caller, patience_s: float | None) -> None:
        with caller.waiter:
            try:
                caller.got.append(await caller.waiter.outcome(patience_s))
            except (WaitTimeout, asyncio.CancelledError) as error:
                caller.got.append(type(error))

    def with_caller(self, n: int, act: Callable[[Caller], object]) -> None:
        waiting = [caller for caller in self.callers if caller.task is not None and not caller.task.done()]
        if waiting:
            act(waiting[n % len(waiting)])

    def with_run(self, n: int, act: Callable[[Run], object]) -> None:
        open_runs = [run for run in self.runs if not run.end.done()]
        if open_runs:
            act(open_runs[n % len(open_runs)])

    def forget(self, key: str) -> None:
        self.flights.forget(key)
        self.current.pop(key, None)

    def close(self, drain_s: float) -> None:
        self.closing.append(asyncio.create_task(self.flights.aclose(drain_s)))

    # -- what must hold ------------------------------------------------------------------------------------------

    def aloft(self) -> list[Flight[Any]]:
        return [flight for flight in self.started if flight.outcome is None]

    def attached(self, key: str) -> Flight[Any] | None:
        """The flight a newcomer must join: neither landed, forgotten nor being ended."""
        flight = self.current.get(key)
        return flight if flight is not None and flight.outcome is None and flight._end is None else None

    def check(self) -> None:
        stats = self.flights.stats()
        assert stats.flights == sum(self.attached(key) is not None for key in KEYS)
        assert stats.tasks == len(self.aloft()) <= MAX_FLIGHTS
        assert stats.waiters == sum(flight.waiters for flight in self.aloft())
        assert all(0 <= flight.waiters <= MAX_WAITERS for flight in self.started)
        assert len(self.landed) == len(self.started) - len(self.aloft())
        assert all(len(caller.got) <= 1 for caller in self.callers)

    async def finish(self) -> None:
        """Let everything come to its end, then look what is left."""
        for flight in self.aloft():
            if flight.waiters == 0 and flight._end is None:
                self.flights.cancel(flight, STOPPED)
        await turns(2)
        for run in self.runs:
            if not run.end.done():
                run.end.set_result(id(run.flight))
        await asyncio.gather(*(caller.task for caller in self.callers if caller.task), return_exceptions=True)
        await asyncio.gather(*self.closing)
        await asyncio.sleep(REMEMBERED_S + 0.1)
        assert self.flights.stats() == CoalescerStats(0, 0, 0, 0)
        assert not self.flights._table
        assert not self.flights._expiries
        for caller in self.callers:
            self.check_outcome(caller)

    def check_outcome(self, caller: Caller) -> None:
        if not caller.got:
            assert caller.task is not None
            assert caller.task.cancelled()
            return
        (outcome,) = caller.got
        if isinstance(outcome, Landed):
            assert outcome.value == id(caller.waiter.flight)
        elif isinstance(outcome, Failure):
            assert outcome == STOPPED or outcome is caller.waiter.flight.outcome
            assert outcome.code in {
                STOPPED.code,
                FlightCancelled.code,
                FlightFailed.code,
                ProviderError.code,
                ShuttingDown.code,
            }


QUEUED = {"abandon_after_s": None, "running": False, "tidy": 2, "remembers": False}


@given(ops, tables)
@example([("arrive", 0, 2), ("leave", 0, 1), ("arrive", 0, 2), ("land", 0, 4)], QUEUED)
@example([("arrive", 0, 2), ("forget", 0, 0), ("arrive", 0, 2), ("fail", 0, 3), ("arrive", 0, 1)], QUEUED)
@example([("arrive", 0, 0), ("close", 0, 1), ("arrive", 0, 4)], QUEUED)
def test_histories(history: list[Op], table: dict[str, Any]) -> None:
    """One running flight a key, one outcome a waiter, an empty table and a silent loop at the end."""

    async def play() -> None:
        await History(**table).play(history)

    run_virtual(play())
