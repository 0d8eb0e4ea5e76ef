"""A provider that needs no key and no network: always the same answer to the same prompt, as slow as a real one.

It refuses calls beyond its own limit, as a real provider would: more than `rps` calls in any second (within 5 %: no
clock of a client is better). It fails on request, so that a user can see what becomes of a failure. The model name is
the script, if it begins with `demo`; a script given to the constructor goes for all other names.

============== ========================================================================================
demo           a good answer after `latency_ms`
demo-fast      in 50 ms
demo-lat-250   in 250 ms
demo-429       refused: rate limit, `retry_after_s` 1
demo-500       refused: the provider failed; `demo-400`: the request is wrong, no retry will help
demo-cut-3     the connection breaks after 3 deltas
demo-hang      no token ever comes
demo-empty     an answer without text
demo-nofinish  all of the text, but no finish reason
============== ========================================================================================

Words combine, e.g. `demo-fast-cut-3`; unknown ones are ignored.

Deliberately absent: chance. Text, deltas and usage follow from the SHA-256 of the request.
"""

import asyncio
import hashlib
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from oncewise.core.keys import canonical
from oncewise.errors import OncewiseError, ProviderError, ProviderProtocolError, ProviderRateLimited, ProviderTimeout
from oncewise.model import ChatRequest, CompletionRequest
from oncewise.ports import Chunk, ProviderEvent
from oncewise.providers.answer import as_text
from oncewise.providers.call import Timers
from oncewise.providers.chat_shape import ChunkMaker, as_completion, usage

__all__ = ["DemoProvider"]

_FIRST_TOKEN_SHARE = 0.4
_TOLERANCE = 0.95

_OPENINGS = (
    "Good question, and a short answer to it.",
    "Here is how I would look at it.",
    "Let us take it step by step.",
    "Voilà, the essentials in a few lines.",
)
_POINTS = (
    "Ask once, share the answer: everybody who waits for the same thing can wait together.",
    "A queue is only a promise that somebody will be served next.",
    "Whoever comes late is given what was already said, then hears the rest live.",
    "Naïve caches help the second visitor; the first fifty arrive at the same moment.",
    "What was said to one reader is word for word what is stored for all of them.",
    "An answer that stops in the middle is not an answer, however politely it stops.",
    "Slow is fine as long as it is slow only once: 50 questions, 1 call, 1 bill.",
    "The café on the corner brews one pot for the whole table, too ☕.",
    "If the line breaks, pick up where you left off; nothing is asked twice.",
    "Limits are kind when they are known beforehand.",
)
_CLOSINGS = (
    "That is all there is to it 🙂",
    "Ask again whenever you like; the same question gets the same answer ✨",
    "À bientôt!",
)


@dataclass(frozen=True, slots=True)
class _Script:
    latency_s: float
    refuse: int | None
    cut: int | None
    words: frozenset[str]


