"""The composition root: settings in, wired services out.

Every long-lived object is made here, once, and closed here, in the reverse order: first what takes work on, last what
the work stands on.

Deliberately absent: HTTP. How events look on the wire is passed in as an encoder.
"""

import asyncio
import hmac
import math
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa
from uuid_utils import uuid7

from oncewise.coordination.fallback import FallbackLimiter, FallbackSlots
from oncewise.core.breaker import Breakers, BreakerStats
from oncewise.core.coalesce import Coalescer
from oncewise.core.errands import Errands
from oncewise.core.pacing import Pacer, PacerStats, Starts
from oncewise.core.retry import RetryBudget
from oncewise.core.stream_hub import Encoder, StreamHub
from oncewise.errors import CoordinationUnavailable, OncewiseError
from oncewise.ports import (
    CallSlots,
    Coordination,
    CoordinationChanged,
    CoordinationLate,
    Listener,
    Provider,
    SharedLimiter,
    Signal,
)
from oncewise.providers.anthropic import AnthropicProvider
from oncewise.providers.catalogue import Quirks, Wire
from oncewise.providers.demo import DemoProvider
from oncewise.providers.gemini import GeminiProvider
from oncewise.providers.native import NativeProvider
from oncewise.providers.openai_compatible import OpenAICompatibleProvider
from oncewise.providers.prices import PublicPrices
from oncewise.service.accounts import Accounts, Prices
from oncewise.service.calls import Calls, ProviderLane, remember_s
from oncewise.service.completions import Completions
from oncewise.service.fleet import Fleet
from oncewise.service.keys import Keys
from oncewise.service.metrics import Metrics
from oncewise.service.model_names import ModelNames
from oncewise.service.sharing import Policies, Policy
from oncewise.service.threads import Threads
from oncewise.service.turn_runs import TurnRules
from oncewise.service.turns import Turns
from oncewise.settings import ProviderSettings, Settings
from oncewise.storage.database import Database
from oncewise.storage.deployment import deployment_secret
from oncewise.storage.engines import open_database
from oncewise.storage.keys import SqlKeyStore
from oncewise.storage.ledger import SqlTurnLedger
from oncewise.storage.pacing import SqlCallSlots, SqlLimiter
from oncewise.storage.requests import SqlRequestLog
from oncewise.storage.signals import SqlSignals
from oncewise.storage.threads import SqlThreadStore
from oncewise.telemetry.logs import log_event
from oncewise.telemetry.prometheus import Prometheus
from oncewise.telemetry.shared_figures import SharedFigures

__all__ = ["DEGRADED", "Lanes", "Services", "connect", "open_services"]

DEGRADED = "degraded"
"""State of something that requests are served without, if need be."""


LOG_BYTES = 256 * 2**20
"""What the logs of one process may hold: half for viewers of turns, half for running calls and those of /v1."""


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
    accounts: Accounts
    keys: Keys
    hub: StreamHub
    prometheus: Prometheus
    names: ModelNames
    warnings: tuple[str, ...]
    draining: bool = False
    _database: Database = field(kw_only=True, repr=False)
    _coordination: Coordination | None = field(kw_only=True, repr=False)
    _opened: AsyncExitStack = field(kw_only=True, repr=False)

    async def ready(self) -> dict[str, str]:
        """The state of each thing requests depend on: `ok`, or what is wrong."""
        checks = {"storage": "ok"}
        try:
            await self._database.read(lambda conn: conn.execute(sa.text("SELECT 1")).scalar_one())
        except OncewiseError as error:
            checks["storage"] = error.code
        if self._coordination is not None:
            # Not a reason to be taken out of service: all workers would be, and each of them can serve.
            checks["coordination"] = "ok" if await self._coordination.check() is None else DEGRADED
        if self.draining:
            checks["server"] = "draining"
        return checks

    def drain(self) -> None:
        """Take no new work on from now."""
        self.draining = True
        self.turns.runs.closing = True
        self.completions.drain()

    async def finish(self, drain_s: float) -> None:
        """Let running turns and calls go on for `drain_s` seconds; hand the turns back that are left, end the calls."""
        self.drain()
        await asyncio.gather(self.turns.aclose(drain_s), self.completions.aclose(drain_s))

    async def aclose(self, drain_s: float = 0.0) -> None:
        """As `finish`, and close everything."""
        await self.finish(drain_s)
        await self._opened.aclose()


OpenStorage = Callable[[Settings, str], Awaitable[Database]]
"""Opens the database that the settings name, for an owner of turns of that name."""


async def _storage(settings: Settings, owner: str) -> Database:
    return await open_database(settings, owner=owner)


