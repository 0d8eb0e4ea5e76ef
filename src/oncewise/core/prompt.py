"""The one order of roles that every provider accepts: at most one system message, then user and assistant in turn.

Some providers answer 400 to anything else (perplexityai/api-discussion#265). Done before a key is computed, so that
prompts that are the same to the provider share a call.

Deliberately absent: what a conversation means. No message is reordered, shortened or dropped, except empty ones.
"""

from collections.abc import Iterable, Sequence

from oncewise.model import ChatMessage

__all__ = ["normalise_roles"]


def normalise_roles(messages: Iterable[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Messages in roles that alternate, ending with a user message.

    System messages at the beginning become one and stay what they are: as a user message their text would lose its
    rank, for good where a provider keeps state. Later ones become user messages. Neighbours of one role are joined by
    an empty line. Empty messages, and assistant messages after the last user message, are left out. Roles nobody knows
    count as user. Without a user message, the result is empty or the system message alone.

    Idempotent: a normalised prompt comes back as it is.
    """
    merged: list[ChatMessage] = []
    for message in messages:
        if not message.content:
            continue
        role = _role(message.role, merged)
        if merged and merged[-1].role == role:
            merged[-1] = ChatMessage(role, f"{merged[-1].content}\n\n{message.content}")
        else:
            merged.append(ChatMessage(role, message.content))
    return tuple(_until_last_user(merged))


def _role(role: str, before: Sequence[ChatMessage]) -> str:
    if role == "assistant":
        return role
    leads = all(message.role == "system" for message in before)
    return "system" if role in ("system", "developer") and leads else "user"


def _until_last_user(messages: list[ChatMessage]) -> list[ChatMessage]:
    while messages and messages[-1].role == "assistant":
        messages.pop()
    return messages
