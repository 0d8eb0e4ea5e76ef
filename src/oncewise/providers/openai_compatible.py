"""The OpenAI wire, as many providers speak it: always streamed, and complete only when the provider said so.

Deliberately absent: retries, and what makes an answer whole (`oncewise.providers.answer`).
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from oncewise.model import ChatRequest, CompletionRequest
from oncewise.ports import Chunk, ProviderEvent
from oncewise.providers.alternation import alternating
from oncewise.providers.answer import Verifier, as_text
from oncewise.providers.call import Call, Timers, json_object
from oncewise.providers.catalogue import Quirks
from oncewise.providers.chat_shape import as_completion
from oncewise.providers.halves import Halves
from oncewise.providers.refusals import stream_refusal
from oncewise.providers.transport import HttpTransport, Transport

__all__ = ["OpenAICompatibleProvider"]


class OpenAICompatibleProvider:
    """A provider that answers `POST {base_url}/chat/completions`. Implements `oncewise.ports.Provider`."""

    def __init__(
        self,
        name: str,
        transport: Transport,
        *,
        quirks: Quirks = Quirks(),  # noqa: B008  frozen
        timers: Timers = Timers(),  # noqa: B008  frozen
    ) -> None:
        self._name = name
        self._transport = transport
        self._quirks = quirks
        self._timers = timers

    @classmethod
    def connect(
        cls,
        name: str,
        base_url: str,
        api_key: str | None,
        *,
        concurrency: int,
        quirks: Quirks = Quirks(),  # noqa: B008  frozen
        timers: Timers = Timers(),  # noqa: B008  frozen
    ) -> "OpenAICompatibleProvider":
        """A provider with a connection pool of its own. Connects at the first call.

        The pool has `concurrency` connections; calls beyond it wait for one, and fail after 5 s.

        Raises:
            ValueError: the URL or the key cannot be used; says why without repeating them.
        """
        headers = {"accept": "text/event-stream", "user-agent": "oncewise"}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        transport = HttpTransport(base_url, headers=headers, connections=concurrency)
        return cls(name, transport, quirks=quirks, timers=timers)

    @property
    def name(self) -> str:
        return self._name

    def stream(self, request: ChatRequest) -> AsyncGenerator[ProviderEvent, None]:
        return as_text(self._name, self.chunks(as_completion(request)))

    async def chunks(self, request: CompletionRequest) -> AsyncGenerator[Chunk, None]:
        call = Call(self._name, self._timers)
        verifier, halves = Verifier(self._name, call, request.choices), Halves()
        done = False
        async with aclosing(call.events(self._transport, "chat/completions", self._body(request))) as events:
            async for event in events:
                if event.data == "[DONE]":
                    done = True
                    break
                chunk = json_object(self._name, event, halves)
                if chunk.get("error") or event.name == "error":
                    raise stream_refusal(self._name, chunk.get("error"))
                verifier.take(chunk)
                yield chunk
            ending = verifier.end(done=done and self._quirks.done_ends)
            if ending is not None:
                yield ending
            call.over()
            async for _ in events:
                pass  # the rest of the body, so that the connection can be used again

    async def reach(self) -> int:
        """The status of the list of models, which costs nothing. Says whether the host answers and takes the key.

        Raises:
            TransportError: the host did not answer.
        """
        return await self._transport.status("models")

    async def aclose(self) -> None:
        await self._transport.aclose()

    def _body(self, request: CompletionRequest) -> dict[str, Any]:
        quirks = self._quirks
        body = {
            **{quirks.renamed.get(name, name): value for name, value in request.body.items()},
            "model": request.model,
            "stream": True,
            **({"stream_options": {"include_usage": True}} if quirks.usage_option else {}),
        }
        if quirks.alternates:
            body["messages"] = alternating(body.get("messages"))
        return body
