"""Who may write a turn: leases, fences, takeovers, and what is shown only after it was written down.

The rows of the turn ledger's protocol, one by one, with an owner that is late, paused, lost or cut off.
"""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from oncewise.errors import LeaderLost, ProviderError, StorageUnavailable
from oncewise.model import Answer, FinishReason, Heartbeat, TurnClaim, TurnState, Usage
from tests.support.ledgers import DisturbedLedger
from tests.support.scripted import Desk, ScriptedProvider, open_desk

LEASE_S = 1.0


@pytest.fixture
async def held(tmp_path):
    """A desk with a disturbed ledger, whose provider answers when the test says so."""
    provider = ScriptedProvider(held=True)
    async with open_desk(tmp_path / "ow.db", provider, ledger=DisturbedLedger, poll_s=0.01) as desk:
        yield desk


@pytest.fixture
async def brief(tmp_path):
    """The same with leases of a second, for tests that wait for beats."""
    provider = ScriptedProvider(held=True)
    async with open_desk(tmp_path / "ow.db", provider, ledger=DisturbedLedger, lease_s=LEASE_S, poll_s=0.01) as desk:
        yield desk


async def leading(desk: Desk, thread: Any, **fields: Any) -> tuple[asyncio.Task[Any], TurnClaim]:
    """A request whose call runs, and the claim of its turn."""
    caller = asyncio.create_task(desk.outcome(thread, **fields))
    async with asyncio.timeout(10):
        await desk.provider.started.wait()
    turn = await desk.ledger.active(thread.org_id, thread.id)
    return caller, TurnClaim(thread.org_id, thread.id, turn.id, turn.idx, turn.epoch)


async def lost(desk: Desk, thread: Any, **ask: Any) -> TurnClaim:
    """A turn whose owner is gone, and its lease with it."""
    lead = await desk.ledger.admit(
        desk.ask(thread, **ask), owner="lost", lease_s=0.0, replay_window_s=30.0, queue_limit=32
    )
    return lead.claim


async def taken_over(desk: Desk, claim: TurnClaim) -> TurnClaim:
    """The turn, in the hands of another process."""
    await desk.ledger.release(claim)
    taken = await desk.ledger.take_over(claim, owner="other", lease_s=10.0)
    assert taken is not None
    return taken


def answer(text: str) -> Answer:
    return Answer(text, FinishReason.STOP, Usage(1, 1), model="m", call_id="c", deltas=1)


# -- claim -------------------------------------------------------------------------------------------------------


async def test_a_turn_that_everybody_leaves_while_it_is_admitted_holds_nobody_up(held):
    """The row is in by the time that its only caller has left: it ends at once, and not with its lease."""
    thread = await held.thread()
    admit = held.ledger.hold_after("admit")
    leaver = asyncio.create_task(held.post(thread))
    await admit.reached.wait()
    turn = await held.ledger.active(thread.org_id, thread.id)
    leaver.cancel()
    await asyncio.sleep(0.01)
    admit.open.set()
    await held.settled()

    assert (await held.ledger.turn(thread.org_id, thread.id, turn.id)).state is TurnState.CANCELLED
    assert await held.ledger.active(thread.org_id, thread.id) is None
    assert held.provider.calls == []


async def test_a_fault_of_our_own_ends_the_turn_too(held):
    """Whatever it is: left open, the turn would hold up its thread."""
    thread = await held.thread()
    held.ledger.fail("history", LookupError("a fault"))

    error = await held.outcome(thread)

    assert error.code == "flight_failed"
    assert await held.ledger.active(thread.org_id, thread.id) is None
    await held.settled()


# -- visible -----------------------------------------------------------------------------------------------------


async def test_the_first_delta_is_shown_after_the_turn_is_marked_visible(held):
    """For a viewer that was there before it: a successor must know that something may have been seen."""
    thread = await held.thread()
    caller, claim = await leading(held, thread)
    with held.turns.send(held.ask(thread), "viewer") as ticket:
        await ticket.admitted()
        viewer = (await ticket.watch()).view()
        mark = held.ledger.hold_before("mark_visible")
        held.provider.go.set()
        await mark.reached.wait()
        assert not await viewer.wait(0.02)
        mark.open.set()
        assert await viewer.wait(1.0)
        assert viewer.take().startswith(b"po")
    await caller
    assert (await held.ledger.turn(thread.org_id, thread.id, claim.turn_id)).visible


