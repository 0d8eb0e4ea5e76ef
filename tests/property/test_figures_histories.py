"""Any history of workers that count, publish, die and are replaced: the sums are those of the model, and never fall."""

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge

from oncewise.telemetry.shared_figures import SharedFigures

SEATS = ("0", "1", "2")
steps = st.lists(
    st.tuples(
        st.sampled_from(["count", "hold", "publish", "publish", "die", "start", "start"]), st.sampled_from(SEATS)
    ),
    max_size=40,
)


class Worker:
    def __init__(self, folder: Path, seat: str) -> None:
        self.shared = SharedFigures(folder, seat)
        self.registry = CollectorRegistry()
        self.counter = Counter("done", "Done.", ["seat"], registry=self.registry)
        self.total = Counter("all_done", "All done.", registry=self.registry)
        self.held = Gauge("held", "Held.", registry=self.registry)
        self.seat = seat

    def count(self) -> None:
        self.counter.labels(self.seat).inc()
        self.total.inc()

    def publish(self) -> None:
        self.shared.publish(self.registry.collect)


# A successor that has not published yet is alive, but holds nothing of what its predecessor held.
@example([("start", "1"), ("hold", "1"), ("publish", "1"), ("die", "1"), ("start", "1")])
@given(steps)
def test_sums_are_those_of_the_model(history: list[tuple[str, str]]) -> None:
    """What was published counts for ever; what is held counts while its worker lives."""
    with TemporaryDirectory() as folder:
        living: dict[str, Worker] = {}
        counted = dict.fromkeys(SEATS, 0)
        published = dict.fromkeys(SEATS, 0)
        held: dict[str, int] = {}
        last_total = 0.0
        for step, seat in [*history, ("start", "0"), ("publish", "0")]:
            worker = living.get(seat)
            if step == "start" and worker is None:
                living[seat] = Worker(Path(folder), seat)
                # What its predecessor counted and did not publish is lost with it.
                counted[seat] = published[seat]
            elif worker is None:
                continue
            elif step == "count":
                worker.count()
                counted[seat] += 1
            elif step == "hold":
                worker.held.inc()
            elif step == "publish":
                worker.publish()
                published[seat] = counted[seat]
                held[seat] = int(worker.held._value.get())
                seen = {
                    (sample.name, sample.labels.get("seat")): sample.value
                    for metric in worker.shared.collect()
                    for sample in metric.samples
                }
                total = seen["all_done_total", None]
                assert total == sum(published.values()) >= last_total
                last_total = total
                assert seen["held", None] == sum(held.values())
                for each, value in published.items():
                    assert seen.get(("done_total", each), 0) == value
            elif step == "die":
                living.pop(seat).shared.close()
                held.pop(seat, None)
        for worker in living.values():
            worker.shared.close()
