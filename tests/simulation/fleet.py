"""A fleet on a simulated world: workers of real parts, one database, one provider, and clients who try again.

A worker is what a server process is: the real turns, calls, coalescers, hubs and pacers, put together as the
composition root does it. Only what is outside of a process is simulated: the ledger's transactions happen somewhere
else and take their time, and so does the provider.

The provider never says the same twice: its text names the call it came from, so that a text which turns up where it
does not belong is seen.

Deliberately absent: which faults happen (`tests.simulation.histories`) and what is promised (`tests.simulation.check`).
"""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import count
from typing import Any

from oncewise.api.row_viewer import RowViewer
from oncewise.bootstrap import FOLLOWERS_FIRST_S, LOOK_EVERY_S
from oncewise.core.coalesce import Coalescer
from oncewise.core.pacing import LocalLimiter, Pacer
from oncewise.core.retry import RetryBudget
from oncewise.core.stream_hub import Position, StreamHub
from oncewise.errors import OncewiseError, ProviderError, ProviderProtocolError, StorageUnavailable
from oncewise.model import ChatRequest, CompletionRequest, FinishReason, Role, StoredTurn, TurnAsk, TurnState, Usage
from oncewise.ports import Chunk, Completion, ProviderEvent, TextDelta
from oncewise.service.calls import Calls, ProviderLane, remember_s
from oncewise.service.completions import CompletionAsk, Completions, Wish
from oncewise.service.fleet import Fleet as Among
from oncewise.service.model_names import ModelNames
from oncewise.service.threads import Threads
from oncewise.service.turn_runs import TurnRules
from oncewise.service.turns import Turns, TurnTicket
from tests.simulation.between import Between, WayThere
from tests.simulation.ledger import Records
from tests.simulation.world import Machine, World

__all__ = ["Call", "Client", "Fleet", "Told", "Worker"]

DATABASE_PATIENCE_S = 1.0
LEASE_S = 10.0
DELTAS = 5
STORAGE_CODES = ("storage_unavailable", "not_persisted")
GAP_S = 0.2


# -- the provider ------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """One request that reached the provider.

    Attributes:
        ends: How it is to end: `well`, `refused`, `cut` after some deltas, or `eof` without a finish reason.
        deltas: How many pieces are sent before it ends.
        until_s: When it ended; infinity if its worker was lost.
    """

    number: int
    request: ChatRequest | CompletionRequest
    worker: str
    at_s: float
    until_s: float = float("inf")
    ends: str = "well"
    deltas: int = DELTAS

    def piece(self, at: int) -> str:
        """One delta of its text."""
        return f"[{self.number}.{at}]"

    @property
    def text(self) -> str:
        """The whole text of a call that ends well."""
        return "".join(self.piece(at) for at in range(self.deltas))


class Provider:
    """Implements `oncewise.ports.Provider` for one worker; the calls of all are in the fleet's list."""

    name = "simulated"
    eof_is_done = False

    def __init__(self, fleet: "Fleet", machine: Machine) -> None:
        self._fleet = fleet
        self._machine = machine

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ProviderEvent, None]:
        """See `Provider.stream`."""
        call = self._fleet.called(request, self._machine)
        async with aclosing(self._pieces(call)) as pieces:
            async for piece in pieces:
                yield TextDelta(piece)
        yield Completion(FinishReason.STOP, Usage(1, call.deltas), model=request.model)

    async def chunks(self, request: CompletionRequest) -> AsyncGenerator[Chunk, None]:
        """See `Provider.chunks`."""
        call = self._fleet.called(request, self._machine)
        async with aclosing(self._pieces(call)) as pieces:
            async for piece in pieces:
                yield {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
        yield {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1}}

    async def _pieces(self, call: Call) -> AsyncGenerator[str, None]:
        world = self._fleet.world
        try:
            await asyncio.sleep(world.delay_s() + GAP_S)
            if call.ends == "refused":
                raise ProviderError
            for at in range(call.deltas):
                yield call.piece(at)
                await asyncio.sleep(world.delay_s() + GAP_S * world.chance.random())
            if call.ends == "cut":
                raise ProviderError
            if call.ends == "eof" and not self.eof_is_done:
                raise ProviderProtocolError
        finally:
            call.until_s = world.now_s

    async def aclose(self) -> None:
        """See `Provider.aclose`."""


