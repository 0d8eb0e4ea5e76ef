"""A chat completion request in the words of Anthropic's Messages API (version 2023-06-01).

============================ =====================================================================================
leading system messages       `system`; later ones become user messages, as they do for threads
tool calls and tool messages  `tool_use` and `tool_result` blocks; neighbours of one role are one message
images, files                 `image` and `document` blocks; parts of other types pass as they are
`max_tokens`                  required there: without one, 4,096 to 16,384 by model, on top of a thinking budget
`temperature`                 at most 1, the highest there
`stop`                        `stop_sequences`
`tools`, `tool_choice`        with `parallel_tool_calls`; tools that are no functions pass as they are
`response_format`             a JSON schema becomes `output_config.format`; JSON without a schema is refused
`reasoning_effort`            `output_config.effort`
`user`                        `metadata.user_id`
`thinking_blocks`             of an assistant message: its signed thinking, as an earlier answer carried it
`seed`, penalties, logprobs…  left out, since there is nothing like them; Anthropic's own OpenAI endpoint does so too
============================ =====================================================================================

Any other field passes as it is (`top_k`, `thinking`, `cache_control`…), and Anthropic judges it.

Deliberately absent: the answer.
"""

from collections.abc import Mapping
from typing import Any

from oncewise.providers.chat_shape import (
    Place,
    arguments,
    function,
    json_schema,
    messages,
    no_choices,
    objects,
    parts,
    refused,
    resource,
)

__all__ = ["messages_request"]

Json = dict[str, Any]

_TRANSLATED = frozenset({
    "messages", "model", "max_tokens", "max_completion_tokens", "stop", "temperature", "tools", "tool_choice",
    "parallel_tool_calls", "response_format", "reasoning_effort", "stream", "user", "output_config",
})  # fmt: skip
_WITHOUT_MEANING = frozenset({
    "frequency_penalty", "presence_penalty", "seed", "logit_bias", "logprobs", "top_logprobs", "n", "stream_options",
    "metadata", "store", "modalities", "prediction", "verbosity", "service_tier", "safety_identifier",
    "prompt_cache_key", "prompt_cache_retention",
})  # fmt: skip
# The first generations refuse more. The newer ones would take more than the 120 s of a call can bring.
_MAX_TOKENS = (("claude-3-5", 8192), ("claude-3-7", 16_384), ("claude-3", 4096), ("", 16_384))


def messages_request(body: Mapping[str, Any]) -> Json:
    """The body of `POST /v1/messages` that asks the same, as a stream.

    Raises:
        InvalidRequest: it cannot be said there; names the place.
    """
    no_choices(body, "anthropic")
    passed = {name: value for name, value in body.items() if name not in _TRANSLATED | _WITHOUT_MEANING}
    system, turns = _conversation(body)
    given = {
        "model": body.get("model"),
        "max_tokens": _max_tokens(body),
        "system": system,
        "messages": turns,
        "temperature": _temperature(body.get("temperature")),
        "stop_sequences": _stop(body.get("stop")),
        "tools": [_tool(tool, ("tools", index)) for index, tool in enumerate(objects(body.get("tools"), ("tools",)))],
        "tool_choice": _tool_choice(body),
        "output_config": _output_config(body),
        "metadata": {"user_id": body["user"]} if body.get("user") else None,
    }
    # An empty list, e.g. of tools, says nothing, and null is how some clients leave a field out.
    told = {name: value for name, value in given.items() if value not in (None, [], {})}
    return {name: value for name, value in passed.items() if value is not None} | told | {"stream": True}


def _conversation(body: Mapping[str, Any]) -> tuple[list[Json], list[Json]]:
    system: list[Json] = []
    turns: list[Json] = []
    for place, message in messages(body):
        if message.get("role") in ("system", "developer") and not turns:
            system += _content(message, place)
            continue
        role, blocks = _blocks(message, place)
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        elif blocks:
            turns.append({"role": role, "content": blocks})
    return system, turns


