"""A few trials of each figure; `make faults` has them all."""

import pytest

from tests.faults.figures import FIGURES, POINTS, Outcome, measure, point_of, quantile
from tests.faults.storms import Trial

SEED = 7

# Half a minute each: the others are left to `make faults`.
IN_TESTS = ["kill", "sqlite-kill", "postgres", "commit", "redis-kill", "redis-pause", "headline"]


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


def test_quantiles():
    assert quantile([], 0.5) is None
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile(list(map(float, range(100))), 0.95) == 95.0
