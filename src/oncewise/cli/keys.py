"""`oncewise keys`: API keys, made and revoked in the database itself.

The first key cannot come over HTTP, where nobody could yet say that they may make one. A running server sees the change
within about a second.

Deliberately absent: what a key may do (`oncewise.api.auth`).
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TypeVar

from uuid_utils import uuid7

from oncewise.cli.failure import CommandFailed
from oncewise.errors import NotFound
from oncewise.model import ApiKey, KeyRole
from oncewise.service.keys import Keys
from oncewise.settings import Settings
from oncewise.storage.engines import is_there, open_database
from oncewise.storage.keys import SqlKeyStore

__all__ = ["any_key", "create", "listed", "revoke"]

Result = TypeVar("Result")


def create(settings: Settings, role: KeyRole, org_id: str | None) -> tuple[str, str]:
    """Make a key; return a line about it, and its secret. Errors as in `open_database`."""
    key, secret = _with_keys(settings, lambda keys: keys.create(role, org_id))
    return f"Key {key.id} for {_whom(key)}. This is its secret, which is shown only now:", secret


def listed(settings: Settings) -> list[str]:
    """A line for each key, oldest first: id, prefix, for whom, times. Errors as in `open_database`."""
    return [_line(key) for key in _with_keys(settings, lambda keys: keys.list())]


def revoke(settings: Settings, key_id: str) -> None:
    """End a key for ever. Errors as in `open_database`.

    Raises:
        CommandFailed: there is no such key.
    """
    try:
        _with_keys(settings, lambda keys: keys.revoke(key_id))
    except NotFound:
        raise CommandFailed("there is no key of that id; `oncewise keys list` shows all") from None


def any_key(settings: Settings) -> bool:
    """Whether a server on this database asks for keys. Makes no database; errors as in `open_database`."""

    async def exist(keys: Keys) -> bool:
        await keys.refresh()
        return keys.exist

    return is_there(settings) and _with_keys(settings, exist)


def _line(key: ApiKey) -> str:
    ended = f", revoked {_time(key.revoked_at_ms)}" if key.revoked_at_ms is not None else ""
    return f"{key.id}  {key.prefix}…  {_whom(key)}, made {_time(key.created_at_ms)}{ended}"


def _whom(key: ApiKey) -> str:
    return key.role.value if key.org_id is None else f"tenant {key.org_id}"


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _with_keys(settings: Settings, work: Callable[[Keys], Awaitable[Result]]) -> Result:
    async def run() -> Result:
        async with _opened(settings) as keys:
            return await work(keys)

    return asyncio.run(run())


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncGenerator[Keys, None]:
    database = await open_database(settings, owner=_new_id(), visit=True)
    try:
        yield Keys(SqlKeyStore(database, ids=_new_id))
    finally:
        await database.aclose()


def _new_id() -> str:
    return str(uuid7())
