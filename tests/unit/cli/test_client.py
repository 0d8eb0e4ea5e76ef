"""The load client against servers that answer byte by byte as each test says."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from oncewise.cli.client import BrokenAnswer, Connection, Event, NoAnswer, NoServer, Server, read_events

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@asynccontextmanager
async def raw_server(*answers: bytes) -> AsyncIterator[tuple[Server, list[bytes], Callable[[], int]]]:
    """Answers the n-th request with the n-th bytes; after the last it closes. Yields what came in, and connections."""
    todo, requests, connections = list(answers), list[bytes](), list[asyncio.StreamWriter]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        try:
            while todo:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().partition(b"content-length:")[2].partition(b"\r")[0])
                requests.append(head + await reader.readexactly(size))
                writer.write(todo.pop(0))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        yield Server("127.0.0.1", port, headers={"x-org-id": "org"}), requests, lambda: len(connections)


async def chunks(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def test_a_request_carries_its_headers_and_json() -> None:
    """Method, path, host, the server's headers, the request's own, and a JSON body with its length."""
    async with raw_server(ANSWER) as (server, requests, _), Connection(server) as connection:
        reply = await connection.fetch("POST", "/p?q=1", {"a": "é"}, {"x-request-id": "r"})
    assert (reply.status, reply.body) == (200, b"ok")
    head, _, body = requests[0].partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /p?q=1 HTTP/1.1"
    assert {"x-org-id: org", "x-request-id: r", "content-type: application/json", f"content-length: {len(body)}"} < {
        *lines
    }
    assert body == b'{"a": "\\u00e9"}'


async def test_a_connection_is_kept_for_the_next_request() -> None:
    """Three answers of three kinds that leave the connection usable."""
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n3;x=y\r\ncde\r\n0\r\ntrailer: t\r\n\r\n"
    empty = b"HTTP/1.1 204 No Content\r\n\r\n"
    async with raw_server(chunked, empty, ANSWER) as (server, _, connections), Connection(server) as connection:
        bodies = [(await connection.fetch("GET", "/")).body for _ in range(3)]
        assert bodies == [b"abcde", b"", b"ok"]
        assert connections() == 1


@pytest.mark.parametrize("head", [b"content-length: 2\r\nconnection: close\r\n", b""])
async def test_a_closed_connection_is_opened_again(head: bytes) -> None:
    """Whether the server announces the close or marks the end of the body with it."""
    answer = b"HTTP/1.1 200 OK\r\n" + head + b"\r\nok"
    async with raw_server(answer) as (server, _, connections), Connection(server) as connection:
        assert (await connection.fetch("GET", "/")).body == b"ok"
        with pytest.raises((BrokenAnswer, ConnectionError)):
            await connection.fetch("GET", "/")
        assert connections() == 2


async def test_an_answer_that_was_not_read_to_its_end_is_not_taken_for_the_next_one() -> None:
    """Leaving a body unread closes the connection."""
    async with raw_server(ANSWER, ANSWER) as (server, _, connections), Connection(server) as connection:
        async with connection.stream("GET", "/"):
            pass
        assert (await connection.fetch("GET", "/")).body == b"ok"
        assert connections() == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
    ],
)
async def test_a_broken_answer_is_an_error(answer: bytes) -> None:
    """An early end and nonsense are told from a good answer."""
    async with raw_server(answer) as (server, _, _connections), Connection(server) as connection:
        with pytest.raises(BrokenAnswer):
            await connection.fetch("GET", "/")


async def test_nobody_listening_is_said_with_the_way_out() -> None:
    """The message names the address and the command that starts a server."""
    async with raw_server() as (server, _, _connections):
        pass
    with pytest.raises(NoServer, match=f"no server at {server.url}; `oncewise serve --demo` starts one"):
        await server.fetch("GET", "/")


async def test_silence_is_said_with_its_limit() -> None:
    """A program that takes connections and answers nothing is named, and not waited for for ever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = Server(*silent.getsockname())
        with pytest.raises(NoAnswer, match=f"{server.url} did not answer within 0.05 s"):
            await server.fetch("GET", "/", timeout_s=0.05)


async def test_events_are_read_however_the_bytes_are_cut() -> None:
    """Byte by byte, with LF or CR LF, with comments between."""
    ping = b": hi\nretry: 2000\nevent: ping\ndata: {}\n\n"
    body = ping + b"id: 1-1\r\nevent: delta\r\ndata: a\r\ndata:b\r\n\r\nevent: x\n\ndata: z\n\n"
    expected = [Event("ping", "{}"), Event("delta", "a\nb", "1-1"), Event("message", "z", "1-1")]
    for cut in (1, 7, len(body)):
        pieces = [body[at : at + cut] for at in range(0, len(body), cut)]
        assert [event async for event in read_events(chunks(*pieces))] == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("localhost:81/x", "http://localhost:81"),
        ("https://h", "https://h:443"),
        ("http://[::1]:9", "http://[::1]:9"),
    ],
)
def test_urls_are_read_as_people_type_them(url: str, expected: str) -> None:
    """Scheme and port may be left out; a path is ignored."""
    assert Server.at(url).url == expected


@pytest.mark.parametrize("url", ["ftp://h", "http://", "http://h:x", "http://a b", "http://h:99999"])
def test_other_urls_are_refused(url: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(ValueError, match=r"URL|port|Port"):
        Server.at(url)
