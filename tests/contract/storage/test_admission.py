"""Which turn a request belongs to: the rules of `TurnLedger.admit`, in their order."""

import asyncio

import pytest

from oncewise.errors import HeadMoved, IdempotencyMismatch, NotFound, QueueFull, ThreadBusy
from oncewise.model import OnBusy, OnDisconnect, Params, Scope, TurnState
from oncewise.ports import Follow, Lead, Replay
from tests.support.storage import CANCELLED, DAY_S, OVERLOADED, REFUSED, WINDOW_S, Storage, answer, ask, timeless


async def test_a_first_message_leads_a_pending_turn_of_epoch_one(storage: Storage, thread: str):
    """Nothing is there: a new turn, at the first place, claimed and leased."""
    admission = await storage.admit(thread)

    assert isinstance(admission, Lead)
    assert (admission.position, admission.claim.idx, admission.claim.epoch) == (0, 0, 1)
    turn = await storage.read(admission.claim)
    assert (turn.state, turn.owner, turn.attempt, turn.lease_lapsed) == (TurnState.PENDING, "worker-1", 1, False)


async def test_fifty_identical_requests_at_once_lead_one_turn(storage: Storage, thread: str):
    """Join-or-create is atomic: one leads, the others follow that very turn."""
    admissions = await asyncio.gather(*(storage.admit(thread) for _ in range(50)))

    leads = [admission for admission in admissions if isinstance(admission, Lead)]
    follows = [admission for admission in admissions if isinstance(admission, Follow)]
    assert (len(leads), len(follows)) == (1, 49)
    assert {follow.turn.id for follow in follows} == {leads[0].claim.turn_id}


async def test_the_same_message_follows_a_queued_turn(storage: Storage, thread: str):
    """Rule 3 looks at all open turns, not only at the running one, and takes the first."""
    await storage.lead(thread, "running")
    queued = await storage.lead(thread, "queued")

    assert isinstance(followed := await storage.admit(thread, "queued"), Follow)
    assert followed.turn.id == queued.turn_id


async def test_the_latest_turn_is_replayed_within_the_window(storage: Storage, thread: str):
    """The window is fixed from the commit; a replay does not extend it."""
    committed = await storage.answered(thread)

    storage.clock.advance(WINDOW_S - 1)
    assert isinstance(first := await storage.admit(thread), Replay)
    assert timeless(first.turn) == timeless(committed)
    assert WINDOW_S - 1 <= first.turn.age_s < WINDOW_S

    storage.clock.advance(1.5)
    assert isinstance(await storage.admit(thread), Lead)


async def test_an_older_turn_is_not_replayed(storage: Storage, thread: str):
    """Only the thread's latest completed turn may answer: the conversation has moved on behind an older one."""
    await storage.answered(thread, "first")
    await storage.answered(thread, "second")

    assert isinstance(await storage.admit(thread, "first"), Lead)


async def test_a_failed_turn_in_between_does_not_hide_the_latest_completed_one(storage: Storage, thread: str):
    """The latest turn that counts is the latest completed one."""
    committed = await storage.answered(thread, "first")
    await storage.ended(await storage.lead(thread, "second"), TurnState.FAILED)

    assert isinstance(replay := await storage.admit(thread, "first"), Replay)
    assert replay.turn.id == committed.id


@pytest.mark.parametrize("state", [TurnState.FAILED, TurnState.CANCELLED, TurnState.INTERRUPTED])
async def test_a_turn_that_ended_badly_is_not_replayed(storage: Storage, thread: str, state: TurnState):
    """Errors are shared with those who wait, not with those who come later."""
    await storage.ended(await storage.lead(thread), state)

    assert isinstance(await storage.admit(thread), Lead)


async def test_force_new_queues_behind_its_running_twin(storage: Storage, thread: str):
    """`x-coalesce: off`: neither the running nor the latest turn answers."""
    await storage.answered(thread)
    assert (await storage.lead(thread, force_new=True)).idx == 1
    admission = await storage.admit(thread, force_new=True)

    assert isinstance(admission, Lead)
    assert (admission.position, admission.claim.idx) == (1, 2)


async def test_of_two_open_twins_the_first_is_followed(storage: Storage, thread: str):
    """It will have its answer sooner."""
    first = await storage.lead(thread)
    await storage.lead(thread, force_new=True)
    admission = await storage.admit(thread)

    assert isinstance(admission, Follow)
    assert admission.turn.id == first.turn_id


# -- rule 1: Idempotency-Key -------------------------------------------------------------------------------------