def _blocks(message: Json, place: Place) -> tuple[str, list[Json]]:
    role = message.get("role")
    if role == "assistant":
        thinking = objects(message.get("thinking_blocks"), (*place, "thinking_blocks"))
        return role, [*thinking, *_content(message, place), *_tool_uses(message, place)]
    if role == "tool":
        if not isinstance(message.get("tool_call_id"), str):
            raise refused((*place, "tool_call_id"), "must be a string")
        content = _content(message, place)
        return "user", [{"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": content}]
    return "user", _content(message, place)


def _content(message: Json, place: Place) -> list[Json]:
    place = (*place, "content")
    return [_block(part, (*place, index)) for index, part in enumerate(parts(message.get("content"), place))]


def _block(part: Json, place: Place) -> Json:
    kept = {"cache_control": part["cache_control"]} if part.get("cache_control") else {}
    if part.get("type") == "text":  # nothing else of it: the wire refuses fields it does not know
        return {"type": "text", "text": part["text"], **kept}
    if part.get("type") == "image_url":
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        return {"type": "image", "source": _source(url, (*place, "image_url", "url")), **kept}
    if part.get("type") == "file" and isinstance(part.get("file"), dict) and "file_data" in part["file"]:
        return {"type": "document", "source": _source(part["file"]["file_data"], (*place, "file", "file_data")), **kept}
    if part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    return part


def _source(url: Any, place: Place) -> Json:
    media_type, payload = resource(url, place)
    if payload is None:
        return {"type": "url", "url": url}
    return {"type": "base64", "media_type": media_type, "data": payload}


def _tool_uses(message: Json, place: Place) -> list[Json]:
    uses = []
    for index, call in enumerate(objects(message.get("tool_calls"), (*place, "tool_calls"))):
        at = (*place, "tool_calls", index)
        called = function(call, at)
        uses.append({"type": "tool_use", "id": call.get("id"), "name": called["name"], "input": arguments(called, at)})
    return uses


def _tool(tool: Json, place: Place) -> Json:
    if tool.get("type") != "function":
        return tool
    declared = function(tool, place)
    schema = declared.get("parameters") or {"type": "object", "properties": {}}
    known = {name: declared[name] for name in ("description", "strict") if declared.get(name) is not None}
    kept = {"cache_control": tool["cache_control"]} if tool.get("cache_control") else {}
    return {"name": declared["name"], **known, "input_schema": schema, **kept}


def _tool_choice(body: Mapping[str, Any]) -> Json | None:
    asked = body.get("tool_choice")
    choice: Json | None = None
    if isinstance(asked, str):
        choice = {"auto": {"type": "auto"}, "none": {"type": "none"}, "required": {"type": "any"}}.get(asked)
        if choice is None:
            raise refused(("tool_choice",), "must be auto, none, required or a function")
    elif isinstance(asked, dict):
        choice = {"type": "tool", "name": function(asked, ("tool_choice",))["name"]}
    if body.get("parallel_tool_calls") is False and body.get("tools"):
        choice = choice or {"type": "auto"}
        choice |= {"disable_parallel_tool_use": True} if choice["type"] != "none" else {}
    return choice


def _max_tokens(body: Mapping[str, Any]) -> Any:
    for name in ("max_completion_tokens", "max_tokens"):
        if body.get(name) is not None:
            return body[name]
    thinking = body.get("thinking")
    budget = thinking.get("budget_tokens") if isinstance(thinking, dict) else None
    model = str(body.get("model"))
    most = next(most for prefix, most in _MAX_TOKENS if model.startswith(prefix))
    return most + (budget if type(budget) is int else 0)


def _temperature(asked: Any) -> Any:
    return min(asked, 1) if type(asked) in (int, float) else asked


def _stop(asked: Any) -> Any:
    return [asked] if isinstance(asked, str) else asked


def _output_config(body: Mapping[str, Any]) -> Json:
    config = dict(body["output_config"]) if isinstance(body.get("output_config"), dict) else {}
    if body.get("reasoning_effort") is not None:
        config["effort"] = body["reasoning_effort"]
    wanted = body.get("response_format")
    if not isinstance(wanted, dict) or wanted.get("type") == "text":
        return config
    if wanted.get("type") != "json_schema":
        raise refused(("response_format", "type"), "must be text or json_schema for anthropic")
    return config | {"format": {"type": "json_schema", "schema": json_schema(wanted)}}
