"""The services as the composition root wires them: what runs beside requests, and what is closed when."""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oncewise.api.sse import SseEncoder
from oncewise.bootstrap import FOLLOWERS_FIRST_S, Services, open_services
from oncewise.errors import OncewiseError
from oncewise.model import ChatRequest, TurnState
from oncewise.ports import Lead, ProviderEvent
from oncewise.service.accounts import Ended
from oncewise.settings import Settings, load_settings
from oncewise.testing import ScriptedProvider
from tests.support.fake_provider import FakeProvider


def settings(folder: Path, **fields: Any) -> Settings:
    return Settings(database_url=f"sqlite:///{folder}/ow.db", demo=True, demo_latency_ms=0, **fields)


@asynccontextmanager
async def serving(folder: Path, **fields: Any) -> AsyncGenerator[Services, None]:
    services = await open_services(settings(folder, **fields), SseEncoder())
    try:
        yield services
    finally:
        await services.aclose()


async def lost_turn(services: Services, lease_s: float) -> Any:
    """A turn whose owner is a process that is not there."""
    thread = await services.threads.create("acme")
    admission = await services.turns.ledger.admit(
        services.threads.prepare("acme", thread.id, content="Hello"),
        owner="lost", lease_s=lease_s, replay_window_s=30.0, queue_limit=32,
    )  # fmt: skip
    assert isinstance(admission, Lead)
    return admission.claim


async def state_of(services: Services, claim: Any) -> TurnState:
    return (await services.threads.turn(claim.org_id, claim.thread_id, claim.turn_id)).state


async def test_turns_of_dead_owners_are_ended_at_the_start(tmp_path: Path):
    """At once, though their leases go on for minutes: the process that held them is gone."""
    async with serving(tmp_path) as services:
        claim = await lost_turn(services, 300.0)
    async with serving(tmp_path) as services:
        assert await state_of(services, claim) is TurnState.INTERRUPTED


async def test_turns_that_are_lost_while_the_server_runs_are_ended_too(tmp_path: Path):
    """Nobody asks for them; they would hold up their thread until somebody does."""
    async with serving(tmp_path, lease_s=1) as services:
        claim = await lost_turn(services, 0.0)
        assert await state_of(services, claim) is TurnState.PENDING
        async with asyncio.timeout(FOLLOWERS_FIRST_S + 5):
            while await state_of(services, claim) is TurnState.PENDING:
                await asyncio.sleep(0.05)
        assert await state_of(services, claim) is TurnState.INTERRUPTED


async def test_closing_leaves_no_task_no_thread_and_no_sign_of_life(tmp_path: Path):
    """Whatever was opened; a second time does nothing."""
    async with serving(tmp_path) as services:
        thread = await services.threads.create("acme")
        with services.turns.send(services.threads.prepare("acme", thread.id, content="Hello"), "r") as ticket:
            await ticket.result()
        await services.aclose()
    await nothing_is_left(tmp_path)


class Lingering(ScriptedProvider):
    """Takes its time to close a connection."""

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ProviderEvent, None]:
        try:
            async for event in super().stream(request):
                yield event
        finally:
            await asyncio.sleep(0.2)


async def test_closing_ends_what_runs_and_what_waits(tmp_path: Path):
    """A call, and another that waits for its start: who asked is told to come again, and nothing goes on.

    The turns are handed back, and how the call ended is on record: it is waited for, and the database closes last.
    """
    provider = Lingering(held=True)
    async with serving(tmp_path, demo_rps=0.2) as services:
        asking = []
        lane = services.turns.calls.lanes["demo"]
        services.turns.calls.lanes["demo"] = replace(lane, provider=provider)
        for number in range(2):
            thread = await services.threads.create("acme")
            ask = services.threads.prepare("acme", thread.id, content=f"{number}")
            asking.append(asyncio.create_task(result_of(services, ask, f"r{number}")))
        async with asyncio.timeout(10):
            while not (provider.running and lane.pacer.stats().waiting):
                await asyncio.sleep(0.01)
        await services.aclose()

        assert [(await told).code for told in asking] == ["shutting_down"] * 2
        await nothing_is_left(tmp_path)
    with closing(sqlite3.connect(tmp_path / "ow.db")) as database:
        turns = database.execute("SELECT state, lease_until_s <= strftime('%s') + 1 FROM turns").fetchall()
        attempts = database.execute("SELECT outcome FROM attempts").fetchall()
    assert (turns, attempts) == ([("pending", 1)] * 2, [("cancelled",)])


async def result_of(services: Services, ask: Any, name: str) -> Any:
    with services.turns.send(ask, name) as ticket:
        try:
            return await ticket.result()
        except OncewiseError as error:
            return error


async def test_closing_keeps_the_figures_and_closes_the_connections(tmp_path: Path):
    """Of the last moment too; a provider's connection is kept for the next call only as long as there may be one."""
    async with FakeProvider() as fake:
        environ = {
            "OPENAI_API_KEY": "k",
            "OPENAI_BASE_URL": fake.base_url,
            "ONCEWISE_DATABASE_URL": f"sqlite:///{tmp_path}/ow.db",
        }
        loaded = load_settings(environ=environ).settings
        services = await open_services(loaded, SseEncoder())
        thread = await services.threads.create("acme")
        with services.turns.send(services.threads.prepare("acme", thread.id, content="Hi", model="n3"), "r") as ticket:
            result = await ticket.result()
            services.accounts.close(Ended("r", "acme", "threads", False, 0.0, 1.0, 1, None), ticket, result)
        assert len(fake.connections) == 1
        await services.aclose()
        async with asyncio.timeout(2):
            while fake.connections:
                await asyncio.sleep(0.01)
        services = await open_services(loaded, SseEncoder())
        assert (await services.metrics.performance(10, None))["total_requests"] == 1
        await services.aclose()


async def test_a_start_that_fails_half_way_closes_what_it_opened(tmp_path: Path):
    """The database is open by the time that the providers are found wrong."""
    wrong = settings(tmp_path).model_copy(update={"default_provider": "nobody", "demo": False})
    with pytest.raises(KeyError):
        await open_services(wrong, SseEncoder())
    await nothing_is_left(tmp_path)


async def nothing_is_left(folder: Path) -> None:
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("oncewise-")]
    assert names_in(folder) == {"ow.db", "ow.db.owners"}
    assert names_in(folder / "ow.db.owners") == set()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
