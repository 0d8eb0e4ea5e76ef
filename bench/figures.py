"""The page of figures, made from the recorded results: `python -m bench.figures`.

Nothing on the page is typed by hand: a figure without its command, its commit and its date is worth nothing.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from bench.fleet.scale import operations
from bench.record import NOISE_PCT, RESULTS, Run, spread

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "figures.md"

HEAD = f"""# Figures

Measured by the programs in `bench`, on the machine named below each heading. Ratios travel from one machine to
another; absolute times do not. A cell is the median of the runs that count and, in brackets, their range.

Over HTTP the server has the first core; the load, written on epoll, and the fake provider share the last one. *Noise*
is what other programs took of all cores during the runs that count. A run with more than {NOISE_PCT:.0f} % is taken
again and the calmest are kept; where the column shows more than that, the machine was not calm: read those rows as
upper limits. The core alone is measured in CPU time of its own process.

`bare` is a server that only copies the provider's bytes to every socket and keeps none of the promises: the floor for
Python on that machine. `rival` is a plain server on sse-starlette with one queue per viewer.
"""

Column = tuple[str, str, str]
"""Heading, name in the run, format."""

BURST: list[Column] = [
    ("succeeded", "ok", "{:.0f}"),
    ("provider calls", "provider_calls", "{:.0f}"),
    ("messages stored", "messages", "{:.0f}"),
    ("p50 / provider", "p50_ratio", "{:.2f}"),
    ("p95 / provider", "p95_ratio", "{:.2f}"),
    ("slowest / provider", "max_ratio", "{:.2f}"),
    ("server CPU s", "server_cpu_s", "{:.2f}"),
    ("peak RSS MiB", "peak_rss_mib", "{:.0f}"),
]
START: list[Column] = [
    ("ready s", "ready_s", "{:.2f}"),
    ("CPU s until idle", "cpu_s", "{:.2f}"),
    ("idle PSS MiB", "idle_pss_mib", "{:.0f}"),
    ("idle RSS MiB", "idle_rss_mib", "{:.0f}"),
]
WAITING: list[Column] = [
    ("succeeded", "ok", "{:.0f}"),
    ("provider calls", "provider_calls", "{:.0f}"),
    ("KiB PSS each, connected", "connected_pss_kib", "{:.1f}"),
    ("KiB PSS each, waiting", "waiting_pss_kib", "{:.1f}"),
    ("KiB RSS each, waiting", "waiting_rss_kib", "{:.1f}"),
]
FANOUT: list[Column] = [
    ("complete", "complete", "{:.0f}"),
    ("texts", "distinct_texts", "{:.0f}"),
    ("provider calls", "provider_calls", "{:.0f}"),
    ("delta lag p50 ms", "delta_lag_p50_ms", "{:.1f}"),
    ("delta lag p95 ms", "delta_lag_p95_ms", "{:.1f}"),
    ("last delta lag p95 ms", "last_delta_lag_p95_ms", "{:.1f}"),
    ("last byte lag p95 ms", "last_byte_lag_p95_ms", "{:.1f}"),
    ("server CPU s", "server_cpu_s", "{:.2f}"),
    ("events per CPU s", "events_per_cpu_s", "{:,.0f}"),
    ("KiB PSS per viewer", "pss_kib_per_viewer", "{:.1f}"),
]
FLEET_TEXT = (
    "The servers, PostgreSQL and Valkey share the cores with the load and the fake provider: figures of a fleet on one "
    "small machine are upper limits. "
)
HEADLINE: list[Column] = [
    ("succeeded", "ok", "{:.0f}"),
    ("provider calls", "provider_calls", "{:.0f}"),
    ("messages stored", "messages", "{:.0f}"),
    ("bodies", "distinct_bodies", "{:.0f}"),
    ("texts", "distinct_texts", "{:.0f}"),
    ("p50 / provider", "p50_ratio", "{:.2f}"),
    ("p95 / provider", "p95_ratio", "{:.2f}"),
    ("slowest / provider", "max_ratio", "{:.2f}"),
    ("server CPU s", "server_cpu_s", "{:.2f}"),
]
VIEWERS: list[Column] = [
    ("complete", "complete", "{:.0f}"),
    ("of", "of", "{:.0f}"),
    ("provider calls", "provider_calls", "{:.0f}"),
    ("lag p50 ms, here", "here_p50_ms", "{:.1f}"),
    ("lag p99 ms, here", "here_p99_ms", "{:.1f}"),
    ("lag p50 ms, there", "there_p50_ms", "{:.1f}"),
    ("lag p99 ms, there", "there_p99_ms", "{:.1f}"),
    ("cores, leading", "leading_cores", "{:.2f}"),
    ("cores, viewing", "viewing_cores", "{:.2f}"),
]
FAILOVER: list[Column] = [
    ("answered", "ok", "{:.0f}"),
    ("bodies", "distinct_bodies", "{:.0f}"),
    ("provider calls", "provider_calls", "{:.0f}"),
    ("messages stored", "messages", "{:.0f}"),
    ("answered s after the kill", "waited_s", "{:.2f}"),
    ("beyond one generation", "beyond_s", "{:.2f}"),
]
PASSED_TEXT = (
    "No two requests are equal, so each is a call of its own; at temperature 0, so that equal ones would share. Each "
    "connection asks again as soon as it is answered, and the provider answers at once. `direct` is the same load on "
    "the provider itself, and what a server adds to it is *over direct*. One worker each; the peers are as released, "
    "in the versions that `bench/http/peers.py` installs. "
)
PASSED: list[Column] = [
    ("requests/s", "per_s", "{:,.0f}"),
    ("p50 ms", "p50_ms", "{:.2f}"),
    ("p99 ms", "p99_ms", "{:.2f}"),
    ("p50 over direct", "p50_over_ms", "{:.2f}"),
    ("p99 over direct", "p99_over_ms", "{:.2f}"),
    ("server CPU ms each", "server_cpu_ms", "{:.2f}"),
    ("failed", "failed", "{:.0f}"),
    ("peak RSS MiB", "peak_rss_mib", "{:.0f}"),
]
SILENT: list[Column] = [
    ("complete", "complete", "{:.0f}"),
    ("delta lag p95 ms, alone", "alone_p95_ms", "{:.1f}"),
    ("delta lag p95 ms, beside them", "beside_p95_ms", "{:.1f}"),
    ("beside / alone", "beside_over_alone", "{:.2f}"),
    ("MiB PSS added by them", "added_mib", "{:.1f}"),
    ("cut off s after the end", "gone_after_s", "{:.1f}"),
]
FAULTS: list[Column] = [
    ("trials", "trials", "{:,.0f}"),
    ("met", "struck", "{:,.0f}"),
    ("turns", "turns", "{:,.0f}"),
    ("clients", "clients", "{:,.0f}"),
    ("lost", "lost", "{:.0f}"),
    ("stored twice", "twice", "{:.0f}"),
    ("told ≠ stored", "told_otherwise", "{:.0f}"),
    ("hung", "hung", "{:.0f}"),
    ("violations", "violations", "{:.0f}"),
    ("one call %", "one_call_pct", "{:.1f}"),
    ("≤ 2 calls %", "two_calls_pct", "{:.1f}"),
    ("last answer p95 s", "after_p95_s", "{:.2f}"),
    ("p95 added ms", "added_p95_ms", "{:.0f}"),
    ("503 after s", "refused_s", "{:.2f}"),
]
FAULTS_TEXT = (
    "Servers as processes of their own on one PostgreSQL, SQLite file or Valkey; clients ask again as SDKs do. A trial "
    "breaks one thing at a moment that its seed decides, and *met* says how often that hit something. What clients "
    "were told is then compared with what is stored and with what the provider was asked: acknowledged turns lost, "
    "turns stored twice, texts told other than stored, clients that waited more than 25 s, and all violations. "
    "*Last answer* is from the fault to the last client's, where one generation takes 1 s; *added* is to the p95 of "
    "requests under load, against the same load without a fault. `matrix` is every row of the fault matrix, in full."
)
LATE: list[Column] = [
    ("deltas", "deltas", "{:,.0f}"),
    ("bytes", "backlog_bytes", "{:,.0f}"),
    ("all there after ms", "backlog_ms", "{:.1f}"),
]


def main() -> None:
    """Write the page."""
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page())
    print(PAGE.relative_to(RESULTS.parents[1]))


def page() -> str:
    """The page as the recorded results make it."""
    parts = [HEAD]
    for name, sections in PAGES.items():
        file = RESULTS / f"{name}.json"
        if file.exists():
            parts += _sections(json.loads(file.read_text()), sections)
    for name, core in CORE.items():
        file = RESULTS / f"{name}.json"
        if file.exists():
            parts.append(_core(json.loads(file.read_text()), core))
    file = RESULTS / "fleet-costs.json"
    if file.exists():
        parts.append(_operations(json.loads(file.read_text())))
    file = RESULTS / "faults.json"
    if file.exists():
        parts.append(faults(json.loads(file.read_text())))
    return "\n".join(parts)


def _operations(document: dict[str, Any]) -> str:
    page = "[How far a fleet goes](../explanation/scale.md)"
    text = f"Of three servers on one PostgreSQL and one Valkey; what follows from it is in {page}."
    heading = "## Redis and SQL operations per request\n"
    return "\n".join([heading, text, "", _source(document), operations(document), ""])


def faults(document: dict[str, Any]) -> str:
    """The section of the fault figures; each row may be of another day."""
    heads = ["what is broken", *(head for head, _, _ in FAULTS), "recorded"]
    lines = [_row(heads), "|" + "---|" * len(heads)]
    for run in document["runs"]:
        cells = [form.format(run[name]) if run.get(name) is not None else "-" for _, name, form in FAULTS]
        changed = f" with {run['changed_files']} changed files in src" if run["changed_files"] else ""
        lines.append(_row([f"`{run['figure']}`: {run['says']}", *cells, f"{run['commit']}{changed}, {run['date']}"]))
    place = f"Python {document['python']}, {document['kernel']}, {document['cores']} cores"
    source = f"`python -m tests.faults --figures …` with the names below; {place}."
    return "\n".join(["## Faults\n", FAULTS_TEXT, "", source, "", *lines, ""])


def _core(document: dict[str, Any], core: "Core") -> str:
    source = f"`{document['command']}` at {document['commit']}, {document['date']}; {document['python']}."
    lines = [_row(core.columns.values()), "|" + "---|" * len(core.columns)]
    lines += [_row(_core_cell(row[name]) for name in core.columns) for row in document["rows"]]
    return "\n".join([f"## {core.title}\n", core.text, "", source, "", *lines, ""])


def _core_cell(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:,}"


def _sections(document: dict[str, Any], sections: Sequence["Section"]) -> Iterable[str]:
    for section in sections:
        yield f"## {section.title}\n\n{section.text}\n"
        yield _source(document)
        runs = [run for run in document["runs"] if run["counts"] and run.get("what") in {section.what, None}]
        yield _table(runs, section.first, section.columns)


def _source(document: dict[str, Any]) -> str:
    changed = f" with {document['changed_files']} changed files in src" if document["changed_files"] else ""
    priority = f", with raised priority (nice {document['nice']})" if document["nice"] < 0 else ""
    place = f"Python {document['python']}, {document['kernel']}, {document['cores']} cores{priority}"
    return f"`{document['command']}` at {document['commit']}{changed}, {document['date']}; {place}.\n"


def _table(runs: list[Run], first: dict[str, str], columns: list[Column]) -> str:
    heads = [*first.values(), *(head for head, _, _ in columns), "noise %"]
    lines = [_row(heads), "|" + "---|" * len(heads)]
    order: Callable[[Run], list[Any]] = lambda run: [run[name] for name in first]  # noqa: E731  used twice
    for names, group in groupby(runs, order):
        same = list(group)
        cells = [_cell(same, name, form) for _, name, form in columns]
        lines.append(_row([*(f"{name}" for name in names), *cells, _cell(same, "foreign_pct", "{:.0f}")]))
    return "\n".join(lines) + "\n"


def _cell(runs: list[Run], name: str, form: str) -> str:
    return spread([run[name] for run in runs if run.get(name) is not None], form)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


class Section:
    """One table of the page.

    Attributes:
        first: The names in a run by which rows are told apart, and their headings.
    """

    def __init__(self, title: str, text: str, what: str | None, first: dict[str, str], columns: list[Column]) -> None:
        self.title = title
        self.text = text
        self.what = what
        self.first = first
        self.columns = columns


class Core(NamedTuple):
    """One table of a program that measures the core alone.

    Attributes:
        columns: Names in a row, and their headings.
    """

    title: str
    text: str
    columns: dict[str, str]


CORE = {
    "core-coalescer": Core(
        "The coalescer alone",
        "Tasks that ask for the same running work, from the first one made to the last one answered. The bare\n"
        "`asyncio.Event` is the floor: it has no table, key, limit, role, deadline or error.",
        {
            "contender": "contender",
            "joins_per_s": "joins per CPU s",
            "of_bare_event": "of the bare event",
            "bytes_per_waiter": "bytes a waiter",
        },
    ),
    "core-hub": Core(
        "The stream hub alone",
        "One event from its publication until every viewer has taken it, one by one (live) and in bursts of eight;\n"
        "and what is held for viewers who have read nothing.",
        {
            "viewers": "viewers",
            "structure": "structure",
            "live_us_per_event": "live, CPU µs",
            "burst_us_per_event": "bursts, CPU µs",
            "stalled_kib": "KiB unread",
        },
    ),
}
"""By the file of the results."""


PAGES = {
    "http-burst": [
        Section(
            "A burst of identical messages",
            "All requests at the same moment, each on its own connection, to a fresh thread; the provider takes 1 s.",
            None,
            {"requests": "requests", "server": "server"},
            BURST,
        )
    ],
    "http-memory": [
        Section(
            "Start and idle",
            "From the start of the process on an empty database to the first 200 of `/health/readiness`, and what the "
            "server holds 3 s later.",
            "start",
            {},
            START,
        ),
        Section(
            "Memory of a request that waits",
            "Requests that follow one long call; what the server holds more than before the first of them connected, "
            "for each. Socket buffers of the kernel are not in it.",
            "waiting",
            {"followers": "followers"},
            WAITING,
        ),
    ],
    "http-fanout": [
        Section(
            "One stream, many viewers",
            "200 deltas, 20 ms apart. Lag is behind the provider's own clock; the last byte of Oncewise comes after "
            "the turn is stored, that of the others is not stored at all. Memory is that of the middle of the stream.",
            "fan-out",
            {"viewers": "viewers", "server": "server"},
            FANOUT,
        ),
        Section(
            "A late joiner",
            "Somebody who opens a running stream that already has so many deltas.",
            "late joiner",
            {},
            LATE,
        ),
    ],
    "http-slow": [
        Section(
            "Viewers that never read",
            "200 deltas of 3,000 characters, 25 ms apart; the second half, when all buffers of those that take nothing "
            "are full. They are cut off 10 s after their send is blocked, and may resume.",
            "never read",
            {"readers": "read", "silent": "never read"},
            SILENT,
        ),
    ],
    "fleet-headline": [
        Section(
            "A burst over a fleet",
            "Half of the requests for JSON and half for events, at the same moment, spread over the servers; the "
            f"provider takes 1 s. {FLEET_TEXT.rstrip()}",
            None,
            {"fleet": "fleet", "requests": "requests"},
            HEADLINE,
        )
    ],
    "fleet-viewers": [
        Section(
            "Viewers at another server",
            "Each turn is led by a viewer at one server (here), and seen by others at the second one (there), who have "
            f"every delta through Valkey. {FLEET_TEXT.rstrip()}",
            None,
            {"turns": "turns", "viewers": "viewers there", "deltas": "deltas", "gap_ms": "ms between two"},
            VIEWERS,
        )
    ],
    "fleet-failover": [
        Section(
            "The death of a leader",
            "Ten requests wait at one server for a turn that another one leads, which is killed with signal 9 in the "
            f"middle of the provider's second; the survivor asks again. {FLEET_TEXT.rstrip()}",
            None,
            {"followers": "followers"},
            FAILOVER,
        )
    ],
    "http-passthrough": [
        Section(
            "Distinct requests through /v1, answered as JSON",
            PASSED_TEXT + "The provider answers the others with one document; Oncewise always streams from a provider, "
            "and puts 20 deltas together for each answer.",
            "json",
            {"connections": "connections", "server": "server"},
            PASSED,
        ),
        Section(
            "Distinct requests through /v1, answered as a stream",
            PASSED_TEXT + "An answer is 20 deltas.",
            "stream",
            {"connections": "connections", "server": "server"},
            PASSED,
        ),
    ],
}


if __name__ == "__main__":
    main()
