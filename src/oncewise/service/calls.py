"""Provider calls, shared: whoever asks the same at the same time gets the same call.

A *call flight* is identified by the tenant and the whole canonical provider request. It owns the provider call, its
retries and its log, and stores nothing but the fact that the call was made. Twenty threads that send the same prompt
at once are twenty turn flights and one call flight, over all workers (`oncewise.service.shared_calls`).

A text that another worker tells may end in the middle, with that worker. It is held for whoever waits, and counts as
seen once a turn has taken it; what nobody took is worth nothing, and whoever waits for it joins the call anew.

Deliberately absent: turns, messages, HTTP, and which provider speaks which wire format.
"""

import asyncio
import json
import random
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from oncewise.core.coalesce import Coalescer, Flight, Waiter
from oncewise.core.keys import RequestKey, request_key
from oncewise.core.stream_hub import StreamHub, StreamLog
from oncewise.errors import ProviderProtocolError, StorageFull, StorageUnavailable, UnknownProvider
from oncewise.model import ChatRequest, FinishReason, TurnClaim, Usage
from oncewise.ports import CallRecord, Completion, TextDelta, TurnLedger
from oncewise.service.accounts import Bill
from oncewise.service.attempts import ProviderLane, remember_s
from oncewise.service.fleet import Fleet
from oncewise.service.shared_calls import SharedCall

__all__ = ["CallResult", "CallRun", "Calls", "ProviderLane", "remember_s"]


@dataclass(frozen=True, slots=True)
class CallResult:
    """A call that ended well.

    Attributes:
        text: The whole answer.
        usage: The provider's figures, or our estimate, marked as such.
        calls: Requests made to the provider, retries included; 0 if another worker made them.
        queue_wait_s: Seconds the first attempt waited for its start.
        first_delta_s: When the first text came, by the event loop's clock.
    """

    call_id: str
    text: str
    completion: Completion
    usage: Usage
    calls: int
    queue_wait_s: float
    first_delta_s: float


class CallRun(SharedCall[CallResult]):
    """The work of one call flight.

    Attributes:
        log: The text as it comes.
        taken: A turn has taken of the text while it came, to show it.
        lost: The rest of it is lost with the worker that made the call.
    """

    def __init__(
        self, calls: "Calls", lane: ProviderLane, org_id: str, request: ChatRequest, origin: TurnClaim
    ) -> None:
        super().__init__(calls, lane, org_id, request.model)
        self.log = StreamLog(calls.logs, (org_id, self.call_id))
        self.taken = False
        self.lost = False
        self._desk = calls
        self._request = request
        self._origin = origin
        self._on_start: list[Callable[[], None]] = []
        self._first_delta_s = 0.0
        self._result: CallResult | None = None

    @property
    def bill(self) -> Bill:
        """What the call came to, as far as it got."""
        request, result = self._request, self._result
        if result is None:
            usage = _estimate(request, self.log.text) if self._shown else None
            return Bill(request.provider, request.model, usage)
        end = result.completion
        return Bill(request.provider, request.model, result.usage, end.cost_usd, end.model)

    def when_started(self, tell: Callable[[], None]) -> None:
        """Call `tell` when the provider is about to be called; at once if it has been, or another worker sees to it."""
        if self.queue_wait_s is None and self.holder is None:
            self._on_start.append(tell)
        else:
            tell()

    async def __call__(self, flight: Flight[CallResult]) -> CallResult:
        """Make the call, or repeat it.

        Raises:
            OncewiseError: as `SharedCall` and `TurnLedger.record_call`.
        """
        # Not sooner: a flight that is dropped before its first step would leave its log behind.
        self._desk.logs.hold(self.log)
        try:
            return await super().__call__(flight)
        finally:
            self._desk.logs.drop(self.log.key)

    # -- in several workers --------------------------------------------------------------------------------------

    @property
    def _claimed(self) -> RequestKey:
        return self._desk.key(self._org_id, self._request)

    @property
    def _seen(self) -> bool:
        return self.taken

    def _packed(self, answer: CallResult) -> dict[str, Any]:
        end, usage = answer.completion, answer.usage
        # In ASCII: what a provider says may hold halves of surrogate pairs, which no relay takes as text.
        said = json.dumps([end.finish_reason.value, end.model, end.citations, end.cost_usd])
        return {"said": said, "usage": [usage.prompt_tokens, usage.completion_tokens, usage.estimated]}

    def _unpacked(self, ending: Mapping[str, Any]) -> CallResult:
        reason, model, citations, cost_usd = json.loads(ending["said"])
        prompt, completion, estimated = ending["usage"]
        usage = Usage(prompt, completion, estimated=estimated)
        cited = None if citations is None else tuple(citations)
        return self._result_of(Completion(FinishReason(reason), usage, model, cited, cost_usd))

    def _begin_again(self) -> bool:
        # Turns look at this log already, so it cannot be another one.
        self.lost = self.log.closed or self.log.deltas > 0
        return not self.lost

    def _follows(self) -> None:
        # Or will be soon, and nothing here can say when: who leaves now leaves a call that runs.
        self._started()

    def _told(self) -> None:
        self._first_delta_s = self._first_delta_s or asyncio.get_running_loop().time()

    # -- here ----------------------------------------------------------------------------------------------------

    @property
    def _shown(self) -> bool:
        return self.log.deltas > 0

    def _started(self) -> None:
        for tell in self._on_start:
            tell()

    async def _opened(self) -> None:
        await self._desk.ledger.record_call(self._record(self.calls + 1))

    async def _closed(self, outcome: str, usage: Usage | None) -> None:
        try:
            await self._desk.ledger.finish_call(self._record(self.calls), outcome=outcome, usage=usage)
        except (StorageUnavailable, StorageFull):
            # The answer is there and the turn's commit decides; how a call ended is only accounting.
            return

    def _record(self, attempt: int) -> CallRecord:
        return CallRecord(
            call_id=self.call_id,
            attempt=attempt,
            org_id=self._org_id,
            turn_id=self._origin.turn_id,
            epoch=self._origin.epoch,
            provider=self._request.provider,
            model=self._request.model,
        )

    async def _read(self) -> CallResult:
        loop = asyncio.get_running_loop()
        completion: Completion | None = None
        async with aclosing(self._lane.provider.stream(self._request)) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    self._first_delta_s = self._first_delta_s or loop.time()
                    self.log.append(event.text)
                else:
                    completion = event
        if completion is None:
            raise ProviderProtocolError("The provider's answer ended without a verified completion.")
        self._result = self._result_of(completion)
        return self._result

    def _usage(self, answer: CallResult) -> Usage | None:
        return answer.completion.usage

    def _result_of(self, completion: Completion) -> CallResult:
        text = self.log.text
        usage = completion.usage or _estimate(self._request, text)
        return CallResult(
            self.call_id, text, completion, usage, self.calls, self.queue_wait_s or 0.0, self._first_delta_s
        )


