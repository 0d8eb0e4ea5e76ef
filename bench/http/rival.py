"""The usual way to share a stream: Starlette, sse-starlette, and one queue per viewer.

Written as its documentation and most projects write it, and no slower than need be: the provider is called once for
all who ask the same, uvicorn runs on uvloop and httptools, and JSON is written by orjson. It stores nothing.
"""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import orjson
import uvicorn
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

Event = dict[str, Any]


class Broadcast:
    """One provider call, copied into the queue of every viewer."""

    def __init__(self) -> None:
        self.past: list[Event] = []
        self.queues: set[asyncio.Queue[Event | None]] = set()

    def publish(self, event: Event) -> None:
        """Give an event to all who watch."""
        self.past.append(event)
        for queue in self.queues:
            queue.put_nowait(event)

    async def watch(self) -> AsyncIterator[Event]:
        """Everything so far, then everything as it comes."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        for event in self.past:
            queue.put_nowait(event)
        self.queues.add(queue)
        try:
            event: Event = {}
            while event.get("event") != "done":
                event = await queue.get()
                yield event
        finally:
            self.queues.discard(queue)


class Rival:
    """The application."""

    def __init__(self, provider: str) -> None:
        self._provider = provider
        self._running: dict[bytes, Broadcast] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.app = Starlette(
            routes=[
                Route("/health/readiness", lambda _: JSONResponse({})),
                Route("/api/threads/{thread}/messages/stream", self.stream, methods=["POST"]),
            ]
        )

    async def stream(self, request: Request) -> Response:
        """Ask, or join who asked the same."""
        body = await request.body()
        broadcast = self._running.get(body)
        if broadcast is None:
            broadcast = self._running[body] = Broadcast()
            task = asyncio.create_task(self._call(body, broadcast))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return EventSourceResponse(broadcast.watch(), sep="\n")

    async def _call(self, body: bytes, broadcast: Broadcast) -> None:
        asked = json.loads(body)
        sent = {"model": asked["model"], "stream": True, "messages": [{"role": "user", "content": asked["content"]}]}
        seq = 0
        async with (
            httpx2.AsyncClient(timeout=60) as client,
            client.stream("POST", f"{self._provider}/chat/completions", json=sent) as answer,
        ):
            async for line in answer.aiter_lines():
                if not line.startswith('data: {"'):
                    continue
                delta = json.loads(line[6:])["choices"][0]["delta"].get("content")
                if delta:
                    seq += 1
                    data = orjson.dumps({"delta": delta}).decode()
                    broadcast.publish({"event": "delta", "id": f"1-{seq}", "data": data})
        del self._running[body]
        broadcast.publish({"event": "done", "data": '{"state":"completed"}'})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--provider", required=True, help="base URL, with /v1")
    arguments = parser.parse_args()
    uvicorn.run(
        Rival(arguments.provider).app,
        host="127.0.0.1",
        port=arguments.port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
        backlog=8192,
    )
