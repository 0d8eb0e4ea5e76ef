"""What chunks add up to. The shapes of whole answers are in `tests/unit/service/test_completions.py`."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncewise.core.chunks import assembled, usage_of
from oncewise.model import Usage
from oncewise.ports import Chunk


def chunk(delta: dict[str, object], **choice: object) -> Chunk:
    return {"choices": [{"index": 0, "delta": delta, **choice}]}


def message_of(*deltas: dict[str, object]) -> dict[str, object]:
    document = assembled([chunk(delta) for delta in deltas], {})
    return document["choices"][0]["message"]


@given(
    st.lists(
        st.tuples(st.sampled_from(["content", "reasoning", "refusal"]), st.none() | st.text(max_size=3)), min_size=1
    )
)
def test_each_text_is_its_own_pieces_in_their_order(pieces: list[tuple[str, str | None]]) -> None:
    """Whatever comes between two of them, a null included."""
    message = message_of(*({name: piece} for name, piece in pieces))
    for name in {name for name, _ in pieces}:
        said = [piece for other, piece in pieces if other == name and piece is not None]
        assert message[name] == ("".join(said) if said else None)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["a", {"b": "c"}, {"b": "d"}], {"b": "cd"}),
        (["a", ["b"], ["c"]], ["b", "c"]),
        ([{"b": "c"}, "a", "b"], "ab"),
        ([{"b": "c"}, ""], {"b": "c"}),
        ([1, 2, ""], 2),
    ],
)
def test_a_field_that_changes_its_kind_begins_anew(values: list[object], expected: object) -> None:
    """The last kind counts; an empty text is none."""
    assert message_of(*({"field": value} for value in values))["field"] == expected


def test_a_long_answer_is_put_together_in_proportion() -> None:
    """20,000 deltas of 200 characters: adding each to what was before would copy 40 GB."""
    chunks = [chunk({"content": "x" * 200}) for _ in range(20_000)]
    begun_s = time.process_time()
    document = assembled(chunks, {})
    assert len(document["choices"][0]["message"]["content"]) == 4_000_000
    assert time.process_time() - begun_s < 2


@pytest.mark.parametrize(
    ("more", "cached", "written", "cost_usd"),
    [
        ({}, 0, 0, None),
        ({"prompt_tokens_details": {"cached_tokens": 40}}, 40, 0, None),
        ({"prompt_tokens_details": {"cached_tokens": 40, "cache_write_tokens": 20}, "cost": 0.5}, 40, 20, 0.5),
        ({"prompt_tokens_details": {"cached_tokens": 30}, "cache_creation_input_tokens": 50}, 30, 50, None),
        ({"prompt_cache_hit_tokens": 64}, 64, 0, None),
        ({"cached_tokens": 16}, 16, 0, None),
        # No more of the prompt than there is.
        ({"cached_tokens": 500, "cache_creation_input_tokens": 500}, 100, 0, None),
        ({"prompt_tokens_details": None, "cached_tokens": -1, "prompt_cache_hit_tokens": True}, 0, 0, None),
        ({"cost": {"total_cost": 0.25, "input_tokens_cost": 0.1}}, 0, 0, 0.25),
        ({"cost_in_usd_ticks": 318_319_000}, 0, 0, 0.0318319),
        ({"cost_in_usd_ticks": 318_319_000, "cost": 0}, 0, 0, 0.0),
        ({"cost_in_usd_ticks": "5"}, 0, 0, None),
        ({"cost": -1}, 0, 0, None),
        ({"cost": True}, 0, 0, None),
        ({"cost": float("nan")}, 0, 0, None),
    ],
)
def test_figures_are_read_by_the_names_that_providers_give_them(
    more: dict[str, Any], cached: int, written: int, cost_usd: float | None
) -> None:
    """Cached tokens of OpenAI, OpenRouter, Anthropic, DeepSeek, Moonshot; costs of OpenRouter, Perplexity, xAI."""
    usage, cost = usage_of({"usage": {"prompt_tokens": 100, "completion_tokens": 7, **more}})
    assert usage == Usage(100, 7)
    assert (usage.cached_tokens, usage.cache_write_tokens) == (cached, written)
    assert cost == (None if cost_usd is None else pytest.approx(cost_usd))


@pytest.mark.parametrize("tokens", [-1, True, "7", 2**30, 2**62])
def test_figures_that_cannot_be_are_none(tokens: Any) -> None:
    """Nor could they be stored, and the answer with them."""
    for name in ("prompt_tokens", "completion_tokens"):
        assert usage_of({"usage": {"prompt_tokens": 1, "completion_tokens": 1, name: tokens}}) == (None, None)
    most = {"prompt_tokens": 2**30 - 1, "completion_tokens": 2**30 - 1}
    assert usage_of({"usage": most})[0] == Usage(2**30 - 1, 2**30 - 1)
