"""Words between workers through a table, where they share nothing faster or while that is away.

A word is a row; who listens looks for new ones twice a second. That is enough to cancel a turn of another worker within
a second. Whatever only saves looking at a row that is looked at anyway is not sent this way: see `Signals.prompt`.

Rows are found by the time they were sent at, a few seconds back, and each number once: a transaction that commits late
may bring a lower number than one that was seen.

Deliberately absent: who is alive. The engine knows, and is asked.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import Context
from itertools import count
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa

from oncewise.errors import CoordinationUnavailable, OncewiseError, StorageFull, StorageUnavailable
from oncewise.ports import Signal
from oncewise.storage.database import Database, DatabaseClock, database_time_s
from oncewise.storage.tables import signals

__all__ = ["SqlSignals"]

KEEP_S = 60.0
OVERLAP_S = 5.0
QUIET_EVERY = 6

_INSERT = sa.insert(signals)
_FORGET = sa.delete(signals).where(signals.c.sent_at_s < sa.bindparam("before_s", type_=sa.Double))
_LATEST = (
    sa.select(signals)
    .where(
        signals.c.sent_at_s >= sa.bindparam("since_s", type_=sa.Double),
        sa.or_(signals.c.receiver.is_(None), signals.c.receiver == sa.bindparam("me", type_=sa.Text)),
        signals.c.sender != sa.bindparam("me", type_=sa.Text),
    )
    .order_by(signals.c.number)
)


class SqlSignals:
    """The `Signals` port on any `Database`, which it does not close.

    Args:
        address: Of this worker: the name under which it claims turns.
        others: How many other workers are alive.
        poll_s: Seconds between two looks.

    Attributes:
        idle: Whether there is nothing that anybody could have a word about; then nobody looks.
        quiet: Whether there is a quicker way, as far as is known; then every sixth look is enough.
    """

    prompt = False

    def __init__(
        self,
        database: Database,
        address: str,
        *,
        others: Callable[[], Awaitable[int]],
        poll_s: float = 0.5,
        clock: DatabaseClock = database_time_s,
    ) -> None:
        self.address = address
        self.idle: Callable[[], bool] = lambda: False
        self.quiet: Callable[[], bool] = lambda: False
        self._database = database
        self._others = others
        self._poll_s = poll_s
        self._clock = clock
        self._hearers: list[Callable[[Signal], None]] = []
        self._began_s = 0.0
        self._seen: set[tuple[int, float]] = set()
        self._task: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Listen from now on.

        Raises:
            StorageUnavailable: the database does not answer.
        """
        self._began_s = await self._database.read(self._clock)
        self._task = asyncio.get_running_loop().create_task(self._listen(), context=Context())

    async def send(self, signal: Signal, to: str | None = None) -> None:
        """See `Signals.send`."""
        word = json.dumps([signal.kind, signal.name, dict(signal.data)], separators=(",", ":"))

        def send(conn: sa.Connection) -> None:
            now_s = self._clock(conn)
            conn.execute(_FORGET, {"before_s": now_s - KEEP_S})
            conn.execute(_INSERT, {"receiver": to, "sender": self.address, "word": word, "sent_at_s": now_s})

        try:
            await self._database.write(send)
        except (StorageUnavailable, StorageFull) as error:
            raise CoordinationUnavailable from error

    async def others(self) -> int:
        """See `Signals.others`."""
        try:
            return await self._others()
        except OncewiseError as error:
            raise CoordinationUnavailable from error

    def listen(self, hear: Callable[[Signal], None]) -> None:
        """See `Signals.listen`."""
        self._hearers.append(hear)

    async def _listen(self) -> None:
        for number in count():
            await asyncio.sleep(self._poll_s)
            if not self.idle() and (number % QUIET_EVERY == 0 or not self.quiet()):
                with suppress(StorageUnavailable):
                    self._hear(await self._database.read(self._look))

    def _look(self, conn: sa.Connection) -> list[sa.Row[Any]]:
        since_s = max(self._began_s, self._clock(conn) - OVERLAP_S)
        return list(conn.execute(_LATEST, {"since_s": since_s, "me": self.address}))

    def _hear(self, rows: list[sa.Row[Any]]) -> None:
        # With the time: SQLite counts from one again when all rows were deleted.
        seen, self._seen = self._seen, {(row.number, row.sent_at_s) for row in rows}
        for row in rows:
            if (row.number, row.sent_at_s) not in seen:
                kind, name, data = json.loads(row.word)
                for hear in self._hearers:
                    hear(Signal(kind, name, row.sender, MappingProxyType(data)))

    async def aclose(self) -> None:
        """Listen no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
