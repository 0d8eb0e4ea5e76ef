"""One request and its answer: what every route reads from, and the only way it answers.

Raw ASGI on purpose. Thousands of requests wait for the same answer at once, and each is one task with few frames; a
request object, a response object and a middleware of a framework would more than double what a waiting request costs.

Deliberately absent: which routes there are, and what they do.
"""

import asyncio
import contextlib
import re
from collections.abc import Iterable, Mapping

from starlette.types import Receive, Scope, Send
from uuid_utils import uuid7

from oncewise.api.auth import Gate
from oncewise.api.errors import problem_body, problem_headers, status_of
from oncewise.api.limits import Limits
from oncewise.api.openai_errors import openai_body, openai_headers
from oncewise.api.presence import CONNECTION, ClientGone, Connection, Headers, Presence
from oncewise.bootstrap import Services
from oncewise.errors import (
    BodyTooLarge,
    DuplicateHeader,
    HeadersTooLarge,
    MalformedRequest,
    OncewiseError,
    RequestTimeout,
    UnsupportedMediaType,
)

__all__ = ["WITH_BODY", "Exchange", "Headers"]

WITH_BODY = frozenset(("POST", "PUT", "PATCH"))
_ENCODINGS: Mapping[bytes, bytes] = {b"content-encoding": b"identity", b"transfer-encoding": b"chunked"}
_SINGLE = frozenset((b"x-org-id", b"authorization", b"x-api-key", b"host", b"content-type", b"idempotency-key"))
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
_NOSNIFF = (b"x-content-type-options", b"nosniff")
_NO_STORE = (b"cache-control", b"no-store")
_JSON = (b"content-type", b"application/json")


