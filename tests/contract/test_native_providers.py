"""Anthropic's and Gemini's wires over a socket: what is broken there, what is odd but whole, and where the key goes."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from oncewise.errors import OncewiseError, ProviderError, ProviderProtocolError, ProviderTimeout
from oncewise.ports import Completion, TextDelta
from oncewise.providers.anthropic import AnthropicProvider
from oncewise.providers.call import Timers
from oncewise.providers.gemini import GeminiProvider
from oncewise.providers.native import NativeProvider
from tests.contract.test_providers import KEY, PROMPT, TIMERS, collect, request
from tests.support.fake_provider import FakeProvider

KINDS = [AnthropicProvider, GeminiProvider]


@pytest.fixture
async def fake() -> AsyncIterator[FakeProvider]:
    async with FakeProvider() as server:
        yield server


@pytest.fixture(params=KINDS)
async def adapter(request: pytest.FixtureRequest, fake: FakeProvider) -> AsyncIterator[NativeProvider]:
    provider = request.param.connect("acme", fake.base_url, KEY, concurrency=4, timers=TIMERS)
    yield provider
    await provider.aclose()


@pytest.mark.parametrize(
    ("model", "expected", "retryable", "texts"),
    [
        ("reset", ProviderError, True, 0),
        ("redirect", ProviderError, False, 0),
        ("err401", ProviderError, False, 0),
        ("err422", ProviderError, False, 0),
        ("err529", ProviderError, True, 0),
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
        ("n3-cut3", ProviderProtocolError, True, 3),
        ("n2-badjson", ProviderProtocolError, True, 2),
        ("n2-badutf8", ProviderProtocolError, True, 2),
        ("n2-arrayjson", ProviderProtocolError, True, 2),
        ("n2-errinstream", ProviderError, True, 2),
        ("hugeevent", ProviderProtocolError, False, 0),
        ("n9-tok900000", ProviderProtocolError, False, 4),
    ],
)
async def test_what_is_broken_on_the_wire_is_found(
    adapter: NativeProvider,
    fake: FakeProvider,
    model: str,
    expected: type[OncewiseError],
    retryable: bool,
    texts: int,
) -> None:
    """Each as one call, with the text that came before, and the connection given up."""
    events, error = await collect(adapter, request(model))
    assert error is not None
    assert (type(error), error.retryable) == (expected, retryable)
    assert len(events) == texts
    assert fake.count == 1
    assert KEY not in repr(error)
    assert PROMPT not in repr(error)
    await asyncio.wait_for(fake.calls[-1].ended.wait(), 1)


async def test_anthropics_last_event_is_needed(fake: FakeProvider) -> None:
    """A stop reason alone is not the end: figures and text may be missing."""
    provider = AnthropicProvider.connect("acme", fake.base_url, KEY, concurrency=1, timers=TIMERS)
    _, error = await collect(provider, request("n2-nodone"))
    await provider.aclose()
    assert (type(error), error and error.retryable) == (ProviderProtocolError, True)


@pytest.mark.parametrize(
    "model",
    [
        "n3-close", "n3-cronly", "n3-crlf", "n3-bom", "n3-split1-u2028", "n3-dup", "n3-reasoning", "n3-think2",
        "n3-oddfinish",
    ],
)  # fmt: skip
async def test_what_is_odd_but_whole_is_an_answer(adapter: NativeProvider, model: str) -> None:
    """Three deltas and a finish reason, however they come."""
    events, error = await collect(adapter, request(model))
    assert error is None
    assert [type(event) for event in events] == [TextDelta] * 3 + [Completion]


@pytest.mark.parametrize(
    ("model", "timers", "detail"),
    [
        ("pings", Timers(first_token_s=0.3), "begin"),
        ("n9-stall0", Timers(first_token_s=0.3), "begin"),
        ("n9-stall2", Timers(between_tokens_s=0.3), "silent"),
        ("n999-gap20", Timers(total_s=0.6), "end"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
async def test_each_timer_ends_a_call_that_takes_too_long(
    kind: type[NativeProvider], fake: FakeProvider, model: str, timers: Timers, detail: str
) -> None:
    """Neither comments nor the head of an answer are tokens."""
    provider = kind.connect("acme", fake.base_url, KEY, concurrency=1, timers=timers)
    _, error = await collect(provider, request(model))
    await asyncio.wait_for(fake.calls[-1].ended.wait(), 1)
    await provider.aclose()
    assert (type(error), error and error.retryable) == (ProviderTimeout, True)
    assert error is not None
    assert detail in error.detail


@pytest.mark.parametrize("kind", KINDS)
async def test_thinking_is_a_sign_of_life(kind: type[NativeProvider], fake: FakeProvider) -> None:
    """A model that thinks for longer than the first token may take is not given up."""
    timers = Timers(first_token_s=0.5, between_tokens_s=0.5)
    provider = kind.connect("acme", fake.base_url, KEY, concurrency=1, timers=timers)
    events, error = await collect(provider, request("think9-gap100-n1"))
    await provider.aclose()
    assert error is None
    assert len(events) == 2


@pytest.mark.parametrize(
    ("kind", "header", "value"),
    [
        (AnthropicProvider, "x-api-key", KEY),
        (AnthropicProvider, "anthropic-version", "2023-06-01"),
        (GeminiProvider, "x-goog-api-key", KEY),
    ],
)
async def test_the_key_travels_in_its_header_only(
    kind: type[NativeProvider], fake: FakeProvider, header: str, value: str
) -> None:
    """Not in the URL, not in the body, not in another provider's header."""
    provider = kind.connect("acme", fake.base_url, KEY, concurrency=1, timers=TIMERS)
    await collect(provider, request("n1"))
    await provider.aclose()
    call = await fake.call(1)
    assert call.headers[header] == value
    assert [name for name, found in call.headers.items() if KEY in found] in (["x-api-key"], ["x-goog-api-key"])
    assert KEY.encode() not in call.body
    assert KEY not in call.url


async def test_a_connection_is_used_again_after_a_whole_answer(adapter: NativeProvider, fake: FakeProvider) -> None:
    """Three calls, one handshake."""
    for _ in range(3):
        _, error = await collect(adapter, request("n2"))
        assert error is None
    assert fake.stats()["connections"] == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_does_not_wait_for_a_body_that_never_ends(
    kind: type[NativeProvider], fake: FakeProvider
) -> None:
    """What follows the end is of no interest; what follows a finish reason is waited for a moment only."""
    begun = (
        'data: {"type":"message_start","message":{"id":"m","model":"c"}}\n\n'
        'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"x"}}\n\n'
        'data: {"type":"message_delta","delta":{"stop_reason":"end_turn"}}\n\ndata: {"type":"message_stop"}\n\n'
        if kind is AnthropicProvider
        else 'data: {"candidates":[{"content":{"parts":[{"text":"x"}]},"finishReason":"STOP"}]}\n\n'
    )
    body = begun.encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 9999\r\n\r\n"
        writer.write(head + body)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    timers = Timers(between_tokens_s=20, tail_s=20 if kind is AnthropicProvider else 0.3)
    provider = kind.connect("acme", url, None, concurrency=1, timers=timers)
    begun_s = time.monotonic()
    events, error = await collect(provider, request("m"))
    await provider.aclose()
    server.close()
    await server.wait_closed()
    assert error is None
    assert len(events) == 2
    assert time.monotonic() - begun_s < 5
