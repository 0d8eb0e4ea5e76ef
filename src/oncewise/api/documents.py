"""The answers as OpenAPI describes them. Routes send bytes of their own; these models only tell what is in them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

__all__ = [
    "Audit",
    "Health",
    "KeyCreated",
    "KeyList",
    "MessageOut",
    "Performance",
    "Problem",
    "Readiness",
    "ThreadCreated",
    "ThreadList",
    "ThreadOut",
    "TurnAnswer",
    "TurnOut",
    "Withdrawn",
]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Place(_Answer):
    """Where a request is wrong, and why."""

    loc: list[str | int]
    msg: str


class Problem(_Answer):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    retryable: bool
    request_id: str
    errors: list[Place] | None = None
    turn_id: str | None = None


class Usage(_Answer):
    """Tokens; `estimated` where the provider gave no figures."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    estimated: bool


class MessageOut(_Answer):
    """A stored message."""

    id: str
    role: Literal["user", "assistant", "system"]
    content: str
    sequence: int
    status: Literal["complete", "partial"]
    turn_id: str | None
    created_at: str
    meta: dict[str, Any]
    provider: str | None = None
    model: str | None = None
    citations: list[Any] | None = None
    usage: Usage | None = None


class TurnAnswer(_Answer):
    """A message and its answer."""

    turn_id: str
    thread_id: str
    user_message: MessageOut
    assistant_message: MessageOut
    usage: Usage


class ThreadCreated(_Answer):
    """A new thread."""

    thread_id: str
    title: str | None
    created_at: str


class ThreadItem(_Answer):
    """A thread in a list."""

    id: str
    title: str | None
    last_message_preview: str | None
    last_provider: str | None
    last_model: str | None
    created_at: str
    updated_at: str
    pinned: bool


class ThreadList(_Answer):
    """A page of threads."""

    items: list[ThreadItem]
    next_cursor: str | None


class ThreadOut(_Answer):
    """A thread with its messages."""

    id: str
    org_id: str
    title: str | None
    description: str | None
    user_id: str | None
    last_provider: str | None
    last_model: str | None
    created_at: str
    updated_at: str
    pinned: bool
    messages: list[MessageOut]


class AuditItem(_Answer):
    """One stored turn."""

    turn_id: str
    provider: str
    model: str
    reason: str | None
    user_id: str | None
    scope: Literal["private", "shared"]
    package_hash: str
    response_hash: str
    tokens: Usage
    call_id: str
    shared: bool
    created_at: str


class Audit(_Answer):
    """What the audit knows of a thread."""

    items: list[AuditItem]


class TurnError(_Answer):
    """Why a turn is not completed."""

    code: str
    message: str | None
    retryable: bool


class TurnOut(_Answer):
    """A turn."""

    id: str
    thread_id: str
    state: Literal["pending", "streaming", "completed", "failed", "cancelled", "interrupted"]
    text: str
    last_event_id: str | None
    viewers: int
    requesters: int
    leader: str
    epoch: int
    attempt: int
    call_id: str | None
    shared: bool
    provider: str
    model: str
    reason: str | None
    error: TurnError | None
    created_at: str
    done_at: str | None
    duration_ms: int | None
    usage: Usage | None


class Withdrawn(_Answer):
    """A request that was cancelled, or had ended before it could be."""

    request_id: str
    state: Literal["cancelled", "ended"]


class KeyItem(_Answer):
    """An API key without its secret; `prefix` is how the secret begins."""

    id: str
    role: Literal["tenant", "admin", "metrics"]
    org_id: str | None
    prefix: str
    created_at: str
    revoked_at: str | None


class KeyCreated(KeyItem):
    """A new API key with its secret, which is never shown again."""

    key: str


class KeyList(_Answer):
    """All API keys."""

    items: list[KeyItem]


class Health(_Answer):
    """The process answers."""

    status: Literal["ok"]


class Readiness(_Answer):
    """What requests depend on, and how it is."""

    status: Literal["ok", "degraded", "unavailable"]
    checks: dict[str, str]


class Performance(BaseModel):
    """Figures over finished requests."""

    total_requests: int
    ttft: dict[str, float | bool | None]
    latency: dict[str, float | bool | None]
    queue_wait_ms: dict[str, float | bool | None]
    tokens: dict[str, float]
    errors: dict[str, float | bool]
    streaming: dict[str, float]
    coalesce: dict[str, int]
    upstream: dict[str, float]
