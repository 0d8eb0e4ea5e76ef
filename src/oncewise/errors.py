"""Every deliberate error: a code, whether a retry can help, and fields. The sentence comes second.

An error that ends shared work is first frozen into a `Failure`. Each waiter then raises an exception of its own,
rebuilt by `Failure.error()`: one exception object raised in many tasks would grow a traceback frame per task and keep
the locals of every request alive.

Deliberately absent: HTTP. The one table from code to status is `oncewise.api.errors`.
"""

from dataclasses import dataclass, field
from typing import ClassVar

__all__ = [
    "BodyTooLarge",
    "CoordinationUnavailable",
    "DuplicateHeader",
    "Failure",
    "FlightCancelled",
    "FlightFailed",
    "FlightTimeout",
    "Forbidden",
    "HeadMoved",
    "HeadersTooLarge",
    "IdempotencyMismatch",
    "InternalError",
    "InvalidRequest",
    "LeaderLost",
    "MalformedJson",
    "MalformedRequest",
    "MethodNotAllowed",
    "MisdirectedHost",
    "MissingOrg",
    "ModelNotFound",
    "NotFound",
    "NotPersisted",
    "OncewiseError",
    "OrgMismatch",
    "Overloaded",
    "ProviderError",
    "ProviderProtocolError",
    "ProviderRateLimited",
    "ProviderTimeout",
    "ProviderUnavailable",
    "QueueFull",
    "QueueTimeout",
    "RateLimited",
    "ReentrantFlight",
    "RequestTimeout",
    "ResponseTooLarge",
    "SchemaMismatch",
    "ShuttingDown",
    "StorageFull",
    "StorageUnavailable",
    "ThreadBusy",
    "TurnCancelled",
    "Unauthorized",
    "UnknownProvider",
    "UnsupportedMediaType",
    "WaitTimeout",
    "WrongLoop",
]


