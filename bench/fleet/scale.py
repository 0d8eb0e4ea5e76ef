"""How far a fleet goes, from what its work costs: `python -m bench.fleet.scale` writes the page and its plots.

`bench.fleet.costs` says what one turn, one follower and one delta cost Redis and PostgreSQL, `bench.fleet.relay` what
a delta costs a Redis that is busy, and `bench.fleet.looks` what the watch for dead workers costs by the size of the
fleet. Here they are multiplied, and compared with what one Redis, one PostgreSQL and their settings can do. Nothing on
the page is typed by hand.

Deliberately absent: queueing. A part that is used for half is taken to be as quick as one that is idle, so that what
comes out says which part ends first, and not how long anybody waits.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.fleet.plot import Line, plot
from bench.record import RESULTS, Run

__all__ = [
    "LIMITS",
    "Costs",
    "Limit",
    "Load",
    "Model",
    "limits",
    "load",
    "operations",
    "page",
    "parts",
    "plots",
    "prices",
    "recorded",
]

FOLDER = Path(__file__).parents[2] / "docs" / "explanation"
SIZES = (10, 100, 1000)
SHORT, LONG = 20, 120
GAP_S = 0.05
"""Deltas of the two kinds of streams that were measured, and the time between two."""


# -- what was measured -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Costs:
    """What something costs.

    Attributes:
        commands: That Redis is sent.
        redis_bytes: To Redis and back.
        redis_us: Processor time of Redis, in microseconds.
        statements: That PostgreSQL is sent, BEGIN and COMMIT included.
        writes: Transactions among them that write.
        sql_bytes: To PostgreSQL and back.
        sql_us: Processor time of PostgreSQL, in microseconds.
    """

    commands: float = 0.0
    redis_bytes: float = 0.0
    redis_us: float = 0.0
    statements: float = 0.0
    writes: float = 0.0
    sql_bytes: float = 0.0
    sql_us: float = 0.0

    @classmethod
    def of(cls, run: Run) -> "Costs":
        """What a scenario cost."""
        return cls(
            sum(run["redis"].values()),
            run["redis_sent"] + run["redis_received"],
            run["redis_cpu_s"] * 1e6,
            sum(run["sql"].values()),
            run["sql"].get("BEGIN WRITE", 0.0),
            run["sql_sent"] + run["sql_received"],
            run["sql_cpu_s"] * 1e6,
        )

    @classmethod
    def middle(cls, costs: Iterable["Costs"]) -> "Costs":
        """The median of several, each of its parts by itself."""
        found = list(costs)
        return cls(*(median(getattr(each, name) for each in found) for name in NAMES))

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(*(getattr(self, name) + getattr(other, name) for name in NAMES))

    def __sub__(self, other: "Costs") -> "Costs":
        return self + other * -1

    def __mul__(self, times: float) -> "Costs":
        return Costs(*(getattr(self, name) * times for name in NAMES))

    def __truediv__(self, times: float) -> "Costs":
        return self * (1 / times)


NAMES = tuple(Costs.__dataclass_fields__)
IN_REDIS = {"commands", "redis_bytes", "redis_us"}


@dataclass(frozen=True, slots=True)
class Prices:
    """What each kind of work costs.

    Attributes:
        idle: A worker, each second.
        turn: A turn that a request leads: JSON, one second long.
        second: Each further second that it runs.
        here: A follower at the same worker.
        there: Another worker that follows, with one request.
        there_second: Each further second that it follows for JSON, and looks at the row.
        watch_second: The same for events, which come by themselves.
        there_more: A further follower there.
        shown: A delta shown where its turn is led.
        passed_1, passed_10, passed_40: A delta told to Redis and read by one other worker, which reads so many turns.
        read: A delta read by a further worker.
        call, call_here, call_there, call_there_more: The same on `/v1`, of calls a second long.
    """

    idle: Costs
    turn: Costs
    second: Costs
    here: Costs
    there: Costs
    there_second: Costs
    watch_second: Costs
    there_more: Costs
    shown: Costs
    passed_1: Costs
    passed_10: Costs
    passed_40: Costs
    read: Costs
    call: Costs
    call_here: Costs
    call_there: Costs
    call_there_more: Costs


def _by(document: Mapping[str, Any], *names: str) -> dict[Any, list[Run]]:
    """The runs of a program, by what tells them apart."""
    found: dict[Any, list[Run]] = {}
    for run in document["runs"]:
        key = tuple(run[name] for name in names)
        found.setdefault(key if len(names) > 1 else key[0], []).append(run)
    return found


def prices(document: Mapping[str, Any]) -> Prices:
    """The differences between scenarios that differ in one thing."""
    cost = {what: Costs.middle(map(Costs.of, runs)) for what, runs in _by(document, "what").items()}
    (workers,) = {run["workers"] for run in document["runs"]}
    second = (cost["turn, 11 s long"] - cost["turn"]) / 10
    there = cost["turn, 1 follows there"] - cost["turn"]
    there_second = (cost["turn, 11 s long, 1 follows there"] - cost["turn, 1 follows there"]) / 10 - second
    call_there = cost["call, 1 follows there"] - cost["call"]

    def longer(who: str) -> Costs:
        return cost[who.format(LONG)] - cost[who.format(SHORT)]

    passing_s = (LONG - SHORT) * GAP_S
    shown = (longer("stream of {}, seen here") - second * passing_s) / (LONG - SHORT)
    # What has come so far is stored now and then: bytes, but no statement that would not be made anyway.
    shown = Costs(sql_bytes=shown.sql_bytes, sql_us=shown.sql_us)
    # No statement is made for a delta that another worker reads: what there is of them is made as time passes.
    in_sql = (longer("40 streams of {}, 1 sees each there") - shown * (LONG - SHORT)) / passing_s - second
    watch_second = _joined(there_second, in_sql)

    def passed(who: str) -> Costs:
        each = (longer(who) - (second + there_second) * passing_s) / (LONG - SHORT)
        return _joined(each, Costs())

    passed_10 = passed("10 streams of {}, 1 sees each there")
    farther = longer("10 streams of {}, 1 sees each there and 1 farther") - longer(
        "10 streams of {}, 1 sees each there"
    )
    return Prices(
        idle=cost["idle"] / workers,
        turn=cost["turn"],
        second=second,
        here=(cost["turn, 10 follow here"] - cost["turn"]) / 10,
        there=there,
        there_second=there_second,
        watch_second=watch_second,
        there_more=(cost["turn, 11 follow there"] - cost["turn, 1 follows there"]) / 10,
        shown=shown,
        passed_1=passed("stream of {}, 1 sees it there"),
        passed_10=passed_10,
        passed_40=passed("40 streams of {}, 1 sees each there"),
        read=_joined((farther - there_second * passing_s) / (LONG - SHORT), Costs()),
        call=cost["call"],
        call_here=(cost["call, 10 follow here"] - cost["call"]) / 10,
        call_there=call_there,
        call_there_more=(cost["call, 11 follow there"] - cost["call, 1 follows there"]) / 10,
    )


def _joined(in_redis: Costs, in_sql: Costs) -> Costs:
    """What one costs Redis, and the other PostgreSQL."""
    return Costs(*(getattr(in_redis if name in IN_REDIS else in_sql, name) for name in NAMES))


def busy_us(document: Mapping[str, Any], logs: int = 40) -> float:
    """Processor time of a delta that is told and read, of a Redis that is busy."""
    found: list[float] = [run["redis_us"] for run in document["runs"] if run["logs"] == logs]
    return median(found)


@dataclass(frozen=True, slots=True)
class Look:
    """What one look for dead workers costs beyond one in a small and idle fleet, which `Prices.idle` has."""

    by_worker: Costs
    by_turn: Costs

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Look":
        """From fleets that differ in one of the two."""
        found = {
            size: Costs.middle(Costs(sql_bytes=run["sql_received"], sql_us=run["sql_cpu_s"] * 1e6) for run in runs)
            for size, runs in _by(document, "workers", "turns").items()
        }

        def between(one: tuple[int, int], other: tuple[int, int], by: int) -> Costs:
            return (found[one] - found[other]) / by

        return cls(
            between((1000, 4000), (100, 4000), 900),
            between((1000, 40_000), (1000, 4000), 36_000),
        )

    def at(self, workers: int, turns: float) -> Costs:
        """One look at a fleet of this size."""
        return self.by_worker * workers + self.by_turn * turns


# -- what follows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """What each worker of a fleet has to do; a server of one core is busy with it.

    Attributes:
        turns_per_s: That it leads.
        seconds: How long each runs.
        deltas: Of each.
        followers: Further requests for each, at any worker.
    """

    turns_per_s: float = 4.0
    seconds: float = 10.0
    deltas: int = 200
    followers: int = 1

    @property
    def running(self) -> float:
        """Turns that a worker leads at any moment."""
        return self.turns_per_s * self.seconds

    def elsewhere(self, workers: int) -> float:
        """How many other workers follow a turn, if each follower comes to any worker alike."""
        return (workers - 1) * (1 - (1 - 1 / workers) ** self.followers)


@dataclass(frozen=True, slots=True)
class Model:
    """All that was measured.

    Attributes:
        price: With deltas as they cost a Redis that is busy: that is what decides where it ends.
        woken_us: What a delta costs one that is woken for each command.
    """

    price: Prices
    look: Look
    woken_us: float

    @classmethod
    def of(cls, documents: Mapping[str, Mapping[str, Any]]) -> "Model":
        """From the recorded results."""
        price = prices(documents["costs"])
        busy = replace(price.passed_40, redis_us=busy_us(documents["relay"]))
        return cls(replace(price, passed_40=busy), Look.of(documents["looks"]), price.passed_40.redis_us)


def parts(model: Model, work: Load, workers: int) -> dict[str, Costs]:
    """What a fleet costs each second, by what it is for."""
    price, look = model.price, model.look
    others = work.elsewhere(workers)
    there = work.followers * (workers - 1) / workers
    turns = workers * work.turns_per_s
    return {
        "workers that are there": price.idle * workers,
        "turns": price.turn * turns,
        "turns that run on": price.second * (turns * (work.seconds - 1)),
        "followers at the same worker": price.here * (turns * (work.followers - there)),
        "followers elsewhere": price.there * (turns * others) + price.there_more * (turns * (there - others)),
        "followers elsewhere, as time passes": price.watch_second * (turns * others * (work.seconds - 1)),
        "deltas, shown where they are led": price.shown * (turns * work.deltas),
        "deltas, told and read once": price.passed_40 * (turns * min(1.0, others) * work.deltas),
        "deltas, read by further workers": price.read * (turns * max(0.0, others - 1) * work.deltas),
        "looks for dead workers": look.at(workers, workers * work.running) * workers,
    }


def load(model: Model, work: Load, workers: int) -> Costs:
    """What a fleet costs each second."""
    return sum(parts(model, work, workers).values(), Costs())


CONNECTIONS = 6
"""Of a worker to PostgreSQL: five for transactions and its sign of life."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Something that a fleet uses up.

    Attributes:
        of: What there is of it.
        used: What a fleet of some size uses, in the same unit, from its costs each second.
        mend: What to do when it is used up.
    """

    what: str
    of: float
    unit: str
    used: Callable[[Costs, int], float]
    mend: str

    def reached(self, model: Model, work: Load) -> int | None:
        """The smallest fleet that it does not suffice for; None if ten thousand workers are fine."""
        low, high = 0, 10_001
        while high - low > 1:
            middle = (low + high) // 2
            over = self.used(load(model, work, middle), middle) > self.of
            low, high = (low, middle) if over else (middle, high)
        return None if high > 10_000 else high


LIMITS = (
    Limit(
        "connections of PostgreSQL as it is installed",
        97,
        "connections",
        lambda _, workers: CONNECTIONS * workers,
        "a setting: raise `max_connections`, or put PgBouncer in front",
    ),
    Limit(
        "the core of one Redis",
        1,
        "cores",
        lambda costs, _: costs.redis_us / 1e6,
        "one Redis for each group of tenants, or fewer and larger entries: batches of 50 ms instead of 25",
    ),
    Limit(
        "the network of Redis, 10 Gbit/s",
        1250,
        "MB/s",
        lambda costs, _: costs.redis_bytes / 1e6,
        "names of logs that are shorter, or a read for each group of logs: every read names all logs that are read",
    ),
    Limit(
        "eight cores of PostgreSQL",
        8,
        "cores",
        lambda costs, _: costs.sql_us / 1e6,
        "a larger machine, or a database for each group of tenants",
    ),
    Limit(
        "the disk of PostgreSQL, 10,000 commits a second",
        10_000,
        "commits/s",
        lambda costs, _: costs.writes,
        "a disk that acknowledges sooner, or a database for each group of tenants",
    ),
    Limit(
        "the network of PostgreSQL, 10 Gbit/s",
        1250,
        "MB/s",
        lambda costs, _: costs.sql_bytes / 1e6,
        "one look for dead workers for all, made by one worker at a time, instead of one each",
    ),
)


def limits(model: Model, work: Load) -> list[tuple[Limit, int | None]]:
    """Each limit and the smallest fleet it does not suffice for, the first one first."""
    found = [(limit, limit.reached(model, work)) for limit in LIMITS]
    return sorted(found, key=lambda pair: pair[1] or 10**9)


# -- the page ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Write the page and its plots."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    documents = recorded()
    for name, text in {"scale.md": page(documents), **plots(documents)}.items():
        (FOLDER / name).write_text(text)
        print(f"docs/explanation/{name}")


def recorded() -> dict[str, dict[str, Any]]:
    """What was recorded, by the name of the program."""
    return {name: json.loads((RESULTS / f"fleet-{name}.json").read_text()) for name in ("costs", "looks", "relay")}


def plots(documents: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The plots by the names of their files."""
    model, work = Model.of(documents), Load()
    sizes = [2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000]
    loads = {size: load(model, work, size) for size in sizes}

    def line(label: str, value: Callable[[Costs], float]) -> Line:
        return Line(label, [(size, value(each)) for size, each in loads.items()])

    return {
        "scale-cores.svg": plot(
            "Processor time that a fleet needs of Redis and PostgreSQL",
            "workers",
            "cores",
            [
                line("Redis", lambda each: each.redis_us / 1e6),
                line("PostgreSQL", lambda each: each.sql_us / 1e6),
                Line("one core, all Redis uses", [(2, 1.0), (1000, 1.0)], limit=True),
            ],
        ),
        "scale-operations.svg": plot(
            "What a fleet asks of Redis and PostgreSQL",
            "workers",
            "per second",
            [
                line("commands to Redis", lambda each: each.commands),
                line("SQL statements", lambda each: each.statements),
                line("write transactions", lambda each: each.writes),
            ],
        ),
    }


