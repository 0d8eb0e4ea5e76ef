"""The benchmarks run as somebody else would run them, with tiny sizes; their figures are thrown away."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


FLEET = ["headline", "viewers", "failover", "costs", "looks", "relay"]


@pytest.mark.parametrize("program", ["burst", "memory", "fanout", "slow", "passthrough", "coalescer", "hub", *FLEET])
def test_program_measures_and_records(program: str) -> None:
    """Each program starts its servers, measures, checks what came back and writes its results."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.run", "--quick", "--only", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{program}.json" in done.stdout


def test_recorded_figures_make_the_page() -> None:
    """The page in the documentation is what the recorded results make; a hand-typed figure would differ."""
    from bench import figures

    assert figures.PAGE.read_text() == figures.page()
