"""One connection: what is a whole response, however its bytes come, and what is not."""

import asyncio
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncewise.providers.http1 import MAX_HELD_BYTES, ClientConnection, ConnectionLost, MalformedHttp, TransportError
from tests.support.scripted_transport import split

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nx-trailer: 1\r\n\r\n"
SIZED = HEAD + b"Content-Length: 11\r\n\r\nhello world"
UNTIL_CLOSE = HEAD + b"\r\nhello world"
EARLY = (
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\ncontent-type: text/html\r\n\r\n" + SIZED
)


class Wire(asyncio.Transport):
    """The loop's side of a connection, in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closing = False
        self.paused = False
        self.unsent = 0

    def get_extra_info(self, name: str, default: object = None) -> object:
        assert name == "socket"
        return self

    def fileno(self) -> int:
        return 0

    def write(self, data: bytes) -> None:
        self.written += data

    def writelines(self, list_of_data: Iterable[bytes]) -> None:
        self.written += b"".join(list_of_data)

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.closing = True

    def pause_reading(self) -> None:
        assert not self.paused
        self.paused = True

    def resume_reading(self) -> None:
        assert self.paused
        self.paused = False


class Asked:
    """A connection on which a request was sent, and what became of it."""

    def __init__(self) -> None:
        self.lost = 0
        self.wire = Wire()
        self.connection = ClientConnection(lambda _connection: self.count())
        self.connection.connection_made(self.wire)
        self.task = asyncio.create_task(self.read())
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""

    def count(self) -> None:
        self.lost += 1

    async def read(self) -> type[TransportError] | None:
        """Read everything; the error that ended it."""
        try:
            reply = await self.connection.ask(b"POST / HTTP/1.1\r\n\r\n", b"{}")
            self.status, self.headers = reply.status, dict(reply.headers)
            while piece := await reply.read():
                self.body += piece
        except TransportError as error:
            return type(error)
        return None

    async def given(self, *pieces: bytes) -> "Asked":
        """Let the other side send these."""
        await asyncio.sleep(0)
        for piece in pieces:
            if not self.wire.closing:
                self.connection.data_received(piece)
            await asyncio.sleep(0)
        return self

    def close(self, error: Exception | None = None) -> "Asked":
        """Let the other side close, or the connection break."""
        if error is None:
            self.connection.eof_received()
        self.wire.closing = True
        self.connection.connection_lost(error)
        return self

    async def outcome(self) -> tuple[int, bytes, type[TransportError] | None]:
        error = await asyncio.wait_for(self.task, 1)
        return self.status, self.body, error


@pytest.mark.parametrize("response", [CHUNKED, SIZED, EARLY], ids=["chunked", "sized", "after interim ones"])
async def test_a_response_is_the_same_however_it_is_cut(response: bytes) -> None:
    """In two at every place, and byte by byte; it is kept open for the next one."""
    cuts = [split(response, place) for place in range(len(response))]
    for pieces in (*cuts, [response[place : place + 1] for place in range(len(response))]):
        asked = await Asked().given(*pieces)
        assert await asked.outcome() == (200, b"hello world", None)
        assert asked.headers["content-type"] == "text/event-stream"
        assert asked.connection.reusable


async def test_a_body_without_a_size_ends_with_the_connection() -> None:
    """If the other side closed it; and only then."""
    asked = await Asked().given(UNTIL_CLOSE)
    assert await asked.close().outcome() == (200, b"hello world", None)
    assert not asked.connection.reusable
    asked = await Asked().given(UNTIL_CLOSE)
    assert await asked.close(ConnectionResetError()).outcome() == (200, b"hello world", ConnectionLost)
    asked = await Asked().given(UNTIL_CLOSE)
    asked.connection.abort()
    asked.connection.connection_lost(None)
    assert await asked.outcome() == (200, b"hello world", ConnectionLost)


@pytest.mark.parametrize("response", [CHUNKED, SIZED], ids=["chunked", "sized"])
async def test_a_response_that_is_cut_is_an_error_after_what_came(response: bytes) -> None:
    """Wherever: a clean end is one that HTTP forbids, a reset is a lost connection."""
    for place in range(len(response)):
        has_head = response.find(b"\r\n\r\n") < place - 3
        for error in (None, ConnectionResetError()):
            asked = (await Asked().given(response[:place])).close(error)
            status, body, raised = await asked.outcome()
            assert raised is (MalformedHttp if has_head and error is None else ConnectionLost)
            assert status == (200 if has_head else 0)
            assert b"hello world".startswith(body)
            assert asked.lost == 1


@pytest.mark.parametrize(
    "response",
    [
        b"SSH-2.0-x\r\n",
        b"\x00\x01\x02",
        b"HTTP/1.1 200 OK\r\nbroken\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nbad name: x\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\nhello",
        HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nx\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n99999999999999999999\r\n",
    ],
)
async def test_what_is_no_http_closes_the_connection(response: bytes) -> None:
    """As an error, at the latest where the body would be."""
    asked = await Asked().given(response)
    _, body, error = await asked.outcome()
    assert (body, error) == (b"", MalformedHttp)
    assert asked.wire.closing


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"x-more: " + b"x" * 1000 + b"\r\n"),
        (b"HTTP/1.1 200 OK\r\nx-long: ", b"x" * 1000),
        (b"HTTP/1.1 200 ", b"x" * 1000),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 40),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n1;", b"x" * 1000),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", b"x-more: " + b"x" * 1000 + b"\r\n"),
    ],
    ids=["fields", "field", "status line", "interim responses", "chunk extension", "trailers"],
)
async def test_what_never_becomes_a_body_has_an_end(begin: bytes, more: bytes) -> None:
    """64 KiB of it, or a provider could fill the memory with a head."""
    asked = await Asked().given(begin, *[more] * 80)
    assert (await asked.outcome())[2] is MalformedHttp
    assert asked.wire.closing


async def test_whatever_comes_unasked_closes_the_connection() -> None:
    """Before the first request, after a response, or with it; a whole response stays whole."""
    wire, connection = Wire(), ClientConnection(lambda _connection: None)
    connection.connection_made(wire)
    connection.data_received(SIZED)
    assert wire.closing
    with pytest.raises(ConnectionLost):
        await connection.ask(b"", b"")
    for pieces in ([SIZED, b"HTTP/1.1 408 Request Timeout\r\n\r\n"], [SIZED + SIZED], [SIZED, b"x"]):
        asked = await Asked().given(*pieces)
        assert await asked.outcome() == (200, b"hello world", None)
        assert asked.wire.closing
        assert not asked.connection.reusable


@pytest.mark.parametrize(
    "response",
    [
        HEAD + b"connection: close\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n",
    ],
)
async def test_a_provider_that_will_close_is_not_asked_again(response: bytes) -> None:
    """It says so, or speaks HTTP/1.0."""
    asked = await Asked().given(response)
    assert await asked.outcome() == (200, b"", None)
    assert not asked.connection.reusable


async def test_a_connection_with_something_left_is_not_used_again() -> None:
    """A request that was answered before all of it was sent, as with 413; a body nobody read."""
    asked = await Asked().given(SIZED)
    await asked.outcome()
    assert asked.connection.reusable
    asked.wire.unsent = 1
    assert not asked.connection.reusable
    asked = await Asked().given(HEAD + b"content-length: 11\r\n\r\nhello")
    assert not asked.connection.reusable
    asked.task.cancel()


async def test_a_repeated_field_is_one_with_commas() -> None:
    """As RFC 9110 §5.3 says; trailers are none of the head's."""
    asked = await Asked().given(HEAD + b"X-A: 1\r\nx-a: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx-a: 3\r\n\r\n")
    assert (await asked.outcome())[2] is None
    assert asked.headers["x-a"] == "1, 2"


