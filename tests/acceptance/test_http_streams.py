"""Streams over real sockets: frames, endings, joining and resuming, as the HTTP contract promises them."""

import asyncio
import json

import pytest

from oncewise.errors import ProviderError, ProviderProtocolError
from tests.support.http import JSON, ORG, read_events, serve
from tests.support.scripted import ScriptedProvider

GAP_S = 0.02
"""Deltas that come at once are joined into one; these tests want each."""


@pytest.fixture
async def site(tmp_path):
    async with serve(tmp_path, ScriptedProvider(gap_s=GAP_S)) as site:
        yield site


@pytest.fixture
async def held(tmp_path):
    """A server whose provider answers when the test says so."""
    async with serve(tmp_path, ScriptedProvider(held=True), drain_s=0) as site:
        yield site


def names(events):
    return [event.name for event in events]


def text_of(events):
    return "".join(event.data["delta"] for event in events if event.name == "delta")


async def until(condition):
    """Wait for a condition that no event tells of."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def resume(site, thread, turn, last=None, query=""):
    headers = [ORG] if last is None else [ORG, ("last-event-id", last)]
    return await site.ask("GET", f"/api/threads/{thread}/turns/{turn}/stream{query}", headers=headers)


async def test_a_stream_is_ping_meta_deltas_and_one_done(site):
    """With the headers that keep proxies from holding or changing it."""
    thread = await site.thread()
    reply = await site.stream(thread)
    events = read_events(reply.body)
    turn = reply.headers["x-turn-id"]

    assert reply.status == 200
    assert reply.headers["content-type"] == "text/event-stream"
    assert reply.headers["cache-control"] == "no-store, no-transform"
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["x-coalesce"] == "leader"
    assert reply.headers["location"] == f"/api/threads/{thread}/turns/{turn}/stream"
    assert reply.body.startswith(b"retry: 2000\nevent: ping\ndata: ")
    assert events[0].data["every_ms"] == 15000
    assert set(events[1].data) == {
        "request_id",
        "turn_id",
        "thread_id",
        "role",
        "state",
        "queue_position",
        "provider",
        "model",
    }
    assert (events[1].data["role"], events[1].data["turn_id"]) == ("leader", turn)
    assert set(events[2].data) == {"ttft_ms", "queue_wait_ms"}
    assert names(events)[-1] == "done"
    assert names(events).count("done") == 1
    assert "error" not in names(events)
    assert text_of(events) == "pong"
    assert [event.id for event in events if event.name in ("ping", "meta")] == [None] * 3
    assert events[-1].id == "1-3"
    done = events[-1].data
    assert (done["state"], done["reason"], done["chars"]) == ("completed", "stop", 4)
    stored = (await site.ask("GET", f"/api/threads/{thread}")).json()["messages"]
    assert [done["user_message_id"], done["assistant_message_id"]] == [message["id"] for message in stored]


async def test_json_and_stream_of_the_same_message_share_one_call(held):
    """And a late viewer is given what was said before it came."""
    thread = await held.thread()
    asked = asyncio.create_task(held.say(thread))
    await held.provider.started.wait()
    watched = asyncio.create_task(held.stream(thread))
    await until(lambda: held.services.turns.flights.stats().waiters == 2)
    held.provider.go.set()
    reply, stream = await asked, await watched

    assert text_of(read_events(stream.body)) == reply.json()["assistant_message"]["content"]
    assert stream.headers["x-coalesce"] == "follower"
    assert read_events(stream.body)[1].data["role"] == "follower"
    assert len(held.provider.calls) == 1


async def test_a_replayed_turn_is_one_delta_and_the_same_done(site):
    """Made from the row: meta, one delta, done."""
    thread = await site.thread()
    first = read_events((await site.stream(thread)).body)
    reply = await site.stream(thread)
    events = read_events(reply.body)

    assert names(events) == ["ping", "meta", "delta", "done"]
    assert reply.headers["x-coalesce"] == "replayed"
    assert events[1].data["role"] == "replayed"
    assert text_of(events) == "pong"
    assert (events[-1].id, events[-1].data) == (first[-1].id, first[-1].data)


async def test_an_early_failure_keeps_its_status(site):
    """What fails before any text, within a second, is a problem and not a stream."""
    site.provider.failures = [(0, ProviderError(retryable=False))]
    reply = await site.stream(await site.thread())

    assert (reply.status, reply.code) == (502, "provider_error")
    assert reply.headers["x-coalesce"] == "leader"


async def test_the_head_is_held_for_a_second_and_a_later_failure_is_told_inside(held):
    """200 after one second of silence; then one `error`, and no `done`."""
    thread = await held.thread()
    held.provider.failures = [(0, ProviderError(retryable=False))]
    reader, writer = await held.connect()
    body = b'{"content":"Hello"}'
    path = f"/api/threads/{thread}/messages/stream"
    fields = [held.host, ORG, JSON, ("content-length", str(len(body))), ("connection", "close")]
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    writer.write(held.head("POST", path, fields) + body)
    head = await reader.readuntil(b"\r\n\r\n")
    assert 0.9 <= loop.time() - began_s < 3.0
    assert head.startswith(b"HTTP/1.1 200")
    first = await reader.readuntil(b"}\n\n")
    assert b"event: ping" in first
    held.provider.go.set()
    rest = (await reader.read()).decode()
    writer.close()

    assert "event: error\nid: 1-1\n" in rest
    error = json.loads(rest.split("event: error\n")[1].split("data: ")[1].split("\n")[0])
    assert (error["state"], error["code"], error["partial_chars"]) == ("failed", "provider_error", 0)
    assert "event: done" not in rest


async def test_a_failure_after_text_ends_with_error_and_counts_what_was_shown(site):
    """The partial answer is stored as such."""
    thread = await site.thread()
    site.provider.failures = [(1, ProviderProtocolError())]
    reply = await site.stream(thread)
    events = read_events(reply.body)

    assert reply.status == 200
    assert names(events)[-1] == "error"
    assert events[-1].data["partial_chars"] == 2
    assert text_of(events) == "po"
    stored = (await site.ask("GET", f"/api/threads/{thread}")).json()["messages"]
    assert stored[1]["status"] == "partial"


async def test_text_cannot_become_a_field_of_the_stream(tmp_path):
    """A text that looks like events, or ends lines in other ways, comes back as it was."""
    text = "\n\nevent: done\ndata: {}\n\n\r\nid: 9-9\r \u2028 \u2029 \u0085 \x1c ☕ "
    async with serve(tmp_path, ScriptedProvider(deltas=[text])) as site:
        thread = await site.thread()
        events = read_events((await site.stream(thread, text)).body)

        assert text_of(events) == text
        assert names(events).count("done") == 1
        assert await site.messages(thread) == [("user", text), ("assistant", text)]


async def test_a_stream_resumes_strictly_after_any_position(tmp_path):
    """From every id of a turn exactly the rest comes, and from the terminal one nothing."""
    deltas = ["a", "b", "c", "d", "e"]
    async with serve(tmp_path, ScriptedProvider(deltas=deltas, gap_s=GAP_S)) as site:
        thread = await site.thread()
        turn = (await site.stream(thread)).headers["x-turn-id"]
        for seen in range(1, 6):
            events = read_events((await resume(site, thread, turn, f"1-{seen}")).body)
            assert text_of(events) == "".join(deltas[seen:])
            assert (names(events)[-1], events[-1].id) == ("done", "1-6")
        assert (await resume(site, thread, turn, "1-6")).status == 204
        by_query = await resume(site, thread, turn, query="?last_event_id=1-4")
        assert text_of(read_events(by_query.body)) == "e"
        header_wins = await resume(site, thread, turn, "1-5", query="?last_event_id=1-1")
        assert text_of(read_events(header_wins.body)) == ""
        assert len(site.provider.calls) == 1


@pytest.mark.parametrize("last", ["1-99", "7-1", "nonsense", "-1--1", "1-3\t", "9" * 5000, "٣-٣", "0-0"])
async def test_a_position_nobody_gave_out_starts_again_and_says_so(site, last):
    """Never a hang, never an error: a 4xx would end an EventSource for good."""
    thread = await site.thread()
    turn = (await site.stream(thread)).headers["x-turn-id"]
    sent = last.encode().decode("latin-1")
    reply = await resume(site, thread, turn, sent)

    assert reply.status == 200
    assert reply.headers["stream-replayed-from"] == "start"
    assert text_of(read_events(reply.body)) == "pong"


async def test_when_the_log_is_gone_a_stream_is_made_from_the_row(tmp_path):
    """Meta, one delta, done; the terminal id is 204 still; no provider call."""
    async with serve(tmp_path, ScriptedProvider(gap_s=GAP_S), log_retention_s=0) as site:
        thread = await site.thread()
        turn = (await site.stream(thread)).headers["x-turn-id"]
        await until(lambda: site.services.hub.stats().logs == 0)
        whole = await resume(site, thread, turn)
        within = await resume(site, thread, turn, "1-1")

        assert names(read_events(whole.body)) == ["ping", "meta", "delta", "done"]
        assert "stream-replayed-from" not in whole.headers
        assert within.headers["stream-replayed-from"] == "start"
        assert read_events(within.body)[1].data["replayed_from"] == "start"
        assert (await resume(site, thread, turn, "1-3")).status == 204
        assert len(site.provider.calls) == 1


async def test_a_failed_turn_is_told_the_same_way_from_its_row(tmp_path):
    """One `error` with the id it had live."""
    async with serve(tmp_path, ScriptedProvider(gap_s=GAP_S), log_retention_s=0) as site:
        thread = await site.thread()
        site.provider.failures = [(1, ProviderProtocolError())]
        live = await site.stream(thread)
        turn = live.headers["x-turn-id"]
        await until(lambda: site.services.hub.stats().logs == 0)
        events = read_events((await resume(site, thread, turn)).body)

        assert names(events) == ["ping", "meta", "delta", "error"]
        assert (events[-1].id, events[-1].data) == (
            read_events(live.body)[-1].id,
            read_events(live.body)[-1].data,
        )


async def test_a_thread_is_joined_while_a_turn_runs_and_is_204_when_idle(held):
    """From the beginning of the turn that is active."""
    thread = await held.thread()
    idle = await held.ask("GET", f"/api/threads/{thread}/stream")
    asked = asyncio.create_task(held.say(thread))
    await held.provider.started.wait()
    joined = asyncio.create_task(held.ask("GET", f"/api/threads/{thread}/stream"))
    await until(lambda: held.services.hub.stats().viewers == 1)
    held.provider.go.set()
    turn = (await asked).json()["turn_id"]
    reply = await joined

    assert (idle.status, idle.body) == (204, b"")
    assert reply.headers["x-turn-id"] == turn
    assert text_of(read_events(reply.body)) == "pong"
    assert names(read_events(reply.body))[-1] == "done"


async def test_a_withdrawn_stream_ends_as_cancelled_without_an_id_while_the_turn_goes_on(held):
    """Only that request's stream."""
    thread = await held.thread()
    stays = asyncio.create_task(held.stream(thread))
    await held.provider.started.wait()
    goes = asyncio.create_task(held.stream(thread, headers=[("x-request-id", "mine")]))
    await until(lambda: held.services.turns.flights.stats().waiters == 2)
    assert (await held.ask("POST", "/api/threads/cancel/mine")).status == 200
    ended = read_events((await goes).body)
    held.provider.go.set()

    assert names(ended) == ["ping", "meta", "done"]
    assert (ended[-1].id, ended[-1].data["state"]) == (None, "cancelled")
    assert names(read_events((await stays).body))[-1] == "done"


