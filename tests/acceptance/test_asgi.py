"""`uvicorn oncewise.asgi:app`: the same server for people who bring their own."""

import asyncio
import json
import os
import signal
import sys
import time
import urllib.request
from contextlib import asynccontextmanager
from pathlib import Path
from socket import socket


def free_port() -> int:
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def fetch(url: str, body: object = None) -> tuple[int, dict]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"x-org-id": "org_a", "content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=10) as answer:
        return answer.status, json.load(answer)


@asynccontextmanager
async def uvicorn(folder: Path, *arguments: str, **settings: str):
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "uvicorn", "oncewise.asgi:app", "--port", str(port), "--log-level", "warning"),
        *arguments,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "ONCEWISE_DATABASE_URL": f"sqlite:///{folder / 'ow.db'}",
            "ONCEWISE_DEMO": "1",
            **settings,
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        process_group=0,
    )
    base = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(20):
            while True:
                try:
                    if (await asyncio.to_thread(fetch, f"{base}/health/readiness"))[0] == 200:
                        break
                except OSError:
                    await asyncio.sleep(0.05)
        yield base, process
    finally:
        if process.returncode is None:
            # With its workers, which would not notice.
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def watch(base: str, thread: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A streaming request that was answered so far as to have its head."""
    port = int(base.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = b'{"content":"hello"}'
    writer.write(
        f"POST /api/threads/{thread}/messages/stream HTTP/1.1\r\nhost: 127.0.0.1\r\nx-org-id: org_a\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        + body
    )
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    return reader, writer


async def test_a_burst_over_plain_uvicorn_is_one_call(tmp_path):
    """The same routes and the same promise."""
    async with uvicorn(tmp_path, ONCEWISE_DEMO_LATENCY_MS="500") as (base, _):
        _, thread = await asyncio.to_thread(fetch, f"{base}/api/threads", {})
        url = f"{base}/api/threads/{thread['thread_id']}/messages"
        answers = await asyncio.gather(*(asyncio.to_thread(fetch, url, {"content": "hello"}) for _ in range(20)))

        _, stored = await asyncio.to_thread(fetch, f"{base}/api/threads/{thread['thread_id']}")
        _, figures = await asyncio.to_thread(fetch, f"{base}/api/metrics/performance")

    assert len({json.dumps(body) for _, body in answers}) == 1
    assert len(stored["messages"]) == 2
    assert (figures["total_requests"], figures["upstream"]["calls"]) == (20, 1)


async def test_a_signal_ends_streams_after_the_drain(tmp_path):
    """With a viewer connected, and a turn that outlives the drain: the process ends, and the stream without an end."""
    async with uvicorn(tmp_path, ONCEWISE_DEMO_LATENCY_MS="60000", ONCEWISE_DRAIN_S="0.5") as (base, process):
        _, thread = await asyncio.to_thread(fetch, f"{base}/api/threads", {})
        reader, writer = await watch(base, thread["thread_id"])
        asked_s = time.monotonic()
        process.send_signal(signal.SIGTERM)

        async with asyncio.timeout(15):
            rest = await reader.read()
            await process.wait()
        writer.close()

    assert b"event: done" not in rest
    assert b"event: error" not in rest
    assert time.monotonic() - asked_s >= 0.4


async def test_a_signal_lets_a_running_turn_end(tmp_path):
    """A turn that ends within the drain is stored, and its viewer is told."""
    async with uvicorn(tmp_path, ONCEWISE_DEMO_LATENCY_MS="1500", ONCEWISE_DRAIN_S="20") as (base, process):
        _, thread = await asyncio.to_thread(fetch, f"{base}/api/threads", {})
        reader, writer = await watch(base, thread["thread_id"])
        process.send_signal(signal.SIGTERM)

        async with asyncio.timeout(20):
            rest = await reader.read()
            await process.wait()
        writer.close()

    assert rest.count(b"event: done") == 1


async def test_several_workers_of_plain_uvicorn_are_one_call_and_end_in_peace(tmp_path):
    """They coalesce by the row; the figures in SQL are those of all; a running turn ends before its worker does."""
    settings = {"ONCEWISE_DEMO_LATENCY_MS": "1500", "ONCEWISE_DRAIN_S": "20"}
    async with uvicorn(tmp_path, "--workers", "2", **settings) as (base, process):
        _, thread = await asyncio.to_thread(fetch, f"{base}/api/threads", {})
        url = f"{base}/api/threads/{thread['thread_id']}/messages"
        answers = await asyncio.gather(*(asyncio.to_thread(fetch, url, {"content": "hello"}) for _ in range(20)))
        await asyncio.sleep(0.35)
        _, figures = await asyncio.to_thread(fetch, f"{base}/api/metrics/performance")
        _, other = await asyncio.to_thread(fetch, f"{base}/api/threads", {})
        reader, writer = await watch(base, other["thread_id"])
        process.send_signal(signal.SIGTERM)

        async with asyncio.timeout(20):
            rest = await reader.read()
            await process.wait()
        writer.close()

    assert len({json.dumps(body) for _, body in answers}) == 1
    assert (figures["total_requests"], figures["upstream"]["calls"]) == (20, 1)
    assert rest.count(b"event: done") == 1
