"""Five tenants before one slow provider: it never has to refuse, everybody gets a turn, and everybody sees the queue.

The provider takes 20 calls in any second and answers 429 to the next; time is scaled down by 20 from 1 call/s.
"""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from oncewise.api.limits import Limits
from oncewise.core.pacing import LocalLimiter, Pacer
from oncewise.core.retry import RetryBudget
from oncewise.service.attempts import ProviderLane
from oncewise.settings import load_settings
from tests.support.fake_provider import FakeProvider
from tests.support.http import JSON, Reply, Site, read_events, serve
from tests.support.v1 import chat, chunks_of

RPS = 20
BURST = 3
TENANTS = ("ann", "ben", "cas", "dora", "eli")
MODEL = f"n2-rps{RPS}"


@pytest.fixture
async def fake() -> AsyncIterator[FakeProvider]:
    async with FakeProvider() as server:
        server.second_s = 0.95  # calls of a busy machine arrive up to 80 ms apart from their starts
        yield server


@asynccontextmanager
async def serving(folder: Path, fake: FakeProvider, rps: float) -> AsyncIterator[Site]:
    environ = {
        "OPENAI_API_KEY": "sk-upstream",
        "OPENAI_BASE_URL": fake.base_url,
        "OPENAI_RPS": str(rps),
        "OPENAI_BURST": str(BURST),
        "OPENAI_CONCURRENCY": "60",
    }
    settings = load_settings({}, environ=environ).settings
    chosen = {"providers": settings.providers, "default_provider": "openai"}
    async with serve(folder, limits=Limits(hold_s=0.05), **chosen) as running:
        yield running


@pytest.fixture
async def site(tmp_path: Path, fake: FakeProvider) -> AsyncIterator[Site]:
    async with serving(tmp_path, fake, RPS) as running:
        yield running


def jain(counts: list[int]) -> float:
    """Jain's index of fairness: 1.0 where all have the same, 1/n where one has all."""
    return sum(counts) ** 2 / (len(counts) * sum(count * count for count in counts))


async def complete(site: Site, tenant: str, number: int, *, stream: bool = False) -> Reply:
    body = chat(f"openai/{MODEL}", f"question {number} of {tenant}", stream=stream)
    return await site.ask("POST", "/v1/chat/completions", body, (JSON, ("x-org-id", tenant)))


async def say(site: Site, tenant: str, thread: str, *, stream: bool = False) -> Reply:
    path = f"/api/threads/{thread}/messages{'/stream' if stream else ''}"
    body = {"content": f"message of {tenant} in {thread}", "model": MODEL}
    return await site.ask("POST", path, body, (JSON, ("x-org-id", tenant)))


def ask_everywhere(site: Site, tenant: str, threads: list[str]) -> list[asyncio.Task[Reply]]:
    """Ten questions, five of them in threads, each asked for twice: as JSON and as a stream."""
    asks = [complete(site, tenant, number, stream=stream) for number in range(5) for stream in (False, True)]
    asks += [say(site, tenant, thread, stream=stream) for thread in threads for stream in (False, True)]
    return [asyncio.create_task(ask) for ask in asks]


def tenant_of(prompt: str) -> str:
    return next(tenant for tenant in TENANTS if f"of {tenant}" in prompt)


async def test_fifty_questions_of_five_tenants(site: Site, fake: FakeProvider) -> None:
    """100 requests are 50 calls at the provider's rate; none is refused, and no tenant is ahead of the others."""
    threads = {name: [await site.thread((JSON, ("x-org-id", name))) for _ in range(5)] for name in TENANTS}
    asked = [task for name in TENANTS for task in ask_everywhere(site, name, threads[name])]
    answered = await asyncio.gather(*asked)

    assert {reply.status for reply in answered} == {200}
    assert (fake.count, fake.outcomes["e429"]) == (50, 0)
    assert fake.max_in_second <= RPS
    # It is not idle either: 49 spacings of 1/20 s and the guard, and some time for a busy machine.
    starts = [call.started_s for call in fake.calls]
    assert starts[-1] - starts[0] < 49 / RPS * 1.03 + 1.0
    served = [tenant_of(call.request["messages"][-1]["content"]) for call in fake.calls]
    # As long as all wait; the first ones were alone in the queue.
    shares = Counter(served[:40])
    assert jain([shares[tenant] for tenant in TENANTS]) >= 0.95
    check_what_was_seen(answered)


