"""How much of a configured rate to use, by what the provider refuses: additive increase, multiplicative decrease.

A provider's limit may be lower than the configured one: it is shared with other programs, or counts what we do not.
Each refusal for the rate (429) halves the share of the rate that is used, each second without one gives 5 % of the
whole back (AIMD, as TCP; Netflix's concurrency-limits advises it for clients). After a refusal nothing starts for as
long as the provider says, or, if it does not say, for 1 s, doubling up to 30 s until a call is accepted again.

Several calls that ran when the limit was met are refused together. That is one event: those that had begun before the
first of them was known halve nothing again.

A share is kept by leaving starts unused, so that whoever books the starts need not know of it, be it another process.

Deliberately absent: clock time (each method is told the time), and waiting.
"""

__all__ = ["Throttle"]

CUT = 0.5
GAIN_PER_S = 0.05
LEAST = 0.05
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


class Throttle:
    """The share of one provider's rate that is used now."""

    def __init__(self) -> None:
        self._share = 1.0
        self._clean_from_s = float("-inf")
        self._known_s = float("-inf")
        self._pause_s = FIRST_PAUSE_S
        self._owed = 0.0

    def share(self, now_s: float) -> float:
        """The part of the rate that is used, above 0.0 to 1.0. It grows once the last pause is over."""
        return min(1.0, self._share + GAIN_PER_S * max(0.0, now_s - self._clean_from_s))

    def refused(self, began_s: float, now_s: float, retry_after_s: float | None) -> float:
        """Take a refusal of a call that began at `began_s`; return for how many seconds nothing must start.

        `retry_after_s` is what the provider says of that, to which nothing is added and from which nothing is taken.
        """
        share, pause_s = self.share(now_s), retry_after_s or 0.0
        if began_s >= self._known_s:
            share = max(LEAST, share * CUT)
            self._known_s = now_s
            if retry_after_s is None:
                pause_s, self._pause_s = self._pause_s, min(self._pause_s * 2, LONGEST_PAUSE_S)
        self._share = share
        self._clean_from_s = max(self._clean_from_s, now_s + pause_s)
        return pause_s

    def accepted(self, began_s: float) -> None:
        """Take an answer to a call that began at `began_s`: the next refusal is the first of its kind again."""
        if began_s >= self._known_s:
            self._pause_s = FIRST_PAUSE_S

    def starts_to_skip(self, now_s: float) -> int:
        """How many starts to leave unused before the next one, so that on average the share is kept."""
        share = self.share(now_s)
        if share >= 1.0:
            self._owed = 0.0
            return 0
        self._owed += 1.0 / share - 1.0
        skipped = int(self._owed)
        self._owed -= skipped
        return skipped
