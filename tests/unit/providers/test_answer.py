"""What counts as a whole completion, and what passes through untouched."""

import json
from typing import Any

import pytest

from oncewise.errors import ProviderError, ProviderProtocolError
from oncewise.model import CompletionRequest
from oncewise.providers.catalogue import Quirks
from oncewise.providers.openai_compatible import OpenAICompatibleProvider
from tests.support.scripted_transport import ScriptedTransport

DONE = b"data: [DONE]\n\n"


def piece(delta: dict[str, Any], finish: str | None = None, index: int = 0, **fields: Any) -> dict[str, Any]:
    return {"id": "c1", "choices": [{"index": index, "delta": delta, "finish_reason": finish}], **fields}


async def answer(*chunks: dict[str, Any], done_ends: bool = False, n: int = 1) -> list[dict[str, Any]]:
    """What comes out where these chunks go in."""
    body = b"".join(b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in chunks) + DONE
    provider = OpenAICompatibleProvider("acme", ScriptedTransport([body]), quirks=Quirks(done_ends=done_ends))
    return [chunk async for chunk in provider.chunks(CompletionRequest("acme", "m", {"messages": [], "n": n}))]


async def test_chunks_pass_as_they_are() -> None:
    """Tool calls, logprobs, citations, usage with cost, and fields nobody knows."""
    chunks = [
        piece({"role": "assistant", "tool_calls": [{"index": 0, "id": "t", "function": {"arguments": "{"}}]}),
        piece({}, "tool_calls", citations=["https://example.org"], surprise={"a": 1.0}),
        {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "cost": 0.1}},
    ]
    assert await answer(*chunks) == chunks


async def test_a_request_keeps_the_fields_nobody_knows() -> None:
    """What is ours to say is said by us."""
    transport = ScriptedTransport(
        [b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"stop"}]}\n\n']
    )
    body = {"messages": [], "tools": [{"x": 1}], "surprise": [1.0]}
    _ = [chunk async for chunk in OpenAICompatibleProvider("a", transport).chunks(CompletionRequest("a", "m", body))]
    sent = json.loads(transport.posted[0][1])
    assert sent == {**body, "model": "m", "stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    "chunks",
    [
        [piece({"content": "a"}, "stop"), piece({"content": "b"}, index=1)],
        [piece({"content": ""}, "stop")],
        [piece({"content": "a"})],
        [piece({"tool_calls": [{"index": 0}]})],
        [{"choices": [{"index": "0", "delta": {}}]}],
    ],
)
async def test_what_is_not_whole_is_an_error(chunks: list[dict[str, Any]]) -> None:
    """Every choice that began needs its own end."""
    with pytest.raises(ProviderProtocolError):
        await answer(*chunks, n=2)


@pytest.mark.parametrize("finish", [[], {}, 7, True])
async def test_a_finish_reason_that_is_no_name_is_none(finish: Any) -> None:
    """Whatever it is, it neither ends the answer nor the program."""
    with pytest.raises(ProviderProtocolError):
        await answer(piece({"content": "a"}, finish))
    assert len(await answer(piece({"content": "a"}, finish), piece({}, "stop"))) == 2
    assert len(await answer(piece({"content": "a"}, "stop"), piece({}, finish))) == 2


@pytest.mark.parametrize("finish", ["length", "content_filter", "tool_calls"])
async def test_an_answer_may_say_why_it_has_no_text(finish: str) -> None:
    """Here it is for the caller to judge."""
    assert len(await answer(piece({}, finish))) == 1


async def test_a_provider_that_gave_up_has_not_answered() -> None:
    """Its finish reason is never passed on."""
    with pytest.raises(ProviderError):
        await answer(piece({"content": "a"}), piece({}, "error"))


async def test_a_finish_reason_left_out_by_custom_is_put_in() -> None:
    """A client that gets none takes the answer for broken."""
    *_, last = await answer(piece({"content": "a"}), done_ends=True)
    assert last == {"id": "c1", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
