"""`/openapi.json`: what FastAPI knows of its routes, and the raw ones described by hand.

Deliberately absent: a page that shows it.
"""

from typing import Any

from pydantic import BaseModel

from oncewise.api.documents import Problem, TurnAnswer
from oncewise.api.schema import MessageIn

__all__ = ["RAW_PATHS", "with_raw_routes"]

_REF = "#/components/schemas/{model}"
_ERRORS = {
    "description": "Error",
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
}
_EVENTS = {
    "description": "`ping`, `meta`, `delta`, `reset`, then one `done` or `error`.",
    "content": {"text/event-stream": {}},
}
_IDLE = {"description": "There is nothing (more) to send."}
_ANSWER = {
    "description": "The stored turn.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/TurnAnswer"}}},
}


def _path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _header(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": description}


_ORG = _header("x-org-id", "The tenant; with an API key of a tenant it may be left out.")
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, `ow_...`."},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same."},
}
_BODY = {
    "required": True,
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/MessageIn"}}},
}
_ASK = [
    _path("thread_id"),
    _ORG,
    _header("Idempotency-Key", "Names the request; kept for 24 h."),
    _header("x-coalesce", "`off`: a turn of its own."),
]
_LAST = {"name": "last_event_id", "in": "query", "required": False, "schema": {"type": "string"}}


def _post(operation: str, summary: str, good: dict[str, Any]) -> dict[str, Any]:
    responses = {"200": good, "4XX": _ERRORS, "5XX": _ERRORS}
    return {
        "post": {
            "operationId": operation,
            "summary": summary,
            "tags": ["messages"],
            "parameters": _ASK,
            "requestBody": _BODY,
            "responses": responses,
        }
    }


def _watch(operation: str, summary: str, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    responses = {"200": _EVENTS, "204": _IDLE, "4XX": _ERRORS, "5XX": _ERRORS}
    described = {"operationId": operation, "summary": summary, "tags": ["messages"]}
    return {"get": {**described, "parameters": parameters, "responses": responses}}


# -- /v1 -----------------------------------------------------------------------------------------------------------

_ANY = {"schema": {"type": "object"}}
_V1_ERRORS = {"description": "An error in OpenAI's shape.", "content": {"application/json": _ANY}}
_CHAT = {"required": True, "content": {"application/json": _ANY}}


def _v1(method: str, operation: str, summary: str, *parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    good = {"description": "As OpenAI answers it.", "content": {"application/json": _ANY, **more.pop("also", {})}}
    described = {"operationId": operation, "summary": summary, "tags": ["openai"], "parameters": [*parameters, _ORG]}
    return {method: {**described, "responses": {"200": good, "4XX": _V1_ERRORS, "5XX": _V1_ERRORS}, **more}}


_V1_PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _v1(
        "post",
        "create_completion",
        "Ask a model; `stream: true` for a stream.",
        _header("Idempotency-Key", "Requests with the same one share a running call."),
        _header("x-coalesce", "`on` or `off`: whether to share a running call."),
        _header("X-Stream-Resume", "`1`: the stream's chunks carry ids, and it can be resumed."),
        requestBody=_CHAT,
        also={"text/event-stream": {}},
    ),
    "/v1/chat/completions/{call}/stream": _v1(
        "get",
        "resume_completion",
        "Watch a call from where the client is.",
        _path("call"),
        {"name": "starting_after", "in": "query", "required": False, "schema": {"type": "string"}},
        also={"text/event-stream": {}},
    ),
    "/v1/chat/completions/{call}/cancel": _v1(
        "post", "cancel_completion", "Stop a call for everyone who waits for it.", _path("call")
    ),
    "/v1/coalesce/explain": _v1(
        "post", "explain_coalescing", "Say whether a request would share a call, and why.", requestBody=_CHAT
    ),
    "/v1/models": _v1("get", "list_models", "The names that requests may use."),
    "/v1/models/{model}": _v1("get", "get_model", "One of them.", _path("model")),
}

RAW_PATHS: dict[str, dict[str, Any]] = {
    "/api/threads/{thread_id}/messages": _post("post_message", "Add a message and wait for the answer.", _ANSWER),
    "/api/threads/{thread_id}/messages/stream": _post(
        "stream_message", "Add a message and watch the answer come.", _EVENTS
    ),
    "/api/threads/{thread_id}/stream": _watch(
        "join_thread", "Watch the thread's active turn.", [_path("thread_id"), _ORG]
    ),
    "/api/threads/{thread_id}/turns/{turn_id}/stream": _watch(
        "resume_turn",
        "Watch a turn from where the client is.",
        [
            _path("thread_id"),
            _path("turn_id"),
            _ORG,
            _header("Last-Event-ID", "The id of the last event seen."),
            _LAST,
        ],
    ),
}


def with_raw_routes(document: dict[str, Any]) -> dict[str, Any]:
    """Add the routes that FastAPI does not know of, and the documents they use."""
    components = document.setdefault("components", {})
    components["securitySchemes"] = _KEYS
    # Either header, or none while no key was made.
    document["security"] = [{}, *({name: []} for name in _KEYS)]
    schemas = components.setdefault("schemas", {})
    models: tuple[type[BaseModel], ...] = (MessageIn, TurnAnswer, Problem)
    for model in models:
        schema = model.model_json_schema(ref_template=_REF)
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _correct(operation, path)
    document["paths"].update(RAW_PATHS | _V1_PATHS)
    return document


def _correct(operation: dict[str, Any], path: str) -> None:
    """Say of a FastAPI route what the edge adds to it: the tenant's header, and errors as problems."""
    if path.startswith("/api/threads"):
        operation.setdefault("parameters", []).append(_ORG)
    operation["responses"].pop("422", None)
    operation["responses"] |= {"4XX": _ERRORS, "5XX": _ERRORS}
