"""Server-Sent Events as the HTTP contract has them, and the loop that sends one stream.

Frames are written here: a block is `event`, `id` where there is one, and one line of JSON, each ended by LF. There is
no comment, no block of an id alone and no byte order mark, since common clients stumble over each of them (streams.md
§6.1). A log's event is encoded once, for all who watch.

`follow` sends what a viewer sees until the stream has ended, and leaves the last bytes to its caller, who has
accounts to write before they go out.

Deliberately absent: which turn is watched, and by whom.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import orjson

from oncewise.api.exchange import Exchange, Headers
from oncewise.core.stream_hub import Position, Viewer

__all__ = ["STREAM_HEADERS", "EventStream", "Source", "SseEncoder", "Stalled", "cancelled_frame"]

STREAM_HEADERS: Headers = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store, no-transform"),
    (b"x-accel-buffering", b"no"),
]


_PIECE = 64 * 1024


class Stalled(Exception):
    """The client takes no bytes; its connection was dropped, and it may resume."""


def frame(name: str, data: Mapping[str, Any], position: Position | None = None) -> bytes:
    """One event. JSON keeps line ends out of `data`, so a text can not become a field or an event."""
    place = b"" if position is None else b"id: %d-%d\n" % (position.epoch, position.seq)
    return b"event: %b\n%bdata: %b\n\n" % (name.encode("ascii"), place, orjson.dumps(data))


class SseEncoder:
    """Implements `oncewise.core.stream_hub.Encoder`."""

    def delta(self, position: Position, text: str) -> bytes:
        return frame("delta", {"delta": text}, position)

    def event(self, name: str, data: Mapping[str, Any], position: Position | None) -> bytes:
        return frame(name, data, position)


def _ping(every_s: float, *, first: bool = False) -> bytes:
    # `retry` shares the block: alone it would be an empty event to some clients.
    head = b"retry: 2000\n" if first else b""
    return head + frame("ping", {"t": time.time_ns() // 1_000_000, "every_ms": round(every_s * 1000)})


def cancelled_frame() -> bytes:
    """How a stream ends whose own request was withdrawn; without an id, since the turn may go on for others."""
    ending = {"user_message_id": None, "assistant_message_id": None, "usage": None, "chars": 0}
    return frame("done", {"state": "cancelled", "reason": "cancelled", **ending})


class Source(Protocol):
    """What a stream is sent from: `oncewise.core.stream_hub.Viewer`, or one that reads a row."""

    @property
    def ended(self) -> bool:
        """Whether everything was taken, the terminal event included."""
        ...

    def take(self) -> bytes:
        """What is new."""
        ...

    async def wait(self, timeout_s: float) -> bool:
        """Wait until something is new; False if nothing is after `timeout_s` seconds or `close`."""
        ...

    def close(self) -> None:
        """Look no more; wakes a `wait`."""
        ...


class EventStream:
    """One response that is a stream of events.

    Attributes:
        stopped: The server ends this stream; the client may resume it elsewhere.
    """

    def __init__(self, exchange: Exchange, source: Source) -> None:
        self.stopped = False
        self._patience: asyncio.Timeout | None = None
        self._exchange = exchange
        self._limits = exchange.limits
        self._source = source
        self._connection = exchange.connection

    async def open(self, headers: Headers, meta: Mapping[str, Any]) -> None:
        """Send the head, a ping and what is known of the stream."""
        await self._exchange.start(200, self._exchange.head([*STREAM_HEADERS, *headers]))
        await self.write(_ping(self._limits.ping_s, first=True) + frame("meta", meta))

    async def follow(self, withdrawn: Callable[[], bool] = bool) -> bytes:
        """Send events as they come, until the stream has ended; return the bytes that are left to send.

        Args:
            withdrawn: Whether the request behind the stream was cancelled; asked whenever the source wakes.

        Raises:
            Stalled: the client takes no bytes.
        """
        source = self._source
        if self._connection is not None and isinstance(source, Viewer):
            source.push_to(self._connection)
        while not self.stopped:
            has_news = await source.wait(self._limits.ping_s)
            if withdrawn():
                return cancelled_frame()
            if has_news:
                chunk = source.take()
                if source.ended:
                    return chunk
                await self.write(chunk)
            elif not self.stopped:
                await self.write(_ping(self._limits.ping_s))
        return b""

    async def write(self, chunk: bytes, *, more: bool = True) -> None:
        """Send some bytes.

        Raises:
            Stalled: the client takes none; the connection was dropped.
        """
        # In pieces: the server copies what it is given, and waits for the client only before the next.
        for start in range(0, max(len(chunk), 1), _PIECE):
            piece = chunk[start : start + _PIECE]
            await self._send(piece, more=more or start + _PIECE < len(chunk))

    async def _send(self, piece: bytes, *, more: bool) -> None:
        if self._connection is not None and self._connection.ready():
            # Nothing to be patient about, and a timer per frame and viewer costs as much as the frame.
            await self._exchange.write(piece, more=more)
            return
        try:
            async with asyncio.timeout(self._limits.stall_s) as self._patience:
                await self._exchange.write(piece, more=more)
        except TimeoutError:
            self._exchange.abort()
            raise Stalled from None
        finally:
            self._patience = None

    def stop(self) -> None:
        """End the stream without a terminal event: the client may resume elsewhere."""
        self.stopped = True
        self._source.close()
        if self._patience is not None:
            # A client that takes no bytes would hold up the end of the server for as long as it may hold up a stream.
            self._patience.reschedule(asyncio.get_running_loop().time() + self._limits.parting_s)
