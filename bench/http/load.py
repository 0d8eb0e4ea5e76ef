"""Thousands of HTTP/1.1 requests at once from one process, with the time of every piece that came back.

One epoll loop over non-blocking sockets. During a run it only finds out where an answer ends; chunks, events and texts
are read afterwards, so that a receive costs a few microseconds. A loop that is late reads larger pieces: the load
cannot slow the server down by being slow itself, and what it measures late it measures late for every server alike.

Connections are made first and requests sent when all stand, so that connecting is in no figure.

Deliberately absent: TLS, redirects, pipelining, and any library whose own cost would be in the figures.
"""

import gc
import json
import re
import resource
import select
import socket
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Self

__all__ = ["Answer", "Events", "Load", "post", "quantile"]

STAMP = re.compile(rb"@(\d+):(\d+):(\d+)@")
"""Call, index and monotonic nanoseconds: what the fake provider writes into every delta."""
RECEIVE_BYTES = 262_144
LAST_CHUNK = b"\r\n0\r\n\r\n"


def post(path: str, body: object, headers: dict[str, str]) -> bytes:
    """The bytes of a request with a JSON body."""
    content = json.dumps(body).encode()
    fields = {"host": "127.0.0.1", "content-type": "application/json", "content-length": str(len(content)), **headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + content


def quantile(values: Sequence[float], share: float) -> float | None:
    """A quantile by linear interpolation; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(slots=True)
class Answer:
    """What came back on one connection.

    Attributes:
        sent_ns: Monotonic time just before the request was handed to the kernel.
        ended_ns: When its last byte was received; 0 if it is not complete.
        pieces: Time and bytes of every receive, without the head; chunks are still framed.
        error: Why there is no complete answer, in words.
    """

    sent_ns: int = 0
    ended_ns: int = 0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[tuple[int, bytes]] = field(default_factory=list)
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Complete, with status 200."""
        return self.error is None and self.status == 200 and self.ended_ns > 0

    @property
    def latency_ms(self) -> float:
        """From the send to the last byte."""
        return (self.ended_ns - self.sent_ns) / 1e6

    @property
    def body(self) -> bytes:
        """Everything that came, chunks joined; what follows a break in the framing is left out."""
        return b"".join(data for _, data in self._chunks())

    def stamps(self) -> list[tuple[int, int]]:
        """When each of the provider's stamps was written and when its last byte was received, in nanoseconds."""
        chunks = list(self._chunks())
        body = b"".join(data for _, data in chunks)
        body_ends = list(accumulate(len(data) for _, data in chunks))
        piece_ends = list(accumulate(len(piece) for _, piece in self.pieces))

        def received_ns(end: int) -> int:
            number = bisect_left(body_ends, end)
            # Counted back from the end of its chunk: bytes of the body are not bytes of the wire.
            raw_end = chunks[number][0] - (body_ends[number] - end)
            return self.pieces[bisect_left(piece_ends, raw_end)][0]

        return [(int(stamp[3]), received_ns(stamp.end())) for stamp in STAMP.finditer(body)]

    def _chunks(self) -> Iterator[tuple[int, bytes]]:
        """The bytes of the body, and where on the wire each run of them ended."""
        raw = b"".join(piece for _, piece in self.pieces)
        if self.headers.get("transfer-encoding") != "chunked":
            yield len(raw), raw
            return
        at = 0
        while (line := raw.find(b"\r\n", at)) >= 0:
            data = raw[line + 2 : line + 2 + int(raw[at:line], 16)]
            yield line + 2 + len(data), data
            at = line + 4 + len(data)


@dataclass(frozen=True, slots=True)
class Events:
    """A stream of events, read to its end.

    Attributes:
        text: All deltas, joined.
        names: How many events of each name there were.
        last: The data of the last event.
    """

    text: str
    names: Counter[str]
    last: dict[str, Any]

    @classmethod
    def read(cls, body: bytes) -> Self:
        """Read a whole event stream; LF and CR LF both end lines."""
        texts: list[str] = []
        names: Counter[str] = Counter()
        data: dict[str, Any] = {}
        for block in body.replace(b"\r\n", b"\n").split(b"\n\n")[:-1]:
            fields = dict(line.split(b": ", 1) for line in block.split(b"\n") if not line.startswith(b":"))
            if b"data" in fields:
                name = fields.get(b"event", b"message").decode()
                data = json.loads(fields[b"data"])
                names[name] += 1
                texts += [data["delta"]] if name == "delta" else []
        return cls("".join(texts), names, data)


class _Connection:
    __slots__ = ("answer", "expected", "head", "received", "socket", "tail", "unsent")

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=20)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.answer = Answer()
        self.unsent = b""
        self.head: bytes | None = b""
        self.expected: int | None = None
        self.received = 0
        self.tail = b""

    def feed(self, now_ns: int, data: bytes) -> bool:
        """Take received bytes; True if the answer is complete with them."""
        if self.head is not None:
            self.head += data
            head, blank, data = self.head.partition(b"\r\n\r\n")
            if not blank:
                return False
            self.head = None
            self._read_head(head.decode("latin-1"))
        if data:
            self.answer.pieces.append((now_ns, data))
            self.received += len(data)
            self.tail = (self.tail + data)[-len(LAST_CHUNK) :]
        return self.received >= self.expected if self.expected is not None else self.tail == LAST_CHUNK

    def _read_head(self, head: str) -> None:
        status, *fields = head.split("\r\n")
        self.answer.status = int(status.split(" ")[1])
        self.answer.headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in fields)}
        if "content-length" in self.answer.headers:
            self.expected = int(self.answer.headers["content-length"])


