"""What chunks of a chat completion add up to: the whole completion, and its figures.

Fields that nobody here knows are kept: in a delta, texts are joined and lists extended, as OpenAI's own do; elsewhere
the last value counts. Texts are joined at the end, once: adding each delta to the text before it would copy a long
answer thousands of times.

Deliberately absent: whether an answer is whole (`oncewise.providers.answer`).
"""

import math
from collections.abc import Iterable
from typing import Any, TypeGuard

from oncewise.model import Usage
from oncewise.ports import Chunk

__all__ = ["assembled", "usage_object", "usage_of"]

# Said once or said again, never in pieces.
_WHOLE = frozenset({"role", "id", "type", "name", "format"})

Json = dict[str, Any]


class _Text:
    """A text that still grows, in its place in the document."""

    __slots__ = ("pieces", "place")

    def __init__(self, place: tuple[Json, str], first: str) -> None:
        self.place = place
        self.pieces = [first]

    def join(self) -> None:
        """Put the text where it belongs, unless something else took its place."""
        into, name = self.place
        if into.get(name) is self:
            into[name] = "".join(self.pieces)


def assembled(chunks: Iterable[Chunk], usage: Json) -> Json:
    """The completion that a caller who did not ask for a stream gets."""
    assembly = _Assembly()
    for chunk in chunks:
        assembly.take(chunk)
    return assembly.whole(usage)


class _Assembly:
    """A completion that is being put together."""

    def __init__(self) -> None:
        self._document: Json = {}
        self._choices: dict[int, Json] = {}
        self._texts: list[_Text] = []

    def take(self, chunk: Chunk) -> None:
        for name, value in chunk.items():
            if name != "choices" and value is not None:
                self._document[name] = value
        for choice in chunk["choices"]:
            self._take_choice(self._choices.setdefault(choice.get("index", 0), {}), choice)

    def whole(self, usage: Json) -> Json:
        for text in self._texts:
            text.join()
        choices = [_finished(index, self._choices[index]) for index in sorted(self._choices)]
        return self._document | {"object": "chat.completion", "choices": choices, "usage": usage}

    def _take_choice(self, into: Json, choice: Json) -> None:
        self._merge(into.setdefault("message", {"role": "assistant", "content": None}), choice.get("delta") or {})
        for name, value in choice.items():
            if name == "logprobs" and isinstance(value, dict):
                self._merge(into.setdefault("logprobs", {}), value)
            elif name not in ("delta", "message", "logprobs") and (value is not None or name not in into):
                into[name] = value

    def _merge(self, into: Json, delta: Json) -> None:
        for name, value in delta.items():
            held = into.get(name)
            if value is None:
                into.setdefault(name, None)
            elif isinstance(value, list):
                into[name] = self._extended(held if isinstance(held, list) else [], value)
            elif isinstance(value, dict):
                into[name] = held if isinstance(held, dict) else {}
                self._merge(into[name], value)
            elif isinstance(value, str) and name not in _WHOLE:
                self._merge_text(into, name, value)
            elif value != "" or held is None:
                into[name] = value

    def _merge_text(self, into: Json, name: str, value: str) -> None:
        held = into.get(name)
        if isinstance(held, _Text):
            held.pieces.append(value)
        elif value or held is None:
            into[name] = _Text((into, name), value)
            self._texts.append(into[name])

    def _extended(self, held: list[Any], new: list[Any]) -> list[Any]:
        for item in new:
            if not isinstance(item, dict) or type(item.get("index")) is not int:
                held.append(item)
                continue
            known = next((old for old in held if isinstance(old, dict) and old.get("index") == item["index"]), None)
            if known is None:
                known = {}
                held.append(known)
            self._merge(known, item)
        return held


def _finished(index: int, choice: Json) -> Json:
    for called in choice["message"].get("tool_calls") or ():
        called.pop("index", None)
    return {"logprobs": None, **choice, "index": index}


_MOST = 2**30 - 1
"""Tokens. No model takes or makes as many; a figure above is a mistake, and the sum of two would fit no column."""


def usage_of(chunk: Chunk) -> tuple[Usage | None, float | None]:
    """Tokens, and cost in US dollars, that a chunk tells; None for what it does not."""
    return _figures(usage_object(chunk))


def usage_object(chunk: Chunk) -> Json | None:
    """The figures of a chunk as the provider wrote them."""
    if isinstance(chunk.get("usage"), dict):
        return dict(chunk["usage"])
    for choice in chunk.get("choices") or ():
        if isinstance(choice, dict) and isinstance(choice.get("usage"), dict):
            return dict(choice["usage"])  # Moonshot puts it here
    return None


def _figures(usage: Json | None) -> tuple[Usage | None, float | None]:
    if usage is None:
        return None, None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    found = None
    if _is_count(prompt) and _is_count(completion):
        read, written = _cached(usage)
        read = min(read, prompt)
        found = Usage(prompt, completion, cached_tokens=read, cache_write_tokens=min(written, prompt - read))
    return found, _cost_usd(usage)


def _is_count(tokens: Any) -> TypeGuard[int]:
    return type(tokens) is int and 0 <= tokens <= _MOST


def _cached(usage: Json) -> tuple[int, int]:
    """Tokens of the prompt read from and written to a cache: OpenAI's names, Anthropic's, Moonshot's and DeepSeek's."""
    details = usage.get("prompt_tokens_details")
    details = details if isinstance(details, dict) else {}
    read = (details.get("cached_tokens"), usage.get("cached_tokens"), usage.get("prompt_cache_hit_tokens"))
    written = (details.get("cache_write_tokens"), usage.get("cache_creation_input_tokens"))
    return _first_count(read), _first_count(written)


def _first_count(values: Iterable[Any]) -> int:
    return next((value for value in values if type(value) is int and value > 0), 0)


def _cost_usd(usage: Json) -> float | None:
    cost, ticks = usage.get("cost"), usage.get("cost_in_usd_ticks")
    if isinstance(cost, dict):
        cost = cost.get("total_cost")  # Perplexity
    elif cost is None and ticks is not None:
        cost = ticks / 10**10 if type(ticks) is int else None  # xAI
    if isinstance(cost, int | float) and not isinstance(cost, bool) and math.isfinite(cost) and cost >= 0:
        return float(cost)
    return None
