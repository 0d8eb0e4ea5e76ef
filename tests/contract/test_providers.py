"""One suite for every `Provider`: what a call gives, how it ends, and that nothing of it is left behind.

All adapters but the demo talk to a real server over a real socket.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import pytest

from oncewise.errors import (
    OncewiseError,
    ProviderError,
    ProviderProtocolError,
    ProviderRateLimited,
    ProviderTimeout,
    ProviderUnavailable,
)
from oncewise.model import ChatMessage, ChatRequest, CompletionRequest, FinishReason
from oncewise.ports import Chunk, Completion, Provider, ProviderEvent, TextDelta
from oncewise.providers.anthropic import AnthropicProvider
from oncewise.providers.call import Timers
from oncewise.providers.catalogue import CATALOGUE
from oncewise.providers.demo import DemoProvider
from oncewise.providers.gemini import GeminiProvider
from oncewise.providers.openai_compatible import OpenAICompatibleProvider
from oncewise.providers.transport import HttpTransport
from tests.support.fake_provider import FakeProvider
from tests.support.recorded_streams import RECORDED, Recorded

# Long enough for a busy machine; a test of one timer shortens that one only.
TIMERS = Timers(first_token_s=1.0, between_tokens_s=5.0, total_s=20.0, tail_s=0.3)
KEY = "sk-very-secret"
PROMPT = "a prompt that must never stand in an error"


@dataclass
class Rig:
    """A provider with the model names by which it does what a test is about.

    Attributes:
        calls: Calls the provider has seen.
        gone: Returns once the latest call has ended on the provider's side.
    """

    provider: Provider
    models: dict[str, str]
    calls: Callable[[], int]
    gone: Callable[[], Awaitable[None]]

    def ask(self, what: str) -> ChatRequest:
        return request(self.models[what], self.provider.name)


def request(model: str, provider: str = "acme") -> ChatRequest:
    return ChatRequest(provider, model, (ChatMessage("user", PROMPT),))


async def collect(provider: Provider, asked: ChatRequest) -> tuple[list[ProviderEvent], OncewiseError | None]:
    """All events, and the error that ended them."""
    events: list[ProviderEvent] = []
    try:
        async with aclosing(provider.stream(asked)) as stream:
            async for event in stream:
                events.append(event)  # noqa: PERF401  those before an error count
    except OncewiseError as error:
        return events, error
    return events, None


@pytest.fixture
async def fake() -> AsyncIterator[FakeProvider]:
    async with FakeProvider() as server:
        yield server


@pytest.fixture
async def adapter(fake: FakeProvider) -> AsyncIterator[OpenAICompatibleProvider]:
    provider = OpenAICompatibleProvider.connect("acme", fake.base_url, KEY, concurrency=4, timers=TIMERS)
    yield provider
    await provider.aclose()


def demo_rig() -> Rig:
    provider = DemoProvider(rps=None, timers=TIMERS)

    async def gone() -> None:
        assert provider.running == 0

    models = {
        "good": "demo-fast", "slow": "demo-lat-800", "rate": "demo-429", "down": "demo-500", "wrong": "demo-400",
        "cut": "demo-fast-cut-3", "hang": "demo-hang", "empty": "demo-fast-empty", "nofinish": "demo-fast-nofinish",
    }  # fmt: skip
    return Rig(provider, models, lambda: provider.calls, gone)


def http_rig(provider: Provider, fake: FakeProvider) -> Rig:
    async def gone() -> None:
        async with asyncio.timeout(1):
            await fake.calls[-1].ended.wait()

    models = {
        "good": "n5", "slow": "n500-gap40", "rate": "err429-retryafter1", "down": "err500", "wrong": "err400",
        "cut": "n9-cut3", "hang": "hang", "empty": "empty", "nofinish": "n5-nofinish",
    }  # fmt: skip
    return Rig(provider, models, lambda: fake.count, gone)


ADAPTERS = {
    "openai_compatible": OpenAICompatibleProvider,
    "anthropic": AnthropicProvider,
    "gemini": GeminiProvider,
}


@pytest.fixture
async def rig(kind: str, fake: FakeProvider) -> AsyncIterator[Rig]:
    if kind == "demo":
        yield demo_rig()
        return
    provider = ADAPTERS[kind].connect("acme", fake.base_url, KEY, concurrency=4, timers=TIMERS)
    yield http_rig(provider, fake)
    await provider.aclose()


@pytest.fixture(params=["demo", *ADAPTERS])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


# -- every provider ----------------------------------------------------------------------------------------------


async def test_text_and_then_one_completion(rig: Rig) -> None:
    """No empty delta, one completion, as the last event, with usage and the model."""
    events, error = await collect(rig.provider, rig.ask("good"))
    assert error is None
    assert len(events) > 3
    assert all(isinstance(event, TextDelta) and event.text for event in events[:-1])
    completion = events[-1]
    assert isinstance(completion, Completion)
    assert completion.finish_reason is FinishReason.STOP
    assert completion.usage is not None
    assert completion.usage.completion_tokens == len(events) - 1
    assert completion.model == rig.models["good"]


async def test_closing_the_generator_ends_the_call_within_a_second(rig: Rig) -> None:
    """The provider stops producing, and billing, when nobody is left."""
    async with aclosing(rig.provider.stream(rig.ask("slow"))) as stream:
        await anext(stream)
        closing_s = time.monotonic()
    await rig.gone()
    assert time.monotonic() - closing_s < 1


@pytest.mark.parametrize("what", ["slow", "hang"])
async def test_a_cancellation_passes_through_and_ends_the_call(rig: Rig, what: str) -> None:
    """Before the first token as well as between two."""
    task = asyncio.create_task(collect(rig.provider, rig.ask(what)))
    while rig.calls() == 0:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.02)
    cancelled_s = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await rig.gone()
    assert time.monotonic() - cancelled_s < 1


@pytest.mark.parametrize(
    ("what", "expected", "retryable"),
    [
        ("rate", ProviderRateLimited, True),
        ("down", ProviderError, True),
        ("wrong", ProviderError, False),
        ("cut", ProviderProtocolError, True),
        ("hang", ProviderTimeout, True),
        ("empty", ProviderProtocolError, True),
        ("nofinish", ProviderProtocolError, True),
    ],
)
async def test_each_failure_is_one_call_and_one_typed_error(
    rig: Rig, what: str, expected: type[OncewiseError], retryable: bool
) -> None:
    """No retries inside, no completion, and neither prompt nor key in what is told."""
    events, error = await collect(rig.provider, rig.ask(what))
    assert (type(error), error.retryable) == (expected, retryable)
    assert rig.calls() == 1
    assert all(isinstance(event, TextDelta) for event in events)
    assert PROMPT not in error.detail
    assert KEY not in error.detail
    await rig.gone()


async def test_text_before_a_failure_stays_valid(rig: Rig) -> None:
    """Exactly what came before the break, as a partial answer."""
    events, _ = await collect(rig.provider, rig.ask("cut"))
    assert len(events) == 3


async def test_a_rate_limit_says_when_to_come_again(rig: Rig) -> None:
    """In seconds."""
    _, error = await collect(rig.provider, rig.ask("rate"))
    assert error.retry_after_s == 1.0


async def test_calls_run_side_by_side(rig: Rig) -> None:
    """And share nothing but the provider."""
    results = await asyncio.gather(*(collect(rig.provider, rig.ask("good")) for _ in range(4)))
    assert [error for _, error in results] == [None] * 4
    assert rig.calls() == 4


async def test_a_failure_does_not_harm_the_next_call(rig: Rig) -> None:
    """Whatever a broken answer leaves behind, it is not met by the next one."""
    for what in ("cut", "empty", "down", "good"):
        _, error = await collect(rig.provider, rig.ask(what))
    assert error is None


async def whole(rig: Rig, what: str) -> list[Chunk]:
    body = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0}
    asked = CompletionRequest(rig.provider.name, rig.models[what], body)
    return [chunk async for chunk in rig.provider.chunks(asked)]


async def test_chunks_say_what_the_text_says_and_more(rig: Rig) -> None:
    """The same text, a finish reason for the choice, and usage at the end."""
    chunks = await whole(rig, "good")
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert len([choice for choice in choices if choice["delta"].get("content")]) > 3
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    assert chunks[-1]["usage"]["completion_tokens"] > 3


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("rate", ProviderRateLimited),
        ("down", ProviderError),
        ("wrong", ProviderError),
        ("cut", ProviderProtocolError),
        ("hang", ProviderTimeout),
        ("empty", ProviderProtocolError),
        ("nofinish", ProviderProtocolError),
    ],
)
async def test_chunks_are_verified_like_text(rig: Rig, what: str, expected: type[OncewiseError]) -> None:
    """Whatever is no whole answer ends in a typed error, after one call."""
    with pytest.raises(expected):
        await whole(rig, what)
    assert rig.calls() == 1
    await rig.gone()


# -- over a socket -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "expected", "retryable", "texts"),
    [
        ("reset", ProviderError, True, 0),
        ("redirect", ProviderError, False, 0),
        ("err401", ProviderError, False, 0),
        ("err403", ProviderError, False, 0),
        ("err422", ProviderError, False, 0),
        ("err408", ProviderError, True, 0),
        ("html200", ProviderProtocolError, True, 0),
        ("json200", ProviderProtocolError, True, 0),
        ("gzip-n1", ProviderProtocolError, True, 0),
        ("doneonly", ProviderProtocolError, True, 0),
        ("nochoices", ProviderProtocolError, True, 0),
        ("index1-n2", ProviderProtocolError, True, 0),
        ("n2-nofinish-nodone", ProviderProtocolError, True, 2),
        ("n2-nofinish-nodone-close", ProviderProtocolError, True, 2),
        ("n2-nullfinish", ProviderProtocolError, True, 2),
        ("n3-cut0", ProviderProtocolError, True, 0),
        ("n2-badjson", ProviderProtocolError, True, 2),
        ("n2-badutf8", ProviderProtocolError, True, 2),
        ("n2-arrayjson", ProviderProtocolError, True, 2),
        ("n2-errinstream", ProviderError, True, 2),
        ("hugeevent", ProviderProtocolError, False, 0),
        ("n9-tok900000", ProviderProtocolError, False, 4),
    ],
)
async def test_what_is_broken_on_the_wire_is_found(
    adapter: OpenAICompatibleProvider,
    fake: FakeProvider,
    model: str,
    expected: type[OncewiseError],
    retryable: bool,
    texts: int,
) -> None:
    """Each as one call, with the text that came before, and the connection given up."""
    events, error = await collect(adapter, request(model))
    assert (type(error), error.retryable) == (expected, retryable)
    assert len(events) == texts
    assert fake.count == 1
    assert KEY not in repr(error)
    assert PROMPT not in repr(error)
    await asyncio.wait_for(fake.calls[-1].ended.wait(), 1)


@pytest.mark.parametrize(
    "model",
    [
        "n3-nodone", "n3-close", "n3-nodone-close", "n3-cronly", "n3-crlf", "n3-bom", "n3-split1-u2028", "n3-dup",
        "n3-reasoning", "n3-afterdone", "n3-nousage", "n3-oddfinish", "n3-moonshotusage-citations-cost",
    ],
)  # fmt: skip
async def test_what_is_odd_but_whole_is_an_answer(adapter: OpenAICompatibleProvider, model: str) -> None:
    """Every dialect that carries three deltas and a finish reason."""
    events, error = await collect(adapter, request(model))
    assert error is None
    assert [type(event) for event in events] == [TextDelta] * 3 + [Completion]
    assert "after the end" not in "".join(event.text for event in events[:3])


async def test_what_the_provider_says_about_its_answer_is_kept(adapter: OpenAICompatibleProvider) -> None:
    """Usage, citations and cost, the cost as an object too."""
    for model in ("n2-moonshotusage-citations-cost", "n2-citations-costobject"):
        events, _ = await collect(adapter, request(model))
        completion = events[-1]
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (10, 2)
        assert completion.citations == ("https://example.org/1",)
        assert completion.cost_usd == pytest.approx(0.0125)


async def test_characters_survive_the_wire(adapter: OpenAICompatibleProvider) -> None:
    """One byte at a time, with every line end that is none."""
    events, _ = await collect(adapter, request("n2-split1-u2028"))
    assert all(event.text.endswith("a\u2028b\u2029c\u0085é🙂") for event in events[:2])


@pytest.mark.parametrize(
    ("model", "timers", "detail"),
    [
        ("pings", Timers(first_token_s=0.3), "begin"),
        ("emptydeltas", Timers(first_token_s=0.3), "begin"),
        ("n9-stall0", Timers(first_token_s=0.3), "begin"),
        ("n9-stall2", Timers(between_tokens_s=0.3), "silent"),
        ("n999-gap20", Timers(total_s=0.6), "end"),
    ],
)
async def test_each_timer_ends_a_call_that_takes_too_long(
    fake: FakeProvider, model: str, timers: Timers, detail: str
) -> None:
    """Keep-alive comments and empty deltas are no tokens: a timeout per read would never fire here."""
    provider = OpenAICompatibleProvider.connect("acme", fake.base_url, KEY, concurrency=1, timers=timers)
    _, error = await collect(provider, request(model))
    await asyncio.wait_for(fake.calls[-1].ended.wait(), 1)
    await provider.aclose()
    assert (type(error), error.retryable) == (ProviderTimeout, True)
    assert detail in error.detail
    # Only the answer that was too long for its time came all along: that is no fault of the provider's.
    assert error.self_inflicted is (detail == "end")


async def test_an_answer_is_not_lost_to_what_follows_its_finish_reason(adapter: OpenAICompatibleProvider) -> None:
    """Neither a body that does not end nor one that is cut takes back a complete answer."""
    body = b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"stop"}]}\n\n'
    begun_s = time.monotonic()
    async with serving(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 999\r\n\r\n" + body
    ) as url:
        provider = OpenAICompatibleProvider.connect("acme", url, None, concurrency=1, timers=TIMERS)
        events, error = await collect(provider, request("m"))
        await provider.aclose()
    assert error is None
    assert len(events) == 2
    assert time.monotonic() - begun_s < 3


async def test_the_key_travels_in_its_header_only(adapter: OpenAICompatibleProvider, fake: FakeProvider) -> None:
    """As a bearer token; nothing of the body is compressed or asked to be."""
    await collect(adapter, request("n1"))
    call = await fake.call(1)
    assert call.headers["authorization"] == f"Bearer {KEY}"
    assert call.headers["accept-encoding"] == "identity"
    assert KEY.encode() not in call.body


async def test_a_redirect_is_not_followed(adapter: OpenAICompatibleProvider, fake: FakeProvider) -> None:
    """It would carry prompt and key to wherever it points."""
    _, error = await collect(adapter, request("redirect"))
    assert fake.count == 1
    assert "ACME_BASE_URL" in error.detail


async def test_proxies_of_the_environment_are_not_used(fake: FakeProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    """What calls a provider is configured here, not inherited."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    provider = OpenAICompatibleProvider.connect("acme", fake.base_url, KEY, concurrency=1, timers=TIMERS)
    _, error = await collect(provider, request("n1"))
    await provider.aclose()
    assert error is None


