"""Heartbeats: what keeps the leases of this worker's turns, in as few transactions as it takes.

Every turn beats at times of its own. While one transaction runs the beats of other turns gather, and go together in the
next one. So a few turns wait for nobody, and for many the database is asked no oftener than it can answer. With one
transaction for each beat a busy worker fell behind the leases of six hundred turns and gave them all up, though nothing
was wrong but the number of its transactions.

Deliberately absent: what follows from a lease that is lost (`oncewise.service.turn_runs`).
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context

from oncewise.errors import OncewiseError, StorageFull, StorageUnavailable
from oncewise.model import Heartbeat, TurnClaim
from oncewise.ports import TurnLedger

__all__ = ["Heartbeats"]

AT_ONCE = 200
CHARS_AT_ONCE = 1024 * 1024
"""Where a transaction ends, so that none holds many rows for long. A beat with more text than that goes alone."""

_Asked = tuple[Heartbeat, "asyncio.Future[bool]"]


class Heartbeats:
    """The beats of one worker. Only `_run` talks to the ledger.

    Args:
        ledger: Where the leases are.
        lease_s: What each beat extends a lease to, in seconds from then.
    """

    def __init__(self, ledger: TurnLedger, *, lease_s: float) -> None:
        self._ledger = ledger
        self._lease_s = lease_s
        self._waiting: list[_Asked] = []
        self._task: asyncio.Task[None] | None = None

    async def keep(self, claim: TurnClaim, leased_s: float, so_far: Callable[[], tuple[str, int]]) -> None:
        """Keep a lease; return when it is lost or, a little before its end, cannot be kept.

        Args:
            claim: The claim that the lease belongs to.
            leased_s: When it was asked for, by the event loop's clock.
            so_far: The text, and how many deltas it came in.
        """
        loop = asyncio.get_running_loop()
        safe_s = self._lease_s - min(1.0, self._lease_s / 10)
        kept_s, pause_s = leased_s, self._lease_s / 3
        alive = True
        while alive:
            await asyncio.sleep(min(pause_s, max(0.0, kept_s + safe_s - loop.time())))
            asked_s = loop.time()
            try:
                # Not longer: a database that says nothing does not keep the lease either.
                async with asyncio.timeout_at(kept_s + safe_s):
                    alive = await self.beat(Heartbeat(claim, *so_far()))
            except TimeoutError:
                alive = False
            except (StorageUnavailable, StorageFull):
                pause_s = self._lease_s / 10
            else:
                kept_s, pause_s = asked_s, self._lease_s / 3

    async def beat(self, beat: Heartbeat) -> bool:
        """Extend a lease and store the text so far; False if the claim is fenced.

        Raises:
            StorageUnavailable, StorageFull: the lease could not be extended now, and is as it was.
        """
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((beat, answer))
        if self._task is None:
            # In a context of its own: it goes on for the beats of other turns.
            self._task = asyncio.get_running_loop().create_task(self._run(), context=Context())
        return await answer

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._send(self._take())
        finally:
            self._task = None

    def _take(self) -> list[_Asked]:
        """Those that have waited longest, and are waited for still."""
        taken: list[_Asked] = []
        chars = 0
        while self._waiting and len(taken) < AT_ONCE:
            beat, answer = self._waiting[0]
            chars += len(beat.partial)
            if taken and chars > CHARS_AT_ONCE:
                break
            del self._waiting[0]
            if not answer.done():
                taken.append((beat, answer))
        return taken

    async def _send(self, asked: list[_Asked]) -> None:
        try:
            # A connection that says nothing must not cost the leases of all: the next transaction takes another one.
            async with asyncio.timeout(self._lease_s / 3):
                holds = await self._ledger.beat([beat for beat, _ in asked], lease_s=self._lease_s)
        except (OncewiseError, TimeoutError) as error:
            for _, answer in asked:
                if not answer.done():
                    answer.set_exception(error if isinstance(error, OncewiseError) else StorageUnavailable())
            return
        for beat, answer in asked:
            if answer.done():
                continue
            if beat.claim in holds:
                answer.set_result(holds[beat.claim])
            else:
                answer.set_exception(StorageUnavailable())

    async def aclose(self) -> None:
        """End, when no turn is led any more. May be called again."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
