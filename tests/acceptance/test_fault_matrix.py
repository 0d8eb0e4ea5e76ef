"""Every way a provider fails, on every surface: how often it is called, what callers are told, and what is stored.

Each row of `ROWS` is played four times, as JSON and as a stream, in a thread and on `/v1`, over sockets on both sides.
Three requests ask for the same at once; the provider is called when all of them are there. They must be told the same,
and nothing that broke may be told or stored as an answer.
"""

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio

from oncewise.api.errors import STATUS
from oncewise.api.limits import Limits
from oncewise.core.breaker import BreakerRules, Breakers
from oncewise.core.pacing import Pacer
from oncewise.core.retry import RetryBudget
from oncewise.ports import Provider
from oncewise.providers.call import Timers
from oncewise.providers.openai_compatible import OpenAICompatibleProvider
from oncewise.service.attempts import ProviderLane
from oncewise.settings import ProviderSettings
from tests.support.fake_provider import FakeProvider
from tests.support.http import Reply, Site, read_events, serve
from tests.support.v1 import chat, chunks_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

CALLERS = 3
KEY = "sk-very-secret"
PATIENT = Timers(first_token_s=20.0, between_tokens_s=20.0, total_s=60.0, tail_s=0.3)
SHORT = {
    "first token": Timers(first_token_s=0.15, between_tokens_s=20.0, total_s=60.0),
    "between tokens": Timers(first_token_s=20.0, between_tokens_s=0.15, total_s=60.0),
    "total": Timers(first_token_s=20.0, between_tokens_s=20.0, total_s=0.3),
}
numbers = itertools.count()


@dataclass(frozen=True)
class Row:
    """One way to fail, or to be odd and good, and what becomes of it.

    Attributes:
        script: The fake provider's switches.
        calls: Requests the provider sees.
        code: None for a good answer.
        texts: Deltas that callers may see before the failure, or of the good answer.
        retry_after: The header, where the status has one.
        timer: Which one is short.
        finish: The finish reason of a good answer.
        gaps_s: Seconds that must lie between the calls at least.
    """

    what: str
    script: str
    calls: int
    code: str | None = None
    texts: int = 0
    retryable: bool = True
    retry_after: str | None = None
    timer: str | None = None
    finish: str = "stop"
    gaps_s: float = 0.0


PROTOCOL, ERROR, LIMITED = "provider_protocol", "provider_error", "provider_rate_limited"
TIMEOUT, UNAVAILABLE = "provider_timeout", "provider_unavailable"

