"""`oncewise db`: the revision of a database's schema.

Deliberately absent: downgrades (see `oncewise.storage.schema`).
"""

import asyncio
from pathlib import Path

import sqlalchemy as sa
from uuid_utils import uuid7

from oncewise.storage import schema
from oncewise.storage.sqlite import open_sqlite, revision_of

__all__ = ["current", "upgrade"]


def current(database_url: str) -> str:
    """One line: the revision of the database and that of this version. Changes nothing, makes no file.

    Raises:
        StorageUnavailable: see `revision_of`.
    """
    path = _path(database_url)
    if not path.exists():
        return f"no database yet; this version's schema is {schema.HEAD}"
    return f"{revision_of(str(path)) or 'empty'}; this version's schema is {schema.HEAD}"


def upgrade(database_url: str) -> str:
    """Make or upgrade the database; return one line about it.

    Raises:
        StorageUnavailable, SchemaMismatch: see `open_sqlite`.
    """

    async def open_and_close() -> None:
        # Opening a database is what brings it up to date, here as in the server.
        await (await open_sqlite(str(_path(database_url)), owner=str(uuid7()))).aclose()

    asyncio.run(open_and_close())
    return current(database_url)


def _path(database_url: str) -> Path:
    return Path(sa.make_url(database_url).database or "").expanduser()
