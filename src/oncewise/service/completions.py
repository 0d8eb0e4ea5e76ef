"""Calls of the OpenAI-compatible API: identical requests that run at the same time may share one.

A call flight is identified by the tenant, the provider, its model and the whole body, less what `TRANSPORT` names. It
is shared while it runs and never replayed. Whether a request shares is policy: sampling the same question twice on
purpose must give two answers. `always` shares every body; `safe` those that ask for the same answer each time
(`temperature: 0` or a `seed`), requests with the same Idempotency-Key, and whoever asks for it; `off` none.

A request that does not share has a flight of its own. One thing joins it all the same: a client library's automatic
retry, once the request that started the call has gone. There is then nobody else who could get the same answer.

No row is written per attempt: nothing is taken over, so nobody would read it. The leader's row in the request log
counts its attempts, and is written with hundreds of others: at thousands of calls a second each row of its own would
cost a flush to disk.

Deliberately absent: HTTP, how chunks look on the wire, and which policy is whose (`oncewise.service.sharing`).
"""

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Self

import orjson

from oncewise.core.chunks import assembled, usage_object, usage_of
from oncewise.core.coalesce import Coalescer, Flight, FlightLanded, Landed, Waiter
from oncewise.core.keys import RequestKey, canonical, request_key
from oncewise.core.stream_hub import StreamHub, StreamLog
from oncewise.errors import (
    Failure,
    IdempotencyMismatch,
    LeaderLost,
    ModelNotFound,
    ProviderProtocolError,
    ShuttingDown,
    TurnCancelled,
    UnknownProvider,
)
from oncewise.model import CompletionRequest, Role, Usage
from oncewise.ports import Chunk, Listener, Signal
from oncewise.service.accounts import Bill, Share
from oncewise.service.attempts import ProviderLane, remember_s
from oncewise.service.fleet import Fleet
from oncewise.service.model_names import ModelNames
from oncewise.service.shared_calls import CallLost, Holder, SharedCall, follow_call
from oncewise.service.sharing import Policies, Policy

__all__ = ["Completion", "CompletionAsk", "CompletionRun", "CompletionTicket", "Completions", "Plan", "Wish"]

KIND = "v1/chat/completions"

TRANSPORT = MappingProxyType(
    {
        "stream": "how the answer is sent",
        "stream_options": "how the answer is sent",
        "user": "who asks, for the provider's watch on abuse",
        "metadata": "labels of the request in the provider's records",
    }
)
"""Fields of a body that are no part of its identity, and why. Whatever is not here keeps two requests apart."""

_OURS = ("model", "stream", "stream_options")
_HEAD = ("id", "object", "created", "model")
_PLAIN = frozenset({*_HEAD, "choices", "usage", "system_fingerprint", "service_tier"})

Json = dict[str, Any]


