"""The wires of Anthropic and Gemini, byte by byte: what is a good answer, and what each kind of broken one becomes."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncewise.errors import OncewiseError, ProviderError, ProviderProtocolError, ProviderRateLimited
from oncewise.model import ChatMessage, ChatRequest, CompletionRequest, FinishReason, Params
from oncewise.ports import Completion, TextDelta
from oncewise.providers.anthropic import AnthropicProvider
from oncewise.providers.gemini import GeminiProvider
from oncewise.providers.native import NativeProvider
from tests.support.recorded_streams import ANTHROPIC_RECORDED, GEMINI_RECORDED, Native
from tests.support.scripted_transport import ScriptedTransport, split

REQUEST = ChatRequest("acme", "m1", (ChatMessage("system", "be brief"), ChatMessage("user", "hi")))
RECORDED = [(AnthropicProvider, each) for each in ANTHROPIC_RECORDED]
RECORDED += [(GeminiProvider, each) for each in GEMINI_RECORDED]


def event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def chunks(
    kind: type[NativeProvider], pieces: list[bytes], into: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """All chunks of an answer with this body; those before an error are in `into`."""
    provider = kind("acme", ScriptedTransport(pieces), now_s=lambda: 1700000000.9)
    asked = CompletionRequest("acme", "m1", {"messages": [{"role": "user", "content": "hi"}]})
    found = [] if into is None else into
    async for chunk in provider.chunks(asked):
        found.append(chunk)
    return found


async def answer(kind: type[NativeProvider], body: str | bytes, **head: Any) -> tuple[str, Completion]:
    """Text and completion of an answer with this body, as a thread gets them."""
    provider = kind("acme", ScriptedTransport([body.encode() if isinstance(body, str) else body], **head))
    events = [event async for event in provider.stream(REQUEST)]
    assert all(isinstance(event, TextDelta) and event.text for event in events[:-1])
    assert isinstance(events[-1], Completion)
    return "".join(event.text for event in events[:-1]), events[-1]


async def failure(kind: type[NativeProvider], body: str | bytes, **head: Any) -> OncewiseError:
    with pytest.raises(OncewiseError) as caught:
        await answer(kind, body, **head)
    return caught.value


def deltas(found: list[dict[str, Any]], name: str) -> list[Any]:
    return [choice["delta"][name] for chunk in found for choice in chunk["choices"] if name in choice["delta"]]


def tool_calls(found: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Put together as every OpenAI client does: by index, arguments joined."""
    calls: dict[int, dict[str, str]] = {}
    for piece in (call for some in deltas(found, "tool_calls") for call in some):
        call = calls.setdefault(piece["index"], {"id": piece.get("id"), "name": "", "arguments": ""})
        call["name"] += piece["function"].get("name", "")
        call["arguments"] += piece["function"]["arguments"]
    return [(call["id"], call["name"], call["arguments"]) for call in calls.values()]


# -- recorded ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "recorded"), RECORDED, ids=lambda value: getattr(value, "name", ""))
async def test_a_recorded_stream_says_the_same_in_chunks(kind: type[NativeProvider], recorded: Native) -> None:
    """Text, thinking, tool calls, the end and the figures, in chunks that share their id, time and model."""
    found = await chunks(kind, [recorded.body])
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(deltas(found, "content")) == recorded.text
    assert "".join(deltas(found, "reasoning_content")) == recorded.reasoning
    assert tool_calls(found) == list(recorded.calls)
    ends = [choice["finish_reason"] for chunk in found for choice in chunk["choices"] if choice["finish_reason"]]
    assert ends == [recorded.finish]
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in found}) == 1
    assert found[0]["created"] == 1700000000
    given = recorded.completion.usage
    told = [chunk["usage"] for chunk in found if "usage" in chunk]
    assert len(told) == (given is not None)
    for usage in told:
        counts = (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"])
        assert counts == (given.prompt_tokens, given.completion_tokens, given.total_tokens)
        assert usage | recorded.usage_extras == usage


@pytest.mark.parametrize(("kind", "recorded"), RECORDED, ids=lambda value: getattr(value, "name", ""))
async def test_a_recorded_stream_means_the_same_wherever_it_is_split(
    kind: type[NativeProvider], recorded: Native
) -> None:
    """At every position of its bytes."""
    whole = await chunks(kind, [recorded.body])
    for position in range(len(recorded.body)):
        assert await chunks(kind, split(recorded.body, position)) == whole


@pytest.mark.parametrize(
    ("kind", "recorded"), [each for each in RECORDED if each[1].text], ids=lambda value: getattr(value, "name", "")
)
async def test_a_thread_gets_the_text_and_the_end_of_a_recorded_stream(
    kind: type[NativeProvider], recorded: Native
) -> None:
    """Thinking and tool calls are no text; finish reason, usage, model and citations are."""
    assert await answer(kind, recorded.body) == (recorded.text, recorded.completion)


@pytest.mark.parametrize(("kind", "recorded"), RECORDED, ids=lambda value: getattr(value, "name", ""))
async def test_a_stream_that_ends_early_never_counts(kind: type[NativeProvider], recorded: Native) -> None:
    """After every event but the last, a clean end of the body is an error, and no finish reason was told."""
    blocks = recorded.body.replace(b"\r\n\r\n", b"\n\n").split(b"\n\n")[:-1]
    for size in range(len(blocks)):
        body = b"".join(block + b"\n\n" for block in blocks[:size])
        found: list[dict[str, Any]] = []
        with pytest.raises(ProviderProtocolError) as caught:
            await chunks(kind, [body], into=found)
        assert caught.value.retryable
        assert all(choice["finish_reason"] is None for chunk in found for choice in chunk["choices"])


# -- broken ------------------------------------------------------------------------------------------------------

START = event({"type": "message_start", "message": {"id": "msg_1", "model": "c", "usage": {"input_tokens": 1}}})
STOP = event({"type": "message_stop"})


def claude(text: Any, stop: Any = "end_turn") -> str:
    delta = event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}})
    return START + delta + event({"type": "message_delta", "delta": {"stop_reason": stop}}) + STOP


