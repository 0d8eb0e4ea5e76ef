"""The SQLite engine: where it opens, what it does when the disk or another process is in the way."""

import asyncio
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import sqlalchemy as sa

from oncewise.errors import SchemaMismatch, StorageFull, StorageUnavailable
from oncewise.model import TurnState
from oncewise.storage import ledger, pairs
from oncewise.storage.owners import alone
from oncewise.storage.sqlite import SqliteDatabase, open_sqlite
from oncewise.storage.tables import orgs
from tests.support.storage import Storage, sqlite_storage, statements, storage_on


@pytest.fixture
async def storage(tmp_path: Path) -> AsyncGenerator[Storage, None]:
    """The ports on a new SQLite file."""
    async with sqlite_storage(tmp_path) as ports:
        yield ports


def adding(name: str, chars: int = 0):
    return lambda conn: conn.execute(sa.insert(orgs).values(id=name + "x" * chars, created_at_ms=0)).close()


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def count(conn: sa.Connection) -> int:
    return conn.execute(sa.select(sa.func.count()).select_from(orgs)).scalar_one()


# -- opening -----------------------------------------------------------------------------------------------------


async def test_missing_directories_are_made(tmp_path: Path):
    """A first start on a fresh machine."""
    database = await open_sqlite(str(tmp_path / "a" / "b c%?#" / "x.db"), owner="o")
    await database.write(adding("a"))
    await database.aclose()

    assert (tmp_path / "a" / "b c%?#" / "x.db").exists()


async def test_a_directory_that_cannot_be_made_is_told_clearly(tmp_path: Path):
    """At start, not at the first request."""
    (tmp_path / "file").write_text("")

    with pytest.raises(StorageUnavailable, match="directory"):
        await open_sqlite(str(tmp_path / "file" / "x.db"), owner="o")


async def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path):
    """Somebody else's file."""
    path = tmp_path / "x.db"
    path.write_text("not a database, but long enough to be taken for the header of one" * 20)

    with pytest.raises(StorageUnavailable):
        await open_sqlite(str(path), owner="o")
    assert path.read_text().startswith("not a database")


async def test_a_newer_schema_is_refused(tmp_path: Path):
    """And no worker is left behind."""
    path = str(tmp_path / "x.db")
    await (await open_sqlite(path, owner="o")).aclose()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()

    with pytest.raises(SchemaMismatch):
        await open_sqlite(path, owner="o")
    assert names_in(tmp_path / "x.db.owners") == set()


@pytest.mark.parametrize("owner", ["", "..", "a/b", "a b", "x" * 129])
async def test_an_owner_is_a_plain_file_name(tmp_path: Path, owner: str):
    """It becomes one."""
    with pytest.raises(ValueError, match=re.escape("A-Za-z0-9")):
        await open_sqlite(str(tmp_path / "x.db"), owner=owner)


async def test_many_may_start_on_an_empty_file_at_once(tmp_path: Path):
    """One makes and migrates it, the others find it done."""
    path = str(tmp_path / "x.db")
    opened = await asyncio.gather(*(open_sqlite(path, owner=f"o{n}") for n in range(4)))
    for n, database in enumerate(opened):
        await database.write(adding(f"{n}"))

    assert await opened[0].read(count) == 4
    await asyncio.gather(*(database.aclose() for database in opened))


async def test_a_start_waits_for_another_processs_start(tmp_path: Path):
    """Unguarded, one in two hundred openings of a new file at the same moment found it locked."""
    path = tmp_path / "x.db"
    owners = tmp_path / "x.db.owners"
    owners.mkdir()
    with alone(owners, within_s=0):
        opening = asyncio.ensure_future(open_sqlite(str(path), owner="o"))
        done, _ = await asyncio.wait({opening}, timeout=0.3)
        assert not done
        assert names_in(tmp_path) == {"x.db.owners"}
    await (await opening).aclose()


async def test_closing_leaves_the_file_alone_and_no_thread(tmp_path: Path):
    """The log is folded in: the file can be copied or deleted."""
    database = await open_sqlite(str(tmp_path / "x.db"), owner="o")
    await database.write(adding("a"))
    await database.read(count)
    await database.aclose()

    assert names_in(tmp_path) == {"x.db", "x.db.owners"}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("oncewise-sqlite")]


async def test_the_pragmas_that_promises_rest_on(storage: Storage):
    """Told means it survives power loss; cascades work; only the writer checkpoints."""

    def of(*names: str):
        return lambda conn: [conn.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]

    full, immediately = 2, 5000
    writer = await storage.database.write(of("journal_mode", "synchronous", "foreign_keys", "busy_timeout"))
    assert writer == ["wal", full, 1, immediately]
    assert await storage.database.write(of("wal_autocheckpoint")) == [1000]
    assert await storage.database.read(of("query_only", "wal_autocheckpoint")) == [1, 0]


