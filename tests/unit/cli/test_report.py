"""What a burst's figures are judged and shown as."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from oncewise.cli.load import Answer, Burst, BurstResult
from oncewise.cli.report import as_html, as_json, burst_promises, milliseconds, print_burst, verdict

ANSWERS = (
    Answer(200, None, "leader", 5.0, digest="d"),
    Answer(200, None, "follower", 5.0, digest="d"),
    Answer(200, None, "replayed", 0.002, digest="d"),
)
GOOD = BurstResult(Burst(["t"], {}, requests=3, connections=2), ANSWERS, 5.0, provider_calls=1, messages=2, shared=0)


def test_a_good_burst_keeps_every_promise() -> None:
    """All answered, one call, one pair, one answer."""
    assert GOOD.as_promised
    assert all(promise.kept for promise in burst_promises(GOOD))
    assert verdict(GOOD) == "PASS: 3 requests → 3 answered → 1 provider call → 2 stored messages"


@pytest.mark.parametrize(
    "result",
    [
        replace(GOOD, answers=(*ANSWERS[:2], Answer(503, "overloaded", "none", 1.0))),
        replace(GOOD, answers=ANSWERS[:2]),
        replace(GOOD, provider_calls=2),
        replace(GOOD, provider_calls=0),
        replace(GOOD, messages=4),
        replace(GOOD, answers=(*ANSWERS[:2], replace(ANSWERS[2], digest="other"))),
    ],
)
def test_each_deviation_is_a_failure(result: BurstResult) -> None:
    """A failed or missing request, a second call or none, a second pair, a different answer."""
    assert not result.as_promised
    assert not all(promise.kept for promise in burst_promises(result))
    assert verdict(result).startswith("FAIL")


def test_several_threads_store_a_pair_each() -> None:
    """One call may serve many threads; each has its own stored answer."""
    answers = tuple(replace(ANSWERS[0], digest=str(number)) for number in range(3))
    result = replace(GOOD, burst=Burst(["a", "b", "c"], {}, 3, 3), answers=answers, messages=6, shared=2)
    assert result.as_promised


def test_the_figures_are_the_same_for_people_and_programs() -> None:
    """JSON has the numbers, the terminal and the page show them."""
    document = as_json(GOOD)
    assert document["roles"] == {"leader": 1, "follower": 1, "replayed": 1}
    assert document["latency_s"] == {"p50": 5.0, "p95": 5.0, "p99": 5.0, "max": 5.0}
    assert document["as_promised"] is True
    out = io.StringIO()
    print_burst(Console(file=out, width=100), GOOD)
    shown = out.getvalue()
    assert "1 / 1 / 1" in shown
    assert "≤ 5 s" in shown
    assert verdict(GOOD) in shown


def test_a_page_needs_nothing_else_and_escapes_what_it_shows() -> None:
    """Error names come from the server; the page has neither script nor another host."""
    hostile = replace(GOOD, answers=(Answer(500, "<script>x</script>", "none", 1.0),))
    page = as_html(hostile)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (0.0021, "2.1 ms"), (0.5, "500 ms"), (1.0, "1 s"), (5.0123, "5.01 s")]
)
def test_durations_read_well(seconds: float | None, text: str) -> None:
    """Three digits and a unit."""
    assert milliseconds(seconds) == text