async def open_services(
    settings: Settings,
    encoder: Encoder,
    figures: SharedFigures | None = None,
    *,
    open_storage: OpenStorage = _storage,
) -> Services:
    """Open the storage, make the lanes, wire the services and start what runs beside them.

    Args:
        settings: What to serve with.
        encoder: How events look on the wire.
        figures: What this process shares with the other workers of its server; closed with the services.
        open_storage: How the database is opened; another way is for whoever puts something before it.

    Raises:
        StorageUnavailable: the database cannot be opened.
        SchemaMismatch: the database has another version's schema.
        CoordinationUnavailable: Redis cannot be used with what is installed or set; one that only does not answer can.
    """
    # Whatever was opened is closed again if a later step fails.
    async with AsyncExitStack() as opening:
        if figures is not None:
            opening.callback(figures.close)
        return await _wire(settings, encoder, opening, figures, open_storage)


async def _wire(
    settings: Settings,
    encoder: Encoder,
    opening: AsyncExitStack,
    figures: SharedFigures | None,
    open_storage: OpenStorage,
) -> Services:
    owner = _new_id()
    database = await open_storage(settings, owner)
    opening.push_async_callback(database.aclose)
    ledger = SqlTurnLedger(database, ids=_new_id)
    listeners: list[Listener] = [log_event]

    def tell(event: object) -> None:
        for listener in listeners:
            listener(event)

    coordination = await _coordination(settings, await deployment_secret(database), owner, tell, opening)
    slow = SqlSignals(database, owner, others=database.neighbours)
    await slow.begin()
    opening.push_async_callback(slow.aclose)
    keep_s = max(settings.log_retention_s, LEAST_KEPT_S)
    fleet = Fleet(await deployment_secret(database), coordination=coordination, slow=slow, keep_s=keep_s)
    opening.push_async_callback(fleet.aclose)
    limits = _Limits(database, owner, coordination, fleet, opening)
    await limits.look()
    lanes = _lanes(settings, opening, tell, limits)
    hub = StreamHub(encoder, max_total_bytes=LOG_BYTES // 2, retention_s=settings.log_retention_s)
    flights = Coalescer(deadline_s=None, listener=tell)
    prometheus = Prometheus(flights.stats, hub.stats, lanes.stats, figures)
    listeners.append(prometheus)
    metrics = Metrics(SqlRequestLog(database), _prices(settings), listener=prometheus)
    opening.callback(prometheus.publish)
    # Before the calls are: their end may be what a row waits for.
    opening.push_async_callback(metrics.flush)
    rules = TurnRules(replay_window_s=settings.replay_window_s, lease_s=settings.lease_s)
    turns = Turns(
        ledger=ledger,
        calls=_calls(lanes, ledger, fleet, opening),
        flights=flights,
        hub=hub,
        owner=owner,
        rules=rules,
        ids=_new_id,
        fleet=fleet,
    )
    changed = (CoordinationChanged, CoordinationLate)
    listeners.append(lambda event: turns.remotes.look_again() if isinstance(event, changed) else None)
    names = _names(settings, lanes)
    threads = Threads(SqlThreadStore(database, ids=_new_id), turns, names=names)
    keys = Keys(SqlKeyStore(database, ids=_new_id))
    await keys.refresh()
    completions = Completions(
        lanes,
        names,
        logs=StreamHub(max_total_bytes=LOG_BYTES // 4, retention_s=settings.log_retention_s),
        ids=_new_id,
        policies=_policies(settings),
        listener=tell,
        fleet=fleet,
    )
    slow.idle = lambda: limits.alone or (fleet.idle and turns.idle and completions.idle)
    slow.quiet = lambda: fleet.prompt
    await _resolve_lost(ledger, database)
    shared = metrics.run(then=prometheus.publish)
    lost = _free_lost(ledger, database, fleet.owners_lost)
    for beside in (shared, keys.run(), limits.run(), lost, _sweep(ledger, settings.lease_s)):
        opening.push_async_callback(_background(beside))
    return Services(
        settings,
        threads,
        turns,
        completions,
        metrics,
        Accounts(metrics.record),
        keys,
        hub,
        prometheus,
        names,
        (*await database.hazards(), *await _coordination_hazards(coordination, alone=limits.alone)),
        _database=database,
        _coordination=coordination,
        _opened=opening.pop_all(),
    )


def _calls(lanes: Lanes, ledger: SqlTurnLedger, fleet: Fleet, opening: AsyncExitStack) -> Calls:
    flights = Coalescer(deadline_s=None, abandon_after_s=0.0, remember=remember_s)
    opening.push_async_callback(flights.aclose)
    logs = StreamHub(max_total_bytes=LOG_BYTES // 4, retention_s=0.0)
    return Calls(lanes, ledger=ledger, flights=flights, logs=logs, ids=_new_id, fleet=fleet)


def _policies(settings: Settings) -> Policies:
    tenants = {name: Policy(value) for name, value in settings.v1_coalesce_tenants.items()}
    models = {name: Policy(value) for name, value in settings.v1_coalesce_models.items()}
    return Policies(Policy(settings.v1_coalesce), tenants, models)


def _prices(settings: Settings) -> Prices:
    own = {name: (price.input_usd_per_mtok, price.output_usd_per_mtok) for name, price in settings.prices.items()}
    # With the demo behind every name nothing is paid to anybody.
    named = {} if settings.demo else settings.providers
    return Prices(PublicPrices({name: provider.base_url for name, provider in named.items()}), own)


def _new_id() -> str:
    return str(uuid7())


def _background(work: Awaitable[None]) -> Callable[[], Awaitable[None]]:
    """Run `work` beside the requests; return what ends it."""
    task = asyncio.ensure_future(work)

    async def end() -> None:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    return end


# -- turns whose owner is lost -----------------------------------------------------------------------------------

LOOK_EVERY_S = 1.0
"""How soon a killed process is missed. Whoever follows one of its turns looks at the row twice as often."""
FOLLOWERS_FIRST_S = 3.0
"""Seconds in which a lost turn belongs to those who wait for it; afterwards nobody does, and it is ended."""


async def _resolve_lost(ledger: SqlTurnLedger, database: Database) -> None:
    """At start: what an earlier process left open."""
    dead = await database.dead_owners()
    if await database.alone():
        # Nobody can be waiting for any of them.
        await ledger.sweep(dead_owners=dead)
    elif dead:
        await ledger.lapse(dead)


async def _free_lost(ledger: SqlTurnLedger, database: Database, tell: Callable[[frozenset[str]], None]) -> None:
    """Let the leases of dead owners lapse, and tell whoever follows one of their turns or calls, to take it over."""
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        with suppress(OncewiseError):
            dead = await database.dead_owners()
            if dead:
                await ledger.lapse(dead)
                tell(frozenset(dead))


async def _sweep(ledger: SqlTurnLedger, every_s: float) -> None:
    """End turns whose owner is lost and that nobody waits for."""
    while True:
        await asyncio.sleep(every_s)
        with suppress(OncewiseError):
            await ledger.sweep(lapsed_s=FOLLOWERS_FIRST_S)


# -- other workers -----------------------------------------------------------------------------------------------

LEAST_KEPT_S = 60.0
"""How long what is told to other workers is kept at least: longer than a provider may say nothing."""

_NO_DRIVER = "Redis needs its driver: pip install 'oncewise[cluster]'."
_BAD_ADDRESS = "The URL of Redis (ONCEWISE_REDIS_URL, --redis) cannot be used; it looks like redis://host:6379/0."


async def _coordination(
    settings: Settings, secret: bytes, owner: str, tell: Listener, opening: AsyncExitStack
) -> Coordination | None:
    """What lies between the workers, if the settings name it; it need not answer now.

    Raises:
        CoordinationUnavailable: it cannot be used with what is installed or set.
    """
    if settings.redis_url is None:
        return None
    try:
        # With its driver, which is an extra: a server of one process needs neither.
        from oncewise.coordination.redis import BadAddress, open_redis  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "redis":
            raise
        raise CoordinationUnavailable(_NO_DRIVER) from None
    deployment = hmac.digest(secret, b"redis", "sha256").hex()[:16]
    try:
        coordination = await open_redis(settings.redis_url, deployment=deployment, address=owner, listener=tell)
    except BadAddress:
        raise CoordinationUnavailable(_BAD_ADDRESS) from None
    opening.push_async_callback(coordination.aclose)
    return coordination


_ROWS_ONLY = (
    "Other processes use this database, and no Redis is set: they see each other's text and cancels up to a second "
    "late, and share no calls of /v1."
)


async def _coordination_hazards(coordination: Coordination | None, *, alone: bool) -> tuple[str, ...]:
    if coordination is None:
        return () if alone else (_ROWS_ONLY,)
    wrong = await coordination.check()
    # One that is away has been reported as an event, as it will be when that changes.
    return (wrong,) if wrong is not None and coordination.signals.prompt else ()


class _Limits:
    """How this process shares the limits of providers: by Redis, else by the database, and with nobody if it is alone.

    Made once; `look` must be called before the first pacer is.

    Attributes:
        alone: Whether no other process uses the database.
    """

    def __init__(
        self,
        database: Database,
        owner: str,
        coordination: Coordination | None,
        fleet: Fleet,
        opening: AsyncExitStack,
    ) -> None:
        self._database = database
        self._owner = owner
        self._coordination = coordination
        self._fleet = fleet
        self._opening = opening
        self.alone = True
        self._pacers: dict[str, Pacer] = {}
        self._errands = Errands()
        opening.push_async_callback(self._errands.aclose)
        fleet.hear("pause", self._paused)

    async def look(self) -> None:
        """See whether others use the database."""
        self.alone = await self._database.alone()

    async def run(self) -> None:
        """Look now and then."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            with suppress(OncewiseError):
                await self.look()

    def pacer(self, name: str, *, rate: float, burst: int, concurrency: int) -> Pacer:
        """The pacer of a provider."""
        by_rows = SqlLimiter(self._database, name, rate=rate, burst=burst)
        rows = SqlCallSlots(self._database, name, limit=concurrency, owner=self._owner)
        self._opening.push_async_callback(rows.aclose)
        limiters: list[SharedLimiter] = [by_rows]
        slots: list[CallSlots] = [rows]
        if self._coordination is not None:
            limiters.insert(0, self._coordination.limiter(name, rate=rate, burst=burst))
            slots.insert(0, self._coordination.slots(name, limit=concurrency))
        # Alone on the database, nobody has to be asked there.
        limiter = FallbackLimiter(
            lambda: limiters[:-1] if self.alone else limiters, Starts(rate, burst), asyncio.get_running_loop().time
        )
        # Nobody waits whose start could not come in time: it is better told at once.
        places = min(QUEUE_PLACES, math.ceil(rate * QUEUE_S))
        self._pacers[name] = pacer = Pacer(
            limiter,
            concurrency=concurrency,
            max_waiting=places,
            max_wait_s=QUEUE_S,
            slots=FallbackSlots(lambda: slots[:-1] if self.alone else slots),
            on_pause=partial(self._pause, name, limiter),
        )
        return pacer

    def _pause(self, name: str, limiter: FallbackLimiter, for_s: float) -> None:
        if self._coordination is not None or not self.alone:
            self._errands.run(limiter.pause(for_s))
            self._fleet.tell(Signal("pause", name, data={"for_s": for_s}), None, surely=True)

    def _paused(self, signal: Signal) -> None:
        pacer = self._pacers.get(signal.name)
        if pacer is not None:
            pacer.hold(float(signal.data["for_s"]))


# -- providers ---------------------------------------------------------------------------------------------------

QUEUE_S = 60.0
QUEUE_PLACES = 1_000
DEMO_META = MappingProxyType({"demo": True})


def _lanes(settings: Settings, opening: AsyncExitStack, tell: Listener, limits: _Limits) -> Lanes:
    demo = DemoProvider(latency_ms=settings.demo_latency_ms, rps=settings.demo_rps)
    demo_pacer = limits.pacer(demo.name, rate=settings.demo_rps, burst=1, concurrency=64)
    demo_lane = _lane(demo, demo_pacer, opening, tell, model="demo-1", meta=DEMO_META)
    if settings.demo:
        return Lanes({"demo": demo_lane}, fallback=demo_lane)
    lanes = {"demo": demo_lane}
    for configured in settings.providers.values():
        name, rate, burst = configured.name, configured.rps, configured.burst
        pacer = limits.pacer(name, rate=rate, burst=burst, concurrency=configured.concurrency)
        lanes[name] = _lane(connect(configured), pacer, opening, tell, model=configured.default_model)
    return Lanes(lanes)


def _names(settings: Settings, lanes: Lanes) -> ModelNames:
    models = {name: lane.default_model for name, lane in lanes.items()}
    return ModelNames(
        {**models, settings.default_provider: lanes[settings.default_provider].default_model},
        default_provider=settings.default_provider,
        aliases=settings.aliases,
        any_provider=settings.demo,
    )


def connect(configured: ProviderSettings) -> OpenAICompatibleProvider | NativeProvider:
    """The adapter of a configured provider; close it with `aclose`. Connects at the first call."""
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
    pacer: Pacer,
    opening: AsyncExitStack,
    tell: Listener,
    *,
    model: str,
    meta: Mapping[str, Any] = MappingProxyType({}),
) -> ProviderLane:
    opening.push_async_callback(provider.aclose)
    opening.push_async_callback(pacer.aclose)
    return ProviderLane(provider, pacer, model, RetryBudget(), meta, Breakers(provider.name, listener=tell))
