"""Which requests on `/v1` share, and what their chunks add up to."""

import asyncio
import gc
import json
import weakref
from collections.abc import AsyncGenerator
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncewise.core.chunks import assembled
from oncewise.core.pacing import LocalLimiter, Pacer
from oncewise.core.retry import RetryBudget
from oncewise.core.stream_hub import StreamHub
from oncewise.errors import IdempotencyMismatch, ModelNotFound, ProviderError
from oncewise.model import CompletionRequest, Role
from oncewise.service.attempts import ProviderLane
from oncewise.service.completions import TRANSPORT, CompletionAsk, Completions, Wish
from oncewise.service.model_names import ModelNames
from oncewise.service.sharing import Policies, Policy

BODY = {"model": "p/m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
SAMPLED = {**BODY, "temperature": 1}


class Held:
    """Answers when told to; the calls in `failures` fail first."""

    name = "p"

    def __init__(self) -> None:
        self.calls = 0
        self.closed = asyncio.Event()
        self.go = asyncio.Event()
        self.started = asyncio.Event()
        self.failures = 0

    async def chunks(self, request: CompletionRequest) -> AsyncGenerator[dict[str, Any], None]:
        self.calls += 1
        self.started.set()
        try:
            yield {"id": "c", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
            if self.calls <= self.failures:
                raise ProviderError
            await self.go.wait()
            yield {"id": "d", "choices": [{"index": 0, "delta": {"content": "yes"}, "finish_reason": "stop"}]}
            yield {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "cost": 0.5}}
        finally:
            self.closed.set()


class Says:
    """Answers with the chunks it was given."""

    name = "p"

    def __init__(self, *chunks: dict[str, Any]) -> None:
        self.said = chunks

    async def chunks(self, request: CompletionRequest) -> AsyncGenerator[dict[str, Any], None]:
        for chunk in self.said:
            yield chunk


def choice(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish}


async def told(*chunks: dict[str, Any], **body: Any) -> list[dict[str, Any]]:
    """What viewers get of an answer, without what every chunk begins with."""
    desk = desk_of(Says(*chunks))
    ticket = desk.send("acme", ask({**BODY, **body}))
    await ticket.result()
    events = ticket.run.log.text.split("\n\n")[:-1]
    ticket.leave()
    await desk.aclose()
    read = [json.loads(event.removeprefix("data: ")) for event in events]
    head = ("id", "object", "created", "model")
    assert all({*head} <= chunk.keys() for chunk in read)
    return [{name: value for name, value in chunk.items() if name not in head} for chunk in read]


SAFE = Policies()


def desk_of(provider: Any = None, policies: Policies = SAFE, abandon_after_s: float = 5.0) -> Completions:
    clock_s = asyncio.get_running_loop().time if provider else lambda: 0.0
    lane = ProviderLane(provider, Pacer(LocalLimiter(1e6, 1000, clock_s), concurrency=50), "m", RetryBudget())
    ids = iter(range(10_000))
    return Completions(
        {"p": lane},
        ModelNames({"p": "m"}, default_provider="p", aliases={"short": "p/m"}),
        logs=StreamHub(retention_s=60.0),
        ids=lambda: f"call{next(ids)}",
        policies=policies,
        abandon_after_s=abandon_after_s,
        chance=lambda: 0.0,
        now_s=lambda: 7,
    )


def ask(body: dict[str, Any] = BODY, **fields: Any) -> CompletionAsk:
    return CompletionAsk("r1", MappingProxyType(body), **fields)


def key_of(body: dict[str, Any], org: str = "acme") -> Any:
    return desk_of().plan(org, ask(body)).body_key


@pytest.mark.parametrize(
    ("policy", "fields", "wish", "reason"),
    [
        ("safe", {}, "none", None),
        ("safe", {"temperature": 0}, "none", "temperature"),
        ("safe", {"temperature": 0.0}, "none", "temperature"),
        ("safe", {"temperature": False}, "none", None),
        ("safe", {"temperature": "0"}, "none", None),
        ("safe", {"seed": 0}, "none", "seed"),
        ("safe", {"seed": None}, "none", None),
        ("safe", {"temperature": 0}, "off", None),
        ("safe", {}, "on", "asked"),
        ("safe", {"temperature": 0, "n": 1}, "none", "temperature"),
        ("safe", {"temperature": 0, "n": 2}, "none", None),
        ("safe", {"n": 2}, "on", "asked"),
        ("always", {}, "none", "always"),
        ("always", {"n": 2}, "none", None),
        ("always", {}, "off", None),
        ("off", {"temperature": 0}, "on", None),
    ],
)
def test_what_shares_by_which_policy(policy: str, fields: dict[str, Any], wish: str, reason: str | None) -> None:
    """Asking a model twice on purpose must give two answers."""
    plan = desk_of(policies=Policies(Policy(policy))).plan(
        "acme", ask({"model": "p/m", "messages": [{}], **fields}, wish=Wish(wish))
    )
    assert (plan.reason if plan.key else None) == reason


def test_a_key_has_all_of_the_body_but_transport() -> None:
    """And the tenant, the provider and the model that a name stands for."""
    same = {name: {"anything": 1} for name in TRANSPORT}
    assert key_of({**BODY, **same}) == key_of(BODY)
    assert key_of({**BODY, "model": "short"}) == key_of(BODY)
    assert key_of(BODY, "other") != key_of(BODY)
    assert key_of({**BODY, "model": "p/n"}) != key_of(BODY)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.0, 1.0, 2.5, -0.0]) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)