def _estimate(request: ChatRequest, text: str) -> Usage:
    # About four bytes of UTF-8 a token in English; a tokenizer would have to download its vocabulary.
    prompt = sum(len(message.content.encode()) for message in request.messages)
    return Usage(-(-prompt // 4), -(-len(text.encode()) // 4), estimated=True)


class Calls:
    """Joins equal provider requests of one tenant to one call."""

    def __init__(
        self,
        lanes: Mapping[str, ProviderLane],
        *,
        ledger: TurnLedger,
        flights: Coalescer,
        logs: StreamHub,
        ids: Callable[[], str],
        chance: Callable[[], float] = random.random,
        fleet: Fleet | None = None,
    ) -> None:
        self.lanes = lanes
        self.ledger = ledger
        self.flights = flights
        self.logs = logs
        self.ids = ids
        self.chance = chance
        self.fleet = fleet or Fleet(b"")

    def lane(self, provider: str) -> ProviderLane:
        """The lane of a configured provider.

        Raises:
            UnknownProvider: there is none of that name.
        """
        try:
            return self.lanes[provider]
        except KeyError:
            raise UnknownProvider from None

    def join(self, org_id: str, request: ChatRequest, origin: TurnClaim) -> tuple[Waiter[CallResult], CallRun]:
        """Join the call that answers `request`, or start it.

        Returns the caller's interest and the run behind it, its own or the leader's.

        Raises:
            OncewiseError: as `Coalescer.join`; `UnknownProvider`.
        """
        lane = self.lane(request.provider)
        key = self.key(org_id, request)
        running = self.flights.follow(key)
        if running is None:
            running = self.flights.join(key, CallRun(self, lane, org_id, request, origin))
        run = running.flight.work
        assert isinstance(run, CallRun)  # noqa: S101  only this method puts work into these flights
        run.flight = running.flight
        return running, run

    def key(self, org_id: str, request: ChatRequest) -> RequestKey:
        """The identity of a call: the tenant and everything the provider would be told."""
        messages = [[message.role, message.content] for message in request.messages]
        return request_key(org_id, "call", request.provider, request.model, messages, request.params.given())
