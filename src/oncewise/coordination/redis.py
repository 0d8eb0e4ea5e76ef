"""The ports between workers on Redis 7.0 or newer, or Valkey: one connection that asks and one that reads.

| Key | Type | What |
|---|---|---|
| `P:log:N` | stream | a relayed log, its entries by `<epoch>-<seq>` |
| `P:in:A`, `P:all` | streams | words to the worker of address A, and to all; kept for a minute |
| `P:workers` | sorted set | who is alive, by the server's clock |
| `P:claim:N` | string | who holds a name |
| `P:pace:R`, `P:starts:R` | string, list | when the bucket of provider R is full again, and its latest starts |
| `P:slots:R`, `P:wait:R` | sorted sets | running calls of a provider, and workers that wait for one to end |

P names the deployment and N is a keyed digest, so keys tell nothing of tenants, ids or text. Everything has a lifetime.
What must be one step is one script, and every time is the server's.

Deliberately absent: a Redis Cluster. Scripts touch keys of several slots, and one read blocks on all logs.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from types import MappingProxyType

import orjson

from oncewise.coordination.link import Link, Script
from oncewise.coordination.reader import EntryId, Fields, Reader
from oncewise.coordination.wire import BadAddress, Command, Refused, Wire
from oncewise.core.errands import Errands
from oncewise.core.pacing import SECOND_S, Starts
from oncewise.errors import CoordinationUnavailable
from oncewise.ports import CoordinationChanged, Listener, LogEntry, LogTail, Signal

__all__ = ["BadAddress", "RedisCoordination", "open_redis", "rehearsal"]

ALIVE_S = 15.0
BEAT_S = 4.0
REFUSED_BEAT_S = 0.5
WORDS = 4096
WORDS_KEPT_S = 60.0
SLOT_S = 15.0
SLOT_POLL_S = 0.25
FLOOR = (7, 0)

_APPEND = Script("append")
_POST = Script("post")
_ALIVE = Script("alive")
_EXTEND = Script("extend")
_RELEASE = Script("release")
_RESERVE = Script("reserve")
_UNRESERVE = Script("unreserve")
_PAUSE = Script("pause")
_TAKE = Script("take")
_HOLD = Script("hold")
_GIVE = Script("give")


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


# -- logs --------------------------------------------------------------------------------------------------------


def _packed(entry: LogEntry) -> bytes:
    notes = [[at, name, dict(data)] for at, name, data in entry.notes]
    end = None if entry.end is None else [entry.end[0], dict(entry.end[1])]
    return orjson.dumps([entry.after, entry.texts, notes, end])


def _unpacked(place: EntryId, packed: bytes) -> LogEntry:
    after, texts, notes, end = orjson.loads(packed)
    return LogEntry(
        place[0],
        after,
        tuple(texts),
        tuple((at, name, data) for at, name, data in notes),
        None if end is None else (end[0], end[1]),
    )


class _Relay:
    def __init__(self, link: Link, reader: Reader, prefix: str) -> None:
        self._link = link
        self._reader = reader
        self._prefix = prefix

    async def append(self, name: str, entry: LogEntry, *, keep_s: float) -> LogTail:
        """See `Relay.append`."""
        epoch, seq = entry.tail
        keys = (f"{self._prefix}:log:{name}",)
        reply = await self._link.run(_APPEND, keys, epoch, entry.after, seq, _packed(entry), _ms(keep_s))
        return LogTail(*reply)

    def read(
        self,
        name: str,
        take: Callable[[LogEntry], None],
        after: LogTail = LogTail(0, 0),  # noqa: B008  a value
    ) -> Callable[[], None]:
        """See `Relay.read`."""

        def unpack(place: EntryId, fields: Fields) -> None:
            take(_unpacked(place, fields[1]))

        return self._reader.follow(f"{self._prefix}:log:{name}", unpack, after)


# -- words -------------------------------------------------------------------------------------------------------


class _Signals:
    def __init__(self, link: Link, reader: Reader, prefix: str, address: str) -> None:
        self.address = address
        self._link = link
        self._reader = reader
        self._prefix = prefix
        self._hearers: list[Callable[[Signal], None]] = []
        self.refused = ""
        """Why the server, which answers, takes no words or lets nobody read them; empty if it does."""

    @property
    def prompt(self) -> bool:
        """See `Signals.prompt`."""
        return self._link.up and not self.refused

    async def begin(self) -> None:
        """Listen from now on: to the own inbox from its start, to what is said to all from here."""
        newest = await self._link.call("XREVRANGE", f"{self._prefix}:all", "+", "-", "COUNT", 1)
        first, _, second = newest[0][0].partition(b"-") if newest else (b"0", b"", b"0")
        self.follow((int(first), int(second)))

    def follow(self, after: EntryId) -> None:
        """Read both streams."""
        self._reader.follow(f"{self._prefix}:in:{self.address}", self._hear, timed=True)
        self._reader.follow(f"{self._prefix}:all", self._hear, after, timed=True)

    async def send(self, signal: Signal, to: str | None = None) -> None:
        """See `Signals.send`."""
        key = f"{self._prefix}:all" if to is None else f"{self._prefix}:in:{to}"
        await self._link.run(_POST, (key,), word(signal, self.address), WORDS, _ms(WORDS_KEPT_S))

    async def others(self) -> int:
        """See `Signals.others`."""
        others: int = await self._link.run(_ALIVE, (f"{self._prefix}:workers",), self.address, _ms(ALIVE_S))
        return others

    def listen(self, hear: Callable[[Signal], None]) -> None:
        """See `Signals.listen`."""
        self._hearers.append(hear)

    def _hear(self, _place: EntryId, fields: Fields) -> None:
        kind, name, sender, data = orjson.loads(fields[1])
        if sender != self.address:
            signal = Signal(kind, name, sender, MappingProxyType(data))
            for hear in self._hearers:
                hear(signal)


def word(signal: Signal, sender: str) -> bytes:
    """A signal as it stands in a stream."""
    return orjson.dumps([signal.kind, signal.name, sender, dict(signal.data)])


# -- claims, starts and slots ------------------------------------------------------------------------------------


class _Claims:
    def __init__(self, link: Link, prefix: str) -> None:
        self._link = link
        self._prefix = prefix

    async def claim(self, name: str, holder: str, *, lease_s: float) -> str:
        """See `Claims.claim`."""
        held = await self._link.call("SET", self._key(name), holder, "NX", "GET", "PX", _ms(lease_s))
        return holder if held is None else str(held.decode())

    async def extend(self, name: str, holder: str, *, lease_s: float) -> bool:
        """See `Claims.extend`."""
        return bool(await self._link.run(_EXTEND, (self._key(name),), holder, _ms(lease_s)))

    async def release(self, name: str, holder: str) -> None:
        """See `Claims.release`."""
        await self._link.run(_RELEASE, (self._key(name),), holder)

    def _key(self, name: str) -> str:
        return f"{self._prefix}:claim:{name}"


class _Limiter:
    def __init__(self, link: Link, keys: tuple[str, str], rate: float, burst: int) -> None:
        starts = Starts(rate, burst)
        self._link = link
        self._keys = keys
        self._spacing_us = round(starts.gcra.spacing_s * 1e6)
        self._slack_us = round(starts.gcra.slack_s * 1e6)
        self._window = starts.window
        self._booked = b""

    async def reserve(self) -> float:
        """See `StartLimiter.reserve`."""
        delay_us, self._booked = await self._link.run(
            _RESERVE, self._keys, self._spacing_us, self._slack_us, self._window, round(SECOND_S * 1e6), hasty=True
        )
        return float(delay_us) / 1e6

    async def give_back(self) -> None:
        """See `StartLimiter.give_back`."""
        await self._link.run(_UNRESERVE, self._keys, self._booked, self._spacing_us)

    async def pause(self, for_s: float) -> None:
        """See `SharedLimiter.pause`."""
        await self._link.run(_PAUSE, self._keys[:1], round(for_s * 1e6), self._slack_us)


class _Slots:
    """The slots of one provider, as far as this process takes part.

    A slot's name is new for every taking, so that giving one back twice harms nobody.
    """

    def __init__(self, desk: "RedisCoordination", provider: str, limit: int) -> None:
        self.provider = provider
        self.freed = asyncio.Event()
        self._desk = desk
        self._limit = limit
        self._held: list[str] = []
        self._taken = 0

    async def take(self) -> None:
        """See `CallSlots.take`."""
        self._taken += 1
        name = f"{self._desk.signals.address}/{self._taken}"
        try:
            await self._take(name)
        except BaseException:
            # It may have been taken all the same.
            self._desk.errands.run(self._give(name))
            raise
        self._held.append(name)

    async def _take(self, name: str) -> None:
        while True:
            self.freed.clear()
            keys = (self._desk.key("slots", self.provider), self._desk.key("wait", self.provider))
            address = self._desk.signals.address
            wait_ms = await self._desk.link.run(_TAKE, keys, self._limit, name, _ms(SLOT_S), address, hasty=True)
            if wait_ms == 0:
                return
            with suppress(TimeoutError):
                # A word that says so may be lost; so may the worker that it was said to.
                async with asyncio.timeout(min(wait_ms / 1000, SLOT_POLL_S)):
                    await self.freed.wait()

    def give_back(self) -> None:
        """See `CallSlots.give_back`."""
        if self._held:
            self._desk.errands.run(self._give(self._held.pop()))

    async def _give(self, name: str) -> None:
        desk = self._desk
        keys = (desk.key("slots", self.provider), desk.key("wait", self.provider))
        said = word(Signal(_FREED, self.provider), "")
        await desk.link.run(_GIVE, keys, name, desk.key("in", ""), said, WORDS, _ms(WORDS_KEPT_S))

    async def hold(self) -> None:
        """Keep what is held."""
        if self._held:
            await self._desk.link.run(_HOLD, (self._desk.key("slots", self.provider),), _ms(SLOT_S), *self._held)


_FREED = "slot"


# -- all together ------------------------------------------------------------------------------------------------


class RedisCoordination:
    """Implements `Coordination`. Made by `open_redis`.

    Attributes:
        version: What the server says it is; empty if it has not said so yet.
    """

    def __init__(self, url: str, *, prefix: str, address: str, listener: Listener, budget_s: float) -> None:
        name = f"oncewise-{address[:13]}"
        asking, reading = Wire(url, name=name), Wire(url, name=f"{name}-reader")
        self._prefix = prefix
        self._listener = listener
        self.errands = Errands()
        self.link = Link(asking, budget_s=budget_s, listener=listener)
        self.reader = Reader(reading, self._wake_reader)
        self.relay = _Relay(self.link, self.reader, prefix)
        self.signals = _Signals(self.link, self.reader, prefix, address)
        self.claims = _Claims(self.link, prefix)
        self.version = ""
        self._slots: dict[str, _Slots] = {}
        self._listens = False
        self._task: asyncio.Task[None] | None = None

    def key(self, kind: str, name: str) -> str:
        """A key of this deployment."""
        return f"{self._prefix}:{kind}:{name}"

    def limiter(self, provider: str, *, rate: float, burst: int) -> _Limiter:
        """See `Coordination.limiter`."""
        return _Limiter(self.link, (self.key("pace", provider), self.key("starts", provider)), rate, burst)

    def slots(self, provider: str, *, limit: int) -> _Slots:
        """See `Coordination.slots`. Call it once for each provider."""
        self._slots[provider] = _Slots(self, provider, limit)
        return self._slots[provider]

    async def begin(self, patience_s: float) -> None:
        """Listen, and say that this worker is alive; if the server does not answer in time, later."""
        self.signals.listen(self._hear)
        await self.link.probe(patience_s)
        await self._beat()
        self._task = asyncio.get_running_loop().create_task(self._live(), context=Context())

    async def _live(self) -> None:
        while True:
            if self.signals.refused:
                await asyncio.sleep(REFUSED_BEAT_S)
            else:
                await asyncio.sleep(BEAT_S if self._listens and self.link.up else 0.1)
            await self._beat()

    async def _beat(self) -> None:
        try:
            if not self._listens:
                await self.signals.begin()
                self._listens = True
            # This always writes, as a probe that only asks would not: it shows a replica, or a server that is full.
            await self.signals.others()
            for slots in self._slots.values():
                await slots.hold()
        except CoordinationUnavailable as error:
            refused = error.__cause__
            self._refused(refused.code if isinstance(refused, Refused) else "")
        else:
            self._refused(self.reader.refused)

    def _refused(self, code: str) -> None:
        """A server that refuses is as good as one that is away; the link, which has its answers, cannot tell."""
        before, self.signals.refused = self.signals.refused, code
        if self.link.up and bool(code) != bool(before):
            self._listener(CoordinationChanged(up=not code, reason=code))

    def _hear(self, signal: Signal) -> None:
        if signal.kind == _FREED and signal.name in self._slots:
            self._slots[signal.name].freed.set()

    def _wake_reader(self) -> None:
        self.errands.run(self.signals.send(Signal("wake"), self.signals.address))

    async def check(self) -> str | None:
        """See `Coordination.check`."""
        try:
            info: bytes = await self.link.call("INFO", "server")
        except CoordinationUnavailable as error:
            refused = error.__cause__
            reason = refused.code if isinstance(refused, Refused) else self.link.reason
            return f"Redis does not answer ({reason or 'timeout'})."
        self.version, wrong = server_of(info.decode())
        if wrong is None and self.signals.refused:
            return f"Redis refuses what workers tell each other ({self.signals.refused})."
        return wrong

    async def aclose(self) -> None:
        """See `Coordination.aclose`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self.errands.run(self._leave())
        await self.errands.aclose()
        await self.reader.aclose()
        await self.link.aclose()

    async def _leave(self) -> None:
        await self.link.call("ZREM", f"{self._prefix}:workers", self.signals.address)
        await self.link.call("DEL", self.key("in", self.signals.address))


