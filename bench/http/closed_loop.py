"""Connections that ask again as soon as they are answered: what a server can pass, and how long each request takes.

Every request differs from every other by a tag in its prompt, and every answer must have the tag of its own request in
it: an answer that went to somebody else is counted as wrong.

Deliberately absent: a rate. At few connections this measures time, at many it measures throughput.
"""

import gc
import re
import select
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

__all__ = ["Asked", "ask"]

RECEIVE_BYTES = 262_144
LIMIT_S = 60.0
LAST_CHUNK = b"\r\n0\r\n\r\n"
_numbers = count(1)
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


@dataclass
class Asked:
    """What came of it.

    Attributes:
        latencies_ms: Of each good answer, from the send of its request to its last byte.
        wrong: How many answers were not good, by what was wrong.
        seconds: From the first send to the last answer.
    """

    latencies_ms: list[float] = field(default_factory=list)
    wrong: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def per_s(self) -> float:
        """Good answers per second."""
        return len(self.latencies_ms) / self.seconds


class _Connection:
    __slots__ = ("ends", "received", "sent_ns", "socket", "tag")

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=LIMIT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received = bytearray()

    def send(self, tag: bytes, request: bytes) -> None:
        self.tag = tag
        self.received.clear()
        self.ends: int | None = None
        self.sent_ns = time.monotonic_ns()
        # Shorter than any send buffer, and the answer to what was sent before is there: never blocks.
        self.socket.sendall(request)

    def receive(self) -> bool:
        """Take what is there; True if the answer is complete with it."""
        data = self.socket.recv(RECEIVE_BYTES)
        if not data:
            raise ConnectionError("closed early")
        received = self.received
        received += data
        if self.ends is None:
            head = received.find(b"\r\n\r\n")
            if head < 0:
                return False
            length = _LENGTH.search(received, 0, head + 2)
            self.ends = head + 4 + int(length[1]) if length else 0
        return len(received) >= self.ends if self.ends else received.endswith(LAST_CHUNK)

    @property
    def wrong(self) -> str | None:
        if self.received[9:12] != b"200":
            return f"status {self.received[9:12].decode('latin-1')}"
        return None if self.tag in self.received else "another's answer"


def ask(address: tuple[str, int], request: Callable[[bytes], bytes], connections: int, seconds: float) -> Asked:
    """Keep so many connections busy for so long; then let the answers come that are still out.

    Args:
        request: The bytes of the request with a tag.
    """
    asked = Asked()
    poll = select.epoll()
    by_fd: dict[int, _Connection] = {}
    for _ in range(connections):
        connection = _Connection(address)
        by_fd[connection.socket.fileno()] = connection
        poll.register(connection.socket.fileno(), select.EPOLLIN)
    # A pause of the client would look like one of the server.
    gc.disable()
    try:
        _run(asked, poll, by_fd, request, seconds)
    finally:
        gc.enable()
        poll.close()
        for connection in by_fd.values():
            connection.socket.close()
    return asked


def _run(
    asked: Asked,
    poll: select.epoll,
    by_fd: dict[int, _Connection],
    request: Callable[[bytes], bytes],
    seconds: float,
) -> None:
    began_s = now_s = time.monotonic()

    def send(connection: _Connection) -> None:
        tag = b"tag-%09d" % next(_numbers)
        connection.send(tag, request(tag))

    for connection in by_fd.values():
        send(connection)
    waiting = len(by_fd)
    while waiting and now_s < began_s + seconds + LIMIT_S:
        for fd, _ in poll.poll(1.0):
            connection = by_fd[fd]
            try:
                complete = connection.receive()
            except OSError as error:
                asked.wrong[str(error)] += 1
                poll.unregister(fd)
                waiting -= 1
                continue
            if not complete:
                continue
            taken_ms = (time.monotonic_ns() - connection.sent_ns) / 1e6
            if wrong := connection.wrong:
                asked.wrong[wrong] += 1
            else:
                asked.latencies_ms.append(taken_ms)
            if now_s < began_s + seconds:
                send(connection)
            else:
                waiting -= 1
        now_s = time.monotonic()
    asked.wrong["not complete in time"] += waiting
    asked.wrong += Counter()  # drops what is zero
    asked.seconds = now_s - began_s
