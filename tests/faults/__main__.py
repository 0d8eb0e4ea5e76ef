"""Faults by the hundred, counted: `python -m tests.faults`, or `make faults`.

Prints a line for each violation as it is found, with what brings it about again, and a table in the end. The figures
are written beside those of the benchmarks, after each, so that they may be made in parts and in any order.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from bench.record import RESULTS, command_of, save_parts

from tests.faults.figures import FIGURES, Figure, Outcome, measure
from tests.faults.storms import Trial
from tests.support.commands import ROOT

HISTORIES = ROOT / "tests" / "faults" / "histories"

_COLUMNS = {
    "figure": "figure", "trials": "trials", "struck": "struck", "turns": "turns", "lost": "lost", "twice": "twice",
    "told_otherwise": "told ≠ stored", "hung": "hung", "violations": "all", "one_call_pct": "1 call %",
    "two_calls_pct": "≤ 2 calls %", "added_p95_ms": "p95 + ms", "refused_s": "503 s",
    "after_p50_s": "after p50 s", "after_p95_s": "p95 s", "after_max_s": "max s",
    "wait_p95_s": "wait p95 s", "seconds": "took s",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=[*FIGURES], metavar="NAME", help="which ones")
    parser.add_argument("--trials", type=int, help="how many of each, instead of the full number")
    parser.add_argument("--share", type=float, default=1.0, help="this share of the full number")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="trials of these numbers alone")
    parser.add_argument("--seed", type=int, default=1, help="decides what is broken and when")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory the figures are saved in")
    asked = parser.parse_args(argv)
    records = []
    bad = False
    for name in asked.figures:
        figure = FIGURES[name]
        numbers = asked.only or range(asked.trials or max(1, round(figure.full * asked.share)))
        began_s = time.monotonic()
        outcome = asyncio.run(measure(figure, asked.seed, numbers, lambda trial, figure=figure: _tell(figure, trial)))
        records.append({**outcome.record, "seed": asked.seed, "seconds": round(time.monotonic() - began_s, 1)})
        bad = bad or bool(outcome.violations or outcome.misses)
        _sum_up(outcome)
        if not asked.only:
            # At once: an hour is long, and what was measured counts also if what comes next is not.
            command = command_of("tests.faults", argv)
            save_parts(asked.results, "faults", command, records[-1:], by="figure", order=[*FIGURES])
    print("\n" + table(records))
    return 1 if bad else 0


def _tell(figure: Figure, trial: Trial) -> None:
    if trial.violations:
        file = HISTORIES / f"{figure.name}-{trial.seed}-{trial.number}.jsonl"
        trial.history.write(file)
        print(f"\n{figure.name}, seed {trial.seed}, trial {trial.number}: " + "; ".join(trial.violations))
        print(f"  history: {file.relative_to(ROOT)}")
        print(f"  again: python -m tests.faults --figures {figure.name} --seed {trial.seed} --only {trial.number}")
    else:
        print(".", end="")
    sys.stdout.flush()


def _sum_up(outcome: Outcome) -> None:
    words = "; ".join(outcome.misses) or "all promises kept" if not outcome.violations else "violated"
    print(f"\n{outcome.figure.name}: {outcome.figure.says}: {words}")


def table(records: Iterable[dict[str, object]]) -> str:
    """The records, one a line."""
    rows = [list(_COLUMNS.values())]
    rows += [["-" if row.get(name) is None else str(row[name]) for name in _COLUMNS] for row in records]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
