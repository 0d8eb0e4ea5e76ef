"""A few trials of each figure; `make faults` has them all."""

import json
import re

import pytest
from bench.figures import faults
from bench.record import RESULTS, save_parts

from tests.faults.figures import FIGURES, POINTS, Outcome, measure, point_of, quantile, rows_of
from tests.faults.storms import GENERATION_S, Trial
from tests.support.commands import ROOT

SEED = 7

IN_TESTS = [name for name, figure in FIGURES.items() if figure.few]


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_TESTS)
async def test_no_fault_breaks_a_promise(name):
    """What a machine that others use makes slow is judged by the full figures only; what is wrong is wrong here too."""
    figure = FIGURES[name]
    outcome = await measure(figure, SEED, range(figure.few), lambda _trial: None)

    assert [(trial.number, words) for trial, words in outcome.violations] == []
    assert any(trial.struck for trial in outcome.trials)


def test_trials_meet_every_point_and_any_time():
    """Three of five at a named one, each as often as the others."""
    points = [point_of(number) for number in range(200)]
    assert points.count(None) == 80
    assert {points.count(point) for point in POINTS} == {20, 40}


def test_an_outcome_counts_what_was_broken():
    trial = Trial("kill", 1, 0, struck="any time", after_s=2.0, calls=[1, 2, 3], waits_s=[0.5, 1.0])
    trial.violations = ["I1 x", "I2 y", "I3 z", "I6 z", "I5 w", "I4 v"]
    record = Outcome(FIGURES["kill"], [trial]).record
    assert (record["lost"], record["twice"], record["told_otherwise"], record["hung"]) == (1, 1, 2, 1)
    assert (record["violations"], record["most_calls"], record["two_calls_pct"]) == (6, 3, 66.7)
    assert (record["after_p95_s"], record["wait_max_s"]) == (2.0, 1.0)


def test_a_figure_says_what_it_missed():
    """Late answers, too many calls, and what a fault added."""
    late = Trial("kill", 1, 0, struck="any time", after_s=9.0, calls=[3])
    assert FIGURES["kill"].judge([late]) == ["p95 of the last answer 9.00 s after the fault"]
    assert FIGURES["stop"].judge([late]) == ["at most two calls in 0 % only"]
    calm = Trial("calm", 1, 0, struck="nothing", waits_s=[0.5] * 20)
    rough = Trial("killed", 1, 0, struck="killed", waits_s=[0.8] * 20)
    assert FIGURES["redis-kill"].judge([calm, rough]) == ["p95 grew by 300 ms, from 0.50 s"]
    assert FIGURES["redis-kill"].judge([calm, calm]) == []
    refused = Trial("restart", 1, 0, struck="restarted", figures={"refused_s": 1.2})
    assert FIGURES["postgres"].judge([refused]) == ["refused after 1.20 s while PostgreSQL was down"]
    assert FIGURES["postgres"].judge([Trial("restart", 1, 0, figures={"refused_s": 0.9})]) == []


def test_a_figure_judges_what_it_is_there_for():
    """The sentence of each promise, at its number and just above."""
    for after_s, kept in ((3.99, True), (4.01, False)):
        trials = [Trial("kill", 1, number, struck="any time", after_s=after_s) for number in range(10)]
        assert (FIGURES["kill"].judge(trials) == []) is kept
        assert (FIGURES["sqlite-kill"].judge(trials) == []) is kept
    for many, kept in ((5, True), (6, False)):
        trials = [Trial("stop", 1, number, calls=[3 if number < many else 2]) for number in range(100)]
        assert (FIGURES["stop"].judge(trials) == []) is kept
        assert (FIGURES["sqlite-stop"].judge(trials) == []) is kept
    calm = Trial("calm", 1, 0, struck="nothing", waits_s=[0.5] * 20)
    for added_s, kept in ((0.149, True), (0.151, False)):
        rough = Trial("paused", 1, 0, struck="paused", waits_s=[0.5 + added_s] * 20)
        for name in ("redis-kill", "redis-pause", "redis-flush", "redis-down"):
            assert (FIGURES[name].judge([calm, rough]) == []) is kept


def test_so_many_must_have_met_a_turn():
    """Those that nothing was broken in, and the look for leaks, are none of them."""
    figure = FIGURES["redis-kill"]
    calm = [Trial("calm", 1, number, struck="nothing") for number in range(20)]
    rough = [Trial("killed", 1, number, struck="killed") for number in range(20)]
    rough[3].struck = None
    assert figure.misses([*calm, *rough, Trial("end", 1, -1)]) == ["only 19 of 20 met a turn"]
    assert figure.misses([*calm, *rough[:19], Trial("end", 1, -1)]) == [], "asked of the full number only"
    rough[3].struck = "killed"
    assert figure.misses([*calm, *rough]) == []
    record = Outcome(figure, [*calm, *rough, Trial("end", 1, -1)]).record
    assert (record["trials"], record["struck"]) == (20, 20)


