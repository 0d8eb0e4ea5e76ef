"""Clients that do not give up, and the history of what they were told.

They behave as SDKs do: what broke, and what is said to be worth a retry, is asked again after a moment, on another
server. A stream that ended without an end is resumed where it was.
"""

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from oncewise.core.stream_hub import Position
from tests.faults.site import Deployment, Member
from tests.support.http import JSON, Event, Reply, parse_reply
from tests.support.watching import Watch

__all__ = ["Ask", "Client", "History", "JsonClient", "SseClient", "Told"]

_RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504})
_PAUSE_S = 0.1
_MOST_S = 1.0


@dataclass(frozen=True)
class Ask:
    """One message of one user, which several clients may send."""

    org: str
    thread: str
    content: str
    model: str
    key: str | None = None

    @property
    def body(self) -> dict[str, str]:
        return {"content": self.content, "model": self.model}

    @property
    def headers(self) -> list[tuple[str, str]]:
        return [("x-org-id", self.org), *([("idempotency-key", self.key)] if self.key else [])]


@dataclass
class Told:
    """What one attempt of a client was told.

    Attributes:
        op: `json` or `sse`.
        state: `completed`; how else the turn ended; `lost` if the connection broke; `refused`; `hung`.
        positions: For streams, epoch and number of each piece of text.
        broken: What no stream may do, in words.
    """

    op: str
    client: int
    ask: Ask
    start_s: float
    end_s: float = 0.0
    status: int = 0
    code: str | None = None
    state: str = "lost"
    turn: str | None = None
    text: str = ""
    positions: list[tuple[int, int]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def line(self) -> str:
        """The history's line: no text, its digest."""
        values = asdict(self) | {"text": sha256(self.text.encode()).hexdigest()[:16], "chars": len(self.text)}
        return json.dumps(values)


@dataclass
class History:
    """All that clients were told, attempt by attempt.

    Attributes:
        waits: For each client, its ask, when it began, and when it had its last answer; None while it waits.
    """

    told: list[Told] = field(default_factory=list)
    waits: dict[int, tuple[Ask, float, float | None]] = field(default_factory=dict)

    def write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(told.line() + "\n" for told in self.told))

    def final(self, client: int) -> Told | None:
        """What a client was told last."""
        return next((told for told in reversed(self.told) if told.client == client), None)


class _Lost(Exception):
    """The connection broke before the answer was whole."""


