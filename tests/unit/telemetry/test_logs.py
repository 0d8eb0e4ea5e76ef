"""What the log says of events."""

import logging

import pytest

from oncewise.core.breaker import BreakerChanged, BreakerState
from oncewise.core.coalesce import FlightLanded
from oncewise.core.keys import request_key
from oncewise.ports import CoordinationChanged
from oncewise.telemetry.logs import log_event

OPENED = BreakerChanged("acme", "m1", BreakerState.OPEN, failures=5, calls=6, open_s=5.0)
CLOSED = BreakerChanged("acme", "m1", BreakerState.CLOSED, failures=0, calls=0, open_s=0.0)


@pytest.mark.parametrize(
    ("event", "level", "action", "open_ms"),
    [(OPENED, logging.WARNING, "breaker opened", 5000), (CLOSED, logging.INFO, "breaker closed", 0)],
)
def test_a_breaker_is_told_of(
    caplog: pytest.LogCaptureFixture, event: BreakerChanged, level: int, action: str, open_ms: int
) -> None:
    """Opening is a warning, since requests are refused from then on."""
    with caplog.at_level(logging.DEBUG, "oncewise"):
        log_event(event)
    (line,) = caplog.records
    assert (line.levelno, line.getMessage()) == (level, action)
    assert (line.provider, line.model, line.failures, line.open_ms) == ("acme", "m1", event.failures, open_ms)


def test_a_flight_is_told_of_without_its_key(caplog: pytest.LogCaptureFixture) -> None:
    """A part of the digest is enough to correlate."""
    key = request_key("tenant", "turn", "a secret")
    with caplog.at_level(logging.DEBUG, "oncewise"):
        log_event(FlightLanded(key, 3, abandoned=False, duration_s=0.5, code="provider_error"))
        log_event(object())
    (line,) = caplog.records
    assert (line.levelno, line.joined, line.code) == (logging.INFO, 3, "provider_error")
    assert "secret" not in str(vars(line))


def test_redis_is_told_of_when_it_goes_and_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    """Both are worth a look: an operator who sees the first waits for the second."""
    with caplog.at_level(logging.DEBUG, "oncewise"):
        log_event(CoordinationChanged(up=False, reason="ConnectionError"))
        log_event(CoordinationChanged(up=True))
    assert [line.levelno for line in caplog.records] == [logging.WARNING, logging.WARNING]
    gone, back = (line.getMessage() for line in caplog.records)
    assert "ConnectionError" in gone
    assert back == "Redis answers again"
