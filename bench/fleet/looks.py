"""What it costs to look for dead workers, by how many there are: `python -m bench.fleet.looks`.

Every worker looks each second at who holds open turns and at who is alive. What one look costs grows with the fleet,
and so does the number of those who look: the one cost that grows with the square of the fleet. A fleet of a thousand
does not fit on this machine, but what a look sees of it does: its locks, all held by one session, and its open turns.
"""

import asyncio
import time
from collections.abc import Sequence

import asyncpg
from bench.fleet.servers import DATABASE, Shared, cpu_s_of, shared
from bench.fleet.wiretap import Wiretap
from bench.record import Run, command_of, parser_of, save

from oncewise.storage.postgres import open_postgres
from oncewise.storage.sign_of_life import _FAMILY, _number

SHAPES = ((10, 400), (100, 400), (100, 4000), (1000, 4000), (1000, 40_000))
"""Workers, and the turns that all of them together have open."""

YOUNG_S = 3.5

_OPEN = """\
INSERT INTO turns (id, org_id, thread_id, idx, state, epoch, attempt, owner, lease_until_s, visible, fingerprint, ask,
  created_at_ms, partial, partial_seq, failure_retryable, shared)
SELECT 'turn-' || number, 'org', 'thread-' || number, 0, 'streaming', 1, 1, ($2::TEXT[])[1 + number % $3::INT], 1e12,
  TRUE, '', '{}', 0, '', 0, FALSE, FALSE
FROM generate_series(1, $1::INT) AS number"""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and record."""
    parser = parser_of(__doc__)
    parser.add_argument("--looks", type=int, default=20)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="so many sizes of fleets, from the smallest")
    arguments = parser.parse_args(argv)
    runs: list[Run] = []
    with shared() as common, Wiretap(common.postgres.port) as tap:
        # Of a server that has just started nobody is taken for dead, and nobody looks.
        time.sleep(YOUNG_S)
        for workers, turns in SHAPES[: arguments.shapes]:
            for _ in range(arguments.times):
                runs.append(asyncio.run(look(common, tap, workers, turns, arguments.looks)))
                print(runs[-1], flush=True)
    print(save(arguments.results, "fleet-looks", command_of("bench.fleet.looks", argv), runs))


async def look(common: Shared, tap: Wiretap, workers: int, turns: int, times: int) -> Run:
    """Look so often at a fleet of this size, as one of its workers does."""
    owners = [f"worker-{number}" for number in range(workers)]
    session = await asyncpg.connect(common.postgres.url(DATABASE))
    try:
        # Only who holds a turn is looked at, not whose turn it is: threads and tenants can be spared.
        await session.execute("SET session_replication_role = replica")
        await session.execute("DELETE FROM turns")
        await session.execute(_OPEN, turns, owners, workers)
        await session.execute("VACUUM ANALYZE turns")
        for owner in owners:
            await session.execute("SELECT pg_try_advisory_lock($1, $2)", _FAMILY, _number(owner))
        figures = await _measured(common, tap, times)
    finally:
        await session.close()
    return {"workers": workers, "turns": turns, **figures, "foreign_pct": 0.0, "counts": True}


async def _measured(common: Shared, tap: Wiretap, times: int) -> Run:
    url = f"postgresql://postgres@127.0.0.1:{tap.port}/{DATABASE}?sslmode=disable"
    database = await open_postgres(url, owner="who-looks")
    try:
        if await database.dead_owners() or await database.alone():
            raise RuntimeError("it is not seen as a fleet that is alive")
        began_s, own_s, sql_s = time.monotonic(), time.process_time(), cpu_s_of(common.postgres.pid)
        received = tap.received
        for _ in range(times):
            await database.dead_owners()
            await database.alone()
        return {
            "seconds": round((time.monotonic() - began_s) / times, 5),
            "worker_cpu_s": round((time.process_time() - own_s) / times, 5),
            "sql_cpu_s": round((cpu_s_of(common.postgres.pid) - sql_s) / times, 5),
            "sql_received": round((tap.received - received) / times),
        }
    finally:
        await database.aclose()


if __name__ == "__main__":
    main()
