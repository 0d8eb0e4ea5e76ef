"""What work costs Redis and PostgreSQL: `python -m bench.fleet.costs`.

Three servers of one worker each, on one PostgreSQL and one Valkey. A scenario does one kind of work a known number of
times; what both were asked meanwhile, and what it cost them, is recorded less what the idle fleet asks in as long. Each
scenario is played twice: once watched command by command, and once unwatched, for bytes and processor time.

Nothing here depends on how fast the machine is but processor time, and that is a cost and no delay: a busy machine
changes it little.

Deliberately absent: what follows for larger fleets (`bench.fleet.scale`).
"""

import asyncio
import hashlib
import re
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import asyncpg
from bench.fleet.servers import DATABASE, Fleet, Server, Shared, cpu_s_of, shared
from bench.fleet.wiretap import Wiretap
from bench.record import Meter, Run, command_of, parser_of, save

SETTLE_S = 3.5
"""Before and after the work: rows of requests are written, words are said, and cursors on ended turns are gone."""
GAP_MS = 50
HERE, THERE, FARTHER = 0, 1, 2


# -- what was asked ----------------------------------------------------------------------------------------------


class Monitor:
    """Every command that clients send to Redis, by name; scripts by the name of their file.

    What a script does inside is no command of a client, but is part of its cost.
    """

    def __init__(self, port: int) -> None:
        self.sent: Counter[str] = Counter()
        self._names = _script_names()
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.sendall(b"*1\r\n$7\r\nMONITOR\r\n")
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._socket.makefile("rb") as lines:
            for line in lines:
                words = re.match(rb'\+\d+\.\d+ \[\d+ ([^\]]+)\] "([^"]+)"(?: "([^"]*)")?', line)
                if words is not None and words[1] != b"lua":
                    name = words[2].decode().upper()
                    script = self._names.get((words[3] or b"").decode()) if name == "EVALSHA" else None
                    self.sent[script or name] += 1

    def close(self) -> None:
        """Watch no more."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._socket.close()


def _script_names() -> dict[str, str]:
    scripts = (files("oncewise.coordination") / "lua").iterdir()
    return {
        hashlib.sha1(each.read_bytes(), usedforsecurity=False).hexdigest(): each.name.removesuffix(".lua")
        for each in scripts
    }


@dataclass(frozen=True, slots=True)
class Counts:
    """Everything that grows, at one moment; or how much it grew."""

    at_s: float
    redis: Counter[str]
    sql: Counter[str]
    redis_sent: int
    redis_received: int
    sql_sent: int
    sql_received: int
    redis_cpu_s: float
    sql_cpu_s: float
    wal_bytes: int

    def since(self, before: "Counts") -> "Counts":
        """How much it grew."""
        return Counts(
            self.at_s - before.at_s,
            Counter(self.redis) - Counter(before.redis),
            Counter(self.sql) - Counter(before.sql),
            *(getattr(self, name) - getattr(before, name) for name in NUMBERS),
        )


NUMBERS = ("redis_sent", "redis_received", "sql_sent", "sql_received", "redis_cpu_s", "sql_cpu_s", "wal_bytes")


class Books:
    """Reads the counters of both, and says how long work is given to begin and to end."""

    def __init__(self, common: Shared, redis: Wiretap, sql: Wiretap, settle_s: float) -> None:
        self.redis, self.sql = redis, sql
        self.settle_s = settle_s
        self.common = common
        self._monitor: Monitor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count commands by name meanwhile."""
        self._monitor = Monitor(self.common.redis.port)
        try:
            yield
        finally:
            self._monitor.close()
            self._monitor = None

    def now(self) -> Counts:
        """All counters now."""
        statements, wal = asyncio.run(self._asked())
        return Counts(
            time.monotonic(),
            Counter() if self._monitor is None else Counter(self._monitor.sent),
            statements,
            self.redis.sent,
            self.redis.received,
            self.sql.sent,
            self.sql.received,
            cpu_s_of(self.common.redis.pid),
            cpu_s_of(self.common.postgres.pid),
            wal,
        )

    async def _asked(self) -> tuple[Counter[str], int]:
        # From another database, so that the question is not in the answer.
        connection = await asyncpg.connect(self.common.postgres.url())
        try:
            rows = await connection.fetch(
                "SELECT query, calls FROM pg_stat_statements JOIN pg_database ON oid = dbid WHERE datname = $1",
                DATABASE,
            )
            wal = await connection.fetchval("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::BIGINT")
        finally:
            await connection.close()
        statements: Counter[str] = Counter()
        for row in rows:
            statements[_kind(row["query"])] += row["calls"]
        return statements, wal


