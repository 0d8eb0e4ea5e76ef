"""What a type checker says of a program that embeds Oncewise; mypy checks it, tests/unit/test_public_api.py runs it.

Where an embedder would lose a type, `assert_type` fails here first.
"""

import asyncio
from typing import assert_type

from oncewise import (
    Coalescer,
    CoalescerStats,
    Failure,
    Flight,
    HubStats,
    Landed,
    LocalLimiter,
    Pacer,
    PacerStats,
    Permit,
    Place,
    Position,
    RequestKey,
    Role,
    Shared,
    StartLimiter,
    StreamHub,
    StreamLog,
    Waiter,
    canonical,
    request_key,
)


async def ask(question: str) -> str:
    """A call that costs money."""
    await asyncio.sleep(0.01)
    return question.upper()


async def share(flights: Coalescer) -> Shared[str]:
    key = request_key("acme", "ask", "gpt-5", "hello")
    assert_type(key, RequestKey)
    shared = await flights.run(key, lambda: ask("hello"), timeout_s=5.0)
    assert_type(shared, Shared[str])
    assert_type(shared.value, str)
    assert_type(shared.role, Role)
    return shared


async def work(flight: Flight[int]) -> int:
    flight.mark_running()
    flight.announce()
    return 7


async def wait(flights: Coalescer) -> int:
    with flights.join("seven", work) as waiter:
        assert_type(waiter, Waiter[int])
        await waiter.announced()
        outcome = await waiter.outcome(5.0)
        assert_type(outcome, Landed[int] | Failure)
        return await waiter.result()


async def look(hub: StreamHub) -> bytes:
    log = hub.open(("acme", "answer"))
    assert_type(log, StreamLog)
    assert_type(log.append("one call, "), Position)
    log.append("many readers")
    log.close("done", {})
    chunks = [chunk async for chunk in log.view(Position(1, 1))]
    assert_type(chunks, list[bytes])
    assert_type(hub.stats(), HubStats)
    return b"".join(chunks)


async def pace(limiter: StartLimiter) -> float:
    pacer = Pacer(limiter, concurrency=3)
    place = pacer.permit("acme")
    assert_type(place, Place)
    async with place as permit:
        assert_type(permit, Permit)
        assert_type(place.position, int)
        assert_type(pacer.stats(), PacerStats)
    await pacer.aclose()
    return permit.queue_wait_s


async def main() -> tuple[list[Shared[str]], int, bytes, float]:
    flights = Coalescer(deadline_s=30.0)
    shared = await asyncio.gather(*(share(flights) for _ in range(3)))
    seven = await wait(flights)
    assert_type(flights.stats(), CoalescerStats)
    await flights.aclose()
    text = await look(StreamHub(retention_s=0.0))
    waited_s = await pace(LocalLimiter(rate=1.0, burst=1, clock_s=asyncio.get_running_loop().time))
    return shared, seven, text, waited_s


assert_type(canonical({"a": [1, None]}), bytes)
