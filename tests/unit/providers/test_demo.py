"""The provider without a key: deterministic, limited, and broken on request."""

import contextlib
import itertools

import pytest

from oncewise.errors import OncewiseError, ProviderError, ProviderRateLimited, ProviderTimeout
from oncewise.model import ChatMessage, ChatRequest
from oncewise.ports import Completion, TextDelta
from oncewise.providers.demo import DemoProvider


class Time:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic_s(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def demo(time: Time, **settings: object) -> DemoProvider:
    return DemoProvider(monotonic_s=time.monotonic_s, sleep=time.sleep, **settings)


def ask(content: str = "Why?", model: str = "demo") -> ChatRequest:
    return ChatRequest("demo", model, (ChatMessage("user", content),))


async def text(provider: DemoProvider, request: ChatRequest) -> str:
    return "".join([event.text async for event in provider.stream(request) if isinstance(event, TextDelta)])


async def test_the_same_request_gets_the_same_answer() -> None:
    """From any instance; another prompt gets another one."""
    first = await text(demo(Time()), ask())
    assert first == await text(demo(Time()), ask())
    assert first != await text(demo(Time()), ask("Why not?"))
    assert "Why?" in first
    assert not first.isascii()


async def test_the_whole_answer_takes_the_latency() -> None:
    """The first token after 40 % of it, the last event at its end."""
    time = Time()
    provider = demo(time, latency_ms=5000)
    times = [(time.now_s - 100, event) async for event in provider.stream(ask())]
    assert times[0][0] == pytest.approx(2.0)
    assert times[-1][0] == pytest.approx(5.0)
    assert isinstance(times[-1][1], Completion)
    gaps = [later - sooner for (sooner, _), (later, _) in itertools.pairwise(times[:-1])]
    assert max(gaps) == pytest.approx(min(gaps))


@pytest.mark.parametrize(("model", "latency_s"), [("demo-fast", 0.05), ("demo-lat-250", 0.25), ("demo-lat-500", 0.5)])
async def test_the_model_name_sets_the_pace(model: str, latency_s: float) -> None:
    """500 after `lat` is a latency, not a status."""
    time = Time()
    await text(demo(time), ask(model=model))
    assert time.now_s - 100 == pytest.approx(latency_s)


async def test_only_names_of_its_own_are_scripts() -> None:
    """A real model's name may hold any word; the constructor's script goes for those."""
    time = Time()
    await text(demo(time, latency_ms=900), ask(model="grok-4-fast-500"))
    assert time.now_s - 100 == pytest.approx(0.9)
    with pytest.raises(ProviderError):
        await text(demo(time, script="500"), ask(model="sonar"))


async def test_it_refuses_calls_beyond_its_rate() -> None:
    """One a second: the second one at once is refused and told when to come; then it is served."""
    time = Time()
    provider = demo(time, rps=1.0, latency_ms=0)
    await text(provider, ask())
    time.now_s += 0.25
    with pytest.raises(ProviderRateLimited) as caught:
        await text(provider, ask())
    assert caught.value.retry_after_s == pytest.approx(0.75)
    time.now_s += caught.value.retry_after_s
    await text(provider, ask())
    assert provider.calls == 3


@pytest.mark.parametrize(("rps", "served"), [(1.0, 10), (2.0, 20), (0.5, 5), (None, 1000)])
async def test_its_rate_holds_over_time(rps: float | None, served: int) -> None:
    """A caller who tries every hundredth of a second for ten is served at the rate, within its tolerance."""
    time = Time()
    provider = demo(time, rps=rps, latency_ms=0)
    good = 0
    for _ in range(1000):
        with contextlib.suppress(ProviderRateLimited):
            good += bool(await text(provider, ask()))
        time.now_s = round(time.now_s + 0.01, 2)
    assert served <= good <= served * 1.1 + 1


async def test_a_call_exactly_on_the_rate_is_served_although_clocks_jitter() -> None:
    """A pacer that keeps to the second is not refused for a few milliseconds."""
    time = Time()
    provider = demo(time, rps=1.0, latency_ms=0)
    for _ in range(3):
        await text(provider, ask())
        time.now_s += 0.98


@pytest.mark.parametrize(
    ("model", "code", "retryable"),
    [
        ("demo-429", "provider_rate_limited", True),
        ("demo-500", "provider_error", True),
        ("demo-400", "provider_error", False),
        ("demo-cut-3", "provider_protocol", True),
        ("demo-empty", "provider_protocol", True),
        ("demo-nofinish", "provider_protocol", True),
        ("demo-hang", "provider_timeout", True),
    ],
)
async def test_it_fails_on_request(model: str, code: str, retryable: bool) -> None:
    """Each failure as a real provider's adapter would tell it."""
    with pytest.raises(OncewiseError) as caught:
        await text(demo(Time()), ask(model=model))
    assert (caught.value.code, caught.value.retryable) == (code, retryable)


async def test_hanging_ends_with_the_first_token_timer() -> None:
    """After 30 s, as with any provider."""
    time = Time()
    with pytest.raises(ProviderTimeout):
        await text(demo(time), ask(model="demo-hang"))
    assert time.now_s - 100 == 30


async def test_an_empty_prompt_is_answered_too() -> None:
    """It says nothing about what was asked."""
    provider = demo(Time())
    assert await text(provider, ChatRequest("demo", "demo", ()))
    assert provider.running == 0
