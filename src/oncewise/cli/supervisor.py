"""Keeps the worker processes of one server: starts them, replaces those that die, ends them all.

A worker is a program of its own, not a fork: it inherits no state and no lock, at the price of its start (one second).
It hangs on its supervisor by a leash, a pair of sockets that carries lines of JSON: down the settings, later what to
accept on and when to end; up that it serves, or why it cannot. If the leash breaks, whichever way the supervisor died,
the worker ends; nobody is left to hold the port.

Each worker accepts on sockets of its own, which the supervisor holds too: what waits in the queue of a dead worker is
not lost. Until its replacement serves, a neighbour accepts for it (docs/decisions/0028).

Deliberately absent: what a worker does (`oncewise.cli.worker`), and nearly every import: this process only waits.
"""

import asyncio
import json
import logging
import signal
import socket
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from oncewise.api.sockets import SocketGroup
from oncewise.cli.failure import CommandFailed
from oncewise.cli.start_up import CannotStart

__all__ = ["Supervisor"]

logger = logging.getLogger("oncewise.workers")

Message = dict[str, Any]


class _Worker:
    """One process, as its supervisor sees it.

    Attributes:
        slot: Its number, from 0; a replacement has the same.
        report: What it said when it began to serve; None before.
        refusal: Why it says that it cannot serve.
        fate: How it ended, as the rest of a sentence.
        served_s: For how long it served until then, in seconds.
    """

    def __init__(
        self, slot: int, process: asyncio.subprocess.Process, up: asyncio.StreamReader, down: asyncio.StreamWriter
    ) -> None:
        self.slot = slot
        self.process = process
        self.report: Message | None = None
        self.refusal: str | None = None
        self.fate = ""
        self.served_s = 0.0
        self._up = up
        self._down = down
        self._serving_since_s: float | None = None
        self._accepts = [slot]

    def __str__(self) -> str:
        return f"worker {self.slot + 1} (process {self.process.pid})"

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    @property
    def serves(self) -> bool:
        return self.report is not None and self.alive

    def tell(self, message: Message) -> None:
        self._down.write(json.dumps(message).encode() + b"\n")

    def accept_on(self, slots: list[int]) -> None:
        """Let it accept for these slots, its own among them, and for no others."""
        if slots != self._accepts:
            self._accepts = slots
            self.tell({"accept": slots})

    def drain(self) -> None:
        """Let it finish what it has, and end."""
        if self.report is None:
            # It holds nothing yet, and does not listen to us before it serves.
            self.send(signal.SIGTERM)
        self.tell({"do": "drain"})

    def send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def end(self, changed: Callable[[], None]) -> None:
        """Listen to it until it ends. `changed` is called when it begins to serve, and when it has ended."""
        listening = asyncio.create_task(self._listen(changed))
        status = await self.process.wait()
        if self._serving_since_s is not None:
            self.served_s = asyncio.get_running_loop().time() - self._serving_since_s
        # What it said last may still be on its way.
        await asyncio.wait({listening}, timeout=1.0)
        listening.cancel()
        self._down.close()
        if self.refusal is not None:
            self.fate = f"did not start: {self.refusal}"
        elif status < 0:
            self.fate = f"was killed by {signal.Signals(-status).name}"
        else:
            self.fate = f"ended with exit status {status}"
        changed()

    async def _listen(self, changed: Callable[[], None]) -> None:
        with suppress(ConnectionError):
            async for line in self._up:
                message = json.loads(line)
                if "serves" in message:
                    self.report = message["serves"]
                    self._serving_since_s = asyncio.get_running_loop().time()
                    changed()
                else:
                    self.refusal = message["refuses"]


