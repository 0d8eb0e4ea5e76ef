"""Two bodies on `/v1` share only if they are the same request, from their bytes on.

A body is changed in one place, as clients and mistakes change it: another type of the same number, another form of the
same letter, a space more, a border shifted, a member more or less. Whatever is not transport keeps the two apart.
"""

import json
import unicodedata
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from oncewise.api.openai_request import read_completion
from oncewise.core.keys import RequestKey
from oncewise.core.stream_hub import StreamHub
from oncewise.errors import MalformedJson
from oncewise.service.completions import TRANSPORT, CompletionAsk, Completions
from oncewise.service.model_names import ModelNames
from oncewise.service.sharing import Policies, Policy

DESK = Completions(
    {},
    ModelNames({"p": "m"}, default_provider="p"),
    logs=StreamHub(),
    ids=lambda: "c",
    policies=Policies(Policy.ALWAYS),
)

texts = st.text(st.sampled_from('ae é\u0301ﬁI\u0131"\\/\n\t{}[],:01'), max_size=6)
numbers = st.integers(-3, 3) | st.sampled_from([0.0, -0.0, 1.0, 0.5, 1e30, -1.5]) | st.integers(-(2**63), 2**63 - 1)
leaves = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
parts = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url"])}, optional={"text": texts, "image_url": values}
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": texts | st.lists(parts, max_size=2)},
    optional={"name": texts, "tool_calls": st.lists(values, max_size=2), "tool_call_id": texts},
)
names = st.sampled_from(
    ["temperature", "top_p", "seed", "stop", "tools", "response_format", "logprobs", "users", "streams", "meta", "x"]
)
bodies = st.builds(
    lambda said, fields: {"model": "p/m", "messages": said, **fields},
    st.lists(messages, min_size=1, max_size=3),
    st.dictionaries(names, values, max_size=3),
)
transports = st.fixed_dictionaries(
    {},
    optional={
        "stream": st.booleans() | st.none(),
        "stream_options": st.none() | st.just({"include_usage": True}),
        "user": values,
        "metadata": values,
    },
)


def key_of(body: bytes, org_id: str = "acme") -> RequestKey:
    """The key of a body as a client sends it."""
    return DESK.plan(org_id, CompletionAsk("r", read_completion(body).fields)).body_key


def encoded(body: Any, **how: Any) -> bytes:
    return json.dumps(body, **how).encode()


def spelt(value: Any) -> str:
    """A value in one spelling, its types told apart; independent of the code under test."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name!r}:{spelt(value[name])}" for name in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(spelt, value)) + "]"
    return f"{type(value).__name__} {value!r}"


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a value, itself first."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, member in inner:
        yield from places(member, (*at, name))


def got(value: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        value = value[step]
    return value


def put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """The same with something else in one place."""
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = put(value[place[0]], place[1:], new)
    return copy


def look_alikes(value: Any) -> list[Any]:
    """What a careless comparison would take for the same."""
    found: list[Any] = [[value], {"": value}, str(value), None]
    if isinstance(value, str):
        forms = [unicodedata.normalize(form, value) for form in ("NFC", "NFD", "NFKC")]
        found += [*forms, value + " ", " " + value, value.strip(), value.casefold(), value.replace("\n", "\r\n")]
        found += [value + "\u200b", value[:-1], value + value]
    elif isinstance(value, bool | int | float):
        found += [float(value), bool(value), -value, value + 1]
        found += [int(value)] if abs(value) < 2**53 else []
    elif isinstance(value, list):
        found += [value[::-1], value[1:], [*value, None], [*value, *value[-1:]], _shifted(value)]
    elif isinstance(value, dict):
        found += [{**value, "more": None}, dict(list(value.items())[1:]), list(value.items()), list(value)]
        found += [{f"{name} ": member for name, member in value.items()}]
    return found


def _shifted(texts: list[Any]) -> list[Any]:
    """`["ab", "c"]` as `["a", "bc"]`."""
    if len(texts) < 2 or not all(isinstance(text, str) for text in texts[:2]):
        return texts
    return [texts[0][:-1], texts[0][-1:] + texts[1], *texts[2:]]


@given(bodies, st.data())
def test_a_body_changed_anywhere_is_another_request(body: dict[str, Any], data: st.DataObject) -> None:
    """In messages, parts, tools or any field that nobody knows."""
    place = data.draw(st.sampled_from([place for place in places(body) if place and place[0] != "model"]))
    changed = put(body, place, data.draw(st.sampled_from(look_alikes(got(body, place)))))
    said = changed["messages"]
    assume(isinstance(said, list) and said and all(isinstance(message, dict) for message in said))
    assume(spelt(changed) != spelt(body))
    assert key_of(encoded(body)) != key_of(encoded(changed))


@given(bodies, bodies)
def test_two_bodies_share_exactly_if_they_are_the_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Whatever they are."""
    assert (key_of(encoded(one)) == key_of(encoded(two))) is (spelt(one) == spelt(two))


