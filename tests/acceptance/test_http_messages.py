"""Messages over real sockets, as the HTTP contract promises them."""

import asyncio
import json

import pytest

from oncewise.api.documents import TurnAnswer
from oncewise.errors import ProviderError, ProviderRateLimited
from tests.support.http import JSON, ORG, serve
from tests.support.scripted import ScriptedProvider


@pytest.fixture
async def site(tmp_path):
    async with serve(tmp_path) as site:
        yield site


@pytest.fixture
async def held(tmp_path):
    """A server whose provider answers when the test says so."""
    async with serve(tmp_path, ScriptedProvider(held=True), drain_s=0) as site:
        yield site


async def until(condition):
    """Wait for a condition that no event tells of."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_fifty_identical_messages_over_ten_connections_are_one_call_and_two_messages(tmp_path):
    """The headline: 1 leader, 49 followers, byte-identical bodies."""
    async with serve(tmp_path, ScriptedProvider(delay_s=0.2)) as site:
        thread = await site.thread()

        async def five():
            return [await site.say(thread) for _ in range(5)]

        replies = [reply for five in await asyncio.gather(*(five() for _ in range(10))) for reply in five]

        assert {reply.status for reply in replies} == {200}
        assert len({reply.body for reply in replies}) == 1
        assert [reply.headers["x-coalesce"] for reply in replies].count("leader") == 1
        assert len(site.provider.calls) == 1
        assert await site.messages(thread) == [("user", "Hello"), ("assistant", "pong")]
        figures = (await site.ask("GET", "/api/metrics/performance?last_n=50", headers=())).json()
        assert figures["total_requests"] == 50
        assert figures["coalesce"]["leaders"] == 1
        assert figures["coalesce"]["followers"] == 49
        assert figures["upstream"]["calls"] == 1


async def test_the_answer_has_the_fields_of_the_contract(site):
    """And no others."""
    reply = await site.say(await site.thread())

    TurnAnswer.model_validate(reply.json())
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-coalesce"] == "leader"
    assert reply.headers["cache-status"] == "oncewise; fwd=miss"
    assert reply.headers["x-turn-id"] == reply.json()["turn_id"]
    assert int(reply.headers["x-queue-wait-ms"]) >= 0
    assert int(reply.headers["x-ttft-ms"]) >= 0
    assert "age" not in reply.headers
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "server" not in reply.headers
    assert not any(name.startswith("access-control") for name in reply.headers)


async def test_a_follower_and_a_replay_say_what_they_are(held):
    """`x-coalesce`, `Cache-Status` and `Age` are each caller's own."""
    thread = await held.thread()
    leader = asyncio.create_task(held.say(thread))
    await held.provider.started.wait()
    follower = asyncio.create_task(held.say(thread, headers=[("x-request-id", "second")]))
    await until(lambda: held.services.turns.flights.stats().waiters == 2)
    held.provider.go.set()
    first, second, third = await leader, await follower, await held.say(thread)

    assert [reply.headers["x-coalesce"] for reply in (first, second, third)] == ["leader", "follower", "replayed"]
    assert second.headers["cache-status"] == "oncewise; hit; detail=follower; collapsed"
    assert third.headers["cache-status"].startswith("oncewise; hit; ttl=")
    assert third.headers["age"] == "0"
    assert second.headers["x-request-id"] == "second"
    assert first.body == second.body == third.body


@pytest.mark.parametrize("header", [("x-coalesce", "off"), ("cache-control", "max-age=0, no-cache")])
async def test_a_request_may_have_a_turn_of_its_own(site, header):
    """`bypass`: a new turn although the same was answered a moment ago."""
    thread = await site.thread()
    await site.say(thread)
    reply = await site.say(thread, headers=[header])

    assert reply.headers["x-coalesce"] == "bypass"
    assert reply.headers["cache-status"] == "oncewise; fwd=bypass"
    assert len(await site.messages(thread)) == 4


async def test_an_idempotency_key_replays_its_request_and_refuses_another(site):
    """Same key, other content: 422."""
    thread, key = await site.thread(), ("idempotency-key", "k-1")
    first = await site.say(thread, headers=[key])
    again = await site.say(thread, headers=[key])
    other = await site.say(thread, "Other", headers=[key])

    assert again.body == first.body
    assert 86_000 < int(again.headers["cache-status"].rpartition("=")[2]) <= 86_400
    assert (other.status, other.code) == (422, "idempotency_mismatch")


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "ключ".encode().decode("latin-1")])
async def test_an_idempotency_key_is_visible_ascii(site, key):
    """At most 255 characters."""
    reply = await site.say(await site.thread(), headers=[("idempotency-key", key)])

    assert (reply.status, reply.json()["errors"][0]["loc"]) == (422, ["header", "idempotency-key"])
    assert site.provider.calls == []


