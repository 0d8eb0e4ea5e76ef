"""The commands that talk to a running server, against one."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import ONCEWISE, environment, oncewise, running, serving


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving("--demo", ONCEWISE_DEMO_LATENCY_MS=600, ONCEWISE_DEMO_RPS=20) as address:
        yield address


def test_a_burst_is_measured_and_judged(url: str) -> None:
    """Table, histogram and verdict on a terminal, exit code 0."""
    result = oncewise("burst", url)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "PASS: 50 requests → 50 answered → 1 provider call → 2 stored messages" in result.stdout
    assert re.search(r"≤ 1 s +█+ 10", result.stdout)


def test_a_burst_of_streams_gives_figures_to_programs(url: str, tmp_path: Path) -> None:
    """JSON alone on standard output, and a page beside it."""
    page = tmp_path / "report.html"
    arguments = ["--stream", "--json", "--html", str(page), "--connections", "50", "--provider", "openai"]
    result = oncewise("burst", url, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads(result.stdout)
    assert (figures["succeeded"], figures["provider_calls"], figures["messages"]) == (50, 1, 2)
    assert figures["roles"] == {"leader": 1, "follower": 49}
    assert 0 < figures["ttft_s"]["p50"] <= figures["latency_s"]["p50"]
    assert "PASS: 50 requests" in page.read_text()


def test_a_report_that_cannot_be_written_does_not_take_the_figures_with_it(url: str, tmp_path: Path) -> None:
    """The burst is paid for; its table comes first, then one line about the file."""
    result = oncewise("burst", url, "--requests", "5", "--html", str(tmp_path / "none" / "report.html"))
    assert result.returncode == 1
    assert "PASS: 5 requests" in result.stdout
    assert re.fullmatch(r"oncewise: [^\n]*No such file[^\n]*\n", result.stderr)


def test_a_burst_that_needs_more_calls_fails() -> None:
    """Without replays the later requests cost calls; the exit code says so."""
    with serving("--demo", ONCEWISE_DEMO_LATENCY_MS=20, ONCEWISE_DEMO_RPS=100, ONCEWISE_REPLAY_WINDOW_S=0) as url:
        result = oncewise("burst", url, "--requests", "20", "--connections", "10")
    assert result.returncode == 1
    assert "FAIL: 20 requests → 20 answered → 2 provider calls → 4 stored messages" in result.stdout


def test_a_burst_of_failures_fails(url: str) -> None:
    """An error code is counted by its name."""
    result = oncewise("burst", url, "--model", "demo-400", "--requests", "10")
    assert result.returncode == 1
    assert "0 answered" in result.stdout
    assert "x provider_error" in result.stdout


def test_first_tokens_and_stops_are_measured(url: str) -> None:
    """The first token comes after two fifths of the answer's time; a stop takes milliseconds."""
    result = oncewise("ttft", url, "--requests", "3", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads(result.stdout)
    assert 0.2 < figures["ttft_s"]["p50"] < 0.6
    assert figures["cancel_s"]["p95"] < 0.3


def test_slow_first_tokens_miss_the_target() -> None:
    """The verdict is the exit code."""
    with serving("--demo", ONCEWISE_DEMO_LATENCY_MS=4500) as url:
        result = oncewise("ttft", url, "--requests", "1")
    assert result.returncode == 1
    assert "✗ First token" in result.stdout
    assert "✓ Stop" in result.stdout


def test_a_thread_can_be_taken_elsewhere(url: str, tmp_path: Path) -> None:
    """What is exported is imported as the same conversation."""
    burst = json.loads(oncewise("burst", url, "--requests", "1", "--json").stdout)
    file = tmp_path / "thread.jsonl"
    exported = oncewise("threads", "export", burst["threads"][0], "--url", url).stdout
    file.write_text(exported)
    imported = oncewise("threads", "import", str(file), "--url", url)
    assert imported.returncode == 0, imported.stderr
    again = oncewise("threads", "export", imported.stdout.strip(), "--url", url).stdout
    told = [[json.loads(line)[name] for name in ("role", "content")] for line in exported.splitlines()]
    assert [role for role, _text in told] == ["user", "assistant"]
    assert [[json.loads(line)[name] for name in ("role", "content")] for line in again.splitlines()] == told


def test_a_thread_that_is_not_there_is_said_plainly(url: str) -> None:
    """Another tenant's thread looks the same."""
    burst = json.loads(oncewise("burst", url, "--requests", "1", "--json").stdout)
    for arguments in (["nothing"], [burst["threads"][0], "--org", "other"]):
        result = oncewise("threads", "export", *arguments, "--url", url)
        assert result.returncode == 1
        assert "404" in result.stderr
        assert "Traceback" not in result.stderr


def test_the_banner_is_short_and_its_request_works(tmp_path: Path) -> None:
    """At most ten lines; the last one can be copied."""
    env = environment(tmp_path)
    with running((*ONCEWISE, "serve", "--port", "0"), env) as server:
        command = server.wait_for(r"Try +(curl .*)")[1]
        assert len(server.output) <= 10
        assert str(tmp_path / "data" / "oncewise" / "oncewise.db") in "".join(server.output)
        answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=20, check=True)
        assert json.loads(answer.stdout)["thread_id"]
        assert server.stop()[0] == 0


def test_a_misspelt_variable_is_reported(tmp_path: Path) -> None:
    """The server starts, and says what has no effect."""
    with running((*ONCEWISE, "serve", "--port", "0"), environment(tmp_path, ONCEWISE_LEASES="3")) as server:
        server.wait_for(r"warning: ONCEWISE_LEASES is not a setting; did you mean ONCEWISE_LEASE_S\?")
        server.wait_for("is ready")
