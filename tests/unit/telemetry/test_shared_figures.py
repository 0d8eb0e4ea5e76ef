"""Figures of several workers, added up from their pages."""

import re
from pathlib import Path

from oncewise.core.breaker import BreakerStats
from oncewise.core.coalesce import CoalescerStats
from oncewise.core.pacing import PacerStats
from oncewise.core.stream_hub import HubStats
from oncewise.model import Role
from oncewise.telemetry.prometheus import Prometheus
from oncewise.telemetry.shared_figures import SharedFigures
from tests.unit.telemetry.test_prometheus import figures, record


class Seat:
    """One worker with figures."""

    def __init__(self, folder: Path, seat: str, *, waiters: int = 0, rate_share: float = 1.0) -> None:
        self.shared = SharedFigures(folder, seat)
        self.waiters = waiters
        self.prometheus = Prometheus(
            lambda: CoalescerStats(1, self.waiters, 0, 0),
            lambda: HubStats(0, 0, 0, 0),
            lambda: {"p": (PacerStats(2, 0, 1, rate_share), BreakerStats(0, 0, 0))},
            self.shared,
        )

    def count(self, *roles: Role) -> "Seat":
        for role in roles:
            self.prometheus(record(role, calls=int(role is Role.LEADER)))
        self.prometheus.publish()
        return self

    def die(self) -> None:
        """As a process does: its page stays, its lock is free."""
        self.shared.close()

    @property
    def seen(self) -> dict[str, float]:
        return figures(self.prometheus)


def test_counters_histograms_and_gauges_of_all_workers_add_up(tmp_path: Path):
    """Whoever is asked; a label that only another worker has is there too."""
    here = Seat(tmp_path, "0", waiters=3).count(Role.LEADER, Role.FOLLOWER)
    there = Seat(tmp_path, "1", waiters=4).count(Role.LEADER, Role.REPLAYED)

    for seen in (here.seen, there.seen):
        assert seen['oncewise_requests_total{outcome="ok",surface="threads"}'] == 4
        assert seen['oncewise_coalesce_total{role="leader"}'] == 2
        assert seen['oncewise_coalesce_total{role="follower"}'] == seen['oncewise_coalesce_total{role="replayed"}'] == 1
        assert seen['oncewise_ttft_seconds_bucket{le="+Inf",role="leader"}'] == 2
        assert seen["oncewise_waiters"] == 7
        assert seen["oncewise_live_flights"] == 2


def test_a_page_names_every_family_once(tmp_path: Path):
    """The text stays valid for Prometheus: one TYPE each, no sample twice."""
    for seat in ("0", "1"):
        last = Seat(tmp_path, seat).count(Role.LEADER)
    text = last.prometheus.text().decode()
    types = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    samples = [line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(types) == len(set(types))
    assert len(samples) == len(set(samples))


def test_what_a_dead_worker_counted_stays_and_what_it_held_is_gone(tmp_path: Path):
    """A counter that fell would read as a restart; a gauge that stayed would be a lie."""
    dead = Seat(tmp_path, "0", waiters=5).count(Role.LEADER)
    alive = Seat(tmp_path, "1", waiters=2).count(Role.LEADER)
    dead.die()

    assert alive.seen['oncewise_coalesce_total{role="leader"}'] == 2
    assert alive.seen["oncewise_waiters"] == 2


def test_a_successor_goes_on_from_the_counters_of_its_seat(tmp_path: Path):
    """However often a worker is replaced, no file is added and nothing is counted twice."""
    other = Seat(tmp_path, "1").count(Role.FOLLOWER)
    for _ in range(3):
        Seat(tmp_path, "0", waiters=5).count(Role.LEADER).die()
    last = Seat(tmp_path, "0", waiters=1).count(Role.LEADER)

    for seen in (last.seen, other.seen):
        assert seen['oncewise_coalesce_total{role="leader"}'] == 4
        assert seen["oncewise_waiters"] == 1
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".lock"}
    assert len(list(tmp_path.iterdir())) == 4


def test_a_share_is_not_added_up(tmp_path: Path):
    """Of the part of a rate in use the least is shown; of the time since when, the earliest."""
    first = Seat(tmp_path, "0", rate_share=0.5).count(Role.LEADER)
    created = first.seen['oncewise_coalesce_created{role="leader"}']
    other = Seat(tmp_path, "1", rate_share=1.0).count(Role.LEADER)

    assert other.seen['oncewise_rate_share{provider="p"}'] == 0.5
    assert other.seen['oncewise_queue_length{provider="p"}'] == 4
    assert other.seen['oncewise_coalesce_created{role="leader"}'] == created


def test_a_page_is_written_only_when_something_changed(tmp_path: Path):
    """An idle server writes nothing."""
    seat = Seat(tmp_path, "0").count(Role.LEADER)
    written = (tmp_path / "0.json").stat().st_ino
    seat.prometheus.publish()
    assert (tmp_path / "0.json").stat().st_ino == written
    seat.waiters = 1
    seat.prometheus.publish()
    assert (tmp_path / "0.json").stat().st_ino != written


def test_a_folder_that_is_gone_stops_nobody(tmp_path: Path):
    """It goes when the supervisor was killed, while workers hand back their turns."""
    seat = Seat(tmp_path / "figures", "0").count(Role.LEADER)
    for path in (tmp_path / "figures").iterdir():
        path.unlink()
    (tmp_path / "figures").rmdir()
    seat.count(Role.LEADER)
    assert seat.seen == {}
