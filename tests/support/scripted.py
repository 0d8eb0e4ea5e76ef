"""A desk of real parts around a provider that does what the test says."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from uuid_utils import uuid7

from oncewise.coordination.memory import World
from oncewise.core.coalesce import Coalescer
from oncewise.core.pacing import LocalLimiter, Pacer
from oncewise.core.retry import RetryBudget
from oncewise.core.stream_hub import Encoder, StreamHub
from oncewise.errors import OncewiseError
from oncewise.model import Thread, TurnAsk
from oncewise.service.calls import Calls, ProviderLane, remember_s
from oncewise.service.fleet import Fleet
from oncewise.service.model_names import ModelNames
from oncewise.service.threads import Threads
from oncewise.service.turn_outcomes import TurnResult
from oncewise.service.turn_runs import TurnRules
from oncewise.service.turns import Turns
from oncewise.storage.ledger import SqlTurnLedger
from oncewise.storage.signals import SqlSignals
from oncewise.storage.sqlite import SqliteDatabase, open_sqlite
from oncewise.storage.threads import SqlThreadStore
from oncewise.testing import ScriptedProvider

__all__ = ["Desk", "ScriptedProvider", "open_desk"]


@dataclass
class Desk:
    """Turns, threads and ledger on a real SQLite file, in front of one provider."""

    provider: Any
    database: SqliteDatabase
    ledger: Any
    calls: Calls
    turns: Turns
    threads: Threads
    hub: StreamHub
    fleet: Fleet
    numbers: Any = field(default_factory=count)

    async def thread(self, org_id: str = "org_a") -> Thread:
        return await self.threads.create(org_id)

    def ask(self, thread: Thread, content: str = "Hello", **fields: Any) -> TurnAsk:
        return self.threads.prepare(thread.org_id, thread.id, content=content, **fields)

    async def post(self, thread: Thread, content: str = "Hello", **fields: Any) -> TurnResult:
        """One JSON request, as the API makes it."""
        return (await self.told(thread, content, **fields))[0]

    async def told(self, thread: Thread, content: str = "Hello", **fields: Any) -> tuple[TurnResult, str]:
        """One JSON request, and the role it was told."""
        with self.turns.send(self.ask(thread, content, **fields), f"r{next(self.numbers)}") as ticket:
            result = await ticket.result()
            return result, ticket.role().value

    async def outcome(self, thread: Thread, content: str = "Hello", **fields: Any) -> TurnResult | OncewiseError:
        try:
            return await self.post(thread, content, **fields)
        except OncewiseError as error:
            return error

    async def messages(self, thread: Thread) -> list[tuple[str, str]]:
        stored = await self.threads.get(thread.org_id, thread.id)
        assert [message.sequence for message in stored.messages] == list(range(len(stored.messages)))
        return [(message.role, message.content) for message in stored.messages]

    async def settled(self) -> None:
        """Wait until nothing runs, and see that nothing is left behind (C16)."""
        async with asyncio.timeout(5):
            while self.turns.flights.stats().tasks or self.calls.flights.stats().tasks:
                await asyncio.sleep(0.005)
        for stats in (self.turns.flights.stats(), self.calls.flights.stats()):
            assert (stats.flights, stats.waiters, stats.tasks) == (0, 0, 0)
        await asyncio.sleep(0)
        assert self._left() == []
        assert self.hub.stats().open_logs == 0
        assert self.calls.logs.stats().logs == 0
        pacer = self.calls.lanes["scripted"].pacer.stats()
        assert (pacer.waiting, pacer.running) == (0, 0)
        # Calls that ended a moment ago are still told to whoever comes late.
        assert [led.work for led in self.fleet._led.values() if led.work.flight.outcome is None] == []
        assert not any(led.work in self.turns.runs.led.values() for led in self.fleet._led.values())

    def _left(self) -> list[object]:
        """What the registries of turns hold still, and beats that go on."""
        turns = self.turns
        registries: list[object] = [*turns.runs.led, *turns.runs._gates, *turns._tickets]
        beats = [task for task in asyncio.all_tasks() if task.get_coro().__qualname__ == "TurnRun._keep_lease"]
        return registries + beats


@asynccontextmanager
async def open_desk(
    path: Path,
    provider: Any = None,
    *,
    rps: float = 10_000.0,
    concurrency: int = 50,
    ledger: Any = None,
    owner: str = "tester",
    world: World | None = None,
    encoder: Encoder | None = None,
    **rules: Any,
) -> AsyncIterator[Desk]:
    """A desk on the database file at `path`.

    Args:
        ledger: Wraps the real one, to delay or fail it.
        world: What it shares with other desks on the same file, besides that.
        encoder: How viewers see events; as text alone if none is given.
    """

    def ids() -> str:
        return str(uuid7())

    provider = provider or ScriptedProvider()
    database = await open_sqlite(str(path), owner=owner)
    real = SqlTurnLedger(database, ids=ids)
    wrapped = ledger(real) if ledger is not None else real
    pacer = Pacer(LocalLimiter(rps, 1, asyncio.get_running_loop().time), concurrency=concurrency)
    lane = ProviderLane(provider, pacer, "scripted-1", RetryBudget())
    names = ModelNames({"scripted": lane.default_model}, default_provider="scripted")
    hub = StreamHub(encoder, retention_s=5.0)
    coordination = None if world is None else world.worker(owner)
    slow = SqlSignals(database, owner, others=database.neighbours, poll_s=0.05)
    await slow.begin()
    fleet = Fleet(b"secret", coordination=coordination, slow=slow)
    calls = Calls(
        {"scripted": lane},
        ledger=wrapped,
        flights=Coalescer(deadline_s=None, abandon_after_s=0.0, remember=remember_s),
        logs=StreamHub(retention_s=0.0),
        ids=ids,
        chance=lambda: 0.0,
        fleet=fleet,
    )
    turns = Turns(
        ledger=wrapped,
        calls=calls,
        flights=Coalescer(deadline_s=None),
        hub=hub,
        owner=owner,
        rules=TurnRules(**rules),
        ids=ids,
        fleet=fleet,
    )
    threads = Threads(SqlThreadStore(database, ids=ids), turns, names=names)
    desk = Desk(provider, database, wrapped, calls, turns, threads, hub, fleet)
    try:
        yield desk
    finally:
        await turns.aclose(0.0)
        await fleet.aclose()
        await slow.aclose()
        await calls.flights.aclose()
        await pacer.aclose()
        hub.close()
        await database.aclose()
