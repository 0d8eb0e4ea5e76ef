"""One spelling for equal requests, two for different ones."""

import json
import math
import unicodedata
from enum import Enum, StrEnum
from typing import Any

import pytest

from oncewise.core.keys import RequestKey, canonical, request_key
from oncewise.errors import InvalidRequest


@pytest.mark.parametrize(
    ("value", "spelling"),
    [
        (None, b"null"),
        (True, b"true"),
        (1, b"1"),
        (1.0, b"1.0"),
        (0.1, b"0.1"),
        (1e100, b"1e+100"),
        (-0.0, b"-0.0"),
        (2**70, b"1180591620717411303424"),
        ("", b'""'),
        ('é\n"\\\u2028', '"é\\n\\"\\\\\u2028"'.encode()),
        ("\U0001f600", '"\U0001f600"'.encode()),
        ([], b"[]"),
        ((1, [2]), b"[1,[2]]"),
        ({}, b"{}"),
        ({"b": 1, "a": {"d": 2, "c": None}}, b'{"a":{"c":null,"d":2},"b":1}'),
        ({"\uffff": 1, "\U00010000": 2}, '{"\uffff":1,"\U00010000":2}'.encode()),
    ],
)  # fmt: skip
def test_the_one_spelling(value: Any, spelling: bytes) -> None:
    """Golden bytes: sorted by code point, no space, UTF-8."""
    assert canonical(value) == spelling
    assert json.loads(spelling) == json.loads(json.dumps(value))


def test_the_digest_of_a_known_request() -> None:
    """Golden: a change here makes the workers of two versions miss each other."""
    key = request_key("acme", "call", "openai", "gpt-5", [["user", "hello"]], {"temperature": 0.5})
    assert key.canonical == b'["openai","gpt-5",[["user","hello"]],{"temperature":0.5}]'
    assert key.digest == "6ed78272c6213738d2be7924b3265228bc672b3041703605f227f03b2896a510"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        (0, False),
        (0.0, -0.0),
        (1, "1"),
        (None, "null"),
        (None, []),
        ("", None),
        ({}, []),
        ({"a": None}, {}),
        ("a", "A"),
        ("a", "a "),
        (unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")),
        ([1, 2], [2, 1]),
        ([[1], 2], [1, [2]]),
        ("\u200b", ""),
    ],
)
def test_what_differs_stays_apart(one: Any, other: Any) -> None:
    """Nothing is normalised, trimmed or coerced."""
    assert canonical(one) != canonical(other)
    assert request_key("acme", "call", one) != request_key("acme", "call", other)


def test_the_order_of_members_does_not_matter() -> None:
    """Two clients that write their members in another order ask the same."""
    one, other = request_key("acme", "call", {"a": 1, "b": 2}), request_key("acme", "call", {"b": 2, "a": 1})
    assert one == other
    assert hash(one) == hash(other)
    assert one.digest == other.digest


class Shade(StrEnum):
    """Text with a name."""

    RED = "red"


def test_text_with_a_name_is_text() -> None:
    """A StrEnum is the string that the wire carries."""
    assert canonical({Shade.RED: Shade.RED}) == b'{"red":"red"}'


class Opaque(Enum):
    """Nothing JSON knows."""

    SECRET = "hunter2"


def nested(depth: int) -> Any:
    value: Any = "hunter2"
    for _ in range(depth):
        value = [value]
    return value


CIRCLE: list[Any] = ["hunter2"]
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        {"a": [-math.inf]},
        "hunter2\ud800",
        {"hunter2\udfff": 1},
        {1: "hunter2"},
        {None: "hunter2"},
        {True: "hunter2"},
        [{"a": {("x",): "hunter2"}}],
        b"hunter2",
        {"hunter2"},
        object(),
        Opaque.SECRET,
        nested(100_000),
        CIRCLE,
        10**5000,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_json_is_refused_without_being_quoted(value: Any) -> None:
    """A typed error that neither shows the value nor carries an exception that does."""
    with pytest.raises(InvalidRequest) as caught:
        canonical(value)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_reasonable_nesting_is_fine() -> None:
    """The limit is for attacks: tool schemas nest a few dozen levels."""
    assert canonical(nested(200)).endswith(b"]" * 200)


def test_tenant_and_kind_are_part_of_the_identity() -> None:
    """Equal parts of two tenants, or of two kinds, are never equal; nor do the borders blur."""
    keys = [
        request_key("acme", "call", "x"),
        request_key("globex", "call", "x"),
        request_key("acme", "turn", "x"),
        request_key("acmec", "all", "x"),
        RequestKey("acme", "call", b""),
        RequestKey("acm", "ecall", b""),
    ]
    assert len(set(keys)) == len(keys)
    assert len({key.digest for key in keys}) == len(keys)


def test_parts_do_not_run_into_each_other() -> None:
    """("a", "bc") and ("ab", "c") are two requests."""
    assert request_key("acme", "call", "a", "bc") != request_key("acme", "call", "ab", "c")
    assert request_key("acme", "call", ["a"], "b") != request_key("acme", "call", ["a", "b"])


def test_a_collision_of_digests_is_no_equality() -> None:
    """Found in a dictionary by hash, told apart by bytes."""
    one, other = (RequestKey("acme", "call", parts, digest=lambda _: b"same") for parts in (b"1", b"2"))
    assert one.digest == other.digest
    assert hash(one) == hash(other)
    assert one != other
    assert {one: "one"}.get(other) is None


@pytest.mark.parametrize(("tenant", "kind"), [("globex", "call"), ("acme", "turn")])
def test_a_collision_of_digests_is_no_sharing_across_tenants(tenant: str, kind: str) -> None:
    """Equal bytes under one digest are another's work still."""
    one, other = (RequestKey(*of, b"same", digest=lambda _: b"same") for of in (("acme", "call"), (tenant, kind)))
    assert (hash(one), one.canonical) == (hash(other), other.canonical)
    assert one != other
    assert {one: "one"}.get(other) is None


@pytest.mark.parametrize(("tenant", "kind"), [("", "call"), ("hunter2\ud800", "call"), ("acme", "hunter2\udc00")])
def test_a_key_needs_a_tenant_and_proper_text(tenant: str, kind: str) -> None:
    """Without a tenant everybody would share with everybody."""
    with pytest.raises(InvalidRequest) as caught:
        request_key(tenant, kind, "x")
    assert "hunter2" not in str(caught.value)


def test_a_key_shows_nothing_of_the_request() -> None:
    """Neither repr nor digest contain tenant or text."""
    key = request_key("tenant-acme", "call", "hunter2")
    assert repr(key) == f"<RequestKey call {key.digest[:8]}>"


def test_a_key_is_not_equal_to_other_things() -> None:
    """And says so in the way Python expects."""
    key = request_key("acme", "call", "x")
    assert key != "acme"
    assert key.__eq__("acme") is NotImplemented
