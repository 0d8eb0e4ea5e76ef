"""The composition root: settings in, wired services out.

Every long-lived object is made here, once, and closed here, in the reverse order: first what takes work on, last what
the work stands on.

Deliberately absent: HTTP. How events look on the wire is passed in as an encoder.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa
from uuid_utils import uuid7

from oncewise.core.breaker import Breakers, BreakerStats
from oncewise.core.coalesce import Coalescer
from oncewise.core.pacing import LocalLimiter, Pacer, PacerStats
from oncewise.core.retry import RetryBudget
from oncewise.core.stream_hub import Encoder, StreamHub
from oncewise.errors import OncewiseError, StorageUnavailable
from oncewise.ports import Listener, Provider
from oncewise.providers.anthropic import AnthropicProvider
from oncewise.providers.catalogue import Quirks, Wire
from oncewise.providers.demo import DemoProvider
from oncewise.providers.gemini import GeminiProvider
from oncewise.providers.openai_compatible import OpenAICompatibleProvider
from oncewise.service.calls import Calls, ProviderLane, remember_s
from oncewise.service.completions import Completions
from oncewise.service.keys import Keys
from oncewise.service.metrics import Metrics
from oncewise.service.model_names import ModelNames
from oncewise.service.sharing import Policies, Policy
from oncewise.service.threads import Threads
from oncewise.service.turns import TurnRules, Turns
from oncewise.settings import ProviderSettings, Settings
from oncewise.storage.keys import SqlKeyStore
from oncewise.storage.ledger import SqlTurnLedger
from oncewise.storage.requests import SqlRequestLog
from oncewise.storage.sqlite import SqliteDatabase, open_sqlite
from oncewise.storage.threads import SqlThreadStore
from oncewise.telemetry.logs import log_event
from oncewise.telemetry.prometheus import Prometheus

__all__ = ["Lanes", "Services", "open_services"]


class Lanes(dict[str, ProviderLane]):
    """The configured lanes by name. With a fallback, every other name is answered by that lane too."""

    def __init__(self, lanes: Mapping[str, ProviderLane], fallback: ProviderLane | None = None) -> None:
        super().__init__(lanes)
        self._fallback = fallback

    def __missing__(self, name: str) -> ProviderLane:
        if self._fallback is None:
            raise KeyError(name)
        return self._fallback

    def stats(self) -> dict[str, tuple[PacerStats, BreakerStats]]:
        """What each provider's pacer and breakers hold now."""
        now_s = asyncio.get_running_loop().time()
        return {name: (lane.pacer.stats(), lane.breakers.stats(now_s)) for name, lane in self.items()}


@dataclass
class Services:
    """Everything that serves requests, wired.

    Attributes:
        prometheus: Counts what happens, for `GET /metrics`.
        names: Which provider and model a request means.
        draining: Set once the server is asked to stop: nothing new is taken on.
        warnings: Sentences for the start-up banner.
    """

    settings: Settings
    threads: Threads
    turns: Turns
    completions: Completions
    metrics: Metrics
    keys: Keys
    hub: StreamHub
    prometheus: Prometheus
    names: ModelNames
    warnings: tuple[str, ...]
    draining: bool = False
    _database: SqliteDatabase = field(kw_only=True, repr=False)
    _opened: AsyncExitStack = field(kw_only=True, repr=False)

    async def ready(self) -> dict[str, str]:
        """The state of each thing requests depend on: `ok`, or what is wrong."""
        checks = {"storage": "ok"}
        try:
            await self._database.read(lambda conn: conn.execute(sa.text("SELECT 1")).scalar_one())
        except OncewiseError as error:
            checks["storage"] = error.code
        if self.draining:
            checks["server"] = "draining"
        return checks

    def drain(self) -> None:
        """Take no new work on from now."""
        self.draining = True
        self.turns.closing = True
        self.completions.drain()

    async def finish(self, drain_s: float) -> None:
        """Let running turns and calls go on for `drain_s` seconds; hand the turns back that are left, end the calls."""
        self.drain()
        await asyncio.gather(self.turns.aclose(drain_s), self.completions.aclose(drain_s))

    async def aclose(self, drain_s: float = 0.0) -> None:
        """As `finish`, and close everything."""
        await self.finish(drain_s)
        await self._opened.aclose()


async def open_services(settings: Settings, encoder: Encoder) -> Services:
    """Open the storage, make the lanes, wire the services and start what runs beside them.

    Raises:
        StorageUnavailable: the database cannot be opened.
        SchemaMismatch: the database was made by a newer version.
    """
    # Whatever was opened is closed again if a later step fails.
    async with AsyncExitStack() as opening:
        return await _wire(settings, encoder, opening)


