"""What the server lends a request: the ways past the ASGI interface, over a real socket."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import uvicorn

from oncewise.api.limits import Limits
from oncewise.api.presence import CONNECTION, Connection
from oncewise.api.server import GuardedProtocol
from oncewise.api.sockets import listen

Answer = Callable[[dict, Connection, Callable, Callable], Awaitable[None]]


class Asked:
    """An ASGI application that does what a test says, and remembers what came of it."""

    limits = Limits()

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.sent: list[bool] = []

    async def __call__(self, scope, receive, send) -> None:
        await self.answer(scope, scope["extensions"][CONNECTION], receive, send)


@asynccontextmanager
async def served(
    answer: Answer, *, keep_s: int = 5
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a server with such an application."""
    sockets = listen("127.0.0.1", 0)
    config = uvicorn.Config(
        Asked(answer), http=GuardedProtocol, log_config=None, lifespan="off", ws="none", timeout_keep_alive=keep_s
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve(sockets))
    while not server.started:
        await asyncio.sleep(0.005)
    reader, writer = await asyncio.open_connection(*sockets[0].getsockname()[:2])
    yield reader, writer
    writer.close()
    server.should_exit = True
    await running


async def through_asgi(send, headers, body: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def request(method: str = "GET", body: bytes = b"", *fields: str) -> bytes:
    lines = "".join(f"{field}\r\n" for field in ("host: localhost", f"content-length: {len(body)}", *fields))
    return f"{method} / HTTP/1.1\r\n{lines}\r\n".encode() + body


def length(body: bytes) -> tuple[bytes, bytes]:
    return b"content-length", b"%d" % len(body)


async def test_a_whole_answer_goes_out_in_one_piece() -> None:
    """And the connection serves the next request, and the one after it."""

    async def answer(scope, connection, receive, send) -> None:
        assert connection.answer(scope, 200, [(b"x-a", b"1"), length(b"yes")], b"yes")

    async with served(answer) as (reader, writer):
        for _ in range(3):
            writer.write(request())
            piece = await reader.read(65_536)
            assert piece.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"\r\nx-a: 1\r\ncontent-length: 3\r\n" in piece
            assert piece.endswith(b"\r\n\r\nyes")


async def test_an_idle_connection_is_closed_after_such_an_answer_too() -> None:
    """As after any other."""

    async def answer(scope, connection, receive, send) -> None:
        assert connection.answer(scope, 200, [length(b"yes")], b"yes")

    async with served(answer, keep_s=0) as (reader, writer):
        writer.write(request())
        assert (await asyncio.wait_for(reader.read(), 5)).endswith(b"yes")


@pytest.mark.parametrize("break_", [b"\r\n", b"\n", b"\r"])
@pytest.mark.parametrize("place", [0, 1])
async def test_a_line_break_in_a_header_is_not_sent(break_: bytes, place: int) -> None:
    """It would be a header of somebody else's making."""
    evil = b"a" + break_ + b"evil: 1"
    refused: list[bool] = []

    async def answer(scope, connection, receive, send) -> None:
        field = (evil, b"b") if place == 0 else (b"b", evil)
        with pytest.raises(ValueError, match="line break"):
            connection.answer(scope, 200, [field, length(b"")], b"")
        refused.append(True)
        await through_asgi(send, [length(b"")], b"")

    async with served(answer) as (reader, writer):
        writer.write(request())
        piece = await reader.read(65_536)
    assert refused == [True]
    assert b"evil" not in piece


@pytest.mark.parametrize(
    ("asked", "fields"),
    [
        (request("HEAD"), []),
        (request("GET", b"", "connection: close"), []),
        (request(), [(b"connection", b"close")]),
        (request().replace(b"HTTP/1.1", b"HTTP/1.0"), []),
    ],
    ids=["HEAD", "asked to close", "told to close", "HTTP/1.0"],
)
async def test_what_ends_otherwise_goes_through_asgi(asked: bytes, fields: list[tuple[bytes, bytes]]) -> None:
    """No body, or the end of the connection: uvicorn knows how."""
    took: list[bool] = []

    async def answer(scope, connection, receive, send) -> None:
        headers = [*fields, length(b"yes")]
        took.append(connection.answer(scope, 200, headers, b"yes"))
        await through_asgi(send, headers, b"yes")

    async with served(answer) as (reader, writer):
        writer.write(asked)
        head = await reader.readuntil(b"\r\n\r\n")
        body = b"" if asked.startswith(b"HEAD") else await reader.read()
    assert (took, body) == ([False], b"" if asked.startswith(b"HEAD") else b"yes")
    assert asked.startswith(b"HEAD") or b"connection: close" in head


async def test_an_answer_belongs_to_its_own_request() -> None:
    """A request that came before the one before it was answered has taken its place on the connection."""
    took: list[tuple[bytes, bool]] = []

    async def answer(scope, connection, receive, send) -> None:
        body = (await receive())["body"]
        while len(took) == 0 and body == b"first" and connection.cycle.scope is scope:
            await asyncio.sleep(0.005)
        took.append((body, connection.answer(scope, 200, [length(body)], body)))
        if not took[-1][1]:
            await through_asgi(send, [length(body)], body)

    async with served(answer) as (reader, writer):
        writer.write(request("POST", b"first") + request("POST", b"second"))
        replies = b""
        while not replies.endswith(b"second"):
            replies += await reader.read(65_536)
    assert took == [(b"first", False), (b"second", True)]
    assert replies.index(b"first") < replies.index(b"second")
    assert replies.count(b"HTTP/1.1 200 OK") == 2


async def test_a_client_that_has_gone_is_sent_nothing() -> None:
    """Nor one that was answered already."""
    took: list[bool] = []
    gone = asyncio.Event()

    async def answer(scope, connection, receive, send) -> None:
        connection.when_lost(gone.set)
        await gone.wait()
        took.append(connection.answer(scope, 200, [length(b"")], b""))

    async with served(answer) as (_, writer):
        writer.write(request())
        await asyncio.sleep(0.02)
        writer.close()
        await asyncio.wait_for(gone.wait(), 5)
        await asyncio.sleep(0.01)
    assert took == [False]


async def test_whether_the_whole_body_has_come() -> None:
    """Nothing is waited for where nothing is missing."""
    seen: list[bool] = []

    async def answer(scope, connection, receive, send) -> None:
        seen.append(connection.received())
        while (await receive()).get("more_body"):
            pass
        seen.append(connection.received())
        assert connection.answer(scope, 200, [length(b"")], b"")

    async with served(answer) as (reader, writer):
        writer.write(request("POST", b"whole"))
        await reader.readuntil(b"\r\n\r\n")
        half = request("POST", b"halves")
        writer.write(half[:-3])
        await asyncio.sleep(0.05)
        writer.write(half[-3:])
        await reader.readuntil(b"\r\n\r\n")
    assert seen == [True, True, False, True]


def test_the_collector_is_on_when_the_server_is_ready() -> None:
    """`oncewise serve` starts without it. In a process of its own: this concerns the whole of it."""
    code = "import gc; gc.disable(); from oncewise.api.server import _spare_the_collector as spare; spare(); "
    code += "print(gc.isenabled(), gc.get_freeze_count() > 10_000)"
    assert subprocess.check_output((sys.executable, "-c", code), text=True) == "True True\n"
