"""Calls of `/v1` that several workers were asked for: one makes the call, the others repeat what it says.

Who comes first claims the name of the request, which is a keyed digest over tenant and whole body, and keeps the claim
while the call runs. Who comes later follows: chunk by chunk through the relay, and the end with its figures.

Nothing is stored, so nothing else tells how a call ended. If its worker is lost, or what lies between, a follower that
has shown nothing makes the call itself, and one that has shown something waits a while for the rest and then fails. A
claim that was lost costs a second call and never gives anybody another's answer.

Deliberately absent: what shares (`oncewise.service.sharing`), and calls inside one worker (`oncewise.core.coalesce`).
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from oncewise.core.errands import Errands
from oncewise.core.stream_hub import StreamLog
from oncewise.errors import CoordinationUnavailable, Failure
from oncewise.model import Usage
from oncewise.ports import Claims
from oncewise.service.fleet import Fleet

__all__ = ["CallLost", "Claim", "Completion", "Holder", "call_name", "ending_of", "follow_call"]

LEASE_S = 10.0
LOOK_S = 1.0
LAST_WORDS_S = 0.5
PATIENCE_S = 15.0
"""How long a follower that has shown something waits for what lies between the workers, should that be away."""
SILENCE_S = 150.0
"""Longer than any call may be silent, waiting for its start included."""

_OF_THE_WORKER = frozenset({"shutting_down", "upstream_cancelled"})

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Completion:
    """A call that ended well.

    Attributes:
        usage: Tokens: the provider's figures, or our estimate, marked as such.
        figures: The same with all that the provider says about them.
        head: `id`, `object`, `created` and `model` of every chunk.
    """

    usage: Usage
    figures: Json
    cost_usd: float | None
    head: Json


def ending_of(outcome: Completion | Failure) -> Json:
    """How a call ended, as one worker tells it to others."""
    if isinstance(outcome, Failure):
        return {"failure": [outcome.code, outcome.detail, outcome.retryable, outcome.retry_after_s]}
    usage = outcome.usage
    return {
        "usage": [usage.prompt_tokens, usage.completion_tokens, usage.estimated],
        "figures": outcome.figures,
        "cost_usd": outcome.cost_usd,
        "head": outcome.head,
    }


def _outcome(ending: Mapping[str, Any]) -> Completion | Failure:
    if "failure" in ending:
        code, detail, retryable, retry_after_s = ending["failure"]
        return Failure(code, detail, retryable=retryable, retry_after_s=retry_after_s)
    prompt, completion, estimated = ending["usage"]
    usage = Usage(prompt, completion, estimated=estimated)
    return Completion(usage, ending["figures"], ending["cost_usd"], ending["head"])


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
        self._keeping: asyncio.Task[None] | None = None

    async def take(self) -> Holder | None:
        """Who makes the call; None if it is to be made here: the claim is ours, or nobody can be asked."""
        try:
            held = await self._claims.claim(self._name, self._me, lease_s=LEASE_S)
        except CoordinationUnavailable:
            return None
        return None if held == self._me else Holder.parse(held)

    def keep(self) -> None:
        """Hold it from now on."""
        self._keeping = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            with suppress(CoordinationUnavailable):
                # Lost is lost: whoever has it now makes a second call, and ours is no worse for it.
                await self._claims.extend(self._name, self._me, lease_s=LEASE_S)

    def give_up(self, errands: Errands) -> None:
        """Hold it no more."""
        if self._keeping is not None:
            self._keeping.cancel()
        errands.run(self._claims.release(self._name, self._me))


class CallLost(Exception):
    """A call that another worker made will not be told to its end."""


def call_name(fleet: Fleet, org_id: str, call_id: str) -> str:
    """What workers call a call among each other."""
    return fleet.name("call", org_id, call_id)


async def follow_call(
    fleet: Fleet, org_id: str, holder: Holder, log: StreamLog, *, claim: Claim | None = None, told: Callable[[], None]
) -> Completion:
    """Repeat a call of another worker in `log`, to its end, which is returned. The log stays open.

    Args:
        fleet: The workers.
        org_id: Whose call it is.
        holder: Who makes it.
        log: An empty log.
        claim: Asked now and then whether the other worker still makes the call; None if there is nothing to ask.
        told: Called when something came.

    Raises:
        CallLost: there is no more, or it ended for reasons of that worker alone.
        OncewiseError: how the call ended.
    """
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
        patience = _Patience(fleet, holder, claim)
        while following.ending is None and not log.closed:
            news.clear()
            try:
                async with asyncio.timeout(LAST_WORDS_S if over.is_set() else LOOK_S):
                    await news.wait()
            except TimeoutError:
                if over.is_set() or await patience.is_over(log):
                    raise CallLost from None
    outcome = None if following.ending is None else _outcome(following.ending[1])
    if isinstance(outcome, Completion):
        return outcome
    if outcome is None or outcome.code in _OF_THE_WORKER:
        raise CallLost
    raise outcome.error()


class _Patience:
    """How long a call that says nothing is waited for."""

    def __init__(self, fleet: Fleet, holder: Holder, claim: Claim | None) -> None:
        self._fleet = fleet
        self._holder = holder
        self._claim = claim
        self._deltas = 0
        self._heard_s = asyncio.get_running_loop().time()

    async def is_over(self, log: StreamLog) -> bool:
        """Whether it is, after some silence."""
        now_s = asyncio.get_running_loop().time()
        if log.deltas > self._deltas:
            self._deltas, self._heard_s = log.deltas, now_s
        silent_s = now_s - self._heard_s
        if not self._fleet.prompt:
            return log.deltas == 0 or silent_s > PATIENCE_S
        if self._claim is None:
            return silent_s > SILENCE_S
        # Its worker keeps the claim while the call runs.
        return await self._claim.take() != self._holder
