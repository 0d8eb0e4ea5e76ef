"""What servers of one and of several processes say on the terminal."""

import logging

import pytest

from oncewise.cli.start_up import LogLine
from oncewise.core.breaker import BreakerChanged, BreakerState
from oncewise.telemetry.logs import log_event


def test_a_line_says_which_worker_and_with_what_fields(caplog: pytest.LogCaptureFixture) -> None:
    """Which provider is left alone is in the fields; a line without them would help nobody."""
    log_event(BreakerChanged("openai", "gpt 5", BreakerState.OPEN, calls=9, failures=5, open_s=5.0))
    (record,) = caplog.records
    told = "breaker opened provider=openai model='gpt 5' failures=5 calls=9 open_ms=5000"
    assert LogLine(2).format(record) == f"WARNING: worker 2: {told}"
    assert LogLine().format(record) == f"WARNING: {told}"


def test_a_field_cannot_begin_a_line_of_its_own() -> None:
    """A client chooses the names of models."""
    record = logging.makeLogRecord(
        {"levelname": "ERROR", "msg": "failed", "model": "x\nERROR: no", "color_message": "f"}
    )
    assert LogLine().format(record) == r"ERROR: failed model='x\nERROR: no'"
