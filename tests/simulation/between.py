"""What lies between workers: logs that are relayed, words, and claims, on a server that is slow, forgets and goes away.

It stands where Redis or Valkey stands. `Between` is the server, one for all machines; what it does it does at once. A
machine's way to it has a network in between, and what machines are told takes its time too, each entry and each word
its own.

Deliberately absent: pacing. Workers of a simulated fleet have a rate each.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from oncewise.errors import CoordinationUnavailable
from oncewise.ports import LogEntry, LogTail, Signal
from tests.simulation.world import Machine, World

__all__ = ["Between", "WayThere"]

PATIENCE_S = 0.25
NOTHING = LogTail(0, 0)


@dataclass
class _Reader:
    machine: Machine
    take: Callable[[LogEntry], None]
    after: LogTail
    closed: bool = False


@dataclass
class _Log:
    entries: list[LogEntry] = field(default_factory=list)
    readers: list[_Reader] = field(default_factory=list)

    @property
    def tail(self) -> LogTail:
        return self.entries[-1].tail if self.entries else NOTHING


class Between:
    """The server.

    Attributes:
        down: Whether it answers nobody.
        wrongs: What it did that such a server may not do, in words; whoever was told a name is theirs has it until
            they give it up or its time is over.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.down = False
        self.wrongs: list[str] = []
        self.listeners: dict[str, tuple[Machine, Callable[[Signal], None]]] = {}
        self._logs: dict[str, _Log] = {}
        self._claims: dict[str, tuple[str, float]] = {}
        self._told: dict[str, tuple[str, float]] = {}

    def flush(self) -> None:
        """Forget everything; readers stay and read what is written next."""
        self._claims.clear()
        self._told.clear()
        for log in self._logs.values():
            log.entries.clear()

    # -- logs ----------------------------------------------------------------------------------------------------

    def log(self, name: str) -> _Log:
        """The log of a name."""
        return self._logs.setdefault(name, _Log())

    def append(self, name: str, entry: LogEntry) -> LogTail:
        """See `Relay.append`."""
        log = self.log(name)
        begins = entry.after == 0 and entry.epoch > log.tail.epoch
        starts = LogTail(entry.epoch, entry.after)
        if entry.tail != starts and (begins or starts == log.tail):
            if begins:
                log.entries.clear()
            self.add(log, entry)
        return log.tail

    def add(self, log: _Log, entry: LogEntry) -> None:
        """Write an entry, and send it to whoever reads."""
        log.entries.append(entry)
        for reader in log.readers:
            self._send(log, reader)

    def read(self, name: str, reader: _Reader) -> None:
        """Let somebody read from where they are."""
        log = self.log(name)
        log.readers.append(reader)
        self._send(log, reader)

    def _send(self, log: _Log, reader: _Reader) -> None:
        self.world.after(self.world.delay_s(), self._deliver, log, reader)

    def _deliver(self, log: _Log, reader: _Reader) -> None:
        if self.down:
            self.world.after(0.05, self._deliver, log, reader)
            return
        for entry in log.entries:
            if not reader.closed and entry.tail > reader.after:
                self.world.counts["entries relayed"] += 1
                reader.after = entry.tail
                reader.machine.loop.call_soon(_take, reader, entry)

    # -- words ---------------------------------------------------------------------------------------------------

    def send(self, signal: Signal, to: str | None) -> None:
        """See `Signals.send`."""
        for address in [to] if to is not None else list(self.listeners):
            if address in self.listeners and address != signal.sender and not self.world.loses():
                machine, hear = self.listeners[address]
                self.world.after(self.world.delay_s(), machine.loop.call_soon, hear, signal)

    # -- claims --------------------------------------------------------------------------------------------------

    def claim(self, name: str, holder: str, lease_s: float) -> str:
        """See `Claims.claim`."""
        held = self._holder(name)
        self.world.counts["claims refused" if held not in (None, holder) else "claims"] += 1
        if held is None:
            self._claims[name] = (holder, self.world.now_s + lease_s)
            owner, until_s = self._told.get(name, ("", 0.0))
            if until_s > self.world.now_s and owner != holder:
                self.wrongs.append(f"{holder} was given what is still {owner}'s")
            self._told[name] = self._claims[name]
        return held or holder

    def extend(self, name: str, holder: str, lease_s: float) -> bool:
        """See `Claims.extend`."""
        mine = self._holder(name) == holder
        self.world.counts["claims extended"] += mine
        if mine:
            self._claims[name] = self._told[name] = (holder, self.world.now_s + lease_s)
        return mine

    def release(self, name: str, holder: str) -> None:
        """See `Claims.release`."""
        if self._told.get(name, ("", 0.0))[0] == holder:
            del self._told[name]
        self.give_up(name, holder)

    def give_up(self, name: str, holder: str) -> None:
        """Let a name go, if it is the holder's."""
        if self._holder(name) == holder:
            self.forget(name)

    def forget(self, name: str) -> None:
        """Let a name go."""
        self._claims.pop(name, None)

    def _holder(self, name: str) -> str | None:
        holder, until_s = self._claims.get(name, (None, 0.0))
        return holder if until_s > self.world.now_s else None


def _take(reader: _Reader, entry: LogEntry) -> None:
    if not reader.closed:
        reader.take(entry)


class WayThere:
    """One worker's way to the server: implements `Coordination` as far as a simulated worker needs it."""

    def __init__(self, between: Between, machine: Machine) -> None:
        self.address = machine.name
        self.relay = self.signals = self.claims = self
        self._between = between
        self._machine = machine

    @property
    def prompt(self) -> bool:
        """See `Signals.prompt`."""
        return not self._between.down

    def _ask(self, serve: Callable[[], object]) -> asyncio.Future[object]:
        def answered() -> object:
            if self._between.down:
                raise CoordinationUnavailable
            return serve()

        return self._machine.ask(answered, lost=CoordinationUnavailable, within_s=PATIENCE_S)

    async def append(self, name: str, entry: LogEntry, *, keep_s: float) -> LogTail:
        """See `Relay.append`."""
        return await self._ask(lambda: self._between.append(name, entry))  # type: ignore[return-value]

    def read(self, name: str, take: Callable[[LogEntry], None], after: LogTail = NOTHING) -> Callable[[], None]:
        """See `Relay.read`."""
        reader = _Reader(self._machine, take, after)
        self._machine.world.after(self._machine.world.delay_s(), self._between.read, name, reader)

        def close() -> None:
            reader.closed = True

        return close

    async def send(self, signal: Signal, to: str | None = None) -> None:
        """See `Signals.send`."""
        await self._ask(lambda: self._between.send(replace(signal, sender=self.address), to))

    async def others(self) -> int:
        """See `Signals.others`."""
        return await self._ask(lambda: len(self._between.listeners) - 1)  # type: ignore[return-value]

    def listen(self, hear: Callable[[Signal], None]) -> None:
        """See `Signals.listen`."""
        self._between.listeners[self.address] = (self._machine, hear)

    async def claim(self, name: str, holder: str, *, lease_s: float) -> str:
        """See `Claims.claim`."""
        return await self._ask(lambda: self._between.claim(name, holder, lease_s))  # type: ignore[return-value]

    async def extend(self, name: str, holder: str, *, lease_s: float) -> bool:
        """See `Claims.extend`."""
        return await self._ask(lambda: self._between.extend(name, holder, lease_s))  # type: ignore[return-value]

    async def release(self, name: str, holder: str) -> None:
        """See `Claims.release`."""
        await self._ask(lambda: self._between.release(name, holder))
