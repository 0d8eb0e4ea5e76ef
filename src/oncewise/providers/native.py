"""What the adapters for wires other than OpenAI's have in common: events in, OpenAI chunks out, verified at the end.

An adapter of this kind says where to post what, and brings a `Translation` that turns events into chunks. The text of
threads is read from the same chunks, by the same rules as with a provider that sends them itself.

Deliberately absent: any wire.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from typing import Any, Protocol, Self

from oncewise.model import ChatRequest, CompletionRequest
from oncewise.ports import Chunk, ProviderEvent
from oncewise.providers.answer import Verifier, as_text
from oncewise.providers.call import Call, Timers, json_object
from oncewise.providers.chat_shape import as_completion
from oncewise.providers.halves import Halves
from oncewise.providers.transport import HttpTransport, Transport

__all__ = ["NativeProvider", "Translation"]

Json = dict[str, Any]


class Translation(Protocol):
    """The events of one answer, in chunks."""

    @property
    def finished(self) -> bool:
        """Whether the answer is whole; what follows is welcome, that nothing follows is no error."""
        ...

    @property
    def over(self) -> bool:
        """Whether nothing that follows is of interest."""
        ...

    def take(self, event: Json) -> Iterator[Json]:
        """The chunks that say what one event says.

        Raises:
            ProviderError, ProviderRateLimited: it says that the provider failed.
            ProviderProtocolError: its shape is not that of an event.
        """
        ...

    def end(self) -> Iterator[Json]:
        """The last chunks, with the finish reason: held back until the answer is whole.

        Raises:
            ProviderProtocolError: it is not.
            ProviderError: the provider gave up on it.
        """
        ...


class NativeProvider(ABC):
    """A provider with a wire of its own. Implements `oncewise.ports.Provider`; made by a subclass's `connect`."""

    def __init__(
        self,
        name: str,
        transport: Transport,
        *,
        timers: Timers = Timers(),  # noqa: B008  frozen
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._name = name
        self._transport = transport
        self._timers = timers
        self._now_s = now_s

    @classmethod
    def connect(
        cls,
        name: str,
        base_url: str,
        api_key: str | None,
        *,
        concurrency: int,
        timers: Timers = Timers(),  # noqa: B008  frozen
    ) -> Self:
        """A provider with a connection pool of its own. Connects at the first call.

        The pool has `concurrency` connections; calls beyond it wait for one, and fail after 5 s.

        Raises:
            ValueError: the URL or the key cannot be used; says why without repeating them.
        """
        headers = {"accept": "text/event-stream", "user-agent": "oncewise", **cls._headers(api_key)}
        return cls(name, HttpTransport(base_url, headers=headers, connections=concurrency), timers=timers)

    @property
    def name(self) -> str:
        return self._name

    def stream(self, request: ChatRequest) -> AsyncGenerator[ProviderEvent, None]:
        return as_text(self._name, self.chunks(as_completion(request)))

    async def chunks(self, request: CompletionRequest) -> AsyncGenerator[Chunk, None]:
        call = Call(self._name, self._timers)
        verifier = Verifier(self._name, call, request.choices)
        body = {**request.body, "model": request.model}
        async with aclosing(self._chunks(body, call)) as chunks:
            async for chunk in chunks:
                verifier.take(chunk)
                yield chunk
            verifier.end(done=False)

    async def reach(self) -> int:
        """The status of the list of models, which costs nothing. Says whether the host answers and takes the key.

        Raises:
            TransportError: the host did not answer.
        """
        return await self._transport.status("models")

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def _chunks(self, body: Mapping[str, Any], call: Call) -> AsyncGenerator[Json, None]:
        translation, halves = self._translation(int(self._now_s())), Halves()
        path, asked = self._request(body)
        async with aclosing(call.events(self._transport, path, asked)) as events:
            async for event in events:
                for chunk in translation.take(json_object(self._name, event, halves)):
                    yield chunk
                if translation.finished:
                    call.finished()
                if translation.over:
                    break
            for chunk in translation.end():
                yield chunk
            call.over()
            async for _ in events:
                pass  # the rest of the body, so that the connection can be used again

    @staticmethod
    @abstractmethod
    def _headers(api_key: str | None) -> dict[str, str]:
        """How the provider wants the key, and whatever else it wants in every request."""

    @abstractmethod
    def _request(self, body: Mapping[str, Any]) -> tuple[str, Json]:
        """Path and body of the provider's own request for a chat completion request."""

    @abstractmethod
    def _translation(self, created_s: int) -> Translation:
        """What turns the events of one answer into chunks."""
