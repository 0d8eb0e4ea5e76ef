"""Turns: which turn a request belongs to, and what it may ask of it.

Requests with the same identity (tenant, thread, and idempotency key, parent or fingerprint) are one *turn flight*,
whose work is a `TurnRun`. Requests only wait: each holds a `TurnTicket`, and leaves or is withdrawn without harm to the
others.

Who changes what: `Turns` which requests wait; the runs their turns.

Deliberately absent: HTTP, SQL, how a provider is called, and who may use which thread (the ledger answers for tenants).
"""

import asyncio
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from oncewise.core.coalesce import Coalescer, Waiter
from oncewise.core.keys import RequestKey, request_key
from oncewise.core.stream_hub import StreamHub, StreamLog, Viewer
from oncewise.errors import (
    FlightFailed,
    ShuttingDown,
    TurnCancelled,
    UnknownProvider,
)
from oncewise.model import (
    Role,
    StoredTurn,
    TurnAsk,
    TurnClaim,
    TurnState,
)
from oncewise.ports import Signal, TurnLedger
from oncewise.service.accounts import Bill, Share
from oncewise.service.calls import Calls
from oncewise.service.fleet import Fleet
from oncewise.service.turn_outcomes import (
    Admitted,
    TurnResult,
)
from oncewise.service.turn_runs import Runs, TurnRules, TurnRun

__all__ = ["TurnTicket", "Turns"]

ENDED_REQUESTS = 10_000
"""Requests whose end is remembered, so that a late or repeated cancel is told apart from one that names nobody."""


class TurnTicket:
    """One request's interest in its turn. Use it in a `with` block: leaving the block gives the interest up.

    Attributes:
        request_id: What the sender calls the request; `Turns.cancel_request` takes it.
        viewer: Set by whoever streams, so that a withdrawal wakes it.
        withdrawn: Whether the request was cancelled by its id.
        accounted: See `oncewise.service.accounts.Ticket`.
    """

    __slots__ = ("_desk", "_waiter", "accounted", "ask", "request_id", "run", "viewer", "withdrawn")

    surface = "threads"

    def __init__(self, desk: "Turns", waiter: Waiter[TurnResult], ask: TurnAsk, request_id: str) -> None:
        run = waiter.flight.work
        assert isinstance(run, TurnRun)  # noqa: S101  only `Turns.send` puts work into these flights
        self.ask = ask
        self.request_id = request_id
        self.run = run
        self.viewer: Viewer | None = None
        self.withdrawn = False
        self.accounted = False
        self._desk = desk
        self._waiter = waiter

    @property
    def org_id(self) -> str:
        """The tenant of the request."""
        return self.ask.org_id

    async def admitted(self) -> Admitted:
        """What is known of the turn; waits until the ledger has decided.

        Raises:
            OncewiseError: the request was not admitted.
        """
        await self._waiter.announced()
        admitted = self.run.admitted
        if admitted is None:
            await self._waiter.result()
            raise FlightFailed
        return admitted

    def role(self) -> Role:
        """What this request is to its turn: the first of a led turn leads, the others follow."""
        admitted = self.run.admitted
        if admitted is None:
            return self._waiter.role
        if admitted.role in (Role.LEADER, Role.BYPASS) and self._waiter.role is not Role.LEADER:
            return Role.FOLLOWER
        return admitted.role

    async def result(self) -> TurnResult:
        """The completed turn.

        Raises:
            OncewiseError: how the turn ended, or `TurnCancelled` if this request was withdrawn.
        """
        return await self._waiter.result()

    async def watch(self) -> StreamLog | None:
        """The log of the turn, for streaming; None if it runs in another process or is only stored."""
        return await self.run.viewed.watch()

    def when_over(self, tell: Callable[[], None]) -> None:
        """Call `tell` once the turn and the call it led have ended if this request led the turn, else at once."""
        if self._waiter.role is Role.LEADER:
            self._waiter.flight.after(lambda: self._after_call(tell))
        else:
            tell()

    def _after_call(self, tell: Callable[[], None]) -> None:
        # It may go on without its turn, for the turns of other threads that share it.
        call = self.run.led_call
        if call is None:
            tell()
        else:
            call.flight.after(tell)

    def share(self, result: TurnResult | None) -> Share:
        """What this request had of its turn."""
        run, ask, role, admitted = self.run, self.ask, self.role(), self.run.admitted
        leads = role in (Role.LEADER, Role.BYPASS)
        call = run.led_call if leads else None
        bill = call.bill if call is not None else None if result is None else _bill_of(result.stored)
        shown = None if result is None else result.stored.call_id
        return Share(
            role=role,
            provider=ask.provider,
            model=ask.model,
            bill=bill,
            pays=call is not None,
            calls=0 if call is None else call.calls,
            first_s=None if result is None else result.first_delta_s,
            queue_wait_ms=run.queue_wait_ms if leads else 0.0,
            leader_id=None if role is Role.REPLAYED else run.viewed.leader_id,
            turn_id=None if admitted is None else admitted.turn_id,
            call_id=shown if call is None else call.call_id,
        )

    def withdraw(self) -> None:
        """Cancel this request: it ends as cancelled, and the turn with it if no other request is interested."""
        self.withdrawn = True
        flight = self._waiter.flight
        self._waiter.withdraw(TurnCancelled().failure())
        if self.viewer is not None:
            self.viewer.close()
        if flight.waiters == 0:
            self.run.stop(TurnCancelled().failure())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiter.leave()
        self._desk.forget(self)


