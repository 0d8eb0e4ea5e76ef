"""One row per request, whoever leaves and whatever fails: calls as the provider counted them, money by hand.

The operator's price here is 2 $ for a million tokens of the prompt and 8 $ of the answer; the fake provider counts 10
and as many as it has deltas.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from oncewise.model import RequestRecord
from oncewise.settings import ModelPrice
from tests.support.http import JSON, ORG, Site
from tests.support.v1 import V1, chat, serve_v1

PRICE = ModelPrice(input_usd_per_mtok=2, output_usd_per_mtok=8)
MODELS = (
    "n5-lat200", "n5-lat200-cost", "n5-lat200-costobject", "n5-lat200-nousage", "n5-cut3", "n5-gap60", "n500-gap20",
    "err400", "n5-err503-first1",
)  # fmt: skip
N5_USD = (10 * 2 + 5 * 8) / 1e6


@pytest.fixture
async def v1(tmp_path: Path) -> AsyncIterator[V1]:
    prices = {f"openai/{model}": PRICE for model in MODELS}
    async with serve_v1(tmp_path, prices=prices, replay_window_s=30.0) as running:
        yield running


async def rows(site: Site, count: int) -> Sequence[RequestRecord]:
    """The rows, oldest first; waits for so many."""
    async with asyncio.timeout(5):
        while True:
            await site.services.metrics.flush()
            found = await site.services.metrics._log.last(1000)
            if len(found) >= count:
                assert len(found) == count
                return sorted(found, key=lambda row: row.finished_at_ms)
            await asyncio.sleep(0.02)


async def upstream(site: Site, query: str = "") -> dict[str, Any]:
    return (await site.ask("GET", f"/api/metrics/performance?last_n=1000{query}", headers=())).json()["upstream"]


async def leave(site: Site, body: dict[str, Any], path: str, headers: Any = ()) -> None:
    """Send a request, and close the connection once the provider answers it."""
    calls = site.services
    _, writer = await site.connect()
    sent = json.dumps(body).encode()
    fields = [site.host, JSON, ("content-length", str(len(sent))), *headers]
    writer.write(site.head("POST", path, fields) + sent)
    async with asyncio.timeout(5):
        while not (calls.completions.flights.stats().waiters or calls.turns.calls.flights.stats().waiters):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
    writer.close()
    await writer.wait_closed()


# -- /v1 -----------------------------------------------------------------------------------------------------------


async def test_a_call_is_paid_once_and_saved_by_all_who_share_it(v1: V1) -> None:
    """Ten requests, streamed and whole: 60 millionths of a dollar paid, nine times as much saved."""
    asks = [v1.post(chat("openai/n5-lat200", stream=bool(n % 2)), [("x-request-id", f"r{n}")]) for n in range(10)]
    replies = await asyncio.gather(*asks)
    written = await rows(v1.site, 10)
    (leader,) = (row for row in written if row.role == "leader")
    assert {row.leader_id for row in written} == {leader.request_id}
    assert {row.call_id for row in written} == {replies[0].headers["x-call-id"]}
    assert (leader.prompt_tokens, leader.completion_tokens, leader.upstream_calls) == (10, 5, 1)
    assert (leader.cost_usd, leader.cost_basis, leader.usage_estimated) == (pytest.approx(N5_USD), "prices", False)
    for row in written:
        if row is not leader:
            assert (row.role, row.cost_usd, row.upstream_calls, row.prompt_tokens) == ("follower", 0.0, 0, 0)
            assert (row.tokens_saved, row.cost_saved_usd) == (15, pytest.approx(N5_USD))
    assert await upstream(v1.site) == {
        "calls": 1,
        "calls_saved": 9,
        "tokens_saved": 135,
        "cost_usd": pytest.approx(N5_USD),
        "cost_saved_usd": pytest.approx(9 * N5_USD),
    }
    page = (await v1.get("/metrics")).body.decode()
    assert f'oncewise_cost_usd_total{{basis="prices"}} {N5_USD}' in page
    assert "oncewise_tokens_saved_total 135.0" in page


@pytest.mark.parametrize(
    ("model", "cost_usd", "basis", "estimated"),
    [
        # What the provider says it charged, as a number and as Perplexity writes it.
        ("n5-lat200-cost", 0.0125, "provider", False),
        ("n5-lat200-costobject", 0.0125, "provider", False),
        # 9 tokens of prompt, a quarter of the bytes of its messages, and a token for each delta.
        ("n5-lat200-nousage", (9 * 2 + 6 * 8) / 1e6, "estimated", True),
        # In no table, and without a price of its own.
        ("n5-lat200-unheard-of", 0.0, "unknown", False),
        # Twenty deltas of the real gpt-4o: 2.50 $ and 10 $ for a million.
        ("gpt-4o", (10 * 2.5 + 20 * 10) / 1e6, "prices", False),
    ],
)
async def test_the_surest_figure_counts(v1: V1, model: str, cost_usd: float, basis: str, estimated: bool) -> None:
    """The provider's, the operator's price, the public one, an estimate, and what is not known is marked."""
    await v1.post(chat(f"openai/{model}"))
    (row,) = await rows(v1.site, 1)
    assert (row.cost_usd, row.cost_basis, row.usage_estimated) == (pytest.approx(cost_usd), basis, estimated)


async def test_a_leader_that_leaves_still_pays(v1: V1) -> None:
    """When the call is over; whoever stayed saved it. The figures have the provider's own count of calls."""
    body = chat("openai/n5-gap60", stream=True)
    leaving = asyncio.create_task(leave(v1.site, body, "/v1/chat/completions"))
    await v1.provider.call(1)
    stays = await v1.post(body)
    await leaving
    gone, stayed = sorted(await rows(v1.site, 2), key=lambda row: row.role != "leader")
    assert stays.headers["x-coalesce"] == "follower"
    assert (gone.role, gone.error_code, gone.upstream_calls) == ("leader", "client_gone", 1)
    assert (gone.cost_usd, gone.cost_basis, gone.ttft_ms) == (pytest.approx(N5_USD), "prices", None)
    assert (stayed.role, stayed.cost_usd, stayed.cost_saved_usd) == ("follower", 0.0, pytest.approx(N5_USD))
    figures = (await v1.get("/api/metrics/performance")).json()
    assert figures["errors"]["total"] == 0
    assert (figures["total_requests"], figures["upstream"]["calls"]) == (2, v1.provider.count)


