"""A reverse proxy that breaks connections where a test wants it to, and adds a header that a browser cannot send."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

__all__ = ["CuttingProxy", "cutting_proxy"]

_DELTA = b'data: {"delta"'


@dataclass
class CuttingProxy:
    """Answers `/` with a page, passes everything else on.

    Attributes:
        cuts: For the next streams, in the middle of the data of which delta each is cut.
        passed: The Last-Event-ID of each request passed on, and the status it was answered.
    """

    upstream: int
    page: bytes
    port: int = 0
    cuts: list[int] = field(default_factory=list)
    passed: list[tuple[str | None, int]] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET / "):
                about = b"content-type: text/html\r\nconnection: close\r\ncontent-length: %d" % len(self.page)
                writer.write(b"HTTP/1.1 200 OK\r\n" + about + b"\r\n\r\n" + self.page)
            else:
                await self._pass_on(head, writer)
        writer.close()

    async def _pass_on(self, head: bytes, writer: asyncio.StreamWriter) -> None:
        request, *fields = head.rstrip().split(b"\r\n")
        kept = [line for line in fields if line.split(b":")[0].lower() not in (b"host", b"connection")]
        added = [b"host: 127.0.0.1:%d" % self.upstream, b"connection: close", b"x-org-id: acme"]
        last = next(
            (line.partition(b": ")[2].decode() for line in kept if line.lower().startswith(b"last-event")), None
        )
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self.upstream)
        to_server.write(b"\r\n".join([request, *kept, *added, b"", b""]))
        answer = await from_server.readuntil(b"\r\n\r\n")
        self.passed.append((last, int(answer.split()[1])))
        writer.write(answer)
        await self._pump(from_server, writer, self.cuts.pop(0) if self.cuts else None)
        to_server.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, cut: int | None) -> None:
        came, sent = b"", 0
        while piece := await source.read(65536):
            came += piece
            places = came.split(_DELTA)
            if cut is not None and len(places) > cut:
                end = len(_DELTA.join(places[:cut])) + len(_DELTA) + 5
                sink.write(came[sent:end])
                await sink.drain()
                return
            sink.write(came[sent:])
            sent = len(came)
            await sink.drain()


@asynccontextmanager
async def cutting_proxy(upstream: int, page: bytes) -> AsyncIterator[CuttingProxy]:
    """A proxy in front of the server on port `upstream`."""
    proxy = CuttingProxy(upstream, page)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
