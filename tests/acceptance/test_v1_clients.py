"""The clients people have, unchanged but for their base URL.

openai-python 3, openai-node and the Vercel AI SDK (both as Node.js 20 gets them and the newest), LangChain, curl.

Keep-alives come every 50 ms here, so that whatever waits sees several of them.
"""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from oncewise.api.limits import Limits
from tests.support.v1 import V1, chat, serve_v1

NODE = Path(__file__).parents[1] / "node" / "node_modules"
LANGCHAIN = Path(__file__).parents[1] / "langchain" / ".venv" / "bin" / "python"
CLIENTS = Path(__file__).parent / "clients"

TOOL_CHUNKS = [
    {"role": "assistant", "content": None, "tool_calls": [
        {"index": 0, "id": "t1", "type": "function", "function": {"name": "weather", "arguments": ""}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '"Riga"}'}}]},
]  # fmt: skip


def tool_stream() -> list[bytes]:
    """A provider's stream that calls a tool."""
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "tools"}
    choices = [{"index": 0, "delta": delta, "finish_reason": None, "logprobs": None} for delta in TOOL_CHUNKS]
    choices.append({"index": 0, "delta": {}, "finish_reason": "tool_calls", "logprobs": None})
    chunks = [{**head, "choices": [choice]} for choice in choices]
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return [line.encode() for line in (*lines, "data: [DONE]\n\n")]


@pytest.fixture
async def v1(tmp_path: Path) -> AsyncIterator[V1]:
    async with serve_v1(tmp_path, limits=Limits(ping_s=0.05, hold_s=0.05)) as running:
        running.provider.raw["tools"] = tool_stream()
        yield running


@pytest.fixture
async def client(v1: V1) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=v1.base_url, api_key="sk-any", max_retries=0) as made:
        yield made


async def test_openai_python_gets_a_completion(client: openai.AsyncOpenAI) -> None:
    """With usage, finish reason and the request id of the answer."""
    completion = await client.chat.completions.create(**chat())
    assert completion.choices[0].message.content.count("@") == 6
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.total_tokens == 13
    assert completion._request_id


@pytest.mark.parametrize("resume", [{}, {"X-Stream-Resume": "1"}])
async def test_openai_python_reads_a_stream_through_keep_alives(
    v1: V1, client: openai.AsyncOpenAI, resume: dict[str, str]
) -> None:
    """Before the first chunk and between chunks, with ids and without."""
    body = chat("openai/lat300-n3-gap120", stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in await client.chat.completions.create(**body, extra_headers=resume)]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == 3
    assert len({chunk.id for chunk in chunks}) == 1
    assert v1.provider.count == 1


async def test_openai_python_without_async(v1: V1) -> None:
    """In a thread, as scripts have it."""

    def ask() -> tuple[str, int]:
        with openai.OpenAI(base_url=v1.base_url, api_key="sk-any") as client:
            whole = client.chat.completions.create(**chat())
            return whole.choices[0].finish_reason, len(list(client.chat.completions.create(**chat(stream=True))))

    assert await asyncio.to_thread(ask) == ("stop", 4)


@pytest.mark.parametrize("stream", [False, True])
async def test_openai_python_is_called_back_for_tools(client: openai.AsyncOpenAI, stream: bool) -> None:
    """Name and arguments, whole or put together by the client's own helper."""
    body = chat("openai/tools")
    if stream:
        async with client.chat.completions.stream(**body) as events:
            completion = await events.get_final_completion()
    else:
        completion = await client.chat.completions.create(**body)
    (called,) = completion.choices[0].message.tool_calls
    assert (called.id, called.function.name, called.function.arguments) == ("t1", "weather", '{"city":"Riga"}')
    assert completion.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("fields", "kind", "code"),
    [
        ({"model": "nobody/x"}, openai.NotFoundError, "model_not_found"),
        ({"model": "openai/n1", "n": 0}, openai.UnprocessableEntityError, "invalid_request"),
        ({"model": "openai/err400"}, openai.InternalServerError, "provider_error"),
        ({"model": "openai/err429-retryafter200"}, openai.RateLimitError, "provider_rate_limited"),
    ],
)
async def test_openai_python_raises_its_own_errors(
    client: openai.AsyncOpenAI, fields: dict[str, Any], kind: type[openai.APIStatusError], code: str
) -> None:
    """With the code, which programs look at."""
    with pytest.raises(kind) as caught:
        await client.chat.completions.create(**chat(**fields))
    assert caught.value.code == code


async def test_openai_python_sees_a_stream_break(client: openai.AsyncOpenAI) -> None:
    """Its decoder takes a bare end for a good one; an error it raises."""
    with pytest.raises(openai.APIError) as caught:
        async for _ in await client.chat.completions.create(**chat("openai/n5-cut3", stream=True)):
            pass
    assert caught.value.code == "provider_protocol"


