"""One blocking read for everything that this process waits for: relayed logs, its inbox, and what is said to all.

A reader per viewer would be a connection per viewer (201 connections and a p99 of 531 ms, against 2 and 9.5 ms with
this one, for 200 viewers of 40 logs). A key that is added while the read blocks is seen at once, since the reader is
woken by a word into its own inbox.

Each follower of a key has read up to an entry of its own; the key is asked for from the least of them, and nobody is
handed an entry twice. The connection has no time limit for replies, which would end every quiet read; instead a read
that does not come back some time after it should have is given up, and its connection with it.

`_read` is the only task that uses the connection.

Deliberately absent: what entries mean.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextvars import Context
from typing import Any

from oncewise.coordination.wire import Refused, Wire, WireFailed

__all__ = ["Follower", "Reader", "entry_id"]

BLOCK_S = 5.0
LATE_S = 2.0
COUNT = 64
RETRY_S = (0.05, 1.0)
INTERRUPTED = "UNBLOCKED"
"""Reads that block are ended so when a primary becomes a replica, which is no reason not to read on from it."""

EntryId = tuple[int, int]
Fields = list[bytes]

logger = logging.getLogger("oncewise.coordination")


def entry_id(text: bytes) -> EntryId:
    """An entry's place in its stream; ids are ordered as pairs of numbers."""
    first, _, second = text.partition(b"-")
    return int(first), int(second)


class Follower:
    """One reader of one key.

    Attributes:
        after: The last entry it was handed.
        timed: Whether the ids of the stream are times of the server's clock, which may be set back.
    """

    def __init__(self, take: Callable[[EntryId, Fields], None], after: EntryId, *, timed: bool) -> None:
        self.after = after
        self.take = take
        self.timed = timed

    def hand(self, place: EntryId, fields: Fields) -> None:
        """Take an entry, unless it is an old one."""
        if place > self.after:
            self.after = place
            try:
                self.take(place, fields)
            except Exception as error:  # noqa: BLE001  one follower's fault must not end the reading of all
                # The name of the fault alone: its text may be an entry's.
                logger.error("an entry could not be taken: %s", type(error).__name__)  # noqa: TRY400


class Reader:
    """Reads streams for a process.

    Args:
        wire: A connection nobody else uses.
        wake: Puts a word into a stream that is read, to end a read that blocks; must not raise.

    Attributes:
        refused: Why the server refused the last read; empty if it did not.
    """

    def __init__(self, wire: Wire, wake: Callable[[], None]) -> None:
        self.refused = ""
        self._wire = wire
        self._wake = wake
        self._followers: dict[str, list[Follower]] = {}
        self._asked: frozenset[str] | None = None
        self._idle = asyncio.Event()
        self._looked_s = asyncio.get_running_loop().time()
        self._task = asyncio.get_running_loop().create_task(self._read(), context=Context())

    def follow(
        self, key: str, take: Callable[[EntryId, Fields], None], after: EntryId = (0, 0), *, timed: bool = False
    ) -> Callable[[], None]:
        """Hand every entry of a stream beyond `after` to `take`, until the returned function is called."""
        follower = Follower(take, after, timed=timed)
        self._followers.setdefault(key, []).append(follower)
        self._idle.set()
        if self._asked is not None:
            # The read that blocks now does not look at this key, or looks beyond what this follower lacks.
            self._wake()

        def leave() -> None:
            followers = self._followers.get(key, [])
            if follower in followers:
                followers.remove(follower)
            if not followers:
                self._followers.pop(key, None)

        return leave

    @property
    def keys(self) -> int:
        """How many streams are read."""
        return len(self._followers)

    async def aclose(self) -> None:
        """Read nothing more."""
        self._task.cancel()
        await asyncio.wait([self._task])
        await self._wire.close()

    async def _read(self) -> None:
        wait_s, last_s = RETRY_S
        while True:
            if not self._followers:
                self._idle.clear()
                await self._idle.wait()
            try:
                await self._read_once()
                wait_s = RETRY_S[0]
            except (WireFailed, TimeoutError):
                await self._wire.close()
                # Whoever asks this server for something finds out what became of it; so ask it something.
                self._wake()
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, last_s)
            finally:
                self._asked = None

    async def _read_once(self) -> None:
        places = {key: min(each.after for each in followers) for key, followers in self._followers.items()}
        self._asked = frozenset(places)
        ids = [f"{first}-{second}" for first, second in places.values()]
        block_ms = round(BLOCK_S * 1000)
        async with asyncio.timeout(BLOCK_S + LATE_S):
            (reply,) = await self._wire.ask([("XREAD", "COUNT", COUNT, "BLOCK", block_ms, "STREAMS", *places, *ids)])
        self._asked = None
        self.refused = reply.code if isinstance(reply, Refused) and reply.code != INTERRUPTED else ""
        if isinstance(reply, Refused):
            raise WireFailed(reply.code)
        self._hand_out(reply or ())
        await self._look_for_lost()

    def _hand_out(self, reply: Iterable[Any]) -> None:
        for key, entries in reply:
            for place, fields in entries:
                for follower in list(self._followers.get(key.decode(), ())):
                    follower.hand(entry_id(place), fields)

    async def _look_for_lost(self) -> None:
        """Find streams that were lost and begun anew by a server whose clock is behind: their entries look old."""
        now_s = asyncio.get_running_loop().time()
        if now_s - self._looked_s < BLOCK_S:
            return
        self._looked_s = now_s
        timed = [(key, each) for key, followers in self._followers.items() for each in followers if each.timed]
        async with asyncio.timeout(LATE_S):
            replies = await self._wire.ask([("XREVRANGE", key, "+", "-", "COUNT", 1) for key, _ in timed])
        for (_, follower), newest in zip(timed, replies, strict=True):
            if isinstance(newest, list) and newest and entry_id(newest[0][0]) < follower.after:
                follower.after = (0, 0)
