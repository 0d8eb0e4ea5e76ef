"""Slow and hostile viewers cost nobody anything, and every bound holds in the server as it is put together."""

import asyncio
import contextlib
import json
import re
import socket
import time

import pytest

from oncewise.api.limits import Limits
from oncewise.errors import Overloaded, ResponseTooLarge
from tests.support.fake_provider import FakeProvider
from tests.support.http import JSON, ORG, dechunk, read_events, serve
from tests.support.scripted import ScriptedProvider
from tests.support.server import serve_process
from tests.support.watching import terminal, text_of, until, watching

MIB = 2**20


def stream_of(thread):
    return f"/api/threads/{thread}/messages/stream"


async def never_reads(site, path, body=None, buffer=2048):
    """A client that asks and then takes no byte; its own buffer is as small as the kernel lets it be."""
    loop = asyncio.get_running_loop()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.setblocking(False)
    await loop.sock_connect(client, ("127.0.0.1", site.port))
    content = b"" if body is None else json.dumps(body).encode()
    fields = [site.host, ORG] + ([] if body is None else [JSON, ("content-length", str(len(content)))])
    await loop.sock_sendall(client, site.head("GET" if body is None else "POST", path, fields) + content)
    return client


async def everything(client):
    """What a client finds when it reads after all, until its connection ends."""
    came = b""
    with contextlib.suppress(ConnectionError):
        while more := await asyncio.get_running_loop().sock_recv(client, 65536):
            came += more
    client.close()
    return came


def unsent(site):
    """Bytes of answers that wait in this process for each client."""
    return [connection.transport.get_write_buffer_size() for connection in site.server.server_state.connections]


