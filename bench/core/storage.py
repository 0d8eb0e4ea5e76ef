"""What a turn costs in the database, on both engines: statements sent, time alone, turns a second together.

    python bench/core/storage.py [--turns 300] [--postgres postgresql://...] [--out bench/results/storage.json]

The transactions of one led turn (admit, history, record_call, finish_call, commit), of a replayed one (admit) and of a
follower in another process (one look at the row). `statements` counts what is sent to the database and answered, BEGIN
and COMMIT included; SQLite is a library, its are no round trips. `alone` is one turn after the other, `together` 50
threads at once. Without `--postgres` a server of its own is started, which syncs as it does in production.
"""

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median, quantiles

import sqlalchemy as sa
from reporting import write
from sqlalchemy import event

sys.path.insert(0, str(Path(__file__).parents[2]))

from oncewise.model import Answer, FinishReason, TurnAsk, TurnClaim, Usage
from oncewise.ports import CallRecord, Lead
from oncewise.storage.database import Database
from oncewise.storage.ledger import SqlTurnLedger
from oncewise.storage.postgres import open_postgres, upgrade_postgres
from oncewise.storage.sqlite import open_sqlite
from oncewise.storage.threads import SqlThreadStore
from tests.support.postgres import own_server
from tests.support.storage import ids

TOGETHER = 50
RULES = {"owner": "bench", "lease_s": 60.0, "replay_window_s": 60.0, "queue_limit": 32}
TEXT = "word " * 200


class Bench:
    """A ledger, and the statements that its engine sent."""

    def __init__(self, database: Database) -> None:
        self.ledger = SqlTurnLedger(database, ids=ids)
        self.threads = SqlThreadStore(database, ids=ids)
        self.sent = 0
        for name in ("before_cursor_execute", "commit"):
            event.listen(sa.Engine, name, self._count)
        for name in ("begin", "rollback"):
            event.listen(sa.Engine, name, self._count_driver)

    def _count(self, *_args: object) -> None:
        self.sent += 1

    def _count_driver(self, conn: sa.Connection) -> None:
        # SQLite's BEGIN is a statement like any other, and a read of it needs no end.
        self.sent += conn.dialect.name == "postgresql"

    async def thread(self) -> str:
        return (await self.threads.create("bench", title=None, description=None, user_id=None)).id

    def ask(self, thread: str, n: int) -> TurnAsk:
        return TurnAsk("bench", thread, f"message {n} {TEXT}", "demo", "demo-1", f"fingerprint {n}")

    async def lead(self, thread: str, n: int) -> TurnClaim:
        admission = await self.ledger.admit(self.ask(thread, n), **RULES)
        assert isinstance(admission, Lead)
        return admission.claim

    async def turn(self, thread: str, n: int) -> None:
        claim = await self.lead(thread, n)
        await self.ledger.history("bench", thread)
        call = CallRecord(f"{claim.turn_id}-call", 1, "bench", claim.turn_id, 1, "demo", "demo-1")
        await self.ledger.record_call(call)
        await self.ledger.finish_call(call, outcome="ok", usage=Usage(10, 200))
        assert await self.ledger.commit(claim, Answer(TEXT, FinishReason.STOP, Usage(10, 200), "demo-1", call.call_id))

    async def replay(self, thread: str, n: int) -> None:
        await self.ledger.admit(self.ask(thread, n), **RULES)


async def times(work: Callable[[int], Awaitable[object]], count: int) -> list[float]:
    """Milliseconds of each run, one after the other."""
    took = []
    for n in range(count):
        began_s = time.perf_counter()
        await work(n)
        took.append((time.perf_counter() - began_s) * 1000)
    return took


async def measure(name: str, bench: Bench, turns: int) -> list[dict[str, object]]:
    """One row for each kind of request."""
    thread = await bench.thread()
    await times(lambda n: bench.turn(thread, -n), 20)

    async def row(what: str, work: Callable[[int], Awaitable[object]], count: int) -> dict[str, object]:
        bench.sent = 0
        took = await times(work, count)
        return {
            "engine": name,
            "request": what,
            "statements": round(bench.sent / count, 1),
            "alone_p50_ms": round(median(took), 2),
            "alone_p99_ms": round(quantiles(took, n=100)[98], 2),
        }

    rows = [await row("led turn", lambda n: bench.turn(thread, n), turns)]
    last = turns - 1
    rows.append(await row("replay", lambda _n: bench.replay(thread, last), turns))
    claim = await bench.lead(thread, turns)
    rows.append(await row("look at the row", lambda _n: bench.ledger.turn("bench", thread, claim.turn_id), turns))
    threads = [await bench.thread() for _ in range(TOGETHER)]
    began_s = time.perf_counter()
    await asyncio.gather(*(times(lambda n, thread=thread: bench.turn(thread, n), turns // 20) for thread in threads))
    rows[0]["together_per_s"] = round(TOGETHER * (turns // 20) / (time.perf_counter() - began_s))
    for other in rows[1:]:
        other["together_per_s"] = ""
    return rows


async def on_sqlite(turns: int) -> list[dict[str, object]]:
    """On a file of its own."""
    directory = tempfile.mkdtemp(prefix="oncewise-bench-")
    database = await open_sqlite(f"{directory}/bench.db", owner="bench")
    try:
        return await measure("SQLite", Bench(database), turns)
    finally:
        await database.aclose()
        shutil.rmtree(directory)


async def on_postgres(url: str, turns: int) -> list[dict[str, object]]:
    """On a database that has the schema."""
    database = await open_postgres(url, owner="bench")
    try:
        return await measure("PostgreSQL", Bench(database), turns)
    finally:
        await database.aclose()


def main() -> None:
    """Measure, print a table, write the record."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--turns", type=int, default=300)
    options.add_argument("--postgres", metavar="URL")
    options.add_argument("--out")
    chosen = options.parse_args()
    rows = asyncio.run(on_sqlite(chosen.turns))
    server = nullcontext() if chosen.postgres else own_server(durable=True)
    with server as started:
        url = chosen.postgres or started.url()
        asyncio.run(upgrade_postgres(url))
        rows += asyncio.run(on_postgres(url, chosen.turns))
    write(rows, chosen.out)


if __name__ == "__main__":
    main()
