"""PostgreSQL behind the `Database` protocol: one function is one transaction in a task of its own.

No request can cancel that task. With the request's own task inside, a client that hung up between BEGIN and COMMIT
left a connection behind whose state nobody knew. A connection in doubt is closed and never used again.

Writes are READ COMMITTED: whoever waited for the lock on a thread sees with the next statement what its last holder
committed, which is what admission needs, and nothing has to be repeated for it. Reads are REPEATABLE READ and
READ ONLY: one moment, whatever commits meanwhile.

If the connection breaks in COMMIT, nobody here knows what became of the transaction; the database does, by the
transaction's number. So it is asked, and only a transaction that left nothing behind is run again.

Deliberately absent: queries, and changes of the schema while a server starts (`oncewise db upgrade` makes them; two
versions that start together must not migrate under each other).
"""

import asyncio
import ssl
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Generic, TypeVar

import asyncpg
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from oncewise.errors import StorageFull, StorageUnavailable
from oncewise.storage import schema
from oncewise.storage.database import UNKNOWN, DatabaseTime, begun_at
from oncewise.storage.ledger import open_owners
from oncewise.storage.places import Places
from oncewise.storage.sign_of_life import SignOfLife

__all__ = ["PostgresDatabase", "PostgresLimits", "current_postgres", "open_postgres", "upgrade_postgres"]

Result = TypeVar("Result")

_OLDEST = 15
_TRIES = 4
_PAUSE_S = 0.01
_SECOND_LOOK_S = 0.3


@dataclass(frozen=True, slots=True)
class PostgresLimits:
    """How much, and how long, PostgreSQL is waited for.

    Attributes:
        connections: Open at a time, beside the one of the sign of life.
        connect_s: Until a new connection can be used. A request is refused within a second, before any provider call.
        queue_s: For a free connection while none of them gets anything done.
        lock_s: For a row that another transaction holds.
        statement_s: For one statement, by PostgreSQL's clock.
        idle_s: Between two statements of a transaction: a process that stopped in one must not hold its locks.
        command_s: For one answer, by ours; asyncpg would wait for ever for a server that is stopped or unplugged.
    """

    connections: int = 10
    connect_s: float = 0.8
    queue_s: float = 1.0
    lock_s: float = 1.0
    statement_s: float = 5.0
    idle_s: float = 5.0
    command_s: float = 6.0

    def session(self) -> dict[str, str]:
        """The limits that PostgreSQL itself keeps, as its settings."""
        limits_s = {
            "lock_timeout": self.lock_s,
            "statement_timeout": self.statement_s,
            "idle_in_transaction_session_timeout": self.idle_s,
        }
        return {name: f"{limit_s * 1000:.0f}ms" for name, limit_s in limits_s.items()}


# -- what went wrong ---------------------------------------------------------------------------------------------


class _Trouble(Enum):
    """What an error of the driver means."""

    CONFLICT = auto()  # rolled back for the sake of another transaction
    BROKEN = auto()  # the connection is gone
    SILENT = auto()  # no answer came in time; the connection is useless
    FULL = auto()
    REFUSED = auto()


# By SQLSTATE, or the longest beginning of one that stands here.
_MEANING = {
    "40001": _Trouble.CONFLICT,
    "40P01": _Trouble.CONFLICT,
    "08": _Trouble.BROKEN,
    "25P03": _Trouble.BROKEN,
    "57P": _Trouble.BROKEN,
    "53100": _Trouble.FULL,
    # After a failover a connection may lead to a standby.
    "25006": _Trouble.REFUSED,
    "28": _Trouble.REFUSED,
    "42501": _Trouble.REFUSED,
    "53": _Trouble.REFUSED,
    "55P03": _Trouble.REFUSED,
    "57014": _Trouble.REFUSED,
    "58": _Trouble.REFUSED,
    "XX": _Trouble.REFUSED,
}


def _driver_error(error: BaseException) -> BaseException:
    """The exception of asyncpg, or of the socket, behind one of SQLAlchemy."""
    if isinstance(error, sa.exc.DBAPIError) and error.orig is not None:
        # Not `driver_exception`, which some of SQLAlchemy's own wrappers lack.
        return error.orig.__cause__ or error.orig
    return error