async def test_a_permanent_error_is_asked_once(v1: V1) -> None:
    """The client retries every 5xx twice by default; it is told not to."""
    async with openai.AsyncOpenAI(base_url=v1.base_url, api_key="sk-any") as client:
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(**chat("openai/err400"))
    figures = (await v1.get("/api/metrics/performance")).json()
    assert (figures["total_requests"], v1.provider.count) == (1, 1)


async def test_the_client_s_own_retry_adopts_the_call_it_gave_up_on(v1: V1) -> None:
    """A timeout shorter than the answer: three attempts by the client, one call, one answer, sampled or not."""
    async with openai.AsyncOpenAI(base_url=v1.base_url, api_key="sk-any", timeout=1.0, max_retries=2) as client:
        completion = await client.chat.completions.create(**chat("openai/lat2200-n2", temperature=1.0))
    assert completion.choices[0].finish_reason == "stop"
    assert v1.provider.count == 1


async def test_leaving_a_stream_ends_only_its_own(v1: V1, client: openai.AsyncOpenAI) -> None:
    """Whoever stays gets all of it."""
    body = chat("openai/n8-gap40", stream=True)
    stays = asyncio.create_task(v1.post(body))
    stream = await client.chat.completions.create(**body)
    await anext(aiter(stream))
    await stream.close()
    assert (await stays).body.endswith(b"data: [DONE]\n\n")
    assert v1.provider.count == 1


async def test_leaving_is_seen_however_it_is_done(v1: V1, client: openai.AsyncOpenAI) -> None:
    """A stream that is closed, a stream whose task is cancelled, and a whole answer nobody waits for any longer."""
    body = chat("openai/n500-gap20-left")
    closed = await client.chat.completions.create(**body, stream=True)
    await anext(aiter(closed))
    reading = asyncio.create_task(_all_of(await client.chat.completions.create(**body, stream=True)))
    whole = asyncio.create_task(client.chat.completions.create(**body))
    await asyncio.sleep(0.2)
    assert v1.site.services.completions.flights.stats().waiters == 3
    await closed.close()
    for task in (reading, whole):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await check_left(v1)


async def _all_of(stream: openai.AsyncStream[Any]) -> list[Any]:
    return [chunk async for chunk in stream]


async def test_a_role_that_is_repeated_reaches_clients_once(v1: V1, client: openai.AsyncOpenAI) -> None:
    """Some providers send it with every delta; the client's own helper joins them to `assistantassistant`."""
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "roles"}
    deltas = [{"role": "assistant", "content": text} for text in ("", "A", "B")]
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {"role": "assistant"}, "finish_reason": "stop"})
    v1.provider.raw["roles"] = [f"data: {json.dumps({**head, 'choices': [choice]})}\n\n".encode() for choice in choices]
    async with client.chat.completions.stream(**chat("openai/roles")) as events:
        message = (await events.get_final_completion()).choices[0].message
    assert (message.role, message.content) == ("assistant", "AB")


async def test_models_by_the_client(client: openai.AsyncOpenAI) -> None:
    """Listed, and one by its name, which has a slash."""
    assert [model.id async for model in client.models.list()] == ["demo/demo-1", "openai/gpt-6-luna"]
    assert (await client.models.retrieve("openai/gpt-6-luna")).owned_by == "openai"


async def run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(100):
        out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


def commands(base_url: str) -> dict[str, tuple[str, ...]]:
    """How to run the clients that are programs of their own: as npm installs them on Node.js 20, and the newest."""
    node = ("node", str(CLIENTS / "openai_node.mjs"), base_url, str(NODE))
    vercel = ("node", str(CLIENTS / "ai_sdk.mjs"), base_url, str(NODE))
    return {
        "openai-node": (*node, "openai"),
        "openai-node-newest": (*node, "openai-newest"),
        "ai": (*vercel, "ai", "@ai-sdk/openai-compatible"),
        "ai-newest": (*vercel, "ai-newest", "ai-openai-compatible-newest"),
        "langchain": (str(LANGCHAIN), str(CLIENTS / "langchain_chat.py"), base_url),
    }


async def seen_by(v1: V1, client: str, *arguments: str) -> dict[str, Any]:
    """What a client's script saw; skipped where it is not installed."""
    if not (LANGCHAIN if client == "langchain" else NODE / "openai").exists():
        pytest.skip("run `make test`, or `make clients`")
    return json.loads(await run(*commands(v1.base_url)[client], *arguments))


