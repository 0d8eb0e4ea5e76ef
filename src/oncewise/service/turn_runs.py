"""The work that brings one turn to its end, and all turns that this worker leads.

A run's first act is to ask the ledger, whose one transaction decides: the request replays a stored turn, follows one
that runs or waits, or leads a new one. Asking before joining a flight would not do: between the answer and the join the
turn may commit, and 6.9 % of simulated schedules then made a second call.

The run owns everything from there on: the place in the thread's queue, the lease, the call flight it shares, the log
that its viewers read, and the one transaction that stores the pair.

Who changes what: `TurnRun` its turn and log; `Runs` who leads which; the ledger everything that must survive.

Deliberately absent: requests, which turn one belongs to and how it is cancelled (`oncewise.service.turns`).
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from oncewise.core.coalesce import Coalescer, Flight, Waiter
from oncewise.core.prompt import normalise_roles
from oncewise.core.stream_hub import StreamHub, StreamLog
from oncewise.errors import (
    Failure,
    FlightCancelled,
    FlightFailed,
    LeaderLost,
    NotPersisted,
    OncewiseError,
    QueueTimeout,
    ShuttingDown,
    StorageFull,
    StorageUnavailable,
    TurnCancelled,
)
from oncewise.model import (
    Answer,
    ChatMessage,
    ChatRequest,
    Heartbeat,
    OnBusy,
    OnDisconnect,
    Role,
    StoredTurn,
    TurnAsk,
    TurnClaim,
    TurnState,
)
from oncewise.ports import Admission, Follow, Lead, Replay, TurnLedger
from oncewise.service.calls import CallResult, CallRun, Calls
from oncewise.service.fleet import Fleet
from oncewise.service.heartbeats import Heartbeats
from oncewise.service.remote_turns import RemoteTurn, RemoteTurns, turn_name
from oncewise.service.turn_outcomes import (
    RESET,
    Admitted,
    TurnResult,
    done_event,
    error_event,
    failure_of,
    show_stored,
)

__all__ = ["Runs", "TurnRules", "TurnRun"]

MAX_TURN_ATTEMPTS = 2
ABANDONED = "Nobody waited for the turn any more."
LOOK_S = 0.5
PROMPT_LOOK_S = 1.0
"""How long to wait for a word of another worker, without and with a quick way for words, before looking at the row."""

_OF_STORAGE = frozenset({NotPersisted.code, StorageUnavailable.code, StorageFull.code})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TurnRules:
    """Numbers that turns go by; see the settings of the same names."""

    replay_window_s: float = 30.0
    lease_s: float = 10.0
    queue_limit: int = 32
    queue_wait_s: float = 300.0
    commit_patience_s: float = 30.0
    poll_s: float = 0.1


class TurnRun:
    """The work of one turn flight.

    Attributes:
        admitted: Set, and announced, once the ledger has decided.
        leader_id: Request id of whoever started this run.
        log: The turn's log while this run leads it.
        viewed: Whose log shows the turn: this run's, or that of what it follows here or in another worker.
        place: Turns of the thread that come first, as of the last look.
        ended: Set when a led turn has come to its end here.
        name: What other workers call the turn while this run leads it.
        flight: The flight this is the work of, once it has begun.
    """

    def __init__(self, desk: "Runs", ask: TurnAsk, leader_id: str) -> None:
        self.ask = ask
        self.leader_id = leader_id
        self.admitted: Admitted | None = None
        self.log: StreamLog | None = None
        self.viewed: TurnRun | RemoteTurn = self
        self.ended = asyncio.Event()
        self.name = ""
        self.place = 0
        self.flight: Flight[TurnResult] | None = None
        self._desk = desk
        self._task: asyncio.Task[Any] | None = None
        self._claim: TurnClaim | None = None
        self._call: CallRun | None = None
        self._started_call = False
        self._stop: Failure | None = None
        self._keep_partial = True
        self._fenced = False
        self._ending = False
        self._watched = False
        self._wanted = asyncio.Event()
        self._visible = False
        self._showing = asyncio.Lock()
        self._started_s = 0.0
        self._queue_wait_s = 0.0
        self._leased_s = 0.0

    # -- admission -----------------------------------------------------------------------------------------------

    async def __call__(self, flight: Flight[TurnResult]) -> TurnResult:
        """Bring the request to its answer.

        Raises:
            OncewiseError: whatever ended the turn; it has been stored and told to the viewers before.
        """
        self.flight = flight
        self._task = asyncio.current_task()
        self._started_s = asyncio.get_running_loop().time()
        while True:
            match await self._admit():
                case Lead(claim, position):
                    return await self._lead(claim, position)
                case Replay(turn):
                    return self._replay(turn, Role.REPLAYED)
                case Follow(turn):
                    result = await self._follow(turn)
                    if result is not None:
                        return result

    async def _admit(self) -> Admission:
        rules = self._desk.rules
        self._leased_s = asyncio.get_running_loop().time()
        admitting = asyncio.ensure_future(
            self._desk.ledger.admit(
                self.ask,
                owner=self._desk.owner,
                lease_s=rules.lease_s,
                replay_window_s=rules.replay_window_s,
                queue_limit=rules.queue_limit,
            )
        )
        try:
            return await asyncio.shield(admitting)
        except asyncio.CancelledError:
            # The row may be in by now. Left open, it would hold up its thread until the lease lapses.
            admission = await admitting
            if isinstance(admission, Lead):
                failure = self._stop or FlightCancelled(ABANDONED).failure()
                await self._end(admission.claim, TurnState.CANCELLED, failure)
            raise

    def _announce(self, turn_id: str, role: Role, state: TurnState, epoch: int, position: int) -> None:
        ask = self.ask
        meta = self._desk.calls.lane(ask.provider).meta
        self.admitted = Admitted(turn_id, ask.thread_id, role, state, epoch, position, ask.provider, ask.model, meta)
        if self.flight is not None:
            self.flight.announce()

    def _replay(self, turn: StoredTurn, role: Role, first_delta_s: float | None = None) -> TurnResult:
        self._announce(turn.id, role, turn.state, turn.epoch, 0)
        if turn.state is not TurnState.COMPLETED:
            raise failure_of(turn).error()
        return TurnResult(turn, first_delta_s=first_delta_s)

    async def _follow(self, turn: StoredTurn) -> TurnResult | None:
        """The outcome of a turn that another flight leads; None if that is being ended: the ledger is asked anew."""
        run = self._desk.of(self.ask.org_id, turn.id)
        if run is None or run.flight is None:
            return await self._follow_remote(turn)
        waiter = run.board()
        if waiter is None:
            await run.ended.wait()
            return None
        self.viewed = run
        position = run.admitted.position if run.admitted else 0
        self._announce(turn.id, Role.FOLLOWER, turn.state, turn.epoch, position)
        try:
            with waiter:
                return await waiter.result()
        finally:
            if self._stop is not None and waiter.flight.waiters == 0:
                run.stop(self._stop)

    async def _follow_remote(self, turn: StoredTurn) -> TurnResult | None:
        """The outcome of a turn that another worker leads; takes it over if that worker is lost.

        None if nobody is to answer it any more but this run's requests: the ledger is asked anew.
        """
        self._announce(turn.id, Role.FOLLOWER, turn.state, turn.epoch, 0)
        taken: TurnClaim | None = None
        with self._desk.remotes.hold(turn) as remote:
            self.viewed = remote.turn
            try:
                while not turn.state.final and taken is None:
                    if self._desk.of(turn.org_id, turn.id) is not None:
                        return None
                    # The row may be locked by its owner's last transaction, until the database ends that.
                    taken = await self._patiently(partial(self._claim_lost, turn))
                    if taken is None:
                        turn = await self._patiently(remote.turn.news)
            finally:
                remote.withdrawn = self._stop is not None
        if taken is not None:
            return await self._take_over(taken, remote.turn)
        if turn.state is TurnState.CANCELLED and turn.failure_code == FlightCancelled.code:
            # Its leader knew of nobody who waits for it.
            return None
        return self._replay(turn, Role.FOLLOWER, first_delta_s=remote.turn.first_s)

    async def _claim_lost(self, turn: StoredTurn) -> TurnClaim | None:
        # At each attempt: one that had to wait for the database has a whole lease from when it got the turn.
        self._leased_s = asyncio.get_running_loop().time()
        return await self._desk.claim_lost(turn)

    async def _take_over(self, claim: TurnClaim, remote: RemoteTurn) -> TurnResult | None:
        # Read again: the lost owner may have shown something between our look at the row and its fencing.
        turn = await self._patiently(lambda: self._row(claim))
        if turn.visible or turn.attempt > MAX_TURN_ATTEMPTS:
            # Shown text is never replaced in silence, and a turn that kills its owners is not tried for ever.
            lost = LeaderLost().failure()
            await self._patiently(
                lambda: self._desk.ledger.end(
                    claim,
                    TurnState.INTERRUPTED,
                    lost,
                    partial=turn.partial,
                    partial_seq=turn.partial_seq,
                    call_id=turn.call_id,
                )
            )
            remote.look()
            raise lost.error()
        # It may have waited when its owner was lost, and the turns before it are still open.
        position = await self._patiently(lambda: self._desk.ledger.position(claim))
        if remote.epoch >= claim.epoch or (remote.log is not None and remote.log.epoch >= claim.epoch):
            # Somebody else has taken it over in the meantime, and may have been repeated here already.
            return None
        self.ask = turn.ask
        return await self._lead(claim, position, remote.take_log())

    # -- leading -------------------------------------------------------------------------------------------------

    async def _lead(self, claim: TurnClaim, position: int, log: StreamLog | None = None) -> TurnResult:
        """Lead the turn, in the log that its viewers here look at already if there is one."""
        self._claim, self.place = claim, position
        if log is None:
            log = self._desk.hub.open((claim.org_id, claim.turn_id), claim.epoch)
        else:
            self._watched = log.viewers > 0
            log.restart(claim.epoch, RESET, {"epoch": claim.epoch, "reason": "leader_lost"})
        self.log, self.viewed = log, self
        self._desk.enter(claim, self)
        role = Role.BYPASS if self.ask.force_new else Role.LEADER
        self._announce(claim.turn_id, role, TurnState.PENDING, claim.epoch, position)
        beat = asyncio.create_task(self._keep_lease(claim))
        try:
            return await self._answer(claim, position)
        except asyncio.CancelledError:
            return await self._stopped(claim)
        except OncewiseError as error:
            return await self._failed(claim, error.failure())
        except Exception as error:
            await self._failed(claim, FlightFailed().failure(), cause=error)
            raise
        finally:
            beat.cancel()
            if self.log is not None:
                # Ended long ago, unless the turn was handed back, or its row could not be read or is gone with its
                # thread: then its viewers end where they are, and are told when they resume.
                self.log.sever()
            self._desk.leave(claim)
            self.ended.set()

    async def _answer(self, claim: TurnClaim, position: int) -> TurnResult:
        if position > 0 and self.ask.on_busy in (OnBusy.INTERRUPT, OnBusy.ROLLBACK):
            await self._desk.make_way(claim, keep_partial=self.ask.on_busy is OnBusy.INTERRUPT)
        await self._wait_for_place(claim, position)
        history = await self._desk.ledger.history(claim.org_id, claim.thread_id)
        return await self._commit(claim, await self._called(claim, self._request(history)))

    async def _called(self, claim: TurnClaim, request: ChatRequest) -> CallResult:
        """The answer of the call; of another one if that is lost with its worker before anything of it was taken."""
        while True:
            waiter, call = self._desk.calls.join(claim.org_id, request, claim)
            with waiter:
                self._call = call
                self._started_call = waiter.role is Role.LEADER
                call.when_started(self._call_started)
                await self._copy(call)
                try:
                    return await waiter.result()
                except LeaderLost:
                    if self.log is None or self.log.deltas:
                        raise

    async def _wait_for_place(self, claim: TurnClaim, position: int) -> None:
        """Wait until the turns that came first have ended."""
        deadline_s = self._started_s + self._desk.rules.queue_wait_s
        while position > 0:
            left_s = deadline_s - asyncio.get_running_loop().time()
            if left_s <= 0:
                raise QueueTimeout("The turns before this one took too long.", retry_after_s=1.0)
            await self._desk.turn_ended(claim, left_s)
            position = self.place = await self._patiently(lambda: self._desk.ledger.position(claim))

    def _request(self, history: tuple[ChatMessage, ...]) -> ChatRequest:
        ask = self.ask
        messages = normalise_roles((*history, ChatMessage("user", ask.content)))
        return ChatRequest(ask.provider, ask.model, messages, ask.params)

    def _call_started(self) -> None:
        self._queue_wait_s = asyncio.get_running_loop().time() - self._started_s
        if self.flight is not None:
            self.flight.mark_running()
            self.flight.abandon_after(0.0 if self.ask.on_disconnect is OnDisconnect.CANCEL else None)

    async def _copy(self, call: CallRun) -> None:
        """Bring the call's text into the turn's log as it comes."""
        viewer = call.log.view()
        try:
            while not viewer.ended:
                await viewer.wait(3600.0)
                if call.holder is not None and not await self._may_take(call):
                    return
                text = viewer.take().decode()
                if text:
                    await self._publish(text)
        except asyncio.CancelledError:
            if self._stop is not None and self.log is not None and not self.log.deltas and call.log.deltas:
                # Held back until now; what has come of a cancelled turn is kept, if there is room.
                with suppress(OncewiseError):
                    self.log.append(call.log.text)
            raise
        finally:
            viewer.close()

    async def _may_take(self, call: CallRun) -> bool:
        """Whether a text may be taken that another worker tells and may not tell to its end.

        Not before somebody wants to see it, or the end has come: a turn that has none of it needs another call only.
        """
        if not self._watched:
            self._wanted.clear()
            call.flight.after(self._wanted.set)
            await self._wanted.wait()
        call.taken = call.taken or self._watched
        return not call.lost or (self.log is not None and self.log.deltas > 0)

    async def _publish(self, text: str) -> None:
        if self.log is None:
            return
        if self._watched and not self._visible:
            await self._show()
            await asyncio.sleep(0)  # where a fenced run ends
        if self.log.deltas == 0:
            self._tell_first_token()
        self.log.append(text)

    def _tell_first_token(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if self.log is not None:
            self.log.note(
                "meta",
                {"ttft_ms": round((now_s - self._started_s) * 1000), "queue_wait_ms": round(self.queue_wait_ms)},
            )

    def now(self) -> tuple[TurnState, int] | None:
        """The state of the turn and how many come first, for who is told now; None unless it is led here.

        What was announced at its admission may be long past.
        """
        if self.viewed is not self:
            return self.viewed.now()
        if self.log is None:
            return None
        comes = self.log.deltas or (self._call is not None and self._call.log.deltas)
        return (TurnState.STREAMING, 0) if comes else (TurnState.PENDING, self.queue_position)

    @property
    def queue_wait_ms(self) -> float:
        """Milliseconds from the start of the flight to the start of its call; 0.0 until then."""
        return self._queue_wait_s * 1000

    @property
    def queue_position(self) -> int:
        """What comes first, as it looks now: turns of its thread, and then calls to its provider."""
        if self._call is not None:
            return self._call.queue_position
        return self.place

    @property
    def queued_behind(self) -> int:
        """How many of them there were when it was admitted to that queue."""
        position = self.admitted.position if self.admitted is not None else 0
        return position or (self._call.queued_behind if self._call is not None else 0)

    @property
    def requesters(self) -> int:
        """How many requests wait for this turn."""
        return self.flight.waiters if self.flight is not None else 0

    @property
    def led_call(self) -> CallRun | None:
        """The call that this flight leads; None while there is none, or it shares that of another flight or worker."""
        return self._call if self._started_call and self._call is not None and self._call.holder is None else None

    @property
    def upstream_calls(self) -> int:
        """Requests this flight made to the provider; 0 while it shares the call of another."""
        return self.led_call.calls if self.led_call is not None else 0

    async def watch(self) -> StreamLog | None:
        """The log, for a viewer: from now on the turn is marked visible before a delta is shown."""
        self._watched = True
        self._wanted.set()
        if self.log is not None and self.log.deltas and not self._visible and not self.ended.is_set():
            await self._show()
            if not self._visible:
                # Fenced: what this run has was never shown to anybody. Its log ends with what the row says.
                await self.ended.wait()
        return self.log

    async def _show(self) -> None:
        async with self._showing:
            claim = self._claim
            if self._visible or claim is None:
                return
            self._visible = await self._patiently(lambda: self._desk.ledger.mark_visible(claim))
            if not self._visible and not self.ended.is_set():
                self._fence()

    # -- the lease -----------------------------------------------------------------------------------------------

    async def _keep_lease(self, claim: TurnClaim) -> None:
        await self._desk.heartbeats.keep(claim, self._leased_s, self._so_far)
        self._fence()

    def _so_far(self) -> tuple[str, int]:
        """The text, and how many deltas it came in."""
        return (self.log.text, self.log.deltas) if self.log is not None else ("", 0)

    def _fence(self) -> None:
        # Once, and not while the end is being written: a cancel there would leave it untold.
        if self._task is not None and not (self._fenced or self._ending):
            self._fenced = True
            self._task.cancel()

    # -- endings -------------------------------------------------------------------------------------------------

    @property
    def idx(self) -> int:
        """The turn's place in its thread; -1 before it is known."""
        return self._claim.idx if self._claim is not None else -1

    def board(self) -> Waiter[TurnResult] | None:
        """An interest in this run; None if it is being ended, so that nobody should join it."""
        return None if self.flight is None else self._desk.flights.follow_flight(self.flight)

    def stop(self, failure: Failure, *, keep_partial: bool = True) -> None:
        """End the turn with `failure` for everyone, unless it has ended; with or without the text so far."""
        if self._stop is None and not self.ended.is_set() and self.flight is not None:
            self._stop = failure
            self._keep_partial = keep_partial
            self._desk.flights.cancel(self.flight, failure)

    async def _commit(self, claim: TurnClaim, call: CallResult) -> TurnResult:
        completion = call.completion
        answer = Answer(
            text=call.text,
            finish_reason=completion.finish_reason,
            usage=call.usage,
            model=completion.model or self.ask.model,
            call_id=call.call_id,
            citations=completion.citations,
            shared=self.led_call is None,
            deltas=self.log.deltas if self.log is not None else 0,
            cost_usd=completion.cost_usd,
            meta=self._desk.calls.lane(self.ask.provider).meta,
        )
        # From here on the epoch alone decides: a lease that cannot be kept is no reason to give a whole answer up.
        self._ending = True
        stored = await self._patiently(lambda: self._desk.ledger.commit(claim, answer))
        if stored is None:
            return await self._settle(claim)
        self._close("done", done_event(stored))
        return TurnResult(
            stored,
            upstream_calls=self.upstream_calls,
            queue_wait_ms=self.queue_wait_ms,
            queued_behind=self.queued_behind,
            first_delta_s=call.first_delta_s,
        )

    async def _patiently(self, write: Callable[[], Awaitable[T]]) -> T:
        """Tell the ledger, or ask it, what cannot be done without; a database that is away may come back.

        Raises:
            NotPersisted: it did not.
        """
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + self._desk.rules.commit_patience_s
        wait_s = 0.05
        while True:
            try:
                return await write()
            except StorageUnavailable:
                if loop.time() + wait_s > give_up_s:
                    raise NotPersisted(retry_after_s=1.0) from None
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, 2.0)

    async def _failed(
        self, claim: TurnClaim, failure: Failure, state: TurnState = TurnState.FAILED, cause: Exception | None = None
    ) -> TurnResult:
        """End the turn in the ledger, then for the viewers, then for the requests."""
        self._ending = True
        try:
            if failure.code in _OF_STORAGE:
                stored = await self._end(claim, state, failure)
            else:
                stored = await self._patiently(lambda: self._end(claim, state, failure))
            if stored is None:
                return await self._settle(claim)
        except (StorageUnavailable, StorageFull, NotPersisted):
            # The row stays open and is swept when its lease has lapsed; who waits is told what happened.
            stored = None
        self._close_failed(stored, failure, state)
        raise failure.error() from cause

    async def _end(self, claim: TurnClaim, state: TurnState, failure: Failure) -> StoredTurn | None:
        text, seq = self._so_far()
        if not self._keep_partial:
            text = ""
        call_id = self._call.call_id if self._call is not None else None
        return await self._desk.ledger.end(claim, state, failure, partial=text, partial_seq=seq, call_id=call_id)

    def _close_failed(self, stored: StoredTurn | None, failure: Failure, state: TurnState) -> None:
        if state is TurnState.CANCELLED and stored is not None:
            self._close("done", done_event(stored))
        else:
            chars = len(self.log.text) if self.log is not None else 0
            self._close("error", error_event(failure, state, chars))

    async def _stopped(self, claim: TurnClaim) -> TurnResult:
        """The task was cancelled: fenced, stopped by a caller, left by everyone, or the server goes down."""
        if self._fenced:
            return await self._settle(claim)
        if self._desk.closing and self._stop is None:
            await self._hand_back(claim)
            raise ShuttingDown(retry_after_s=1.0)
        # Abandoned is not cancelled: somebody in another worker may wait, of whom nobody here knew.
        failure = self._stop or FlightCancelled(ABANDONED).failure()
        return await self._failed(claim, failure, TurnState.CANCELLED)

    async def _hand_back(self, claim: TurnClaim) -> None:
        """Let another process take the turn at once, and viewers resume there."""
        with suppress(StorageUnavailable, StorageFull):
            # What was shown since the last beat would be lost.
            await self._desk.heartbeats.beat(Heartbeat(claim, *self._so_far()))
            await self._desk.ledger.release(claim)

    async def _settle(self, claim: TurnClaim) -> TurnResult:
        """Serve what the row says: the turn is final, or another owner works on it under a later epoch."""
        turn = await self._patiently(lambda: self._row(claim))
        if turn.epoch == claim.epoch and not turn.state.final:
            # Nobody took it over: the database was away for longer than the lease.
            lost = LeaderLost().failure()
            await self._patiently(lambda: self._end(claim, TurnState.INTERRUPTED, lost))
            turn = await self._patiently(lambda: self._row(claim))
        while not turn.state.final:
            if self._desk.closing and self.flight is not None and self.flight.ending:
                # The fence and the shutdown came as one cancellation: no other will follow.
                raise ShuttingDown(retry_after_s=1.0)
            await asyncio.sleep(self._desk.rules.poll_s)
            turn = await self._patiently(lambda: self._row(claim))
        if self.log is not None:
            show_stored(self.log, turn)
        if turn.state is not TurnState.COMPLETED:
            raise failure_of(turn).error()
        return TurnResult(turn)

    async def _row(self, claim: TurnClaim) -> StoredTurn:
        return await self._desk.ledger.turn(claim.org_id, claim.thread_id, claim.turn_id)

    def _close(self, name: str, data: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.close(name, data)


class Runs:
    """The turns that this worker leads, and what their runs need of the world.

    Attributes:
        led: By tenant and turn.
        closing: Whether the server goes down: what ends now may be handed to another worker.
    """

    def __init__(
        self,
        *,
        ledger: TurnLedger,
        calls: Calls,
        flights: Coalescer,
        hub: StreamHub,
        fleet: Fleet,
        owner: str,
        rules: TurnRules,
    ) -> None:
        self.ledger = ledger
        self.calls = calls
        self.flights = flights
        self.hub = hub
        self.fleet = fleet
        self.owner = owner
        self.rules = rules
        self.closing = False
        self.heartbeats = Heartbeats(ledger, lease_s=rules.lease_s)
        self.remotes = RemoteTurns(owner=owner, ledger=ledger, hub=hub, fleet=fleet, ended=self._open_gates)
        self.led: dict[tuple[str, str], TurnRun] = {}
        self._gates: dict[tuple[str, str], dict[asyncio.Future[None], None]] = {}

    def of(self, org_id: str, turn_id: str) -> TurnRun | None:
        """The run that leads a turn in this process."""
        return self.led.get((org_id, turn_id))

    def of_thread(self, org_id: str, thread_id: str) -> list[TurnRun]:
        """The runs that lead the turns of a thread in this process."""
        return [run for (org, _), run in self.led.items() if org == org_id and run.ask.thread_id == thread_id]

    def enter(self, claim: TurnClaim, run: TurnRun) -> None:
        """A run leads a turn from now on."""
        self.led[claim.org_id, claim.turn_id] = run
        run.name = turn_name(self.fleet, claim.org_id, claim.turn_id)
        self.fleet.lead(run.name, run)

    async def make_way(self, claim: TurnClaim, *, keep_partial: bool) -> None:
        """Stop the turn that runs before the claimed one. Those that wait between them keep their places."""
        before = [run for run in self.of_thread(claim.org_id, claim.thread_id) if run.idx < claim.idx]
        first = await self.ledger.active(claim.org_id, claim.thread_id)
        if first is not None and first.idx < claim.idx and first.owner != self.owner:
            await self.stop_elsewhere(first, keep_partial=keep_partial)
        elif before:
            min(before, key=lambda run: run.idx).stop(TurnCancelled().failure(), keep_partial=keep_partial)

    def leave(self, claim: TurnClaim) -> None:
        """A run leads its turn no more; whoever waits behind it looks again."""
        run = self.led.pop((claim.org_id, claim.turn_id), None)
        if run is not None:
            self.fleet.ended(run.name, run)
        self._open_gates(claim.org_id, claim.thread_id)

    async def claim_lost(self, turn: StoredTurn) -> TurnClaim | None:
        """The right to work on a turn whose owner is lost; None if it is alive, or somebody else was quicker."""
        if not turn.lease_lapsed:
            return None
        claim = TurnClaim(turn.org_id, turn.thread_id, turn.id, turn.idx, turn.epoch)
        taken = await self.ledger.take_over(claim, owner=self.owner, lease_s=self.rules.lease_s)
        if taken is not None and turn.owner != self.owner:
            # Nor does it make the call any more that the turn was about.
            self.fleet.owners_lost(frozenset({turn.owner}))
        return taken

    async def stop_elsewhere(self, turn: StoredTurn, *, keep_partial: bool = True) -> None:
        """Ask the worker that leads a turn to stop it, and look again when it may have."""
        remote = self.remotes.look_at(turn)
        self.fleet.stop(turn_name(self.fleet, turn.org_id, turn.id), turn.owner, keep_partial=keep_partial)
        await remote.news()

    # -- waiting for a place ------------------------------------------------------------------------------------

    def _open_gates(self, org_id: str, thread_id: str) -> None:
        for gate in self._gates.pop((org_id, thread_id), ()):
            if not gate.done():
                gate.set_result(None)

    async def turn_ended(self, claim: TurnClaim, timeout_s: float) -> None:
        """Wait until some turn of the claim's thread may have ended, at most `timeout_s` seconds.

        Turns of this worker wake us, and those of another where it has a quick way to say so; else by looking.
        """
        first = await self.ledger.active(claim.org_id, claim.thread_id) if self.fleet.prompt else None
        if first is None or first.owner == self.owner:
            await self._gate(claim, min(timeout_s, LOOK_S))
        elif first.id != claim.turn_id:
            self.remotes.look_at(first)
            await self._gate(claim, min(timeout_s, PROMPT_LOOK_S))

    async def _gate(self, claim: TurnClaim, timeout_s: float) -> None:
        gate = asyncio.get_running_loop().create_future()
        gates = self._gates.setdefault((claim.org_id, claim.thread_id), {})
        gates[gate] = None
        try:
            async with asyncio.timeout(timeout_s):
                await gate
        except TimeoutError:
            return
        finally:
            # The dict itself goes when a turn of the thread leaves: the one that waits here does so in any case.
            gates.pop(gate, None)

    async def aclose(self) -> None:
        """Follow and keep nothing any more; no turn is led by now."""
        await self.remotes.aclose()
        await self.heartbeats.aclose()
