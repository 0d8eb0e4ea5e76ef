"""Figures of several workers added up: each writes its own to a file, whoever is asked reads them all.

A worker writes four times a second, in one replacement of its file, so that a reader finds a whole one. While it lives
it holds a lock, as owners of turns do; of a worker that died the counters still count, and what it held is gone. Its
successor goes on from its counters: a sum that fell would look to Prometheus like a restart of all.

The client library has a mode for this too. It takes no collectors that are read at the scrape, adds gauges that are no
sums, and leaves files for every process that ever was (docs/decisions/0029).

Deliberately absent: which figures there are.
"""

import copy
import fcntl
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client.core import Metric

__all__ = ["SharedFigures"]

Family = dict[str, Any]
"""A family of samples as JSON: name, text, kind, and the values by sample name and labels."""

_PASSING = ("gauge", "unknown")
_LEAST = ("oncewise_rate_share", "_created")
"""Families of which the least value stands for all: a sum would mean nothing."""


def _family(metric: Metric) -> Family:
    samples = [[sample.name, sample.labels, sample.value] for sample in metric.samples]
    return {"name": metric.name, "text": metric.documentation, "kind": metric.type, "samples": samples}


def _metric(family: Family) -> Metric:
    metric = Metric(family["name"], family["text"], family["kind"])
    for name, labels, value in family["samples"]:
        metric.add_sample(name, labels, value)
    return metric


def _merged(pages: Iterable[Iterable[Family]]) -> list[Family]:
    """Families of the same name as one, in the order of their first appearance. The pages are used up."""
    families: dict[str, Family] = {}
    known: dict[tuple[str, ...], list[Any]] = {}
    for family in (family for page in pages for family in page):
        whole = families.setdefault(family["name"], family)
        for sample in family["samples"]:
            name, labels, value = sample
            first = known.setdefault((name, *labels.values()), sample)
            if first is not sample:
                first[2] = min(first[2], value) if name.endswith(_LEAST) else first[2] + value
            elif whole is not family:
                whole["samples"].append(sample)
    return list(families.values())


class SharedFigures:
    """One worker's page among those of all, from `__init__` to `close`.

    Args:
        folder: Private to the workers of one server; made if it is missing.
        seat: Which worker this is. One process at a time has a seat; the next one there goes on from its counters.
    """

    def __init__(self, folder: Path, seat: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._page = folder / f"{seat}.json"
        self._lock = os.open(folder / f"{seat}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._before = _lasting(_read(self._page))
        self._written: list[Family] | None = None
        # What a predecessor held would seem to be held by this one.
        self._write(copy.deepcopy(self._before))

    def publish(self, collect: Callable[[], Iterable[Metric]]) -> None:
        """Write this worker's figures for the others, if any changed."""
        page = [_family(metric) for metric in collect()]
        if self._before:
            page = _merged([page, copy.deepcopy(self._before)])
        self._write(page)

    def _write(self, page: list[Family]) -> None:
        if page == self._written:
            return
        draft = self._page.with_suffix(".draft")
        # A full disk, or the folder of a server that was killed, is no reason to stop serving.
        with suppress(OSError):
            draft.write_text(json.dumps(page))
            draft.replace(self._page)
            self._written = page

    def collect(self) -> list[Metric]:
        """The figures of all workers, this one's as of its last `publish`."""
        pages = (self._living_part(path) for path in sorted(self._folder.glob("*.json")))
        return [_metric(family) for family in _merged(pages)]

    def _living_part(self, path: Path) -> list[Family]:
        page = _read(path)
        return page if path == self._page or _is_held(path.with_suffix(".lock")) else _lasting(page)

    def close(self) -> None:
        """Give the seat up; the counters stay."""
        os.close(self._lock)


def _read(path: Path) -> list[Family]:
    try:
        page: list[Family] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    return page


def _lasting(page: list[Family]) -> list[Family]:
    """What a dead worker leaves: what it counted, not what it held."""
    return [family for family in page if family["kind"] not in _PASSING]


def _is_held(lock: Path) -> bool:
    file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        # Shared: several may ask at once, and none must take another for the owner.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(file)
