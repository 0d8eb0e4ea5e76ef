"""The OpenAI shape of a chat, for adapters with another wire: its requests taken apart, its chunks put together.

Strict about what has to be translated and blind to the rest: a request that cannot be said on the other wire is refused
before anything is sent, with the place and never the value.

Deliberately absent: any other wire.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from oncewise.errors import InvalidRequest
from oncewise.model import ChatRequest, CompletionRequest

__all__ = [
    "ChunkMaker",
    "Place",
    "arguments",
    "as_completion",
    "function",
    "json_schema",
    "messages",
    "no_choices",
    "objects",
    "parts",
    "plain_text",
    "refused",
    "resource",
    "tokens",
    "usage",
]

Place = tuple[str | int, ...]
"""Where in a request something stands: `("messages", 0, "content")`."""

Json = dict[str, Any]


# -- requests ----------------------------------------------------------------------------------------------------


def as_completion(request: ChatRequest) -> CompletionRequest:
    """The chat completion request that says the same."""
    turns = [{"role": message.role, "content": message.content} for message in request.messages]
    return CompletionRequest(request.provider, request.model, {"messages": turns, **request.params.given()})


def refused(place: Place, problem: str) -> InvalidRequest:
    """The error for a request that cannot be translated; `problem` is a sentence without its subject."""
    return InvalidRequest(f"{'.'.join(map(str, place))} {problem}.", errors=((place, problem),))


def messages(body: Mapping[str, Any]) -> Iterator[tuple[Place, Json]]:
    """Each message and where it stands.

    Raises:
        InvalidRequest: there is none, or one is no object.
    """
    given = objects(body.get("messages"), ("messages",))
    if not given:
        raise refused(("messages",), "must have at least one message")
    for index, message in enumerate(given):
        yield ("messages", index), message


def objects(value: Any, place: Place) -> list[Json]:
    """A list of objects; empty if there is none.

    Raises:
        InvalidRequest: it is something else.
    """
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise refused(place, "must be a list of objects")
    return value


def parts(content: Any, place: Place) -> list[Json]:
    """The content of a message as parts: a string is one text part, none is no part; empty texts are left out.

    Raises:
        InvalidRequest: it is neither a string nor a list of objects, or a text part has no text.
    """
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    found = objects(content, place)
    for index, part in enumerate(found):
        if part.get("type") == "text" and not isinstance(part.get("text"), str):
            raise refused((*place, index, "text"), "must be a string")
    return [part for part in found if part.get("type") != "text" or part["text"]]


def plain_text(content: Any, place: Place) -> str:
    """The text of a content; whatever else it has is left out.

    Raises:
        InvalidRequest: as `parts`.
    """
    return "".join(part["text"] for part in parts(content, place) if part.get("type") == "text")


def function(value: Mapping[str, Any], place: Place) -> Json:
    """The `function` of a tool, a tool call or a tool choice.

    Raises:
        InvalidRequest: there is none, or it has no name.
    """
    found = value.get("function")
    if not isinstance(found, dict) or not isinstance(found.get("name"), str) or not found["name"]:
        raise refused((*place, "function", "name"), "must be a string")
    return found


def arguments(called: Mapping[str, Any], place: Place) -> Json:
    """The arguments of a tool call; none at all is `{}`.

    Raises:
        InvalidRequest: they are not a JSON object in a string.
    """
    text = called.get("arguments") or "{}"
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise refused((*place, "function", "arguments"), "must be a JSON object in a string")
    return value


def resource(url: Any, place: Place) -> tuple[str, str | None]:
    """Of a `data:` URL the media type and the base64; of any other the URL itself and None.

    Raises:
        InvalidRequest: it is no https and no base64 data URL. Plain http is refused: the provider would fetch it in
            the clear.
    """
    if not isinstance(url, str):
        raise refused(place, "must be a string")
    if url.startswith("https://"):
        return url, None
    head, _, payload = url.partition(",")
    media_type = head.removeprefix("data:").partition(";")[0]
    if not (head.startswith("data:") and head.endswith(";base64") and media_type and payload):
        raise refused(place, "must be an https URL or a base64 data URL")
    return media_type, payload


def json_schema(response_format: Mapping[str, Any]) -> Json:
    """The schema of a `response_format` of type `json_schema`.

    Raises:
        InvalidRequest: it has none.
    """
    wrapped = response_format.get("json_schema")
    schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
    if not isinstance(schema, dict):
        raise refused(("response_format", "json_schema", "schema"), "must be an object")
    return schema


def no_choices(body: Mapping[str, Any], provider: str) -> None:
    """Refuse more than one choice, which a stream of this wire cannot carry.

    Raises:
        InvalidRequest: `n` is neither absent nor 1.
    """
    if body.get("n") not in (None, 1):
        raise refused(("n",), f"must be 1 for {provider}")


# -- chunks ------------------------------------------------------------------------------------------------------


@dataclass
class ChunkMaker:
    """Makes the chunks of one answer, which all carry the same id, time and model.

    Attributes:
        created_s: Seconds since the Unix epoch, whole.
    """

    created_s: int
    id: str = ""
    model: str = ""

    def delta(self, **delta: Any) -> Json:
        """A piece of the answer."""
        return self._chunk([{"index": 0, "delta": delta, "finish_reason": None}])

    def tool_call(self, index: int, called: Json, **extra: Any) -> Json:
        """A piece of a tool call; `called` has what is new of its function."""
        return self.delta(tool_calls=[{"index": index, **extra, "function": called}])

    def finish(self, reason: str, native: str, **extra: Any) -> Json:
        """The end, and the provider's own word for its reason as OpenRouter names it."""
        choice = {"index": 0, "delta": {}, "finish_reason": reason, "native_finish_reason": native}
        return self._chunk([choice]) | extra

    def usage(self, usage: Json) -> Json:
        """The figures, after the end."""
        return self._chunk([]) | {"usage": usage}

    def _chunk(self, choices: list[Json]) -> Json:
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created_s, "model": self.model}
        return {**head, "choices": choices}


def tokens(value: Any) -> int | None:
    """A count of tokens; None if it is no such thing."""
    return value if type(value) is int and value >= 0 else None


def usage(prompt: int, completion: int, *, cached: int = 0, reasoning: int | None = None) -> Json:
    """Figures in the shape of a chat completion; `cached` and `reasoning` are parts of the first two."""
    figures: Json = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    figures["prompt_tokens_details"] = {"cached_tokens": cached}
    if reasoning is not None:
        figures["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return figures