def _kind(statement: str) -> str:
    """What a statement does: its verb, and whether a transaction only reads."""
    words = statement.upper().split()
    if words[0] in ("BEGIN", "START"):
        return "BEGIN READ" if "READ ONLY" in " ".join(words).replace(",", " ") else "BEGIN WRITE"
    return words[0].rstrip(";")


# -- what is done ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of work.

    Attributes:
        what: What it is called in the results.
        times: How often it is done.
        prepare: Makes what it needs, uncounted, and returns what then does it, all of it.
        note: Further numbers for the results.
    """

    what: str
    times: int
    prepare: Callable[[Fleet], Callable[[], None]]
    note: dict[str, int]


def idle(seconds: float) -> Scenario:
    """Nothing, for so long."""
    return Scenario("idle", 1, lambda _: lambda: time.sleep(seconds), {})


def turns(
    what: str, times: int, asks: Sequence[tuple[int, int]], *, model: str, stream: bool = False, **note: int
) -> Scenario:
    """Turns of threads: of each, requests to servers by number, the first one leading; all turns at once.

    Args:
        what: Name in the results.
        times: How many turns.
        asks: Number of a server, and how many requests it gets.
        model: What the provider does.
        stream: Whether the requests ask for events.
        note: Further numbers for the results.
    """

    def prepare(fleet: Fleet) -> Callable[[], None]:
        threads = [fleet.new_thread() for _ in range(times)]
        end = "messages/stream" if stream else "messages"
        works = [(f"/api/threads/{thread}/{end}", _message(model)) for thread in threads]
        return lambda: _together(fleet, works, asks)

    return Scenario(what, times, prepare, note)


def _message(model: str) -> dict[str, str]:
    return {"role": "user", "content": f"Tell me about {uuid.uuid4()}.", "provider": "openai", "model": model}


def calls(
    what: str, times: int, asks: Sequence[tuple[int, int]], *, model: str, stream: bool = False, **note: int
) -> Scenario:
    """The same on `/v1`, where nothing is stored but accounts."""

    def prepare(fleet: Fleet) -> Callable[[], None]:
        bodies = [
            {
                "model": f"openai/{model}",
                "temperature": 0,
                "stream": stream,
                "messages": [{"role": "user", "content": f"Tell me about {uuid.uuid4()}."}],
            }
            for _ in range(times)
        ]
        return lambda: _together(fleet, [("/v1/chat/completions", body) for body in bodies], asks)

    return Scenario(what, times, prepare, note)


def _together(fleet: Fleet, works: list[tuple[str, Any]], asks: Sequence[tuple[int, int]]) -> None:
    """Send each its requests, those that lead well before those that follow."""
    leading = [fleet.ask(asks[0][0], *work) for work in works]
    time.sleep(0.15)
    following = [
        fleet.ask(server, *work)
        for work in works
        for place, (server, count) in enumerate(asks)
        for _ in range(count - (place == 0))
    ]
    for answer in (*leading, *following):
        status, _ = answer.result()
        if status != 200:
            raise RuntimeError(f"status {status}")


SLOW = "lat1000-n20"
"""Followers find a turn that runs."""


def scenarios() -> list[Scenario]:
    """Each differs from another one in one thing, so that the difference is its cost."""
    short, long = 20, 120
    shown = f"n{{}}-gap{GAP_MS}"
    return [
        turns("turn", 40, [(HERE, 1)], model=SLOW),
        turns("turn, 11 s long", 40, [(HERE, 1)], model="lat11000-n20"),
        turns("turn, 10 follow here", 10, [(HERE, 11)], model=SLOW),
        turns("turn, 1 follows there", 10, [(HERE, 1), (THERE, 1)], model=SLOW),
        turns("turn, 11 follow there", 10, [(HERE, 1), (THERE, 11)], model=SLOW),
        turns("turn, 11 s long, 1 follows there", 10, [(HERE, 1), (THERE, 1)], model="lat11000-n20"),
        *(
            turns(f"stream of {deltas}, {who}", times, asks, model=shown.format(deltas), stream=True, deltas=deltas)
            for who, times, asks in (
                ("seen here", 10, [(HERE, 1)]),
                ("1 sees it there", 1, [(HERE, 1), (THERE, 1)]),
                ("10 see it there", 1, [(HERE, 1), (THERE, 10)]),
            )
            for deltas in (short, long)
        ),
        *(
            turns(
                f"{times} streams of {deltas}, 1 sees each there",
                times,
                [(HERE, 1), (THERE, 1)],
                model=shown.format(deltas),
                stream=True,
                deltas=deltas,
            )
            for times in (10, 40)
            for deltas in (short, long)
        ),
        *(
            turns(
                f"10 streams of {deltas}, 1 sees each there and 1 farther",
                10,
                [(HERE, 1), (THERE, 1), (FARTHER, 1)],
                model=shown.format(deltas),
                stream=True,
                deltas=deltas,
            )
            for deltas in (short, long)
        ),
        calls("call", 40, [(HERE, 1)], model=SLOW),
        calls("call, 10 follow here", 10, [(HERE, 11)], model=SLOW),
        calls("call, 1 follows there", 10, [(HERE, 1), (THERE, 1)], model=SLOW),
        calls("call, 11 follow there", 10, [(HERE, 1), (THERE, 11)], model=SLOW),
    ]


# -- what it costs -----------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and record."""
    parser = parser_of(__doc__)
    parser.add_argument("--idle-s", type=float, default=30.0)
    parser.add_argument("--settle-s", type=float, default=SETTLE_S)
    parser.add_argument("--only", nargs="+", help="names of scenarios")
    arguments = parser.parse_args(argv)
    with (
        shared() as common,
        Wiretap(common.redis.port) as redis,
        Wiretap(common.postgres.port) as sql,
        Fleet([Server(replace(common, postgres_port=sql.port, redis_port=redis.port)) for _ in range(3)]) as fleet,
    ):
        books = Books(common, redis, sql, arguments.settle_s)
        # The first of a kind prepares statements and loads scripts.
        play(turns("warm-up", 8, [(HERE, 2), (THERE, 2)], model="n20", stream=True), fleet, books, None)
        play(calls("warm-up", 8, [(HERE, 2), (THERE, 2)], model="n20"), fleet, books, None)
        rest = play(idle(arguments.idle_s), fleet, books, None)
        runs = [rest]
        for scenario in scenarios():
            if not arguments.only or scenario.what in arguments.only:
                runs += [play(scenario, fleet, books, rest) for _ in range(arguments.times)]
    print(save(arguments.results, "fleet-costs", command_of("bench.fleet.costs", argv), runs))


