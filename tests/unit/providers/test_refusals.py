"""When to retry, as providers say it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncewise.providers.refusals import refusal, retry_after_s

NOW_S = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "9999"}, 9999.0),
        ({"retry-after": "999999"}, 86400.0),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:50 GMT"}, 30.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:00 GMT"}, 0.0),
        ({"retry-after": "Tue, 14 Nov 2033 22:13:00 GMT"}, 86400.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:50 GMT", "date": "Tue, 14 Nov 2023 22:13:45 GMT"}, 5.0),
        ({"retry-after": "Tue, 99 Nov 2023 22:13:50 GMT"}, None),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
    ],
)
def test_retry_after_in_every_form(headers: dict[str, str], expected: float | None) -> None:
    """Seconds, milliseconds, a date by the provider's own clock; at most a day; nonsense is no wish."""
    assert retry_after_s(headers, NOW_S) == expected


@given(st.text(max_size=40))
def test_no_header_value_is_too_odd(value: str) -> None:
    """Whatever the header says, the answer is None or a wait between nothing and a day."""
    seconds = retry_after_s({"retry-after": value, "retry-after-ms": value, "date": value}, NOW_S)
    assert seconds is None or 0 <= seconds <= 86400


def test_a_refused_key_names_the_setting_to_check() -> None:
    """The one error a new user is most likely to meet."""
    detail = refusal("my-llm", 401, frozenset(), None).detail
    assert "MY_LLM_API_KEY" in detail


@pytest.mark.parametrize(
    ("status", "code"), [(429, "provider_rate_limited"), (408, "provider_unavailable"), (503, "provider_unavailable")]
)
def test_the_wait_is_passed_on(status: int, code: str) -> None:
    """With a rate limit, and by a provider that fails and says when to come again."""
    error = refusal("acme", status, frozenset(), 4.0)
    assert (error.code, error.retry_after_s, error.retryable) == (code, 4.0, True)


@pytest.mark.parametrize("status", [408, 500, 503, 529])
def test_a_failure_without_a_wait_is_a_failure(status: int) -> None:
    """There is nothing to tell but that."""
    error = refusal("acme", status, frozenset(), None)
    assert (error.code, error.retry_after_s, error.retryable) == ("provider_error", None, True)
