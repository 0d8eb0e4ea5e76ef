"""Turns that other workers lead, as this worker sees them: a row that is read again, and a log that is repeated.

The row decides. It is read when the leader says that the turn has ended, and every second in any case, so that a turn
whose leader is lost is found; without a quick way between workers it is read more often. All requests and viewers of
this worker share one reading.

The text comes through the relay, event by event as the leader's own viewers see it, into a log of this worker. While
the relay is away, or behind the row, the log is filled from the row's partial: the same text, less often. Before that
is shown the turn is marked visible, as its leader would do. Whatever the row says in the end is what the log ends with.

`RemoteTurn._run` is the only one that reads the row, and with the mirror the only one that writes the log.

Deliberately absent: taking turns over. Whoever waits for one does that, and takes the log along.
"""

import asyncio
import math
from collections.abc import Mapping
from contextlib import suppress
from contextvars import Context
from typing import Any, Protocol, Self

from oncewise.core.stream_hub import Position, StreamHub, StreamLog
from oncewise.errors import Failure, NotFound, Overloaded, ResponseTooLarge, StorageUnavailable
from oncewise.model import StoredTurn, TurnClaim, TurnState
from oncewise.ports import TurnLedger
from oncewise.service.fleet import Fleet, Following
from oncewise.service.turn_outcomes import RESET, show_stored

__all__ = ["RemoteTurn", "RemoteTurns"]

POLL_S = (0.1, 0.5)
PROMPT_POLL_S = 1.0
AWAY_POLL_S = 0.1
"""While a quick way that there is does not work. It may be back in a moment, and nobody should notice that long."""
SETTLE_S = 2.0
"""For how long after it came back it is not relied upon: other workers find that out up to a second later."""
LOOKS_PER_S = 500
"""All those looks together, so that many turns do not become many queries."""
LAST_WORDS_S = 0.3
"""How long a turn that has ended waits for the rest of its text, before that is taken from the row."""
LINGER_S = 5.0
REACH_S = 1.0


