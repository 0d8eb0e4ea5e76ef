"""Threads in SQL: made, listed, read, changed, deleted and restored.

Threads are listed by when they were made, not by when they were last used: a page that a caller holds a cursor into
must not move under it.

Deliberately absent: running turns. Deleting a thread fences them, since their rows are gone; stopping them is the
caller's business.
"""

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

import sqlalchemy as sa

from oncewise.errors import InvalidRequest, NotFound
from oncewise.model import (
    AuditEntry,
    ChatMessage,
    FinishReason,
    MessageStatus,
    Thread,
    ThreadPage,
    TurnAsk,
    TurnState,
    Usage,
)
from oncewise.storage.database import Database, DatabaseClock, database_time_s, insert_missing
from oncewise.storage.pairs import ORG, THREAD, Pair, store_pairs
from oncewise.storage.rows import ask_columns, ask_of, message_of, thread_of, to_ms, usage_of
from oncewise.storage.tables import messages, orgs, threads, turns

__all__ = ["SqlThreadStore"]

Ids = Callable[[], str]
Row = sa.Row[Any]

_CHANGEABLE = frozenset({"title", "description", "pinned"})
# Whole milliseconds that fit a 64-bit column, then the id.
_CURSOR = re.compile(r"(\d{1,15}):([0-9A-Za-z_-]{1,64})")
_IMPORTED = "import"

_HERE = (threads.c.org_id == ORG, threads.c.id == THREAD)
_ONE = sa.select(threads).where(*_HERE)
_MESSAGES = (
    sa.select(messages).where(messages.c.org_id == ORG, messages.c.thread_id == THREAD).order_by(messages.c.sequence)
)
_NEWEST = (
    sa.select(threads)
    .where(threads.c.org_id == ORG)
    .order_by(threads.c.created_at_ms.desc(), threads.c.id.desc())
    .limit(sa.bindparam("at_most", type_=sa.Integer))
)
_OLDER = _NEWEST.where(
    sa.tuple_(threads.c.created_at_ms, threads.c.id)
    < sa.tuple_(sa.bindparam("than_ms", type_=sa.BigInteger), sa.bindparam("than_id", type_=sa.Text))
)
_AUDIT = (
    sa.select(
        turns.c.id,
        turns.c.ask,
        turns.c.fingerprint,
        turns.c.response_hash,
        turns.c.call_id,
        turns.c.shared,
        turns.c.created_at_ms,
        messages.c.provider,
        messages.c.model,
        messages.c.prompt_tokens,
        messages.c.completion_tokens,
        messages.c.usage_estimated,
    )
    .join(messages, messages.c.turn_id == turns.c.id)
    .where(turns.c.org_id == ORG, turns.c.thread_id == THREAD, messages.c.org_id == ORG, messages.c.role == "assistant")
    .order_by(turns.c.idx)
)
_INSERT = sa.insert(threads)
_INSERT_TURNS = sa.insert(turns)
_DELETE = sa.delete(threads).where(*_HERE)


def _cursor(row: Row) -> str:
    return urlsafe_b64encode(f"{row.created_at_ms}:{row.id}".encode()).decode()


def _place(cursor: str) -> tuple[int, str]:
    try:
        match = _CURSOR.fullmatch(urlsafe_b64decode(cursor.encode("ascii")).decode("ascii"))
    except ValueError:
        match = None
    if match is None:
        raise InvalidRequest(errors=((("query", "cursor"), "is not a cursor of this list"),))
    return int(match[1]), match[2]


def _here(org_id: str, thread_id: str) -> dict[str, Any]:
    return {"in_org": org_id, "in_thread": thread_id}


def _create(conn: sa.Connection, now_ms: int, org_id: str, thread_id: str, **told: str | None) -> Thread:
    insert_missing(conn, orgs, id=org_id, created_at_ms=now_ms)
    made = {"id": thread_id, "org_id": org_id, "pinned": False, "created_at_ms": now_ms, "updated_at_ms": now_ms}
    conn.execute(_INSERT, made | told)
    return _get(conn, org_id, thread_id)


def _get(conn: sa.Connection, org_id: str, thread_id: str) -> Thread:
    here = _here(org_id, thread_id)
    row = conn.execute(_ONE, here).first()
    if row is None:
        raise NotFound
    return thread_of(row, [message_of(message) for message in conn.execute(_MESSAGES, here)])


def _list(conn: sa.Connection, org_id: str, limit: int, after: tuple[int, str] | None) -> ThreadPage:
    # One more than asked for tells whether there is a next page.
    values: dict[str, Any] = {"in_org": org_id, "at_most": limit + 1}
    if after is None:
        rows = conn.execute(_NEWEST, values).all()
    else:
        rows = conn.execute(_OLDER, values | {"than_ms": after[0], "than_id": after[1]}).all()
    items = tuple(thread_of(row) for row in rows[:limit])
    return ThreadPage(items, _cursor(rows[limit - 1]) if len(rows) > limit else None)


def _update(
    conn: sa.Connection, now_ms: int, org_id: str, thread_id: str, changes: dict[str, str | bool | None]
) -> Thread:
    if changes:
        change = sa.update(threads).where(*_HERE).values(**changes, updated_at_ms=now_ms)
        conn.execute(change, _here(org_id, thread_id))
    return _get(conn, org_id, thread_id)


def _delete(conn: sa.Connection, org_id: str, thread_id: str) -> None:
    if conn.execute(_DELETE, _here(org_id, thread_id)).rowcount == 0:
        raise NotFound


