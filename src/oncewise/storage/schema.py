"""Brings a database to the schema of this version.

A database that is up to date is recognised by one query; Alembic is imported only where there is something to do,
since importing it takes longer than all the rest of opening a database.

Deliberately absent: downgrades. Going back means restoring a backup; a migration that guesses would lose turns.
"""

import sqlalchemy as sa

from oncewise.errors import SchemaMismatch

__all__ = ["HEAD", "current", "require_current", "upgrade"]

HEAD = "0004"
"""Revision of the newest migration. Revisions are ordinals, so that a newer one is known without its script."""


def current(conn: sa.Connection) -> str | None:
    """Revision of the database; None if it is empty."""
    if not sa.inspect(conn).has_table("alembic_version"):
        return None
    revision: str | None = conn.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    return revision


def upgrade(conn: sa.Connection) -> bool:
    """Run the migrations that are missing, in the caller's transaction; False if there were none.

    Raises:
        SchemaMismatch: the database is newer than this code; nothing was changed.
    """
    revision = current(conn)
    if revision == HEAD:
        return False
    if revision is not None and revision > HEAD:
        raise SchemaMismatch
    _migrate(conn)
    return True


def require_current(conn: sa.Connection) -> None:
    """See that the database has this version's schema; change nothing.

    Raises:
        SchemaMismatch: it is older, newer, or empty; the sentence says what to do.
    """
    revision = current(conn)
    if revision == HEAD:
        return
    if revision is not None and revision > HEAD:
        raise SchemaMismatch(
            f"The database has schema {revision}, made by a newer version; this version's is {HEAD}: install that "
            "version."
        )
    have = "is empty" if revision is None else f"has schema {revision}"
    raise SchemaMismatch(f"The database {have}; this version needs schema {HEAD}: run `oncewise db upgrade` first.")


def _migrate(conn: sa.Connection) -> None:
    from alembic import command  # noqa: PLC0415 - see the module's docstring
    from alembic.config import Config  # noqa: PLC0415

    config = Config(attributes={"connection": conn})
    config.set_main_option("script_location", "oncewise.storage:migrations")
    config.set_main_option("path_separator", "os")
    command.upgrade(config, HEAD)
