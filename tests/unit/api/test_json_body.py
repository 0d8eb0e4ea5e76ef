"""Strict JSON, and the memory of what was read."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncewise.api.json_body import BodyCache, parse_json
from oncewise.errors import InvalidRequest, MalformedJson, OncewiseError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(VALUES, st.booleans())
def test_what_json_can_say_is_read_as_it_was(value, ascii_only):
    """Escaped or not."""
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=200))
def test_no_bytes_make_anything_but_a_value_or_a_deliberate_error(body):
    """Whatever is taken is JSON to the standard library too."""
    try:
        value = parse_json(body)
    except OncewiseError:
        return
    assert json.loads(body) == value


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b'{"a":1,}',
        b'{"a":1} {"b":2}',
        b'{"a":1}x',
        b"{'a':1}",
        b'\xef\xbb\xbf{"a":1}',
        '{"a":1}'.encode("utf-16"),
        b'"\xff"',
        b'"\xc0\xaf"',
        b'"\xed\xa0\x80"',
        b'"\x01"',
        b'"\x00"',
        b"NaN",
        b"[Infinity]",
        b'{"a":-Infinity}',
        b"1e999",
        b"-1e999",
        b"9223372036854775808",
        b"-9223372036854775809",
        b"1" * 5000,
        b'{"a":1,"a":1}',
        b'{"b":[{"a":1,"\\u0061":2}]}',
        b"[" * 65 + b"]" * 65,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"01",
        b"+1",
        b".5",
        b"0x10",
    ],
)
def test_anything_else_is_malformed(body):
    """One meaning only, whichever parser reads it."""
    with pytest.raises(MalformedJson):
        parse_json(body)


@pytest.mark.parametrize("body", [b'"\\ud800"', b'"\\udc00\\ud800"', b'"a\\u0000"', b'{"\\u0000":1}', b'[["\\uDFFF"]]'])
def test_text_that_nobody_can_store_is_invalid(body):
    """It is JSON, so the status is 422."""
    with pytest.raises(InvalidRequest):
        parse_json(body)


def test_the_edges_are_taken():
    """64 levels, the 64-bit integers, an escaped pair."""
    assert parse_json(b"[" * 64 + b"]" * 64)
    assert parse_json(b"[9223372036854775807,-9223372036854775808]") == [2**63 - 1, -(2**63)]
    assert parse_json(b'"\\ud83d\\ude00"') == "😀"


def test_equal_bodies_are_read_once():
    """5,000 equal requests cost one validation."""
    read = []
    cache = BodyCache(lambda body: read.append(body) or len(body))

    assert [cache(b"abc") for _ in range(5000)] == [3] * 5000
    assert read == [b"abc"]


def test_the_memory_of_bodies_is_bounded_by_their_bytes():
    """The least recently used go; a large one is not kept at all."""
    read = []
    cache = BodyCache(lambda body: read.append(body) or body, max_bytes=160)
    for body in (b"a" * 10, b"b" * 10, b"a" * 10):
        cache(body)
    for index in range(15):
        cache(b"%010d" % index)
    cache(b"x" * 11)

    assert cache.bytes == 160
    assert len(read) == 18
    cache(b"a" * 10)
    assert len(read) == 18
    cache(b"b" * 10)
    assert len(read) == 19


def test_a_refusal_is_not_remembered():
    """Only values are."""
    cache = BodyCache(parse_json)
    for _ in range(2):
        with pytest.raises(MalformedJson):
            cache(b"{")
    assert cache.bytes == 0