class RemoteTurn:
    """One turn that another worker leads. Made by `RemoteTurns.follow`.

    Attributes:
        row: The turn as it was read last.
        log: Its log here; None while nobody has looked.
        first_s: When the first text came, by the event loop's clock; None before.
        leader_id: None: the request that leads the turn is known to its own worker only.
    """

    leader_id: str | None = None

    def __init__(self, desk: "RemoteTurns", turn: StoredTurn) -> None:
        self.row = turn
        self.log: StreamLog | None = None
        self.first_s: float | None = None
        self._desk = desk
        self._holders = 0
        self._interested_s = asyncio.get_running_loop().time()
        self._behind_at: int | None = None
        self._yielded = False
        self._news: dict[asyncio.Future[StoredTurn], None] = {}
        self._woken = asyncio.Event()
        self._came = asyncio.Event()
        name = turn_name(desk.fleet, turn.org_id, turn.id)
        self._following: Following = desk.fleet.follow(name, turn.owner, self.look)
        self._task = asyncio.get_running_loop().create_task(self._run(), context=Context())

    # -- for requests and viewers --------------------------------------------------------------------------------

    async def news(self) -> StoredTurn:
        """The row, once it was read again.

        Raises:
            NotFound: it is gone with its thread.
            StorageUnavailable: it could not be read.
        """
        if self._task.done():
            # Nobody looks any more; whoever still asks in a loop must not spin.
            await asyncio.sleep(POLL_S[1])
            row = self.row
            return await self._desk.ledger.turn(row.org_id, row.thread_id, row.id)
        future: asyncio.Future[StoredTurn] = asyncio.get_running_loop().create_future()
        self._news[future] = None
        try:
            return await future
        finally:
            self._news.pop(future, None)

    async def watch(self, after: Position | None = None) -> StreamLog | None:
        """The log, for a viewer; None if the turn is over and its row tells everything.

        For one that has seen the turn up to `after` in another worker the log is there up to that place, if it comes
        within a second; else the viewer is shown everything again.
        """
        self._interested_s = asyncio.get_running_loop().time()
        if self.log is None and not (self._task.done() or self._yielded):
            self.log = self._desk.hub.open((self.row.org_id, self.row.id), self.row.epoch)
            self._following.repeat(self.log, _reset, self._text_came)
            self.look()
        if self.log is not None and after is not None:
            await self._reach(self.log, after)
        return self.log

    async def _reach(self, log: StreamLog, after: Position) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(REACH_S):
                while Position(log.epoch, log.deltas) < after and not log.closed:
                    self._came.clear()
                    await self._came.wait()

    def now(self) -> tuple[TurnState, int] | None:
        """As `TurnRun.now`."""
        return (TurnState.STREAMING, 0) if self.log is not None and self.log.deltas else None

    def look(self) -> None:
        """Read the row again now."""
        self._woken.set()

    def take_log(self) -> StreamLog | None:
        """The log, for whoever leads the turn from now on in this worker; it is repeated here no more."""
        self._yielded = True
        self.look()
        self._close()
        return self.log if self.log is not None and not self.log.closed else None

    def hold(self) -> None:
        """A request waits for the turn."""
        self._holders += 1
        if self._holders == 1:
            self._following.hold()

    def let_go(self, *, withdrawn: bool = False) -> None:
        """A request waits for it no more; see `Following.let_go`."""
        self._holders -= 1
        self._interested_s = asyncio.get_running_loop().time()
        if self._holders == 0 and not self._task.done():
            self._following.let_go(withdrawn=withdrawn)
        # There may be nobody left, or the turn may have been ended by whoever let go.
        self.look()

    # -- the row and the log -------------------------------------------------------------------------------------

    def _text_came(self) -> None:
        self._came.set()
        if self.first_s is None:
            self.first_s = asyncio.get_running_loop().time()
        if self.log is not None and self.log.closed:
            self.look()

    async def _run(self) -> None:
        wait_s, last_s = POLL_S
        try:
            while not (self.row.state.final or self._yielded):
                try:
                    async with asyncio.timeout(self._desk.look_s(wait_s)):
                        await self._woken.wait()
                except TimeoutError:
                    wait_s = min(wait_s * 1.5, last_s)
                self._woken.clear()
                if not await self._read() or not self._is_wanted():
                    break
            await self._finish()
        finally:
            self._close()

    async def _read(self) -> bool:
        """Read the row; False if it is gone."""
        row = self.row
        try:
            self.row = await self._desk.ledger.turn(row.org_id, row.thread_id, row.id)
            if self._following.owner != self.row.owner:
                self._following.owner = self.row.owner
                self._following.say()
            await self._catch_up()
        except NotFound as error:
            self._tell(error.failure())
            return False
        except StorageUnavailable as error:
            self._tell(error.failure())
            return True
        self._tell(self.row)
        return True

    def _tell(self, news: StoredTurn | Failure) -> None:
        waiting, self._news = self._news, {}
        for future in waiting:
            if not future.done():
                if isinstance(news, Failure):
                    future.set_exception(news.error())
                else:
                    future.set_result(news)

    def _is_wanted(self) -> bool:
        now_s = asyncio.get_running_loop().time()
        if self._holders or (self.log is not None and self.log.viewers):
            self._interested_s = now_s
        return now_s - self._interested_s < LINGER_S

    async def _catch_up(self) -> None:
        """Fill the log from the row, if the relay does not."""
        row, log = self.row, self.log
        if log is None or log.closed or self._yielded or row.state.final or not row.partial:
            return
        if row.owner == self._desk.fleet.address:
            # Somebody here has just taken it over, and is about to take the log along and begin it again.
            return
        if row.epoch == log.epoch and row.partial_seq <= log.deltas:
            self._behind_at = None
            return
        if self._desk.fleet.prompt and self._behind_at != log.deltas:
            # It may be under way; the next look tells.
            self._behind_at = log.deltas
            return
        if row.epoch < log.epoch or not (row.visible or await self._show()):
            return
        try:
            if row.epoch > log.epoch:
                log.restart(row.epoch, *_reset(row.epoch))
            log.append_joined(row.partial[len(log.text) :], row.partial_seq)
            self._came.set()
        except (ResponseTooLarge, Overloaded):
            log.sever()

    async def _show(self) -> bool:
        row = self.row
        claim = TurnClaim(row.org_id, row.thread_id, row.id, row.idx, row.epoch)
        return await self._desk.ledger.mark_visible(claim) and not self._yielded

    async def _finish(self) -> None:
        """End the log as the row says; if nobody is interested any more, where it is."""
        log = self.log
        if log is None or self._yielded:
            return
        if not self.row.state.final:
            log.sever()
            return
        if self._desk.fleet.prompt and self._following.heard:
            give_up_s = asyncio.get_running_loop().time() + LAST_WORDS_S
            while not log.closed and asyncio.get_running_loop().time() < give_up_s:
                self._woken.clear()
                try:
                    async with asyncio.timeout_at(give_up_s):
                        await self._woken.wait()
                except TimeoutError:
                    break
        show_stored(log, self.row)
        self._came.set()

    def _close(self) -> None:
        self._following.leave()
        self._desk.forget(self)
        if self._news:
            self._tell(self.row)

    async def aclose(self) -> None:
        """Look no more; the log ends where it is."""
        self._task.cancel()
        await asyncio.wait([self._task])
        if self.log is not None and not self._yielded:
            self.log.sever()


