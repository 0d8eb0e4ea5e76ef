"""One stream, any number of viewers.

A *log* is the append-only list of one stream's deltas, notes and its terminal event. A *viewer* is a cursor on it and a
way to be woken. There is no queue per viewer: memory grows with the stream and not with the audience, a late joiner
gets the beginning for free, and a slow viewer finds what it missed joined into one frame. Publishing never waits.

A position is `<epoch>-<seq>`: the epoch is the attempt that wrote the stream, the sequence counts its deltas from 1.
The terminal event takes the position after the last delta. A log that is taken over restarts under a higher epoch; a
viewer of the older one is told to drop what it showed.

The log owns the events: `append`, `note`, `restart`, `close` and `sever` are the only methods that change it, none
awaits. The hub owns which logs exist and how many bytes they hold. A log may repeat one of another process: `entry`
tells its events as values, `mirror` takes them, and `append_joined` takes text whose deltas nobody knows any more.

Deliberately absent: the wire (an `Encoder` is passed in), sockets, tenants' rights, and what the events mean.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from oncewise.errors import Overloaded, ResponseTooLarge
from oncewise.ports import LogEntry

__all__ = ["Encoder", "HubStats", "PlainText", "Position", "Sink", "StreamHub", "StreamLog", "Viewer"]

FRAME_CHARS = 128 * 1024
"""Code points after which a frame of joined deltas ends and another begins."""


class Position(NamedTuple):
    """A place in a stream. Written `<epoch>-<seq>`."""

    epoch: int
    seq: int

    @classmethod
    def parse(cls, text: str) -> "Position | None":
        """Read a position as a client sent it; None for anything that was never one of ours."""
        epoch, dash, seq = text.partition("-")
        if not dash or not (_is_number(epoch, 10) and _is_number(seq, 15)):
            return None
        return cls(int(epoch), int(seq))

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}"


def _is_number(text: str, digits: int) -> bool:
    # str.isdigit alone accepts digits of other scripts, which int() would then read.
    return 0 < len(text) <= digits and text.isascii() and text.isdigit()


class Encoder(Protocol):
    """Turns events into the bytes that all viewers are sent."""

    def delta(self, position: Position, text: str) -> bytes:
        """A piece of text, or several joined ones; `position` is that of the last."""
        ...

    def event(self, name: str, data: Mapping[str, Any], position: Position | None) -> bytes:
        """A note (without position) or a terminal event (with it)."""
        ...


class PlainText:
    """The text alone, in UTF-8; notes and terminal events are silent."""

    def delta(self, position: Position, text: str) -> bytes:  # noqa: ARG002  the port's signature
        """The text."""
        return text.encode()

    def event(self, name: str, data: Mapping[str, Any], position: Position | None) -> bytes:  # noqa: ARG002
        """Nothing."""
        return b""


class Sink(Protocol):
    """Takes what one viewer is to be shown at the moment it is published, without a task being woken for it."""

    def push(self, chunk: bytes) -> bool:
        """Take bytes, or say False: then the viewer's task is woken and waits as it has to.

        Must not block, must not raise, and must not call the log or its viewers.
        """
        ...


@dataclass(frozen=True, slots=True)
class HubStats:
    """What a hub holds now."""

    logs: int
    open_logs: int
    viewers: int
    bytes: int


class StreamLog:
    """The events of one stream. Opened, kept and dropped by its `StreamHub`; made by hand it counts for nothing there.

    Attributes:
        epoch: The attempt that writes now.
        closed: Whether the terminal event is in.
        viewers: How many viewers look on.
        tap: Called when a delta or the end is in, or the log began again; must not raise. Carries the log elsewhere.
    """

    __slots__ = (
        "_bytes",
        "_end",
        "_ending",
        "_fed",
        "_frames",
        "_held",
        "_hub",
        "_joined",
        "_notes",
        "_pieces",
        "_reset",
        "_said",
        "_sleepers",
        "_texts",
        "_timer",
        "_told_s",
        "epoch",
        "key",
        "tap",
        "viewers",
    )

    def __init__(self, hub: "StreamHub", key: Hashable, epoch: int = 1) -> None:
        self.key = key
        self.epoch = epoch
        self.viewers = 0
        self.tap: Callable[[], None] | None = None
        self._hub = hub
        self._texts: list[str] = []
        self._frames: list[bytes] = []
        self._notes: list[tuple[int, bytes]] = []
        self._said: list[tuple[str, Mapping[str, Any]]] = []
        self._pieces: list[tuple[int, int]] = []
        self._end: bytes | None = None
        self._ending: tuple[str, Mapping[str, Any]] | None = None
        self._reset: bytes = b""
        self._bytes = 0
        self._held = False
        self._timer: asyncio.TimerHandle | None = None
        # Viewers that wait, and so have all there is: those with a sink are fed, the others woken.
        self._fed: dict[Viewer, Callable[[bytes], bool]] = {}
        # A dict for its order: viewers are served as they came, and equal schedules give equal histories.
        self._sleepers: dict[Viewer, None] = {}
        self._told_s = 0.0
        self._joined: tuple[int, int, bytes] = (0, 0, b"")

    @property
    def closed(self) -> bool:
        """Whether the terminal event is in."""
        return self._end is not None

    @property
    def ending(self) -> tuple[str, Mapping[str, Any]] | None:
        """Name and data of the terminal event; None while there is none."""
        return self._ending

    @property
    def deltas(self) -> int:
        """How many deltas there are."""
        return len(self._texts)

    @property
    def tail(self) -> Position:
        """The position of the newest event."""
        return Position(self.epoch, len(self._texts) + self.closed)

    @property
    def text(self) -> str:
        """All deltas of this epoch, joined."""
        return "".join(self._texts)

    def size_after(self, seq: int) -> int:
        """Encoded bytes of the deltas after the first `seq`."""
        return sum(len(frame) for frame in self._frames[seq:])

    def append(self, text: str) -> Position:
        """Publish a delta to every viewer, at once and without waiting for any.

        Raises:
            ResponseTooLarge: the log is at its limit of bytes or deltas; nothing was appended.
            Overloaded: all logs together are at theirs; nothing was appended.
        """
        if self._end is not None:
            raise RuntimeError("append to a closed log")
        if len(self._texts) >= self._hub.max_deltas:
            raise ResponseTooLarge
        position = Position(self.epoch, len(self._texts) + 1)
        frame = self._hub.encoder.delta(position, text)
        self._grow(len(frame))
        self._feed(frame)
        self._texts.append(text)
        self._frames.append(frame)
        self._tell()
        return position

    def append_joined(self, text: str, seq: int) -> None:
        """Publish all deltas up to position `seq` in one piece, where nobody knows any more where each of them ended.

        A viewer that comes with a position inside the piece is shown everything again. Deltas that are in are not
        published twice: with none left this does nothing.

        Raises:
            ResponseTooLarge, Overloaded: as `append`.
        """
        start = len(self._texts)
        if self._end is not None or seq <= start:
            return
        if seq > self._hub.max_deltas:
            raise ResponseTooLarge
        frame = self._hub.encoder.delta(Position(self.epoch, seq), text)
        self._grow(len(frame))
        self._feed(frame)
        self._texts += [""] * (seq - start - 1) + [text]
        self._frames += [b""] * (seq - start - 1) + [frame]
        self._pieces.append((start, seq))
        self._tell()

    def note(self, name: str, data: Mapping[str, Any]) -> None:
        """Publish an event without a position, between the deltas before and after it.

        Raises:
            ResponseTooLarge, Overloaded: as `append`, for the limits of bytes.
        """
        if self._end is not None:
            raise RuntimeError("note on a closed log")
        frame = self._hub.encoder.event(name, data, None)
        self._grow(len(frame))
        self._feed(frame)
        self._notes.append((len(self._texts), frame))
        self._said.append((name, data))

    def restart(self, epoch: int, name: str, data: Mapping[str, Any]) -> None:
        """Begin again under a higher epoch; viewers that saw something get the event first, at `<epoch>-0`."""
        if epoch <= self.epoch or self._end is not None:
            raise RuntimeError("restart needs a higher epoch and an open log")
        self._wake()
        if self._held:
            self._hub._bytes -= self._bytes
        self._bytes = 0
        self.epoch = epoch
        self._texts, self._frames, self._notes, self._said, self._pieces = [], [], [], [], []
        self._joined = (0, 0, b"")
        self._reset = self._hub.encoder.event(name, data, Position(epoch, 0))
        self._tell()

    def close(self, name: str, data: Mapping[str, Any]) -> None:
        """Publish the terminal event; the log stays readable for the hub's retention. Closing again does nothing."""
        if self._end is None:
            self._end = self._hub.encoder.event(name, data, Position(self.epoch, len(self._texts) + 1))
            self._ending = (name, data)
            self._wake()
            self._tell()
            self._hub._retain(self)

    def sever(self) -> None:
        """End the log without a terminal event: its viewers end where they are, and may resume elsewhere."""
        if self._end is None:
            self._end = b""
            self._wake()
            self._tell()
            self._hub._let_go(self)

    def view(self, after: Position | None = None) -> "Viewer":
        """A viewer that sees everything after a position, or everything if there is none.

        A position of an older epoch gets the reset event and everything; one that this log never reached gets
        everything, and `Viewer.from_start` says so. Notes have no position, so every viewer is shown all of the epoch.
        """
        return Viewer(self, after)

    # -- for other processes -------------------------------------------------------------------------------------

    def entry(self, after: int, *, max_deltas: int, max_bytes: int) -> LogEntry | None:
        """The events after the first `after` deltas, up to so many, at least one of them; None if there are none.

        The terminal event comes with the last deltas, and a note with what follows it.
        """
        stop, size = after, 0
        while stop < len(self._texts) and stop - after < max_deltas and (size == 0 or size < max_bytes):
            size += len(self._frames[stop])
            stop += 1
        end = self._ending if stop == len(self._texts) else None
        if after > len(self._texts) or (stop == after and end is None):
            return None
        told = stop + (end is not None)
        notes = [
            (at, name, data)
            for (at, _), (name, data) in zip(self._notes, self._said, strict=True)
            if after <= at < told
        ]
        return LogEntry(self.epoch, after, tuple(self._texts[after:stop]), tuple(notes), end)

    def mirror(self, entry: LogEntry) -> bool:
        """Publish what is new of the events of this epoch that another process tells; False if some before are missing.

        Raises:
            ResponseTooLarge, Overloaded: as `append`.
        """
        if self._end is not None or entry.epoch != self.epoch:
            return True
        if entry.after > len(self._texts):
            return False
        stop = entry.after + len(entry.texts)
        for place in range(len(self._texts), stop):
            self._mirror_notes(entry, place)
            self.append(entry.texts[place - entry.after])
        if entry.end is not None and len(self._texts) == stop:
            self._mirror_notes(entry, stop)
            self.close(*entry.end)
        return True

    def _mirror_notes(self, entry: LogEntry, place: int) -> None:
        for at, name, data in entry.notes:
            if at == place:
                self.note(name, data)

    def _tell(self) -> None:
        if self.tap is not None:
            self.tap()

    # -- for viewers ---------------------------------------------------------------------------------------------

    def _grow(self, size: int) -> None:
        if self._bytes + size > self._hub.max_log_bytes:
            raise ResponseTooLarge
        if self._held:
            self._hub._grow(size)
        self._bytes += size

    def _feed(self, frame: bytes) -> None:
        """Show an event that is about to be the newest one: to sinks at once, to all others by waking them.

        This loop is what a stream costs with an audience. All who are fed have the same things, so the frame is what
        each of them lacks and no cursor is touched; a viewer finds its own when it is fed no more.
        """
        woken = list(self._sleepers)
        if self._fed:
            self._told_s = asyncio.get_running_loop().time()
            for viewer, push in self._fed.items():
                if not push(frame):
                    woken.append(viewer)
        for viewer in woken:
            viewer._wake(True)

    def _wake(self) -> None:
        for viewer in (*self._fed, *self._sleepers):
            viewer._wake(True)

    def _frame_end(self, start: int, stop: int) -> int:
        """How many deltas there are up to the end of a frame that begins after `start` of them."""
        chars = 0
        for place in range(start, stop):
            chars += len(self._texts[place])
            if chars >= FRAME_CHARS:
                return place + 1
        return stop

    def _slice(self, start: int, stop: int) -> bytes:
        """Deltas `start+1` to `stop` as one frame, encoded once for everyone who asks for the same ones."""
        if stop - start == 1:
            return self._frames[start]
        if (start, stop) != self._joined[:2]:
            text = "".join(self._texts[start:stop])
            self._joined = (start, stop, self._hub.encoder.delta(Position(self.epoch, stop), text))
        return self._joined[2]