def server_of(info: str) -> tuple[str, str | None]:
    """What a server says it is, and what is wrong with that; `info` is its answer to INFO."""
    lines = dict(line.partition(":")[::2] for line in info.splitlines())
    valkey, redis = lines.get("valkey_version"), lines.get("redis_version", "")
    if valkey:
        return f"Valkey {valkey}", None
    numbers = tuple(int(part) for part in redis.split(".")[:2] if part.isdigit())
    # One that does not say its version is a service's own; it may well do.
    too_old = bool(numbers) and numbers < FLOOR
    return f"Redis {redis}", f"Redis {redis} is too old; 7.0 or newer is needed, or Valkey." if too_old else None


def rehearsal(prefix: str) -> list[tuple[str, Command]]:
    """Everything that a server is asked for, once: its name, and the command. What a user may not do shows in this.

    In this order nothing is left behind. One that is refused may leave keys, for a minute.
    """
    log, end, inbox, workers, claim, pace, starts, slots, wait = keys = [
        f"{prefix}:{kind}" for kind in ("log", "end", "in", "workers", "claim", "pace", "starts", "slots", "wait")
    ]

    def run(script: Script, on: tuple[str, ...], *args: str | bytes | int) -> tuple[str, Command]:
        return f"{script.name}.lua", ("EVAL", script.text, len(on), *on, *args)

    return [
        ("PING", ("PING",)),
        # Unknown to every server, and refused as such to those who may ask for it.
        ("EVALSHA", ("EVALSHA", "0" * 40, 0)),
        run(_APPEND, (log, end), 1, 0, 1, b"", _ms(1.0)),
        # A higher epoch removes what the lower one wrote.
        run(_APPEND, (log, end), 2, 0, 1, b"", _ms(1.0)),
        ("XREAD", ("XREAD", "COUNT", 1, "STREAMS", log, "0-0")),
        ("XREVRANGE", ("XREVRANGE", log, "+", "-", "COUNT", 1)),
        run(_POST, (inbox,), b"", 1, _ms(1.0)),
        run(_ALIVE, (workers,), "here", _ms(1.0)),
        ("SET", ("SET", claim, "here", "NX", "GET", "PX", _ms(1.0))),
        run(_EXTEND, (claim,), "here", _ms(1.0)),
        run(_RELEASE, (claim,), "here"),
        run(_RESERVE, (pace, starts), 1, 0, 1, 1),
        run(_UNRESERVE, (pace, starts), b"0", 1),
        # What the script does with a booking that is still the latest.
        ("LPOP", ("LPOP", starts)),
        run(_PAUSE, (pace,), 1, 0),
        run(_TAKE, (slots, wait), 1, "first", _ms(1.0), "here"),
        run(_TAKE, (slots, wait), 1, "second", _ms(1.0), "here"),
        run(_HOLD, (slots,), _ms(1.0), "first"),
        run(_GIVE, (slots, wait), "first", f"{prefix}:in:", b"", 1, _ms(1.0)),
        ("ZREM", ("ZREM", workers, "here")),
        ("DEL", ("DEL", *keys, f"{prefix}:in:here")),
    ]


async def open_redis(
    url: str,
    *,
    deployment: str,
    address: str,
    listener: Listener = lambda _event: None,
    budget_s: float = 0.25,
    patience_s: float = 1.0,
) -> RedisCoordination:
    """The ports on a server. It need not answer now: until it does, every port says that it is away.

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        deployment: Keeps the keys of several deployments on one server apart.
        address: Of this worker; never used again by another.
        listener: Told when the server goes away, and when it is back.
        budget_s: Seconds for one request.
        patience_s: Seconds to wait for its first answer.

    Raises:
        BadAddress: the URL cannot be used.
    """
    coordination = RedisCoordination(
        url, prefix=f"oncewise:{deployment}", address=address, listener=listener, budget_s=budget_s
    )
    await coordination.begin(patience_s)
    return coordination
