"""The OpenAI wire, byte by byte: what is a good answer, and what each kind of broken one becomes."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncewise.core.chunks import assembled, usage_object
from oncewise.errors import OncewiseError, ProviderError, ProviderProtocolError, ProviderRateLimited
from oncewise.model import ChatMessage, ChatRequest, CompletionRequest, FinishReason, Params, Usage
from oncewise.ports import Completion, TextDelta
from oncewise.providers.call import Timers
from oncewise.providers.catalogue import CATALOGUE, Quirks
from oncewise.providers.openai_compatible import OpenAICompatibleProvider
from tests.support.recorded_streams import RECORDED, WHOLE, Recorded
from tests.support.scripted_transport import ScriptedTransport, split

REQUEST = ChatRequest("acme", "m1", (ChatMessage("system", "be brief"), ChatMessage("user", "hi")))
PLAIN = Quirks()
DONE = "data: [DONE]\n\n"


def event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


def chunk(content: Any = None, finish: Any = None, **fields: Any) -> str:
    return event({"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish}], **fields})


async def answer(body: str | bytes | list[bytes], quirks: Quirks = PLAIN, **head: Any) -> tuple[str, Completion]:
    """Text and completion of an answer with this body."""
    pieces = body if isinstance(body, list) else [body.encode() if isinstance(body, str) else body]
    transport = ScriptedTransport(pieces, **head)
    provider = OpenAICompatibleProvider("acme", transport, quirks=quirks)
    try:
        events = [event async for event in provider.stream(REQUEST)]
    finally:
        assert transport.open == 0, "the connection is given back, however the answer ended"
    assert all(isinstance(event, TextDelta) and event.text for event in events[:-1])
    assert isinstance(events[-1], Completion)
    return "".join(event.text for event in events[:-1]), events[-1]


async def failure(body: str | bytes, **head: Any) -> OncewiseError:
    with pytest.raises(OncewiseError) as caught:
        await answer(body, **head)
    return caught.value


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded.name)
async def test_a_recorded_stream_means_the_same_wherever_it_is_split(recorded: Recorded) -> None:
    """Text, finish reason, usage, model, citations and cost of every public dialect, cut at every position."""
    quirks = CATALOGUE[recorded.provider].quirks
    for position in range(len(recorded.body)):
        assert await answer(split(recorded.body, position), quirks) == (recorded.text, recorded.completion)


@pytest.mark.parametrize("name", WHOLE)
async def test_the_chunks_of_a_recorded_stream_add_up_wherever_it_is_split(name: str) -> None:
    """Tool calls, logprobs, reasoning, citations, cost and whatever else a provider says, cut at every position."""
    provider, body, document = WHOLE[name]
    quirks = CATALOGUE[provider].quirks
    for position in range(len(body)):
        adapter = OpenAICompatibleProvider(provider, ScriptedTransport(split(body, position)), quirks=quirks)
        asked = CompletionRequest(provider, "m1", {"messages": []})
        chunks = [chunk async for chunk in adapter.chunks(asked)]
        figures = [figure for figure in map(usage_object, chunks) if figure is not None]
        assert assembled(chunks, figures[-1] if figures else {}) == document


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded.name)
async def test_a_recorded_stream_that_ends_early_never_counts(recorded: Recorded) -> None:
    """After every event before the one with the finish reason, a clean end of the body is an error to retry."""
    body = recorded.body.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    blocks = body.split(b"\n\n")[:-1]
    end = b"[DONE]" if recorded.provider == "ollama" else b'"finish_reason":"'
    last = next(at for at, block in enumerate(blocks) if end in block)
    for size in range(last + 1):
        transport = ScriptedTransport([b"".join(block + b"\n\n" for block in blocks[:size])])
        adapter = OpenAICompatibleProvider("acme", transport, quirks=CATALOGUE[recorded.provider].quirks)
        with pytest.raises(ProviderProtocolError) as caught:
            _ = [event async for event in adapter.stream(REQUEST)]
        assert caught.value.retryable


async def test_the_request_asks_for_a_stream_with_usage() -> None:
    """Messages as they are, given parameters only, in one POST."""
    transport = ScriptedTransport([chunk("x", "stop").encode()])
    request = ChatRequest("acme", "m1", REQUEST.messages, Params(temperature=0.0, stop=("END",), seed=7))
    _ = [event async for event in OpenAICompatibleProvider("acme", transport).stream(request)]
    ((path, body),) = transport.posted
    assert path == "chat/completions"
    assert json.loads(body) == {
        "model": "m1",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "stop": ["END"],
        "seed": 7,
    }


async def test_a_dialect_changes_the_request() -> None:
    """Mistral: no usage option, and the seed under its own name."""
    transport = ScriptedTransport([chunk("x", "stop").encode()])
    provider = OpenAICompatibleProvider("mistral", transport, quirks=CATALOGUE["mistral"].quirks)
    _ = [event async for event in provider.stream(ChatRequest("mistral", "m", REQUEST.messages, Params(seed=7)))]
    body = json.loads(transport.posted[0][1])
    assert (body["random_seed"], "seed" in body, "stream_options" in body) == (7, False, False)


@pytest.mark.parametrize(
    ("body", "code", "retryable"),
    [
        ("", "provider_protocol", True),
        (DONE, "provider_protocol", True),
        (event({"choices": []}) + DONE, "provider_protocol", True),
        (chunk("text") + DONE, "provider_protocol", True),
        (chunk("text"), "provider_protocol", True),
        (chunk("", "stop") + DONE, "provider_protocol", True),
        (chunk("text", "stop").rstrip("\n"), "provider_protocol", True),
        (chunk("text") + 'data: {"choices":[{"ind\n\n', "provider_protocol", True),
        (chunk("text") + "data: [1]\n\n", "provider_protocol", True),
        (
            chunk("text") + 'data: {"choices":[{"index":0,"delta":{"content":"\\ud800"}}]}\n\n',
            "provider_protocol",
            True,
        ),
        (event({"choices": {"index": 0}}), "provider_protocol", True),
        (event({"choices": ["text"]}), "provider_protocol", True),
        (event({"choices": [{"delta": "text"}]}), "provider_protocol", True),
        (chunk(7), "provider_protocol", True),
        (b"data: \xff\n\n", "provider_protocol", True),
        ("data: " + "x" * (1 << 20) + "\n\n", "provider_protocol", False),
        (chunk("x" * 900_000) * 5 + chunk(None, "stop"), "provider_protocol", False),
        (chunk(None, "length"), "provider_protocol", False),
        (chunk(None, "content_filter"), "provider_error", False),
        (chunk("text", "error"), "provider_error", True),
        (chunk("text", "insufficient_system_resource"), "provider_error", True),
        (chunk("text") + event({"error": {"message": "secret"}}), "provider_error", True),
        (chunk("text") + event({"error": "secret"}), "provider_error", True),
        (chunk("text") + 'event: error\ndata: {"message":"secret"}\n\n', "provider_error", True),
        (event({"error": {"code": 429, "message": "secret"}}), "provider_rate_limited", True),
        # OpenRouter's, in the middle of an answer.
        (
            chunk("text") + chunk("", "error", id="gen-1", provider="X", error={"code": 502, "message": "secret"}),
            "provider_error",
            True,
        ),
        (
            event(
                {"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error", "error": {"code": 429}}]}
            ),
            "provider_error",
            True,
        ),
        (event({"error": {"code": "502", "message": "secret"}}), "provider_error", True),
        (event({"error": {"type": "invalid_request_error", "message": "secret"}}), "provider_error", False),
        (event({"error": {"code": "insufficient_quota", "type": "rate_limit_error"}}), "provider_error", False),
    ],
)
async def test_what_is_no_verified_answer_is_an_error(body: str | bytes, code: str, retryable: bool) -> None:
    """Everything that looks like success to a usual client, and everything broken."""
    error = await failure(body)
    assert (error.code, error.retryable) == (code, retryable)
    assert "secret" not in error.detail


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (chunk("", "stop"), True),
        (chunk(None, "stop", usage={"prompt_tokens": 1, "completion_tokens": 0}) + DONE, True),
        ("", False),
        (DONE, False),
        (chunk("text") + DONE, False),
        (event({"error": {"code": 500}}), False),
    ],
)
async def test_only_a_whole_answer_without_text_may_be_its_prompts_doing(body: str, expected: bool) -> None:
    """A tenant must not be able to have a model taken for broken; a broken model must be."""
    assert (await failure(body)).self_inflicted is expected


async def chunks_before_the_end(body: str, n: int) -> tuple[list[dict[str, Any]], OncewiseError | None]:
    """What was passed on of an answer to a request for `n` choices, and the error that ended it."""
    provider = OpenAICompatibleProvider("acme", ScriptedTransport([body.encode()]))
    seen: list[dict[str, Any]] = []
    try:
        async for piece in provider.chunks(CompletionRequest("acme", "m1", {"messages": [], "n": n})):
            seen.append(piece)  # noqa: PERF401  those before an error count
    except OncewiseError as error:
        return seen, error
    return seen, None


@pytest.mark.parametrize("body", [chunk("", "stop"), chunk(None) + chunk(None, "stop") + DONE])
async def test_an_empty_answer_has_no_end_that_could_be_shown(body: str) -> None:
    """A finish reason looks like a whole answer, whatever follows."""
    seen, error = await chunks_before_the_end(body, 1)
    assert isinstance(error, ProviderProtocolError)
    assert all(choice["finish_reason"] is None for piece in seen for choice in piece["choices"])


async def test_the_last_of_several_choices_decides_whether_an_answer_is_empty() -> None:
    """One of them may well be."""
    ends = (
        {"index": index, "delta": {"content": text}, "finish_reason": "stop"} for index, text in ((0, ""), (1, "x"))
    )
    seen, error = await chunks_before_the_end("".join(event({"choices": [end]}) for end in ends) + DONE, 2)
    assert (len(seen), error) == (2, None)


@pytest.mark.parametrize(
    "head",
    [
        {"headers": {"content-type": "text/html"}},
        {"headers": {"content-type": "application/json"}},
        {"headers": {"content-type": ""}},
        {"headers": {"content-encoding": "gzip"}},
    ],
)
async def test_a_body_that_is_no_event_stream_is_an_error(head: dict[str, Any]) -> None:
    """A page or a document with status 200, and a compressed body that was not asked for."""
    error = await failure(chunk("text", "stop"), **head)
    assert (type(error), error.retryable) == (ProviderProtocolError, True)


async def test_the_content_type_is_read_as_a_media_type() -> None:
    """Parameters and case do not matter."""
    assert (await answer(chunk("x", "stop"), headers={"content-type": "Text/Event-Stream; charset=UTF-8"}))[0] == "x"


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("stop", FinishReason.STOP),
        ("length", FinishReason.LENGTH),
        ("max_tokens", FinishReason.LENGTH),
        ("content_filter", FinishReason.CONTENT_FILTER),
        ("function_call", FinishReason.TOOL_CALLS),
        ("a reason nobody knows", FinishReason.STOP),
    ],
)
async def test_finish_reasons_are_told_in_our_words(said: str, meant: FinishReason) -> None:
    """An unknown one is still the provider's word that it has ended."""
    assert (await answer(chunk("x", said)))[1].finish_reason is meant