BODIES = st.dictionaries(
    st.sampled_from(["a", "tools", "top_p", "stop", "n"]) | st.text(max_size=3), VALUES, max_size=4
)


@given(BODIES, BODIES)
def test_two_bodies_share_only_if_they_are_the_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Numbers of another type or spelling, another order in a list, a letter composed otherwise: all keep apart."""
    kept = [{name: value for name, value in body.items() if name not in (*TRANSPORT, "model")} for body in (one, two)]
    same = repr(sorted(kept[0].items())) == repr(sorted(kept[1].items()))
    if _ordered(kept[0]) != _ordered(kept[1]):
        assert key_of({**BODY, "x": kept[0]}) != key_of({**BODY, "x": kept[1]})
    elif same:
        assert key_of({**BODY, "x": kept[0]}) == key_of({**BODY, "x": kept[1]})


def _ordered(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{name!r}:{_ordered(value[name])}" for name in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_ordered, value)) + "]"
    return repr(value)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (1, 1.0),
        (1, True),
        (0, False),
        ("é", "e\u0301"),
        ("a", "a "),
        (["ab", "c"], ["a", "bc"]),
        (None, "null"),
        (1, "1"),
    ],
)
def test_values_that_look_alike_keep_apart(one: Any, two: Any) -> None:
    """`1`, `1.0` and `true`; NFC and NFD; a trailing space; a shifted border."""
    assert key_of({**BODY, "x": one}) != key_of({**BODY, "x": two})


def test_a_name_nobody_answers_to() -> None:
    """Is the caller's mistake, in the place where it is looked for."""
    with pytest.raises(ModelNotFound):
        key_of({**BODY, "model": "nobody/x"})


async def test_identical_requests_share_a_call_and_its_chunks() -> None:
    """One leads, the rest follow; the head of every chunk is the same, figures stay out of them."""
    provider = Held()
    desk = desk_of(provider)
    tickets = [desk.send("acme", ask()) for _ in range(3)]
    assert [ticket.role for ticket in tickets] == [Role.LEADER, Role.FOLLOWER, Role.FOLLOWER]
    provider.go.set()
    results = [await ticket.result() for ticket in tickets]
    assert provider.calls == 1
    assert results[0].head == {"id": "c", "object": "chat.completion.chunk", "created": 7, "model": "m"}
    assert (results[0].usage.total_tokens, results[0].cost_usd) == (3, 0.5)
    text = tickets[0].run.log.text
    assert text.count('"id":"c"') == text.count("data: ") == 2
    assert "usage" not in text
    for ticket in tickets:
        ticket.leave()
    await desk.aclose()
    assert desk.logs.stats().logs == 0