def _trouble(error: BaseException) -> _Trouble | None:
    """None for an error that is not the database's condition, but a mistake in what it was told."""
    driver_error = _driver_error(error)
    if isinstance(driver_error, TimeoutError):
        return _Trouble.SILENT
    if isinstance(driver_error, asyncpg.InvalidCachedStatementError):
        # The schema changed under a prepared statement; the next run prepares it anew.
        return _Trouble.CONFLICT
    if isinstance(driver_error, asyncpg.PostgresError):
        state = driver_error.sqlstate or ""
        return next((_MEANING[state[:size]] for size in (5, 3, 2) if state[:size] in _MEANING), None)
    if isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated:
        return _Trouble.BROKEN
    # asyncpg complains of its caller and of the connection with one class, and has closed it in the latter case.
    return _Trouble.BROKEN if isinstance(driver_error, (asyncpg.InternalClientError, OSError)) else None


def _forget_values(error: BaseException) -> None:
    """Drop what PostgreSQL quotes of a row: the text of a message must not reach a log with the exception."""
    driver_error = _driver_error(error)
    if isinstance(driver_error, asyncpg.PostgresError):
        driver_error.detail = driver_error.where = None


# -- one transaction ---------------------------------------------------------------------------------------------

# What the transaction is called, and by which server: after a failover, a number may be another transaction's.
_NAME = (
    sa.cast(sa.func.pg_current_xact_id(), sa.Text).label("number"),
    sa.cast(sa.func.pg_postmaster_start_time(), sa.Text).label("server"),
)
_STATUS = sa.text(
    "SELECT pg_xact_status(CAST(CAST(:number AS TEXT) AS XID8)) "
    "WHERE CAST(pg_postmaster_start_time() AS TEXT) = CAST(:server AS TEXT)"
)


class _Read(Generic[Result]):
    """One run of a function that only reads.

    Attributes:
        name: PostgreSQL's name for the transaction, if it may have to be asked for.
        committing: Whether COMMIT was sent.
        result: What the function returned.
    """

    result: Result

    def __init__(self, work: Callable[[sa.Connection], Result], begin: sa.Select[Any] | None) -> None:
        self.name: dict[str, str] = {}
        self.committing = False
        self._work = work
        self._begin = begin

    def __call__(self, conn: sa.Connection) -> None:
        if self._begin is not None:
            conn.execute(self._begin)
        self.result = self._work(conn)


class _Write(_Read[Result]):
    """One run of a function as a transaction, up to its COMMIT."""

    def __call__(self, conn: sa.Connection) -> None:
        assert self._begin is not None  # noqa: S101  a write asks for its number
        begun = conn.execute(self._begin).one()
        self.name = {"number": begun.number, "server": begun.server}
        with begun_at(conn, begun.time_s):
            self.result = self._work(conn)
        self.committing = True
        conn.commit()


# -- the database ------------------------------------------------------------------------------------------------


