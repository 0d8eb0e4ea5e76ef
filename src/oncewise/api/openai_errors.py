"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`.

Deliberately absent: the status of an error, which is the same as everywhere (`oncewise.api.errors`).
"""

from typing import Any

import orjson

from oncewise.api.errors import problem_headers, status_of
from oncewise.errors import InvalidRequest, ModelNotFound, OncewiseError

__all__ = ["openai_body", "openai_error", "openai_headers"]

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}


def openai_error(error: OncewiseError) -> dict[str, Any]:
    """The document of an error."""
    status = status_of(error)
    fallback = "invalid_request_error" if status < 500 else "api_error"
    return {
        "error": {
            "message": error.detail,
            "type": _TYPES.get(status, fallback),
            "param": _param(error),
            "code": error.code,
        }
    }


def openai_body(error: OncewiseError) -> bytes:
    """The body of an answer that is an error."""
    return orjson.dumps(openai_error(error))


def openai_headers(error: OncewiseError) -> list[tuple[bytes, bytes]]:
    """Headers that belong to an error's status, besides those of every answer."""
    headers = [(b"content-type", b"application/json"), *problem_headers(error)[1:]]
    if not error.retryable:
        # OpenAI's clients repeat 409 and every 5xx twice unless they are told that it is of no use.
        headers.append((b"x-should-retry", b"false"))
    return headers


def _param(error: OncewiseError) -> str | None:
    if isinstance(error, ModelNotFound):
        return "model"
    places = error.errors if isinstance(error, InvalidRequest) else ()
    return ".".join(map(str, places[0][0])) if places else None
