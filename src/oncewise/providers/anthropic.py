"""Anthropic's Messages API, always streamed, and complete only with a stop reason and `message_stop`.

What its events say is given in OpenAI chunks. Thinking becomes `reasoning_content`, which the text of threads leaves
out; each finished thinking block comes once more, with its signature, in `thinking_blocks`, since Anthropic wants it
back unchanged in the next request of a conversation with tools. What Anthropic counts beyond tokens stays in `usage`
under its own names; the tokens of a prompt include those read from and written to its cache, as OpenAI counts them.

A turn that is paused or compacted is not whole: it ends with `length`. Events and blocks nobody knows are passed over,
as the wire's versioning asks for.

Deliberately absent: retries, and blocks of tools that run at Anthropic; the text they lead to is there.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from oncewise.errors import OncewiseError
from oncewise.providers.anthropic_request import messages_request
from oncewise.providers.call import broken
from oncewise.providers.chat_shape import ChunkMaker, tokens, usage
from oncewise.providers.native import NativeProvider, Translation
from oncewise.providers.refusals import stream_refusal

__all__ = ["AnthropicProvider"]

VERSION = "2023-06-01"

Json = dict[str, Any]

_FINISH = {
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "pause_turn": "length",
    "compaction": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


class AnthropicProvider(NativeProvider):
    """A provider that answers `POST {base_url}/messages`."""

    @staticmethod
    def _headers(api_key: str | None) -> dict[str, str]:
        return {"anthropic-version": VERSION, **({"x-api-key": api_key} if api_key else {})}

    def _request(self, body: Mapping[str, Any]) -> tuple[str, Json]:
        return "messages", messages_request(body)

    def _translation(self, created_s: int) -> Translation:
        return _Answer(self._name, created_s)


class _Answer:
    """Turns the events of one answer into chunks.

    Attributes:
        over: Whether the last event has come; only then is the answer whole.
    """

    def __init__(self, provider: str, created_s: int) -> None:
        self._provider = provider
        self._chunks = ChunkMaker(created_s)
        self._stop_reason: str | None = None
        self._stop: Json = {}
        self._usage: Json = {}
        self._counted = False
        self._tools: dict[int, int] = {}
        self._bare: set[int] = set()
        self._thinking: dict[int, Json] = {}
        self._citations: list[Json] = []
        self.over = False

    @property
    def finished(self) -> bool:
        return self.over

    def take(self, event: Json) -> Iterator[Json]:
        """The chunks that say what this event says.

        Raises:
            ProviderError, ProviderRateLimited: it says that Anthropic failed.
            ProviderProtocolError: its shape is not that of its type.
        """
        kind = event.get("type")
        if kind == "content_block_delta":
            yield from self._delta(self._index(event), self._object(event, "delta"))
        elif kind == "content_block_start":
            yield from self._start(self._index(event), self._object(event, "content_block"))
        elif kind == "content_block_stop":
            yield from self._stop_block(self._index(event))
        elif kind == "message_start":
            yield self._begin(self._object(event, "message"))
        elif kind == "message_delta":
            self._end(event)
        elif kind == "message_stop":
            self.over = True
        elif kind == "error":
            raise stream_refusal(self._provider, event.get("error"))

    def end(self) -> Iterator[Json]:
        """The last chunks, once the answer is whole.

        Raises:
            ProviderProtocolError: it is not.
        """
        if not self.over or self._stop_reason is None:
            raise broken(f"{self._provider} ended its answer without a finish reason.")
        cited = {"citations": self._citations} if self._citations else {}
        yield self._chunks.finish(_FINISH.get(self._stop_reason, "stop"), self._stop_reason, **cited, **self._stop)
        if self._counted:
            yield self._chunks.usage(self._figures())

    def _begin(self, message: Json) -> Json:
        for name in ("id", "model"):
            if isinstance(message.get(name), str):
                setattr(self._chunks, name, message[name])
        self._count(message.get("usage"))
        return self._chunks.delta(role="assistant", content="")

    def _start(self, index: int, block: Json) -> Iterator[Json]:
        if block.get("type") == "text" and self._text(block, "text"):
            yield self._chunks.delta(content=block["text"])
        elif block.get("type") in ("thinking", "redacted_thinking"):
            self._thinking[index] = dict(block)
        elif block.get("type") == "tool_use":
            self._tools[index] = len(self._tools)
            if not block.get("input"):
                self._bare.add(index)
            called = {"name": self._text(block, "name"), "arguments": self._given(block.get("input"))}
            yield self._chunks.tool_call(self._tools[index], called, id=self._text(block, "id"), type="function")

    def _delta(self, index: int, delta: Json) -> Iterator[Json]:
        kind = delta.get("type")
        if kind == "text_delta" and self._text(delta, "text"):
            yield self._chunks.delta(content=delta["text"])
        elif kind == "input_json_delta" and index in self._tools and self._text(delta, "partial_json"):
            self._bare.discard(index)
            yield self._chunks.tool_call(self._tools[index], {"arguments": delta["partial_json"]})
        elif kind == "thinking_delta" and self._text(delta, "thinking"):
            self._extend(index, "thinking", delta["thinking"])
            yield self._chunks.delta(reasoning_content=delta["thinking"])
        elif kind == "signature_delta":
            self._extend(index, "signature", self._text(delta, "signature"))
        elif kind == "citations_delta":
            self._citations.append(self._object(delta, "citation"))

    def _stop_block(self, index: int) -> Iterator[Json]:
        if index in self._bare:
            # A tool without arguments has none on this wire; OpenAI's clients parse what they get as JSON.
            self._bare.discard(index)
            yield self._chunks.tool_call(self._tools[index], {"arguments": "{}"})
        if index in self._thinking:
            yield self._chunks.delta(thinking_blocks=[self._thinking.pop(index)])

    def _end(self, event: Json) -> None:
        delta = self._object(event, "delta")
        if isinstance(delta.get("stop_reason"), str):
            self._stop_reason = delta["stop_reason"]
        self._stop |= {name: delta[name] for name in ("stop_sequence", "stop_details") if delta.get(name) is not None}
        self._count(event.get("usage"))
        self._counted = tokens(self._usage.get("output_tokens")) is not None

    def _count(self, figures: Any) -> None:
        if isinstance(figures, dict):
            self._usage |= {name: value for name, value in figures.items() if value is not None}

    def _figures(self) -> Json:
        read, written, fresh = (
            tokens(self._usage.get(name)) or 0
            for name in ("cache_read_input_tokens", "cache_creation_input_tokens", "input_tokens")
        )
        extras = {name: value for name, value in self._usage.items() if name not in ("input_tokens", "output_tokens")}
        return extras | usage(fresh + read + written, self._usage["output_tokens"], cached=read)

    def _extend(self, index: int, name: str, text: str) -> None:
        block = self._thinking.setdefault(index, {"type": "thinking"})
        before = block.get(name)
        block[name] = (before if isinstance(before, str) else "") + text

    def _given(self, arguments: Any) -> str:
        return orjson.dumps(arguments).decode() if arguments else ""

    def _index(self, event: Json) -> int:
        if type(event.get("index")) is not int:
            raise self._malformed()
        index: int = event["index"]
        return index

    def _object(self, holder: Json, name: str) -> Json:
        value = holder.get(name)
        if not isinstance(value, dict):
            raise self._malformed()
        return value

    def _text(self, holder: Json, name: str) -> str:
        value = holder.get(name)
        if not isinstance(value, str):
            raise self._malformed()
        return value

    def _malformed(self) -> OncewiseError:
        return broken(f"{self._provider} sent an event of an unknown shape.")
