"""Figures over finished requests, computed by hand."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from oncewise.errors import StorageUnavailable
from oncewise.model import RequestRecord, Role, Usage
from oncewise.service.accounts import CLIENT_GONE, Bill, Ended, Prices, Share
from oncewise.service.metrics import Metrics, quantile


class Log:
    """Keeps rows in a list."""

    def __init__(self) -> None:
        self.rows: list[RequestRecord] = []
        self.away = False

    async def record(self, records: Sequence[RequestRecord]) -> None:
        if self.away:
            raise StorageUnavailable
        self.rows += records

    async def last(self, n: int, org_id: str | None = None) -> tuple[RequestRecord, ...]:
        found = [row for row in reversed(self.rows) if org_id in (None, row.org_id)]
        return tuple(found[:n])


class Slow:
    """A table that takes its time to load."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    def lists(self, provider: str) -> bool:
        return True

    async def load(self) -> None:
        await self.go.wait()

    def usd(self, provider: str, model: str, usage: Usage) -> float | None:
        return usage.total_tokens * 1e-6


OWN = {"p/m": (2.0, 8.0)}


def metrics_of(log: Log, table: Any = None, told: list[Any] | None = None) -> Metrics:
    return Metrics(log, Prices(table or Slow(), OWN), listener=[].append if told is None else told.append)


def request(
    number: int, role: Role, latency_s: float = 1.0, *, org: str = "acme", error: str | None = None, **fields: Any
) -> tuple[Ended, Share]:
    stream = fields.pop("stream", False)
    ended = Ended(f"r{number}", org, "v1", stream, 100.0, 100.0 + latency_s, 1_000 + number, error)
    pays = role in (Role.LEADER, Role.BYPASS)
    values = {"bill": Bill("p", "m", Usage(100, 50)), "pays": pays, "calls": int(pays), **fields}
    return ended, Share(role, "p", "m", **values)


async def test_all_figures_of_a_burst() -> None:
    """A leader, two who joined, one replayed, one that shared nothing, one failure, one that left.

    Each call is 100 tokens in and 50 out: at 2 $ and 8 $ for a million, 0.0006 $.
    """
    log = Log()
    metrics = metrics_of(log)
    for entry in (
        request(1, Role.LEADER, 4.0, first_s=101.0, queue_wait_ms=500.0, stream=True),
        request(2, Role.FOLLOWER, 3.0, first_s=101.0, stream=True),
        request(3, Role.FOLLOWER, 2.0, first_s=101.0),
        request(4, Role.REPLAYED, 0.0),
        request(5, Role.BYPASS, 1.0, first_s=100.5, queue_wait_ms=2000.0),
        request(6, Role.LEADER, 8.0, error="provider_timeout", calls=3, bill=Bill("p", "m")),
        request(7, Role.FOLLOWER, 0.1, error=CLIENT_GONE),
    ):
        metrics.record(*entry)
    assert await metrics.performance(50) == {
        "total_requests": 7,
        # 1.0, 1.0, 1.0, 0.0 and 0.5 s
        "ttft": {"p50": 1.0, "p95": 1.0, "p99": 1.0, "target_p95": 1.5, "meets_target": True},
        # 4, 3, 2, 0, 1 and 8 s: when somebody left is no latency
        "latency": {
            "p50": 2.0, "p95": 8.0, "p99": 8.0, "target_p50": 3.5, "target_p95": 6.0,
            "meets_p50_target": True, "meets_p95_target": False,
        },
        "queue_wait_ms": {"p50": 0.0, "p95": 2000.0, "p99": 2000.0, "target_p95": 1000.0, "meets_target": False},
        "tokens": {"total": 300, "prompt": 200, "completion": 100, "avg_per_request": round(300 / 7, 3)},
        "errors": {"total": 1, "rate": 1 / 7, "target": 0.01, "meets_target": False},
        "streaming": {"enabled_requests": 2, "percentage": round(200 / 7, 3)},
        "coalesce": {"leaders": 2, "followers": 4, "joined": 3, "replayed": 1, "bypassed": 1},
        "upstream": {
            "calls": 5, "calls_saved": 3, "tokens_saved": 450, "cost_usd": 0.0012, "cost_saved_usd": 0.0018,
        },
    }  # fmt: skip


async def test_a_tenant_s_figures_are_its_own() -> None:
    """Money included."""
    metrics = metrics_of(Log())
    metrics.record(*request(1, Role.LEADER))
    metrics.record(*request(2, Role.FOLLOWER))
    metrics.record(*request(3, Role.LEADER, org="other"))
    upstream = {org: (await metrics.performance(50, org))["upstream"] for org in ("acme", "other", "nobody")}
    assert [each["cost_usd"] for each in upstream.values()] == [0.0006, 0.0006, 0.0]
    assert [each["cost_saved_usd"] for each in upstream.values()] == [0.0006, 0.0, 0.0]
    assert [each["calls_saved"] for each in upstream.values()] == [1, 0, 0]


async def test_nothing_yet_is_zeros_and_nulls() -> None:
    """Every field is there."""
    figures = await metrics_of(Log()).performance(50)
    assert figures["total_requests"] == 0
    for part in ("ttft", "latency", "queue_wait_ms"):
        assert [figures[part][name] for name in ("p50", "p95", "p99")] == [None] * 3
    assert set(figures["upstream"].values()) == {0}
    assert figures["errors"]["meets_target"] is True


async def test_what_cannot_be_written_now_is_written_later() -> None:
    """In its order, and told to listeners only then."""
    log, told = Log(), []
    metrics = metrics_of(log, told=told)
    log.away = True
    metrics.record(*request(1, Role.LEADER))
    await metrics.flush()
    assert (log.rows, told) == ([], [])
    log.away = False
    metrics.record(*request(2, Role.FOLLOWER))
    await metrics.flush()
    assert [row.request_id for row in log.rows] == ["r1", "r2"]
    assert told == log.rows


async def test_rows_outlive_a_flush_that_is_cancelled_while_prices_load() -> None:
    """The server stops in the first second; the last flush writes them."""
    log, table = Log(), Slow()
    metrics = metrics_of(log, table)
    metrics.record(*request(1, Role.LEADER, bill=Bill("p", "unpriced", Usage(1, 1))))
    running = asyncio.create_task(metrics.run(0.0))
    await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    table.go.set()
    await metrics.flush()
    assert [row.cost_usd for row in log.rows] == [2e-6]


def test_a_quantile_is_one_of_the_values() -> None:
    """By nearest rank."""
    values = [float(number) for number in range(1, 101)]
    assert [quantile(values, share) for share in (0.5, 0.95, 0.99)] == [50.0, 95.0, 99.0]
    assert quantile([], 0.5) is None
    assert quantile([7.0], 0.99) == 7.0