async def test_done_is_not_needed_and_nothing_after_it_counts() -> None:
    """The finish reason completes an answer; `[DONE]` only ends the reading."""
    whole = chunk("text", "stop")
    assert await answer(whole) == await answer(whole + DONE)
    assert (await answer(whole + DONE + chunk("more") + "data: \xff not json\n\n"))[0] == "text"
    assert (await answer([(whole + DONE).encode(), b"data: \xff\n\n" + b"x" * (2 << 20)]))[0] == "text"


async def test_done_alone_completes_only_where_the_catalogue_says_so() -> None:
    """Ollama's null finish reason: accepted with `[DONE]`, not without."""
    ollama = CATALOGUE["ollama"].quirks
    assert (await answer(chunk("text") + DONE, ollama))[1].finish_reason is FinishReason.STOP
    with pytest.raises(ProviderProtocolError):
        await answer(chunk("text"), ollama)
    with pytest.raises(ProviderProtocolError):
        await answer(DONE, ollama)


async def test_usage_that_comes_after_the_finish_reason_counts() -> None:
    """With `include_usage` it is the last chunk, without choices."""
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    _, completion = await answer(chunk("x", "stop") + event({"choices": [], "usage": usage}) + DONE)
    assert completion.usage == Usage(3, 4)


@pytest.mark.parametrize(
    "usage",
    [
        None, 7, {}, {"prompt_tokens": 3}, {"prompt_tokens": -1, "completion_tokens": 2},
        {"prompt_tokens": 1.5, "completion_tokens": 2}, {"prompt_tokens": True, "completion_tokens": True},
    ],
)  # fmt: skip
async def test_usage_in_a_form_nobody_knows_is_no_usage(usage: Any) -> None:
    """It is an estimate's place then, not an error's."""
    assert (await answer(chunk("x", "stop", usage=usage)))[1].usage is None


