"""The network does what it is told, and nothing else."""

import asyncio
import time

import pytest

from tests.faults.network import Network, network


@pytest.fixture
async def echo():
    """A server that says everything twice, and its last word when its input ends."""

    async def serve(reader, writer):
        while data := await reader.read(1000):
            writer.write(data * 2)
        writer.write(b"bye")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with network(server.sockets[0].getsockname()[1]) as made:
        yield made
    server.close()


async def said(made: Network, word: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
    writer.write(word)
    return reader, writer


async def test_it_passes_on_and_a_half_that_is_closed_leaves_the_other_open(echo):
    reader, writer = await said(echo, b"one")
    assert await reader.readexactly(6) == b"oneone"
    writer.write_eof()
    assert await reader.read() == b"bye"
    writer.close()


async def test_it_closes_a_half_by_itself(echo):
    reader, writer = await said(echo, b"one")
    assert await reader.readexactly(6) == b"oneone"
    echo.half_close()
    assert await reader.read() == b"bye"
    writer.close()


async def test_it_is_late(echo):
    echo.delay_s = 0.05
    began_s = time.monotonic()
    reader, writer = await said(echo, b"one")
    await reader.readexactly(6)
    assert time.monotonic() - began_s >= 0.1
    writer.close()


async def test_it_falls_silent_and_loses_nothing(echo):
    reader, writer = await said(echo, b"one")
    await reader.readexactly(6)
    echo.silent = True
    writer.write(b"two")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.readexactly(1), 0.1)
    echo.silent = False
    assert await reader.readexactly(6) == b"twotwo"
    writer.close()


async def test_it_resets_what_is_open(echo):
    reader, writer = await said(echo, b"one")
    await reader.readexactly(6)
    assert echo.cut() == 1
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()


async def test_it_loses_one_answer_and_its_connection(echo):
    echo.swallow = b"commit"
    reader, writer = await said(echo, b"one")
    assert await reader.readexactly(6) == b"oneone"
    writer.write(b"commit")
    assert await reader.read() == b""
    writer.close()
    reader, writer = await said(echo, b"commit")
    assert await reader.readexactly(12) == b"commitcommit"
    writer.close()