async def test_a_viewer_that_comes_after_the_first_delta_waits_for_the_mark(tmp_path):
    """What is in the log already is shown to nobody before; two who come at once write the mark once."""
    provider = ScriptedProvider(deltas=["a", "b"], gap_s=0.3)
    async with open_desk(tmp_path / "ow.db", provider, ledger=DisturbedLedger) as desk:
        thread = await desk.thread()
        caller, claim = await leading(desk, thread)
        run = desk.turns.runs.of(thread.org_id, claim.turn_id)
        while not run.log.deltas:
            await asyncio.sleep(0.01)
        mark = desk.ledger.hold_before("mark_visible")
        watching = [asyncio.create_task(run.watch()) for _ in range(2)]
        await mark.reached.wait()
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in watching)
        mark.open.set()
        await asyncio.gather(*watching)

        assert (await desk.ledger.turn(thread.org_id, thread.id, claim.turn_id)).visible
        assert desk.ledger.calls["mark_visible"] == 1
        await caller


async def test_an_owner_that_was_fenced_shows_nothing_of_its_own(held):
    """It learns so by the mark, before its first delta leaves; its viewers get what the other stored."""
    thread = await held.thread()
    caller, claim = await leading(held, thread)
    with held.turns.send(held.ask(thread), "viewer") as ticket:
        await ticket.admitted()
        viewer = (await ticket.watch()).view()
        taken = await taken_over(held, claim)
        held.provider.go.set()
        assert not await viewer.wait(0.1)
        await held.ledger.commit(taken, answer("theirs"))

        assert b"".join([chunk async for chunk in viewer]) == b"theirs"
        assert (await caller).stored.assistant_message.content == "theirs"


async def test_text_that_was_shown_is_taken_back_when_another_text_is_stored(held):
    """A viewer of the old epoch is told to drop what it has."""
    thread = await held.thread()
    held.provider.deltas = ["mine", " own"]
    held.provider.gap_s = 0.2
    caller, claim = await leading(held, thread)
    with held.turns.send(held.ask(thread), "viewer") as ticket:
        await ticket.admitted()
        log = await ticket.watch()
        viewer = log.view()
        held.provider.go.set()
        assert await viewer.wait(1.0)
        assert viewer.take() == b"mine"
        taken = await taken_over(held, claim)
        await held.ledger.commit(taken, answer("theirs"))
        await caller

    assert (log.epoch, log.text) == (2, "theirs")
    assert viewer.take() == b"theirs"


async def test_a_turn_that_another_owner_ended_is_told_as_that_one_ended_it(held):
    """Callers and viewers alike; the log says so and is kept, instead of being cut off."""
    thread = await held.thread()
    caller, claim = await leading(held, thread)
    log = await held.turns.runs.of(thread.org_id, claim.turn_id).watch()
    taken = await taken_over(held, claim)
    held.provider.go.set()
    lost = LeaderLost().failure()
    await held.ledger.end(taken, TurnState.INTERRUPTED, lost, partial="", partial_seq=0, call_id=None)

    assert (await caller).code == "leader_lost"
    assert log.closed
    assert held.hub.get((claim.org_id, claim.turn_id)) is log


# -- beat --------------------------------------------------------------------------------------------------------


async def test_a_running_call_keeps_its_lease(brief):
    """It takes three leases, and nobody may take it over meanwhile; each beat stores what there is."""
    thread = await brief.thread()
    brief.provider.deltas = ["so ", "far"]
    caller, claim = await leading(brief, thread)
    await asyncio.sleep(3 * LEASE_S)

    assert await brief.ledger.take_over(claim, owner="other", lease_s=1.0) is None
    brief.provider.go.set()
    assert (await caller).stored.epoch == 1


