"""What happens to a turn under a claim, and after one was lost."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from hashlib import sha256

import pytest
import sqlalchemy as sa

from oncewise.errors import NotFound
from oncewise.model import ChatMessage, FinishReason, Heartbeat, MessageStatus, TurnClaim, TurnState, Usage
from oncewise.ports import CallRecord, Follow
from oncewise.storage.tables import attempts
from tests.support.storage import (
    CANCELLED,
    LEASE_S,
    LOST,
    OVERLOADED,
    REFUSED,
    Storage,
    answer,
    timeless,
)

FINAL = (TurnState.FAILED, TurnState.CANCELLED, TurnState.INTERRUPTED)

# -- commit ------------------------------------------------------------------------------------------------------


async def test_commit_returns_the_turn_as_every_later_read_returns_it(storage: Storage, thread: str):
    """Told is stored: the leader's answer and a replay are the same bytes."""
    claim = await storage.lead(thread, "what?")
    odd = ({"url": "http://x", "half": "\ud800", "n": 2**70, "f": 1.0}, "plain", None)
    committed = await storage.ledger.commit(claim, answer("that\u2028", citations=odd, shared=True, cost_usd=0.25))

    assert timeless(committed) == timeless(await storage.read(claim))
    assert timeless(committed) == timeless((await storage.admit(thread, "what?")).turn)
    assert committed.assistant_message.citations == odd


async def test_commit_completes_the_turn_with_its_pair(storage: Storage, thread: str):
    """State, text, figures and both messages, all from one transaction."""
    claim = await storage.lead(thread, "what?")
    await storage.ledger.beat([Heartbeat(claim, "th", 1)], lease_s=LEASE_S)
    turn = await storage.ledger.commit(claim, answer("that", model="small-2026"))

    assert (turn.state, turn.finish_reason, turn.call_id, turn.usage) == (
        TurnState.COMPLETED,
        FinishReason.STOP,
        "call-1",
        Usage(3, 5),
    )
    assert (turn.partial, turn.partial_seq, turn.age_s, turn.lease_lapsed) == ("", 2, pytest.approx(0, abs=0.01), False)
    user, assistant = turn.user_message, turn.assistant_message
    assert (user.role, user.content, user.sequence, user.status) == ("user", "what?", 0, MessageStatus.COMPLETE)
    assert (assistant.role, assistant.content, assistant.sequence) == ("assistant", "that", 1)
    assert (assistant.provider, assistant.model, assistant.usage) == ("demo", "small-2026", Usage(3, 5))
    assert user.turn_id == assistant.turn_id == claim.turn_id


async def test_commit_shows_the_answer_in_the_threads_head(storage: Storage, thread: str):
    """The preview is the first 120 code points; provider and model are those that were asked."""
    before = await storage.threads.get(storage.org, thread)
    storage.clock.advance(5)
    await storage.ledger.commit(await storage.lead(thread), answer("\U0001f600" * 121, model="small-2026"))

    head = await storage.threads.get(storage.org, thread)
    assert (head.last_provider, head.last_model) == ("demo", "small")
    assert head.last_message_preview == "\U0001f600" * 120
    assert head.updated_at_ms >= before.updated_at_ms + 5000


async def test_sequences_have_no_gaps_across_turns_that_stored_nothing(storage: Storage, thread: str):
    """A failed turn without text takes a place in the queue and none among the messages."""
    await storage.answered(thread, "a")
    await storage.ended(await storage.lead(thread, "b"), TurnState.FAILED)
    await storage.ended(await storage.lead(thread, "c"), TurnState.INTERRUPTED, LOST, "par")
    await storage.answered(thread, "d")

    messages = (await storage.threads.get(storage.org, thread)).messages
    assert [message.sequence for message in messages] == [0, 1, 2, 3, 4, 5]
    assert [message.content for message in messages] == ["a", "to a", "c", "par", "d", "to d"]


async def test_the_largest_figures_there_are_can_be_stored(storage: Storage, thread: str):
    """A provider's mistake must not cost the answer."""
    usage = Usage(2**30 - 1, 2**30 - 1)
    turn = await storage.ledger.commit(await storage.lead(thread), answer(usage=usage, cost_usd=1e300))

    assert turn is not None
    assert turn.usage == usage


