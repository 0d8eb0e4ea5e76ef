"""What passes through `/v1`: everything, in both directions, whole and streamed; and what is said beside it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.http import JSON, ORG
from tests.support.v1 import PATH, V1, chat, chunks_of, serve_v1


@pytest.fixture
async def v1(tmp_path: Path) -> AsyncIterator[V1]:
    async with serve_v1(tmp_path) as running:
        yield running


REQUEST = {
    "model": "openai/rich",
    "messages": [
        {"role": "system", "content": "Be brief.", "name": "house"},
        {"role": "user", "content": [
            {"type": "text", "text": "What is this? é e\u0301 \u2028 🙂"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
            {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        ]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "t0", "type": "function", "function": {"name": "look", "arguments": '{"at":"it"}'}}]},
        {"role": "tool", "tool_call_id": "t0", "content": "a cat", "cache_control": {"type": "ephemeral"}},
    ],
    "n": 2,
    "seed": 7,
    "temperature": 0.0,
    "logprobs": True,
    "top_logprobs": 1,
    "logit_bias": {"50256": -100},
    "stop": ["\n\n", "END "],
    "tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}, "strict": True}}],
    "tool_choice": {"type": "function", "function": {"name": "look"}},
    "parallel_tool_calls": False,
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, 1.0, None]}}},
    "metadata": {"run": "1"},
    "user": "somebody",
    "service_tier": "flex",
    "web_search_options": {},
    "provider": {"order": ["a", "b"], "allow_fallbacks": False},
    "nobody_knows": [1, 1.0, 1e30, True, None, {"": []}],
}  # fmt: skip


def logprob(token: str) -> dict[str, Any]:
    top = [{"token": token, "logprob": -0.5, "bytes": None}]
    return {"content": [{"token": token, "logprob": -0.5, "bytes": None, "top_logprobs": top}], "refusal": None}


HEAD = {"id": "c9", "object": "chat.completion.chunk", "created": 7, "model": "rich-2026", "system_fingerprint": "fp"}
USAGE = {
    "prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13, "cost": 0.25, "cost_details": {"upstream": None},
    "prompt_tokens_details": {"cached_tokens": 3}, "num_search_queries": 1,
}  # fmt: skip
CHUNKS = [
    {"citations": ["https://example.org/1"], "choices": [
        {"index": 0, "delta": {"role": "assistant", "content": "", "refusal": None}, "logprobs": None}]},
    {"choices": [{"index": 1, "delta": {"role": "assistant", "content": "B", "reasoning_content": "hm"},
                  "logprobs": logprob("B")}]},
    {"choices": [{"index": 0, "delta": {"content": "A"}, "logprobs": logprob("A")}]},
    {"choices": [{"index": 0, "delta": {"tool_calls": [
        {"index": 0, "id": "t1", "type": "function", "function": {"name": "look", "arguments": ""}},
        {"index": 1, "id": "t2", "type": "function", "function": {"name": "look", "arguments": "{"}}]}}]},
    {"choices": [{"index": 0, "delta": {"tool_calls": [
        {"index": 1, "function": {"arguments": "}"}},
        {"index": 0, "function": {"arguments": '{"n":1}'}, "extra_content": {"google": {"thought_signature": "s"}}},
    ]}}]},
    {"choices": [{"index": 1, "delta": {"content": "b", "annotations": [{"type": "url_citation"}]},
                  "logprobs": logprob("b")}]},
    {"choices": [{"index": 1, "delta": {}, "finish_reason": "stop", "native_finish_reason": "END"}]},
    {"search_results": [{"title": "A", "url": "https://example.org/1"}], "service_tier": "flex", "choices": [
        {"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
    {"choices": [], "usage": USAGE},
]  # fmt: skip


def recorded() -> list[bytes]:
    """The same as an upstream sends it, with its habits: comments, CR LF, spaces that need not be there."""
    lines = [f": keep alive\r\n\r\ndata: {json.dumps(HEAD | chunk)}\r\n\r\n" for chunk in CHUNKS]
    return [line.encode() for line in (*lines, "data: [DONE]\r\n\r\n")]


async def test_a_request_reaches_the_provider_as_it_was_sent(v1: V1) -> None:
    """But for its model, and for being streamed."""
    v1.provider.raw["rich"] = recorded()
    await v1.post({**REQUEST, "stream": False, "stream_options": None})
    ours = {"model": "rich", "stream": True, "stream_options": {"include_usage": True}}
    sent = (await v1.provider.call(1)).body
    assert json.dumps(json.loads(sent), sort_keys=True) == json.dumps({**REQUEST, **ours}, sort_keys=True)
    assert "e\u0301".encode() in sent or b"e\\u0301" in sent


async def test_a_stream_reaches_the_client_as_it_came(v1: V1) -> None:
    """Chunk by chunk, with one head, every choice's role, and the figures at the end for who asked."""
    v1.provider.raw["rich"] = recorded()
    chunks = chunks_of(await v1.post({**REQUEST, "stream": True, "stream_options": {"include_usage": True}}))
    *contents, figures, done = chunks
    assert done == "[DONE]"
    assert figures["usage"] == USAGE
    assert figures["choices"] == []
    for seen, sent in zip(contents, CHUNKS, strict=False):
        expected = [{"finish_reason": None, **choice} for choice in sent["choices"]]
        assert seen == {**HEAD, **sent, "choices": expected}
    assert len(contents) == len(CHUNKS) - 1
    assert {chunk["id"] for chunk in chunks[:-1]} == {"c9"}