async def test_a_beat_that_finds_another_owner_ends_the_call(brief):
    """Nothing is paid for on behalf of a turn that is somebody else's, and the callers get what that one stores."""
    thread = await brief.thread()
    caller, claim = await leading(brief, thread)
    taken = await taken_over(brief, claim)

    async with asyncio.timeout(5.0):
        while brief.provider.running:
            await asyncio.sleep(0.005)
    assert not caller.done()
    await brief.ledger.commit(taken, answer("theirs"))
    assert (await caller).stored.assistant_message.content == "theirs"
    await brief.settled()


async def test_a_beat_that_fails_once_fences_nobody(brief):
    """The lease is good for two more."""
    thread = await brief.thread()
    brief.ledger.fail("beat", StorageUnavailable())
    caller, _ = await leading(brief, thread)
    await asyncio.sleep(0.7 * LEASE_S)
    brief.provider.go.set()

    assert (await caller).stored.assistant_message.content == "pong"
    assert brief.ledger.calls["beat"] >= 2


@pytest.mark.parametrize("silent", [False, True])
async def test_an_owner_that_cannot_keep_its_lease_stops_before_it_ends(brief, silent):
    """Whether the database refuses or says nothing at all: from then on another may lead.

    The best of three: on a busy machine a loop may stand still for longer than the tenth of a lease that is left.
    """
    if silent:
        brief.ledger.hold_before("beat")
    else:
        brief.ledger.fail("beat", StorageUnavailable(), times=99)
    in_time = False
    for attempt in range(3):
        thread = await brief.thread()
        brief.provider.started.clear()
        caller, claim = await leading(brief, thread)
        async with asyncio.timeout(5.0):
            while brief.provider.running:
                await asyncio.sleep(0.005)
        in_time = not (await brief.ledger.turn(thread.org_id, thread.id, claim.turn_id)).lease_lapsed
        await asyncio.sleep(LEASE_S / 2)
        await brief.ledger.sweep()
        assert (await caller).code == "leader_lost"
        assert len(brief.provider.calls) == attempt + 1
        if in_time:
            break
    assert in_time


# -- commit and end ----------------------------------------------------------------------------------------------


async def test_a_fenced_owner_does_not_tell_its_own_failure(held):
    """The call failed here and went well there: the stored answer counts."""
    thread = await held.thread()
    held.provider.failures = [(0, ProviderError("no", retryable=False))]
    caller, claim = await leading(held, thread)
    taken = await taken_over(held, claim)
    held.provider.go.set()
    await asyncio.sleep(0.02)
    await held.ledger.commit(taken, answer("theirs"))

    assert (await caller).stored.assistant_message.content == "theirs"


@pytest.mark.parametrize("stage", ["ending", "waiting for the other"])
async def test_a_fence_does_not_cut_into_the_telling_of_an_end(brief, stage):
    """A beat that is due while the own failure is stored, or the other owner's end is awaited, changes nothing."""
    thread = await brief.thread()
    brief.provider.failures = [(0, ProviderError("no", retryable=False))]
    end = brief.ledger.hold_before("end")
    caller, claim = await leading(brief, thread)
    if stage != "ending":
        end.open.set()
    taken = await taken_over(brief, claim)
    brief.provider.go.set()
    await end.reached.wait()
    await asyncio.sleep(0.7 * LEASE_S)
    end.open.set()
    await brief.ledger.commit(taken, answer("theirs"))

    assert (await caller).stored.assistant_message.content == "theirs"


async def test_a_failure_that_cannot_be_stored_is_told_all_the_same(brief):
    """As what it was, once patience has run out; the row is left to the sweeper, and viewers have their end."""
    brief.turns.runs.rules = replace(brief.turns.runs.rules, commit_patience_s=0.1)
    thread = await brief.thread()
    brief.provider.failures = [(1, ProviderError("no", retryable=False))]
    brief.ledger.fail("end", StorageUnavailable(), times=9)
    caller, claim = await leading(brief, thread)
    log = await brief.turns.runs.of(thread.org_id, claim.turn_id).watch()
    brief.provider.go.set()

    assert (await caller).code == "provider_error"
    assert log.closed
    await asyncio.sleep(LEASE_S)
    assert await brief.ledger.sweep() == 1