@pytest.mark.parametrize(
    ("failure", "status", "retry_after"),
    [
        (ProviderError(retryable=False), 502, None),
        (ProviderRateLimited(retry_after_s=400.2), 429, "401"),
    ],
)
async def test_a_failed_turn_is_a_problem_that_says_which_turn(site, failure, status, retry_after):
    """With the turn's headers, and `Retry-After` in whole seconds where a retry helps."""
    site.provider.failures = [(0, failure)]
    reply = await site.say(await site.thread())

    assert reply.status == status
    assert reply.code == failure.code
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers["x-coalesce"] == "leader"
    assert reply.headers["x-turn-id"]
    assert reply.headers.get("retry-after") == retry_after
    assert reply.json()["retryable"] is failure.retryable


async def test_a_provider_that_cancels_itself_is_a_bad_gateway_to_everyone(held):
    """C13: three times 502, and the server goes on."""
    thread = await held.thread()
    held.provider.failures = [(0, asyncio.CancelledError())]
    asked = [asyncio.create_task(held.say(thread)) for _ in range(3)]
    await until(lambda: held.services.turns.flights.stats().waiters == 3)
    held.provider.go.set()
    replies = await asyncio.gather(*asked)

    assert {(reply.status, reply.code) for reply in replies} == {(502, "upstream_cancelled")}
    assert (await held.say(thread)).status == 200


async def test_a_client_that_leaves_gives_up_its_interest_at_once(held):
    """The turn goes on for the others."""
    thread = await held.thread()
    stays = asyncio.create_task(held.say(thread))
    await held.provider.started.wait()
    _, writer = await held.connect()
    body = b'{"content":"Hello"}'
    path = f"/api/threads/{thread}/messages"
    writer.write(held.head("POST", path, [held.host, ORG, JSON, ("content-length", str(len(body)))]) + body)
    waiting = held.services.turns.flights.stats
    await until(lambda: waiting().waiters == 2)
    writer.close()
    await until(lambda: waiting().waiters == 1)
    held.provider.go.set()

    assert (await stays).status == 200
    assert held.provider.closed_early == 0


async def test_under_any_asgi_server_a_client_that_leaves_gives_up_its_interest(tmp_path):
    """Without our own server the application watches for the disconnect itself."""
    async with serve(tmp_path, ScriptedProvider(held=True), plain=True) as site:
        thread = await site.thread()
        asked = asyncio.create_task(site.say(thread))
        await site.provider.started.wait()
        assert site.services.turns.flights.stats().waiters == 1
        asked.cancel()
        await until(lambda: site.services.turns.flights.stats().waiters == 0)


async def test_cancelling_a_request_answers_it_and_nobody_else(held):
    """By its request id; the others keep waiting for the turn."""
    thread = await held.thread()
    stays = asyncio.create_task(held.say(thread))
    await held.provider.started.wait()
    goes = asyncio.create_task(held.say(thread, headers=[("x-request-id", "mine")]))
    await until(lambda: held.services.turns.flights.stats().waiters == 2)
    foreign = await held.ask("POST", "/api/threads/cancel/mine", headers=[("x-org-id", "other")])
    done = await held.ask("POST", "/api/threads/cancel/mine", headers=[ORG])
    cancelled = await goes
    held.provider.go.set()

    assert foreign.status == 404
    assert done.json() == {"request_id": "mine", "state": "cancelled"}
    assert (cancelled.status, cancelled.code, cancelled.json()["retryable"]) == (409, "turn_cancelled", False)
    assert (await stays).status == 200


async def test_cancelling_a_turn_ends_it_for_everyone_and_may_be_repeated(held):
    """200 with the final state, however often."""
    thread = await held.thread()
    asked = asyncio.create_task(held.say(thread))
    await held.provider.started.wait()
    turn = (await held.services.threads.active("acme", thread)).id
    path = f"/api/threads/{thread}/turns/{turn}"
    running = await held.ask("GET", path)
    first = await held.ask("POST", f"{path}/cancel")
    second = await held.ask("POST", f"{path}/cancel")

    assert (running.json()["state"], running.json()["requesters"]) == ("pending", 1)
    assert first.status == second.status == 200
    assert first.json()["state"] == second.json()["state"] == "cancelled"
    assert (await asked).code == "turn_cancelled"
    assert held.provider.closed_early == 1
    assert await held.messages(thread) == []


