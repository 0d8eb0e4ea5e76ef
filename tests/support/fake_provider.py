"""A provider on loopback that fails in every way the model name asks for.

It speaks the OpenAI-compatible wire, and those of Anthropic and Gemini on their own paths below the same base URL.

A real HTTP/1.1 server, so that what is tested is what a user has: sockets, chunked bodies, resets. In a test::

    async with FakeProvider() as provider:
        ...  # calls provider.base_url with model "fake-n5-gap10"
        call = await provider.call(1)
        await call.ended.wait()
        assert call.closed_by_client

As a program: `python -m tests.support.fake_provider --port 9100 [--default lat5000-rps1]`. It also answers
`GET /stats`, `POST /reset`, `GET /v1/models` and `GET /health`.

A model name is read as switches joined by `-`, `/` or `:`, in any order, after any prefix; unknown parts are ignored.
Names without any switch take the `default` script.

========== ====================================================================================================
lat1000     milliseconds before the first byte of the answer
n20         deltas of a stream (20)
gap20       milliseconds between deltas (0)
tok24       characters of text per delta, at least those of its stamp (24)
size64      characters of a JSON answer, at least those of its stamp (64)
rps1        429 with Retry-After beyond 1 call in any second; one window for all models that have this switch
err503      this status instead of an answer, after the latency
p30         `err` hits 30 % of the calls, evenly spread
first2      `err` hits the first 2 calls of this model name
retryafter7 seconds in the Retry-After header of `err` (429: 1; else no header)
retrydate7  the same, as an HTTP-date; `noretryafter`: no such header, with 429 either
redirect    307 to the same server
cut5        the connection breaks inside the body after 5 deltas (JSON: after half of the body); `midchunk`: inside of a
            chunk, and of the next delta
stall5      falls silent after 5 deltas; the connection stays open
hang        never sends a byte
reset       resets the connection before the first byte
html200     200 with a page
json200     200 with a JSON completion, although a stream was asked for
gzip        says that the body is compressed
empty       an event stream without any byte
doneonly    `[DONE]` alone
nochoices   events without choices, then `[DONE]`
nofinish    no finish reason
nodone      no `[DONE]`; with `nofinish` a clean end of the body in the middle of the answer
nullfinish  the last chunk has a null finish reason
length      finish reason `length`; `filter`: `content_filter`; `oddfinish`: a reason nobody knows
badjson     an event that is not JSON after the last delta; `badutf8`: not UTF-8; `arrayjson`: not an object
errinstream an error object after the last delta
pings       comments for ever, one per gap (at least 10 ms), no text; `emptydeltas`: deltas without text, for ever
hugeevent   one delta of 2 MiB
cronly      lines end with CR; `crlf`: with CR LF
u2028       U+2028, U+2029, U+0085 and accents in every delta, not escaped
bom         the body begins with a byte order mark
split1      every byte is a chunk of its own
close       the body ends with the connection instead of a last chunk
dup         every delta comes again as choice 1; `index1`: only as choice 1
reasoning   reasoning fields before the text; `think9`: nine of them, one per gap
afterdone   more text after `[DONE]`
nousage     no usage; `moonshotusage`: inside the last choice; otherwise a last chunk with empty choices, if asked for
citations   `citations` and `search_results` in the chunks; `cost`: `usage.cost` a number; `costobject`: an object
========== ====================================================================================================

Text is made of stamps, `@<call>:<index>:<monotonic ns>@<padding>`, so that a client can prove which call served it and
how late: `time.monotonic_ns()` is comparable between the processes of one Linux host.
"""

import argparse
import asyncio
import contextlib
import json
import math
import re
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import lru_cache
from typing import Any, Self

import httptools

from tests.support.fake_wires import OpenAIWire, wire_of

__all__ = ["Call", "FakeProvider"]