# -- end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", FINAL)
async def test_an_end_without_text_stores_no_message(storage: Storage, thread: str, state: TurnState):
    """Nothing was said."""
    turn = await storage.ended(await storage.lead(thread), state, REFUSED)

    assert (turn.state, turn.user_message, turn.assistant_message) == (state, None, None)
    assert (turn.failure_code, turn.failure_detail, turn.failure_retryable) == (REFUSED.code, REFUSED.detail, False)
    assert (await storage.threads.get(storage.org, thread)).messages == ()
    assert await storage.threads.audit(storage.org, thread) == ()


@pytest.mark.parametrize("state", FINAL)
async def test_an_end_with_text_stores_the_pair_as_partial(storage: Storage, thread: str, state: TurnState):
    """What was shown is kept, and told as every later read tells it."""
    claim = await storage.lead(thread)
    turn = await storage.ended(claim, state, OVERLOADED, "half an an")

    assert timeless(turn) == timeless(await storage.read(claim))
    assert (turn.user_message.status, turn.assistant_message.status) == (MessageStatus.COMPLETE, MessageStatus.PARTIAL)
    assert (turn.assistant_message.content, turn.partial_seq, turn.usage) == ("half an an", 10, None)
    assert turn.failure_retryable


async def test_only_an_end_that_is_no_success_may_be_told_to_end(storage: Storage, thread: str):
    """A success goes through `commit`, with an answer."""
    claim = await storage.lead(thread)
    for state in (TurnState.COMPLETED, TurnState.PENDING):
        with pytest.raises(ValueError, match=state):
            await storage.ended(claim, state)


async def _beaten(storage: Storage, beat: Heartbeat) -> bool:
    return (await storage.ledger.beat([beat], lease_s=LEASE_S))[beat.claim]


# -- fencing -----------------------------------------------------------------------------------------------------

CLAIM_METHODS: dict[str, Callable[[Storage, TurnClaim], Awaitable[object]]] = {
    "mark_visible": lambda s, c: s.ledger.mark_visible(c),
    "beat": lambda s, c: _beaten(s, Heartbeat(c, "zombie", 1)),
    "commit": lambda s, c: s.ledger.commit(c, answer("zombie")),
    "end": lambda s, c: s.ledger.end(c, TurnState.FAILED, REFUSED, partial="zombie", partial_seq=1, call_id=None),
    "take_over": lambda s, c: s.ledger.take_over(c, owner="zombie", lease_s=LEASE_S),
    "release": lambda s, c: s.ledger.release(c),
}


async def _taken_over(storage: Storage, claim: TurnClaim) -> None:
    storage.clock.advance(LEASE_S + 1)
    assert await storage.ledger.take_over(claim, owner="worker-2", lease_s=LEASE_S)


async def _completed(storage: Storage, claim: TurnClaim) -> None:
    await storage.ledger.commit(claim, answer())


async def _failed(storage: Storage, claim: TurnClaim) -> None:
    await storage.ended(claim, TurnState.FAILED, REFUSED)


async def _deleted(storage: Storage, claim: TurnClaim) -> None:
    await storage.threads.delete(claim.org_id, claim.thread_id)


@pytest.mark.parametrize("method", CLAIM_METHODS)
@pytest.mark.parametrize("fence", [_taken_over, _completed, _failed])
async def test_a_fenced_owner_changes_nothing(storage: Storage, thread: str, method, fence):
    """Another epoch, or a final state: every method says so and leaves the row and the messages alone."""
    claim = await storage.lead(thread)
    await fence(storage, claim)
    before = (timeless(await storage.read(claim)), await storage.threads.get(storage.org, thread))

    assert not await CLAIM_METHODS[method](storage, claim)
    assert (timeless(await storage.read(claim)), await storage.threads.get(storage.org, thread)) == before


@pytest.mark.parametrize("method", CLAIM_METHODS)
async def test_deleting_the_thread_fences_its_turns(storage: Storage, thread: str, method):
    """The row is gone; a late owner is told so and stores nothing."""
    claim = await storage.lead(thread)
    await _deleted(storage, claim)

    assert not await CLAIM_METHODS[method](storage, claim)
    with pytest.raises(NotFound):
        await storage.ledger.position(claim)


