"""Servers of every kind behind the ports: with a password, on a socket file, too old, and none at all."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from oncewise.coordination.redis import BadAddress, open_redis, server_of
from oncewise.errors import CoordinationUnavailable
from oncewise.ports import CoordinationChanged, LogEntry, Signal
from tests.support.redis_server import SERVERS, RedisServer, free_port
from tests.support.watching import until


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that wants a password."""
    server = RedisServer(tmp_path / "guarded").start()
    server.ask("CONFIG", "SET", "requirepass", "hunter2")
    yield server
    server.kill()


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[Any]:
    coordination = await open_redis(url, **{"deployment": "d", "address": "me", **options})
    try:
        yield coordination
    finally:
        await coordination.aclose()


async def test_a_password_is_sent_and_a_wrong_one_is_told_without_it(guarded):
    """None, a wrong one, and the right one."""
    bare = guarded.url
    async with opened(bare) as coordination:
        said = await coordination.check()
        assert "NOAUTH" in said or "Authentication" in said
    async with opened(bare.replace("//", "//:wrong@")) as coordination:
        said = await coordination.check()
        assert said.startswith("Redis does not answer")
        assert "wrong" not in said
    async with opened(bare.replace("//", "//:hunter2@")) as coordination:
        assert await coordination.check() is None
        assert await coordination.relay.append("n", LogEntry(1, 0, ("a",)), keep_s=5) == (1, 1)


async def test_a_socket_file_will_do(tmp_path):
    """As the workers of one machine have it."""
    path = tmp_path / "v.sock"
    options = ["--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(tmp_path)]
    process = await asyncio.create_subprocess_exec(SERVERS["valkey"], *options, stdout=asyncio.subprocess.DEVNULL)
    try:
        await until(path.exists)
        async with opened(f"unix://{path}", patience_s=5) as coordination:
            assert await coordination.check() is None
            assert coordination.version.startswith("Valkey")
    finally:
        process.kill()
        await process.wait()


@pytest.mark.parametrize(
    ("info", "version", "old"),
    [
        ("redis_version:6.2.14", "Redis 6.2.14", True),
        ("# Server\r\nredis_version:7.0.15\r\n", "Redis 7.0.15", False),
        ("redis_version:10.1.0", "Redis 10.1.0", False),
        ("redis_version:7.2.4\nvalkey_version:9.1.0", "Valkey 9.1.0", False),
        ("redis_version:255.255.255", "Redis 255.255.255", False),
        ("server:a service", "Redis ", False),
    ],
)
def test_a_server_that_is_too_old_is_told_so(info, version, old):
    """By its number, and not by a command that fails later."""
    named, wrong = server_of(info)
    assert (named, wrong is not None) == (version, old)


async def test_no_server_at_all_is_away_from_the_start_and_found_later(tmp_path):
    """Nobody waits for it longer than was said; what is asked meanwhile fails at once."""
    port = free_port()
    changes: list[Any] = []
    began_s = time.monotonic()
    async with opened(f"redis://127.0.0.1:{port}/0", patience_s=0.3, listener=changes.append) as coordination:
        assert time.monotonic() - began_s < 1.5
        assert not coordination.signals.prompt
        for _ in range(20):
            with pytest.raises(CoordinationUnavailable):
                await coordination.claims.claim("n", "me", lease_s=1)
        heard: list[Signal] = []
        coordination.signals.listen(heard.append)
        server = RedisServer(tmp_path / "late", port=port).start()
        try:
            await until(lambda: coordination.signals.prompt)
            async with opened(server.url, address="other", patience_s=5) as other:
                await until(lambda: coordination._listens)
                await other.signals.send(Signal("hello"), "me")
                await until(lambda: heard)
        finally:
            server.kill()
    assert [change.up for change in changes if isinstance(change, CoordinationChanged)][:2] == [False, True]


async def beating(coordination: Any, *, prompt: bool) -> None:
    """Let a worker say that it is alive, more often than it does, until it has noticed."""
    async with asyncio.timeout(4):
        while coordination.signals.prompt is not prompt:
            await coordination._beat()
            await asyncio.sleep(0.02)


REFUSALS = {
    "full": ("OOM", [("maxmemory", "1"), ("maxmemory-policy", "noeviction")], [("maxmemory", "0")]),
    "cut off": ("NOREPLICAS", [("min-replicas-to-write", "1")], [("min-replicas-to-write", "0")]),
}


@pytest.mark.parametrize("program", SERVERS)
@pytest.mark.parametrize("how", [*REFUSALS, "a replica", "without a right to write", "without a right to read"])
async def test_a_server_that_answers_and_refuses_is_away(tmp_path, program, how):
    """Nobody relies on it, everybody is told, and all is well again when it takes what it is told."""
    server = RedisServer(tmp_path / "server", SERVERS[program]).start()
    changes: list[CoordinationChanged] = []
    if how in REFUSALS:
        code, faults, cures = REFUSALS[how]
        breaks = [("CONFIG", "SET", *fault) for fault in faults]
        mends = [("CONFIG", "SET", *cure) for cure in cures]
    elif how == "a replica":
        code, breaks, mends = "READONLY", [("REPLICAOF", "127.0.0.1", str(free_port()))], [("REPLICAOF", "NO", "ONE")]
    else:
        command = "evalsha" if "write" in how else "xread"
        code, breaks = "NOPERM", [("ACL", "SETUSER", "default", f"-{command}")]
        mends = [("ACL", "SETUSER", "default", f"+{command}")]
    try:
        async with opened(server.url, patience_s=5, listener=changes.append) as coordination:
            assert coordination.signals.prompt
            for command in breaks:
                assert server.ask(*command) == "+OK\r\n"
            # Ends the read that blocks, which was allowed.
            server.ask("XADD", "oncewise:d:all", "*", "s", '["nothing","","somebody",{}]')
            await beating(coordination, prompt=False)
            assert code in await coordination.check()
            for command in mends:
                assert server.ask(*command) == "+OK\r\n"
            await beating(coordination, prompt=True)
            assert await coordination.check() is None
            assert await coordination.relay.append("n", LogEntry(1, 0, ("a",)), keep_s=5) == (1, 1)
    finally:
        server.kill()
    assert [change.up for change in changes] == [False, True]
    assert changes[0].reason == code


@pytest.mark.parametrize("url", ["http://:hunter2@h", "redis://:hunter2@h:port/0", "redis://:hunter2@h:99999999/0"])
async def test_a_url_that_cannot_be_used_is_refused_without_being_shown(url):
    """It may hold a password."""
    with pytest.raises(BadAddress) as refused:
        await open_redis(url, deployment="d", address="me", patience_s=0.1)
    assert "hunter2" not in str(refused.value)


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisServer]:
    """One of each kind."""
    running = RedisServer(tmp_path / "server", SERVERS[request.param]).start()
    yield running
    running.kill()