def check_one_call(seen: dict[str, Any]) -> None:
    """Ten requests at once, whole and streamed, were one call: its texts have the call's number and time in them."""
    text = seen["whole"]["text"]
    assert text.count("@") == 6
    assert {text} == {seen["stream"]["text"], *seen["burst"]}
    assert len(seen["burst"]) == 8
    assert seen["whole"]["role"] in ("leader", "follower")
    assert seen["whole"]["call"]
    assert seen["whole"]["finish"] == seen["stream"]["finish"] == "stop"


async def check_left(v1: V1) -> None:
    """The server saw the client leave, streamed and whole: nobody waits for the call any more."""
    async with asyncio.timeout(2):
        while (stats := v1.site.services.completions.flights.stats()).waiters:
            await asyncio.sleep(0.02)
    assert stats.flights == 1
    assert sum(call.model.endswith("left") for call in v1.provider.calls) == 1


@pytest.mark.parametrize("client", ["openai-node", "openai-node-newest"])
async def test_openai_node(v1: V1, client: str) -> None:
    """Whole answers, streams, tools, usage, errors, models and leaving."""
    seen = await seen_by(v1, client)
    check_one_call(seen)
    assert seen["whole"]["usage"] == seen["stream"]["usage"]
    assert seen["whole"]["usage"]["total_tokens"] == 13
    assert seen["whole"]["extra"] == seen["stream"]["extra"] == ["https://example.org/1"]
    assert (seen["stream"]["chunks"], len(seen["stream"]["ids"])) == (5, 1)
    assert seen["whole"]["request"]
    assert seen["helper"] == "stop"
    assert seen["tools"] == seen["toolsStreamed"] == [["weather", '{"city":"Riga"}']]
    assert seen["errors"] == {
        "model": ["NotFoundError", 404, "model_not_found"],
        "invalid": ["UnprocessableEntityError", 422, "invalid_request"],
        "provider": ["InternalServerError", 502, "provider_error"],
        "limit": ["RateLimitError", 429, "provider_rate_limited"],
        "late": ["APIError", None, "provider_protocol"],
    }
    assert seen["models"] == ["demo/demo-1", "openai/gpt-6-luna"]
    assert seen["left"][1][0] == "APIUserAbortError"
    await check_left(v1)


@pytest.mark.parametrize("client", ["ai", "ai-newest"])
async def test_the_vercel_ai_sdk(v1: V1, client: str) -> None:
    """Whole answers, streams, tools, usage, errors and leaving."""
    seen = await seen_by(v1, client)
    check_one_call(seen)
    assert seen["whole"]["usage"] == seen["stream"]["usage"] == [10, 3, 13]
    assert seen["whole"]["request"]
    assert seen["tools"] == seen["toolsStreamed"] == [["weather", {"city": "Riga"}]]
    assert seen["errors"]["model"] == ["AI_APICallError", 404, False]
    # It retries every 5xx and never looks at `x-should-retry`.
    assert seen["errors"]["provider"][:2] == ["AI_APICallError", 502]
    assert seen["errors"]["limit"] == ["AI_APICallError", 429, True]
    assert seen["errors"]["late"] != "none"
    await check_left(v1)


async def test_langchain(v1: V1) -> None:
    """Whole answers, streams, async, batches, tools, usage, errors and leaving."""
    seen = await seen_by(v1, "langchain")
    check_one_call(seen)
    assert [seen[name]["usage"] for name in ("whole", "stream", "sync", "syncStream")] == [[10, 3, 13]] * 4
    assert seen["sync"]["finish"] == seen["syncStream"]["finish"] == "stop"
    assert seen["tools"] == seen["toolsStreamed"] == [["weather", {"city": "Riga"}]]
    assert seen["answered"] == "stop"
    (sent,) = [call.request["messages"] for call in v1.provider.calls if call.model.endswith("answered")]
    assert [message["role"] for message in sent] == ["user", "assistant", "tool"]
    assert (sent[1]["tool_calls"][0]["id"], sent[2]["tool_call_id"]) == ("t1", "t1")
    assert seen["errors"] == {
        "model": [404, "model_not_found"],
        "invalid": [422, "invalid_request"],
        "provider": [502, "provider_error"],
        "late": [None, "provider_protocol"],
    }
    assert seen["left"] == "cancelled"
    assert seen["limit"] == [429, "provider_rate_limited"]
    await check_left(v1)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing")
