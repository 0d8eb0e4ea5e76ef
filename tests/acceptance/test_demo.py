"""`oncewise demo` as `make demo` runs it."""

import re
import signal
import socket
import time

import pytest

from tests.support.commands import ONCEWISE, environment, oncewise, running

VERDICT = r"PASS: 120 requests, 3 provider calls"


def test_every_promise_is_kept_and_the_demo_ends_when_asked() -> None:
    """Three rounds against a real server: every line of the verdict holds, exit code 0."""
    result = oncewise("demo", "--once", "--port", "0", ONCEWISE_DEMO_LATENCY_MS=1500)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(VERDICT, result.stdout)
    assert "✗" not in result.stdout
    assert result.stdout.count("✓") == 15
    assert re.search(r"50 over 10 connections +50/50 +1 +2 +1 +49 ", result.stdout)
    assert re.search(r"50 over 50 connections +50/50 +1 +2 +1 +49 ", result.stdout)
    assert re.search(r"20 threads, one prompt +20/20 +1 +40 +1 +19 ", result.stdout)
    assert re.search(r"p95 is at most 1\.\d\d times the 1\.5 s that the provider takes", result.stdout)
    assert result.stderr == ""


def test_a_broken_promise_is_shown_and_is_the_exit_code() -> None:
    """Without the replay window the requests that come after the first answer cost calls of their own."""
    result = oncewise("demo", "--once", "--port", "0", ONCEWISE_DEMO_LATENCY_MS=200, ONCEWISE_REPLAY_WINDOW_S=0)
    assert result.returncode == 1
    assert "✗ 5 provider calls" in result.stdout
    assert "FAIL: 120 requests" in result.stdout


def test_a_taken_default_port_is_replaced_and_said() -> None:
    """Whoever has something on port 8000 can still see the demo."""
    try:
        taken = socket.create_server(("127.0.0.1", 8000))
    except OSError:
        taken = socket.socket()  # somebody else has it, which serves as well
    with taken:
        result = oncewise("demo", "--once", ONCEWISE_DEMO_LATENCY_MS=50, ONCEWISE_DEMO_RPS=100)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"Port 8000 is taken; this demo uses http://127\.0\.0\.1:\d+\.", result.stdout)


def test_a_port_that_was_asked_for_is_not_replaced() -> None:
    """Somebody who names a port relies on it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = oncewise("demo", "--once", ONCEWISE_PORT=taken.getsockname()[1])
    assert result.returncode == 1
    assert "is taken" in result.stderr


@pytest.mark.parametrize(
    ("last_line", "exit_code"), [(r"takes 60 s per answer", 130), (r"oncewise burst http", 0)], ids=["during", "after"]
)
def test_ctrl_c_ends_everything_at_once(last_line: str, exit_code: int) -> None:
    """In the middle of a call of a minute, and after the verdict, it takes less than a second."""
    times_s = []
    for _attempt in range(3):
        # The best of three, less what the machine now needs for a command that does nothing.
        began_s = time.monotonic()
        oncewise("--version")
        idle_s = time.monotonic() - began_s
        latency_ms = 60_000 if exit_code else 50
        env = environment(ONCEWISE_DEMO_LATENCY_MS=latency_ms, ONCEWISE_DEMO_RPS=100)
        with running((*ONCEWISE, "demo", "--port", "0"), env) as demo:
            demo.wait_for(last_line)
            # The line is printed just before the first request is sent; a little later a call is under way.
            time.sleep(0.3)
            status, took_s = demo.stop()
        assert status == exit_code
        assert "Traceback" not in "".join(demo.output)
        times_s.append(took_s - idle_s)
        if times_s[-1] < 1.0:
            return
    raise AssertionError(times_s)


def test_the_server_of_the_demo_stays_up_after_the_verdict() -> None:
    """Until Ctrl-C, and its last lines say what to do with it."""
    with running(
        (*ONCEWISE, "demo", "--port", "0"), environment(ONCEWISE_DEMO_LATENCY_MS=50, ONCEWISE_DEMO_RPS=100)
    ) as demo:
        demo.wait_for(VERDICT)
        url = demo.wait_for(r"oncewise burst (http\S+)")[1]
        result = oncewise("burst", url, "--requests", "5")
        assert result.returncode == 0
        assert demo.stop(signal.SIGTERM)[0] == 0