_NUMBERS = {
    "lat": 0, "n": 20, "gap": 0, "tok": 24, "size": 64, "rps": 0, "err": 0, "p": 100, "first": 0,
    "retryafter": -1, "retrydate": -1, "cut": -1, "stall": -1, "think": 0,
}  # fmt: skip
_FLAGS = frozenset({
    "redirect", "hang", "reset", "html200", "json200", "gzip", "empty", "doneonly", "nochoices", "nofinish", "nodone",
    "nullfinish", "length", "filter", "oddfinish", "badjson", "badutf8", "arrayjson", "errinstream", "pings",
    "emptydeltas", "hugeevent", "cronly", "crlf", "u2028", "bom", "split1", "close", "dup", "index1", "reasoning",
    "afterdone", "nousage", "moonshotusage", "citations", "cost", "costobject", "noretryafter", "midchunk",
})  # fmt: skip
_SWITCH = re.compile(rf"({'|'.join(_NUMBERS)})(\d+)")
_PADDING = "lorem ipsum dolor sit amet consectetur adipiscing elit sed do eiusmod tempor "
_ODD_TEXT = "a\u2028b\u2029c\u0085é🙂"
_CREATED = 1_700_000_000
_PHRASES = {
    200: "OK", 307: "Temporary Redirect", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
    408: "Request Timeout", 422: "Unprocessable Content", 429: "Too Many Requests", 500: "Internal Server Error",
    502: "Bad Gateway", 503: "Service Unavailable", 529: "Overloaded",
}  # fmt: skip


@dataclass(frozen=True)
class Script:
    """What a model name asks for."""

    numbers: dict[str, int]
    flags: frozenset[str]

    def __getitem__(self, name: str) -> int:
        return self.numbers[name]

    def __contains__(self, flag: str) -> bool:
        return flag in self.flags

    @property
    def line_end(self) -> str:
        return "\r" if "cronly" in self else "\r\n" if "crlf" in self else "\n"

    @property
    def finish_reason(self) -> str | None:
        named = {"nullfinish": None, "length": "length", "filter": "content_filter", "oddfinish": "eos_token"}
        return next((reason for flag, reason in named.items() if flag in self), "stop")


@lru_cache(maxsize=10_000)
def script_of(model: str, default: str = "") -> Script:
    """Read the switches of a model name; those of `default` if it has none."""
    numbers, flags = dict(_NUMBERS), set()
    found = False
    for part in re.split(r"[-/:]", model):
        match = _SWITCH.fullmatch(part)
        if match:
            numbers[match[1]] = int(match[2])
        elif part in _FLAGS:
            flags.add(part)
        found = found or bool(match) or part in _FLAGS
    return Script(numbers, frozenset(flags)) if found or not default else script_of(default)


@dataclass
class Call:
    """One request for a completion, as the provider saw it.

    Attributes:
        number: 1 for the first call since the start or the last reset.
        started_s: `time.monotonic()` when its body was complete.
        url: Path and query.
        deltas: Deltas written so far.
        ended: Set when nothing more is written: answered, failed or gone.
        closed_by_client: The client closed the connection before the answer was complete.
    """

    number: int
    started_s: float
    headers: dict[str, str]
    body: bytes
    url: str = ""
    deltas: int = 0
    status: int | None = None
    ended_s: float | None = None
    closed_by_client: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def request(self) -> dict[str, Any]:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def model(self) -> str:
        return self.request["model"]

    def end(self, *, closed_by_client: bool = False) -> None:
        if not self.ended.is_set():
            self.ended_s = time.monotonic()
            self.closed_by_client = closed_by_client
            self.ended.set()