async def test_a_connection_is_used_again_after_a_whole_answer(
    adapter: OpenAICompatibleProvider, fake: FakeProvider
) -> None:
    """Three calls, one handshake; an answer that was given up costs its connection."""
    for _ in range(3):
        await collect(adapter, request("n2"))
    assert fake.stats()["connections"] == 1


async def test_a_refused_answer_gives_its_connection_back(fake: FakeProvider) -> None:
    """Else a provider that sends pages would use up the pool."""
    timers = Timers(between_tokens_s=0.3)
    provider = OpenAICompatibleProvider.connect("acme", fake.base_url, None, concurrency=1, timers=timers)
    for model in ("html200", "err503", "n9-stall1", "hugeevent", "n1"):
        _, error = await collect(provider, request(model))
    await provider.aclose()
    assert error is None


async def test_a_model_that_thinks_before_it_speaks_is_not_late(fake: FakeProvider) -> None:
    """Reasoning is no text, but it is a sign of life: 1.5 s of it with 1 s to the first token."""
    provider = OpenAICompatibleProvider.connect("acme", fake.base_url, KEY, concurrency=1, timers=TIMERS)
    events, error = await collect(provider, request("think15-n1-gap100"))
    await provider.aclose()
    assert error is None
    assert len(events) == 2


