"""Gemini's own API, always streamed, and complete only with a finish reason.

What its events say is given in OpenAI chunks. Thoughts become `reasoning_content`, which the text of threads leaves
out. A tool call comes whole; its id is Gemini's or made from the id of the answer, and its thought signature stands in
`extra_content.google.thought_signature`, since Gemini 3 wants it back. The figures count thoughts as part of the answer
and the prompts of tools as part of the prompt, as the bill does. Sources are `citations`: those of a search if there
was one, else those of the text.

A prompt or an answer that is withheld ends with `content_filter`; an answer that Gemini could not bring to an end
(`MALFORMED_FUNCTION_CALL`, `OTHER`…) is an error.

Deliberately absent: retries, images and code in answers, and more than one candidate.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from oncewise.errors import OncewiseError, ProviderError
from oncewise.providers.call import broken
from oncewise.providers.chat_shape import ChunkMaker, tokens, usage
from oncewise.providers.gemini_request import generate_path, generate_request
from oncewise.providers.native import NativeProvider, Translation
from oncewise.providers.refusals import stream_refusal

__all__ = ["GeminiProvider"]

Json = dict[str, Any]

_WITHHELD = frozenset({
    "SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE", "IMAGE_SAFETY",
    "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION", "MODEL_ARMOR",
})  # fmt: skip
_FAILED = frozenset({
    "FINISH_REASON_UNSPECIFIED", "OTHER", "MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS",
    "MISSING_THOUGHT_SIGNATURE", "MALFORMED_RESPONSE", "IMAGE_OTHER", "NO_IMAGE",
})  # fmt: skip


class GeminiProvider(NativeProvider):
    """A provider that answers `POST {base_url}/models/{model}:streamGenerateContent`."""

    @staticmethod
    def _headers(api_key: str | None) -> dict[str, str]:
        # Never in the URL, where Google takes it too: URLs are what proxies and logs keep.
        return {"x-goog-api-key": api_key} if api_key else {}

    def _request(self, body: Mapping[str, Any]) -> tuple[str, Json]:
        return generate_path(str(body.get("model"))), generate_request(body)

    def _translation(self, created_s: int) -> Translation:
        return _Answer(self._name, created_s)


class _Answer:
    """Turns the events of one answer into chunks.

    Attributes:
        over: Never: what follows the finish reason may be the figures; the end of the body is the end.
    """

    over = False

    def __init__(self, provider: str, created_s: int) -> None:
        self._provider = provider
        self._chunks = ChunkMaker(created_s)
        self._begun = False
        self._finish: str | None = None
        self._withheld = False
        self._calls = 0
        self._usage: Json = {}
        self._sources: list[Json] = []
        self._cited: list[Json] = []

    @property
    def finished(self) -> bool:
        return self._finish is not None

    def take(self, event: Json) -> Iterator[Json]:
        """The chunks that say what this event says.

        Raises:
            ProviderError, ProviderRateLimited: it says that Gemini failed.
            ProviderProtocolError: its shape is not that of an answer.
        """
        if event.get("error"):
            raise stream_refusal(self._provider, event["error"])
        for name, field in (("id", "responseId"), ("model", "modelVersion")):
            if isinstance(event.get(field), str):
                setattr(self._chunks, name, event[field])
        self._usage |= self._object(event, "usageMetadata")
        self._take_block(self._object(event, "promptFeedback").get("blockReason"))
        if not self._begun:
            self._begun = True
            yield self._chunks.delta(role="assistant", content="")
        for candidate in self._objects(event, "candidates"):
            if candidate.get("index", 0) == 0:
                yield from self._candidate(candidate)

    def end(self) -> Iterator[Json]:
        """The last chunks, once the answer is whole.

        Raises:
            ProviderProtocolError: it is not.
            ProviderError: Gemini gave up on it.
        """
        if self._finish is None:
            raise broken(f"{self._provider} ended its answer without a finish reason.")
        if self._finish in _FAILED and not self._withheld:
            again = self._finish != "MISSING_THOUGHT_SIGNATURE"
            raise ProviderError(f"{self._provider} gave up on its answer.", retryable=again)
        citations = self._sources or self._cited
        cited = {"citations": citations} if citations else {}
        yield self._chunks.finish(self._reason(self._finish), self._finish, **cited)
        figures = self._figures()
        if figures:
            yield self._chunks.usage(figures)

    def _reason(self, finish: str) -> str:
        if self._withheld or finish in _WITHHELD:
            return "content_filter"
        if finish == "MAX_TOKENS":
            return "length"
        return "tool_calls" if self._calls else "stop"

    def _candidate(self, candidate: Json) -> Iterator[Json]:
        for part in self._objects(self._object(candidate, "content"), "parts"):
            yield from self._part(part)
        yield from self._logprobs(self._object(candidate, "logprobsResult"))
        self._cited += self._objects(self._object(candidate, "citationMetadata"), "citationSources")
        self._sources = self._objects(self._object(candidate, "groundingMetadata"), "groundingChunks") or self._sources
        if isinstance(candidate.get("finishReason"), str) and candidate["finishReason"]:
            self._finish = candidate["finishReason"]

    def _part(self, part: Json) -> Iterator[Json]:
        text = part.get("text")
        if isinstance(text, str) and text:
            yield self._chunks.delta(**{"reasoning_content" if part.get("thought") is True else "content": text})
        elif text not in (None, ""):
            raise self._malformed()
        if "functionCall" in part:
            yield self._call(self._object(part, "functionCall"), part.get("thoughtSignature"))

    def _call(self, called: Json, signature: Any) -> Json:
        if not isinstance(called.get("name"), str):
            raise self._malformed()
        index = self._calls
        self._calls += 1
        call_id = called.get("id")
        if not isinstance(call_id, str) or not call_id:
            call_id = f"call_{self._chunks.id}_{index}"
        given = orjson.dumps(self._object(called, "args")).decode()
        extra = {"extra_content": {"google": {"thought_signature": signature}}} if isinstance(signature, str) else {}
        function = {"name": called["name"], "arguments": given}
        return self._chunks.tool_call(index, function, id=call_id, type="function", **extra)

    def _logprobs(self, result: Json) -> Iterator[Json]:
        chosen = self._objects(result, "chosenCandidates")
        if not chosen:
            return
        tops = self._objects(result, "topCandidates")
        content = []
        for index, token in enumerate(chosen):
            others = self._objects(tops[index], "candidates") if index < len(tops) else []
            content.append({**_logprob(token), "top_logprobs": [_logprob(other) for other in others]})
        chunk = self._chunks.delta()
        chunk["choices"][0]["logprobs"] = {"content": content, "refusal": None}
        yield chunk

    def _take_block(self, reason: Any) -> None:
        if isinstance(reason, str) and reason:
            self._withheld = True
            self._finish = reason

    def _figures(self) -> Json:
        prompt, answer, tools, thoughts, cached = (
            tokens(self._usage.get(name))
            for name in (
                "promptTokenCount", "candidatesTokenCount", "toolUsePromptTokenCount", "thoughtsTokenCount",
                "cachedContentTokenCount",
            )
        )  # fmt: skip
        if prompt is None:
            return {}
        spent = (answer or 0) + (thoughts or 0)
        return usage(prompt + (tools or 0), spent, cached=cached or 0, reasoning=thoughts or 0)

    def _object(self, holder: Json, name: str) -> Json:
        value = holder.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._malformed()
        return value

    def _objects(self, holder: Json, name: str) -> list[Json]:
        value = holder.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._malformed()
        return value

    def _malformed(self) -> OncewiseError:
        return broken(f"{self._provider} sent an event of an unknown shape.")


def _logprob(token: Json) -> Json:
    text, value = token.get("token"), token.get("logProbability")
    known = value if type(value) in (int, float) else -9999.0  # OpenAI's own for a token that is very unlikely
    return {"token": text if isinstance(text, str) else "", "logprob": known, "bytes": None}