class FakeProvider:
    """The server and its call log; listens on loopback only.

    Attributes:
        calls: The latest 100,000 calls, oldest first.
        raw: Model name → chunks of a recorded body, sent as they are in an event stream.
        second_s: How long the second is for `rps` and the figures; a little less forgives a busy machine its delays.
    """

    def __init__(self, default: str = "", *, port: int = 0) -> None:
        self.default = default
        self.port = port
        self.raw: dict[str, list[bytes]] = {}
        self.second_s = 1.0
        self.connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._changed = asyncio.Condition()
        self.reset()

    def reset(self) -> None:
        """Forget all calls and counters."""
        self.calls: deque[Call] = deque(maxlen=100_000)
        self.connected = 0
        self.count = self.running = self.max_running = self.max_in_second = 0
        self.outcomes: Counter[str] = Counter()
        self._by_model: Counter[str] = Counter()
        self._second: deque[float] = deque()
        self._accepted: deque[float] = deque()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port, backlog=4096)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        connections = list(self.connections)
        for connection in connections:
            connection.transport.abort()
        await asyncio.gather(*(connection.gone.wait() for connection in connections))
        await asyncio.gather(*(connection.task for connection in connections), return_exceptions=True)
        await self._server.wait_closed()

    @property
    def base_url(self) -> str:
        """What a client is configured with, the `/v1` part included."""
        return f"http://127.0.0.1:{self.port}/v1"

    async def call(self, number: int, timeout_s: float = 5) -> Call:
        """The call of that number, as soon as it has come.

        Raises:
            TimeoutError: it did not come in time.
        """
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: self.count >= number)
        return next(call for call in self.calls if call.number == number)

    def stats(self) -> dict[str, Any]:
        """Counters, as `GET /stats` answers them."""
        starts = [call.started_s for call in self.calls]
        span_s = starts[-1] - starts[0] if len(starts) > 1 else 0.0
        names = ("ok", "e429", "e4xx", "e500", "cut", "aborted", "streams")
        return {
            "calls": self.count,
            **{name: self.outcomes[name] for name in names},
            "deltas": sum(call.deltas for call in self.calls),
            "inflight": self.running,
            "max_concurrency": self.max_running,
            "connections": self.connected,
            "max_calls_in_1s": self.max_in_second,
            "span_s": round(span_s, 4),
            "calls_per_s": round(self.count / span_s, 2) if span_s else None,
            "distinct_bodies": len({call.body for call in self.calls}),
        }

    async def began(self, headers: dict[str, str], body: bytes, url: str = "") -> Call:
        """Log a call."""
        self.count += 1
        self.running += 1
        self.max_running = max(self.max_running, self.running)
        call = Call(self.count, time.monotonic(), headers, body, url)
        self.calls.append(call)
        self._second.append(call.started_s)
        while self._second[0] < call.started_s - self.second_s:
            self._second.popleft()
        self.max_in_second = max(self.max_in_second, len(self._second))
        async with self._changed:
            self._changed.notify_all()
        return call

    def ended(self, call: Call, outcome: str, *, closed_by_client: bool = False) -> None:
        """Log how a call ended."""
        self.running -= 1
        self.outcomes[outcome] += 1
        call.end(closed_by_client=closed_by_client)

    def wait_s(self, calls_per_s: int) -> float:
        """Take a place in the sliding second; seconds until there is one if it is full, else 0."""
        now = time.monotonic()
        while self._accepted and self._accepted[0] <= now - self.second_s:
            self._accepted.popleft()
        if len(self._accepted) >= calls_per_s:
            return self._accepted[0] + self.second_s - now
        self._accepted.append(now)
        return 0.0

    def hit(self, script: Script, model: str, number: int) -> bool:
        """Whether the `err` switch strikes this call."""
        self._by_model[model] += 1
        if script["first"]:
            return self._by_model[model] <= script["first"]
        return number * 61 % 100 < script["p"]


class _Gone(Exception):
    """The connection is lost."""


