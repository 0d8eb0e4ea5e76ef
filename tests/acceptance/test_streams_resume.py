"""Joining and resuming: wherever it is cut, a client ends with the stored text, and no provider is asked again."""

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oncewise.api.limits import Limits
from oncewise.model import FinishReason, Usage
from oncewise.ports import Completion, TextDelta
from tests.support.fake_provider import FakeProvider
from tests.support.http import JSON, ORG, parse_reply, read_events, serve
from tests.support.scripted import ScriptedProvider
from tests.support.watching import names, serve_openai, terminal, text_of, until, watching


class PiecewiseProvider(ScriptedProvider):
    """Says its pieces one after the other; after some of them it lets the others run first."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    async def stream(self, request):
        self.calls.append(request)
        for text, pause_s in self.pieces:
            yield TextDelta(text)
            if pause_s is not None:
                await asyncio.sleep(pause_s)
        yield Completion(FinishReason.STOP, Usage(1, 1), model=request.model)


@pytest.fixture
async def piecewise(tmp_path):
    async with serve(tmp_path, PiecewiseProvider()) as site:
        yield site


def stream_of(thread):
    return f"/api/threads/{thread}/messages/stream"


def dechunk_what_came(body):
    parts = []
    while b"\r\n" in body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        parts.append(body[:length])
        body = body[length + 2 :]
    return b"".join(parts)


@dataclass
class CutClient:
    """A client whose connection breaks after some bytes, again and again, and that resumes each time."""

    site: object
    thread: str
    turn: str | None = None
    text: str = ""
    last: str | None = None
    endings: list = field(default_factory=list)

    async def connect(self, cut_after):
        """Read at most so many bytes of the body; None for all."""
        reader, writer = await self.site.connect()
        fields = [self.site.host, ORG, ("connection", "close")]
        if self.turn is None:
            body = b'{"content":"Hello"}'
            fields += [JSON, ("content-length", str(len(body))), ("x-coalesce", "off")]
            writer.write(self.site.head("POST", stream_of(self.thread), fields) + body)
        else:
            fields += [("last-event-id", self.last)] if self.last is not None else []
            path = f"/api/threads/{self.thread}/turns/{self.turn}/stream"
            writer.write(self.site.head("GET", path, fields))
        async with asyncio.timeout(10):
            reply = parse_reply(await reader.readuntil(b"\r\n\r\n"))
            came = b""
            while cut_after is None or len(came) < cut_after:
                more = await reader.read(65536 if cut_after is None else cut_after - len(came))
                came += more
                if not more:
                    break
        writer.close()
        self.take(reply, dechunk_what_came(came))

    def take(self, reply, body):
        if reply.status == 204:
            assert self.endings, "204 for a client that was never told the end"
            return
        assert reply.status == 200
        self.turn = self.turn or reply.headers["x-turn-id"]
        assert "stream-replayed-from" not in reply.headers
        whole, gap, _ = body.rpartition(b"\n\n")
        for event in read_events(whole + gap):
            self.last = event.id or self.last
            if event.name == "delta":
                self.text += event.data["delta"]
            elif event.name in ("done", "error"):
                self.endings.append(event)


PIECES = st.lists(
    st.tuples(st.text(min_size=1, max_size=5), st.sampled_from([None, 0, 0.001, 0.003])), min_size=1, max_size=9
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=PIECES, cuts=st.lists(st.integers(0, 700), max_size=5))
async def test_any_stream_may_be_cut_anywhere_and_resumed(piecewise, pieces, cuts):
    """C30: the text put together over the cuts is the stored one; each id is followed by exactly the rest."""
    piecewise.provider.pieces, before = pieces, len(piecewise.provider.calls)
    whole = "".join(text for text, _ in pieces)
    thread = await piecewise.thread()
    client = CutClient(piecewise, thread)
    for cut in [*cuts, None]:
        await client.connect(cut)

    assert client.text == whole
    assert {ending.name for ending in client.endings} == {"done"}
    assert await piecewise.messages(thread) == [("user", "Hello"), ("assistant", whole)]
    log = piecewise.services.hub.get(("acme", client.turn))
    for seen in range(log.deltas + 1):
        rest = CutClient(piecewise, thread, client.turn, last=f"1-{seen}")
        await rest.connect(None)
        assert rest.text == "".join(log._texts[seen:])
        assert [ending.id for ending in rest.endings] == [str(log.tail)]
    path = f"/api/threads/{thread}/turns/{client.turn}/stream"
    assert (await piecewise.ask("GET", path, headers=[ORG, ("last-event-id", str(log.tail))])).status == 204
    assert len(piecewise.provider.calls) == before + 1


async def test_a_connection_cut_inside_a_data_line_resumes_where_the_last_whole_event_was(tmp_path):
    """While the turn runs: half an event counts for nothing."""
    async with FakeProvider() as fake, serve_openai(tmp_path, fake, "n20-gap20-u2028") as site:
        thread = await site.thread()
        client = CutClient(site, thread)
        for bytes_in in (700, 300, 333, 401):
            await client.connect(bytes_in)
            assert not client.endings
        await client.connect(None)
        stored = await site.messages(thread)

    assert stored[1] == ("assistant", client.text)
    assert fake.count == 1


async def test_other_tenants_get_the_answer_of_an_unknown_id(tmp_path):
    """Byte for byte, while the turn runs and after it; the turn is not disturbed."""
    async with FakeProvider() as fake, serve_openai(tmp_path, fake, "n20-gap20") as site:
        thread = await site.thread()
        unknown = "00000000-0000-7000-8000-000000000000"
        me = ("x-request-id", "me")

        async def probe(path, method="GET"):
            return await site.ask(method, path, None, [("x-org-id", "other"), me])

        async def compare(turn):
            for suffix in (f"/turns/{turn}/stream", "/stream", f"/turns/{turn}"):
                foreign = await probe(f"/api/threads/{thread}{suffix}")
                random = await probe(f"/api/threads/{unknown}{suffix.replace(turn, unknown)}")
                assert (foreign.status, foreign.body) == (404, random.body)
                assert foreign.headers.keys() == random.headers.keys()
            foreign = await probe(f"/api/threads/{thread}/turns/{turn}/cancel", "POST")
            random = await probe(f"/api/threads/{unknown}/turns/{unknown}/cancel", "POST")
            assert (foreign.status, foreign.body) == (404, random.body)
            assert (await probe("/api/threads/cancel/mine", "POST")).body == (
                await probe("/api/threads/cancel/none", "POST")
            ).body

        async with watching(site, stream_of(thread), {"content": "Hello"}, [("x-request-id", "mine")]) as mine:
            await mine.until("delta")
            await compare(mine.turn_id)
            await mine.rest()
        await compare(mine.turn_id)

    assert terminal(mine.events).data["state"] == "completed"
    assert fake.count == 1


async def test_a_deleted_turn_is_unknown_and_asks_nobody(tmp_path):
    """Neither log nor row: 404, and no provider call."""
    async with serve(tmp_path, log_retention_s=0) as site:
        thread = await site.thread()
        turn = (await site.stream(thread)).headers["x-turn-id"]
        await site.ask("DELETE", f"/api/threads/{thread}")
        reply = await site.ask(
            "GET", f"/api/threads/{thread}/turns/{turn}/stream", headers=[ORG, ("last-event-id", "1-1")]
        )

        assert (reply.status, reply.code) == (404, "not_found")
        assert len(site.provider.calls) == 1


async def test_joining_a_thread_follows_the_turn_that_runs_and_then_the_next(tmp_path):
    """A stream stays with its turn; when that has ended the thread's address leads to the one that waited."""
    async with serve(tmp_path, ScriptedProvider(held=True)) as site:
        thread = await site.thread()
        address = f"/api/threads/{thread}/stream"
        first = asyncio.create_task(site.say(thread, "one"))
        await site.provider.started.wait()
        second = asyncio.create_task(site.say(thread, "two"))
        await until(lambda: len(site.services.turns.runs.led) == 2)
        async with watching(site, address) as watch:
            queued = max(run.admitted.turn_id for run in site.services.turns.runs.led.values())
            async with watching(site, f"/api/threads/{thread}/turns/{queued}/stream") as waiting:
                site.provider.go.set()
                await asyncio.gather(watch.rest(), waiting.rest())
        one, two = (await first).json(), (await second).json()
        idle = await site.ask("GET", address)

    assert (watch.turn_id, text_of(watch.events)) == (one["turn_id"], "pong")
    assert terminal(watch.events).data["assistant_message_id"] == one["assistant_message"]["id"]
    assert (waiting.turn_id, waiting.events[1].data["state"]) == (two["turn_id"], "pending")
    assert terminal(waiting.events).data["assistant_message_id"] == two["assistant_message"]["id"]
    assert idle.status == 204


