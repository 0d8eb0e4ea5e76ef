"""What is on the wire of a stream, and that every way to an answer gives the same text."""

import asyncio
import contextlib
import json
import re
import sqlite3

import pytest

from oncewise.api.limits import Limits
from tests.support.fake_provider import FakeProvider
from tests.support.http import JSON, ORG, parse_reply, read_events, serve
from tests.support.scripted import ScriptedProvider
from tests.support.watching import names, serve_openai, terminal, text_of, until, watching

ODD_TEXT = (
    "👩‍👩‍👧‍👦 family, 🇩🇪 flag, e\u0301 and é, \u200b\u202e, \u2028 \u2029 \u0085 \x1c,"
    "\r\nCR LF\rCR\nLF\n\nevent: done\ndata: {}\n\nid: 9-9\nretry: 1\n: comment\n"
    "\ufeff\\u0000 \\ \" ' </script> \x7f\t end\n\n"
)


@pytest.fixture
async def fake():
    async with FakeProvider() as provider:
        yield provider


def recorded(pieces, *, ensure_ascii=False):
    """An OpenAI stream that says these pieces, as its bytes."""
    envelope = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "odd"}
    choices = [{"index": 0, "delta": {"content": piece}, "finish_reason": None} for piece in pieces]
    choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    events = [json.dumps({**envelope, "choices": [choice]}, ensure_ascii=ensure_ascii) for choice in choices]
    return "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()


def messages_in(file):
    """What is in the database, read past the server."""
    with contextlib.closing(sqlite3.connect(file)) as database:
        return database.execute("SELECT role, content FROM messages ORDER BY sequence").fetchall()


def stream_of(thread):
    return f"/api/threads/{thread}/messages/stream"


async def test_every_block_has_the_one_form_that_all_clients_read(fake, tmp_path):
    """`event`, `id` where there is one, one line of JSON; `retry` inside the first; nothing else, no CR, no BOM."""
    async with (
        serve_openai(tmp_path, fake, "n8-gap15-u2028") as site,
        watching(site, stream_of(await site.thread()), {"content": "Hello"}) as watch,
    ):
        events = await watch.rest()

    blocks = watch.raw.split(b"\n\n")
    form = re.compile(rb"event: (ping|meta|delta|done)\n(id: \d+-\d+\n)?data: (\{[^\n]*\})")
    assert blocks.pop() == b""
    assert blocks[0].startswith(b"retry: 2000\nevent: ping\n")
    assert all(form.fullmatch(block.removeprefix(b"retry: 2000\n")) for block in blocks)
    assert watch.raw.count(b"retry:") == 1
    assert b"\r" not in watch.raw
    assert b"\xef\xbb\xbf" not in watch.raw
    assert names(events)[:3] == ["ping", "meta", "meta"]
    assert [event.id for event in events if event.id is None] == [None, None, None]
    places = [tuple(map(int, event.id.split("-"))) for event in events if event.id is not None]
    assert places == sorted(set(places))
    assert (terminal(events).name, places[-1]) == ("done", (1, 9))
    assert events[0].data["every_ms"] == 15000
    assert watch.complete
    assert watch.reply.headers["transfer-encoding"] == "chunked"
    assert "content-encoding" not in watch.reply.headers


