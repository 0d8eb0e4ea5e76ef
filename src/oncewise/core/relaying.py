"""One log in several processes: an *outbox* tells a relay what its owner publishes, a *mirror* repeats it elsewhere.

The owner never waits for the relay. Its log is the queue: what the relay does not have yet is read from the log when
the relay answers, however long that took, so nothing piles up and nothing is told in part. The relay says after each
attempt where its copy ends, and the outbox goes on from there: after a lost reply, a restart that emptied the relay, or
another owner, the same rule leads to a copy without gap or repetition.

The first delta goes at once. Then one entry takes what came within 25 ms, or less if that is 64 deltas or 16 KiB.

`_Line` owns how far one log was told; `Outbox` owns which lines there are.

Deliberately absent: who may read, what the events mean, and Redis.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextvars import Context
from dataclasses import replace
from typing import Any

from oncewise.core.stream_hub import StreamLog
from oncewise.errors import CoordinationUnavailable, Overloaded, ResponseTooLarge
from oncewise.ports import LogEntry, LogTail, Relay

__all__ = ["Mirror", "Outbox"]

BATCH_S = 0.025
BATCH_DELTAS = 64
BATCH_BYTES = 16 * 1024
RETRY_S = (0.05, 1.0)
PARTING_S = 5.0
"""How long the end of a log is offered to a relay that does not answer; whoever reads then looks elsewhere."""


class _Line:
    """How far one log was told, and the task that tells the rest."""

    def __init__(self, relay: Relay, name: str, log: StreamLog, keep_s: float) -> None:
        self.log = log
        self._relay = relay
        self._name = name
        self._keep_s = keep_s
        self._sent = LogTail(log.epoch, 0)
        self._sent_at_s = float("-inf")
        self._asks = False
        self._resting = False
        self._news = asyncio.Event()
        log.tap = self._published

    def ask(self) -> None:
        """Look again where the relay's copy ends: it may have been lost."""
        self._asks = True
        self._news.set()

    def end(self) -> None:
        """Tell nothing more."""
        if self.log.tap == self._published:
            self.log.tap = None

    def _published(self) -> None:
        log = self.log
        if (
            not self._resting
            or log.closed
            or log.deltas - self._sent.seq >= BATCH_DELTAS
            or log.size_after(self._sent.seq) >= BATCH_BYTES
        ):
            self._news.set()

    async def run(self) -> None:
        """Tell everything, to the end of the log; return early if another owner writes."""
        while True:
            await self._rest()
            entry = self._next()
            if entry is not None:
                tail = await self._append(entry)
                if tail is None or tail.epoch > self.log.epoch:
                    return
                self._sent = tail if tail.epoch == self.log.epoch else LogTail(self.log.epoch, 0)
            elif self.log.closed:
                return
            else:
                self._news.clear()
                await self._news.wait()

    def _next(self) -> LogEntry | None:
        if self._sent.epoch != self.log.epoch:
            self._sent = LogTail(self.log.epoch, 0)
        entry = self.log.entry(self._sent.seq, max_deltas=BATCH_DELTAS, max_bytes=BATCH_BYTES)
        if entry is None and self._asks:
            entry = LogEntry(self.log.epoch, self._sent.seq)
        self._asks = False
        return entry

    async def _rest(self) -> None:
        """Let a batch fill."""
        until_s = self._sent_at_s + BATCH_S
        if until_s <= asyncio.get_running_loop().time():
            return
        self._resting = True
        self._news.clear()
        self._published()
        try:
            async with asyncio.timeout_at(until_s):
                await self._news.wait()
        except TimeoutError:
            return
        finally:
            self._resting = False

    async def _append(self, entry: LogEntry) -> LogTail | None:
        """Where the relay's copy ends after an attempt that was answered; None if there was none in time."""
        loop = asyncio.get_running_loop()
        wait_s, last_s = RETRY_S
        give_up_s: float | None = None
        while True:
            self._sent_at_s = loop.time()
            try:
                return await self._relay.append(self._name, entry, keep_s=self._keep_s)
            except CoordinationUnavailable:
                if self.log.closed:
                    give_up_s = give_up_s or loop.time() + PARTING_S
                    if loop.time() >= give_up_s:
                        return None
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, last_s)


