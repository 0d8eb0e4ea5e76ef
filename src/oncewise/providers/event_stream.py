"""Server-sent events out of bytes, however the bytes were cut.

Written on bytes because the usual line readers work on text and follow `str.splitlines`: they also end a line at
U+2028 or U+0085, which may stand unescaped in JSON, and cut an answer's JSON in three. Here a line ends at CR, LF or
CRLF and nowhere else (WHATWG HTML, §9.2.6), and a whole field is decoded at once, so that a character split between two
reads is never two broken ones.

Deliberately absent: JSON, what an event means, and reconnecting.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Event", "EventNotUtf8", "EventStream", "EventTooLarge"]

MAX_EVENT_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_LINE_END = re.compile(rb"\r\n?|\n")


class EventTooLarge(Exception):
    """An event, or a line, is larger than any honest one."""


class EventNotUtf8(Exception):
    """An event is not UTF-8."""


class Event(NamedTuple):
    """One event.

    Attributes:
        data: The data lines, joined by LF; never empty.
        name: The `event:` field; empty if it had none.
        last_id: The latest `id:` field of the stream so far.
        retry_ms: The `retry:` field of this event.
    """

    data: str
    name: str = ""
    last_id: str = ""
    retry_ms: int | None = None


class EventStream:
    """Takes the body of one response, piece by piece; after an error it takes nothing more.

    An event that its blank line does not end is no event: its tail may be missing.
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._line = bytearray()
        self._head: bytes | None = b""
        self._after_cr = False
        self._last_id = ""
        self._data: list[bytes] = []
        self._retry_ms: int | None = None
        self._clear()

    def feed(self, piece: bytes) -> Iterator[Event]:
        """The events that this piece completes.

        Lazy: events before a broken one are still had, whether or not they came in the same piece. Exhaust it before
        the next piece.

        Raises:
            EventTooLarge: an event or a line exceeds the cap, complete or not.
            EventNotUtf8: a field of a complete event is not strict UTF-8.
        """
        for line in self._lines(self._without_bom(piece)):
            if line:
                self._take(line)
            elif (event := self._dispatch()) is not None:
                yield event
        self._check(len(self._line))

    def _without_bom(self, piece: bytes) -> bytes:
        if self._head is None:
            return piece
        head = self._head + piece
        if len(head) < len(_BOM) and _BOM.startswith(head):
            self._head = head
            return b""
        self._head = None
        return head.removeprefix(_BOM)

    def _lines(self, piece: bytes) -> list[bytes]:
        """The lines that this piece completes."""
        if self._after_cr and piece:
            # The CR ended its line at once: waiting for a LF that may never come would hold the event back.
            self._after_cr = False
            piece = piece.removeprefix(b"\n")
        # Most streams have no CR, and splitting at one character takes a tenth of the time.
        *lines, rest = _LINE_END.split(piece) if b"\r" in piece else piece.split(b"\n")
        self._after_cr = self._after_cr or (not rest and piece.endswith(b"\r"))
        if lines and self._line:
            lines[0] = bytes(self._line) + lines[0]
            self._line.clear()
        self._line += rest
        return lines

    def _take(self, line: bytes) -> None:
        self._check(len(line))
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._size += len(value) + 1
        elif name == b"event":
            self._name = value
        elif name == b"id" and b"\0" not in value:
            self._last_id = _decoded(value)
        elif name == b"retry" and value.isdigit() and len(value) < 10:
            self._retry_ms = int(value)

    def _dispatch(self) -> Event | None:
        data, name, retry_ms = b"\n".join(self._data), self._name, self._retry_ms
        self._clear()
        if not data:
            return None
        return Event(_decoded(data), _decoded(name) if name else "", self._last_id, retry_ms)

    def _check(self, more: int) -> None:
        if self._size + more > self._max_event_bytes:
            raise EventTooLarge

    def _clear(self) -> None:
        self._data = []
        self._size = 0
        self._name = b""
        self._retry_ms = None


def _decoded(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise EventNotUtf8 from None
