"""What a burst came to, for people (a table, a histogram, a verdict) and for programs (JSON, a page of HTML).

Deliberately absent: measuring, and exit codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from oncewise.cli.load import BurstResult

__all__ = [
    "Promise",
    "as_html",
    "as_json",
    "burst_promises",
    "milliseconds",
    "print_burst",
    "print_promises",
    "verdict",
]

HISTOGRAM_S = (0.01, 0.05, 0.25, 1.0, 2.5, 5.0, 6.0, 10.0, 30.0)
BAR_WIDTH = 40


@dataclass(frozen=True, slots=True)
class Promise:
    """Something that should hold, and whether it did."""

    text: str
    kept: bool


def milliseconds(seconds: float | None) -> str:
    """A duration as people read it: `3 ms`, `5.01 s`, `-` for none."""
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def burst_promises(result: BurstResult) -> list[Promise]:
    """What Oncewise promises of identical requests to one thread or to several."""
    threads, wanted = len(set(result.burst.threads)), result.burst.requests
    return [
        Promise(f"{result.succeeded} of {wanted} requests answered", result.succeeded == wanted),
        Promise(_count(result.provider_calls, "provider call"), result.provider_calls == 1),
        Promise(f"{_count(result.messages, 'message')} stored", result.messages == 2 * threads),
        Promise(
            "the same answer for everybody in a thread"
            if result.distinct_answers == threads
            else f"{_count(result.distinct_answers, 'different answer')} in {_count(threads, 'thread')}",
            result.distinct_answers == threads,
        ),
    ]


def verdict(result: BurstResult) -> str:
    """The whole burst in one line."""
    return (
        f"{'PASS' if result.as_promised else 'FAIL'}: {result.burst.requests} requests → {result.succeeded} answered → "
        f"{_count(result.provider_calls, 'provider call')} → {_count(result.messages, 'stored message')}"
    )


def print_burst(console: Console, result: BurstResult) -> None:
    """Table, histogram, verdict."""
    table = Table(box=SIMPLE_HEAD, show_header=False)
    for name, value in _rows(result):
        table.add_row(name, value)
    console.print(table)
    for label, count in _histogram(result):
        bar = "█" * round(BAR_WIDTH * count / len(result.answers)) or ("▏" if count else "")
        console.print(f"  {label:>10}  {bar} {count or ''}".rstrip(), highlight=False)
    console.print()
    console.print(verdict(result), style="bold green" if result.as_promised else "bold red", highlight=False)


def print_promises(console: Console, promises: Sequence[Promise]) -> None:
    """One line each."""
    for promise in promises:
        mark, style = ("✓", "green") if promise.kept else ("✗", "bold red")
        console.print(f"  {mark} {promise.text}", style=style, highlight=False)


def as_json(result: BurstResult) -> dict[str, Any]:
    """All figures; times in seconds."""
    return {
        "requests": result.burst.requests,
        "connections": result.burst.connections,
        "stream": result.burst.stream,
        "succeeded": result.succeeded,
        "errors": dict(result.errors),
        "provider_calls": result.provider_calls,
        "messages": result.messages,
        "distinct_answers": result.distinct_answers,
        "roles": dict(result.roles),
        "elapsed_s": round(result.elapsed_s, 6),
        "latency_s": {name: result.latency_s(share) for name, share in _SHARES.items()},
        "ttft_s": {name: result.ttft_s(share) for name, share in _SHARES.items()},
        "threads": sorted(set(result.burst.threads)),
        "as_promised": result.as_promised,
    }


def as_html(result: BurstResult) -> str:
    """One page that needs nothing else: no script, no other host."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in _rows(result))
    bars = "".join(
        f"<tr><th>{escape(label)}</th><td><meter max={len(result.answers)} value={count}></meter> {count}</td></tr>"
        for label, count in _histogram(result)
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Oncewise burst</title>'
        "<style>body{font:16px system-ui;margin:2rem;color-scheme:light dark}th{text-align:left;padding-right:2rem;"
        "font-weight:normal}meter{width:20rem}</style>"
        f"<h1>{escape(verdict(result))}</h1><table>{rows}</table><h2>Latency</h2><table>{bars}</table></html>\n"
    )


_SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


def _rows(result: BurstResult) -> list[tuple[str, str]]:
    roles, errors = result.roles, result.errors
    rows = [
        ("Requests", f"{result.burst.requests} over {_count(result.burst.connections, 'connection')}"),
        ("Answered", f"{result.succeeded}"),
        ("Leaders / followers / replayed", f"{roles['leader']} / {roles['follower']} / {roles['replayed']}"),
        ("Provider calls", f"{result.provider_calls}"),
        ("Messages stored", f"{result.messages}"),
        ("Latency p50 / p95 / max", " / ".join(milliseconds(result.latency_s(share)) for share in (0.5, 0.95, 1.0))),
        ("Elapsed", milliseconds(result.elapsed_s)),
    ]
    if result.burst.stream:
        rows.append(("First token p50 / p95", " / ".join(milliseconds(result.ttft_s(share)) for share in (0.5, 0.95))))
    if errors:
        rows.append(("Errors", ", ".join(f"{count} x {name}" for name, count in errors.most_common())))
    return rows


def _histogram(result: BurstResult) -> list[tuple[str, int]]:
    """Answers by latency, from the first to the last bucket that has any."""
    bounds = (*HISTOGRAM_S, float("inf"))
    buckets = [next(bound for bound in bounds if answer.latency_s <= bound) for answer in result.answers]
    labels = [*(f"≤ {milliseconds(bound)}" for bound in HISTOGRAM_S), f"> {milliseconds(HISTOGRAM_S[-1])}"]
    counted = [(label, buckets.count(bound)) for label, bound in zip(labels, bounds, strict=True)]
    filled = [place for place, (_label, count) in enumerate(counted) if count]
    return counted[filled[0] : filled[-1] + 1] if filled else []


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