class Client:
    """Asks until it is answered.

    Args:
        site: Whom it asks.
        history: Where it writes what it was told.
        number: Its own; also which server it asks first.
        ask: What it asks for.
        patience_s: When it gives up.
    """

    op = ""

    def __init__(self, site: Deployment, history: History, number: int, ask: Ask, patience_s: float = 60.0) -> None:
        self.site = site
        self.history = history
        self.number = number
        self.ask = ask
        self.patience_s = patience_s
        self._tries = 0

    async def run(self, first: int | None = None) -> Told | None:
        """Ask, from the server at place `first` on; the last answer, None if there was none in time."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        self._place = self.number if first is None else first
        self.history.waits[self.number] = (self.ask, began_s, None)
        try:
            async with asyncio.timeout(self.patience_s):
                while True:
                    told = Told(self.op, self.number, self.ask, loop.time())
                    pause_s = await self._try(told)
                    told.end_s = loop.time()
                    self.history.told.append(told)
                    if pause_s is None:
                        break
                    self._tries += 1
                    await asyncio.sleep(pause_s)
        except TimeoutError:
            told.end_s, told.state = loop.time(), "hung"
            self.history.told.append(told)
            return None
        self.history.waits[self.number] = (self.ask, began_s, loop.time())
        return told

    async def _try(self, told: Told) -> float | None:
        """Ask once; seconds until it should be asked again, None if this was an answer."""
        try:
            return await self._ask(self.server, told)
        except (_Lost, OSError, asyncio.IncompleteReadError):
            return _PAUSE_S
        except AssertionError as error:
            told.broken.append(f"malformed: {error}")
            return _PAUSE_S

    @property
    def server(self) -> Member:
        members = self.site.members
        return members[(self._place + self._tries) % len(members)]

    async def _ask(self, server: Member, told: Told) -> float | None:
        raise NotImplementedError

    def _refused(self, reply: Reply, told: Told) -> float | None:
        """An answer that is none: how long to wait before asking again."""
        problem = reply.json() if reply.body.startswith(b"{") else {}
        told.status, told.state, told.code = reply.status, "refused", problem.get("code")
        told.turn = reply.headers.get("x-turn-id")
        if reply.status not in _RETRIED or problem.get("retryable") is False:
            return None
        # A restarted or neighbouring server may do better at once than the one that said when to come again.
        return min(_MOST_S, float(reply.headers.get("retry-after", _PAUSE_S)))


def _request(
    server: Member, method: str, path: str, ask: Ask, body: Mapping[str, Any] | None, more: Iterable[Any] = ()
) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    fields = [server.host, ("connection", "close"), *ask.headers, *more]
    if body is not None:
        fields += [JSON, ("content-length", str(len(content)))]
    return server.head(method, path, fields) + content


class JsonClient(Client):
    """Wants the whole answer."""

    op = "json"

    async def _ask(self, server: Member, told: Told) -> float | None:
        reader, writer = await server.connect()
        try:
            writer.write(_request(server, "POST", f"/api/threads/{self.ask.thread}/messages", self.ask, self.ask.body))
            data = await reader.read()
        finally:
            writer.close()
        reply = _whole(data)
        if reply.status != 200:
            return self._refused(reply, told)
        answer = reply.json()
        told.status, told.state = 200, "completed"
        told.turn, told.text = answer["turn_id"], answer["assistant_message"]["content"]
        return None


def _whole(data: bytes) -> Reply:
    """The answer; raises if it ends in the middle."""
    if b"\r\n\r\n" not in data:
        raise _Lost
    reply = parse_reply(data)
    if len(reply.body) != int(reply.headers.get("content-length", len(reply.body))):
        raise _Lost
    return reply


class SseClient(Client):
    """Watches the answer come, and resumes where it was cut."""

    op = "sse"
    _turn: str | None = None
    _after: str | None = None
    _text = ""
    _at: tuple[int, int] = (0, 0)

    async def _ask(self, server: Member, told: Told) -> float | None:
        resuming = self._turn is not None
        if resuming:
            path, body = f"/api/threads/{self.ask.thread}/turns/{self._turn}/stream", None
            more = [("last-event-id", self._after)] if self._after else []
        else:
            path, body, more = f"/api/threads/{self.ask.thread}/messages/stream", self.ask.body, []
            self._text, self._at = "", (0, 0)
        reader, writer = await server.connect()
        try:
            writer.write(_request(server, "GET" if resuming else "POST", path, self.ask, body, more))
            stream = await Watch(reader, writer).begin()
            if stream.reply.headers.get("content-type") != "text/event-stream":
                self._turn = None
                if resuming:
                    return _PAUSE_S
                return self._refused(_whole_of(stream.reply), told)
            if resuming and ("stream-replayed-from" in stream.reply.headers or not self._after):
                self._text, self._at = "", (0, 0)
            return await self._watch(stream, told)
        finally:
            told.text = self._text
            writer.close()

    async def _watch(self, stream: Watch, told: Told) -> float | None:
        told.status = 200
        told.turn = self._turn = stream.reply.headers.get("x-turn-id", self._turn)
        while (event := await stream.next()) is not None:
            self._take(event, told)
            if event.name in ("done", "error"):
                return self._ended(event, told)
        # No end is the sign to resume, whether the body was ended properly or cut.
        return _PAUSE_S

    def _take(self, event: Event, told: Told) -> None:
        if event.id is not None:
            self._after = event.id
        if event.name == "reset":
            self._text = ""
        if event.name not in ("reset", "delta") or event.id is None:
            return
        position = Position.parse(event.id)
        at = (position.epoch, position.seq)
        if at <= self._at and event.name == "delta":
            told.broken.append(f"{at} after {self._at}")
        self._at = at
        if event.name == "delta":
            told.positions.append(at)
            self._text += event.data["delta"]

    def _ended(self, event: Event, told: Told) -> float | None:
        told.state, told.code = event.data["state"], event.data.get("code")
        self._turn = self._after = None
        return _PAUSE_S if event.name == "error" and event.data["retryable"] else None


def _whole_of(reply: Reply) -> Reply:
    if len(reply.body) != int(reply.headers.get("content-length", len(reply.body))):
        raise _Lost
    return reply