class Wish(StrEnum):
    """What a request says about sharing."""

    ON = "on"
    OFF = "off"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class CompletionAsk:
    """One request.

    Attributes:
        body: The parsed body, which nobody changes; `model` in it is a string.
        is_retry: A client library says that it repeats a request of its own.
        resumable: Its stream may be picked up after it ended.
    """

    request_id: str
    body: Mapping[str, Any]
    stream: bool = False
    wish: Wish = Wish.NONE
    idempotency_key: str | None = None
    is_retry: bool = False
    resumable: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request asks for, and whether it shares.

    Attributes:
        body_key: Names the request; equal for whatever would get the same answer.
        key: Names what it shares; None if it shares nothing.
        policy: What the operator chose for it.
        reason: Why: `always`, `temperature`, `seed`, `idempotency_key`, `asked`; or why not: `asked_not_to`,
            `switched_off`, `several_choices`, `sampling`.
    """

    request: CompletionRequest
    body_key: RequestKey
    key: RequestKey | None
    policy: Policy
    reason: str


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


class CompletionRun(SharedCall[Completion]):
    """The work of one call flight.

    Attributes:
        log: The chunks as they come, each as the bytes of an event.
        first_s: When the first chunk could be seen, by the event loop's clock; 0.0 before.
        own: Whether it is shared with nobody.
        leader_id: Request id of whoever started it in this worker.
        streamed: Whether anybody may have seen a part of it.
    """

    def __init__(self, desk: "Completions", lane: ProviderLane, org_id: str, plan: Plan, leader_id: str) -> None:
        super().__init__(desk, lane, org_id, plan.request.model)
        self.org_id = org_id
        self.plan = plan
        self.own = plan.key is None
        self.leader_id = leader_id
        self.resumable = False
        self.idempotency: tuple[str, str] | None = None
        self.log = desk.logs.open((org_id, self.call_id))
        self.first_s = 0.0
        self.streamed = False
        self._desk = desk
        self._followed: Completion | None = None
        self._created_s = desk.now_s()
        self._document: bytes | None = None
        self._answer: _Chunks | None = None
        self._bill: Bill | None = None

    # -- in several workers --------------------------------------------------------------------------------------

    @property
    def _claimed(self) -> RequestKey | None:
        return self.plan.key

    @property
    def _seen(self) -> bool:
        return self.streamed and self.log.deltas > 0

    def _packed(self, answer: Completion) -> Json:
        usage = answer.usage
        return {
            "usage": [usage.prompt_tokens, usage.completion_tokens, usage.estimated],
            "figures": answer.figures,
            "cost_usd": answer.cost_usd,
            "head": answer.head,
        }

    def _unpacked(self, ending: Mapping[str, Any]) -> Completion:
        self._followed = _told_completion(ending)
        return self._followed

    def _begin_again(self) -> bool:
        if self.log.closed or self._seen:
            return False
        if self.log.deltas:
            # Nobody has seen it: whoever waits for the whole answer gets that of another call.
            self.log = self._desk.logs.open(self.log.key)
            self.first_s = 0.0
        return True

    def _rename(self, call_id: str) -> None:
        self._desk.rename(self, call_id)

    def _told(self) -> None:
        self.first_s = self.first_s or asyncio.get_running_loop().time()

    def stop(self, failure: Failure, *, keep_partial: bool = True) -> None:
        """End it for everyone, wherever it is made; one that has ended stays as it is."""
        self.resumable = True  # a second cancel finds it
        super().stop(failure, keep_partial=keep_partial)

    # -- its answer ----------------------------------------------------------------------------------------------

    def document(self, completion: Completion) -> bytes:
        """The whole completion in JSON, put together once for all who ask."""
        if self._document is None:
            # JSON has no line ends of its own: all events are read as one list.
            chunks = self.log.text.removeprefix("data: ").removesuffix("\n\n").replace("\n\ndata: ", ",")
            self._document = orjson.dumps(assembled(orjson.loads(f"[{chunks}]"), completion.figures))
        return self._document

    @property
    def bill(self) -> Bill:
        """What the call came to, as far as it got."""
        if self._bill is not None:
            return self._bill
        request, answer = self.plan.request, self._answer
        bill = Bill(request.provider, request.model)
        if self._followed is not None:
            done = self._followed
            bill = Bill(request.provider, request.model, done.usage, done.cost_usd, str(done.head["model"]))
        elif answer is not None:
            usage, cost_usd = answer.figures(self.log)
            bill = Bill(request.provider, request.model, usage, cost_usd, answer.model)
        if self.flight.outcome is not None:
            # Final: thousands of followers ask for it, and an estimate reads the whole prompt.
            self._bill = bill
        return bill

    @property
    def _shown(self) -> bool:
        return self.log.deltas > 0

    def _usage(self, answer: Completion) -> Usage | None:
        return answer.usage

    async def _read(self) -> Completion:
        answer = self._answer = _Chunks(self.plan.request, self.call_id, self._created_s)
        async with aclosing(self._lane.provider.chunks(self.plan.request)) as chunks:
            async for chunk in chunks:
                for ready in answer.take(chunk):
                    self.first_s = self.first_s or asyncio.get_running_loop().time()
                    self.log.append(f"data: {orjson.dumps(ready).decode()}\n\n")
        if not self._shown:
            raise ProviderProtocolError("The provider's answer ended without a verified completion.")
        return answer.completion(self.log)


class _Chunks:
    """Makes the chunks of one attempt look alike, and keeps its figures."""

    def __init__(self, request: CompletionRequest, call_id: str, created_s: int) -> None:
        self._request = request
        self._asked = max(request.choices, 1)
        self._head: Json = {
            "id": f"chatcmpl-{call_id}",
            "object": "chat.completion.chunk",
            "created": created_s,
            "model": request.model,
        }
        self._choices: set[int] = set()
        self._held: list[Chunk] | None = []
        self._told: Json = {}
        self._usage: Usage | None = None
        self._figures: Json | None = None
        self._cost_usd: float | None = None

    def take(self, chunk: Chunk) -> list[Chunk]:
        """What may be shown now: nothing before there is something to see, so that a retry takes nothing back."""
        self._count(chunk)
        if not self._choices:
            self._begin(chunk)
        tidy = self._tidy(chunk)
        if tidy is None:
            return []
        if self._held is None:
            return [tidy]
        self._held.append(tidy)
        if not any(_says_something(choice) for choice in tidy["choices"]):
            return []
        ready, self._held = self._held, None
        return ready

    @property
    def model(self) -> str:
        """The model that the provider says it used, else the one it was asked for."""
        model: str = self._head["model"]
        return model

    def figures(self, log: StreamLog) -> tuple[Usage | None, float | None]:
        """Tokens and cost of whatever came so far; None for no tokens if nothing did."""
        return self._usage or (_estimate(self._request, log) if log.deltas else None), self._cost_usd

    def completion(self, log: StreamLog) -> Completion:
        """The end of a good answer."""
        usage = self._usage or _estimate(self._request, log)
        figures = self._figures if self._usage is not None else None
        return Completion(usage, figures or _figures(usage), self._cost_usd, self._head)

    def _begin(self, chunk: Chunk) -> None:
        # Clients take a stream's id and time from any of its chunks: they are the same in all.
        for name, kind in (("id", str), ("created", int), ("model", str)):
            if isinstance(chunk.get(name), kind) and chunk[name]:
                self._head[name] = chunk[name]

    def _count(self, chunk: Chunk) -> None:
        figures = usage_object(chunk)
        if figures is None:
            return
        usage, cost_usd = usage_of(chunk)
        if usage is not None:
            self._usage, self._figures = usage, figures
        if cost_usd is not None:
            self._cost_usd = cost_usd

    def _tidy(self, chunk: Chunk) -> Chunk | None:
        choices = [choice for choice in chunk.get("choices") or () if choice.get("index", 0) < self._asked]
        if not choices:
            if all(name in self._told and self._told[name] == chunk[name] for name in chunk.keys() - _PLAIN):
                return None
            # Many clients look at the first choice of any chunk, unless they asked for figures.
            choices = [{"index": 0, "delta": {}, "finish_reason": None}]
        else:
            for choice in choices:
                self._tidy_choice(choice)
        if not chunk.keys() <= _PLAIN:
            self._told.update((name, chunk[name]) for name in chunk.keys() - _PLAIN)
        tidy = {**chunk, **self._head, "choices": choices}
        tidy.pop("usage", None)
        return tidy

    def _tidy_choice(self, choice: Json) -> None:
        index, delta = choice.setdefault("index", 0), choice.get("delta") or {}
        # The role comes once: OpenAI's Python client joins repeated ones to one text, as it does with contents.
        if index not in self._choices:
            self._choices.add(index)
            delta = {"role": delta.pop("role", None) or "assistant", **delta}
        else:
            delta.pop("role", None)
        choice["delta"] = delta
        choice.setdefault("finish_reason", None)


def _says_something(choice: Json) -> bool:
    delta = choice.get("delta") or {}
    return bool(choice["finish_reason"]) or any(value for name, value in delta.items() if name != "role")


def _estimate(request: CompletionRequest, log: StreamLog) -> Usage:
    # About four bytes of UTF-8 a token in English, and a token to a delta.
    return Usage(-(-len(canonical(request.body.get("messages"))) // 4), log.deltas, estimated=True)


def _told_completion(ending: Mapping[str, Any]) -> Completion:
    prompt, completion, estimated = ending["usage"]
    usage = Usage(prompt, completion, estimated=estimated)
    return Completion(usage, ending["figures"], ending["cost_usd"], ending["head"])


def _figures(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "estimated": usage.estimated,
    }


class RemoteCall:
    """A call of another worker that somebody looks at here.

    Attributes:
        log: Its chunks, repeated.
        flight: The flight that repeats it.
    """

    flight: Flight[Completion]

    def __init__(self, desk: "Completions", org_id: str, holder: Holder) -> None:
        self.log: StreamLog = desk.logs.open((org_id, holder.call_id))
        self._desk = desk
        self._org_id = org_id
        self._holder = holder
        self._came = asyncio.Event()

    async def __call__(self, _flight: Flight[Completion]) -> Completion:
        """Repeat the call to its end.

        Raises:
            OncewiseError: how it ended, or `LeaderLost`.
        """
        try:
            ending = await follow_call(
                self._desk.fleet,
                self._org_id,
                self._holder,
                self.log,
                told=self._came.set,
                seen=lambda: self.log.deltas > 0,
            )
        except CallLost:
            raise LeaderLost from None
        finally:
            self.log.close("end", {})
            self._came.set()
        return _told_completion(ending)

    async def reach(self, seq: int) -> None:
        """Wait until the chunks up to `seq` are there, for a moment at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                while self.log.deltas < seq and not self.log.closed:
                    self._came.clear()
                    await self._came.wait()


