"""What the core and the use cases ask of the world.

Each port states atomicity, lifetime and what failure leaves behind.

One contract suite per port lives in `tests/contract` and runs on every implementation.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from oncewise.errors import Failure
from oncewise.model import (
    Answer,
    ApiKey,
    AuditEntry,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    FinishReason,
    KeyRole,
    RequestRecord,
    StoredTurn,
    Thread,
    ThreadPage,
    TurnAsk,
    TurnClaim,
    TurnState,
    Usage,
)

__all__ = [
    "Admission",
    "CallRecord",
    "Chunk",
    "Clock",
    "Completion",
    "Follow",
    "KeyStore",
    "Lead",
    "Listener",
    "PriceTable",
    "Provider",
    "ProviderEvent",
    "Replay",
    "RequestLog",
    "StartLimiter",
    "TextDelta",
    "ThreadStore",
    "TurnLedger",
]


class Clock(Protocol):
    """Where times come from."""

    def monotonic_s(self) -> float:
        """Seconds that never run backwards; only differences mean anything."""
        ...

    def now_ms(self) -> int:
        """Milliseconds since the Unix epoch, for what people read. No rule depends on it."""
        ...


# -- providers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the answer's text; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """The verified end of a good answer; the last event, and there is exactly one.

    Attributes:
        usage: The provider's own figures; None if it sent none.
        model: The model the provider says it used; None if it did not say.
    """

    finish_reason: FinishReason
    usage: Usage | None = None
    model: str | None = None
    citations: tuple[object, ...] | None = None
    cost_usd: float | None = None


ProviderEvent = TextDelta | Completion

Chunk = dict[str, Any]
"""A JSON object of the shape of OpenAI's `chat.completion.chunk`."""


class Provider(Protocol):
    """One configured provider. Lives as long as the process; owned and closed by the composition root."""

    @property
    def name(self) -> str:
        """The configured name, e.g. `perplexity`."""
        ...

    def stream(self, request: ChatRequest) -> AsyncGenerator[ProviderEvent, None]:
        """Make one call and yield its text as it comes, then one `Completion`.

        Makes exactly one request to the provider: no retries inside. Closing the generator closes the connection,
        within a second. Whatever does not end in a verified completion raises; what was yielded before stays valid
        as a partial answer.

        Raises:
            ProviderError: refused, or failed; `retryable` tells which. Nothing further is sent.
            ProviderRateLimited: refused for its rate limit, with `retry_after_s` if the provider said so.
            ProviderUnavailable: failed, and said when to come again: `retry_after_s`.
            ProviderProtocolError: the answer was broken, empty or incomplete.
            ProviderTimeout: no connection, first token or next token in time.
        """
        ...

    def chunks(self, request: CompletionRequest) -> AsyncGenerator[Chunk, None]:
        """Make one call and yield all that the provider says, as it says it: fields nobody here knows included.

        Verified as `stream` is, but for whole completions: every choice that begins gets a finish reason, and an answer
        without text is one if it calls tools or says why it has none. `usage` is in one of the last chunks, if the
        provider gives it. A finish reason that the provider left out by its custom is put in a chunk of its own.

        Raises:
            OncewiseError: as `stream`; `InvalidRequest` if the request cannot be said to this provider.
        """
        ...

    async def aclose(self) -> None:
        """Close pooled connections. Calls that still run fail."""
        ...


class PriceTable(Protocol):
    """Public prices of models, as they came with the installed version: nobody is ever asked for newer ones."""

    def lists(self, provider: str) -> bool:
        """Whether there may be prices of a configured provider's models. Loads nothing."""
        ...

    async def load(self) -> None:
        """Get the prices ready, once, without holding up the event loop. Again does nothing."""
        ...

    def usd(self, provider: str, model: str, usage: Usage) -> float | None:
        """What a call of now costs in US dollars; None if the model's price is not known. Loaded before."""
        ...


class StartLimiter(Protocol):
    """Decides when the next call to one provider may start, for everybody who shares the limiter."""

    async def reserve(self) -> float:
        """Book the next free start; return the seconds until it (0.0 = now).

        Atomic: no two reservations are closer than the rate allows. A start that is not used must be given back or
        is lost; losing one costs time, never correctness.
        """
        ...

    async def give_back(self) -> None:
        """Return the reservation made last, if no later one was made."""
        ...