async def _wire(settings: Settings, encoder: Encoder, opening: AsyncExitStack) -> Services:
    owner = _new_id()
    database = await open_sqlite(_sqlite_path(settings.database_url), owner=owner)
    opening.push_async_callback(database.aclose)
    ledger = SqlTurnLedger(database, ids=_new_id)
    listeners: list[Listener] = [log_event]

    def tell(event: object) -> None:
        for listener in listeners:
            listener(event)

    lanes = _lanes(settings, opening, tell)
    hub = StreamHub(encoder, retention_s=settings.log_retention_s)
    flights = Coalescer(deadline_s=None, listener=tell)
    prometheus = Prometheus(flights.stats, hub.stats, lanes.stats)
    listeners.append(prometheus)
    rules = TurnRules(replay_window_s=settings.replay_window_s, lease_s=settings.lease_s)
    turns = Turns(
        ledger=ledger,
        calls=_calls(lanes, ledger, opening),
        flights=flights,
        hub=hub,
        owner=owner,
        rules=rules,
        ids=_new_id,
    )
    metrics = Metrics(SqlRequestLog(database), listener=prometheus)
    opening.push_async_callback(metrics.flush)
    names = _names(settings, lanes)
    threads = Threads(SqlThreadStore(database, ids=_new_id), turns, names=names)
    keys = Keys(SqlKeyStore(database, ids=_new_id))
    await keys.refresh()
    completions = Completions(
        lanes,
        names,
        logs=StreamHub(retention_s=settings.log_retention_s),
        ids=_new_id,
        policies=_policies(settings),
        listener=tell,
    )
    await ledger.sweep(dead_owners=await database.dead_owners())
    for beside in (metrics.run(), keys.run(), _sweep(ledger, database, settings.lease_s)):
        opening.push_async_callback(_background(beside))
    return Services(
        settings,
        threads,
        turns,
        completions,
        metrics,
        keys,
        hub,
        prometheus,
        names,
        await database.hazards(),
        _database=database,
        _opened=opening.pop_all(),
    )


def _calls(lanes: Lanes, ledger: SqlTurnLedger, opening: AsyncExitStack) -> Calls:
    flights = Coalescer(deadline_s=None, abandon_after_s=0.0, remember=remember_s)
    opening.push_async_callback(flights.aclose)
    return Calls(lanes, ledger=ledger, flights=flights, logs=StreamHub(retention_s=0.0), ids=_new_id)


def _policies(settings: Settings) -> Policies:
    tenants = {name: Policy(value) for name, value in settings.v1_coalesce_tenants.items()}
    models = {name: Policy(value) for name, value in settings.v1_coalesce_models.items()}
    return Policies(Policy(settings.v1_coalesce), tenants, models)


def _new_id() -> str:
    return str(uuid7())


def _sqlite_path(url: str) -> str:
    parsed = sa.make_url(url)
    if not parsed.database:
        raise StorageUnavailable("An SQLite database needs a file.")
    return str(Path(parsed.database).expanduser())


def _background(work: Awaitable[None]) -> Callable[[], Awaitable[None]]:
    """Run `work` beside the requests; return what ends it."""
    task = asyncio.ensure_future(work)

    async def end() -> None:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    return end


async def _sweep(ledger: SqlTurnLedger, database: SqliteDatabase, every_s: float) -> None:
    """End turns whose owner is lost and that nobody waits for."""
    while True:
        await asyncio.sleep(every_s)
        with suppress(OncewiseError):
            await ledger.sweep(dead_owners=await database.dead_owners())


# -- providers ---------------------------------------------------------------------------------------------------

QUEUE_S = 60.0
QUEUE_PLACES = 1_000
DEMO_META = MappingProxyType({"demo": True})


def _lanes(settings: Settings, opening: AsyncExitStack, tell: Listener) -> Lanes:
    demo = DemoProvider(latency_ms=settings.demo_latency_ms, rps=settings.demo_rps)
    demo_lane = _lane(demo, settings.demo_rps, opening, tell, burst=1, concurrency=64, model="demo-1", meta=DEMO_META)
    if settings.demo:
        return Lanes({"demo": demo_lane}, fallback=demo_lane)
    lanes = {"demo": demo_lane}
    for configured in settings.providers.values():
        lanes[configured.name] = _lane(
            _connect(configured),
            configured.rps,
            opening,
            tell,
            burst=configured.burst,
            concurrency=configured.concurrency,
            model=configured.default_model,
        )
    return Lanes(lanes)


def _names(settings: Settings, lanes: Lanes) -> ModelNames:
    models = {name: lane.default_model for name, lane in lanes.items()}
    return ModelNames(
        {**models, settings.default_provider: lanes[settings.default_provider].default_model},
        default_provider=settings.default_provider,
        aliases=settings.aliases,
        any_provider=settings.demo,
    )


def _connect(configured: ProviderSettings) -> Provider:
    entry = configured.entry
    wire = entry.wire if entry else Wire.OPENAI
    name, base_url, concurrency = configured.name, configured.base_url, configured.concurrency
    api_key = configured.api_key.get_secret_value() if configured.api_key else None
    if wire is Wire.ANTHROPIC:
        return AnthropicProvider.connect(name, base_url, api_key, concurrency=concurrency)
    if wire is Wire.GEMINI:
        return GeminiProvider.connect(name, base_url, api_key, concurrency=concurrency)
    quirks = entry.quirks if entry else Quirks()
    return OpenAICompatibleProvider.connect(name, base_url, api_key, concurrency=concurrency, quirks=quirks)


def _lane(
    provider: Provider,
    rps: float,
    opening: AsyncExitStack,
    tell: Listener,
    *,
    burst: int,
    concurrency: int,
    model: str,
    meta: Mapping[str, Any] = MappingProxyType({}),
) -> ProviderLane:
    limiter = LocalLimiter(rps, burst, asyncio.get_running_loop().time)
    # Nobody waits whose start could not come in time: it is better told at once.
    places = min(QUEUE_PLACES, math.ceil(rps * QUEUE_S))
    pacer = Pacer(limiter, concurrency=concurrency, max_waiting=places, max_wait_s=QUEUE_S)
    opening.push_async_callback(provider.aclose)
    opening.push_async_callback(pacer.aclose)
    return ProviderLane(provider, pacer, model, RetryBudget(), meta, Breakers(provider.name, listener=tell))
