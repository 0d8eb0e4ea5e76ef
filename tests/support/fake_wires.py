"""The languages the fake provider speaks: what it would say in OpenAI chunks, said on another wire."""

import json
from typing import Any
from urllib.parse import unquote

__all__ = ["AnthropicWire", "GeminiWire", "OpenAIWire", "wire_of"]

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "content_filter": "refusal"}
_FINISH_REASONS = {"stop": "STOP", "length": "MAX_TOKENS", "content_filter": "SAFETY"}


def wire_of(path: str) -> "OpenAIWire | None":
    """The wire whose endpoint a path is; a new one, since it remembers what it said."""
    if path.endswith("/chat/completions"):
        return OpenAIWire()
    if path.endswith("/messages"):
        return AnthropicWire()
    if path.endswith(":streamGenerateContent"):
        return GeminiWire(unquote(path.rpartition("/")[2].removesuffix(":streamGenerateContent")))
    return None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class OpenAIWire:
    """Chunks as they are."""

    def request(self, body: dict[str, Any]) -> dict[str, Any]:
        """What the story needs to know of a request: `model`, `stream`, `stream_options`."""
        return body

    def events(self, value: Any) -> list[str]:
        """The blocks, without their blank lines, that say a chunk, a marker or anything else."""
        return ["data: " + (value if isinstance(value, str) else _json(value))]


class AnthropicWire(OpenAIWire):
    def __init__(self) -> None:
        self.begun = False
        self.deltas = 0

    def events(self, value: Any) -> list[str]:
        if value == "[DONE]":
            return [self.event({"type": "message_stop"})]
        if not isinstance(value, dict):
            return super().events(value)
        if "error" in value:
            return [self.event({"type": "error", "error": {"type": "api_error", "message": value["error"]["message"]}})]
        said = [] if self.begun else [self.event(self.start(value["model"]))]
        self.begun = True
        for choice in value["choices"]:
            said += self.choice(choice)
        return said

    def choice(self, choice: dict[str, Any]) -> list[str]:
        delta, said = choice["delta"], []
        if choice["index"]:
            return []
        for name, kind in (("reasoning_content", "thinking"), ("content", "text")):
            if isinstance(delta.get(name), str):
                self.deltas += kind == "text"
                piece = {"type": f"{kind}_delta", kind: delta[name]}
                said.append(self.event({"type": "content_block_delta", "index": 0, "delta": piece}))
        if choice["finish_reason"]:
            reason = _STOP_REASONS.get(choice["finish_reason"], choice["finish_reason"])
            figures = {"output_tokens": self.deltas}
            said.append(self.event({"type": "message_delta", "delta": {"stop_reason": reason}, "usage": figures}))
        return said

    def start(self, model: str) -> dict[str, Any]:
        message = {"id": "msg_1", "type": "message", "role": "assistant", "content": [], "model": model}
        return {"type": "message_start", "message": {**message, "usage": {"input_tokens": 10, "output_tokens": 1}}}

    def event(self, value: dict[str, Any]) -> str:
        return f"event: {value['type']}\ndata: {_json(value)}"


class GeminiWire(OpenAIWire):
    def __init__(self, model: str) -> None:
        self.model = model
        self.deltas = 0

    def request(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"model": self.model, "stream": True}

    def events(self, value: Any) -> list[str]:
        if value == "[DONE]":
            return []
        if not isinstance(value, dict) or "error" in value:
            return super().events(value)
        candidates = [self.candidate(choice) for choice in value["choices"]]
        figures = {"promptTokenCount": 10, "candidatesTokenCount": self.deltas}
        event = {"candidates": candidates, "modelVersion": self.model, "responseId": "r1", "usageMetadata": figures}
        return super().events(event)

    def candidate(self, choice: dict[str, Any]) -> dict[str, Any]:
        delta = choice["delta"]
        parts = []
        if isinstance(delta.get("reasoning_content"), str):
            parts.append({"text": delta["reasoning_content"], "thought": True})
        if isinstance(delta.get("content"), str):
            self.deltas += not choice["index"]
            parts.append({"text": delta["content"]})
        said = {"content": {"parts": parts, "role": "model"}, "index": choice["index"]}
        if choice["finish_reason"]:
            said["finishReason"] = _FINISH_REASONS.get(choice["finish_reason"], choice["finish_reason"])
        return said