class PostgresDatabase:
    """One PostgreSQL database, as a `Database`. Made by `open_postgres`; close it with `aclose`."""

    dialect_name = "postgresql"

    def __init__(self, url: str, *, owner: str, limits: PostgresLimits, transaction_pooling: bool) -> None:
        self._url = url
        self._owner = owner
        self._limits = limits
        self._pooled = transaction_pooling
        self._sign: SignOfLife | None = None
        self._places = Places(limits.connections, limits.queue_s)
        self._running: set[asyncio.Task[Any]] = set()
        self._closing: asyncio.Future[None] | None = None
        self._useless_before_s = 0.0
        self._engine = self._make_engine()
        self._writing = self._engine.execution_options(isolation_level="READ COMMITTED")
        self._reading = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        # Behind a transaction pooler a session is anybody's, so that each transaction brings its limits along.
        own = [sa.func.set_config(*limit, True) for limit in limits.session().items()] if transaction_pooling else []
        self._limit = sa.select(*own) if own else None
        self._begin = sa.select(DatabaseTime().label("time_s"), *_NAME, *own)

    # -- connections ---------------------------------------------------------------------------------------------

    def _make_engine(self) -> AsyncEngine:
        # hide_parameters: an exception must not carry message text into a log.
        engine = create_async_engine(
            "postgresql+asyncpg://",
            connect_args={
                "async_creator_fn": self._connect,
                "prepared_statement_cache_size": 0 if self._pooled else 100,
            },
            pool_size=self._limits.connections,
            max_overflow=0,
            # The last one used has its statements prepared.
            pool_use_lifo=True,
            hide_parameters=True,
        )
        event.listen(engine.sync_engine, "connect", self._connected)
        event.listen(engine.sync_engine, "checkout", self._checked_out)
        return engine

    async def _connect(self) -> Any:
        return await _connect(self._url, self._limits, pooled=self._pooled)

    @staticmethod
    def _connected(_connection: object, record: Any) -> None:
        record.info["since_s"] = asyncio.get_running_loop().time()

    def _checked_out(self, connection: Any, record: Any, _proxy: object) -> None:
        """Refuse a connection that is known to be useless; the pool then opens another."""
        driver = connection.driver_connection
        if driver.is_closed() or record.info["since_s"] < self._useless_before_s:
            driver.terminate()
            raise sa.exc.DisconnectionError

    @asynccontextmanager
    async def _connection(self, engine: AsyncEngine) -> AsyncGenerator[AsyncConnection, None]:
        """A connection for one transaction; one that is in doubt afterwards is closed.

        Raises:
            StorageUnavailable: none can be had.
        """
        began_s = asyncio.get_running_loop().time()
        try:
            conn = await engine.connect()
        except Exception as error:
            if isinstance(error, TimeoutError) and not self._places.moved_since(began_s):
                # All who wait would find out the same, each after as long.
                self._places.turn_away()
            raise StorageUnavailable from error
        try:
            yield conn
        except Exception as error:
            if _trouble(error) in (_Trouble.BROKEN, _Trouble.SILENT):
                await self._drop(conn, error)
            raise
        finally:
            await conn.close()

    async def _drop(self, conn: AsyncConnection, error: Exception) -> None:
        if _trouble(error) is _Trouble.SILENT:
            # The others lead to the same silent place.
            self._useless_before_s = asyncio.get_running_loop().time()
        if not conn.invalidated:
            await conn.invalidate(error)

    # -- transactions --------------------------------------------------------------------------------------------

    async def write(self, work: Callable[[sa.Connection], Result]) -> Result:
        """See `Database.write`."""
        return await self._apart(self._run(self._writing, lambda: _Write(work, self._begin)))

    async def read(self, work: Callable[[sa.Connection], Result]) -> Result:
        """See `Database.read`."""
        return await self._apart(self._run(self._reading, lambda: _Read(work, self._limit)))

    async def _apart(self, transaction: Coroutine[Any, Any, Result]) -> Result:
        """Run it in a task that goes on when its caller is cancelled."""
        if self._closing is not None:
            transaction.close()
            raise StorageUnavailable
        task = asyncio.create_task(transaction)
        self._running.add(task)
        task.add_done_callback(self._ended)
        await asyncio.wait({task})
        return task.result()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            # Looked at, so that asyncio does not complain if its caller has left.
            task.exception()

    async def _run(self, engine: AsyncEngine, begin: Callable[[], _Read[Result]]) -> Result:
        async with self._places:
            for tries_left in reversed(range(_TRIES)):
                transaction = begin()
                try:
                    async with self._connection(engine) as conn:
                        await conn.run_sync(transaction)
                except Exception as error:
                    _forget_values(error)
                    if not await self._is_in(transaction, error):
                        if not tries_left:
                            raise StorageUnavailable from error
                        await asyncio.sleep(_PAUSE_S)
                        continue
                return transaction.result
        raise AssertionError  # the last try returns or raises

    async def _is_in(self, transaction: _Read[Any], error: Exception) -> bool:
        """Whether a transaction that met with `error` is in all the same; False if it should be run again.

        Raises:
            Exception: it left nothing behind, and running it again would not help.
        """
        trouble = _trouble(error)
        if trouble is None:
            raise error
        if transaction.committing and trouble in (_Trouble.BROKEN, _Trouble.SILENT):
            return await self._committed(transaction.name)
        if trouble in (_Trouble.BROKEN, _Trouble.CONFLICT):
            return False
        raise (StorageFull if trouble is _Trouble.FULL else StorageUnavailable) from error

    async def _committed(self, name: dict[str, str]) -> bool:
        """What became of a transaction whose COMMIT was not answered.

        Raises:
            StorageUnavailable: the database could not be asked in time; only the rows can tell.
        """
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + self._limits.connect_s
        status = None
        while loop.time() < give_up_s and status not in ("committed", "aborted"):
            # In progress: PostgreSQL has not yet seen that the connection is gone, or is about to commit.
            await asyncio.sleep(_PAUSE_S)
            with suppress(Exception):
                status = await self._status(name)
        if status not in ("committed", "aborted"):
            raise StorageUnavailable
        return status == "committed"

    async def _status(self, name: dict[str, str]) -> str | None:
        look = _Read(lambda conn: conn.execute(_STATUS, name).scalar(), self._limit)
        async with self._connection(self._reading) as conn:
            await conn.run_sync(look)
        return look.result

    # -- neighbours ----------------------------------------------------------------------------------------------

    async def dead_owners(self) -> tuple[str, ...]:
        """See `Database.dead_owners`."""
        suspects = await self._suspects()
        if suspects:
            await asyncio.sleep(_SECOND_LOOK_S)
            suspects &= await self._suspects()
        return tuple(sorted(suspects))

    async def _suspects(self) -> frozenset[str]:
        sign = self._sign
        if sign is None or not sign.may_judge:
            return frozenset()

        def look(conn: sa.Connection) -> frozenset[str]:
            others = open_owners(conn) - {self._owner}
            return sign.dead(conn, others) if others else frozenset()

        return await self.read(look)

    async def alone(self) -> bool:
        """See `Database.alone`."""
        return self._sign is not None and await self.read(self._sign.alone)

    async def neighbours(self) -> int:
        """See `Database.neighbours`."""
        return UNKNOWN if self._sign is None else await self.read(self._sign.others)

    async def hazards(self) -> tuple[str, ...]:
        """See `Database.hazards`."""
        off = await self.read(lambda conn: conn.execute(_UNSAFE).scalars().all())
        return tuple(_UNSAFE_WARNING.format(name) for name in off)

    # -- life ----------------------------------------------------------------------------------------------------

    async def start(self, *, visit: bool) -> None:
        """See that the database can be used, and give the sign of life unless this is a short visit."""
        await self.read(_require_usable)
        # All connections now: in the first burst of requests a busy loop could miss the time they are given.
        await asyncio.gather(*(self.read(_require_usable) for _ in range(self._limits.connections)))
        if not self._pooled and not visit:
            sign = SignOfLife(lambda: _connect(self._url, self._limits, idle_session_timeout="0"), self._owner)
            await sign.give()
            self._sign = sign

    async def aclose(self) -> None:
        """See `Database.aclose`. May be called again."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        while self._running:
            await asyncio.wait(self._running)
        if self._sign is not None:
            await self._sign.withdraw()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.connect_s):
                await self._engine.dispose()


# -- opening -----------------------------------------------------------------------------------------------------

_UNSAFE = sa.text(
    "SELECT name FROM pg_settings WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit') AND setting = 'off'"
)
_UNSAFE_WARNING = "PostgreSQL runs with {} = off: answers that were told can be lost when its machine fails."


def _require_usable(conn: sa.Connection) -> None:
    _require_server(conn)
    schema.require_current(conn)


def _require_server(conn: sa.Connection) -> None:
    """Before its schema is looked at: a server that is too old is not to be upgraded first and refused then."""
    show = sa.select(sa.func.current_setting("server_version_num"), sa.func.current_setting("server_encoding"))
    version, encoding = conn.execute(show).one()
    if int(version) < _OLDEST * 10_000:
        raise StorageUnavailable(f"PostgreSQL {_OLDEST} or newer is needed; this is version {int(version) // 10_000}.")
    if encoding != "UTF8":
        raise StorageUnavailable("The PostgreSQL database must have the encoding UTF8.")


# Many networks forget a connection that is idle for some minutes, and tell nobody.
_ALIVE = {"tcp_keepalives_idle": "30", "tcp_keepalives_interval": "10", "tcp_keepalives_count": "3"}


class _Connection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg is untyped
    """A connection that does not wait for an answer to its goodbye where none can be expected."""

    __slots__ = ()

    async def close(self, *, timeout: float | None = None) -> None:  # noqa: ASYNC109 - asyncpg's form
        # SQLAlchemy names a time (two seconds) for connections in doubt, and none for the others.
        if timeout is not None:
            self.terminate()
        await super().close()


async def _connect(url: str, limits: PostgresLimits, *, pooled: bool = False, **settings: str) -> Any:
    return await asyncpg.connect(
        _plain(url),
        timeout=limits.connect_s,
        command_timeout=limits.command_s,
        connection_class=_Connection,
        # A prepared statement belongs to a session, and a transaction pooler hands that to somebody else.
        statement_cache_size=0 if pooled else 100,
        server_settings={"application_name": "oncewise", **({} if pooled else limits.session() | _ALIVE), **settings},
    )


def _plain(url: str) -> str:
    """The URL as asyncpg reads it, with all that libpq knows behind the question mark."""
    return "postgresql://" + url.partition("://")[2]


async def open_postgres(
    url: str,
    *,
    owner: str,
    limits: PostgresLimits = PostgresLimits(),
    transaction_pooling: bool = False,
    visit: bool = False,
) -> PostgresDatabase:
    """Open a database whose schema is this version's.

    Args:
        url: As libpq takes it; the driver that SQLAlchemy would want in it is left out.
        owner: Name of this process, never used again.
        limits: See there.
        transaction_pooling: A pooler stands before PostgreSQL that gives each transaction another session. Nothing
            then rests on the session: no prepared statements, and no sign of life.
        visit: A short look by a process that claims no turns.

    Raises:
        StorageUnavailable: the database cannot be reached or used; the sentence says what to do.
        SchemaMismatch: its schema is older or newer, or not there yet.
    """
    database = PostgresDatabase(url, owner=owner, limits=limits, transaction_pooling=transaction_pooling)
    with _explaining():
        try:
            await database.start(visit=visit)
        except BaseException:
            await database.aclose()
            raise
    return database


_REASONS = {
    "28": "PostgreSQL refused the user or the password of the database URL.",
    "42": "PostgreSQL does not let the role of the database URL do that.",
    "55": "A table was in use for too long; nothing was changed. Try again.",
    "3D": "PostgreSQL has no database of the name in the database URL.",
    "53": "PostgreSQL takes no more connections: see its max_connections.",
    "57": "PostgreSQL is starting or stopping.",
    "08": "The connection to PostgreSQL was refused. If a transaction pooler stands before it, set "
    "ONCEWISE_DATABASE_TRANSACTION_POOLING=1.",
}


@contextmanager
def _explaining() -> Generator[None, None, None]:
    """Say why a database does not open."""
    try:
        yield
    except StorageUnavailable as error:
        if error.__cause__ is None:
            raise
        raise StorageUnavailable(_reason(error.__cause__)) from error


def _reason(error: BaseException) -> str:
    """In words that hold nothing of the URL."""
    driver_error = _driver_error(error)
    if isinstance(driver_error, asyncpg.PostgresError):
        return _REASONS.get((driver_error.sqlstate or "")[:2], "PostgreSQL refused the connection.")
    if isinstance(driver_error, (ValueError, FileNotFoundError)):
        return (
            "The database URL cannot be used: it must be postgresql://USER:PASSWORD@HOST:PORT/DATABASE, and the files "
            "that it needs (with sslmode=verify-full: sslrootcert) must be there."
        )
    # Not a subclass: asyncpg's own, for a server that has no TLS. What the system raises is one.
    if isinstance(driver_error, ssl.SSLError) or type(driver_error) is ConnectionError:
        return "PostgreSQL answers, but not with the TLS that the database URL asks for."
    return "PostgreSQL does not answer at the address in the database URL."


# -- the schema --------------------------------------------------------------------------------------------------

# A migration takes as long as it takes, and waits for another one as long as that takes.
_PATIENT = PostgresLimits(connections=1, connect_s=10.0, lock_s=0.0, statement_s=0.0, idle_s=0.0, command_s=86_400.0)
_UPGRADE_LOCK = 0x6F6E6365


async def current_postgres(url: str, *, transaction_pooling: bool = False) -> str | None:
    """Revision of the database; None if it is empty. Errors as in `open_postgres`."""

    def look(conn: sa.Connection) -> str | None:
        _require_server(conn)
        return schema.current(conn)

    async with _visited(url, transaction_pooling=transaction_pooling) as database:
        return await database.read(look)


async def upgrade_postgres(url: str, *, transaction_pooling: bool = False, table_s: float = 5.0) -> bool:
    """Bring the database to this version's schema; False if it was there. Of several at once, one does it.

    Args:
        url: As for `open_postgres`.
        transaction_pooling: As for `open_postgres`.
        table_s: How long to wait for a table that is in use. Behind a change that waits for a table, all who want to
            read that table wait too.

    Raises:
        StorageUnavailable: as `open_postgres`; or a table was in use for too long, and nothing was changed.
        SchemaMismatch: the database is newer than this version; nothing was changed.
    """

    def work(conn: sa.Connection) -> bool:
        _require_server(conn)
        conn.execute(sa.select(sa.func.pg_advisory_xact_lock(_UPGRADE_LOCK)))
        conn.execute(sa.select(sa.func.set_config("lock_timeout", f"{table_s * 1000:.0f}ms", True)))
        return schema.upgrade(conn)

    async with _visited(url, transaction_pooling=transaction_pooling) as database:
        return await database.write(work)


@asynccontextmanager
async def _visited(url: str, *, transaction_pooling: bool) -> AsyncGenerator[PostgresDatabase, None]:
    database = PostgresDatabase(url, owner="", limits=_PATIENT, transaction_pooling=transaction_pooling)
    try:
        with _explaining():
            yield database
    finally:
        await database.aclose()
