"""What a measurement leaves behind: its figures, and everything needed to make them again.

Two cores that others use too are never quite still. Each run notes how much processor time went to programs that were
no part of it; a run with too much of that is taken again, and the calmest ones count. All are recorded.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

__all__ = ["RESULTS", "Meter", "Run", "command_of", "parser_of", "repeated", "save", "save_parts", "spread"]

RESULTS = Path(__file__).parent / "results"
NOISE_PCT = 6.0
"""Share of all cores that other programs may use during a run that counts."""
TICK_S = 1 / os.sysconf("SC_CLK_TCK")

Run = dict[str, Any]


class Meter:
    """Processor time of the whole machine against that of the processes measured, over a `with` block.

    Args:
        own_cpu_s: Processor time, so far, of every process that belongs to the measurement, this one excepted.
    """

    def __init__(self, own_cpu_s: Callable[[], float]) -> None:
        self._own_cpu_s = own_cpu_s
        self.foreign_pct = 0.0

    def _now(self) -> tuple[float, float]:
        return time.monotonic(), _busy_s() - self._own_cpu_s() - time.process_time()

    def __enter__(self) -> Self:
        self._began = self._now()
        return self

    def __exit__(self, *exc_info: object) -> None:
        (began_s, others_before_s), (ended_s, others_after_s) = self._began, self._now()
        cores = os.cpu_count() or 1
        # The kernel counts the machine in ticks and processes in nanoseconds: little may come out as less than none.
        share = (others_after_s - others_before_s) / (ended_s - began_s) / cores
        self.foreign_pct = max(0.0, round(100 * share, 1))


def _busy_s() -> float:
    with Path("/proc/stat").open() as file:
        user, nice, system, _idle, _wait, irq, softirq, *_ = map(int, file.readline().split()[1:])
    return (user + nice + system + irq + softirq) * TICK_S


def repeated(measure: Callable[[], Run], times: int, extra: int) -> list[Run]:
    """Measure until enough runs were calm, at most `extra` times more; the calmest `times` count.

    A run is a mapping with `foreign_pct`; `counts` is added to each.
    """
    runs: list[Run] = []
    while sum(_calm(run) for run in runs) < times and len(runs) < times + extra:
        runs.append(measure())
        print(json.dumps({name: value for name, value in runs[-1].items() if value is not None}), flush=True)
    calmest = sorted(runs, key=lambda run: max(NOISE_PCT, run["foreign_pct"]))[:times]
    return [{**run, "counts": run in calmest} for run in runs]


def _calm(run: Run) -> bool:
    return bool(run["foreign_pct"] <= NOISE_PCT)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every program has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--times", type=int, default=3, help="runs that count of each measurement")
    parser.add_argument("--extra", type=int, default=3, help="runs more at most, where others disturbed some")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory the figures are saved in")
    return parser


def command_of(module: str, argv: Sequence[str] | None) -> str:
    """The command that is running, as somebody else would type it."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)])


def save(results: Path, name: str, command: str, runs: Sequence[Run]) -> Path:
    """Write the runs and where they were made to `NAME.json`."""
    return _write(results, {"name": name, "command": command, **_origin(), **_place(), "runs": list(runs)})


def save_parts(results: Path, name: str, command: str, runs: Sequence[Run], *, by: str, order: Sequence[str]) -> Path:
    """Write runs to `NAME.json` beside those that were recorded before, in place of those of the same name.

    So what takes an hour in all can be recorded part by part; each run says by which command, when and at which commit.

    Args:
        results: Directory of the file.
        name: Of the file.
        command: What was run.
        runs: What it measured.
        by: Where a run has its name.
        order: The names, in the order in which they stand in the file; runs of other names are dropped.
    """
    file = results / f"{name}.json"
    recorded = json.loads(file.read_text())["runs"] if file.exists() else []
    named = {run[by]: run for run in (*recorded, *({**run, "command": command, **_origin()} for run in runs))}
    kept = [named[each] for each in order if each in named]
    return _write(results, {"name": name, **_place(), "runs": kept})


def _origin() -> dict[str, Any]:
    return {
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed_files": len(_git("status", "--porcelain", "--", "src").splitlines()),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _place() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
        "nice": os.nice(0),
    }


def _write(results: Path, document: dict[str, Any]) -> Path:
    results.mkdir(exist_ok=True)
    file = results / f"{document['name']}.json"
    file.write_text(json.dumps(document, indent=1) + "\n")
    return file


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    ).stdout.strip()


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Median and range, as `1.02 (1.01-1.05)`; the median alone where they do not differ."""
    if not values:
        return "-"
    middle, least, most = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least}-{most})"
