"""The ports between workers, inside one process: many workers may share one world.

For tests, for simulations of a fleet, and for programs that embed several workers. What the Redis implementation owes,
this one owes too, so that what runs on it runs on a fleet. Nothing is said within a call: entries and signals are
handed over in a later turn of the loop, as they would be by a network.

The world can go away (`down`), lose what it holds (`flush`), and lose its answers (`lose_answers`), as a server can.

Deliberately absent: threads, and anything that outlives the process.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count

from oncewise.core.pacing import Starts
from oncewise.errors import CoordinationUnavailable
from oncewise.ports import LogEntry, LogTail, Signal

__all__ = ["MemoryCoordination", "World"]

NOTHING = LogTail(0, 0)


@dataclass
class _Log:
    entries: list[LogEntry] = field(default_factory=list)
    ends_s: float = 0.0

    @property
    def tail(self) -> LogTail:
        return self.entries[-1].tail if self.entries else NOTHING


@dataclass
class _Pace:
    starts: Starts
    booked: int = 0


class World:
    """What all workers of one process share.

    Attributes:
        down: Whether nothing is answered now.
        lose_answers: How many of the next requests are carried out and not answered.
    """

    def __init__(self) -> None:
        self.down = False
        self.lose_answers = 0
        self.readers: dict[str, dict[int, _Reader]] = {}
        self.workers: dict[str, MemoryCoordination] = {}
        self.numbers = count()
        self.waiting: dict[str, OrderedDict[asyncio.Future[None], None]] = {}
        self.flush()

    def flush(self) -> None:
        """Lose everything that is held; readers and listeners stay."""
        self.logs: dict[str, _Log] = {}
        self.claims: dict[str, tuple[str, float]] = {}
        self.paces: dict[str, _Pace] = {}
        self.slots: dict[str, set[int]] = {}
        for provider in self.waiting:
            self.freed(provider)

    def worker(self, address: str) -> "MemoryCoordination":
        """The ports of one more worker."""
        return MemoryCoordination(self, address)

    def answer(self) -> None:
        """Fail if this answer is lost; called after everything is done."""
        if self.lose_answers > 0:
            self.lose_answers -= 1
            raise CoordinationUnavailable

    def freed(self, provider: str) -> None:
        """Wake who waits for a slot."""
        for freed in self.waiting.get(provider, ()):
            if not freed.done():
                freed.set_result(None)

    def log(self, name: str) -> _Log:
        """The log of a name, empty if its time is over."""
        log = self.logs.setdefault(name, _Log())
        if log.ends_s <= _now_s():
            log.entries.clear()
        return log


def _now_s() -> float:
    return asyncio.get_running_loop().time()


class _Worker:
    """One worker's way to the world, for as long as it lives."""

    def __init__(self, world: World, address: str) -> None:
        self.world = world
        self.address = address
        self.dead = False

    @property
    def cut_off(self) -> bool:
        return self.world.down or self.dead

    def ask(self) -> World:
        """The world, if it answers this worker; called before anything is done."""
        if self.cut_off:
            raise CoordinationUnavailable
        return self.world


class _Reader:
    """One reader of one log, and how far it has read."""

    def __init__(self, worker: _Worker, name: str, take: Callable[[LogEntry], None], after: LogTail) -> None:
        world = worker.world
        self._worker = worker
        self._world = world
        self._name = name
        self._take = take
        self._after = after
        self._key = next(world.numbers)
        self._closed = False
        world.readers.setdefault(name, {})[self._key] = self
        self.wake()

    def wake(self) -> None:
        """Read on in a later turn of the loop."""
        asyncio.get_running_loop().call_soon(self._read)

    def _read(self) -> None:
        if self._worker.cut_off:
            if not (self._closed or self._worker.dead):
                asyncio.get_running_loop().call_later(0.05, self._read)
            return
        for entry in list(self._world.log(self._name).entries):
            if not self._closed and entry.tail > self._after:
                self._after = entry.tail
                self._take(entry)

    def close(self) -> None:
        """Read nothing more."""
        self._closed = True
        readers = self._world.readers.get(self._name, {})
        readers.pop(self._key, None)
        if not readers:
            self._world.readers.pop(self._name, None)


class _Relay:
    def __init__(self, worker: _Worker) -> None:
        self._worker = worker

    async def append(self, name: str, entry: LogEntry, *, keep_s: float) -> LogTail:
        """See `Relay.append`."""
        world = self._worker.ask()
        log = world.log(name)
        starts = LogTail(entry.epoch, entry.after)
        begins = entry.after == 0 and entry.epoch > log.tail.epoch
        if entry.tail != starts and (begins or starts == log.tail):
            if begins:
                # Readers that come later start at the attempt that counts.
                log.entries.clear()
            log.entries.append(entry)
            log.ends_s = _now_s() + keep_s
            for reader in world.readers.get(name, {}).values():
                reader.wake()
        tail = log.tail
        await asyncio.sleep(0)
        world.answer()
        return tail

    def read(self, name: str, take: Callable[[LogEntry], None], after: LogTail = NOTHING) -> Callable[[], None]:
        """See `Relay.read`."""
        return _Reader(self._worker, name, take, after).close


