"""A database in memory: the rules of `oncewise.ports.TurnLedger` as plain records, fast enough for a million runs.

It stands where SQL stands in a server and passes the same contract suite. `Records` is the database, one for all
machines; each of its methods is one transaction, since nothing else runs meanwhile. What a machine holds is made by the
fleet, and has a network in between.

Deliberately absent: waiting, loss and time. The clock is passed in, and may be stepped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from oncewise.errors import Failure, HeadMoved, IdempotencyMismatch, LeaderLost, NotFound, QueueFull, ThreadBusy
from oncewise.model import (
    Answer,
    ChatMessage,
    FinishReason,
    Heartbeat,
    Message,
    MessageStatus,
    OnBusy,
    StoredTurn,
    TurnAsk,
    TurnClaim,
    TurnState,
)
from oncewise.ports import Admission, CallRecord, Follow, Lead, Replay

__all__ = ["Records", "StoredThread"]

KEY_LIFE_S = 24 * 60 * 60.0


@dataclass
class StoredThread:
    """A thread with everything in it."""

    org_id: str
    id: str
    turns: list[StoredTurn] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)


class Records:
    """Turns, messages and calls.

    Attributes:
        calls: Every provider call that was recorded, in order.
        asked_by: Who asked for the transaction that runs.
    """

    def __init__(self, now_s: Callable[[], float]) -> None:
        self.threads: dict[tuple[str, str], StoredThread] = {}
        self.calls: list[CallRecord] = []
        self.asked_by = ""
        self._now_s = now_s
        self._leases: dict[str, float] = {}
        self._keys: dict[str, str] = {}
        self._parents: dict[str, str | None] = {}
        self._places: dict[str, tuple[StoredThread, int]] = {}
        self._ids = count(1)

    def make_thread(self, org_id: str, thread_id: str) -> StoredThread:
        """An empty thread."""
        made = self.threads[org_id, thread_id] = StoredThread(org_id, thread_id)
        return made

    # -- admission -----------------------------------------------------------------------------------------------

    def admit(self, ask: TurnAsk, *, owner: str, lease_s: float, replay_window_s: float, queue_limit: int) -> Admission:
        """See `TurnLedger.admit`."""
        found = self.find(ask, replay_window_s)
        return found if found is not None else self.insert(ask, owner, lease_s, queue_limit)

    def find(self, ask: TurnAsk, replay_window_s: float) -> Replay | Follow | None:
        """The turn that a request belongs to, if there is one."""
        turn = self._belongs_to(self._thread(ask.org_id, ask.thread_id), ask, replay_window_s)
        if turn is None:
            return None
        turn = self._read(turn)
        return Replay(turn) if turn.state.final else Follow(turn)

    def insert(self, ask: TurnAsk, owner: str, lease_s: float, queue_limit: int) -> Lead:
        """A new turn."""
        thread = self._thread(ask.org_id, ask.thread_id)
        waiting = sum(not turn.state.final for turn in thread.turns)
        if waiting and ask.on_busy is OnBusy.REJECT:
            raise ThreadBusy
        if waiting > queue_limit:
            raise QueueFull
        return Lead(self._insert(thread, ask, owner, lease_s), waiting)

    def _insert(self, thread: StoredThread, ask: TurnAsk, owner: str, lease_s: float) -> TurnClaim:
        now_s, turn_id, idx = self._now_s(), f"t{next(self._ids)}", len(thread.turns)
        thread.turns.append(
            StoredTurn(
                turn_id,
                ask.org_id,
                ask.thread_id,
                idx,
                TurnState.PENDING,
                epoch=1,
                attempt=1,
                owner=owner,
                fingerprint=ask.fingerprint,
                ask=ask,
                created_at_ms=_ms(now_s),
            )
        )
        self._places[turn_id] = (thread, idx)
        self._leases[turn_id] = now_s + lease_s
        if ask.idempotency_key is not None:
            self._keys[turn_id] = ask.idempotency_key
        return TurnClaim(ask.org_id, ask.thread_id, turn_id, idx, 1)

    def _belongs_to(self, thread: StoredThread, ask: TurnAsk, window_s: float) -> StoredTurn | None:
        if ask.idempotency_key is not None:
            return self._under_key(thread, ask)
        if ask.parent_message_id is not None:
            return self._after_parent(thread, ask)
        if ask.force_new:
            return None
        for turn in thread.turns:
            if not turn.state.final and turn.fingerprint == ask.fingerprint:
                return turn
        completed = [turn for turn in thread.turns if turn.state is TurnState.COMPLETED][-1:]
        since_ms = _ms(self._now_s() - window_s)
        same = [
            turn for turn in completed if turn.fingerprint == ask.fingerprint and (turn.done_at_ms or 0) >= since_ms
        ]
        return same[0] if same else None

    def _under_key(self, thread: StoredThread, ask: TurnAsk) -> StoredTurn | None:
        for turn in thread.turns:
            if self._keys.get(turn.id) != ask.idempotency_key:
                continue
            if turn.created_at_ms <= _ms(self._now_s() - KEY_LIFE_S):
                del self._keys[turn.id]
            elif turn.fingerprint != ask.fingerprint:
                raise IdempotencyMismatch
            else:
                return turn
        return None

    def _after_parent(self, thread: StoredThread, ask: TurnAsk) -> StoredTurn | None:
        for turn in thread.turns:
            same = turn.ask.parent_message_id == ask.parent_message_id and turn.fingerprint == ask.fingerprint
            if same and (not turn.state.final or turn.state is TurnState.COMPLETED):
                return turn
        if [message.id for message in thread.messages[-1:]] != [ask.parent_message_id]:
            raise HeadMoved
        return None

    # -- under a claim -------------------------------------------------------------------------------------------

    def position(self, claim: TurnClaim) -> int:
        """See `TurnLedger.position`."""
        thread = self.threads.get((claim.org_id, claim.thread_id))
        if thread is None or not any(turn.id == claim.turn_id for turn in thread.turns):
            raise NotFound
        return sum(not turn.state.final for turn in thread.turns[: claim.idx])

    def mark_visible(self, claim: TurnClaim) -> bool:
        """See `TurnLedger.mark_visible`."""
        turn = self._claimed(claim)
        if turn is not None:
            self._put(replace(turn, visible=True, state=TurnState.STREAMING))
        return turn is not None

    def beat(self, beats: Sequence[Heartbeat], *, lease_s: float) -> Mapping[TurnClaim, bool]:
        """See `TurnLedger.beat`."""
        return {beat.claim: self._beaten(beat, lease_s) for beat in beats}

    def _beaten(self, beat: Heartbeat, lease_s: float) -> bool:
        turn = self._claimed(beat.claim)
        if turn is not None:
            self._leases[turn.id] = self._now_s() + lease_s
            self._put(replace(turn, partial=beat.partial, partial_seq=beat.partial_seq))
        return turn is not None

    def commit(self, claim: TurnClaim, answer: Answer) -> StoredTurn | None:
        """See `TurnLedger.commit`."""
        turn = self._claimed(claim)
        return None if turn is None else self._read(self._put(self._completed(turn, answer)))

    def _completed(self, turn: StoredTurn, answer: Answer) -> StoredTurn:
        final = replace(
            turn,
            state=TurnState.COMPLETED,
            done_at_ms=_ms(self._now_s()),
            partial="",
            partial_seq=answer.deltas,
            finish_reason=answer.finish_reason,
            call_id=answer.call_id,
            shared=answer.shared,
        )
        model = (turn.ask.provider, answer.model)
        return self._with_pair(final, answer.text, MessageStatus.COMPLETE, model, answer)

    def end(
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
        turn = self._claimed(claim)
        return None if turn is None else self._end(turn, state, failure, partial, partial_seq, call_id)

    def _end(
        self,
        turn: StoredTurn,
        state: TurnState,
        failure: Failure,
        partial: str,
        partial_seq: int,
        call_id: str | None,
    ) -> StoredTurn:
        final = replace(
            turn,
            state=state,
            done_at_ms=_ms(self._now_s()),
            partial="",
            partial_seq=partial_seq,
            finish_reason=FinishReason.CANCELLED if state is TurnState.CANCELLED else None,
            call_id=call_id,
            failure_code=failure.code,
            failure_detail=failure.detail,
            failure_retryable=failure.retryable,
        )
        if failure.retryable:
            self._keys.pop(turn.id, None)
        if partial:
            final = self._with_pair(final, partial, MessageStatus.PARTIAL, (turn.ask.provider, turn.ask.model))
        return self._read(self._put(final))

    def take_over(self, claim: TurnClaim, *, owner: str, lease_s: float) -> TurnClaim | None:
        """See `TurnLedger.take_over`."""
        turn = self._claimed(claim)
        if turn is None or self._leases[turn.id] > self._now_s():
            return None
        self._leases[turn.id] = self._now_s() + lease_s
        self._put(replace(turn, epoch=turn.epoch + 1, attempt=turn.attempt + 1, owner=owner))
        return replace(claim, epoch=turn.epoch + 1)

    def release(self, claim: TurnClaim) -> None:
        """See `TurnLedger.release`."""
        if self._claimed(claim) is not None:
            self._leases[claim.turn_id] = self._now_s()

    def lapse(self, dead_owners: Sequence[str]) -> int:
        """See `TurnLedger.lapse`."""
        now_s = self._now_s()
        turns = [turn for thread in self.threads.values() for turn in thread.turns if not turn.state.final]
        held = [turn for turn in turns if turn.owner in dead_owners and self._leases[turn.id] > now_s]
        self._leases |= {turn.id: now_s for turn in held}
        return len(held)

    def sweep(self, *, dead_owners: Sequence[str] = (), lapsed_s: float = 0.0) -> int:
        """See `TurnLedger.sweep`."""
        now_s = self._now_s() - lapsed_s
        lost = [
            turn
            for thread in self.threads.values()
            for turn in thread.turns
            if not turn.state.final and (self._leases[turn.id] <= now_s or turn.owner in dead_owners)
        ]
        for turn in lost:
            later = replace(turn, epoch=turn.epoch + 1)
            failure = LeaderLost().failure()
            self._end(later, TurnState.INTERRUPTED, failure, turn.partial, turn.partial_seq, turn.call_id)
        return len(lost)

    # -- calls and reading ---------------------------------------------------------------------------------------

    def record_call(self, call: CallRecord) -> None:
        """See `TurnLedger.record_call`."""
        self.calls.append(call)

    def finish_call(self, call: CallRecord, *, outcome: str, usage: object) -> None:
        """See `TurnLedger.finish_call`."""

    def history(self, org_id: str, thread_id: str) -> tuple[ChatMessage, ...]:
        """See `TurnLedger.history`."""
        thread = self.threads.get((org_id, thread_id))
        if thread is None:
            return ()
        completed = {turn.id for turn in thread.turns if turn.state is TurnState.COMPLETED}
        return tuple(
            ChatMessage(message.role, message.content) for message in thread.messages if message.turn_id in completed
        )

    def turn(self, org_id: str, thread_id: str, turn_id: str) -> StoredTurn:
        """See `TurnLedger.turn`."""
        thread = self._thread(org_id, thread_id)
        for turn in thread.turns:
            if turn.id == turn_id:
                return self._read(turn)
        raise NotFound

    def active(self, org_id: str, thread_id: str) -> StoredTurn | None:
        """See `TurnLedger.active`."""
        for turn in self._thread(org_id, thread_id).turns:
            if not turn.state.final:
                return self._read(turn)
        return None

    # -- records -------------------------------------------------------------------------------------------------

    def _thread(self, org_id: str, thread_id: str) -> StoredThread:
        thread = self.threads.get((org_id, thread_id))
        if thread is None:
            raise NotFound
        return thread

    def _claimed(self, claim: TurnClaim) -> StoredTurn | None:
        thread = self.threads.get((claim.org_id, claim.thread_id))
        if thread is None or claim.idx >= len(thread.turns):
            return None
        turn = thread.turns[claim.idx]
        if turn.id != claim.turn_id or turn.state.final:
            return None
        return turn if turn.epoch == claim.epoch else None

    def _put(self, turn: StoredTurn) -> StoredTurn:
        thread, idx = self._places[turn.id]
        thread.turns[idx] = turn
        return turn

    def _read(self, turn: StoredTurn) -> StoredTurn:
        now_s = self._now_s()
        if turn.done_at_ms is not None:
            return replace(turn, age_s=max(0.0, now_s - turn.done_at_ms / 1000))
        return replace(turn, lease_lapsed=self._leases[turn.id] <= now_s)

    def _with_pair(
        self,
        turn: StoredTurn,
        text: str,
        status: MessageStatus,
        model: tuple[str, str],
        answer: Answer | None = None,
    ) -> StoredTurn:
        thread, _ = self._places[turn.id]
        sequence, now_ms = len(thread.messages), _ms(self._now_s())
        user = Message(
            f"m{next(self._ids)}",
            "user",
            turn.ask.content,
            sequence,
            MessageStatus.COMPLETE,
            turn.id,
            turn.created_at_ms,
        )
        assistant = Message(
            f"m{next(self._ids)}",
            "assistant",
            text,
            sequence + 1,
            status,
            turn.id,
            now_ms,
            *model,
            citations=answer.citations if answer else None,
            usage=answer.usage if answer else None,
            meta=answer.meta if answer else {},
        )
        thread.messages += [user, assistant]
        return replace(turn, user_message=user, assistant_message=assistant, usage=assistant.usage)


def _ms(time_s: float) -> int:
    return int(time_s * 1000)
