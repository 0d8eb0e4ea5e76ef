"""What must hold at the end of every history, whatever broke in it.

The names are those of the fault matrix: I1 no acknowledged turn is lost, I2 a turn is stored once, I3 what was told is
what is stored, I4 never more calls than attempts, I5 nobody waits past its bound, I6 what a viewer saw is a prefix of
what is stored, I7 nothing crosses tenants, I8 nothing is left behind.
"""

from collections.abc import Iterator
from itertools import pairwise

from oncewise.api.answers import terminal_position
from oncewise.errors import FlightFailed
from oncewise.model import ChatRequest, MessageStatus, StoredTurn, TurnState
from tests.simulation.fleet import CallClient, Client, Fleet

__all__ = ["violations"]

FLIGHT_ATTEMPTS = 3
"""Requests that one attempt at a turn may make to the provider: retries stay inside the flight."""


def violations(fleet: Fleet) -> list[str]:
    """Every promise that was not kept, in words; empty for a good history."""
    return [
        *_stored_once(fleet),
        *_told_is_stored(fleet),
        *_calls_are_bounded(fleet),
        *_everybody_is_answered(fleet),
        *_tenants_are_apart(fleet),
        *_calls_are_shared(fleet),
        *_nothing_is_left(fleet),
        *_no_task_died(fleet),
    ]


def _stored_once(fleet: Fleet) -> Iterator[str]:
    for thread in fleet.records.threads.values():
        roles = [message.role for message in thread.messages]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            yield f"I2 roles of {thread.id}: {roles}"
        if [message.sequence for message in thread.messages] != list(range(len(roles))):
            yield f"I2 sequences of {thread.id} have gaps"
        told = [message.turn_id for message in thread.messages if message.role == "assistant"]
        if len(told) != len(set(told)):
            yield f"I2 {thread.id} has two answers of one turn"
        yield from _one_turn_per_message(fleet, thread.turns)


def _one_turn_per_message(fleet: Fleet, turns: list[StoredTurn]) -> Iterator[str]:
    completed = [turn for turn in turns if turn.state is TurnState.COMPLETED]
    keys = [turn.ask.idempotency_key for turn in completed if turn.ask.idempotency_key is not None]
    if len(keys) != len(set(keys)):
        yield f"I2 a key has two completed turns: {keys}"
    if fleet.database_skew_s:
        return  # the replay window is the database clock's
    for one, other in pairwise(completed):
        if one.fingerprint == other.fingerprint and one.ask.idempotency_key is None:
            yield f"I2 {one.id} and {other.id} are the same message twice"
    indexes = [turn.idx for turn in turns]
    if indexes != sorted(set(indexes)):
        yield f"I2 places in the thread: {indexes}"


def _told_is_stored(fleet: Fleet) -> Iterator[str]:
    for client in fleet.clients:
        yield from (f"I6 {seen}" for seen in client.broken)
        yield from _shown_is_never_replaced(client)
        told = client.told
        if told is None or told.turn_id is None:
            continue
        turn = fleet.turn(told.turn_id)
        if turn is None:
            yield f"I1 {told.turn_id} was told and is not stored"
        elif client.ended_at not in (None, terminal_position(turn)) and told.state == turn.state:
            yield f"I6 {turn.id} ended at {client.ended_at}, and the row says {terminal_position(turn)}"
        elif told.state == TurnState.COMPLETED:
            yield from _completed_is_kept(client, turn)
        elif told.state in (TurnState.FAILED, TurnState.INTERRUPTED, TurnState.CANCELLED):
            yield from _ending_is_kept(client, turn)


def _shown_is_never_replaced(client: Client) -> Iterator[str]:
    for turn_id, epochs in client.saw.items():
        turn = client.fleet.turn(turn_id)
        if turn is not None and turn.state is TurnState.COMPLETED and min(epochs) < turn.epoch and turn.visible:
            yield f"I6 {turn_id} was shown under epoch {min(epochs)} and completed under {turn.epoch}"


def _completed_is_kept(client: Client, turn: StoredTurn) -> Iterator[str]:
    assert client.told is not None
    if turn.state is not TurnState.COMPLETED or turn.assistant_message is None:
        yield f"I1 {turn.id} was told as completed and is {turn.state}"
    elif turn.assistant_message.content != client.told.text:
        yield f"I3 {turn.id}: told {client.told.text!r}, stored {turn.assistant_message.content!r}"
    elif turn.assistant_message.status is not MessageStatus.COMPLETE:
        yield f"I3 {turn.id} is completed and its answer is partial"


