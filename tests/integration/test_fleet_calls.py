"""Turns of several threads over two workers that send the same prompt: one call for all."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from oncewise.errors import OncewiseError, ProviderProtocolError, ShuttingDown
from oncewise.model import MessageStatus, TurnState
from oncewise.service import shared_calls
from tests.integration.test_fleet import Pair, open_pair, post, stream
from tests.support.scripted import Desk
from tests.support.watching import terminal, text_of, until


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    from oncewise.coordination.memory import World

    async with AsyncExitStack() as opened:
        yield await open_pair(opened, tmp_path, World())


def following(desk: Desk) -> bool:
    """Whether a turn of this worker repeats the call of another."""
    runs = desk.turns.runs.led.values()
    return bool(runs) and all(run._call is not None and run._call.holder is not None for run in runs)


def calling(desk: Desk) -> int:
    """How many turns of this worker wait for a call; a later one would find it over."""
    return sum(run._call is not None for run in desk.turns.runs.led.values())


async def led_and_followed(pair: Pair, *, org: str = "org_a", **fields: Any) -> tuple[Any, Any, Any]:
    """A turn that leads a call in one worker, and the thread of one that follows it in the other."""
    mine, theirs = await pair.lead.thread(org), await pair.other.thread(org)
    leading = await post(pair.lead, mine, **fields)
    await pair.provider.started.wait()
    return leading, mine, theirs


def lost(pair: Pair) -> None:
    """The leading worker is dead, and the others find out."""
    pair.lead.turns.fleet._quick._worker.dead = True
    pair.other.fleet.owners_lost(frozenset({"lead"}))


async def test_twenty_threads_of_two_workers_make_one_call(pair):
    """Twenty stored turns; those that share say so, with the call's figures and its name, and pay nothing."""
    threads = [await desk.thread() for desk in (pair.lead, pair.other) for _ in range(10)]
    desks = [pair.lead] * 10 + [pair.other] * 10
    tasks = [await post(desk, thread) for desk, thread in zip(desks, threads, strict=True)]
    await until(lambda: calling(pair.lead) == calling(pair.other) == 10)
    await until(lambda: following(pair.lead) or following(pair.other))
    pair.provider.go.set()

    results = [result for result, _ in await asyncio.gather(*tasks)]

    assert len(pair.provider.calls) == 1
    stored = [result.stored for result in results]
    assert {turn.assistant_message.content for turn in stored} == {pair.provider.text}
    assert len({(turn.call_id, turn.usage, turn.finish_reason, turn.cost_usd) for turn in stored}) == 1
    assert sorted(turn.shared for turn in stored) == [False] + [True] * 19
    assert sum(result.upstream_calls for result in results) == 1
    assert all(result.first_delta_s for result in results)
    await pair.settled()


async def test_a_follower_pays_for_nothing(pair):
    """Its account names the call and counts none."""
    leading, _, theirs = await led_and_followed(pair)
    with pair.other.turns.send(pair.other.ask(theirs), "r9") as ticket:
        await until(lambda: following(pair.other))
        pair.provider.go.set()
        share = ticket.share(await ticket.result())
    result, _ = await leading
    assert (share.pays, share.calls, share.call_id) == (False, 0, result.stored.call_id)
    assert share.bill.usage == result.stored.usage


async def test_viewers_see_the_text_as_it_comes(pair):
    """In the other worker too."""
    pair.provider.gap_s = 0.02
    leading, _, theirs = await led_and_followed(pair)
    shown = await stream(pair.other, theirs)
    await until(lambda: following(pair.other))
    pair.provider.go.set()
    await until(lambda: text_of(shown.events))
    assert not leading.done()
    assert text_of(await shown.rest()) == pair.provider.text
    assert terminal(shown.events).data["state"] == "completed"
    await leading
    assert len(pair.provider.calls) == 1
    await pair.settled()


async def test_other_tenants_and_prompts_share_nothing(pair):
    """A call each."""
    leading, _, _ = await led_and_followed(pair)
    tasks = [
        await post(pair.other, await pair.other.thread("org_b")),
        await post(pair.other, await pair.other.thread(), "Something else"),
    ]
    await until(lambda: len(pair.provider.calls) == 3)
    pair.provider.go.set()
    await asyncio.gather(leading, *tasks)


async def test_nobody_waits_for_a_server_that_is_away(pair):
    """A call in each worker, at once."""
    pair.world.down = True
    leading, _, theirs = await led_and_followed(pair)
    other = await post(pair.other, theirs)
    await until(lambda: len(pair.provider.calls) == 2)
    pair.provider.go.set()
    told = await asyncio.gather(leading, other)
    assert [result.stored.shared for result, _ in told] == [False, False]
    pair.world.down = False
    await pair.settled()