async def test_the_first_meta_says_how_it_stands_with_the_turn_now(tmp_path):
    """Not how it stood when the turn was admitted: to a caller who joins late, and to a viewer."""

    async def told(path, body=None):
        async with watching(site, path, body) as watch:
            meta = await watch.until("meta")
            return meta.data["state"], meta.data["queue_position"]

    slow = ScriptedProvider(deltas=["a"] * 400, gap_s=0.02)
    async with serve(tmp_path, slow, limits=Limits(hold_s=0.05), drain_s=0) as site:
        thread = await site.thread()
        say, third = stream_of(thread), {"content": "three"}
        async with watching(site, say, {"content": "one"}) as one, watching(site, say, {"content": "two"}) as two:
            await one.until("delta")
            asked = asyncio.create_task(site.say(thread, "three"))
            await until(lambda: len(site.services.turns.runs.led) == 3)
            queued = max(run.admitted.turn_id for run in site.services.turns.runs.led.values())
            address = f"/api/threads/{thread}/turns/{queued}/stream"
            before = await asyncio.gather(told(say, third), told(address), told(say, {"content": "one"}))
            await site.ask("POST", f"/api/threads/{thread}/turns/{two.turn_id}/cancel")
            await until(lambda: max(run.place for run in site.services.turns.runs.led.values()) == 1)
            moved = await asyncio.gather(told(say, third), told(address))
            await site.ask("POST", f"/api/threads/{thread}/turns/{one.turn_id}/cancel")
            async with watching(site, address) as last:
                await last.until("delta")
                running = await asyncio.gather(told(say, third), told(address), told(f"/api/threads/{thread}/stream"))
            asked.cancel()
        alone = await site.thread()
        unseen = asyncio.create_task(site.say(alone))
        await until(lambda: any(run.log.deltas and not run._watched for run in site.services.turns.runs.led.values()))
        first_look = await told(f"/api/threads/{alone}/stream")
        unseen.cancel()

    assert first_look == ("streaming", 0)
    assert before == [("pending", 2), ("pending", 2), ("streaming", 0)]
    assert moved == [("pending", 1)] * 2
    assert running == [("streaming", 0)] * 3


