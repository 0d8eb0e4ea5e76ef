"""Requests to Redis that are answered at once: one connection, one time limit, and a breaker.

Whoever asks puts a command into a queue and waits for its own reply. One task sends what is queued, all in one go, and
hands the replies out: a request that is cancelled leaves no half-read reply behind, and a hundred logs that are told at
the same time cost one round trip.

A command has a quarter of a second. When the first one is not answered, the link is *away*: everybody who waits is told
so, and whoever asks next is told at once, while the link itself tries until the server answers again. So a server that
is paused or gone costs one request a quarter of a second, and not every request of the next seconds.

Who has another way does not wait that long. When a command is late, after a tenth of a second, the *hasty* ones among
those that wait are told so, and so are those that are asked meanwhile; the link is not away yet, for the rest may still
be answered. A server that is only slow for a moment so costs a look at the database, and no second call.

`_pump` is the only task that uses the connection.

Deliberately absent: retries (nobody here knows what may be repeated), and blocking reads (`reader.py`).
"""

import asyncio
from collections import deque
from contextlib import suppress
from contextvars import Context
from hashlib import sha1
from importlib.resources import files
from typing import Any, NamedTuple

from oncewise.coordination.wire import Command, Refused, Wire, WireFailed
from oncewise.errors import CoordinationUnavailable
from oncewise.ports import CoordinationChanged, CoordinationLate, Listener

__all__ = ["Link", "Script"]

BATCH = 256
MAX_QUEUED = 20_000
PROBE_S = (0.05, 0.5)
LATE_S = 0.1


class Script:
    """A Lua script of this package, by the name of its file.

    Attributes:
        name: Of the file, without its ending.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = (files(__package__) / "lua" / f"{name}.lua").read_text(encoding="utf-8")
        self.digest = sha1(self.text.encode(), usedforsecurity=False).hexdigest()


class _Asked(NamedTuple):
    command: Command
    reply: asyncio.Future[Any]
    hasty: bool


class Link:
    """The way to one server. Made and closed by its `RedisCoordination`.

    Args:
        wire: A connection nobody else uses.
        budget_s: Seconds for a command, the connecting included.
        listener: Told of each `CoordinationChanged` and `CoordinationLate`.

    Attributes:
        up: Whether the server answered when it was last asked.
        late: Whether it should have answered by now.
        reason: Why not.
    """

    def __init__(self, wire: Wire, *, budget_s: float = 0.25, listener: Listener) -> None:
        self.up = True
        self.late = False
        self.reason = ""
        self._wire = wire
        self._budget_s = budget_s
        self._listener = listener
        self._queue: deque[_Asked] = deque()
        self._asked = asyncio.Event()
        self._back = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._pump(), context=Context())

    async def call(self, *command: str | bytes | int, hasty: bool = False) -> Any:
        """The reply to a command; `hasty` if whoever asks would rather go another way than wait for a late one.

        Raises:
            CoordinationUnavailable: there was none, or a refusal; it may have been carried out.
        """
        reply = await self._reply(command, hasty=hasty)
        if isinstance(reply, Refused):
            raise CoordinationUnavailable from reply
        return reply

    async def run(self, script: Script, keys: tuple[str, ...], *args: str | bytes | int, hasty: bool = False) -> Any:
        """The reply of a script. Errors, and `hasty`, as in `call`."""
        reply = await self._reply(("EVALSHA", script.digest, len(keys), *keys, *args), hasty=hasty)
        if isinstance(reply, Refused) and reply.code == "NOSCRIPT":
            return await self.call("EVAL", script.text, len(keys), *keys, *args, hasty=hasty)
        if isinstance(reply, Refused):
            raise CoordinationUnavailable from reply
        return reply

    async def _reply(self, command: Command, *, hasty: bool) -> Any:
        if not self.up or (hasty and self.late) or self._task.done() or len(self._queue) >= MAX_QUEUED:
            raise CoordinationUnavailable
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.append(_Asked(command, future, hasty))
        self._asked.set()
        return await future

    async def probe(self, patience_s: float) -> None:
        """Wait until the server has answered, at most so long; whether it has is in `up`."""
        with suppress(CoordinationUnavailable, TimeoutError):
            async with asyncio.timeout(patience_s):
                if self.up and await self._answers():
                    return
                # The first attempt failed: the server may only be starting.
                await self._back.wait()

    async def _answers(self) -> bool:
        try:
            await self.call("PING")
        except CoordinationUnavailable:
            # A refusal is an answer too.
            return self.up
        return True

    async def aclose(self) -> None:
        """Tell everybody who waits that there is no answer, and drop the connection."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self._fail()
        await self._wire.close()

    # -- the pump ------------------------------------------------------------------------------------------------

    async def _pump(self) -> None:
        while True:
            self._asked.clear()
            while self._queue:
                await self._send([self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))])
            await self._asked.wait()

    async def _send(self, batch: list[_Asked]) -> None:
        try:
            replies = await self._ask(batch)
        except (WireFailed, TimeoutError) as error:
            self._queue.extendleft(reversed(batch))
            await self._recover(str(error) or "timeout")
        except BaseException:
            self._queue.extendleft(reversed(batch))
            raise
        else:
            for asked, reply in zip(batch, replies, strict=True):
                if not asked.reply.done():
                    asked.reply.set_result(reply)
            if any(isinstance(reply, Refused) and reply.code in ("READONLY", "LOADING") for reply in replies):
                # This server is no primary any more; the address may lead to the one that is.
                await self._wire.close()

    async def _ask(self, batch: list[_Asked]) -> list[Any]:
        lateness = asyncio.get_running_loop().call_later(LATE_S, self._is_late, batch)
        try:
            async with asyncio.timeout(self._budget_s):
                return await self._wire.ask([asked.command for asked in batch])
        finally:
            lateness.cancel()
            self.late = False

    def _is_late(self, batch: list[_Asked]) -> None:
        self.late = True
        for asked in (*batch, *self._queue):
            if asked.hasty and not asked.reply.done():
                asked.reply.set_exception(CoordinationUnavailable())
        self._listener(CoordinationLate())

    def _fail(self) -> None:
        while self._queue:
            future = self._queue.popleft().reply
            if not future.done():
                future.set_exception(CoordinationUnavailable())

    async def _recover(self, reason: str) -> None:
        """Be away until the server answers."""
        self.up, self.reason = False, reason
        self._fail()
        self._back.clear()
        self._listener(CoordinationChanged(up=False, reason=reason))
        wait_s, last_s = PROBE_S
        while not self.up:
            await self._wire.close()
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, last_s)
            try:
                async with asyncio.timeout(self._budget_s):
                    await self._wire.ask([("PING",)])
            except (WireFailed, TimeoutError) as error:
                self.reason = str(error) or "timeout"
            else:
                self.up, self.reason = True, ""
        self._back.set()
        self._listener(CoordinationChanged(up=True))
