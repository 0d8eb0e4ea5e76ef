"""Runs histories and collects what they violate."""

import gc
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

from tests.simulation.check import violations
from tests.simulation.fleet import Parts
from tests.simulation.histories import history

__all__ = ["CHUNK", "broken", "chunk_of", "many"]

CHUNK = 250


def broken(seed: int, parts: Parts = Parts(), counts: Counter[str] | None = None) -> list[str]:  # noqa: B008  frozen
    """What the history of a seed violates; what happened in it is added to `counts`."""
    with warnings.catch_warnings():
        # What crashed machines were about to say when they are taken apart, now or when the next seed's are made.
        warnings.filterwarnings("ignore", ".*was never awaited")
        # A machine that crashed leaves no `finally` behind. The collector would run those of tasks to which nothing
        # leads, in the middle of the history and at a time that no seed decides.
        gc.disable()
        try:
            fleet = history(seed, parts)
            found = violations(fleet)
        finally:
            gc.enable()
        if counts is not None:
            counts.update(fleet.happened())
        fleet.tear_down()
        if seed % 100 == 0:
            # Fleets are cycles, and servers that ran in this process may have told the collector to take its time.
            del fleet
            gc.collect()
    return found


def chunk_of(first: int, end: int) -> tuple[list[tuple[int, list[str]]], Counter[str]]:
    """The bad seeds among the next `CHUNK`, and what happened in all; an exception of the simulated code counts."""
    bad, counts = [], Counter[str]()
    for seed in range(first, min(first + CHUNK, end)):
        try:
            found = broken(seed, counts=counts)
        except Exception:  # noqa: BLE001  the seed is what the reader needs
            found = [traceback.format_exc()]
        if found:
            bad.append((seed, found))
    return bad, counts


def many(first: int, end: int, *, jobs: int = 2) -> Iterator[tuple[list[tuple[int, list[str]]], Counter[str]]]:
    """As `chunk_of`, for all seeds from the first one on, in processes of their own.

    New ones: in a process that ran other tests before, the collector and the loops look through what those left.
    """
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(partial(chunk_of, end=end), range(first, end, CHUNK))
