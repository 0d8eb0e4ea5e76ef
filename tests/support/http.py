"""A real server on a loopback socket, in the test's own loop, and a client that sends the bytes it is told to."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from oncewise.api.app import App
from oncewise.api.limits import Limits
from oncewise.api.server import Server
from oncewise.api.sockets import listen
from oncewise.api.sse import SseEncoder
from oncewise.bootstrap import Services, open_services
from oncewise.core.pacing import LocalLimiter, Pacer
from oncewise.core.retry import RetryBudget
from oncewise.service.calls import ProviderLane
from oncewise.settings import Settings
from tests.support.scripted import ScriptedProvider

ORG = ("x-org-id", "acme")
JSON = ("content-type", "application/json")


@dataclass
class Reply:
    """One answer. `headers` are lower case; of repeated ones the last."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return self.json()["code"]


@dataclass
class Event:
    name: str
    data: dict[str, Any]
    id: str | None = None
    raw: list[str] = field(default_factory=list)


def read_events(body: bytes) -> list[Event]:
    """The blocks of an event stream, read strictly: LF only, one line of data."""
    text = body.decode()
    assert "\r" not in text
    events = []
    for block in text.split("\n\n")[:-1]:
        lines = block.split("\n")
        fields = dict(line.split(": ", 1) for line in lines)
        assert len(fields) == len(lines)
        events.append(Event(fields["event"], json.loads(fields["data"]), fields.get("id"), lines))
    assert text == "" or text.endswith("\n\n")
    return events


def dechunk(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        parts.append(rest[:length])
        body = rest[length + 2 :]
        if length == 0:
            break
    return b"".join(parts)


def parse_reply(data: bytes) -> Reply:
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = dechunk(body)
    return Reply(int(status.split(" ")[1]), headers, body)


@dataclass
class Site:
    """A running server, and how to talk to it."""

    port: int
    services: Services
    provider: ScriptedProvider
    server: uvicorn.Server

    @property
    def host(self) -> tuple[str, str]:
        return "host", f"127.0.0.1:{self.port}"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    def head(self, method: str, path: str, headers: Iterable[tuple[str, str]] = ()) -> bytes:
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1")

    async def raw(self, data: bytes, timeout_s: float = 20.0) -> bytes:
        """Send bytes, return all that comes until the server closes."""
        reader, writer = await self.connect()
        writer.write(data)
        try:
            async with asyncio.timeout(timeout_s):
                return await reader.read()
        finally:
            writer.close()

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes | Mapping[str, Any] | None = None,
        headers: Iterable[Any] = (ORG, JSON),
    ) -> Reply:
        """One request on a connection of its own."""
        if isinstance(body, Mapping):
            body = json.dumps(body).encode()
        fields = [self.host, ("connection", "close"), *headers]
        if body is not None:
            fields.append(("content-length", str(len(body))))
        return parse_reply(await self.raw(self.head(method, path, fields) + (body or b"")))

    async def thread(self, headers: Iterable[Any] = (ORG, JSON)) -> str:
        reply = await self.ask("POST", "/api/threads/", {}, headers)
        assert reply.status == 201
        return reply.json()["thread_id"]

    async def say(self, thread_id: str, content: str = "Hello", headers: Iterable[Any] = (), **fields: Any) -> Reply:
        path = f"/api/threads/{thread_id}/messages"
        return await self.ask("POST", path, {"content": content, **fields}, (ORG, JSON, *headers))

    async def stream(self, thread_id: str, content: str = "Hello", headers: Iterable[Any] = (), **fields: Any) -> Reply:
        path = f"/api/threads/{thread_id}/messages/stream"
        return await self.ask("POST", path, {"content": content, **fields}, (ORG, JSON, *headers))

    async def messages(self, thread_id: str) -> list[tuple[str, str]]:
        reply = await self.ask("GET", f"/api/threads/{thread_id}")
        return [(message["role"], message["content"]) for message in reply.json()["messages"]]


def _opener(settings: Settings, provider: ScriptedProvider, opened: list[Services]) -> Any:
    async def open_all() -> Services:
        services = await open_services(settings, SseEncoder())
        limiter = LocalLimiter(1000, 100, asyncio.get_running_loop().time)
        lane = ProviderLane(provider, Pacer(limiter, concurrency=10), "scripted-1", RetryBudget())
        services.turns.calls.lanes["demo"] = lane
        opened.append(services)
        return services

    return open_all


@asynccontextmanager
async def serve(
    folder: Path,
    provider: ScriptedProvider | None = None,
    *,
    plain: bool = False,
    limits: Limits = Limits(),  # noqa: B008  frozen
    **settings: Any,
) -> AsyncIterator[Site]:
    """Serve on a free port, with our server or, if `plain`, with uvicorn as it comes."""
    chosen = Settings(database_url=f"sqlite:///{folder / 'ow.db'}", **settings)
    provider = provider or ScriptedProvider()
    opened: list[Services] = []
    app = App(_opener(chosen, provider, opened), limits)
    sockets = listen("127.0.0.1", 0)
    server: uvicorn.Server = Server(app, drain_s=chosen.drain_s)
    if plain:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", http="httptools"))
    running = asyncio.create_task(server.serve(sockets))
    try:
        while not server.started:
            await asyncio.sleep(0.01)
            if running.done():
                await running
        yield Site(sockets[0].getsockname()[1], opened[0], provider, server)
    finally:
        provider.go.set()
        server.should_exit = True
        await running
