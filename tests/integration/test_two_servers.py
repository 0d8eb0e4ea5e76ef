"""Two servers on one PostgreSQL, and nothing else between them: they behave as one, also when one is killed."""

import asyncio
import signal
import sys
import time
from collections import Counter
from contextlib import AsyncExitStack

import pytest

from tests.support.fake_provider import FakeProvider
from tests.support.http import JSON, read_events
from tests.support.postgres import fresh_database
from tests.support.server import ServerProcess, serve_process
from tests.support.watching import names, terminal, until, watching

SLOW = {"model": "n10-gap150"}
"""A second and a half of text."""


@pytest.fixture
async def url():
    async with fresh_database() as url:
        yield url


@pytest.fixture
async def fake():
    async with FakeProvider() as provider:
        yield provider


@pytest.fixture
async def pair(url, fake, tmp_path):
    """Both servers."""
    async with AsyncExitStack() as stack:
        serving = (serve_process(tmp_path, fake.base_url, database_url=url, drain_s=0.5) for _ in range(2))
        yield [await stack.enter_async_context(server) for server in serving]


async def called(fake: FakeProvider, calls: int = 1) -> None:
    await until(lambda: fake.count == calls)


async def following(server: ServerProcess, thread: str, requests: int, **said: str):
    """Requests for the turn that runs elsewhere, and the moment that they follow it."""
    tasks = [asyncio.ensure_future(server.say(thread, **said)) for _ in range(requests)]
    async with asyncio.timeout(10):
        while (await server.ask("GET", "/health/readiness")).status != 200:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    assert not any(task.done() for task in tasks)
    return tasks


@pytest.mark.parametrize("connections", [10, 50])
async def test_the_headline_spread_over_both(pair, fake, connections):
    """All answered, one call, two messages, equal bodies; whichever server they came to."""
    thread = await pair[0].thread()
    left = iter(range(50))

    async def connection(number):
        server = pair[number % 2]
        return [await server.say(thread, **SLOW) for _ in left]

    replies = [one for some in await asyncio.gather(*map(connection, range(connections))) for one in some]

    assert [reply.status for reply in replies] == [200] * 50
    assert len({reply.body for reply in replies}) == 1
    roles = Counter(reply.headers["x-coalesce"] for reply in replies)
    assert (roles["leader"], roles["follower"] + roles["replayed"]) == (1, 49)
    assert fake.count == 1
    assert len(await pair[1].messages(thread)) == 2
    figures = (await pair[1].ask("GET", "/api/metrics/performance?last_n=50")).json()
    async with asyncio.timeout(5):
        while figures["total_requests"] < 50:
            await asyncio.sleep(0.1)
            figures = (await pair[1].ask("GET", "/api/metrics/performance?last_n=50")).json()
    assert figures["upstream"]["calls"] == 1


async def test_json_and_streams_on_both_share_one_call(pair, fake):
    """A stream on the server that does not lead tells the same text and the same end."""
    thread = await pair[0].thread()
    asked = [pair[n % 2].stream(thread, **SLOW) if n % 4 < 2 else pair[n % 2].say(thread, **SLOW) for n in range(20)]
    replies = await asyncio.gather(*asked)

    assert [reply.status for reply in replies] == [200] * 20
    assert fake.count == 1
    (_, (_, text)) = await pair[0].messages(thread)
    for reply in replies:
        if reply.headers["content-type"] == "application/json":
            assert reply.json()["assistant_message"]["content"] == text
        else:
            events = read_events(reply.body)
            assert "".join(event.data["delta"] for event in events if event.name == "delta") == text
            assert terminal(events).data["state"] == "completed"


async def test_what_an_operator_should_know_is_said_at_the_start(pair):
    """A PostgreSQL that may forget by both, before the banner; that there is no Redis between them by the second."""
    for server, redis in zip(pair, (False, True), strict=True):
        said = "".join(line for line in server.lines if line.startswith("WARNING"))
        assert "PostgreSQL runs with fsync = off" in said
        assert ("no Redis is set" in said) == redis


