"""Every benchmark, one after the other, then the pages of figures: `python -m bench.run`.

Takes about forty-five minutes on two cores of which nothing else needs either. `--quick` only shows that everything
runs; its figures are thrown away.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench import figures
from bench.fleet import costs, failover, headline, looks, relay, scale, viewers
from bench.http import burst, fanout, memory, passthrough, slow
from bench.record import RESULTS

ROOT = Path(__file__).parents[1]


def core(name: str) -> Callable[[list[str]], None]:
    """A program that measures the core alone; it takes the results' directory as the others do."""

    def run(arguments: list[str]) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--results", type=Path, default=RESULTS)
        parser.add_argument("--times")
        parser.add_argument("--extra")
        options, rest = parser.parse_known_args(arguments)
        out = options.results / f"core-{name}.json"
        command = [
            f"bench/core/{name}.py",
            *rest,
            "--out",
            str(out.relative_to(ROOT) if out.is_relative_to(ROOT) else out),
        ]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        print(out)

    return run


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "burst": burst.main,
    "memory": memory.main,
    "fanout": fanout.main,
    "slow": slow.main,
    "passthrough": passthrough.main,
    "headline": headline.main,
    "viewers": viewers.main,
    "failover": failover.main,
    "costs": costs.main,
    "looks": looks.main,
    "relay": relay.main,
    "coalescer": core("coalescer"),
    "hub": core("hub"),
}
QUICK = {
    "burst": ["--requests", "20", "--provider-ms", "50"],
    "memory": ["--followers", "20", "--call-ms", "200"],
    # Without the rival, whose library is for benchmarks alone.
    "fanout": ["--viewers", "5", "--deltas", "10", "--backlog", "50", "--servers", "bare", "oncewise"],
    "slow": ["--readers", "2", "--silent", "2", "--deltas", "30"],
    # Without the peers, which are installed when they are first asked for.
    "passthrough": ["--connections", "4", "--seconds", "0.2", "--deltas", "3", "--servers", "direct", "oncewise"],
    "headline": ["--requests", "10", "--provider-ms", "50", "--fleets", "2 servers"],
    "viewers": ["--shapes", "40x5", "--turns", "2", "--deltas", "5", "--latency-ms", "500"],
    "failover": ["--kills", "1"],
    "costs": ["--idle-s", "0.5", "--settle-s", "0.5", "--only", "call, 1 follows there"],
    "looks": ["--looks", "1", "--shapes", "2"],
    "relay": ["--logs", "2", "--entries", "100"],
    "coalescer": ["--waiters", "50", "--rounds", "2"],
    "hub": ["--deltas", "20", "--rounds", "1"],
}


def main(argv: list[str] | None = None) -> None:
    """Run the chosen ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=[*PROGRAMS])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, figures thrown away")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        with tempfile.TemporaryDirectory() as directory:
            for name in arguments.only:
                PROGRAMS[name]([*QUICK[name], "--times", "1", "--extra", "0", "--results", directory])
    else:
        for name in arguments.only:
            PROGRAMS[name]([])
        figures.main()
        scale.main()


if __name__ == "__main__":
    main()
