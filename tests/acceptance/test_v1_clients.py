"""The clients people have, unchanged but for their base URL: openai-python, openai-node, the Vercel AI SDK, curl.

Keep-alives come every 50 ms here, so that whatever waits sees several of them.
"""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from oncewise.api.limits import Limits
from tests.support.v1 import V1, chat, serve_v1

NODE = Path(__file__).parents[1] / "node" / "node_modules"
SCRIPT = Path(__file__).parent / "clients" / "openai_node.mjs"

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


async def test_models_by_the_client(client: openai.AsyncOpenAI) -> None:
    """Listed, and one by its name, which has a slash."""
    assert [model.id async for model in client.models.list()] == ["demo/demo-1", "openai/gpt-6-luna"]
    assert (await client.models.retrieve("openai/gpt-6-luna")).owned_by == "openai"


async def run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(60):
        out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


@pytest.mark.skipif(not (NODE / "openai").exists(), reason="npm is missing")
async def test_openai_node_and_the_ai_sdk(v1: V1) -> None:
    """Whole answers, streams, tools, usage, errors and leaving."""
    seen = json.loads(await run("node", str(SCRIPT), v1.base_url, str(NODE)))
    assert seen["whole"]["finish"] == "stop"
    assert seen["whole"]["usage"]["total_tokens"] == 13
    assert seen["stream"]["chunks"] == 5
    assert seen["stream"]["usage"]["completion_tokens"] == 3
    assert seen["helper"] == "stop"
    assert seen["tools"] == [["weather", '{"city":"Riga"}']]
    assert seen["badModel"] == ["NotFoundError", 404, "model_not_found"]
    assert seen["invalid"] == ["UnprocessableEntityError", 422, "invalid_request"]
    assert seen["provider"] == ["InternalServerError", 502, "provider_error"]
    assert seen["late"] == ["APIError", None, "provider_protocol"]
    assert seen["models"] == 2
    assert seen["ai"]["finish"] == seen["aiStream"]["finish"] == "stop"
    assert (seen["ai"]["tokens"], seen["aiStream"]["tokens"]) == (5, 6)
    assert seen["aiStream"]["length"] > seen["ai"]["length"] > 0


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing")
async def test_curl(v1: V1) -> None:
    """As the README has it."""
    url = f"{v1.base_url}/chat/completions"
    command = ("curl", "-sS", "--max-time", "20", url, "-H", "content-type: application/json", "-d")
    assert json.loads(await run(*command, json.dumps(chat())))["object"] == "chat.completion"
    assert (await run(*command, json.dumps(chat(stream=True)))).endswith("data: [DONE]\n\n")
