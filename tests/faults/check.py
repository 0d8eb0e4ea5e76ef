"""What must hold after any fault, judged from three sides: what clients were told, what is stored, what was called.

The names are those of the fault matrix: I1 no acknowledged turn is lost, I2 a turn is stored once, I3 what was told is
what is stored, I4 one call without a fault and never more than attempts, I5 nobody waits past its bound, I6 what a
viewer saw is contiguous and a prefix of what is stored, I7 nothing crosses tenants, I8 nothing is left behind.

A provider's text is made of stamps that name its call and their place (`tests.support.fake_provider`), and a call names
the message it answers, so that every text can be traced to who asked for it.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise
from typing import Any

from oncewise.storage.rows import ask_of
from tests.faults.clients import Ask, History, Told
from tests.faults.site import Rows
from tests.support.fake_provider import Call

__all__ = ["calls_of", "violations"]

_STAMP = re.compile(r"@(\d+):(\d+):\d+@")
_ENDED = ("failed", "interrupted", "cancelled")


def violations(
    history: History,
    rows: Rows,
    calls: Iterable[Call],
    *,
    bound_s: float,
    broken: Collection[Ask] = (),
    leaks: Iterable[str] = (),
) -> list[str]:
    """Every promise that was not kept, in words; empty if all were.

    Args:
        history: What clients were told.
        rows: What is stored of their threads, once no turn is open any more.
        calls: The provider's log.
        bound_s: How long a client may wait for its last answer.
        broken: What was asked for while something broke; anything else must be answered at the first try.
        leaks: What servers still hold.
    """
    return [
        *_acknowledged_is_kept(history, rows),
        *_stored_once(history, rows),
        *_told_is_stored(history, rows),
        *_calls_are_bounded(history, rows, list(calls), broken),
        *_nobody_waits(history, bound_s),
        *_streams_are_whole(history, rows),
        *_tenants_are_apart(history, rows, list(calls)),
        *_nothing_is_left(rows, leaks),
    ]


def calls_of(ask: Ask, calls: Iterable[Call]) -> list[Call]:
    """The calls that a message brought about."""
    return [call for call in calls if _asked(call) == ask.content]


def _asked(call: Call) -> str:
    content: Any = call.request["messages"][-1]["content"]
    return str(content)


def _answers(rows: Rows) -> dict[str, str]:
    return {row.turn_id: row.content for row in rows.messages if row.role == "assistant"}


def _acknowledged_is_kept(history: History, rows: Rows) -> Iterator[str]:
    states = {row.id: row.state for row in rows.turns}
    pairs = defaultdict(list)
    for row in rows.messages:
        pairs[row.turn_id].append((row.role, row.status))
    for told in _completed(history):
        if told.turn not in states:
            yield f"I1 {told.turn} was told as completed and is not stored"
        elif states[told.turn] != "completed":
            yield f"I1 {told.turn} was told as completed and is {states[told.turn]}"
        elif pairs[told.turn] != [("user", "complete"), ("assistant", "complete")]:
            yield f"I1 {told.turn} was told as completed and its messages are {pairs[told.turn]}"


def _completed(history: History) -> list[Told]:
    return [told for told in history.told if told.state == "completed"]


def _stored_once(history: History, rows: Rows) -> Iterator[str]:
    for thread in {row.thread_id for row in rows.turns}:
        stored = [row for row in rows.messages if row.thread_id == thread]
        roles = [row.role for row in stored]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            yield f"I2 roles of {thread}: {roles}"
        if [row.sequence for row in stored] != list(range(len(stored))):
            yield f"I2 sequences of {thread} have gaps"
        owners = [row.turn_id for row in stored if row.role == "assistant"]
        if len(owners) != len(set(owners)):
            yield f"I2 {thread} has two answers of one turn"
    for ask in _asks(history):
        completed = [row.id for row in _turns_of(ask, rows) if row.state == "completed"]
        if len(completed) > 1:
            yield f"I2 {ask.content!r} is stored {len(completed)} times"


def _asks(history: History) -> set[Ask]:
    return {told.ask for told in history.told}


def _turns_of(ask: Ask, rows: Rows) -> list[Any]:
    # By its own row: a turn that never showed anything has no messages.
    return [row for row in rows.turns if row.thread_id == ask.thread and ask_of(row.ask).content == ask.content]


def _told_is_stored(history: History, rows: Rows) -> Iterator[str]:
    answers = _answers(rows)
    states = {row.id: row.state for row in rows.turns}
    for told in _completed(history):
        if told.turn in answers and told.text != answers[told.turn]:
            yield f"I3 {told.turn}: {told.op} client {told.client} was told another text than is stored"
    for told in history.told:
        if told.op == "sse" and told.state in _ENDED and states.get(told.turn, told.state) != told.state:
            yield f"I3 {told.turn} was told as {told.state} and is {states[told.turn]}"
    for row in rows.turns:
        if row.state == "completed" and (wrong := _not_one_call(answers.get(row.id, ""))):
            yield f"I3 {row.id} is stored with {wrong}"


def _not_one_call(text: str) -> str | None:
    stamps = [(int(call), int(index)) for call, index in _STAMP.findall(text)]
    if not stamps or len({call for call, _ in stamps}) != 1:
        return f"the text of calls {sorted({call for call, _ in stamps})}"
    if [index for _, index in stamps] != list(range(len(stamps))):
        return "pieces missing or doubled"
    return None


def _calls_are_bounded(history: History, rows: Rows, calls: list[Call], broken: Collection[Ask]) -> Iterator[str]:
    tried = defaultdict(int)
    for row in rows.attempts:
        tried[row.turn_id] += 1
    for ask in _asks(history):
        made = len(calls_of(ask, calls))
        turns = _turns_of(ask, rows)
        epochs = sum(row.epoch for row in turns)
        if made > epochs:
            yield f"I4 {ask.content!r}: {made} calls, {epochs} epochs"
        if made > sum(tried[row.id] for row in turns):
            yield f"I4 {ask.content!r}: {made} calls, {sum(tried[row.id] for row in turns)} on record"
        if ask not in broken and made != 1:
            yield f"I4 {ask.content!r}: {made} calls, and nothing broke"


def _nobody_waits(history: History, bound_s: float) -> Iterator[str]:
    for client, (ask, began_s, ended_s) in history.waits.items():
        final = history.final(client)
        if ended_s is None or final is None or final.state == "hung":
            yield f"I5 client {client} waits for {ask.content!r}"
        elif ended_s - began_s > bound_s:
            yield f"I5 client {client} waited {ended_s - began_s:.1f} s for {ask.content!r}, more than {bound_s:.1f}"
        elif final.state != "completed":
            yield f"I5 client {client} was sent away: {final.state} {final.status} {final.code}"


def _streams_are_whole(history: History, rows: Rows) -> Iterator[str]:
    answers = _answers(rows)
    turns = {row.id: row for row in rows.turns}
    for told in history.told:
        yield from (f"I6 client {told.client}: {words}" for words in told.broken)
        for before, after in pairwise(told.positions):
            if after <= before:
                yield f"I6 client {told.client}: {after} after {before}"
        kept = answers.get(told.turn or "", "")
        if told.op == "sse" and told.state in _ENDED and not (kept.startswith(told.text) or told.text.startswith(kept)):
            yield f"I6 {told.turn}: what client {told.client} saw is no part of what was kept"
        row = turns.get(told.turn or "")
        if row is not None and row.state == "completed" and told.positions and told.positions[0][0] < row.epoch:
            yield f"I6 {told.turn} was shown under epoch {told.positions[0][0]} and completed under {row.epoch}"


def _tenants_are_apart(history: History, rows: Rows, calls: list[Call]) -> Iterator[str]:
    asked = {call.number: _asked(call) for call in calls}
    for told in history.told:
        for call in {int(number) for number, _ in _STAMP.findall(told.text)}:
            if asked.get(call) != told.ask.content:
                yield f"I7 client {told.client} of {told.ask.org} was told the answer to {asked.get(call)!r}"
    orgs = {told.ask.thread: told.ask.org for told in history.told}
    for row in [*rows.turns, *rows.messages]:
        if orgs.get(row.thread_id, row.org_id) != row.org_id:
            yield f"I7 a row of {orgs[row.thread_id]} says that it belongs to {row.org_id}"


def _nothing_is_left(rows: Rows, leaks: Iterable[str]) -> Iterator[str]:
    still = [row.id for row in rows.turns if row.done_at_ms is None]
    if still:
        yield f"I8 open turns: {still}"
    yield from (f"I8 {leak}" for leak in leaks)