class _Connection(asyncio.Protocol):
    """One connection; its requests are answered one after the other by one task."""

    def __init__(self, provider: FakeProvider) -> None:
        self.provider = provider
        self.requests: asyncio.Queue[tuple[str, str, dict[str, str], bytes]] = asyncio.Queue()
        self.writable = asyncio.Event()
        self.writable.set()
        self.gone = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.provider.connections.add(self)
        self.provider.connected += 1
        self.parser = httptools.HttpRequestParser(self)
        self.task = asyncio.get_running_loop().create_task(self.answer_all())

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()
        self.writable.set()
        self.task.cancel()
        self.provider.connections.discard(self)

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def on_message_begin(self) -> None:
        self.url, self.body, self.headers = b"", b"", {}

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        method, url = self.parser.get_method().decode(), self.url.decode()
        self.requests.put_nowait((method, url, self.headers, self.body))

    async def answer_all(self) -> None:
        with contextlib.suppress(_Gone, asyncio.CancelledError):
            while True:
                await self.answer(*await self.requests.get())
        if not self.gone.is_set():
            self.transport.close()

    async def answer(self, method: str, url: str, headers: dict[str, str], body: bytes) -> None:
        provider, path = self.provider, url.partition("?")[0]
        wire = wire_of(path) if method == "POST" else None
        if wire:
            await self.complete(await provider.began(headers, body, url), wire)
        elif path == "/stats":
            self.send(200, provider.stats())
        elif path == "/reset":
            provider.reset()
            self.send(200, {"ok": True})
        elif path.endswith("/models"):
            model = {"id": "fake", "object": "model", "created": _CREATED, "owned_by": "tests"}
            self.send(200, {"object": "list", "data": [model]})
        elif path in ("/", "/health"):
            self.send(200, {"ok": True})
        else:
            self.send(404, {"error": {"message": "not found"}})

    async def complete(self, call: Call, wire: OpenAIWire) -> None:
        provider = self.provider
        try:
            outcome = await self.play(call, wire)
        except (asyncio.CancelledError, _Gone):
            provider.ended(call, "aborted", closed_by_client=True)
            raise
        provider.ended(call, outcome)
        if self.gone.is_set() or outcome == "cut":
            raise _Gone

    async def play(self, call: Call, wire: OpenAIWire) -> str:
        try:
            request = wire.request(json.loads(call.body))
            script = script_of(request["model"], self.provider.default)
        except (ValueError, KeyError, TypeError):
            return self.refuse(call, 400)
        if "hang" in script:
            await asyncio.Event().wait()
        if "reset" in script:
            return self.break_connection(reset=True)
        if outcome := self.limit(call, script):
            return outcome
        if script["lat"]:
            await asyncio.sleep(script["lat"] / 1000)
        if outcome := self.fail(call, script, request["model"]):
            return outcome
        if request.get("stream") and "json200" not in script:
            return await self.stream(call, script, request, wire)
        return await self.whole(call, script, request["model"])

    def limit(self, call: Call, script: Script) -> str | None:
        wait_s = self.provider.wait_s(script["rps"]) if script["rps"] else 0.0
        return self.refuse(call, 429, retry_after=str(max(1, math.ceil(wait_s)))) if wait_s else None

    def fail(self, call: Call, script: Script, model: str) -> str | None:
        if "redirect" in script:
            return self.refuse(call, 307, location=f"{self.provider.base_url}/elsewhere/chat/completions")
        if script["err"] and self.provider.hit(script, model, call.number):
            return self.refuse(call, script["err"], retry_after=_retry_after(script))
        if "html200" in script:
            return self.page(call)
        return None

    def head(self, status: int, **fields: str | int) -> bytes:
        lines = [f"HTTP/1.1 {status} {_PHRASES.get(status, 'Status')}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def send(self, status: int, body: dict[str, Any], **fields: str) -> None:
        content = json.dumps(body).encode()
        head = self.head(status, content_type="application/json", content_length=len(content), **fields)
        self.transport.write(head + content)

    def refuse(self, call: Call, status: int, **fields: str) -> str:
        call.status = status
        error = {"message": f"refused with {status}", "type": "error", "code": str(status)}
        given = {name: value for name, value in fields.items() if value}
        self.send(status, {"error": error}, x_upstream_call=str(call.number), **given)
        return "e429" if status == 429 else "e500" if status >= 500 else "e4xx"

    def page(self, call: Call) -> str:
        call.status = 200
        content = b"<!doctype html><title>Sign in</title><p>Please sign in."
        self.transport.write(self.head(200, content_type="text/html", content_length=len(content)) + content)
        return "ok"

    async def whole(self, call: Call, script: Script, model: str) -> str:
        text = stamp(call.number, 0, script["size"])
        message = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": script.finish_reason}
        content = json.dumps(
            {**_envelope(call, model), "object": "chat.completion", "choices": [message], "usage": _usage(script)}
        ).encode()
        call.status = 200
        head = self.head(200, content_type="application/json", content_length=len(content), x_upstream_call=call.number)
        if script["cut"] >= 0:
            await self.write(head + content[: len(content) // 2])
            return self.break_connection()
        await self.write(head + content)
        return "ok"

    async def stream(self, call: Call, script: Script, request: dict[str, Any], wire: OpenAIWire) -> str:
        self.provider.outcomes["streams"] += 1
        call.status = 200
        body = _Body(self, script, wire)
        framing = {"connection": "close"} if body.plain else {"transfer_encoding": "chunked"}
        encoding = {"content_encoding": "gzip"} if "gzip" in script else {}
        head = {"content_type": "text/event-stream; charset=utf-8", "cache_control": "no-cache"}
        await self.write(self.head(200, **head, **framing, **encoding, x_upstream_call=call.number))
        if request["model"] in self.provider.raw:
            for chunk in self.provider.raw[request["model"]]:
                await body.chunk(chunk)
            return await body.end()
        return await Story(call, script, request, body).tell()

    async def write(self, data: bytes) -> None:
        if self.gone.is_set():
            raise _Gone
        self.transport.write(data)
        if not self.writable.is_set():
            await self.writable.wait()

    def break_connection(self, *, reset: bool = False) -> str:
        if reset:
            linger = struct.pack("ii", 1, 0)
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.transport.abort()
        else:
            self.transport.close()  # flushes first: a client may count on the deltas before the cut
        return "cut"


class _Body:
    """The bytes of an event stream and how they are framed."""

    def __init__(self, connection: _Connection, script: Script, wire: OpenAIWire) -> None:
        self.connection = connection
        self.wire = wire
        self.script = script
        self.plain = "close" in script
        self.begun = False

    async def chunk(self, data: bytes) -> None:
        if data:
            await self.connection.write(data if self.plain else b"%x\r\n%s\r\n" % (len(data), data))

    async def write(self, data: bytes) -> None:
        if not self.begun and "bom" in self.script:
            data = b"\xef\xbb\xbf" + data
        self.begun = True
        if "split1" not in self.script:
            return await self.chunk(data)
        for i in range(len(data)):
            await self.chunk(data[i : i + 1])
        return None

    async def line(self, text: str) -> None:
        await self.write((text + self.script.line_end * 2).encode())

    async def event(self, value: Any) -> None:
        for block in self.wire.events(value):
            await self.line(block)

    async def end(self) -> str:
        if self.plain:
            self.connection.transport.close()
        else:
            await self.connection.write(b"0\r\n\r\n")
        return "ok"

    async def cut(self) -> str:
        if "midchunk" in self.script:
            await self.connection.write(b'ff\r\ndata: {"choices":[{"index":0,"delta":{"content":"lost')
        return self.connection.break_connection()


class Story:
    """The events of one stream, in order."""

    def __init__(self, call: Call, script: Script, request: dict[str, Any], body: _Body) -> None:
        self.call, self.script, self.body = call, script, body
        self.envelope = {**_envelope(call, request["model"]), "object": "chat.completion.chunk"}
        if "citations" in script:
            result = {"title": "A source", "url": "https://example.org/1"}
            self.envelope |= {"citations": ["https://example.org/1"], "search_results": [result]}
        self.usage_asked = bool((request.get("stream_options") or {}).get("include_usage")) and "nousage" not in script

    async def tell(self) -> str:
        script, body = self.script, self.body
        if "pings" in script or "emptydeltas" in script:
            await self.babble()
        if "empty" in script:
            return await body.end()
        if "nochoices" in script:
            await body.event({**self.envelope, "choices": []})
        elif "doneonly" not in script:
            await self.prelude()
            async for index in self.ticks():
                if index == script["cut"]:
                    return await body.cut()
                await self.delta(index)
            if script["cut"] == script["n"]:
                return await body.cut()
            await self.trouble()
            await self.finish()
        if "nodone" not in script:
            await body.event("[DONE]")
        if "afterdone" in script:
            await body.event(self.chunk({"content": "after the end"}))
        return await body.end()

    def chunk(self, delta: dict[str, Any], *, index: int = 0, finish: str | None = None) -> dict[str, Any]:
        return {**self.envelope, "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}

    async def babble(self) -> None:
        while True:
            if "pings" in self.script:
                await self.body.line(": still working")
            else:
                await self.body.event(self.chunk({"content": ""}))
            await asyncio.sleep(max(10, self.script["gap"]) / 1000)

    async def prelude(self) -> None:
        if "reasoning" in self.script:
            await self.body.event(self.chunk({"role": "assistant", "content": None, "reasoning_content": "thinking"}))
            await self.body.event(self.chunk({"reasoning": "thinking on"}))
        for _ in range(self.script["think"]):
            await self.body.event(self.chunk({"content": None, "reasoning_content": "hm"}))
            await asyncio.sleep(self.script["gap"] / 1000)
        if "hugeevent" in self.script:
            await self.body.event(self.chunk({"content": "x" * (2 << 20)}))

    async def ticks(self) -> AsyncIterator[int]:
        loop = asyncio.get_running_loop()
        start_s, gap_s = loop.time(), self.script["gap"] / 1000
        for index in range(self.script["n"]):
            if index == self.script["stall"]:
                await asyncio.Event().wait()
            yield index
            if gap_s and index + 1 < self.script["n"]:
                await asyncio.sleep(max(0.0, start_s + (index + 1) * gap_s - loop.time()))
            elif index % 16 == 15:
                await asyncio.sleep(0)

    async def delta(self, index: int) -> None:
        text = stamp(self.call.number, index, self.script["tok"])
        if "u2028" in self.script:
            text += _ODD_TEXT
        delta = {"role": "assistant", "content": text} if index == 0 else {"content": text}
        self.call.deltas += 1
        if "index1" not in self.script:
            await self.body.event(self.chunk(delta))
        if "dup" in self.script or "index1" in self.script:
            await self.body.event(self.chunk(delta, index=1))

    async def trouble(self) -> None:
        if self.script["stall"] >= self.script["n"]:
            await asyncio.Event().wait()
        if "badjson" in self.script:
            await self.body.event('{"choices":[{"index":0,"del')
        if "arrayjson" in self.script:
            await self.body.event("[1, 2]")
        if "badutf8" in self.script:
            await self.body.write(b'data: {"choices":[{"index":0,"delta":{"content":"\xff\xfe"}}]}\n\n')
        if "errinstream" in self.script:
            await self.body.event({"error": {"message": "the model fell over", "type": "server_error", "code": 500}})

    async def finish(self) -> None:
        usage = _usage(self.script)
        inside = "moonshotusage" in self.script
        if "nofinish" not in self.script:
            last = self.chunk({}, index=1 if "index1" in self.script else 0, finish=self.script.finish_reason)
            if inside:
                last["choices"][0]["usage"] = usage
            await self.body.event(last)
        if self.usage_asked and not inside:
            await self.body.event({**self.envelope, "choices": [], "usage": usage})


def stamp(call: int, index: int, characters: int) -> str:
    """Text that names its call, its place and when it was written."""
    text = f"@{call}:{index}:{time.monotonic_ns()}@"
    missing = max(0, characters - len(text))
    return text + (_PADDING * (missing // len(_PADDING) + 1))[:missing]


def _envelope(call: Call, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{call.number}", "created": _CREATED, "model": model}


def _usage(script: Script) -> dict[str, Any]:
    usage: dict[str, Any] = {"prompt_tokens": 10, "completion_tokens": script["n"], "total_tokens": 10 + script["n"]}
    if "cost" in script:
        usage["cost"] = 0.0125
    if "costobject" in script:
        usage["cost"] = {"input_tokens_cost": 0.0025, "output_tokens_cost": 0.01, "total_cost": 0.0125}
    return usage


def _retry_after(script: Script) -> str:
    if script["retrydate"] >= 0:
        return formatdate(time.time() + script["retrydate"], usegmt=True)
    if script["retryafter"] >= 0:
        return str(script["retryafter"])
    return "1" if script["err"] == 429 and "noretryafter" not in script else ""


async def _serve(port: int, default: str) -> None:
    async with FakeProvider(default, port=port) as provider:
        print(f"fake provider on {provider.base_url}", flush=True)
        await asyncio.Event().wait()


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=9100, help="0 takes a free one and prints it")
    parser.add_argument("--default", default="", help="switches for model names without any, e.g. lat1000-n200-gap20")
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(arguments.port, arguments.default))


if __name__ == "__main__":
    main()
