"""Public prices: the library's own arithmetic in a fraction of its time, and nothing fetched."""

import asyncio
import subprocess
import sys
from decimal import Decimal

import pytest
from genai_prices import Usage as ReportedUsage
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import ModelPrice, StartDateConstraint, Tier, TieredPrices

from oncewise.model import Usage
from oncewise.providers.prices import KEEP_S, MOST, PublicPrices, _tiers

HOSTS = {
    "openai": "http://127.0.0.1:9100/v1",
    "gemini": "https://generativelanguage.googleapis.com/v1beta",
    "kimi": "https://api.moonshot.ai/v1",
    "xai": "https://api.x.ai/v1",
    "ollama": "http://127.0.0.1:11434/v1",
    "second-account": "https://api.anthropic.com/v1",
    "my-vllm": "http://127.0.0.1:9200/v1",
}


@pytest.fixture
async def prices() -> PublicPrices:
    table = PublicPrices(HOSTS)
    await table.load()
    return table


async def test_a_call_is_the_sum_of_its_tokens(prices: PublicPrices) -> None:
    """Gpt-4o: 2.50 $ in, 10 $ out, 1.25 $ from the cache, for a million each."""
    plain = Usage(1000, 500)
    assert prices.usd("openai", "gpt-4o", plain) == pytest.approx(1000 * 2.5e-6 + 500 * 10e-6)
    cached = Usage(1000, 500, cached_tokens=200)
    assert prices.usd("openai", "gpt-4o", cached) == pytest.approx(800 * 2.5e-6 + 200 * 1.25e-6 + 500 * 10e-6)


def test_above_its_threshold_every_token_has_the_higher_price() -> None:
    """One token more makes 200,001 of them dearer; what has no price of its own is part of the prompt."""
    dear = TieredPrices(base=Decimal(1), tiers=[Tier(200_000, Decimal(2)), Tier(400_000, Decimal(4))])
    tiers = _tiers(ModelPrice(input_mtok=dear, output_mtok=Decimal(10), cache_write_mtok=Decimal("1.5")))
    assert [rates.above_tokens for rates in tiers] == [400_000, 200_000, -1]
    assert [round(rates.prompt * 1e6, 6) for rates in tiers] == [4, 2, 1]
    assert [round(rates.cached * 1e6, 6) for rates in tiers] == [4, 2, 1]
    assert {round(rates.cache_write * 1e6, 6) for rates in tiers} == {1.5}
    assert {round(rates.completion * 1e6, 6) for rates in tiers} == {10}


def test_a_request_may_cost_something_itself() -> None:
    """Perplexity's do: 5 $ for a thousand."""
    (rates,) = _tiers(ModelPrice(input_mtok=Decimal(1), requests_kcount=Decimal(5)))
    assert (rates.request, rates.completion) == (0.005, 0.0)


def test_what_is_not_paid_by_token_has_no_price() -> None:
    """Nor would it be right to call it free."""
    assert _tiers(ModelPrice(requests_kcount=Decimal(5))) == ()


COUNTS = [(0, 0, 0, 0), (1000, 500, 0, 0), (1000, 500, 400, 0), (1000, 500, 400, 300), (300_000, 7, 1, 2)]


@pytest.mark.parametrize("name", ["openai", "anthropic", "gemini", "mistral", "groq", "deepseek", "xai", "kimi"])
async def test_every_model_costs_what_the_library_says(name: str) -> None:
    """All prices of the providers that are called here, cached and uncached, below and above thresholds."""
    table = PublicPrices({name: "https://any.example"})
    await table.load()
    known = {"gemini": "google", "xai": "x-ai", "kimi": "moonshotai"}.get(name, name)
    (provider,) = (provider for provider in get_snapshot().providers if provider.id == known)
    compared = 0
    for model in provider.models:
        if provider.find_model(model.id, all_providers=[]) is not model:
            continue
        for prompt, completion, cached, written in COUNTS:
            reported = ReportedUsage(
                input_tokens=prompt,
                output_tokens=completion,
                cache_read_tokens=cached or None,
                cache_write_tokens=written or None,
            )
            usage = Usage(prompt, completion, cached_tokens=cached, cache_write_tokens=written)
            found = table.usd(name, model.id, usage)
            if found is not None:
                theirs = float(get_snapshot().calc(reported, model.id, known, None, None).total_price)
                assert found == pytest.approx(theirs), (model.id, usage)
                compared += 1
    assert compared > 20