class CompletionTicket:
    """One request's interest in a call. Leave it, or use it in a `with` block.

    Attributes:
        run: The call.
        accounted: See `oncewise.service.accounts.Ticket`.
    """

    surface = "v1"

    def __init__(
        self, waiter: Waiter[Completion], run: CompletionRun, role: Role, org_id: str, ask: CompletionAsk
    ) -> None:
        self.run = run
        self._role = role
        self.org_id = org_id
        self.ask = ask
        self.accounted = False
        self._waiter = waiter

    @property
    def role(self) -> Role:
        """What the request is to the call, as far as is known: another worker may lead it."""
        return Role.FOLLOWER if self._role is Role.LEADER and self.run.holder is not None else self._role

    async def result(self) -> Completion:
        """The end of the call.

        Raises:
            OncewiseError: it did not end well; an object of its own for each caller.
        """
        return await self._waiter.result()

    def leave(self) -> None:
        """Give up the interest. Calling it again does nothing."""
        self._waiter.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.leave()

    @property
    def _leads(self) -> bool:
        return self.role in (Role.LEADER, Role.BYPASS)

    def when_over(self, tell: Callable[[], None]) -> None:
        """Call `tell` once the call has ended if this request led it, else at once."""
        if self._leads:
            self.run.flight.after(tell)
        else:
            tell()

    def share(self, _result: Completion | None) -> Share:
        """What this request had of the call."""
        run, leads = self.run, self._leads
        request = run.plan.request
        return Share(
            role=self.role,
            provider=request.provider,
            model=request.model,
            bill=run.bill,
            pays=leads,
            calls=run.calls if leads else 0,
            first_s=run.first_s,
            queue_wait_ms=(run.queue_wait_s or 0.0) * 1000 if leads else 0.0,
            leader_id=run.leader_id if run.holder is None else None,
            call_id=run.call_id,
        )


