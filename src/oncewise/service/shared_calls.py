"""Calls that several workers were asked for: one makes the call, the others repeat what it says.

Who comes first claims the name of the call, which is a keyed digest over tenant and whole request, and keeps the claim
while the call runs. Who comes later follows: piece by piece through the relay, and the end with its figures.

Nothing is stored of a call, so nothing else tells how it ended. If its worker is lost, or what lies between, a follower
of whose text nobody has seen anything makes the call itself, and one that has shown something waits a while for the
rest and then fails. A claim that was lost costs a second call and never gives anybody another's answer.

Deliberately absent: which requests share a call, what an answer is, and calls inside one worker
(`oncewise.core.coalesce`).
"""

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from oncewise.core.coalesce import Coalescer, Flight, Waiter
from oncewise.core.errands import Errands
from oncewise.core.keys import RequestKey
from oncewise.core.stream_hub import StreamLog
from oncewise.errors import CoordinationUnavailable, Failure, FlightCancelled, LeaderLost, OncewiseError
from oncewise.ports import Claims
from oncewise.service.attempts import Attempts, ProviderLane
from oncewise.service.fleet import Fleet

__all__ = ["CallLost", "Claim", "Holder", "SharedCall", "call_name", "follow_call"]

LEASE_S = 10.0
LOOK_S = 0.25
ASK_S = 1.0
"""How long a call says nothing before its follower asks whether its worker still makes it."""
LAST_WORDS_S = 0.5
LATE_S = 2.0
"""How long a call that has ended is still told to workers that found its claim held and come for it."""
PATIENCE_S = 15.0
"""How long a follower that has shown something waits for what lies between the workers, should that be away."""
REGAIN_S = 6.0
"""The same for a claim that is not its worker's: that takes it again within `LEASE_S / 3` if it was only lost."""
SILENCE_S = 150.0
"""Longer than any call may be silent, waiting for its start included."""

_OF_THE_WORKER = frozenset({"shutting_down", "upstream_cancelled"})

Json = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Holder:
    """Who makes a call.

    Attributes:
        address: Of its worker.
    """

    address: str
    call_id: str

    def __str__(self) -> str:
        return f"{self.address} {self.call_id}"

    @classmethod
    def parse(cls, text: str) -> "Holder":
        """Read what `str` wrote."""
        address, _, call_id = text.partition(" ")
        return cls(address, call_id)


class Claim:
    """One worker's claim to make the call for a request.

    Args:
        name: Of the request, as all workers call it.
        me: What others are told of who holds it.
    """

    def __init__(self, claims: Claims, name: str, me: Holder) -> None:
        self._claims = claims
        self._name = name
        self._me = str(me)
        self._may_be_mine = False
        self._keeping: asyncio.Task[None] | None = None

    async def take(self) -> Holder | None:
        """Who makes the call; None if it is to be made here: the claim is ours, or nobody can be asked."""
        # Until it is known otherwise: an answer may be lost after the claim was made.
        self._may_be_mine = True
        try:
            held = await self._claims.claim(self._name, self._me, lease_s=LEASE_S)
        except CoordinationUnavailable:
            return None
        self._may_be_mine = held == self._me
        return None if self._may_be_mine else Holder.parse(held)

    def keep(self) -> None:
        """Hold it from now on."""
        self._keeping = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            with suppress(CoordinationUnavailable):
                if not await self._claims.extend(self._name, self._me, lease_s=LEASE_S):
                    # Whoever has it now makes a second call, and ours is no worse for it. If nobody has, the server
                    # lost it, and others may follow again.
                    await self._claims.claim(self._name, self._me, lease_s=LEASE_S)

    async def is_held_by(self, holder: Holder) -> bool:
        """Whether another worker keeps it. If nobody does, it is ours from now on."""
        return await self.take() == holder

    async def free(self, holder: Holder | None = None) -> None:
        """Give it up for a worker that makes the call no more, or for this one."""
        with suppress(CoordinationUnavailable):
            await self._claims.release(self._name, self._me if holder is None else str(holder))

    def give_up(self, errands: Errands) -> None:
        """Hold it no more."""
        if self._keeping is not None:
            self._keeping.cancel()
        if self._may_be_mine:
            errands.run(self.free())


class CallLost(Exception):
    """A call that another worker made will not be told to its end."""


def call_name(fleet: Fleet, org_id: str, call_id: str) -> str:
    """What workers call a call among each other."""
    return fleet.name("call", org_id, call_id)


