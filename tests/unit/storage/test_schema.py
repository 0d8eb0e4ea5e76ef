"""Bringing a database to this version's schema."""

import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from oncewise.errors import SchemaMismatch
from oncewise.storage.schema import HEAD, current, upgrade
from oncewise.storage.tables import metadata


def engine() -> sa.Engine:
    return sa.create_engine("sqlite://")


def definitions(conn: sa.Connection) -> dict[str, list[str]]:
    """What SQLite stores of each table and index, clause by clause: the order of constraints means nothing."""
    rows = conn.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    tidy = ((name, " ".join(sql.split()).removesuffix(" )")) for name, sql in rows)
    return {name: sorted(sql.split(", CONSTRAINT ")) for name, sql in tidy if name != "alembic_version"}


def test_the_migrations_make_exactly_the_tables_of_the_code():
    """Down to constraints and partial indexes, as SQLite spells them; and Alembic sees no difference."""
    with engine().begin() as made, engine().begin() as migrated:
        metadata.create_all(made)
        assert upgrade(migrated)

        assert definitions(migrated) == definitions(made)
        context = MigrationContext.configure(migrated, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_the_named_head_is_the_newest_migration():
    """`HEAD` stands in the code so that Alembic need not be imported to know it."""
    config = Config()
    config.set_main_option("script_location", "oncewise.storage:migrations")
    config.set_main_option("path_separator", "os")

    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_a_database_at_head_is_left_alone():
    """The second start changes nothing."""
    with engine().begin() as conn:
        assert current(conn) is None
        assert upgrade(conn)
        assert current(conn) == HEAD
        assert not upgrade(conn)


def test_a_failed_migration_leaves_no_half_of_itself():
    """The caller's transaction holds it all, tables included."""
    database = engine()

    @sa.event.listens_for(database, "connect")
    def _manual(connection, _record):
        connection.isolation_level = None

    @sa.event.listens_for(database, "begin")
    def _begin(conn):
        conn.exec_driver_sql("BEGIN")

    with database.connect() as conn:
        conn.begin()
        upgrade(conn)
        conn.rollback()
        assert sa.inspect(conn).get_table_names() == []


def test_a_database_of_a_newer_version_is_refused():
    """Guessing at an unknown schema could lose turns."""
    with engine().begin() as conn:
        upgrade(conn)
        conn.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")

        with pytest.raises(SchemaMismatch):
            upgrade(conn)


def test_starting_on_a_current_database_does_not_import_alembic(tmp_path: Path):
    """It would cost a third of the time a server has to start."""
    program = (
        "import asyncio, sys\n"
        "from oncewise.storage.sqlite import open_sqlite\n"
        "async def main():\n"
        "    database = await open_sqlite(sys.argv[1], owner='o')\n"
        "    await database.aclose()\n"
        "asyncio.run(main())\n"
        "print('alembic' in sys.modules)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "x.db")]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for _ in range(2)]

    assert runs == ["True", "False"]
