"""The limit: one provider call, its bytes copied to every socket, and nothing else.

Speaks just enough HTTP for the load of this directory and keeps none of the promises of a server: no storage, no
identity, no limits, one call at a time. What Oncewise costs beyond this is the price of those.
"""

import argparse
import asyncio
import json
import socket
from urllib.parse import urlsplit

import uvloop

JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Call:
    """The one call that is running, and who waits for it."""

    def __init__(self, provider: str) -> None:
        self._url = urlsplit(provider)
        self._past: list[bytes] = []
        self._streams: list[asyncio.Transport] = []
        self._waiters: list[asyncio.Transport] = []
        self._task: asyncio.Task[None] | None = None

    def join(self, transport: asyncio.Transport, body: bytes, *, stream: bool) -> None:
        """Answer this connection too."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(json.loads(body)["model"]))
        if stream:
            transport.write(STREAM_HEAD + b"".join(self._past))
            self._streams.append(transport)
        else:
            self._waiters.append(transport)

    async def _run(self, model: str) -> None:
        text = ""
        reader, writer = await asyncio.open_connection(self._url.hostname, self._url.port)
        content = json.dumps({"model": model, "stream": True, "messages": []}).encode()
        line = f"POST {self._url.path}/chat/completions HTTP/1.1"
        head = f"{line}\r\nhost: provider\r\ncontent-length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        async for line in reader:
            if line.startswith(b'data: {"'):
                delta = json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                text += delta
                if delta:
                    self._publish(b'event: delta\ndata: {"delta":%b}\n\n' % json.dumps(delta).encode())
            elif line.startswith(b"data: [DONE]"):
                break
        writer.close()
        self._finish(json.dumps({"text": text}).encode())

    def _publish(self, event: bytes) -> None:
        chunk = b"%x\r\n%b\r\n" % (len(event), event)
        self._past.append(chunk)
        for transport in self._streams:
            transport.write(chunk)

    def _finish(self, answer: bytes) -> None:
        self._publish(b'event: done\ndata: {"state":"completed"}\n\n')
        for transport in self._streams:
            transport.write(b"0\r\n\r\n")
        for transport in self._waiters:
            transport.write(JSON_HEAD % (len(answer), answer))
        self._past, self._streams, self._waiters, self._task = [], [], [], None


class Connection(asyncio.Protocol):
    """One connection: a request, its answer, and so on."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._received = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        if not blank or len(body) < _length(head):
            return
        self._received = b""
        line = head.partition(b"\r\n")[0]
        if line.startswith(b"POST"):
            self._call.join(self._transport, body, stream=b"/stream " in line)
        else:
            self._transport.write(JSON_HEAD % (2, b"{}"))


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    return 0


async def serve(port: int, provider: str) -> None:
    """Serve for ever."""
    call = Call(provider)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(call), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--provider", required=True, help="base URL, with /v1")
    arguments = parser.parse_args()
    uvloop.run(serve(arguments.port, arguments.provider))