async def test_a_known_key_follows_then_replays_without_a_window(storage: Storage, thread: str):
    """A key ties the request to its turn for a day, past later turns of the thread."""
    turn = await storage.answered(thread, idempotency_key="k")
    await storage.answered(thread, "other")
    storage.clock.advance(DAY_S / 2)

    assert isinstance(replay := await storage.admit(thread, idempotency_key="k"), Replay)
    assert timeless(replay.turn) == timeless(turn)


async def test_a_known_key_follows_its_running_turn(storage: Storage, thread: str):
    """Same key while the turn runs: follow it."""
    claim = await storage.lead(thread, idempotency_key="k")

    assert isinstance(follow := await storage.admit(thread, idempotency_key="k"), Follow)
    assert follow.turn.id == claim.turn_id


async def test_a_known_key_with_another_request_is_a_mismatch(storage: Storage, thread: str):
    """A key names one request."""
    await storage.lead(thread, idempotency_key="k")

    with pytest.raises(IdempotencyMismatch):
        await storage.admit(thread, "other", idempotency_key="k")


async def test_an_unknown_key_is_a_new_turn_beside_its_twin(storage: Storage, thread: str):
    """Two keys are two intents, even with the same words."""
    await storage.lead(thread, idempotency_key="a")

    assert isinstance(await storage.admit(thread, idempotency_key="b"), Lead)


async def test_a_request_without_a_key_joins_a_turn_that_has_one(storage: Storage, thread: str):
    """A key binds those who send it; it does not hide the turn from others."""
    claim = await storage.lead(thread, idempotency_key="a")

    assert isinstance(follow := await storage.admit(thread), Follow)
    assert follow.turn.id == claim.turn_id


async def test_a_key_is_forgotten_after_a_day(storage: Storage, thread: str):
    """Then it may be used for another request, and is known again from there."""
    await storage.answered(thread, idempotency_key="k")
    storage.clock.advance(DAY_S - 1)
    assert isinstance(await storage.admit(thread, idempotency_key="k"), Replay)

    storage.clock.advance(2)
    claim = await storage.lead(thread, "other", idempotency_key="k")
    assert isinstance(follow := await storage.admit(thread, "other", idempotency_key="k"), Follow)
    assert follow.turn.id == claim.turn_id


async def test_a_retryable_failure_releases_its_key(storage: Storage, thread: str):
    """The client's retry with the same key is meant to try again."""
    await storage.ended(await storage.lead(thread, idempotency_key="k"), TurnState.FAILED, OVERLOADED)

    assert isinstance(await storage.admit(thread, idempotency_key="k"), Lead)


@pytest.mark.parametrize(("state", "failure"), [(TurnState.FAILED, REFUSED), (TurnState.CANCELLED, CANCELLED)])
async def test_an_end_for_good_stays_under_its_key(storage: Storage, thread: str, state, failure):
    """A retry cannot help: it is told the same."""
    ended = await storage.ended(await storage.lead(thread, idempotency_key="k"), state, failure)

    assert isinstance(replay := await storage.admit(thread, idempotency_key="k"), Replay)
    assert timeless(replay.turn) == timeless(ended)
    assert (replay.turn.state, replay.turn.failure_code) == (state, failure.code)


async def test_force_new_still_obeys_a_known_key(storage: Storage, thread: str):
    """A retry of a request that asked for its own turn gets that turn."""
    claim = await storage.lead(thread, idempotency_key="k", force_new=True)

    assert isinstance(follow := await storage.admit(thread, idempotency_key="k", force_new=True), Follow)
    assert follow.turn.id == claim.turn_id


async def test_keys_of_two_threads_do_not_meet(storage: Storage, thread: str):
    """The scope of a key is tenant and thread."""
    await storage.lead(thread, idempotency_key="k")

    assert isinstance(await storage.admit(await storage.thread(), "other", idempotency_key="k"), Lead)


# -- rule 2: parent_message_id -----------------------------------------------------------------------------------


async def head_of(storage: Storage, thread: str) -> str:
    return (await storage.answered(thread, "opening")).assistant_message.id


async def test_the_same_answer_to_the_same_parent_follows_then_replays(storage: Storage, thread: str):
    """Identity is thread, parent and fingerprint, without a window."""
    head = await head_of(storage, thread)
    claim = await storage.lead(thread, parent_message_id=head)
    assert isinstance(follow := await storage.admit(thread, parent_message_id=head), Follow)
    assert follow.turn.id == claim.turn_id

    await storage.ledger.commit(claim, answer())
    storage.clock.advance(DAY_S)
    assert isinstance(replay := await storage.admit(thread, parent_message_id=head), Replay)
    assert replay.turn.id == claim.turn_id


