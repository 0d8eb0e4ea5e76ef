"""Roles in the one order that every provider takes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncewise.core.prompt import normalise_roles
from oncewise.model import ChatMessage

SHORT = {"s": "system", "u": "user", "a": "assistant", "d": "developer", "t": "tool"}


def prompt(*messages: str) -> tuple[ChatMessage, ...]:
    """`u:hello` is a user message."""
    parts = (message.partition(":") for message in messages)
    return tuple(ChatMessage(SHORT[role], content) for role, _, content in parts)


@pytest.mark.parametrize(
    ("given_messages", "expected"),
    [
        (["u:a"], ["u:a"]),
        (["s:rules", "u:a", "a:b", "u:c"], ["s:rules", "u:a", "a:b", "u:c"]),
        (["u:a", "u:b"], ["u:a\n\nb"]),
        (["u:a", "a:b", "a:c", "u:d"], ["u:a", "a:b\n\nc", "u:d"]),
        (["s:one", "s:two", "u:a"], ["s:one\n\ntwo", "u:a"]),
        (["s:one", "d:two", "u:a"], ["s:one\n\ntwo", "u:a"]),
        (["u:a", "s:late", "a:b", "u:c"], ["u:a\n\nlate", "a:b", "u:c"]),
        (["u:a", "a:b", "s:late"], ["u:a", "a:b", "u:late"]),
        (["u:a", "a:", "u:b"], ["u:a\n\nb"]),
        (["u:a", "a:b", "a:c"], ["u:a"]),
        (["s:rules", "a:hello", "u:a"], ["s:rules", "a:hello", "u:a"]),
        (["u:a", "t:result"], ["u:a\n\nresult"]),
        (["s:rules"], ["s:rules"]),
        (["s:rules", "a:b"], ["s:rules"]),
        (["u:", "s:"], []),
        ([], []),
    ],
)
def test_roles_are_normalised(given_messages: list[str], expected: list[str]) -> None:
    """Neighbours merged, late system messages turned into user, empty ones and a trailing assistant left out."""
    assert normalise_roles(prompt(*given_messages)) == prompt(*expected)


messages = st.lists(
    st.builds(ChatMessage, st.sampled_from([*SHORT.values()]), st.text(alphabet="ab \n", max_size=3)), max_size=12
)


@given(messages)
def test_a_normalised_prompt_alternates_and_stays_as_it_is(given_messages: list[ChatMessage]) -> None:
    """System first if at all, no two neighbours of a role, a user message last, and nothing more to do."""
    normal = normalise_roles(given_messages)
    roles = [message.role for message in normal]
    assert normalise_roles(normal) == normal
    assert all(left != right for left, right in itertools.pairwise(roles))
    assert "system" not in roles[1:]
    assert set(roles) <= {"system", "user", "assistant"}
    assert not roles or roles[-1] == "user" or roles == ["system"]
    assert all(message.content for message in normal)


@given(messages)
def test_no_user_text_is_lost(given_messages: list[ChatMessage]) -> None:
    """Every user message is found again, in order."""
    user_text = "\n\n".join(message.content for message in normalise_roles(given_messages) if message.role == "user")
    place = 0
    for message in given_messages:
        if message.role == "user":
            place = user_text.index(message.content, place) + len(message.content)