class _Signals:
    def __init__(self, worker: _Worker) -> None:
        self._worker = worker
        self.address = worker.address
        self._hearers: list[Callable[[Signal], None]] = []

    @property
    def prompt(self) -> bool:
        """See `Signals.prompt`."""
        return not self._worker.cut_off

    async def send(self, signal: Signal, to: str | None = None) -> None:
        """See `Signals.send`."""
        world = self._worker.ask()
        signal = Signal(signal.kind, signal.name, self.address, signal.data)
        workers = world.workers
        for address in [to] if to is not None else list(workers):
            if address in workers and address != self.address:
                asyncio.get_running_loop().call_soon(workers[address].signals.hear, signal)
        await asyncio.sleep(0)
        world.answer()

    async def others(self) -> int:
        """See `Signals.others`."""
        return len(self._worker.ask().workers) - 1

    def listen(self, hear: Callable[[Signal], None]) -> None:
        """See `Signals.listen`."""
        self._hearers.append(hear)

    def hear(self, signal: Signal) -> None:
        """Take a signal from another worker."""
        for hearer in self._hearers:
            hearer(signal)


class _Claims:
    def __init__(self, worker: _Worker) -> None:
        self._worker = worker

    async def claim(self, name: str, holder: str, *, lease_s: float) -> str:
        """See `Claims.claim`."""
        world = self._worker.ask()
        held = self._holder(name)
        if held is None:
            world.claims[name] = (holder, _now_s() + lease_s)
        await asyncio.sleep(0)
        world.answer()
        return held or holder

    async def extend(self, name: str, holder: str, *, lease_s: float) -> bool:
        """See `Claims.extend`."""
        world = self._worker.ask()
        mine = self._holder(name) == holder
        if mine:
            world.claims[name] = (holder, _now_s() + lease_s)
        return mine

    async def release(self, name: str, holder: str) -> None:
        """See `Claims.release`."""
        world = self._worker.ask()
        if self._holder(name) == holder:
            del world.claims[name]

    def _holder(self, name: str) -> str | None:
        holder, until_s = self._worker.world.claims.get(name, (None, 0.0))
        return holder if until_s > _now_s() else None


class _Limiter:
    def __init__(self, worker: _Worker, provider: str, rate: float, burst: int) -> None:
        self._worker = worker
        self._provider = provider
        self._rate = rate
        self._burst = burst
        self._mine = -1

    @property
    def _pace(self) -> _Pace:
        return self._worker.world.paces.setdefault(self._provider, _Pace(Starts(self._rate, self._burst)))

    async def reserve(self) -> float:
        """See `StartLimiter.reserve`."""
        world = self._worker.ask()
        pace, now_s = self._pace, _now_s()
        start_s = pace.starts.reserve(now_s)
        pace.booked += 1
        self._mine = pace.booked
        await asyncio.sleep(0)
        world.answer()
        return start_s - now_s

    async def give_back(self) -> None:
        """See `StartLimiter.give_back`."""
        self._worker.ask()
        if self._pace.booked == self._mine:
            self._pace.starts.give_back()
            self._mine = -1

    async def pause(self, for_s: float) -> None:
        """See `SharedLimiter.pause`."""
        self._worker.ask()
        self._pace.booked += 1
        self._pace.starts.pause(_now_s() + for_s)


class _Slots:
    """Unlike a server's, these slots never lapse: the process that holds them is the one that knows of them."""

    def __init__(self, worker: _Worker, provider: str, limit: int) -> None:
        self._worker = worker
        self._provider = provider
        self._limit = limit
        self.held: list[int] = []

    async def take(self) -> None:
        """See `CallSlots.take`."""
        world = self._worker.ask()
        while len(world.slots.setdefault(self._provider, set())) >= self._limit:
            freed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiting = world.waiting.setdefault(self._provider, OrderedDict())
            waiting[freed] = None
            try:
                await freed
            finally:
                waiting.pop(freed, None)
            self._worker.ask()
        self.held.append(next(world.numbers))
        world.slots[self._provider].add(self.held[-1])

    def give_back(self) -> None:
        """See `CallSlots.give_back`."""
        if self.held:
            self.free([self.held.pop()])

    def free(self, slots: Iterable[int]) -> None:
        """Take slots from whoever held them, and wake who waits."""
        world = self._worker.world
        world.slots.get(self._provider, set()).difference_update(slots)
        world.freed(self._provider)


class MemoryCoordination:
    """Implements `Coordination` in a `World`. Made by `World.worker`."""

    def __init__(self, world: World, address: str) -> None:
        self._worker = _Worker(world, address)
        self.relay = _Relay(self._worker)
        self.signals = _Signals(self._worker)
        self.claims = _Claims(self._worker)
        self._slots: list[_Slots] = []
        world.workers[address] = self

    def limiter(self, provider: str, *, rate: float, burst: int) -> _Limiter:
        """See `Coordination.limiter`."""
        return _Limiter(self._worker, provider, rate, burst)

    def slots(self, provider: str, *, limit: int) -> _Slots:
        """See `Coordination.slots`."""
        self._slots.append(_Slots(self._worker, provider, limit))
        return self._slots[-1]

    async def check(self) -> str | None:
        """See `Coordination.check`."""
        return "down" if self._worker.cut_off else None

    async def aclose(self) -> None:
        """See `Coordination.aclose`."""
        self.die()

    def die(self) -> None:
        """Leave the world as a killed process does: it hears and says nothing more, and what it held has lapsed."""
        world = self._worker.world
        self._worker.dead = True
        if world.workers.get(self.signals.address) is self:
            del world.workers[self.signals.address]
        for slots in self._slots:
            held, slots.held = slots.held, []
            slots.free(held)
