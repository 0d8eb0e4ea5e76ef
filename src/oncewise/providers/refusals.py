"""What a provider's refusal means for a caller: which error, whether to retry, and when.

Judged by the status and by the machine-readable names in the error object (`code`, `type`, Google's `status` and
`details`), never by its sentence.

Deliberately absent: the sentence. It may quote the prompt or the key.
"""

import math
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import orjson

from oncewise.errors import OncewiseError, ProviderError, ProviderRateLimited, ProviderUnavailable

__all__ = ["error_names", "refusal", "retry_after_s", "retry_delay_s", "stream_refusal"]

MAX_RETRY_AFTER_S = 86_400.0

_TRANSIENT = frozenset({408, 409, 425})
_OUT_OF_CREDIT = frozenset({"insufficient_quota", "billing_not_active", "billing_hard_limit_reached", "billing_error"})
_STATUS_OF = {
    "rate_limit_exceeded": 429,
    "rate_limit_error": 429,
    "too_many_requests": 429,
    "invalid_request_error": 400,
    "context_length_exceeded": 400,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "model_not_found": 404,
    "request_too_large": 413,
    "overloaded_error": 503,
}


def refusal(provider: str, status: int, names: frozenset[str], retry_after: float | None) -> OncewiseError:
    """The error for an answer with this status.

    `names` are what `error_names` found in its body; `retry_after` is in seconds, None if the provider does not say.
    """
    if status == 402 or names & _OUT_OF_CREDIT:
        return ProviderError(f"The account with {provider} has no credit left.", retryable=False)
    if "API_KEY_INVALID" in names:  # Google answers 400 to it
        return ProviderError(_advice(provider, 401), retryable=False)
    if status == 429:
        return ProviderRateLimited(
            f"{provider} refused the call: its rate limit is reached.", retry_after_s=retry_after
        )
    if status >= 500 or status in _TRANSIENT:
        if retry_after is not None:
            return ProviderUnavailable(f"{provider} failed with status {status}.", retry_after_s=retry_after)
        return ProviderError(f"{provider} failed with status {status}.")
    return ProviderError(_advice(provider, status), retryable=False)


def stream_refusal(provider: str, error: Any) -> OncewiseError:
    """The error for an error object inside a stream, whose status was 200 long ago."""
    names = _names(error)
    codes = (int(name) for name in names if name.isdecimal() and len(name) == 3)
    status = next((code for code in codes if code >= 400), None)
    if status is None:
        status = next((_STATUS_OF[name] for name in sorted(names) if name in _STATUS_OF), 500)
    return refusal(provider, status, names, None)


def error_names(body: bytes) -> frozenset[str]:
    """What the error object in a body calls its error; empty if there is none."""
    return _names(_error_object(body))


def retry_delay_s(body: bytes) -> float | None:
    """Seconds to wait, at most a day, as Google says it in the body (`google.rpc.RetryInfo`); None if it does not."""
    for detail in _details(_error_object(body)):
        delay = detail.get("retryDelay")
        seconds = _seconds(delay.removesuffix("s")) if isinstance(delay, str) else None
        if seconds is not None:
            return min(seconds, MAX_RETRY_AFTER_S)
    return None


def retry_after_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """Seconds the provider asks to wait, at most a day; None if it does not say, or not in a form we know.

    Args:
        headers: Names in lower case.
        now_s: Seconds since the Unix epoch. A date is compared with the provider's own `Date` where there is one:
            our clock may be wrong.
    """
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        seconds = _seconds(headers.get(name, ""))
        if seconds is not None:
            return min(seconds * unit_s, MAX_RETRY_AFTER_S)
    then_s = _date_s(headers.get("retry-after", ""))
    if then_s is None:
        return None
    sent_s = _date_s(headers.get("date", ""))
    return min(max(0.0, then_s - (now_s if sent_s is None else sent_s)), MAX_RETRY_AFTER_S)


def _advice(provider: str, status: int) -> str:
    prefix = provider.upper().replace("-", "_")
    if status in (401, 403):
        return f"{provider} refused the API key with status {status}; check {prefix}_API_KEY."
    if status < 400:
        return f"{provider} answered with status {status} instead of an answer; check {prefix}_BASE_URL."
    if status == 404:
        return f"{provider} answered 404: it does not know the model, or {prefix}_BASE_URL is wrong."
    return f"{provider} refused the request with status {status}."


def _error_object(body: bytes) -> Any:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if isinstance(document, list) and document:
        document = document[0]  # Google's, where a stream was asked for
    return document.get("error") if isinstance(document, dict) else None


def _details(error: Any) -> list[dict[str, Any]]:
    details = error.get("details") if isinstance(error, dict) else None
    return [detail for detail in details if isinstance(detail, dict)] if isinstance(details, list) else []


def _names(error: Any) -> frozenset[str]:
    if not isinstance(error, dict):
        return frozenset()
    values = (error.get("code"), error.get("type"), error.get("status"), *(d.get("reason") for d in _details(error)))
    return frozenset(str(value) for value in values if isinstance(value, str | int))


def _seconds(value: str) -> float | None:
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _date_s(value: str) -> float | None:
    try:
        return parsedate_to_datetime(value).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
