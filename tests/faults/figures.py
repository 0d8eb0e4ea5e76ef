"""The figures of the fault suite: which trials, how many of them, and what they must come to.

A figure has a full number of trials, for `make faults`, and a few of the same, for the test suite. Its n-th trial is
the same in both: the seed and the number decide what is broken and when.
"""

import asyncio
import os
import random
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from tests.faults import storms
from tests.faults.server import Point
from tests.faults.site import Deployment, deployment
from tests.faults.storms import GENERATION_S, Trial
from tests.support.commands import ROOT
from tests.support.postgres import roomy

__all__ = ["FIGURES", "FULL", "Figure", "Outcome", "measure", "quantile", "rows_of"]

Trials = AsyncGenerator[Trial, None]
ANSWERED_S = GENERATION_S + 3.0
ADDED_S = 0.15
REFUSED_S = 1.0

MATRIX = (
    "tests/faults/test_matrix.py",
    "tests/acceptance/test_fault_matrix.py",
    "tests/acceptance/test_streams_viewers.py::test_two_hundred_clients_that_never_read_cost_the_others_nothing",
)
"""Where the rows of the fault matrix are."""
FULL = "ONCEWISE_TEST_FAULTS_FULL"
"""Set while they run as often, as long and with as many as the matrix says, and not as a test suite has time for."""

POINTS = (*(point for point in Point if point is not Point.PAUSE_IN_TX), Point.MID_STREAM)
"""Those that kill; the middle of a call twice, since it matters whether anybody saw text of it."""