async def test_the_same_odd_text_comes_every_way(fake, tmp_path):
    """Leader, follower, late resume, JSON, the row without its log, and the thread; pieces cut anywhere, bytes too."""
    pieces = [ODD_TEXT[start : start + 3] for start in range(0, len(ODD_TEXT), 3)]
    body = recorded(pieces)
    fake.raw["odd"] = [body[start : start + 7] for start in range(0, len(body), 7)]
    said = {"content": ODD_TEXT, "model": "odd"}
    async with serve_openai(tmp_path, fake, log_retention_s=0.5) as site:
        thread = await site.thread()
        path = stream_of(thread)
        async with watching(site, path, said) as leader, watching(site, path, said) as follower:
            answer = asyncio.create_task(site.ask("POST", f"/api/threads/{thread}/messages", said))
            await leader.rest()
            await follower.rest()
        reply = (await answer).json()
        turn = reply["turn_id"]
        again = f"/api/threads/{thread}/turns/{turn}/stream"
        async with watching(site, again) as from_log:
            await from_log.rest()
        first = next(event for event in leader.events if event.name == "delta")
        async with watching(site, again, headers=[("last-event-id", first.id)]) as rest:
            await rest.rest()
        await until(lambda: site.services.hub.stats().logs == 0)
        async with watching(site, again) as from_row:
            await from_row.rest()
        stored = await site.messages(thread)
        polled = (await site.ask("GET", f"/api/threads/{thread}/turns/{turn}")).json()
        rows = messages_in(tmp_path / "ow.db")

    texts = [leader.text, follower.text, from_log.text, first.data["delta"] + rest.text, from_row.text]
    assert texts == [ODD_TEXT] * 5
    assert reply["assistant_message"]["content"] == polled["text"] == ODD_TEXT
    assert stored == rows == [("user", ODD_TEXT), ("assistant", ODD_TEXT)]
    assert {terminal(watch.events).id for watch in (leader, follower, from_log, rest, from_row)} == {leader.last_id}
    assert terminal(leader.events).data["chars"] == len(ODD_TEXT)
    assert fake.count == 1


