"""A chat completion request in the words of Gemini's `streamGenerateContent` (v1beta).

============================ =====================================================================================
leading system messages       `systemInstruction`; later ones become user messages, as they do for threads
tool calls and tool messages  `functionCall` and `functionResponse` parts with the same ids; a result that is no JSON
                              object is wrapped as `{"result": …}`; neighbours of one role are one content
thought signatures            `extra_content.google.thought_signature` of a tool call, as Google's own OpenAI endpoint
                              has it; Gemini 3 refuses a call that comes back without its signature
images, audio, files          `inlineData` for data URLs, `fileData` for https
sampling, `stop`, `seed`…     `generationConfig`, logprobs included
`response_format`             `responseMimeType` and `responseJsonSchema`
`reasoning_effort`            `thinkingConfig`: a level, for Gemini 2.5 a budget
`tools`, `tool_choice`        function declarations and `toolConfig`; tools that are no functions pass as they are
`logit_bias`, `user`…         left out, since there is nothing like them
============================ =====================================================================================

Any other field passes as it is (`safetySettings`, `cachedContent`…; `generationConfig` is merged): Gemini judges it.

Deliberately absent: the answer.
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import orjson

from oncewise.providers.chat_shape import (
    Place,
    arguments,
    function,
    json_schema,
    messages,
    no_choices,
    objects,
    parts,
    plain_text,
    refused,
    resource,
)

__all__ = ["generate_path", "generate_request"]

Json = dict[str, Any]

_SAMPLING = {
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "seed": "seed",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
    "logprobs": "responseLogprobs",
    "top_logprobs": "logprobs",
}
_TRANSLATED = frozenset({
    "messages", "model", "max_tokens", "max_completion_tokens", "stop", "tools", "tool_choice", "response_format",
    "reasoning_effort", "stream", "generationConfig", *_SAMPLING,
})  # fmt: skip
_WITHOUT_MEANING = frozenset({
    "logit_bias", "n", "stream_options", "metadata", "store", "modalities", "prediction", "verbosity", "service_tier",
    "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls", "user",
})  # fmt: skip
_BUDGETS = {"none": 0, "minimal": 1024, "low": 1024, "medium": 8192, "high": 24_576}


def generate_path(model: str) -> str:
    """Where a model answers. Its name is one segment, whatever stands in it."""
    kind, slash, name = model.partition("/")
    if not (slash and kind in ("models", "tunedModels")):
        kind, name = "models", model
    return f"{kind}/{quote(name, safe='')}:streamGenerateContent?alt=sse"


def generate_request(body: Mapping[str, Any]) -> Json:
    """The body that asks the same.

    Raises:
        InvalidRequest: it cannot be said there; names the place.
    """
    no_choices(body, "gemini")
    passed = {name: value for name, value in body.items() if name not in _TRANSLATED | _WITHOUT_MEANING}
    system, contents = _conversation(body)
    told = {
        "systemInstruction": {"parts": system} if system else None,
        "contents": contents,
        "tools": _tools(body),
        "toolConfig": _tool_config(body.get("tool_choice")),
        "generationConfig": _generation_config(body),
    }
    return {name: value for name, value in (passed | told).items() if value not in (None, {}, [])}


def _conversation(body: Mapping[str, Any]) -> tuple[list[Json], list[Json]]:
    system: list[Json] = []
    contents: list[Json] = []
    names: dict[Any, str] = {}
    for place, message in messages(body):
        if message.get("role") in ("system", "developer") and not contents:
            system += _parts(message, place)
            continue
        role, said = _said(message, place, names)
        if contents and contents[-1]["role"] == role:
            contents[-1]["parts"] += said
        elif said:
            contents.append({"role": role, "parts": said})
    return system, contents


def _said(message: Json, place: Place, names: dict[Any, str]) -> tuple[str, list[Json]]:
    if message.get("role") == "assistant":
        return "model", [*_parts(message, place), *_function_calls(message, place, names)]
    if message.get("role") == "tool":
        return "user", [_function_response(message, place, names)]
    return "user", _parts(message, place)


def _function_calls(message: Json, place: Place, names: dict[Any, str]) -> list[Json]:
    found = []
    for index, call in enumerate(objects(message.get("tool_calls"), (*place, "tool_calls"))):
        at = (*place, "tool_calls", index)
        called = function(call, at)
        if isinstance(call.get("id"), str):
            names[call["id"]] = called["name"]
        part = {"functionCall": {"id": call.get("id"), "name": called["name"], "args": arguments(called, at)}}
        found.append(part | _signature(call))
    return found


def _signature(call: Json) -> Json:
    extra = call.get("extra_content")
    google = extra.get("google") if isinstance(extra, dict) else None
    signature = google.get("thought_signature") if isinstance(google, dict) else None
    return {"thoughtSignature": signature} if isinstance(signature, str) else {}


def _function_response(message: Json, place: Place, names: Mapping[Any, str]) -> Json:
    call_id = message.get("tool_call_id")
    if not isinstance(call_id, str) or call_id not in names:
        raise refused((*place, "tool_call_id"), "must be the id of a tool call before it")
    text = plain_text(message.get("content"), (*place, "content"))
    return {"functionResponse": {"id": call_id, "name": names[call_id], "response": _result(text)}}


def _result(text: str) -> Json:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = text
    return value if isinstance(value, dict) else {"result": value}


def _parts(message: Json, place: Place) -> list[Json]:
    place = (*place, "content")
    return [_part(part, (*place, index)) for index, part in enumerate(parts(message.get("content"), place))]


def _part(part: Json, place: Place) -> Json:
    kind = part.get("type")
    if kind == "text":
        return {"text": part["text"]}
    if kind == "refusal":
        return {"text": part.get("refusal")}
    if kind == "image_url":
        image = part.get("image_url")
        return _data(image.get("url") if isinstance(image, dict) else image, (*place, "image_url", "url"))
    held = part.get(kind) if isinstance(kind, str) else None
    if kind == "file" and isinstance(held, dict):
        return _data(held.get("file_data"), (*place, "file", "file_data"))
    if kind == "input_audio" and isinstance(held, dict):
        return {"inlineData": {"mimeType": f"audio/{held.get('format')}", "data": held.get("data")}}
    return part


def _data(url: Any, place: Place) -> Json:
    media_type, payload = resource(url, place)
    if payload is None:
        return {"fileData": {"fileUri": url}}
    return {"inlineData": {"mimeType": media_type, "data": payload}}


def _tools(body: Mapping[str, Any]) -> list[Json]:
    declared, others = [], []
    for index, tool in enumerate(objects(body.get("tools"), ("tools",))):
        if tool.get("type") == "function":
            declared.append(_declaration(function(tool, ("tools", index))))
        else:
            others.append(tool)
    return [{"functionDeclarations": declared}, *others] if declared else others


def _declaration(declared: Json) -> Json:
    given = {
        "name": declared["name"],
        "description": declared.get("description"),
        "parametersJsonSchema": declared.get("parameters"),
    }
    return {name: value for name, value in given.items() if value is not None}


def _tool_config(asked: Any) -> Json | None:
    if asked is None:
        return None
    if isinstance(asked, dict):
        only = {"mode": "ANY", "allowedFunctionNames": [function(asked, ("tool_choice",))["name"]]}
        return {"functionCallingConfig": only}
    mode = {"auto": "AUTO", "none": "NONE", "required": "ANY"}.get(asked) if isinstance(asked, str) else None
    if mode is None:
        raise refused(("tool_choice",), "must be auto, none, required or a function")
    return {"functionCallingConfig": {"mode": mode}}


def _generation_config(body: Mapping[str, Any]) -> Json:
    given = body.get("generationConfig")
    config = dict(given) if isinstance(given, dict) else {}
    config |= {theirs: body[ours] for ours, theirs in _SAMPLING.items() if body.get(ours) is not None}
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name) is not None:
            config["maxOutputTokens"] = body[name]
    if body.get("stop") is not None:
        config["stopSequences"] = [body["stop"]] if isinstance(body["stop"], str) else body["stop"]
    if body.get("reasoning_effort") is not None:
        config["thinkingConfig"] = _thinking(str(body.get("model")), body["reasoning_effort"])
    return config | _response_format(body.get("response_format"))


def _thinking(model: str, effort: Any) -> Json:
    if "gemini-2.5" in model:
        budget = _BUDGETS.get(effort) if isinstance(effort, str) else None
        if budget is None:
            raise refused(("reasoning_effort",), "must be none, minimal, low, medium or high for gemini")
        return {"thinkingBudget": budget}
    return {"thinkingLevel": effort}


def _response_format(wanted: Any) -> Json:
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind in (None, "text"):
        return {}
    if kind == "json_object":
        return {"responseMimeType": "application/json"}
    if kind == "json_schema":
        return {"responseMimeType": "application/json", "responseJsonSchema": json_schema(wanted)}
    raise refused(("response_format", "type"), "must be text, json_object or json_schema for gemini")
