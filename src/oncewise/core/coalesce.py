"""Leader/follower coalescing of identical work, inside one event loop.

A *flight* is one piece of work in progress. The first request for a key starts it and leads; requests that come before
it *lands* follow. The table owns the work: it runs in a task and a context of its own, so that no requester, the first
included, can end it by leaving. Every requester is a waiter on the flight's outcome, a frozen record from which each
builds its own result or exception.

When a flight lands its key is free again. This module shares work in progress and remembers nothing, except failures
for as long as `remember` says: replaying answers is the business of whoever stores them.

The state is one table and a heap of expiries. `_start` and `_keep` are the only methods that add to the table and
`_detach` the only one that removes; none awaits, so no lock is needed on one loop.

The idea is golang.org/x/sync/singleflight's; where the rules differ, a comment says which bug taught us.

Deliberately absent: HTTP, SQL, Redis, providers, settings and wall-clock time.
"""

import asyncio
import heapq
from collections.abc import Awaitable, Callable, Hashable
from contextvars import Context, ContextVar
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any, Generic, NamedTuple, NoReturn, Self, TypeVar

from oncewise.errors import (
    Failure,
    FlightCancelled,
    FlightFailed,
    FlightTimeout,
    OncewiseError,
    Overloaded,
    ReentrantFlight,
    ShuttingDown,
    WaitTimeout,
    WrongLoop,
)
from oncewise.model import Role

__all__ = ["Coalescer", "CoalescerStats", "Flight", "FlightLanded", "Landed", "Shared", "Waiter"]

T = TypeVar("T")

Work = Callable[["Flight[T]"], Awaitable[T]]


@dataclass(frozen=True, slots=True)
class Landed(Generic[T]):
    """The outcome of work that ended well."""

    value: T


Outcome = Landed[T] | Failure

_CANCELLED = FlightCancelled().failure()


class Shared(NamedTuple, Generic[T]):
    """A value and what the caller was to the work behind it."""

    value: T
    role: Role


@dataclass(frozen=True, slots=True)
class FlightLanded:
    """A flight ended; emitted once for each, without content.

    Attributes:
        joined: Requests that followed while it ran; the leader is not counted.
        abandoned: Whether nobody waited for it any more.
        code: None if it ended well.
    """

    key: Hashable
    joined: int
    abandoned: bool
    duration_s: float
    code: str | None


@dataclass(frozen=True, slots=True)
class CoalescerStats:
    """What a coalescer holds now. All zero when idle: anything else is a leak.

    Attributes:
        flights: Keys in the table whose work runs.
        waiters: Requests that wait, over all flights.
        tasks: Flights that have not landed; more than `flights` while forgotten or cancelled work winds down.
        remembered: Failures that still answer.
    """

    flights: int
    waiters: int
    tasks: int
    remembered: int


class Flight(Generic[T]):
    """One piece of work in progress. Made and changed by its `Coalescer` only.

    Attributes:
        work: What was given to `join` by the leader, shared by all; gone once nobody can join any more.
        outcome: How it ended; None while it runs.
        waiters: Requests that wait now.
    """

    __slots__ = (
        "_abandon_after_s",
        "_after",
        "_end",
        "_futures",
        "_heralds",
        "_loop",
        "_running",
        "_started_s",
        "_task",
        "_timer",
        "awaits",
        "has_announced",
        "joined",
        "key",
        "outcome",
        "waiters",
        "work",
    )

    def __init__(
        self, key: Hashable, work: "Work[T]", loop: asyncio.AbstractEventLoop, abandon_after_s: float | None
    ) -> None:
        self.key = key
        self.work = work
        self.outcome: Outcome[T] | None = None
        self.waiters = 0
        self.joined = -1  # the leader's own join makes it 0
        self.awaits: list[Flight[Any]] = []
        self._loop = loop
        self._started_s = loop.time()
        self.has_announced = False
        self._futures: dict[asyncio.Future[None], None] = {}
        self._heralds: dict[asyncio.Future[None], None] = {}
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._running = False
        self._end: Failure | None = None
        self._after: list[Callable[[], None]] = []
        self._abandon_after_s = abandon_after_s

    @property
    def ending(self) -> bool:
        """Whether it was cancelled, so that its work should come to an end; see `Coalescer.cancel`."""
        return self._end is not None

    def mark_running(self) -> None:
        """Say that the work costs something from here on, so that leaving no longer drops it at once."""
        self._running = True

    def announce(self) -> None:
        """Wake everyone in `Waiter.announced`: what the work has to say before it ends is there to be read."""
        self.has_announced = True
        _resolve(*self._heralds)

    def after(self, tell: Callable[[], None]) -> None:
        """Call `tell` once this has landed, however it does; at once if it has. It must not raise."""
        if self.outcome is None:
            self._after.append(tell)
        else:
            tell()

    def abandon_after(self, abandon_after_s: float | None) -> None:
        """Choose for this flight what `Coalescer(abandon_after_s=...)` chooses for all."""
        self._abandon_after_s = abandon_after_s

    def _forget_work(self) -> None:
        """Let go of the work: it often knows its flight, and each would keep the other until a collection.

        At 2,500 flights a second the collections would be a tenth of all work, 50 ms at a time.
        """
        self.work = _over

    def _reaches(self, other: "Flight[Any]") -> bool:
        seen, ahead = set[Flight[Any]](), [self]
        while ahead:
            flight = ahead.pop()
            if flight is other:
                return True
            if flight not in seen:
                seen.add(flight)
                ahead.extend(flight.awaits)
        return False


