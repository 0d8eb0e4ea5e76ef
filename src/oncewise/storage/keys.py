"""API keys in SQL: made, listed, revoked and counted.

Deliberately absent: secrets. Only their hashes come here.
"""

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from oncewise.errors import NotFound
from oncewise.model import ApiKey, KeyRole
from oncewise.storage.database import Database, DatabaseClock, database_time_s, insert_missing
from oncewise.storage.rows import to_ms
from oncewise.storage.tables import api_keys, orgs

__all__ = ["SqlKeyStore"]

_KEY = sa.bindparam("this_key", type_=sa.Text)
_INSERT = sa.insert(api_keys)
_ALL = sa.select(api_keys).order_by(api_keys.c.created_at_ms, api_keys.c.id)
_ONE = sa.select(api_keys).where(api_keys.c.id == _KEY)
_REVOKE = (
    sa.update(api_keys)
    .where(api_keys.c.id == _KEY, api_keys.c.revoked_at_ms.is_(None))
    .values(revoked_at_ms=sa.bindparam("now_ms", type_=sa.BigInteger))
)
_COUNTS = sa.select(sa.func.count(), sa.func.count(api_keys.c.revoked_at_ms)).select_from(api_keys)


def _key(row: sa.Row[Any]) -> ApiKey:
    return ApiKey(**{**row._mapping, "role": KeyRole(row.role)})  # noqa: SLF001 - public under a private name


def _create(conn: sa.Connection, key: ApiKey) -> ApiKey:
    if key.org_id is not None:
        insert_missing(conn, orgs, id=key.org_id, created_at_ms=key.created_at_ms)
    row = {
        "id": key.id,
        "role": key.role.value,
        "org_id": key.org_id,
        "prefix": key.prefix,
        "secret_hash": key.secret_hash,
        "created_at_ms": key.created_at_ms,
    }
    conn.execute(_INSERT, row)
    return key


def _revoke(conn: sa.Connection, key_id: str, now_ms: int) -> ApiKey:
    conn.execute(_REVOKE, {"this_key": key_id, "now_ms": now_ms})
    row = conn.execute(_ONE, {"this_key": key_id}).first()
    if row is None:
        raise NotFound
    return _key(row)


def _counts(conn: sa.Connection) -> tuple[int, int]:
    made, revoked = conn.execute(_COUNTS).one()
    return made, revoked


class SqlKeyStore:
    """The `KeyStore` port on any `Database`, which it does not close.

    Args:
        database: Where the keys are.
        ids: Makes identifiers that were never made before.
        clock: Reads the database's clock.
    """

    def __init__(self, database: Database, *, ids: Callable[[], str], clock: DatabaseClock = database_time_s) -> None:
        self._database = database
        self._ids = ids
        self._clock = clock

    async def create(self, role: KeyRole, org_id: str | None, *, prefix: str, secret_hash: str) -> ApiKey:
        """See `KeyStore.create`."""
        key_id = self._ids()

        def work(conn: sa.Connection) -> ApiKey:
            return _create(conn, ApiKey(key_id, role, org_id, prefix, secret_hash, to_ms(self._clock(conn))))

        return await self._database.write(work)

    async def list(self) -> tuple[ApiKey, ...]:
        """See `KeyStore.list`."""
        return await self._database.read(lambda conn: tuple(_key(row) for row in conn.execute(_ALL)))

    async def revoke(self, key_id: str) -> ApiKey:
        """See `KeyStore.revoke`."""
        return await self._database.write(lambda conn: _revoke(conn, key_id, to_ms(self._clock(conn))))

    async def counts(self) -> tuple[int, int]:
        """See `KeyStore.counts`."""
        return await self._database.read(_counts)
