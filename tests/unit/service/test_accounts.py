"""Who pays, what was saved, and what the money rests on."""

from collections.abc import Callable
from typing import Any

import pytest

from oncewise.model import CostBasis, Role, Usage
from oncewise.service.accounts import CLIENT_GONE, Accounts, Bill, Cost, Ended, Prices, Share, row

ENDED = Ended("r1", "acme", "v1", False, 10.0, 12.5, 1_700_000_000_000, None)


class Table:
    """Knows one model: 1 $ for a million tokens of the prompt, 3 $ for one of the answer."""

    def __init__(self) -> None:
        self.loads = 0

    def lists(self, provider: str) -> bool:
        return provider != "unlisted"

    async def load(self) -> None:
        self.loads += 1

    def usd(self, provider: str, model: str, usage: Usage) -> float | None:
        assert self.loads
        if (provider, model) != ("p", "m-2025"):
            return None
        return usage.prompt_tokens * 1e-6 + usage.completion_tokens * 3e-6


USAGE = Usage(1000, 200)
GUESS = Usage(1000, 200, estimated=True)


@pytest.mark.parametrize(
    ("bill", "cost"),
    [
        (None, None),
        (Bill("p", "m"), None),
        (Bill("p", "m", USAGE, 0.5), Cost(0.5, CostBasis.PROVIDER)),
        (Bill("p", "m", USAGE, 0.0), Cost(0.0, CostBasis.PROVIDER)),
        (Bill("p", "m", None, 0.5), Cost(0.5, CostBasis.PROVIDER)),
        (Bill("p", "m", USAGE, None, "m-2025"), Cost(0.0016, CostBasis.PRICES)),
        (Bill("p", "m-2025", USAGE, None, "unheard of"), Cost(0.0016, CostBasis.PRICES)),
        (Bill("p", "m-2025", GUESS), Cost(0.0016, CostBasis.ESTIMATED)),
        (Bill("p", "m", USAGE), Cost(0.0, CostBasis.UNKNOWN)),
        (Bill("unlisted", "m-2025", USAGE), Cost(0.0, CostBasis.UNKNOWN)),
        (Bill("p", "own", USAGE, None, "m-2025"), Cost(0.0024, CostBasis.PRICES)),
        (Bill("unlisted", "own", GUESS), Cost(0.4, CostBasis.ESTIMATED)),
        (Bill("p", "own", USAGE, 0.5), Cost(0.5, CostBasis.PROVIDER)),
    ],
)
async def test_the_provider_s_figure_counts_before_the_operator_s_price_and_that_before_the_public_one(
    bill: Bill | None, cost: Cost | None
) -> None:
    """1,000 tokens at 1 $ and 200 at 3 $ for a million are 0.0016 $; at 2 $ and 2 $, 0.0024 $."""
    prices = Prices(Table(), {"p/own": (2.0, 2.0), "unlisted/own": (0.0, 2000.0)})
    found = await prices.cost(bill)
    assert found == (None if cost is None else (pytest.approx(cost.usd), cost.basis))


async def test_prices_that_are_told_need_no_table() -> None:
    """Neither do the operator's own, nor a provider that has none."""
    table = Table()
    prices = Prices(table, {"p/own": (2.0, 2.0)})
    for bill in (Bill("p", "m", USAGE, 0.5), Bill("p", "own", USAGE), Bill("unlisted", "m", USAGE), Bill("p", "m")):
        await prices.cost(bill)
    assert table.loads == 0


def share(*, pays: bool, bill: Bill | None, role: Role = Role.LEADER, calls: int = 0) -> Share:
    return Share(role, "p", "m", bill, pays, calls=calls, first_s=11.0, leader_id="r1", call_id="c")


def test_whoever_led_the_call_pays_for_it() -> None:
    """Retries included; nothing is saved."""
    made = row(ENDED, share(pays=True, bill=Bill("p", "m", GUESS), calls=2), Cost(0.5, CostBasis.ESTIMATED))
    assert (made.prompt_tokens, made.completion_tokens, made.upstream_calls) == (1000, 200, 2)
    assert (made.cost_usd, made.cost_saved_usd, made.tokens_saved) == (0.5, 0.0, 0)
    assert (made.cost_basis, made.usage_estimated) == (CostBasis.ESTIMATED, True)
    assert (made.latency_ms, made.ttft_ms) == (2500.0, 1000.0)
    assert (made.request_id, made.leader_id, made.call_id) == ("r1", "r1", "c")


@pytest.mark.parametrize("role", [Role.FOLLOWER, Role.REPLAYED, Role.LEADER])
def test_whoever_shared_it_saved_as_much(role: Role) -> None:
    """A turn's leader too, if the call was another thread's."""
    made = row(ENDED, share(pays=False, bill=Bill("p", "m", USAGE), role=role), Cost(0.5, CostBasis.PRICES))
    assert (made.prompt_tokens, made.completion_tokens, made.upstream_calls, made.cost_usd) == (0, 0, 0, 0.0)
    assert (made.tokens_saved, made.cost_saved_usd, made.cost_basis) == (1200, 0.5, CostBasis.PRICES)


@pytest.mark.parametrize("code", ["provider_protocol", CLIENT_GONE])
def test_a_failure_is_paid_for_by_its_leader_and_saves_nobody_anything(code: str) -> None:
    """The provider sent half an answer, which it charges for; whoever waited for it got nothing."""
    failed = ENDED._replace(error_code=code)
    bill, cost = Bill("p", "m", GUESS), Cost(0.5, CostBasis.ESTIMATED)
    led = row(failed, share(pays=True, bill=bill, calls=1), cost)
    followed = row(failed, share(pays=False, bill=bill, role=Role.FOLLOWER), cost)
    assert (led.cost_usd, led.prompt_tokens, led.ttft_ms, led.error_code) == (0.5, 1000, None, code)
    assert (followed.cost_saved_usd, followed.tokens_saved, followed.cost_basis) == (0.0, 0, None)


def test_a_call_that_answered_nothing_costs_nothing() -> None:
    """It was refused; the row has its attempts and no basis."""
    made = row(ENDED._replace(error_code="provider_error"), share(pays=True, bill=Bill("p", "m"), calls=3), None)
    assert (made.cost_usd, made.prompt_tokens, made.upstream_calls) == (0.0, 0, 3)
    assert (made.cost_basis, made.usage_estimated) == (None, None)


class Ticket:
    """Is over when told to."""

    def __init__(self) -> None:
        self.accounted = False
        self.waiting: list[Callable[[], None]] = []
        self.results: list[Any] = []

    def share(self, result: Any) -> Share:
        self.results.append(result)
        return share(pays=True, bill=None)

    def when_over(self, tell: Callable[[], None]) -> None:
        self.waiting.append(tell)


def test_an_account_is_closed_once_and_written_when_the_work_is_over() -> None:
    """Whatever happens to the request after its answer was ready."""
    written: list[tuple[Ended, Share]] = []
    accounts, ticket = Accounts(lambda *entry: written.append(entry)), Ticket()
    accounts.close(ENDED, ticket, "the answer")
    accounts.close(ENDED._replace(error_code=CLIENT_GONE), ticket, None)
    assert written == []
    (tell,) = ticket.waiting
    tell()
    assert [ended for ended, _ in written] == [ENDED]
    assert ticket.results == ["the answer"]