async def test_a_call_that_everybody_left_is_paid_for_as_far_as_it_got(v1: V1) -> None:
    """By estimate: the provider has sent that much, and sends no figures any more."""
    await leave(v1.site, chat("openai/n500-gap20"), "/v1/chat/completions")
    v1.site.services.completions.drain()  # ends it at once; otherwise after 5 s
    (row,) = await rows(v1.site, 1)
    assert (row.error_code, row.role, row.cost_basis, row.upstream_calls) == ("client_gone", "leader", "estimated", 1)
    assert row.prompt_tokens == 9
    assert 2 < row.completion_tokens < 100
    assert row.cost_usd == pytest.approx((9 * 2 + row.completion_tokens * 8) / 1e6)


async def test_a_retry_that_adopts_a_call_saves_it(v1: V1) -> None:
    """Its first attempt led the call and pays for it."""
    body = chat("openai/n5-gap60", temperature=1)
    await leave(v1.site, body, "/v1/chat/completions")
    await v1.post(body, [("x-stainless-retry-count", "1")])
    first, retry = sorted(await rows(v1.site, 2), key=lambda row: row.role)
    assert (first.role, first.error_code, first.upstream_calls) == ("bypass", "client_gone", 1)
    assert (retry.role, retry.error_code, retry.upstream_calls) == ("follower", None, 0)
    assert (first.cost_usd, retry.cost_saved_usd) == (pytest.approx(N5_USD), pytest.approx(N5_USD))
    assert v1.provider.count == 1


