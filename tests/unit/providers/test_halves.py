"""Characters that a provider cut in two."""

import json
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oncewise.providers.halves import Halves

TEXTS = st.text(st.sampled_from("a\u00e9\u2028\U0001f642\U0001f468\u200d\U0010ffff"), max_size=12)


def as_javascript_cuts_it(text: str, cuts: list[int]) -> list[str]:
    """Pieces of a text, cut between code units of UTF-16; a character beyond the first plane has two."""
    units = text.encode("utf-16-le")
    places = sorted({0, len(units), *(2 * cut for cut in cuts if 2 * cut < len(units))})
    pieces = [units[start:stop] for start, stop in pairwise(places)]
    return [piece.decode("utf-16-le", "surrogatepass") for piece in pieces]


@given(TEXTS, st.lists(st.integers(0, 24)), st.booleans())
@example("\U0001f642", [1], True)
@example("\U0001f642\U0001f642", [1, 2, 3], True)
def test_a_text_cut_anywhere_is_the_text(text: str, cuts: list[int], ascii_only: bool) -> None:
    """Each piece has whole characters only, and none is lost or changed."""
    halves, came = Halves(), []
    for piece in as_javascript_cuts_it(text, cuts):
        is_whole = piece.isascii() or not any("\ud800" <= char <= "\udfff" for char in piece)
        event = json.dumps({"choices": [{"delta": {"content": piece}}]}, ensure_ascii=ascii_only or not is_whole)
        came.append(halves.read(event)["choices"][0]["delta"]["content"])
        orjson.dumps(came)
    assert "".join(came) == text


def test_a_half_waits_at_its_place() -> None:
    """Two choices at once; events without text between, and other fields, do not disturb it."""
    halves = Halves()
    events: list[Any] = [
        {"a": "x\ud83d", "b": "y\ud83d", "n": 1},
        {"a": ""},
        {"usage": {"tokens": 3}, "b": "\ude43z"},
        {"a": "\ude42", "c": ["\ud83d"]},
        {"c": ["\ude44", 2.5, None, True]},
        {"a": "plain"},
    ]
    assert [halves.read(json.dumps(event)) for event in events] == [
        {"a": "x", "b": "y", "n": 1},
        {"a": ""},
        {"usage": {"tokens": 3}, "b": "\U0001f643z"},
        {"a": "\U0001f642", "c": [""]},
        {"c": ["\U0001f644", 2.5, None, True]},
        {"a": "plain"},
    ]


@pytest.mark.parametrize(
    "events",
    [
        ['{"a":"\\ude42"}'],
        ['{"a":"\\ud83dx"}'],
        ['{"a":"\\ud83d"}', '{"a":"x"}'],
        ['{"a":"\\ud83d"}', '{"a":"\\ud83d"}'],
        ['{"\\ud83d":1}'],
        ['{"a":"\\ud83d","b":NaN}'],
        ['{"a":"\\ud83d'],
        ['{"a":"\\ud83d","b":' + "[" * 100_000 + "]" * 100_000 + "}"],
        ["not JSON"],
    ],
)
def test_what_is_no_whole_text_is_refused(events: list[str]) -> None:
    """A half before other text, one without a first, and whatever else is not JSON."""
    *before, last = events
    halves = Halves()
    for event in before:
        halves.read(event)
    with pytest.raises(ValueError, match=r"."):
        halves.read(last)


def test_numbers_are_those_of_the_strict_reader() -> None:
    """So that they can be written again."""
    assert Halves().read('{"a":"\\ud83d","b":18446744073709551616}') == {"a": "", "b": 18446744073709551616.0}