async def follow_call(
    fleet: Fleet,
    org_id: str,
    holder: Holder,
    log: StreamLog,
    *,
    claim: Claim | None = None,
    told: Callable[[], None],
    seen: Callable[[], bool],
) -> Mapping[str, Any]:
    """Repeat a call of another worker in `log`, to its end, which is returned. The log stays open.

    Args:
        fleet: The workers.
        org_id: Whose call it is.
        holder: Who makes it.
        log: An empty log.
        claim: Asked now and then whether the other worker still makes the call; None if there is nothing to ask.
        told: Called when something came.
        seen: Whether somebody has seen a part of it, so that losing it is worth a wait.

    Raises:
        CallLost: there is no more, or it ended for reasons of that worker alone.
        OncewiseError: how the call ended.
    """
    if fleet.is_lost(holder.address):
        raise CallLost
    news, over = asyncio.Event(), asyncio.Event()

    def came() -> None:
        told()
        news.set()

    def ended() -> None:
        over.set()
        news.set()

    with fleet.follow(call_name(fleet, org_id, holder.call_id), holder.address, ended) as following:
        following.hold()
        following.repeat(log, lambda epoch: ("reset", {"epoch": epoch}), came, closes=False)
        patience = _Patience(fleet, holder, claim, seen, ended)
        while following.ending is None and not log.closed:
            news.clear()
            try:
                async with asyncio.timeout(LAST_WORDS_S if over.is_set() else LOOK_S):
                    await news.wait()
            except TimeoutError:
                lost = over.is_set() or await patience.is_over(log)
                # What came in the moment of the timeout, or while the claim was asked for, may be the end.
                if lost and not news.is_set():
                    raise CallLost from None
    if following.ending is None:
        raise CallLost
    return _ended_well(following.ending[1])


def _ended_well(ending: Mapping[str, Any]) -> Mapping[str, Any]:
    """The end of a good answer. Errors as `follow_call`."""
    if "failure" in ending:
        code, detail, retryable, retry_after_s = ending["failure"]
        if code in _OF_THE_WORKER:
            raise CallLost
        raise Failure(code, detail, retryable=retryable, retry_after_s=retry_after_s).error()
    return ending


class _Patience:
    """How long a call that says nothing is waited for.

    Args:
        ended: Called when its worker makes it no more, as far as the claim tells; its last words may be on their way.
    """

    def __init__(
        self, fleet: Fleet, holder: Holder, claim: Claim | None, seen: Callable[[], bool], ended: Callable[[], None]
    ) -> None:
        self._fleet = fleet
        self._holder = holder
        self._claim = claim
        self._seen = seen
        self._ended = ended
        self._deltas = 0
        self._heard_s = asyncio.get_running_loop().time()
        self._asked_s = self._heard_s

    async def is_over(self, log: StreamLog) -> bool:
        """Whether it is, after some silence; asks now and then whether the claim is held."""
        now_s = asyncio.get_running_loop().time()
        if log.deltas > self._deltas:
            self._deltas, self._heard_s, self._asked_s = log.deltas, now_s, now_s
        if not self._fleet.prompt:
            return not self._seen() or now_s - self._heard_s > PATIENCE_S
        if self._claim is None:
            return now_s - self._heard_s > SILENCE_S
        if now_s - self._asked_s < ASK_S:
            return False
        self._asked_s = now_s
        await self._ask(self._claim, now_s)
        return False

    async def _ask(self, claim: Claim, now_s: float) -> None:
        if await claim.is_held_by(self._holder):
            # Its worker keeps it while the call runs.
            self._heard_s = now_s
            return
        # Not for us yet: its worker takes it again if the server forgot it, and gives it up just before it tells the
        # end. Whoever comes meanwhile may make the call.
        await claim.free()
        if not self._seen() or now_s - self._heard_s > REGAIN_S:
            self._ended()


class Desk(Protocol):
    """What a shared call needs of whoever keeps the calls."""

    fleet: Fleet
    flights: Coalescer
    ids: Callable[[], str]
    chance: Callable[[], float]