HEAD = """\
# How far a fleet goes

What one turn costs Redis and PostgreSQL was measured; what a thousand workers would cost them is multiplication. This
page shows both, and which part ends first. It is written by `python -m bench.fleet.scale` from the recorded results.
"""
WORDS = {
    "idle": "a worker that is there, each second",
    "turn": "a turn, asked for as JSON, 1 s long",
    "second": "… each further second that it runs",
    "here": "… a follower at the same worker",
    "there": "… another worker that follows, with one request",
    "there_second": "… … each further second that it waits for JSON",
    "watch_second": "… … each further second that it watches events",
    "there_more": "… … a further follower there",
    "shown": "a delta, shown where its turn is led",
    "passed_1": "… told to Redis and read by another worker, which reads 1 turn",
    "passed_10": "… … which reads 10 turns",
    "passed_40": "… … which reads 40 turns",
    "read": "… … read by a further worker, which reads 10 turns",
    "call": "a call of `/v1`, 1 s long",
    "call_here": "… a follower at the same worker",
    "call_there": "… another worker that follows, with one request",
    "call_there_more": "… … a further follower there",
}


def operations(document: Mapping[str, Any]) -> str:
    """What each kind of work asks, as a table."""
    price = prices(document)
    heads = ["", "Redis commands", "Redis bytes", "Redis CPU µs", "SQL statements", "of them write transactions"]
    lines = [_row([*heads, "SQL bytes", "SQL CPU µs"]), "|" + "---|" * 8]
    for name, words in WORDS.items():
        cost: Costs = getattr(price, name)
        cells = [_figure(getattr(cost, each), 1 if each in SMALL else 0) for each in NAMES]
        lines.append(_row([words, *cells]))
    return "\n".join(lines)


