"""Which engine a database URL means: the one place where the two are told apart.

PostgreSQL's driver is imported only for a URL of PostgreSQL: it comes with an extra, and takes a while.

Deliberately absent: how URLs are checked (`oncewise.settings`).
"""

import asyncio
from pathlib import Path
from types import ModuleType
from typing import Protocol

import sqlalchemy as sa

from oncewise.errors import StorageUnavailable
from oncewise.storage.database import Database
from oncewise.storage.sqlite import open_sqlite, revision_of

__all__ = ["DatabaseSettings", "is_there", "open_database", "revision", "upgrade"]


class DatabaseSettings(Protocol):
    """The settings of the same names."""

    @property
    def database_url(self) -> str: ...

    @property
    def database_connections(self) -> int: ...

    @property
    def database_transaction_pooling(self) -> bool: ...


async def open_database(settings: DatabaseSettings, *, owner: str, visit: bool = False) -> Database:
    """Open the database that the settings name.

    An SQLite file is made and brought to this version's schema; PostgreSQL must have it.

    Args:
        settings: Which database, and how it is used.
        owner: Name of this process, never used again; see `open_sqlite`.
        visit: A short look at a database that a server may have open, by a process that claims no turns.

    Raises:
        StorageUnavailable: the database cannot be opened; the sentence says what to do.
        SchemaMismatch: its schema is not this version's.
    """
    if not _is_postgres(settings):
        return await open_sqlite(str(_file(settings)), owner=owner, checkpoints=not visit)
    postgres = _postgres()
    limits = postgres.PostgresLimits(connections=1 if visit else settings.database_connections)
    database: Database = await postgres.open_postgres(
        settings.database_url,
        owner=owner,
        limits=limits,
        transaction_pooling=settings.database_transaction_pooling,
        visit=visit,
    )
    return database


def is_there(settings: DatabaseSettings) -> bool:
    """Whether there is a database to look into: a server is, until it is asked; a file may not have been made."""
    return _is_postgres(settings) or _file(settings).exists()


async def revision(settings: DatabaseSettings) -> str | None:
    """The revision of the database's schema; None if it is empty. Changes nothing.

    Raises:
        StorageUnavailable: the database cannot be opened.
    """
    if _is_postgres(settings):
        found: str | None = await _postgres().current_postgres(
            settings.database_url, transaction_pooling=settings.database_transaction_pooling
        )
        return found
    return await asyncio.to_thread(revision_of, str(_file(settings)))


async def upgrade(settings: DatabaseSettings, *, owner: str) -> None:
    """Make the database, or bring it to this version's schema.

    Raises:
        StorageUnavailable: it cannot be opened or changed; nothing was changed.
        SchemaMismatch: it is newer than this version; nothing was changed.
    """
    if _is_postgres(settings):
        await _postgres().upgrade_postgres(
            settings.database_url, transaction_pooling=settings.database_transaction_pooling
        )
    else:
        # Opening a file is what brings it up to date, here as in the server.
        await (await open_sqlite(str(_file(settings)), owner=owner)).aclose()


def _is_postgres(settings: DatabaseSettings) -> bool:
    return settings.database_url.startswith("postgres")


def _file(settings: DatabaseSettings) -> Path:
    path = sa.make_url(settings.database_url).database
    if not path:
        raise StorageUnavailable("An SQLite database needs a file.")
    return Path(path).expanduser()


def _postgres() -> ModuleType:
    try:
        from oncewise.storage import postgres  # noqa: PLC0415 - see the module's docstring
    except ModuleNotFoundError as error:
        if error.name != "asyncpg":
            raise
        raise StorageUnavailable("PostgreSQL needs its driver: pip install 'oncewise[cluster]'.") from None
    return postgres
