"""Every way a turn can end, as the viewers, the callers, the thread and the provider see it."""

import asyncio
import random
import re
import time

import pytest

from tests.support.fake_provider import FakeProvider
from tests.support.http import ORG, serve
from tests.support.scripted import ScriptedProvider
from tests.support.watching import names, serve_openai, terminal, text_of, until, watching


@pytest.fixture
async def fake():
    async with FakeProvider() as provider:
        yield provider


@pytest.fixture
async def site(tmp_path, fake):
    """A server whose provider would talk for four seconds."""
    async with serve_openai(tmp_path, fake, "n200-gap20", drain_s=0) as site:
        yield site


def stream_of(thread):
    return f"/api/threads/{thread}/messages/stream"


def watch_as(site, thread, request_id, content="Hello", **fields):
    return watching(site, stream_of(thread), {"content": content, **fields}, [("x-request-id", request_id)])


async def thread_of(site, thread):
    return (await site.ask("GET", f"/api/threads/{thread}")).json()["messages"]


async def turn_of(site, thread, turn):
    return (await site.ask("GET", f"/api/threads/{thread}/turns/{turn}")).json()


async def cancel_turn(site, thread, turn):
    return await site.ask("POST", f"/api/threads/{thread}/turns/{turn}/cancel")


async def cancel_request(site, request_id):
    return await site.ask("POST", f"/api/threads/cancel/{request_id}")


# -- the provider fails ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "code"),
    [
        ("n9-gap15-cut3", "provider_protocol"),
        ("n3-gap15-nofinish", "provider_protocol"),
        ("n3-gap15-errinstream-u2028", "provider_error"),
    ],
)
async def test_a_failure_after_text_keeps_the_text_out_of_the_next_prompt(site, fake, model, code):
    """One `error` that counts what was shown; the pair is stored as partial; asking again gives a clean pair."""
    thread = await site.thread()
    async with watch_as(site, thread, "r", model=model) as watch:
        await watch.rest()
    error = terminal(watch.events)
    first = await thread_of(site, thread)
    again = await site.stream(thread, model="n2")
    pairs = await thread_of(site, thread)

    assert (error.name, error.data["state"], error.data["code"]) == ("error", "failed", code)
    assert error.data["partial_chars"] == len(watch.text) > 0
    assert (await turn_of(site, thread, watch.turn_id))["state"] == "failed"
    assert [(message["status"], message["content"]) for message in first] == [
        ("complete", "Hello"),
        ("partial", watch.text),
    ]
    assert again.status == 200
    assert [message["status"] for message in pairs] == ["complete", "partial", "complete", "complete"]
    assert (await fake.call(fake.count)).request["messages"] == [{"role": "user", "content": "Hello"}]


async def test_everyone_sees_the_same_deltas_and_the_same_error(site, fake):
    """Who asked first, who joined, who watches, who comes when it is over; a JSON caller gets the code as a status."""
    thread = await site.thread()
    said = {"content": "Hello", "model": "n20-gap20-cut9"}
    async with watch_as(site, thread, "a", **said) as leader:
        await leader.until("delta")
        asked = asyncio.create_task(site.ask("POST", f"/api/threads/{thread}/messages", said))
        async with (
            watch_as(site, thread, "b", **said) as follower,
            watching(site, f"/api/threads/{thread}/stream") as viewer,
        ):
            await asyncio.gather(leader.rest(), follower.rest(), viewer.rest())
    reply = await asked
    async with watching(site, f"/api/threads/{thread}/turns/{leader.turn_id}/stream") as late:
        await late.rest()

    ending = terminal(leader.events)
    assert (ending.name, ending.id, ending.data["code"]) == ("error", "1-10", "provider_protocol")
    for watch in (follower, viewer, late):
        assert (watch.text, terminal(watch.events)) == (leader.text, ending)
    assert len(re.findall(r"@1:\d+:", leader.text)) == 9
    assert (reply.status, reply.code) == (502, "provider_protocol")
    assert [message["content"] for message in await thread_of(site, thread)] == ["Hello", leader.text]
    assert fake.count == 1