@pytest.mark.parametrize("method", CLAIM_METHODS)
@pytest.mark.parametrize("field", ["org_id", "thread_id"])
async def test_a_claim_of_another_tenant_or_thread_changes_nothing(storage: Storage, thread: str, method, field):
    """A turn's id alone opens nothing."""
    claim = await storage.lead(thread)
    storage.clock.advance(LEASE_S + 1)
    elsewhere = {"org_id": "other", "thread_id": await storage.thread()}[field]
    before = timeless(await storage.read(claim))

    assert not await CLAIM_METHODS[method](storage, replace(claim, **{field: elsewhere}))
    assert timeless(await storage.read(claim)) == before


async def test_marking_visible_twice_is_one_mark(storage: Storage, thread: str):
    """Each viewer's first delta may ask."""
    claim = await storage.lead(thread)
    assert await storage.ledger.mark_visible(claim)
    assert await storage.ledger.mark_visible(claim)

    turn = await storage.read(claim)
    assert (turn.state, turn.visible) == (TurnState.STREAMING, True)


async def test_a_beat_extends_the_lease_and_keeps_the_text_so_far(storage: Storage, thread: str):
    """Without beats the turn would be free by now."""
    claim = await storage.lead(thread)
    storage.clock.advance(LEASE_S - 1)
    assert await _beaten(storage, Heartbeat(claim, "so far", 4))
    storage.clock.advance(LEASE_S - 1)

    turn = await storage.read(claim)
    assert (turn.lease_lapsed, turn.partial, turn.partial_seq) == (False, "so far", 4)
    assert await storage.ledger.take_over(claim, owner="worker-2", lease_s=LEASE_S) is None


async def test_one_beat_for_many_turns_says_of_each_whether_it_holds(storage: Storage, thread: str):
    """Of two threads and tenants; the fenced one keeps what its next owner made of it."""
    mine, other, lost = [await storage.lead(await storage.thread()) for _ in range(3)]
    await storage.ledger.release(lost)
    taken = await storage.ledger.take_over(lost, owner="worker-2", lease_s=LEASE_S)
    storage.clock.advance(LEASE_S - 1)

    beats = [Heartbeat(claim, claim.turn_id, n) for n, claim in enumerate((mine, lost, other), start=1)]
    assert await storage.ledger.beat(beats, lease_s=LEASE_S) == {mine: True, lost: False, other: True}
    storage.clock.advance(LEASE_S - 1)

    turns = [await storage.read(claim) for claim in (mine, taken, other)]
    assert [(turn.lease_lapsed, turn.partial, turn.partial_seq) for turn in turns] == [
        (False, mine.turn_id, 1), (True, "", 0), (False, other.turn_id, 3)
    ]  # fmt: skip


async def test_a_beat_for_no_turn_changes_nothing(storage: Storage):
    """All who asked may have left."""
    assert await storage.ledger.beat([], lease_s=LEASE_S) == {}


# -- takeover and sweep ------------------------------------------------------------------------------------------


async def test_one_of_many_takes_a_lapsed_turn_over(storage: Storage, thread: str):
    """Compare-and-set on the epoch: one winner, the next epoch, another attempt."""
    claim = await storage.lead(thread)
    storage.clock.advance(LEASE_S + 1)
    assert (await storage.read(claim)).lease_lapsed

    takes = [storage.ledger.take_over(claim, owner=f"worker-{n}", lease_s=LEASE_S) for n in range(10)]
    won = [(n, taken) for n, taken in enumerate(await asyncio.gather(*takes)) if taken]
    ((winner, taken),) = won
    assert taken == replace(claim, epoch=2)
    turn = await storage.read(claim)
    assert (turn.owner, turn.epoch, turn.attempt, turn.lease_lapsed) == (f"worker-{winner}", 2, 2, False)


async def test_a_living_lease_is_not_taken_over(storage: Storage, thread: str):
    """Only the database's clock says when a lease has lapsed."""
    claim = await storage.lead(thread)
    storage.clock.advance(LEASE_S - 1)

    assert await storage.ledger.take_over(claim, owner="worker-2", lease_s=LEASE_S) is None


async def test_a_released_turn_can_be_taken_over_at_once(storage: Storage, thread: str):
    """A worker that shuts down does not make its followers wait for the lease."""
    claim = await storage.lead(thread)
    await storage.ledger.release(claim)

    assert await storage.ledger.take_over(claim, owner="worker-2", lease_s=LEASE_S) == replace(claim, epoch=2)


