"""Servers of every kind behind the ports: with a password, on a socket file, too old, and none at all."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
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


@pytest.mark.parametrize("url", ["http://:hunter2@h", "redis://:hunter2@h:port/0", "redis://:hunter2@h:99999999/0"])
async def test_a_url_that_cannot_be_used_is_refused_without_being_shown(url):
    """It may hold a password."""
    with pytest.raises(BadAddress) as refused:
        await open_redis(url, deployment="d", address="me", patience_s=0.1)
    assert "hunter2" not in str(refused.value)


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
