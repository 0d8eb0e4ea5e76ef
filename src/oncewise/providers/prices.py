"""Public prices of models, from the table that `genai-prices` brings along.

The table is Python code of 1.6 MB: it is imported when a price is first needed, in a thread, and never brought up to
date over the network. Its own arithmetic takes 60 µs a call and more for models that it does not know; here a model is
looked up once a minute, and what a call costs is then a sum of products.

A provider of the catalogue is priced by its name, wherever its `base_url` points; any other by its host, or not at all.

Deliberately absent: what a provider charges beside tokens and requests: searches, images, sound, storage.
"""

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

from oncewise.model import Usage
from oncewise.providers.catalogue import CATALOGUE

if TYPE_CHECKING:
    from genai_prices.types import ModelPrice, Provider, TieredPrices

__all__ = ["PublicPrices"]

MTOK = 1_000_000

KEEP_S = 60.0
"""For so long a looked-up price holds; some change with the date, or the time of day."""
MOST = 1_000
"""Models held at a time: clients may name any."""

# Where the table calls a provider of the catalogue something else; None: it is nobody's to be paid.
_NAMES: Mapping[str, str | None] = {"gemini": "google", "kimi": "moonshotai", "xai": "x-ai", "ollama": None}


class _Rates(NamedTuple):
    """US dollars for one token each, and for one request, of prompts above so many tokens."""

    above_tokens: int
    prompt: float
    cached: float
    cache_write: float
    completion: float
    request: float


class PublicPrices:
    """Implements `oncewise.ports.PriceTable`.

    Args:
        hosts: Name of each configured provider → its base URL.
        now_s: Seconds since the Unix epoch.
    """

    def __init__(self, hosts: Mapping[str, str], now_s: Callable[[], float] = time.time) -> None:
        self._hosts = dict(hosts)
        self._now_s = now_s
        self._loading: asyncio.Task[None] | None = None
        self._providers: dict[str, Provider | None] | None = None
        self._all: list[Provider] = []
        self._held: dict[tuple[str, str], tuple[float, tuple[_Rates, ...]]] = {}

    def lists(self, provider: str) -> bool:
        if self._providers is not None:
            return self._providers.get(provider) is not None
        return provider in self._hosts and _NAMES.get(provider, provider) is not None

    async def load(self) -> None:
        if self._providers is None:
            if self._loading is None:
                self._loading = asyncio.create_task(asyncio.to_thread(self._load))
            # Whoever is cancelled meanwhile must not end it for the others.
            await asyncio.shield(self._loading)

    def _load(self) -> None:
        from genai_prices.data_snapshot import get_snapshot  # noqa: PLC0415  see the module's docstring

        self._all = get_snapshot().providers
        self._providers = {name: self._provider(name, host) for name, host in self._hosts.items()}

    def _provider(self, name: str, host: str) -> "Provider | None":
        if name in CATALOGUE:
            wanted = _NAMES.get(name, name)
            return next((provider for provider in self._all if provider.id == wanted), None)
        return next((provider for provider in self._all if re.match(provider.api_pattern, host)), None)

    def usd(self, provider: str, model: str, usage: Usage) -> float | None:
        now_s = self._now_s()
        until_s, tiers = self._held.get((provider, model), (0.0, ()))
        if until_s <= now_s:
            tiers = self._look_up(provider, model, now_s)
        if not tiers:
            return None
        rates = next(rates for rates in tiers if usage.prompt_tokens > rates.above_tokens)
        plain = usage.prompt_tokens - usage.cached_tokens - usage.cache_write_tokens
        return (
            rates.request
            + plain * rates.prompt
            + usage.cached_tokens * rates.cached
            + usage.cache_write_tokens * rates.cache_write
            + usage.completion_tokens * rates.completion
        )

    def _look_up(self, provider: str, model: str, now_s: float) -> tuple[_Rates, ...]:
        # Not the library's own look-up: that remembers every name it was ever asked for.
        known = (self._providers or {}).get(provider)
        found = None if known is None else known.find_model(model, all_providers=self._all)
        prices = None if found is None else found.get_prices(datetime.fromtimestamp(now_s, UTC))
        tiers = () if prices is None else _tiers(prices)
        if len(self._held) >= MOST:
            self._held.clear()
        self._held[provider, model] = now_s + KEEP_S, tiers
        return tiers


def _tiers(prices: "ModelPrice") -> tuple[_Rates, ...]:
    """Rates by the size of the prompt, the largest first; none for a model that is not paid by token."""
    paid = (prices.input_mtok, prices.output_mtok, prices.cache_read_mtok, prices.cache_write_mtok)
    if paid[:2] == (None, None):
        return ()
    # -1: the lowest tier is for prompts without a token, too.
    starts = {-1, *(tier.start for price in paid for tier in getattr(price, "tiers", ()))}
    return tuple(_rates(prices, above) for above in sorted(starts, reverse=True))


def _rates(prices: "ModelPrice", above: int) -> _Rates:
    prompt = _at(prices.input_mtok, above, 0.0)
    return _Rates(
        above_tokens=above,
        prompt=prompt / MTOK,
        cached=_at(prices.cache_read_mtok, above, prompt) / MTOK,
        cache_write=_at(prices.cache_write_mtok, above, prompt) / MTOK,
        completion=_at(prices.output_mtok, above, 0.0) / MTOK,
        request=_at(prices.requests_kcount, above, 0.0) / 1_000,
    )


def _at(price: "Decimal | TieredPrices | None", above: int, without: float) -> float:
    """A price for prompts of more than `above` tokens: the tier that is reached holds for every token."""
    if price is None:
        return without
    if isinstance(price, Decimal):
        return float(price)
    reached = [tier.price for tier in price.tiers if tier.start <= above]
    return float(reached[-1] if reached else price.base)
