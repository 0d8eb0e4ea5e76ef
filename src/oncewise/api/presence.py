"""Ends the work for one request when its client goes away.

HTTP tells nobody that a client has left: the server sees its connection close. A client that leaves must give up its
interest at once, so the wait for its answer is cancelled, and only that wait. Our own server calls us when a connection
is lost; any other ASGI server is asked by a task that waits for `http.disconnect`.

Deliberately absent: what is given up; leaving the `with` block does that.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

from starlette.types import Receive, Scope

__all__ = ["CONNECTION", "ClientGone", "Connection", "Headers", "Presence"]

CONNECTION = "oncewise.connection"
"""Name of the ASGI extension by which our own server lends its connection."""


Headers = list[tuple[bytes, bytes]]


class ClientGone(Exception):
    """The client closed its connection before its answer was complete."""


class Connection(Protocol):
    """What our own server lets a request do with its connection."""

    def when_lost(self, tell: Callable[[], None] | None) -> None:
        """Call `tell` once when the client is gone; None takes that back."""
        ...

    def abort(self) -> None:
        """Close now, throwing away what the client did not read."""
        ...

    def received(self) -> bool:
        """Whether the whole body of the request is there."""
        ...

    def answer(self, scope: Scope, status: int, headers: Headers, body: bytes) -> bool:
        """Send a whole answer to the request of `scope`, past the ASGI interface; False if it must go through that."""
        ...

    def ready(self) -> bool:
        """Whether the body of the answer can be written to now without waiting for the client."""
        ...

    def push(self, chunk: bytes) -> bool:
        """Write a piece of the body that is not the last, past the ASGI interface; False if it must wait."""
        ...


class Presence:
    """A block that is cancelled when the client goes away; it then ends with `ClientGone`."""

    __slots__ = ("_connection", "_gone", "_receive", "_task", "_watch")

    def __init__(self, scope: Any, receive: Receive) -> None:
        self._connection: Connection | None = scope.get("extensions", {}).get(CONNECTION)
        self._receive = receive
        self._gone = False
        self._task: asyncio.Task[Any] | None = None
        self._watch: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        if self._connection is not None:
            self._connection.when_lost(self._left)
        else:
            self._watch = asyncio.create_task(self._wait())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection is not None:
            self._connection.when_lost(None)
        elif self._watch is not None:
            self._watch.cancel()
        task, self._task = self._task, None
        if self._gone and task is not None and isinstance(error, asyncio.CancelledError) and task.uncancel() == 0:
            raise ClientGone from None

    def _left(self) -> None:
        # The task is suspended inside the block, or __exit__ would have run: the cancellation cannot outlive it.
        if self._task is not None:
            self._gone = True
            self._task.cancel()

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left()