async def test_curl(v1: V1) -> None:
    """As the README has it: whole, streamed, refused, and left by a time limit of its own."""
    url = f"{v1.base_url}/chat/completions"
    command = ("curl", "-sS", "--max-time", "20", url, "-H", "content-type: application/json", "-d")
    assert json.loads(await run(*command, json.dumps(chat())))["object"] == "chat.completion"
    assert (await run(*command, json.dumps(chat(stream=True)))).endswith("data: [DONE]\n\n")
    status = await run(*command, json.dumps(chat("nobody/x")), "-o", "/dev/null", "-w", "%{http_code}")
    assert status == "404"
    left = await asyncio.create_subprocess_exec(*command, json.dumps(chat("openai/n500-gap20-left")), "--max-time", "1")
    assert await left.wait() == 28
    await check_left(v1)


# -- patience ------------------------------------------------------------------------------------------------------


def seeded(model: str, **fields: Any) -> dict[str, Any]:
    """What the scripts ask. Not `temperature: 0`: LangChain makes 0.0 of it, which is another request."""
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], "seed": 7, **fields}


async def openai_python_waits(v1: V1, model: str, read_s: float) -> dict[str, Any]:
    """Both of openai-python's clients: the whole answer without a limit, the stream with a read timeout."""
    body = seeded(model, stream=True)

    def read() -> str:
        timeout = httpx2.Timeout(120.0, read=read_s)
        with openai.OpenAI(base_url=v1.base_url, api_key="sk-any", max_retries=0, timeout=timeout) as client:
            chunks = list(client.chat.completions.create(**body))
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    async with openai.AsyncOpenAI(base_url=v1.base_url, api_key="sk-any", max_retries=0, timeout=120) as client:
        whole, streamed = await asyncio.gather(client.chat.completions.create(**seeded(model)), asyncio.to_thread(read))
    return {"whole": whole.choices[0].message.content, "stream": streamed}


async def curl_waits(v1: V1, model: str, idle_s: int) -> dict[str, Any]:
    """Curl has no patience of its own; told to, it gives up what is slower than so many bytes a second."""
    url = f"{v1.base_url}/chat/completions"
    command = ("curl", "-sS", url, "-H", "content-type: application/json", "-d")
    patience = ("--speed-limit", "1", "--speed-time", str(idle_s)) if idle_s < 10 else ()
    whole, streamed = await asyncio.gather(
        run(*command, json.dumps(seeded(model))),
        run(*command, json.dumps(seeded(model, stream=True)), "-N", *patience),
    )
    lines = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return {"whole": json.loads(whole)["choices"][0]["message"]["content"], "stream": text}


def all_that_wait(v1: V1, model: str, idle_s: int) -> list[Any]:
    """Every client, asking for `model` both ways, its stream with a patience of `idle_s` seconds between two reads."""
    installed = {"langchain": LANGCHAIN.exists()}
    waits = [openai_python_waits(v1, model, idle_s)]
    waits += [curl_waits(v1, model, idle_s)] if shutil.which("curl") else []
    for client in commands(v1.base_url):
        if installed.get(client, (NODE / "openai").exists()):
            limit = str(idle_s) if client == "langchain" else str(idle_s * 1000)
            waits.append(seen_by(v1, client, model, limit))
    return waits


async def test_keep_alives_outlast_a_clients_patience(tmp_path: Path) -> None:
    """Five seconds of silence from the provider, and clients that hang up after two without a byte."""
    async with serve_v1(tmp_path, limits=Limits(ping_s=0.2, hold_s=0.2)) as v1:
        seen = await asyncio.gather(*all_that_wait(v1, "openai/lat5000-n3", 2))
    texts = [text for answer in seen for text in answer.values()]
    assert len(texts) >= 4
    assert {text.count("@") for text in texts} == {6}


async def test_without_keep_alives_patience_ends(tmp_path: Path) -> None:
    """What the test above shows is the keep-alives' doing."""
    async with serve_v1(tmp_path, limits=Limits(ping_s=60.0, hold_s=0.2)) as v1:
        with pytest.raises(openai.APITimeoutError):
            await openai_python_waits(v1, "openai/lat3000-n3", 1.0)


@pytest.mark.slow
async def test_a_minute_in_the_queue_breaks_no_client(tmp_path: Path) -> None:
    """A provider of one call in 56 s and an answer that takes 4 s: every client waits a minute, for one call.

    With the keep-alives that a server has, one in 15 s.
    """
    async with serve_v1(tmp_path, rps=1 / 56) as v1:
        first = await v1.post(chat("openai/n1", content="first"))
        assert first.status == 200
        seen = await asyncio.gather(*all_that_wait(v1, "openai/lat4000-n3", 20))
        (_, second) = v1.provider.calls
        texts = {text for answer in seen for text in answer.values()}
        assert len(texts) == 1
        figures = (await v1.get("/api/metrics/performance")).json()
    assert second.started_s - v1.provider.calls[0].started_s > 55
    assert figures["errors"]["total"] == 0
    assert figures["upstream"]["calls"] == 2
    assert figures["latency"]["p50"] > 50