# -- take over ---------------------------------------------------------------------------------------------------


async def test_shown_text_of_a_lost_owner_is_kept_and_not_replaced(held):
    """The turn is interrupted with its partial, without another call."""
    thread = await held.thread()
    claim = await lost(held, thread)
    await held.ledger.beat([Heartbeat(claim, "so far", 2)], lease_s=0.0)
    await held.ledger.mark_visible(claim)

    error = await held.outcome(thread)

    assert isinstance(error, LeaderLost)
    assert error.retryable
    assert await held.messages(thread) == [("user", "Hello"), ("assistant", "so far")]
    assert held.provider.calls == []


@pytest.mark.parametrize(("operation", "times"), [("take_over", 3), ("take_over", 5), ("position", 3)])
async def test_a_takeover_waits_for_a_database_that_is_busy(held, operation, times):
    """The lost owner may hold the row in a transaction that is never ended by itself; who waits goes on waiting.

    Also for longer than a lease, which is counted from the attempt that succeeds: from the first, it would be over.
    """
    thread = await held.thread()
    await lost(held, thread)
    held.ledger.fail(operation, StorageUnavailable(), times=times)
    waiting = asyncio.create_task(held.post(thread))
    async with asyncio.timeout(10):
        await held.provider.started.wait()
    await asyncio.sleep(0.1)
    held.provider.go.set()

    assert (await waiting).stored.state is TurnState.COMPLETED
    assert len(held.provider.calls) == 1


@pytest.mark.parametrize("looks_first", [True, False])
async def test_a_viewer_that_comes_while_a_turn_is_taken_over_sees_it_to_its_end(held, looks_first):
    """The row says already that this process leads it, under an epoch of which nobody here has begun to tell."""
    thread = await held.thread()
    claim = await lost(held, thread)
    await held.ledger.beat([Heartbeat(claim, "never shown", 2)], lease_s=0.0)
    gate = held.ledger.hold_before("position")
    waiting = asyncio.create_task(held.post(thread))
    await gate.reached.wait()
    turn = await held.ledger.turn(thread.org_id, thread.id, claim.turn_id)
    remote = held.turns.runs.remotes.look_at(turn)
    if looks_first:
        log = await remote.watch()
    for _ in range(2):
        remote.look()
        await remote.news()
    if not looks_first:
        log = await remote.watch()
    gate.open.set()
    held.provider.go.set()

    result = await waiting

    assert (result.stored.state, result.stored.epoch) == (TurnState.COMPLETED, 2)
    assert (log.epoch, log.text, log.closed) == (2, result.stored.assistant_message.content, True)


async def test_who_loses_a_turn_while_taking_it_over_follows_whoever_has_it(held):
    """It was slow for longer than its lease, and another process has begun to tell the turn under its own epoch."""
    thread = await held.thread()
    claim = await lost(held, thread)
    gate = held.ledger.hold_before("position")
    waiting = asyncio.create_task(held.told(thread))
    await gate.reached.wait()
    theirs = await taken_over(held, replace(claim, epoch=2))
    turn = await held.ledger.turn(thread.org_id, thread.id, claim.turn_id)
    remote = held.turns.runs.remotes.look_at(turn)
    remote.look()
    await remote.news()
    gate.open.set()
    await asyncio.sleep(0.05)
    await held.ledger.commit(theirs, answer("theirs"))

    result, role = await waiting

    assert (result.stored.assistant_message.content, role) == ("theirs", "follower")
    assert held.provider.calls == []


async def test_a_lost_turn_is_ended_by_a_database_that_is_busy(held):
    """Text of it was shown, so that who waits is told of the loss, and not that the database is away."""
    thread = await held.thread()
    await held.ledger.mark_visible(await lost(held, thread))
    held.ledger.fail("end", StorageUnavailable(), times=3)

    with pytest.raises(LeaderLost):
        await held.post(thread)


