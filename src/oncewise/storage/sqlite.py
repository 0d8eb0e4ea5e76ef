"""SQLite behind the `Database` protocol: one thread writes, a few threads read.

A transaction is one synchronous function on the writer's thread. No task can be cancelled inside one: with an
await between BEGIN and COMMIT, a cancelled request left its transaction open and the next request committed its row
(omnilib/aiosqlite#259). Functions that queue up while the disk syncs share the next transaction, each behind a
savepoint of its own, so that one sync pays for all (group commit). Nobody hears of a result before its COMMIT.

Only the writer checkpoints the write-ahead log, and the writers of several processes take turns, from BEGIN to the end
of what COMMIT checkpoints: SQLite 3.7.0 to 3.51.2 can corrupt a database when one connection checkpoints while another
commits (sqlite.org/wal.html), and its own way of waiting for a lock, by longer and longer sleeps, lets some wait for
seconds (docs/decisions/0030).

Deliberately absent: queries, network file systems, on which neither the log nor the locks work, and other programs that
write to the file: they take no turns.
"""

import asyncio
import os
import queue
import re
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.pool import NullPool, QueuePool

from oncewise.errors import OncewiseError, StorageFull, StorageUnavailable
from oncewise.storage.ledger import open_owners
from oncewise.storage.owners import OwnerLock, alone
from oncewise.storage.schema import current, upgrade

__all__ = ["SqliteDatabase", "open_sqlite", "revision_of"]

Result = TypeVar("Result")
Turn = Callable[[], AbstractContextManager[None]]

_BATCH = 128
_LOG_LIMIT_BYTES = 64 * 1024 * 1024

_UNAVAILABLE = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_NOMEM,
    }
)
# A quota and a limit on file sizes refuse a write with other errors than ENOSPC, which SQLite reports as these.
_REFUSED_WRITES = frozenset({sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE})

_OWNER = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")


def _storage_error(error: BaseException) -> OncewiseError | None:
    """What an error of the driver means to a caller; None for one that is not the database's condition."""
    driver_error = error.orig if isinstance(error, sa.exc.DBAPIError) else error
    if not isinstance(driver_error, sqlite3.Error):
        return None
    code = getattr(driver_error, "sqlite_errorcode", sqlite3.SQLITE_OK)
    if code & 0xFF == sqlite3.SQLITE_FULL or code in _REFUSED_WRITES:
        return StorageFull()
    return StorageUnavailable() if code & 0xFF in _UNAVAILABLE else None


# -- connections -------------------------------------------------------------------------------------------------


def _engine(path: Path, busy_timeout_s: float, *, begin: str, pragmas: tuple[str, ...], **pool: Any) -> sa.Engine:
    # hide_parameters: an exception must not carry message text into a log.
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        connect_args={"timeout": busy_timeout_s, "check_same_thread": False},
        hide_parameters=True,
        **pool,
    )

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _record: object) -> None:
        # The driver would begin transactions by itself, deferred ones: those fail at once when another writer was
        # quicker, whatever the busy timeout says.
        connection.isolation_level = None
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begun(conn: sa.Connection) -> None:
        conn.exec_driver_sql(begin)

    return engine


def _writer_engine(path: Path, busy_timeout_s: float, *, checkpoints: bool) -> sa.Engine:
    pragmas = (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"journal_size_limit={_LOG_LIMIT_BYTES}",
        *(() if checkpoints else ("wal_autocheckpoint=0",)),
    )
    return _engine(path, busy_timeout_s, begin="BEGIN IMMEDIATE", pragmas=pragmas, poolclass=NullPool)


def _reader_engine(path: Path, busy_timeout_s: float, readers: int) -> sa.Engine:
    return _engine(
        path,
        busy_timeout_s,
        begin="BEGIN",
        pragmas=("query_only=ON", "wal_autocheckpoint=0"),
        poolclass=QueuePool,
        pool_size=readers,
        max_overflow=0,
    )


# -- the writer --------------------------------------------------------------------------------------------------


class _Job:
    """One function on its way through the writer, and the future of the caller who waits for it."""

    __slots__ = ("error", "future", "loop", "result", "work")

    def __init__(self, work: Callable[[sa.Connection], Any], loop: asyncio.AbstractEventLoop) -> None:
        self.work = work
        self.loop = loop
        self.future: asyncio.Future[Any] = loop.create_future()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self, conn: sa.Connection) -> None:
        """Run the function behind a savepoint; raise only if the transaction itself is lost."""
        savepoint = conn.begin_nested()
        try:
            self.result = self.work(conn)
        except Exception as error:
            if _storage_error(error):
                raise
            savepoint.rollback()
            self.error = error
        else:
            savepoint.commit()

    def run_alone(self, conn: sa.Connection) -> None:
        """Run the function as the whole transaction, up to its COMMIT."""
        try:
            with conn.begin():
                self.result = self.work(conn)
        except Exception as error:  # noqa: BLE001 - it is handed to the caller
            self.error = error

    def tell(self) -> None:
        """Hand the outcome to the caller's loop, if both are still there."""
        try:
            self.loop.call_soon_threadsafe(self._resolve)
        except RuntimeError:
            # The loop was closed: nobody is left to be told, and the work is committed all the same.
            return

    def _resolve(self) -> None:
        if self.future.done():
            return
        if self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)


