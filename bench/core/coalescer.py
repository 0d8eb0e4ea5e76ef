"""Joins a second and bytes a waiter, beside a bare `asyncio.Event` and `aiocoalesce`.

    python bench/core/coalescer.py [--waiters 2000] [--rounds 60] [--out bench/results/coalescer.json]

One round of a contender: N tasks are made, each asks for the same running work; the work ends; all N have its value.
What counts is the CPU time of the process from the first task to the last answer. Rounds of all contenders are
interleaved, so that a busy machine slows all alike; the median counts.

The bare event is the floor: tasks that wait for an event and then read a list. It has no table, key, limit, role,
deadline or error, so nothing that shares work can be cheaper on asyncio. `aiocoalesce` shares and does nothing else.
Bytes a waiter: what `tracemalloc` counts with all N waiting, less the same N tasks waiting on nothing shared.
"""

import argparse
import asyncio
import gc
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

import aiocoalesce
from reporting import write

from oncewise import Coalescer, request_key

Join = Callable[[], Awaitable[Any]]
Land = Callable[[], object]
KEY = request_key("acme", "call", "demo", "demo-1", [["user", "hello"]])


def bare_event() -> tuple[Join, Land]:
    """The floor."""
    event, box = asyncio.Event(), list[int]()

    async def join() -> int:
        await event.wait()
        return box[0]

    def land() -> None:
        box.append(1)
        event.set()

    return join, land


def oncewise_run() -> tuple[Join, Land]:
    """`Coalescer.run`, all with one key object."""
    flights, gate = Coalescer(max_waiters=10**6), asyncio.Event()

    async def work() -> int:
        await gate.wait()
        return 1

    return lambda: flights.run(KEY, work), gate.set


def oncewise_timeout() -> tuple[Join, Land]:
    """The same, each caller with a deadline of its own."""
    flights, gate = Coalescer(max_waiters=10**6), asyncio.Event()

    async def work() -> int:
        await gate.wait()
        return 1

    return lambda: flights.run(KEY, work, timeout_s=60.0), gate.set


def aiocoalesce_run() -> tuple[Join, Land]:
    """`aiocoalesce.Coalescer.run`, which wants a coroutine of every caller."""
    flights, gate = aiocoalesce.Coalescer(), asyncio.Event()

    async def work() -> int:
        await gate.wait()
        return 1

    return lambda: flights.run("key", work()), gate.set


CONTENDERS = (bare_event, oncewise_run, oncewise_timeout, aiocoalesce_run)


async def joins_per_s(make: Callable[[], tuple[Join, Land]], waiters: int) -> float:
    """One round."""
    join, land = make()
    loop = asyncio.get_running_loop()
    gc.collect()
    began_s = time.process_time()
    tasks = [loop.create_task(join()) for _ in range(waiters)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    land()
    for task in tasks:
        await task
    return waiters / (time.process_time() - began_s)


async def bytes_per_waiter(make: Callable[[], tuple[Join, Land]], waiters: int) -> float:
    """Memory of the wait itself: everything that N waiting tasks hold."""
    join, land = make()
    first = asyncio.ensure_future(join())
    await asyncio.sleep(0)
    gc.collect()
    tracemalloc.start()
    tasks = [asyncio.ensure_future(join()) for _ in range(waiters)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    land()
    await asyncio.gather(first, *tasks)
    return held / waiters


def main() -> None:
    """Measure, print a table, write the record."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--waiters", type=int, default=2000)
    options.add_argument("--rounds", type=int, default=60)
    options.add_argument("--out")
    chosen = options.parse_args()
    rates: dict[str, list[float]] = {make.__name__: [] for make in CONTENDERS}
    for _ in range(chosen.rounds):
        for make in CONTENDERS:
            rates[make.__name__].append(asyncio.run(joins_per_s(make, chosen.waiters)))
    floor = median(rates["bare_event"])
    rows = []
    for make in CONTENDERS:
        rate = median(rates[make.__name__])
        size = asyncio.run(bytes_per_waiter(make, chosen.waiters))
        rows.append(
            {
                "contender": make.__name__,
                "joins_per_s": round(rate),
                "of_bare_event": round(rate / floor, 3),
                "bytes_per_waiter": round(size),
            }
        )
    write(rows, chosen.out)


if __name__ == "__main__":
    main()
