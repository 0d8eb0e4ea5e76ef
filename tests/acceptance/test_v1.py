"""`/v1` as a client sees it, byte by byte, over sockets."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from oncewise.api.limits import Limits
from tests.support.v1 import V1, chat, chunks_of, serve_v1


@pytest.fixture
async def v1(tmp_path: Path) -> AsyncIterator[V1]:
    async with serve_v1(tmp_path) as running:
        yield running


def text_of(chunks: list) -> str:
    parts = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks[:-1] if chunk["choices"]]
    return "".join(parts)


async def test_fifty_identical_requests_are_one_call(v1: V1) -> None:
    """Streams and whole answers alike, with one id, one text and one bill."""
    asks = [v1.post(chat("openai/n5-lat300", stream=bool(number % 2))) for number in range(50)]
    replies = await asyncio.gather(*asks)
    assert {reply.status for reply in replies} == {200}
    assert v1.provider.count == 1
    roles = [reply.headers["x-coalesce"] for reply in replies]
    assert (roles.count("leader"), roles.count("follower")) == (1, 49)
    assert len({reply.headers["x-call-id"] for reply in replies}) == 1
    whole = {reply.body for reply in replies[::2]}
    streamed = {reply.body for reply in replies[1::2]}
    assert (len(whole), len(streamed)) == (1, 1)
    document, chunks = json.loads(whole.pop()), chunks_of(replies[1])
    assert document["choices"][0]["message"]["content"] == text_of(chunks)
    assert {chunk["id"] for chunk in chunks[:-1]} == {document["id"]}
    figures = (await v1.get("/api/metrics/performance")).json()
    assert (figures["upstream"]["calls"], figures["upstream"]["calls_saved"]) == (1, 49)
    assert figures["coalesce"]["followers"] == 49


async def test_fifty_samples_are_fifty_calls(v1: V1) -> None:
    """Nobody asked for the same answer."""
    replies = await asyncio.gather(*(v1.post(chat("openai/n2-lat200", temperature=1)) for _ in range(50)))
    assert {reply.headers["x-coalesce"] for reply in replies} == {"bypass"}
    assert v1.provider.count == 50


async def test_a_stream_is_data_blocks_and_ends_with_done(v1: V1) -> None:
    """A role, contents, a finish; figures only for who asked."""
    reply = await v1.post(chat(stream=True))
    chunks = chunks_of(reply)
    assert chunks[-1] == "[DONE]"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert all("usage" not in chunk for chunk in chunks[:-1])
    assert b"id: " not in reply.body
    assert b"event:" not in reply.body
    asked = chunks_of(await v1.post(chat(stream=True, stream_options={"include_usage": True})))
    assert asked[-2]["choices"] == []
    assert asked[-2]["usage"]["completion_tokens"] == 3


async def test_what_the_provider_says_besides_passes(v1: V1) -> None:
    """Citations, search results and cost, in both forms; fields nobody knows, upstream."""
    body = chat("openai/n2-citations-cost", surprise={"a": [1.0, None]}, tools=[{"type": "function"}])
    whole = (await v1.post(body)).json()
    assert whole["citations"] == ["https://example.org/1"]
    assert whole["search_results"]
    assert whole["usage"]["cost"] > 0
    streamed = chunks_of(await v1.post({**body, "stream": True, "stream_options": {"include_usage": True}}))
    assert any("citations" in chunk for chunk in streamed[:-1])
    assert streamed[-2]["usage"]["cost"] > 0
    sent = (await v1.provider.call(1)).request
    assert (sent["surprise"], sent["tools"]) == ({"a": [1.0, None]}, [{"type": "function"}])


@pytest.mark.parametrize(
    ("model", "status", "code", "permanent"),
    [
        ("openai/err400", 502, "provider_error", True),
        ("openai/err401", 502, "provider_error", True),
        ("openai/err429-retryafter200", 429, "provider_rate_limited", False),
        ("openai/html200", 502, "provider_protocol", False),
        ("openai/empty", 502, "provider_protocol", False),
        ("openai/doneonly", 502, "provider_protocol", False),
        ("nobody/x", 404, "model_not_found", True),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_early_failure_has_its_status(
    tmp_path: Path, model: str, status: int, code: str, permanent: bool, stream: bool
) -> None:
    """In OpenAI's shape, streamed or not, and permanent ones say so."""
    async with serve_v1(tmp_path, limits=Limits(hold_s=10.0)) as v1:
        reply = await v1.post(chat(model, stream=stream))
    error = reply.json()["error"]
    assert (reply.status, error["code"]) == (status, code)
    assert error.keys() == {"message", "type", "param", "code"}
    assert (reply.headers.get("x-should-retry") == "false") is permanent


