"""Clients as users have them: scripts with fetch under Node, and EventSource in a real browser."""

import asyncio
import json
import os
import shutil
from pathlib import Path

import pytest
from playwright.async_api import async_playwright

from tests.support.cutting_proxy import cutting_proxy
from tests.support.fake_provider import FakeProvider
from tests.support.watching import serve_openai, until, watching

CLIENTS = Path(__file__).parent / "clients"
CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def program(name):
    """Where a program is; without it the test is skipped, but never where the whole suite is promised to run."""
    found = shutil.which(name)
    if found is None and os.environ.get("CI"):
        pytest.fail(f"{name} is not installed, and this is CI")
    if found is None:
        pytest.skip(f"NOT RUN: {name} is not installed; `make test` installs it")
    return found


async def node(script, *arguments):
    """What a script prints, as JSON."""
    process = await asyncio.create_subprocess_exec(
        program("node"), CLIENTS / script, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, errors = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, errors.decode()
    return json.loads(out)


@pytest.fixture
async def fake():
    async with FakeProvider() as provider:
        yield provider


@pytest.fixture
async def site(tmp_path, fake):
    async with serve_openai(tmp_path, fake) as site:
        yield site


def base_url(site):
    return f"http://127.0.0.1:{site.port}"


async def state_of(site, thread, turn):
    return (await site.ask("GET", f"/api/threads/{thread}/turns/{turn}")).json()["state"]


async def test_a_fetch_reader_finds_what_it_looks_for(site):
    """`meta.request_id`, `meta.ttft_ms`, `delta.delta` and `done`; the text is the stored one, accents included."""
    thread = await site.thread()
    seen = await node("reader.mjs", base_url(site), thread, "lat50-n20-gap10-u2028")

    assert seen["status"] == 200
    assert seen["events"][:2] == ["ping", "meta"]
    assert seen["events"].count("done") == 1
    assert seen["ttft_ms"] >= 50
    assert (seen["done"]["state"], seen["done"]["chars"]) == ("completed", len(seen["text"]))
    assert await site.messages(thread) == [("user", "Hello"), ("assistant", seen["text"])]


async def test_a_fetch_reader_cancels_its_request_by_its_id(site, fake):
    """Its stream ends as cancelled, and the provider's connection is closed."""
    thread = await site.thread()
    seen = await node("reader.mjs", base_url(site), thread, "n400-gap20", "3")
    call = await fake.call(1)
    async with asyncio.timeout(2):
        await call.ended.wait()

    assert (seen["cancel_status"], seen["done"]["state"]) == (200, "cancelled")
    assert call.closed_by_client
    await until(lambda: not site.services.turns.runs.led)
    assert (await site.messages(thread))[1][1].startswith(seen["text"])


async def test_an_abort_ends_the_stream_and_not_the_turn(site, fake):
    """After two seconds the client is gone; the turn is stored, and can be watched to its end."""
    thread = await site.thread()
    seen = await node("abort.mjs", base_url(site), thread, "n110-gap25")
    await until(lambda: site.services.turns.flights.stats().waiters == 0)
    async with watching(site, f"/api/threads/{thread}/turns/{seen['turn_id']}/stream") as watch:
        await watch.rest()

    assert seen["error"] == "AbortError"
    assert seen["chars"] > 0
    assert 1900 <= seen["after_ms"] < 3000
    assert await state_of(site, thread, seen["turn_id"]) == "completed"
    assert await site.messages(thread) == [("user", "Hello"), ("assistant", watch.text)]
    assert not (await fake.call(1)).closed_by_client
    assert fake.count == 1


@pytest.mark.slow
async def test_an_event_source_resumes_by_itself_and_stops_after_the_end(site, fake):
    """Cut twice inside a line it goes on without gap or repeat; after `done` it is told 204 and stays closed."""
    thread = await site.thread()
    said = {"content": "Hello", "model": "n260-gap25-u2028"}
    async with (
        cutting_proxy(site.port, (CLIENTS / "event_source.html").read_bytes()) as proxy,
        async_playwright() as playwright,
    ):
        browser = await playwright.chromium.launch(executable_path=program("chromium"), args=CHROMIUM)
        page = await browser.new_page()
        # Before the turn starts: on a busy machine a browser takes longer than the whole stream.
        await page.goto(f"http://127.0.0.1:{proxy.port}/")
        async with watching(site, f"/api/threads/{thread}/messages/stream", said) as first:
            proxy.cuts = [12, 5]
            stream = f"/api/threads/{thread}/turns/{first.turn_id}/stream"
            await page.evaluate("address => follow(address)", stream)
            await page.wait_for_function("source.readyState === EventSource.CLOSED", timeout=30_000)
            seen = await page.evaluate("seen")
            await first.rest()
        passed = list(proxy.passed)
        await asyncio.sleep(2.5)
        await browser.close()

    assert seen["text"] == first.text
    assert seen["opens"] == 3
    assert [status for _, status in passed] == [200, 200, 200, 204]
    places = [int(place.removeprefix("1-")) for place in seen["ids"]]
    assert places == sorted(set(places))
    assert passed[0][0] is None
    assert all(last in seen["ids"] for last, _ in passed[1:3])
    assert passed[3][0] == seen["terminal"][0][1] == first.last_id
    assert [(name, data["state"]) for name, _, data in seen["terminal"]] == [("done", "completed")]
    assert not any("replayed_from" in meta for meta in seen["metas"])
    assert proxy.passed == passed
    assert fake.count == 1