async def test_what_a_provider_says_may_be_no_unicode(pair):
    """Halves of surrogate pairs in citations, which the way between workers cannot carry as they are."""
    pair.provider.citations = ("\ud83d", {"title": "\udca9"})
    leading, _, theirs = await led_and_followed(pair)
    other = await post(pair.other, theirs)
    await until(lambda: following(pair.other))
    pair.provider.go.set()
    (one, _), (two, _) = await asyncio.gather(leading, other)
    assert two.stored.assistant_message.citations == one.stored.assistant_message.citations
    assert len(pair.provider.calls) == 1


# -- endings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deltas", [0, 3])
async def test_a_failure_is_shared(pair, deltas):
    """The same error for all, and no second call for it; what had come is kept by each."""
    # Before the first text it is tried again, as often as the budget allows.
    pair.provider.failures = [(deltas, ProviderProtocolError())] * 3
    leading, mine, theirs = await led_and_followed(pair)
    other = await post(pair.other, theirs)
    await until(lambda: following(pair.other))
    pair.provider.go.set()
    told = await asyncio.gather(leading, other, return_exceptions=True)
    assert [(error.code, error.retryable) for error in told] == [(told[0].code, told[0].retryable)] * 2
    assert told[0].code == "provider_protocol"
    assert len(pair.provider.calls) == (1 if deltas else 2)
    assert await pair.lead.messages(mine) == await pair.other.messages(theirs)
    await pair.settled()


async def test_a_call_goes_on_for_turns_of_another_worker(pair):
    """The turn that made it was cancelled."""
    leading, mine, theirs = await led_and_followed(pair)
    other = await post(pair.other, theirs)
    await until(lambda: following(pair.other))
    await asyncio.sleep(0.02)
    await pair.lead.turns.cancel_thread(mine.org_id, mine.id)
    with pytest.raises(OncewiseError):
        await leading
    await asyncio.sleep(0.1)
    assert pair.provider.running == 1
    pair.provider.go.set()
    result, _ = await other
    assert result.stored.assistant_message.content == pair.provider.text
    assert len(pair.provider.calls) == 1
    await pair.settled()


async def test_a_call_that_all_turns_left_is_ended(pair):
    """Those of the other worker last."""
    leading, mine, theirs = await led_and_followed(pair)
    other = await post(pair.other, theirs)
    await until(lambda: following(pair.other))
    await asyncio.sleep(0.02)
    await pair.lead.turns.cancel_thread(mine.org_id, mine.id)
    assert pair.provider.running == 1
    await pair.other.turns.cancel_thread(theirs.org_id, theirs.id)
    await until(lambda: pair.provider.running == 0)
    assert pair.provider.closed_early == 1
    await asyncio.gather(leading, other, return_exceptions=True)
    await pair.settled()


async def test_a_cancelled_turn_keeps_what_had_come(pair):
    """As in one worker, although its text was held back until somebody would look."""
    pair.provider.gap_s = 0.02
    leading, _, theirs = await led_and_followed(pair)
    other = await post(pair.other, theirs)
    await until(lambda: following(pair.other))
    pair.provider.go.set()
    (run,) = pair.other.turns.runs.led.values()
    await until(lambda: run._call.log.deltas > 3)
    await pair.other.turns.cancel_thread(theirs.org_id, theirs.id)
    with pytest.raises(OncewiseError):
        await other
    stored = await pair.other.threads.get(theirs.org_id, theirs.id)
    assert stored.messages[-1].content
    assert pair.provider.text.startswith(stored.messages[-1].content)
    await leading


async def test_a_turn_whose_only_client_left_is_stored(pair):
    """It follows a call that runs: leaving it ends nothing."""
    leading, _, theirs = await led_and_followed(pair)
    other = await post(pair.other, theirs)
    await until(lambda: following(pair.other))
    other.cancel()
    await asyncio.sleep(0.05)
    pair.provider.go.set()
    await leading
    await until(lambda: not pair.other.turns.runs.led)
    await asyncio.sleep(0.01)
    await pair.settled()
    assert len(await pair.other.messages(theirs)) == 2
    assert len(pair.provider.calls) == 1


# -- what is lost ------------------------------------------------------------------------------------------------


async def test_a_lost_worker_costs_a_second_call(pair):
    """At once, although its claim would hold for seconds."""
    leading, _, theirs = await led_and_followed(pair)
    other = await post(pair.other, theirs)
    await until(lambda: following(pair.other))
    lost(pair)
    began_s = asyncio.get_running_loop().time()
    await until(lambda: len(pair.provider.calls) == 2)
    assert asyncio.get_running_loop().time() - began_s < 1.5
    pair.provider.go.set()
    result, _ = await other
    assert result.stored.assistant_message.content == pair.provider.text
    assert (result.stored.shared, result.upstream_calls) == (False, 1)
    await leading