# -- somebody else holds the file --------------------------------------------------------------------------------


async def test_a_file_locked_for_too_long_is_unavailable_and_then_works_again(tmp_path: Path):
    """All who queue behind the lock wait for it together, once; reads go on."""
    path = str(tmp_path / "x.db")
    database = await open_sqlite(path, owner="o", busy_timeout_s=0.3)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    writes = [asyncio.ensure_future(database.write(adding(f"{n}"))) for n in range(20)]
    assert await database.read(count) == 0

    outcomes = await asyncio.gather(*writes, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {StorageUnavailable}
    assert 0.3 <= time.monotonic() - started < 2
    other.execute("ROLLBACK")
    other.close()
    await database.write(adding("a"))
    assert await database.read(count) == 1
    await database.aclose()


# -- no space ----------------------------------------------------------------------------------------------------


async def page_limit(database: SqliteDatabase, pages: int | None) -> None:
    """Let the file grow by so many pages, or as it likes; the limit holds on the writer's connection."""

    def limit(conn: sa.Connection) -> None:
        used = conn.exec_driver_sql("PRAGMA page_count").scalar_one()
        conn.exec_driver_sql(f"PRAGMA max_page_count = {used + pages if pages is not None else 2**30}")

    await database.write(limit)


async def test_a_full_database_refuses_writes_keeps_reading_and_recovers(storage: Storage):
    """Without a restart, and with everything that was acknowledged."""
    await storage.database.write(adding("a"))
    await page_limit(storage.database, 2)

    with pytest.raises(StorageFull):
        await storage.database.write(adding("b", 100_000))
    assert await storage.database.read(count) == 1
    await storage.database.write(adding("b", 100_000))
    assert await storage.database.read(count) == 2


async def test_a_text_that_does_not_fit_harms_none_of_its_neighbours(storage: Storage):
    """SQLite may give up the whole transaction of a group; the others are repeated alone."""
    entered, opened = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def hold(conn: sa.Connection) -> None:
        loop.call_soon_threadsafe(entered.set)
        asyncio.run_coroutine_threadsafe(opened.wait(), loop).result(10)

    await page_limit(storage.database, 4)
    held = asyncio.ensure_future(storage.database.write(hold))
    await entered.wait()
    group = [
        asyncio.ensure_future(storage.database.write(work)) for work in (adding("a"), adding("b", 100_000), adding("c"))
    ]
    await asyncio.sleep(0)
    opened.set()

    outcomes = await asyncio.gather(held, *group, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), type(None), StorageFull, type(None)]
    assert await storage.database.read(count) == 2


async def test_a_group_is_bounded(storage: Storage):
    """Functions share a commit, and no one waits for the commit of thousands."""
    entered, opened = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def hold(conn: sa.Connection) -> None:
        loop.call_soon_threadsafe(entered.set)
        asyncio.run_coroutine_threadsafe(opened.wait(), loop).result(10)

    transactions: list[object] = []
    held = asyncio.ensure_future(storage.database.write(hold))
    await entered.wait()
    group = [
        asyncio.ensure_future(storage.database.write(lambda conn: transactions.append(conn.get_transaction())))
        for _ in range(300)
    ]
    await asyncio.sleep(0)
    opened.set()
    await asyncio.gather(held, *group)

    assert [transactions.count(each) for each in dict.fromkeys(transactions)] == [128, 128, 44]


async def test_a_failure_within_a_group_that_was_given_up_is_forgotten(storage: Storage):
    """It may have come of a neighbour that left nothing behind: what counts is how the function ends alone."""
    entered, opened = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def hold(conn: sa.Connection) -> None:
        loop.call_soon_threadsafe(entered.set)
        asyncio.run_coroutine_threadsafe(opened.wait(), loop).result(10)

    def full(_conn: sa.Connection) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    held = asyncio.ensure_future(storage.database.write(hold))
    await entered.wait()
    runs: list[str] = []

    def takes_the_name(conn: sa.Connection) -> None:
        adding("a")(conn)
        runs.append("took")
        if len(runs) > 1:
            full(conn)

    group = [asyncio.ensure_future(storage.database.write(work)) for work in (takes_the_name, adding("a"), full)]
    await asyncio.sleep(0)
    opened.set()

    outcomes = await asyncio.gather(held, *group, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), StorageFull, type(None), StorageFull]
    assert await storage.database.read(count) == 1


