"""Any history of asking, leaving and breaking: connections are counted right, and none is lost or used twice."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

from hypothesis import given, settings
from hypothesis import strategies as st

from oncewise.providers.transport import HttpTransport, TransportError

LIMIT = 2
HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n"
ANSWERS = {
    b"good": HEAD + b"\r\ngood",
    b"last": HEAD + b"connection: close\r\n\r\nlast",
    b"half": HEAD + b"\r\nha",  # and never more
    b"cut!": HEAD + b"\r\ncu",  # and then closed
    b"long": HEAD + b"\r\nlong and more than was said",
    b"none": b"",
}

ops = st.lists(
    st.tuples(st.sampled_from([*ANSWERS, b"leave", b"cancel", b"pass"]), st.integers(0, 9), st.integers(0, 6)),
    max_size=20,
)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Do what the body of each request names."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            await reader.readuntil(b"\r\n\r\n")
            asked = await reader.readexactly(4)
            writer.write(ANSWERS[asked])
            if asked in (b"last", b"cut!"):
                break
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@asynccontextmanager
async def hosted() -> AsyncIterator[HttpTransport]:
    """A pool of connections to a host that answers."""
    serving: set[asyncio.Task[None]] = set()

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.create_task(answer(reader, writer)))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    transport = HttpTransport(url, headers={}, connections=LIMIT, connect_s=5)
    yield transport
    await transport.aclose()
    server.close()
    await server.wait_closed()
    await asyncio.wait_for(asyncio.gather(*serving), 5)


async def ask(transport: HttpTransport, what: bytes, *, leaves: bool = False) -> bytes:
    got = b""
    with closing(await transport.post("x", what)) as reply:
        while not leaves and (piece := await reply.read()):
            got += piece
    return got


@settings(max_examples=60)
@given(ops=ops)
async def test_whatever_happens_the_pool_is_whole_afterwards(ops: list[tuple[bytes, int, int]]) -> None:
    """Never more connections than its limit, each answer its own, and at the end every turn is free again."""
    async with hosted() as transport:
        tasks: list[tuple[bytes, asyncio.Task[bytes]]] = []
        for what, number, turns in ops:
            if what == b"cancel" and tasks:
                tasks[number % len(tasks)][1].cancel()
            elif what == b"leave":
                tasks.append((what, asyncio.create_task(ask(transport, b"good", leaves=True))))
            elif what in ANSWERS:
                tasks.append((what, asyncio.create_task(ask(transport, what))))
            for _ in range(turns):
                await asyncio.sleep(0.001 if what == b"pass" else 0)
                assert transport.connections <= LIMIT
        for what, task in tasks:
            if what in (b"half", b"none"):
                task.cancel()
        for what, task in tasks:
            try:
                got = await asyncio.wait_for(task, 5)
            except (asyncio.CancelledError, TransportError):
                continue
            assert got == {b"good": b"good", b"last": b"last", b"long": b"long", b"leave": b""}[what]
        # All turns are free: as many as there are, at the same time.
        assert await asyncio.gather(*(ask(transport, b"good") for _ in range(LIMIT))) == [b"good"] * LIMIT
        assert transport.connections <= LIMIT
    assert transport.connections == 0