async def test_a_provider_is_priced_by_its_name_or_by_its_host(prices: PublicPrices) -> None:
    """A known name wherever it points; another name by its host; nobody's host not at all."""
    usage = Usage(1_000_000, 0)
    assert prices.usd("gemini", "gemini-2.5-flash", usage) == pytest.approx(0.3)
    assert prices.usd("kimi", "kimi-k2.6", usage) is not None
    assert prices.usd("xai", "grok-4.3", usage) is not None
    assert prices.usd("second-account", "claude-haiku-4-5", usage) == pytest.approx(1.0)
    for name, model in (("my-vllm", "gpt-4o"), ("ollama", "llama3.2"), ("nobody", "gpt-4o")):
        assert not prices.lists(name)
        assert prices.usd(name, model, usage) is None


async def test_a_model_nobody_knows_has_no_price(prices: PublicPrices) -> None:
    """And names that clients make up take no memory for ever."""
    assert prices.usd("openai", "no-such-model", Usage(1, 1)) is None
    for number in range(MOST + 10):
        prices.usd("openai", f"no-such-model-{number}", Usage(1, 1))
    assert len(prices._held) <= MOST


async def test_a_price_that_changes_is_looked_up_again() -> None:
    """Some have a date; what was held a minute ago is not what a call of now costs."""
    providers = get_snapshot().providers
    dated = [
        (provider, model, conditional.constraint.start_date)
        for provider in providers
        if provider.id in ("openai", "anthropic", "google", "mistral", "deepseek")
        for model in provider.models
        if isinstance(model.prices, list)
        for conditional in model.prices
        if isinstance(conditional.constraint, StartDateConstraint)
    ]
    usage, changed = Usage(1_000_000, 1_000_000), 0
    for provider, model, day in dated:
        now = [float(int(day.strftime("%s"))) - 2 * 86_400]
        name = "gemini" if provider.id == "google" else provider.id
        table = PublicPrices({name: ""}, lambda now=now: now[0])
        await table.load()
        before = table.usd(name, model.id, usage)
        now[0] += KEEP_S - 1
        assert table.usd(name, model.id, usage) == before
        now[0] += 4 * 86_400
        changed += table.usd(name, model.id, usage) != before
    assert changed > 0


async def test_it_is_loaded_once_and_by_nobody_in_particular() -> None:
    """Whoever is cancelled while it loads does not keep it from the others."""
    table = PublicPrices(HOSTS)
    assert table.lists("openai")
    assert not table.lists("ollama")
    first = asyncio.create_task(table.load())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(table.load(), table.load())
    assert table.usd("openai", "gpt-4o", Usage(1, 1)) is not None


def test_neither_start_nor_look_up_reaches_the_network() -> None:
    """The table is not imported with the server, and nothing is resolved or connected when it is used."""
    program = """
import asyncio, sys
import oncewise.api.app, oncewise.bootstrap
assert not any(name.partition(".")[0] == "genai_prices" for name in sys.modules), "imported at the start"
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        raise SystemExit(f"reached the network: {event}")
sys.addaudithook(hook)
from oncewise.model import Usage
from oncewise.providers.prices import PublicPrices
async def main():
    table = PublicPrices({"openai": ""})
    await table.load()
    print(table.usd("openai", "gpt-4o", Usage(1_000_000, 0)), table.usd("openai", "none", Usage(1, 1)))
asyncio.run(main())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (result.stdout, result.stderr) == ("2.5 None\n", "")