async def test_requests_that_do_not_share_each_have_a_call() -> None:
    """Even with equal bodies."""
    provider = Held()
    desk = desk_of(provider)
    tickets = [desk.send("acme", ask(SAMPLED)) for _ in range(2)]
    provider.go.set()
    for ticket in tickets:
        await ticket.result()
        assert ticket.role is Role.BYPASS
        ticket.leave()
    assert provider.calls == 2
    await desk.aclose()


async def test_a_retry_adopts_the_call_that_its_first_attempt_left() -> None:
    """And only that: while somebody waits for the call, its answer is theirs."""
    provider = Held()
    desk = desk_of(provider)
    first = desk.send("acme", ask(SAMPLED))
    await provider.started.wait()
    assert desk.send("acme", ask(SAMPLED, is_retry=True)).run is not first.run
    first.leave()
    assert desk.send("acme", ask(SAMPLED)).run is not first.run
    assert desk.send("other", ask(SAMPLED, is_retry=True)).run is not first.run
    assert desk.send("acme", ask({**SAMPLED, "x": 1}, is_retry=True)).run is not first.run
    adopted = desk.send("acme", ask(SAMPLED, is_retry=True))
    assert (adopted.run, adopted.role) == (first.run, Role.FOLLOWER)
    await desk.aclose()


async def test_a_call_is_cancelled_some_time_after_the_last_requester_left() -> None:
    """Somebody who comes back in time keeps it alive."""
    provider = Held()
    desk = desk_of(provider, abandon_after_s=0.05)
    ticket = desk.send("acme", ask())
    await provider.started.wait()
    ticket.leave()
    again = desk.send("acme", ask())
    await asyncio.sleep(0.1)
    assert again.run is ticket.run
    assert not provider.closed.is_set()
    again.leave()
    await asyncio.wait_for(provider.closed.wait(), 1)
    await desk.aclose()


async def test_an_idempotency_key_shares_and_belongs_to_one_request() -> None:
    """Without `temperature: 0` too; another body under it is refused while the first runs, and by nobody else."""
    provider = Held()
    desk = desk_of(provider)
    first = desk.send("acme", ask(SAMPLED, idempotency_key="k"))
    assert desk.send("acme", ask(SAMPLED, idempotency_key="k")).run is first.run
    assert desk.send("acme", ask(SAMPLED, idempotency_key="l")).run is not first.run
    with pytest.raises(IdempotencyMismatch):
        desk.send("acme", ask({**SAMPLED, "top_p": 1}, idempotency_key="k"))
    assert desk.send("other", ask({**SAMPLED, "top_p": 1}, idempotency_key="k")).run is not first.run
    await desk.aclose()
    assert not desk._keyed


async def test_a_failure_before_anything_was_shown_is_tried_again() -> None:
    """A role alone is nothing to see; it is held back until something follows."""
    provider = Held()
    provider.failures = 1
    provider.go.set()
    desk = desk_of(provider)
    ticket = desk.send("acme", ask())
    await ticket.result()
    assert provider.calls == 2
    assert ticket.run.log.text.count('"role"') == 1
    await desk.aclose()


async def test_a_request_dropped_before_its_first_step_leaves_nothing() -> None:
    """Its work never began; its log goes with it."""
    provider = Held()
    desk = desk_of(provider)
    ticket = desk.send("acme", ask())
    ticket.leave()
    await asyncio.sleep(0.01)
    assert ticket.run.log.closed
    assert (desk.logs.stats().logs, provider.calls) == (0, 0)
    await desk.aclose()


async def test_calls_that_nobody_waits_for_end_when_the_server_stops() -> None:
    """Nobody can come back to them, so the stop does not wait; those that are waited for go on until they are left."""
    provider = Held()
    desk = desk_of(provider)
    left = desk.send("acme", ask())
    await provider.started.wait()
    stays = desk.send("acme", ask(SAMPLED))
    while provider.calls < 2:
        await asyncio.sleep(0)
    left.leave()
    desk.drain()
    async with asyncio.timeout(1):
        await provider.closed.wait()
        assert desk.flights.stats().tasks == 1
        stays.leave()
        while desk.flights.stats().tasks:
            await asyncio.sleep(0.01)
    await desk.aclose()