def quantile(values: Sequence[float], share: float) -> float | None:
    """The least value that `share` of all do not exceed; None of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else None


@dataclass
class Outcome:
    """What a figure came to.

    Attributes:
        misses: Promises about the whole that were not kept; those about single trials are in the trials.
    """

    figure: "Figure"
    trials: list[Trial]
    misses: list[str] = field(default_factory=list)

    @property
    def violations(self) -> list[tuple[Trial, str]]:
        return [(trial, words) for trial in self.trials for words in trial.violations]

    def counted(self, *names: str) -> int:
        return sum(words.split(" ")[0] in names for _, words in self.violations)

    @property
    def record(self) -> dict[str, Any]:
        """One row of the table, and of the results."""
        after = [trial.after_s for trial in self.trials if trial.after_s is not None]
        waits = [wait for trial in self.trials for wait in trial.waits_s]
        calls = [made for trial in self.trials for made in trial.calls]
        return {
            "figure": self.figure.name,
            "says": self.figure.says,
            "trials": len(_of_faults(self.trials)),
            "struck": len(_that_met(self.trials)),
            "turns": len(calls),
            "clients": len(waits),
            "lost": self.counted("I1"),
            "twice": self.counted("I2"),
            "told_otherwise": self.counted("I3", "I6", "I7"),
            "hung": self.counted("I5"),
            "violations": len(self.violations),
            "one_call_pct": round(100 * sum(made <= 1 for made in calls) / max(1, len(calls)), 1),
            "two_calls_pct": round(100 * sum(made <= 2 for made in calls) / max(1, len(calls)), 1),
            "most_calls": max(calls, default=0),
            "after_p50_s": _rounded(quantile(after, 0.5)),
            "after_p95_s": _rounded(quantile(after, 0.95)),
            "after_max_s": _rounded(max(after, default=None)),
            "wait_p95_s": _rounded(quantile(waits, 0.95)),
            "wait_max_s": _rounded(max(waits, default=None)),
            "added_p95_ms": None if (added := _added(self.trials)) is None else round(1000 * added[0]),
            "misses": self.misses,
            **self.figures(),
        }

    def figures(self) -> dict[str, float]:
        """The worst of what trials measured besides."""
        names = {name for trial in self.trials for name in trial.figures}
        return {name: round(max(trial.figures.get(name, 0.0) for trial in self.trials), 3) for name in sorted(names)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


@dataclass(frozen=True)
class Figure:
    """One kind of fault, often.

    Attributes:
        full, few: How many trials: all, and for the test suite.
        least: How many of all must have met a running turn; others came too early or too late for it.
        run: Trials of these numbers, on a deployment of their own in a folder.
        judge: What the trials together did not keep.
    """

    name: str
    says: str
    full: int
    few: int
    run: Callable[[Path, int, Sequence[int]], Trials]
    judge: Callable[[list[Trial]], list[str]] = lambda _trials: []
    least: int = 0

    def misses(self, trials: list[Trial]) -> list[str]:
        """What the trials together did not keep; whether enough of them met something is asked of all only."""
        met, whole = len(_that_met(trials)), len(_of_faults(trials)) >= self.full
        few = [f"only {met} of {self.least} met a turn"] if whole and met < self.least else []
        return [*few, *self.judge(trials)]


async def measure(figure: Figure, seed: int, numbers: Iterable[int], each: Callable[[Trial], None]) -> Outcome:
    """Run trials of a figure, tell of each, and judge."""
    outcome = Outcome(figure, [])
    with tempfile.TemporaryDirectory(prefix="oncewise-faults-", dir=roomy()) as folder:
        async for trial in figure.run(Path(folder), seed, list(numbers)):
            outcome.trials.append(trial)
            each(trial)
    outcome.misses = figure.misses(outcome.trials)
    return outcome


# -- what trials come to -------------------------------------------------------------------------------------------


def _of_faults(trials: list[Trial]) -> list[Trial]:
    """Without those that nothing was broken in, and the look for leaks at the end."""
    return [trial for trial in trials if trial.number >= 0 and trial.struck != "nothing"]


def _that_met(trials: list[Trial]) -> list[Trial]:
    return [trial for trial in _of_faults(trials) if trial.struck is not None]


def _answered_soon(trials: list[Trial]) -> list[str]:
    p95 = quantile([trial.after_s for trial in trials if trial.after_s is not None], 0.95)
    return [f"p95 of the last answer {p95:.2f} s after the fault"] if p95 is not None and p95 > ANSWERED_S else []


def _few_calls(trials: list[Trial]) -> list[str]:
    calls = [made for trial in trials for made in trial.calls]
    share = sum(made <= 2 for made in calls) / max(1, len(calls))
    return [] if share >= 0.95 else [f"at most two calls in {100 * share:.0f} % only"]


def _little_added(trials: list[Trial]) -> list[str]:
    added = _added(trials)
    if added is None or added[0] <= ADDED_S:
        return []
    return [f"p95 grew by {added[0] * 1000:.0f} ms, from {added[1]:.2f} s"]


def _added(trials: list[Trial]) -> tuple[float, float] | None:
    """By how much the p95 of waits grew over that without a fault, and that."""
    calm = [wait for trial in trials if trial.struck == "nothing" for wait in trial.waits_s]
    rough = [wait for trial in trials if trial.struck != "nothing" for wait in trial.waits_s]
    before, after = quantile(calm, 0.95), quantile(rough, 0.95)
    return None if before is None or after is None else (after - before, before)


def _refused_soon(trials: list[Trial]) -> list[str]:
    slowest_s = max((trial.figures.get("refused_s", 0.0) for trial in trials), default=0.0)
    return [f"refused after {slowest_s:.2f} s while PostgreSQL was down"] if slowest_s > REFUSED_S else []


# -- trials --------------------------------------------------------------------------------------------------------


def point_of(number: int) -> Point | None:
    """Where the leader of the n-th trial is killed: three of five at named points, the others at any time."""
    place = number % 5
    return POINTS[(number // 5 * 3 + place) % len(POINTS)] if place < 3 else None


async def _whole(site: Deployment, point: Point | None = None) -> int:
    """Start what is dead again; the place of the server that will die at `point`."""
    dead = [place for place, member in enumerate(site.members) if not member.alive]
    place = dead[0] if dead else 0
    if point is not None or dead:
        await site.restart(place, **({} if point is None else {"CRASH_AT": point.value}))
    for other in dead[1:]:
        await site.restart(other)
    return place


async def _killed(folder: Path, seed: int, numbers: Sequence[int], *, postgres: bool = True) -> Trials:
    # PostgreSQL tells at once who is dead, and so does a lock on SQLite's file; the lease is for what they miss.
    async with deployment(folder, 3 if postgres else 2, postgres=postgres, lease_s=3) as site:
        for number in numbers:
            point = point_of(number)
            place = await _whole(site, point)
            yield await storms.kill(site, Trial("kill", seed, number), point, place)
        await _whole(site)
        yield await _leaks(site, seed)


async def _stopped(folder: Path, seed: int, numbers: Sequence[int], *, postgres: bool = True) -> Trials:
    async with deployment(folder, 3 if postgres else 2, postgres=postgres, lease_s=1) as site:
        for number in numbers:
            yield await storms.stop(site, Trial("stop", seed, number))
        yield await _leaks(site, seed)


async def _redis(folder: Path, seed: int, numbers: Sequence[int], *, ways: Sequence[str]) -> Trials:
    async with deployment(folder, 2, redis=True, between=ways == NETWORK) as site:
        for number in numbers:
            how = ways[number % len(ways)]
            # As many without a fault: what those take is what the others are measured against.
            yield await storms.trouble_redis(site, Trial("calm", seed, number), "nothing")
            yield await storms.trouble_redis(site, Trial(how, seed, number), how)
        yield await _leaks(site, seed)


async def _headline(folder: Path, seed: int, numbers: Sequence[int]) -> Trials:
    async with deployment(folder, 2, redis=True) as site:
        assert site.redis is not None
        redis = site.redis

        async def killed(chance: random.Random) -> None:
            await asyncio.sleep(chance.uniform(0.0, 1.0))
            redis.kill()

        for number in numbers:
            trial = Trial("headline", seed, number, struck="Redis killed")
            yield await storms.headline(site, trial, killed)
            await asyncio.to_thread(redis.start)
        yield await _leaks(site, seed)


def _postgres(trial_of: Callable[[Deployment, Trial], Any], kind: str, **options: Any) -> Any:
    async def run(folder: Path, seed: int, numbers: Sequence[int]) -> Trials:
        async with deployment(folder, 3, lease_s=3, **options) as site:
            for number in numbers:
                yield await trial_of(site, Trial(kind, seed, number))
            yield await _leaks(site, seed)

    return run


async def _matrix(folder: Path, seed: int, _numbers: Sequence[int]) -> Trials:
    """Each row of the matrix in full, as a trial; one that is skipped did not keep anything."""
    report = folder / "matrix.xml"
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pytest", *MATRIX, "-q", "--timeout", "900", f"--junit-xml={report}"),
        env={**os.environ, FULL: "1"}, cwd=ROOT, stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    ended = await running.wait()
    for trial in rows_of(report.read_text() if report.exists() else "<testsuite/>", seed, ended):
        yield trial


def rows_of(report: str, seed: int, ended: int) -> list[Trial]:
    """A trial for each test of a report in JUnit's form, and one for a run that did not come to its end."""
    trials = []
    for number, row in enumerate(ET.fromstring(report).iter("testcase")):
        wrong = [*row.iter("failure"), *row.iter("error"), *row.iter("skipped")]
        trial = Trial("matrix", seed, number, struck=row.get("name"))
        trial.violations = [f"{row.get('name')}: {each.get('message', each.tag)[:300]}" for each in wrong]
        trials.append(trial)
    if not trials or ended not in (0, 1):
        trials.append(Trial("matrix", seed, len(trials), violations=[f"the tests ended with {ended}"]))
    return trials