async def test_a_failure_before_text_is_one_error_for_everyone(site, fake):
    """Inside the streams whose head was sent, without any delta; for all others a status. Nothing is stored."""
    thread = await site.thread()
    said = {"content": "Hello", "model": "lat1300-err400"}
    async with (
        watch_as(site, thread, "a", **said) as leader,
        watching(site, f"/api/threads/{thread}/stream") as viewer,
    ):
        joined = await site.stream(thread, **said)
        await asyncio.gather(leader.rest(), viewer.rest())

    for watch in (leader, viewer):
        assert names(watch.events) == ["ping", "meta", "error"]
        ending = terminal(watch.events)
        assert (ending.id, ending.data["code"], ending.data["partial_chars"]) == ("1-1", "provider_error", 0)
    assert (joined.status, joined.code, joined.headers["x-coalesce"]) == (502, "provider_error", "follower")
    assert await thread_of(site, thread) == []
    assert fake.count == 1


async def test_a_failure_before_text_leaves_no_messages(site, fake):
    """The thread is as before; asking again leaves exactly two."""
    thread = await site.thread()
    refused = await site.stream(thread, model="err400")
    between = await thread_of(site, thread)
    again = await site.stream(thread, model="n2")

    assert (refused.status, refused.code) == (502, "provider_error")
    assert between == []
    assert again.status == 200
    assert [message["status"] for message in await thread_of(site, thread)] == ["complete", "complete"]
    assert fake.count == 2


# -- cancelling --------------------------------------------------------------------------------------------------


async def test_cancelling_a_turn_closes_the_providers_connection_within_a_second(site, fake):
    """Every stream ends with the same `done`; a second cancel answers the same and changes nothing."""
    thread = await site.thread()
    async with watch_as(site, thread, "a") as one, watch_as(site, thread, "b") as two:
        await one.until("delta")
        call = await fake.call(1)
        asked_s = time.monotonic()
        first = await cancel_turn(site, thread, one.turn_id)
        await asyncio.gather(one.rest(), two.rest())
        async with asyncio.timeout(5):
            await call.ended.wait()
    second = await cancel_turn(site, thread, one.turn_id)

    assert call.closed_by_client
    assert call.ended_s - asked_s < 1.0
    ending = terminal(one.events)
    assert (ending.name, ending.data["state"], ending.data["reason"]) == ("done", "cancelled", "cancelled")
    assert (ending.id, ending.data) == (terminal(two.events).id, terminal(two.events).data)
    assert (first.status, first.json()["state"]) == (200, "cancelled")
    assert (second.status, second.json()) == (200, first.json())
    assert (await thread_of(site, thread))[1]["content"] == one.text == two.text
    assert (await thread_of(site, thread))[1]["status"] == "partial"
    assert fake.count == 1


async def test_a_call_that_another_thread_shares_outlives_a_cancel(site, fake):
    """The last turn that wants it is who stops it."""
    one, two = await site.thread(), await site.thread()
    async with watch_as(site, one, "a") as mine:
        await mine.until("delta")
        async with watch_as(site, two, "b") as other:
            await other.until("delta")
            await cancel_turn(site, one, mine.turn_id)
            await mine.rest()
            for _ in range(5):
                await other.until("delta")
            assert not fake.calls[0].ended.is_set()
            asked_s = time.monotonic()
            await cancel_turn(site, two, other.turn_id)
            await other.rest()
        async with asyncio.timeout(5):
            await fake.calls[0].ended.wait()

    assert fake.calls[0].ended_s - asked_s < 1.0
    assert other.text.startswith(mine.text)
    assert fake.count == 1


async def test_a_late_cancel_never_touches_a_newer_turn(site):
    """Neither of the turn nor of a request that has its answer; both are told so, as often as they ask."""
    thread = await site.thread()
    async with watch_as(site, thread, "old", model="n2") as old:
        await old.rest()
    async with watch_as(site, thread, "new", content="Next", model="n9-gap30") as new:
        await new.until("delta")
        late = await cancel_turn(site, thread, old.turn_id)
        gone = [await cancel_request(site, "old") for _ in range(2)]
        unknown = await cancel_request(site, "nobody")
        foreign = await site.ask("POST", "/api/threads/cancel/old", headers=[("x-org-id", "other")])
        await new.rest()

    assert (late.status, late.json()["state"]) == (200, "completed")
    assert [(reply.status, reply.json()["state"]) for reply in gone] == [(200, "ended")] * 2
    assert (unknown.status, foreign.status) == (404, 404)
    assert terminal(new.events).data["state"] == "completed"


