"""The one door to a provider's host: a pool of HTTP connections that post JSON and give back raw bytes.

Nothing decides behind our back: there are no retries, redirects or cookies, no proxies or certificates named by the
environment, no decompression (a small body may unpack to any size), and no read timeouts, since a timeout per read
begins anew with every keep-alive comment.

The client is ours because the well-kept ones cost more than all the rest of a call
([decision 18](docs/decisions/0018-own-http-client.md)).

Deliberately absent: what the bytes mean, when to give up on them, and which status is an error.
"""

import asyncio
import socket
import ssl
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from ipaddress import ip_address
from typing import Protocol
from urllib.parse import SplitResult, quote, urlsplit

from aiohappyeyeballs import start_connection

from oncewise.providers.http1 import ClientConnection, ConnectionLost, MalformedHttp, Reply, TransportError
from oncewise.providers.trust import system_trust

__all__ = [
    "ConnectTimedOut",
    "ConnectionLost",
    "HttpTransport",
    "MalformedHttp",
    "Reply",
    "Transport",
    "TransportError",
    "Unreachable",
]

CONNECT_S = 5.0
KEEP_S = 60.0
NEXT_ADDRESS_S = 0.25
"""After which the next address of a host is tried beside the first, as RFC 8305 says."""
MAX_URL_CHARS = 2048

_FIELDS = {"accept-encoding": "identity", "content-type": "application/json"}
_IN_PATHS = "/%:@!$&'()*+,;=~"


class Unreachable(TransportError):
    """No connection could be made; nothing was sent."""


class ConnectTimedOut(Unreachable):
    """No connection was made in time, or none of the pool came free."""


class Transport(Protocol):
    """What an adapter needs of a provider's host."""

    async def post(self, path: str, body: bytes) -> Reply:
        """Send one request with a JSON body, and wait for the head of its response; never repeats or redirects it.

        Raises:
            TransportError: there was none. Reading the reply raises it too.
        """
        ...

    async def status(self, path: str) -> int:
        """Ask for `path` with GET; the status of the answer, whose body is not read.

        Raises:
            TransportError: there was none.
        """
        ...

    async def aclose(self) -> None:
        """Close all connections; requests that still run fail."""
        ...


