"""Errors as data: codes, records and what becomes of them."""

import inspect
import re

import pytest

from oncewise import errors
from oncewise.errors import Failure, FlightFailed, InvalidRequest, OncewiseError, ProviderError, ProviderRateLimited

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, OncewiseError)]
CONCRETE = [cls for cls in CLASSES if cls is not OncewiseError]


def test_everything_declared_is_listed() -> None:
    """`__all__` names every class of the module, sorted."""
    assert errors.__all__ == sorted([*(cls.__name__ for cls in CLASSES), "Failure"])


def test_codes_are_unique() -> None:
    """Two classes with one code would be rebuilt as the wrong one on the way to a waiter."""
    codes = [cls.code for cls in CONCRETE]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in codes)


@pytest.mark.parametrize("cls", CONCRETE, ids=lambda cls: cls.__name__)
def test_an_error_survives_being_shared(cls: type[OncewiseError]) -> None:
    """Frozen and rebuilt it is a new object of the same class that says the same."""
    error = cls("What happened.", retry_after_s=2.5)
    rebuilt = error.failure().error()
    assert type(rebuilt) is cls
    assert rebuilt is not error
    assert (rebuilt.code, rebuilt.detail, rebuilt.retryable, rebuilt.retry_after_s) == (
        error.code,
        "What happened.",
        error.retryable,
        2.5,
    )
    assert str(rebuilt) == "What happened."


@pytest.mark.parametrize("cls", CONCRETE, ids=lambda cls: cls.__name__)
def test_an_error_has_a_sentence_for_people(cls: type[OncewiseError]) -> None:
    """Without a detail it is the first line of the class's description, one whole sentence."""
    detail = cls().detail
    assert detail
    assert detail[0].isupper()
    assert detail.endswith(".")


def test_a_code_nobody_declared_is_an_unexpected_end() -> None:
    """A record from a newer version is still an error of ours."""
    assert OncewiseError.with_code("from_the_future") is FlightFailed
    assert isinstance(Failure("from_the_future", "Something.").error(), OncewiseError)


def test_the_instance_knows_better_than_its_class() -> None:
    """A provider's refusal is not retryable, and stays so when shared."""
    assert ProviderError().retryable
    refused = ProviderError(retryable=False)
    assert refused.failure().error().retryable is False
    assert ProviderError().retryable


def test_records_are_values() -> None:
    """Equal when they say the same; the foreign exception behind one is neither compared nor shown."""
    one = Failure("flight_failed", "Gone.", cause=LookupError("hunter2"))
    assert one == Failure("flight_failed", "Gone.")
    assert "hunter2" not in repr(one)
    assert hash(one) == hash(Failure("flight_failed", "Gone."))


def test_the_cause_goes_with_the_rebuilt_error() -> None:
    """For whoever debugs; the sentence itself never quotes it."""
    cause = LookupError("hunter2")
    error = Failure("flight_failed", "Gone.", cause=cause).error()
    assert error.__cause__ is cause
    assert "hunter2" not in str(error)


def test_an_invalid_request_tells_where_and_not_what() -> None:
    """Locations and messages, as given."""
    error = InvalidRequest(errors=((("body", "content"), "must not be empty"),))
    assert error.errors == ((("body", "content"), "must not be empty"),)


def test_the_hint_when_to_retry_is_kept() -> None:
    """Seconds, as the provider said."""
    assert ProviderRateLimited(retry_after_s=0.0).failure().retry_after_s == 0.0