async def test_a_whole_answer_has_all_that_the_stream_had(v1: V1) -> None:
    """Put together as OpenAI would have answered."""
    v1.provider.raw["rich"] = recorded()
    reply = await v1.post(REQUEST)
    calls = [
        {"id": "t1", "type": "function", "function": {"name": "look", "arguments": '{"n":1}'},
         "extra_content": {"google": {"thought_signature": "s"}}},
        {"id": "t2", "type": "function", "function": {"name": "look", "arguments": "{}"}},
    ]  # fmt: skip
    both = {"content": [*logprob("B")["content"], *logprob("b")["content"]], "refusal": None}
    assert reply.json() == {
        **HEAD,
        "object": "chat.completion",
        "service_tier": "flex",
        "citations": ["https://example.org/1"],
        "search_results": [{"title": "A", "url": "https://example.org/1"}],
        "usage": USAGE,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "A", "refusal": None, "tool_calls": calls},
                "logprobs": logprob("A"),
                "finish_reason": "tool_calls",
            },
            {
                "index": 1,
                "message": {
                    "role": "assistant",
                    "content": "Bb",
                    "reasoning_content": "hm",
                    "annotations": [{"type": "url_citation"}],
                },
                "logprobs": both,
                "finish_reason": "stop",
                "native_finish_reason": "END",
            },
        ],
    }


async def test_every_answer_says_what_it_was(v1: V1) -> None:
    """Role, call, `Cache-Status` of RFC 9211, the client's request id, and times; on failures too."""
    body, asked = chat("openai/n3-lat300"), [("x-request-id", "mine.1")]
    replies = await asyncio.gather(v1.post(body, asked), v1.post({**body, "stream": True}), v1.post(body))
    leader = next(reply for reply in replies if reply.headers["x-coalesce"] == "leader")
    assert leader.headers["cache-status"] == "oncewise; fwd=miss"
    for reply in replies:
        if reply is not leader:
            assert reply.headers["x-coalesce"] == "follower"
            assert reply.headers["cache-status"] == "oncewise; hit; detail=follower; collapsed"
    assert replies[0].headers["x-request-id"] == "mine.1"
    assert len({reply.headers["x-request-id"] for reply in replies}) == 3
    assert 250 < int(replies[0].headers["x-ttft-ms"]) < 5_000
    assert int(replies[0].headers["x-queue-wait-ms"]) >= 0
    assert replies[1].headers["content-type"] == "text/event-stream"
    assert (replies[1].headers["cache-control"], replies[1].headers["x-accel-buffering"]) == (
        "no-store, no-transform",
        "no",
    )

    own = await v1.post(chat("openai/n3"), [("x-coalesce", "off")])
    assert (own.headers["x-coalesce"], own.headers["cache-status"]) == ("bypass", "oncewise; fwd=bypass")
    failed, again = [await v1.post(chat("openai/err400")) for _ in range(2)]
    assert [reply.headers["x-coalesce"] for reply in (failed, again)] == ["leader", "replayed"]
    assert again.headers["cache-status"] == "oncewise; hit; detail=failure"
    assert failed.headers["x-call-id"] == again.headers["x-call-id"]
    assert v1.provider.count == 3


