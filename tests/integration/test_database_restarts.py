"""PostgreSQL is killed and started again under a running server, which is never restarted."""

import asyncio
import time

import pytest

from oncewise.storage.postgres import upgrade_postgres
from tests.support.fake_provider import FakeProvider
from tests.support.postgres import own_server
from tests.support.server import serve_process
from tests.support.watching import names, terminal, until, watching


@pytest.fixture
def postgres():
    with own_server() as server:
        yield server


@pytest.fixture
async def fake():
    async with FakeProvider() as provider:
        yield provider


@pytest.fixture
async def server(postgres, fake, tmp_path):
    await upgrade_postgres(postgres.url())
    async with serve_process(tmp_path, fake.base_url, database_url=postgres.url(), lease_s=3) as server:
        yield server


async def test_requests_are_refused_within_a_second_and_served_again_without_a_restart(server, postgres, fake):
    """Before any provider call; alive but not ready meanwhile."""
    thread = await server.thread()
    assert (await server.say(thread, "Before", model="n2")).status == 200
    postgres.stop()
    refused = []
    for content in ("During", "During again"):
        began_s = time.monotonic()
        refused.append(await server.say(thread, content, model="n2"))
        assert time.monotonic() - began_s < 1.0

    assert [(reply.status, reply.code) for reply in refused] == [(503, "storage_unavailable")] * 2
    assert all("retry-after" in reply.headers for reply in refused)
    assert fake.count == 1
    assert (await server.ask("GET", "/health/readiness")).status == 503
    assert (await server.ask("GET", "/health/liveness")).status == 200
    await asyncio.to_thread(postgres.start)
    assert (await server.say(thread, "After", model="n2")).status == 200
    assert (await server.ask("GET", "/health/readiness")).status == 200
    assert [content for _, content in await server.messages(thread)][::2] == ["Before", "After"]
    assert not [line for line in server.lines if "Traceback" in line or "ERROR" in line]


@pytest.mark.parametrize("away_s", [0.3, 3.5])
async def test_a_running_turn_is_stored_when_the_database_is_back(server, postgres, fake, away_s):
    """It keeps streaming, its commit is tried again, also after its lease; `done` comes after that, once, to all."""
    thread = await server.thread()
    said = {"content": "Hello", "model": "n40-gap25"}
    async with watching(server, f"/api/threads/{thread}/messages/stream", said) as stream:
        await stream.until("delta")
        joined = asyncio.ensure_future(server.say(thread, **said))
        await asyncio.sleep(0.1)
        postgres.stop()
        await until(fake.calls[0].ended.is_set)
        await asyncio.sleep(away_s)
        assert "done" not in names(stream.events)
        await asyncio.to_thread(postgres.start)
        began_s = time.monotonic()
        ending = terminal(await stream.rest())
        assert time.monotonic() - began_s < 4

    assert (ending.name, ending.data["state"]) == ("done", "completed")
    assert (await joined).status == 200
    assert [content for _, content in await server.messages(thread)] == ["Hello", stream.text]
    assert fake.count == 1


async def test_text_waits_for_the_database_before_it_is_shown_first(server, postgres, fake):
    """The mark that a turn was seen must be in the row before the text leaves; away for a moment, it is waited for."""
    thread = await server.thread()
    said = {"content": "Hello", "model": "lat1600-n5-gap20"}
    async with watching(server, f"/api/threads/{thread}/messages/stream", said) as stream:
        await stream.until("meta")
        await until(lambda: fake.count == 1)
        postgres.stop()
        await until(fake.calls[0].ended.is_set)
        await asyncio.sleep(0.2)
        await asyncio.to_thread(postgres.start)
        ending = terminal(await stream.rest())

    assert (ending.name, ending.data["state"]) == ("done", "completed")
    assert fake.count == 1


async def test_a_follower_elsewhere_waits_out_the_restart(server, postgres, fake, tmp_path):
    """It follows by reading the row; that cannot be read for a moment is no reason to send its caller away."""
    (tmp_path / "other").mkdir()
    async with serve_process(tmp_path / "other", fake.base_url, database_url=postgres.url()) as other:
        thread = await server.thread()
        said = {"content": "Hello", "model": "lat2500-n3"}
        leading = asyncio.ensure_future(server.say(thread, **said))
        await until(lambda: fake.count == 1)
        following = asyncio.ensure_future(other.say(thread, **said))
        await asyncio.sleep(0.4)
        postgres.stop()
        await asyncio.sleep(0.3)
        await asyncio.to_thread(postgres.start)

        assert [(await reply).status for reply in (leading, following)] == [200, 200]
        assert (await leading).body == (await following).body
    assert fake.count == 1