async def test_sweep_interrupts_lapsed_turns_and_keeps_their_text(storage: Storage, thread: str):
    """Nobody answers for them any more; what was shown is stored as partial."""
    silent = await storage.lead(thread, "silent", idempotency_key="k")
    spoken = await storage.lead(other := await storage.thread(), "spoken")
    await storage.ledger.beat([Heartbeat(spoken, "half", 2)], lease_s=LEASE_S)
    storage.clock.advance(LEASE_S + 1)
    alive = await storage.lead(await storage.thread())

    assert await storage.ledger.sweep() == 2
    assert await storage.ledger.sweep() == 0
    states = [(await storage.read(claim)).state for claim in (silent, spoken, alive)]
    assert states == [TurnState.INTERRUPTED, TurnState.INTERRUPTED, TurnState.PENDING]
    turn = await storage.read(spoken)
    assert (turn.failure_code, turn.failure_retryable, turn.partial_seq) == ("leader_lost", True, 2)
    assert turn.epoch == 2, "a viewer may have been shown more than was stored"
    assert [message.content for message in (await storage.threads.get(storage.org, other)).messages] == [
        "spoken",
        "half",
    ]
    assert await storage.lead(thread, "silent", idempotency_key="k")


async def test_sweep_ends_turns_of_dead_owners_before_their_lease(storage: Storage, thread: str):
    """A process known to be dead will not come back for its lease."""
    claim = await storage.lead(thread)

    assert await storage.ledger.sweep(dead_owners=["somebody else"]) == 0
    assert await storage.ledger.sweep(dead_owners=["somebody else", "worker-1"]) == 1
    assert (await storage.read(claim)).state is TurnState.INTERRUPTED


async def test_lapsing_frees_the_open_turns_of_dead_owners_at_once(storage: Storage, thread: str):
    """Of all tenants, and of nobody else; whoever follows one takes it over, and its late owner changes nothing."""
    lost = [await storage.lead(await storage.thread(org), org_id=org) for org in ("a", "b")]
    ended = await storage.answered(thread)
    living = await replace(storage, owner="worker-2").lead(await storage.thread())

    assert await storage.ledger.lapse(["worker-1", "somebody else"]) == 2
    assert await storage.ledger.lapse(["worker-1"]) == 0
    assert [(await storage.read(claim)).lease_lapsed for claim in (*lost, living)] == [True, True, False]
    assert timeless(await storage.ledger.turn(storage.org, thread, ended.id)) == timeless(ended)
    taken = await storage.ledger.take_over(lost[0], owner="worker-2", lease_s=LEASE_S)
    assert taken == replace(lost[0], epoch=2)
    assert await storage.ledger.commit(lost[0], answer()) is None


async def test_lapsing_nobodys_turns_changes_nothing(storage: Storage, thread: str):
    """The usual case: nobody is dead."""
    claim = await storage.lead(thread)

    assert await storage.ledger.lapse([]) == 0
    assert not (await storage.read(claim)).lease_lapsed


async def test_sweep_leaves_a_lapsed_turn_to_its_followers_for_a_while(storage: Storage, thread: str):
    """They look at the row now and then; ended too soon, a turn that could have been answered would fail."""
    claim = await storage.lead(thread)
    await storage.ledger.release(claim)
    storage.clock.advance(2)

    assert await storage.ledger.sweep(lapsed_s=3.0) == 0
    storage.clock.advance(1.5)
    assert await storage.ledger.sweep(lapsed_s=3.0) == 1


async def test_sweep_keeps_the_order_of_a_threads_turns(storage: Storage, thread: str):
    """Whichever lease lapsed first."""
    claims = [await storage.lead(thread, content) for content in ("a", "b")]
    for claim in reversed(claims):
        await storage.ledger.beat([Heartbeat(claim, "half", 1)], lease_s=LEASE_S)
        storage.clock.advance(1)
    storage.clock.advance(LEASE_S)

    assert await storage.ledger.sweep() == 2
    messages = (await storage.threads.get(storage.org, thread)).messages
    assert [message.content for message in messages] == ["a", "half", "b", "half"]


async def test_sweep_ends_turns_of_all_tenants(storage: Storage):
    """It speaks for processes, which serve all tenants; each row is changed under its own."""
    claims = [await storage.lead(await storage.thread(org), org_id=org) for org in ("a", "b")]
    storage.clock.advance(LEASE_S + 1)

    assert await storage.ledger.sweep() == 2
    assert {(await storage.read(claim)).state for claim in claims} == {TurnState.INTERRUPTED}


