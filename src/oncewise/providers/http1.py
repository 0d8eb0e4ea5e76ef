"""One HTTP/1.1 connection to a provider, as its client: requests one after the other, raw bytes back.

llhttp (the parser of Node.js) finds where a response begins and ends, and is strict about it. What is left is to hand
its bytes on, to stop reading while nobody takes them, and to tell a whole response from one that merely stopped.

Deliberately absent: timers, retries, redirects, cookies, proxies and decompression, none of which a connection should
decide; and which connection a request is sent on (`oncewise.providers.transport`).
"""

import asyncio
import select
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import httptools

__all__ = ["ClientConnection", "ConnectionLost", "MalformedHttp", "Reply", "TransportError"]

MAX_UNSPENT_BYTES = 64 << 10
"""What may come without any of it being body: a head, most often."""
MAX_HELD_BYTES = 256 << 10
"""What may wait to be read; above it the provider has to wait."""


class TransportError(Exception):
    """The exchange failed below HTTP's meaning."""


class ConnectionLost(TransportError):
    """The connection broke, or was closed by us."""


class MalformedHttp(TransportError):
    """The other side did not keep to HTTP: a body that ends too early, most often."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The head of a response, and its body as it comes. To be closed, by `contextlib.closing` most often.

    Attributes:
        headers: Names in lower case; the values of a repeated field are joined by commas.
        read: Gives the next piece of the body, raw and not decompressed, or nothing at its end. Raises
            `ConnectionLost` or `MalformedHttp`, after the pieces that came before.
        close: Ends the exchange. The connection is kept for the next one if the response has come to its end, else
            it is closed. Closing again does nothing.
    """

    status: int
    headers: Mapping[str, str]
    read: Callable[[], Awaitable[bytes]]
    close: Callable[[], None]

    @property
    def content_type(self) -> str:
        """The media type, in lower case, without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


class ClientConnection(asyncio.Protocol):
    """A connection and the exchange on it. Made by `loop.create_connection`; one task at a time uses it.

    Args:
        when_lost: Called once when the connection is closed, by whomever.
    """

    _transport: asyncio.Transport

    def __init__(self, when_lost: "Callable[[ClientConnection], None]") -> None:
        self._when_lost = when_lost
        self._loop = asyncio.get_running_loop()
        self._readable = select.poll()
        self._parser: httptools.HttpResponseParser | None = None
        self._news: asyncio.Future[None] | None = None
        self._eof = False
        self._begin()

    def _begin(self) -> None:
        """Forget the last exchange."""
        self._status = 0  # until the head is complete
        self._headers: dict[str, str] = {}
        self._pieces: list[bytes] = []
        self._held_bytes = 0
        self._unspent_bytes = 0
        self._is_paused = False
        self._is_whole = False
        self._stays_open = False
        self._failure: type[TransportError] | None = None

    # -- for the pool --------------------------------------------------------------------------------------------

    async def ask(self, head: bytes, body: bytes, close: Callable[[], None] = lambda: None) -> Reply:
        """Send a request; return when the head of its response is there.

        Args:
            head: The request's, with its blank line.
            body: The request's.
            close: What the reply is to be closed by.

        Raises:
            ConnectionLost, MalformedHttp: there is none. The connection is of no use any more.
        """
        if self._transport.is_closing():
            raise ConnectionLost
        self._begin()
        self._parser = httptools.HttpResponseParser(self)
        self._transport.writelines((head, body))
        while not self._status:
            await self._progress()
        return Reply(self._status, self._headers, self._read, close)

    @property
    def reusable(self) -> bool:
        """Whether another request may follow: this response came to its end, and so did what we sent."""
        left = self._is_paused or self._transport.get_write_buffer_size() or self._transport.is_closing()
        return self._is_whole and self._stays_open and not left

    def is_stale(self) -> bool:
        """Whether an idle connection was closed by the other side, or sent something unasked.

        The kernel knows before the event loop tells. A request that is not sent on such a connection needs no retry,
        which nobody could be sure is safe.
        """
        return self._transport.is_closing() or bool(self._readable.poll(0))

    def abort(self) -> None:
        """Close now; a response that is being read breaks off."""
        self._fail(ConnectionLost)

    # -- the response --------------------------------------------------------------------------------------------

    async def _read(self) -> bytes:
        while not self._pieces and not self._is_whole:
            await self._progress()
        piece = b"".join(self._pieces)
        self._pieces.clear()
        self._held_bytes = 0
        if self._is_paused and not self._transport.is_closing():
            self._is_paused = False
            self._transport.resume_reading()
        return piece

    async def _progress(self) -> None:
        """Wait until something came."""
        if self._failure is not None:
            raise self._failure
        self._news = self._loop.create_future()
        try:
            await self._news
        finally:
            self._news = None

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def _fail(self, failure: type[TransportError]) -> None:
        if not self._is_whole and self._failure is None:
            self._failure = failure
        self._transport.abort()
        self._wake()

    # -- what the event loop tells -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a stream is asked for
        self._transport = transport
        self._readable.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            self._fail(MalformedHttp)  # nothing was asked
            return
        self._unspent_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail(MalformedHttp)
        if self._unspent_bytes > MAX_UNSPENT_BYTES:
            self._fail(MalformedHttp)
        self._wake()

    def eof_received(self) -> None:
        self._eof = True  # and the transport closes itself

    def connection_lost(self, exc: Exception | None) -> None:
        ended = self._eof and exc is None
        if ended and self._status and not self._says_its_end():
            self._is_whole = True
        self._fail(MalformedHttp if ended and self._status else ConnectionLost)
        self._when_lost(self)

    def _says_its_end(self) -> bool:
        return "content-length" in self._headers or "chunked" in self._headers.get("transfer-encoding", "").lower()

    # -- what the parser tells -----------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._is_whole:
            raise httptools.HttpParserError  # more than was asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._status:  # a trailer comes here too
            key, text = name.decode("latin-1").lower(), value.decode("latin-1")
            self._headers[key] = f"{self._headers[key]}, {text}" if key in self._headers else text

    def on_headers_complete(self) -> None:
        assert self._parser is not None  # noqa: S101  it is calling
        status = self._parser.get_status_code()
        if status < 200:
            self._headers.clear()  # 100 Continue and its like: the response is still to come
        else:
            self._status = status

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._unspent_bytes = 0
        self._held_bytes += len(body)
        if self._held_bytes > MAX_HELD_BYTES and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        assert self._parser is not None  # noqa: S101  it is calling
        if self._status:
            self._is_whole = True
            self._stays_open = self._parser.should_keep_alive()
