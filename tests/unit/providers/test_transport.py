"""What a provider may be configured with, and the pool of connections to it."""

import asyncio
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from typing import Any

import pytest
import trustme
import uvloop

from oncewise.providers.catalogue import CATALOGUE, Wire
from oncewise.providers.openai_compatible import OpenAICompatibleProvider
from oncewise.providers.transport import (
    ConnectionLost,
    ConnectTimedOut,
    HttpTransport,
    Transport,
    TransportError,
    Unreachable,
    check_base_url,
)
from oncewise.providers.trust import system_trust
from tests.support.raw_host import OK, RawHost

SECRET = "hunter2"


@pytest.mark.parametrize(
    "url",
    [
        "https://api.example.org/v1",
        "https://api.example.org:8443/v1/",
        "http://127.0.0.1:9100/v1",
        "http://127.8.9.10/v1",
        "http://localhost:11434/v1",
        "http://[::1]:9100/v1",
        *(entry.base_url for entry in CATALOGUE.values()),
    ],
)
def test_https_and_loopback_are_taken(url: str) -> None:
    """And with them everything the catalogue knows."""
    check_base_url(url)


@pytest.mark.parametrize(
    "url",
    [
        f"http://{SECRET}.example.org/v1",
        f"http://127.0.0.1.{SECRET}.org/v1",
        f"http://localhost.{SECRET}.org/v1",
        "http://10.0.0.1/v1",
        "http://0.0.0.0:9100/v1",
        f"https://user:{SECRET}@example.org/v1",
        f"https://example.org/v1?key={SECRET}",
        f"https://example.org/v1#{SECRET}",
        f"ftp://{SECRET}/v1",
        f"{SECRET}",
        "https://",
        f"https://exa mple.org/{SECRET}",
        f"https://example.org/\n{SECRET}",
        f"http://[::1/{SECRET}",
        f"https://example.org:port{SECRET}/",
        f"https://{'a' * 64}.{SECRET}.org/v1",
        f"https://xn--\u2603.{SECRET}/v1",
        f"https://example.org/{SECRET}/{'a' * 70_000}",
        "",
    ],
)
def test_everything_else_is_refused_without_repeating_it(url: str) -> None:
    """A key or a prompt in the clear, a password in a URL, or no URL at all."""
    with pytest.raises(ValueError, match="base URL") as caught:
        OpenAICompatibleProvider.connect("acme", url, None, concurrency=1)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("key", [f"{SECRET}\r\nx-evil: 1", f"{SECRET}é", f"{SECRET} ", f"{SECRET}\0"])
def test_a_key_that_no_header_can_carry_is_refused_without_repeating_it(key: str) -> None:
    """A line break would begin a header of its own; a trailing blank is a copying mistake."""
    with pytest.raises(ValueError, match="authorization") as caught:
        OpenAICompatibleProvider.connect("acme", "https://example.org/v1", key, concurrency=1)
    assert SECRET not in str(caught.value)


def test_certificates_are_verified() -> None:
    """By the pool's own context, whatever the environment says."""
    context = system_trust()
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED


def test_the_catalogue_names_what_the_contract_promises() -> None:
    """Every provider of API.md §7 that is called over a network, in its order, each with a model and a key rule."""
    expected = [
        "perplexity", "openai", "anthropic", "gemini", "openrouter", "kimi", "mistral", "groq", "deepseek", "xai",
        "ollama",
    ]  # fmt: skip
    assert list(CATALOGUE) == expected
    assert [name for name, entry in CATALOGUE.items() if entry.wire is not Wire.OPENAI] == ["anthropic", "gemini"]
    assert all(name == entry.name and entry.default_model for name, entry in CATALOGUE.items())
    assert [name for name, entry in CATALOGUE.items() if not entry.needs_key] == ["ollama"]


# -- the pool ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def pool(url: str, *, connections: int = 4, **options: Any) -> AsyncIterator[HttpTransport]:
    transport = HttpTransport(url, headers={"x-key": "k"}, connections=connections, **options)
    try:
        yield transport
    finally:
        await transport.aclose()


