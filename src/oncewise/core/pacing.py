"""When the next call to a provider may start.

`Gcra` is the arithmetic: one number of state, the generic cell rate algorithm (ITU-T I.371). It says when the next
start is free and books it. `Pacer` is the queue in front of it: it hands out permits at the booked starts, in turn over
the tenants that wait, and never more at a time than the provider takes.

A start is booked for whoever is next when it comes, not for whoever was next when it was booked: a request that leaves
the queue costs its neighbours nothing.

The pacer owns its queue and its permits; `_hand_out` is the only method that gives one and `_release` the only one that
takes it back.

Deliberately absent: wall-clock time, providers, and who shares a limit (a `StartLimiter` is passed in).
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass

from oncewise.errors import Failure, InternalError, OncewiseError, QueueFull, QueueTimeout, ShuttingDown
from oncewise.ports import StartLimiter

__all__ = ["Gcra", "LocalLimiter", "Pacer", "PacerStats", "Permit"]

GUARD_SHARE = 0.03
GUARD_MAX_S = 0.03
LATE_S = 0.005


class Gcra:
    """Starts `rate` times a second; after a pause `burst` may come together: at most `burst + rate * t` in any `t` s.

    Starts are spaced `1 / rate` and a guard of 3 %, at most 30 ms, since a provider judges when a call arrives: one
    that needed a new connection arrives late, and its successor would come too early.

    `burst` counts for nothing above `rate`: a provider of 1 call/s would refuse the second of two at once.

    Attributes:
        spacing_s: Seconds between two starts.
        slack_s: How much earlier than that a start may be, after a pause.
    """

    def __init__(self, rate: float, burst: int = 1) -> None:
        self.spacing_s = 1.0 / rate + min(GUARD_SHARE / rate, GUARD_MAX_S)
        self.slack_s = self.spacing_s * (max(1, min(burst, int(rate))) - 1)
        self._free_at_s = float("-inf")

    def reserve(self, now_s: float) -> float:
        """Book the next start; return when it is, in the time of `now_s` and never before it."""
        free_at_s = max(now_s, self._free_at_s)
        self._free_at_s = free_at_s + self.spacing_s
        return max(now_s, free_at_s - self.slack_s)

    def give_back(self) -> None:
        """Undo the reservation made last."""
        self._free_at_s -= self.spacing_s

    def pause(self, until_s: float) -> None:
        """Book no start before that time, and none together at it."""
        self._free_at_s = max(self._free_at_s, until_s + self.slack_s)


class LocalLimiter:
    """A `StartLimiter` for one process."""

    def __init__(self, rate: float, burst: int, clock_s: Callable[[], float]) -> None:
        self._gcra = Gcra(rate, burst)
        self._clock_s = clock_s

    async def reserve(self) -> float:
        """Book the next start; return the seconds until it."""
        now_s = self._clock_s()
        return self._gcra.reserve(now_s) - now_s

    async def give_back(self) -> None:
        """Return the reservation made last."""
        self._gcra.give_back()


@dataclass(frozen=True, slots=True)
class Permit:
    """The right to make one call now.

    Attributes:
        queue_wait_s: Seconds from asking to the start.
    """

    queue_wait_s: float


@dataclass(frozen=True, slots=True)
class PacerStats:
    """What a pacer holds now."""

    waiting: int
    running: int
    tenants: int


class Pacer:
    """Hands out permits to call one provider. Made once per provider, by the composition root.

    Args:
        limiter: Books the starts; shared by everyone under the same limit.
        concurrency: Calls that may run at a time.
        max_waiting: Requests that may wait; above it `QueueFull`.
        max_wait_s: Seconds a request may wait; after them `QueueTimeout`.
    """

    def __init__(
        self, limiter: StartLimiter, *, concurrency: int, max_waiting: int = 1_000, max_wait_s: float = 60.0
    ) -> None:
        self._limiter = limiter
        self._concurrency = concurrency
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        # Tenants in turn: whoever was served goes to the end.
        self._lanes: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._waiting = 0
        self._running = 0
        self._task: asyncio.Task[None] | None = None
        self._freed = asyncio.Event()
        self._not_before_s = float("-inf")
        self._closing = False

    @asynccontextmanager
    async def permit(self, tenant: str) -> AsyncIterator[Permit]:
        """Wait for the right to make one call; it is given back when the block ends, however it ends.

        Raises:
            QueueFull: too many wait already.
            QueueTimeout: no start came free in time.
            ShuttingDown: the pacer is closing.
            OncewiseError: the limiter failed; everyone who waits gets that.
        """
        loop = asyncio.get_running_loop()
        asked_s = loop.time()
        await self._queue(tenant, loop.create_future())
        try:
            yield Permit(loop.time() - asked_s)
        finally:
            self._release()

    async def _queue(self, tenant: str, turn: asyncio.Future[None]) -> None:
        if self._closing:
            raise ShuttingDown(retry_after_s=1.0)
        if self._waiting >= self._max_waiting:
            raise QueueFull("Too many requests wait for this provider.", retry_after_s=1.0)
        self._lanes.setdefault(tenant, deque()).append(turn)
        self._waiting += 1
        self._wake_pump()
        try:
            async with asyncio.timeout(self._max_wait_s):
                await turn
        except BaseException as error:
            self._withdraw(tenant, turn)
            if isinstance(error, TimeoutError):
                raise QueueTimeout("No call to the provider could start in time.", retry_after_s=1.0) from None
            raise

    def _withdraw(self, tenant: str, turn: asyncio.Future[None]) -> None:
        if turn.done() and not turn.cancelled() and turn.exception() is None:
            # The permit and the end of patience met in one turn of the loop: permit and start go to the next in line.
            self._running -= 1
            if not self._hand_out():
                self._freed.set()
            return
        lane = self._lanes.get(tenant)
        if lane is not None and turn in lane:
            lane.remove(turn)
            self._waiting -= 1
            if not lane:
                del self._lanes[tenant]

    def _release(self) -> None:
        self._running -= 1
        self._freed.set()

    def pause(self, for_s: float) -> None:
        """Let nothing start for some seconds, e.g. what a provider's `Retry-After` says. Never shortens a pause."""
        self._not_before_s = max(self._not_before_s, asyncio.get_running_loop().time() + for_s)

    def position(self, tenant: str) -> int:
        """How many permits would be handed out before one that `tenant` asked for now."""
        own = len(self._lanes.get(tenant, ()))
        ahead, rounds = own, own + 1
        for name, lane in self._lanes.items():
            if name == tenant:
                rounds = own  # the tenants behind it in the turn come once less before it
            else:
                ahead += min(len(lane), rounds)
        return ahead

    def stats(self) -> PacerStats:
        """What is held now."""
        return PacerStats(self._waiting, self._running, len(self._lanes))

    async def aclose(self) -> None:
        """Hand out nothing more; whoever waits gets `ShuttingDown`."""
        self._closing = True
        self._refuse(ShuttingDown(retry_after_s=1.0).failure())
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _refuse(self, failure: Failure) -> None:
        for lane in self._lanes.values():
            for turn in lane:
                if not turn.done():
                    turn.set_exception(failure.error())
        self._lanes.clear()
        self._waiting = 0

    # -- handing out ---------------------------------------------------------------------------------------------

    def _wake_pump(self) -> None:
        if self._task is None or self._task.done():
            # An empty context: the pump outlives the request that happened to start it.
            self._task = asyncio.get_running_loop().create_task(self._pump(), context=Context())

    async def _pump(self) -> None:
        try:
            while self._lanes:
                if self._running >= self._concurrency:
                    self._freed.clear()
                    await self._freed.wait()
                    continue
                await self._next_start()
        except OncewiseError as error:
            self._refuse(error.failure())
        except Exception as error:  # noqa: BLE001  whoever waits must be told; the cause goes with it
            internal = InternalError()
            self._refuse(Failure(internal.code, internal.detail, cause=error))

    async def _next_start(self) -> None:
        loop = asyncio.get_running_loop()
        delay_s = await self._limiter.reserve()
        due_s = loop.time() + delay_s
        await asyncio.sleep(delay_s)
        # Asked again after each sleep: a pause may have been made longer meanwhile.
        while (pause_s := self._not_before_s - loop.time()) > 0:  # noqa: ASYNC110  a time is awaited, not a state
            await asyncio.sleep(pause_s)
        if not self._hand_out():
            await self._limiter.give_back()
            return
        await asyncio.sleep(0)  # the caller wakes
        if loop.time() - due_s > LATE_S:
            # Overslept, by a pause or a loop that stood still. Booked anew from now, or the next start would come too
            # soon after this one.
            await self._limiter.give_back()
            await self._limiter.reserve()

    def _hand_out(self) -> bool:
        """Give the start that has come to whoever is next; False if everybody has left."""
        while self._lanes:
            tenant, lane = self._lanes.popitem(last=False)
            turn = lane.popleft()
            self._waiting -= 1
            if lane:
                self._lanes[tenant] = lane
            if not turn.done():
                self._running += 1
                turn.set_result(None)
                return True
        return False
