"""When a provider's model is better left alone: because it fails, or because it said itself when to come again.

A breaker looks at how the calls of the last 20 s ended. Once five of them failed, and that was half of all, it *opens*:
for 5 s nobody calls. Then it is *half open*: one call is let through as a trial. If that ends well the breaker closes;
if it fails, the breaker opens for twice as long, up to a minute (the circuit breaker of Nygard's "Release It!").

What a request brought about itself, a refusal of its form or its own leaving, is neither a success nor a failure: no
tenant can shut the others out by asking badly. A trial that ends like that says nothing; the next call is the trial.

Calls that began before the breaker last opened or closed say nothing of the provider as it is now. So each call carries
the number of the period in which it began, and what it says counts in that one only.

Each breaker changes in `begin` and `end` only; `Breakers` keeps those of one provider, as many as it has room for. All
is O(1), but for `Breakers.stats`.

Deliberately absent: clock time (each method is told the time), which errors are failures, and other processes, which
each find out by five failures of their own.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from oncewise.errors import Failure, OncewiseError, ProviderRateLimited, ProviderUnavailable

__all__ = ["Breaker", "BreakerChanged", "BreakerRules", "BreakerState", "BreakerStats", "Breakers"]

TRIAL_RUNS_S = 1.0
"""When to come again while a trial runs: nobody knows how long it takes."""


class BreakerState(StrEnum):
    """Whether calls are let through: all, none, or one as a trial."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class BreakerRules:
    """When a breaker opens, and for how long.

    Attributes:
        failures: So many calls must have failed.
        share: And so large a part of all that ended well or failed.
        window_s: Within so many seconds, counted in whole ones.
        open_s: How long it is open the first time; each failed trial doubles that.
        longest_s: Up to this.
    """

    failures: int = 5
    share: float = 0.5
    window_s: int = 20
    open_s: float = 5.0
    longest_s: float = 60.0


@dataclass(frozen=True, slots=True)
class BreakerChanged:
    """A breaker opened or closed.

    Attributes:
        failures: Failed calls that opened it; 0 when it closes.
        calls: All calls that counted.
        open_s: Seconds for which nobody calls now; 0.0 when it closes.
    """

    provider: str
    model: str
    state: BreakerState
    failures: int
    calls: int
    open_s: float


@dataclass(frozen=True, slots=True)
class BreakerStats:
    """Models of one provider that are not called freely.

    Attributes:
        held: Refused until the time the provider named.
    """

    open: int
    half_open: int
    held: int


class _Tally:
    """Calls that ended well or failed within the last seconds.

    Counted by whole seconds: at thousands of calls a second, a time for each would be most of the memory.
    """

    __slots__ = ("_seconds", "_window_s", "all", "failed")

    def __init__(self, window_s: int) -> None:
        self.all = 0
        self.failed = 0
        self._window_s = window_s
        self._seconds: deque[list[int]] = deque()

    def add(self, now_s: float, *, good: bool) -> None:
        second = int(now_s)
        while self._seconds and self._seconds[0][0] <= second - self._window_s:
            _, ended, failed = self._seconds.popleft()
            self.all -= ended
            self.failed -= failed
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append([second, 0, 0])
        self.all += 1
        self.failed += not good
        self._seconds[-1][1] += 1
        self._seconds[-1][2] += not good

    def clear(self) -> None:
        self.all = self.failed = 0
        self._seconds.clear()


class Breaker:
    """The breaker of one model. Ask `wait_s`, then `begin`, and `end` for whatever has begun."""

    __slots__ = ("_open_s", "_period", "_rules", "_tally", "_trial", "_until_s")

    def __init__(self, rules: BreakerRules = BreakerRules()) -> None:
        self._rules = rules
        self._tally = _Tally(rules.window_s)
        self._period = 0
        self._until_s: float | None = None
        self._open_s = 0.0
        self._trial = False

    def state(self, now_s: float) -> BreakerState:
        """What it is now."""
        if self._until_s is None:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if self._trial or now_s >= self._until_s else BreakerState.OPEN

    def wait_s(self, now_s: float) -> float:
        """Seconds until a call may be let through, as far as that is known; 0.0: now."""
        if self._until_s is None:
            return 0.0
        return TRIAL_RUNS_S if self._trial else max(0.0, self._until_s - now_s)

    def begin(self) -> int:
        """Let a call through that need not wait; return the period it belongs to, for `end`."""
        self._trial = self._until_s is not None
        return self._period

    def is_current(self, period: int) -> bool:
        """Whether the breaker has neither opened nor closed since a call began."""
        return period == self._period

    def end(self, period: int, now_s: float, *, good: bool | None) -> bool:
        """Count how a call ended: well, badly, or (None) in a way that says nothing of the provider.

        Returns whether the breaker opened or closed.
        """
        if period != self._period:
            return False
        if self._until_s is not None:
            return self._end_trial(now_s, good=good)
        if good is None:
            return False
        self._tally.add(now_s, good=good)
        rules, tally = self._rules, self._tally
        if good or tally.failed < rules.failures or tally.failed < rules.share * tally.all:
            return False
        self._open(now_s, rules.open_s)
        return True

    def _end_trial(self, now_s: float, *, good: bool | None) -> bool:
        self._trial = False
        if good is None:
            return False
        if good:
            self._until_s = None
            self._period += 1
            self._tally.clear()
        else:
            self._open(now_s, min(self._open_s * 2, self._rules.longest_s))
        return True

    def _open(self, now_s: float, open_s: float) -> None:
        self._open_s = open_s
        self._until_s = now_s + open_s
        self._period += 1

    def changed(self, provider: str, model: str) -> BreakerChanged:
        """What to tell of the change that `end` has just made."""
        if self._until_s is None:
            return BreakerChanged(provider, model, BreakerState.CLOSED, 0, 0, 0.0)
        tally = self._tally
        return BreakerChanged(provider, model, BreakerState.OPEN, tally.failed, tally.all, self._open_s)


