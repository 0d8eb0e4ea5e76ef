"""Two things that stand before a PostgreSQL in real life: a network that fails at a chosen moment, and a pooler."""

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto

__all__ = ["Cut", "FailingNetwork", "TransactionPooler", "failing_network", "transaction_pooler"]

_COMMIT = b"COMMIT;\0"


class Cut(Enum):
    """When a connection breaks in a COMMIT."""

    BEFORE = auto()  # PostgreSQL never sees it
    AFTER = auto()  # PostgreSQL's answer never arrives


@dataclass
class FailingNetwork:
    """Passes bytes on, until it does not.

    Attributes:
        cuts: What happens to the next COMMITs, one after the other.
        silent: Whether nothing arrives any more, though every connection stays open.
        altered: What arrives in place of other bytes of the server, of the same length.
        opened: Connections that were made through it.
    """

    upstream: int
    port: int = 0
    cuts: list[Cut] = field(default_factory=list)
    silent: bool = False
    altered: dict[bytes, bytes] = field(default_factory=dict)
    opened: int = 0
    _swallowed: asyncio.Event | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self.upstream)
        try:
            async with asyncio.TaskGroup() as pumps:
                there = pumps.create_task(self._to_server(reader, to_server))
                back = pumps.create_task(self._to_client(from_server, writer))
                there.add_done_callback(lambda _: back.cancel())
                back.add_done_callback(lambda _: there.cancel())
        finally:
            for end in (writer, to_server):
                end.close()

    async def _to_server(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._while_silent()
            if self.cuts and _COMMIT in data:
                cut = self.cuts.pop(0)
                if cut is Cut.AFTER:
                    self._swallowed = asyncio.Event()
                    writer.write(data)
                    await self._swallowed.wait()
                    self._swallowed = None
                return
            writer.write(data)

    async def _to_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._while_silent()
            for said, heard in self.altered.items():
                data = data.replace(said, heard)
            if self._swallowed is None:
                writer.write(data)
            else:
                # PostgreSQL has answered, so the case is the one that was asked for.
                self._swallowed.set()

    async def _while_silent(self) -> None:
        while self.silent:
            await asyncio.sleep(0.01)


@asynccontextmanager
async def failing_network(upstream: int) -> AsyncIterator[FailingNetwork]:
    """A network before the server on port `upstream`."""
    network = FailingNetwork(upstream)
    async with _serving(network.serve) as network.port:
        yield network


# -- pooler ------------------------------------------------------------------------------------------------------

# What PgBouncer takes of a client's startup message; anything else it refuses, unless it is told to ignore it.
_ALLOWED = {"user", "database", "client_encoding", "application_name"}
_SSL_REQUEST, _PROTOCOL = 80877103, 196608


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


async def _read(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    kind = await reader.readexactly(1)
    size = await reader.readexactly(4)
    return kind, await reader.readexactly(struct.unpack("!i", size)[0] - 4)


@dataclass
class TransactionPooler:
    """PgBouncer's transaction mode, at its meanest: each transaction goes to another session than the one before."""

    upstream: int
    database: str
    port: int = 0
    _parameters: list[bytes] = field(default_factory=list)
    _sessions: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=asyncio.Queue)

    async def open(self, sessions: int) -> None:
        for _ in range(sessions):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream)
            names = b"user\0postgres\0database\0%s\0client_encoding\0UTF8\0\0" % self.database.encode()
            writer.write(struct.pack("!ii", len(names) + 8, _PROTOCOL) + names)
            self._parameters.clear()
            kind = b""
            while kind != b"Z":
                kind, body = await _read(reader)
                if kind == b"S":
                    self._parameters.append(_message(kind, body))
            self._sessions.put_nowait((reader, writer))

    def close(self) -> None:
        while not self._sessions.empty():
            self._sessions.get_nowait()[1].close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            if not await self._greet(reader, writer):
                return
            asked = asyncio.ensure_future(_read(reader))
            while (await asked)[0] != b"X":
                asked = await self._transaction(asked, reader, writer)

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        size, code = struct.unpack("!ii", await reader.readexactly(8))
        if code == _SSL_REQUEST:
            writer.write(b"N")
            return await self._greet(reader, writer)
        names = (await reader.readexactly(size - 8)).decode().rstrip("\0").split("\0")[::2]
        strange = next((name for name in names if name not in _ALLOWED), None)
        if strange is not None:
            told = f"SFATAL\0C08P01\0Munsupported startup parameter: {strange}\0\0"
            writer.write(_message(b"E", told.encode()))
            return False
        writer.write(_message(b"R", bytes(4)) + b"".join(self._parameters))
        writer.write(_message(b"K", bytes(8)) + _message(b"Z", b"I"))
        return True

    async def _transaction(
        self, asked: asyncio.Future[tuple[bytes, bytes]], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> asyncio.Future[tuple[bytes, bytes]]:
        """Pass a transaction on to the session that has rested longest; return the message after it, when it comes."""
        # As PgBouncer does: who comes while all sessions are taken waits for one.
        session = await self._sessions.get()
        try:
            asked = await self._pass_on(session, asked, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            # Its client left in the middle: nobody may have what is left of the transaction.
            session[1].close()
            await self.open(1)
            raise
        self._sessions.put_nowait(session)
        return asked

    async def _pass_on(
        self,
        session: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        asked: asyncio.Future[tuple[bytes, bytes]],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> asyncio.Future[tuple[bytes, bytes]]:
        from_server, to_server = session
        answering = asyncio.ensure_future(self._until_idle(from_server, writer))
        while not answering.done():
            if asked.done():
                to_server.write(_message(*asked.result()))
                asked = asyncio.ensure_future(_read(reader))
            await asyncio.wait({asked, answering}, return_when=asyncio.FIRST_COMPLETED)
        return asked

    @staticmethod
    async def _until_idle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kind = body = b""
        while (kind, body) != (b"Z", b"I"):
            kind, body = await _read(reader)
            writer.write(_message(kind, body))


@asynccontextmanager
async def transaction_pooler(upstream: int, database: str, sessions: int = 4) -> AsyncIterator[TransactionPooler]:
    """A pooler before a database of the server on port `upstream`."""
    pooler = TransactionPooler(upstream, database)
    await pooler.open(sessions)
    async with _serving(pooler.serve) as pooler.port:
        yield pooler
    pooler.close()


@asynccontextmanager
async def _serving(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """Serve on a port of its own; connections that are still there at the end are cut."""
    serving: set[asyncio.Task[None]] = set()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await serve(reader, writer)

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(one(reader, writer))
        serving.add(task)
        task.add_done_callback(serving.discard)
        task.add_done_callback(lambda _: writer.close())

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
