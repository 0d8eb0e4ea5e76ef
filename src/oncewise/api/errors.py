"""The one table from error code to HTTP status, and how an error looks on the wire (RFC 9457).

Deliberately absent: the texts of exceptions that are not ours. Whatever is not an `OncewiseError` becomes `internal`.
"""

import math
from http import HTTPStatus

import orjson

from oncewise.errors import InvalidRequest, OncewiseError

__all__ = ["STATUS", "problem_body", "problem_headers", "status_of"]

STATUS: dict[str, int] = {
    "malformed_json": 400,
    "malformed_request": 400,
    "duplicate_header": 400,
    "missing_org": 401,
    "unauthorized": 401,
    "forbidden": 403,
    "org_mismatch": 403,
    "not_found": 404,
    "model_not_found": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "thread_busy": 409,
    "head_moved": 409,
    "turn_cancelled": 409,
    "body_too_large": 413,
    "unsupported_media_type": 415,
    "misdirected_host": 421,
    "invalid_request": 422,
    "idempotency_mismatch": 422,
    "unknown_provider": 422,
    "queue_full": 429,
    "rate_limited": 429,
    "provider_rate_limited": 429,
    "headers_too_large": 431,
    "internal": 500,
    "flight_failed": 500,
    "reentrant_flight": 500,
    "wrong_loop": 500,
    "schema_mismatch": 500,
    "provider_error": 502,
    "provider_protocol": 502,
    "leader_lost": 502,
    "response_too_large": 502,
    "upstream_cancelled": 502,
    "overloaded": 503,
    "provider_unavailable": 503,
    "shutting_down": 503,
    "storage_unavailable": 503,
    "coordination_unavailable": 503,
    "not_persisted": 503,
    "provider_timeout": 504,
    "queue_timeout": 504,
    "flight_timeout": 504,
    "wait_timeout": 504,
    "storage_full": 507,
}
"""HTTP status by error code; a test compares it with the classes of `oncewise.errors`."""

_WITH_RETRY_AFTER = (429, 503)


def status_of(error: OncewiseError) -> int:
    """The HTTP status of an error."""
    return STATUS[error.code]


def problem_body(error: OncewiseError, request_id: str) -> bytes:
    """The `application/problem+json` document of an error."""
    status = status_of(error)
    problem = {
        # No page to point to: then RFC 9457 wants about:blank and the status phrase as the title.
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": error.detail,
        "code": error.code,
        "retryable": error.retryable,
        "request_id": request_id,
    }
    if error.turn_id is not None:
        problem["turn_id"] = error.turn_id
    if status == HTTPStatus.UNPROCESSABLE_ENTITY:
        found = error.errors if isinstance(error, InvalidRequest) else ()
        problem["errors"] = [{"loc": list(loc), "msg": msg} for loc, msg in found]
    return orjson.dumps(problem)


def problem_headers(error: OncewiseError) -> list[tuple[bytes, bytes]]:
    """Headers that belong to an error's status, besides those of every answer."""
    status = status_of(error)
    headers = [(b"content-type", b"application/problem+json")]
    if status in _WITH_RETRY_AFTER:
        # Whole seconds, rounded up: a client that comes back early would only be refused again.
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s or 1.0))))
    if status == HTTPStatus.UNAUTHORIZED:
        headers.append((b"www-authenticate", b'Bearer realm="oncewise"'))
    return headers
