"""When a model is left alone, for how long, and who cannot bring that about. Times are passed in."""

import pytest

from oncewise.core.breaker import Breaker, BreakerChanged, BreakerRules, Breakers, BreakerState, BreakerStats
from oncewise.errors import ProviderRateLimited, ProviderUnavailable

OPENED = BreakerChanged("acme", "m", BreakerState.OPEN, 5, 5, 5.0)


def call(breakers: Breakers, now_s: float, *, good: bool | None, model: str = "m") -> None:
    """A call that begins and ends at once."""
    breakers.end(model, breakers.begin(model, now_s), now_s, good=good)


def fail(breakers: Breakers, times: int, now_s: float = 0.0, model: str = "m") -> None:
    for _ in range(times):
        call(breakers, now_s, good=False, model=model)


def refused_for_s(breakers: Breakers, now_s: float, model: str = "m") -> float:
    """Seconds the next call is told to wait; 0.0 if it is let through."""
    try:
        period = breakers.begin(model, now_s)
    except (ProviderUnavailable, ProviderRateLimited) as error:
        return error.retry_after_s or 0.0
    breakers.end(model, period, now_s, good=None)
    return 0.0


# -- opening -----------------------------------------------------------------------------------------------------


def test_five_failures_open_it_and_four_do_not() -> None:
    """And then it says how long it stays open, to the second."""
    breakers = Breakers()
    fail(breakers, 4)
    assert refused_for_s(breakers, 0.0) == 0.0
    fail(breakers, 1)
    assert refused_for_s(breakers, 0.0) == 5.0
    assert refused_for_s(breakers, 3.5) == 1.5
    assert refused_for_s(breakers, 5.0) == 0.0


@pytest.mark.parametrize(("good", "opens"), [(5, True), (6, False), (100, False)])
def test_half_of_the_calls_must_have_failed(good: int, opens: bool) -> None:
    """Five failures among hundreds of good answers are the ordinary life of a busy provider."""
    breakers = Breakers()
    for _ in range(good):
        call(breakers, 0.0, good=True)
    fail(breakers, 5)
    assert (refused_for_s(breakers, 0.0) > 0) is opens


def test_a_good_answer_never_opens_it() -> None:
    """Even where it is the call that makes the share complete: a window that moved on may leave failures only."""
    breakers = Breakers()
    for _ in range(6):
        call(breakers, 0.0, good=True)
    fail(breakers, 5, 5.0)
    call(breakers, 20.0, good=True)
    assert refused_for_s(breakers, 20.0) == 0.0


@pytest.mark.parametrize(("then_s", "opens"), [(19.0, True), (20.0, False)])
def test_failures_count_for_twenty_seconds(then_s: float, opens: bool) -> None:
    """Four of a while ago and one now are no outage."""
    breakers = Breakers()
    fail(breakers, 4)
    fail(breakers, 1, then_s)
    assert (refused_for_s(breakers, then_s) > 0) is opens


def test_good_answers_count_for_twenty_seconds() -> None:
    """Yesterday's traffic does not outvote an outage."""
    breakers = Breakers()
    for _ in range(1000):
        call(breakers, 0.0, good=True)
    fail(breakers, 5, 20.0)
    assert refused_for_s(breakers, 20.0) > 0


def test_what_says_nothing_of_the_provider_counts_for_nothing() -> None:
    """A tenant's own 400s and callers that leave neither open it nor hide failures from it."""
    breakers = Breakers()
    for _ in range(100):
        call(breakers, 0.0, good=None)
    assert refused_for_s(breakers, 0.0) == 0.0
    fail(breakers, 5)
    assert refused_for_s(breakers, 0.0) == 5.0


# -- half open ---------------------------------------------------------------------------------------------------


def opened() -> Breakers:
    breakers = Breakers()
    fail(breakers, 5)
    return breakers


def test_one_call_is_the_trial_and_the_others_wait_for_it() -> None:
    """However long it takes."""
    breakers = opened()
    breakers.begin("m", 5.0)
    assert [refused_for_s(breakers, now_s) for now_s in (5.0, 60.0)] == [1.0, 1.0]


def test_a_good_trial_closes_it_and_the_past_is_forgotten() -> None:
    """Four failures more do not open it again; five do, for 5 s as the first time."""
    breakers = opened()
    call(breakers, 5.0, good=True)
    fail(breakers, 4, 5.0)
    assert refused_for_s(breakers, 5.0) == 0.0
    fail(breakers, 1, 5.0)
    assert refused_for_s(breakers, 5.0) == 5.0


def test_a_failed_trial_doubles_the_time_up_to_a_minute() -> None:
    """5, 10, 20, 40, 60, 60 s."""
    breakers, now_s, times = opened(), 5.0, []
    for _ in range(5):
        call(breakers, now_s, good=False)
        times.append(refused_for_s(breakers, now_s))
        now_s += times[-1]
    assert times == [10.0, 20.0, 40.0, 60.0, 60.0]


def test_a_trial_that_says_nothing_leaves_the_next_one_to_try() -> None:
    """Its caller left, or had asked badly: no other is kept waiting for it, and the time does not double."""
    breakers = opened()
    call(breakers, 5.0, good=None)
    fail(breakers, 1, 5.0)
    assert refused_for_s(breakers, 5.0) == 10.0