async def test_threads_are_made_listed_changed_exported_imported_and_deleted(site):
    """The life of a thread, one request after the other."""
    made = await site.ask("POST", "/api/threads", {"title": "One", "user_id": "u"})
    thread = made.json()["thread_id"]
    await site.say(thread, reason="why")
    changed = await site.ask("PATCH", f"/api/threads/{thread}", {"title": None, "pinned": True})
    listed = await site.ask("GET", "/api/threads/?limit=1")
    audit = await site.ask("GET", f"/api/threads/{thread}/audit")
    exported = await site.ask("GET", f"/api/threads/{thread}/export")
    lines = [json.loads(line) for line in exported.body.splitlines()]
    ndjson = ("content-type", "application/x-ndjson")
    imported = await site.ask("POST", "/api/threads/import", exported.body, (ORG, ndjson))
    bad = await site.ask("POST", "/api/threads/import", exported.body.splitlines()[1], (ORG, ndjson))
    gone = await site.ask("DELETE", f"/api/threads/{thread}")

    assert made.status == 201
    assert made.json()["title"] == "One"
    assert (changed.json()["title"], changed.json()["pinned"]) == (None, True)
    assert listed.json()["items"][0]["id"] == thread
    assert audit.json()["items"][0]["reason"] == "why"
    assert [line["content"] for line in lines] == ["Hello", "pong"]
    assert imported.status == 201
    assert await site.messages(imported.json()["thread_id"]) == [("user", "Hello"), ("assistant", "pong")]
    assert bad.status == 422
    assert (gone.status, gone.body) == (204, b"")
    assert (await site.ask("GET", f"/api/threads/{thread}")).status == 404


async def test_a_foreign_thread_is_answered_as_one_that_does_not_exist(site):
    """On every route, byte for byte but for the request id."""
    thread = await site.thread()
    turn = (await site.say(thread)).json()["turn_id"]
    unknown = "01a20a45-0776-732e-ab10-ed5d8e638962"
    routes = [
        ("GET", "", None),
        ("PATCH", "", {}),
        ("DELETE", "", None),
        ("GET", "/audit", None),
        ("GET", "/export", None),
        ("POST", "/messages", {"content": "x"}),
        ("POST", "/messages/stream", {"content": "x"}),
        ("GET", "/stream", None),
        ("GET", f"/turns/{turn}", None),
        ("GET", f"/turns/{turn}/stream", None),
        ("POST", f"/turns/{turn}/cancel", None),
    ]
    sender = (("x-org-id", "other"), JSON, ("x-request-id", "same"))
    for method, rest, body in routes:
        foreign = await site.ask(method, f"/api/threads/{thread}{rest}", body, sender)
        missing = await site.ask(method, f"/api/threads/{unknown}{rest}", body, sender)
        malformed = await site.ask(method, f"/api/threads/a%00b{rest}", body, sender)
        assert (foreign.status, foreign.code) == (404, "not_found"), (method, rest)
        assert foreign.body == missing.body == malformed.body, (method, rest)
    assert (await site.ask("GET", "/api/threads/", headers=sender)).json()["items"] == []
    assert len(await site.messages(thread)) == 2
    assert len(site.provider.calls) == 1


async def test_a_wrong_method_names_the_right_ones(site):
    """405 with `Allow`, raw routes included; HEAD is GET without a body."""
    thread = await site.thread()
    on_raw = await site.ask("GET", f"/api/threads/{thread}/messages")
    on_rest = await site.ask("PUT", f"/api/threads/{thread}", b"{}")
    options = await site.ask("OPTIONS", f"/api/threads/{thread}")
    trace = await site.ask("TRACE", "/health")
    head = await site.ask("HEAD", "/health")

    assert (on_raw.status, on_raw.headers["allow"]) == (405, "POST")
    assert (on_rest.status, on_rest.headers["allow"]) == (405, "DELETE, GET, HEAD, PATCH")
    assert {options.code, trace.code} == {"method_not_allowed"}
    assert (head.status, head.body) == (200, b"")


async def test_health_says_ready_until_the_server_drains(held):
    """And a new message is refused with the reason."""
    thread = await held.thread()
    for path in ("/health", "/health/liveness", "/health/liveliness", "/health/readiness"):
        assert (await held.ask("GET", path, headers=())).status == 200
    held.services.drain()
    ready = await held.ask("GET", "/health/readiness", headers=())
    refused = await held.say(thread)

    assert (ready.status, ready.headers["retry-after"]) == (503, "1")
    assert (refused.status, refused.code) == (503, "shutting_down")
    assert refused.headers["retry-after"] == "1"
    assert (await held.ask("GET", "/health", headers=())).status == 200


async def test_openapi_lists_every_route(site):
    """The raw ones included; and no page that would load from another host."""
    document = (await site.ask("GET", "/openapi.json", headers=())).json()

    assert {
        "/api/threads/",
        "/api/threads/{thread_id}",
        "/api/threads/{thread_id}/messages",
        "/api/threads/{thread_id}/messages/stream",
        "/api/threads/{thread_id}/stream",
        "/api/threads/{thread_id}/turns/{turn_id}",
        "/api/threads/{thread_id}/turns/{turn_id}/stream",
        "/api/threads/{thread_id}/turns/{turn_id}/cancel",
        "/api/threads/cancel/{request_id}",
        "/api/metrics/performance",
        "/health/readiness",
    } <= set(document["paths"])
    assert (await site.ask("GET", "/docs", headers=())).status == 404
