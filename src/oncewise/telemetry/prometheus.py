"""Figures for Prometheus: counters that finished requests move, and gauges read when somebody looks.

Label sets are bounded: surface, role, outcome, kind, basis, configured provider, state. Never a tenant, a thread, a key
or a model that a client names; those would make a time series each. Breakers belong to a model each, so they are
counted by state.

Deliberately absent: how the figures of several workers add up (`oncewise.telemetry.shared_figures`).
"""

from collections.abc import Callable, Mapping
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from oncewise.core.breaker import BreakerChanged, BreakerState, BreakerStats
from oncewise.core.coalesce import CoalescerStats, FlightLanded
from oncewise.core.pacing import PacerStats
from oncewise.core.stream_hub import HubStats
from oncewise.model import RequestRecord
from oncewise.ports import CoordinationChanged
from oncewise.telemetry.shared_figures import SharedFigures

__all__ = ["Prometheus"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_WIDTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000)


Lanes = Callable[[], Mapping[str, tuple[PacerStats, BreakerStats]]]


class _Held(Collector):
    """What is held at the moment of the scrape."""

    def __init__(self, flights: Callable[[], CoalescerStats], hub: Callable[[], HubStats], lanes: Lanes) -> None:
        self._flights = flights
        self._hub = hub
        self._lanes = lanes

    def collect(self) -> list[Metric]:
        """The gauges."""
        flights, hub = self._flights(), self._hub()
        values = {
            "oncewise_live_flights": ("Turns in progress.", flights.flights),
            "oncewise_waiters": ("Requests that wait for a turn.", flights.waiters),
            "oncewise_open_logs": ("Streams that have not ended.", hub.open_logs),
            "oncewise_live_viewers": ("Viewers of streams.", hub.viewers),
            "oncewise_log_bytes": ("Bytes held for viewers.", hub.bytes),
        }
        gauges = [GaugeMetricFamily(name, text, value=value) for name, (text, value) in values.items()]
        return [*gauges, *self._of_lanes()]

    def _of_lanes(self) -> list[Metric]:
        waiting = GaugeMetricFamily("oncewise_queue_length", "Calls that wait for their start.", labels=["provider"])
        running = GaugeMetricFamily("oncewise_running_calls", "Calls that a provider answers.", labels=["provider"])
        share = GaugeMetricFamily(
            "oncewise_rate_share", "Part of the configured rate in use; below 1 after a 429.", labels=["provider"]
        )
        breakers = GaugeMetricFamily(
            "oncewise_breakers", "Models that are not called freely, by state.", labels=["provider", "state"]
        )
        for provider, (pacer, held) in self._lanes().items():
            waiting.add_metric([provider], pacer.waiting)
            running.add_metric([provider], pacer.running)
            share.add_metric([provider], pacer.rate_share)
            for state, models in (("open", held.open), ("half_open", held.half_open), ("held", held.held)):
                breakers.add_metric([provider, state], models)
        return [waiting, running, share, breakers]


class Prometheus:
    """A registry that listens to events and prints itself.

    Args:
        flights: What the turn flights hold now.
        hub: What the stream hub holds now.
        lanes: What the pacer and the breakers of each configured provider hold now.
        shared: Where the figures of all workers are; None for a server of one process.
    """

    def __init__(
        self,
        flights: Callable[[], CoalescerStats],
        hub: Callable[[], HubStats],
        lanes: Lanes = dict,
        shared: SharedFigures | None = None,
    ) -> None:
        self._shared = shared
        self._registry = CollectorRegistry()
        self._registry.register(_Held(flights, hub, lanes))
        registry = self._registry
        # Each set of labels is looked up once: there are few of them, and `labels` takes a lock to find one.
        requests = Counter("oncewise_requests", "Finished requests.", ["surface", "outcome"], registry=registry)
        self._requests = cache(requests.labels)
        coalesce = Counter("oncewise_coalesce", "Finished requests by role.", ["role"], registry=registry)
        self._coalesce = cache(coalesce.labels)
        self._calls = Counter("oncewise_upstream_calls", "Provider calls, retries included.", registry=registry)
        self._saved = Counter("oncewise_calls_saved", "Requests answered without a call.", registry=registry)
        tokens = Counter("oncewise_tokens", "Tokens that were paid for.", ["kind"], registry=registry)
        self._tokens = cache(tokens.labels)
        self._tokens_saved = Counter("oncewise_tokens_saved", "Tokens of answers that cost nothing.", registry=registry)
        cost = Counter(
            "oncewise_cost_usd", "US dollars paid to providers, by what is known of them.", ["basis"], registry=registry
        )
        self._cost = cache(cost.labels)
        self._cost_saved = Counter(
            "oncewise_cost_saved_usd", "US dollars that answers without a call would have cost.", registry=registry
        )
        self._opened = Counter(
            "oncewise_breaker_opened", "Times that a breaker opened.", ["provider"], registry=registry
        )
        self._away = Counter("oncewise_coordination_lost", "Times that Redis stopped answering.", registry=registry)
        latency = Histogram(
            "oncewise_request_duration_seconds",
            "From a request's arrival to its answer.",
            ["surface", "role"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._latency = cache(latency.labels)
        ttft = Histogram(
            "oncewise_ttft_seconds",
            "From a request's arrival to the first token it could be shown.",
            ["role"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._ttft = cache(ttft.labels)
        self._wait = Histogram(
            "oncewise_queue_wait_seconds",
            "What leading requests waited for their call to start.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._width = Histogram(
            "oncewise_fanout_width", "Requests that shared a flight.", buckets=_WIDTHS, registry=registry
        )

    def __call__(self, event: object) -> None:
        """Count an event; others than its own are ignored."""
        if isinstance(event, RequestRecord):
            self._count(event)
        elif isinstance(event, FlightLanded):
            self._width.observe(event.joined + 1)
        elif isinstance(event, BreakerChanged) and event.state is BreakerState.OPEN:
            self._opened.labels(event.provider).inc()
        elif isinstance(event, CoordinationChanged) and not event.up:
            self._away.inc()

    def _count(self, record: RequestRecord) -> None:
        self._requests(record.surface, record.error_code or "ok").inc()
        self._coalesce(record.role.value).inc()
        self._calls.inc(record.upstream_calls)
        if record.error_code is None and record.upstream_calls == 0:
            self._saved.inc()
        self._count_money(record)
        self._latency(record.surface, record.role.value).observe(record.latency_ms / 1000)
        if record.ttft_ms is not None:
            self._ttft(record.role.value).observe(record.ttft_ms / 1000)
        if record.upstream_calls and record.queue_wait_ms is not None:
            self._wait.observe(record.queue_wait_ms / 1000)

    def _count_money(self, record: RequestRecord) -> None:
        self._tokens("prompt").inc(record.prompt_tokens)
        self._tokens("completion").inc(record.completion_tokens)
        self._tokens_saved.inc(record.tokens_saved)
        self._cost_saved.inc(record.cost_saved_usd)
        if record.cost_basis is not None:
            self._cost(record.cost_basis.value).inc(record.cost_usd)

    def publish(self) -> None:
        """Let the other workers know this one's figures."""
        if self._shared is not None:
            self._shared.publish(self._registry.collect)

    def text(self) -> bytes:
        """All figures, of all workers, in Prometheus' text format. Those of others are as of their last `publish`."""
        self.publish()
        return generate_latest(self._shared or self._registry)