@pytest.mark.parametrize("fault", ["cut3", "nofinish-nodone", "errinstream", "badjson"])
async def test_a_late_failure_is_told_inside_the_stream(v1: V1, fault: str) -> None:
    """What came before it, an error, and no `[DONE]`; whole answers get a status instead."""
    streamed = chunks_of(await v1.post(chat(f"openai/n5-{fault}", stream=True)))
    assert streamed[-1]["error"]["code"].startswith("provider_")
    assert "[DONE]" not in streamed
    assert (await v1.post(chat(f"openai/n5-{fault}"))).status == 502


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "param"),
    [
        ("POST", "/v1/chat/completions", b"{", {}, 400, None),
        ("POST", "/v1/chat/completions", b'{"model":"a","model":"b"}', {}, 400, None),
        ("POST", "/v1/chat/completions", b"[]", {}, 422, "body"),
        ("POST", "/v1/chat/completions", b'{"messages":[{}]}', {}, 422, "model"),
        ("POST", "/v1/chat/completions", b'{"model":"m","messages":[]}', {}, 422, "messages"),
        ("POST", "/v1/chat/completions", b'{"model":"m","messages":[{}],"stream":1}', {}, 422, "stream"),
        ("POST", "/v1/chat/completions", b"{}", {"content-type": "text/plain"}, 415, None),
        ("POST", "/v1/chat/completions", b"{}", {"content-encoding": "gzip"}, 415, None),
        ("POST", "/v1/chat/completions", b"x" * (1 << 21), {}, 413, None),
        ("GET", "/v1/chat/completions", None, {}, 405, None),
        ("POST", "/v1/models", b"{}", {}, 405, None),
        ("GET", "/v1/nothing", None, {}, 404, None),
        ("GET", "/v1/models/nobody/x", None, {}, 404, "model"),
        ("POST", "/v1/chat/completions/nobody/cancel", b"", {}, 404, None),
        ("GET", "/v1/chat/completions/nobody/stream", None, {}, 404, None),
    ],
)
async def test_every_refusal_has_openai_s_shape(
    v1: V1, method: str, path: str, body: bytes | None, headers: dict[str, str], status: int, param: str | None
) -> None:
    """With a code that is a string, and a request id."""
    fields = {"content-type": "application/json", **headers}
    reply = await v1.site.ask(method, path, body, fields.items())
    error = reply.json()["error"]
    assert reply.status == status
    assert isinstance(error["code"], str)
    assert error["param"] == param
    assert reply.headers["x-request-id"]
    assert reply.headers["x-should-retry"] == "false"


async def test_tenants_share_nothing(v1: V1) -> None:
    """Nor does one that is named share with the one for who names none."""
    asks = [v1.post(chat("openai/n2-lat200"), org) for org in ((), [("x-org-id", "a")], [("x-org-id", "b")])]
    replies = await asyncio.gather(*asks)
    assert v1.provider.count == 3
    call_id = replies[1].headers["x-call-id"]
    reply = await v1.post(b"", [("x-org-id", "b")], f"/v1/chat/completions/{call_id}/cancel")
    assert reply.status == 404