@given(bodies, st.sampled_from(["model", *TRANSPORT]), values)
def test_a_field_more_is_another_request_unless_it_is_transport(body: dict[str, Any], name: str, value: Any) -> None:
    """Names that merely begin like one of transport are none."""
    for other in (f"{name}s", f"{name} ", name.upper(), f"x_{name}"):
        assume(other not in body)
        assert key_of(encoded({**body, other: value})) != key_of(encoded(body))


@given(bodies, transports, transports, st.booleans())
def test_how_it_is_sent_and_spelt_changes_nothing(
    body: dict[str, Any], one: dict[str, Any], two: dict[str, Any], escaped: bool
) -> None:
    """Transport fields, the order of members, spaces and escapes."""
    backwards = dict(reversed(list({**body, **two}.items())))
    sent = encoded(backwards, indent=2, ensure_ascii=escaped)
    assert key_of(encoded({**one, **body}, separators=(",", ":"))) == key_of(sent)


@given(bodies)
def test_tenants_and_models_keep_apart(body: dict[str, Any]) -> None:
    """The model by what its name stands for."""
    assert key_of(encoded(body)) != key_of(encoded(body), "other")
    assert key_of(encoded(body)) == key_of(encoded({**body, "model": "m"}))
    assert key_of(encoded(body)) != key_of(encoded({**body, "model": "p/m2"}))


@given(bodies, st.data())
@example({"model": "p/m", "messages": [{"role": "user"}]}, None)
def test_a_member_named_twice_is_refused_wherever_it_is(body: dict[str, Any], data: st.DataObject | None) -> None:
    """Two parsers could read two different requests."""
    objects = [place for place in places(body) if isinstance(got(body, place), dict) and got(body, place)]
    place = data.draw(st.sampled_from(objects)) if data is not None else objects[-1]
    twice = got(body, place)
    name = next(iter(twice))
    marked = put(body, place, {**twice, "MARK": 0})
    sent = encoded(marked).replace(b'"MARK": 0', encoded(name) + b": " + encoded(twice[name]), 1)
    with pytest.raises(MalformedJson):
        read_completion(sent)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("1", "1.0"), ("1", "true"), ("1.0", "true"), ("0", "false"), ("0", "-0.0"), ("0.0", "-0.0"),
        ("null", '"null"'), ('"\\u00e9"', '"e\\u0301"'), ('"a"', '"a "'), ('"a"', '"A"'), ('["ab","c"]', '["a","bc"]'),
        ('["ab"]', '["a","b"]'), ("[]", "{}"), ("[1]", "1"), ('{"a":null}', "{}"),
        ("9007199254740993", "9007199254740992"), ('"1"', "1"), ('"\\n"', '"\\r\\n"'), ('"\\ufb01"', '"fi"'),
    ],
)  # fmt: skip
def test_values_that_look_alike(one: str, two: str) -> None:
    """Pinned, as the wire has them."""
    body = '{"model":"p/m","messages":[{"role":"user","content":"hi"}],"x":%s}'
    assert key_of((body % one).encode()) != key_of((body % two).encode())


@pytest.mark.parametrize(("one", "two"), [("1.0", "1.00"), ("1e0", "1.0"), ('"\\u0061"', '"a"'), ("0.5", "5e-1")])
def test_spellings_of_one_value_are_the_same(one: str, two: str) -> None:
    """The provider is told the same, too."""
    body = '{"model":"p/m","messages":[{"role":"user","content":"hi"}],"x":%s}'
    assert key_of((body % one).encode()) == key_of((body % two).encode())