def claude_event(**fields: Any) -> str:
    return START + event(fields) + claude("x")


def gemini(text: Any = "x", finish: Any = "STOP", **fields: Any) -> str:
    return event({"candidates": [{"content": {"parts": [{"text": text}]}, "finishReason": finish}], **fields})


BROKEN = [
    (AnthropicProvider, "", "provider_protocol", True),
    (AnthropicProvider, STOP, "provider_protocol", True),
    (AnthropicProvider, START + STOP, "provider_protocol", True),
    (AnthropicProvider, claude("x", None), "provider_protocol", True),
    (AnthropicProvider, claude("x").removesuffix(STOP), "provider_protocol", True),
    (AnthropicProvider, claude("x").removesuffix("\n"), "provider_protocol", True),
    (AnthropicProvider, claude(""), "provider_protocol", True),
    (AnthropicProvider, claude(7), "provider_protocol", True),
    (AnthropicProvider, claude("", "max_tokens"), "provider_protocol", False),
    (AnthropicProvider, claude("", "refusal"), "provider_error", False),
    (AnthropicProvider, claude("x" * 900_000).removesuffix(STOP) * 5 + STOP, "provider_protocol", False),
    (AnthropicProvider, START + "data: [1]\n\n", "provider_protocol", True),
    (AnthropicProvider, START + "data: {\n\n", "provider_protocol", True),
    (AnthropicProvider, START.encode() + b"data: \xff\n\n", "provider_protocol", True),
    (AnthropicProvider, event({"type": "message_start"}), "provider_protocol", True),
    (AnthropicProvider, claude_event(type="content_block_start"), "provider_protocol", True),
    (AnthropicProvider, claude_event(type="content_block_start", index=0), "provider_protocol", True),
    (AnthropicProvider, claude_event(type="content_block_stop", index=True), "provider_protocol", True),
    (
        AnthropicProvider,
        claude_event(type="content_block_start", index=1, content_block={"type": "tool_use", "id": 1, "name": "n"}),
        "provider_protocol",
        True,
    ),
    (AnthropicProvider, claude_event(type="message_delta", delta="x"), "provider_protocol", True),
    (AnthropicProvider, claude_event(type="error"), "provider_error", True),
    (
        AnthropicProvider,
        claude_event(type="error", error={"type": "overloaded_error", "message": "secret"}),
        "provider_error",
        True,
    ),
    (
        AnthropicProvider,
        claude_event(type="error", error={"type": "rate_limit_error", "message": "secret"}),
        "provider_rate_limited",
        True,
    ),
    (
        AnthropicProvider,
        claude_event(type="error", error={"type": "invalid_request_error", "message": "secret"}),
        "provider_error",
        False,
    ),
    (
        AnthropicProvider,
        claude_event(type="error", error={"type": "billing_error", "message": "secret"}),
        "provider_error",
        False,
    ),
    (
        AnthropicProvider,
        claude_event(type="error", error={"type": "request_too_large", "message": "secret"}),
        "provider_error",
        False,
    ),
    (GeminiProvider, "", "provider_protocol", True),
    (GeminiProvider, "data: [DONE]\n\n", "provider_protocol", True),
    (GeminiProvider, gemini("x", None), "provider_protocol", True),
    (GeminiProvider, gemini(""), "provider_protocol", True),
    (GeminiProvider, gemini(7), "provider_protocol", True),
    (GeminiProvider, gemini().removesuffix("\n"), "provider_protocol", True),
    (GeminiProvider, gemini("", "MAX_TOKENS"), "provider_protocol", False),
    (GeminiProvider, gemini("", "SAFETY"), "provider_error", False),
    (GeminiProvider, gemini("x", "MALFORMED_FUNCTION_CALL"), "provider_error", True),
    (GeminiProvider, gemini("x", "OTHER"), "provider_error", True),
    (GeminiProvider, gemini("x", "FINISH_REASON_UNSPECIFIED"), "provider_error", True),
    (GeminiProvider, gemini("x", "MISSING_THOUGHT_SIGNATURE"), "provider_error", False),
    (GeminiProvider, gemini("x" * 900_000, None) * 5 + gemini(), "provider_protocol", False),
    (GeminiProvider, event({"promptFeedback": {"blockReason": "SAFETY"}}), "provider_error", False),
    (GeminiProvider, event({"promptFeedback": {"blockReason": "OTHER"}}), "provider_error", False),
    (GeminiProvider, event({"candidates": {}}), "provider_protocol", True),
    (GeminiProvider, event({"candidates": ["x"]}), "provider_protocol", True),
    (GeminiProvider, event({"candidates": [{"content": "x"}]}), "provider_protocol", True),
    (GeminiProvider, event({"candidates": [{"content": {"parts": [{"functionCall": 1}]}}]}), "provider_protocol", True),
    (
        GeminiProvider,
        event({"candidates": [{"content": {"parts": [{"functionCall": {"args": {}}}]}}]}),
        "provider_protocol",
        True,
    ),
    (GeminiProvider, gemini("x", None) + "data: nonsense\n\n", "provider_protocol", True),
    (GeminiProvider, gemini("x", None) + event({"error": {"code": 503, "message": "secret"}}), "provider_error", True),
    (GeminiProvider, event({"error": {"code": 429, "status": "RESOURCE_EXHAUSTED"}}), "provider_rate_limited", True),
    (GeminiProvider, event({"error": {"code": 400, "status": "INVALID_ARGUMENT"}}), "provider_error", False),
]