async def test_no_more_is_taken_in_than_somebody_reads() -> None:
    """Reading stops above a bound, and goes on when the pieces were taken."""
    wire, connection = Wire(), ClientConnection(lambda _connection: None)
    connection.connection_made(wire)
    asking = asyncio.create_task(connection.ask(b"", b""))
    await asyncio.sleep(0)
    connection.data_received(HEAD + b"content-length: 99999999\r\n\r\n")
    reply = await asking
    piece = b"x" * 65_536
    given = 0
    while not wire.paused:
        connection.data_received(piece)
        given += len(piece)
    assert given <= MAX_HELD_BYTES + len(piece)
    assert len(await reply.read()) == given
    assert not wire.paused


async def test_a_whole_answer_that_nobody_took_leaves_no_paused_connection() -> None:
    """One that reads no more would never hear that the other side closed it."""
    wire, connection = Wire(), ClientConnection(lambda _connection: None)
    connection.connection_made(wire)
    asking = asyncio.create_task(connection.ask(b"", b""))
    await asyncio.sleep(0)
    connection.data_received(HEAD + b"content-length: 300000\r\n\r\n" + b"x" * 300_000)
    await asking
    assert wire.paused
    assert not connection.reusable


pieces_of_http = st.lists(
    st.sampled_from(
        [
            HEAD, SIZED, CHUNKED, b"\r\n", b"\r\n\r\n", b"0\r\n", b"5\r\nhello\r\n", b"content-length: 5\r\n",
            b"transfer-encoding: chunked\r\n", b"connection: close\r\n", b"HTTP/1.1 100 Continue\r\n\r\n",
            b"HTTP/1.1 204 No Content\r\n", b"HTTP/1.1 101 X\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        ]
    )
    | st.binary(max_size=8),
    max_size=8,
)  # fmt: skip


@given(pieces=pieces_of_http, breaks=st.booleans())
async def test_whatever_comes_ends_in_a_response_or_an_error_of_ours(pieces: list[bytes], breaks: bool) -> None:
    """And nothing but those, whether or not the end is clean."""
    asked = await Asked().given(*pieces)
    _, _, error = await asked.close(ConnectionResetError() if breaks else None).outcome()
    assert error in (None, ConnectionLost, MalformedHttp)
    assert asked.lost == 1