class _Writer:
    """The one thread that writes. It owns its connection and opens a new one after the disk failed it.

    Args:
        conn: The connection; from now on the writer's.
        turn: Enters the block in which this process alone writes; raises `TimeoutError`.
    """

    def __init__(self, conn: sa.Connection, turn: Turn) -> None:
        self._engine = conn.engine
        self._turn = turn
        self._conn: sa.Connection | None = conn
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="oncewise-sqlite-writer", daemon=True)
        self._thread.start()

    def put(self, job: _Job) -> None:
        self._jobs.put(job)

    def finish(self) -> None:
        """Run what is queued, then close. Blocks."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        open_ = True
        while open_:
            batch, open_ = self._next_batch()
            if batch:
                self._take_turn(batch)
                for job in batch:
                    job.tell()
        # The last one to close folds the log into the file. If another process is in its turn, that is not we.
        with suppress(OSError), self._turn():
            self._disconnect()
        self._disconnect()

    def _next_batch(self) -> tuple[list[_Job], bool]:
        """What is queued now, at least one job; False with the last one."""
        batch: list[_Job] = []
        job = self._jobs.get()
        while job is not None:
            batch.append(job)
            if len(batch) == _BATCH or self._jobs.empty():
                return batch, True
            job = self._jobs.get_nowait()
        return batch, False

    def _take_turn(self, batch: list[_Job]) -> None:
        try:
            with self._turn():
                self._transact(batch)
        except OSError as error:
            for job in batch:
                job.error = StorageUnavailable()
                job.error.__cause__ = error

    def _transact(self, batch: list[_Job]) -> None:
        try:
            conn = self._connection()
            if len(batch) == 1 or not self._together(conn, batch):
                self._one_by_one(conn, batch)
        except Exception as error:  # noqa: BLE001 - it is handed to the callers
            for job in batch:
                job.error = job.error or error
        self._judge(batch)

    @staticmethod
    def _together(conn: sa.Connection, batch: list[_Job]) -> bool:
        """Run the jobs in one transaction; False if it was lost, which leaves nothing of any of them."""
        transaction = conn.begin()
        try:
            for job in batch:
                job.run(conn)
            transaction.commit()
        except Exception as error:
            transaction.rollback()
            if _storage_error(error):
                return False
            raise
        return True

    @staticmethod
    def _one_by_one(conn: sa.Connection, batch: list[_Job]) -> None:
        # Also after a lost group: a text that does not fit on the disk must not fail its smaller neighbours.
        for job in batch:
            job.result = job.error = None
            job.run_alone(conn)

    def _judge(self, batch: list[_Job]) -> None:
        for job in batch:
            failed = job.error and _storage_error(job.error)
            if failed:
                failed.__cause__ = job.error
                job.error = failed
                self._disconnect()

    def _connection(self) -> sa.Connection:
        if self._conn is None:
            self._conn = self._engine.connect()
        return self._conn

    def _disconnect(self) -> None:
        if self._conn is not None:
            self._conn.close()
            self._conn = None


# -- the database ------------------------------------------------------------------------------------------------


class SqliteDatabase:
    """One database file, as a `Database`. Made by `open_sqlite`; close it with `aclose`."""

    dialect_name = "sqlite"

    def __init__(self, writer: sa.Connection, reader: sa.Engine, lock: OwnerLock, turn: Turn, *, readers: int) -> None:
        self._lock = lock
        self._writer = _Writer(writer, turn)
        self._reader_engine = reader
        self._readers = ThreadPoolExecutor(readers, "oncewise-sqlite-reader")
        self._closing: asyncio.Future[None] | None = None

    @property
    def owner(self) -> str:
        """The name under which this process claims turns."""
        return self._lock.owner

    async def write(self, work: Callable[[sa.Connection], Result]) -> Result:
        """See `Database.write`. Functions queue without a bound; whoever admits requests limits them."""
        if self._closing is not None:
            raise StorageUnavailable
        job = _Job(work, asyncio.get_running_loop())
        self._writer.put(job)
        result: Result = await job.future
        return result

    async def read(self, work: Callable[[sa.Connection], Result]) -> Result:
        """See `Database.read`."""
        if self._closing is not None:
            raise StorageUnavailable
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, work)

    def _read(self, work: Callable[[sa.Connection], Result]) -> Result:
        try:
            with self._reader_engine.connect() as conn:
                return work(conn)
        except Exception as error:
            failed = _storage_error(error)
            if failed:
                raise failed from error
            raise

    async def dead_owners(self) -> tuple[str, ...]:
        """See `Database.dead_owners`."""
        others = await self.read(open_owners) - {self.owner}
        return tuple(sorted(others - await asyncio.to_thread(self._lock.living))) if others else ()

    async def alone(self) -> bool:
        """See `Database.alone`."""
        return await asyncio.to_thread(self._lock.living) <= {self.owner}

    async def neighbours(self) -> int:
        """See `Database.neighbours`."""
        return len(await asyncio.to_thread(self._lock.living) - {self.owner})

    async def hazards(self) -> tuple[str, ...]:
        """See `Database.hazards`: none, also with other processes, since they take turns at writing."""
        return ()

    async def aclose(self) -> None:
        """See `Database.aclose`. May be called again."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(asyncio.to_thread(self._close))
        await asyncio.shield(self._closing)

    def _close(self) -> None:
        self._readers.shutdown()
        self._reader_engine.dispose()
        # Last, so that the writer's connection is the one that folds the log into the file.
        self._writer.finish()
        self._lock.close()