def _reset(epoch: int) -> tuple[str, Mapping[str, Any]]:
    return RESET, {"epoch": epoch, "reason": "leader_lost"}


def turn_name(fleet: Fleet, org_id: str, turn_id: str) -> str:
    """What workers call a turn among each other."""
    return fleet.name("turn", org_id, turn_id)


class Held:
    """A request's wait for a turn of another worker; leaving the block ends it.

    Attributes:
        withdrawn: Set if the request was cancelled and did not just leave.
    """

    def __init__(self, turn: RemoteTurn) -> None:
        self.turn = turn
        self.withdrawn = False

    def __enter__(self) -> Self:
        self.turn.hold()
        return self

    def __exit__(self, *_raised: object) -> None:
        self.turn.let_go(withdrawn=self.withdrawn)


class _Ended(Protocol):
    def __call__(self, org_id: str, thread_id: str) -> None: ...


class RemoteTurns:
    """The turns of other workers that somebody here is interested in.

    Args:
        ended: Called with the tenant and thread of each turn that has ended.
    """

    def __init__(self, *, ledger: TurnLedger, hub: StreamHub, fleet: Fleet, ended: _Ended) -> None:
        self.ledger = ledger
        self.hub = hub
        self.fleet = fleet
        self._ended = ended
        self._turns: dict[tuple[str, str], RemoteTurn] = {}
        self._settled_s = -math.inf

    def look_at(self, turn: StoredTurn) -> RemoteTurn:
        """A turn that another worker leads, as this one sees it from now on."""
        key = (turn.org_id, turn.id)
        remote = self._turns.get(key)
        if remote is None:
            remote = self._turns[key] = RemoteTurn(self, turn)
        return remote

    def hold(self, turn: StoredTurn) -> Held:
        """The same for a request that waits for it."""
        return Held(self.look_at(turn))

    def look_s(self, slow_s: float) -> float:
        """Seconds until a turn's row should be read again; `slow_s` where there was never a quick way."""
        if self.fleet.away or asyncio.get_running_loop().time() < self._settled_s:
            return max(AWAY_POLL_S, len(self._turns) / LOOKS_PER_S)
        return PROMPT_POLL_S if self.fleet.prompt else slow_s

    def look_again(self) -> None:
        """The quick way has gone, or come back: look at all turns, and then as often as is right from now on."""
        self._settled_s = asyncio.get_running_loop().time() + SETTLE_S
        for remote in self._turns.values():
            remote.look()

    def forget(self, remote: RemoteTurn) -> None:
        """For `RemoteTurn`: it is looked at no more."""
        key = (remote.row.org_id, remote.row.id)
        if self._turns.get(key) is remote:
            del self._turns[key]
        if remote.row.state.final:
            self._ended(remote.row.org_id, remote.row.thread_id)

    async def aclose(self) -> None:
        """Look at nothing more."""
        for remote in list(self._turns.values()):
            await remote.aclose()