async def test_a_failure_after_some_text_is_paid_for(v1: V1) -> None:
    """Three deltas and the prompt, by estimate; the follower has neither an answer nor savings."""
    body = chat("openai/n5-cut3-gap60", stream=True)
    v1.site.services.metrics._prices._own["openai/n5-cut3-gap60"] = (2.0, 8.0)
    await asyncio.gather(v1.post(body), v1.post(body))
    led, followed = sorted(await rows(v1.site, 2), key=lambda row: row.role != "leader")
    assert (led.error_code, led.cost_basis) == ("provider_protocol", "estimated")
    assert led.cost_usd == pytest.approx((9 * 2 + 3 * 8) / 1e6)
    assert (followed.error_code, followed.cost_saved_usd, followed.tokens_saved) == ("provider_protocol", 0.0, 0)


async def test_what_was_refused_costs_nothing_and_retries_are_counted(v1: V1) -> None:
    """One attempt that is final, and one that is tried again."""
    await v1.post(chat("openai/err400"))
    await v1.post(chat("openai/n5-err503-first1"))
    refused, retried = await rows(v1.site, 2)
    assert (refused.upstream_calls, refused.cost_usd, refused.cost_basis) == (1, 0.0, None)
    assert (retried.upstream_calls, retried.cost_usd, retried.error_code) == (2, pytest.approx(N5_USD), None)
    assert (await upstream(v1.site))["calls"] == v1.provider.count == 3


async def test_figures_of_one_tenant(v1: V1) -> None:
    """Beside those of all."""
    body = chat("openai/n5-lat200")
    await asyncio.gather(*(v1.post(body, [("x-org-id", org)]) for org in ("a", "a", "a", "b")))
    of_a, of_b, of_all = [await upstream(v1.site, query) for query in ("&org_id=a", "&org_id=b", "")]
    assert (of_a["cost_usd"], of_a["cost_saved_usd"]) == (pytest.approx(N5_USD), pytest.approx(2 * N5_USD))
    assert (of_b["cost_usd"], of_b["cost_saved_usd"], of_b["calls"]) == (pytest.approx(N5_USD), 0, 1)
    assert of_all["cost_usd"] == pytest.approx(2 * N5_USD)


# -- threads -------------------------------------------------------------------------------------------------------


async def test_a_turn_is_paid_once_and_saved_by_followers_and_replays(v1: V1) -> None:
    """Whole and streamed; the replay has the same price as the call had."""
    thread = await v1.site.thread()
    both = [v1.site.say(thread, model="openai/n5-lat200"), v1.site.stream(thread, model="openai/n5-lat200")]
    await asyncio.gather(*both)
    await v1.site.say(thread, model="openai/n5-lat200")
    written = await rows(v1.site, 3)
    assert sorted(row.role for row in written) == ["follower", "leader", "replayed"]
    for row in written:
        paid, saved = (N5_USD, 0.0) if row.role == "leader" else (0.0, N5_USD)
        assert (row.cost_usd, row.cost_saved_usd) == (pytest.approx(paid), pytest.approx(saved))
        assert (row.tokens_saved, row.upstream_calls) == ((0, 1) if row.role == "leader" else (15, 0))
        assert (row.cost_basis, row.surface, row.call_id is not None) == ("prices", "threads", True)
    leader = next(row for row in written if row.role == "leader")
    links = {row.role: row.leader_id for row in written}
    assert links == {"leader": leader.request_id, "follower": leader.request_id, "replayed": None}
    assert len({row.turn_id for row in written}) == 1


async def test_a_replay_saves_what_the_provider_said(v1: V1) -> None:
    """It is stored with the turn."""
    thread = await v1.site.thread()
    for _ in range(2):
        await v1.site.say(thread, model="openai/n5-lat200-cost")
    led, replayed = await rows(v1.site, 2)
    assert (led.cost_usd, led.cost_basis) == (0.0125, "provider")
    assert (replayed.role, replayed.cost_saved_usd, replayed.cost_basis) == ("replayed", 0.0125, "provider")