async def test_models_are_listed_and_found(v1: V1) -> None:
    """By the name that a request uses, slashes and all."""
    listed = (await v1.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["demo/demo-1", "openai/gpt-6-luna"]
    assert (await v1.get("/v1/models/openai/gpt-6-luna")).json()["id"] == "openai/gpt-6-luna"


async def test_explain_says_whether_and_why_and_calls_nobody(v1: V1) -> None:
    """Equal requests have equal keys, whatever their transport."""
    path = "/v1/coalesce/explain"
    one = (await v1.post(chat(user="u", stream=True), path=path)).json()
    two = (await v1.post(chat(), path=path)).json()
    assert (one["coalesces"], one["reason"], one["key"]) == (True, "temperature", two["key"])
    assert set(one["ignored_fields"]) == {"user", "stream"}
    other = (await v1.post(chat(temperature=1), path=path)).json()
    assert (other["coalesces"], other["reason"]) == (False, "sampling")
    assert v1.provider.count == 0


async def test_the_operator_says_what_shares_for_a_tenant_and_for_a_model(tmp_path: Path) -> None:
    """A model that always shares, by its alias too; a tenant that never does, whatever it asks for."""
    settings = {
        "aliases": {"short": "openai/n2-lat200"},
        "v1_coalesce_models": {"openai/n2-lat200": "always"},
        "v1_coalesce_tenants": {"secretive": "off"},
    }
    sampled = chat("openai/n2-lat200", temperature=1)
    async with serve_v1(tmp_path, **settings) as v1:
        by_name = [v1.post({**sampled, "model": model}) for model in ("short", "openai/n2-lat200")]
        other_model = [v1.post(chat("openai/n3-lat200", temperature=1)) for _ in range(2)]
        org = ("x-org-id", "secretive")
        own = [v1.post(chat("openai/n2-lat200"), [org, ("x-coalesce", "on")]) for _ in range(2)]
        replies = await asyncio.gather(*by_name, *other_model, *own)
        roles = [reply.headers["x-coalesce"] for reply in replies]
        assert sorted(roles[:2]) == ["follower", "leader"]
        assert roles[2:] == ["bypass"] * 4
        assert v1.provider.count == 5
        path = "/v1/coalesce/explain"
        told = [(await v1.post(body, headers, path)).json() for body, headers in ((sampled, []), (chat(), [org]))]
    assert [(one["coalesces"], one["policy"], one["reason"]) for one in told] == [
        (True, "always", "always"),
        (False, "off", "switched_off"),
    ]


async def test_a_stream_is_resumed_where_it_was_left(v1: V1) -> None:
    """While it runs and after it ended, with the ids that were asked for; for its own tenant."""
    first = await v1.post(chat("openai/n6-gap20", stream=True), [("x-stream-resume", "1")])
    ids = [line for line in first.body.decode().split("\n") if line.startswith("id: ")]
    assert ids == [f"id: 1-{number}" for number in range(1, len(ids) + 1)]
    path = f"/v1/chat/completions/{first.headers['x-call-id']}/stream"
    rest = await v1.get(f"{path}?starting_after=1-4")
    assert rest.body.decode().replace(":\n", "").startswith("id: 1-5\n")
    assert chunks_of(rest)[-1] == "[DONE]"
    assert (await v1.get(path, [("x-org-id", "other")])).status == 404
    plain = await v1.post(chat(stream=True))
    assert (await v1.get(f"/v1/chat/completions/{plain.headers['x-call-id']}/stream")).status == 404
    assert v1.provider.count == 2


async def test_a_cancelled_call_ends_for_everyone(v1: V1) -> None:
    """Its provider connection is closed; streams get an error, whole answers a status that asks for no retry."""
    whole = asyncio.create_task(v1.post(chat("openai/n500-gap20")))
    call = await v1.provider.call(1)
    (call_id,) = [call_id for _, call_id in v1.site.services.completions._runs]
    cancelled = await v1.post(b"", path=f"/v1/chat/completions/{call_id}/cancel")
    assert cancelled.json()["state"] == "cancelled"
    reply = await whole
    assert (reply.status, reply.headers["x-should-retry"]) == (409, "false")
    async with asyncio.timeout(1):
        await call.ended.wait()
    assert call.closed_by_client


async def test_waiting_is_told_by_comments_that_end_in_one_line_feed(tmp_path: Path) -> None:
    """Followed by a blank line they would be empty events to some clients."""
    async with serve_v1(tmp_path, limits=Limits(ping_s=0.05, hold_s=0.05)) as v1:
        reply = await v1.post(chat("openai/lat400-n2", stream=True))
    assert reply.body.count(b":\n") > 3
    assert b":\n\n" not in reply.body
    assert chunks_of(reply)[-1] == "[DONE]"


async def test_a_late_joiner_gets_the_beginning_at_once(v1: V1) -> None:
    """And the same bytes in the end."""
    body = chat("openai/n10-gap40", stream=True)
    early = asyncio.create_task(v1.post(body))
    await v1.provider.call(1)
    await asyncio.sleep(0.15)
    late = await v1.post(body)
    assert late.headers["x-coalesce"] == "follower"
    assert chunks_of(late) == chunks_of(await early)
    assert v1.provider.count == 1