@pytest.mark.parametrize("chars", [160_000, 3_000_000])
async def test_a_finished_stream_that_nobody_takes_is_let_go(tmp_path, chars):
    """Whether its end fits into the buffers or not; meanwhile little of it waits in memory."""
    provider = ScriptedProvider(deltas=["x" * 10_000] * (chars // 10_000))
    async with serve(tmp_path, provider, limits=Limits(stall_s=0.5)) as site:
        thread = await site.thread()
        turn = (await site.say(thread)).json()["turn_id"]
        path = f"/api/threads/{thread}/turns/{turn}/stream"
        clients = [await never_reads(site, path) for _ in range(5)]
        await until(lambda: len([size for size in unsent(site) if size]) == 5)
        waiting = unsent(site)
        began_s = time.monotonic()
        await until(lambda: not site.server.server_state.connections)
        took_s = time.monotonic() - began_s
        async with watching(site, path) as reads:
            await reads.rest()
        for client in clients:
            client.close()

    assert max(waiting) <= 256 * 1024
    assert took_s < 3.0
    assert len(reads.text) == chars


async def test_a_viewer_that_takes_nothing_of_a_running_stream_is_dropped_and_may_resume(tmp_path):
    """So many seconds after its buffers were full, and no sooner; the others get each delta, and it loses none."""
    provider = ScriptedProvider(deltas=[f"<{number:03}>" * 600 for number in range(200)], gap_s=0.01)
    async with serve(tmp_path, provider, limits=Limits(stall_s=0.7)) as site:
        thread = await site.thread()
        async with watching(site, stream_of(thread), {"content": "Hello"}) as reads:
            client = await never_reads(site, f"/api/threads/{thread}/turns/{reads.turn_id}/stream")
            reading = asyncio.create_task(reads.rest())
            await until(lambda: max(unsent(site), default=0) > 64 * 1024)
            full_s = time.monotonic()
            most = max(unsent(site))
            await until(lambda: len(site.server.server_state.connections) == 1)
            dropped_s = time.monotonic() - full_s
            assert not reading.done()
            await reading
        came = await everything(client)
        head, _, body = came.partition(b"\r\n\r\n")
        seen = read_events(dechunk(body).rpartition(b"\n\n")[0] + b"\n\n")
        last = next(event.id for event in reversed(seen) if event.id)
        address = f"/api/threads/{thread}/turns/{reads.turn_id}/stream"
        async with watching(site, address, headers=[("last-event-id", last)]) as resumed:
            await resumed.rest()

    assert head.startswith(b"HTTP/1.1 200")
    assert 0.6 < dropped_s < 1.4
    assert most <= 128 * 1024
    assert reads.text == provider.text
    assert text_of(seen) + resumed.text == provider.text
    assert len(site.provider.calls) == 1


async def test_a_client_that_reads_slowly_is_served_to_the_end(tmp_path):
    """As long as it takes some bytes each time, however long that is in all."""
    provider = ScriptedProvider(deltas=["x" * 10_000] * 60)
    async with serve(tmp_path, provider, limits=Limits(stall_s=0.5)) as site:
        thread = await site.thread()
        turn = (await site.say(thread)).json()["turn_id"]
        client = await never_reads(site, f"/api/threads/{thread}/turns/{turn}/stream", buffer=32 * 1024)
        came = b""
        while b"event: done" not in came:
            await asyncio.sleep(0.05)
            more = await asyncio.get_running_loop().sock_recv(client, 64 * 1024)
            assert more, "closed in the middle"
            came += more
        client.close()

    assert came.count(b"x") > 600_000


async def test_clients_that_never_read_do_not_hold_up_a_stop(tmp_path):
    """Neither with a running stream, nor with the rest of a finished one: well under a second."""
    provider = ScriptedProvider(deltas=["x" * 10_000] * 40)
    async with serve(tmp_path, provider) as site:
        thread = await site.thread()
        turn = (await site.say(thread)).json()["turn_id"]
        path = f"/api/threads/{thread}/turns/{turn}/stream"
        small = await site.thread()
        provider.deltas = ["x" * 10_000] * 16
        ended = (await site.say(small)).json()["turn_id"]
        clients = [await never_reads(site, path) for _ in range(3)]
        clients += [await never_reads(site, f"/api/threads/{small}/turns/{ended}/stream") for _ in range(3)]
        await until(lambda: len([size for size in unsent(site) if size]) == 6)
        began_s = time.monotonic()
        site.server.should_exit = True
        await until(lambda: not site.server.server_state.connections)
        took_s = time.monotonic() - began_s
        for client in clients:
            client.close()

    assert took_s < 1.0


async def test_a_backlog_is_taken_in_frames_that_stay_small(tmp_path):
    """Each viewer that is slow to read holds one of them, whatever the length of the text."""
    async with serve(tmp_path) as site:
        log = site.services.hub.open(("acme", "turn"))
        for _ in range(400):
            log.append("x" * 10_000)
        log.close("done", {})
        viewer, sizes = log.view(), []
        while not viewer.ended:
            sizes.append(len(viewer.take()))
        viewer.close()

    assert sum(sizes) > 4_000_000
    assert max(sizes) < 160_000


# -- what the whole costs ----------------------------------------------------------------------------------------


async def delays_ms(server, thread, said, viewers):
    """How late each delta of the second half of a stream came to each of some viewers, and what they read."""
    late = []

    async def read():
        async with watching(server, stream_of(thread), said) as watch:
            while (event := await watch.next()) is not None:
                if event.name == "delta":
                    now_ns = time.monotonic_ns()
                    stamps = re.findall(r"@\d+:(\d+):(\d+)@", event.data["delta"])
                    late.extend((now_ns - int(at)) / 1e6 for number, at in stamps if int(number) >= 75)
            return watch.text

    texts = await asyncio.gather(*(read() for _ in range(viewers)))
    assert len(set(texts)) == 1
    return sorted(late), texts[0]


@pytest.mark.slow
async def test_two_hundred_clients_that_never_read_cost_the_others_nothing(tmp_path):
    """C31: at most 40 MiB, and a fifth of the others' delay; after ten seconds they are gone, and may resume."""
    async with FakeProvider() as fake, serve_process(tmp_path, fake.base_url) as server:
        measured = []
        # The best of three: on a shared machine one may be anything.
        while len(measured) < 3 and not any(is_harmless(*each) for each in measured):
            thread, said = await server.thread(), {"content": f"{len(measured)}", "model": "n150-gap25-tok3000"}
            alone, _ = await delays_ms(server, await server.thread(), said, 10)
            before = server.rss_bytes
            said["content"] += " beside"
            async with watching(server, stream_of(thread), said) as first:
                clients = [await never_reads(server, f"/api/threads/{thread}/stream") for _ in range(200)]
                beside, text = await delays_ms(server, thread, said, 10)
                after = server.rss_bytes
                await first.rest()
            path = f"/api/threads/{thread}/turns/{first.turn_id}"
            began_s = time.monotonic()
            while (await server.ask("GET", path)).json()["viewers"]:
                await asyncio.sleep(0.1)
            gone_s = time.monotonic() - began_s
            for client in clients:
                client.close()
            measured.append((p95(alone), p95(beside)))
            assert after - before <= 40 * MIB
            assert gone_s < 15
        async with watching(server, path + "/stream", headers=[("last-event-id", "1-5")]) as resumed:
            await resumed.rest()

    assert any(is_harmless(*each) for each in measured), measured
    assert text.endswith(resumed.text)
    assert fake.count == 2 * len(measured)


def p95(delays):
    return delays[int(len(delays) * 0.95)]


def is_harmless(alone_ms, beside_ms):
    # Below ten milliseconds the machine is measured, not the server.
    return beside_ms <= max(1.2 * alone_ms, alone_ms + 10)


# -- bounds ------------------------------------------------------------------------------------------------------


async def test_the_bounds_of_the_server_are_those_of_the_design(tmp_path):
    """Each at its limit, and one above it."""
    async with serve(tmp_path, ScriptedProvider(held=True)) as site:
        hub, turns, threads = site.services.hub, site.services.turns, site.services.threads
        log = hub.open(("acme", "deltas"))
        for _ in range(50_000):
            log.append("")
        with pytest.raises(ResponseTooLarge):
            log.append("")
        log = hub.open(("acme", "bytes"))
        for _ in range(3):
            log.append("x" * (MIB - 60))
        log.append("x" * (MIB - 60))
        with pytest.raises(ResponseTooLarge):
            log.append("x" * 200)
        hubs = [hub, turns.calls.logs, site.services.completions.logs]
        assert [each.max_log_bytes for each in hubs] == [4 * MIB] * 3
        assert sum(each.max_total_bytes for each in hubs) == 256 * MIB

        thread = await site.thread()
        held = [turns.send(threads.prepare("acme", thread, content=f"m{n}"), "r") for n in range(10_000)]
        with pytest.raises(Overloaded):
            turns.send(threads.prepare("acme", thread, content="one more"), "r")
        with contextlib.ExitStack() as leaving:
            for ticket in held:
                leaving.enter_context(ticket)
        await until(lambda: turns.flights.stats().tasks == 0)

        with contextlib.ExitStack() as leaving:
            ask = threads.prepare("acme", thread, content="Hello")
            for _ in range(5_000):
                leaving.enter_context(turns.send(ask, "r"))
            refused = await site.stream(thread)
    assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "overloaded", "1")


async def test_all_streams_together_have_a_limit_of_memory(tmp_path):
    """At the limit a turn fails with `overloaded`, and the others keep what they have; ended streams make room."""
    async with serve(tmp_path) as site:
        hub = site.services.hub
        logs = [hub.open(("acme", str(number))) for number in range(hub.max_total_bytes // (4 * MIB))]
        for log in logs:
            for _ in range(4):
                log.append("x" * (MIB - 60))
        thread = await site.thread()
        rest = hub.max_total_bytes - hub.stats().bytes
        logs.append(hub.open(("acme", "rest")))
        logs[-1].append("x" * (rest - 60))
        with pytest.raises(Overloaded):
            logs[-1].append("x" * 100)
        refused = await site.say(thread)
        logs[0].close("done", {})
        answered = await site.say(thread)

    assert (refused.status, refused.code) == (503, "overloaded")
    assert answered.status == 200
    assert [log.deltas for log in logs] == [4] * (len(logs) - 1) + [1]


async def test_an_answer_that_grows_too_large_ends_there(tmp_path):
    """What fits is shown and kept, as of any turn that fails; the server goes on."""
    provider = ScriptedProvider(deltas=["x" * (MIB - 100)] * 5, gap_s=0.01)
    async with serve(tmp_path, provider) as site:
        thread = await site.thread()
        async with watching(site, stream_of(thread), {"content": "Hello"}) as watch:
            await watch.rest()
        stored = (await site.ask("GET", f"/api/threads/{thread}")).json()["messages"]
        provider.deltas = ["pong"]
        after = await site.say(thread, "Again")

    ending = terminal(watch.events)
    assert (ending.name, ending.data["state"], ending.data["code"]) == ("error", "failed", "response_too_large")
    assert ending.data["partial_chars"] == len(watch.text) == 4 * (MIB - 100)
    assert (stored[1]["status"], stored[1]["content"]) == ("partial", watch.text)
    assert after.status == 200


async def test_thirty_two_messages_wait_behind_the_one_that_runs(tmp_path):
    """The next is told that the queue is full; a message that is already in it joins."""
    async with serve(tmp_path, ScriptedProvider(held=True), drain_s=0) as site:
        thread = await site.thread()
        waiting = [asyncio.create_task(site.stream(thread, f"m{number}")) for number in range(33)]
        await until(lambda: len(site.services.turns.runs.led) == 33)
        refused = await site.stream(thread, "one more")
        joins = asyncio.create_task(site.stream(thread, "m20"))
        await until(lambda: site.services.turns.flights.stats().waiters == 34)
        site.provider.go.set()
        replies = await asyncio.gather(joins, *waiting)

    assert (refused.status, refused.code) == (429, "queue_full")
    assert "retry-after" in refused.headers
    assert {reply.status for reply in replies} == {200}
    assert replies[0].headers["x-turn-id"] == replies[21].headers["x-turn-id"]
    assert len(site.provider.calls) == 33