async def ask(transport: Transport, body: bytes = b"{}") -> bytes:
    """One request, its answer read to the end."""
    with closing(await transport.post("chat", body)) as reply:
        assert reply.status == 200
        parts = []
        while piece := await reply.read():
            parts.append(piece)
    return b"".join(parts)


async def test_a_request_says_what_it_should_and_no_more() -> None:
    """The host with its port, our fields, the body; and nothing that a library might add."""
    with RawHost() as host:
        async with pool(host.url + "/") as transport:
            assert await ask(transport, b'{"a":1}') == b"ok"
    head, body = host.requests[0]
    assert body == b'{"a":1}'
    assert head.decode().split("\r\n") == [
        "POST /v1/chat HTTP/1.1",
        f"host: 127.0.0.1:{host.port}",
        "accept-encoding: identity",
        "content-type: application/json",
        "x-key: k",
        "content-length: 7",
    ]


async def test_a_path_is_sent_as_http_wants_it() -> None:
    """What is escaped stays so, what is not gets it; a host in other letters becomes its ASCII name."""
    with RawHost() as host:
        async with pool(host.url + "/a%2Fb/\u00e9") as transport:
            await ask(transport)
    assert host.requests[0][0].startswith(b"POST /v1/a%2Fb/%C3%A9/chat HTTP/1.1\r\n")
    async with pool("https://b\u00fccher.example.org:8443/v1") as transport:
        assert "host: xn--bcher-kva.example.org:8443\r\n" in transport._fields


async def test_connections_are_used_again_and_never_above_their_number() -> None:
    """Twenty requests over four; then one at a time over one."""
    with RawHost() as host:
        async with pool(host.url) as transport:
            await asyncio.gather(*(ask(transport) for _ in range(20)))
            assert host.accepted <= 4
            before = host.accepted
            for _ in range(3):
                await ask(transport)
            assert host.accepted == before


async def test_what_waits_too_long_for_a_connection_is_told() -> None:
    """And whoever gave up waiting takes none from the others."""
    with RawHost() as host:
        async with pool(host.url, connections=1, connect_s=0.1) as transport:
            with closing(await transport.post("chat", b"{}")):
                with pytest.raises(ConnectTimedOut):
                    await ask(transport)
                waiting = asyncio.create_task(ask(transport))
                await asyncio.sleep(0.01)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
            assert await ask(transport) == b"ok"


async def test_no_request_is_sent_where_the_other_side_has_closed() -> None:
    """Although the event loop had no time to hear of it: it would fail, and repeating it might not be safe."""
    with RawHost() as host:
        async with pool(host.url) as transport:
            await ask(transport)
            host.hang_up()
            time.sleep(0.05)  # noqa: ASYNC251  the loop must not run
            assert await ask(transport) == b"ok"
    assert (host.accepted, len(host.requests)) == (2, 2)


async def test_a_connection_that_breaks_under_a_request_is_an_error_and_not_tried_again() -> None:
    """The provider may have done what it was asked, and be paid for it."""

    def reset(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    with RawHost() as host:
        async with pool(host.url) as transport:
            await ask(transport)
            host.answer = reset
            with pytest.raises(ConnectionLost):
                await ask(transport)
            assert len(host.requests) == 2
            host.answer = OK
            assert await ask(transport) == b"ok"


async def test_leaving_early_closes_the_connection() -> None:
    """By leaving the block or by a cancellation, in the head or in the body."""
    for answer in (
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nx",
    ):
        with RawHost(answer) as host:
            async with pool(host.url, connections=1) as transport:
                reading = asyncio.create_task(ask(transport))
                while not host.requests:
                    await asyncio.sleep(0.005)
                await asyncio.sleep(0.02)
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
                host.answer = OK
                with closing(await transport.post("chat", b"{}")):
                    pass
                assert await ask(transport) == b"ok"
    assert host.accepted >= 2


async def test_closing_a_reply_again_does_nothing() -> None:
    """Not even when its connection is used for another by then."""
    with RawHost() as host:
        async with pool(host.url, connections=1) as transport:
            first = await transport.post("chat", b"{}")
            assert await first.read() == b"ok"
            first.close()
            host.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nha"
            second = await transport.post("chat", b"{}")
            first.close()
            assert transport.connections == 1
            assert await second.read() == b"ha"
            second.close()
            second.close()
            host.answer = OK
            assert await asyncio.gather(ask(transport), ask(transport)) == [b"ok", b"ok"]
            assert transport.connections == 1


async def test_large_bodies_pass_both_ways() -> None:
    """16 MiB up, 16 MiB down, whole."""
    large = bytes(range(256)) * (1 << 16)
    with RawHost(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(large), large)) as host:
        async with pool(host.url) as transport:
            assert await ask(transport, large) == large
    assert host.requests[0][1] == large