class Supervisor:
    """Runs the workers of one server until a signal, or until they cannot be kept running.

    Args:
        command: Starts a worker; the number of its file descriptor of the leash is added.
        brief: The first line for the worker of a slot.
        groups: Sockets that listen: a group for each slot, or one for all. Still open when `run` returns.
        processes: How many workers there are, at least 1.
        drain_s: Seconds for which workers finish what they have after the first signal.
        grace_s: Seconds they have beyond that, or after a second signal, until they are killed.
        pause_s: Seconds before the next attempt after a start that failed; doubled with each, up to 10.
        attempts: Starts that fail in a row before the server is given up. While a worker serves it never is.
    """

    def __init__(
        self,
        command: Sequence[str],
        brief: Callable[[int], Message],
        groups: Sequence[SocketGroup],
        *,
        processes: int,
        drain_s: float,
        grace_s: float = 8.0,
        pause_s: float = 0.1,
        attempts: int = 5,
    ) -> None:
        self._command = command
        self._brief = brief
        self._groups = groups
        self._processes = processes
        self._drain_s = drain_s
        self._grace_s = grace_s
        self._pause_s = pause_s
        self._attempts = attempts
        self._workers: dict[int, _Worker] = {}
        self._complete = asyncio.Event()
        self._served = False
        self._signals = 0
        self._stopping = asyncio.Event()
        self._beside: asyncio.Task[None] | None = None
        self._killed = False

    # -- the whole -----------------------------------------------------------------------------------------------

    def hear_signals(self) -> None:
        """From now on signals end the workers in order, and not this process at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._hear)
        # Under nohup it is to be ignored. It may come twice, from the kernel and from the shell: that is no hurry.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            loop.add_signal_handler(signal.SIGHUP, self.stop)

    async def run(self, once_complete: Callable[[Sequence[Message]], Coroutine[Any, Any, bool]]) -> None:
        """Keep the workers running; return when all have ended after a signal.

        `once_complete` is called with the reports of the workers when all of them serve for the first time. If it
        returns True or raises, the server ends; a signal cancels it.

        Raises:
            CannotStart: no worker could be kept running.
            CommandFailed: workers had to be killed.
        """
        keeping = [asyncio.create_task(self._keep(slot)) for slot in range(self._processes)]
        self._beside = asyncio.create_task(self._be_beside(once_complete))
        tasks = [*keeping, self._beside]
        try:
            await asyncio.wait(keeping, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            self.stop()
            await asyncio.wait(tasks)
        errors = [error for task in tasks if not task.cancelled() and (error := task.exception())]
        if errors:
            raise errors[0]
        if self._killed:
            raise CommandFailed("not all workers ended in time; those that did not were killed")

    async def _be_beside(self, once_complete: Callable[[Sequence[Message]], Coroutine[Any, Any, bool]]) -> None:
        await self._complete.wait()
        try:
            enough = await once_complete([worker.report or {} for worker in self._workers.values()])
        except BaseException:
            self.stop()
            raise
        if enough:
            self.stop()

    # -- endings -------------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        self._signals += 1
        if self._signals == 1:
            self.stop()
        elif self._signals == 2:
            for worker in self._workers.values():
                worker.tell({"do": "hurry"})
            asyncio.get_running_loop().call_later(self._grace_s, self._kill)
        else:
            self._kill()

    def stop(self) -> None:
        """Let the workers finish what they have, and end. May be called again."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        if self._beside is not None:
            self._beside.cancel()
        for worker in self._workers.values():
            worker.drain()
        asyncio.get_running_loop().call_later(self._drain_s + self._grace_s, self._kill)

    def _kill(self) -> None:
        for worker in self._workers.values():
            if worker.alive:
                logger.error("%s did not end in time and is killed", worker)
                worker.send(signal.SIGKILL)
                self._killed = True

    # -- one slot ------------------------------------------------------------------------------------------------

    async def _keep(self, slot: int) -> None:
        """Keep one worker running until the server stops."""
        failures = 0
        while not self._stopping.is_set():
            try:
                worker = await self._start(slot)
            except OSError as error:
                # No memory, no process left: reasons to wait, not to end the other workers.
                failures, fate = failures + 1, f"worker {slot + 1} could not be started: {error.strerror}"
            else:
                await worker.end(self._changed)
                if self._stopping.is_set():
                    return
                if worker.refusal is not None and not self._served:
                    raise CannotStart(worker.refusal)
                # One that dies as soon as it serves would otherwise be replaced without a pause, for ever.
                failures = 0 if worker.served_s >= 1.0 else failures + 1
                fate = f"{worker} {worker.fate}"
            if failures >= self._attempts and not any(worker.serves for worker in self._workers.values()):
                raise CannotStart(f"given up after {failures} attempts: {fate}")
            logger.warning("%s; another takes its place", fate)
            await self._pause(failures)

    async def _start(self, slot: int) -> _Worker:
        ours, theirs = socket.socketpair()
        passed = [theirs.fileno(), *(bound.fileno() for group in self._groups for bound in group)]
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *self._command,
                    str(theirs.fileno()),
                    pass_fds=passed,
                    stdin=asyncio.subprocess.DEVNULL,
                    # Ctrl-C signals all processes of a terminal's group; it is for this one alone.
                    process_group=0,
                )
        except BaseException:
            ours.close()
            raise
        up, down = await asyncio.open_connection(sock=ours)
        worker = self._workers[slot] = _Worker(slot, process, up, down)
        fds = [[bound.fileno() for bound in group] for group in self._groups]
        worker.tell({"slot": slot, "groups": fds, **self._brief(slot)})
        if self._stopping.is_set():
            worker.drain()
        return worker

    async def _pause(self, failures: int) -> None:
        if failures:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(self._pause_s * 2 ** (failures - 1), 10.0)):
                    await self._stopping.wait()

    # -- all slots -----------------------------------------------------------------------------------------------

    def _changed(self) -> None:
        """A worker began to serve, or ended."""
        serving = [slot for slot in range(self._processes) if slot in self._workers and self._workers[slot].serves]
        self._served = self._served or bool(serving)
        if len(serving) == self._processes:
            self._complete.set()
        if serving and len(self._groups) > 1:
            self._share_out(serving)

    def _share_out(self, serving: list[int]) -> None:
        """Let every serving worker accept on its own sockets, and on those of the workers before it that do not."""
        shares: dict[int, list[int]] = {slot: [slot] for slot in serving}
        for slot in range(self._processes):
            if slot not in shares:
                shares[next((other for other in serving if other > slot), serving[0])].append(slot)
        for slot, share in shares.items():
            self._workers[slot].accept_on(share)
