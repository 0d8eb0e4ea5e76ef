"""Values of the model as the JSON documents of the HTTP contract.

One function per document: the same message is the same bytes in an answer, in its thread and in an export.

Deliberately absent: headers and status codes.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import orjson

from oncewise.core.stream_hub import Position
from oncewise.model import ApiKey, AuditEntry, Message, StoredTurn, Thread, ThreadPage, Usage

__all__ = [
    "audit_json",
    "created_json",
    "dump",
    "key_json",
    "keys_json",
    "message_json",
    "page_json",
    "terminal_position",
    "thread_json",
    "turn_answer",
    "turn_json",
    "turn_text",
    "usage_json",
]


def dump(value: Any) -> bytes:
    """A JSON document in UTF-8."""
    return orjson.dumps(value)


def _time(at_ms: int) -> str:
    # ISO 8601 in UTC with three decimals, always: a time of a whole second must not look different.
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def usage_json(usage: Usage | None) -> dict[str, Any] | None:
    """Tokens of a turn."""
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "estimated": usage.estimated,
    }


def message_json(message: Message) -> dict[str, Any]:
    """A stored message; what it does not have is left out."""
    optional = {
        "provider": message.provider,
        "model": message.model,
        "citations": list(message.citations) if message.citations is not None else None,
        "usage": usage_json(message.usage),
    }
    return {
        "id": message.id,
        "role": message.role,
        "content": message.content,
        "sequence": message.sequence,
        "status": message.status.value,
        "turn_id": message.turn_id,
        "created_at": _time(message.created_at_ms),
        "meta": dict(message.meta),
        **{name: value for name, value in optional.items() if value is not None},
    }


def turn_answer(turn: StoredTurn) -> bytes:
    """The answer to a message: what `POST /api/threads/{id}/messages` sends."""
    user, assistant = turn.user_message, turn.assistant_message
    return dump(
        {
            "turn_id": turn.id,
            "thread_id": turn.thread_id,
            "user_message": message_json(user) if user else None,
            "assistant_message": message_json(assistant) if assistant else None,
            "usage": usage_json(turn.usage),
        }
    )


def turn_text(turn: StoredTurn) -> str:
    """The text of a turn as far as its row holds it."""
    return turn.assistant_message.content if turn.assistant_message else turn.partial


def terminal_position(turn: StoredTurn) -> Position:
    """Where the terminal event of a final turn stands in its stream."""
    return Position(turn.epoch, turn.partial_seq + 1)


def turn_json(turn: StoredTurn, *, text: str, position: Position, viewers: int, requesters: int) -> Mapping[str, Any]:
    """A turn and who is interested in it now."""
    done_ms = turn.done_at_ms
    return {
        "id": turn.id,
        "thread_id": turn.thread_id,
        "state": turn.state.value,
        "text": text,
        "last_event_id": str(position) if position.seq else None,
        "viewers": viewers,
        "requesters": requesters,
        "leader": turn.owner,
        "epoch": turn.epoch,
        "attempt": turn.attempt,
        "call_id": turn.call_id,
        "shared": turn.shared,
        "provider": turn.ask.provider,
        "model": turn.ask.model,
        "reason": turn.finish_reason.value if turn.finish_reason else None,
        "error": {"code": turn.failure_code, "message": turn.failure_detail, "retryable": turn.failure_retryable}
        if turn.failure_code
        else None,
        "created_at": _time(turn.created_at_ms),
        "done_at": None if done_ms is None else _time(done_ms),
        "duration_ms": None if done_ms is None else done_ms - turn.created_at_ms,
        "usage": usage_json(turn.usage),
    }


def thread_json(thread: Thread) -> dict[str, Any]:
    """A thread with its messages."""
    return {
        "id": thread.id,
        "org_id": thread.org_id,
        "title": thread.title,
        "description": thread.description,
        "user_id": thread.user_id,
        "last_provider": thread.last_provider,
        "last_model": thread.last_model,
        "created_at": _time(thread.created_at_ms),
        "updated_at": _time(thread.updated_at_ms),
        "pinned": thread.pinned,
        "messages": [message_json(message) for message in thread.messages],
    }


def created_json(thread: Thread) -> dict[str, Any]:
    """A thread that was just made."""
    return {"thread_id": thread.id, "title": thread.title, "created_at": _time(thread.created_at_ms)}


def page_json(page: ThreadPage) -> dict[str, Any]:
    """Some threads, without their messages."""
    items = [
        {
            "id": thread.id,
            "title": thread.title,
            "last_message_preview": thread.last_message_preview,
            "last_provider": thread.last_provider,
            "last_model": thread.last_model,
            "created_at": _time(thread.created_at_ms),
            "updated_at": _time(thread.updated_at_ms),
            "pinned": thread.pinned,
        }
        for thread in page.items
    ]
    return {"items": items, "next_cursor": page.next_cursor}


def audit_json(entries: tuple[AuditEntry, ...]) -> dict[str, Any]:
    """What the audit knows of a thread's turns."""
    items = [
        {
            "turn_id": entry.turn_id,
            "provider": entry.provider,
            "model": entry.model,
            "reason": entry.reason,
            "user_id": entry.user_id,
            "scope": entry.scope.value,
            "package_hash": entry.package_hash,
            "response_hash": entry.response_hash,
            "tokens": usage_json(entry.usage),
            "call_id": entry.call_id,
            "shared": entry.shared,
            "created_at": _time(entry.created_at_ms),
        }
        for entry in entries
    ]
    return {"items": items}


def key_json(key: ApiKey) -> dict[str, Any]:
    """An API key as everybody may see it who may see keys."""
    return {
        "id": key.id,
        "role": key.role.value,
        "org_id": key.org_id,
        "prefix": key.prefix,
        "created_at": _time(key.created_at_ms),
        "revoked_at": None if key.revoked_at_ms is None else _time(key.revoked_at_ms),
    }


def keys_json(keys: tuple[ApiKey, ...]) -> dict[str, Any]:
    """All API keys."""
    return {"items": [key_json(key) for key in keys]}
