"""What makes all workers on one database one deployment: a secret that is made at the first start.

Names that workers share outside the database are keyed with it. So two deployments on one Redis never meet, and nobody
who sees the names can try out whose they are.

Deliberately absent: what is named with it.
"""

import secrets

import sqlalchemy as sa

from oncewise.storage.database import Database, insert_missing
from oncewise.storage.tables import deployment

__all__ = ["deployment_secret"]

_SECRET = sa.select(deployment.c.secret)


def _read(conn: sa.Connection) -> str | None:
    return conn.execute(_SECRET).scalar()


def _make(conn: sa.Connection) -> str:
    # Several workers may start at once on a new database; the first one's stays.
    insert_missing(conn, deployment, id=1, secret=secrets.token_hex(32))
    secret: str = conn.execute(_SECRET).scalar_one()
    return secret


async def deployment_secret(database: Database) -> bytes:
    """The secret of this database's deployment; the same for all, from the first start on. Errors as the database's."""
    known = await database.read(_read)
    return bytes.fromhex(await database.write(_make) if known is None else known)
