"""What chunks add up to. The shapes of whole answers are in `tests/unit/service/test_completions.py`."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncewise.core.chunks import assembled
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