class DemoProvider:
    """Implements `oncewise.ports.Provider`.

    Attributes:
        calls: Calls started so far, the refused ones included.
        running: Calls being answered now.
    """

    def __init__(
        self,
        name: str = "demo",
        *,
        latency_ms: float = 5000,
        rps: float | None = 1.0,
        script: str = "",
        timers: Timers = Timers(),  # noqa: B008  frozen
        monotonic_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Make one.

        `latency_ms` runs from the call to the end of its answer; the first token comes after 40 % of it. `rps` calls
        may start per second; None for no limit. `script` has words as in a model name, without `demo-`.
        """
        self._name = name
        self._latency_s = latency_ms / 1000
        self._words = script
        self._timers = timers
        self._monotonic_s = monotonic_s
        self._sleep = sleep
        self._places = max(1, int(rps)) if rps else 0
        self._window_s = self._places / rps if rps else 0.0
        self._starts: deque[float] = deque()
        self.calls = 0
        self.running = 0

    @property
    def name(self) -> str:
        return self._name

    def stream(self, request: ChatRequest) -> AsyncGenerator[ProviderEvent, None]:
        return as_text(self._name, self.chunks(as_completion(request)))

    async def chunks(self, request: CompletionRequest) -> AsyncGenerator[Chunk, None]:
        words = request.model if request.model.startswith("demo") else self._words
        script = _read(words, self._latency_s)
        self.calls += 1
        self._take_place()
        if script.refuse is not None:
            raise self._refusal(script.refuse)
        self.running += 1
        try:
            async with aclosing(self._answer(request, script)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            self.running -= 1

    async def aclose(self) -> None:
        """Nothing to close."""

    async def _answer(self, request: CompletionRequest, script: _Script) -> AsyncGenerator[Chunk, None]:
        start_s = self._monotonic_s()
        if "hang" in script.words:
            await self._sleep(self._timers.first_token_s)
            raise ProviderTimeout(f"{self._name} did not begin to answer within {self._timers.first_token_s:g} s.")
        asked = canonical([request.provider, request.model, request.body])
        topic = _topic(request.body.get("messages"))
        deltas = [] if "empty" in script.words else _deltas(_text(asked, topic))
        maker = ChunkMaker(int(time.time()), id=f"chatcmpl-demo-{self.calls}", model=request.model)
        for index, delta in enumerate(deltas):
            if index == script.cut:
                raise ProviderProtocolError(f"{self._name} broke its answer off.")
            share = _FIRST_TOKEN_SHARE + (1 - _FIRST_TOKEN_SHARE) * index / (len(deltas) - 1)
            await self._until(start_s + script.latency_s * share)
            yield maker.delta(content=delta)
        await self._until(start_s + script.latency_s)
        if not deltas:
            raise ProviderProtocolError(f"{self._name} sent an empty answer.")
        if "nofinish" in script.words:
            raise ProviderProtocolError(f"{self._name} ended its answer without a finish reason.")
        yield maker.finish("stop", "stop")
        yield maker.usage({**usage(_prompt_tokens(request.body.get("messages")), len(deltas)), "cost": 0.0})

    async def _until(self, due_s: float) -> None:
        wait_s = due_s - self._monotonic_s()
        if wait_s > 0:
            await self._sleep(wait_s)

    def _take_place(self) -> None:
        if not self._places:
            return
        now_s = self._monotonic_s()
        while self._starts and self._starts[0] <= now_s - self._window_s * _TOLERANCE:
            self._starts.popleft()
        if len(self._starts) >= self._places:
            wait_s = self._starts[0] + self._window_s - now_s
            raise ProviderRateLimited(
                f"{self._name} refused the call: its rate limit is reached.", retry_after_s=wait_s
            )
        self._starts.append(now_s)

    def _refusal(self, status: int) -> OncewiseError:
        if status == 429:
            detail = f"{self._name} refused the call: its rate limit is reached."
            return ProviderRateLimited(detail, retry_after_s=1.0)
        return ProviderError(f"{self._name} refused the call with status {status}.", retryable=status >= 500)


def _read(words: str, latency_s: float) -> _Script:
    numbers: dict[str, int] = {}
    flags: set[str] = set()
    refuse: int | None = None
    parts = iter(words.split("-"))
    for part in parts:
        if part in ("lat", "cut"):
            number = next(parts, "")
            numbers |= {part: int(number)} if re.fullmatch(r"[0-9]{1,6}", number) else {}
        elif re.fullmatch(r"[45][0-9]{2}", part):
            refuse = int(part)
        else:
            flags.add(part)
    default_ms = 50 if "fast" in flags else latency_s * 1000
    return _Script(numbers.get("lat", default_ms) / 1000, refuse, numbers.get("cut"), frozenset(flags))


def _text(asked: bytes, topic: str) -> str:
    seed = hashlib.sha256(asked).digest()
    opening = f"{_OPENINGS[seed[0] % len(_OPENINGS)]} You asked: “{topic}”"
    points = sorted(_POINTS, key=lambda point: hashlib.sha256(seed + point.encode()).digest())[:4]
    closing = _CLOSINGS[seed[1] % len(_CLOSINGS)]
    return "\n".join([opening, "", *(f"- {point}" for point in points), "", closing])


def _contents(messages: Any) -> list[str]:
    """The texts of messages, as far as they are messages: this provider does not judge what it is asked."""
    found = messages if isinstance(messages, list) else []
    contents = [message.get("content") if isinstance(message, dict) else None for message in found]
    return [content if isinstance(content, str) else _parts(content) for content in contents]


def _parts(content: Any) -> str:
    parts = content if isinstance(content, list) else []
    return " ".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def _topic(messages: Any) -> str:
    contents = _contents(messages)
    topic = " ".join(contents[-1].split()) if contents else ""
    return topic if len(topic) <= 60 else f"{topic[:59].rstrip()}…"


def _deltas(text: str) -> list[str]:
    return re.findall(r"\S+\s*", text)


def _prompt_tokens(messages: Any) -> int:
    # Four characters to a token, and four tokens around each message: the order of magnitude of real tokenizers.
    return sum(4 + -(-len(content) // 4) for content in _contents(messages))