async def test_a_turn_that_lost_two_owners_is_not_tried_again(held):
    """It may be the turn that ends them: never more calls than epochs, and two of those."""
    thread = await held.thread()
    claim = await lost(held, thread)
    assert await held.ledger.take_over(claim, owner="lost as well", lease_s=0.0)

    error = await held.outcome(thread)

    assert isinstance(error, LeaderLost)
    assert held.provider.calls == []
    assert (await held.ledger.turn(thread.org_id, thread.id, claim.turn_id)).state is TurnState.INTERRUPTED


async def test_looking_again_and_again_for_a_place_holds_nothing(held):
    """A turn behind one of another process looks twice a second for as long as that takes."""
    thread = await held.thread()
    claim = await lost(held, thread)
    for _ in range(3):
        await held.turns.runs.turn_ended(claim, 0.001)
    assert [gate for gates in held.turns.runs._gates.values() for gate in gates] == []


async def test_a_living_owner_elsewhere_is_waited_for(held):
    """Until it has stored its answer; no call is made here."""
    thread = await held.thread()
    claim = await lost(held, thread)
    taken = await held.ledger.take_over(claim, owner="alive", lease_s=10.0)
    follower = asyncio.create_task(held.told(thread))
    await asyncio.sleep(0.05)
    await held.ledger.commit(taken, answer("theirs"))

    result, role = await follower
    assert (result.stored.assistant_message.content, role) == ("theirs", "follower")
    assert held.provider.calls == []


async def test_two_that_wait_for_a_lost_owner_make_one_call(tmp_path):
    """Two processes see the lease lapse at the same moment: the row lets one of them take the turn."""
    path = tmp_path / "ow.db"
    async with open_desk(path, owner="one", poll_s=0.01) as one, open_desk(path, owner="two", poll_s=0.01) as two:
        thread = await one.thread()
        lead = await one.ledger.admit(one.ask(thread), owner="lost", lease_s=0.2, replay_window_s=30.0, queue_limit=32)

        results = await asyncio.gather(*(desk.post(thread) for desk in (one, two) for _ in range(5)))

        assert {(result.stored.id, result.stored.epoch) for result in results} == {(lead.claim.turn_id, 2)}
        assert len(one.provider.calls) + len(two.provider.calls) == 1
        assert len(await one.messages(thread)) == 2


# -- release -----------------------------------------------------------------------------------------------------


async def test_a_turn_is_handed_back_with_what_was_shown(tmp_path):
    """The text since the last beat is stored, its viewers end without an end, and the lease is free at once."""
    provider = ScriptedProvider(deltas=["shown", "never"], gap_s=0.1)
    async with open_desk(tmp_path / "ow.db", provider, ledger=DisturbedLedger) as desk:
        thread = await desk.thread()
        caller, claim = await leading(desk, thread)
        run = desk.turns.runs.of(thread.org_id, claim.turn_id)
        viewer = (await run.watch()).view()
        provider.gap_s = 60.0
        assert await viewer.wait(1.0)
        await desk.turns.aclose(0.0)

        assert (await caller).code == "shutting_down"
        assert b"".join([chunk async for chunk in viewer]) == b"shown"
        turn = await desk.ledger.active(thread.org_id, thread.id)
        assert (turn.partial, turn.partial_seq, turn.lease_lapsed) == ("shown", 1, True)


async def test_a_fence_and_a_stop_at_once_hold_up_no_shutdown(held):
    """The task is cancelled once for both: it must not wait for the other owner then, who may take minutes."""
    thread = await held.thread()
    caller, claim = await leading(held, thread)
    await taken_over(held, claim)
    held.turns.runs.of(thread.org_id, claim.turn_id)._fence()

    async with asyncio.timeout(5):
        await held.turns.aclose(0.0)

    assert (await caller).code == "shutting_down"


async def test_nothing_is_taken_on_while_closing(held):
    """Not even what would only be joined."""
    thread = await held.thread()
    caller, _ = await leading(held, thread)
    closing = asyncio.create_task(held.turns.aclose(5.0))
    await asyncio.sleep(0)

    assert (await held.outcome(thread)).code == "shutting_down"
    held.provider.go.set()
    assert (await caller).stored.state is TurnState.COMPLETED
    await closing
