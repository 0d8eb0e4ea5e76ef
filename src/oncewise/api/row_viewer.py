"""A stream read from a turn's row instead of its log.

Used where no log is in this process: the turn ended a while ago, or another process leads it. A final row is one
delta and the terminal event. Of a running turn the row is read again every second; it holds the partial text as of
the last heartbeat.

Deliberately absent: sockets, and starting anything. Watching never makes a provider call.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from oncewise.api.answers import terminal_position, turn_text
from oncewise.core.stream_hub import Encoder, Position
from oncewise.errors import StorageUnavailable
from oncewise.model import StoredTurn, TurnState
from oncewise.service.turn_outcomes import done_event, error_event, failure_of

__all__ = ["RowViewer"]

POLL_S = 1.0


class RowViewer:
    """Implements `oncewise.api.sse.Source` over a row.

    Attributes:
        from_start: The position asked for is unknown, so everything is shown again.
        ended: The terminal event was taken.
    """

    def __init__(
        self,
        turn: StoredTurn,
        read: Callable[[], Awaitable[StoredTurn]],
        encoder: Encoder,
        after: Position | None = None,
    ) -> None:
        self.from_start = False
        self.ended = False
        self._turn = turn
        self._read = read
        self._encoder = encoder
        self._epoch = turn.epoch
        self._chars = 0
        self._shows_older = False
        self._closed = asyncio.Event()
        if after is not None:
            self._seek(after)

    def _seek(self, after: Position) -> None:
        turn = self._turn
        if turn.state.final and after == terminal_position(turn):
            self.ended = True
        elif 0 < after.epoch < turn.epoch:
            self._shows_older = True
        elif not turn.state.final and after == Position(turn.epoch, turn.partial_seq):
            self._chars = len(turn.partial)
        else:
            # A row does not tell where in its text an earlier delta ended.
            self.from_start = True

    def take(self) -> bytes:
        """What the row has and the client does not."""
        turn, parts = self._turn, []
        if turn.epoch != self._epoch:
            self._shows_older = self._chars > 0
            self._epoch, self._chars = turn.epoch, 0
        if self._shows_older:
            reset = {"epoch": turn.epoch, "reason": "leader_lost"}
            parts.append(self._encoder.event("reset", reset, Position(turn.epoch, 0)))
            self._shows_older = False
        text = turn_text(turn)
        if len(text) > self._chars:
            parts.append(self._encoder.delta(Position(turn.epoch, turn.partial_seq), text[self._chars :]))
            self._chars = len(text)
        if turn.state.final and not self.ended:
            parts.append(self._terminal())
            self.ended = True
        return b"".join(parts)

    def _terminal(self) -> bytes:
        turn = self._turn
        if turn.state in (TurnState.COMPLETED, TurnState.CANCELLED):
            return self._encoder.event("done", done_event(turn), terminal_position(turn))
        ending = error_event(failure_of(turn), turn.state, len(turn_text(turn)))
        return self._encoder.event("error", ending, terminal_position(turn))

    def _has_news(self) -> bool:
        turn = self._turn
        return (
            self._shows_older
            or turn.epoch != self._epoch
            or len(turn_text(turn)) > self._chars
            or (turn.state.final and not self.ended)
        )

    async def wait(self, timeout_s: float) -> bool:
        """Wait until the row has news; False if it has none after `timeout_s` seconds, or is no longer looked at.

        Raises:
            NotFound: the turn was deleted with its thread.
        """
        give_up_s = asyncio.get_running_loop().time() + timeout_s
        while not self._has_news() and not self._closed.is_set():
            left_s = give_up_s - asyncio.get_running_loop().time()
            if left_s <= 0 or await self._closed_within(min(left_s, POLL_S)):
                return False
            with suppress(StorageUnavailable):
                self._turn = await self._read()
        return not self._closed.is_set()

    async def _closed_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._closed.wait()
        except TimeoutError:
            return False

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
