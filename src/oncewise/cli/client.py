"""An HTTP/1.1 client small and quick enough to measure a server with: keep-alive, chunked bodies, Server-Sent Events.

A load program must cost less than what it measures; the usual clients cost ten times a request of this one. A
`Connection` carries one request at a time, as a connection of a browser or of a load program does, and retries nothing:
whatever the server does wrong is seen.

Deliberately absent: redirects, cookies, compression, proxies, HTTP/2, and any state beyond the connection.
"""

import asyncio
import json
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from oncewise.cli.failure import CommandFailed

__all__ = ["BrokenAnswer", "Connection", "Event", "NoAnswer", "NoServer", "Reply", "Server", "read_events"]

MAX_LINE_BYTES = 4 * 1024 * 1024
NO_BODY = frozenset({204, 304})
_HOST = re.compile(r"[^\s/?#@\\]+")


class BrokenAnswer(CommandFailed):
    """The server's bytes are not an HTTP answer, or end too early."""


class NoServer(CommandFailed):
    """Nobody listens there."""


class NoAnswer(CommandFailed):
    """Somebody listens there and does not answer in time."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go.

    Attributes:
        headers: Sent with every request, e.g. the tenant's.
    """

    host: str
    port: int
    tls: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def at(cls, url: str, headers: Mapping[str, str] | None = None) -> Self:
        """The server of a URL such as `http://127.0.0.1:8000`; its path is ignored.

        Raises:
            ValueError: the URL has no http or https host, or no possible port.
        """
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in {"http", "https"} or not parts.hostname or not _HOST.fullmatch(parts.hostname):
            raise ValueError("must be a URL such as http://127.0.0.1:8000")
        tls = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls, dict(headers or {}))

    @property
    def url(self) -> str:
        """The base URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"

    async def fetch(self, method: str, path: str, body: object = None, *, timeout_s: float = 30.0) -> "Reply":
        """One request on a connection of its own, with its body read.

        Raises:
            NoServer: no connection.
            OSError: the connection broke.
            BrokenAnswer: no valid answer.
            NoAnswer: none within `timeout_s` seconds.
        """
        try:
            async with asyncio.timeout(timeout_s), Connection(self) as connection:
                return await connection.fetch(method, path, body)
        except TimeoutError:
            raise NoAnswer(f"{self.url} did not answer within {timeout_s:g} s") from None


@dataclass(slots=True)
class Reply:
    """An answer. Header names are lower case; `body` is filled once it was read."""

    status: int
    headers: dict[str, str]
    body: bytes = b""

    def json(self) -> Any:
        """The body as JSON.

        Raises:
            BrokenAnswer: it is none.
        """
        try:
            return json.loads(self.body)
        except ValueError:
            raise BrokenAnswer("the body is not JSON") from None


@dataclass(frozen=True, slots=True)
class Event:
    """One Server-Sent Event."""

    name: str
    data: str
    id: str | None = None


class Connection:
    """One connection, opened with the first request and again after the server closed it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connection, also in the middle of an answer."""
        if self._streams:
            self._streams[1].close()
        self._streams = None

    async def fetch(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """Send one request and read the whole answer; errors as in `Server.fetch`."""
        async with self.stream(method, path, body, headers) as (reply, chunks):
            reply.body = b"".join([chunk async for chunk in chunks])
        return reply

    @asynccontextmanager
    async def stream(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[tuple[Reply, AsyncGenerator[bytes, None]], None]:
        """Send one request; yield the head of the answer and its body, piece by piece as it comes.

        A body that was not read to its end closes the connection: what is left of it must not be taken for the next
        answer.
        """
        reader, writer = self._streams = self._streams or await self._open()
        done = False
        try:
            writer.write(self._request(method, path, body, headers or {}))
            reply = await _read_head(reader)
            body_end = _BodyEnd()
            yield reply, _read_body(reader, reply, body_end)
            done = body_end.reached and reply.headers.get("connection", "").lower() != "close"
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
            raise BrokenAnswer("the answer ended early or is not HTTP") from error
        finally:
            if not done:
                self.close()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        server = self._server
        tls = ssl.create_default_context() if server.tls else None
        try:
            return await asyncio.open_connection(server.host, server.port, ssl=tls, limit=MAX_LINE_BYTES)
        except OSError as error:
            raise NoServer(f"no server at {server.url}; `oncewise serve --demo` starts one") from error

    def _request(self, method: str, path: str, body: object, headers: Mapping[str, str]) -> bytes:
        server = self._server
        payload = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        host = server.url.partition("://")[2]
        fields = {"host": host, "content-length": str(len(payload)), **server.headers, **headers}
        if body is not None:
            fields.setdefault("content-type", "application/json")
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + payload


async def read_events(chunks: AsyncIterator[bytes]) -> AsyncGenerator[Event, None]:
    """The events of a body, as the WHATWG standard reads them; comments and blocks without data are skipped."""
    rest = b""
    name, data, last_id = "", list[str](), None
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            text = line.removesuffix(b"\r").decode()
            field_name, _, value = text.partition(":")
            value = value.removeprefix(" ")
            if not text:
                if data:
                    yield Event(name or "message", "\n".join(data), last_id)
                name, data = "", []
            elif field_name == "event":
                name = value
            elif field_name == "data":
                data.append(value)
            elif field_name == "id":
                last_id = value


# -- HTTP/1.1 ----------------------------------------------------------------------------------------------------


class _BodyEnd:
    """Whether a body was read to its end."""

    reached = False


async def _read_head(reader: asyncio.StreamReader) -> Reply:
    while True:
        status_line, *lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin-1").split("\r\n")
        version, status, *_ = status_line.split(" ", 2)
        if not version.startswith("HTTP/1."):
            raise BrokenAnswer("the answer is not HTTP/1.1")
        if not status.startswith("1"):
            break
    pairs = (line.partition(":") for line in lines)
    return Reply(int(status), {name.strip().lower(): value.strip() for name, _, value in pairs})


async def _read_body(reader: asyncio.StreamReader, reply: Reply, end: _BodyEnd) -> AsyncGenerator[bytes, None]:
    if reply.headers.get("transfer-encoding", "").lower() == "chunked":
        async for chunk in _read_chunks(reader):
            yield chunk
    elif "content-length" in reply.headers or reply.status in NO_BODY:
        size = int(reply.headers.get("content-length", "0"))
        if size and reply.status not in NO_BODY:
            yield await reader.readexactly(size)
    else:
        reply.headers["connection"] = "close"
        while chunk := await reader.read(65_536):
            yield chunk
    end.reached = True


async def _read_chunks(reader: asyncio.StreamReader) -> AsyncGenerator[bytes, None]:
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass
