"""Messages in roles that take turns, for providers that answer 400 to any other order.

The rules are those of `oncewise.core.prompt`, which threads go through before their key is computed. Requests of `/v1`
pass as they were written, and two that differ share nothing; so here it is done on the way to the provider.

Deliberately absent: conversations with tools. What belongs together there is left for the provider to judge.
"""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["alternating"]

Json = dict[str, Any]

_KNOWN = frozenset({"role", "content", "name"})


def alternating(messages: Any) -> Any:
    """The messages with at most one system message, the first, and then user and assistant in turn, the last a user's.

    Later system messages become user messages; neighbours of one role are joined, texts by an empty line and parts one
    after the other; empty messages, and assistant messages after the last user message, are left out. A list with
    anything else in it than roles and contents comes back as it is.
    """
    if not isinstance(messages, list) or not all(_is_plain(message) for message in messages):
        return messages
    merged: list[Json] = []
    for message in messages:
        if not message["content"]:
            continue
        role = _role(message["role"], merged)
        if merged and merged[-1]["role"] == role:
            merged[-1] = {**merged[-1], "content": _joined(merged[-1]["content"], message["content"])}
        else:
            merged.append({**message, "role": role})
    while merged and merged[-1]["role"] == "assistant":
        merged.pop()
    return merged


def _is_plain(message: Any) -> bool:
    return (
        isinstance(message, Mapping)
        and message.keys() <= _KNOWN
        and message.get("role") in ("system", "developer", "user", "assistant")
        and isinstance(message.get("content"), str | list)
    )


def _role(role: str, before: Sequence[Json]) -> str:
    if role == "assistant":
        return role
    leads = all(message["role"] == "system" for message in before)
    return "system" if role in ("system", "developer") and leads else "user"


def _joined(one: str | list[Any], other: str | list[Any]) -> str | list[Any]:
    if isinstance(one, str) and isinstance(other, str):
        return f"{one}\n\n{other}"
    return [*_parts(one), *_parts(other)]


def _parts(content: str | list[Any]) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
