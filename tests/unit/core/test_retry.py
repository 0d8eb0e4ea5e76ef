"""When work may be tried again."""

from hypothesis import given
from hypothesis import strategies as st

from oncewise.core.retry import RetryBudget, backoff_s


@given(attempt=st.integers(1, 60), chance=st.floats(0, 1))
def test_the_backoff_is_jittered_over_its_whole_range(attempt: int, chance: float) -> None:
    """Full jitter: from nothing to the limit of the attempt, which doubles up to 8 s."""
    assert 0.0 <= backoff_s(attempt, chance) <= min(8.0, 0.5 * 2**attempt)
    assert backoff_s(attempt, 0.0) == 0.0
    assert backoff_s(attempt, 1.0) == min(8.0, 0.5 * 2**attempt)


def test_a_quiet_system_may_retry_once_in_ten_seconds() -> None:
    """The floor: without it the first failure of a day could never be mended."""
    budget = RetryBudget()
    budget.called(0.0)
    assert [budget.spend(now_s) for now_s in (0.0, 1.0, 9.9, 10.0, 10.1)] == [True, False, False, True, False]


def test_a_busy_system_may_retry_a_tenth_of_its_calls() -> None:
    """200 calls in a minute earn 20 retries at once, and no more."""
    budget = RetryBudget()
    for number in range(200):
        budget.called(number * 0.1)
    assert sum(budget.spend(20.0) for _ in range(100)) == 20


def test_calls_and_retries_of_the_last_minute_count() -> None:
    """Yesterday's traffic earns nothing, yesterday's retries cost nothing."""
    budget = RetryBudget()
    for _ in range(100):
        budget.called(0.0)
    assert sum(budget.spend(30.0) for _ in range(50)) == 10
    assert sum(budget.spend(95.0) for _ in range(50)) == 1

    unspent = RetryBudget()
    for _ in range(100):
        unspent.called(0.0)
    assert sum(unspent.spend(61.0) for _ in range(50)) == 1

    spent = RetryBudget()
    for _ in range(50):
        spent.spend(0.0)
    for _ in range(10):
        spent.called(61.0)
    assert spent.spend(61.0)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 5)), max_size=200))
def test_retries_never_exceed_the_share_and_the_floor(history: list[tuple[bool, float]]) -> None:
    """In any minute: at most a tenth of the calls, and one per ten seconds beside them."""
    budget, now_s = RetryBudget(), 0.0
    calls: list[float] = []
    retries: list[float] = []
    for is_call, pause_s in history:
        now_s += pause_s
        if is_call:
            budget.called(now_s)
            calls.append(now_s)
        elif budget.spend(now_s):
            retries.append(now_s)
    for end_s in retries:
        recent = sum(end_s - 60 < at_s <= end_s for at_s in retries)
        # Calls that have left the window since may have earned a retry that is still in it.
        earned = sum(end_s - 120 < at_s <= end_s for at_s in calls)
        assert recent <= 0.1 * earned + 1 + 60 / 10