class Completions:
    """Joins identical requests of one tenant to one call.

    Args:
        abandon_after_s: Seconds after which a call that nobody waits for is cancelled.

    Attributes:
        flights: The calls in progress.
        closing: Nothing new is taken on.
    """

    def __init__(
        self,
        lanes: Mapping[str, ProviderLane],
        names: ModelNames,
        *,
        logs: StreamHub,
        ids: Callable[[], str],
        policies: Policies = Policies(),  # noqa: B008  frozen
        abandon_after_s: float = 5.0,
        listener: Listener = lambda _event: None,
        chance: Callable[[], float] = random.random,
        now_s: Callable[[], int] = lambda: int(time.time()),
        fleet: Fleet | None = None,
    ) -> None:
        self.fleet = fleet or Fleet(b"")
        self.logs = logs
        self.ids = ids
        self.chance = chance
        self.now_s = now_s
        self.names = names
        self.closing = False
        self.flights = Coalescer(
            deadline_s=None, abandon_after_s=abandon_after_s, remember=remember_s, listener=self._landed
        )
        self._lanes = lanes
        self._policies = policies
        self._listener = listener
        self._runs: dict[tuple[str, str], CompletionRun] = {}
        self._by_flight: dict[object, list[CompletionRun]] = {}
        self._own: dict[RequestKey, list[CompletionRun]] = {}
        self._keyed: dict[tuple[str, str], CompletionRun] = {}
        self.fleet.answer("find_call", self._find)
        self.fleet.answer("stop_call", self._stop_here)

    @property
    def idle(self) -> bool:
        """Whether no call runs or can be resumed."""
        return not self._runs

    def plan(self, org_id: str, ask: CompletionAsk) -> Plan:
        """Whether a request would share, and under which key. Calls nobody.

        Raises:
            ModelNotFound: its model means no provider.
        """
        try:
            provider, model = self.names.resolve(None, ask.body["model"])
        except UnknownProvider:
            raise ModelNotFound from None
        request = CompletionRequest(
            provider, model, {name: value for name, value in ask.body.items() if name not in _OURS}
        )
        body = {name: value for name, value in request.body.items() if name not in TRANSPORT}
        body_key = request_key(org_id, KIND, provider, model, body)
        policy = self._policies.of(org_id, provider, model)
        shares, reason = _shares(policy, ask)
        if shares and reason == "idempotency_key":
            keyed = request_key(org_id, f"{KIND}#keyed", ask.idempotency_key, provider, model, body)
            return Plan(request, body_key, keyed, policy, reason)
        return Plan(request, body_key, body_key if shares else None, policy, reason)

    def ignored(self, body: Mapping[str, Any]) -> dict[str, str]:
        """The fields of a body that do not keep it apart from others, and why."""
        return {name: reason for name, reason in TRANSPORT.items() if name in body}

    def send(self, org_id: str, ask: CompletionAsk) -> CompletionTicket:
        """Join the call that answers a request, or start it. Never awaits.

        Raises:
            ModelNotFound, UnknownProvider: nobody answers for its model.
            IdempotencyMismatch: its key belongs to another request that runs.
            ShuttingDown, Overloaded: it was not taken on.
        """
        if self.closing:
            raise ShuttingDown(retry_after_s=1.0)
        plan = self.plan(org_id, ask)
        self._check_key(org_id, ask, plan)
        joined = self._join(plan, ask)
        if joined is None:
            joined = self._start(org_id, plan, ask)
        run = joined.run
        run.resumable = run.resumable or ask.resumable
        run.streamed = run.streamed or ask.stream
        return joined

    def _check_key(self, org_id: str, ask: CompletionAsk, plan: Plan) -> None:
        if ask.idempotency_key is not None:
            known = self._keyed.get((org_id, ask.idempotency_key))
            if known is not None and known.plan.body_key != plan.body_key:
                raise IdempotencyMismatch

    def _join(self, plan: Plan, ask: CompletionAsk) -> CompletionTicket | None:
        waiter: Waiter[Completion] | None = None
        if plan.key is not None:
            waiter = self.flights.follow(plan.key)
        elif ask.is_retry:
            waiter = self._adopt(plan.body_key)
        if waiter is None:
            return None
        run = waiter.flight.work
        assert isinstance(run, CompletionRun)  # noqa: S101  only `_start` puts work into these flights
        return CompletionTicket(waiter, run, waiter.role, run.org_id, ask)

    def _adopt(self, body_key: RequestKey) -> Waiter[Completion] | None:
        """Take over a call whose only requester has gone: a client gave up waiting and asks again."""
        for run in self._own.get(body_key, ()):
            if run.flight.waiters == 0:
                waiter = self.flights.follow(run.flight.key)
                if waiter is not None and waiter.flight is run.flight:
                    return waiter
                if waiter is not None:
                    waiter.leave()
        return None

    def _start(self, org_id: str, plan: Plan, ask: CompletionAsk) -> CompletionTicket:
        try:
            lane = self._lanes[plan.request.provider]
        except KeyError:
            raise ModelNotFound from None
        run = CompletionRun(self, lane, org_id, plan, ask.request_id)
        key: object = plan.key or (plan.body_key, run.call_id)
        try:
            waiter = self.flights.join(key, run)
        except BaseException:
            self.logs.drop((org_id, run.call_id))
            raise
        run.flight = waiter.flight
        self._runs[org_id, run.call_id] = run
        self._by_flight.setdefault(key, []).append(run)
        if run.own:
            self._own.setdefault(plan.body_key, []).append(run)
        if ask.idempotency_key is not None:
            self._keyed.setdefault((org_id, ask.idempotency_key), run)
            run.idempotency = (org_id, ask.idempotency_key)
        return CompletionTicket(waiter, run, Role.BYPASS if run.own else Role.LEADER, org_id, ask)

    # -- one call, by its name -----------------------------------------------------------------------------------

    async def watch(
        self, org_id: str, call_id: str, seq: int = 0
    ) -> "tuple[CompletionRun | RemoteCall, Waiter[Completion] | None]":
        """A call that runs, with an interest in it to be left, or one that ended a moment ago; in any worker.

        One of another worker is there up to chunk `seq`, if that is not far away.

        Raises:
            NotFound: no such call of this tenant.
        """
        run = self._runs.get((org_id, call_id))
        if run is not None:
            run.streamed = True
            return run, run.board()
        found = await self.fleet.ask("find_call", data={"org": org_id, "call": call_id})
        key = ("remote", org_id, call_id)
        waiter = self.flights.follow(key)
        if waiter is None:
            remote = RemoteCall(self, org_id, Holder(found["sender"], call_id))
            waiter = self.flights.join(key, remote)
            remote.flight = waiter.flight
        call = waiter.flight.work
        assert isinstance(call, RemoteCall)  # noqa: S101  only this method puts work under these keys
        try:
            await call.reach(seq)
        except BaseException:
            waiter.leave()
            raise
        return call, waiter

    def _find(self, asked: Signal) -> Json | None:
        run = self._runs.get((str(asked.data["org"]), str(asked.data["call"])))
        if run is None or run.holder is not None:
            return None
        run.streamed = True
        run.enter()
        return {}

    def _stop_here(self, asked: Signal) -> Json | None:
        run = self._runs.get((str(asked.data["org"]), str(asked.data["call"])))
        return None if run is None else {"ended_well": self._stop(run)}

    def _stop(self, run: CompletionRun) -> bool:
        run.stop(TurnCancelled("The call was cancelled.").failure())
        return isinstance(run.flight.outcome, Landed)

    async def cancel(self, org_id: str, call_id: str) -> bool:
        """Stop a call for everyone, in whichever worker; return whether it had ended well before.

        Raises:
            NotFound: no such call of this tenant.
        """
        run = self._runs.get((org_id, call_id))
        if run is not None:
            return self._stop(run)
        answer = await self.fleet.ask("stop_call", data={"org": org_id, "call": call_id})
        return bool(answer["ended_well"])

    def rename(self, run: CompletionRun, call_id: str) -> None:
        """A call goes by the name that its leader gave it."""
        if call_id != run.call_id:
            self._runs.pop((run.org_id, run.call_id), None)
            run.call_id = call_id
            self._runs[run.org_id, call_id] = run

    # -- ends ----------------------------------------------------------------------------------------------------

    def _landed(self, event: object) -> None:
        assert isinstance(event, FlightLanded)  # noqa: S101  all that a coalescer tells
        # A key may be flown again before its cancelled flight has landed: only what has an outcome is over.
        for run in [run for run in self._by_flight.get(event.key, ()) if run.flight.outcome is not None]:
            self._forget(event.key, run)
        self._listener(event)

    def _forget(self, key: object, run: CompletionRun) -> None:
        _remove(self._by_flight, key, run)
        _remove(self._own, run.plan.body_key, run)
        if run.idempotency is not None and self._keyed.get(run.idempotency) is run:
            del self._keyed[run.idempotency]
        run.log.close("end", {})
        name = (run.org_id, run.call_id)
        if run.resumable and not self.closing:
            asyncio.get_running_loop().call_later(self.logs.retention_s, self._runs.pop, name, None)
        else:
            self._runs.pop(name, None)
            self.logs.drop(run.log.key)

    def drain(self) -> None:
        """Take nothing new on; end calls as soon as nobody waits for them, since nobody can come back to them."""
        self.closing = True
        for run in list(self._runs.values()):
            run.flight.abandon_after(0.0)
            if run.flight.waiters == 0:
                self.flights.cancel(run.flight, ShuttingDown().failure())

    async def aclose(self, drain_s: float = 0.0) -> None:
        """Let running calls go on for `drain_s` seconds, end the rest."""
        self.drain()
        await self.flights.aclose(drain_s)


def _shares(policy: Policy, ask: CompletionAsk) -> tuple[bool, str]:
    if policy is Policy.OFF:
        return False, "switched_off"
    if ask.wish is not Wish.NONE:
        return ask.wish is Wish.ON, "asked" if ask.wish is Wish.ON else "asked_not_to"
    n = ask.body.get("n")
    several = n is not None and n > 1
    reason = None if several else _reason(policy, ask.body)
    if reason is None and ask.idempotency_key is not None:
        reason = "idempotency_key"
    return reason is not None, reason or ("several_choices" if several else "sampling")


def _reason(policy: Policy, body: Mapping[str, Any]) -> str | None:
    """Why a body shares by itself."""
    temperature = body.get("temperature")
    if policy is Policy.ALWAYS:
        return "always"
    if type(temperature) in (int, float) and temperature == 0:
        return "temperature"
    return "seed" if body.get("seed") is not None else None


def _remove(table: dict[Any, list[CompletionRun]], key: object, run: CompletionRun) -> None:
    runs = table.get(key, [])
    if run in runs:
        runs.remove(run)
        if not runs:
            del table[key]
