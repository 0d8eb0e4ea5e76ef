"""Accepting connections: those that wait come in together, however busy the event loop is.

uvloop accepts one connection in a turn of the loop. While others are served a turn takes milliseconds, and of 256
clients that come at once the last waits for 256 turns. So when the loop has accepted one, and was not idle since, more
are taken in one go (docs/decisions/0039).

Deliberately absent: which process has which socket (`oncewise.api.sockets`), and what is said on a connection
(`oncewise.api.server`).
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Self

__all__ = ["AT_ONCE", "Listener"]

AT_ONCE = 64
"""Five milliseconds of work, for which those who are connected already wait."""

SOON_S = 0.001


class Listener:
    """One listening socket. Stands where uvicorn keeps an `asyncio.Server`, and has of it what uvicorn calls.

    Made by `open`. The loop's own server accepts first, so a client that comes alone waits for nothing more than it
    did; and when file descriptors have run out, what becomes of those who wait is the loop's business alone.
    """

    def __init__(self, bound: socket.socket, protocol: Callable[[], asyncio.Protocol], at_once: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._bound = bound
        self._protocol = protocol
        self._at_once = at_once
        self._looking: asyncio.TimerHandle | None = None
        self._handovers: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server

    @classmethod
    async def open(
        cls, bound: socket.socket, protocol: Callable[[], asyncio.Protocol], *, backlog: int, at_once: int = AT_ONCE
    ) -> Self:
        """Listen on a bound socket, and own it.

        Args:
            bound: Not blocking.
            protocol: Makes the protocol of a connection.
            backlog: How many connections may wait in the kernel.
            at_once: How many more to accept when the loop has accepted one. 0 where other processes accept on the same
                socket: what this one takes, they do not get.

        Raises:
            OSError: the socket cannot listen.
        """
        listener = cls(bound, protocol, at_once)
        factory = listener._accepted if at_once else protocol
        listener._server = await listener._loop.create_server(factory, sock=bound, backlog=backlog)
        return listener

    def close(self) -> None:
        """Accept nothing more; the kernel turns away who waits. May be called again."""
        self._stop_looking()
        self._server.close()

    async def handed_over(self) -> None:
        """Return when every connection that was accepted is known to its protocol."""
        # The loop tells a protocol of what it has accepted one turn later.
        await asyncio.sleep(0)
        if self._handovers:
            await asyncio.wait(self._handovers)

    async def wait_closed(self) -> None:
        """Return when the loop's server is closed."""
        await self._server.wait_closed()

    def _accepted(self) -> asyncio.Protocol:
        """The loop has accepted a connection."""
        if self._looking is None:
            # Not at once: in vain it would cost a client that comes alone a tenth of its time. An idle loop has
            # accepted everybody until then; to a busy one, a millisecond is its next turn.
            self._looking = self._loop.call_later(SOON_S, self._look)
        return self._protocol()

    def _look(self) -> None:
        self._looking = None
        for _ in range(self._at_once):
            try:
                connection, _address = self._bound.accept()
            except ConnectionError:
                # Reset while it waited; the next one need not be.
                continue
            except OSError:
                # Nobody waits, or there is no file descriptor for them.
                return
            connection.setblocking(False)
            handover = self._loop.create_task(self._hand_over(connection))
            self._handovers.add(handover)
            handover.add_done_callback(self._handovers.discard)

    async def _hand_over(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol, connection)
        except OSError:
            # Some systems refuse options on a connection that was reset.
            connection.close()

    def _stop_looking(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