async def test_a_port_where_nobody_listens_is_an_error_to_retry() -> None:
    """Refused at once, not after the connect timeout."""
    async with FakeProvider() as server:
        url = server.base_url
    provider = OpenAICompatibleProvider.connect("acme", url, None, concurrency=1)
    _, error = await collect(provider, request("n1"))
    await provider.aclose()
    assert (type(error), error.retryable) == (ProviderError, True)


@pytest.mark.parametrize(
    "garbage", [b"\x00\x01\x02\r\n\r\n", b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\nbroken\r\n\r\n", b""]
)
async def test_a_host_that_speaks_no_http_is_an_error_to_retry(garbage: bytes) -> None:
    """Nothing of the client library's own errors gets out."""
    async with serving(garbage) as url:
        provider = OpenAICompatibleProvider.connect("acme", url, None, concurrency=1, timers=TIMERS)
        _, error = await collect(provider, request("m"))
        await provider.aclose()
    assert (type(error), error.retryable) == (ProviderError, True)


async def test_a_full_pool_is_a_timeout() -> None:
    """A call beyond the concurrency waits, and does not wait for ever."""
    async with FakeProvider() as server:
        transport = HttpTransport(server.base_url, headers={}, connections=1, connect_s=0.1)
        provider = OpenAICompatibleProvider("acme", transport)
        async with aclosing(provider.stream(request("n500-gap20"))) as first:
            await anext(first)
            _, error = await collect(provider, request("n1"))
        await provider.aclose()
    assert type(error) is ProviderTimeout


async def test_closing_the_provider_fails_its_calls(adapter: OpenAICompatibleProvider) -> None:
    """Those that run, and those that come later."""
    async with aclosing(adapter.stream(request("n500-gap20"))) as stream:
        await anext(stream)
        await adapter.aclose()
        with pytest.raises(OncewiseError):
            _ = [event async for event in stream]
    _, error = await collect(adapter, request("n1"))
    assert isinstance(error, ProviderError)


async def test_the_body_of_an_error_is_not_read_without_end() -> None:
    """A status is enough; neither its body nor the wait for it can be endless."""
    head = b"HTTP/1.1 503 No\r\ncontent-type: text/plain\r\nretry-after: 3\r\ncontent-length: 99999999\r\n\r\n"
    for body in (b"x" * (1 << 20), b""):
        begun_s = time.monotonic()
        async with serving(head + body) as url:
            provider = OpenAICompatibleProvider.connect("acme", url, None, concurrency=1)
            _, error = await collect(provider, request("m"))
            await provider.aclose()
        assert (type(error), error.retry_after_s) == (ProviderUnavailable, 3.0)
        assert time.monotonic() - begun_s < 2


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded.name)
async def test_a_recorded_stream_means_the_same_over_a_socket(fake: FakeProvider, recorded: Recorded) -> None:
    """One byte to a chunk of the body: the finest a network can cut."""
    fake.raw["recorded"] = [bytes([byte]) for byte in recorded.body]
    quirks = CATALOGUE[recorded.provider].quirks
    provider = OpenAICompatibleProvider.connect("acme", fake.base_url, None, concurrency=1, quirks=quirks)
    events, error = await collect(provider, request("recorded"))
    await provider.aclose()
    assert error is None
    assert "".join(event.text for event in events[:-1]) == recorded.text
    assert events[-1] == recorded.completion


@asynccontextmanager
async def serving(answer: bytes) -> AsyncIterator[str]:
    """A server that sends these bytes to whoever connects, and then waits; with none it hangs up."""
    writers = []

    async def answer_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await reader.read(100)
        writer.write(answer)
        if not answer:
            writer.close()

    server = await asyncio.start_server(answer_one, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    server.close()
    for writer in writers:
        writer.transport.abort()
    await server.wait_closed()
