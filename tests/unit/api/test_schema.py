"""The fields and bounds of requests."""

import json

import pytest

from oncewise.api.schema import ThreadChanges, is_id, read_import, read_message, read_model
from oncewise.errors import InvalidRequest
from oncewise.model import OnBusy, OnDisconnect, Params, Scope


def message(**fields):
    return read_message(json.dumps({"content": "Hello", **fields}).encode())


def test_what_is_absent_has_the_defaults_of_the_contract():
    """Provider and model are the server's to choose."""
    assert dict(message()) == {
        "content": "Hello",
        "provider": None,
        "model": None,
        "params": Params(),
        "scope": Scope.PRIVATE,
        "reason": None,
        "user_id": None,
        "parent_message_id": None,
        "on_busy": OnBusy.ENQUEUE,
        "on_disconnect": OnDisconnect.CONTINUE,
    }


def test_everything_may_be_given():
    """Numbers keep their type, stops become a tuple."""
    params = {"temperature": 1, "top_p": 0.5, "max_tokens": 5, "seed": -1, "stop": "x"}
    read = message(
        provider="openai",
        model="org/model:free@1",
        params=params,
        scope="shared",
        reason="r" * 500,
        user_id="u" * 128,
        parent_message_id="01a2",
        on_busy="rollback",
        on_disconnect="cancel",
    )

    assert read["params"] == Params(temperature=1.0, top_p=0.5, max_tokens=5, seed=-1, stop=("x",))
    assert message(params={"stop": ["a", "b"]})["params"].stop == ("a", "b")
    assert (read["scope"], read["on_busy"]) == (Scope.SHARED, OnBusy.ROLLBACK)


def test_one_reading_is_shared_so_nobody_can_change_it():
    """The mapping is read-only."""
    with pytest.raises(TypeError):
        message()["content"] = "other"


@pytest.mark.parametrize("content", ["😀" * 200_000, " x ", "\n.", "\u200bx", "\ufdd0x"])
def test_content_is_counted_in_code_points_and_never_trimmed(content):
    """One visible character is enough."""
    assert message(content=content)["content"] == content


@pytest.mark.parametrize(
    "content", ["", " ", "\t\r\n", "\u00a0\u2003\u3000", "\u200b\u200d\u2060\ufeff\u202e", "\x1c", "x" * 200_001]
)
def test_content_without_anything_to_see_or_too_much_is_refused(content):
    """White space, format and control characters alone are not a message."""
    with pytest.raises(InvalidRequest) as caught:
        message(content=content)
    assert caught.value.errors[0][0] == ("body", "content")


def test_an_error_names_the_place_and_never_the_value():
    """Nor a name that no field could have."""
    with pytest.raises(InvalidRequest) as caught:
        message(**{"scope": "s3cret", "base_url": "s3cret", "<s3cret>": 1, "params": {"seed": "s3cret", "s3cret!": 1}})
    places = [loc for loc, _ in caught.value.errors]

    assert ("body", "scope") in places
    assert ("body", "base_url") in places
    assert ("body", "params", "seed") in places
    assert ("body", "?") in places
    assert "s3cret" not in str(caught.value.errors)
    assert caught.value.__cause__ is None


def test_errors_are_bounded_in_number():
    """A body of many wrong names does not become a longer answer."""
    with pytest.raises(InvalidRequest) as caught:
        message(**{f"x{index}": 1 for index in range(1000)})
    assert len(caught.value.errors) == 20


def test_changes_are_what_was_sent():
    """Null is a change, absence is none."""
    assert read_model(ThreadChanges, b'{"title":null}').given() == {"title": None}
    assert read_model(ThreadChanges, b'{"pinned":true}').given() == {"pinned": True}
    assert read_model(ThreadChanges, b"{}").given() == {}


@pytest.mark.parametrize("text", ["", "a" * 65, "a/b", "a b", "ä", "a\n", "..", "a\0"])
def test_ids_have_one_form(text):
    """Whatever cannot be an id is not looked up."""
    assert not is_id(text)
    assert is_id("01a20a45-0776-732e-ab10-ed5d8e638962")


def test_an_import_is_lines_of_messages_and_says_which_line_is_wrong():
    """Split at LF alone, so that other line ends may stand in a text."""
    lines = [{"role": "user", "content": "a\u2028b\u0085c", "sequence": 0}, {"role": "assistant", "content": "d"}]
    body = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode() + b"\n"

    assert [(message.role, message.content) for message in read_import(body)] == [
        ("user", "a\u2028b\u0085c"),
        ("assistant", "d"),
    ]
    with pytest.raises(InvalidRequest) as caught:
        read_import(body + b'{"role":"tool","content":""}')
    assert caught.value.errors[0][0] == ("body", 2, "role")