# -- turns -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Replay:
    """The request is answered by a turn that is already final (completed, or failed for good under its key)."""

    turn: StoredTurn


@dataclass(frozen=True, slots=True)
class Follow:
    """The request belongs to a turn that is running or queued."""

    turn: StoredTurn


@dataclass(frozen=True, slots=True)
class Lead:
    """The request has a new turn, inserted and claimed for its owner.

    Attributes:
        position: Turns of the thread that come before it; 0 means it may run at once.
    """

    claim: TurnClaim
    position: int


Admission = Replay | Follow | Lead


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One request to a provider, written before it is made: money may be spent from here on."""

    call_id: str
    attempt: int
    org_id: str
    turn_id: str | None
    epoch: int
    provider: str
    model: str


class TurnLedger(Protocol):
    """Turns and their messages: one row decides who works on a turn and whether its answer counts.

    Every method is one short transaction; nothing is awaited inside one. Final states are final. Lease times are
    judged by the database's clock only. Each method that takes a `TurnClaim` changes rows only where the turn still
    carries the claim's epoch and is not final, so a fenced owner can change nothing.

    All methods raise `StorageUnavailable` when the database does not answer and `StorageFull` when it has no space;
    the transaction then left nothing behind.
    """

    async def admit(
        self, ask: TurnAsk, *, owner: str, lease_s: float, replay_window_s: float, queue_limit: int
    ) -> Admission:
        """Decide which turn a request belongs to, and claim a new one if it is none. Atomic.

        Rules, in order:

        1. A known `idempotency_key` of this thread, younger than 24 h: same fingerprint → follow, or replay if
           final; other fingerprint → `IdempotencyMismatch`. An unknown one → a new turn.
        2. `parent_message_id`: a turn of this thread with the same parent and fingerprint that is not failed,
           interrupted or cancelled → follow or replay; else, if the parent is the thread's last message → a new
           turn; else → `HeadMoved`.
        3. `force_new` → a new turn. Neither key nor parent: a turn with the same fingerprint that is running or
           queued → follow the first of them; else, if the latest completed turn has the same fingerprint and was
           committed at most `replay_window_s` ago → replay; else → a new turn.

        `force_new` with a key or parent still obeys rules 1 and 2. A new turn takes the next place (`idx`) in its
        thread. It is inserted `pending` with epoch 1 and a lease of `lease_s`.

        Raises:
            NotFound: the thread does not exist for this tenant.
            IdempotencyMismatch, HeadMoved: see the rules.
            ThreadBusy: `on_busy` is `reject` and another turn runs or waits; `turn_id` names the first of them.
            QueueFull: `queue_limit` turns already wait behind the running one.
        """
        ...

    async def position(self, claim: TurnClaim) -> int:
        """How many turns of the thread that are not final come before the claimed one.

        Raises:
            NotFound: the turn is gone with its thread.
        """
        ...

    async def history(self, org_id: str, thread_id: str) -> tuple[ChatMessage, ...]:
        """The messages of all completed turns, in order: what a prompt begins with. Partial pairs are left out."""
        ...

    async def record_call(self, call: CallRecord) -> None:
        """Write that a provider call is about to be made."""
        ...

    async def finish_call(self, call: CallRecord, *, outcome: str, usage: Usage | None) -> None:
        """Write how a recorded call ended: `ok` or an error code."""
        ...

    async def mark_visible(self, claim: TurnClaim) -> bool:
        """Set the turn `streaming` before its first delta leaves the process; False if the claim is fenced."""
        ...

    async def beat(self, claim: TurnClaim, *, lease_s: float, partial: str, partial_seq: int) -> bool:
        """Extend the lease and store the text so far; False if the claim is fenced."""
        ...

    async def commit(self, claim: TurnClaim, answer: Answer) -> StoredTurn | None:
        """Store the pair and complete the turn, in one transaction.

        Returns the turn as it is now stored, byte for byte what any later read returns; None if the claim is
        fenced, in which case nothing was written.
        """
        ...

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
        """End the turn as failed, cancelled or interrupted; None if the claim is fenced.

        With a `partial` the pair is stored, the assistant message `partial`; without, no message is. A retryable
        failure releases the turn's idempotency key.
        """
        ...

    async def take_over(self, claim: TurnClaim, *, owner: str, lease_s: float) -> TurnClaim | None:
        """Claim a turn whose lease has lapsed, under the next epoch; None if it is alive, final or taken."""
        ...

    async def release(self, claim: TurnClaim) -> None:
        """Let the lease lapse now, so that another owner may take over at once."""
        ...

    async def sweep(self, *, dead_owners: Sequence[str] = ()) -> int:
        """End turns whose lease has lapsed, or whose owner is named dead, as `interrupted` with their partial.

        Their epoch grows, as on a takeover: a viewer may have been shown more than the partial.

        Returns how many turns were ended.
        """
        ...

    async def turn(self, org_id: str, thread_id: str, turn_id: str) -> StoredTurn:
        """Read one turn.

        Raises:
            NotFound: no such turn for this tenant and thread.
        """
        ...

    async def active(self, org_id: str, thread_id: str) -> StoredTurn | None:
        """The first turn of the thread that is not final, or None.

        Raises:
            NotFound: the thread does not exist for this tenant.
        """
        ...


class ThreadStore(Protocol):
    """Threads and what is read of them. Atomicity, errors and tenancy as in `TurnLedger`."""

    async def create(self, org_id: str, *, title: str | None, description: str | None, user_id: str | None) -> Thread:
        """Make an empty thread; the tenant is created at first use."""
        ...

    async def get(self, org_id: str, thread_id: str) -> Thread:
        """One thread with all its messages in sequence order.

        Raises:
            NotFound: the thread does not exist for this tenant.
        """
        ...

    async def list(self, org_id: str, *, limit: int, cursor: str | None) -> ThreadPage:
        """Threads of a tenant, newest first. A cursor is opaque and stays valid.

        Raises:
            InvalidRequest: the cursor is not one of ours.
        """
        ...

    async def update(self, org_id: str, thread_id: str, changes: dict[str, str | bool | None]) -> Thread:
        """Change title, description or pinned; return the thread with its messages.

        Raises:
            NotFound: the thread does not exist for this tenant.
        """
        ...

    async def delete(self, org_id: str, thread_id: str) -> None:
        """Delete a thread with its turns and messages.

        Raises:
            NotFound: the thread does not exist for this tenant.
        """
        ...

    async def audit(self, org_id: str, thread_id: str) -> tuple[AuditEntry, ...]:
        """One entry per stored turn, oldest first.

        Raises:
            NotFound: the thread does not exist for this tenant.
        """
        ...

    async def restore(self, org_id: str, messages: Sequence[ChatMessage], *, title: str | None) -> Thread:
        """Make a thread from exported messages, all or nothing. Roles must alternate, user first.

        Raises:
            InvalidRequest: the roles do not alternate or are unknown; nothing was stored.
        """
        ...


class RequestLog(Protocol):
    """Finished requests, for figures. Losing the last moments of it in a crash is acceptable."""

    async def record(self, records: Sequence[RequestRecord]) -> None:
        """Append; one transaction for all."""
        ...

    async def last(self, n: int, org_id: str | None = None) -> tuple[RequestRecord, ...]:
        """The last n finished requests of one tenant, or of all, latest first."""
        ...


class KeyStore(Protocol):
    """API keys. A key is never deleted: one that was revoked still tells that this server is not open."""

    async def create(self, role: KeyRole, org_id: str | None, *, prefix: str, secret_hash: str) -> ApiKey:
        """Store a new key; the tenant of a tenant key is created at first use."""
        ...

    async def list(self) -> tuple[ApiKey, ...]:
        """All keys, the revoked ones too, oldest first."""
        ...

    async def revoke(self, key_id: str) -> ApiKey:
        """End a key for ever. Of a key that is revoked already the first time stands.

        Raises:
            NotFound: there is no such key.
        """
        ...

    async def counts(self) -> tuple[int, int]:
        """How many keys were ever made, and how many of them revoked. Neither falls, so they tell every change."""
        ...


Listener = Callable[[object], None]
"""Takes an event value. Must not block and must not raise."""
