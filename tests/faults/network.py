"""A network between a server and what it depends on, without any of the rights that a real bad network needs.

What goes wrong is set while connections are open, and holds for them as well. Loss is what TCP makes of it: bytes that
come late, never bytes that are missing.
"""

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

__all__ = ["Network", "network"]

_RETRANSMIT_S = 0.2


@dataclass
class Network:
    """Passes bytes on to a port of this host, until told otherwise.

    Attributes:
        delay_s: How late everything is, in each direction.
        loss: Share of the pieces that have to be sent again, and are late by a fifth of a second.
        silent: Whether nothing arrives any more, though connections can be made and stay open.
        swallow: The answer to the next message that has these bytes is lost, and the connection with it; None then.
        opened: Connections that were made.
    """

    upstream: int
    port: int = 0
    delay_s: float = 0.0
    loss: float = 0.0
    silent: bool = False
    swallow: bytes | None = None
    opened: int = 0
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    _pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.upstream)
        except OSError:
            writer.close()
            return
        pair = (writer, back)
        self._pairs.add(pair)
        deaf = asyncio.Event()
        try:
            # Each direction ends by itself: a half that is closed leaves the other open. One that breaks ends both.
            with suppress(ExceptionGroup):
                async with asyncio.TaskGroup() as pumps:
                    pumps.create_task(self._pump(reader, back, deaf, out=True))
                    pumps.create_task(self._pump(there, writer, deaf))
        finally:
            self._pairs.discard(pair)
            for end in pair:
                end.close()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, deaf: asyncio.Event, *, out: bool = False
    ) -> None:
        while data := await reader.read(65536):
            late_s = self.delay_s + (_RETRANSMIT_S if self.chance.random() < self.loss else 0.0)
            if late_s:
                await asyncio.sleep(late_s)
            while self.silent:
                await asyncio.sleep(0.01)
            if out and self.swallow is not None and self.swallow in data:
                self.swallow = None
                deaf.set()
            elif deaf.is_set():
                # The upstream has answered, so the case is the one that was asked for.
                raise ConnectionResetError
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    def cut(self) -> int:
        """Reset every connection; how many there were."""
        pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    end.get_extra_info("socket").setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
                end.transport.abort()
        return len(pairs)

    def half_close(self) -> None:
        """End every connection in the direction of the upstream; answers still come."""
        for _, back in self._pairs:
            with suppress(OSError):
                back.write_eof()


@asynccontextmanager
async def network(upstream: int) -> AsyncIterator[Network]:
    """A network before the port `upstream`."""
    made = Network(upstream)
    serving: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(made.serve(reader, writer))
        serving.add(task)
        task.add_done_callback(serving.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        for task in list(serving):
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