class Outbox:
    """Tells a relay what is published in logs of this process. Made and closed by the composition root.

    Args:
        relay: Where the copies are.
        keep_s: Seconds a copy lives after its last entry.
        max_logs: Logs that are told at a time; further ones are not, and their readers look elsewhere.
    """

    def __init__(self, relay: Relay, *, keep_s: float, max_logs: int = 10_000) -> None:
        self._relay = relay
        self._keep_s = keep_s
        self._max_logs = max_logs
        self._lines: dict[str, tuple[_Line, asyncio.Task[None]]] = {}

    def publish(self, name: str, log: StreamLog) -> None:
        """Tell a log from its beginning on. Called again for one that is told, it makes sure that the copy is there."""
        known = self._lines.get(name)
        if known is not None and known[0].log is log:
            known[0].ask()
            return
        if len(self._lines) >= self._max_logs:
            return
        self.withdraw(name)
        line = _Line(self._relay, name, log, self._keep_s)
        # An empty context: the task outlives whoever asked for it, and no request can cancel it.
        task = asyncio.get_running_loop().create_task(line.run(), context=Context())
        self._lines[name] = (line, task)
        task.add_done_callback(lambda _task: self._ended(name, line))

    def withdraw(self, name: str) -> None:
        """Tell no more of a log; what was told stays for its time."""
        known = self._lines.get(name)
        if known is not None:
            known[1].cancel()
            self._ended(name, known[0])

    def tells(self, name: str) -> bool:
        """Whether a log is being told."""
        return name in self._lines

    def _ended(self, name: str, line: _Line) -> None:
        line.end()
        known = self._lines.get(name)
        # By identity: a line that ends late must not take the next one of its name with it.
        if known is not None and known[0] is line:
            del self._lines[name]

    async def aclose(self, patience_s: float = 0.5) -> None:
        """Give what has ended a moment to be told, then stop."""
        tasks = [task for _, task in self._lines.values()]
        closing = [task for line, task in self._lines.values() if line.log.closed]
        if closing:
            await asyncio.wait(closing, timeout=patience_s)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


class Mirror:
    """Repeats a relayed log in a log of this process, until it is closed.

    Args:
        log: What is known of it already; its owner in another process writes on under the same epoch or a higher one.
        reset: Name and data of the event that tells viewers of a new epoch.
        told: Called after each entry; must not block.
        closes: Whether the log is closed with the end of the other one.

    Attributes:
        heard: Entries that came so far.
        ending: Name and data of the terminal event, once that came.
    """

    def __init__(
        self,
        relay: Relay,
        name: str,
        log: StreamLog,
        reset: Callable[[int], tuple[str, Mapping[str, Any]]],
        told: Callable[[], None] = lambda: None,
        *,
        closes: bool = True,
    ) -> None:
        self.log = log
        self.heard = 0
        self.ending: tuple[str, Mapping[str, Any]] | None = None
        self._closes = closes
        self._reset = reset
        self._told = told
        self._stop = relay.read(name, self._take, LogTail(log.epoch, log.deltas))

    def _take(self, entry: LogEntry) -> None:
        log = self.log
        if log.closed or entry.epoch < log.epoch or (entry.epoch > log.epoch and entry.after > 0):
            return
        self.heard += 1
        try:
            if entry.epoch > log.epoch:
                log.restart(entry.epoch, *self._reset(entry.epoch))
            # A gap is left to whoever reads the row: the entries before it are lost with the relay.
            if log.mirror(entry if self._closes else replace(entry, end=None)):
                self.ending = entry.end
        except (ResponseTooLarge, Overloaded):
            log.sever()
        self._told()

    def close(self) -> None:
        """Repeat nothing more; the log stays as it is."""
        self._stop()