# -- the database ------------------------------------------------------------------------------------------------


class RemoteLedger:
    """Implements `oncewise.ports.TurnLedger` for one worker: each transaction is a message there and one back."""

    def __init__(self, fleet: "Fleet", machine: Machine) -> None:
        self._fleet = fleet
        self._machine = machine

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._fleet.records, name)

        async def ask(*args: Any, **kwargs: Any) -> Any:
            return await self.transaction(lambda: method(*args, **kwargs))

        return ask

    def transaction(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        """Run `work` in the database, some time from now."""

        def serve() -> Any:
            if self._fleet.database_down:
                raise StorageUnavailable
            self._fleet.records.asked_by = self._machine.name
            return work()

        return self._machine.ask(serve, lost=StorageUnavailable, within_s=DATABASE_PATIENCE_S)


# -- workers -----------------------------------------------------------------------------------------------------


class JsonLines:
    """How events look to simulated clients: one JSON document a line."""

    def delta(self, position: Position, text: str) -> bytes:
        """A piece of text."""
        return _line({"name": "delta", "epoch": position.epoch, "seq": position.seq, "text": text})

    def event(self, name: str, data: Mapping[str, Any], position: Position | None) -> bytes:
        """Any other event."""
        place = {"epoch": position.epoch, "seq": position.seq} if position is not None else {}
        return _line({"name": name, "data": dict(data), **place})


def _line(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode() + b"\n"


class Worker:
    """One server process: a machine and the real parts on it."""

    def __init__(self, fleet: "Fleet", name: str) -> None:
        self.name = name
        self.machine = machine = Machine(fleet.world, name)
        self.ledger: Any = fleet.parts.ledger(fleet, machine)
        self._fleet = fleet
        machine.read(self._make)
        machine.start(self._free_lost())
        machine.start(self._sweep(fleet.world.chance.random() * LEASE_S))

    def _make(self) -> None:
        fleet, machine = self._fleet, self.machine
        way = WayThere(fleet.between, machine) if fleet.between is not None else None
        self.among = among = Among(b"secret", coordination=way)  # type: ignore[arg-type]
        limiter = LocalLimiter(fleet.rps, 1, machine.loop.time)
        self.pacer = Pacer(limiter, concurrency=8)
        lane = ProviderLane(fleet.parts.provider(fleet, machine), self.pacer, "small", RetryBudget())  # type: ignore[arg-type]
        self.calls = fleet.parts.calls(
            {Provider.name: lane},
            ledger=self.ledger,
            flights=Coalescer(deadline_s=None, abandon_after_s=0.0, remember=remember_s),
            logs=StreamHub(retention_s=0.0),
            ids=fleet.new_id,
            chance=fleet.world.chance.random,
            fleet=among,
        )
        self.hub = fleet.parts.hub(JsonLines(), retention_s=5.0)
        self.turns = Turns(
            ledger=self.ledger,
            calls=self.calls,
            flights=Coalescer(deadline_s=None),
            hub=self.hub,
            owner=self.name,
            rules=TurnRules(lease_s=LEASE_S),
            ids=fleet.new_id,
            fleet=among,
        )
        names = ModelNames({Provider.name: "small"}, default_provider=Provider.name)
        self.threads = Threads(None, self.turns, names=names)  # type: ignore[arg-type]
        self.completions = Completions(
            {Provider.name: lane},
            names,
            logs=StreamHub(retention_s=5.0),
            ids=fleet.new_id,
            chance=fleet.world.chance.random,
            now_s=lambda: 0,
            fleet=among,
        )

    async def _free_lost(self) -> None:
        """As `oncewise.bootstrap` does it; so is the next."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if self._fleet.dead:
                with contextlib.suppress(StorageUnavailable):
                    await self.ledger.lapse(tuple(self._fleet.dead))
                    self.among.owners_lost(frozenset(self._fleet.dead))

    async def _sweep(self, first_s: float) -> None:
        await asyncio.sleep(first_s)
        while True:
            with contextlib.suppress(StorageUnavailable):
                await self.ledger.sweep(lapsed_s=FOLLOWERS_FIRST_S)
            await asyncio.sleep(LEASE_S)

    @property
    def idle(self) -> bool:
        """Whether nothing is held for anybody."""
        tables = (self.turns.flights, self.calls.flights, self.completions.flights)
        flights = self.machine.read(lambda: [table.stats() for table in tables])
        pacer = self.machine.read(self.pacer.stats)
        held = sum(stats.flights + stats.waiters + stats.tasks for stats in flights)
        return held + pacer.waiting + pacer.running == 0


@dataclass(frozen=True)
class Parts:
    """The classes that a fleet is made of; a planted bug replaces one."""

    provider: type[Provider] = Provider
    calls: type[Calls] = Calls
    ledger: type[RemoteLedger] = RemoteLedger
    records: type[Records] = Records
    between: type[Between] = Between
    hub: type[StreamHub] = StreamHub


# -- clients -----------------------------------------------------------------------------------------------------


@dataclass
class Told:
    """What a client was told at last.

    Attributes:
        state: Of the turn, or the code of an error.
        text: What it has of the answer.
        turn_id: The turn it belongs to; None if the client never learnt it.
    """

    state: str
    text: str
    turn_id: str | None
    at_s: float


class Client:
    """Sends one message, to any worker that lives, and again as an SDK does when that fails.

    Attributes:
        told: The answer; None while it waits.
        broken: What it saw that no client may see, in words.
        ended_at: The position of the end of its stream.
        saw: The epochs under which it was shown text, by turn.
    """

    def __init__(self, fleet: "Fleet", ask: TurnAsk, *, stream: bool) -> None:
        self.fleet = fleet
        self.ask = ask
        self.stream = stream
        self.told: Told | None = None
        self.broken: list[str] = []
        self.tries = 0
        self.began_s = 0.0
        self._at: Machine | None = None
        self.ended_at: Position | None = None
        self.saw: dict[str, set[int]] = {}
        self._shown = ""
        self._last: Position | None = None
        self._turn_id: str | None = None

    def begin(self) -> None:
        """Send it."""
        workers = [worker for worker in self.fleet.workers if worker.machine.runs]
        if not workers:
            self.fleet.world.after(0.5, self.begin)
            return
        worker = self.fleet.world.chance.choice(workers)
        self.began_s = self.began_s or self.fleet.world.now_s
        self.tries += 1
        self._at = worker.machine
        if self.stream and self._turn_id is not None:
            worker.machine.start(self._resume(worker, self._turn_id))
        else:
            worker.machine.start(self._watch(worker) if self.stream else self._wait(worker))

    def lost(self, machine: Machine) -> None:
        """The worker is gone; a client notices by its connection."""
        if self._at is machine and self.told is None:
            self._again()

    def _again(self) -> None:
        self._at = None
        self.fleet.world.after(0.1 + self.fleet.world.chance.random(), self.begin)

    def _answer(self, state: str, text: str, turn_id: str | None) -> None:
        if self.told is None:
            self.told = Told(state, text, turn_id, self.fleet.world.now_s)

    def _refused(self, error: OncewiseError) -> None:
        if error.retryable and self.tries < 12:
            self._again()
        else:
            self._answer(error.code, self._shown, self._turn_id)

    # -- JSON ----------------------------------------------------------------------------------------------------

    async def _wait(self, worker: Worker) -> None:
        try:
            with worker.turns.send(self.ask, self.fleet.new_id()) as ticket:
                stored = (await ticket.result()).stored
        except OncewiseError as error:
            self._refused(error)
            return
        assert stored.assistant_message is not None
        self._answer(stored.state.value, stored.assistant_message.content, stored.id)

    # -- streams -------------------------------------------------------------------------------------------------

    async def _watch(self, worker: Worker) -> None:
        """As `oncewise.api.streams.Streams.post`."""
        try:
            with worker.turns.send(self.ask, self.fleet.new_id()) as ticket:
                source = await self._source(worker, ticket)
                self._turn_id = (await ticket.admitted()).turn_id
                await self._show(source)
        except OncewiseError as error:
            self._refused(error)

    async def _source(self, worker: Worker, ticket: TurnTicket) -> Any:
        admitted = await ticket.admitted()
        log = None if ticket.role() is Role.REPLAYED else await ticket.watch()
        if log is not None:
            viewer = log.view()
            await viewer.wait(1.0)
            if log.closed and not log.deltas:
                viewer.close()
                await ticket.result()
            return viewer
        try:
            turn = await asyncio.wait_for(ticket.result(), 1.0)
        except TimeoutError:
            return self._row(worker, await self._read(worker, admitted.turn_id))
        return self._row(worker, turn.stored)

    async def _resume(self, worker: Worker, turn_id: str) -> None:
        """As `Streams.resume`."""
        try:
            turn = await self._read(worker, turn_id)
            log = await worker.threads.watch(turn)
            source = self._row(worker, turn) if log is None else log.view(self._last)
            if source.from_start:
                self._shown, self._last = "", None
            if not source.ended:
                await self._show(source)
        except OncewiseError as error:
            self._refused(error)

    async def _read(self, worker: Worker, turn_id: str) -> StoredTurn:
        turn: StoredTurn = await worker.ledger.turn(self.ask.org_id, self.ask.thread_id, turn_id)
        return turn

    def _row(self, worker: Worker, turn: StoredTurn) -> RowViewer:
        read = partial(self._read, worker, turn.id)
        return RowViewer(turn, read, worker.hub.encoder, self._last)

    async def _show(self, source: Any) -> None:
        while not source.ended and self.told is None:
            if await source.wait(15.0):
                for line in source.take().splitlines():
                    self._take(json.loads(line))
        source.close()
        if self.told is None:
            self._again()  # closed without an end: resume

    def _take(self, event: dict[str, Any]) -> None:
        name = event["name"]
        position = Position(event["epoch"], event["seq"]) if "seq" in event else None
        if position is not None:
            if self._last is not None and position <= self._last and name != "error":
                self.broken.append(f"{name} at {position} after {self._last}")
            if self._last is not None and position.epoch != self._last.epoch and name == "delta":
                self.broken.append(f"a delta of epoch {position.epoch} after {self._last}, without a reset")
            self._last = position
        if name == "reset":
            self._shown = ""
        elif name == "delta":
            self._shown += event["text"]
            self.saw.setdefault(self._turn_id or "", set()).add(event["epoch"])
        elif name in ("done", "error"):
            data = event["data"]
            self.ended_at = position
            # A turn that the database could not be told of ends there in its own way.
            state = data["code"] if data.get("code") in STORAGE_CODES else data["state"]
            self._answer(state, self._shown, self._turn_id)


class CallClient(Client):
    """Sends one request to `/v1`, and again as an SDK does."""

    def __init__(self, fleet: "Fleet", org_id: str, body: Mapping[str, Any]) -> None:
        super().__init__(fleet, TurnAsk(org_id, "", "", Provider.name, "small", ""), stream=False)
        self.body = body

    async def _wait(self, worker: Worker) -> None:
        ask = CompletionAsk(self.fleet.new_id(), self.body, wish=Wish.ON)
        try:
            with worker.completions.send(self.ask.org_id, ask) as ticket:
                completion = await ticket.result()
                document = json.loads(ticket.run.document(completion))
        except OncewiseError as error:
            self._refused(error)
            return
        self._answer(TurnState.COMPLETED.value, document["choices"][0]["message"]["content"], None)


# -- the fleet ---------------------------------------------------------------------------------------------------


@dataclass
class Fleet:
    """Everything outside the workers, and the workers.

    Attributes:
        dead: Workers that crashed; their liveness locks are free.
        broke: Whether any fault happened.
        between: What lies between the workers; None if each is on its own.
        database_down: Whether the database answers nobody.
        database_skew_s: How far its clock was stepped.
        script: How the next provider calls end; calls beyond it end well.
    """

    world: World
    parts: Parts = Parts()
    rps: float = 1000.0
    workers: list[Worker] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)
    provider_calls: list[Call] = field(default_factory=list)
    script: list[tuple[str, int]] = field(default_factory=list)
    broke: bool = False
    database_down: bool = False
    database_skew_s: float = 0.0
    between: Between | None = None
    _numbers: Any = field(default_factory=count)

    def __post_init__(self) -> None:
        self.records = self.parts.records(lambda: 1_800_000_000.0 + self.world.now_s + self.database_skew_s)

    def new_id(self) -> str:
        """A name that nothing else has."""
        return f"i{next(self._numbers)}"

    def add_worker(self) -> Worker:
        """Start another worker."""
        worker = Worker(self, f"worker-{next(self._numbers)}")
        self.workers.append(worker)
        return worker

    def crash(self, worker: Worker, restart_s: float) -> None:
        """Kill a worker; another takes its place after a while."""
        worker.machine.crash()
        self.dead.append(worker.name)
        if self.between is not None:
            self.between.listeners.pop(worker.name, None)
        self.workers.remove(worker)
        for client in self.clients:
            client.lost(worker.machine)
        self.world.after(restart_s, self.add_worker)

    def called(self, request: ChatRequest | CompletionRequest, machine: Machine) -> Call:
        """Take a provider call in."""
        ends, deltas = self.script.pop(0) if self.script else ("well", DELTAS)
        number, at_s = len(self.provider_calls), self.world.now_s
        call = Call(number, request, machine.name, at_s, ends=ends, deltas=deltas)
        self.provider_calls.append(call)
        return call

    def send(self, at_s: float, org_id: str, thread_id: str, content: str, **how: Any) -> None:
        """Let a client send a message."""
        stream = how.pop("stream", False)
        fingerprint = sha256(content.encode()).hexdigest()
        ask = TurnAsk(org_id, thread_id, content, Provider.name, "small", fingerprint, **how)
        client = Client(self, ask, stream=stream)
        self.clients.append(client)
        self.world.after(at_s, client.begin)

    def ask(self, at_s: float, org_id: str, content: str) -> None:
        """Let a client send a request to `/v1`."""
        body = {"model": "simulated/small", "messages": [{"role": "user", "content": content}]}
        client = CallClient(self, org_id, body)
        self.clients.append(client)
        self.world.after(at_s, client.begin)

    def happened(self) -> Counter[str]:
        """How often what happened."""
        taken = sum(turn.epoch > 1 for thread in self.records.threads.values() for turn in thread.turns)
        return self.world.counts + Counter(
            {
                "provider calls": len(self.provider_calls),
                "requests": len(self.clients),
                "turns completed": len(self.completed()),
                "turns taken over": taken,
            }
        )

    def tear_down(self) -> None:
        """End what is left of all machines, the crashed ones too."""
        self.world.over = True
        for machine in self.world.machines:
            machine.bury()

    @property
    def settled(self) -> bool:
        """Whether every client has its answer."""
        return all(client.told is not None for client in self.clients)

    @property
    def open_turns(self) -> list[StoredTurn]:
        """Turns that have not ended."""
        return [turn for thread in self.records.threads.values() for turn in thread.turns if not turn.state.final]

    def turn(self, turn_id: str) -> StoredTurn | None:
        """A turn of any tenant, as it is stored."""
        for thread in self.records.threads.values():
            for turn in thread.turns:
                if turn.id == turn_id:
                    return turn
        return None

    def completed(self) -> list[StoredTurn]:
        """All turns that were stored as complete."""
        threads = self.records.threads.values()
        return [turn for thread in threads for turn in thread.turns if turn.state is TurnState.COMPLETED]