@pytest.mark.parametrize(("kind", "body", "code", "retryable"), BROKEN)
async def test_what_is_no_verified_answer_is_an_error(
    kind: type[NativeProvider], body: str | bytes, code: str, retryable: bool
) -> None:
    """Everything that merely looks like an answer, and everything broken; what the provider wrote is not repeated."""
    error = await failure(kind, body)
    assert (error.code, error.retryable) == (code, retryable)
    assert "secret" not in error.detail


@pytest.mark.parametrize(
    ("kind", "said", "meant"),
    [
        (AnthropicProvider, "end_turn", FinishReason.STOP),
        (AnthropicProvider, "stop_sequence", FinishReason.STOP),
        (AnthropicProvider, "a reason nobody knows", FinishReason.STOP),
        (AnthropicProvider, "max_tokens", FinishReason.LENGTH),
        (AnthropicProvider, "model_context_window_exceeded", FinishReason.LENGTH),
        (AnthropicProvider, "pause_turn", FinishReason.LENGTH),
        (AnthropicProvider, "tool_use", FinishReason.TOOL_CALLS),
        (AnthropicProvider, "refusal", FinishReason.CONTENT_FILTER),
        (GeminiProvider, "STOP", FinishReason.STOP),
        (GeminiProvider, "A_REASON_NOBODY_KNOWS", FinishReason.STOP),
        (GeminiProvider, "MAX_TOKENS", FinishReason.LENGTH),
        (GeminiProvider, "SAFETY", FinishReason.CONTENT_FILTER),
        (GeminiProvider, "RECITATION", FinishReason.CONTENT_FILTER),
        (GeminiProvider, "PROHIBITED_CONTENT", FinishReason.CONTENT_FILTER),
    ],
)
async def test_finish_reasons_are_told_in_our_words(kind: type[NativeProvider], said: str, meant: FinishReason) -> None:
    """And the provider's own word stands beside it."""
    body = claude("x", said) if kind is AnthropicProvider else gemini("x", said)
    assert (await answer(kind, body))[1].finish_reason is meant
    (last,) = (chunk for chunk in await chunks(kind, [body.encode()]) if "native_finish_reason" in str(chunk))
    assert last["choices"][0]["native_finish_reason"] == said


