"""Which processes that share a PostgreSQL database are alive: each holds an advisory lock for as long as it lives.

The lock belongs to a session, and PostgreSQL gives it back when the session's connection ends, however it ends. So the
turns of a process that was killed can be taken over at once and not after their lease.

It is a hint, never a guard: a connection can end while its process lives, and then others may take over turns that
their owner still works on. The epoch in each turn's row keeps that safe; it costs a provider call, not a stored turn.
Three things make it rare. A lost lock is taken again at once. Nobody is dead on one look. And whoever lost his own lock
a moment ago judges nobody: if the database was away, all lost theirs, and some are back before others.

Deliberately absent: turns, and the driver; connections are made by whoever owns the driver.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from hashlib import blake2b
from typing import Any

import sqlalchemy as sa

__all__ = ["SignOfLife"]

# Advisory locks are numbers that all programs on a database share; the first of the two keeps ours apart.
_FAMILY = 0x6F6E6365
_RETRY_S = 0.2
_CHECK_S = 2.0
_GRACE_S = 3.0

_TAKE = "SELECT pg_try_advisory_lock($1, $2)"
_HELD = sa.text(
    """\
SELECT CAST(CAST(objid AS BIGINT) AS TEXT) FROM pg_locks
WHERE locktype = 'advisory' AND granted AND objsubid = 2 AND classid = :family
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""
)
_YOUNG = sa.text("SELECT clock_timestamp() - pg_postmaster_start_time() < make_interval(secs => :grace_s)")

Connect = Callable[[], Awaitable[Any]]
"""Opens a connection of asyncpg's kind."""


class _StillHeld(Exception):
    """The lock is taken."""


def _number(owner: str) -> int:
    """The second half of an owner's lock. Two owners may share one; a dead one is then known by its lease only."""
    return int.from_bytes(blake2b(owner.encode(), digest_size=4).digest(), signed=True)


async def _within(seconds: float, event: asyncio.Event) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False


class SignOfLife:
    """This process's sign of life, from `give` to `withdraw`, on a connection of its own.

    Args:
        connect: Opens that connection.
        owner: Name of this process, never used again by another one.
    """

    def __init__(self, connect: Connect, owner: str) -> None:
        self._connect = connect
        self._number = _number(owner)
        self._held_since_s: float | None = None
        self._was_lost = False
        self._keeping: asyncio.Task[None] | None = None

    async def give(self) -> None:
        """Take the lock, and keep it from now on; before a turn is claimed, or others could think its owner dead.

        Raises:
            Exception: whatever keeps a connection from being opened; `_StillHeld` if the owner's name is in use.
        """
        connection = await self._locked()
        self._keeping = asyncio.create_task(self._keep(connection))

    @property
    def may_judge(self) -> bool:
        """Whether owners without a lock can be taken for dead."""
        if self._held_since_s is None:
            return False
        return not self._was_lost or asyncio.get_running_loop().time() - self._held_since_s > _GRACE_S

    def dead(self, conn: sa.Connection, owners: Iterable[str]) -> frozenset[str]:
        """Which of `owners` hold no lock."""
        if conn.execute(_YOUNG, {"grace_s": _GRACE_S}).scalar_one():
            return frozenset()
        held = self._held(conn)
        return frozenset(owner for owner in owners if _number(owner) not in held)

    def alone(self, conn: sa.Connection) -> bool:
        """Whether no other process of ours holds a lock."""
        return self._held(conn) <= {self._number}

    def others(self, conn: sa.Connection) -> int:
        """How many other processes of ours hold a lock."""
        return len(self._held(conn) - {self._number})

    @staticmethod
    def _held(conn: sa.Connection) -> frozenset[int]:
        # PostgreSQL shows the number without its sign.
        shown = (int(number) for number in conn.execute(_HELD, {"family": _FAMILY}).scalars())
        return frozenset(number - 2**32 if number >= 2**31 else number for number in shown)

    async def withdraw(self) -> None:
        """Give the lock back."""
        if self._keeping is not None:
            self._keeping.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeping

    async def _locked(self) -> Any:
        """A new connection that holds the lock."""
        connection = await self._connect()
        try:
            if not await connection.fetchval(_TAKE, _FAMILY, self._number):
                # By our own last session, which PostgreSQL has not yet seen to be gone; until then it speaks for us.
                raise _StillHeld  # noqa: TRY301 - the connection is closed for every reason alike
        except BaseException:
            connection.terminate()
            raise
        self._held_since_s = asyncio.get_running_loop().time()
        return connection

    async def _keep(self, connection: Any) -> None:
        try:
            while True:
                await self._until_lost(connection)
                self._held_since_s = None
                self._was_lost = True
                connection.terminate()
                connection = await self._again()
        finally:
            self._held_since_s = None
            with suppress(Exception):
                async with asyncio.timeout(_CHECK_S):
                    await connection.close()
            connection.terminate()

    @staticmethod
    async def _until_lost(connection: Any) -> None:
        lost = asyncio.Event()
        # Whatever goes wrong here, the connection is useless, and another is needed.
        with suppress(Exception):
            connection.add_termination_listener(lambda _connection: lost.set())
            while not connection.is_closed():
                if not await _within(_CHECK_S, lost):
                    # A server that was unplugged says no goodbye.
                    await connection.fetchval("SELECT 1", timeout=_CHECK_S)

    async def _again(self) -> Any:
        while True:
            try:
                return await self._locked()
            except Exception:  # noqa: BLE001 - whatever it was, it is tried again
                await asyncio.sleep(_RETRY_S)