def check_what_was_seen(answered: list[Reply]) -> None:
    """Each caller was told what came first and how long that took, in headers or in `meta`."""
    whole = [reply for reply in answered if "x-queue-wait-ms" in reply.headers]
    assert len(whole) == 50
    for reply in whole:
        ahead, waited_ms = int(reply.headers["x-queue-position"]), int(reply.headers["x-queue-wait-ms"])
        # Others may have come before it later; nobody that was counted has left.
        assert waited_ms >= (ahead - BURST) / RPS * 1000 - 5
    assert max(int(reply.headers["x-queue-position"]) for reply in whole) >= 10
    assert max(int(reply.headers["x-queue-wait-ms"]) for reply in whole) >= 1000
    streams = [reply for reply in answered if reply.headers["content-type"] == "text/event-stream"]
    assert len(streams) == 50
    positions = [position_of(reply) for reply in streams]
    assert max(positions) >= 10
    assert min(positions) == 0


def position_of(stream: Reply) -> int:
    if "x-queue-position" in stream.headers:
        assert chunks_of(stream)[-1] == "[DONE]"
        return int(stream.headers["x-queue-position"])
    metas = [event.data for event in read_events(stream.body) if event.name == "meta"]
    assert metas[-1]["queue_wait_ms"] >= 0
    return int(metas[0]["queue_position"])


async def test_a_greedy_tenant_waits_for_itself(site: Site, fake: FakeProvider) -> None:
    """Forty questions at once, then one each of four others: they are answered before the greedy one's second half."""
    greedy = [asyncio.create_task(complete(site, TENANTS[0], number)) for number in range(40)]
    await fake.call(3)
    begun = fake.count
    others = await asyncio.gather(*(complete(site, tenant, 0) for tenant in TENANTS[1:]))
    assert {reply.status for reply in others} == {200}
    # Each waits for one round, in which every tenant has a turn.
    assert fake.count - begun <= 2 * len(TENANTS)
    await asyncio.gather(*greedy)
    assert fake.outcomes["e429"] == 0


async def test_who_looks_in_later_sees_the_place_of_now(site: Site, fake: FakeProvider) -> None:
    """A viewer that joins a waiting turn is told where it stands, not where it stood."""
    waiting = [asyncio.create_task(complete(site, "ann", number)) for number in range(30)]
    await fake.call(1)
    thread = await site.thread((JSON, ("x-org-id", "ann")))
    asked = asyncio.create_task(say(site, "ann", thread, stream=True))
    await asyncio.sleep(0.8)
    joined = await site.ask("GET", f"/api/threads/{thread}/stream", headers=[("x-org-id", "ann")])
    first, later = position_of(await asked), position_of(joined)
    assert 0 < later < first <= 30
    assert first - later >= math.floor(0.5 * RPS)
    await asyncio.gather(*waiting)


def with_queue(site: Site, **limits: Any) -> None:
    """Let the provider's queue be as short as a test needs it, behind a start that never comes."""
    lanes = site.services.turns.calls.lanes
    pacer = Pacer(LocalLimiter(0.01, 1, asyncio.get_running_loop().time), concurrency=9, **limits)
    lanes["openai"] = ProviderLane(lanes["openai"].provider, pacer, "m", RetryBudget())