async def test_a_call_of_two_threads_is_paid_by_the_one_that_led_it(v1: V1) -> None:
    """Both lead a turn of their own."""
    threads = [await v1.site.thread() for _ in range(2)]
    await asyncio.gather(*(v1.site.say(thread, model="openai/n5-lat200") for thread in threads))
    written = sorted(await rows(v1.site, 2), key=lambda row: row.upstream_calls)
    assert [row.role for row in written] == ["leader", "leader"]
    assert [row.upstream_calls for row in written] == [0, 1]
    assert [row.cost_usd for row in written] == [0.0, pytest.approx(N5_USD)]
    assert [row.cost_saved_usd for row in written] == [pytest.approx(N5_USD), 0.0]
    assert len({row.call_id for row in written}) == 1


@pytest.mark.parametrize("path", ["messages", "messages/stream"])
async def test_a_turn_whose_only_client_left_is_paid_for(v1: V1, path: str) -> None:
    """It goes on and is stored; the row waits for its end."""
    thread = await v1.site.thread()
    body = {"content": "Hello", "model": "openai/n5-gap60"}
    await leave(v1.site, body, f"/api/threads/{thread}/{path}", [ORG])
    (row,) = await rows(v1.site, 1)
    assert (row.role, row.error_code, row.upstream_calls) == ("leader", "client_gone", 1)
    assert (row.cost_usd, row.cost_basis) == (pytest.approx(N5_USD), "prices")
    assert len(await v1.site.messages(thread)) == 2


async def test_the_call_of_a_turn_that_was_cancelled_is_paid_when_it_is_over(v1: V1) -> None:
    """Another thread shares it and keeps it going; the money is not lost with the turn."""
    one, two = [await v1.site.thread() for _ in range(2)]
    first = asyncio.create_task(v1.site.say(one, model="openai/n5-gap60", headers=[("x-request-id", "the-first")]))
    await v1.provider.call(1)
    second = asyncio.create_task(v1.site.say(two, model="openai/n5-gap60"))
    await asyncio.sleep(0.05)
    await v1.site.ask("POST", "/api/threads/cancel/the-first", b"")
    assert ((await first).status, (await second).status) == (409, 200)
    cancelled, shared = sorted(await rows(v1.site, 2), key=lambda row: row.error_code is None)
    assert (cancelled.error_code, cancelled.upstream_calls) == ("turn_cancelled", 1)
    assert (cancelled.cost_usd, cancelled.cost_basis) == (pytest.approx(N5_USD), "prices")
    assert (shared.cost_usd, shared.cost_saved_usd) == (0.0, pytest.approx(N5_USD))
    assert v1.provider.count == 1


async def test_rows_of_calls_that_a_stop_interrupts_are_written(tmp_path: Path) -> None:
    """By the last flush, after the calls have ended."""
    async with serve_v1(tmp_path, prices={"openai/n500-gap20": PRICE}, drain_s=0.0) as v1:
        thread = await v1.site.thread()
        whole = asyncio.create_task(v1.post(chat("openai/n500-gap20")))
        turn = asyncio.create_task(v1.site.say(thread, model="openai/n500-gap20"))
        stream = asyncio.create_task(v1.site.stream(thread, "Other", model="openai/n500-gap20"))
        await v1.provider.call(2)
        await asyncio.sleep(0.2)
        metrics = v1.site.services.metrics
        seen: list[RequestRecord] = []
        metrics._listener = seen.append
    await asyncio.gather(whole, turn, stream)
    assert {row.surface for row in seen} == {"threads", "v1"}
    paid = [row for row in seen if row.upstream_calls]
    assert [row.cost_basis for row in paid] == ["estimated"] * 2
    assert all(row.cost_usd > 0 for row in paid)
    assert len(seen) == 3