class Viewer:
    """A cursor on a log. `take` what is there, `wait` for more; or iterate over both until the terminal event.

    One task at a time waits on it.

    Attributes:
        from_start: The position asked for was unknown, so everything is shown again.
        ended: Nothing more will come: the terminal event was taken, or the viewer was closed.
    """

    __slots__ = (
        "_closed",
        "_deadline_s",
        "_epoch",
        "_future",
        "_log",
        "_note",
        "_seq",
        "_sink",
        "_timeout_s",
        "_timer",
        "ended",
        "from_start",
    )

    def __init__(self, log: StreamLog, after: Position | None) -> None:
        self._log = log
        self._epoch = log.epoch
        self._seq = 0
        self._note = 0
        self._future: asyncio.Future[bool] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._sink: Sink | None = None
        self._timeout_s = 0.0
        self._deadline_s = 0.0
        self._closed = False
        self.ended = False
        self.from_start = False
        if after is not None:
            self._seek(after)
        log.viewers += 1

    def _seek(self, after: Position) -> None:
        log = self._log
        if after.epoch == log.epoch and any(start < after.seq < end for start, end in log._pieces):
            self.from_start = True
        elif after.epoch == log.epoch and after.seq <= log.deltas:
            self._seq = after.seq
        elif after == log.tail:
            self._seq, self._note, self.ended = log.deltas, len(log._notes), True
        elif 0 < after.epoch < log.epoch:
            self._epoch, self._seq = after.epoch, max(after.seq, 1)
        else:
            self.from_start = True

    def push_to(self, sink: Sink) -> None:
        """Give news to `sink` as they are published, while a task waits; it wakes for the end, and when it is refused.

        Waking a task for every delta and viewer costs more than sending the delta.
        """
        self._sink = sink

    def take(self) -> bytes:
        """What is new, adjacent deltas joined into one frame; empty if nothing is.

        A backlog of more than `FRAME_CHARS` comes in several takes: whoever is slow to send it on holds one at a time.
        """
        log, parts = self._log, []
        if self._epoch != log.epoch:
            if self._seq:
                parts.append(log._reset or self._hub_reset())
            self._epoch, self._seq, self._note = log.epoch, 0, 0
        while self._note < len(log._notes):
            at, frame = log._notes[self._note]
            if not self._take_deltas(parts, at):
                return b"".join(parts)
            parts.append(frame)
            self._note += 1
        if self._take_deltas(parts, log.deltas) and log._end is not None and not self.ended:
            parts.append(log._end)
            self.ended = True
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _hub_reset(self) -> bytes:
        # The log was opened under its epoch by another attempt and saw no restart itself.
        log = self._log
        return log._hub.encoder.event("reset", {"epoch": log.epoch, "reason": "epoch"}, Position(log.epoch, 0))

    def _take_deltas(self, parts: list[bytes], stop: int) -> bool:
        """Take one frame of the deltas up to `stop`; False if more are left than it holds."""
        if stop > self._seq:
            end = self._log._frame_end(self._seq, stop)
            parts.append(self._log._slice(self._seq, end))
            self._seq = end
        return self._seq >= stop

    def _has_news(self) -> bool:
        log = self._log
        return (
            self._epoch != log.epoch
            or self._seq < len(log._texts)
            or self._note < len(log._notes)
            or (log._end is not None and not self.ended)
        )

    async def wait(self, timeout_s: float) -> bool:
        """Wait until there is something to take; False if nothing came within `timeout_s` seconds."""
        if self._has_news():
            return True
        if self.ended:
            return False
        loop = asyncio.get_running_loop()
        # One timer for many waits, checked when it fires: a timer per delta and viewer would cost more than the delta.
        self._timeout_s = timeout_s
        self._deadline_s = loop.time() + timeout_s
        if self._timer is None or self._timer.when() > self._deadline_s:
            self._cancel_timer()
            self._timer = loop.call_at(self._deadline_s, self._tick, loop)
        future: asyncio.Future[bool] = loop.create_future()
        self._future = future
        if self._sink is None:
            self._log._sleepers[self] = None
        else:
            self._log._fed[self] = self._sink.push
        try:
            return await future
        finally:
            self._future = None
            self._stop_waiting()

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._future is None:
            return
        # What the log told since was pushed, or there would be no wait any more.
        deadline_s = max(self._deadline_s, self._log._told_s + self._timeout_s)
        if loop.time() >= deadline_s:
            self._wake(False)
        else:
            self._timer = loop.call_at(deadline_s, self._tick, loop)

    def _wake(self, news: bool) -> None:  # noqa: FBT001  the value the wait returns
        self._stop_waiting()
        if self._future is not None and not self._future.done():
            self._future.set_result(news)

    def _stop_waiting(self) -> None:
        log = self._log
        log._sleepers.pop(self, None)
        if log._fed.pop(self, None) is not None:
            # Only now: while it was fed it had what the log has.
            self._seq, self._note = len(log._texts), len(log._notes)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Leave; a wait in progress ends. Calling it again does nothing."""
        if not self._closed:
            self._closed = True
            # Or a loop `while not ended: await wait()` would go on for ever when someone else closes its viewer.
            self.ended = True
            self._cancel_timer()
            self._wake(False)
            self._log.viewers -= 1

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while not self.ended:
                await self.wait(3600.0)
                if chunk := self.take():
                    yield chunk
        finally:
            self.close()


class StreamHub:
    """The logs of one process, and their limits.

    Args:
        encoder: How events look on the wire; plain UTF-8 text by default.
        max_log_bytes: Encoded bytes one log may hold.
        max_deltas: Deltas one log may hold.
        max_total_bytes: Encoded bytes all logs together may hold; closed ones that nobody views make room.
        retention_s: Seconds a closed log stays readable.
    """

    def __init__(
        self,
        encoder: Encoder | None = None,
        *,
        max_log_bytes: int = 4 * 2**20,
        max_deltas: int = 50_000,
        max_total_bytes: int = 256 * 2**20,
        retention_s: float = 60.0,
    ) -> None:
        self.encoder: Encoder = encoder or PlainText()
        self.max_log_bytes = max_log_bytes
        self.max_deltas = max_deltas
        self.max_total_bytes = max_total_bytes
        self.retention_s = retention_s
        self._logs: dict[Hashable, StreamLog] = {}
        # Closed logs in the order of their closing: the first to go when memory runs short.
        self._retained: dict[StreamLog, None] = {}
        self._bytes = 0

    def open(self, key: Hashable, epoch: int = 1) -> StreamLog:
        """Make the log of a stream. The key contains the tenant; a key that is in use gets a new log in its place."""
        return self.hold(StreamLog(self, key, epoch))

    def hold(self, log: StreamLog) -> StreamLog:
        """Count a new log among those of this hub, in the place of one of the same key."""
        self.drop(log.key)
        log._held = True
        self._logs[log.key] = log
        return log

    def get(self, key: Hashable) -> StreamLog | None:
        """The log of a stream that runs or ended a moment ago."""
        return self._logs.get(key)

    def drop(self, key: Hashable) -> None:
        """Forget a log now. Who views or writes it goes on with it; it counts for nothing any more."""
        log = self._logs.get(key)
        if log is not None:
            self._let_go(log)

    def stats(self) -> HubStats:
        """What is held now."""
        logs = self._logs.values()
        open_logs = sum(1 for log in logs if not log.closed)
        return HubStats(len(logs), open_logs, sum(log.viewers for log in logs), self._bytes)

    def close(self) -> None:
        """Drop every log and its timer; viewers of open logs end where they are."""
        for log in list(self._logs.values()):
            log.sever()
            self._let_go(log)

    def _let_go(self, log: StreamLog) -> None:
        # By identity: an old log that ends late must not take the newer one of its key with it.
        if not log._held:
            return
        log._held = False
        del self._logs[log.key]
        self._retained.pop(log, None)
        self._bytes -= log._bytes
        if log._timer is not None:
            log._timer.cancel()

    def _retain(self, log: StreamLog) -> None:
        if log._held:
            self._retained[log] = None
            log._timer = asyncio.get_running_loop().call_later(self.retention_s, self._let_go, log)

    def _grow(self, size: int) -> None:
        if self._bytes + size > self.max_total_bytes:
            self._make_room(size)
        self._bytes += size

    def _make_room(self, size: int) -> None:
        # What has ended is stored elsewhere; what runs is not.
        for log in [log for log in self._retained if log.viewers == 0]:
            if self._bytes + size <= self.max_total_bytes:
                return
            self._let_go(log)
        if self._bytes + size > self.max_total_bytes:
            raise Overloaded("All streams together are at their limit of memory.", retry_after_s=1.0)