async def open_sqlite(
    path: str, *, owner: str, readers: int = 3, busy_timeout_s: float = 5.0, checkpoints: bool = True
) -> SqliteDatabase:
    """Open a database file, make it if it is missing, and bring it to this version's schema.

    Args:
        path: Of the file; missing directories are made. Beside it appear `-wal`, `-shm` and `.owners/`.
        owner: Name of this process: letters, digits, `_`, `.` and `-`, at most 128, and never used again.
        readers: Connections that read at the same time.
        busy_timeout_s: How long to wait for another process that holds the file.
        checkpoints: False for a short visit to a file that a server may have open: folding the log is the server's.

    Raises:
        StorageUnavailable: the file cannot be opened or made there.
        SchemaMismatch: a newer version made it.
    """
    if not _OWNER.fullmatch(owner):
        raise ValueError(_OWNER.pattern)
    return await asyncio.to_thread(_open, path, owner, readers, busy_timeout_s, checkpoints=checkpoints)


def _open(name: str, owner: str, readers: int, busy_timeout_s: float, *, checkpoints: bool) -> SqliteDatabase:
    path = Path(name).absolute()
    _require_writable(path)
    owners = Path(f"{path}.owners")
    try:
        lock = OwnerLock(owners, owner)
    except OSError as error:
        raise _not_opened(path, f"{owners.name} beside it cannot be written: {error.strerror}") from error
    turn = partial(alone, owners, within_s=busy_timeout_s)
    try:
        # Turning a file into WAL fails at once with "locked" if two processes do it, whatever the busy timeout says.
        with turn():
            writer = _prepared(path, _writer_engine(path, busy_timeout_s, checkpoints=checkpoints))
    except TimeoutError as error:
        lock.close()
        raise _not_opened(path, "another process does not let go of it") from error
    except BaseException:
        lock.close()
        raise
    return SqliteDatabase(writer, _reader_engine(path, busy_timeout_s, readers), lock, turn, readers=readers)


def _prepared(path: Path, engine: sa.Engine) -> sa.Connection:
    try:
        conn = engine.connect()
        try:
            with conn.begin():
                upgrade(conn)
        except BaseException:
            conn.close()
            raise
    except sa.exc.DBAPIError as error:
        raise _opening_error(path, error) or error from error
    return conn


def revision_of(path: str) -> str | None:
    """Revision of the schema in a file, read without changing it or leaving anything beside it; None if it is empty.

    Raises:
        StorageUnavailable: there is no such file, or it is no database.
    """
    # Not `mode=ro`: a reader that cannot write leaves the files of the log behind, as its own, where there were none.
    address = f"{Path(path).absolute().as_uri()}?mode=rw"
    engine = sa.create_engine("sqlite://", creator=lambda: sqlite3.connect(address, uri=True), poolclass=NullPool)
    try:
        with engine.connect() as conn:
            return current(conn)
    except sa.exc.DBAPIError as error:
        raise _opening_error(Path(path), error) or error from error


def _not_opened(path: Path, reason: str) -> StorageUnavailable:
    # Whoever starts the server reads this, and wants to know which file it is. No request is told.
    return StorageUnavailable(f"The database file {path} cannot be opened: {reason}.")


def _opening_error(path: Path, error: sa.exc.DBAPIError) -> OncewiseError | None:
    failed = _storage_error(error)
    return _not_opened(path, str(error.orig)) if isinstance(failed, StorageUnavailable) else failed


def _require_writable(path: Path) -> None:
    directory = path.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_opened(path, f"its directory cannot be made: {error.strerror}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        # SQLite would open the file and fail at the first write, when it makes its log beside it.
        raise _not_opened(path, "its directory cannot be written to")
    for file in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        if file.exists() and not os.access(file, os.R_OK | os.W_OK):
            # SQLite would open it for reading, let even BEGIN IMMEDIATE pass, and fail at the first write.
            raise _not_opened(path, f"{file.name} cannot be read and written")
