"""What the core and the use cases ask of the world.

Each port states atomicity, lifetime and what failure leaves behind.

One contract suite per port lives in `tests/contract` and runs on every implementation.
"""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

from oncewise.errors import Failure
from oncewise.model import (
    Answer,
    ApiKey,
    AuditEntry,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    FinishReason,
    Heartbeat,
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
    "AtHand",
    "CallRecord",
    "CallSlots",
    "Chunk",
    "Claims",
    "Clock",
    "Completion",
    "Coordination",
    "CoordinationChanged",
    "CoordinationLate",
    "Follow",
    "KeyStore",
    "Lead",
    "Listener",
    "LogEntry",
    "LogTail",
    "PriceTable",
    "Provider",
    "ProviderEvent",
    "Relay",
    "Replay",
    "RequestLog",
    "SharedLimiter",
    "Signal",
    "Signals",
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

    async def beat(self, beats: Sequence[Heartbeat], *, lease_s: float) -> Mapping[TurnClaim, bool]:
        """Extend the leases of some turns and store their texts so far, in one transaction that waits for no row.

        Returns for each claim whether it holds still. Missing are those whose row somebody is changing at the moment:
        nothing is known of them, and their lease is as it was.
        """
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

    async def lapse(self, dead_owners: Sequence[str]) -> int:
        """Let the leases of these owners' open turns lapse now, so that others may take them over at once.

        Returns how many leases that were.
        """
        ...

    async def sweep(self, *, dead_owners: Sequence[str] = (), lapsed_s: float = 0.0) -> int:
        """End turns that nobody works on as `interrupted` with their partial.

        Those are turns whose lease lapsed at least `lapsed_s` seconds ago, time for a follower to take them over, and
        turns whose owner is named dead.

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


# -- between workers ---------------------------------------------------------------------------------------------
#
# SQL decides; these ports only save work and carry what may be lost. Every method raises `CoordinationUnavailable` when
# the other side does not answer within a quarter of a second, and at once while it is known to be away. A caller that
# is cancelled gives up only the result: what it asked for is still done, or not. Names are made of keyed digests and
# tell nothing of tenants, ids or text.


class LogTail(NamedTuple):
    """Where a relayed log ends: the attempt that wrote it, and the position of its last event. Tails order by both."""

    epoch: int
    seq: int


@dataclass(frozen=True, slots=True)
class LogEntry:
    """Events of a log that follow each other, as its owner tells them to other workers.

    Attributes:
        epoch: The attempt that wrote them.
        after: How many deltas of this epoch come before them.
        texts: The deltas.
        notes: `(deltas before it, name, data)` of each note; a note goes with the delta or the end that follows it.
        end: Name and data of the terminal event; None while the log is open.
    """

    epoch: int
    after: int
    texts: tuple[str, ...] = ()
    notes: tuple[tuple[int, str, Mapping[str, Any]], ...] = ()
    end: tuple[str, Mapping[str, Any]] | None = None

    @property
    def tail(self) -> LogTail:
        """Where a log ends that ends with this."""
        return LogTail(self.epoch, self.after + len(self.texts) + (self.end is not None))


class Relay(Protocol):
    """Logs that one worker writes and others read."""

    async def append(self, name: str, entry: LogEntry, *, keep_s: float) -> LogTail:
        """Add the next events of a log; return where it ends now.

        Atomic: the entry is added if it begins exactly where the log ends, or if it begins a higher epoch than the
        log's, and else nothing is. So a repeated entry adds nothing, a fenced owner's is refused, and one that would
        leave a gap is too. What the caller needs to know is in the answer: the entry's own tail if it is there, from
        this or an earlier attempt; a tail of a higher epoch if another owner writes; any other is where to go on from.
        An entry without events only asks.

        The log lives for `keep_s` seconds after its last entry, and may be lost before.

        Raises:
            CoordinationUnavailable: nobody knows whether it was added; the same entry may be sent again.
        """
        ...

    def read(self, name: str, take: Callable[[LogEntry], None], after: LogTail = LogTail(0, 0)) -> Callable[[], None]:  # noqa: B008
        """Hand every entry beyond `after` to `take`, in order and as it comes, until the returned function is called.

        Never raises and never ends by itself: while the other side is away nothing comes, and afterwards all that is
        new. Of a log that was lost and written again, entries may overlap with what was taken before. `take` is called
        from a task of the relay's; it must not block, and whatever it raises is dropped.
        """
        ...


@dataclass(frozen=True, slots=True)
class Signal:
    """A word from one worker to others.

    Attributes:
        kind: What it is about.
        name: Which shared work, or which request, it is about.
        sender: Address of the worker that sent it.
        data: JSON values; never message text.
    """

    kind: str
    name: str = ""
    sender: str = ""
    data: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


class Signals(Protocol):
    """Words between workers. Lives as long as the process; what is heard is handled as it comes.

    A signal is heard by workers that listen, or begin to within a minute under the same address. It may be lost with
    the other side and may be heard twice: whoever hears one does nothing that may not be done again.
    """

    @property
    def address(self) -> str:
        """Where this worker is reached; the owner that it writes into its turns."""
        ...

    @property
    def prompt(self) -> bool:
        """Whether a signal sent now would be heard in milliseconds, as far as this worker knows."""
        ...

    async def send(self, signal: Signal, to: str | None = None) -> None:
        """Tell one worker, or all others if `to` is None. Returns when it is on its way, not when it was heard.

        Raises:
            CoordinationUnavailable: it may or may not be heard.
        """
        ...

    async def others(self) -> int:
        """How many other workers were alive a few seconds ago.

        Raises:
            CoordinationUnavailable: nobody knows.
        """
        ...

    def listen(self, hear: Callable[[Signal], None]) -> None:
        """Call `hear` with every signal to this worker or to all, except its own. It must not block."""
        ...


class Claims(Protocol):
    """Names that one worker at a time holds: who makes a call that several were asked for.

    A claim saves a call and guards nothing. One that lapsed early, or was lost, costs a second call.
    """

    async def claim(self, name: str, holder: str, *, lease_s: float) -> str:
        """Hold a name for `lease_s` seconds unless somebody does; return who holds it now. Atomic."""
        ...

    async def extend(self, name: str, holder: str, *, lease_s: float) -> bool:
        """Hold it for `lease_s` seconds from now on; False if it is somebody else's or nobody's."""
        ...

    async def release(self, name: str, holder: str) -> None:
        """Hold it no more; somebody else's claim stays."""
        ...


class SharedLimiter(StartLimiter, Protocol):
    """A limiter of all workers. Its time is the server's; a state that is lost lets at most one burst start early."""

    async def pause(self, for_s: float) -> None:
        """Let no start be booked within the next seconds, by any worker. Never shortens a pause."""
        ...


class CallSlots(Protocol):
    """How many calls to one provider may run at a time, over all who share the limit.

    A slot is held until it is given back, or until some seconds after the process that holds it has died.
    """

    async def take(self) -> None:
        """Wait for a free slot and take it. A wait that is cancelled or raises has taken none.

        Raises:
            CoordinationUnavailable: nobody knows how many run.
        """
        ...

    def give_back(self) -> None:
        """Give one of this process's slots back. Returns at once; should it be lost, the slot lapses."""
        ...


@runtime_checkable
class AtHand(Protocol):
    """What a `StartLimiter` or `CallSlots` may offer besides: an answer without waiting for anybody."""

    def take_now(self) -> bool:
        """Book a start for this moment, or take a slot, if one is free; False if not, or if others must be asked."""
        ...


@dataclass(frozen=True, slots=True)
class CoordinationChanged:
    """What lies between the workers went away, or answers again; an event for listeners.

    Attributes:
        reason: Why it is away, in one word of the driver's or the server's; empty if it answers.
    """

    up: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class CoordinationLate:
    """What lies between the workers takes longer than it should, and may prove to be away; an event for listeners."""


class Coordination(Protocol):
    """All that workers share beside the database, in one place. Owned and closed by the composition root."""

    @property
    def relay(self) -> Relay: ...

    @property
    def signals(self) -> Signals: ...

    @property
    def claims(self) -> Claims: ...

    def limiter(self, provider: str, *, rate: float, burst: int) -> SharedLimiter:
        """The limiter of one provider; `rate` and `burst` as in `oncewise.core.pacing.Gcra`."""
        ...

    def slots(self, provider: str, *, limit: int) -> CallSlots:
        """The slots of one provider."""
        ...

    async def check(self) -> str | None:
        """What is wrong, in one sentence for people; None if all answers."""
        ...

    async def aclose(self) -> None:
        """Stop reading and listening, and leave nothing of this worker behind that would not lapse by itself."""
        ...


Listener = Callable[[object], None]
"""Takes an event value. Must not block and must not raise."""