async def test_text_that_nobody_saw_is_replaced(pair):
    """A turn of which nothing was shown is answered by another call, whole."""
    pair.provider.gap_s = 0.02
    leading, _, theirs = await led_and_followed(pair)
    other = await post(pair.other, theirs)
    await until(lambda: following(pair.other))
    pair.provider.go.set()
    (run,) = pair.other.turns.runs.led.values()
    await until(lambda: run._call.log.deltas > 3)
    pair.provider.deltas = ["another ", "answer"]
    lost(pair)
    result, _ = await other
    assert result.stored.assistant_message.content == "another answer"
    assert (result.stored.shared, result.stored.epoch) == (False, 1)
    await leading


async def test_text_that_was_shown_is_not_replaced(pair):
    """The turn fails, may be tried again, and keeps what was shown; one beside it that showed nothing is answered."""
    pair.provider.gap_s = 0.02
    pair.provider.deltas = [f"{number} " for number in range(60)]
    leading, _, theirs = await led_and_followed(pair)
    shown = await stream(pair.other, theirs)
    unseen = await post(pair.other, await pair.other.thread())
    await until(lambda: following(pair.other))
    pair.provider.go.set()
    await until(lambda: len(text_of(shown.events)) > 10)
    lost(pair)
    events = await shown.rest()
    end = terminal(events)
    assert (end.data["code"], end.data["retryable"], end.data["state"]) == ("leader_lost", True, "failed")
    stored = await pair.other.threads.get(theirs.org_id, theirs.id)
    assert stored.messages[-1].content == text_of(events)
    assert stored.messages[-1].status is MessageStatus.PARTIAL
    result, _ = await unseen
    assert result.stored.state is TurnState.COMPLETED
    assert len(pair.provider.calls) == 2
    await leading


async def test_a_worker_that_stops_costs_a_second_call(pair):
    """It says so itself."""
    leading, _, theirs = await led_and_followed(pair)
    other = await post(pair.other, theirs)
    await until(lambda: following(pair.other))
    await asyncio.sleep(0.02)
    await pair.lead.turns.aclose(0.0)
    with pytest.raises(ShuttingDown):
        await leading
    stopping = asyncio.create_task(pair.lead.calls.flights.aclose())
    await until(lambda: len(pair.provider.calls) == 2)
    pair.provider.go.set()
    result, _ = await other
    assert result.stored.assistant_message.content == pair.provider.text
    await stopping


async def test_a_server_lost_in_the_middle_costs_a_call(pair):
    """Nobody waits for it who has shown nothing."""
    leading, _, theirs = await led_and_followed(pair)
    other = await post(pair.other, theirs)
    await until(lambda: following(pair.other))
    pair.world.down = True
    began_s = asyncio.get_running_loop().time()
    await until(lambda: len(pair.provider.calls) == 2)
    assert asyncio.get_running_loop().time() - began_s < 0.6
    pair.provider.go.set()
    told = await asyncio.gather(leading, other)
    assert {result.stored.assistant_message.content for result, _ in told} == {pair.provider.text}
    pair.world.down = False
    await pair.settled()


async def test_a_shown_text_goes_on_when_the_server_comes_back_empty(pair):
    """No gap, no repetition, no second call: the worker that makes the call takes its claim again."""
    pair.provider.gap_s = 0.02
    pair.provider.deltas = [f"{number} " for number in range(60)]
    leading, _, theirs = await led_and_followed(pair)
    shown = await stream(pair.other, theirs)
    await until(lambda: following(pair.other))
    pair.provider.go.set()
    await until(lambda: text_of(shown.events))
    pair.world.down = True
    await asyncio.sleep(0.3)
    pair.world.down = False
    pair.world.flush()
    assert text_of(await shown.rest()) == pair.provider.text
    await leading
    assert len(pair.provider.calls) == 1
    await pair.settled()


async def test_a_claim_that_the_server_forgot_is_taken_again(pair):
    """A stream that says nothing for seconds meanwhile goes on; turns that come later share again."""
    pair.provider.gap_s = 0.05
    leading, _, theirs = await led_and_followed(pair)
    shown = await stream(pair.other, theirs)
    await until(lambda: following(pair.other))
    pair.provider.go.set()
    await until(lambda: text_of(shown.events))
    pair.provider.gap_s = 5.0
    await asyncio.sleep(0.1)
    pair.world.flush()
    await asyncio.sleep(4.6)
    pair.provider.gap_s = 0.0
    assert [holder.split()[0] for holder, _ in pair.world.claims.values()] == ["lead"]
    assert text_of(await shown.rest()) == pair.provider.text
    await leading
    assert len(pair.provider.calls) == 1


async def test_a_call_that_has_ended_is_claimed_no_more(pair, monkeypatch):
    """One that kept its claim would hold the next request of this prompt up, for ever."""
    monkeypatch.setattr(shared_calls, "LEASE_S", 0.15)
    leading, _, _ = await led_and_followed(pair)
    await asyncio.sleep(0.1)
    assert len(pair.world.claims) == 1
    pair.provider.go.set()
    await leading
    await asyncio.sleep(0.2)
    assert pair.world.claims == {}