def _audit_entry(row: sa.Row[*tuple[Any, ...]]) -> AuditEntry:
    ask = ask_of(row.ask)
    return AuditEntry(
        turn_id=row.id,
        provider=row.provider or ask.provider,
        model=row.model or ask.model,
        reason=ask.reason,
        user_id=ask.user_id,
        scope=ask.scope,
        package_hash=row.fingerprint,
        response_hash=row.response_hash,
        usage=usage_of(row) or Usage(0, 0, estimated=True),
        call_id=row.call_id or "",
        shared=row.shared,
        created_at_ms=row.created_at_ms,
    )


def _audit(conn: sa.Connection, org_id: str, thread_id: str) -> tuple[AuditEntry, ...]:
    here = _here(org_id, thread_id)
    if conn.execute(_ONE, here).first() is None:
        raise NotFound
    return tuple(_audit_entry(row) for row in conn.execute(_AUDIT, here))


# -- import ------------------------------------------------------------------------------------------------------


def _exchanges(exported: Sequence[ChatMessage]) -> list[tuple[str, str]]:
    """Questions with their answers.

    Raises:
        InvalidRequest: a role out of its turn, or a last question without an answer: the next prompt would hold two
            user messages in a row, which providers refuse.
    """
    for number, message in enumerate(exported):
        expected = "assistant" if number % 2 else "user"
        if message.role != expected:
            raise InvalidRequest(errors=(((number, "role"), f"must be {expected}: roles alternate, user first"),))
    if len(exported) % 2:
        raise InvalidRequest(errors=(((len(exported) - 1,), "has no answer: the last message must be an assistant's"),))
    return [(user.content, answer.content) for user, answer in zip(exported[::2], exported[1::2], strict=True)]


def _restored_turn(pair: Pair, idx: int, now_ms: int) -> dict[str, Any]:
    # Hashed apart from real fingerprints: no request is answered by a turn that was never asked here.
    fingerprint = sha256(b"import\0" + pair.question.encode()).hexdigest()
    ask = TurnAsk(pair.org_id, pair.thread_id, pair.question, _IMPORTED, _IMPORTED, fingerprint)
    return ask_columns(ask) | {
        "id": pair.turn_id,
        "idx": idx,
        "state": TurnState.COMPLETED,
        "epoch": 1,
        "attempt": 1,
        "owner": _IMPORTED,
        "lease_until_s": 0.0,
        "visible": True,
        "created_at_ms": now_ms,
        "partial": "",
        "partial_seq": 0,
        "done_at_ms": now_ms,
        "finish_reason": FinishReason.STOP,
        "failure_retryable": False,
        "shared": False,
        "response_hash": sha256(pair.text.encode()).hexdigest(),
    }


def _restore(
    conn: sa.Connection, now_ms: int, ids: Ids, org_id: str, exchanges: Sequence[tuple[str, str]], *, title: str | None
) -> Thread:
    thread = _create(conn, now_ms, org_id, ids(), title=title)
    if not exchanges:
        return thread
    unknown = (None, None)
    pairs = [
        Pair(org_id, thread.id, ids(), question, text, MessageStatus.COMPLETE, unknown, unknown, asked_at_ms=now_ms)
        for question, text in exchanges
    ]
    conn.execute(_INSERT_TURNS, [_restored_turn(pair, idx, now_ms) for idx, pair in enumerate(pairs)])
    store_pairs(conn, pairs, now_ms=now_ms, ids=ids)
    return _get(conn, org_id, thread.id)


# -- the port ----------------------------------------------------------------------------------------------------


class SqlThreadStore:
    """The `ThreadStore` port on any `Database`, which it does not close. Arguments as in `SqlTurnLedger`."""

    def __init__(self, database: Database, *, ids: Ids, clock: DatabaseClock = database_time_s) -> None:
        self._database = database
        self._ids = ids
        self._clock = clock

    def _now_ms(self, conn: sa.Connection) -> int:
        return to_ms(self._clock(conn))

    async def create(self, org_id: str, *, title: str | None, description: str | None, user_id: str | None) -> Thread:
        """See `ThreadStore.create`."""
        told = {"title": title, "description": description, "user_id": user_id}
        return await self._database.write(lambda conn: _create(conn, self._now_ms(conn), org_id, self._ids(), **told))

    async def get(self, org_id: str, thread_id: str) -> Thread:
        """See `ThreadStore.get`."""
        return await self._database.read(lambda conn: _get(conn, org_id, thread_id))

    async def list(self, org_id: str, *, limit: int, cursor: str | None) -> ThreadPage:
        """See `ThreadStore.list`."""
        after = None if cursor is None else _place(cursor)
        return await self._database.read(lambda conn: _list(conn, org_id, limit, after))

    async def update(self, org_id: str, thread_id: str, changes: dict[str, str | bool | None]) -> Thread:
        """See `ThreadStore.update`."""
        if not _CHANGEABLE.issuperset(changes):
            raise ValueError(sorted(_CHANGEABLE))
        return await self._database.write(lambda conn: _update(conn, self._now_ms(conn), org_id, thread_id, changes))

    async def delete(self, org_id: str, thread_id: str) -> None:
        """See `ThreadStore.delete`."""
        await self._database.write(lambda conn: _delete(conn, org_id, thread_id))

    async def audit(self, org_id: str, thread_id: str) -> tuple[AuditEntry, ...]:
        """See `ThreadStore.audit`."""
        return await self._database.read(lambda conn: _audit(conn, org_id, thread_id))

    async def restore(self, org_id: str, exported: Sequence[ChatMessage], *, title: str | None) -> Thread:
        """See `ThreadStore.restore`."""
        exchanges = _exchanges(exported)
        return await self._database.write(
            lambda conn: _restore(conn, self._now_ms(conn), self._ids, org_id, exchanges, title=title)
        )