async def test_a_thread_is_joined_from_the_beginning_and_a_client_that_saw_some_is_told(tmp_path):
    """An EventSource comes back to the address it was given; without a word it would show the text twice."""
    async with serve(tmp_path, ScriptedProvider(deltas=["a"] * 30, gap_s=0.02)) as site:
        thread = await site.thread()
        async with watching(site, stream_of(thread), {"content": "Hello"}) as first:
            await first.until("delta")
            address = f"/api/threads/{thread}/stream"
            async with (
                watching(site, address, headers=[("last-event-id", "1-1")]) as again,
                watching(site, address) as fresh,
            ):
                await asyncio.gather(first.rest(), again.rest(), fresh.rest())
        idle = await site.ask("GET", address, headers=[ORG, ("last-event-id", first.last_id)])

    assert again.reply.headers["stream-replayed-from"] == again.events[1].data["replayed_from"] == "start"
    assert "stream-replayed-from" not in fresh.reply.headers
    assert again.text == fresh.text == "a" * 30
    assert idle.status == 204


async def test_a_repeated_post_joins_although_the_provider_has_no_place(tmp_path):
    """Its answer was lost; the same key waits for the turn that runs, another message under it is 422."""
    async with serve(tmp_path, ScriptedProvider(held=True)) as site:
        thread = await site.thread()
        key = [("idempotency-key", "k-1")]
        async with watching(site, stream_of(thread), {"content": "Hello"}, key) as lost:
            await lost.until("meta")
        async with watching(site, stream_of(thread), {"content": "Hello"}, key) as again:
            other = await site.say(thread, "Other", headers=key)
            site.provider.go.set()
            await again.rest()
        replayed = await site.stream(thread, headers=key)

    assert again.turn_id == lost.turn_id == replayed.headers["x-turn-id"]
    assert (again.reply.headers["x-coalesce"], replayed.headers["x-coalesce"]) == ("follower", "replayed")
    assert (other.status, other.code) == (422, "idempotency_mismatch")
    assert len(site.provider.calls) == 1


async def test_a_backlog_of_fifty_thousand_deltas_is_joined_at_once(tmp_path):
    """Few frames, within half a second; the ids are those of their last deltas."""
    async with serve(tmp_path) as site:
        thread = await site.thread()
        turn = (await site.stream(thread)).headers["x-turn-id"]
        log = site.services.hub.open(("acme", turn))
        for number in range(50_000):
            log.append(f"<{number}>")
        log.close("done", {"state": "completed"})
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        async with watching(site, f"/api/threads/{thread}/turns/{turn}/stream") as watch:
            await watch.rest()
        took_s = loop.time() - began_s

    deltas = [event for event in watch.events if event.name == "delta"]
    assert text_of(deltas) == "".join(f"<{number}>" for number in range(50_000))
    assert len(deltas) <= 20
    assert (deltas[-1].id, watch.last_id) == ("1-50000", "1-50001")
    assert names(watch.events)[-1] == "done"
    assert took_s < 0.5
