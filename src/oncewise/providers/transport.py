"""The one door to a provider's host: an HTTP connection pool that posts JSON and gives back raw bytes.

Everything that could decide behind our back is off: retries, redirects, proxies and certificates named by the
environment, decompression (a small body may unpack to any size), and read timeouts, since a timeout per read begins
anew with every keep-alive comment. What the library raises is translated here.

Deliberately absent: what the bytes mean, when to give up on them, and which status is an error.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import ssl

    import httpx2

__all__ = ["ConnectTimedOut", "ConnectionLost", "HttpTransport", "MalformedHttp", "Reply", "Transport", "Unreachable"]

CONNECT_S = 5.0


class TransportError(Exception):
    """The exchange failed below HTTP's meaning."""


class Unreachable(TransportError):
    """No connection could be made; nothing was sent."""


class ConnectTimedOut(Unreachable):
    """No connection was made in time, or none of the pool came free."""


class ConnectionLost(TransportError):
    """The connection broke, or was closed by us."""


class MalformedHttp(TransportError):
    """The other side did not keep to HTTP: a body that ends too early, most often."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The head of a response, and its body as it comes.

    Attributes:
        headers: Names in lower case.
        body: The raw bytes, not decompressed; raises `ConnectionLost` or `MalformedHttp`.
    """

    status: int
    headers: Mapping[str, str]
    body: AsyncGenerator[bytes, None]

    @property
    def content_type(self) -> str:
        """The media type, in lower case, without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


class Transport(Protocol):
    """What an adapter needs of a provider's host."""

    def post(self, path: str, body: bytes) -> AbstractAsyncContextManager[Reply]:
        """Send one request with a JSON body; never repeats or redirects it.

        Leaving the context closes the connection unless the body was read to its end, in which case it is kept for
        the next request.

        Raises:
            TransportError: on entry or out of the body.
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

    Raises:
        ValueError: the URL is not https (or plain http to loopback), or a header cannot be sent. The message does not
            repeat the value.
    """

    def __init__(
        self, base_url: str, *, headers: Mapping[str, str], connections: int, connect_s: float = CONNECT_S
    ) -> None:
        import httpx2  # noqa: PLC0415  # 0.2 s of imports, which a server with the demo provider alone does not need

        check_base_url(base_url)
        check_headers(headers)
        try:
            self._base_url = str(httpx2.URL(base_url)).rstrip("/")
        except httpx2.InvalidURL:
            raise ValueError("The base URL is not a URL.") from None
        self._httpx2 = httpx2
        self._closed = False
        self._client = httpx2.AsyncClient(
            headers={"accept-encoding": "identity", "content-type": "application/json", **headers},
            timeout=httpx2.Timeout(None, connect=connect_s, pool=connect_s),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            follow_redirects=False,
            trust_env=False,
            verify=_tls(),
        )

    @asynccontextmanager
    async def post(self, path: str, body: bytes) -> AsyncIterator[Reply]:
        response = await self._send("POST", path, body)
        try:
            async with aclosing(self._body(response)) as pieces:
                yield Reply(response.status_code, dict(response.headers), pieces)
        finally:
            await response.aclose()

    async def status(self, path: str) -> int:
        response = await self._send("GET", path, None)
        await response.aclose()
        return int(response.status_code)

    async def aclose(self) -> None:
        self._closed = True
        await self._client.aclose()

    async def _send(self, method: str, path: str, body: bytes | None) -> "httpx2.Response":
        if self._closed:
            raise Unreachable
        request = self._client.build_request(method, f"{self._base_url}/{path}", content=body)
        try:
            return await self._client.send(request, stream=True)
        except (self._httpx2.HTTPError, self._httpx2.StreamError) as error:
            raise self._translated(error) from error

    async def _body(self, response: "httpx2.Response") -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(response.aiter_raw()) as pieces:
                async for piece in pieces:
                    yield piece
        except (self._httpx2.HTTPError, self._httpx2.StreamError) as error:
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> TransportError:
        httpx2 = self._httpx2
        if isinstance(error, httpx2.ConnectTimeout | httpx2.PoolTimeout):
            return ConnectTimedOut()
        if isinstance(error, httpx2.ConnectError | httpx2.UnsupportedProtocol):
            return Unreachable()
        return MalformedHttp() if isinstance(error, httpx2.ProtocolError) else ConnectionLost()


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
    if not host or any(character.isspace() or not character.isprintable() for character in base_url):
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


@cache
def _tls() -> "ssl.SSLContext":
    """One for all pools: reading the certificates takes 35 ms, for each of a dozen providers at every start."""
    import httpx2  # noqa: PLC0415  # see HttpTransport

    return httpx2.create_ssl_context(trust_env=False)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