async def test_requests_are_withdrawn_one_by_one_and_the_last_stops_the_call(site, fake):
    """Each cancelled stream ends as cancelled without an id, the others go on; a joined JSON caller counts too."""
    thread = await site.thread()
    async with watch_as(site, thread, "a") as one, watch_as(site, thread, "b") as two:
        asked = asyncio.create_task(site.say(thread, headers=[("x-request-id", "c")]))
        await until(lambda: site.services.turns.flights.stats().waiters == 3)
        await two.until("delta")
        call = await fake.call(1)
        assert (await cancel_request(site, "a")).status == 200
        await one.rest()
        assert (await cancel_request(site, "c")).status == 200
        refused = await asked
        await two.until("delta")
        assert not call.ended.is_set()
        asked_s = time.monotonic()
        assert (await cancel_request(site, "b")).status == 200
        await two.rest()
        async with asyncio.timeout(5):
            await call.ended.wait()
    again = [(await cancel_request(site, name)).json()["state"] for name in ("a", "b", "c")]

    assert again == ["cancelled"] * 3
    for watch in (one, two):
        assert (terminal(watch.events).id, terminal(watch.events).data["state"]) == (None, "cancelled")
    assert (refused.status, refused.code, refused.json()["retryable"]) == (409, "turn_cancelled", False)
    assert call.closed_by_client
    assert call.ended_s - asked_s < 1.0
    await until(lambda: not site.services.turns.runs.led)
    assert (await turn_of(site, thread, one.turn_id))["state"] == "cancelled"
    assert fake.count == 1


async def test_a_request_that_is_withdrawn_before_its_turn_starts_leaves_no_trace(site, fake):
    """Queued behind another turn: its stream ends, the provider hears nothing of it."""
    thread = await site.thread()
    async with watch_as(site, thread, "a", model="n90-gap20") as running:
        await running.until("delta")
        async with watch_as(site, thread, "b", content="Waits") as queued:
            assert (queued.events or [await queued.next(), await queued.next()])[1].data["queue_position"] == 1
            assert (await cancel_request(site, "b")).status == 200
            await queued.rest()
        await running.rest()

    assert terminal(queued.events).data["state"] == "cancelled"
    assert terminal(running.events).data["state"] == "completed"
    assert fake.count == 1
    assert len(await thread_of(site, thread)) == 2


async def test_a_queued_turn_is_cancelled_by_its_id_and_the_next_takes_its_place(site, fake):
    """Each is `pending` until its text is there; then `streaming`, with what was said so far."""
    thread = await site.thread()
    async with watch_as(site, thread, "a", model="n90-gap20") as running:
        await running.until("delta")
        asked = asyncio.create_task(site.say(thread, "Third", model="n2"))
        async with watch_as(site, thread, "b", content="Second") as queued:
            pending = await turn_of(site, thread, queued.turn_id)
            streaming = await turn_of(site, thread, running.turn_id)
            cancelled = await cancel_turn(site, thread, queued.turn_id)
            await queued.rest()
        await running.rest()
        third = await asked

    assert (pending["state"], pending["text"], pending["last_event_id"], pending["viewers"]) == ("pending", "", None, 1)
    assert (streaming["state"], streaming["requesters"], streaming["viewers"]) == ("streaming", 1, 1)
    assert running.text.startswith(streaming["text"])
    assert re.fullmatch(r"1-[1-9]\d*", streaming["last_event_id"])
    assert (cancelled.status, cancelled.json()["state"]) == (200, "cancelled")
    assert terminal(queued.events).data["state"] == "cancelled"
    assert third.status == 200
    assert [message["content"] for message in await thread_of(site, thread)][::2] == ["Hello", "Third"]
    assert fake.count == 2


@pytest.mark.parametrize("by", ["turn", "request"])
async def test_a_cancel_that_races_the_end_gives_one_ending_that_all_agree_on(tmp_path, by):
    """Fifty moments around the commit: one terminal event for each viewer, the same state in stream, row and thread."""
    async with serve(tmp_path, ScriptedProvider(deltas=["a", "b", "c"], gap_s=0.02)) as site:
        moments = [random.Random(seed).uniform(0.0, 0.12) for seed in range(50)]
        states = []
        for five in range(0, 50, 5):
            states += await asyncio.gather(*(race(site, by, moment) for moment in moments[five : five + 5]))
    assert set(states) == {"completed", "cancelled"}


