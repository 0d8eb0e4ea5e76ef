"""The seam between queries and engines: a query is one synchronous function of a connection, an engine runs it.

What differs between SQLite and PostgreSQL in SQL stands here and nowhere else: the clock, and insert-if-missing.

Deliberately absent: connections, threads and drivers. An engine may run a function more than once (a transaction that
was given up for a neighbour's sake is repeated), so a function keeps no state between its calls.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

__all__ = ["UNKNOWN", "Database", "DatabaseClock", "DatabaseTime", "begun_at", "database_time_s", "insert_missing"]

Result = TypeVar("Result")

UNKNOWN = 2**31
"""How many neighbours there are where nobody can tell."""

DatabaseClock = Callable[[sa.Connection], float]
"""Reads the time inside a transaction, in seconds since the Unix epoch."""


class Database(Protocol):
    """One database. Lives as long as the process; owned and closed by the composition root."""

    @property
    def dialect_name(self) -> str:
        """`sqlite` or `postgresql`."""
        ...

    async def write(self, work: Callable[[sa.Connection], Result]) -> Result:
        """Run `work` as one transaction and return its result once that is durable.

        All or nothing: what `work` raises is raised here, and the transaction left nothing behind. A caller that is
        cancelled gives up only the result; the transaction still commits.

        Raises:
            StorageUnavailable: the database does not answer. Nothing was written; but if it fell silent in COMMIT and
                cannot be asked what became of it, the rows alone can tell.
            StorageFull: no space is left; nothing was written.
        """
        ...

    async def read(self, work: Callable[[sa.Connection], Result]) -> Result:
        """Run `work` on one snapshot. It cannot write.

        Raises:
            StorageUnavailable: the database does not answer.
        """
        ...

    async def dead_owners(self) -> tuple[str, ...]:
        """Owners of open turns whose process is known to be gone: their leases need not be waited for.

        Raises:
            StorageUnavailable: the database does not answer.
        """
        ...

    async def alone(self) -> bool:
        """Whether no other process uses this database now. False where that cannot be known.

        Raises:
            StorageUnavailable: the database does not answer.
        """
        ...

    async def neighbours(self) -> int:
        """How many other processes use this database now; more than any where that cannot be known.

        Raises:
            StorageUnavailable: the database does not answer.
        """
        ...

    async def hazards(self) -> tuple[str, ...]:
        """What an operator should know about this database; empty if all is well. For people, one sentence each."""
        ...

    async def aclose(self) -> None:
        """Finish what was asked for, then close. Later calls raise `StorageUnavailable`."""
        ...


class DatabaseTime(FunctionElement[float]):
    """Seconds since the Unix epoch by the clock of the database, read when the statement runs."""

    inherit_cache = True
    type = sa.Double()


@compiles(DatabaseTime, "sqlite")
def _sqlite_time(_element: DatabaseTime, _compiler: SQLCompiler, **_options: Any) -> str:
    # unixepoch('subsec') says the same, but only from SQLite 3.42 on.
    return "(julianday('now') - 2440587.5) * 86400.0"


@compiles(DatabaseTime, "postgresql")
def _postgresql_time(_element: DatabaseTime, _compiler: SQLCompiler, **_options: Any) -> str:
    # now() stands still inside a transaction, also while it waits for a lock.
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


_TIME = sa.select(DatabaseTime())
_BEGUN = "oncewise.begun_at_s"


@contextmanager
def begun_at(conn: sa.Connection, time_s: float) -> Generator[None, None, None]:
    """Let the first look at the database's clock within the block be `time_s`, which the transaction began with.

    An engine that asks the database something at the start of every transaction asks for the time in the same breath.
    """
    # Taken once: a connection that broke within the block has no such property any more.
    info = conn.info
    info[_BEGUN] = time_s
    try:
        yield
    finally:
        info.pop(_BEGUN, None)


def database_time_s(conn: sa.Connection) -> float:
    """Seconds since the Unix epoch by the clock of the database: the one clock that all owners of turns share."""
    begun_s: float | None = conn.info.pop(_BEGUN, None)
    if begun_s is not None:
        return begun_s
    time_s: float = conn.execute(_TIME).scalar_one()
    return time_s


def insert_missing(conn: sa.Connection, table: sa.Table, **values: Any) -> None:
    """Insert a row unless one with its key is there; two transactions may do so at once."""
    insert = postgresql.insert if conn.dialect.name == "postgresql" else sqlite.insert
    conn.execute(insert(table).values(**values).on_conflict_do_nothing())