async def test_a_provider_that_sends_more_than_is_read_has_to_wait() -> None:
    """Of 256 MiB that nobody reads, the socket buffers and a little more were sent."""
    sent = 0

    def flood(connection: socket.socket) -> None:
        nonlocal sent
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 268435456\r\n\r\n")
        connection.settimeout(0.2)
        while sent < 1 << 28:
            sent += connection.send(b"x" * (1 << 20))

    with RawHost(flood) as host:
        async with pool(host.url) as transport:
            with closing(await transport.post("chat", b"{}")) as reply:
                await asyncio.sleep(0.3)
                stalled = sent
                await asyncio.sleep(0.1)
                assert stalled == sent < 1 << 26
                assert await reply.read()


async def test_idle_connections_are_closed_in_the_end() -> None:
    """A crowd needed four; after a while nothing is left of them, and the next request makes its own."""
    with RawHost() as host:
        async with pool(host.url, keep_s=0.1) as transport:
            await asyncio.gather(*(ask(transport) for _ in range(4)))
            assert transport.connections > 0
            await asyncio.sleep(0.3)
            assert transport.connections == 0
            before = host.accepted
            assert await ask(transport) == b"ok"
            assert host.accepted == before + 1


async def test_what_the_other_side_closes_is_forgotten() -> None:
    """The pool holds no dead connections."""
    with RawHost() as host:
        async with pool(host.url) as transport:
            await ask(transport)
            assert transport.connections == 1
            host.hang_up()
            await asyncio.sleep(0.05)
            assert transport.connections == 0


async def test_closing_ends_what_runs_and_what_waits() -> None:
    """Each with an error, and nothing new is taken on."""
    with RawHost(b"") as host:
        async with pool(host.url, connections=1) as transport:
            running = asyncio.create_task(ask(transport))
            waiting = asyncio.create_task(ask(transport))
            while not host.requests:
                await asyncio.sleep(0.005)
            await transport.aclose()
            errors = await asyncio.gather(running, waiting, return_exceptions=True)
            assert [type(error) for error in errors] == [ConnectionLost, Unreachable]
            with pytest.raises(Unreachable):
                await ask(transport)
            assert transport.connections == 0


async def test_closing_while_it_connects_leaves_no_connection() -> None:
    """The connection that comes too late is not used."""
    with RawHost() as host:
        async with pool(host.url) as transport:
            asking = asyncio.create_task(ask(transport))
            await asyncio.sleep(0)
            await transport.aclose()
            with pytest.raises(TransportError):
                await asking
            assert transport.connections == 0
    assert not host.requests