def _ending_is_kept(client: Client, turn: StoredTurn) -> Iterator[str]:
    assert client.told is not None
    if turn.state.value != client.told.state:
        yield f"I3 {turn.id} was told as {client.told.state} and is {turn.state}"
    kept = turn.assistant_message.content if turn.assistant_message is not None else ""
    if not (kept.startswith(client.told.text) or client.told.text.startswith(kept)):
        yield f"I6 {turn.id}: shown {client.told.text!r}, kept {kept!r}"


def _calls_are_bounded(fleet: Fleet) -> Iterator[str]:
    by_number = {f"[{call.number}.0]": call for call in fleet.provider_calls}
    for turn in fleet.completed():
        assert turn.assistant_message is not None
        text = turn.assistant_message.content
        call = by_number.get(text.partition("]")[0] + "]")
        if call is None or call.text != text:
            yield f"I3 {turn.id} holds {text!r}, which no call said"
        elif call.ends != "well":
            yield f"I3 {turn.id} holds the text of a call that ended as {call.ends}"
    attempts = {(call.org_id, call.turn_id, call.epoch, call.attempt) for call in fleet.records.calls}
    made = [call for call in fleet.provider_calls if isinstance(call.request, ChatRequest)]
    if len(attempts) < len(made):
        yield f"I4 {len(made)} provider calls, {len(attempts)} on record"
    if any(call.attempt > FLIGHT_ATTEMPTS for call in fleet.records.calls):
        yield "I4 more retries than a flight may make"
    turns = sum(len(thread.turns) for thread in fleet.records.threads.values())
    if not fleet.broke and len(made) > turns:
        yield f"I4 {len(made)} provider calls for {turns} turns, and nothing broke"


def _everybody_is_answered(fleet: Fleet) -> Iterator[str]:
    waiting = sum(client.told is None for client in fleet.clients)
    if waiting:
        yield f"I5 {waiting} clients wait for ever"
    for client in fleet.clients:
        if client.told is not None and client.told.state == FlightFailed.code:
            yield f"I5 told of a fault of the program: {client.told.turn_id or client.ask.content}"
        if client.told is not None and not fleet.broke and client.told.state != TurnState.COMPLETED:
            yield f"I5 {client.told.state}, and nothing broke"


def _tenants_are_apart(fleet: Fleet) -> Iterator[str]:
    whose: dict[str, str] = {}
    for (org_id, _), thread in fleet.records.threads.items():
        for message in thread.messages:
            if message.role == "assistant":
                call = message.content.partition(".")[0]
                if whose.setdefault(call, org_id) != org_id:
                    yield f"I7 the answer {call} is stored for {whose[call]} and {org_id}"


def _calls_are_shared(fleet: Fleet) -> Iterator[str]:
    """Of requests to `/v1`: each has the text of one call, no tenants share, and equal ones run one at a time."""
    by_text = {call.text: call for call in fleet.provider_calls if call.ends == "well"}
    whose: dict[int, str] = {}
    for client in fleet.clients:
        if isinstance(client, CallClient) and client.told is not None and client.told.state == TurnState.COMPLETED:
            call = by_text.get(client.told.text)
            if call is None:
                yield f"I3 told {client.told.text!r}, which no call said"
            elif whose.setdefault(call.number, client.ask.org_id) != client.ask.org_id:
                yield f"I7 the answer {call.number} was given to {whose[call.number]} and {client.ask.org_id}"
    if fleet.between is not None:
        yield from (f"I4 {wrong}" for wrong in fleet.between.wrongs)
        if not fleet.broke:
            yield from _one_at_a_time(fleet, whose)


def _one_at_a_time(fleet: Fleet, whose: dict[int, str]) -> Iterator[str]:
    for org_id in set(whose.values()):
        calls = [call for call in fleet.provider_calls if whose.get(call.number) == org_id]
        for one, other in pairwise(sorted(calls, key=lambda call: call.at_s)):
            if other.at_s < one.until_s:
                yield f"I4 {org_id} made calls {one.number} and {other.number} at once, and nothing broke"


def _nothing_is_left(fleet: Fleet) -> Iterator[str]:
    if fleet.open_turns:
        yield f"I8 open turns: {[turn.id for turn in fleet.open_turns]}"
    for worker in fleet.workers:
        if not worker.idle:
            yield f"I8 {worker.name} still holds {worker.turns.flights.stats()} {worker.calls.flights.stats()}"


def _no_task_died(fleet: Fleet) -> Iterator[str]:
    for worker in fleet.workers:
        for context in worker.machine.loop.unhandled:
            yield f"I8 on {worker.name}: {context.get('message')} {context.get('exception')!r}"
