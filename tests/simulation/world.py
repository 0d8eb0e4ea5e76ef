"""A world in one thread and in virtual time: machines that crash and pause, and a network that delays, loses, reorders.

Every machine has an event loop of its own. That is what makes a crash a crash: a loop that is never run again leaves no
`finally` behind and tells nobody. A pause is a loop that is not run for a while; its timers fire late, all at once.
Between machines there are only messages, and each takes its own time.

One seed gives one history: the random generator of the world decides which machine runs next, in which order what is
ready on it runs, how long each message takes and which are lost.

Deliberately absent: what runs on the machines, and what is promised of it.
"""

import asyncio
import heapq
import random
from asyncio import events
from collections import Counter
from collections.abc import Callable, Coroutine
from contextvars import Context
from itertools import count
from typing import Any, TypeVar

__all__ = ["Machine", "MachineLoop", "World"]

T = TypeVar("T")

Callback = Callable[..., object]


class MachineLoop(asyncio.AbstractEventLoop):
    """The part of an event loop that tasks, futures and timers need, run step by step by its world."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._ready: list[asyncio.Handle] = []
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._order = count()
        self.unhandled: list[dict[str, Any]] = []

    # -- what asyncio asks for -----------------------------------------------------------------------------------

    def time(self) -> float:
        return self._world.now_s

    def call_soon(self, callback: Callback, *args: Any, context: Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callback, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callback, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._order), handle))
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Coroutine[Any, Any, T], *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[T]:
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.unhandled.append(context)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.unhandled.append(context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Asked for by `TimerHandle.cancel`; a cancelled timer is skipped when it is due."""

    # -- what the world asks for ---------------------------------------------------------------------------------

    def next_s(self) -> float:
        """When there is something to do; infinity for never."""
        if self._ready:
            return self._world.now_s
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else float("inf")

    def step(self, chance: random.Random) -> None:
        """Run what is ready now, in an order of chance."""
        now_s = self._world.now_s
        while self._timers and self._timers[0][0] <= now_s:
            self._ready.append(heapq.heappop(self._timers)[2])
        ready, self._ready = self._ready, []
        if len(ready) > 1 and chance.random() < 0.5:
            chance.shuffle(ready)
            self._world.counts["steps in another order"] += 1
        events._set_running_loop(self)
        try:
            for handle in ready:
                if not handle.cancelled():
                    handle._run()
        finally:
            events._set_running_loop(None)


class Machine:
    """One process.

    Attributes:
        runs: False once it has crashed.
        paused: Whether it is stopped for a while.
    """

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.name = name
        self.loop = MachineLoop(world)
        self.runs = True
        self.paused = False
        world.machines.append(self)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run `work` on this machine."""
        return self.loop.create_task(work)

    def crash(self) -> None:
        """Stop for ever, in the middle of whatever it does."""
        self.runs = False

    def pause(self, for_s: float) -> None:
        """Stop for a while; the machine does not notice."""
        self.paused = True
        self.world.after(for_s, self._go_on)

    def _go_on(self) -> None:
        self.paused = False

    def read(self, look: Callable[[], T]) -> T:
        """Look at something of this machine as code on it would, at the present time."""
        events._set_running_loop(self.loop)
        try:
            return look()
        finally:
            events._set_running_loop(None)

    def bury(self) -> None:
        """After the history: end the tasks that are left, so that none is found half done by the collector."""
        self.runs = False
        cancelled: set[asyncio.Task[Any]] = set()
        for _ in range(1000):
            # Those that end may start others to tidy up. A task begins before it is cancelled: its first step may own
            # a coroutine that would be left without one.
            left = asyncio.all_tasks(self.loop)  # type: ignore[arg-type]
            if not left or (left <= cancelled and self.loop.next_s() > self.world.now_s):
                # What is left was cancelled and waits for a time that does not come any more.
                return
            self.loop.step(self.world.chance)
            for task in left - cancelled:
                task.cancel()
            cancelled |= left

    def ask(self, serve: Callable[[], T], *, lost: Callable[[], BaseException], within_s: float) -> asyncio.Future[T]:
        """Send a request to something outside, which serves it as one step; the future has its answer or its error.

        Args:
            serve: What happens there, when the request arrives. Its errors come back.
            lost: The error that the machine gets when the request or the answer is lost, after `within_s` seconds.
        """
        return _Request(self, serve, lost, within_s).future


class _Request:
    """A request on its way, its service, and its answer on the way back."""

    __slots__ = ("_lost", "_machine", "_serve", "_within_s", "future")

    def __init__(
        self, machine: Machine, serve: Callable[[], Any], lost: Callable[[], BaseException], within_s: float
    ) -> None:
        self._machine = machine
        self._serve = serve
        self._lost = lost
        self._within_s = within_s
        self.future: asyncio.Future[Any] = machine.loop.create_future()
        world = machine.world
        if world.over:
            self.future.set_exception(lost())
        elif world.loses():
            world.after(within_s, self._fail, lost())
        else:
            world.after(world.delay_s(), self._arrive)

    def _arrive(self) -> None:
        world = self._machine.world
        try:
            result = self._serve()
        except Exception as error:  # noqa: BLE001  the error is the answer
            world.after(world.delay_s(), self._fail, error)
            return
        if world.loses():
            world.after(self._within_s, self._fail, self._lost())
        else:
            world.after(world.delay_s(), self._succeed, result)

    def _succeed(self, result: Any) -> None:
        if not self.future.done():
            self.future.set_result(result)

    def _fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class World:
    """Time, chance, and the machines.

    Args:
        seed: Decides everything.

    Attributes:
        now_s: Virtual time.
        counts: How often what happened.
        over: Whether the history has ended: nothing outside answers any more.
        loss: How likely a message is lost; a fault changes it for a while.
        slowest_s: How long a message may take.
    """

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now_s = 0.0
        self.over = False
        self.machines: list[Machine] = []
        self.counts: Counter[str] = Counter()
        self.loss = 0.0
        self.slowest_s = 0.01
        self._events: list[tuple[float, int, Callback, tuple[Any, ...]]] = []
        self._order = count()

    def after(self, delay_s: float, callback: Callback, *args: Any) -> None:
        """Let something happen outside all machines."""
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._order), callback, args))

    def delay_s(self) -> float:
        """How long the next message takes: most are quick, so that order changes without time passing."""
        return self.slowest_s * self.chance.random() ** 3

    def loses(self) -> bool:
        """Whether the next message is lost."""
        lost = self.loss > 0 and self.chance.random() < self.loss
        self.counts["messages lost"] += lost
        return lost

    def run(self, until_s: float, done: Callable[[], bool]) -> None:
        """Let time pass until `done`, or until `until_s`."""
        while self.now_s < until_s and not done():
            if not self._step():
                return

    def _step(self) -> bool:
        ready, next_s = [], float("inf")
        for machine in self.machines:
            if machine.runs and not machine.paused:
                at_s = machine.loop.next_s()
                if at_s <= self.now_s:
                    ready.append(machine)
                else:
                    next_s = min(next_s, at_s)
        if ready:
            self.chance.choice(ready).loop.step(self.chance)
            return True
        if self._events and self._events[0][0] <= next_s:
            at_s, _, callback, args = heapq.heappop(self._events)
            self.now_s = max(self.now_s, at_s)
            callback(*args)
            return True
        if next_s == float("inf"):
            return False
        self.now_s = next_s
        return True
