"""The turn ledger in SQL: one row decides who works on a turn and whether its answer counts.

Each operation is one function of a connection, run as one transaction. The first thing it reads is the database's
clock; a reading that grew old behind a lock only makes leases look younger, which delays a takeover and never hastens
one. Who changes a turn names its epoch in the WHERE, so that a fenced owner changes nothing.

A turn is open while `done_at_ms` is null; the schema holds that equal to a state that is not final.

Deliberately absent: waiting. Queues, takeovers and their timing belong to the use cases.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa

from oncewise.errors import Failure, HeadMoved, IdempotencyMismatch, LeaderLost, NotFound, QueueFull, ThreadBusy
from oncewise.model import (
    Answer,
    ChatMessage,
    FinishReason,
    Heartbeat,
    MessageStatus,
    OnBusy,
    StoredTurn,
    TurnAsk,
    TurnClaim,
    TurnState,
    Usage,
)
from oncewise.ports import Admission, CallRecord, Follow, Lead, Replay
from oncewise.storage.database import Database, DatabaseClock, database_time_s
from oncewise.storage.pairs import ORG, THREAD, TURN, Pair, lock_thread, pair_of, store_pairs
from oncewise.storage.rows import ask_columns, ask_of, to_ms, turn_of, usage_columns
from oncewise.storage.tables import attempts, messages, threads, turns

__all__ = ["SqlTurnLedger", "open_owners"]

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")
Ids = Callable[[], str]
Row = sa.Row[Any]

_KEY_LIFE_MS = 24 * 60 * 60 * 1000

# -- statements --------------------------------------------------------------------------------------------------

_HERE = (turns.c.org_id == ORG, turns.c.thread_id == THREAD)
_OPEN = turns.c.done_at_ms.is_(None)
_FINGERPRINT = turns.c.fingerprint == sa.bindparam("of_fingerprint", type_=sa.Text)
_CLAIMED = (*_HERE, turns.c.id == TURN, turns.c.epoch == sa.bindparam("of_epoch"), _OPEN)

_ONE_TURN = sa.select(turns).where(*_HERE, turns.c.id == TURN)
_CLAIMED_TURN = sa.select(turns).where(*_CLAIMED).with_for_update()
_FIRST_OPEN = sa.select(turns).where(*_HERE, _OPEN).order_by(turns.c.idx).limit(1)

_BY_KEY = sa.select(turns).where(*_HERE, turns.c.idempotency_key == sa.bindparam("under_key", type_=sa.Text))
_FORGET_KEY = sa.update(turns).where(*_HERE, turns.c.id == TURN).values(idempotency_key=None)

_AFTER_PARENT = (
    sa.select(turns)
    .where(
        *_HERE,
        turns.c.parent_message_id == sa.bindparam("after_parent", type_=sa.Text),
        _FINGERPRINT,
        sa.or_(_OPEN, turns.c.state == TurnState.COMPLETED),
    )
    .order_by(turns.c.idx)
    .limit(1)
)
_HEAD = (
    sa.select(messages.c.id)
    .where(messages.c.org_id == ORG, messages.c.thread_id == THREAD)
    .order_by(messages.c.sequence.desc())
    .limit(1)
)

_OPEN_TWIN = sa.select(turns).where(*_HERE, _OPEN, _FINGERPRINT).order_by(turns.c.idx).limit(1)
_LATEST_IDX = sa.select(sa.func.max(turns.c.idx)).where(*_HERE, turns.c.state == TurnState.COMPLETED).scalar_subquery()
_LATEST_TWIN = sa.select(turns).where(
    *_HERE, turns.c.idx == _LATEST_IDX, _FINGERPRINT, turns.c.done_at_ms >= sa.bindparam("done_since_ms")
)

_PLACE = sa.select(
    sa.select(sa.func.coalesce(sa.func.max(turns.c.idx), -1) + 1).where(*_HERE).scalar_subquery().label("idx"),
    sa.select(sa.func.count()).select_from(turns).where(*_HERE, _OPEN).scalar_subquery().label("open"),
)
_INSERT = sa.insert(turns)

_POSITION = sa.select(
    sa.select(sa.func.count())
    .select_from(turns)
    .where(*_HERE, _OPEN, turns.c.idx < sa.bindparam("before_idx"))
    .scalar_subquery()
).where(turns.c.org_id == ORG, turns.c.thread_id == THREAD, turns.c.id == TURN)

_HISTORY = (
    sa.select(messages.c.role, messages.c.content)
    .join(turns, messages.c.turn_id == turns.c.id)
    .where(
        messages.c.org_id == ORG, messages.c.thread_id == THREAD, turns.c.org_id == ORG,
        turns.c.state == TurnState.COMPLETED,
    )
    .order_by(messages.c.sequence)
)  # fmt: skip

_THREAD_IS_THERE = sa.select(threads.c.id).where(threads.c.org_id == ORG, threads.c.id == THREAD)

_SHOW = sa.update(turns).where(*_CLAIMED).values(visible=True, state=TurnState.STREAMING)
_LEASE = sa.update(turns).where(*_CLAIMED).values(lease_until_s=sa.bindparam("until_s"))
_FREE = sa.select(turns.c.id).where(*_CLAIMED).with_for_update(skip_locked=True).scalar_subquery()
_BEAT = (
    sa.update(turns)
    .where(turns.c.org_id == ORG, turns.c.id == _FREE)
    .values(lease_until_s=sa.bindparam("until_s"), partial=sa.bindparam("text"), partial_seq=sa.bindparam("deltas"))
)
_STILL_CLAIMED = sa.select(turns.c.id).where(*_CLAIMED)
_TAKE_OVER = _LEASE.where(turns.c.lease_until_s <= sa.bindparam("now_s")).values(
    epoch=turns.c.epoch + 1, attempt=turns.c.attempt + 1, owner=sa.bindparam("by_owner")
)
_COMPLETE = (
    sa.update(turns)
    .where(*_CLAIMED)
    .values(
        state=TurnState.COMPLETED,
        done_at_ms=sa.bindparam("now_ms"),
        partial="",
        partial_seq=sa.bindparam("deltas"),
        finish_reason=sa.bindparam("reason"),
        call_id=sa.bindparam("call"),
        shared=sa.bindparam("is_shared"),
        cost_usd=sa.bindparam("cost"),
        response_hash=sa.bindparam("hash"),
    )
)
_END = (
    sa.update(turns)
    .where(*_CLAIMED)
    .values(
        state=sa.bindparam("final_state"),
        done_at_ms=sa.bindparam("now_ms"),
        partial="",
        partial_seq=sa.bindparam("deltas"),
        finish_reason=sa.bindparam("reason"),
        call_id=sa.bindparam("call"),
        response_hash=sa.bindparam("hash"),
        failure_code=sa.bindparam("code"),
        failure_detail=sa.bindparam("detail"),
        failure_retryable=sa.bindparam("retryable"),
    )
)
# Under the next epoch, as a takeover: viewers may have been shown more than the partial, and one of their positions
# could be taken for that of the end.
_END_LOST = _END.values(epoch=turns.c.epoch + 1)

_LOST = (
    sa.select(turns)
    .where(
        _OPEN,
        sa.or_(
            turns.c.lease_until_s <= sa.bindparam("now_s"),
            turns.c.owner.in_(sa.bindparam("dead_owners", expanding=True)),
        ),
    )
    # The order of an index that holds open turns only; without it all turns ever stored are read.
    .order_by(turns.c.lease_until_s)
)

# Of all tenants: a process that died served all of them.
_LAPSE = (
    sa.update(turns)
    .where(
        _OPEN,
        turns.c.lease_until_s > sa.bindparam("now_s"),
        turns.c.owner.in_(sa.bindparam("dead_owners", expanding=True)),
    )
    .values(lease_until_s=sa.bindparam("now_s"))
)

_START_CALL = sa.insert(attempts)
_FINISH_CALL = (
    sa.update(attempts)
    .where(
        attempts.c.org_id == ORG,
        attempts.c.call_id == sa.bindparam("of_call"),
        attempts.c.attempt == sa.bindparam("of_attempt"),
    )
    .values(
        ended_at_ms=sa.bindparam("now_ms"),
        outcome=sa.bindparam("how"),
        prompt_tokens=sa.bindparam("prompt"),
        completion_tokens=sa.bindparam("completion"),
        usage_estimated=sa.bindparam("estimated"),
    )
)


# Ordered as the index of open turns; DISTINCT would read through all turns ever stored.
# Every process looks at this each second: a row for each turn of the fleet would be more than all else it is sent.
_OPEN_OWNERS = sa.select(turns.c.owner).where(_OPEN).distinct()


def open_owners(conn: sa.Connection) -> frozenset[str]:
    """Who holds turns that are not final."""
    return frozenset(conn.execute(_OPEN_OWNERS).scalars())


def _in(org_id: str, thread_id: str) -> dict[str, Any]:
    return {"in_org": org_id, "in_thread": thread_id}


def _under(claim: TurnClaim) -> dict[str, Any]:
    return {**_in(claim.org_id, claim.thread_id), "of_turn": claim.turn_id, "of_epoch": claim.epoch}


# -- admission ---------------------------------------------------------------------------------------------------


def _admit(
    conn: sa.Connection,
    now_s: float,
    ids: Ids,
    ask: TurnAsk,
    *,
    owner: str,
    lease_s: float,
    replay_window_s: float,
    queue_limit: int,
) -> Admission:
    if not lock_thread(conn, ask.org_id, ask.thread_id):
        raise NotFound
    row = _turn_it_belongs_to(conn, now_s, ask, replay_window_s)
    if row is not None:
        turn = _stored(conn, row, now_s)
        return Replay(turn) if turn.state.final else Follow(turn)
    place = conn.execute(_PLACE, _in(ask.org_id, ask.thread_id)).one()
    if place.open and ask.on_busy is OnBusy.REJECT:
        busy = ThreadBusy()
        busy.turn_id = conn.execute(_FIRST_OPEN, _in(ask.org_id, ask.thread_id)).one().id
        raise busy
    if place.open > queue_limit:
        raise QueueFull
    claim = TurnClaim(ask.org_id, ask.thread_id, ids(), place.idx, epoch=1)
    conn.execute(_INSERT, _new_turn(claim, ask, now_s, owner, lease_s))
    return Lead(claim, place.open)


def _new_turn(claim: TurnClaim, ask: TurnAsk, now_s: float, owner: str, lease_s: float) -> dict[str, Any]:
    return ask_columns(ask) | {
        "id": claim.turn_id,
        "idx": claim.idx,
        "state": TurnState.PENDING,
        "epoch": claim.epoch,
        "attempt": 1,
        "owner": owner,
        "lease_until_s": now_s + lease_s,
        "visible": False,
        "created_at_ms": to_ms(now_s),
        "partial": "",
        "partial_seq": 0,
        "failure_retryable": False,
        "shared": False,
    }


def _turn_it_belongs_to(conn: sa.Connection, now_s: float, ask: TurnAsk, replay_window_s: float) -> Row | None:
    if ask.idempotency_key is not None:
        return _turn_under_key(conn, now_s, ask)
    if ask.parent_message_id is not None:
        return _turn_after_parent(conn, ask)
    if ask.force_new:
        return None
    return _same_turn_again(conn, now_s, ask, replay_window_s)


def _turn_under_key(conn: sa.Connection, now_s: float, ask: TurnAsk) -> Row | None:
    here = _in(ask.org_id, ask.thread_id)
    row = conn.execute(_BY_KEY, here | {"under_key": ask.idempotency_key}).first()
    if row is None:
        return None
    if row.created_at_ms <= to_ms(now_s) - _KEY_LIFE_MS:
        conn.execute(_FORGET_KEY, here | {"of_turn": row.id})
        return None
    if row.fingerprint != ask.fingerprint:
        raise IdempotencyMismatch
    return row


def _turn_after_parent(conn: sa.Connection, ask: TurnAsk) -> Row | None:
    here = _in(ask.org_id, ask.thread_id)
    same = {"after_parent": ask.parent_message_id, "of_fingerprint": ask.fingerprint}
    row = conn.execute(_AFTER_PARENT, here | same).first()
    if row is None and conn.execute(_HEAD, here).scalar() != ask.parent_message_id:
        raise HeadMoved
    return row


def _same_turn_again(conn: sa.Connection, now_s: float, ask: TurnAsk, replay_window_s: float) -> Row | None:
    same = _in(ask.org_id, ask.thread_id) | {"of_fingerprint": ask.fingerprint}
    row = conn.execute(_OPEN_TWIN, same).first()
    if row is not None:
        return row
    since = {"done_since_ms": to_ms(now_s - replay_window_s)}
    return conn.execute(_LATEST_TWIN, same | since).first()


def _position(conn: sa.Connection, claim: TurnClaim) -> int:
    here = _in(claim.org_id, claim.thread_id) | {"of_turn": claim.turn_id, "before_idx": claim.idx}
    row = conn.execute(_POSITION, here).first()
    if row is None:
        raise NotFound
    before: int = row[0]
    return before


# -- reading -----------------------------------------------------------------------------------------------------


def _stored(conn: sa.Connection, row: Row, now_s: float) -> StoredTurn:
    pair = pair_of(conn, row.org_id, row.thread_id, row.id) if row.response_hash is not None else ()
    return turn_of(row, pair, now_s=now_s)


def _turn(conn: sa.Connection, now_s: float, org_id: str, thread_id: str, turn_id: str) -> StoredTurn:
    row = conn.execute(_ONE_TURN, _in(org_id, thread_id) | {"of_turn": turn_id}).first()
    if row is None:
        raise NotFound
    return _stored(conn, row, now_s)


def _active(conn: sa.Connection, now_s: float, org_id: str, thread_id: str) -> StoredTurn | None:
    here = _in(org_id, thread_id)
    row = conn.execute(_FIRST_OPEN, here).first()
    if row is None and conn.execute(_THREAD_IS_THERE, here).first() is None:
        raise NotFound
    return _stored(conn, row, now_s) if row is not None else None


def _history(conn: sa.Connection, org_id: str, thread_id: str) -> tuple[ChatMessage, ...]:
    return tuple(ChatMessage(row.role, row.content) for row in conn.execute(_HISTORY, _in(org_id, thread_id)))


# -- under a claim -----------------------------------------------------------------------------------------------


def _changed(conn: sa.Connection, statement: sa.Update, values: dict[str, Any]) -> bool:
    return conn.execute(statement, values).rowcount == 1


def _mark_visible(conn: sa.Connection, _now_s: float, claim: TurnClaim) -> bool:
    return _changed(conn, _SHOW, _under(claim))


def _beat(conn: sa.Connection, now_s: float, beats: Sequence[Heartbeat], *, lease_s: float) -> Mapping[TurnClaim, bool]:
    holds: dict[TurnClaim, bool] = {}
    for beat in beats:
        under = _under(beat.claim)
        said = {"until_s": now_s + lease_s, "text": beat.partial, "deltas": beat.partial_seq}
        if _changed(conn, _BEAT, under | said):
            holds[beat.claim] = True
        elif conn.execute(_STILL_CLAIMED, under).first() is None:
            holds[beat.claim] = False
        # Else another transaction has the row now. To wait for it would keep all the others waiting.
    return holds


def _release(conn: sa.Connection, now_s: float, claim: TurnClaim) -> None:
    conn.execute(_LEASE, _under(claim) | {"until_s": now_s})


def _take_over(conn: sa.Connection, now_s: float, claim: TurnClaim, owner: str, lease_s: float) -> TurnClaim | None:
    lease = {"now_s": now_s, "until_s": now_s + lease_s, "by_owner": owner}
    if not _changed(conn, _TAKE_OVER, _under(claim) | lease):
        return None
    return TurnClaim(claim.org_id, claim.thread_id, claim.turn_id, claim.idx, claim.epoch + 1)


def _claimed(conn: sa.Connection, claim: TurnClaim) -> Row | None:
    """The claimed turn, locked behind its thread; None if the claim is fenced or the thread is gone."""
    if not lock_thread(conn, claim.org_id, claim.thread_id):
        return None
    return conn.execute(_CLAIMED_TURN, _under(claim)).first()


def _commit(conn: sa.Connection, now_s: float, ids: Ids, claim: TurnClaim, answer: Answer) -> StoredTurn | None:
    row = _claimed(conn, claim)
    if row is None:
        return None
    completion = {
        "now_ms": to_ms(now_s),
        "deltas": answer.deltas,
        "reason": answer.finish_reason,
        "call": answer.call_id,
        "is_shared": answer.shared,
        "cost": answer.cost_usd,
        "hash": _digest(answer.text),
    }
    conn.execute(_COMPLETE, _under(claim) | completion)
    store_pairs(conn, [_whole_pair(row, answer)], now_ms=to_ms(now_s), ids=ids)
    # Read back, not put together from what was written: the first answer and every later one are the same bytes.
    return _turn(conn, now_s, claim.org_id, claim.thread_id, claim.turn_id)


@dataclass(frozen=True, slots=True)
class _Ending:
    state: TurnState
    failure: Failure
    partial: str
    partial_seq: int
    call_id: str | None

    def columns(self, now_ms: int) -> dict[str, Any]:
        return {
            "final_state": self.state,
            "now_ms": now_ms,
            "deltas": self.partial_seq,
            "reason": FinishReason.CANCELLED if self.state is TurnState.CANCELLED else None,
            "call": self.call_id,
            "hash": _digest(self.partial) if self.partial else None,
            "code": self.failure.code,
            "detail": self.failure.detail,
            "retryable": self.failure.retryable,
        }


def _end(
    conn: sa.Connection, now_s: float, ids: Ids, claim: TurnClaim, ending: _Ending, *, update: sa.Update = _END
) -> StoredTurn | None:
    row = _claimed(conn, claim)
    if row is None:
        return None
    conn.execute(update, _under(claim) | ending.columns(to_ms(now_s)))
    if ending.failure.retryable:
        conn.execute(_FORGET_KEY, _in(claim.org_id, claim.thread_id) | {"of_turn": claim.turn_id})
    if ending.partial:
        store_pairs(conn, [_partial_pair(row, ending.partial)], now_ms=to_ms(now_s), ids=ids)
    return _turn(conn, now_s, claim.org_id, claim.thread_id, claim.turn_id)


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _whole_pair(row: Row, answer: Answer) -> Pair:
    ask = ask_of(row.ask)
    return Pair(
        row.org_id,
        row.thread_id,
        row.id,
        question=ask.content,
        text=answer.text,
        status=MessageStatus.COMPLETE,
        asked=(ask.provider, ask.model),
        answered=(ask.provider, answer.model),
        asked_at_ms=row.created_at_ms,
        citations=answer.citations,
        usage=answer.usage,
        meta=answer.meta,
    )


def _partial_pair(row: Row, partial: str) -> Pair:
    ask = ask_of(row.ask)
    asked = (ask.provider, ask.model)
    return Pair(
        row.org_id,
        row.thread_id,
        row.id,
        question=ask.content,
        text=partial,
        status=MessageStatus.PARTIAL,
        asked=asked,
        answered=asked,
        asked_at_ms=row.created_at_ms,
    )


def _lapse(conn: sa.Connection, now_s: float, dead_owners: Sequence[str]) -> int:
    return conn.execute(_LAPSE, {"now_s": now_s, "dead_owners": list(dead_owners)}).rowcount


def _sweep(conn: sa.Connection, now_s: float, ids: Ids, dead_owners: Sequence[str], lapsed_s: float) -> int:
    lost = conn.execute(_LOST, {"now_s": now_s - lapsed_s, "dead_owners": list(dead_owners)}).all()
    failure = LeaderLost().failure()
    ended = 0
    # Threads in one order everywhere: two sweeps that hold one each must not wait for each other's.
    for row in sorted(lost, key=lambda row: (row.thread_id, row.idx)):
        if not lock_thread(conn, row.org_id, row.thread_id, if_free=True):
            # Somebody has it in hand: its owner after all, or a process that stopped in a transaction. Waiting here
            # would keep other turns from their end, and take this one from those who wait for it.
            continue
        claim = TurnClaim(row.org_id, row.thread_id, row.id, row.idx, row.epoch)
        ending = _Ending(TurnState.INTERRUPTED, failure, row.partial, row.partial_seq, row.call_id)
        ended += _end(conn, now_s, ids, claim, ending, update=_END_LOST) is not None
    return ended


# -- calls -------------------------------------------------------------------------------------------------------


def _record_call(conn: sa.Connection, now_s: float, call: CallRecord) -> None:
    row = {
        "call_id": call.call_id,
        "attempt": call.attempt,
        "org_id": call.org_id,
        "turn_id": call.turn_id,
        "epoch": call.epoch,
        "provider": call.provider,
        "model": call.model,
        "started_at_ms": to_ms(now_s),
    }
    conn.execute(_START_CALL, row)


def _finish_call(conn: sa.Connection, now_s: float, call: CallRecord, outcome: str, usage: Usage | None) -> None:
    tokens = usage_columns(usage)
    end = {
        "in_org": call.org_id,
        "of_call": call.call_id,
        "of_attempt": call.attempt,
        "now_ms": to_ms(now_s),
        "how": outcome,
        "prompt": tokens["prompt_tokens"],
        "completion": tokens["completion_tokens"],
        "estimated": tokens["usage_estimated"],
    }
    conn.execute(_FINISH_CALL, end)


# -- the port ----------------------------------------------------------------------------------------------------


class SqlTurnLedger:
    """The `TurnLedger` port on any `Database`. Holds no state: as many as wanted may share one database.

    Args:
        database: Where the rows are; not closed by the ledger.
        ids: Makes identifiers of turns and messages that grow with time, such as UUIDs of version 7.
        clock: How a transaction reads the time. All stored times are the database's: several workers share one order
            and one opinion of leases and replay windows, whatever their own clocks say.
    """

    def __init__(self, database: Database, *, ids: Ids, clock: DatabaseClock = database_time_s) -> None:
        self._database = database
        self._ids = ids
        self._clock = clock

    async def _write(
        self,
        operation: Callable[Concatenate[sa.Connection, float, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        return await self._database.write(lambda conn: operation(conn, self._clock(conn), *args, **kwargs))

    async def _read(
        self,
        operation: Callable[Concatenate[sa.Connection, float, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        return await self._database.read(lambda conn: operation(conn, self._clock(conn), *args, **kwargs))

    async def admit(
        self, ask: TurnAsk, *, owner: str, lease_s: float, replay_window_s: float, queue_limit: int
    ) -> Admission:
        """See `TurnLedger.admit`."""
        return await self._write(
            _admit,
            self._ids,
            ask,
            owner=owner,
            lease_s=lease_s,
            replay_window_s=replay_window_s,
            queue_limit=queue_limit,
        )

    async def position(self, claim: TurnClaim) -> int:
        """See `TurnLedger.position`."""
        return await self._database.read(lambda conn: _position(conn, claim))

    async def history(self, org_id: str, thread_id: str) -> tuple[ChatMessage, ...]:
        """See `TurnLedger.history`."""
        return await self._database.read(lambda conn: _history(conn, org_id, thread_id))

    async def record_call(self, call: CallRecord) -> None:
        """See `TurnLedger.record_call`."""
        await self._write(_record_call, call)

    async def finish_call(self, call: CallRecord, *, outcome: str, usage: Usage | None) -> None:
        """See `TurnLedger.finish_call`."""
        await self._write(_finish_call, call, outcome, usage)

    async def mark_visible(self, claim: TurnClaim) -> bool:
        """See `TurnLedger.mark_visible`."""
        return await self._write(_mark_visible, claim)

    async def beat(self, beats: Sequence[Heartbeat], *, lease_s: float) -> Mapping[TurnClaim, bool]:
        """See `TurnLedger.beat`."""
        return await self._write(_beat, beats, lease_s=lease_s)

    async def commit(self, claim: TurnClaim, answer: Answer) -> StoredTurn | None:
        """See `TurnLedger.commit`."""
        return await self._write(_commit, self._ids, claim, answer)

    async def end(
        self,
        claim: TurnClaim,
        state: TurnState,
        failure: Failure,
        *,
        partial: str,
        partial_seq: int,
        call_id: str | None,
    ) -> StoredTurn | None:
        """See `TurnLedger.end`."""
        if not state.final or state is TurnState.COMPLETED:
            raise ValueError(state)
        return await self._write(_end, self._ids, claim, _Ending(state, failure, partial, partial_seq, call_id))

    async def take_over(self, claim: TurnClaim, *, owner: str, lease_s: float) -> TurnClaim | None:
        """See `TurnLedger.take_over`."""
        return await self._write(_take_over, claim, owner, lease_s)

    async def release(self, claim: TurnClaim) -> None:
        """See `TurnLedger.release`."""
        await self._write(_release, claim)

    async def lapse(self, dead_owners: Sequence[str]) -> int:
        """See `TurnLedger.lapse`."""
        return await self._write(_lapse, dead_owners)

    async def sweep(self, *, dead_owners: Sequence[str] = (), lapsed_s: float = 0.0) -> int:
        """See `TurnLedger.sweep`."""
        return await self._write(_sweep, self._ids, dead_owners, lapsed_s)

    async def turn(self, org_id: str, thread_id: str, turn_id: str) -> StoredTurn:
        """See `TurnLedger.turn`."""
        return await self._read(_turn, org_id, thread_id, turn_id)

    async def active(self, org_id: str, thread_id: str) -> StoredTurn | None:
        """See `TurnLedger.active`."""
        return await self._read(_active, org_id, thread_id)