async def race(site, by, moment_s):
    thread = await site.thread()
    mine_id = f"of-{thread}"
    async with watch_as(site, thread, mine_id) as mine:
        turn = mine.turn_id
        async with watching(site, f"/api/threads/{thread}/turns/{turn}/stream") as other:
            await asyncio.sleep(moment_s)
            cancelled = cancel_turn(site, thread, turn) if by == "turn" else cancel_request(site, mine_id)
            reply, *_ = await asyncio.gather(cancelled, mine.rest(), other.rest())
    row = await turn_of(site, thread, turn)
    messages = await thread_of(site, thread)
    seen, ending = terminal(mine.events), terminal(other.events)

    assert (ending.name, ending.data["state"], ending.id) == ("done", row["state"], row["last_event_id"])
    assert [message["content"] for message in messages] == ["Hello", other.text]
    assert messages[1]["status"] == ("complete" if row["state"] == "completed" else "partial")
    if by == "turn":
        assert (reply.status, reply.json()["state"]) == (200, row["state"])
    if seen.id is None:
        assert (by, seen.data["state"]) == ("request", "cancelled")
    else:
        assert (seen.id, seen.data) == (ending.id, ending.data)
    return row["state"]


# -- leaving -----------------------------------------------------------------------------------------------------


async def test_a_turn_that_may_end_with_its_callers_does(site, fake):
    """`on_disconnect: cancel`: the last caller to leave stops it; a viewer is no caller, and is told."""
    thread = await site.thread()
    async with watch_as(site, thread, "a", on_disconnect="cancel") as one:
        await one.until("delta")
        call = await fake.call(1)
        async with (
            watching(site, f"/api/threads/{thread}/stream") as viewer,
            watch_as(site, thread, "b", on_disconnect="cancel") as two,
        ):
            one.leave()
            await two.until("delta")
            await two.until("delta")
            assert not call.ended.is_set()
            left_s = time.monotonic()
            two.leave()
            await viewer.rest()
        async with asyncio.timeout(5):
            await call.ended.wait()

    assert call.closed_by_client
    assert call.ended_s - left_s < 1.0
    assert terminal(viewer.events).data["state"] == "cancelled"
    assert (await thread_of(site, thread))[1]["content"] == viewer.text


async def test_a_turn_goes_on_when_all_its_callers_have_left(tmp_path, fake):
    """The default: it is stored, and asking again replays it."""
    async with serve_openai(tmp_path, fake, "n10-gap20") as site:
        thread = await site.thread()
        async with watch_as(site, thread, "a") as watch:
            await watch.until("delta")
        await until(lambda: site.services.turns.flights.stats().waiters == 0)
        await until(lambda: not site.services.turns.runs.led)
        again = await site.stream(thread)

        assert again.headers["x-coalesce"] == "replayed"
        assert not (await fake.call(1)).closed_by_client
        assert fake.count == 1


async def test_a_turn_that_waits_ends_with_its_last_caller(site, fake):
    """Nobody is called for it; who only watches is told, and the next has its place."""
    thread = await site.thread()
    async with watch_as(site, thread, "a", model="n90-gap20") as running:
        await running.until("delta")
        async with watch_as(site, thread, "b", content="Waits") as queued:
            path = f"/api/threads/{thread}/turns/{queued.turn_id}/stream"
            async with watching(site, path) as viewer:
                queued.leave()
                await viewer.rest()
        after = await site.ask("GET", path, headers=[ORG, ("last-event-id", viewer.last_id)])
        third = asyncio.create_task(site.say(thread, "Third", model="n2"))
        await running.rest()

    assert names(viewer.events) == ["ping", "meta", "done"]
    assert (terminal(viewer.events).data["state"], viewer.events[1].data["queue_position"]) == ("cancelled", 1)
    assert after.status == 204
    assert (await third).status == 200
    assert [len(call.request["messages"]) for call in fake.calls] == [1, 3]


async def test_the_streams_of_a_deleted_thread_end(site, fake):
    """Running and waiting ones, before it is gone; then there is nothing to resume."""
    thread = await site.thread()
    async with watch_as(site, thread, "a") as running, watch_as(site, thread, "b", content="Waits") as queued:
        await running.until("delta")
        deleted = await site.ask("DELETE", f"/api/threads/{thread}")
        await asyncio.gather(running.rest(), queued.rest())
    path = f"/api/threads/{thread}/turns/{running.turn_id}/stream"
    again = await site.ask("GET", path, headers=[ORG, ("last-event-id", "1-1")])

    assert (deleted.status, again.status) == (204, 404)
    assert [terminal(watch.events).data["state"] for watch in (running, queued)] == ["cancelled"] * 2
    assert (await fake.call(1)).closed_by_client
    assert fake.count == 1


# -- another message while a turn runs ---------------------------------------------------------------------------


