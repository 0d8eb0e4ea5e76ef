"""`oncewise ttft`: how long the first token takes, and how long a stop takes.

Each request goes to a thread of its own with a prompt of its own, so that none is answered from another's call. Once
its first token is there it is withdrawn: that measures the stop, and the rest of the answer need not be paid for.
"""

import asyncio
import json
import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from rich.console import Console

from oncewise.cli.burst import progress_bar
from oncewise.cli.client import Connection, Server, read_events
from oncewise.cli.load import ServerRefused, create_thread
from oncewise.cli.report import Promise, milliseconds, print_promises
from oncewise.service.metrics import quantile

__all__ = ["CANCEL_TARGET_S", "TTFT_TARGET_S", "Streamed", "run"]

TTFT_TARGET_S = 1.5
CANCEL_TARGET_S = 0.3
REQUEST_TIMEOUT_S = 150.0


@dataclass(frozen=True, slots=True)
class Streamed:
    """One streaming request.

    Attributes:
        ttft_s: Seconds from sending it to its first delta.
        cancel_s: Seconds from asking for its end to the end of its stream.
    """

    ttft_s: float
    cancel_s: float


def run(server: Server, body: dict[str, Any], *, requests: int, as_json_text: bool) -> bool:
    """Measure and print; True if both targets are met."""
    console = Console(stderr=as_json_text)
    results = asyncio.run(_measure(server, body, requests, console))
    ttft, cancel = sorted(each.ttft_s for each in results), sorted(each.cancel_s for each in results)
    figures = {
        "requests": requests,
        "ttft_s": {"p50": quantile(ttft, 0.5), "p95": quantile(ttft, 0.95), "target_p95": TTFT_TARGET_S},
        "cancel_s": {"p50": quantile(cancel, 0.5), "p95": quantile(cancel, 0.95), "target_p95": CANCEL_TARGET_S},
    }
    promises = [
        _promise("First token", ttft, TTFT_TARGET_S),
        _promise("Stop", cancel, CANCEL_TARGET_S),
    ]
    if as_json_text:
        print(json.dumps(figures, indent=2))
    else:
        print_promises(console, promises)
    return all(promise.kept for promise in promises)


def _promise(name: str, ordered: list[float], target_s: float) -> Promise:
    p50, p95 = quantile(ordered, 0.5), quantile(ordered, 0.95)
    text = f"{name}: p50 {milliseconds(p50)}, p95 {milliseconds(p95)} (target {milliseconds(target_s)})"
    return Promise(text, p95 is not None and p95 <= target_s)


async def _measure(server: Server, body: dict[str, Any], requests: int, console: Console) -> list[Streamed]:
    results = []
    with progress_bar(console) as progress:
        for number in progress.track(range(requests), description=f"{requests} streams"):
            thread = await create_thread(server, "oncewise ttft")
            own = body | {"content": f"{body['content']} (variation {number + 1} of {requests}, {uuid4()})"}
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                results.append(await _stream_and_stop(server, thread, own))
    return results


async def _stream_and_stop(server: Server, thread: str, body: dict[str, Any]) -> Streamed:
    request_id = str(uuid4())
    began_s = time.perf_counter()
    async with (
        Connection(server) as connection,
        connection.stream("POST", f"/api/threads/{thread}/messages/stream", body, {"x-request-id": request_id}) as (
            reply,
            chunks,
        ),
        aclosing(read_events(chunks)) as events,
    ):
        if reply.status != 200:
            raise ServerRefused(f"the server answered {reply.status}")
        async for event in events:
            if event.name == "delta":
                break
            if event.name == "error":
                raise ServerRefused(f"the stream ended with {json.loads(event.data)['code']}")
        stopped_s = time.perf_counter()
        cancel = asyncio.create_task(server.fetch("POST", f"/api/threads/cancel/{request_id}"))
        _ = [event async for event in events]
        ended_s = time.perf_counter()
        if (await cancel).status >= 400:
            raise ServerRefused(f"the server answered {cancel.result().status} to the stop")
    return Streamed(stopped_s - began_s, ended_s - stopped_s)