SMALL = {"commands", "statements", "writes"}


def page(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """The page as the recorded results make it."""
    model, work = Model.of(documents), Load()
    return "\n".join(
        [
            HEAD,
            _measured(documents),
            _assumed(work),
            _arithmetic(model, work),
            _sizes(model, work),
            _ends(model, work, documents),
        ]
    )


def _measured(documents: Mapping[str, Mapping[str, Any]]) -> str:
    costs, relay = documents["costs"], documents["relay"]
    idle = next(run for run in costs["runs"] if run["what"] == "idle")
    each = idle["redis_connections"] / idle["workers"]
    return f"""\
## What work costs

Three servers of one worker each, on one PostgreSQL and one Valkey. Each row is the difference of measurements that differ
in this alone, less what the idle fleet asks in as long. Bytes are those of both directions; commands inside of a script
are not counted, but their time is. A figure near zero is zero: it is a difference of two that vary.

{_source(costs)}

{operations(costs)}

Each worker holds {each:.0f} connections to Redis, one that asks and one that waits, whatever it does, and up to
{CONNECTIONS} to PostgreSQL. No viewer and no waiting request has one of its own, and nothing is told to Redis of a turn
that nobody follows elsewhere.

A Redis that has little to do is woken for each command, which is what costs it most. One that is busy takes many at a
time: then a delta that is told and read, with 40 logs at once, costs {busy_us(relay):.1f} µs of its time, and
{busy_us(relay, 1):.1f} µs with one. {_source(relay)}
"""  # noqa: E501  lines of the page, with figures in them


def _source(document: Mapping[str, Any]) -> str:
    changed = f" with {document['changed_files']} changed files in src" if document["changed_files"] else ""
    place = f"Python {document['python']}, {document['kernel']}, {document['cores']} cores"
    return f"`{document['command']}` at {document['commit']}{changed}, {document['date']}; {place}."


def _assumed(work: Load) -> str:
    return f"""\
## What a worker has to do

A busy worker leads {work.turns_per_s:g} turns a second, each {work.seconds:g} s long with {work.deltas} deltas, so that
{work.running:g} run at any moment. To each comes {work.followers} further request for its stream, at any worker alike: of N
workers it is another one in (N - 1) / N of all cases. So in a large fleet nearly every follower is elsewhere, and every
delta goes through Redis. That is a heavy load on purpose.
"""  # noqa: E501  lines of the page, with figures in them


def _arithmetic(model: Model, work: Load, workers: int = 100) -> str:
    each = parts(model, work, workers)
    lines = [_row(["each second", "Redis commands", "Redis cores", "SQL statements", "SQL cores"]), "|" + "---|" * 5]
    for what, cost in [*each.items(), ("**all**", load(model, work, workers))]:
        cores = [_figure(us / 1e6, 3) for us in (cost.redis_us, cost.sql_us)]
        lines.append(_row([what, _figure(cost.commands), cores[0], _figure(cost.statements), cores[1]]))
    turns = workers * work.turns_per_s
    others = work.elsewhere(workers)
    deltas = turns * others * work.deltas
    us = model.price.passed_40.redis_us
    return f"""\
## The arithmetic, for {workers} workers

{workers} x {work.turns_per_s:g} = {turns:g} turns a second, of which {others:.2f} other workers follow each:
{turns:g} x {others:.2f} x {work.deltas} = {deltas:,.0f} deltas a second that are told and read. For them a busy Redis needs
{deltas:,.0f} x {us:.2f} µs = {deltas * us / 1e6:.3f} s of processor time each second. All rows are made so, from the table
above.

{chr(10).join(lines)}
"""  # noqa: E501  lines of the page, with figures in them


def _sizes(model: Model, work: Load) -> str:
    rows: dict[str, Callable[[Costs, int], str]] = {
        "commands to Redis, per second": lambda cost, _: _figure(cost.commands),
        "MB to and from Redis, per second": lambda cost, _: _figure(cost.redis_bytes / 1e6, 1),
        "cores of Redis": lambda cost, _: _figure(cost.redis_us / 1e6, 2),
        "SQL statements, per second": lambda cost, _: _figure(cost.statements),
        "write transactions, per second": lambda cost, _: _figure(cost.writes),
        "MB to and from PostgreSQL, per second": lambda cost, _: _figure(cost.sql_bytes / 1e6, 1),
        "cores of PostgreSQL": lambda cost, _: _figure(cost.sql_us / 1e6, 2),
        "connections to Redis": lambda _, workers: f"{2 * workers:,}",
        "connections to PostgreSQL": lambda _, workers: f"{CONNECTIONS * workers:,}",
    }
    lines = [_row(["workers", *(f"{size:,}" for size in SIZES)]), "|" + "---|" * (1 + len(SIZES))]
    loads = {size: load(model, work, size) for size in SIZES}
    lines += [_row([what, *(value(cost, size) for size, cost in loads.items())]) for what, value in rows.items()]
    return f"""\
## 10, 100 and 1,000 workers

{chr(10).join(lines)}

![Cores of Redis and PostgreSQL by the number of workers](scale-cores.svg)

![Commands and statements by the number of workers](scale-operations.svg)
"""


def _ends(model: Model, work: Load, documents: Mapping[str, Mapping[str, Any]]) -> str:
    found = limits(model, work)
    lines = [_row(["what there is", "too little from", "what then"]), "|---|---|---|"]
    lines += [_row([limit.what, f"{at:,} workers" if at else "-", limit.mend]) for limit, at in found]
    (first, at), (second, then) = found[0], next(pair for pair in found if "a setting" not in pair[0].mend)
    assert at
    assert then
    turns = then * work.turns_per_s
    deltas_us = work.turns_per_s * work.deltas * model.woken_us
    square = model.look.at(1000, 1000 * work.running) * 1000
    whole = load(model, work, 1000)
    return f"""\
## What ends first

{chr(10).join(lines)}

**The first bottleneck is {first.what}**, from {at} workers on: {CONNECTIONS} x {at} = {CONNECTIONS * at}, of {first.of:g}.
The first one that no setting mends is **{second.what}**, from {then} workers of this load on, which lead {turns:,.0f} turns
and answer {turns * (1 + work.followers):,.0f} requests a second. If Redis were woken for each command even then, it would
need {model.woken_us:.0f} µs for a delta, and {work.turns_per_s:g} x {work.deltas} x {model.woken_us:.0f} µs =
{deltas_us / 1e6:.3f} cores for each worker: the truth is between {int(1e6 / deltas_us)} and {then} workers.

One cost grows with the square of the fleet: each worker looks once a second at who is alive and who holds open turns. At
1,000 workers with {1000 * work.running:,.0f} open turns that is {square.sql_us / 1e6:.1f} of {whole.sql_us / 1e6:.1f} cores and
{square.sql_bytes / 1e6:,.0f} of {whole.sql_bytes / 1e6:,.0f} MB/s of PostgreSQL. {_source(documents["looks"])}

Not in here: machines that are further apart than loopback, which makes everything later and nothing more; a disk that is
waited for; and waiting itself, since a part that is used for half is taken to be as quick as an idle one. How a fleet
behaves when parts of it fail is no matter of size; `make simulate` plays that.
"""  # noqa: E501  lines of the page, with figures in them


def _figure(value: float, digits: int = 0) -> str:
    text = f"{value:,.{digits}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