async def test_five_messages_wait_in_the_order_they_came(tmp_path, fake):
    """And each prompt holds the turns before it."""
    async with serve_openai(tmp_path, fake, "n2") as site:
        thread = await site.thread()
        asked = []
        for number in range(6):
            model = "n2" if number else "lat1500-n2"
            asked.append(asyncio.create_task(site.stream(thread, f"m{number}", model=model)))
            await until(lambda count=number: len(site.services.turns.runs.led) > count)
        replies = [await one for one in asked]
        messages = await thread_of(site, thread)

    assert {reply.status for reply in replies} == {200}
    assert [message["content"] for message in messages if message["role"] == "user"] == [f"m{n}" for n in range(6)]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 6
    assert [len(call.request["messages"]) for call in fake.calls] == [1, 3, 5, 7, 9, 11]


async def test_a_message_may_be_refused_while_a_turn_runs(site, fake):
    """`reject`: 409 before any byte, with the turn to wait for. That is not disturbed; the same message joins it."""
    thread = await site.thread()
    async with watch_as(site, thread, "a", model="n20-gap20") as running:
        await running.until("delta")
        refused = [await site.stream(thread, "Other", on_busy="reject"), await site.say(thread, "M", on_busy="reject")]
        async with watch_as(site, thread, "b", model="n20-gap20", on_busy="reject") as joined:
            await asyncio.gather(running.rest(), joined.rest())

    assert [(reply.status, reply.code) for reply in refused] == [(409, "thread_busy")] * 2
    assert {reply.json()["turn_id"] for reply in refused} == {running.turn_id}
    assert joined.turn_id == running.turn_id
    assert terminal(running.events).data["state"] == "completed"
    assert fake.count == 1


@pytest.mark.parametrize("on_busy", ["interrupt", "rollback"])
async def test_an_impatient_message_does_not_jump_the_queue(site, fake, on_busy):
    """It stops the turn that runs; those that wait keep their places, and their order is that of the thread."""
    thread = await site.thread()
    async with watch_as(site, thread, "a") as running:
        await running.until("delta")
        waiting = [asyncio.create_task(site.say(thread, "Waits", model="n1"))]
        await until(lambda: len(site.services.turns.runs.led) == 2)
        waiting.append(asyncio.create_task(site.say(thread, "Impatient", model="n2", on_busy=on_busy)))
        # Not by counting: the turn it stops may be gone before it is seen.
        runs = site.services.turns.runs.led
        await until(lambda: waiting[1].done() or any(run.ask.content == "Impatient" for run in runs.values()))
        waiting.append(asyncio.create_task(site.say(thread, "Last", model="n3")))
        replies = await asyncio.gather(*waiting)
        await running.rest()

    assert [reply.status for reply in replies] == [200] * 3
    assert terminal(running.events).data["state"] == "cancelled"
    asked = [message["content"] for message in await thread_of(site, thread) if message["role"] == "user"]
    assert asked == (["Hello"] if on_busy == "interrupt" else []) + ["Waits", "Impatient", "Last"]
    assert [len(call.request["messages"]) for call in fake.calls] == [1, 1, 3, 5]


@pytest.mark.parametrize("on_busy", ["interrupt", "rollback"])
async def test_a_message_may_stop_the_turn_that_runs(site, fake, on_busy):
    """`interrupt` keeps what was said, marked as partial; `rollback` removes it. Neither is in the next prompt."""
    thread = await site.thread()
    async with watch_as(site, thread, "a") as running:
        await running.until("delta")
        call = await fake.call(1)
        async with watch_as(site, thread, "b", content="Other", model="n2", on_busy=on_busy) as other:
            await asyncio.gather(running.rest(), other.rest())
    messages = await thread_of(site, thread)

    assert call.closed_by_client
    assert terminal(running.events).data["state"] == "cancelled"
    assert terminal(other.events).data["state"] == "completed"
    kept = [("Hello", "complete"), (running.text, "partial")] if on_busy == "interrupt" else []
    assert [(message["content"], message["status"]) for message in messages] == [
        *kept,
        ("Other", "complete"),
        (other.text, "complete"),
    ]
    assert [message["sequence"] for message in messages] == list(range(len(messages)))
    assert (await fake.call(2)).request["messages"] == [{"role": "user", "content": "Other"}]
    ended = await turn_of(site, thread, running.turn_id)
    assert ended["state"] == "cancelled"
    assert names(running.events)[-1] == "done"
    assert text_of(running.events)
    assert (await site.ask("GET", f"/api/threads/{thread}/stream", headers=[ORG])).status == 204