async def test_every_choice_has_its_role_once() -> None:
    """Clients join repeated ones; a provider that sends none is helped out."""
    first, second = choice({"content": "a"}), choice({"role": "assistant", "content": "b"}, index=1)
    again = choice({"role": "assistant", "content": "c"}, "stop", index=1)
    seen = await told(
        {"choices": [first, second]}, {"choices": [again]}, {"choices": [choice({}, "stop")]}, n=2, seed=1
    )
    assert [each["delta"] for chunk in seen for each in chunk["choices"]] == [
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"content": "c"},
        {},
    ]


async def test_what_comes_without_a_choice_gets_an_empty_one() -> None:
    """Content filters before the first choice, citations after the last: clients look at `choices[0]` of all chunks."""
    text = {"citations": ["u"], "choices": [choice({"content": "a"}, "stop")]}
    seen = await told({"choices": [], "filters": [1]}, text, {"choices": [], "citations": ["u"], "found": 2})
    assert [chunk["choices"] for chunk in seen] == [
        [choice({})],
        [choice({"role": "assistant", "content": "a"}, "stop")],
        [choice({})],
    ]
    assert (seen[0]["filters"], seen[1]["citations"], seen[2]["found"]) == ([1], ["u"], 2)


async def test_figures_make_no_chunk_even_with_what_was_said_before() -> None:
    """OpenRouter and Perplexity repeat their extras in the chunk of figures, which only some callers want."""
    text = {"provider": "x", "choices": [choice({"content": "a"}, "stop")]}
    figures = {"prompt_tokens": 1, "completion_tokens": 1}
    assert len(await told(text, {"choices": [], "provider": "x", "usage": figures})) == 1


def test_chunks_add_up_to_a_completion() -> None:
    """Tool calls by index, logprobs in order, unknown fields kept."""
    function = {"name": "f", "arguments": '{"a"'}
    deltas = [
        {"role": "assistant", "content": "A", "reasoning_content": "h"},
        {"content": "B", "reasoning_content": "m"},
        {"tool_calls": [{"index": 0, "id": "t0", "type": "function", "function": function}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}, {"index": 1, "id": "t1", "function": {}}]},
    ]
    chunks = [
        {"id": "c", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta}]} for delta in deltas
    ]
    chunks[0]["choices"][0]["logprobs"] = {"content": [1]}
    chunks[1]["choices"][0]["logprobs"] = {"content": [2]}
    chunks.append({"citations": ["u"], "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    assert assembled(chunks, {"total_tokens": 3}) == {
        "id": "c",
        "object": "chat.completion",
        "citations": ["u"],
        "usage": {"total_tokens": 3},
        "choices": [
            {
                "index": 0,
                "finish_reason": "tool_calls",
                "logprobs": {"content": [1, 2]},
                "message": {
                    "role": "assistant",
                    "content": "AB",
                    "reasoning_content": "hm",
                    "tool_calls": [
                        {"id": "t0", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
                        {"id": "t1", "function": {}},
                    ],
                },
            }
        ],
    }


@pytest.mark.parametrize("body", [BODY, SAMPLED])
async def test_a_call_that_is_over_needs_no_collection(body: dict[str, Any]) -> None:
    """At thousands a second, collecting what refers to itself would stop the loop for 50 ms at a time."""
    gc.collect()
    gc.disable()
    try:
        desk = desk_of(Says({"choices": [choice({"content": "x"}, "stop")]}))
        with desk.send("acme", ask(body)) as ticket:
            completion = await ticket.result()
            ticket.run.document(completion)
        gone = weakref.ref(ticket.run)
        del ticket, completion
        await asyncio.sleep(0.01)
        assert gone() is None
        await desk.aclose()
    finally:
        gc.enable()
