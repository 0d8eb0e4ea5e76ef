"""A host that answers with bytes, from threads of its own: it goes on while the loop of a test stands still."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Self

__all__ = ["OK", "RawHost", "Request"]

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

Request = tuple[bytes, bytes]
"""Head and body."""
Answer = bytes | Callable[[socket.socket], None]


class RawHost:
    """Listens on loopback until the end of its `with` block.

    Args:
        answer: What every request is answered with: bytes, or something that is called with the connection.
        tls: Speaks TLS with this.

    Attributes:
        requests: What came, in order.
        accepted: Connections so far; those whose TLS handshake failed are counted too.
    """

    def __init__(self, answer: Answer = OK, *, family: int = socket.AF_INET, tls: ssl.SSLContext | None = None) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.accepted = 0
        self._tls = tls
        self._open: list[socket.socket] = []
        self._listener = socket.socket(family)
        self._listener.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        self._listener.listen(128)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)

    @property
    def url(self) -> str:
        """A base URL."""
        host = "[::1]" if self._listener.family == socket.AF_INET6 else "127.0.0.1"
        return f"http{'s' if self._tls else ''}://{'localhost' if self._tls else host}:{self.port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()
        self._thread.join(5)

    def hang_up(self) -> None:
        """Close every connection."""
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.accepted += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            self._open.append(connection)
            while (request := _read(connection)) is not None:
                self.requests.append(request)
                if callable(self.answer):
                    self.answer(connection)
                else:
                    connection.sendall(self.answer)
        connection.close()


def _read(connection: socket.socket) -> Request | None:
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65_536)
        if not more:
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
    parts, received = [body], len(body)
    while received < length:
        parts.append(connection.recv(1 << 20))
        received += len(parts[-1])
    return head, b"".join(parts)