@pytest.mark.parametrize("good", [True, False])
def test_calls_of_before_say_nothing_about_now(good: bool) -> None:
    """A slow answer from before the outage does not end it, and a late failure does not prolong it."""
    breakers = Breakers()
    early = breakers.begin("m", 0.0)
    fail(breakers, 5)
    breakers.end("m", early, 3.0, good=good)
    assert refused_for_s(breakers, 3.0) == 2.0
    call(breakers, 5.0, good=True)
    for _ in range(9):
        breakers.end("m", early, 5.0, good=False)
    assert refused_for_s(breakers, 5.0) == 0.0


def test_a_call_that_waited_is_refused_if_it_opened_meanwhile() -> None:
    """Between its beginning and its start it stood in the queue."""
    breakers = Breakers()
    waiting = breakers.begin("m", 0.0)
    breakers.check("m", waiting, 0.0)
    fail(breakers, 5, 1.0)
    with pytest.raises(ProviderUnavailable) as caught:
        breakers.check("m", waiting, 2.0)
    assert caught.value.retry_after_s == 4.0


# -- one provider ------------------------------------------------------------------------------------------------


def test_models_fail_one_by_one() -> None:
    """One that is down says nothing about the others of its provider."""
    breakers = opened()
    assert refused_for_s(breakers, 0.0, "other") == 0.0
    assert breakers.stats(0.0) == BreakerStats(open=1, half_open=0, held=0)
    assert breakers.stats(5.0) == BreakerStats(open=0, half_open=1, held=0)


def test_opening_and_closing_are_told_once_each() -> None:
    """With what led to it; nothing else is told."""
    told: list[object] = []
    breakers = Breakers("acme", listener=told.append)
    fail(breakers, 5)
    refused_for_s(breakers, 1.0)
    fail(breakers, 1, 5.0)
    call(breakers, 15.0, good=True)
    call(breakers, 15.0, good=True)
    assert told == [
        OPENED,
        BreakerChanged("acme", "m", BreakerState.OPEN, 5, 5, 10.0),
        BreakerChanged("acme", "m", BreakerState.CLOSED, 0, 0, 0.0),
    ]


def test_whoever_waits_is_told_what_newcomers_are() -> None:
    """The call that opens it brings the refusal for all who stand in the queue for this model."""
    breakers = Breakers("acme")
    fail(breakers, 4)
    failure = breakers.end("m", breakers.begin("m", 0.0), 0.0, good=False)
    assert failure is not None
    assert (failure.code, failure.retryable, failure.retry_after_s) == ("provider_unavailable", True, 5.0)
    assert breakers.end("m", breakers.begin("m", 5.0), 5.0, good=True) is None


def test_only_so_many_models_are_kept() -> None:
    """Clients name models; the one least recently used is forgotten, and bad names leave nothing behind."""
    breakers = Breakers(max_models=2)
    for name in ("a", "b", "c"):
        fail(breakers, 5, model=name)
        breakers.hold(name, 0.0, 100.0)
    call(breakers, 0.0, good=None, model="d")
    assert breakers.stats(0.0) == BreakerStats(open=2, half_open=0, held=2)
    assert refused_for_s(breakers, 0.0, "a") == 0.0
    assert refused_for_s(breakers, 0.0, "c") > 0


def test_a_model_in_use_is_not_forgotten_for_a_new_one() -> None:
    """Good answers are use as well."""
    breakers = Breakers(max_models=2)
    fail(breakers, 4, model="a")
    call(breakers, 0.0, good=True, model="b")
    call(breakers, 0.0, good=True, model="a")
    call(breakers, 0.0, good=True, model="c")
    fail(breakers, 1, model="a")
    assert refused_for_s(breakers, 0.0, "a") > 0


def test_a_model_is_held_for_as_long_as_its_provider_said() -> None:
    """To the moment; a shorter wish shortens nothing; other models are free."""
    breakers = Breakers("acme")
    assert breakers.hold("m", 0.0, 90.0).code == "provider_rate_limited"
    assert breakers.hold("m", 10.0, 70.0).retry_after_s == 80.0
    assert [refused_for_s(breakers, now_s) for now_s in (10.0, 89.5, 90.0)] == [80.0, 0.5, 0.0]
    assert refused_for_s(breakers, 10.0, "other") == 0.0


def test_a_call_that_waited_is_refused_if_its_model_is_held_meanwhile() -> None:
    """As with a breaker that opened."""
    breakers = Breakers()
    waiting = breakers.begin("m", 0.0)
    breakers.hold("m", 0.0, 90.0)
    with pytest.raises(ProviderRateLimited) as caught:
        breakers.check("m", waiting, 30.0)
    assert caught.value.retry_after_s == 60.0
    breakers.check("m", waiting, 90.0)


def test_a_breaker_by_other_rules() -> None:
    """The numbers are the rules' and nowhere else."""
    breaker = Breaker(BreakerRules(failures=1, share=0.1, window_s=2, open_s=1.0, longest_s=1.5))
    assert breaker.end(breaker.begin(), 0.0, good=False)
    assert breaker.wait_s(0.0) == 1.0
    assert breaker.end(breaker.begin(), 1.0, good=False)
    assert (breaker.wait_s(1.0), breaker.state(1.0)) == (1.5, BreakerState.OPEN)