async def _leaks(site: Deployment, seed: int) -> Trial:
    """Once at the end: what servers still hold."""
    trial = Trial("end", seed, -1)
    trial.violations = [f"I8 {leak}" for leak in await site.leaks()]
    return trial


def _on(postgres: bool, run: Any) -> Any:
    return lambda folder, seed, numbers: run(folder, seed, numbers, postgres=postgres)


NETWORK = ("late", "lossy", "reset", "silent")


def _how(*ways: str) -> Any:
    return lambda folder, seed, numbers: _redis(folder, seed, numbers, ways=ways)


FIGURES = {
    figure.name: figure
    for figure in (
        # Some come before the turn has a leader or after its end; so many more are needed for those that count.
        Figure("kill", "kill -9 of the leader, PostgreSQL", 220, 10, _on(True, _killed), _answered_soon, 200),
        Figure("stop", "the leader stopped past its lease, PostgreSQL", 120, 5, _on(True, _stopped), _few_calls, 100),
        Figure("sqlite-kill", "kill -9 of the leader, SQLite", 220, 5, _on(False, _killed), _answered_soon, 200),
        Figure(
            "sqlite-stop", "the leader stopped past its lease, SQLite", 120, 3, _on(False, _stopped), _few_calls, 100
        ),
        Figure("postgres", "PostgreSQL restarted", 15, 2, _postgres(storms.restart_postgres, "restart"), _refused_soon),
        Figure("disconnect", "all sessions ended", 100, 3, _postgres(storms.disconnect, "disconnect")),
        Figure("commit", "the answer to a COMMIT lost", 30, 3, _postgres(storms.lose_commit, "commit", between=True)),
        Figure("redis-kill", "Redis killed under load", 20, 2, _how("killed"), _little_added, 20),
        Figure("redis-pause", "Redis paused for 5 s under load", 20, 1, _how("paused"), _little_added, 20),
        Figure("redis-flush", "Redis flushed under load", 20, 2, _how("flushed"), _little_added, 20),
        Figure("redis-down", "Redis killed and away for 30 s under load", 3, 0, _how("down"), _little_added, 3),
        Figure("redis-network", "the way to Redis late, lossy, reset, silent", 40, 4, _how(*NETWORK)),
        Figure("headline", "50 requests, Redis killed meanwhile", 100, 4, _headline),
        Figure("matrix", "each row of the fault matrix", 1, 0, _matrix),
    )
}
"""Every figure by its name."""
