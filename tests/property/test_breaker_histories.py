"""Any history of calls beginning and ending, judged by a record of everything that happened: slow and obvious."""

from dataclasses import dataclass, field

from hypothesis import example, given
from hypothesis import strategies as st

from oncewise.core.breaker import Breaker, BreakerState

Op = tuple[str, int]

ops = st.lists(
    st.tuples(
        st.sampled_from(["begin"] * 3 + ["good", "bad", "bad", "bad", "nothing", "pass", "pass"]), st.integers(0, 9)
    ),
    max_size=120,
)
PAUSES_S = (0.0, 0.25, 0.5, 1.0, 2.0, 4.75, 5.0, 10.0, 19.0, 61.0)


@dataclass
class Ended:
    """A call that ended and counted."""

    at_s: float
    good: bool


@dataclass
class Record:
    """What the rules say, worked out from the whole past each time."""

    ended: list[Ended] = field(default_factory=list)
    until_s: float | None = None
    opened: int = 0
    trial: int | None = None
    epoch: int = 0

    def lets_through(self, now_s: float) -> bool:
        return self.until_s is None or (self.trial is None and now_s >= self.until_s)

    def end(self, call: int, epoch: int, now_s: float, good: bool | None) -> None:
        if epoch != self.epoch:
            return
        if self.until_s is not None:
            assert self.trial == call, "only the trial belongs to an open breaker"
            self.trial = None
            if good is True:
                self.until_s, self.opened, self.epoch, self.ended = None, 0, self.epoch + 1, []
            elif good is False:
                self.open(now_s)
        elif good is not None:
            self.ended.append(Ended(now_s, good))
            recent = [ended for ended in self.ended if int(ended.at_s) > int(now_s) - 20]
            failed = sum(not ended.good for ended in recent)
            if not good and failed >= 5 and 2 * failed >= len(recent):
                self.open(now_s)

    def open(self, now_s: float) -> None:
        self.opened += 1
        self.until_s = now_s + min(60.0, 5.0 * 2 ** (self.opened - 1))
        self.epoch += 1


@given(ops)
@example([("begin", 0)] * 6 + [("bad", 0)] * 5 + [("pass", 6), ("begin", 0), ("good", 0), ("good", 0)])
@example([("begin", 0)] * 5 + [("bad", 0)] * 5 + [("pass", 6), ("begin", 0), ("nothing", 0), ("begin", 0), ("bad", 0)])
def test_histories(history: list[Op]) -> None:
    """Every call is let through or refused as the record says; while it is open one call runs at most, the trial."""
    breaker, record = Breaker(), Record()
    running: list[tuple[int, int, int]] = []
    now_s, begun = 1000.0, 0
    for name, n in history:
        if name == "pass":
            now_s += PAUSES_S[n]
        elif name == "begin":
            wait_s = breaker.wait_s(now_s)
            assert (wait_s == 0.0) is record.lets_through(now_s)
            if wait_s > 0:
                assert record.trial is not None or wait_s == record.until_s - now_s
                continue
            begun += 1
            if record.until_s is not None:
                record.trial = begun
            running.append((begun, breaker.begin(), record.epoch))
        elif running:
            call, period, epoch = running.pop(n % len(running))
            good = {"good": True, "bad": False, "nothing": None}[name]
            before = (record.until_s, record.epoch)
            record.end(call, epoch, now_s, good)
            changed = breaker.end(period, now_s, good=good)
            assert changed is ((record.until_s, record.epoch) != before)
        assert (breaker.state(now_s) is BreakerState.CLOSED) is (record.until_s is None)
        assert (breaker.state(now_s) is BreakerState.OPEN) is (
            record.until_s is not None and record.trial is None and now_s < record.until_s
        )
        assert all(breaker.is_current(period) is (epoch == record.epoch) for _, period, epoch in running)


@given(ops)
def test_what_says_nothing_never_opens_it(history: list[Op]) -> None:
    """However many refusals of bad requests and departures there are: it stays closed without a failure."""
    breaker, running, now_s = Breaker(), [], 0.0
    for name, n in history:
        now_s += PAUSES_S[n] if name == "pass" else 0.0
        if name == "begin":
            running.append(breaker.begin())
        elif running and name != "pass":
            breaker.end(running.pop(), now_s, good=True if name == "good" else None)
        assert breaker.wait_s(now_s) == 0.0
