"""One call to a provider over HTTP, as far as it is the same for every wire: one request, our own timers, typed errors.

What a client library calls a success is not one here. A page with status 200, an answer that falls silent behind
keep-alive comments, a body that ends early: each is found here or in the adapter, and nothing foreign leaves this
package. An error's sentence names the provider and what to check, never what the provider wrote: that may quote the
prompt or the key.

Deliberately absent: retries (the flight's), pacing (the pacer's), and the meaning of an event (the adapter's).
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import orjson

from oncewise.errors import OncewiseError, ProviderError, ProviderProtocolError, ProviderTimeout
from oncewise.providers.event_stream import Event, EventNotUtf8, EventStream, EventTooLarge
from oncewise.providers.halves import Halves
from oncewise.providers.patience import Patience
from oncewise.providers.refusals import error_names, refusal, retry_after_s, retry_delay_s
from oncewise.providers.transport import (
    ConnectTimedOut,
    MalformedHttp,
    Reply,
    Transport,
    TransportError,
    Unreachable,
)

__all__ = ["Call", "Timers", "broken", "json_object"]

MAX_ERROR_BYTES = 64 << 10
MAX_ANSWER_BYTES = 4 << 20
ERROR_BODY_S = 1.0
GOODBYE_S = 0.05


@dataclass(frozen=True, slots=True)
class Timers:
    """How long a provider may take, in seconds.

    Attributes:
        first_token_s: From the start of the call, connecting included, to the first token.
        between_tokens_s: From one token to the next. Comments and empty deltas are not tokens.
        total_s: From the start to the end.
        tail_s: From the finish reason to the end. Usage may follow, but the answer does not depend on it.
    """

    first_token_s: float = 30.0
    between_tokens_s: float = 20.0
    total_s: float = 120.0
    tail_s: float = 2.0


class Call:
    """One request and the state of its answer. Made in the task that reads it; used once."""

    def __init__(self, provider: str, timers: Timers) -> None:
        self._provider = provider
        self._timers = timers
        self._patience = Patience()
        self._now_s = asyncio.get_running_loop().time
        now_s = self._now_s()
        self._end_by_s = now_s + timers.total_s
        self._token_by_s = now_s + timers.first_token_s
        self._bytes = 0
        self._answered = self._begun = self._finished = self._over = False

    def token(self) -> None:
        """The model is at work: a piece of the text, or of the reasoning before it, has come."""
        self._begun = True
        self._token_by_s = self._now_s() + self._timers.between_tokens_s

    def text(self, text: str) -> None:
        """Count a piece of the answer.

        Raises:
            ProviderProtocolError: the answer exceeds 4 MiB; not retryable.
        """
        self.token()
        self._bytes += len(text) if text.isascii() else len(text.encode())
        if self._bytes > MAX_ANSWER_BYTES:
            raise broken(f"{self._provider} sent an answer of more than 4 MiB.", retryable=False)

    def finished(self) -> None:
        """The answer is complete. What follows is welcome; that nothing follows is no error."""
        if not self._finished:
            self._finished = True
            self._end_by_s = min(self._end_by_s, self._now_s() + self._timers.tail_s)

    def over(self) -> None:
        """Nothing that follows is of interest; wait a moment for the end, which lets the connection be used again."""
        self._finished = self._over = True
        self._end_by_s = self._now_s() + GOODBYE_S

    async def events(self, transport: Transport, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Event, None]:
        """Send the request and give the events of its answer, until the body ends.

        Once the answer is `finished`, a body that is cut or does not end is an end like any other.

        Raises:
            OncewiseError: as the port says.
        """
        try:
            with self._patience.until(self._token_by_s):
                reply = await transport.post(path, self._encoded(body))
            with closing(reply):
                self._answered = True
                await self._verify(reply)
                stream = EventStream()
                while piece := await self._piece(reply):
                    if self._over:
                        continue
                    for event in stream.feed(piece):
                        yield event
        except (TransportError, TimeoutError) as error:
            if not self._finished:
                raise self._failure(error) from error
        except EventTooLarge:
            raise broken(f"{self._provider} sent an event of more than 1 MiB.", retryable=False) from None
        except EventNotUtf8:
            raise broken(f"{self._provider} sent text that is not UTF-8.") from None
        finally:
            self._patience.end()

    def _encoded(self, body: Mapping[str, Any]) -> bytes:
        try:
            return orjson.dumps(body)
        except orjson.JSONEncodeError:
            # Lone surrogates and integers beyond 64 bits: the edge refuses them, so they are not worth a retry here.
            raise ProviderError("The request cannot be written as JSON in UTF-8.", retryable=False) from None

    async def _piece(self, reply: Reply) -> bytes:
        with self._patience.until(self._end_by_s if self._finished else min(self._end_by_s, self._token_by_s)):
            return await reply.read()

    async def _verify(self, reply: Reply) -> None:
        if reply.status != 200:
            body = await self._error_body(reply)
            wait_s = retry_after_s(reply.headers, time.time())
            wait_s = retry_delay_s(body) if wait_s is None else wait_s
            raise refusal(self._provider, reply.status, error_names(body), wait_s)
        if reply.content_type != "text/event-stream":
            raise broken(f"{self._provider} answered with something else than an event stream.")
        if reply.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise broken(f"{self._provider} sent a compressed body, which was not asked for.")

    async def _error_body(self, reply: Reply) -> bytes:
        body = b""
        with suppress(TransportError, TimeoutError):
            async with asyncio.timeout(ERROR_BODY_S):
                while piece := await reply.read():
                    body += piece
                    if len(body) > MAX_ERROR_BYTES:
                        return b""
        return body

    def _failure(self, error: Exception) -> OncewiseError:
        if isinstance(error, TimeoutError):
            late = ProviderTimeout(f"{self._provider} {self._lateness()}.")
            # An answer that came all along and was too long for its time says nothing against the provider.
            late.self_inflicted = self._begun and self._now_s() < self._token_by_s
            return late
        if isinstance(error, ConnectTimedOut):
            return ProviderTimeout(f"{self._provider} could not be reached in time.")
        if isinstance(error, Unreachable):
            return ProviderError(f"{self._provider} could not be reached.")
        if isinstance(error, MalformedHttp) and self._answered:
            return broken(f"{self._provider} broke its answer off.")
        return ProviderError(f"The connection to {self._provider} broke.")

    def _lateness(self) -> str:
        if self._now_s() >= self._end_by_s:
            return f"did not end its answer within {self._timers.total_s:g} s"
        if self._begun:
            return f"fell silent for {self._timers.between_tokens_s:g} s"
        return f"did not begin to answer within {self._timers.first_token_s:g} s"


def broken(detail: str, *, retryable: bool = True, self_inflicted: bool = False) -> ProviderProtocolError:
    """The error for an answer that is not what the wire promises."""
    error = ProviderProtocolError(detail)
    error.retryable = retryable
    error.self_inflicted = self_inflicted
    return error


def json_object(provider: str, event: Event, halves: Halves) -> dict[str, Any]:
    """The JSON object in an event's data; `halves` has read the events before it.

    Raises:
        ProviderProtocolError: it is not one; lone surrogates and numbers that are not JSON included.
    """
    try:
        value = halves.read(event.data)
    except ValueError:
        raise broken(f"{provider} sent an event that is not JSON.") from None
    if not isinstance(value, dict):
        raise broken(f"{provider} sent an event that is not a JSON object.")
    return value