async def test_text_keeps_everything_but_nul() -> None:
    """NUL cannot be stored, so it is left out before anybody sees it; a delta of nothing else is none."""
    assert (await answer(chunk("a\0b\u2028é🙂\u200d\r\n") + chunk("\0") + chunk(None, "stop")))[
        0
    ] == "ab\u2028é🙂\u200d\r\n"
    assert (await answer(chunk("a", "stop", model="m\0-1")))[1].model == "m-1"


@pytest.mark.parametrize("seed", [1 << 70])
async def test_a_request_that_is_no_json_is_refused_without_a_call(seed: int) -> None:
    """An integer no JSON reader would take; a lone surrogate is the same."""
    transport = ScriptedTransport([])
    provider = OpenAICompatibleProvider("acme", transport)
    for request in (
        ChatRequest("acme", "m", REQUEST.messages, Params(seed=seed)),
        ChatRequest("acme", "m", (ChatMessage("user", "\ud800"),)),
    ):
        with pytest.raises(ProviderError) as caught:
            _ = [event async for event in provider.stream(request)]
        assert not caught.value.retryable
    assert transport.posted == []


@pytest.mark.parametrize(
    ("status", "error", "retryable"),
    [
        (204, ProviderError, False), (301, ProviderError, False), (400, ProviderError, False),
        (401, ProviderError, False), (402, ProviderError, False), (403, ProviderError, False),
        (404, ProviderError, False), (408, ProviderError, True), (422, ProviderError, False),
        (429, ProviderRateLimited, True), (500, ProviderError, True), (503, ProviderError, True),
        (529, ProviderError, True),
    ],
)  # fmt: skip
async def test_a_status_becomes_an_error_that_says_whether_to_retry(
    status: int, error: type[OncewiseError], retryable: bool
) -> None:
    """The provider's sentence never does: it may quote the prompt or the key."""
    caught = await failure('{"error":{"message":"secret sk-123","code":null}}', status=status)
    assert (type(caught), caught.retryable) == (error, retryable)
    assert "secret" not in caught.detail
    assert caught.detail.startswith(("acme", "The account with acme"))


