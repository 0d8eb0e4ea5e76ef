"""The table of statuses, and problems on the wire."""

import json

import pytest

from oncewise import errors
from oncewise.api.errors import STATUS, problem_body, problem_headers, status_of
from oncewise.errors import InvalidRequest, MissingOrg, NotFound, OncewiseError, Overloaded, ProviderError, QueueFull


def classes():
    return [getattr(errors, name) for name in errors.__all__ if name not in ("Failure", "OncewiseError")]


def test_every_error_has_one_status_and_no_status_is_left_over():
    """A new error without a status would be a 500 at run time."""
    assert {error.code for error in classes()} == set(STATUS)
    assert len({error.code for error in classes()}) == len(classes())


def test_the_status_of_an_error_says_whether_it_is_ours_or_the_clients():
    """Retryable errors are never 400, and permanent ones never 503."""
    for error in classes():
        status = STATUS[error.code]
        assert 400 <= status <= 599
        assert not (error.retryable and status in (400, 401, 403, 404, 413, 415, 422))
        assert not (not error.retryable and status == 503)


def test_a_problem_has_the_fields_of_the_contract():
    """And `errors` for 422 only."""
    assert json.loads(problem_body(NotFound(), "r-1")) == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "There is no such resource.",
        "code": "not_found",
        "retryable": False,
        "request_id": "r-1",
    }
    invalid = InvalidRequest(errors=((("body", "stop", 0), "No."),))
    assert json.loads(problem_body(invalid, "r"))["errors"] == [{"loc": ["body", "stop", 0], "msg": "No."}]
    assert json.loads(problem_body(errors.UnknownProvider(), "r"))["errors"] == []


@pytest.mark.parametrize(("retry_after_s", "sent"), [(None, b"1"), (0.0, b"1"), (0.2, b"1"), (2.01, b"3"), (7, b"7")])
def test_retry_after_is_whole_seconds_rounded_up(retry_after_s, sent):
    """A client that waits as told is not refused again."""
    for error in (QueueFull(retry_after_s=retry_after_s), Overloaded(retry_after_s=retry_after_s)):
        assert (b"retry-after", sent) in problem_headers(error)


def test_other_statuses_carry_no_retry_after():
    """A 401 says which credentials would do."""
    assert not any(name == b"retry-after" for name, _ in problem_headers(ProviderError(retry_after_s=3)))
    assert (b"www-authenticate", b'Bearer realm="oncewise"') in problem_headers(MissingOrg())


def test_a_refusal_of_the_provider_keeps_its_own_word_on_retries():
    """The class is retryable, this error is not."""
    error: OncewiseError = ProviderError(retryable=False).failure().error()

    assert status_of(error) == 502
    assert json.loads(problem_body(error, "r"))["retryable"] is False