class Exchange:
    """A request as it came in, and the answer to it.

    Attributes:
        headers: Field names in lower case; of a repeated field the last.
        request_id: The sender's, if it is well-formed, else one of ours.
        arrived_s: When it came in, by the event loop's clock.
        started: Whether the head of the answer was sent.
        body: The request's body, once it was read.
    """

    __slots__ = (
        "_gate",
        "_unread",
        "arrived_s",
        "body",
        "headers",
        "limits",
        "receive",
        "request_id",
        "scope",
        "send",
        "services",
        "started",
    )

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, *, gate: Gate, limits: Limits, services: Services
    ) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self.services = services
        self.limits = limits
        self.headers: Mapping[bytes, bytes] = dict(scope["headers"])
        self.arrived_s = asyncio.get_running_loop().time()
        self.started = False
        self.body = b""
        self._gate = gate
        # A GET may have a body, which is left to the server to skip.
        self._unread = scope["method"] in WITH_BODY
        sent_id = self.headers.get(b"x-request-id", b"")
        self.request_id = sent_id.decode() if _REQUEST_ID.fullmatch(sent_id) else str(uuid7())

    # -- the request ---------------------------------------------------------------------------------------------

    def check_head(self) -> None:
        """Refuse a head that is too large or ambiguous, or a Host that is not ours.

        Raises:
            HeadersTooLarge, DuplicateHeader, MalformedRequest, MisdirectedHost: as they say.
        """
        fields = self.scope["headers"]
        if (
            len(fields) > self.limits.fields
            or sum(len(name) + len(value) for name, value in fields) > self.limits.head_bytes
        ):
            raise HeadersTooLarge
        if len(self.headers) != len(fields):
            self._check_repeated(name for name, _ in fields)
        # httptools lets any digits pass as the version.
        if self.scope["http_version"] not in ("1.0", "1.1", "2", "3"):
            raise MalformedRequest
        host = self.headers.get(b"host")
        if not host:
            raise MalformedRequest
        self._gate.check_host(host)

    def _check_repeated(self, names: Iterable[bytes]) -> None:
        seen = set()
        for name in names:
            if name in seen and name in _SINGLE:
                raise DuplicateHeader
            seen.add(name)

    def tenant(self) -> str:
        """The tenant this request speaks for.

        Raises:
            MissingOrg, Unauthorized, OrgMismatch, Forbidden: see `Gate.tenant`.
        """
        return self._gate.tenant(self.headers)

    def figures_of(self) -> str | None:
        """The tenant whose figures this request may see; None for those of all. Errors as in `Gate.figures_of`."""
        return self._gate.figures_of(self.headers)

    def check_operator(self) -> None:
        """Refuse a request that may not see what concerns all tenants. Errors as in `Gate.check_operator`."""
        self._gate.check_operator(self.headers)

    def check_admin(self) -> None:
        """Refuse a request that may not make or revoke keys. Errors as in `Gate.check_admin`."""
        self._gate.check_admin(self.headers)

    async def read_body(self, limit: int) -> None:
        """Read the whole body into `body`.

        Raises:
            UnsupportedMediaType: it is compressed.
            BodyTooLarge: it is, or says it is, longer than `limit` bytes; the rest is not read.
            RequestTimeout: it did not arrive in time.
            ClientGone: the client left in the middle of it.
        """
        if not _ENCODINGS.keys().isdisjoint(self.headers):
            self._check_encodings()
        declared = self.headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            raise BodyTooLarge
        if self.connection is not None and self.connection.received():
            # Most bodies come with their heads, and a timer costs more than taking them.
            self.body = await self._collect(limit)
            return
        try:
            async with asyncio.timeout(self.limits.body_s):
                self.body = await self._collect(limit)
        except TimeoutError:
            self._unread = False
            raise RequestTimeout from None

    def _check_encodings(self) -> None:
        # Each of them: behind "gzip, chunked", or "gzip" in a field of its own, is a body that nobody here unpacks.
        for name, value in self.scope["headers"]:
            if name in _ENCODINGS and value.strip().lower() != _ENCODINGS[name]:
                raise UnsupportedMediaType

    async def _collect(self, limit: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        while self._unread:
            parts.append(await self._next_part())
            size += len(parts[-1])
            if size > limit:
                raise BodyTooLarge
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _next_part(self) -> bytes:
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        self._unread = message.get("more_body", False)
        part: bytes = message.get("body", b"")
        return part

    async def _discard_body(self) -> None:
        """Read what is left of the body, within bounds: many clients read an answer only when they have sent all.

        One that is answered and cut off in the middle of its sending sees a reset connection instead of the answer.
        """
        left = self.limits.refused_bytes
        if b"expect" in self.headers:
            # This client asked before sending; reading would tell it to go on.
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.limits.refused_s):
                while self._unread and left > 0:
                    left -= len(await self._next_part())

    def check_media_type(self, wanted: bytes = b"application/json") -> None:
        """Refuse a body that is not what the route takes, in UTF-8.

        Raises:
            UnsupportedMediaType: the Content-Type is missing or another.
        """
        sent = self.headers.get(b"content-type", b"")
        if sent == wanted:
            return
        kind, *options = (part.strip().lower() for part in sent.split(b";"))
        charsets = (option.partition(b"=")[2].strip(b'"') for option in options if option.startswith(b"charset"))
        if kind != wanted or any(charset != b"utf-8" for charset in charsets):
            raise UnsupportedMediaType

    def presence(self) -> Presence:
        """A block that ends with `ClientGone` when the client leaves."""
        return Presence(self.scope, self.receive)

    # -- the answer ----------------------------------------------------------------------------------------------

    def head(self, extra: Iterable[tuple[bytes, bytes]]) -> Headers:
        """The headers of an answer, with those that every answer has."""
        headers = [(b"x-request-id", self.request_id.encode()), _NOSNIFF, *extra]
        if not any(name == b"cache-control" for name, _ in headers):
            headers.append(_NO_STORE)
        return headers

    async def start(self, status: int, headers: Headers) -> None:
        """Send the head of the answer."""
        self.started = True
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, body: bytes, *, more: bool = False) -> None:
        """Send a piece of the body, the last one unless there is `more`."""
        await self.send({"type": "http.response.body", "body": body, "more_body": more})

    async def answer(self, status: int, body: bytes, extra: Iterable[tuple[bytes, bytes]] = (_JSON,)) -> None:
        """Send a whole answer."""
        headers = self.head(extra)
        if status != 204:
            headers.append((b"content-length", b"%d" % len(body)))
        if self.connection is not None and self.connection.answer(self.scope, status, headers, body):
            self.started = True
            return
        await self.start(status, headers)
        await self.write(body)

    async def refuse(self, error: OncewiseError, extra: Headers | None = None) -> None:
        """Send an error as the answer."""
        if self._unread:
            await self._discard_body()
        on_v1 = self.scope["path"].startswith("/v1/")
        headers = [*(openai_headers(error) if on_v1 else problem_headers(error)), *(extra or ())]
        if isinstance(error, RequestTimeout):
            # The rest of the body may still come, and would be taken for the next request.
            headers.append((b"connection", b"close"))
        body = openai_body(error) if on_v1 else problem_body(error, self.request_id)
        await self.answer(status_of(error), body, headers)

    @property
    def connection(self) -> Connection | None:
        """The connection, where the server is our own and lends it."""
        lent: Connection | None = self.scope.get("extensions", {}).get(CONNECTION)
        return lent

    def abort(self) -> None:
        """Drop the connection, as far as the server lets us."""
        if self.connection is not None:
            self.connection.abort()