async def test_everything_has_a_lifetime(server):
    """A server that is left alone is empty after a while."""
    async with opened(server.url, patience_s=5) as coordination, opened(server.url, address="two") as other:
        await coordination.relay.append("n", LogEntry(1, 0, ("a",)), keep_s=5)
        await coordination.signals.send(Signal("x"), "two")
        await coordination.signals.send(Signal("x"))
        await coordination.claims.claim("n", "me", lease_s=5)
        limiter = coordination.limiter("p", rate=5, burst=2)
        await limiter.reserve()
        await limiter.reserve()
        await limiter.give_back()
        await limiter.pause(1)
        slots, theirs = coordination.slots("p", limit=1), other.slots("p", limit=1)
        await slots.take()
        waiting = asyncio.create_task(theirs.take())
        keys: set[str] = set()
        kinds = {"log", "in", "all", "workers", "claim", "pace", "starts", "slots", "wait"}
        async with asyncio.timeout(5):
            while {key.split(":")[2] for key in keys} != kinds:
                keys |= set(re.findall(r"^oncewise\S+", server.ask("KEYS", "*"), re.MULTILINE))
                await asyncio.sleep(0.01)
        lifetimes = {key: int(server.ask("PTTL", key)[1:]) for key in keys}
        slots.give_back()
        await waiting
    assert {key: left for key, left in lifetimes.items() if not 0 < left <= 70_000} == {}


async def test_a_log_that_was_evicted_is_told_from_its_beginning(server):
    """By a server that is full; its owner learns that there is nothing."""
    async with opened(server.url, patience_s=5) as coordination:
        await coordination.relay.append("n", LogEntry(1, 0, ("a",)), keep_s=5)
        assert server.ask("KEYS", "oncewise:d:*:n").count("oncewise") == 1
        server.ask("DEL", "oncewise:d:log:n")
        assert await coordination.relay.append("n", LogEntry(1, 1, ("b",)), keep_s=5) == (0, 0)
        assert await coordination.relay.append("n", LogEntry(1, 0, ("a", "b")), keep_s=5) == (1, 2)


async def test_words_that_nobody_reads_do_not_pile_up(server):
    """A worker that is gone has an inbox for a minute."""
    async with opened(server.url, patience_s=5) as coordination:
        for _ in range(6):
            await asyncio.gather(*(coordination.signals.send(Signal("x"), "gone") for _ in range(1000)))
        assert 4000 < int(server.ask("XLEN", "oncewise:d:in:gone")[1:]) < 4500


async def test_who_waits_longest_for_a_slot_is_told_first(server):
    """However often it has asked again, which all of them do."""
    async with AsyncExitStack() as stack:
        first, second, third = [
            await stack.enter_async_context(opened(server.url, address=name, patience_s=5)) for name in "abc"
        ]
        slots = [worker.slots("p", limit=1) for worker in (first, second, third)]
        await slots[0].take()
        waiting = []
        for each, name in ((slots[1], "b"), (slots[2], "c")):
            waiting.append(asyncio.create_task(each.take()))
            await until(lambda name=name: f"\r\n{name}\r\n" in server.ask("ZRANGE", "oncewise:d:wait:p", "0", "-1"))
        for _ in range(60):
            said = server.ask("ZRANGE", "oncewise:d:wait:p", "0", "-1").split("\r\n")
            assert said[2::2] == ["b", "c"]
            await asyncio.sleep(0.01)
        slots[0].give_back()
        await waiting[0]
        assert not waiting[1].done()
        slots[1].give_back()
        await waiting[1]


async def test_limits_do_not_wait_until_a_server_that_is_late_is_away(tmp_path):
    """They have another way; a claim has none, and is told when it is sure."""
    server = RedisServer(tmp_path / "late").start()
    try:
        async with opened(server.url) as coordination:
            limiter = coordination.limiter("openai", rate=10.0, burst=1)
            slots = coordination.slots("openai", limit=1)
            assert await limiter.reserve() == 0.0
            server.pause()
            claiming = asyncio.ensure_future(coordination.claims.claim("n", "me", lease_s=1))
            for ask in (limiter.reserve, slots.take):
                with pytest.raises(CoordinationUnavailable):
                    await ask()
                assert coordination.link.late
                assert not claiming.done()
            with pytest.raises(CoordinationUnavailable):
                await claiming
            assert not coordination.link.up
            server.resume()
    finally:
        server.kill()
