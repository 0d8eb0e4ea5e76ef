"""Streams when the server stops, stops in a hurry, or is killed: ended, or resumed; nothing that was stored is lost."""

import asyncio
import contextlib
import re
import signal
import time

import pytest

from tests.support.fake_provider import FakeProvider
from tests.support.http import ORG, serve
from tests.support.scripted import ScriptedProvider
from tests.support.server import serve_process
from tests.support.watching import names, terminal, until, watching


@pytest.fixture
async def fake():
    async with FakeProvider() as provider:
        yield provider


def stream_of(thread):
    return f"/api/threads/{thread}/messages/stream"


async def open_turns(server):
    """How many turns run or wait."""
    text = (await server.ask("GET", "/metrics", headers=())).body.decode()
    return float(re.search(r"^oncewise_live_flights (\S+)$", text, re.MULTILINE)[1])


async def messages_of(site, thread):
    return (await site.ask("GET", f"/api/threads/{thread}")).json()["messages"]


async def test_twenty_open_streams_end_with_their_turns_when_the_server_is_asked_to_stop(fake, tmp_path):
    """Readiness says 503 at once, new messages are refused, every stream gets its `done`, and then the server exits.

    Messages that wait in the queue of a thread are no new ones: they have their turn, if there is time.
    """
    async with serve_process(tmp_path, fake.base_url, drain_s=20) as server, asyncio.TaskGroup() as tasks:
        opened = asyncio.Semaphore(0)

        async def watch(path, body=None):
            async with watching(server, path, body) as stream:
                await stream.until("delta")
                opened.release()
                return await stream.rest()

        threads = [await server.thread() for _ in range(10)]
        said = [{"content": f"Hello {thread}", "model": "n80-gap25"} for thread in threads]
        streams = [tasks.create_task(watch(stream_of(thread), one)) for thread, one in zip(threads, said, strict=True)]
        for _ in threads:
            await opened.acquire()
        streams += [tasks.create_task(watch(f"/api/threads/{thread}/stream")) for thread in threads]
        for _ in threads:
            await opened.acquire()
        streams += [tasks.create_task(watch(stream_of(threads[0]), {"content": "Waits", "model": "n2"}))]
        while await open_turns(server) < 11:
            await asyncio.sleep(0.02)
        server.signal(signal.SIGTERM)
        while (ready := await server.ask("GET", "/health/readiness", headers=())).status == 200:
            await asyncio.sleep(0.01)
        refused = await server.stream(threads[0], "Another")
        endings = [terminal(await stream) for stream in streams]
        status = await server.exited(10)

    assert ready.status == 503
    assert (refused.status, refused.code) == (503, "shutting_down")
    assert [(ending.name, ending.data["state"]) for ending in endings] == [("done", "completed")] * 21
    assert status == 0
    assert (fake.count, fake.outcomes["aborted"]) == (11, 0)
    assert server.lines[-1].lstrip().startswith("Try"), server.lines


async def test_streams_of_turns_that_do_not_end_in_time_close_so_that_they_resume(fake, tmp_path):
    """Of twenty streams one half ends, the other is closed; the server exits, and all that was shown is stored."""
    said = [{"content": f"m{n}", "model": "n30-gap20" if n % 2 else "n900-gap20"} for n in range(10)]
    async with serve_process(tmp_path, fake.base_url, drain_s=1.5) as server, contextlib.AsyncExitStack() as opened:
        threads = [await server.thread() for _ in said]
        streams = []
        for path_of, bodies in ((stream_of, said), ("/api/threads/{}/stream".format, [None] * 10)):
            opening = [
                opened.enter_async_context(watching(server, path_of(thread), body))
                for thread, body in zip(threads, bodies, strict=True)
            ]
            streams += await asyncio.gather(*opening)
        began_s = time.monotonic()
        server.signal(signal.SIGTERM)
        await asyncio.gather(*(stream.rest() for stream in streams))
        status = await server.exited(10)
        took_s = time.monotonic() - began_s
    async with serve_process(tmp_path, fake.base_url) as server:
        stored = [(await messages_of(server, thread))[1] for thread in threads]

    assert status == 0
    assert took_s < 1.5 + 3
    assert all(stream.complete and stream.text for stream in streams)
    for number, stream in enumerate(streams):
        ends = [event.data["state"] for event in stream.events if event.name in ("done", "error")]
        message = stored[number % 10]
        assert (ends, message["status"]) == ((["completed"], "complete") if number % 2 else ([], "partial"))
        assert message["content"] == stream.text
    assert fake.count == 10