def _bill_of(turn: StoredTurn) -> Bill:
    message = turn.assistant_message
    said = None if message is None else message.model
    return Bill(turn.ask.provider, turn.ask.model, turn.usage, turn.cost_usd, said)


class Turns:
    """All turns that this process knows of: requests join theirs here, and cancel it.

    Attributes:
        runs: Those that it leads.
    """

    def __init__(
        self,
        *,
        ledger: TurnLedger,
        calls: Calls,
        flights: Coalescer,
        hub: StreamHub,
        owner: str,
        rules: TurnRules,
        ids: Callable[[], str],
        fleet: Fleet | None = None,
    ) -> None:
        self.ledger = ledger
        self.calls = calls
        self.flights = flights
        self.hub = hub
        self.owner = owner
        self.fleet = fleet or Fleet(b"")
        self.runs = Runs(
            ledger=ledger, calls=calls, flights=flights, hub=hub, fleet=self.fleet, owner=owner, rules=rules
        )
        self.remotes = self.runs.remotes
        self._poll_s = rules.poll_s
        self.fleet.answer("withdraw", self._withdraw)
        self._ids = ids
        self._last_identity: tuple[TurnAsk | None, RequestKey] = (None, request_key("none", "turn"))
        self._tickets: dict[tuple[str, str], list[TurnTicket]] = {}
        self._ended: dict[tuple[str, str], bool] = {}

    def send(self, ask: TurnAsk, request_id: str) -> TurnTicket:
        """Join the turn a request belongs to, or start one. Never awaits.

        Raises:
            IdempotencyMismatch: the key is in use by a different request that runs now.
            Overloaded, ShuttingDown: the request was not taken on.
        """
        if self.runs.closing:
            raise ShuttingDown(retry_after_s=1.0)
        key = self._identity(ask)
        waiter = self.flights.follow(key)
        if waiter is None:
            waiter = self.flights.join(key, TurnRun(self.runs, ask, request_id))
        ticket = TurnTicket(self, waiter, ask, request_id)
        self._tickets.setdefault((ask.org_id, request_id), []).append(ticket)
        return ticket

    def _identity(self, ask: TurnAsk) -> RequestKey:
        """Requests of one identity share a flight; which turn that flight belongs to, the ledger decides."""
        last, key = self._last_identity
        if ask is last:
            return key
        key = self._new_identity(ask)
        if not ask.force_new:
            # Of a burst of identical requests every one comes with the same ask.
            self._last_identity = (ask, key)
        return key

    def _new_identity(self, ask: TurnAsk) -> RequestKey:
        if ask.idempotency_key is not None:
            # With the fingerprint: another request under the same key must be told so, not joined.
            parts = ["key", ask.idempotency_key, ask.fingerprint]
        elif ask.parent_message_id is not None:
            parts = ["parent", ask.parent_message_id, ask.fingerprint]
        elif ask.force_new:
            parts = ["own", self._ids()]
        else:
            parts = ["fingerprint", ask.fingerprint]
        return request_key(ask.org_id, "turn", ask.thread_id, *parts)

    @property
    def idle(self) -> bool:
        """Whether nobody waits for a turn here, or is known to have waited."""
        return not (self._tickets or self.runs.led or self._ended)

    async def state_of(self, turn: StoredTurn) -> tuple[TurnState, int]:
        """The state of a turn and how many of its thread come first, newer than a row that was just read.

        Raises:
            NotFound: it was deleted with its thread.
        """
        run = self.runs.of(turn.org_id, turn.id)
        now = None if run is None else run.now()
        if now is not None:
            return now
        if turn.state is not TurnState.PENDING:
            return turn.state, 0
        claim = TurnClaim(turn.org_id, turn.thread_id, turn.id, turn.idx, turn.epoch)
        return turn.state, await self.ledger.position(claim)

    def meta_of(self, turn: StoredTurn) -> Mapping[str, Any]:
        """What a turn's stream says of who answers, e.g. that it is the demo."""
        message = turn.assistant_message
        if turn.state is TurnState.COMPLETED and message is not None:
            # Not the lane's: the server may have been started again with other providers.
            return message.meta
        try:
            return self.calls.lane(turn.ask.provider).meta
        except UnknownProvider:
            return {}

    def forget(self, ticket: TurnTicket) -> None:
        """Drop a ticket whose request has ended."""
        key = (ticket.ask.org_id, ticket.request_id)
        tickets = self._tickets.get(key, [])
        if ticket in tickets:
            tickets.remove(ticket)
        if not tickets:
            self._tickets.pop(key, None)
            self._ended.pop(key, None)
            self._ended[key] = ticket.withdrawn
            if len(self._ended) > ENDED_REQUESTS:
                del self._ended[next(iter(self._ended))]

    async def cancel_request(self, org_id: str, request_id: str) -> bool:
        """Withdraw the request of that id, or all if the sender gave several the same; again changes nothing.

        Returns whether it was withdrawn, now or before; False if it had ended by itself.

        Raises:
            NotFound: no such request of this tenant is in progress or ended a moment ago, in any worker.
        """
        withdrawn = self._withdraw_here(org_id, request_id)
        if withdrawn is None:
            answer = await self.fleet.ask("withdraw", data={"org": org_id, "request": request_id})
            withdrawn = bool(answer["withdrawn"])
        return withdrawn

    def _withdraw_here(self, org_id: str, request_id: str) -> bool | None:
        key = (org_id, request_id)
        tickets = self._tickets.get(key)
        if tickets:
            for ticket in list(tickets):
                ticket.withdraw()
            return True
        return self._ended.get(key)

    def _withdraw(self, asked: Signal) -> Mapping[str, Any] | None:
        withdrawn = self._withdraw_here(str(asked.data["org"]), str(asked.data["request"]))
        return None if withdrawn is None else {"withdrawn": withdrawn}

    async def cancel_turn(self, org_id: str, thread_id: str, turn_id: str) -> StoredTurn:
        """Stop a turn for everyone; return it in its final state. A final turn stays as it is.

        Raises:
            NotFound: no such turn of this tenant and thread.
        """
        while True:
            # Before the row is read, not after: a run that ends between has stored its end by the time of the read,
            # while a row read before may say `streaming` of a turn whose run has gone.
            run = self.runs.of(org_id, turn_id)
            turn = await self.ledger.turn(org_id, thread_id, turn_id)
            if turn.state.final:
                return turn
            if run is not None:
                run.stop(TurnCancelled().failure())
                await run.ended.wait()
            elif turn.lease_lapsed:
                await self._end_lost(turn)
            elif turn.owner == self.owner:
                # Admitted a moment ago, and its run enters now.
                await asyncio.sleep(self._poll_s)
            else:
                await self.runs.stop_elsewhere(turn)

    async def _end_lost(self, turn: StoredTurn) -> None:
        """End a turn that nobody leads any more as cancelled, unless somebody takes it over first."""
        taken = await self.runs.claim_lost(turn)
        if taken is not None:
            await self.ledger.end(
                taken,
                TurnState.CANCELLED,
                TurnCancelled().failure(),
                partial=turn.partial,
                partial_seq=turn.partial_seq,
                call_id=turn.call_id,
            )

    async def cancel_thread(self, org_id: str, thread_id: str) -> None:
        """Stop every turn of a thread that runs or waits.

        Raises:
            NotFound: there is no such thread of this tenant.
        """
        runs = self.runs.of_thread(org_id, thread_id)
        for run in runs:
            run.stop(TurnCancelled().failure())
        for run in runs:
            await run.ended.wait()
        while (turn := await self.ledger.active(org_id, thread_id)) is not None:
            await self.cancel_turn(org_id, thread_id, turn.id)

    async def aclose(self, drain_s: float) -> None:
        """Take nothing on, let turns run on for `drain_s` seconds, hand the rest back."""
        self.runs.closing = True
        await self.flights.aclose(drain_s)
        await self.runs.aclose()
