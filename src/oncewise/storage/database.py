"""The seam between queries and engines: a query is one synchronous function of a connection, an engine runs it.

What differs between SQLite and PostgreSQL in SQL stands here and nowhere else: the clock, and insert-if-missing.

Deliberately absent: connections, threads and drivers. An engine may run a function more than once (a transaction that
was given up for a neighbour's sake is repeated), so a function keeps no state between its calls.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

__all__ = ["Database", "DatabaseClock", "database_time_s", "insert_missing"]

Result = TypeVar("Result")

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
            StorageUnavailable: the database does not answer; nothing was written.
            StorageFull: no space is left; nothing was written.
        """
        ...

    async def read(self, work: Callable[[sa.Connection], Result]) -> Result:
        """Run `work` on one snapshot. It cannot write.

        Raises:
            StorageUnavailable: the database does not answer.
        """
        ...

    async def aclose(self) -> None:
        """Finish what was asked for, then close. Later calls raise `StorageUnavailable`."""
        ...


class _DatabaseTime(FunctionElement[float]):
    """Seconds since the Unix epoch by the clock of the database, read when the statement runs."""

    inherit_cache = True
    type = sa.Double()


@compiles(_DatabaseTime, "sqlite")
def _sqlite_time(_element: _DatabaseTime, _compiler: SQLCompiler, **_options: Any) -> str:
    # unixepoch('subsec') says the same, but only from SQLite 3.42 on.
    return "(julianday('now') - 2440587.5) * 86400.0"


@compiles(_DatabaseTime, "postgresql")
def _postgresql_time(_element: _DatabaseTime, _compiler: SQLCompiler, **_options: Any) -> str:
    # now() stands still inside a transaction, also while it waits for a lock.
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


_TIME = sa.select(_DatabaseTime())


def database_time_s(conn: sa.Connection) -> float:
    """Seconds since the Unix epoch by the clock of the database: the one clock that all owners of turns share."""
    time_s: float = conn.execute(_TIME).scalar_one()
    return time_s


def insert_missing(conn: sa.Connection, table: sa.Table, **values: Any) -> None:
    """Insert a row unless one with its key is there; two transactions may do so at once."""
    insert = postgresql.insert if conn.dialect.name == "postgresql" else sqlite.insert
    conn.execute(insert(table).values(**values).on_conflict_do_nothing())
