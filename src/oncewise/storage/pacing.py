"""One rate and one number of running calls per provider, for workers that share nothing but a database.

The rate is one row, the state of the generic cell rate algorithm and the latest starts as in `oncewise.core.pacing`, by
the clock of the database. A call costs one short transaction for its start and two for its slot; so this is what
remains where there is no Redis, or while it is away.

Deliberately absent: fairness between workers that wait for a slot. They look again ten times a second.
"""

import asyncio
import json
from collections.abc import Callable
from contextvars import Context
from functools import partial
from itertools import count
from typing import Any, TypeVar

import sqlalchemy as sa

from oncewise.core.pacing import SECOND_S, Starts
from oncewise.errors import CoordinationUnavailable, StorageFull, StorageUnavailable
from oncewise.storage.database import Database, DatabaseClock, database_time_s, insert_missing
from oncewise.storage.tables import call_slots, paces

__all__ = ["SqlCallSlots", "SqlLimiter"]

Result = TypeVar("Result")

LEASE_S = 15.0
POLL_S = 0.1

_PROVIDER = sa.bindparam("of_provider", type_=sa.Text)
_NOW = sa.bindparam("now_s", type_=sa.Double)

_PACE = sa.select(paces.c.free_at_s, paces.c.latest).where(paces.c.provider == _PROVIDER)
_LOCKED = _PACE.with_for_update()
_PAUSE = sa.update(paces).where(paces.c.provider == _PROVIDER).values(free_at_s=sa.bindparam("free_s"))
_BOOK = _PAUSE.values(latest=sa.bindparam("starts"))

_LAPSE = sa.delete(call_slots).where(call_slots.c.provider == _PROVIDER, call_slots.c.until_s <= _NOW)
_TAKEN = sa.select(sa.func.count()).select_from(call_slots).where(call_slots.c.provider == _PROVIDER)
_TAKE = sa.insert(call_slots)
_GIVE = sa.delete(call_slots).where(
    call_slots.c.provider == _PROVIDER, call_slots.c.name.in_(sa.bindparam("names", expanding=True))
)


async def _written(database: Database, work: Callable[[sa.Connection], Result]) -> Result:
    try:
        return await database.write(work)
    except (StorageUnavailable, StorageFull) as error:
        raise CoordinationUnavailable from error


def _locked(conn: sa.Connection, provider: str) -> Any:
    """The state of a provider's pace, which nobody else changes until the transaction ends."""
    insert_missing(conn, paces, provider=provider, free_at_s=0.0, latest="[]")
    return conn.execute(_LOCKED, {"of_provider": provider}).one()


class SqlLimiter:
    """A `SharedLimiter` on any `Database`, which it does not close."""

    def __init__(
        self, database: Database, provider: str, *, rate: float, burst: int, clock: DatabaseClock = database_time_s
    ) -> None:
        starts = Starts(rate, burst)
        self._database = database
        self._provider = provider
        self._spacing_s = starts.gcra.spacing_s
        self._slack_s = starts.gcra.slack_s
        self._window = starts.window
        self._clock = clock
        self._booked_s = 0.0

    async def reserve(self) -> float:
        """See `StartLimiter.reserve`."""
        delay_s, self._booked_s = await _written(self._database, self._reserve)
        return delay_s

    def _reserve(self, conn: sa.Connection) -> tuple[float, float]:
        pace = _locked(conn, self._provider)
        now_s = self._clock(conn)
        free_s = max(now_s, pace.free_at_s)
        booked_s = free_s + self._spacing_s
        start_s = max(now_s, free_s - self._slack_s)
        latest: list[float] = json.loads(pace.latest)[-self._window :] if self._window else []
        if self._window:
            if len(latest) == self._window:
                start_s = max(start_s, latest.pop(0) + SECOND_S)
            latest.append(start_s)
        self._book(conn, booked_s, latest)
        return start_s - now_s, booked_s

    def _book(self, conn: sa.Connection, free_s: float, latest: list[float]) -> None:
        values = {"of_provider": self._provider, "free_s": free_s, "starts": json.dumps(latest)}
        conn.execute(_BOOK, values)

    async def give_back(self) -> None:
        """See `StartLimiter.give_back`."""
        await _written(self._database, self._give_back)

    def _give_back(self, conn: sa.Connection) -> None:
        pace = _locked(conn, self._provider)
        if pace.free_at_s == self._booked_s:
            self._book(conn, self._booked_s - self._spacing_s, json.loads(pace.latest)[:-1])

    async def pause(self, for_s: float) -> None:
        """See `SharedLimiter.pause`."""

        def pause(conn: sa.Connection) -> None:
            free_s = _locked(conn, self._provider).free_at_s
            until_s = self._clock(conn) + for_s + self._slack_s
            conn.execute(_PAUSE, {"of_provider": self._provider, "free_s": max(free_s, until_s)})

        await _written(self._database, pause)