async def test_an_emoji_cut_in_two_between_deltas_is_whole_everywhere(fake, tmp_path):
    """As programs in JavaScript cut it: half of it escaped in one event, half in the next; on /v1 too."""
    fake.raw["halves"] = [recorded(["Hi \ud83d", "\ude42", "!\ud83d", "\udc4b\ud83c", "\udffd"], ensure_ascii=True)]
    text = "Hi 🙂!👋🏽"
    async with serve_openai(tmp_path, fake) as site:
        thread = await site.thread()
        async with watching(site, stream_of(thread), {"content": "Hello", "model": "halves"}) as live:
            await live.rest()
        body = {"model": "openai/halves", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
        whole = (await site.ask("POST", "/v1/chat/completions", body)).json()
        stored = await site.messages(thread)

    assert live.text == stored[1][1] == whole["choices"][0]["message"]["content"] == text
    assert terminal(live.events).data["chars"] == len(text)


class HeldLedger:
    """The real ledger, of which one method waits for `go`."""

    def __init__(self, ledger, method):
        self._ledger = ledger
        self._method = method
        self.go = asyncio.Event()
        self.calls = 0

    def __getattr__(self, name):
        method = getattr(self._ledger, name)

        async def held(*args, **kwargs):
            self.calls += 1
            await self.go.wait()
            return await method(*args, **kwargs)

        return held if name == self._method else method


async def test_text_is_shown_after_the_turn_is_marked_visible(tmp_path):
    """Else a turn that was shown could be called for again, and its text be replaced."""
    async with serve(tmp_path, ScriptedProvider(deltas=["a", "b"], gap_s=0.02)) as site:
        ledger = site.services.turns.runs.ledger = HeldLedger(site.services.turns.runs.ledger, "mark_visible")
        async with watching(site, stream_of(await site.thread()), {"content": "Hello"}) as watch:
            await until(lambda: ledger.calls)
            first = asyncio.create_task(watch.until("delta"))
            shown, _ = await asyncio.wait([first], timeout=0.3)
            ledger.go.set()
            await first
            await watch.rest()

    assert shown == set()
    assert (watch.text, ledger.calls) == ("ab", 1)


async def test_done_comes_after_the_commit(tmp_path):
    """Nobody is told before, in a stream or as JSON; who has `done` finds the pair from another connection."""
    async with serve(tmp_path, ScriptedProvider(deltas=["a", "b"], gap_s=0.02)) as site:
        ledger = site.services.turns.runs.ledger = HeldLedger(site.services.turns.runs.ledger, "commit")
        thread = await site.thread()
        said = {"content": "Hello"}
        async with (
            watching(site, stream_of(thread), said) as first,
            watching(site, stream_of(thread), said) as second,
            watching(site, f"/api/threads/{thread}/stream") as viewer,
        ):
            asked = asyncio.create_task(site.say(thread))
            await until(lambda: ledger.calls)
            ends = [asyncio.create_task(watch.until("done")) for watch in (first, second, viewer)]
            told, _ = await asyncio.wait([asked, *ends], timeout=0.3)
            before = messages_in(tmp_path / "ow.db")
            ledger.go.set()
            for end in ends:
                await end
                assert messages_in(tmp_path / "ow.db") == [("user", "Hello"), ("assistant", "ab")]
        reply = await asked

    assert (told, before) == (set(), [])
    assert first.text == second.text == viewer.text == reply.json()["assistant_message"]["content"] == "ab"


async def test_a_late_viewer_gets_one_frame_of_what_it_missed_then_each_delta(tmp_path):
    """The frame's id is that of its last delta; nothing is missing and nothing comes twice."""
    deltas = [f"<{number}>" for number in range(50)]
    async with serve(tmp_path, ScriptedProvider(deltas=deltas, gap_s=0.01)) as site:
        thread = await site.thread()
        async with watching(site, stream_of(thread), {"content": "Hello"}) as first:
            while first.last_id != "1-30":
                await first.next()
            async with watching(site, f"/api/threads/{thread}/stream") as late:
                await late.rest()
            await first.rest()

    missed, *live = [event for event in late.events if event.name == "delta"]
    seen = int(missed.id.removeprefix("1-"))
    assert missed.data["delta"] == "".join(deltas[:seen])
    assert 30 <= seen < 45
    assert [(event.id, event.data["delta"]) for event in live] == [
        (f"1-{number + 1}", deltas[number]) for number in range(seen, 50)
    ]
    assert names(late.events)[:4] == ["ping", "meta", "meta", "delta"]
    assert terminal(late.events).id == terminal(first.events).id == "1-51"


async def test_ten_who_come_at_different_moments_end_with_the_same(fake, tmp_path):
    """Whoever asks, watches or resumes, whenever; one call, and the text is the stored one."""
    async with serve_openai(tmp_path, fake, "n60-gap15-u2028") as site:
        thread = await site.thread()

        async def watch(number, turn=None):
            await asyncio.sleep(0.09 * number)
            paths = [stream_of(thread), f"/api/threads/{thread}/stream", f"/api/threads/{thread}/turns/{turn}/stream"]
            body = {"content": "Hello"} if number % 3 == 0 else None
            async with watching(site, paths[number % 3], body) as stream:
                await stream.rest()
            return stream

        async with watching(site, stream_of(thread), {"content": "Hello"}) as first:
            others = await asyncio.gather(*(watch(number, first.turn_id) for number in range(1, 10)))
            await first.rest()
        stored = await site.messages(thread)

    for other in others:
        assert (other.turn_id, other.text) == (first.turn_id, first.text)
        assert terminal(other.events) == terminal(first.events)
    assert stored[1] == ("assistant", first.text)
    assert len({names(other.events).count("delta") for other in others}) > 3
    assert fake.count == 1


async def test_the_demo_says_so_in_every_meta(tmp_path):
    """Live, joined, resumed from the log and from the row; a real provider's stream does not carry the word."""
    async with serve(tmp_path, demo=True, demo_latency_ms=300, demo_rps=1000, log_retention_s=0.3) as site:
        # `serve` puts a scripted lane under this name; every other name is the demo's.
        thread = await site.thread()
        said = {"content": "Hello", "provider": "openai", "model": "gpt"}
        async with watching(site, stream_of(thread), said) as live:
            await live.until("meta")
            async with watching(site, f"/api/threads/{thread}/stream") as joined:
                await joined.rest()
            await live.rest()
        again = f"/api/threads/{thread}/turns/{live.turn_id}/stream"
        async with watching(site, again) as from_log:
            await from_log.rest()
        await until(lambda: site.services.hub.stats().logs == 0)
        async with watching(site, again) as from_row, watching(site, stream_of(thread), said) as replayed:
            await from_row.rest()
            await replayed.rest()
        async with watching(site, stream_of(thread), {"content": "Hello", "provider": "demo"}) as other:
            await other.rest()

    for watch in (live, joined, from_log, from_row, replayed):
        assert watch.events[1].data["demo"] is True
        assert watch.text == live.text
    assert replayed.events[1].data["role"] == "replayed"
    assert "demo" not in other.events[1].data


async def test_a_stream_that_waits_in_a_queue_is_never_silent_for_long(tmp_path):
    """Behind a proxy that cuts silent connections it lives to its end; so does a viewer of the queued turn."""
    provider = ScriptedProvider(held=True)
    async with serve(tmp_path, provider, limits=Limits(hold_s=0.1, ping_s=0.1)) as site:
        thread = await site.thread()
        asked = asyncio.create_task(site.say(thread, "First"))
        await provider.started.wait()
        async with (
            watching(site, stream_of(thread), {"content": "Waits"}) as caller,
            watching(site, f"/api/threads/{thread}/turns/{caller.turn_id}/stream") as viewer,
        ):
            for watch in (caller, viewer) * 8:
                async with asyncio.timeout(1.0):
                    await watch.until("ping")
            provider.go.set()
            await asyncio.gather(caller.rest(), viewer.rest())
        await asked

    for watch in (caller, viewer):
        assert names(watch.events)[:3] == ["ping", "meta", "ping"]
        assert terminal(watch.events).data["state"] == "completed"


async def test_a_request_that_comes_too_early_waits_for_the_end_of_the_stream(tmp_path):
    """On the connection of a running stream: no byte of it is lost, and the request is answered afterwards."""
    deltas = [f"<{number}>" for number in range(20)]
    async with serve(tmp_path, ScriptedProvider(deltas=deltas, gap_s=0.02)) as site:
        path = stream_of(await site.thread())
        body = b'{"content":"Hello"}'
        fields = [site.host, ORG, JSON, ("content-length", str(len(body))), ("connection", "keep-alive")]
        reader, writer = await site.connect()
        writer.write(site.head("POST", path, fields) + body)
        came = await reader.readuntil(b"event: delta")
        writer.write(site.head("GET", "/health", [site.host, ("connection", "close")]))
        async with asyncio.timeout(10):
            came += await reader.read()
        writer.close()

    _, first, second = came.split(b"HTTP/1.1 ")
    events = read_events(parse_reply(b"HTTP/1.1 " + first).body)
    assert text_of(events) == "".join(deltas)
    assert names(events)[-1] == "done"
    assert second.startswith(b"200 OK")


async def test_tabs_on_one_turn_get_the_same_frames_and_leave_alone(tmp_path):
    """Two viewers are two cursors on one log; closing one changes nothing for the other."""
    deltas = [f"<{number}>" for number in range(30)]
    async with serve(tmp_path, ScriptedProvider(deltas=deltas, gap_s=0.01)) as site:
        thread = await site.thread()
        path = stream_of(thread)
        said = {"content": "Hello"}
        async with (
            watching(site, path, said) as one,
            watching(site, path, said) as two,
            watching(site, path, said) as gone,
        ):
            await gone.until("delta")
            gone.leave()
            await asyncio.gather(one.rest(), two.rest())
        turn = (await site.ask("GET", f"/api/threads/{thread}/turns/{one.turn_id}")).json()

    assert text_of(one.events) == text_of(two.events) == "".join(deltas)
    assert terminal(one.events).data == terminal(two.events).data
    assert terminal(one.events).id == terminal(two.events).id
    assert (turn["viewers"], turn["requesters"], turn["state"]) == (0, 0, "completed")
    assert len(site.provider.calls) == 1