@pytest.mark.slow
@pytest.mark.parametrize("how", ["asked to stop", "asked twice", "killed"])
async def test_a_turn_that_outlives_its_server_is_interrupted_and_its_thread_goes_on(fake, tmp_path, how):
    """The stream closes without a terminal event; resumed at the next server it tells the end and what was kept.

    So does the stream of a message that waited behind it: it was not answered and nothing of it is kept, but nothing
    waits for it either. Sent again under its key it is a new message.
    """
    key = [("idempotency-key", "k-1")]
    drain_s = {"asked to stop": 0.5, "asked twice": 20, "killed": 20}[how]
    said = {"content": "Hello", "model": "n600-gap20"}
    async with serve_process(tmp_path, fake.base_url, drain_s=drain_s, lease_s=1) as server:
        thread = await server.thread()
        async with (
            watching(server, stream_of(thread), said) as stream,
            watching(server, stream_of(thread), {"content": "Waits"}, [("x-request-id", "w")]) as waits,
        ):
            asked = asyncio.create_task(server.say(thread, "Waits too", key))
            while len(stream.events) < 60:
                await stream.next()
            assert await open_turns(server) == 3
            server.signal(signal.SIGKILL if how == "killed" else signal.SIGTERM)
            if how == "asked twice":
                await asyncio.sleep(0.3)
                server.signal(signal.SIGTERM)
            await asyncio.gather(stream.rest(), waits.rest())
            (cut,) = await asyncio.gather(asked, return_exceptions=True)
        status = await server.exited(10)

    assert not {"done", "error"} & {*names(stream.events), *names(waits.events)}
    if how == "killed":
        assert not stream.complete
        assert isinstance(cut, Exception)
    else:
        assert (stream.complete, status) == (True, 0)
        assert (cut.status, cut.code, cut.json()["retryable"]) == (503, "shutting_down", True)
        assert server.lines[-1].lstrip().startswith("Try"), server.lines
    async with serve_process(tmp_path, fake.base_url, lease_s=1) as server:
        resume = f"/api/threads/{thread}/turns/{stream.turn_id}/stream"
        async with watching(server, resume, headers=[("last-event-id", stream.last_id)]) as rest:
            await rest.rest()
        again = await server.ask("GET", resume, headers=[ORG, ("last-event-id", rest.last_id)])
        place = f"/api/threads/{thread}/turns/{waits.turn_id}/stream"
        async with watching(server, place) as unanswered:
            await unanswered.rest()
        kept = await messages_of(server, thread)
        goes_on = await server.stream(thread, "Next", model="n2")
        resent = await server.say(thread, "Waits too", key, model="n2")
        after = await messages_of(server, thread)

    lost = terminal(unanswered.events)
    assert names(unanswered.events) == ["ping", "meta", "error"]
    assert (lost.data["state"], lost.data["code"], lost.data["retryable"]) == ("interrupted", "leader_lost", True)
    assert resent.status == 200
    error = terminal(rest.events)
    assert names(rest.events) == ["ping", "meta", "reset", "delta", "error"]
    assert (error.data["state"], error.data["code"], error.data["retryable"]) == ("interrupted", "leader_lost", True)
    assert error.data["partial_chars"] == len(rest.text)
    assert [(message["content"], message["status"]) for message in kept] == [
        ("Hello", "complete"),
        (rest.text, "partial"),
    ]
    assert stream.text.startswith(rest.text)
    if how != "killed":
        assert rest.text == stream.text
    assert again.status == 204
    assert goes_on.status == 200
    assert [message["content"] for message in after][::2] == ["Hello", "Next", "Waits too"]
    assert [message["sequence"] for message in after] == [0, 1, 2, 3, 4, 5]
    assert (await fake.call(2)).request["messages"] == [{"role": "user", "content": "Next"}]
    assert fake.count == 3


async def test_an_interrupt_from_the_keyboard_ends_an_idle_server_at_once(fake, tmp_path):
    """Although a client of a finished stream still has its connection open and has not read it."""
    took_s = []
    # The best of three: on a shared machine one may be anything.
    while len(took_s) < 3 and not any(seconds < 1.0 for seconds in took_s):
        took_s.append(await stop_beside_an_open_stream(fake, tmp_path))
    assert min(took_s) < 1.0


async def stop_beside_an_open_stream(fake, folder):
    async with serve_process(folder, fake.base_url) as server:
        thread = await server.thread()
        async with watching(server, stream_of(thread), {"content": "Hello", "model": "n60-tok9000"}) as whole:
            await whole.rest()
        path = f"/api/threads/{thread}/turns/{whole.turn_id}/stream"
        async with watching(server, path), watching(server, path) as open_stream:
            await open_stream.until("meta")
            began_s = time.monotonic()
            server.signal(signal.SIGINT)
            status = await server.exited(10)
            took_s = time.monotonic() - began_s
    assert status == 0
    assert server.lines[-1].lstrip().startswith("Try"), server.lines
    return took_s


async def test_a_stream_that_is_opened_after_the_others_were_ended_ends_too(tmp_path):
    """Its request came before the listener was closed; nothing would end it any more."""
    async with serve(tmp_path, ScriptedProvider(held=True), drain_s=0) as site:
        thread = await site.thread()
        asked = asyncio.create_task(site.say(thread))
        await site.provider.started.wait()
        site.server.config.app.stop_streams()
        async with watching(site, f"/api/threads/{thread}/stream") as late:
            await late.rest()
        site.provider.go.set()
        reply = await asked

    assert names(late.events) == ["ping", "meta"]
    assert late.complete
    assert reply.status == 200


async def test_a_turn_may_be_cancelled_while_the_server_drains(tmp_path):
    """It ends as cancelled, with its text, and is not handed back as lost."""
    async with serve(tmp_path, ScriptedProvider(deltas=["a"] * 500, gap_s=0.02), drain_s=20) as site:
        thread = await site.thread()
        async with watching(site, stream_of(thread), {"content": "Hello"}) as stream:
            await stream.until("delta")
            site.server.should_exit = True
            await until(lambda: site.services.draining)
            cancelled = await site.ask("POST", f"/api/threads/{thread}/turns/{stream.turn_id}/cancel")
            await stream.rest()

    assert (cancelled.status, cancelled.json()["state"]) == (200, "cancelled")
    assert cancelled.json()["text"] == stream.text
    assert (terminal(stream.events).name, terminal(stream.events).data["state"]) == ("done", "cancelled")