class Load:
    """Connections to one server, all driven by one loop::

        with Load(address) as load:
            load.connect(5000)
            load.send(request)
            answers = load.receive(limit_s=60)

    The garbage collector is off inside: a pause of the client would look like one of the server.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._poll = select.epoll()
        self._connections: list[_Connection] = []
        self._by_fd: dict[int, _Connection] = {}
        self._waiting = 0

    def __enter__(self) -> Self:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard) if hard > soft else (soft, hard))
        gc.disable()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for connection in self._connections:
            connection.socket.close()
        self._poll.close()
        gc.enable()

    @property
    def answers(self) -> list[Answer]:
        """What came back so far, one for each connection."""
        return [connection.answer for connection in self._connections]

    def connect(self, count: int, address: tuple[str, int] | None = None) -> None:
        """Open more connections, to another server if one is named."""
        for _ in range(count):
            connection = _Connection(address or self._address)
            self._connections.append(connection)
            self._by_fd[connection.socket.fileno()] = connection
            self._poll.register(connection.socket.fileno(), select.EPOLLIN)
        time.sleep(0.2)  # the kernel connects before the server accepts; let it

    def send(self, *requests: bytes) -> None:
        """Send a request on every connection that has sent none, and receive meanwhile what is there.

        Of several requests the connections get one each, in turn.
        """
        fresh = [connection for connection in self._connections if not connection.answer.sent_ns]
        for number, connection in enumerate(fresh):
            connection.answer.sent_ns = time.monotonic_ns()
            connection.unsent = requests[number % len(requests)]
            self._waiting += 1
            self._flush(connection)
            if number % 64 == 63:
                self._step(0)

    def receive(self, limit_s: float) -> list[Answer]:
        """Receive until every answer is complete, or for so long; return what came back."""
        end_s = time.monotonic() + limit_s
        while self._waiting and (left_s := end_s - time.monotonic()) > 0:
            self._step(min(left_s, 0.05))
        return self.answers

    def give_up(self) -> list[Answer]:
        """Call every answer that is not complete an error; return them all."""
        for connection in self._connections:
            if not connection.answer.ended_ns and connection.answer.error is None:
                connection.answer.error = "not complete in time"
        return self.answers

    def _step(self, timeout_s: float) -> None:
        for fd, event in self._poll.poll(timeout_s, 4096):
            connection = self._by_fd[fd]
            if event & select.EPOLLOUT:
                self._flush(connection)
            if event & ~select.EPOLLOUT:
                self._receive(connection)

    def _flush(self, connection: _Connection) -> None:
        try:
            connection.unsent = connection.unsent[connection.socket.send(connection.unsent) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self._end(connection, f"send: {type(error).__name__}")
            return
        wanted = select.EPOLLIN | (select.EPOLLOUT if connection.unsent else 0)
        self._poll.modify(connection.socket.fileno(), wanted)

    def _receive(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(connection, f"receive: {type(error).__name__}")
            return
        now_ns = time.monotonic_ns()
        if not data:
            self._end(connection, "closed early")
        elif connection.feed(now_ns, data):
            connection.answer.ended_ns = now_ns
            self._end(connection, None)

    def _end(self, connection: _Connection, error: str | None) -> None:
        connection.answer.error = error
        self._waiting -= bool(connection.answer.sent_ns)
        fd = connection.socket.fileno()
        self._poll.unregister(fd)
        del self._by_fd[fd]
        connection.socket.close()
