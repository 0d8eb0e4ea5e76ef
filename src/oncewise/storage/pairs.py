"""Statements on a thread that more than one port needs: lock it, append a turn's two messages, read them.

Deliberately absent: when a pair may be stored. That is the ledger's decision.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from oncewise.model import Message, MessageStatus, Usage
from oncewise.storage.rows import message_of, usage_columns
from oncewise.storage.tables import messages, threads

__all__ = ["ORG", "THREAD", "TURN", "Pair", "lock_thread", "pair_of", "store_pairs"]

# Names of bound values; SQLAlchemy keeps the names of columns for the values that a statement sets.
ORG = sa.bindparam("in_org", type_=sa.Text)
THREAD = sa.bindparam("in_thread", type_=sa.Text)
TURN = sa.bindparam("of_turn", type_=sa.Text)

_PREVIEW_CHARS = 120

_LOCK = sa.select(threads.c.id).where(threads.c.org_id == ORG, threads.c.id == THREAD).with_for_update()
_LOCK_FREE = _LOCK.with_for_update(skip_locked=True)

_NEXT_SEQUENCE = sa.select(sa.func.coalesce(sa.func.max(messages.c.sequence), -1) + 1).where(
    messages.c.org_id == ORG, messages.c.thread_id == THREAD
)

_APPEND = sa.insert(messages)

_TOUCH = (
    sa.update(threads)
    .where(threads.c.org_id == ORG, threads.c.id == THREAD)
    .values(
        last_provider=sa.bindparam("provider"),
        last_model=sa.bindparam("model"),
        last_message_preview=sa.bindparam("preview"),
        updated_at_ms=sa.bindparam("now_ms"),
    )
)

_PAIR = (
    sa.select(messages)
    .where(messages.c.org_id == ORG, messages.c.thread_id == THREAD, messages.c.turn_id == TURN)
    # The user first, in the order of the index on (turn_id, role); by sequence, SQLite reads through the whole thread.
    .order_by(messages.c.role.desc())
)


@dataclass(frozen=True, slots=True)
class Pair:
    """A user message and its answer, ready to be stored.

    Attributes:
        asked: Provider and model that were asked for; what the thread shows and a next message would take.
        answered: Provider and model that answered; what the message shows.
    """

    org_id: str
    thread_id: str
    turn_id: str
    question: str
    text: str
    status: MessageStatus
    asked: tuple[str | None, str | None]
    answered: tuple[str | None, str | None]
    asked_at_ms: int
    citations: Sequence[Any] | None = None
    usage: Usage | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


def lock_thread(conn: sa.Connection, org_id: str, thread_id: str, *, if_free: bool = False) -> bool:
    """Make this the only transaction that adds to the thread; False if the tenant has no such thread.

    Every transaction that locks a thread and a turn locks the thread first, or two of them could wait for each other.
    With `if_free` it waits for none, and returns False while another one has the thread.
    """
    lock = _LOCK_FREE if if_free else _LOCK
    return conn.execute(lock, {"in_org": org_id, "in_thread": thread_id}).first() is not None


def pair_of(conn: sa.Connection, org_id: str, thread_id: str, turn_id: str) -> tuple[Message, ...]:
    """The stored messages of a turn: two, or none."""
    rows = conn.execute(_PAIR, {"in_org": org_id, "in_thread": thread_id, "of_turn": turn_id})
    return tuple(message_of(row) for row in rows)


def store_pairs(conn: sa.Connection, pairs: Sequence[Pair], *, now_ms: int, ids: Callable[[], str]) -> None:
    """Append pairs of one locked thread in order, and show the last answer in its head."""
    last = pairs[-1]
    place = {"in_org": last.org_id, "in_thread": last.thread_id}
    first: int = conn.execute(_NEXT_SEQUENCE, place).scalar_one()
    rows = [
        row
        for number, pair in enumerate(pairs)
        for row in (
            _question(pair, ids(), first + 2 * number),
            _answer(pair, ids(), first + 2 * number + 1, now_ms),
        )
    ]
    conn.execute(_APPEND, rows)
    provider, model = last.asked
    head = {"provider": provider, "model": model, "preview": last.text[:_PREVIEW_CHARS], "now_ms": now_ms}
    conn.execute(_TOUCH, place | head)


def _question(pair: Pair, message_id: str, sequence: int) -> dict[str, Any]:
    return _common(pair, message_id, sequence) | {
        "role": "user",
        "content": pair.question,
        "status": MessageStatus.COMPLETE,
        "created_at_ms": pair.asked_at_ms,
        "provider": None,
        "model": None,
        "citations": None,
        **usage_columns(None),
    }


def _answer(pair: Pair, message_id: str, sequence: int, now_ms: int) -> dict[str, Any]:
    provider, model = pair.answered
    return _common(pair, message_id, sequence) | {
        "role": "assistant",
        "content": pair.text,
        "status": pair.status,
        "created_at_ms": now_ms,
        "provider": provider,
        "model": model,
        # In ASCII: a provider's citations may hold halves of surrogate pairs, which no database takes as text.
        "meta": json.dumps(dict(pair.meta)),
        "citations": None if pair.citations is None else json.dumps(pair.citations),
        **usage_columns(pair.usage),
    }


def _common(pair: Pair, message_id: str, sequence: int) -> dict[str, Any]:
    return {
        "id": message_id,
        "org_id": pair.org_id,
        "thread_id": pair.thread_id,
        "turn_id": pair.turn_id,
        "sequence": sequence,
        "meta": "{}",
    }
