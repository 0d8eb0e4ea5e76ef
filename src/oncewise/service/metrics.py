"""Figures over finished requests, leaders and followers alike.

Records are buffered and written together, off the path of the requests they describe: 5,000 followers of one call must
not become 5,000 transactions. A crash may lose the last moments of figures; no promise depends on them.

Deliberately absent: Prometheus and logs, which live in `oncewise.telemetry`.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from oncewise.errors import StorageFull, StorageUnavailable
from oncewise.model import RequestRecord, Role
from oncewise.ports import Listener, RequestLog
from oncewise.service.accounts import CLIENT_GONE, Ended, Prices, Share, row

__all__ = ["Metrics", "quantile"]

TTFT_P95_S = 1.5
LATENCY_P50_S = 3.5
LATENCY_P95_S = 6.0
QUEUE_P95_MS = 1000.0
ERROR_RATE = 0.01


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of the values do not exceed (nearest rank); None of nothing."""
    if not ordered:
        return None
    rank = max(1, -(-len(ordered) * round(share * 100) // 100))
    return ordered[rank - 1]


def _quantiles(values: list[float]) -> dict[str, float | None]:
    ordered = sorted(values)
    return {name: _rounded(quantile(ordered, share)) for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _meets(value: float | None, target: float) -> bool | None:
    return None if value is None else value <= target


class Metrics:
    """Keeps account of finished requests.

    Args:
        log: Where records are kept, for all workers.
        prices: What their calls cost.
        listener: Told of every record once it is written.
        max_buffered: Records held while the log does not answer; beyond them the oldest are dropped.
    """

    def __init__(
        self,
        log: RequestLog,
        prices: Prices,
        *,
        listener: Listener = lambda _event: None,
        max_buffered: int = 100_000,
    ) -> None:
        self._log = log
        self._prices = prices
        self._listener = listener
        self._buffer: deque[tuple[Ended, Share]] = deque(maxlen=max_buffered)
        self._writing = asyncio.Lock()

    def record(self, ended: Ended, share: Share) -> None:
        """Count a finished request. Never waits."""
        self._buffer.append((ended, share))

    async def flush(self) -> None:
        """Write what is buffered; it stays buffered if the log does not answer."""
        async with self._writing:
            batch = [self._buffer.popleft() for _ in range(len(self._buffer))]
            if not batch:
                return
            try:
                records = [row(ended, share, await self._prices.cost(share.bill)) for ended, share in batch]
            except asyncio.CancelledError:
                self._buffer.extendleft(reversed(batch))
                raise
            try:
                await self._log.record(records)
            except (StorageUnavailable, StorageFull):
                self._buffer.extendleft(reversed(batch))
                return
            for record in records:
                self._listener(record)

    async def run(self, every_s: float = 0.25, then: Callable[[], None] = lambda: None) -> None:
        """Write the buffer again and again until cancelled, and call `then` each time.

        By default often enough that a worker's figures include what another one answered 0.3 s ago.
        """
        while True:
            await asyncio.sleep(every_s)
            await self.flush()
            then()

    async def performance(self, last_n: int, org_id: str | None = None) -> dict[str, Any]:
        """The figures over the last `last_n` finished requests of one tenant, or of all.

        Times of `ttft` and `latency` are seconds, of `queue_wait_ms` milliseconds. Without requests all counts are 0
        and all quantiles null.

        Raises:
            StorageUnavailable: the log did not answer.
        """
        await self.flush()
        rows = await self._log.last(last_n, org_id)
        return {
            "total_requests": len(rows),
            "ttft": _ttft(rows),
            "latency": _latency(rows),
            "queue_wait_ms": _queue_wait(rows),
            "tokens": _tokens(rows),
            "errors": _errors(rows),
            "streaming": _streaming(rows),
            "coalesce": _coalesce(rows),
            "upstream": _upstream(rows),
        }


Rows = Sequence[RequestRecord]


def _ttft(rows: Rows) -> dict[str, Any]:
    figures = _quantiles([row.ttft_ms / 1000 for row in rows if row.ttft_ms is not None])
    return {**figures, "target_p95": TTFT_P95_S, "meets_target": _meets(figures["p95"], TTFT_P95_S)}


def _latency(rows: Rows) -> dict[str, Any]:
    # When a client had enough says nothing of how long its answer took.
    figures = _quantiles([row.latency_ms / 1000 for row in rows if row.error_code != CLIENT_GONE])
    return {
        **figures,
        "target_p50": LATENCY_P50_S,
        "target_p95": LATENCY_P95_S,
        "meets_p50_target": _meets(figures["p50"], LATENCY_P50_S),
        "meets_p95_target": _meets(figures["p95"], LATENCY_P95_S),
    }


def _queue_wait(rows: Rows) -> dict[str, Any]:
    figures = _quantiles([row.queue_wait_ms for row in rows if row.queue_wait_ms is not None])
    return {**figures, "target_p95": QUEUE_P95_MS, "meets_target": _meets(figures["p95"], QUEUE_P95_MS)}


def _tokens(rows: Rows) -> dict[str, Any]:
    prompt = sum(row.prompt_tokens for row in rows)
    completion = sum(row.completion_tokens for row in rows)
    total = prompt + completion
    return {
        "total": total,
        "prompt": prompt,
        "completion": completion,
        "avg_per_request": round(total / len(rows), 3) if rows else 0,
    }


def _errors(rows: Rows) -> dict[str, Any]:
    total = sum(1 for row in rows if row.error_code not in (None, CLIENT_GONE))
    rate = total / len(rows) if rows else 0
    return {"total": total, "rate": rate, "target": ERROR_RATE, "meets_target": rate <= ERROR_RATE}


def _streaming(rows: Rows) -> dict[str, Any]:
    streams = sum(1 for row in rows if row.stream)
    return {"enabled_requests": streams, "percentage": round(100 * streams / len(rows), 3) if rows else 0}


def _coalesce(rows: Rows) -> dict[str, Any]:
    counts = {role: sum(1 for row in rows if row.role is role) for role in Role}
    joined, replayed = counts[Role.FOLLOWER], counts[Role.REPLAYED]
    return {
        "leaders": counts[Role.LEADER],
        "followers": joined + replayed,
        "joined": joined,
        "replayed": replayed,
        "bypassed": counts[Role.BYPASS],
    }


def _upstream(rows: Rows) -> dict[str, Any]:
    return {
        "calls": sum(row.upstream_calls for row in rows),
        "calls_saved": sum(1 for row in rows if row.error_code is None and row.upstream_calls == 0),
        "tokens_saved": sum(row.tokens_saved for row in rows),
        "cost_usd": round(sum(row.cost_usd for row in rows), 9),
        "cost_saved_usd": round(sum(row.cost_saved_usd for row in rows), 9),
    }
