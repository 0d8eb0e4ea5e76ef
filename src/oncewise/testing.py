"""For tests of programs that embed Oncewise, and of Oncewise itself: a provider that does what the test says.

Deliberately absent: patches. What stands here is passed in where the real thing would be.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from oncewise.model import ChatRequest, CompletionRequest, FinishReason, Usage
from oncewise.ports import Chunk, Completion, ProviderEvent, TextDelta

__all__ = ["ScriptedProvider"]


class ScriptedProvider:
    """Implements `oncewise.ports.Provider` by a script: answers with `deltas`, held, delayed or failing as asked.

    Args:
        deltas: The pieces of every answer; may be changed between calls.
        delay_s: Seconds before the first.
        gap_s: Seconds before each.
        held: Whether calls wait for `go` before they say anything.

    Attributes:
        calls: The requests, in order.
        started: Set by the first call.
        go: Lets held calls go on.
        failures: What the next calls raise, and after how many deltas; one entry per call, taken from the front.
        running: Calls that run now; `max_running` is the most there ever were.
        closed_early: Calls that were left or failed before their end.
    """

    def __init__(
        self, *, deltas: Sequence[str] = ("po", "ng"), delay_s: float = 0.0, gap_s: float = 0.0, held: bool = False
    ) -> None:
        self.name = "scripted"
        self.deltas = list(deltas)
        self.delay_s = delay_s
        self.gap_s = gap_s
        self.calls: list[ChatRequest | CompletionRequest] = []
        self.closed_early = 0
        self.running = 0
        self.max_running = 0
        self.started = asyncio.Event()
        self.go = asyncio.Event()
        if not held:
            self.go.set()
        self.failures: list[tuple[int, BaseException]] = []

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(self.deltas)

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ProviderEvent, None]:
        """See `Provider.stream`."""
        async with aclosing(self._texts(request)) as texts:
            async for text in texts:
                yield TextDelta(text)
        yield Completion(FinishReason.STOP, Usage(3, len(self.deltas)), model=request.model)

    async def chunks(self, request: CompletionRequest) -> AsyncGenerator[Chunk, None]:
        """See `Provider.chunks`."""
        async with aclosing(self._texts(request)) as texts:
            async for text in texts:
                yield {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
        tokens = len(self.deltas)
        usage = {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens}
        yield {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": usage}

    async def aclose(self) -> None:
        """See `Provider.aclose`."""

    async def _texts(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[str, None]:
        self.calls.append(request)
        self.running += 1
        self.max_running = max(self.max_running, self.running)
        self.started.set()
        ended = False
        try:
            fail_after, failure = self.failures.pop(0) if self.failures else (len(self.deltas) + 1, None)
            await asyncio.sleep(self.delay_s)
            await self.go.wait()
            for sent, text in enumerate(self.deltas):
                if sent == fail_after and failure is not None:
                    raise failure
                if self.gap_s:
                    await asyncio.sleep(self.gap_s)
                yield text
            if failure is not None:
                raise failure
            ended = True
        finally:
            self.running -= 1
            self.closed_early += not ended
