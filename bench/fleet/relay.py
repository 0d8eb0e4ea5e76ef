"""What a delta costs a Redis that is busy: `python -m bench.fleet.relay`.

`bench.fleet.costs` measures a Redis that is woken for each command, since three servers do not keep it busy; that is
the dearest way. Here two workers' coordination, without their servers, tells and reads logs as fast as it can. Between
the two is what a Redis needs that is used for half.
"""

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.fleet.servers import cpu_s_of
from bench.record import Meter, Run, command_of, parser_of, save

from oncewise.coordination.redis import open_redis
from oncewise.ports import LogEntry
from tests.support.redis_server import RedisServer

TEXT = "@1:1:1234567890123456@ws"
"""As long as a delta of the fake provider."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and record."""
    parser = parser_of(__doc__)
    parser.add_argument("--logs", type=int, nargs="+", default=[1, 10, 40])
    parser.add_argument("--entries", type=int, default=20_000, help="of all logs together")
    arguments = parser.parse_args(argv)
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="oncewise-bench-") as folder:
        redis = RedisServer(Path(folder)).start()
        try:
            for logs in arguments.logs:
                for _ in range(arguments.times):
                    runs.append(asyncio.run(tell(redis, logs, arguments.entries // logs)))
                    print(runs[-1], flush=True)
        finally:
            redis.kill()
    print(save(arguments.results, "fleet-relay", command_of("bench.fleet.relay", argv), runs))


async def tell(redis: RedisServer, logs: int, entries: int) -> Run:
    """Tell so many logs at once, each entry when the one before it is there, and read them all."""
    names = [f"{number:064x}" for number in range(logs)]
    redis.flush()
    telling, reading = [await open_redis(redis.url, deployment="bench", address=f"w{number}") for number in range(2)]
    try:
        read = asyncio.Semaphore(0)
        for name in names:
            reading.relay.read(name, lambda _entry: read.release())

        async def one(name: str) -> None:
            for seq in range(entries):
                await telling.relay.append(name, LogEntry(1, seq, (TEXT,)), keep_s=60.0)

        with Meter(lambda: cpu_s_of(redis.pid)) as meter:
            began_s, cpu_before_s = time.monotonic(), cpu_s_of(redis.pid)
            async with asyncio.TaskGroup() as group:
                for name in names:
                    group.create_task(one(name))
            for _ in range(logs * entries):
                await read.acquire()
            took_s, cpu_s = time.monotonic() - began_s, cpu_s_of(redis.pid) - cpu_before_s
    finally:
        await reading.aclose()
        await telling.aclose()
    return {
        "logs": logs,
        "entries": logs * entries,
        "entries_per_s": round(logs * entries / took_s),
        "redis_us": round(cpu_s / (logs * entries) * 1e6, 2),
        "foreign_pct": meter.foreign_pct,
        "counts": True,
    }


if __name__ == "__main__":
    main()
