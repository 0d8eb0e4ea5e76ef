"""Between rows and values: what a stored turn, message or thread says, in both directions.

Deliberately absent: SQL.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa

from oncewise.model import (
    FinishReason,
    Message,
    MessageStatus,
    OnBusy,
    OnDisconnect,
    Params,
    Scope,
    StoredTurn,
    Thread,
    TurnAsk,
    TurnState,
    Usage,
)

__all__ = ["ask_columns", "ask_of", "message_of", "thread_of", "to_ms", "turn_of", "usage_columns", "usage_of"]

Row = sa.Row[Any]


def to_ms(time_s: float) -> int:
    """Seconds of the database's clock as the milliseconds that are stored."""
    return round(time_s * 1000)


def ask_columns(ask: TurnAsk) -> dict[str, Any]:
    """The columns of a turn that say what was asked; `ask` is the whole, so that another process can take over."""
    return {
        "org_id": ask.org_id,
        "thread_id": ask.thread_id,
        "fingerprint": ask.fingerprint,
        "idempotency_key": ask.idempotency_key,
        "parent_message_id": ask.parent_message_id,
        "ask": json.dumps(asdict(ask), ensure_ascii=False, separators=(",", ":")),
    }


def ask_of(stored: str) -> TurnAsk:
    """The ask that `ask_columns` wrote."""
    fields: dict[str, Any] = json.loads(stored)
    params = fields["params"]
    if params["stop"] is not None:
        params["stop"] = tuple(params["stop"])
    fields["params"] = Params(**params)
    fields["scope"] = Scope(fields["scope"])
    fields["on_busy"] = OnBusy(fields["on_busy"])
    fields["on_disconnect"] = OnDisconnect(fields["on_disconnect"])
    return TurnAsk(**fields)


def usage_columns(usage: Usage | None) -> dict[str, Any]:
    """Tokens as three columns; all null for None."""
    if usage is None:
        return {"prompt_tokens": None, "completion_tokens": None, "usage_estimated": None}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "usage_estimated": usage.estimated,
    }


def usage_of(row: Row) -> Usage | None:
    """The tokens of a row of messages or attempts; None where nobody counted."""
    if row.prompt_tokens is None:
        return None
    return Usage(row.prompt_tokens, row.completion_tokens, estimated=row.usage_estimated)


def message_of(row: Row) -> Message:
    """A row of messages."""
    # Read-only: one message object answers many requests.
    meta: Mapping[str, Any] = MappingProxyType(json.loads(row.meta))
    return Message(
        id=row.id,
        role=row.role,
        content=row.content,
        sequence=row.sequence,
        status=MessageStatus(row.status),
        turn_id=row.turn_id,
        created_at_ms=row.created_at_ms,
        provider=row.provider,
        model=row.model,
        citations=None if row.citations is None else tuple(json.loads(row.citations)),
        usage=usage_of(row),
        meta=meta,
    )


def thread_of(row: Row, messages: Sequence[Message] = ()) -> Thread:
    """A row of threads, with the messages that were read beside it."""
    return Thread(
        id=row.id,
        org_id=row.org_id,
        created_at_ms=row.created_at_ms,
        updated_at_ms=row.updated_at_ms,
        title=row.title,
        description=row.description,
        user_id=row.user_id,
        pinned=row.pinned,
        last_provider=row.last_provider,
        last_model=row.last_model,
        last_message_preview=row.last_message_preview,
        messages=tuple(messages),
    )


def turn_of(row: Row, pair: Sequence[Message], *, now_s: float) -> StoredTurn:
    """A row of turns at time `now_s`; `pair` is its user and assistant message, or empty where none are stored."""
    user, assistant = pair or (None, None)
    done = row.done_at_ms is not None
    return StoredTurn(
        id=row.id,
        org_id=row.org_id,
        thread_id=row.thread_id,
        idx=row.idx,
        state=TurnState(row.state),
        epoch=row.epoch,
        attempt=row.attempt,
        owner=row.owner,
        fingerprint=row.fingerprint,
        ask=ask_of(row.ask),
        created_at_ms=row.created_at_ms,
        visible=row.visible,
        lease_lapsed=not done and row.lease_until_s <= now_s,
        partial=row.partial,
        partial_seq=row.partial_seq,
        finish_reason=FinishReason(row.finish_reason) if row.finish_reason else None,
        call_id=row.call_id,
        shared=row.shared,
        done_at_ms=row.done_at_ms,
        age_s=max(0.0, now_s - row.done_at_ms / 1000) if done else 0.0,
        failure_code=row.failure_code,
        failure_detail=row.failure_detail,
        failure_retryable=row.failure_retryable,
        user_message=user,
        assistant_message=assistant,
        usage=assistant.usage if assistant else None,
        cost_usd=row.cost_usd,
    )