def _tell_nobody(_event: object) -> None:
    return None


class Breakers:
    """The breakers of one provider, one per model. Made once per provider, by the composition root.

    Args:
        provider: Its name, for what is told.
        max_models: Models that are kept; the one least recently used is forgotten for another. Clients name models, so
            there is no end of them.
        listener: Called with a `BreakerChanged` whenever one opens or closes.
    """

    def __init__(
        self,
        provider: str = "The provider",
        *,
        rules: BreakerRules = BreakerRules(),
        max_models: int = 256,
        listener: Callable[[object], None] = _tell_nobody,
    ) -> None:
        self._provider = provider
        self._rules = rules
        self._max_models = max_models
        self._listener = listener
        self._breakers: OrderedDict[str, Breaker] = OrderedDict()
        self._held: OrderedDict[str, float] = OrderedDict()

    def wait_s(self, model: str, now_s: float) -> float:
        """Seconds until a call of a model may be let through, as far as that is known; 0.0: now."""
        breaker = self._breakers.get(model)
        held_s = self._held.get(model, now_s) - now_s
        return max(held_s, 0.0 if breaker is None else breaker.wait_s(now_s))

    def begin(self, model: str, now_s: float) -> int:
        """Let a call of a model begin; return what `end` and `check` need. Everything that has begun must end.

        Raises:
            ProviderUnavailable: the model fails; `retry_after_s` says when the next trial may be.
            ProviderRateLimited: the provider wants no call of it before `retry_after_s`.
        """
        if self._held:
            self._check_held(model, now_s)
        breaker = self._breakers.get(model)
        if breaker is None:
            return 0
        wait_s = breaker.wait_s(now_s)
        if wait_s > 0:
            raise self._refusal(wait_s)
        return breaker.begin()

    def check(self, model: str, period: int, now_s: float) -> None:
        """Refuse a call that has begun but was not made yet, if the model was found to fail meanwhile.

        Raises:
            ProviderUnavailable, ProviderRateLimited: as `begin`.
        """
        if self._held:
            self._check_held(model, now_s)
        breaker = self._breakers.get(model)
        if breaker is not None and not breaker.is_current(period):
            wait_s = breaker.wait_s(now_s)
            if wait_s > 0:
                raise self._refusal(wait_s)

    def end(self, model: str, period: int, now_s: float, *, good: bool | None) -> Failure | None:
        """Count how a call that has begun ended; see `Breaker.end`.

        Returns the refusal of everybody who waits to call this model, if the breaker opened.
        """
        breaker = self._breakers.get(model)
        if breaker is None:
            if good is None:
                return None
            breaker = self._new(model)
        self._breakers.move_to_end(model)
        if not breaker.end(period, now_s, good=good):
            return None
        changed = breaker.changed(self._provider, model)
        self._listener(changed)
        return self._refusal(changed.open_s).failure() if changed.state is BreakerState.OPEN else None

    def hold(self, model: str, now_s: float, for_s: float) -> Failure:
        """Refuse calls of a model for some seconds, since its provider said so; return that refusal."""
        while self._held and next(iter(self._held.values())) <= now_s:
            self._held.popitem(last=False)
        self._held[model] = max(self._held.pop(model, now_s), now_s + for_s)
        if len(self._held) > self._max_models:
            self._held.popitem(last=False)
        return self._limited(self._held.get(model, now_s) - now_s).failure()

    def stats(self, now_s: float) -> BreakerStats:
        """What is held back now."""
        states = [breaker.state(now_s) for breaker in self._breakers.values()]
        held = sum(until_s > now_s for until_s in self._held.values())
        return BreakerStats(states.count(BreakerState.OPEN), states.count(BreakerState.HALF_OPEN), held)

    def _check_held(self, model: str, now_s: float) -> None:
        left_s = self._held.get(model, now_s) - now_s
        if left_s > 0:
            raise self._limited(left_s)
        self._held.pop(model, None)

    def _new(self, model: str) -> Breaker:
        breaker = self._breakers[model] = Breaker(self._rules)
        if len(self._breakers) > self._max_models:
            self._breakers.popitem(last=False)
        return breaker

    def _refusal(self, wait_s: float) -> OncewiseError:
        detail = f"{self._provider} has been failing with this model; it is tried again in a moment."
        return ProviderUnavailable(detail, retry_after_s=wait_s)

    def _limited(self, left_s: float) -> OncewiseError:
        detail = f"{self._provider} takes no calls of this model for now: its rate limit is reached."
        return ProviderRateLimited(detail, retry_after_s=left_s)