async def test_different_messages_on_both_run_one_after_the_other(pair, fake):
    """The thread's turn queue is in the database: roles alternate, each prompt holds the turns before it."""
    thread = await pair[0].thread()
    replies = await asyncio.gather(*(pair[n % 2].say(thread, f"Message {n}", model="n2-gap20") for n in range(8)))

    assert [reply.status for reply in replies] == [200] * 8
    messages = (await pair[0].ask("GET", f"/api/threads/{thread}")).json()["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 8
    assert [message["sequence"] for message in messages] == list(range(16))
    assert sorted(len(call.request["messages"]) for call in fake.calls) == list(range(1, 16, 2))


async def test_a_killed_leader_is_taken_over_by_a_follower(pair, fake):
    """Nothing was shown: the call is made again under the next epoch, once, and all who wait are answered."""
    leader, other = pair
    thread = await leader.thread()
    said = {"model": "lat1500-n3"}
    leading = asyncio.ensure_future(leader.say(thread, **said))
    await called(fake)
    followers = await following(other, thread, 5, **said)
    leader.signal(signal.SIGKILL)
    killed_s = time.monotonic()
    replies = await asyncio.gather(*followers)

    assert time.monotonic() - killed_s < 3 + 1.5
    assert [reply.status for reply in replies] == [200] * 5
    assert len({reply.body for reply in replies}) == 1
    assert fake.count == 2
    assert len(await other.messages(thread)) == 2
    await asyncio.gather(leading, return_exceptions=True)


async def test_a_killed_leader_whose_text_was_shown_is_not_replaced_in_silence(pair, fake):
    """All who wait or come back hear that it was lost, the partial is kept, and the thread goes on."""
    leader, other = pair
    thread = await leader.thread()
    said = {"model": "n200-gap50"}
    async with watching(leader, f"/api/threads/{thread}/messages/stream", {"content": "Hello", **said}) as stream:
        await stream.until("delta")
        followers = await following(other, thread, 3, **said)
        async with watching(other, f"/api/threads/{thread}/stream") as elsewhere:
            # As of the leader's last heartbeat, which keeps the text.
            await elsewhere.until("delta")
            leader.signal(signal.SIGKILL)
            killed_s = time.monotonic()
            replies = await asyncio.gather(*followers)
            assert time.monotonic() - killed_s < 3
            ending = terminal(await elsewhere.rest())
        await stream.rest()
    path = f"/api/threads/{thread}/turns/{stream.turn_id}/stream"
    async with watching(other, path, headers=[("last-event-id", stream.last_id)]) as resumed:
        told = names(await resumed.rest())

    assert told == ["ping", "meta", "reset", "delta", "error"]
    assert {(reply.status, reply.code) for reply in replies} == {(502, "leader_lost")}
    assert (ending.name, ending.data["code"]) == ("error", "leader_lost")
    (_, (_, partial)) = await other.messages(thread)
    assert partial
    assert fake.count == 1
    assert (await other.say(thread, "And now?", model="n2")).status == 200


async def test_a_server_that_is_asked_to_stop_hands_its_turn_over(pair, fake):
    """Its lease is released, so that the follower's server need not wait for it."""
    leader, other = pair
    thread = await leader.thread()
    said = {"model": "lat2000-n3"}
    leading = asyncio.ensure_future(leader.say(thread, **said))
    await called(fake)
    (follower,) = await following(other, thread, 1, **said)
    leader.signal(signal.SIGTERM)
    await called(fake, 2)
    asked_again_s = time.monotonic()

    assert (await leading).code == "shutting_down"
    assert (await follower).status == 200
    assert time.monotonic() - asked_again_s < 6
    assert len(await other.messages(thread)) == 2


async def test_all_servers_killed_and_one_started_ends_what_they_left(url, fake, tmp_path):
    """Nobody is left to wait: interrupted at the start, though the lease has five minutes to run."""
    settings = {"database_url": url, "lease_s": 300}
    async with serve_process(tmp_path, fake.base_url, **settings) as server:
        thread = await server.thread()
        leading = asyncio.ensure_future(server.say(thread, model="hang"))
        await called(fake)
        await server.kill()
        await asyncio.gather(leading, return_exceptions=True)
    async with serve_process(tmp_path, fake.base_url, **settings) as server:
        async with asyncio.timeout(10):
            while (await server.ask("GET", f"/api/threads/{thread}/stream")).status != 204:
                await asyncio.sleep(0.1)
        assert (await server.say(thread, "Anybody there?", model="n2")).status == 200


async def test_keys_made_and_revoked_anywhere_hold_everywhere(pair, url):
    """By the command line, and by one of the servers over HTTP; the other knows within a second or so."""
    program = [sys.executable, "-m", "oncewise", "keys", "create", "--admin", "--database", url]
    made = await asyncio.create_subprocess_exec(*program, stdout=asyncio.subprocess.PIPE)
    admin = (await made.communicate())[0].decode().splitlines()[-1]
    asking = [JSON, ("authorization", f"Bearer {admin}")]
    for server in pair:
        async with asyncio.timeout(5):
            while (await server.ask("GET", "/api/threads/")).status != 401:
                await asyncio.sleep(0.05)
    key = (await pair[0].ask("POST", "/api/keys", {"role": "tenant", "org_id": "acme"}, asking)).json()
    tenant = [JSON, ("authorization", f"Bearer {key['key']}")]
    async with asyncio.timeout(5):
        while (await pair[1].ask("GET", "/api/threads/", headers=tenant)).status != 200:
            await asyncio.sleep(0.05)
    assert (await pair[1].ask("DELETE", f"/api/keys/{key['id']}", headers=asking)).status == 204
    async with asyncio.timeout(5):
        while (await pair[0].ask("GET", "/api/threads/", headers=tenant)).status != 401:
            await asyncio.sleep(0.05)
