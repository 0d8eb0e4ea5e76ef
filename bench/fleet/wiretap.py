"""What passes between servers and one port behind them: connections and bytes, both ways.

Neither PostgreSQL nor every Redis tells how many bytes it was sent, so each server under test is given the address of
a tap instead. It runs in a thread of the program that measures.

Deliberately absent: delay, faults, and any look into what passes. A tap costs a copy, so that nothing is timed through
one.
"""

import asyncio
import threading
from contextlib import suppress
from typing import Self

__all__ = ["Wiretap"]

PIECE_BYTES = 65_536


class Wiretap:
    """Forwards connections to a port on loopback.

    Attributes:
        port: Where to connect instead.
        open: Connections that stand now.
        sent: Bytes that went to the port so far.
        received: Bytes that came back.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.port = 0
        self.open = 0
        self.sent = 0
        self.received = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, *exc_info: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        forwarding = asyncio.all_tasks() - {asyncio.current_task()}
        for task in forwarding:
            task.cancel()
        if forwarding:
            await asyncio.wait(forwarding)

    async def _listen(self) -> asyncio.Server:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _connected(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        try:
            answers, onward = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            back.close()
            return
        self.open += 1
        try:
            await asyncio.gather(self._copy(client, onward, "sent"), self._copy(answers, back, "received"))
        finally:
            self.open -= 1

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counter: str) -> None:
        with suppress(OSError):
            while piece := await reader.read(PIECE_BYTES):
                setattr(self, counter, getattr(self, counter) + len(piece))
                writer.write(piece)
                await writer.drain()
        writer.close()