async def test_a_host_that_does_not_answer_is_a_timeout() -> None:
    """Of connecting: its queue of connections is full."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with filled(full):
            async with pool(f"http://127.0.0.1:{full.getsockname()[1]}", connect_s=0.1) as transport:
                with pytest.raises(ConnectTimedOut):
                    await ask(transport)


async def test_ipv6_is_spoken_and_written_in_brackets() -> None:
    """Where the address of a host is one."""
    with RawHost(family=socket.AF_INET6) as host:
        async with pool(host.url) as transport:
            assert await ask(transport) == b"ok"
    assert f"host: [::1]:{host.port}".encode() in host.requests[0][0]


async def test_an_address_that_does_not_answer_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may have several; the second is tried beside the first when that has been silent for a quarter second."""
    with socket.socket() as full, RawHost() as host:
        full.bind(("127.0.0.2", host.port))
        full.listen(0)
        with filled(full):
            addresses = [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, host.port))
                for address in ("127.0.0.2", "127.0.0.1")
            ]
            # The resolver of this machine, whose names have one address each.
            monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolving_to(addresses))
            async with pool(host.url, connect_s=2) as transport:
                assert await ask(transport) == b"ok"


def resolving_to(addresses: list[Any]) -> Callable[..., Awaitable[list[Any]]]:
    async def getaddrinfo(*_args: object, **_options: object) -> list[Any]:
        return addresses

    return getaddrinfo


@contextmanager
def filled(listener: socket.socket) -> Iterator[None]:
    """A listener whose queue is full, so that connecting to it is neither accepted nor refused."""
    fillers = [socket.socket() for _ in range(4)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(listener.getsockname())
    yield
    for filler in fillers:
        filler.close()


# -- TLS ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def secure(authority: trustme.CA) -> Iterator[RawHost]:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(tls)
    with RawHost(tls=tls) as host:
        yield host


async def test_tls_with_a_trusted_certificate(authority: trustme.CA, secure: RawHost) -> None:
    """Connections are kept, and a stale one is noticed, as without TLS."""
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with pool(secure.url, tls=trusting) as transport:
        assert await ask(transport) == b"ok"
        assert await ask(transport) == b"ok"
        assert secure.accepted == 1
        secure.hang_up()
        time.sleep(0.05)  # noqa: ASYNC251  the loop must not run
        assert await ask(transport) == b"ok"
        assert (secure.accepted, len(secure.requests)) == (2, 3)


async def test_nothing_is_sent_to_a_host_that_is_not_trusted(authority: trustme.CA, secure: RawHost) -> None:
    """A certificate of an unknown authority, or for another name; and the same where the environment trusts it."""
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    for url, tls in ((secure.url, None), (secure.url.replace("localhost", "127.0.0.1"), trusting)):
        async with pool(url, tls=tls) as transport:
            with pytest.raises(Unreachable):
                await ask(transport)
    assert (secure.accepted, secure.requests) == (2, [])


async def test_tls_with_a_host_that_speaks_none() -> None:
    """An error, not a wait."""
    with RawHost(b"") as host:
        async with pool(host.url.replace("http:", "https:"), connect_s=1) as transport:
            with pytest.raises(Unreachable):
                await ask(transport)
    assert not host.requests


# -- the server's event loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "test",
    [
        test_connections_are_used_again_and_never_above_their_number,
        test_no_request_is_sent_where_the_other_side_has_closed,
        test_a_connection_that_breaks_under_a_request_is_an_error_and_not_tried_again,
        test_leaving_early_closes_the_connection,
        test_large_bodies_pass_both_ways,
        test_a_provider_that_sends_more_than_is_read_has_to_wait,
        test_idle_connections_are_closed_in_the_end,
        test_what_the_other_side_closes_is_forgotten,
        test_closing_ends_what_runs_and_what_waits,
        test_closing_while_it_connects_leaves_no_connection,
        test_a_host_that_does_not_answer_is_a_timeout,
    ],
)
def test_the_same_on_uvloop(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """The server runs on it, and programs that embed us often do not."""
    uvloop.run(asyncio.wait_for(test(), 20))


def test_tls_on_uvloop(authority: trustme.CA, secure: RawHost) -> None:
    """It has a TLS of its own."""
    uvloop.run(test_tls_with_a_trusted_certificate(authority, secure))


def test_trust_on_uvloop(authority: trustme.CA, secure: RawHost) -> None:
    """Nothing is sent to a host that is not trusted."""
    uvloop.run(test_nothing_is_sent_to_a_host_that_is_not_trusted(authority, secure))