class Reading:
    """A stream that is read piece by piece."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self.text = reader, writer, ""

    async def until(self, chunks: int, timeout_s: float = 5.0) -> float:
        """Read on until there are so many chunks; the seconds that took."""
        began_s = time.monotonic()
        async with asyncio.timeout(timeout_s):
            while self.text.count("data: ") < chunks:
                piece = await self.reader.read(65_536)
                assert piece, self.text
                self.text += piece.decode()
        return time.monotonic() - began_s

    async def leave(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


async def opened(v1: V1, method: str, path: str, body: Any = None, headers: Any = ()) -> Reading:
    """Send a request on a connection of its own, and read nothing yet."""
    reader, writer = await v1.site.connect()
    sent = b"" if body is None else json.dumps(body).encode()
    fields = [v1.site.host, JSON, ("content-length", str(len(sent))), *headers]
    writer.write(v1.site.head(method, path, fields) + sent)
    return Reading(reader, writer)


async def test_a_late_joiner_has_what_there_is_before_there_is_more(v1: V1) -> None:
    """Three chunks in, with the next half a second away."""
    body = chat("openai/n4-gap500", stream=True)
    early = await opened(v1, "POST", PATH, body)
    await early.until(3)
    late = await opened(v1, "POST", PATH, body)
    assert await late.until(3) < 0.3
    await early.until(6)
    await late.until(6)
    texts = [reading.text[reading.text.index("data: ") :].replace(":\n", "") for reading in (early, late)]
    assert "".join(_data(texts[0])) == "".join(_data(texts[1]))
    assert v1.provider.count == 1
    await early.leave()
    await late.leave()


def _data(text: str) -> list[str]:
    return [line for line in text.replace("\r", "").split("\n") if line.startswith("data: ")]


async def test_a_stream_is_resumed_by_any_name_of_its_place(v1: V1) -> None:
    """By query, by header, as our id and as OpenAI's number; while it runs and afterwards; nobody is called again."""
    first = await opened(v1, "POST", PATH, chat("openai/n6-gap60", stream=True), [("x-stream-resume", "1")])
    await first.until(3)
    (call_id,) = [call_id for _, call_id in v1.site.services.completions._runs]
    await first.leave()
    path = f"{PATH}/{call_id}/stream"
    rest = await v1.get(f"{path}?starting_after=1-2")
    ways = [
        await v1.get(f"{path}?starting_after=2"),
        await v1.get(path, [("last-event-id", "1-2")]),
        await v1.get(f"{path}?starting_after=1-2", [("last-event-id", "1-5")]),
    ]
    assert rest.body.decode().replace(":\n", "").startswith("id: 1-3\ndata: ")
    assert {way.body.replace(b":\n", b"") for way in ways} == {rest.body.replace(b":\n", b"")}
    everything = [await v1.get(f"{path}?starting_after={place}") for place in ("1-99", "x", "-", "9-1", "")]
    assert {chunks_of(reply)[0]["choices"][0]["delta"].get("role") for reply in everything} == {"assistant"}
    assert {len(chunks_of(reply)) for reply in everything} == {9}
    assert v1.provider.count == 1


async def test_a_cancelled_stream_ends_with_an_error_and_a_call_that_is_over_stays_as_it_was(v1: V1) -> None:
    """Cancelling again changes nothing; nor does cancelling what is complete."""
    stream = asyncio.create_task(v1.post(chat("openai/n500-gap20", stream=True)))
    await v1.provider.call(1)
    await asyncio.sleep(0.1)
    (call_id,) = [call_id for _, call_id in v1.site.services.completions._runs]
    cancel = f"{PATH}/{call_id}/cancel"
    states = [(await v1.post(b"", path=cancel)).json()["state"] for _ in range(2)]
    chunks = chunks_of(await stream)
    assert states == ["cancelled", "cancelled"]
    assert chunks[-1]["error"]["code"] == "turn_cancelled"
    assert "[DONE]" not in chunks

    whole = await v1.post(chat("openai/n2"), [("x-stream-resume", "1")])
    ended = await v1.post(b"", path=f"{PATH}/{whole.headers['x-call-id']}/cancel")
    assert ended.json() == {"id": whole.headers["x-call-id"], "object": "chat.completion.call", "state": "completed"}


@pytest.mark.slow
async def test_a_call_nobody_waits_for_ends_after_five_seconds_unless_somebody_comes_back(v1: V1) -> None:
    """One is left for good; one is asked again after 3 s, one is picked up by its name. At the same time."""
    models = ("openai/n400-gap20-gone", "openai/n400-gap20-again", "openai/n400-gap20-named")
    readings = [await opened(v1, "POST", PATH, chat(model, stream=True), [ORG]) for model in models]
    for reading in readings:
        await reading.until(2)
    runs = {run.plan.request.model: run.call_id for run in v1.site.services.completions._runs.values()}
    left_s = time.monotonic()
    for reading in readings:
        await reading.leave()
    await asyncio.sleep(3)
    again = asyncio.create_task(v1.post(chat("openai/n400-gap20-again", stream=True), [ORG]))
    named = asyncio.create_task(v1.get(f"{PATH}/{runs['n400-gap20-named']}/stream", [ORG]))
    calls = {call.model: call for call in v1.provider.calls}
    async with asyncio.timeout(5):
        await calls["n400-gap20-gone"].ended.wait()
    assert 4.5 < time.monotonic() - left_s < 6.5
    assert calls["n400-gap20-gone"].closed_by_client
    for reply in await asyncio.gather(again, named):
        assert chunks_of(reply)[-1] == "[DONE]"
        assert len(chunks_of(reply)) > 400
    assert v1.provider.count == 3