FULL_DISK = """
import asyncio, resource, sys
from tests.support.storage import *
from oncewise.errors import StorageFull

async def main():
    async with sqlite_storage(Path(sys.argv[1])) as storage:
        thread = await storage.thread()
        await storage.answered(thread, "before")
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, hard))
        claim = await storage.lead(thread, "during")
        for _ in range(3):
            try:
                await storage.ledger.commit(claim, answer("x" * 1_000_000))
            except StorageFull:
                print("full")
        print((await storage.read(claim)).state, len((await storage.threads.get("acme", thread)).messages))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        turn = await storage.ledger.commit(claim, answer("x" * 1_000_000))
        print(turn.state, len((await storage.threads.get("acme", thread)).messages))

asyncio.run(main())
"""


def test_a_limit_on_file_sizes_is_a_full_disk_and_passes(tmp_path: Path):
    """The kernel's refusal in the middle of a commit: nothing half-written, and the same commit works later."""
    program = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)

    assert done.stdout.splitlines() == ["full", "full", "full", "pending 2", "completed 4"], done.stderr
    with sqlite3.connect(tmp_path / "oncewise.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


# -- liveness ----------------------------------------------------------------------------------------------------

LEADER = """
import asyncio, sys
from oncewise.model import Heartbeat
from tests.support.storage import *

async def main():
    database = await open_sqlite(sys.argv[1], owner="killed")
    storage = storage_on(database)
    claim = (await storage.ledger.admit(ask("acme", await storage.thread()), owner="killed", **storage.options)).claim
    await storage.ledger.beat([Heartbeat(claim, "half", 1)], lease_s=3600)
    print(claim.thread_id, claim.turn_id, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def leading_process(path: str) -> subprocess.Popen[str]:
    """A process that leads a turn and prints its thread and id."""
    return subprocess.Popen([sys.executable, "-c", LEADER, path], stdout=subprocess.PIPE, text=True)


async def test_turns_of_a_killed_process_end_at_the_next_start(tmp_path: Path):
    """`kill -9`, restart: interrupted with its partial text at once, though the lease has an hour to run."""
    path = str(tmp_path / "x.db")
    with leading_process(path) as leader:
        thread, turn_id = (await asyncio.to_thread(leader.stdout.readline)).split()
        database = await open_sqlite(path, owner="next")
        storage = storage_on(database)
        assert await database.dead_owners() == ()
        leader.kill()
        leader.wait(10)

        dead = await database.dead_owners()
        assert dead == ("killed",)
        assert await storage.ledger.sweep(dead_owners=dead) == 1
        turn = await storage.ledger.turn("acme", thread, turn_id)
        assert (turn.state, turn.assistant_message.content) == (TurnState.INTERRUPTED, "half")
        assert await database.dead_owners() == ()
        await database.aclose()


async def test_ones_own_open_turns_are_not_of_the_dead(storage: Storage):
    """Sweeping must not end what this very process runs."""
    await storage.lead(await storage.thread())

    assert await storage.database.dead_owners() == ()


# -- turns of several processes ----------------------------------------------------------------------------------


def free(directory: Path) -> bool:
    """Whether nobody is in the block that one process at a time may be in."""
    try:
        with alone(directory, within_s=0):
            return True
    except TimeoutError:
        return False


async def test_a_process_writes_alone_from_its_begin_to_the_end_of_its_commit(tmp_path: Path):
    """What a commit checkpoints is inside: with that outside, affected versions of SQLite can corrupt the file."""
    owners = tmp_path / "x.db.owners"
    database = await open_sqlite(str(tmp_path / "x.db"), owner="o")
    seen: list[bool] = []

    @sa.event.listens_for(database._writer._engine, "commit")
    def _committing(_conn: sa.Connection) -> None:
        seen.append(free(owners))

    await database.write(lambda conn: seen.append(free(owners)))
    assert seen == [False, False]
    assert free(owners)
    await database.aclose()


async def test_a_writer_waits_for_its_turn(tmp_path: Path):
    """In its thread, not in the loop; what queued up meanwhile is one transaction."""
    database = await open_sqlite(str(tmp_path / "x.db"), owner="o")
    with alone(tmp_path / "x.db.owners", within_s=0):
        writing = [asyncio.ensure_future(database.write(adding(name))) for name in "abc"]
        done, _ = await asyncio.wait(writing, timeout=0.2)
        assert not done
        assert await database.read(count) == 0
    await asyncio.gather(*writing)
    assert await database.read(count) == 3
    await database.aclose()


async def test_a_turn_that_never_comes_is_an_unavailable_storage(tmp_path: Path):
    """A process that was stopped in the middle of writing; when it goes on, so do we."""
    database = await open_sqlite(str(tmp_path / "x.db"), owner="o", busy_timeout_s=0.1)
    with alone(tmp_path / "x.db.owners", within_s=0):
        with pytest.raises(StorageUnavailable):
            await database.write(adding("a"))
        with pytest.raises(StorageUnavailable, match="does not let go"):
            await open_sqlite(str(tmp_path / "x.db"), owner="p", busy_timeout_s=0.1)
        assert await database.read(count) == 0
    await database.write(adding("b"))
    assert await database.read(count) == 1
    await database.aclose()


async def test_closing_does_not_wait_for_ever_for_a_turn(tmp_path: Path):
    """The log stays beside the file then; whoever opens it next finds all."""
    path = str(tmp_path / "x.db")
    database = await open_sqlite(path, owner="o", busy_timeout_s=0.1)
    await database.write(adding("a"))
    with alone(tmp_path / "x.db.owners", within_s=0):
        await asyncio.wait_for(database.aclose(), 5)
    database = await open_sqlite(path, owner="p")
    assert await database.read(count) == 1
    await database.aclose()


# -- callers -----------------------------------------------------------------------------------------------------


async def test_errors_of_the_database_hold_no_values(storage: Storage):
    """A driver's exception is logged one day; the text of a message must not be in it."""
    secret = "the text of a message"
    await storage.database.write(adding(secret))

    with pytest.raises(sa.exc.IntegrityError) as duplicate:
        await storage.database.write(adding(secret))
    assert secret not in str(duplicate.value)
    await page_limit(storage.database, 0)
    with pytest.raises(StorageFull) as full:
        await storage.database.write(adding(secret, 100_000))
    assert secret not in f"{full.value}{full.value.__cause__}"


def test_work_of_a_closed_loop_is_committed_and_harms_nobody(tmp_path: Path):
    """The loop may end while the disk syncs; nobody is left to be told."""
    path = str(tmp_path / "x.db")
    database = asyncio.run(open_sqlite(path, owner="o"))

    async def leave() -> None:
        task = asyncio.ensure_future(database.write(adding("a")))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(leave())

    async def look() -> int:
        await database.write(adding("b"))
        seen = await database.read(count)
        await database.aclose()
        return seen

    assert asyncio.run(look()) == 2


# -- cost --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", statements())
async def test_no_statement_reads_through_a_table(storage: Storage, name: str):
    """A thread of ten thousand turns costs as much as one of ten: rows are found by index, and in its order."""
    sql = str(statements()[name].compile(dialect=sa.create_engine("sqlite://").dialect))
    sql = sql.replace("(__[POSTCOMPILE_dead_owners])", "('a', 'b')")

    def plan(conn: sa.Connection) -> list[str]:
        return [row[3] for row in conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", ("1",) * sql.count("?"))]

    steps = await storage.database.read(plan)
    in_order_of_a_partial_or_limited_index = "SCAN turns USING INDEX ix_turns_leases", "SCAN requests USING INDEX"
    for step in steps:
        # Of what is open, as many owners as there are processes.
        assert not step.startswith("USE TEMP B-TREE") or step == "USE TEMP B-TREE FOR DISTINCT", steps
        assert not step.startswith("SCAN") or step.startswith(
            ("SCAN CONSTANT", *in_order_of_a_partial_or_limited_index)
        )


@pytest.mark.parametrize(("statement", "index"), [(ledger._PLACE, "ix_turns_open"), (pairs._PAIR, "turn_id=?")])
async def test_the_narrower_of_two_indexes_is_used(storage: Storage, statement: sa.Select, index: str):
    """Through the thread's index, admission and commit grew slower with every turn the thread ever had."""
    sql = str(statement.compile(dialect=sa.create_engine("sqlite://").dialect))

    def plan(conn: sa.Connection) -> str:
        return str(conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", ("1",) * sql.count("?")).all())

    assert index in await storage.database.read(plan)


async def test_a_short_visit_leaves_folding_the_log_to_the_server(tmp_path: Path):
    """Two connections that do so at once can corrupt the file."""
    every = []
    for checkpoints in (True, False):
        database = await open_sqlite(str(tmp_path / "x.db"), owner=f"o{checkpoints}", checkpoints=checkpoints)
        every.append(await database.write(lambda conn: conn.exec_driver_sql("PRAGMA wal_autocheckpoint").scalar_one()))
        await database.aclose()

    assert every[0] > 0
    assert every[1] == 0
