"""A provider so quick that it does not limit what is measured through it: an answer is bytes made in advance.

The fake provider of the tests can fail in every way, and takes a task and a queue per connection for that. This one
does two things, whole answers and streams on the OpenAI wire. A model's name ends in the number of deltas of its
stream, e.g. `quick-20`; all of them are written at once.

The first delta names the prompt's tag and the number of the call, so that a client can tell whether an answer is its
own.

Deliberately absent: latency, limits and failures.
"""

import argparse
import asyncio
import re
import socket
from functools import lru_cache
from typing import Any

import httptools
import orjson
import uvloop

_TAG = re.compile(rb"tag-\d{9}")
_NAMED = b"tag-000000000 call-000000000"
"""What stands in an answer made in advance where tag and number go; as long as those, so that lengths stay true."""
_DELTA = " lorem ipsum dolor sit amet"
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n%b\r\n\r\n"


class Provider:
    """The answers, and how many there were."""

    def __init__(self) -> None:
        self.calls = 0

    def answer(self, url: bytes, body: bytes) -> bytes:
        """The bytes that answer a request."""
        if url.endswith(b"/chat/completions"):
            self.calls += 1
            asked = orjson.loads(body)
            tag = _TAG.search(body)
            named = b"%b call-%09d" % (tag[0] if tag else _NAMED[:13], self.calls)
            made = _stream if asked.get("stream") else _whole
            return made(asked["model"]).replace(_NAMED, named, 1)
        if url == b"/reset":
            self.calls = 0
        return _json(b'{"calls":%d}' % self.calls)


@lru_cache
def _whole(model: str) -> bytes:
    message = {"role": "assistant", "content": _NAMED.decode() + _DELTA * (_deltas(model) - 1)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    head = {**_head(model), "object": "chat.completion"}
    return _json(orjson.dumps({**head, "choices": [choice], "usage": _usage(_deltas(model))}))


@lru_cache
def _stream(model: str) -> bytes:
    texts = [_NAMED.decode(), *[_DELTA] * (_deltas(model) - 1)]
    documents = [_chunk(model, {"content": text}) for text in texts]
    documents[0]["choices"][0]["delta"]["role"] = "assistant"
    documents.append(_chunk(model, {}, "stop"))
    documents.append({**_head(model), "choices": [], "usage": _usage(_deltas(model))})
    events = [b"data: %b\n\n" % data for data in [*map(orjson.dumps, documents), b"[DONE]"]]
    chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in [*events, b""]]
    return _HEAD % (b"text/event-stream; charset=utf-8", b"transfer-encoding: chunked") + b"".join(chunks)


def _chunk(model: str, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
    return {**_head(model), "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def _head(model: str) -> dict[str, Any]:
    return {"id": "chatcmpl-quick", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": model}


def _usage(deltas: int) -> dict[str, int]:
    return {"prompt_tokens": 10, "completion_tokens": deltas, "total_tokens": 10 + deltas}


def _deltas(model: str) -> int:
    return int(model.rpartition("-")[2])


def _json(body: bytes) -> bytes:
    return _HEAD % (b"application/json", b"content-length: %d" % len(body)) + body


class Connection(asyncio.Protocol):
    """One connection: a request, its answer, and so on."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        self._parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._transport.write(self._provider.answer(self._url, self._body))


async def serve(port: int) -> None:
    """Serve for ever."""
    provider = Provider()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(provider), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    uvloop.run(serve(parser.parse_args().port))
