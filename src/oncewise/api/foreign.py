"""Shutting down under an ASGI server that is not ours.

Such a server waits for open streams before it tells the application anything, and the streams wait for the
application: with one viewer connected it would never stop. So the application hears the signal itself, drains, and
ends its streams; the server's own handler runs as before.

Deliberately absent: everything else our own server adds (`oncewise.api.server`).
"""

import asyncio
import signal
import threading
from types import FrameType

from starlette.types import Receive, Scope, Send

from oncewise.api.app import App

__all__ = ["SelfDraining"]


class SelfDraining:
    """An application that drains when the process is asked to stop, whoever serves it.

    Args:
        app: What is served.
        drain_s: Seconds running turns may go on.
    """

    def __init__(self, app: App, *, drain_s: float) -> None:
        self._app = app
        self._drain_s = drain_s
        self._draining: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of the ASGI protocol."""
        if scope["type"] == "lifespan" and threading.current_thread() is threading.main_thread():
            self._hear(asyncio.get_running_loop())
        await self._app(scope, receive, send)

    def _hear(self, loop: asyncio.AbstractEventLoop) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous = signal.getsignal(number)

            def handle(number: int, frame: FrameType | None, previous: object = previous) -> None:
                loop.call_soon_threadsafe(self._begin)
                if callable(previous):
                    previous(number, frame)

            signal.signal(number, handle)

    def _begin(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        self._app.drain()
        if self._app.services is not None:
            await self._app.services.turns.aclose(self._drain_s)
        self._app.stop_streams()