def test_the_full_numbers_are_those_that_are_promised():
    """At least as many as the promise names must have met something."""
    promised = {"kill": 200, "stop": 100, "sqlite-kill": 200, "sqlite-stop": 100, "redis-kill": 20, "redis-pause": 20}
    assert {name: FIGURES[name].least for name in promised} == promised
    assert FIGURES["redis-flush"].least == 20
    numbers = {"postgres": 15, "disconnect": 100, "commit": 30, "headline": 100, "redis-network": 40}
    assert {name: FIGURES[name].full for name in numbers} == numbers
    named = [point_of(number) for number in range(FIGURES["kill"].full)]
    assert min(named.count(point) for point in POINTS) >= 20


def test_figures_are_recorded_in_parts(tmp_path):
    """What is measured again takes its own place; all else stays, with its command, commit and date."""
    order = ["kill", "stop", "headline"]

    def save(command, *names, lost=0):
        rows = [{**Outcome(FIGURES[name], []).record, "lost": lost} for name in names]
        return save_parts(tmp_path, "faults", command, rows, by="figure", order=order)

    save("first", "stop", "kill")
    file = save("second", "headline", "kill", lost=3)
    document = json.loads(file.read_text())
    seen = [(run["figure"], run["command"], run["lost"]) for run in document["runs"]]
    assert seen == [("kill", "second", 3), ("stop", "first", 0), ("headline", "second", 3)]
    assert all(run["commit"] and run["date"] for run in document["runs"])
    page = faults(document)
    assert "| `kill`: kill -9 of the leader, PostgreSQL | 0 | 0 | 0 | 0 | 3 |" in page
    assert page.count(document["runs"][0]["date"]) == 3


def test_a_row_of_the_matrix_that_fails_or_is_skipped_is_a_violation():
    """So is a run that ended before all rows were seen."""
    report = """<testsuites><testsuite><testcase name="F12"/>
    <testcase name="F14"><failure message="not gone"/></testcase>
    <testcase name="F16"><error message="no server"/></testcase>
    <testcase name="F41"><skipped message="no libfaketime"/></testcase></testsuite></testsuites>"""
    trials = rows_of(report, 1, 1)
    assert [trial.violations for trial in trials] == [
        [], ["F14: not gone"], ["F16: no server"], ["F41: no libfaketime"],
    ]  # fmt: skip
    assert Outcome(FIGURES["matrix"], trials).record["trials"] == 4
    assert rows_of(report, 1, 2)[-1].violations == ["the tests ended with 2"]
    assert rows_of("<testsuite/>", 1, 0)[-1].violations == ["the tests ended with 0"]


def test_the_readme_says_what_was_recorded():
    """Its numbers of trials, its zeros and its bounds; the figures themselves stand on the page of figures."""
    file = RESULTS / "faults.json"
    if not file.exists():
        pytest.skip("nothing is recorded")
    rows = {run["figure"]: run for run in json.loads(file.read_text())["runs"]}
    readme = (ROOT / "README.md").read_text()
    kills, stops, zeros, bound_s = re.search(
        r"`kill -9`\) at (\d+) moments .* lease (\d+) times on each \| (0 .* 0 .* 0 .* 0 .*); .* within (\d+) s", readme
    ).groups()
    assert zeros.count("0 ") == 4
    for name, times in (("kill", kills), ("sqlite-kill", kills), ("stop", stops), ("sqlite-stop", stops)):
        assert rows[name]["struck"] >= int(times), name
        assert [rows[name][each] for each in ("lost", "twice", "told_otherwise", "hung", "violations")] == [0] * 5, name
    assert max(rows[name]["after_p95_s"] for name in ("kill", "sqlite-kill")) <= int(bound_s) + GENERATION_S
    paused_s, times, added_ms = re.search(
        r"Redis killed, paused for (\d) s and emptied, (\d+) times .* at most (\d+) ms longer", readme
    ).groups()
    for name in ("redis-kill", "redis-pause", "redis-flush"):
        row = rows[name]
        assert (row["struck"], row["violations"], row["one_call_pct"]) == (int(times), 0, 100.0), name
        assert row["added_p95_ms"] <= int(added_ms), name
    assert f"paused for {paused_s} s" in rows["redis-pause"]["says"]


def test_quantiles():
    assert quantile([], 0.5) is None
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile(list(map(float, range(100))), 0.95) == 95.0