async def test_an_exhausted_account_is_no_rate_limit() -> None:
    """OpenAI answers 429 to it as well, but no wait will help."""
    body = '{"error":{"message":"m","type":"insufficient_quota","code":"insufficient_quota"}}'
    assert (await failure(body, status=429)).retryable is False


@pytest.mark.parametrize("body", [b"\xff" * 200_000, b"[" * 5000, b"null", b'{"error":[1]}', b""])
async def test_an_error_body_of_any_kind_leaves_the_status_to_speak(body: bytes) -> None:
    """Large, deep, empty or no JSON at all."""
    assert (await failure(body, status=503)).code == "provider_error"


async def test_an_error_body_is_read_to_its_cap_only() -> None:
    """64 KiB are enough for any error object; the rest is left with the connection."""
    transport = ScriptedTransport([b" " * (16 << 10)] * 100, status=500)
    with pytest.raises(ProviderError):
        _ = [event async for event in OpenAICompatibleProvider("acme", transport).stream(REQUEST)]
    assert transport.read == 5


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "choices",
                    "delta",
                    "content",
                    "index",
                    "finish_reason",
                    "usage",
                    "cost",
                    "total_cost",
                    "prompt_tokens",
                    "completion_tokens",
                    "error",
                    "code",
                    "type",
                    "text",
                    "reasoning",
                    "model",
                    "citations",
                    "search_results",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(st.lists(json_values, max_size=4))
async def test_no_stream_raises_anything_foreign(values: list[Any]) -> None:
    """Whatever JSON a provider thinks of, it is an answer or one of the port's errors."""
    body = "".join(event(value) for value in values) + chunk("x", "stop")
    provider = OpenAICompatibleProvider("acme", ScriptedTransport([body.encode()]), timers=Timers())
    try:
        events = [event async for event in provider.stream(REQUEST)]
    except (ProviderError, ProviderProtocolError, ProviderRateLimited):
        return
    assert isinstance(events[-1], Completion)


async def test_closing_the_provider_closes_its_transport() -> None:
    """The pool is the provider's own."""
    transport = ScriptedTransport([])
    await OpenAICompatibleProvider("acme", transport).aclose()
    assert transport.closed