async def _over(_flight: Flight[Any]) -> NoReturn:
    raise RuntimeError("the flight is over")


def _resolve(*futures: asyncio.Future[None]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


_inside: ContextVar[Flight[Any] | None] = ContextVar("oncewise_flight", default=None)


class Waiter(Generic[T]):
    """One request's interest in a flight. Await `result` or `outcome`, then `leave`; or use it in a `with` block.

    One task at a time waits on it.
    """

    __slots__ = ("_future", "_left", "_table", "_withdrawn", "_within", "flight", "role")

    def __init__(
        self,
        table: "Coalescer",
        flight: Flight[T],
        role: Role,
        within: Flight[Any] | None = None,
        *,
        landed: bool = False,
    ) -> None:
        self.flight = flight
        self.role = role
        self._table = table
        self._within = within
        self._left = landed
        self._future: asyncio.Future[None] | None = None
        self._withdrawn: Failure | None = None

    async def outcome(self, timeout_s: float | None = None) -> Outcome[T]:
        """Wait until the flight has landed, at most `timeout_s` seconds; the flight goes on in any case.

        Raises:
            WaitTimeout: it did not land in time.
        """
        await self._wait(self.flight._futures, timeout_s)
        return self._outcome()

    async def result(self, timeout_s: float | None = None) -> T:
        """The value of the flight.

        Raises:
            OncewiseError: rebuilt from the shared failure; a new object for each caller.
            WaitTimeout: it did not land in time.
        """
        await self._wait(self.flight._futures, timeout_s)
        return self._value()

    async def announced(self) -> None:
        """Wait until the work has announced something or has landed, whichever is first."""
        if not self.flight.has_announced:
            await self._wait(self.flight._heralds, None)

    async def _wait(self, futures: dict[asyncio.Future[None], None], timeout_s: float | None) -> None:
        if self.flight.outcome is not None or self._withdrawn is not None:
            return
        loop = self.flight._loop
        # A future of our own and not the task: cancelling this wait must not reach the work (aiohttp #2910).
        future: asyncio.Future[None] = loop.create_future()
        self._future = future
        futures[future] = None
        # A timer and not `asyncio.timeout`: that cancels, and would turn an answer that came just in time into nothing.
        timer = None if timeout_s is None else loop.call_later(timeout_s, _resolve, future)
        try:
            await future
        finally:
            futures.pop(future, None)
            if timer is not None:
                timer.cancel()

    def _outcome(self) -> Outcome[T]:
        outcome = self._withdrawn or self.flight.outcome
        if outcome is None:
            raise WaitTimeout
        return outcome

    def _value(self) -> T:
        outcome = self._outcome()
        if isinstance(outcome, Failure):
            raise outcome.error()
        copy = self._table._copy
        return outcome.value if copy is None else copy(outcome.value)

    def withdraw(self, failure: Failure) -> None:
        """End this interest, and only this, with a failure of its own; a wait in progress gets it."""
        self._withdrawn = failure
        if self._future is not None:
            _resolve(self._future)
        self.leave()

    def leave(self) -> None:
        """Give up this interest; nobody else's. Calling it again does nothing."""
        if not self._left:
            self._left = True
            self._table._leave(self.flight, self._within)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()


def _running(work: Callable[[], Awaitable[T]]) -> Work[T]:
    def begin(flight: Flight[T]) -> Awaitable[T]:
        flight.mark_running()
        return work()

    return begin


def _remember_nothing(_failure: Failure) -> float:
    return 0.0


def _tell_nobody(_event: object) -> None:
    return None


class Coalescer:
    """Shares running work between identical requests.

    Args:
        deadline_s: Seconds after which a flight is ended with `FlightTimeout`; None for no deadline. It is the flight's
            own: no requester's deadline shortens it.
        abandon_after_s: What becomes of running work that nobody waits for: None lets it finish, a number cancels it
            that many seconds after the last waiter left. Work that has not called `Flight.mark_running` is always
            dropped at once.
        remember: How many seconds a failure answers further requests for its key; 0.0 for not at all. Not asked about
            a cancellation, which says nothing about the request.
        copy: Makes each requester's own value of the shared one, e.g. `copy.deepcopy`. None hands everyone the same
            object, which all must leave as it is.
        max_flights: Flights at a time, forgotten and cancelled ones included until they have ended; above it
            `Overloaded`. Also how many failures are remembered at most.
        max_waiters: Waiters per flight; above it `Overloaded`.
        listener: Called with a `FlightLanded` for every flight.
    """

    def __init__(
        self,
        *,
        deadline_s: float | None = 120.0,
        abandon_after_s: float | None = None,
        remember: Callable[[Failure], float] = _remember_nothing,
        copy: Callable[[Any], Any] | None = None,
        max_flights: int = 10_000,
        max_waiters: int = 5_000,
        listener: Callable[[object], None] = _tell_nobody,
    ) -> None:
        self._deadline_s = deadline_s
        self._abandon_after_s = abandon_after_s
        self._remember = remember
        self._copy = copy
        self._max_flights = max_flights
        self._max_waiters = max_waiters
        self._listener = listener
        self._table: dict[Hashable, Flight[Any]] = {}
        self._expiries: list[tuple[float, int, Flight[Any]]] = []
        self._order = count()
        self._flying: set[Flight[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False

    async def run(
        self, key: Hashable, work: Callable[[], Awaitable[T]], *, timeout_s: float | None = None
    ) -> Shared[T]:
        """Do `work`, or share the result of the same work in progress.

        Args:
            key: Equal keys share; see `oncewise.request_key`.
            work: Called once for all, without arguments and in an empty context: it sees no context variable, task
                group or cancellation of any requester. It counts as running from its first step; work that queues
                before it costs anything takes `join` and says when.
            timeout_s: This caller's own patience in seconds; None waits as long as the flight takes.

        Raises:
            OncewiseError: what the work raised, rebuilt for this caller; `FlightFailed` with the original as
                `__cause__` if it was an exception of another kind.
            WaitTimeout: `timeout_s` passed; the work goes on for the others.
            Overloaded, ShuttingDown, ReentrantFlight: the request was not taken on.
        """
        flight: Flight[T] | None = self._look_up(key)
        if flight is None:
            waiter = self._board(self._start(key, _running(work)), Role.LEADER)
        else:
            waiter = self._board(flight, Role.FOLLOWER)
        try:
            # Not `await waiter.result()`: a coroutine less for each of thousands of followers.
            await waiter._wait(waiter.flight._futures, timeout_s)
            return Shared(waiter._value(), waiter.role)
        finally:
            waiter.leave()

    def join(self, key: Hashable, work: "Work[T]") -> Waiter[T]:
        """Join the flight of `key`, or start one. Never awaits: between look-up and insert nobody else can run.

        Raises:
            Overloaded: too many flights or waiters; `retry_after_s` is set.
            ReentrantFlight: the flight waits, directly or not, for the work that asks.
            ShuttingDown: the coalescer is closing.
            WrongLoop: the coalescer belongs to another event loop.
        """
        flight: Flight[T] | None = self._look_up(key)
        if flight is None:
            return self._board(self._start(key, work), Role.LEADER)
        return self._board(flight, Role.FOLLOWER)

    def follow(self, key: Hashable) -> Waiter[Any] | None:
        """Join the flight of `key` if there is one; start nothing.

        Raises:
            Overloaded, ReentrantFlight, WrongLoop: as `join`.
        """
        flight = self._look_up(key)
        return None if flight is None else self._board(flight, Role.FOLLOWER)

    def follow_flight(self, flight: Flight[T]) -> Waiter[T] | None:
        """Join this very flight; None if it can be joined no more: it has landed, or is being cancelled.

        By its key another could be met that has come in its place, even the one that asks.

        Raises:
            Overloaded, ReentrantFlight, WrongLoop: as `join`.
        """
        return self._board(flight, Role.FOLLOWER) if self._look_up(flight.key) is flight else None

    def forget(self, key: Hashable) -> None:
        """Let later requests for `key` start anew. A running flight still answers those who wait for it."""
        flight = self._table.get(key)
        if flight is not None:
            self._detach(flight)

    def cancel(self, flight: Flight[Any], failure: Failure) -> None:
        """End a flight with `failure` for everyone who waits. A landed flight stays as it is.

        The work is cancelled and may tidy up. Should it end in a value or an error of its own after all, that is the
        outcome: what was stored a moment before the cancel came stays true.
        """
        if flight._end is None and self._is_aloft(flight):
            flight._end = failure
            self._detach(flight)
            if flight._task is not None:
                flight._task.cancel()

    def stats(self) -> CoalescerStats:
        """What is held now."""
        self._expire()
        remembered = sum(1 for flight in self._table.values() if flight.outcome is not None)
        waiters = sum(flight.waiters for flight in self._flying)
        return CoalescerStats(len(self._table) - remembered, waiters, len(self._flying), remembered)

    async def aclose(self, drain_s: float = 0.0) -> None:
        """Take nothing on, give running flights `drain_s` seconds, end the rest with `ShuttingDown`.

        Returns when every task has ended. May be called again.
        """
        self._closing = True
        if drain_s > 0:
            await self._ended(drain_s)
        # Once each: a second cancel would interrupt the work while it tidies up after the first.
        for flight in list(self._flying):
            self.cancel(flight, ShuttingDown().failure())
        await self._ended(None)
        self._table.clear()
        self._expiries.clear()

    async def _ended(self, timeout_s: float | None) -> None:
        tasks = [flight._task for flight in self._flying if flight._task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)

    # -- the table -----------------------------------------------------------------------------------------------

    def _look_up(self, key: Hashable) -> Flight[Any] | None:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._bind(loop)
        if self._expiries:
            self._expire()
        return self._table.get(key)

    def _bind(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is not None and not self._loop.is_closed():
            raise WrongLoop
        # Flights of a closed loop can never land; joining one would wait for ever.
        self._table.clear()
        self._expiries.clear()
        self._flying.clear()
        self._loop = loop

    def _is_aloft(self, flight: Flight[Any]) -> bool:
        return flight in self._flying and not flight._loop.is_closed()

    def _start(self, key: Hashable, work: "Work[T]") -> Flight[T]:
        if self._closing:
            raise ShuttingDown(retry_after_s=1.0)
        if len(self._flying) >= self._max_flights:
            raise Overloaded("Too many different requests are in progress.", retry_after_s=1.0)
        loop = asyncio.get_running_loop()
        flight: Flight[T] = Flight(key, work, loop, self._abandon_after_s)
        # An empty context: a copy would carry the leader's tenant, trace and open transactions into work that serves
        # others and outlives it (cockroach #91038).
        context = Context()
        context.run(_inside.set, flight)
        task = loop.create_task(self._fly(flight), context=context)
        flight._task = task
        self._flying.add(flight)
        task.add_done_callback(lambda _task: self._finish(flight))
        self._table[key] = flight
        return flight

    def _board(self, flight: Flight[T], role: Role) -> Waiter[T]:
        if flight.outcome is not None:
            return Waiter(self, flight, Role.REPLAYED, landed=True)
        if flight.waiters >= self._max_waiters:
            raise Overloaded("Too many requests wait for the same answer.", retry_after_s=1.0)
        within = _inside.get()
        if within is not None:
            if flight._reaches(within):
                raise ReentrantFlight
            within.awaits.append(flight)
        if flight._timer is not None:
            flight._timer.cancel()
            flight._timer = None
        flight.waiters += 1
        flight.joined += 1
        return Waiter(self, flight, role, within)

    def _leave(self, flight: Flight[Any], within: Flight[Any] | None) -> None:
        if within is not None:
            within.awaits.remove(flight)
        flight.waiters -= 1
        if flight.waiters == 0 and self._is_aloft(flight):
            self._abandoned(flight)

    def _abandoned(self, flight: Flight[Any]) -> None:
        if not flight._running:
            self._drop(flight)
        elif flight._abandon_after_s is not None:
            flight._timer = flight._loop.call_later(flight._abandon_after_s, self._drop, flight)

    def _drop(self, flight: Flight[Any]) -> None:
        # The key first: a newcomer must start anew instead of joining work that is being cancelled (tailscale #18919).
        self.cancel(flight, _CANCELLED)

    def _detach(self, flight: Flight[Any]) -> bool:
        """Take a flight out of the table; False if it was not in it any more."""
        # Compare before removing: a flight that lands late may find its key taken by the next (golang/sync 56d3577).
        if self._table.get(flight.key) is not flight:
            return False
        del self._table[flight.key]
        return True

    # -- the work ------------------------------------------------------------------------------------------------

    async def _fly(self, flight: Flight[Any]) -> None:
        outcome: Outcome[Any] = _CANCELLED
        try:
            outcome = await self._outcome_of(flight)
        finally:
            # BaseException too: whatever ended the work, those who wait get an outcome (golang/go #41133).
            self._land(flight, outcome)

    async def _outcome_of(self, flight: Flight[Any]) -> Outcome[Any]:
        deadline = asyncio.timeout(self._deadline_s)
        try:
            async with deadline:
                return Landed(await flight.work(flight))
        except asyncio.CancelledError:
            return flight._end or _CANCELLED
        except OncewiseError as error:
            return error.failure()
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001  foreign code: anything can come
            if deadline.expired():
                return FlightTimeout().failure()
            failed = FlightFailed()
            return Failure(failed.code, failed.detail, retryable=False, cause=error)

    def _land(self, flight: Flight[Any], outcome: Outcome[Any]) -> None:
        """End a flight. One synchronous step: outcome, table, waiters, in this order."""
        if not self._is_aloft(flight):
            return
        flight.outcome = outcome
        self._flying.discard(flight)
        if flight._timer is not None:
            flight._timer.cancel()
        # Removed before anyone wakes: an immediate retry must not meet a dead flight (Caffeine #372).
        held = self._detach(flight)
        _resolve(*flight._futures)
        _resolve(*flight._heralds)
        # Foreign code comes last: were it to raise, nobody would wait for ever.
        if held and isinstance(outcome, Failure):
            self._keep(flight, outcome)
        self._report(flight, outcome)
        for tell in flight._after:
            tell()
        flight._after.clear()
        if self._table.get(flight.key) is not flight:
            flight._forget_work()

    def _keep(self, flight: Flight[Any], failure: Failure) -> None:
        """Put a landed flight back, to answer for as long as its failure is remembered."""
        if failure.code == FlightCancelled.code or len(self._expiries) >= self._max_flights:
            return
        keep_s = self._remember(failure)
        if keep_s > 0:
            self._table[flight.key] = flight
            ends_s = flight._loop.time() + keep_s
            heapq.heappush(self._expiries, (ends_s, next(self._order), flight))

    def _report(self, flight: Flight[Any], outcome: Outcome[Any]) -> None:
        code = outcome.code if isinstance(outcome, Failure) else None
        duration_s = flight._loop.time() - flight._started_s
        self._listener(FlightLanded(flight.key, max(flight.joined, 0), flight.waiters == 0, duration_s, code))

    def _finish(self, flight: Flight[Any]) -> None:
        # A task cancelled before its first step never entered `_fly`.
        self._land(flight, flight._end or _CANCELLED)
        flight._task = None

    def _expire(self) -> None:
        while self._expiries and self._loop is not None and self._expiries[0][0] <= self._loop.time():
            flight = heapq.heappop(self._expiries)[2]
            self._detach(flight)
            flight._forget_work()