def play(scenario: Scenario, fleet: Fleet, books: Books, rest: Run | None) -> Run:
    """Do it twice, and return what one time of it costs, beyond what an idle fleet asks in as long."""
    own_cpu_s = books.common.cpu_s
    with Meter(lambda: own_cpu_s() + sum(server.cpu_s() for server in fleet.servers)) as meter:
        with books.watching():
            watched = _grown(scenario, fleet, books)
        plain = _grown(scenario, fleet, books)
    run = {
        "what": scenario.what,
        "times": scenario.times,
        **scenario.note,
        "seconds": round(plain.at_s, 2),
        "redis": _each(watched.redis, scenario, watched.at_s, rest, "redis"),
        "sql": _each(plain.sql, scenario, plain.at_s, rest, "sql"),
        **{name: _one(getattr(plain, name), scenario, plain.at_s, rest, name) for name in NUMBERS},
        "workers": len(fleet.servers),
        "redis_connections": books.redis.open,
        "sql_connections": books.sql.open,
        "foreign_pct": meter.foreign_pct,
        "counts": True,
    }
    print(
        {name: value for name, value in run.items() if name in ("what", "redis", "sql", "redis_cpu_s", "sql_cpu_s")},
        flush=True,
    )
    return run


def _grown(scenario: Scenario, fleet: Fleet, books: Books) -> Counts:
    act = scenario.prepare(fleet)
    time.sleep(books.settle_s)
    before = books.now()
    act()
    time.sleep(books.settle_s)
    return books.now().since(before)


def _one(grown: float, scenario: Scenario, took_s: float, rest: Run | None, name: str) -> float:
    """Of one time; of a second, where there is nothing but the passing of time."""
    if rest is None:
        return round(grown / took_s, 7)
    return round((grown - rest[name] * took_s) / scenario.times, 7)


def _each(grown: Counter[str], scenario: Scenario, took_s: float, rest: Run | None, name: str) -> dict[str, float]:
    if rest is None:
        return {key: round(count / took_s, 4) for key, count in sorted(grown.items())}
    keys = sorted(grown.keys() | rest[name].keys())
    left = {key: (grown[key] - rest[name].get(key, 0.0) * took_s) / scenario.times for key in keys}
    return {key: round(count, 3) for key, count in left.items()}


if __name__ == "__main__":
    main()
