"""`oncewise db`: the revision of a database's schema.

Deliberately absent: downgrades (see `oncewise.storage.schema`).
"""

import asyncio

from uuid_utils import uuid7

from oncewise.settings import Settings
from oncewise.storage import engines, schema

__all__ = ["current", "is_current", "upgrade"]


def current(settings: Settings) -> str:
    """One line: the revision of the database and that of this version. Changes nothing, makes no file.

    Raises:
        StorageUnavailable: see `engines.revision`.
    """
    if not engines.is_there(settings):
        return f"no database yet; this version's schema is {schema.HEAD}"
    revision = asyncio.run(engines.revision(settings))
    return f"{revision or 'empty'}; this version's schema is {schema.HEAD}"


def is_current(settings: Settings) -> bool:
    """Whether the database has this version's schema, so that a server starts on it. Changes nothing.

    Raises:
        StorageUnavailable: see `engines.revision`.
    """
    return engines.is_there(settings) and asyncio.run(engines.revision(settings)) == schema.HEAD


def upgrade(settings: Settings) -> str:
    """Make or upgrade the database; return one line about it.

    Raises:
        StorageUnavailable, SchemaMismatch: see `engines.upgrade`.
    """
    asyncio.run(engines.upgrade(settings, owner=str(uuid7())))
    return current(settings)