async def test_a_cancelled_turn_ends_every_stream_with_the_same_terminal_event(held):
    """`done`, cancelled, with one id for all."""
    thread = await held.thread()
    streams = [asyncio.create_task(held.stream(thread)) for _ in range(3)]
    await until(lambda: held.services.turns.flights.stats().waiters == 3)
    await held.provider.started.wait()
    turn = (await held.services.threads.active("acme", thread)).id
    await held.ask("POST", f"/api/threads/{thread}/turns/{turn}/cancel")
    endings = [read_events((await stream).body)[-1] for stream in streams]

    assert {(ending.name, ending.id, ending.data["state"]) for ending in endings} == {("done", "1-1", "cancelled")}
    assert held.provider.closed_early == 1


async def test_a_viewer_that_leaves_changes_nothing_for_the_others(tmp_path):
    """Not even when it was the first; the turn is stored when all have left."""
    async with serve(tmp_path, ScriptedProvider(deltas=["a", "b", "c"], held=True)) as site:
        thread = await site.thread()
        asked = asyncio.create_task(site.stream(thread))
        await site.provider.started.wait()
        await until(lambda: site.services.hub.stats().viewers == 1)
        asked.cancel()
        await until(lambda: site.services.hub.stats().viewers == 0)
        await until(lambda: site.services.turns.flights.stats().waiters == 0)
        site.provider.go.set()
        await until(lambda: site.services.turns.flights.stats().flights == 0)

        assert await site.messages(thread) == [("user", "Hello"), ("assistant", "abc")]


async def test_done_is_told_only_after_the_pair_is_stored(tmp_path):
    """Whoever reads `done` finds both messages."""
    async with serve(tmp_path, ScriptedProvider(deltas=["a"] * 20)) as site:
        for _ in range(5):
            thread = await site.thread()
            events = read_events((await site.stream(thread)).body)
            assert events[-1].name == "done"
            assert len(await site.messages(thread)) == 2


async def test_an_open_stream_does_not_hold_up_a_stop(held):
    """With no time to drain the server ends at once; the stream has no terminal event, which means: resume me."""
    thread = await held.thread()
    asked = asyncio.create_task(held.stream(thread))
    await held.provider.started.wait()
    watched = asyncio.create_task(held.ask("GET", f"/api/threads/{thread}/stream"))
    await until(lambda: held.services.hub.stats().viewers == 2)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    held.server.should_exit = True
    events = read_events((await watched).body)
    refused = await asked

    assert names(events) == ["ping", "meta"]
    assert (refused.status, refused.code) == (503, "shutting_down")
    assert loop.time() - began_s < 3.0