ROWS = [
    # Refused before anything was said.
    Row("429, then an answer, and its Retry-After", "n3-err429-first1-retryafter1", 2, texts=3, gaps_s=1.0),
    Row("429 without Retry-After, then an answer", "n3-err429-first1-noretryafter", 2, texts=3, gaps_s=1.0),
    Row("429 for longer than anybody waits", "err429-retryafter200", 1, LIMITED, retry_after="200"),
    Row("500 for good", "err500", 3, ERROR),
    Row("500 twice, then an answer", "n3-err500-first2", 3, texts=3),
    Row("503 for longer than anybody waits", "err503-retryafter9999", 1, UNAVAILABLE, retry_after="9999"),
    Row("503 and its Retry-After, then an answer", "n3-err503-first1-retryafter1", 2, texts=3, gaps_s=1.0),
    Row("529 for good", "err529", 3, ERROR),
    Row("400", "err400", 1, ERROR, retryable=False),
    Row("401", "err401", 1, ERROR, retryable=False),
    Row("404", "err404", 1, ERROR, retryable=False),
    Row("422", "err422", 1, ERROR, retryable=False),
    Row("a redirect", "redirect", 1, ERROR, retryable=False),
    Row("a reset before the head", "reset", 3, ERROR),
    # Success by its status, and no answer.
    Row("200 with a page", "html200", 3, PROTOCOL),
    Row("200 with JSON where a stream was asked for", "json200", 3, PROTOCOL),
    Row("a compressed body", "gzip-n3", 3, PROTOCOL),
    Row("an empty body", "empty", 3, PROTOCOL),
    Row("[DONE] alone", "doneonly", 3, PROTOCOL),
    Row("no choices", "nochoices", 3, PROTOCOL),
    Row("a finish reason without text", "n0", 3, PROTOCOL),
    Row("choices nobody asked for", "index1-n3", 3, PROTOCOL),
    # Broken off.
    Row("cut before the first delta", "n3-cut0", 3, PROTOCOL),
    Row("cut between two chunks", "n5-cut2", 1, PROTOCOL, texts=2),
    Row("cut inside a chunk", "n5-cut2-midchunk", 1, PROTOCOL, texts=2),
    Row("a clean end without a finish reason", "n3-nofinish-nodone", 1, PROTOCOL, texts=3),
    Row("the same, ended by the connection", "n3-nofinish-nodone-close", 1, PROTOCOL, texts=3),
    Row("[DONE] without a finish reason", "n3-nofinish", 1, PROTOCOL, texts=3),
    Row("a null finish reason", "n3-nullfinish", 1, PROTOCOL, texts=3),
    # Broken inside.
    Row("an event that is not JSON, first", "n0-badjson", 3, PROTOCOL),
    Row("an event that is not JSON", "n2-badjson", 1, PROTOCOL, texts=2),
    Row("an event that is no object", "n2-arrayjson", 1, PROTOCOL, texts=2),
    Row("bytes that are not UTF-8", "n2-badutf8", 1, PROTOCOL, texts=2),
    Row("an error object, first", "n0-errinstream", 3, ERROR),
    Row("an error object", "n2-errinstream", 1, ERROR, texts=2),
    Row("a delta of 20 MB", "n1-tok20000000", 1, PROTOCOL, retryable=False),
    Row("an answer of more than 4 MiB", "n9-tok900000", 1, PROTOCOL, texts=4, retryable=False),
    # Too late.
    Row("silence before the head", "hang", 3, TIMEOUT, timer="first token"),
    Row("silence after the head", "n9-stall0", 3, TIMEOUT, timer="first token"),
    Row("comments only", "pings", 3, TIMEOUT, timer="first token"),
    Row("deltas without text only", "emptydeltas", 3, TIMEOUT, timer="first token"),
    Row("silence between tokens", "n9-stall2", 1, TIMEOUT, texts=2, timer="between tokens"),
    Row("an answer without end", "n9999-gap10", 1, TIMEOUT, texts=1, timer="total"),
    # Odd, and an answer.
    Row("plain", "n3", 1, texts=3),
    Row("withheld in the middle", "n3-filter", 1, texts=3, finish="content_filter"),
    Row("at the end of its tokens", "n3-length", 1, texts=3, finish="length"),
    Row("a byte at a time", "n3-split1-u2028", 1, texts=3),
    Row("line ends inside JSON", "n3-u2028", 1, texts=3),
    Row("no [DONE]", "n3-nodone", 1, texts=3),
    Row("ended by the connection", "n3-close", 1, texts=3),
    Row("text after [DONE]", "n3-afterdone", 1, texts=3),
    Row("lines that end with CR, a byte order mark", "n3-cronly-bom", 1, texts=3),
]


@dataclass
class Told:
    """What one caller was told.

    Attributes:
        text: Of the answer, or of the part of it that was shown.
        retryable: None where the wire has no place for it.
        whole: Whether it looks like a whole answer.
    """

    status: int
    code: str | None = None
    text: str = ""
    retryable: bool | None = None
    retry_after: str | None = None
    finish: str | None = None
    whole: bool = False
    body: bytes = field(default=b"", compare=False)