async def waiting(site: Site, n: int) -> None:
    async with asyncio.timeout(5):
        while site.services.turns.calls.lanes["openai"].pacer.stats().waiting < n:
            await asyncio.sleep(0.005)


async def test_a_full_queue_refuses_at_once(site: Site, fake: FakeProvider) -> None:
    """With 429, a code and when to come again, on every surface; nobody is called for it."""
    with_queue(site, max_waiting=2, max_wait_s=3.0)
    assert (await complete(site, "ann", 0)).status == 200
    held = [asyncio.create_task(complete(site, "ann", number)) for number in (1, 2)]
    await waiting(site, 2)
    thread = await site.thread((JSON, ("x-org-id", "ann")))
    for ask in (
        complete(site, "ann", 3),
        complete(site, "ann", 4, stream=True),
        say(site, "ann", thread),
        say(site, "ann", thread, stream=True),
    ):
        reply = await ask
        document = reply.json()
        assert (reply.status, document.get("error", document)["code"]) == (429, "queue_full")
        assert int(reply.headers["retry-after"]) >= 1
        assert document.get("retryable", True)
        assert "x-should-retry" not in reply.headers
    # There is room for a tenant that has nothing in it: the newest of the one that fills it makes way.
    modest = asyncio.create_task(complete(site, "ben", 0))
    refused = await held[1]
    assert (refused.status, refused.json()["error"]["code"]) == (429, "queue_full")
    for reply in await asyncio.gather(held[0], modest):
        assert (reply.status, reply.json()["error"]["code"]) == (504, "queue_timeout")
    assert fake.count == 1


async def test_nobody_waits_in_vain(tmp_path: Path, fake: FakeProvider) -> None:
    """At 1 call in 20 s three starts come within a minute: the fourth in line is told at once when to come again."""
    async with serving(tmp_path, fake, 0.05) as site:
        assert (await complete(site, "ann", 0)).status == 200
        held = [asyncio.create_task(complete(site, "ann", number)) for number in (1, 2, 3)]
        await waiting(site, 3)
        reply = await complete(site, "ann", 4)
        assert (reply.status, reply.json()["error"]["code"]) == (429, "queue_full")
        assert reply.headers["retry-after"] == "20"
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
    assert fake.count == 1


async def test_retries_keep_to_the_rate_and_to_their_budget(site: Site, fake: FakeProvider) -> None:
    """A third of the calls fails: no second has more than the rate, and no more than a tenth are tried again."""
    asks = [
        site.ask("POST", "/v1/chat/completions", chat(f"openai/n2-err500-p30-rps{RPS}", f"q{number}"), (JSON,))
        for number in range(60)
    ]
    replies = await asyncio.gather(*asks)
    assert fake.max_in_second <= RPS
    assert fake.outcomes["e429"] == 0
    assert 60 < fake.count <= 60 + 6 + 1
    statuses = Counter(reply.status for reply in replies)
    assert statuses[200] + statuses[502] == 60
    assert fake.count == 60 + fake.outcomes["e500"] - statuses[502]


async def test_a_provider_that_allows_less_than_was_configured(site: Site, fake: FakeProvider) -> None:
    """Configured for 20 calls/s, it takes 10: after its first refusals half of the rate is used."""
    slower = MODEL.replace(f"rps{RPS}", "rps10")
    asks = [
        site.ask("POST", "/v1/chat/completions", chat(f"openai/{slower}", f"q{number}"), (JSON,))
        for number in range(25)
    ]
    replies = await asyncio.gather(*asks)
    figures = (await site.ask("GET", "/metrics")).body.decode()
    refused = fake.outcomes["e429"]
    # Each of the calls that ran into the limit together is one; without slowing down every second would have ten more.
    assert 1 <= refused <= 8
    assert 'oncewise_rate_share{provider="openai"} 1.0' not in figures
    statuses = Counter(reply.status for reply in replies)
    assert statuses[200] + statuses[429] == 25
    assert statuses[429] <= refused