class OncewiseError(Exception):
    """Base of all deliberate errors. The class docstring is the default message.

    Attributes:
        code: Stable name for programs; part of the HTTP contract.
        retryable: Whether the same request may succeed later.
        retry_after_s: Seconds to wait before a retry; None if nobody knows.
        detail: One sentence for people. Never contains message text, secrets or an input value.
        turn_id: The turn that it is about, where that is not the caller's own.
        self_inflicted: Whether the request itself may have brought it about, so that it says nothing of the provider.
            Known where the error arises; a `Failure` does not carry it.
    """

    code: ClassVar[str] = "internal"
    retryable: bool = False
    turn_id: str | None = None
    self_inflicted: bool = False
    _by_code: ClassVar[dict[str, type["OncewiseError"]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._by_code[cls.code] = cls

    def __init__(self, detail: str | None = None, *, retry_after_s: float | None = None) -> None:
        self.detail = detail or (type(self).__doc__ or "").partition("\n")[0]
        self.retry_after_s = retry_after_s
        super().__init__(self.detail)

    def failure(self) -> "Failure":
        """The frozen record of this error, safe to share between requests."""
        return Failure(
            self.code, self.detail, retryable=self.retryable, retry_after_s=self.retry_after_s, turn_id=self.turn_id
        )

    @classmethod
    def with_code(cls, code: str) -> type["OncewiseError"]:
        """The class that carries `code`; `FlightFailed` for a code nobody declared."""
        return cls._by_code.get(code, FlightFailed)


@dataclass(frozen=True, slots=True)
class Failure:
    """How work ended when it did not end well. Immutable, comparable, without any reference to a request.

    Attributes:
        retryable: Stands here beside the class, since a provider may know better: its 400 is a `provider_error`
            that no retry will mend.
        turn_id: As in `OncewiseError`.
        cause: The exception of foreign code behind it, for `raise ... from`; its traceback belongs to the work,
            never to a waiter. Not compared.
    """

    code: str
    detail: str
    retryable: bool = False
    retry_after_s: float | None = None
    turn_id: str | None = None
    cause: BaseException | None = field(default=None, compare=False, repr=False)

    def error(self) -> OncewiseError:
        """A new exception that says this; every caller gets its own object."""
        error = OncewiseError.with_code(self.code)(self.detail, retry_after_s=self.retry_after_s)
        error.retryable = self.retryable
        error.turn_id = self.turn_id
        error.__cause__ = self.cause
        return error


# -- flights -----------------------------------------------------------------------------------------------------


class FlightFailed(OncewiseError):
    """The shared work ended with an unexpected error."""

    code = "flight_failed"


class FlightCancelled(OncewiseError):
    """The shared work was cancelled before it had an answer."""

    code = "upstream_cancelled"
    retryable = True


class FlightTimeout(OncewiseError):
    """The shared work did not end within its deadline."""

    code = "flight_timeout"
    retryable = True


class WaitTimeout(OncewiseError):
    """The answer did not come within the caller's own deadline; the work goes on."""

    code = "wait_timeout"
    retryable = True


class ReentrantFlight(OncewiseError):
    """Work asked for a key whose flight is waiting for that same work; waiting would never end."""

    code = "reentrant_flight"


class WrongLoop(OncewiseError):
    """A table of flights belongs to the event loop that first used it."""

    code = "wrong_loop"


class Overloaded(OncewiseError):
    """A limit that protects the server is reached."""

    code = "overloaded"
    retryable = True


class ShuttingDown(OncewiseError):
    """The server is shutting down; another one will answer."""

    code = "shutting_down"
    retryable = True


class ResponseTooLarge(OncewiseError):
    """The answer is larger than a stream may grow."""

    code = "response_too_large"


# -- turns -------------------------------------------------------------------------------------------------------


class NotFound(OncewiseError):
    """There is no such resource."""

    code = "not_found"


class ThreadBusy(OncewiseError):
    """Another message is being answered in this thread."""

    code = "thread_busy"
    retryable = True


class HeadMoved(OncewiseError):
    """The thread has newer messages than the one this message answers."""

    code = "head_moved"


class TurnCancelled(OncewiseError):
    """The turn was cancelled."""

    code = "turn_cancelled"


class IdempotencyMismatch(OncewiseError):
    """This Idempotency-Key was used with a different request."""

    code = "idempotency_mismatch"


class QueueFull(OncewiseError):
    """Too many messages wait in this queue."""

    code = "queue_full"
    retryable = True


class QueueTimeout(OncewiseError):
    """The request waited too long for its start."""

    code = "queue_timeout"
    retryable = True


class LeaderLost(OncewiseError):
    """The process that produced this answer was lost after part of it had been shown."""

    code = "leader_lost"
    retryable = True


class NotPersisted(OncewiseError):
    """The answer could not be stored."""

    code = "not_persisted"
    retryable = True


# -- requests ----------------------------------------------------------------------------------------------------


class InvalidRequest(OncewiseError):
    """The request is well-formed JSON but not a valid request.

    Attributes:
        errors: One `(location, message)` for each problem, without the offending value.
    """

    code = "invalid_request"

    def __init__(
        self,
        detail: str | None = None,
        *,
        errors: tuple[tuple[tuple[str | int, ...], str], ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        self.errors = errors
        super().__init__(detail, retry_after_s=retry_after_s)


class MalformedJson(OncewiseError):
    """The body is not one strict JSON document in UTF-8."""

    code = "malformed_json"


class MalformedRequest(OncewiseError):
    """The request is not well-formed HTTP/1.1 with one Host."""

    code = "malformed_request"


class DuplicateHeader(OncewiseError):
    """A header that may stand once was sent more than once."""

    code = "duplicate_header"


class MissingOrg(OncewiseError):
    """The x-org-id header is missing or not of the form [A-Za-z0-9_.-]{1,64}."""

    code = "missing_org"


class Unauthorized(OncewiseError):
    """A valid API key is missing: send `Authorization: Bearer ow_...` or `x-api-key: ow_...`."""

    code = "unauthorized"


class OrgMismatch(OncewiseError):
    """The x-org-id header names another tenant than the API key."""

    code = "org_mismatch"


class Forbidden(OncewiseError):
    """This API key may not do that."""

    code = "forbidden"


class MethodNotAllowed(OncewiseError):
    """This resource does not take that method."""

    code = "method_not_allowed"


class RequestTimeout(OncewiseError):
    """The request did not arrive in time."""

    code = "request_timeout"
    retryable = True


class BodyTooLarge(OncewiseError):
    """The request body is larger than this server takes."""

    code = "body_too_large"


class UnsupportedMediaType(OncewiseError):
    """The body must be application/json in UTF-8, uncompressed."""

    code = "unsupported_media_type"


class MisdirectedHost(OncewiseError):
    """Without API keys this server answers only to loopback host names."""

    code = "misdirected_host"


class HeadersTooLarge(OncewiseError):
    """The request head is larger than 32 KiB or has more than 100 fields."""

    code = "headers_too_large"


class UnknownProvider(OncewiseError):
    """No provider of that name is configured."""

    code = "unknown_provider"


class ModelNotFound(OncewiseError):
    """No configured provider or alias has a model of that name."""

    code = "model_not_found"


class RateLimited(OncewiseError):
    """The tenant's request rate is used up."""

    code = "rate_limited"
    retryable = True


# -- providers ---------------------------------------------------------------------------------------------------


class ProviderError(OncewiseError):
    """The provider failed to answer.

    A refusal that will be repeated (the provider's own 400) carries `retryable=False`.
    """

    code = "provider_error"
    retryable = True

    def __init__(
        self, detail: str | None = None, *, retry_after_s: float | None = None, retryable: bool = True
    ) -> None:
        super().__init__(detail, retry_after_s=retry_after_s)
        self.retryable = retryable


class ProviderRateLimited(OncewiseError):
    """The provider refused the call because its rate limit was reached."""

    code = "provider_rate_limited"
    retryable = True


class ProviderUnavailable(OncewiseError):
    """The provider takes no calls for now."""

    code = "provider_unavailable"
    retryable = True


class ProviderProtocolError(OncewiseError):
    """The provider's answer was broken or incomplete."""

    code = "provider_protocol"
    retryable = True


class ProviderTimeout(OncewiseError):
    """The provider did not answer in time."""

    code = "provider_timeout"
    retryable = True


# -- storage -----------------------------------------------------------------------------------------------------


class StorageUnavailable(OncewiseError):
    """The database did not answer."""

    code = "storage_unavailable"
    retryable = True


class StorageFull(OncewiseError):
    """The database has no space left."""

    code = "storage_full"
    retryable = True


class SchemaMismatch(OncewiseError):
    """The database was made by a newer version; this version cannot use it."""

    code = "schema_mismatch"


# -- between workers ---------------------------------------------------------------------------------------------


class CoordinationUnavailable(OncewiseError):
    """The service between the workers did not answer."""

    code = "coordination_unavailable"
    retryable = True


class InternalError(OncewiseError):
    """The server failed; the failure is logged under the request id."""

    code = "internal"
