"""A stream as a client reads it while it comes: event by event, and as strict as the contract."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

from oncewise.settings import ProviderSettings
from tests.support.fake_provider import FakeProvider
from tests.support.http import JSON, ORG, Event, Reply, Site, parse_reply, read_events, serve

__all__ = ["Watch", "names", "serve_openai", "terminal", "text_of", "until", "watching"]

TIMEOUT_S = 30.0


def names(events: Iterable[Event]) -> list[str]:
    return [event.name for event in events]


def text_of(events: Iterable[Event]) -> str:
    """The text as a client puts it together: deltas in order, dropped at a `reset`."""
    text = ""
    for event in events:
        if event.name == "reset":
            text = ""
        elif event.name == "delta":
            text += event.data["delta"]
    return text


def terminal(events: Iterable[Event]) -> Event:
    """The one terminal event, which must be the last."""
    ends = [event for event in events if event.name in ("done", "error")]
    assert len(ends) == 1, names(ends)
    assert ends[0] is list(events)[-1]
    return ends[0]


async def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition that no event tells of."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


class Watch:
    """One open stream.

    Attributes:
        reply: Status and headers; for an answer that is no stream also its body.
        events: Everything read so far.
        raw: The bytes behind them, without the framing of HTTP.
        complete: The server ended the body properly; False after a cut.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reply = Reply(0, {}, b"")
        self.events: list[Event] = []
        self.raw = b""
        self.complete = False
        self._reader = reader
        self._writer = writer
        self._pending = b""
        self._parsed: list[Event] = []

    async def begin(self) -> Self:
        head = await self._reader.readuntil(b"\r\n\r\n")
        self.reply = parse_reply(head)
        if self.reply.headers.get("content-type") != "text/event-stream":
            self.reply = parse_reply(head + await self._reader.read())
        return self

    @property
    def turn_id(self) -> str:
        return self.reply.headers["x-turn-id"]

    @property
    def last_id(self) -> str | None:
        """What a client would resume after."""
        return next((event.id for event in reversed(self.events) if event.id is not None), None)

    @property
    def text(self) -> str:
        return text_of(self.events)

    async def next(self) -> Event | None:
        """The next event; None at the end of the stream."""
        async with asyncio.timeout(TIMEOUT_S):
            while not self._parsed:
                chunk = await self._chunk()
                if not chunk:
                    assert not (self.complete and self._pending), "the stream ends inside an event"
                    return None
                self.raw += chunk
                self._take(chunk)
        self.events.append(self._parsed.pop(0))
        return self.events[-1]

    def _take(self, chunk: bytes) -> None:
        whole, gap, self._pending = (self._pending + chunk).rpartition(b"\n\n")
        self._parsed += read_events(whole + gap)

    async def _chunk(self) -> bytes:
        try:
            size = int((await self._reader.readuntil(b"\r\n"))[:-2], 16)
            data = await self._reader.readexactly(size + 2)
        except (asyncio.IncompleteReadError, ConnectionError):
            return b""
        self.complete = size == 0
        return data[:-2]

    async def until(self, name: str) -> Event:
        """Read on to the next event of that name."""
        while (event := await self.next()) is not None:
            if event.name == name:
                return event
        raise AssertionError(f"the stream ended without {name}: {names(self.events)}")

    async def rest(self) -> list[Event]:
        """Read to the end; all events, the earlier ones included."""
        while await self.next() is not None:
            pass
        return self.events

    def leave(self) -> None:
        """Close the connection, whatever is still to come."""
        self._writer.close()


@asynccontextmanager
async def watching(
    site: Site,
    path: str,
    body: Mapping[str, Any] | None = None,
    headers: Iterable[tuple[str, str]] = (),
    org: tuple[str, str] = ORG,
) -> AsyncIterator[Watch]:
    """Open a stream: POST with a body, else GET."""
    content = b"" if body is None else json.dumps(body).encode()
    fields = [site.host, ("connection", "close"), org, *headers]
    if body is not None:
        fields += [JSON, ("content-length", str(len(content)))]
    reader, writer = await site.connect()
    writer.write(site.head("GET" if body is None else "POST", path, fields) + content)
    try:
        yield await Watch(reader, writer).begin()
    finally:
        writer.close()


@asynccontextmanager
async def serve_openai(
    folder: Path, provider: FakeProvider, model: str = "n5-gap20", **settings: Any
) -> AsyncIterator[Site]:
    """A server in this process that asks `provider` over HTTP; `model` is the script of messages that name none."""
    openai = ProviderSettings(
        name="openai",
        api_key="sk-test",
        base_url=provider.base_url,
        default_model=model,
        rps=10_000,
        burst=1000,
        concurrency=1000,
    )
    async with serve(folder, providers={"openai": openai}, **settings) as site:
        yield site