class HttpTransport:
    """A pool of connections to one provider. Belongs to the event loop that first uses it.

    Args:
        headers: Sent with every request.
        connections: How many there may be at a time.
        connect_s: Seconds until one of the pool comes free, and then until a new one stands.
        keep_s: Seconds for which an idle connection is kept.
        tls: How to judge the provider's certificate; if not given, by what this machine trusts.

    Raises:
        ValueError: the URL is not https (or plain http to loopback), or a header cannot be sent. The message does not
            repeat the value.
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str],
        connections: int,
        connect_s: float = CONNECT_S,
        keep_s: float = KEEP_S,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        check_base_url(base_url)
        check_headers(headers)
        url = urlsplit(base_url)
        secure = url.scheme == "https"
        self._host = (url.hostname or "").encode("idna").decode("ascii")
        self._port = url.port or (443 if secure else 80)
        self._tls = (tls or system_trust()) if secure else None
        self._path = quote(url.path.rstrip("/"), safe=_IN_PATHS)
        self._fields = _lines({"host": _authority(self._host, url), **_FIELDS, **headers})
        self._connect_s = connect_s
        self._keep_s = keep_s
        self._turns = asyncio.Semaphore(connections)
        self._busy: dict[ClientConnection, object] = {}  # and the exchange that it is used for
        self._idle: dict[ClientConnection, float] = {}  # and since when; the longest idle first
        self._reaper: asyncio.TimerHandle | None = None
        self._closed = False

    async def post(self, path: str, body: bytes) -> Reply:
        return await self._ask("POST", path, body)

    async def status(self, path: str) -> int:
        with closing(await self._ask("GET", path, b"")) as reply:
            return reply.status

    async def _ask(self, method: str, path: str, body: bytes) -> Reply:
        length = f"content-length: {len(body)}\r\n" if body else ""
        head = f"{method} {self._path}/{path} HTTP/1.1\r\n{self._fields}{length}\r\n"
        connection, exchange = await self._connection(), object()
        self._busy[connection] = exchange
        try:
            return await connection.ask(head.encode("ascii"), body, partial(self._end, connection, exchange))
        except BaseException:
            self._end(connection, exchange)
            raise

    def _end(self, connection: ClientConnection, exchange: object) -> None:
        # Closed a second time, a reply must not end the exchange that follows its own on the same connection.
        if self._busy.get(connection) is exchange:
            del self._busy[connection]
            self._keep(connection)
            self._turns.release()

    async def aclose(self) -> None:
        self._closed = True
        if self._reaper is not None:
            self._reaper.cancel()
        for connection in (*self._busy, *self._idle):
            connection.abort()
        await asyncio.sleep(0)  # the event loop closes sockets in its next round

    async def _connection(self) -> ClientConnection:
        """A connection for one exchange, idle or new."""
        await self._turn()
        try:
            return self._take_idle() or await self._connect()
        except BaseException:
            self._turns.release()
            raise

    async def _turn(self) -> None:
        if not self._turns.locked():
            await self._turns.acquire()  # at once
            return
        try:
            async with asyncio.timeout(self._connect_s):
                await self._turns.acquire()
        except TimeoutError:
            raise ConnectTimedOut from None

    # -- connections ---------------------------------------------------------------------------------------------

    @property
    def connections(self) -> int:
        """How many stand now."""
        return len(self._busy) + len(self._idle)

    async def _connect(self) -> ClientConnection:
        try:
            async with asyncio.timeout(self._connect_s):
                connection = await self._connected()
        except TimeoutError:
            raise ConnectTimedOut from None
        except (OSError, RuntimeError) as error:  # uvloop has both for a connection that fails
            raise Unreachable from error
        if self._closed:
            connection.abort()
            raise Unreachable
        return connection

    async def _connected(self) -> ClientConnection:
        if self._closed:
            raise Unreachable
        loop = asyncio.get_running_loop()
        addresses = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        made = await start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_S)
        try:
            _, connection = await loop.create_connection(
                lambda: ClientConnection(self._lost),
                sock=made,
                ssl=self._tls,
                server_hostname=self._host if self._tls else None,
            )
        except BaseException:
            made.close()
            raise
        return connection

    def _take_idle(self) -> ClientConnection | None:
        while self._idle:
            connection, _ = self._idle.popitem()
            if not connection.is_stale():
                return connection
            connection.abort()
        return None

    def _keep(self, connection: ClientConnection) -> None:
        if self._closed or not connection.reusable:
            connection.abort()
            return
        loop = asyncio.get_running_loop()
        self._idle[connection] = loop.time()
        if self._reaper is None:
            self._reaper = loop.call_later(self._keep_s, self._reap)

    def _reap(self) -> None:
        """Close what nobody used for long: a crowd may have needed many more connections than are needed now."""
        loop = asyncio.get_running_loop()
        self._reaper = None
        for connection, since_s in [*self._idle.items()]:
            if since_s + self._keep_s > loop.time():
                self._reaper = loop.call_at(since_s + self._keep_s, self._reap)
                return
            self._lost(connection)
            connection.abort()

    def _lost(self, connection: ClientConnection) -> None:
        self._idle.pop(connection, None)


def check_base_url(base_url: str) -> None:
    """Refuse a URL that would send keys and prompts in the clear, or that is no base.

    Raises:
        ValueError: says what is wrong without repeating the URL, which may hold a password.
    """
    try:
        url = urlsplit(base_url)
        host, _ = url.hostname, url.port
        (host or "").encode("idna")  # what the resolver does, whose UnicodeError would come at the first call
    except ValueError:
        raise ValueError("The base URL is not a URL.") from None
    if (
        not host
        or len(base_url) > MAX_URL_CHARS
        or any(character.isspace() or not character.isprintable() for character in base_url)
    ):
        raise ValueError("The base URL is not a URL.")
    if url.username is not None or url.password is not None or url.query or url.fragment:
        raise ValueError("The base URL must not have a user, a password, a query or a fragment.")
    if url.scheme != "https" and not (url.scheme == "http" and _is_loopback(host)):
        raise ValueError("The base URL must be https; plain http is for loopback only.")


def check_headers(headers: Mapping[str, str]) -> None:
    """Refuse values that HTTP cannot carry; a line break in a key would be a header of its own.

    Raises:
        ValueError: names the header, not its value.
    """
    for name, value in headers.items():
        if not (value.isascii() and value.isprintable()) or value != value.strip():
            raise ValueError(f"The value for the {name} header has characters that no header may have.")


def _authority(host: str, url: SplitResult) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if url.port is None else f"{name}:{url.port}"


def _lines(fields: Mapping[str, str]) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in fields.items())


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
