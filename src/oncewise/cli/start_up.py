"""What servers of one and of several processes have in common when they start: the port, refusals, the banner.

Deliberately absent: the server itself. The supervisor of several workers imports this and should stay small.
"""

import errno
import logging
import socket
from collections.abc import Callable
from typing import TypeVar

from oncewise import __version__
from oncewise.api.sockets import SocketGroup, listen, listen_for_each
from oncewise.cli.failure import CommandFailed
from oncewise.settings import Loaded, Settings, shown_url

__all__ = [
    "CannotStart",
    "LogLine",
    "address_url",
    "banner",
    "create_thread_command",
    "log_to_terminal",
    "no_key",
    "take_port",
    "take_port_for_each",
]

Taken = TypeVar("Taken")

_NO_KEY = """\
refusing to listen on {host}: there is no API key, so everybody who reaches that address could spend your provider \
budget. Create a key first:
  oncewise keys create --org ORG{database}
or listen on this machine only: --host 127.0.0.1"""

_OPEN_MODE = "open: this machine only, the x-org-id header names the tenant"


class CannotStart(CommandFailed):
    """Why the server does not start, in words for the terminal."""


def no_key(loaded: Loaded) -> str:
    """Why a server without an API key does not listen where others could reach it, and what helps."""
    # The command that helps must reach the same database, if this one was pointed there by a flag.
    flagged = loaded.origins.get(("database_url",)) == "--database"
    database = f" --database {shown_url(loaded.settings.database_url)}" if flagged else ""
    return _NO_KEY.format(host=loaded.settings.host, database=database)


def log_to_terminal(worker: int | None = None) -> None:
    """Send warnings of all modules to the terminal, one line each; the start-up error of the services comes so too.

    Args:
        worker: The number of this process, if it is one of several that share the terminal.
    """
    lines = logging.StreamHandler()
    lines.setFormatter(LogLine(worker))
    logging.basicConfig(level=logging.WARNING, handlers=[lines])


class LogLine(logging.Formatter):
    """A line for people: the level, which worker says it, what happened, and the fields that came with it.

    Args:
        worker: See `log_to_terminal`.
    """

    def __init__(self, worker: int | None = None) -> None:
        super().__init__("%(levelname)s: " + (f"worker {worker}: " if worker is not None else "") + "%(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the library's name
        fields = (f"{name}={_word(value)}" for name, value in vars(record).items() if name not in _NO_FIELDS)
        return " ".join((super().formatMessage(record), *fields))


# The last one is uvicorn's, the message again.
_NO_FIELDS = {*vars(logging.makeLogRecord({})), "message", "asctime", "color_message"}


def _word(value: object) -> str:
    """A value as one word on the line; what a client named, a model say, begins no line of its own."""
    text = str(value)
    return text if text.isprintable() and " " not in text else ascii(text)


def take_port(host: str, port: int) -> SocketGroup:
    """Sockets bound to an address.

    Raises:
        CannotStart: it is taken, forbidden or unknown.
    """
    return _take(host, port, lambda: listen(host, port))


def take_port_for_each(host: str, port: int, processes: int) -> list[SocketGroup]:
    """Sockets for several processes on one port, see `listen_for_each`; errors as in `take_port`."""
    return _take(host, port, lambda: listen_for_each(host, port, processes))


def _take(host: str, port: int, bind: Callable[[], Taken]) -> Taken:
    try:
        return bind()
    except socket.gaierror:
        raise CannotStart(f"{host} is not an address of this machine") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise CannotStart(
                f"port {port} of {host} is taken by another program; choose one with --port, or --port 0 for any"
            ) from None
        raise CannotStart(f"cannot listen on {host} port {port}: {error.strerror}") from None


def address_url(sockets: SocketGroup) -> str:
    """The base URL of a server."""
    host, port = sockets[0].getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def banner(settings: Settings, url: str, *, has_keys: bool = False, own_valkey: bool = False) -> str:
    """At most ten lines: what runs, where, on what, and a first request."""
    providers = "demo, for every name" if settings.demo else ", ".join([*settings.providers, "demo"])
    mode = "every request needs an API key" if has_keys else _OPEN_MODE
    return f"""\
Oncewise {__version__} is ready.
  API        {url}/api/threads/   (description: {url}/openapi.json)
  Figures    {url}/api/metrics/performance
  Health     {url}/health/readiness
  Store      {shown_url(settings.database_url)}
  Workers    {settings.workers}{", with a Valkey server of their own" if own_valkey else ""}
  Providers  {providers} (default: {settings.default_provider})
  Mode       {"demo; " if settings.demo else ""}{mode}
  Try        {create_thread_command(url, "authorization: Bearer ow_..." if has_keys else "x-org-id: org_demo")}"""


def create_thread_command(url: str, who: str = "x-org-id: org_demo") -> str:
    """A first request; without keys it works as it stands."""
    return f"""curl -s {url}/api/threads/ -H 'content-type: application/json' -H '{who}' -d '{{}}'"""
