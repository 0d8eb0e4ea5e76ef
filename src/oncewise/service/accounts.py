"""What finished requests come to: a row each, in tokens and money, for threads and `/v1` alike.

A call is paid for once, by the request that led it, even if that one left before the end: its row then waits for the
end of the call. Whoever shared a call, or was answered from a stored turn, pays nothing and saved what its own call
would have cost. A call that failed or was cancelled in the middle of its answer is paid for as well, by estimate:
providers charge for what they sent.

Money is the provider's own figure; else its tokens, or our estimate of them, at the operator's price or else at the
public one. Prices are looked up when rows are written, many at a time, and not when requests end: nobody waits for
them.

Deliberately absent: figures over many requests (`oncewise.service.metrics`), and where public prices come from.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

from oncewise.model import CostBasis, RequestRecord, Role, Usage
from oncewise.ports import PriceTable

__all__ = ["CLIENT_GONE", "Accounts", "Bill", "Cost", "Ended", "Prices", "Share", "row"]

CLIENT_GONE = "client_gone"
"""Error code of a request whose client left before its answer was complete. No client is ever sent it."""

MTOK = 1_000_000

Result_contra = TypeVar("Result_contra", contravariant=True)


class Bill(NamedTuple):
    """What a call came to, in the provider's terms.

    Attributes:
        model: The model that was asked for.
        usage: Tokens; None where nothing was answered.
        told_usd: What the provider said it cost; None if it did not say.
        said_model: The model the provider says it used; None if it did not say.
    """

    provider: str
    model: str
    usage: Usage | None = None
    told_usd: float | None = None
    said_model: str | None = None


class Share(NamedTuple):
    """What a request had of the work that answered it.

    Attributes:
        bill: Of the call behind it; None if there was none, or its answer did not come.
        pays: Whether the request led that call.
        calls: Requests made to the provider that it pays for.
        first_s: When the first text was there, by the event loop's clock; None or 0.0 if it was not seen.
    """

    role: Role
    provider: str
    model: str
    bill: Bill | None
    pays: bool
    calls: int = 0
    first_s: float | None = None
    queue_wait_ms: float = 0.0
    leader_id: str | None = None
    turn_id: str | None = None
    call_id: str | None = None


class Ended(NamedTuple):
    """A request that has ended, as the API saw it.

    Attributes:
        arrived_s, ended_s: When it came and when its answer was ready, by the event loop's clock.
        finished_at_ms: The latter for people, in milliseconds since the Unix epoch.
        error_code: Why it failed; None if it did not.
    """

    request_id: str
    org_id: str
    surface: str
    stream: bool
    arrived_s: float
    ended_s: float
    finished_at_ms: int
    error_code: str | None


class Ticket(Protocol[Result_contra]):
    """A request's interest in some work.

    Attributes:
        accounted: Whether its row is written, or will be.
    """

    accounted: bool

    def share(self, result: Result_contra | None) -> Share:
        """What the request had of the work; `result` is None if it failed or left."""
        ...

    def when_over(self, tell: Callable[[], None]) -> None:
        """Call `tell` once everything has ended that the request pays for; at once if it pays for nothing."""
        ...


class Accounts:
    """Closes the account of each request, once.

    Args:
        record: Takes what a row is made of.
    """

    def __init__(self, record: Callable[[Ended, Share], None]) -> None:
        self._record = record

    def close(self, ended: Ended, ticket: Ticket[Any], result: object) -> None:
        """Account for a request that has ended. Closing it again does nothing."""
        if not ticket.accounted:
            ticket.accounted = True
            ticket.when_over(lambda: self._record(ended, ticket.share(result)))


class Cost(NamedTuple):
    """Money, in US dollars."""

    usd: float
    basis: CostBasis


class Prices:
    """Finds out what calls cost.

    Args:
        table: Public prices.
        own: The operator's, by `provider/model`: US dollars for a million tokens, of the prompt and of the answer.
    """

    def __init__(self, table: PriceTable, own: Mapping[str, tuple[float, float]] = MappingProxyType({})) -> None:
        self._table = table
        self._own = own

    async def cost(self, bill: Bill | None) -> Cost | None:
        """What a call cost; None if nothing was answered."""
        if bill is None:
            return None
        if bill.told_usd is not None:
            return Cost(bill.told_usd, CostBasis.PROVIDER)
        if bill.usage is None:
            return None
        usd = self._at_own_price(bill, bill.usage)
        if usd is None:
            usd = await self._at_public_price(bill, bill.usage)
        if usd is None:
            return Cost(0.0, CostBasis.UNKNOWN)
        return Cost(usd, CostBasis.ESTIMATED if bill.usage.estimated else CostBasis.PRICES)

    def _at_own_price(self, bill: Bill, usage: Usage) -> float | None:
        price = self._own.get(f"{bill.provider}/{bill.model}") if self._own else None
        if price is None:
            return None
        return (usage.prompt_tokens * price[0] + usage.completion_tokens * price[1]) / MTOK

    async def _at_public_price(self, bill: Bill, usage: Usage) -> float | None:
        table = self._table
        if not table.lists(bill.provider):
            return None
        await table.load()
        # What the provider says it used is more exact: an alias of its own stands for another model next month.
        usd = table.usd(bill.provider, bill.said_model, usage) if bill.said_model else None
        return usd if usd is not None else table.usd(bill.provider, bill.model, usage)


_NOTHING = Usage(0, 0)
_FREE = Cost(0.0, CostBasis.UNKNOWN)


def row(ended: Ended, share: Share, cost: Cost | None) -> RequestRecord:
    """The row of a request; `cost` is that of its bill."""
    bill, failed = share.bill, ended.error_code is not None
    counted = share.pays or not failed
    usage = bill.usage if bill is not None and counted else None
    tokens, money = usage or _NOTHING, (cost if counted else None) or _FREE
    return RequestRecord(
        request_id=ended.request_id,
        org_id=ended.org_id,
        surface=ended.surface,
        role=share.role,
        stream=ended.stream,
        provider=share.provider,
        model=share.model,
        finished_at_ms=ended.finished_at_ms,
        latency_ms=(ended.ended_s - ended.arrived_s) * 1000,
        # Who joined late did not wait for what was already there.
        ttft_ms=None if failed else max(0.0, ((share.first_s or ended.ended_s) - ended.arrived_s) * 1000),
        queue_wait_ms=share.queue_wait_ms,
        prompt_tokens=tokens.prompt_tokens if share.pays else 0,
        completion_tokens=tokens.completion_tokens if share.pays else 0,
        upstream_calls=share.calls,
        tokens_saved=0 if share.pays else tokens.total_tokens,
        cost_usd=money.usd if share.pays else 0.0,
        cost_saved_usd=0.0 if share.pays else money.usd,
        error_code=ended.error_code,
        turn_id=share.turn_id,
        call_id=share.call_id,
        leader_id=share.leader_id,
        cost_basis=None if cost is None or not counted else cost.basis,
        usage_estimated=None if usage is None else usage.estimated,
    )
