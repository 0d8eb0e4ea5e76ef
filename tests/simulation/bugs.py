"""Bugs of the kind that such protocols have, planted one at a time: a checker that does not find them is no checker.

Each is a part that is wrong in one way. `PLANTED` names them; every one must be found within two thousand seeds.
"""

from collections.abc import Hashable
from typing import Any

from oncewise.core.coalesce import Waiter
from oncewise.core.keys import RequestKey
from oncewise.core.stream_hub import StreamHub, StreamLog
from oncewise.model import Answer, ChatRequest, StoredTurn, TurnAsk, TurnClaim
from oncewise.ports import Admission
from oncewise.service.calls import CallResult, CallRun, Calls
from tests.simulation.between import Between
from tests.simulation.fleet import Parts, Provider, RemoteLedger
from tests.simulation.ledger import Records

__all__ = ["PLANTED"]


class NoEpochInWhere(Records):
    """Whoever claimed the turn once may write it for ever."""

    def _claimed(self, claim: TurnClaim) -> StoredTurn | None:
        thread = self.threads.get((claim.org_id, claim.thread_id))
        turn = thread.turns[claim.idx] if thread is not None else None
        return None if turn is None or turn.state.final else turn


class Previewing(Records):
    """Says what a commit would give, and takes it back."""

    def previewed(self, claim: TurnClaim, answer: Answer) -> StoredTurn | None:
        turn = self._claimed(claim)
        if turn is None:
            return None
        messages = self.threads[claim.org_id, claim.thread_id].messages
        completed = self._read(self._completed(turn, answer))
        del messages[-2:]
        return completed


class AckBeforeCommit(RemoteLedger):
    """A commit is reported before it is durable."""

    async def commit(self, claim: TurnClaim, answer: Answer) -> StoredTurn | None:
        world = self._machine.world
        records: Any = self._fleet.records

        def later() -> None:
            if not world.loses() and not self._fleet.database_down and self._machine.runs:
                records.commit(claim, answer)

        turn: StoredTurn | None = await self.transaction(lambda: records.previewed(claim, answer))
        if turn is not None:
            world.after(world.delay_s() * 20, later)
        return turn


class VisibleAfterTheFirstDelta(RemoteLedger):
    """The first delta leaves before the row says so."""

    async def mark_visible(self, claim: TurnClaim) -> bool:
        records = self._fleet.records
        self._machine.world.after(0.5, lambda: self._machine.runs and records.mark_visible(claim))
        return True


class LeasesByTheWorkersClock(Records):
    """Each worker compares leases with a clock of its own."""

    def __init__(self, now_s: Any) -> None:
        super().__init__(lambda: now_s() + self._skew_s())

    def _skew_s(self) -> float:
        return 15.0 * (sum(self.asked_by.encode()) % 3 - 1)


class NoUniquePlace(RemoteLedger):
    """Look first, insert then, and nothing that holds the two together."""

    async def admit(self, ask: TurnAsk, *, owner: str, lease_s: float, replay_window_s: float, queue_limit: int) -> Any:
        records = self._fleet.records
        found: Admission | None = await self.transaction(lambda: records.find(ask, replay_window_s))
        if found is not None:
            return found
        return await self.transaction(lambda: records.insert(ask, owner, lease_s, queue_limit))


class EndOfBodyIsDone(Provider):
    """A body that merely ends counts as an answer."""

    eof_is_done = True


class _RetryingRun(CallRun):
    @property
    def _shown(self) -> bool:
        return False


class RetryAfterTheFirstDelta(Calls):
    """A call is tried again although its text was shown."""

    def join(self, org_id: str, request: ChatRequest, origin: TurnClaim) -> tuple[Waiter[CallResult], CallRun]:
        key = self.key(org_id, request)
        running = self.flights.follow(key)
        if running is None:
            running = self.flights.join(key, _RetryingRun(self, self.lane(request.provider), org_id, request, origin))
            running.flight.work.flight = running.flight
        return running, running.flight.work  # type: ignore[return-value]


class NoTenantInTheKey(Calls):
    """Equal requests share, whoever asks."""

    def key(self, org_id: str, request: ChatRequest) -> RequestKey:
        return super().key("everybody", request)


class NoEpochInTheStream(StreamHub):
    """Positions count deltas and do not say whose."""

    def open(self, key: Hashable, epoch: int = 1) -> StreamLog:
        return super().open(key, 1)


class ReleaseWithoutToken(Between):
    """Whoever gives a name up takes it from whoever has it."""

    def give_up(self, name: str, holder: str) -> None:
        self.forget(name)


PLANTED = {
    "no epoch in WHERE": Parts(records=NoEpochInWhere),
    "acknowledged before the commit": Parts(ledger=AckBeforeCommit, records=Previewing),
    "visible after the first delta": Parts(ledger=VisibleAfterTheFirstDelta),
    "leases by the worker's clock": Parts(records=LeasesByTheWorkersClock),
    "no unique place": Parts(ledger=NoUniquePlace),
    "the end of a body is the end of an answer": Parts(provider=EndOfBodyIsDone),
    "a retry after the first delta": Parts(calls=RetryAfterTheFirstDelta),
    "no epoch in the stream": Parts(hub=NoEpochInTheStream),
    "a release without a token": Parts(between=ReleaseWithoutToken),
    "no tenant in the key": Parts(calls=NoTenantInTheKey),
}