class SharedCall(Attempts[T]):
    """The work of one call flight: the call itself, or another worker's call repeated.

    A subclass says what names the call, what an answer is, and what of it was seen.

    Attributes:
        call_id: Names the call in answers, in whichever worker it is made.
        log: The answer as it comes; closed when the call has ended, however it did. The subclass opens it.
        flight: The flight that does this work.
        holder: The worker that makes the call, if that is another one.
    """

    flight: Flight[T]
    log: StreamLog

    def __init__(self, desk: Desk, lane: ProviderLane, org_id: str, model: str) -> None:
        super().__init__(lane, org_id, model, desk.chance)
        self.call_id = desk.ids()
        self.holder: Holder | None = None
        self._shared_by = desk
        self._own_id = self.call_id
        self._name: str | None = None
        self._stopped: Failure | None = None

    async def __call__(self, flight: Flight[T]) -> T:
        """Make the call, or repeat it.

        Raises:
            LeaderLost: another worker made it, and the rest of it is lost.
            OncewiseError: as `Attempts.run`.
        """
        outcome: T | Failure = FlightCancelled().failure()
        try:
            claim = self._claim()
            outcome = await (self.run(flight) if claim is None else self._share(flight, claim))
        except OncewiseError as error:
            outcome = error.failure()
            raise
        finally:
            self.log.close("end", self._ending(self._stopped or outcome))
            if self._name is not None:
                self._shared_by.fleet.ended(self._name, self, linger_s=LATE_S)
        return outcome

    # -- what a subclass says ------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def _claimed(self) -> RequestKey | None:
        """What names the request; None if it is shared with nobody."""

    @property
    @abstractmethod
    def _seen(self) -> bool:
        """Whether somebody may have seen a part of what another worker told."""

    @abstractmethod
    def _packed(self, answer: T) -> Json:
        """The end of a good answer, as one worker tells it to others; the log tells the rest."""

    @abstractmethod
    def _unpacked(self, ending: Mapping[str, Any]) -> T:
        """The answer that another worker told."""

    @abstractmethod
    def _begin_again(self) -> bool:
        """Be as before anything came; False if that cannot be."""

    def _rename(self, call_id: str) -> None:
        """The call goes by the name that its leader gave it."""
        self.call_id = call_id

    def _follows(self) -> None:
        """Another worker makes the call."""

    def _told(self) -> None:
        """Something of it came."""

    # -- one call in several workers -----------------------------------------------------------------------------

    def _claim(self) -> Claim | None:
        fleet, key = self._shared_by.fleet, self._claimed
        if fleet.claims is None or key is None:
            return None
        name = fleet.name("claim", self._org_id, key.digest)
        return Claim(fleet.claims, name, Holder(fleet.address, self._own_id))

    async def _share(self, flight: Flight[T], claim: Claim) -> T:
        """Make the call, unless another worker makes it."""
        fleet = self._shared_by.fleet
        try:
            while True:
                holder = self.holder = await claim.take()
                self._rename(self._own_id if holder is None else holder.call_id)
                if holder is None:
                    claim.keep()
                    self.enter()
                    return await self.run(flight)
                self._follows()
                try:
                    ending = await follow_call(
                        fleet, self._org_id, holder, self.log, claim=claim, told=self._told, seen=lambda: self._seen
                    )
                    return self._unpacked(ending)
                except CallLost:
                    # A dead worker would hold it for seconds still, and nobody could make the call.
                    await claim.free(holder)
                    if not self._begin_again():
                        raise LeaderLost from None
        finally:
            claim.give_up(fleet.errands)

    def _ending(self, outcome: T | Failure) -> Json:
        if isinstance(outcome, Failure):
            return {"failure": [outcome.code, outcome.detail, outcome.retryable, outcome.retry_after_s]}
        return self._packed(outcome)

    def enter(self) -> None:
        """Other workers may follow this call."""
        if self._name is None:
            fleet = self._shared_by.fleet
            self._name = call_name(fleet, self._org_id, self.call_id)
            fleet.lead(self._name, self)
            if self.flight.outcome is not None:
                fleet.ended(self._name, self, linger_s=LATE_S)

    @property
    def requesters(self) -> int:
        """How many wait for it."""
        return self.flight.waiters

    async def watch(self) -> StreamLog | None:
        """Its log."""
        return self.log

    def board(self) -> Waiter[T] | None:
        """An interest in it; None if it is over."""
        return None if self.flight.outcome is not None else self._shared_by.flights.follow_flight(self.flight)

    def stop(self, failure: Failure, *, keep_partial: bool = True) -> None:  # noqa: ARG002  nothing is kept
        """End it for everyone, wherever it is made; one that has ended stays as it is."""
        self._stopped = self._stopped or failure
        if self.holder is not None:
            fleet = self._shared_by.fleet
            fleet.stop(call_name(fleet, self._org_id, self.holder.call_id), self.holder.address)
        self._shared_by.flights.cancel(self.flight, failure)
