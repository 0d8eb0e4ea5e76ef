"""Roles in turn, as Perplexity wants them."""

import copy
import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncewise.core.prompt import normalise_roles
from oncewise.model import ChatMessage, CompletionRequest
from oncewise.providers.alternation import alternating
from oncewise.providers.catalogue import CATALOGUE
from oncewise.providers.openai_compatible import OpenAICompatibleProvider
from tests.support.scripted_transport import ScriptedTransport

ROLES = ["system", "developer", "user", "assistant"]
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
contents = st.text(max_size=3) | st.lists(st.builds(lambda text: {"type": "text", "text": text}, st.text(max_size=3)))
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": contents}, optional={"name": st.just("n")}),
    max_size=8,
)


def said(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


@given(messages)
def test_whatever_is_said_the_roles_take_turns(given_messages: list[dict[str, Any]]) -> None:
    """One system message at most, the first; the last one a user's; done twice it is as done once; nothing is changed
    in place."""
    before = copy.deepcopy(given_messages)
    found = alternating(given_messages)
    assert given_messages == before
    assert alternating(found) == found
    roles = [message["role"] for message in found]
    assert "system" not in roles[1:]
    assert all(one != other for one, other in pairwise(roles))
    assert roles[-1:] != ["assistant"]
    assert set(roles) <= {"system", "user", "assistant"}


@given(st.lists(st.tuples(st.sampled_from(ROLES), st.text(max_size=4)), max_size=8))
def test_texts_become_what_threads_make_of_them(turns: list[tuple[str, str]]) -> None:
    """One rule, in two places."""
    expected = normalise_roles(ChatMessage(role, content) for role, content in turns)
    assert alternating(said(*turns)) == said(*((message.role, message.content) for message in expected))


def test_parts_are_joined_with_texts() -> None:
    """A text becomes a part; an image stays what it is."""
    found = alternating(said(("user", "Look:"), ("user", [IMAGE]), ("system", "Be brief.")))
    parts = [{"type": "text", "text": "Look:"}, IMAGE, {"type": "text", "text": "Be brief."}]
    assert found == said(("user", parts))


@pytest.mark.parametrize(
    "odd",
    [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "fine", "tool_call_id": "t"},
        {"role": "user", "content": "Hi", "cache_control": {}},
        {"role": "user", "content": 7},
        {"role": ["user"], "content": "Hi"},
        {"content": "Hi"},
        "Hi",
    ],
)
def test_what_nobody_here_knows_is_left_to_the_provider(odd: Any) -> None:
    """With all that stands around it, tools above all."""
    asked = [*said(("user", "a"), ("user", "b")), odd]
    assert alternating(asked) is asked
    assert alternating(None) is None


@pytest.mark.parametrize(("provider", "count"), [("perplexity", 3), ("openai", 4)])
async def test_the_catalogue_says_who_wants_it(provider: str, count: int) -> None:
    """What others are asked is what the client wrote."""
    transport = ScriptedTransport([b'data: {"choices":[{"delta":{"content":"x"},"finish_reason":"stop"}]}\n\n'])
    adapter = OpenAICompatibleProvider(provider, transport, quirks=CATALOGUE[provider].quirks)
    body = {"messages": said(("user", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")), "return_images": True}
    _ = [chunk async for chunk in adapter.chunks(CompletionRequest(provider, "m", body))]
    sent = json.loads(transport.posted[0][1])
    assert len(sent["messages"]) == count
    assert sent["return_images"] is True