async def test_a_parent_that_is_no_longer_the_head_is_refused(storage: Storage, thread: str):
    """The sender has not seen what it would answer."""
    head = await head_of(storage, thread)
    await storage.answered(thread, "in between")

    with pytest.raises(HeadMoved):
        await storage.admit(thread, parent_message_id=head)


async def test_a_parent_in_an_empty_thread_is_refused(storage: Storage, thread: str):
    """There is no head that it could be."""
    with pytest.raises(HeadMoved):
        await storage.admit(thread, parent_message_id="nothing")


async def test_a_different_answer_to_the_head_is_a_new_turn(storage: Storage, thread: str):
    """Another fingerprint does not match, and the parent is still the head."""
    head = await head_of(storage, thread)
    await storage.lead(thread, "one", parent_message_id=head)

    assert isinstance(await storage.admit(thread, "two", parent_message_id=head), Lead)


@pytest.mark.parametrize("state", [TurnState.FAILED, TurnState.CANCELLED, TurnState.INTERRUPTED])
async def test_a_parent_does_not_match_a_turn_that_ended_badly(storage: Storage, thread: str, state: TurnState):
    """The head did not move, so that the message may be tried again."""
    head = await head_of(storage, thread)
    await storage.ended(await storage.lead(thread, parent_message_id=head), state)

    assert isinstance(await storage.admit(thread, parent_message_id=head), Lead)


async def test_force_new_still_obeys_the_parent(storage: Storage, thread: str):
    """The same answer to the same parent is one turn, whoever asks."""
    head = await head_of(storage, thread)
    await storage.lead(thread, parent_message_id=head)

    assert isinstance(await storage.admit(thread, parent_message_id=head, force_new=True), Follow)


# -- queue -------------------------------------------------------------------------------------------------------


async def test_thirty_two_wait_behind_the_running_turn_and_no_more(storage: Storage, thread: str):
    """The 33rd that would wait is refused; joining is not waiting for a place."""
    positions = [(await storage.admit(thread, f"{n}")).position for n in range(33)]
    assert positions == list(range(33))

    with pytest.raises(QueueFull):
        await storage.admit(thread, "33")
    assert isinstance(await storage.admit(thread, "32"), Follow)


async def test_a_full_queue_has_room_after_a_turn_ended(storage: Storage, thread: str):
    """The limit counts open turns, not turns."""
    first = await storage.lead(thread, "0")
    for n in range(1, 33):
        await storage.lead(thread, f"{n}")
    await storage.ended(first, TurnState.CANCELLED)

    assert (await storage.admit(thread, "33")).position == 32


async def test_reject_refuses_a_new_turn_while_another_is_open(storage: Storage, thread: str):
    """`on_busy=reject`, and nothing is stored for the refused one, which is told what runs."""
    running = await storage.lead(thread, "running")
    await storage.lead(thread, "waits")

    with pytest.raises(ThreadBusy) as refused:
        await storage.admit(thread, "other", on_busy=OnBusy.REJECT)
    assert refused.value.turn_id == running.turn_id
    assert (await storage.admit(thread, "third")).position == 2


async def test_reject_still_joins_and_leads_an_idle_thread(storage: Storage, thread: str):
    """It speaks of a different message in a busy thread only."""
    await storage.lead(thread, on_busy=OnBusy.REJECT)

    assert isinstance(await storage.admit(thread, on_busy=OnBusy.REJECT), Follow)


# -- tenants -----------------------------------------------------------------------------------------------------


async def test_an_unknown_thread_and_a_foreign_one_are_the_same_error(storage: Storage, thread: str):
    """A tenant cannot learn that another one's thread exists."""
    with pytest.raises(NotFound) as foreign:
        await storage.admit(thread, org_id="other")
    with pytest.raises(NotFound) as unknown:
        await storage.admit("nowhere", org_id="other")
    assert foreign.value.failure() == unknown.value.failure()


async def test_every_field_of_the_ask_is_stored(storage: Storage, thread: str):
    """Another process can take the turn over with the row alone."""
    whole = ask(
        storage.org,
        thread,
        "ünï \U0001f600",
        params=Params(0.5, 0.9, 10, 7, ("a", "b"), 0.1, -0.1),
        scope=Scope.SHARED,
        reason="why",
        user_id="u",
        idempotency_key="k",
        parent_message_id=None,
        force_new=True,
        on_busy=OnBusy.INTERRUPT,
        on_disconnect=OnDisconnect.CANCEL,
    )
    admission = await storage.ledger.admit(whole, owner="w", **storage.options)
    assert (await storage.read(admission.claim)).ask == whole
