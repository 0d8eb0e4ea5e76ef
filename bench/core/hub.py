"""What one event costs with N viewers: CPU from `append` until every viewer has taken it.

    python bench/core/hub.py [--deltas 400] [--rounds 15] [--out bench/results/hub.json]

400 deltas of 20 bytes, each published when all viewers have taken the one before (`live`), or in bursts of eight
(`burst`); beside it a queue per viewer, the usual way. Rounds are interleaved, the median of the process's CPU time
counts. Bytes: what `tracemalloc` counts when 400 deltas were published and no viewer has read.
"""

import argparse
import asyncio
import gc
import time
import tracemalloc
from statistics import median

from reporting import write

from oncewise import StreamHub

TEXT = "x" * 20
VIEWERS = (10, 50, 200)


class Hub:
    """The log with cursors."""

    def __init__(self, viewers: int) -> None:
        self.log = StreamHub(retention_s=0.0).open("key")
        self.viewers = [self.log.view() for _ in range(viewers)]

    def publish(self) -> None:
        self.log.append(TEXT)

    def end(self) -> None:
        self.log.close("done", {})

    async def read(self, n: int) -> int:
        return sum([len(chunk) async for chunk in self.viewers[n]])


class Queues:
    """A queue for each viewer."""

    def __init__(self, viewers: int) -> None:
        self.queues: list[asyncio.Queue[bytes | None]] = [asyncio.Queue() for _ in range(viewers)]

    def publish(self) -> None:
        frame = TEXT.encode()
        for queue in self.queues:
            queue.put_nowait(frame)

    def end(self) -> None:
        for queue in self.queues:
            queue.put_nowait(None)

    async def read(self, n: int) -> int:
        size = 0
        while (frame := await self.queues[n].get()) is not None:
            size += len(frame)
        return size


async def us_per_event(make: type[Hub] | type[Queues], viewers: int, deltas: int, burst: int) -> float:
    """Microseconds of CPU for one event and all its viewers."""
    stream = make(viewers)
    readers = [asyncio.create_task(stream.read(n)) for n in range(viewers)]
    await asyncio.sleep(0)
    gc.collect()
    began_s = time.process_time()
    for n in range(deltas):
        stream.publish()
        if n % burst == burst - 1:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
    stream.end()
    sizes = await asyncio.gather(*readers)
    took_s = time.process_time() - began_s
    assert set(sizes) == {deltas * len(TEXT)}
    return took_s / deltas * 1e6


async def stalled_kib(make: type[Hub] | type[Queues], viewers: int, deltas: int) -> float:
    """Memory when nobody reads."""
    gc.collect()
    tracemalloc.start()
    stream = make(viewers)
    for _ in range(deltas):
        stream.publish()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held / 1024


def main() -> None:
    """Measure, print a table, write the record."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--deltas", type=int, default=400)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--out")
    chosen = options.parse_args()
    cells = [(make, viewers) for viewers in VIEWERS for make in (Hub, Queues)]
    live: dict[tuple[str, int], list[float]] = {(make.__name__, viewers): [] for make, viewers in cells}
    bursts: dict[tuple[str, int], list[float]] = {cell: [] for cell in live}
    for _ in range(chosen.rounds):
        for make, viewers in cells:
            cell = (make.__name__, viewers)
            live[cell].append(asyncio.run(us_per_event(make, viewers, chosen.deltas, 1)))
            bursts[cell].append(asyncio.run(us_per_event(make, viewers, chosen.deltas, 8)))
    rows = []
    for make, viewers in cells:
        cell = (make.__name__, viewers)
        rows.append(
            {
                "structure": "log and cursors" if make is Hub else "queue per viewer",
                "viewers": viewers,
                "live_us_per_event": round(median(live[cell]), 1),
                "burst_us_per_event": round(median(bursts[cell]), 1),
                "stalled_kib": round(asyncio.run(stalled_kib(make, viewers, chosen.deltas))),
            }
        )
    write(rows, chosen.out)


if __name__ == "__main__":
    main()