# -- reading -----------------------------------------------------------------------------------------------------


async def test_position_counts_the_open_turns_before(storage: Storage, thread: str):
    """A place in the queue moves up when any turn before it ends."""
    claims = [await storage.lead(thread, f"{n}") for n in range(3)]
    assert [await storage.ledger.position(claim) for claim in claims] == [0, 1, 2]

    await storage.ended(claims[1], TurnState.CANCELLED, CANCELLED)
    assert await storage.ledger.position(claims[2]) == 1
    await storage.ledger.commit(claims[0], answer())
    assert await storage.ledger.position(claims[2]) == 0


async def test_history_is_the_completed_turns_only(storage: Storage, thread: str):
    """A partial answer in a prompt would be continued, or make two user messages neighbours."""
    await storage.answered(thread, "a")
    await storage.ended(await storage.lead(thread, "b"), TurnState.CANCELLED, CANCELLED, "par")
    await storage.answered(thread, "c")
    await storage.lead(thread, "running")

    assert await storage.ledger.history(storage.org, thread) == (
        ChatMessage("user", "a"),
        ChatMessage("assistant", "to a"),
        ChatMessage("user", "c"),
        ChatMessage("assistant", "to c"),
    )


async def test_active_is_the_first_open_turn(storage: Storage, thread: str):
    """The one that runs, or the one to run next."""
    assert await storage.ledger.active(storage.org, thread) is None
    first = await storage.lead(thread, "a")
    second = await storage.lead(thread, "b")

    assert (await storage.ledger.active(storage.org, thread)).id == first.turn_id
    await storage.ledger.commit(first, answer())
    assert (await storage.ledger.active(storage.org, thread)).id == second.turn_id


async def test_reading_needs_the_right_tenant_and_thread(storage: Storage, thread: str):
    """Foreign and unknown are one error, and an id of a turn is not enough."""
    turn = await storage.answered(thread)
    elsewhere = await storage.thread()

    for org, place, turn_id in (
        ("other", thread, turn.id),
        (storage.org, elsewhere, turn.id),
        (storage.org, thread, "nothing"),
    ):
        with pytest.raises(NotFound):
            await storage.ledger.turn(org, place, turn_id)
    with pytest.raises(NotFound):
        await storage.ledger.active("other", thread)
    assert await storage.ledger.history("other", thread) == ()


async def test_two_tenants_with_the_same_words_never_meet(storage: Storage):
    """Same content, same key, two tenants: two turns."""
    for org in ("a", "b"):
        place = await storage.thread(org)
        await storage.lead(place, org_id=org, idempotency_key="k")
        assert isinstance(follow := await storage.admit(place, org_id=org, idempotency_key="k"), Follow)
        assert follow.turn.org_id == org


# -- calls -------------------------------------------------------------------------------------------------------


async def test_a_call_is_on_record_before_and_after_it_is_made(storage: Storage, thread: str):
    """Money may be spent from `record_call` on, whatever becomes of the process."""
    call = CallRecord("call-1", 1, storage.org, None, 1, "demo", "small")
    await storage.ledger.record_call(call)
    await storage.ledger.record_call(replace(call, attempt=2))
    await storage.ledger.finish_call(call, outcome="ok", usage=Usage(1, 2, estimated=True))
    await storage.ledger.finish_call(replace(call, attempt=2, org_id="other"), outcome="stolen", usage=None)

    def rows(conn: sa.Connection) -> list[tuple[object, ...]]:
        columns = (attempts.c.attempt, attempts.c.outcome, attempts.c.prompt_tokens, attempts.c.usage_estimated)
        return [tuple(row) for row in conn.execute(sa.select(*columns).order_by(attempts.c.attempt))]

    assert await storage.database.read(rows) == [(1, "ok", 1, True), (2, None, None, None)]


async def test_the_answers_hash_is_of_its_bytes(storage: Storage, thread: str):
    """An auditor can compute it from the exported text."""
    await storage.answered(thread, "ü")

    (entry,) = await storage.threads.audit(storage.org, thread)
    assert entry.response_hash == sha256("to ü".encode()).hexdigest()
