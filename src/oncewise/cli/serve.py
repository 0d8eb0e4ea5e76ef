"""`oncewise serve` in one process: refuse what would be unsafe, take the port, say where everything is, serve.

Deliberately absent: several workers (`oncewise.cli.workers`), and what the server does with requests (`oncewise.api`).
"""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

from oncewise.api.app import create_app
from oncewise.api.server import Server
from oncewise.cli.failure import CommandFailed
from oncewise.cli.keys import any_key
from oncewise.cli.start_up import CannotStart, address_url, banner, log_to_terminal, no_key, take_port
from oncewise.settings import Loaded, Settings, is_loopback

__all__ = ["run", "run_server"]


def run(loaded: Loaded, echo: Callable[[str], None], warn: Callable[[str], None]) -> None:
    """Serve until a signal.

    Raises:
        CannotStart: an address that is refused, taken or unknown, or storage that does not open.
    """
    settings = loaded.settings
    has_keys = any_key(settings)
    if not has_keys and not is_loopback(settings.host):
        raise CannotStart(no_key(loaded))
    for warning in loaded.warnings:
        warn(warning)
    sockets = take_port(settings.host, settings.port)

    async def announce() -> bool:
        echo(banner(settings, address_url(sockets), has_keys=has_keys))
        return False

    run_server(settings, sockets, announce())


def run_server(settings: Settings, sockets: list[socket.socket], once_ready: Coroutine[Any, Any, bool]) -> None:
    """Serve on bound sockets until a signal.

    `once_ready` runs beside the server from the moment that requests are answered. If it returns True or raises, the
    server ends; a signal cancels it.

    Raises:
        CannotStart: the services did not open.
    """
    log_to_terminal()
    server = _Telling(settings)
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(_serve(server, sockets, once_ready))


class _Telling(Server):
    """Tells when it serves requests.

    Attributes:
        beside: What ends with the first signal, before the server turns its requests away.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(create_app(settings), drain_s=settings.drain_s)
        self.serving = asyncio.Event()
        self.beside: asyncio.Task[bool] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self.beside is not None:
            self.beside.get_loop().call_soon_threadsafe(self.beside.cancel)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except SystemExit:
            # uvicorn leaves the process from inside the loop; the reason is already in the log.
            raise CannotStart("the server did not start") from None
        self.serving.set()


async def _serve(server: _Telling, sockets: list[socket.socket], once_ready: Coroutine[Any, Any, bool]) -> None:
    serving = asyncio.create_task(server.serve(sockets))
    up = asyncio.create_task(server.serving.wait())
    await asyncio.wait({serving, up}, return_when=asyncio.FIRST_COMPLETED)
    up.cancel()
    if not server.serving.is_set():
        once_ready.close()
        serving.result()
        raise CannotStart("the server did not start, see above")
    beside = server.beside = asyncio.create_task(_beside(once_ready))
    await asyncio.wait({serving, beside}, return_when=asyncio.FIRST_COMPLETED)
    if beside.done() and not beside.cancelled() and (beside.exception() or beside.result()):
        server.should_exit = True
    beside.cancel()
    await asyncio.wait({serving, beside})
    serving.result()
    if not beside.cancelled():
        beside.result()


async def _beside(work: Coroutine[Any, Any, bool]) -> bool:
    try:
        return await work
    except SystemExit:
        # rich leaves so when nobody reads its output any more; inside the loop that would tear the server down.
        raise CommandFailed("the output was closed") from None
