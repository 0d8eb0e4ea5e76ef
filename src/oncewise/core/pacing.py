"""When the next call to a provider may start.

`Gcra` is the arithmetic: one number of state, the generic cell rate algorithm (ITU-T I.371). It says when the next
start is free and books it. `Pacer` is the queue in front of it: it hands out permits at the booked starts, in turn over
the tenants that wait, and never more at a time than the provider takes. What the provider refuses for its rate makes it
pause and use fewer of the starts (`oncewise.core.throttle`).

A start is booked for whoever is next when it comes, not for whoever was next when it was booked: a request that leaves
the queue costs its neighbours nothing.

The pacer owns its queue and its permits; `_hand_out` and, where nobody waits, `_take_at_once` are the only methods that
give one and `_release` the only one that takes it back.

Deliberately absent: wall-clock time, providers, and who shares a limit (a `StartLimiter` is passed in).
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass

from oncewise.core.throttle import Throttle
from oncewise.errors import Failure, InternalError, OncewiseError, QueueFull, QueueTimeout, ShuttingDown
from oncewise.ports import AtHand, CallSlots, StartLimiter

__all__ = ["Gcra", "LocalLimiter", "Pacer", "PacerStats", "Permit", "Place", "Starts"]

GUARD_SHARE = 0.03
GUARD_MAX_S = 0.03
LATE_S = 0.005
SECOND_S = 1.0 + GUARD_MAX_S
"""A second as a provider may count it."""


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

    def next_s(self, now_s: float) -> float:
        """When the next start is, in the time of `now_s` and never before it."""
        return max(now_s, self._free_at_s - self.slack_s)

    def reserve(self, now_s: float) -> float:
        """Book the next start; return when it is."""
        start_s = self.next_s(now_s)
        self._free_at_s = max(now_s, self._free_at_s) + self.spacing_s
        return start_s

    def give_back(self) -> None:
        """Undo the reservation made last."""
        self._free_at_s -= self.spacing_s

    def pause(self, until_s: float) -> None:
        """Book no start before that time, and none together at it."""
        self._free_at_s = max(self._free_at_s, until_s + self.slack_s)


class Starts:
    """`Gcra`, and no more starts in any second than the rate.

    A burst alone would come on top of the rate in the first second after a pause, and a provider that counts calls by
    the second would refuse as many. Only for that the starts of the latest second are remembered; none of them where
    the guard between starts leaves room enough.

    Attributes:
        gcra: The spacing of starts.
        window: How many starts are remembered; 0 for none.
    """

    def __init__(self, rate: float, burst: int) -> None:
        self.gcra = Gcra(rate, burst)
        spare = int(rate) - int(rate / (1.0 + GUARD_SHARE))
        self.window = int(rate) if min(burst, int(rate)) > max(1, spare) else 0
        self._latest: deque[float] = deque(maxlen=self.window)

    def next_s(self, now_s: float) -> float:
        """When the next start is, in the time of `now_s` and never before it."""
        start_s = self.gcra.next_s(now_s)
        if self.window and len(self._latest) == self.window:
            return max(start_s, self._latest[0] + SECOND_S)
        return start_s

    def reserve(self, now_s: float) -> float:
        """Book the next start; return when it is."""
        start_s = self.next_s(now_s)
        self.gcra.reserve(now_s)
        if self.window:
            self._latest.append(start_s)
        return start_s

    def take(self, now_s: float) -> bool:
        """Book a start at `now_s`, if one is free."""
        is_free = self.next_s(now_s) <= now_s
        if is_free:
            self.reserve(now_s)
        return is_free

    def give_back(self) -> None:
        """Undo the reservation made last."""
        self.gcra.give_back()
        if self._latest:
            self._latest.pop()

    def pause(self, until_s: float) -> None:
        """Book no start before that time, and none together at it."""
        self.gcra.pause(until_s)


class LocalLimiter:
    """A `StartLimiter` for one process."""

    def __init__(self, rate: float, burst: int, clock_s: Callable[[], float]) -> None:
        self._starts = Starts(rate, burst)
        self._clock_s = clock_s

    async def reserve(self) -> float:
        """Book the next start; return the seconds until it."""
        now_s = self._clock_s()
        return self._starts.reserve(now_s) - now_s

    def take_now(self) -> bool:
        """See `AtHand.take_now`."""
        return self._starts.take(self._clock_s())

    async def give_back(self) -> None:
        """Return the reservation made last."""
        self._starts.give_back()


@dataclass(frozen=True, slots=True)
class Permit:
    """The right to make one call now.

    Attributes:
        queue_wait_s: Seconds from asking to the start.
    """

    queue_wait_s: float


@dataclass(frozen=True, slots=True)
class PacerStats:
    """What a pacer holds now.

    Attributes:
        rate_share: The part of the configured rate that is used; below 1.0 for a while after the provider refused.
    """

    waiting: int
    running: int
    tenants: int
    rate_share: float = 1.0


class Place:
    """A place in a pacer's queue: entering the block waits for the permit, leaving it gives it back. Used once.

    Attributes:
        ahead: Permits that would be handed out before this one, at the moment it joined the queue.
    """

    __slots__ = ("_asked_s", "_pacer", "_turn", "ahead", "group", "tenant")

    def __init__(self, pacer: "Pacer", tenant: str, group: str) -> None:
        self.tenant = tenant
        self.group = group
        self.ahead = 0
        self._pacer = pacer
        self._turn: asyncio.Future[None] | None = None
        self._asked_s = 0.0

    @property
    def position(self) -> int:
        """Permits that will be handed out before this one, as it looks now; 0 once it has its own."""
        return self._pacer._position(self)

    async def __aenter__(self) -> Permit:
        loop = asyncio.get_running_loop()
        self._asked_s = loop.time()
        await self._pacer._queue(self)
        return Permit(loop.time() - self._asked_s)

    async def __aexit__(self, *_raised: object) -> None:
        self._pacer._release()


class Pacer:
    """Hands out permits to call one provider. Made once per provider, by the composition root.

    Args:
        limiter: Books the starts; shared by everyone under the same limit.
        concurrency: Calls that may run at a time.
        max_waiting: Requests that may wait; above it `QueueFull`.
        max_wait_s: Seconds a request may wait; after them `QueueTimeout`.
        slots: Counts running calls over everyone under the same limit; None if nobody else is.
        on_pause: Told of each pause in seconds, for the others; must not block.
    """

    def __init__(
        self,
        limiter: StartLimiter,
        *,
        concurrency: int,
        max_waiting: int = 1_000,
        max_wait_s: float = 60.0,
        slots: CallSlots | None = None,
        on_pause: Callable[[float], None] | None = None,
    ) -> None:
        self._limiter = limiter
        # Who shares a limit with others has to ask them, which takes time; these can tell when it is not so.
        self._limiter_at_hand: AtHand | None = limiter if isinstance(limiter, AtHand) else None
        self._slots_at_hand: AtHand | None = slots if isinstance(slots, AtHand) else None
        self._slots = slots
        self._on_pause = on_pause
        self._concurrency = concurrency
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        # Tenants in turn: whoever was served goes to the end.
        self._lanes: OrderedDict[str, deque[Place]] = OrderedDict()
        self._waiting = 0
        self._running = 0
        self._task: asyncio.Task[None] | None = None
        self._freed = asyncio.Event()
        self._not_before_s = float("-inf")
        self._throttle = Throttle()
        self._closing = False

    def permit(self, tenant: str, group: str = "") -> Place:
        """The right to make one call, for an `async with` block: it waits, and gives the right back however it ends.

        Args:
            tenant: Who waits; tenants take turns.
            group: What is called, for `turn_away`.

        Raises (on entering):
            QueueFull: too many wait already, or others are to have their share of the queue.
            QueueTimeout: no start came free in time.
            ShuttingDown: the pacer is closing.
            OncewiseError: the limiter failed, or the group was turned away; everyone who waits gets that.
        """
        return Place(self, tenant, group)

    async def _queue(self, place: Place) -> None:
        if self._take_at_once():
            return
        turn = self._line_up(place)
        timer = turn.get_loop().call_later(self._max_wait_s, self._give_up, place)
        try:
            await turn
        except BaseException:
            self._withdraw(place, turn)
            raise
        finally:
            timer.cancel()

    def _give_up(self, place: Place) -> None:
        left_s = self._not_before_s - asyncio.get_running_loop().time()
        self._end(place, QueueTimeout("No call to the provider could start in time.", retry_after_s=max(1.0, left_s)))

    def _take_at_once(self) -> bool:
        """Give a permit to somebody who comes when nobody waits and a start is free; False if it is not so.

        Most calls start like this, and the queue would cost them three turns of the event loop.
        """
        if self._closing or self._waiting or self._running >= self._concurrency or self._limiter_at_hand is None:
            return False
        now_s = asyncio.get_running_loop().time()
        if self._not_before_s > now_s or self._throttle.share(now_s) < 1.0:
            return False
        if self._slots is not None and (self._slots_at_hand is None or not self._slots_at_hand.take_now()):
            return False
        if not self._limiter_at_hand.take_now():
            if self._slots is not None:
                self._slots.give_back()
            return False
        self._running += 1
        return True

    def _line_up(self, place: Place) -> asyncio.Future[None]:
        if self._closing:
            raise ShuttingDown(retry_after_s=1.0)
        if self._waiting >= self._max_waiting:
            self._make_room(place.tenant)
        if self._waiting:
            place.ahead = self.position(place.tenant)
        place._turn = turn = asyncio.get_running_loop().create_future()
        self._lanes.setdefault(place.tenant, deque()).append(place)
        self._waiting += 1
        self._wake_pump()
        return turn

    def _make_room(self, tenant: str) -> None:
        """Refuse the newest request of the tenant that waits with most; the newcomer, if that is or would be its own.

        Otherwise one tenant could fill the queue, and the turns that the others have in it would be of no use to them.
        """
        longest = max(self._lanes.values(), key=len, default=deque[Place]())
        # Within the patience of those who wait all their places come free, one after the other.
        wait_s = max(1.0, self._max_wait_s / max(1, self._max_waiting))
        full = QueueFull("Too many requests wait for this provider.", retry_after_s=wait_s)
        if len(longest) - 1 <= len(self._lanes.get(tenant, ())):
            raise full
        self._end(longest[-1], full)

    def _end(self, place: Place, error: OncewiseError) -> None:
        """Take a place out of the queue and tell whoever waits there."""
        self._leave(place)
        if place._turn is not None and not place._turn.done():
            place._turn.set_exception(error)

    def _leave(self, place: Place) -> None:
        lane = self._lanes.get(place.tenant)
        if lane is not None and place in lane:
            lane.remove(place)
            self._waiting -= 1
            if not lane:
                del self._lanes[place.tenant]

    def _withdraw(self, place: Place, turn: asyncio.Future[None]) -> None:
        if turn.done() and not turn.cancelled() and turn.exception() is None:
            # The permit and the end of patience met in one turn of the loop: permit and start go to the next in line.
            self._running -= 1
            if not self._hand_out():
                self._give_back_slot()
            return
        self._leave(place)

    def _release(self) -> None:
        self._running -= 1
        self._give_back_slot()

    def _give_back_slot(self) -> None:
        self._freed.set()
        if self._slots is not None:
            self._slots.give_back()

    # -- what the provider says ----------------------------------------------------------------------------------

    def pause(self, for_s: float) -> None:
        """Let nothing start for some seconds, here and by all who share the limit. Never shortens a pause."""
        self.hold(for_s)
        if self._on_pause is not None:
            self._on_pause(for_s)

    def hold(self, for_s: float) -> None:
        """Let nothing start here for some seconds: somebody else under the same limit paused."""
        self._not_before_s = max(self._not_before_s, asyncio.get_running_loop().time() + for_s)

    def slow_down(self, began_s: float, retry_after_s: float | None) -> None:
        """The provider refused a call for its rate: start nothing for as long as it says, and then less often.

        Args:
            began_s: When that call started, by the event loop's clock.
            retry_after_s: What the provider says; kept to exactly. None if it does not say.
        """
        self.pause(self._throttle.refused(began_s, asyncio.get_running_loop().time(), retry_after_s))

    def accepted(self, began_s: float) -> None:
        """The provider took a call that started at `began_s`, by the event loop's clock."""
        self._throttle.accepted(began_s)

    def turn_away(self, group: str, failure: Failure) -> None:
        """End the waiting of everyone who is to call `group`; others keep their places."""
        waiting = [place for lane in self._lanes.values() for place in lane if place.group == group]
        for place in waiting:
            self._end(place, failure.error())

    # -- looking -------------------------------------------------------------------------------------------------

    def position(self, tenant: str) -> int:
        """How many permits would be handed out before one that `tenant` asked for now."""
        return self._ahead(tenant, len(self._lanes.get(tenant, ())))

    def _position(self, place: Place) -> int:
        lane = self._lanes.get(place.tenant, deque())
        return self._ahead(place.tenant, lane.index(place)) if place in lane else 0

    def _ahead(self, tenant: str, own: int) -> int:
        """Permits before the one of `tenant` that has `own` of the same tenant before it."""
        ahead, rounds = own, own + 1
        for name, lane in self._lanes.items():
            if name == tenant:
                rounds = own  # the tenants behind it in the turn come once less before it
            else:
                ahead += min(len(lane), rounds)
        return ahead

    def stats(self) -> PacerStats:
        """What is held now."""
        share = self._throttle.share(asyncio.get_running_loop().time())
        return PacerStats(self._waiting, self._running, len(self._lanes), share)

    async def aclose(self) -> None:
        """Hand out nothing more; whoever waits gets `ShuttingDown`."""
        self._closing = True
        self._refuse(ShuttingDown(retry_after_s=1.0).failure())
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _refuse(self, failure: Failure) -> None:
        for lane in self._lanes.values():
            for place in lane:
                if place._turn is not None and not place._turn.done():
                    place._turn.set_exception(failure.error())
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
                await self._next_call()
        except OncewiseError as error:
            self._refuse(error.failure())
        except Exception as error:  # noqa: BLE001  whoever waits must be told; the cause goes with it
            internal = InternalError()
            self._refuse(Failure(internal.code, internal.detail, cause=error))

    async def _next_call(self) -> None:
        if self._slots is not None:
            await self._slots.take()
        handed_out = False
        try:
            due_s = await self._next_start()
            handed_out = self._hand_out()
        finally:
            if not handed_out and self._slots is not None:
                self._slots.give_back()
        if not handed_out:
            await self._limiter.give_back()
            return
        await asyncio.sleep(0)  # the caller wakes
        if asyncio.get_running_loop().time() - due_s > LATE_S:
            # Overslept: the loop stood still. Booked anew from now, or the next start would come too soon after this.
            await self._limiter.give_back()
            await self._limiter.reserve()

    async def _next_start(self) -> float:
        """Wait for a start that may be used now; return when it was due."""
        loop = asyncio.get_running_loop()
        delay_s = await self._limiter.reserve()
        for _ in range(self._throttle.starts_to_skip(loop.time())):
            delay_s = await self._limiter.reserve()
        due_s = loop.time() + delay_s
        if delay_s > 0:
            await asyncio.sleep(delay_s)
        # Asked again after each sleep: a pause may have been made longer meanwhile.
        while (pause_s := self._not_before_s - loop.time()) > 0:
            await asyncio.sleep(pause_s)
            # Booked anew, since everybody who shares the limit waited for the same moment.
            await self._limiter.give_back()
            delay_s = await self._limiter.reserve()
            due_s = loop.time() + delay_s
            await asyncio.sleep(delay_s)
        return due_s

    def _hand_out(self) -> bool:
        """Give the start that has come to whoever is next; False if everybody has left."""
        while self._lanes:
            tenant, lane = self._lanes.popitem(last=False)
            turn = lane.popleft()._turn
            self._waiting -= 1
            if lane:
                self._lanes[tenant] = lane
            if turn is not None and not turn.done():
                self._running += 1
                turn.set_result(None)
                return True
        return False