@pytest.mark.parametrize(
    ("status", "body", "code", "retryable", "wait_s"),
    [
        (
            529,
            {"type": "error", "error": {"type": "overloaded_error", "message": "secret"}},
            "provider_unavailable",
            True,
            3,
        ),
        (429, {"type": "error", "error": {"type": "rate_limit_error"}}, "provider_rate_limited", True, 3),
        (400, {"type": "error", "error": {"type": "invalid_request_error"}}, "provider_error", False, None),
        (403, {"type": "error", "error": {"type": "billing_error"}}, "provider_error", False, None),
        (429, [{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED"}}], "provider_rate_limited", True, 3),
        (503, {"error": {"code": 503, "status": "UNAVAILABLE", "message": "secret"}}, "provider_unavailable", True, 3),
        (400, {"error": {"code": 400, "status": "INVALID_ARGUMENT"}}, "provider_error", False, None),
    ],
)
@pytest.mark.parametrize("kind", [AnthropicProvider, GeminiProvider])
async def test_a_refusal_says_whether_and_when_to_retry(
    kind: type[NativeProvider], status: int, body: Any, code: str, retryable: bool, wait_s: float | None
) -> None:
    """By status and header, in both forms of an error body."""
    error = await failure(kind, json.dumps(body), status=status, headers={"retry-after": "3"})
    assert (error.code, error.retryable, error.retry_after_s) == (code, retryable, wait_s)
    assert "secret" not in error.detail


async def test_the_wait_may_stand_in_the_body() -> None:
    """Gemini sends no Retry-After, but a RetryInfo."""
    info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.5s"}
    body = json.dumps([{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": [{}, info]}}])
    assert (await failure(GeminiProvider, body, status=429)).retry_after_s == 34.5


async def test_a_refused_key_is_named_as_what_it_is() -> None:
    """Google answers 400 to a key it does not know."""
    details = [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]
    body = json.dumps({"error": {"code": 400, "status": "INVALID_ARGUMENT", "details": details}})
    assert "ACME_API_KEY" in (await failure(GeminiProvider, body, status=400)).detail


# -- odd ---------------------------------------------------------------------------------------------------------


async def test_events_and_blocks_nobody_knows_are_passed_over() -> None:
    """New ones may come at any time, says the versioning of Anthropic's wire."""
    odd = event({"type": "news", "delta": 1}) + event({"type": "ping"}) + event({})
    odd += event({"type": "content_block_start", "index": 7, "content_block": {"type": "hologram"}})
    odd += event({"type": "content_block_delta", "index": 7, "delta": {"type": "hologram_delta"}})
    assert await answer(AnthropicProvider, START + odd + claude("x")) == await answer(AnthropicProvider, claude("x"))


async def test_thinking_comes_back_with_its_signature() -> None:
    """A conversation with tools has to send it back unchanged."""
    (tools,) = (each for each in ANTHROPIC_RECORDED if each.name == "tools")
    found = await chunks(AnthropicProvider, [tools.body])
    expected = {"type": "thinking", "thinking": "Two cities.", "signature": "EqQBCg=="}
    assert deltas(found, "thinking_blocks") == [[expected]]


async def test_a_thought_signature_stays_with_its_tool_call() -> None:
    """Where Google's own OpenAI endpoint has it."""
    (tools,) = (each for each in GEMINI_RECORDED if each.name == "tools")
    calls = [call for some in deltas(await chunks(GeminiProvider, [tools.body]), "tool_calls") for call in some]
    assert [call.get("extra_content") for call in calls] == [{"google": {"thought_signature": "Sig=="}}, None]


async def test_figures_of_a_stream_that_never_counted_are_none() -> None:
    """The count at the start of Anthropic's stream is not that of the answer."""
    assert (await answer(AnthropicProvider, claude("x")))[1].usage is None


async def test_a_figure_that_is_null_takes_nothing_back() -> None:
    """Anthropic's last figures add to the first."""
    figures = {"input_tokens": None, "cache_read_input_tokens": None, "output_tokens": 5}
    ended = event({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": figures})
    usage = (await answer(AnthropicProvider, claude("x").removesuffix(STOP) + ended + STOP))[1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (1, 5)


async def test_only_the_first_candidate_counts() -> None:
    """Two answers in one text would be neither."""
    second = {"index": 1, "content": {"parts": [{"text": "no"}]}, "finishReason": "STOP"}
    assert (await answer(GeminiProvider, event({"candidates": [second]}) + gemini("yes")))[0] == "yes"


async def test_log_probabilities_are_passed_on() -> None:
    """In the form of a chat completion, chosen tokens with those considered."""
    a, b = {"token": "a", "logProbability": -0.5}, {"token": "b", "logProbability": "odd"}
    result = {"chosenCandidates": [a], "topCandidates": [{"candidates": [a, b]}]}
    first = {"content": {"parts": [{"text": "a"}]}, "logprobsResult": result, "finishReason": "STOP"}
    found = await chunks(GeminiProvider, [event({"candidates": [first]}).encode()])
    (told,) = (chunk["choices"][0]["logprobs"]["content"] for chunk in found if "logprobs" in str(chunk))
    told_a = {"token": "a", "logprob": -0.5, "bytes": None}
    assert told == [{**told_a, "top_logprobs": [told_a, {"token": "b", "logprob": -9999.0, "bytes": None}]}]


async def test_figures_may_follow_the_finish_reason() -> None:
    """The body is read to its end."""
    late = event({"usageMetadata": {"promptTokenCount": 3, "candidatesTokenCount": 4}})
    usage = (await answer(GeminiProvider, gemini() + late))[1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 4)


# -- requests of threads -----------------------------------------------------------------------------------------


async def posted(kind: type[NativeProvider], body: str, request: ChatRequest) -> tuple[str, Mapping[str, Any]]:
    transport = ScriptedTransport([body.encode()])
    _ = [event async for event in kind("acme", transport).stream(request)]
    ((path, sent),) = transport.posted
    return path, json.loads(sent)


PARAMS = Params(1.5, 0.9, 100, 7, ("END",), 0.1, 0.2)


async def test_a_thread_asks_anthropic() -> None:
    """What it has nothing like is left out; the temperature stops at its highest."""
    request = ChatRequest("acme", "claude-x", REQUEST.messages, PARAMS)
    assert await posted(AnthropicProvider, claude("x"), request) == (
        "messages",
        {
            "model": "claude-x",
            "system": [{"type": "text", "text": "be brief"}],
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "max_tokens": 100,
            "temperature": 1,
            "top_p": 0.9,
            "stop_sequences": ["END"],
            "stream": True,
        },
    )


async def test_a_thread_asks_gemini() -> None:
    """Model in the path, sampling in its own object."""
    request = ChatRequest("acme", "gemini-x", REQUEST.messages, PARAMS)
    assert await posted(GeminiProvider, gemini(), request) == (
        "models/gemini-x:streamGenerateContent?alt=sse",
        {
            "systemInstruction": {"parts": [{"text": "be brief"}]},
            "contents": [{"role": "user", "parts": [{"text": "hi"}]}],
            "generationConfig": {
                "temperature": 1.5,
                "topP": 0.9,
                "maxOutputTokens": 100,
                "seed": 7,
                "stopSequences": ["END"],
                "presencePenalty": 0.1,
                "frequencyPenalty": 0.2,
            },
        },
    )


# -- anything ----------------------------------------------------------------------------------------------------

NAMES = [
    "type", "index", "delta", "message", "content_block", "text", "partial_json", "thinking", "signature", "usage",
    "stop_reason", "input_tokens", "output_tokens", "citation", "error", "id", "name", "input", "model",
    "candidates", "content", "parts", "finishReason", "functionCall", "args", "promptFeedback", "blockReason",
    "usageMetadata", "promptTokenCount", "candidatesTokenCount", "citationMetadata", "citationSources",
    "groundingMetadata", "groundingChunks", "logprobsResult", "chosenCandidates", "topCandidates", "thought", "code",
    "status", "details",
]  # fmt: skip
TYPES = [
    "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "error",
    "text_delta", "input_json_delta", "thinking_delta", "signature_delta", "citations_delta", "tool_use", "text",
    "thinking", "STOP",
]  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.sampled_from(TYPES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6),
    max_leaves=14,
)


@pytest.mark.parametrize("kind", [AnthropicProvider, GeminiProvider])
@given(values=st.lists(json_values, max_size=4))
async def test_no_stream_raises_anything_foreign(kind: type[NativeProvider], values: list[Any]) -> None:
    """Whatever JSON a provider thinks of, it is an answer or one of the port's errors."""
    body = START + "".join(event(value) for value in values)
    body += claude("x") if kind is AnthropicProvider else gemini()
    try:
        await answer(kind, body)
    except (ProviderError, ProviderProtocolError, ProviderRateLimited):
        return
