"""Frozen value objects that all layers share. No behaviour beyond what a value knows of itself.

Times are integers of milliseconds since the Unix epoch (`_ms`) where they are stored or sent, and floats of seconds
(`_s`) where they are durations.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

__all__ = [
    "Answer",
    "ApiKey",
    "AuditEntry",
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "CostBasis",
    "FinishReason",
    "KeyRole",
    "Message",
    "MessageStatus",
    "OnBusy",
    "OnDisconnect",
    "Params",
    "RequestRecord",
    "Role",
    "Scope",
    "StoredTurn",
    "Thread",
    "ThreadPage",
    "TurnAsk",
    "TurnClaim",
    "TurnState",
    "Usage",
]


class Role(StrEnum):
    """What a request was to the work that answered it."""

    LEADER = "leader"
    FOLLOWER = "follower"
    REPLAYED = "replayed"
    BYPASS = "bypass"


class TurnState(StrEnum):
    """Where a turn is. The last four are final: a turn leaves none of them."""

    PENDING = "pending"
    STREAMING = "streaming"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"

    @property
    def final(self) -> bool:
        """Whether nothing more can happen to the turn."""
        return self not in (TurnState.PENDING, TurnState.STREAMING)


class FinishReason(StrEnum):
    """Why a provider stopped, in the words of the wire."""

    STOP = "stop"
    LENGTH = "length"
    CONTENT_FILTER = "content_filter"
    TOOL_CALLS = "tool_calls"
    CANCELLED = "cancelled"


class MessageStatus(StrEnum):
    """Whether a stored message is whole."""

    COMPLETE = "complete"
    PARTIAL = "partial"


class Scope(StrEnum):
    """Who may share the provider call of a request."""

    PRIVATE = "private"
    SHARED = "shared"


class OnBusy(StrEnum):
    """What a different message does while a turn of its thread runs."""

    ENQUEUE = "enqueue"
    REJECT = "reject"
    INTERRUPT = "interrupt"
    ROLLBACK = "rollback"


class OnDisconnect(StrEnum):
    """What becomes of a running turn that all callers have left."""

    CONTINUE = "continue"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call. `estimated` where the provider gave no figures.

    Attributes:
        cached_tokens: Of the prompt, those read from the provider's cache; they have a price of their own. Neither they
            nor `cache_write_tokens` are stored, since what they cost is known by then.
        cache_write_tokens: Of the prompt, those written to it.
    """

    prompt_tokens: int
    completion_tokens: int
    estimated: bool = False
    cached_tokens: int = field(default=0, compare=False)
    cache_write_tokens: int = field(default=0, compare=False)

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Params:
    """Sampling parameters; None leaves the choice to the provider."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def given(self) -> dict[str, Any]:
        """The parameters that were set, in the names of the wire; `stop` as a list."""
        values: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None:
                values[name] = list(value) if isinstance(value, tuple) else value
        return values


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a prompt."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What a provider is asked, after roles are normalised. Equal requests may share one call."""

    provider: str
    model: str
    messages: tuple[ChatMessage, ...]
    params: Params = Params()


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """What a provider is asked through the OpenAI-compatible API.

    Attributes:
        body: A chat completion request as the caller wrote it, unknown fields included, but without `model`, `stream`
            and `stream_options`, which are ours to say. JSON values that nobody changes.
    """

    provider: str
    model: str
    body: Mapping[str, Any]

    @property
    def choices(self) -> int:
        """How many answers are asked for; 1 where `n` is no number."""
        n = self.body.get("n")
        return n if type(n) is int else 1


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer of a provider.

    Attributes:
        model: The model the provider says it used.
        citations: What the provider cites, as it sent them; None if it sends none.
        call_id: The call that produced it.
        shared: Whether another turn led that call.
        deltas: How many deltas the text came in; the id of the stream's terminal event follows from it.
        meta: What the stored answer says of itself, e.g. that the demo provider gave it.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage
    model: str
    call_id: str
    citations: tuple[Any, ...] | None = None
    shared: bool = False
    deltas: int = 0
    cost_usd: float | None = None
    meta: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Message:
    """A stored message. `sequence` counts from 0 within its thread, without gaps."""

    id: str
    role: str
    content: str
    sequence: int
    status: MessageStatus
    turn_id: str | None
    created_at_ms: int
    provider: str | None = None
    model: str | None = None
    citations: tuple[Any, ...] | None = None
    usage: Usage | None = None
    meta: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Thread:
    """A conversation. `messages` is filled only where one thread is read."""

    id: str
    org_id: str
    created_at_ms: int
    updated_at_ms: int
    title: str | None = None
    description: str | None = None
    user_id: str | None = None
    pinned: bool = False
    last_provider: str | None = None
    last_model: str | None = None
    last_message_preview: str | None = None
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class ThreadPage:
    """Some threads, newest first, and where the next page starts."""

    items: tuple[Thread, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One stored turn as the audit shows it; tokens are the turn's, `shared` tells that another turn led the call."""

    turn_id: str
    provider: str
    model: str
    reason: str | None
    user_id: str | None
    scope: Scope
    package_hash: str
    response_hash: str
    usage: Usage
    call_id: str
    shared: bool
    created_at_ms: int


@dataclass(frozen=True, slots=True)
class TurnAsk:
    """One request for a turn, as it is admitted to the ledger.

    Attributes:
        fingerprint: Hex SHA-256 over role, content, provider, model, params, scope and system prompt.
        force_new: The sender wants a turn of its own (`x-coalesce: off`, `Cache-Control: no-cache`).
    """

    org_id: str
    thread_id: str
    content: str
    provider: str
    model: str
    fingerprint: str
    params: Params = Params()
    scope: Scope = Scope.PRIVATE
    reason: str | None = None
    user_id: str | None = None
    idempotency_key: str | None = None
    parent_message_id: str | None = None
    force_new: bool = False
    on_busy: OnBusy = OnBusy.ENQUEUE
    on_disconnect: OnDisconnect = OnDisconnect.CONTINUE


@dataclass(frozen=True, slots=True)
class TurnClaim:
    """The right to work on a turn: valid while the turn's row carries this epoch and is not final."""

    org_id: str
    thread_id: str
    turn_id: str
    idx: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """That whoever has a claim still works on the turn, and how far it is.

    Attributes:
        partial, partial_seq: The text so far, and how many deltas it came in.
    """

    claim: TurnClaim
    partial: str
    partial_seq: int


@dataclass(frozen=True, slots=True)
class StoredTurn:
    """A turn as the ledger holds it.

    Attributes:
        idx: Place in the thread, in order of arrival.
        partial: Text stored by heartbeats of a turn that is not final.
        partial_seq: Deltas in `partial`; of a final turn, deltas in the whole answer.
        user_message: Set once the pair is stored; so is `assistant_message`.
        failure_code: Why it is failed, cancelled or interrupted; with `failure_detail` and `failure_retryable`.
        age_s: Seconds since `done_at_ms` by the database's clock; 0.0 for a turn that is not final.
        cost_usd: What the provider said that its call cost; None if it did not say.
    """

    id: str
    org_id: str
    thread_id: str
    idx: int
    state: TurnState
    epoch: int
    attempt: int
    owner: str
    fingerprint: str
    ask: TurnAsk
    created_at_ms: int
    visible: bool = False
    lease_lapsed: bool = False
    partial: str = ""
    partial_seq: int = 0
    finish_reason: FinishReason | None = None
    call_id: str | None = None
    shared: bool = False
    done_at_ms: int | None = None
    age_s: float = 0.0
    failure_code: str | None = None
    failure_detail: str | None = None
    failure_retryable: bool = False
    user_message: Message | None = None
    assistant_message: Message | None = None
    usage: Usage | None = None
    cost_usd: float | None = None


class CostBasis(StrEnum):
    """What a cost rests on, from the surest."""

    PROVIDER = "provider"
    """The provider said it."""
    PRICES = "prices"
    """The provider's tokens, at a known price."""
    ESTIMATED = "estimated"
    """Tokens that were estimated, at a known price."""
    UNKNOWN = "unknown"
    """Nobody knows a price; the cost counts as 0."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One finished logical request, for accounting. Never holds message text.

    Attributes:
        surface: `threads` or `v1`.
        upstream_calls: Provider calls this request led, retries included; 0 for whoever shared or replayed.
        tokens_saved: Tokens that would have been paid for, had the request made a call of its own.
        error_code: None for a success.
        leader_id: Request id of the request that led the turn (`threads`) or the call (`v1`), its own if it did; None
            for a replay, which has its turn's id instead.
        cost_basis: What `cost_usd` or `cost_saved_usd` rests on; None where there is neither.
        usage_estimated: Whether the tokens are our estimate; None where there are none.
    """

    request_id: str
    org_id: str
    surface: str
    role: Role
    stream: bool
    provider: str
    model: str
    finished_at_ms: int
    latency_ms: float
    ttft_ms: float | None = None
    queue_wait_ms: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    upstream_calls: int = 0
    tokens_saved: int = 0
    cost_usd: float = 0.0
    cost_saved_usd: float = 0.0
    error_code: str | None = None
    turn_id: str | None = None
    call_id: str | None = None
    leader_id: str | None = None
    cost_basis: CostBasis | None = None
    usage_estimated: bool | None = None


class KeyRole(StrEnum):
    """What an API key may do: speak for one tenant, do everything for every tenant, or read the figures of all."""

    TENANT = "tenant"
    ADMIN = "admin"
    METRICS = "metrics"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key without its secret.

    Attributes:
        org_id: The tenant of a tenant key; None for the other roles.
        prefix: How the secret begins, `ow_` and eight characters; public, so that people can tell keys apart.
        secret_hash: SHA-256 of the whole secret, in hexadecimal. 256 random bits need no slow hash: nobody can try
            them all.
        revoked_at_ms: None while the key is valid.
    """

    id: str
    role: KeyRole
    org_id: str | None
    prefix: str
    secret_hash: str = field(repr=False)
    created_at_ms: int
    revoked_at_ms: int | None = None