class Gate:
    """A `StartLimiter` that lets nothing start before the test says so."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def reserve(self) -> float:
        await self.open.wait()
        return 0.0

    async def give_back(self) -> None:
        """Nothing to do."""


@dataclass
class Stage:
    """A server in front of the fake provider, with an adapter for each set of timers."""

    site: Site
    fake: FakeProvider
    adapters: dict[str | None, Provider]
    gate: Gate = field(default_factory=Gate)
    thread: str = ""
    content: str = "Hello"

    async def set_up(self, timer: str | None, breakers: Breakers | None = None) -> None:
        """A new lane, that nothing has happened on, and a new thread."""
        self.fake.reset()
        self.gate = Gate()
        pacer = Pacer(self.gate, concurrency=50)
        adapter = self.adapters[timer]
        lane = ProviderLane(adapter, pacer, "m", RetryBudget(share=100.0), breakers=breakers or Breakers("openai"))
        self.site.services.turns.calls.lanes["openai"] = lane
        self.thread = await self.site.thread()
        self.content = f"Hello {next(numbers)}"

    async def waiting(self, flights: Any) -> None:
        """Wait until all callers share one flight, then let it start."""
        async with asyncio.timeout(5):
            while flights.stats().waiters < CALLERS:
                await asyncio.sleep(0.002)
        assert flights.stats().flights == 1
        self.gate.open.set()

    async def ask(self, surface: "Surface", model: str) -> list[Told]:
        """What the callers are told who ask for the same."""
        asked = [asyncio.create_task(surface.ask(self, model)) for _ in range(CALLERS)]
        services = self.site.services
        await self.waiting(services.turns.flights if surface.stores else services.completions.flights)
        return await asyncio.gather(*asked)

    async def stored(self) -> list[tuple[str, str, str]]:
        reply = await self.site.ask("GET", f"/api/threads/{self.thread}")
        return [(message["role"], message["status"], message["content"]) for message in reply.json()["messages"]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with FakeProvider() as fake:
        timers = {None: PATIENT, **SHORT}
        adapters = {
            name: OpenAICompatibleProvider.connect("openai", fake.base_url, KEY, concurrency=50, timers=chosen)
            for name, chosen in timers.items()
        }
        settings = ProviderSettings(name="openai", base_url=fake.base_url, default_model="m")
        folder = tmp_path_factory.mktemp("matrix")
        async with serve(folder, limits=Limits(hold_s=20.0), providers={"openai": settings}) as site:
            # Retries at once: how long they wait is looked at in virtual time.
            site.services.turns.calls.chance = site.services.completions.chance = lambda: 0.0
            yield Stage(site, fake, adapters)
        for adapter in adapters.values():
            await adapter.aclose()


# -- the surfaces ------------------------------------------------------------------------------------------------


def problem(reply: Reply) -> Told:
    document = reply.json()
    return Told(
        reply.status,
        document["code"],
        retryable=document["retryable"],
        retry_after=reply.headers.get("retry-after"),
        body=reply.body,
    )


async def thread_json(stage: Stage, model: str) -> Told:
    reply = await stage.site.say(stage.thread, stage.content, provider="openai", model=model)
    if reply.status != 200:
        return problem(reply)
    answer = reply.json()["assistant_message"]
    return Told(200, text=answer["content"], finish=None, whole=answer["status"] == "complete", body=reply.body)


async def thread_stream(stage: Stage, model: str) -> Told:
    reply = await stage.site.stream(stage.thread, stage.content, provider="openai", model=model)
    if reply.status != 200:
        return problem(reply)
    events = read_events(reply.body)
    text = "".join(event.data["delta"] for event in events if event.name == "delta")
    last = events[-1]
    assert [event.name for event in events].count("done") + [event.name for event in events].count("error") == 1
    if last.name == "error":
        assert (last.data["state"], last.data["partial_chars"]) == ("failed", len(text))
        return Told(200, last.data["code"], text, last.data["retryable"])
    return Told(200, text=text, finish=last.data["reason"], whole=last.data["state"] == "completed")


def refusal(reply: Reply) -> Told:
    return Told(
        reply.status,
        reply.json()["error"]["code"],
        retryable=reply.headers.get("x-should-retry") != "false",
        retry_after=reply.headers.get("retry-after"),
        body=reply.body,
    )


async def v1(stage: Stage, model: str, *, stream: bool) -> Reply:
    body = chat(f"openai/{model}", stage.content, stream=stream)
    headers = [("content-type", "application/json")]
    return await stage.site.ask("POST", "/v1/chat/completions", body, headers)


async def v1_json(stage: Stage, model: str) -> Told:
    reply = await v1(stage, model, stream=False)
    if reply.status != 200:
        return refusal(reply)
    (choice,) = reply.json()["choices"]
    return Told(200, text=choice["message"]["content"], finish=choice["finish_reason"], whole=True, body=reply.body)


async def v1_stream(stage: Stage, model: str) -> Told:
    reply = await v1(stage, model, stream=True)
    if reply.status != 200:
        return refusal(reply)
    chunks = chunks_of(reply)
    said = [chunk["choices"][0] for chunk in chunks if chunk != "[DONE]" and "error" not in chunk]
    text = "".join(choice["delta"].get("content") or "" for choice in said)
    finishes = [choice["finish_reason"] for choice in said if choice["finish_reason"]]
    if chunks[-1] != "[DONE]":
        assert finishes == [] or chunks[-1]["error"]["code"] == PROTOCOL
        return Told(200, chunks[-1]["error"]["code"], text)
    return Told(200, text=text, finish=finishes[-1], whole=True)


@dataclass(frozen=True)
class Surface:
    """One way to ask.

    Attributes:
        stores: Whether it stores what it is told.
        streams: Whether it shows an answer as it comes.
    """

    name: str
    ask: Callable[[Stage, str], Awaitable[Told]]
    stores: bool
    streams: bool


SURFACES = [
    Surface("thread-json", thread_json, stores=True, streams=False),
    Surface("thread-stream", thread_stream, stores=True, streams=True),
    Surface("v1-json", v1_json, stores=False, streams=False),
    Surface("v1-stream", v1_stream, stores=False, streams=True),
]


# -- the matrix --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surface", SURFACES, ids=lambda surface: surface.name)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
async def test_every_failure_on_every_surface(stage: Stage, row: Row, surface: Surface) -> None:
    """The calls, what all callers are told, and what is stored, as the row says."""
    await stage.set_up(row.timer)

    told = await stage.ask(surface, row.script)

    assert stage.fake.count == row.calls
    starts = [call.started_s for call in stage.fake.calls]
    assert all(later - sooner >= row.gaps_s for sooner, later in itertools.pairwise(starts))
    assert told == [told[0]] * CALLERS
    check_told(row, surface, told[0])
    if surface.stores:
        check_stored(row, told[0], await stage.stored())


def check_told(row: Row, surface: Surface, told: Told) -> None:
    assert told.code == row.code
    assert told.whole is (row.code is None)
    if row.code is None:
        assert told.status == 200
        assert told.text.count("@") == 2 * row.texts
        assert "after the end" not in told.text
        assert told.finish in (None, row.finish)
    elif surface.streams and row.texts:
        # Shown text stays: the failure is told after it.
        assert told.status == 200
        assert told.text.count("@") >= 2 * row.texts
        assert told.retryable in (None, row.retryable)
    else:
        assert (told.status, told.text) == (STATUS[row.code], "")
        assert (told.retryable, told.retry_after) == (row.retryable, row.retry_after)
        assert KEY.encode() not in told.body


def check_stored(row: Row, told: Told, stored: list[tuple[str, str, str]]) -> None:
    if row.code is None:
        assert [each[:2] for each in stored] == [("user", "complete"), ("assistant", "complete")]
        assert stored[1][2] == told.text
    elif row.texts:
        assert [each[:2] for each in stored] == [("user", "complete"), ("assistant", "partial")]
        assert stored[1][2].startswith(told.text)
    else:
        assert stored == []


@pytest.mark.parametrize("surface", SURFACES, ids=lambda surface: surface.name)
async def test_what_broke_is_never_an_answer_later(stage: Stage, surface: Surface) -> None:
    """The same request again is a new call, and the part that was shown before is in no prompt."""
    await stage.set_up(None)
    broken = await stage.ask(surface, "n3-nofinish-nodone")
    again = await surface.ask(stage, "n3-nofinish-nodone")
    assert (stage.fake.count, again.code) == (2, broken[0].code)
    good = await surface.ask(stage, "n2")
    assert good.whole
    sent = (await stage.fake.call(3)).request["messages"]
    assert sent == [{"role": "user", "content": stage.content}]


@pytest.mark.parametrize("surface", SURFACES, ids=lambda surface: surface.name)
async def test_nobody_listens_at_the_providers_address(stage: Stage, surface: Surface) -> None:
    """Refused at once, three times; then all are told."""
    async with FakeProvider() as gone:
        url = gone.base_url
    adapter = OpenAICompatibleProvider.connect("openai", url, None, concurrency=3)
    stage.adapters["nobody"] = adapter
    await stage.set_up("nobody")
    told = await stage.ask(surface, "n1")
    await adapter.aclose()
    assert told == [told[0]] * CALLERS
    assert (told[0].status, told[0].code, told[0].retryable) == (502, ERROR, True)


@pytest.mark.parametrize("surface", SURFACES, ids=lambda surface: surface.name)
async def test_a_model_that_fails_is_refused_at_once_and_tried_again(stage: Stage, surface: Surface) -> None:
    """With 503, a time to come again, and no call; other models are called meanwhile."""
    rules = BreakerRules(open_s=0.5, longest_s=0.5)
    await stage.set_up(None, Breakers("openai", rules=rules))
    stage.gate.open.set()
    model = "n2-err500-first6"
    for _ in range(2):  # three attempts, then two more and it is open
        assert (await surface.ask(stage, model)).code == ERROR
    told = await surface.ask(stage, model)
    assert (told.status, told.code, told.retryable, told.retry_after) == (503, UNAVAILABLE, True, "1")
    assert stage.fake.count == 5
    assert (await surface.ask(stage, "n1")).whole
    assert await breakers_shown(stage) == {"open": 1.0, "half_open": 0.0, "held": 0.0}
    await asyncio.sleep(0.6)
    assert await breakers_shown(stage) == {"open": 0.0, "half_open": 1.0, "held": 0.0}
    assert (await surface.ask(stage, model)).code == ERROR  # the trial
    assert stage.fake.count == 7
    await asyncio.sleep(0.6)
    assert (await surface.ask(stage, model)).whole
    assert await breakers_shown(stage) == {"open": 0.0, "half_open": 0.0, "held": 0.0}


async def breakers_shown(stage: Stage) -> dict[str, float]:
    lines = (await stage.site.ask("GET", "/metrics")).body.decode().splitlines()
    found = (re.fullmatch(r'oncewise_breakers\{provider="openai",state="(\w+)"\} (\S+)', line) for line in lines)
    return {match[1]: float(match[2]) for match in found if match}
