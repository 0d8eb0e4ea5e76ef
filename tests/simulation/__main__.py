"""Histories by the thousand: `python -m tests.simulation --seeds 50000`. Prints what was violated, with its seed."""

import argparse
import time
from collections import Counter

from tests.simulation.run import many

__all__ = ["main"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=50_000, help="how many histories")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    asked = parser.parse_args()
    began_s = time.monotonic()
    bad, counts = 0, Counter[str]()
    for found, happened in many(asked.first, asked.first + asked.seeds, jobs=asked.jobs):
        counts += happened
        for seed, broken in found:
            bad += 1
            print(f"seed {seed}: " + "; ".join(broken))
    print(", ".join(f"{what} {times:,}" for what, times in sorted(counts.items())))
    print(f"{asked.seeds} seeds in {time.monotonic() - began_s:.1f} s, {bad} with violations")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
