"""What the chunks of one answer add up to: whether it is whole, and what a thread reads of it.

The usual clients report success for an answer that merely stopped, for `[DONE]` alone and for an empty body. For shared
work that is worse than an error: the stump is stored and given to everybody. Here an answer counts when every choice
that began has a finish reason. A finish reason nobody knows counts as `stop`: the provider ended on purpose, and said
so.

`Verifier` judges whole completions; `as_text` reads the first choice's text out of chunks that passed it, and asks for
some text, since a thread cannot store an answer without any.

Deliberately absent: bytes and events, and how a provider is asked.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from oncewise.core.chunks import usage_of
from oncewise.errors import OncewiseError, ProviderError
from oncewise.model import FinishReason, Usage
from oncewise.ports import Chunk, Completion, ProviderEvent, TextDelta
from oncewise.providers.call import Call, broken

__all__ = ["Verifier", "as_text"]

_FINISH = {
    "length": FinishReason.LENGTH,
    "max_tokens": FinishReason.LENGTH,
    "model_length": FinishReason.LENGTH,
    "content_filter": FinishReason.CONTENT_FILTER,
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
}
# DeepSeek and OpenRouter (and Mistral) end a stream that failed on their side with these.
_FAILED = frozenset({"insufficient_system_resource", "error"})
_SUBSTANCE = frozenset({"content", "tool_calls", "function_call", "refusal", "audio"})
_REASONING = frozenset({"reasoning_content", "reasoning"})


class Verifier:
    """Looks at every chunk of one answer before it is passed on.

    Args:
        choices: How many choices were asked for.
    """

    def __init__(self, provider: str, call: Call, choices: int = 1) -> None:
        self._provider = provider
        self._call = call
        self._asked = choices
        self._finishes: dict[int, str | None] = {}
        self._has_substance = False
        self._whole = False
        self._last: Chunk = {}

    def take(self, chunk: Chunk) -> None:
        """Take one chunk.

        Raises:
            ProviderProtocolError: its shape is not that of a chunk, the answer is too large, or it ends empty.
            ProviderError: the provider says that it failed.
        """
        self._last = chunk
        for choice in _objects(self._provider, chunk.get("choices")):
            self._take_choice(choice)
        if self._whole:
            # Now and not at the end: this chunk would be passed on, and look like the end of an answer.
            self._check_substance()
            self._call.finished()

    def end(self, *, done: bool) -> Chunk | None:
        """Judge the answer as a whole.

        Args:
            done: Whether the provider ended it in a way that stands for a finish reason with this provider.

        Returns the chunk that says what the provider left out, if it did.

        Raises:
            ProviderProtocolError: the answer is not whole, or nothing is in it.
        """
        open_choices = [index for index, finish in self._finishes.items() if finish is None]
        if not self._finishes or (open_choices and not done):
            raise broken(f"{self._provider} ended its answer without a finish reason.")
        self._check_substance()
        if not open_choices:
            return None
        ends = [{"index": index, "delta": {}, "finish_reason": "stop"} for index in open_choices]
        head: Chunk = {name: self._last[name] for name in ("id", "object", "created", "model") if name in self._last}
        return head | {"choices": ends}

    def _check_substance(self) -> None:
        if not self._has_substance and {*self._finishes.values()} <= {None, "stop"}:
            # Some prompts lead to it; who sends them must not be able to have the model taken for broken.
            raise broken(f"{self._provider} sent an empty answer.", self_inflicted=True)

    def _take_choice(self, choice: Mapping[str, Any]) -> None:
        index, finish = choice.get("index", 0), choice.get("finish_reason")
        if type(index) is not int:
            raise _malformed(self._provider)
        if index >= self._asked:
            return  # nobody asked for it, and it may never end
        if isinstance(finish, str) and finish:
            self._take_finish(index, finish)
        else:
            self._finishes.setdefault(index, None)
        for name, value in _delta(self._provider, choice).items():
            if value and name in _SUBSTANCE:
                self._has_substance = True
                self._call.text(value if isinstance(value, str) else _written(self._provider, name, value))
            elif value and name in _REASONING:
                self._call.token()

    def _take_finish(self, index: int, reason: str) -> None:
        if reason in _FAILED:
            raise ProviderError(f"{self._provider} gave up on its answer.")
        self._finishes[index] = reason
        self._whole = len(self._finishes) >= self._asked and all(self._finishes.values())


def _written(provider: str, name: str, value: Any) -> str:
    """The text whose size counts, of a value that is none itself."""
    return _text(provider, value) if name == "content" else str(value)


async def as_text(provider: str, chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[ProviderEvent, None]:
    """The first choice of verified chunks, as `oncewise.ports.Provider.stream` gives it.

    Raises:
        ProviderError, ProviderProtocolError: there was no text.
    """
    reader = _Reader(provider)
    async with aclosing(chunks):
        async for chunk in chunks:
            text = reader.take(chunk)
            if text:
                yield TextDelta(text)
    yield reader.completion()


class _Reader:
    """What a thread keeps of an answer."""

    def __init__(self, provider: str) -> None:
        self._provider = provider
        self._texts = 0
        self._finish: str | None = None
        self._usage: Usage | None = None
        self._model: str | None = None
        self._citations: tuple[object, ...] | None = None
        self._cost_usd: float | None = None

    def take(self, chunk: Chunk) -> str:
        """Take one chunk; return its text."""
        if isinstance(chunk.get("model"), str):
            self._model = _storable(chunk["model"])
        usage, cost_usd = usage_of(chunk)
        self._usage = usage or self._usage
        self._cost_usd = self._cost_usd if cost_usd is None else cost_usd
        self._take_citations(chunk)
        text = "".join(self._take_choice(choice) for choice in chunk.get("choices") or ())
        self._texts += bool(text)
        return text

    def completion(self) -> Completion:
        """The verified end.

        Raises:
            ProviderProtocolError: there was no text.
            ProviderError: the provider withheld it.
        """
        reason = _FINISH.get(self._finish or "stop", FinishReason.STOP)
        if not self._texts:
            raise self._empty(reason)
        return Completion(reason, self._usage, self._model, self._citations, self._cost_usd)

    def _empty(self, reason: FinishReason) -> OncewiseError:
        # These two would come again at every attempt, and each is paid for.
        if reason is FinishReason.CONTENT_FILTER:
            return ProviderError(f"{self._provider} withheld the whole answer.", retryable=False)
        if reason is FinishReason.LENGTH:
            return broken(f"{self._provider} used up its token limit before the first text.", retryable=False)
        return broken(f"{self._provider} sent an empty answer.", self_inflicted=True)

    def _take_choice(self, choice: Mapping[str, Any]) -> str:
        if choice.get("index", 0) != 0:
            return ""
        finish = choice.get("finish_reason")
        self._finish = finish if isinstance(finish, str) and finish else self._finish
        content = _delta(self._provider, choice).get("content")
        return _storable(_text(self._provider, content))

    def _take_citations(self, chunk: Chunk) -> None:
        for name in ("citations", "search_results"):
            if isinstance(chunk.get(name), list) and chunk[name]:
                self._citations = tuple(chunk[name])
                return


def _delta(provider: str, choice: Mapping[str, Any]) -> dict[str, Any]:
    delta = choice.get("delta") or {}
    if not isinstance(delta, dict):
        raise _malformed(provider)
    return delta


def _storable(text: str) -> str:
    return text.replace("\0", "")  # no database stores NUL, and no reader sees it


def _text(provider: str, content: Any) -> str:
    if isinstance(content, list):  # Mistral's reasoning models: parts, of which some are text
        parts = [part.get("text") for part in _objects(provider, content) if part.get("type") == "text"]
        return "".join(_text(provider, part) for part in parts)
    if content is not None and not isinstance(content, str):
        raise _malformed(provider)
    return content or ""


def _objects(provider: str, value: Any) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise _malformed(provider)
    for item in value:
        if not isinstance(item, dict):
            raise _malformed(provider)
    return value


def _malformed(provider: str) -> OncewiseError:
    return broken(f"{provider} sent a chunk of an unknown shape.")
