"""How long processes that write to one SQLite file wait for each other, taking turns and without.

    python bench/core/writers.py [--seconds 4] [--out FILE]

Each process writes one row per transaction, with a pause of 5 ms after each or none. `free` leaves the waiting to
SQLite as it comes: its busy handler sleeps 1, 2, 5 … 100 ms.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from reporting import write

from oncewise.storage.sqlite import open_sqlite

INSERT = "INSERT INTO orgs VALUES ('{}', 0)"


async def writer(path: str, name: str, how: str, pause_s: float, seconds: float) -> None:
    database = await open_sqlite(path, owner=name)
    if how == "free":
        database._writer._turn = nullcontext  # noqa: SLF001  the way it was
    print("ready", flush=True)
    sys.stdin.readline()
    took_s = []
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        began_s = time.perf_counter()
        row = INSERT.format(f"{name}-{len(took_s)}")
        await database.write(lambda conn, row=row: conn.exec_driver_sql(row).close())
        took_s.append(time.perf_counter() - began_s)
        await asyncio.sleep(pause_s)
    print(json.dumps(took_s), flush=True)
    await database.aclose()


def contend(processes: int, how: str, pause_s: float, seconds: float) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "o.db")
        started = []
        for number in range(processes):
            own = [path, f"w{number}", how, str(pause_s), str(seconds)]
            started.append(
                subprocess.Popen(
                    [sys.executable, __file__, *own], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
        for process in started:
            process.stdout.readline()
        for process in started:
            process.stdin.write("go\n")
            process.stdin.flush()
        took_s = sorted(second for process in started for second in json.loads(process.communicate()[0]))

    def ms(share: float) -> str:
        return f"{took_s[min(len(took_s) - 1, int(len(took_s) * share))] * 1000:.1f}"

    figures = {"per_s": round(len(took_s) / seconds), "p50_ms": ms(0.5), "p99_ms": ms(0.99), "max_ms": ms(1)}
    return {"processes": processes, "pause_ms": pause_s * 1000, "how": how, **figures}


def main() -> None:
    if len(sys.argv) == 6 and not sys.argv[1].startswith("-"):
        path, name, how, pause_s, seconds = sys.argv[1:]
        asyncio.run(writer(path, name, how, float(pause_s), float(seconds)))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--out")
    options = parser.parse_args()
    rows = [
        contend(processes, how, pause_s, options.seconds)
        for processes in (1, 2, 4)
        for pause_s in (0.005, 0.0)
        for how in ("free", "turns")
    ]
    write(rows, options.out)


if __name__ == "__main__":
    main()
