"""The real server with a fault in its database's way: `python -m tests.faults.server`.

Nothing of the product knows of faults. The server is put together as `oncewise serve` does it, with one difference: the
database that it is given kills or stops its own process at a named point, or fails at the n-th operation. What is asked
of the database is known by the name of the function that would run as the transaction.

Settings are those of the server, in `ONCEWISE_*`. The fault is named by the environment too:

============== ====================================================================================================
CRASH_AT       a `Point`; the process is killed there, or stopped where the name says `pause`
CRASH_AFTER_MS for `mid_stream`: milliseconds from the start of the call (400)
============== ====================================================================================================

SIGUSR2 makes it print how many tasks it has.
"""

import asyncio
import ctypes
import inspect
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any, TypeVar

import sqlalchemy as sa

from oncewise.api.app import App
from oncewise.api.server import Server
from oncewise.api.sockets import listen
from oncewise.api.sse import SseEncoder
from oncewise.bootstrap import Services, open_services
from oncewise.cli.start_up import log_to_terminal
from oncewise.errors import StorageUnavailable
from oncewise.ports import Lead
from oncewise.settings import Settings, load_settings
from oncewise.storage.database import Database
from oncewise.storage.engines import open_database

__all__ = ["CrashingDatabase", "FailingDatabase", "Point", "name_of"]

Result = TypeVar("Result")
Work = Callable[[sa.Connection], Result]

_PR_SET_PDEATHSIG = 1


class Point(StrEnum):
    """Where a process is killed or stopped: between the steps of a turn, and inside of its last one."""

    AFTER_CLAIM = "after_claim"  # its row is in, the provider is not yet called
    MID_STREAM = "mid_stream"  # the provider answers
    AFTER_VISIBLE = "after_visible"  # the row says that text was shown; none has left yet
    IN_TX = "in_tx"  # all statements of the last transaction are done, COMMIT is not sent
    BEFORE_ACK = "before_ack"  # the pair is stored, nobody was told
    PAUSE_IN_TX = "pause_in_tx"  # as `in_tx`, but the process is stopped and holds its locks


def name_of(work: Work[Any]) -> str:
    """What a transaction does: the name of the ledger's operation, else of the function itself."""
    operation = inspect.getclosurevars(work).nonlocals.get("operation", work)
    return str(getattr(operation, "__name__", "")).lstrip("_")


class CrashingDatabase:
    """Wraps a `Database`; the first time that the point is reached, this process ends or stops there."""

    def __init__(self, database: Database, point: Point, after_s: float = 0.0) -> None:
        self._database = database
        self._point: Point | None = point
        self._after_s = after_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    async def write(self, work: Work[Result]) -> Result:
        name = name_of(work)
        if name == "commit" and self._point in (Point.IN_TX, Point.PAUSE_IN_TX):
            return await self._database.write(lambda conn: self._inside(work, conn))
        result = await self._database.write(work)
        match name, self._point:
            case ("admit", Point.AFTER_CLAIM) if isinstance(result, Lead):
                _end_now()
            case ("record_call", Point.MID_STREAM):
                threading.Timer(self._after_s, _end_now).start()
            case ("mark_visible", Point.AFTER_VISIBLE) | ("commit", Point.BEFORE_ACK):
                _end_now()
        return result

    def _inside(self, work: Work[Result], conn: sa.Connection) -> Result:
        result = work(conn)
        point, self._point = self._point, None
        if point is Point.IN_TX:
            _end_now()
        if point is Point.PAUSE_IN_TX:
            # Once: resumed, it finds out for itself what became of its transaction.
            os.kill(os.getpid(), signal.SIGSTOP)
        return result


def _end_now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(10)


class FailingDatabase:
    """Wraps a `Database`; its n-th operation fails, and no other.

    Args:
        database: What is wrapped.
        nth: Which operation; the first has the number 1.
        done: Whether the operation is done and only its outcome lost: what a write cut off in COMMIT looks like when
            the database cannot be asked about it.

    Attributes:
        count: Operations so far.
        failed: What failed, by its name; None before.
    """

    def __init__(self, database: Database, nth: int, *, done: bool = False) -> None:
        self.count = 0
        self.failed: str | None = None
        self._database = database
        self._nth = nth
        self._done = done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    async def write(self, work: Work[Result]) -> Result:
        return await self._run(self._database.write, work)

    async def read(self, work: Work[Result]) -> Result:
        return await self._run(self._database.read, work)

    async def _run(self, run: Callable[[Work[Result]], Any], work: Work[Result]) -> Result:
        self.count += 1
        if self.count != self._nth:
            result: Result = await run(work)
            return result
        self.failed = name_of(work)
        if self._done:
            await run(work)
        raise StorageUnavailable


async def _storage(settings: Settings, owner: str) -> Database:
    # So that whoever reads the rows can tell which process to kill.
    print(f"owner {owner}", flush=True)
    database = await open_database(settings, owner=owner)
    point = os.environ.get("CRASH_AT")
    if point is None:
        return database
    after_s = float(os.environ.get("CRASH_AFTER_MS", "400")) / 1000
    return CrashingDatabase(database, Point(point), after_s)


class _Telling(Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, _tell_tasks)
        print(f"API http://127.0.0.1:{sockets[0].getsockname()[1]}/", flush=True)


def _tell_tasks() -> None:
    print(f"tasks {len(asyncio.all_tasks())}", flush=True)


def main() -> None:
    """Serve until a signal."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    settings = load_settings().settings
    log_to_terminal()

    async def open_all() -> Services:
        return await open_services(settings, SseEncoder(), open_storage=_storage)

    _Telling(App(open_all), drain_s=settings.drain_s).run(listen(settings.host, settings.port))


if __name__ == "__main__":
    main()
