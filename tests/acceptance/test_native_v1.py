"""An OpenAI client's conversation with tools, answered by Anthropic and Gemini on their own wires."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from oncewise.settings import ProviderSettings
from tests.support.fake_provider import FakeProvider
from tests.support.http import serve
from tests.support.recorded_streams import ANTHROPIC_RECORDED, GEMINI_RECORDED, Native

RECORDED = {"anthropic": ANTHROPIC_RECORDED, "gemini": GEMINI_RECORDED}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture
async def fake() -> AsyncIterator[FakeProvider]:
    async with FakeProvider() as server:
        for kind, recorded in RECORDED.items():
            server.raw |= {f"{kind}-{each.name}": [each.body] for each in recorded}
        yield server


@pytest.fixture
async def client(fake: FakeProvider, tmp_path: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    providers = {
        kind: ProviderSettings(name=kind, base_url=fake.base_url, default_model="m", rps=1000, burst=100)
        for kind in RECORDED
    }
    aliases = {"clever": "anthropic/anthropic-text"}
    async with serve(tmp_path, providers=providers, aliases=aliases) as site:
        url = f"http://127.0.0.1:{site.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as made:
            yield made


def asked(kind: str, recorded: Native, *said: Any) -> dict[str, Any]:
    question = {"role": "user", "content": "How is the weather?"}
    return {"model": f"{kind}/{kind}-{recorded.name}", "messages": [question, *said], "tools": [WEATHER]}


def each() -> list[Any]:
    return [pytest.param(kind, one, id=f"{kind}-{one.name}") for kind, some in RECORDED.items() for one in some]


@pytest.mark.parametrize(("kind", "recorded"), each())
async def test_a_completion_has_all_that_was_said(client: openai.AsyncOpenAI, kind: str, recorded: Native) -> None:
    """Text, tool calls, figures and the reason it ended, in JSON."""
    completion = await client.chat.completions.create(**asked(kind, recorded))
    (choice,) = completion.choices
    calls = [(call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
    assert (choice.message.content or "", calls) == (recorded.text, list(recorded.calls))
    assert choice.finish_reason == recorded.finish
    assert completion.model == recorded.completion.model
    if recorded.completion.usage is not None:
        assert completion.usage is not None
        assert completion.usage.prompt_tokens == recorded.completion.usage.prompt_tokens
        assert completion.usage.completion_tokens == recorded.completion.usage.completion_tokens


@pytest.mark.parametrize(("kind", "recorded"), each())
async def test_a_stream_says_the_same(client: openai.AsyncOpenAI, kind: str, recorded: Native) -> None:
    """Piece by piece, with the figures when asked."""
    text, finishes, usages = "", [], []
    stream = await client.chat.completions.create(
        **asked(kind, recorded), stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finishes += [choice.finish_reason] if choice.finish_reason else []
        usages += [chunk.usage] if chunk.usage else []
    assert (text, finishes) == (recorded.text, [recorded.finish])
    assert len(usages) == 1


async def test_a_message_goes_back_as_it_came_from_anthropic(client: openai.AsyncOpenAI, fake: FakeProvider) -> None:
    """Thinking with its signature, text, calls and then the results: what the wire wants."""
    (tools,) = (one for one in ANTHROPIC_RECORDED if one.name == "tools")
    message = (await client.chat.completions.create(**asked("anthropic", tools))).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "fine"} for call in message.tool_calls or ()]
    await client.chat.completions.create(**asked("anthropic", tools, message.model_dump(), *results))
    assert fake.calls[-1].request["messages"][1:] == [
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Two cities.", "signature": "EqQBCg=="},
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "toolu_A", "name": "weather", "input": {"city": "Köln"}},
                {"type": "tool_use", "id": "toolu_B", "name": "now", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": call_id, "content": [{"type": "text", "text": "fine"}]}
                for call_id in ("toolu_A", "toolu_B")
            ],
        },
    ]


async def test_a_message_goes_back_as_it_came_from_gemini(client: openai.AsyncOpenAI, fake: FakeProvider) -> None:
    """Each call with its id and, where it had one, its thought signature."""
    (tools,) = (one for one in GEMINI_RECORDED if one.name == "tools")
    message = (await client.chat.completions.create(**asked("gemini", tools))).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "fine"} for call in message.tool_calls or ()]
    await client.chat.completions.create(**asked("gemini", tools, message.model_dump(), *results))
    (model, user) = fake.calls[-1].request["contents"][1:]
    assert model == {
        "role": "model",
        "parts": [
            {"functionCall": {"id": "fc1", "name": "weather", "args": {"city": "Köln"}}, "thoughtSignature": "Sig=="},
            {"functionCall": {"id": "call_r2_1", "name": "now", "args": {}}},
        ],
    }
    assert [part["functionResponse"]["name"] for part in user["parts"]] == ["weather", "now"]


async def test_names_reach_whom_they_mean(client: openai.AsyncOpenAI, fake: FakeProvider) -> None:
    """An alias its model; a provider nobody configured, 404."""
    question = [{"role": "user", "content": "hi"}]
    completion = await client.chat.completions.create(model="clever", messages=question)
    assert completion.choices[0].message.content == "Grüß dich 🙂"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="nobody/gpt", messages=question)
    assert caught.value.code == "model_not_found"
    assert "clever" in [model.id async for model in client.models.list()]
    assert fake.count == 1


async def test_what_cannot_be_said_is_the_callers_error(client: openai.AsyncOpenAI, fake: FakeProvider) -> None:
    """Named by its place, before the provider is asked, and not worth a retry."""
    image = {"type": "image_url", "image_url": {"url": "ftp://example.org/a.png"}}
    with pytest.raises(openai.APIStatusError) as caught:
        await client.chat.completions.create(model="clever", messages=[{"role": "user", "content": [image]}])
    assert (caught.value.status_code, caught.value.code) == (422, "invalid_request")
    assert "messages.0.content.0.image_url.url" in caught.value.message
    assert "ftp" not in caught.value.message
    assert fake.count == 0
