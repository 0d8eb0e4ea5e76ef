"""Whether and when work may be tried again: bounded, jittered, and within a budget per provider.

A retry costs money and a start of the pacer, and a provider in trouble gets more of them just when it can take less.
The budget therefore follows the traffic: a share of recent calls, and a floor so that a quiet system may retry at all
(the idea is Finagle's RetryBudget; shares as in Envoy and gRPC A6).

Deliberately absent: which errors are worth it, and sleeping.
"""

from collections import deque

__all__ = ["RetryBudget", "backoff_s"]


def backoff_s(attempt: int, chance: float) -> float:
    """Seconds before attempt `attempt + 1`: full jitter, `chance` (0 to 1) of 0.5 s doubling up to 8 s."""
    return chance * min(8.0, 0.5 * 2.0**attempt)


class RetryBudget:
    """Retries allowed to one provider: a share of the calls of the last minute, and one each ten seconds."""

    def __init__(self, share: float = 0.1, window_s: float = 60.0, floor_every_s: float = 10.0) -> None:
        self._share = share
        self._window_s = window_s
        self._floor_every_s = floor_every_s
        self._calls: deque[float] = deque()
        self._retries: deque[float] = deque()

    def called(self, now_s: float) -> None:
        """Count a first attempt."""
        self._calls.append(now_s)
        self._forget(now_s)

    def spend(self, now_s: float) -> bool:
        """Take one retry out of the budget; False if there is none."""
        self._forget(now_s)
        earned = len(self._retries) < self._share * len(self._calls)
        if not earned and self._retries and now_s - self._retries[-1] < self._floor_every_s:
            return False
        self._retries.append(now_s)
        return True

    def _forget(self, now_s: float) -> None:
        for times in (self._calls, self._retries):
            while times and times[0] <= now_s - self._window_s:
                times.popleft()
