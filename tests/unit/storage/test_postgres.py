"""The PostgreSQL engine: what it refuses to open, and what it does when the database or the network is in the way."""

import asyncio
import gc
import re
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace

import asyncpg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.util import await_only

from oncewise.errors import SchemaMismatch, StorageFull, StorageUnavailable
from oncewise.model import Heartbeat, TurnState
from oncewise.storage.postgres import (
    PostgresDatabase,
    PostgresLimits,
    current_postgres,
    open_postgres,
    upgrade_postgres,
)
from oncewise.storage.schema import HEAD
from oncewise.storage.tables import metadata, orgs, turns
from tests.support.postgres import empty_database, fresh_database, own_server, shared_server
from tests.support.postgres_proxy import Cut, FailingNetwork, failing_network, transaction_pooler
from tests.support.storage import answer, statements, storage_on

QUICK = PostgresLimits(
    connections=3, connect_s=0.4, queue_s=0.4, lock_s=0.3, statement_s=0.6, idle_s=0.6, command_s=0.8
)


@pytest.fixture
async def url() -> AsyncGenerator[str, None]:
    """A database with the schema."""
    async with fresh_database() as url:
        yield url


@pytest.fixture
async def network() -> AsyncGenerator[FailingNetwork, None]:
    """What lies between us and the server."""
    async with failing_network(shared_server().port) as network:
        yield network


@asynccontextmanager
async def opened(url: str, owner: str = "worker-1", **options) -> AsyncGenerator[PostgresDatabase, None]:
    database = await open_postgres(url, owner=owner, **options)
    try:
        yield database
    finally:
        await database.aclose()


def through(url: str, port: int) -> str:
    """The same database by way of another port."""
    return url.replace(f":{shared_server().port}/", f":{port}/")


def name_of(url: str) -> str:
    """Of its database."""
    return url.rpartition("/")[2].partition("?")[0]


def adding(name: str):
    return lambda conn: conn.execute(sa.insert(orgs).values(id=name, created_at_ms=0)).close()


def names(conn: sa.Connection) -> list[str]:
    return list(conn.execute(sa.select(orgs.c.id).order_by(orgs.c.id)).scalars())


def sleeping(seconds: float):
    return lambda conn: conn.execute(sa.select(sa.func.pg_sleep(seconds))).close()


class Gate:
    """Holds a transaction until the test lets it go on."""

    def __init__(self) -> None:
        self.entered, self.opened = asyncio.Event(), asyncio.Event()

    def __call__(self, _conn: sa.Connection) -> None:
        self.entered.set()
        await_only(self.opened.wait())


