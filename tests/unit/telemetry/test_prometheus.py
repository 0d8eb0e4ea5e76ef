"""What Prometheus is told."""

import re
from dataclasses import replace

from oncewise.core.breaker import BreakerChanged, BreakerState, BreakerStats
from oncewise.core.coalesce import CoalescerStats, FlightLanded
from oncewise.core.keys import request_key
from oncewise.core.pacing import PacerStats
from oncewise.core.stream_hub import HubStats
from oncewise.model import CostBasis, RequestRecord, Role
from oncewise.telemetry.prometheus import Prometheus

SECRET = "tenant-nobody-may-see"


def record(role: Role, *, calls: int = 0, error_code: str | None = None) -> RequestRecord:
    return RequestRecord(
        request_id="r",
        org_id=SECRET,
        surface="threads",
        role=role,
        stream=False,
        provider="p",
        model=SECRET,
        finished_at_ms=0,
        latency_ms=1500.0,
        ttft_ms=600.0,
        queue_wait_ms=20.0,
        upstream_calls=calls,
        error_code=error_code,
    )


def figures(prometheus: Prometheus) -> dict[str, float]:
    lines = prometheus.text().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def make() -> Prometheus:
    lanes = {"acme": (PacerStats(3, 2, 1, 0.5), BreakerStats(open=1, half_open=0, held=2))}
    return Prometheus(lambda: CoalescerStats(2, 7, 2, 0), lambda: HubStats(3, 1, 4, 512), lambda: lanes)


def test_requests_are_counted_by_role_and_outcome():
    """One leader, two followers, one failure."""
    prometheus = make()
    for event in (
        record(Role.LEADER, calls=1),
        record(Role.FOLLOWER),
        record(Role.REPLAYED),
        record(Role.LEADER, calls=2, error_code="provider_error"),
    ):
        prometheus(event)

    seen = figures(prometheus)

    assert seen['oncewise_requests_total{outcome="ok",surface="threads"}'] == 3
    assert seen['oncewise_requests_total{outcome="provider_error",surface="threads"}'] == 1
    assert seen["oncewise_upstream_calls_total"] == 3
    assert seen["oncewise_calls_saved_total"] == 2
    assert seen['oncewise_coalesce_total{role="leader"}'] == 2
    assert seen["oncewise_queue_wait_seconds_count"] == 2


def test_money_is_counted_by_what_it_rests_on():
    """Paid and saved, with the tokens behind it."""
    prometheus = make()
    paid = replace(record(Role.LEADER, calls=1), prompt_tokens=10, completion_tokens=5, cost_usd=0.25)
    saved = replace(record(Role.FOLLOWER), tokens_saved=15, cost_saved_usd=0.5)
    for event in (
        replace(paid, cost_basis=CostBasis.PROVIDER),
        replace(paid, cost_basis=CostBasis.ESTIMATED, cost_usd=0.125),
        replace(paid, cost_basis=CostBasis.UNKNOWN, cost_usd=0.0),
        replace(saved, cost_basis=CostBasis.PRICES),
        record(Role.LEADER, error_code="provider_error"),
    ):
        prometheus(event)

    seen = figures(prometheus)

    costs = {basis: seen[f'oncewise_cost_usd_total{{basis="{basis}"}}'] for basis in CostBasis}
    assert costs == {"provider": 0.25, "estimated": 0.125, "unknown": 0.0, "prices": 0.0}
    assert (seen["oncewise_cost_saved_usd_total"], seen["oncewise_tokens_saved_total"]) == (0.5, 15)
    assert seen['oncewise_tokens_total{kind="prompt"}'] == 30
    assert seen['oncewise_tokens_total{kind="completion"}'] == 15


def test_gauges_are_read_at_the_scrape():
    """No gauge can drift: it is what is held now."""
    seen = figures(make())
    assert (seen["oncewise_live_flights"], seen["oncewise_waiters"], seen["oncewise_live_viewers"]) == (2, 7, 4)


def test_providers_show_what_is_held_back():
    """Queue, calls, share of the rate, and breakers counted by state, of every configured provider."""
    prometheus = make()
    for state in (BreakerState.OPEN, BreakerState.OPEN, BreakerState.CLOSED):
        prometheus(BreakerChanged("acme", SECRET, state, 5, 6, 5.0))
    seen = figures(prometheus)
    assert seen['oncewise_queue_length{provider="acme"}'] == 3
    assert seen['oncewise_running_calls{provider="acme"}'] == 2
    assert seen['oncewise_rate_share{provider="acme"}'] == 0.5
    assert seen['oncewise_breakers{provider="acme",state="open"}'] == 1
    assert seen['oncewise_breakers{provider="acme",state="half_open"}'] == 0
    assert seen['oncewise_breakers{provider="acme",state="held"}'] == 2
    assert seen['oncewise_breaker_opened_total{provider="acme"}'] == 2


def test_the_width_of_a_flight_counts_its_leader():
    """49 followers are 50 requests."""
    prometheus = make()
    prometheus(FlightLanded(request_key("o", "turn", "x"), 49, abandoned=False, duration_s=1.0, code=None))
    seen = figures(prometheus)
    assert seen["oncewise_fanout_width_sum"] == 50


def test_no_tenant_and_no_model_becomes_a_label():
    """Labels are bounded, whatever clients send."""
    prometheus = make()
    prometheus(record(Role.LEADER, calls=1))
    prometheus(BreakerChanged("acme", SECRET, BreakerState.OPEN, 5, 5, 5.0))
    text = prometheus.text().decode()
    assert SECRET not in text
    labels = {"surface", "outcome", "role", "le", "kind", "basis", "provider", "state"}
    assert set(re.findall(r'(\w+)="', text)) <= labels


def test_other_events_are_ignored():
    """A listener gets everything."""
    prometheus = make()
    before = figures(prometheus)
    prometheus(object())
    counts = {name: value for name, value in figures(prometheus).items() if not name.endswith("_created")}
    assert counts == {name: value for name, value in before.items() if not name.endswith("_created")}