class SqlCallSlots:
    """The `CallSlots` of one provider on any `Database`. Close it before the database.

    Args:
        owner: Name of this process.
        limit: Slots there are, for all workers together.
    """

    def __init__(
        self, database: Database, provider: str, *, limit: int, owner: str, clock: DatabaseClock = database_time_s
    ) -> None:
        self._database = database
        self._provider = provider
        self._limit = limit
        self._owner = owner
        self._clock = clock
        self._numbers = count()
        self._held: list[str] = []
        self._returned: list[str] = []
        self._changed = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None

    async def take(self) -> None:
        """See `CallSlots.take`."""
        name = f"{self._owner}/{next(self._numbers)}"
        self._keep()
        taking = self._start_taking(name)
        try:
            while not await asyncio.shield(taking):
                await asyncio.sleep(POLL_S)
                taking = self._start_taking(name)
        except BaseException:
            # It may have been taken all the same, or yet be: a transaction goes on without who asked for it, and one
            # that gives the slot back could overtake it.
            taking.add_done_callback(partial(self._gave_up, name))
            raise
        self._held.append(name)

    def _gave_up(self, name: str, taking: asyncio.Future[bool]) -> None:
        if not taking.cancelled():
            # Looked at, so that asyncio does not complain.
            taking.exception()
        self._return(name)

    def _start_taking(self, name: str) -> asyncio.Future[bool]:
        return asyncio.ensure_future(_written(self._database, lambda conn: self._take(conn, name)))

    def _take(self, conn: sa.Connection, name: str) -> bool:
        # The row of the pace is what workers take turns at: two that count at once would both find room.
        _locked(conn, self._provider)
        now_s = self._clock(conn)
        here = {"of_provider": self._provider}
        conn.execute(_LAPSE, here | {"now_s": now_s})
        if conn.execute(_TAKEN, here).scalar_one() >= self._limit:
            return False
        conn.execute(_TAKE, {"provider": self._provider, "name": name, "until_s": now_s + LEASE_S})
        return True

    def give_back(self) -> None:
        """See `CallSlots.give_back`."""
        if self._held:
            self._return(self._held.pop())

    def _return(self, name: str) -> None:
        self._returned.append(name)
        self._changed.set()

    def _keep(self) -> None:
        if self._keeping is None:
            self._keeping = asyncio.get_running_loop().create_task(self._run(), context=Context())

    async def _run(self) -> None:
        """Give back what was returned as soon as that is, and hold the rest."""
        while True:
            try:
                async with asyncio.timeout(LEASE_S / 3):
                    await self._changed.wait()
            except TimeoutError:
                if not self._held:
                    continue
            await self._bring_up_to_date()

    async def _bring_up_to_date(self) -> None:
        self._changed.clear()
        returned, self._returned = self._returned, []
        held = list(self._held)

        def change(conn: sa.Connection) -> None:
            # Those that are held are written anew: another worker may have found them lapsed after a long silence.
            conn.execute(_GIVE, {"of_provider": self._provider, "names": [*returned, *held]})
            until_s = self._clock(conn) + LEASE_S
            if held:
                rows = [{"provider": self._provider, "name": name, "until_s": until_s} for name in held]
                conn.execute(_TAKE, rows)

        try:
            await _written(self._database, change)
        except CoordinationUnavailable:
            self._returned += returned
            await asyncio.sleep(1.0)
            self._changed.set()

    async def aclose(self) -> None:
        """Give everything back."""
        if self._keeping is None:
            return
        self._keeping.cancel()
        await asyncio.wait([self._keeping])
        self._returned += self._held
        self._held.clear()
        try:
            await _written(
                self._database,
                lambda conn: conn.execute(_GIVE, {"of_provider": self._provider, "names": self._returned}).close(),
            )
        except CoordinationUnavailable:
            return