def program(source: str, url: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", source, url], stdout=subprocess.PIPE, text=True)


async def took(awaitable) -> float:
    began_s = time.monotonic()
    with pytest.raises(StorageUnavailable):
        await awaitable
    return time.monotonic() - began_s


# -- opening -----------------------------------------------------------------------------------------------------


async def test_an_empty_database_is_refused_with_the_command_that_helps():
    """A server that migrated at its start could do so under the feet of the old version's."""
    async with empty_database() as url:
        with pytest.raises(SchemaMismatch, match=r"is empty.*oncewise db upgrade"):
            await open_postgres(url, owner="o")
        assert await current_postgres(url) is None

        assert await upgrade_postgres(url)
        assert not await upgrade_postgres(url)
        assert await current_postgres(url) == HEAD
        async with opened(url) as database:
            await database.write(adding("a"))


@pytest.mark.parametrize(("revision", "sentence"), [("0001", "has schema 0001.*db upgrade"), ("9999", "newer version")])
async def test_a_schema_behind_or_ahead_is_refused(revision: str, sentence: str):
    """With what to do about it."""
    async with empty_database() as url:
        await upgrade_postgres(url)
        await shared_server().execute(f"UPDATE alembic_version SET version_num = '{revision}'", name_of(url))

        with pytest.raises(SchemaMismatch, match=sentence):
            await open_postgres(url, owner="o")


async def test_a_server_that_is_too_old_is_refused_before_its_schema_is_made():
    """By its number, whoever asks; `db upgrade` would be in vain."""
    async with empty_database() as url, failing_network(shared_server().port) as network:
        connection = await asyncpg.connect(url)
        version = (await connection.fetchval("SHOW server_version_num")).encode()
        await connection.close()
        network.altered = {version: b"140012"}
        old = through(url, network.port)

        for attempt in (open_postgres(old, owner="o"), upgrade_postgres(old), current_postgres(old)):
            with pytest.raises(StorageUnavailable, match="15 or newer is needed; this is version 14"):
                await attempt
        assert await current_postgres(url) is None
        network.altered = {version: b"150000"}
        assert await upgrade_postgres(old)


async def test_upgrading_a_newer_database_changes_nothing():
    """An old version's command, run by mistake."""
    async with empty_database() as url:
        await upgrade_postgres(url)
        await shared_server().execute("UPDATE alembic_version SET version_num = '9999'", name_of(url))

        with pytest.raises(SchemaMismatch):
            await upgrade_postgres(url)
        assert await current_postgres(url) == "9999"


UPGRADE = """
import asyncio, sys
from oncewise.storage.postgres import upgrade_postgres
print(asyncio.run(upgrade_postgres(sys.argv[1])))
"""


async def test_of_two_upgrades_at_once_one_does_it():
    """Two shells, or two hosts that are set up at the same time."""
    async with empty_database() as url:
        both = [program(UPGRADE, url) for _ in range(2)]
        told = [(await asyncio.to_thread(process.communicate))[0] for process in both]

        assert sorted(told) == ["False\n", "True\n"]
        assert await current_postgres(url) == HEAD


COLUMNS = """\
SELECT attrelid::regclass::text, attname, atttypid::regtype::text, attnotnull
FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
WHERE relnamespace = 'public'::regnamespace AND attnum > 0"""
DEFINITIONS = (
    COLUMNS,
    "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE connamespace = 'public'::regnamespace",
    "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
)


def definitions(conn: sa.Connection) -> set[tuple[object, ...]]:
    """What PostgreSQL stores of columns, constraints and indexes."""
    rows = {tuple(row) for query in DEFINITIONS for row in conn.exec_driver_sql(query)}
    return {row for row in rows if "alembic" not in str(row[0])}


async def test_the_migrations_make_exactly_the_tables_of_the_code(url: str):
    """As PostgreSQL spells them; and Alembic sees no difference."""

    def differences(conn: sa.Connection) -> object:
        return compare_metadata(MigrationContext.configure(conn, opts={"compare_type": True}), metadata)

    async with empty_database() as other:
        made = PostgresDatabase(other, owner="", limits=PostgresLimits(), transaction_pooling=False)
        await made.write(metadata.create_all)
        async with opened(url) as migrated:
            assert await migrated.read(definitions) == await made.read(definitions)
            assert await migrated.read(differences) == []
        await made.aclose()


async def test_an_upgrade_does_not_make_everybody_wait_for_a_table(url: str):
    """Who reads it would queue behind the change that waits; so the change gives up, and says so."""
    async with opened(url) as database:
        gate = Gate()
        lock = sa.text("LOCK TABLE alembic_version")
        holding = asyncio.ensure_future(database.write(lambda conn: (conn.execute(lock), gate(conn))))
        await gate.entered.wait()
        with pytest.raises(StorageUnavailable, match="in use for too long; nothing was changed"):
            await upgrade_postgres(url, table_s=0.2)
        gate.opened.set()
        await holding


async def test_a_role_with_rights_on_rows_serves_and_cannot_upgrade(url: str):
    """What the server needs is not what the operator may do."""
    server, role = shared_server(), shared_server().name()
    rights = "SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public"
    await server.execute(f"CREATE ROLE {role} LOGIN; GRANT {rights} TO {role}", name_of(url))
    await server.execute(f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {role}", name_of(url))
    async with opened(url.replace("postgres@", f"{role}@")) as database:
        storage = storage_on(database)
        await storage.answered(await storage.thread())
    async with empty_database() as other:
        with pytest.raises(StorageUnavailable, match="does not let the role"):
            await upgrade_postgres(other.replace("postgres@", f"{role}@"))
    await server.execute(f"DROP OWNED BY {role}; DROP ROLE {role}", name_of(url))


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("postgresql://postgres@127.0.0.1:{port}/nowhere", "no database of the name"),
        ("postgresql://nobody:hunter2@127.0.0.1:{port}/postgres", "user or the password"),
        ("postgresql://postgres:hunter2@h/postgres?sslmode=verify-full&sslrootcert=/none.crt", "sslrootcert"),
        ("postgresql://u:hunter2@127.0.0.1:1/postgres", "does not answer"),
        ("postgresql://u:hunter2@no-such-host.invalid/postgres", "does not answer"),
        ("postgresql://u:hunter2@127.0.0.1:hunter2/postgres", "cannot be used: it must be"),
    ],
)
async def test_why_it_does_not_open_is_told_without_the_url(url: str, sentence: str):
    """One sentence, and no password in it or behind it."""
    with pytest.raises(StorageUnavailable, match=sentence) as refused:
        await open_postgres(url.format(port=shared_server().port), owner="o")
    assert "hunter2" not in str(refused.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_server_without_tls_is_told_from_one_that_is_away():
    """The usual mistake with a URL that was copied from another host."""
    with pytest.raises(StorageUnavailable, match="not with the TLS"):
        await open_postgres(shared_server().url().replace("sslmode=disable", "sslmode=require"), owner="o")
    # asyncpg leaves the socket to the collector.
    gc.collect()


async def test_the_ways_people_write_the_url(url: str):
    """As hosting services print it, and as SQLAlchemy would want it."""
    place = url.partition("://")[2]
    for scheme in ("postgres", "postgresql", "postgresql+asyncpg"):
        async with opened(f"{scheme}://{place}", visit=True) as database:
            assert await database.read(names) == []


async def test_every_session_is_limited(url: str):
    """The four timeouts, as PostgreSQL sees them, and our own."""

    def limits(conn: sa.Connection) -> list[str]:
        shown = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout", "transaction_isolation")
        return [conn.exec_driver_sql(f"SHOW {name}").scalar_one() for name in shown]

    async with opened(url) as database:
        assert await database.write(limits) == ["1s", "5s", "5s", "read committed"]
        assert await database.read(limits) == ["1s", "5s", "5s", "repeatable read"]


async def test_an_unsafe_server_is_a_hazard(url: str):
    """Told is stored, says the README; this server forgets."""
    async with opened(url) as database:
        hazards = await database.hazards()

    assert [hazard.split()[3] for hazard in hazards] == ["fsync", "full_page_writes"]


# -- COMMIT is not answered --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", Cut)
async def test_a_commit_that_is_not_answered_is_looked_up(url: str, network: FailingNetwork, cut: Cut):
    """In or not in: either way it is in once, and its caller hears so."""
    async with opened(through(url, network.port)) as database:
        network.cuts.append(cut)
        runs = []

        def work(conn: sa.Connection) -> str:
            runs.append(adding(f"run {len(runs)}")(conn))
            return f"told {len(runs)}"

        told = await database.write(work)

        in_first_run = cut is Cut.AFTER
        assert told == ("told 1" if in_first_run else "told 2")
        assert await database.read(names) == (["run 0"] if in_first_run else ["run 1"])


async def test_a_turn_whose_commit_is_not_answered_is_stored_once_and_told(url: str, network: FailingNetwork):
    """The claim is as good as before: not fenced by its own commit."""
    async with opened(through(url, network.port)) as database:
        storage = storage_on(database)
        thread = await storage.thread()
        network.cuts += [Cut.AFTER, Cut.AFTER]
        claim = await storage.lead(thread)
        turn = await storage.ledger.commit(claim, answer())

        assert turn is not None
        assert turn.state is TurnState.COMPLETED
        assert len((await storage.threads.get("acme", thread)).messages) == 2
        assert network.cuts == []


async def test_a_commit_that_nobody_can_be_asked_about_is_unavailable(url: str, network: FailingNetwork):
    """Within a second; who must know reads the row later."""
    async with opened(through(url, network.port), limits=QUICK) as database:
        gate = Gate()
        writing = asyncio.ensure_future(database.write(lambda conn: (adding("a")(conn), gate(conn))))
        await gate.entered.wait()
        network.silent = True
        gate.opened.set()

        assert await took(writing) < QUICK.command_s + QUICK.connect_s + 0.6
        network.silent = False
    async with opened(url) as database:
        assert await database.read(names) in ([], ["a"])


# -- the server is away ------------------------------------------------------------------------------------------


async def test_a_stopped_server_is_unavailable_at_once_and_used_again_when_it_is_back():
    """No restart of ours, and no connection of the time before is tried in vain."""
    with own_server() as server:
        await upgrade_postgres(server.url())
        async with opened(server.url()) as database:
            await database.write(adding("a"))
            server.stop()

            for work in (database.write(adding("b")), database.read(names)):
                assert await took(work) < 1.0
            await asyncio.to_thread(server.start)
            await database.write(adding("c"))
            assert await database.read(names) == ["a", "c"]


async def test_a_server_that_ends_sessions_is_not_noticed(url: str):
    """An administrator, a failover, a pooler that tidies up: the transaction is run again on another connection."""
    async with opened(url, limits=replace(QUICK, connections=1)) as database:
        for name in "abc":
            pid = await database.read(lambda conn: conn.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
            await shared_server().execute(f"SELECT pg_terminate_backend({pid})")
            await database.write(adding(name))

        runs = []

        def ended_in_the_middle(conn: sa.Connection) -> None:
            runs.append(1)
            adding("d")(conn)
            if len(runs) == 1:
                pid = conn.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
                await_only(shared_server().execute(f"SELECT pg_terminate_backend({pid})"))

        await database.write(ended_in_the_middle)
        assert await database.read(names) == ["a", "b", "c", "d"]
        assert len(runs) == 2


async def test_a_silent_server_is_given_up_and_nobody_queues_behind_it(url: str, network: FailingNetwork):
    """The one that was in the middle waits for its own limit; those behind it are refused within a second."""
    async with opened(through(url, network.port), limits=replace(QUICK, connections=2)) as database:
        await asyncio.gather(*(database.write(adding(name)) for name in "ab"))
        network.silent = True
        waits = await asyncio.gather(*(took(database.read(names)) for _ in range(20)))

        assert max(waits) < QUICK.command_s + QUICK.connect_s + 0.5
        assert sorted(waits)[-3] < 1.0
        opened_before = network.opened
        assert await took(database.read(names)) < 1.0
        network.silent = False
        assert await database.read(names) == ["a", "b"]
        assert network.opened > opened_before


async def test_a_busy_database_is_waited_for(url: str):
    """Longer than the patience for one that stands still, as long as it gets something done."""
    limits = replace(QUICK, connections=1)
    async with opened(url, limits=limits) as database:
        await asyncio.gather(*(database.read(sleeping(0.15)) for _ in range(8)))


# -- limits ------------------------------------------------------------------------------------------------------


async def test_a_statement_that_takes_too_long_is_ended_and_the_connection_kept(url: str):
    """By PostgreSQL, which then is ready for the next."""
    async with opened(url, limits=replace(QUICK, connections=1)) as database:
        pid = await database.read(lambda conn: conn.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
        assert 0.5 < await took(database.write(sleeping(5))) < 0.8

        assert await database.read(lambda conn: conn.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()) == pid


async def test_a_row_that_is_held_for_too_long_is_unavailable(url: str):
    """And its holder, who stopped in the middle, loses it: nobody can hold up a thread for ever."""
    async with opened(url, limits=QUICK) as database:
        storage = storage_on(database)
        thread = await storage.thread()
        gate = Gate()

        def hold(conn: sa.Connection) -> None:
            conn.exec_driver_sql("SELECT id FROM threads FOR UPDATE")
            gate(conn)
            adding("never")(conn)

        holding = asyncio.ensure_future(database.write(hold))
        await gate.entered.wait()
        assert 0.2 < await took(storage.admit(thread)) < 0.6

        await asyncio.sleep(QUICK.idle_s)
        claim = await storage.lead(thread)
        assert claim.idx == 0
        holding.cancel()
        gate.opened.set()


async def test_a_sweep_does_not_wait_for_a_thread_that_somebody_holds(url: str):
    """Other lost turns are ended meanwhile; that one later, should nobody who waits for it have taken it over."""
    async with opened(url, limits=QUICK) as database:
        storage = replace(storage_on(database), options={"lease_s": 0.0, "replay_window_s": 0.0, "queue_limit": 1})
        free, held = await storage.thread(), await storage.thread()
        claims = [await storage.lead(thread) for thread in (free, held)]
        gate = Gate()

        def hold(conn: sa.Connection) -> None:
            conn.execute(sa.text("SELECT id FROM threads WHERE id = :held FOR UPDATE"), {"held": held})
            gate(conn)

        holding = asyncio.ensure_future(database.write(hold))
        await gate.entered.wait()
        ended = await storage.ledger.sweep()
        still = [claim.thread_id for claim in claims if not (await storage.read(claim)).state.final]
        gate.opened.set()
        await holding

        assert (ended, still) == (1, [held])
        assert await storage.ledger.sweep() == 1


async def test_a_deadlock_is_run_again(url: str):
    """One of two that wait for each other is chosen by PostgreSQL, and nobody hears of it."""
    async with opened(url, limits=replace(QUICK, lock_s=5.0, statement_s=8.0, command_s=9.0)) as database:
        await asyncio.gather(*(database.write(adding(name)) for name in "ab"))
        met = asyncio.Barrier(2)
        first = [True, True]

        def crossing(me: int, order: str):
            def work(conn: sa.Connection) -> None:
                conn.exec_driver_sql(f"UPDATE orgs SET created_at_ms = created_at_ms + 1 WHERE id = '{order[0]}'")
                if first[me]:
                    first[me] = False
                    await_only(met.wait())
                conn.exec_driver_sql(f"UPDATE orgs SET created_at_ms = created_at_ms + 1 WHERE id = '{order[1]}'")

            return work

        await asyncio.gather(database.write(crossing(0, "ab")), database.write(crossing(1, "ba")))
        counts = await database.read(lambda conn: conn.execute(sa.select(orgs.c.created_at_ms)).scalars().all())
        assert counts == [2, 2]


async def test_a_schema_that_changes_under_a_prepared_statement_is_not_noticed():
    """Another host ran `oncewise db upgrade`."""
    async with empty_database() as url:
        await upgrade_postgres(url)
        async with opened(url, limits=replace(QUICK, connections=1)) as database:
            everything = sa.text("SELECT * FROM orgs")
            await database.write(adding("a"))
            for _ in range(2):
                await database.read(lambda conn: conn.execute(everything).all())
            await shared_server().execute("ALTER TABLE orgs ADD COLUMN label TEXT", name_of(url))

            assert await database.read(lambda conn: conn.execute(everything).all()) == [("a", 0, None)]


async def test_a_full_disk_is_full_and_passes(url: str):
    """PostgreSQL says so with an error of its own, here raised by hand."""
    full = sa.text("DO $$ BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END $$")
    async with opened(url) as database:
        with pytest.raises(StorageFull):
            await database.write(lambda conn: (adding("a")(conn), conn.execute(full)))
        assert await database.read(names) == []
        await database.write(adding("a"))


# -- heartbeats --------------------------------------------------------------------------------------------------


async def test_a_row_that_somebody_changes_keeps_no_other_turn_from_its_beat(url: str):
    """Nothing is said of the turn whose row is locked, and nobody waits for it; a moment later it beats as well."""
    async with opened(url) as database, opened(url, "worker-2") as other:
        storage = storage_on(database)
        busy, free = [await storage.lead(await storage.thread()) for _ in range(2)]
        beats = [Heartbeat(claim, "so far", 1) for claim in (busy, free)]
        locked, done = asyncio.Event(), asyncio.Event()

        def change(conn: sa.Connection) -> None:
            conn.execute(sa.update(turns).where(turns.c.id == busy.turn_id).values(visible=True))
            locked.set()
            await_only(done.wait())

        changing = asyncio.create_task(other.write(change))
        await locked.wait()
        began_s = time.monotonic()
        assert await storage.ledger.beat(beats, lease_s=10.0) == {free: True}
        assert time.monotonic() - began_s < PostgresLimits().lock_s
        done.set()
        await changing
        assert await storage.ledger.beat(beats, lease_s=10.0) == {busy: True, free: True}


# -- liveness ----------------------------------------------------------------------------------------------------

LEADER = """
import asyncio, sys
from oncewise.model import Heartbeat
from oncewise.storage.postgres import open_postgres
from tests.support.storage import ask, storage_on

async def main():
    database = await open_postgres(sys.argv[1], owner="killed")
    storage = storage_on(database)
    claim = (await storage.ledger.admit(ask("acme", await storage.thread()), owner="killed", **storage.options)).claim
    await storage.ledger.beat([Heartbeat(claim, "half", 1)], lease_s=3600)
    print(claim.thread_id, claim.turn_id, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_killed_process_is_known_to_be_dead_and_a_living_one_is_not(url: str):
    """Though its lease has an hour to run."""
    with program(LEADER, url) as leader:
        thread, turn_id = (await asyncio.to_thread(leader.stdout.readline)).split()
        async with opened(url, "next") as database:
            storage = storage_on(database)
            assert await database.dead_owners() == ()
            assert not await database.alone()
            leader.kill()
            leader.wait(10)
            async with asyncio.timeout(5):
                while (dead := await database.dead_owners()) == ():
                    await asyncio.sleep(0.05)

            assert dead == ("killed",)
            assert await database.alone()
            assert await storage.ledger.lapse(dead) == 1
            turn = await storage.ledger.turn("acme", thread, turn_id)
            assert (turn.state, turn.lease_lapsed) == (TurnState.PENDING, True)


async def test_a_lost_sign_of_life_is_given_again_and_judges_nobody_meanwhile(url: str):
    """All sessions end, as when the database fails over: nobody is dead, and a moment later all can be seen again."""
    name = url.rpartition("/")[2].partition("?")[0]
    async with opened(url, "one") as one, opened(url, "two") as two:
        storage = replace(storage_on(one), owner="one")
        await storage.lead(await storage.thread())
        await shared_server().execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
        )

        assert await two.dead_owners() == ()
        async with asyncio.timeout(5):
            while await two.alone() or await one.alone():
                await asyncio.sleep(0.05)
        assert await two.dead_owners() == ()


# -- behind a pooler ---------------------------------------------------------------------------------------------


async def test_a_transaction_pooler_that_was_not_declared_is_told_about(url: str):
    """It refuses our session's limits; the sentence names the setting."""
    async with transaction_pooler(shared_server().port, name_of(url)) as pooler:
        with pytest.raises(StorageUnavailable, match="ONCEWISE_DATABASE_TRANSACTION_POOLING"):
            await open_postgres(through(url, pooler.port), owner="o")


async def test_nothing_rests_on_the_session_behind_a_transaction_pooler(url: str):
    """Every transaction meets another session: statements, limits and leases hold; dead owners are not looked for."""
    async with transaction_pooler(shared_server().port, name_of(url)) as pooler:
        pooled = through(url, pooler.port)
        assert not await upgrade_postgres(pooled, transaction_pooling=True)
        async with opened(pooled, transaction_pooling=True) as database:
            storage = storage_on(database)
            thread = await storage.thread()
            for n in range(5):
                await storage.answered(thread, f"{n}")
            assert len((await storage.threads.get("acme", thread)).messages) == 10
            shown = await database.write(lambda conn: conn.exec_driver_sql("SHOW lock_timeout").scalar_one())
            assert shown == "1s"
            await storage.lead(thread)
            assert await database.dead_owners() == ()
            assert not await database.alone()


# -- cost --------------------------------------------------------------------------------------------------------


async def test_no_statement_reads_through_a_table(url: str):
    """Rows are found by index, and in its order, wherever PostgreSQL is given no better reason than a small table."""

    def plans(conn: sa.Connection) -> dict[str, list[str]]:
        for habit in ("seqscan", "bitmapscan", "sort"):
            conn.exec_driver_sql(f"SET LOCAL enable_{habit} = off")
        return {name: plan(conn, statement) for name, statement in statements().items()}

    def plan(conn: sa.Connection, statement: sa.Executable) -> list[str]:
        sql = str(statement.compile(dialect=conn.dialect)).replace("(__[POSTCOMPILE_dead_owners])", "('a', 'b')")
        return [row[0] for row in conn.exec_driver_sql("EXPLAIN " + re.sub(r"\$\d+", "'1'", sql))]

    async with opened(url) as database:
        steps = await database.write(plans)
    slow = {name: lines for name, lines in steps.items() if any("Seq Scan" in line or "Sort" in line for line in lines)}
    assert slow == {}


# -- callers -----------------------------------------------------------------------------------------------------


async def test_errors_of_the_database_hold_no_values(url: str):
    """PostgreSQL quotes the row; a driver's exception is logged one day."""
    secret = "the text of a message"
    async with opened(url) as database:
        await database.write(adding(secret))
        with pytest.raises(sa.exc.IntegrityError) as duplicate:
            await database.write(adding(secret))

    error = duplicate.value
    while error is not None:
        assert secret not in str(error)
        error = error.__cause__ or error.__context__


async def test_a_cancelled_read_gives_its_connection_back(url: str):
    """Half-used connections would be used up."""
    async with opened(url, limits=replace(QUICK, connections=1)) as database:
        for _ in range(5):
            reading = asyncio.ensure_future(database.read(sleeping(0.05)))
            await asyncio.sleep(0.02)
            reading.cancel()
        assert await database.read(names) == []


async def test_importing_the_server_loads_no_driver():
    """One process with SQLite needs none, and need not have it installed."""
    program = "import sys, oncewise.api.app; print('asyncpg' in sys.modules)"
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
