"""`oncewise serve`: refuse what would be unsafe, take the port, say where everything is, serve until a signal.

Deliberately absent: what the server does with requests (`oncewise.api`).
"""

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

from oncewise import __version__
from oncewise.api.app import create_app
from oncewise.api.server import Server, listen
from oncewise.cli.failure import CommandFailed
from oncewise.cli.keys import any_key
from oncewise.settings import Loaded, Settings, is_loopback, shown_url

__all__ = ["CannotStart", "address_url", "banner", "run", "run_server", "take_port"]

NO_KEY = """\
refusing to listen on {host}: there is no API key, so everybody who reaches that address could spend your provider \
budget. Create a key first:
  oncewise keys create --org ORG{database}
or listen on this machine only: --host 127.0.0.1"""


_OPEN_MODE = "open: this machine only, the x-org-id header names the tenant"


class CannotStart(CommandFailed):
    """Why the server does not start, in words for the terminal."""


def run(loaded: Loaded, echo: Callable[[str], None], warn: Callable[[str], None]) -> None:
    """Serve until a signal.

    Raises:
        CannotStart: an address that is refused, taken or unknown, or storage that does not open.
    """
    settings = loaded.settings
    has_keys = any_key(settings)
    if not has_keys and not is_loopback(settings.host):
        raise CannotStart(NO_KEY.format(host=settings.host, database=_database_flag(loaded)))
    for warning in loaded.warnings:
        warn(warning)
    if settings.redis_url:
        warn("ONCEWISE_REDIS_URL is set, but a server with one worker does not use Redis.")
    sockets = take_port(settings.host, settings.port)

    async def announce() -> bool:
        echo(banner(settings, address_url(sockets), has_keys=has_keys))
        return False

    run_server(settings, sockets, announce())


def _database_flag(loaded: Loaded) -> str:
    """The flag that points another command to the same database, if this one was pointed there by it."""
    flagged = loaded.origins.get(("database_url",)) == "--database"
    return f" --database {shown_url(loaded.settings.database_url)}" if flagged else ""


def take_port(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to an address.

    Raises:
        CannotStart: it is taken, forbidden or unknown.
    """
    try:
        return listen(host, port)
    except socket.gaierror:
        raise CannotStart(f"{host} is not an address of this machine") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise CannotStart(
                f"port {port} of {host} is taken by another program; choose one with --port, or --port 0 for any"
            ) from None
        raise CannotStart(f"cannot listen on {host} port {port}: {error.strerror}") from None


def run_server(settings: Settings, sockets: list[socket.socket], once_ready: Coroutine[Any, Any, bool]) -> None:
    """Serve on bound sockets until a signal.

    `once_ready` runs beside the server from the moment that requests are answered. If it returns True or raises, the
    server ends; a signal cancels it.

    Raises:
        CannotStart: the services did not open.
    """
    # Warnings of libraries go to the terminal, one line each; the start-up error of the services comes this way too.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
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


def address_url(sockets: list[socket.socket]) -> str:
    """The base URL of a server."""
    host, port = sockets[0].getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def banner(settings: Settings, url: str, *, has_keys: bool = False) -> str:
    """At most ten lines: what runs, where, on what, and a first request."""
    providers = "demo, for every name" if settings.demo else ", ".join([*settings.providers, "demo"])
    mode = "every request needs an API key" if has_keys else _OPEN_MODE
    return f"""\
Oncewise {__version__} is ready.
  API        {url}/api/threads/   (description: {url}/openapi.json)
  Figures    {url}/api/metrics/performance
  Health     {url}/health/readiness
  Store      {shown_url(settings.database_url)}
  Workers    {settings.workers}
  Providers  {providers} (default: {settings.default_provider})
  Mode       {"demo; " if settings.demo else ""}{mode}
  Try        {create_thread_command(url, "authorization: Bearer ow_..." if has_keys else "x-org-id: org_demo")}"""


def create_thread_command(url: str, who: str = "x-org-id: org_demo") -> str:
    """A first request; without keys it works as it stands."""
    return f"""curl -s {url}/api/threads/ -H 'content-type: application/json' -H '{who}' -d '{{}}'"""
