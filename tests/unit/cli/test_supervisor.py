"""Workers that are kept running, with small programs in their place."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from oncewise.api.sockets import listen_for_each
from oncewise.cli.failure import CommandFailed
from oncewise.cli.start_up import CannotStart
from oncewise.cli.supervisor import Supervisor

Beside = Callable[[Sequence[dict[str, Any]]], Coroutine[Any, Any, bool]]

WORKER = """
import json, os, signal, socket, sys, time

end = socket.socket(fileno=int(sys.argv[1]))
lines = end.makefile("r")
brief = json.loads(lines.readline())


def tell(**message):
    end.sendall(json.dumps(message).encode() + b"\\n")


def serve(**report):
    tell(serves={"slot": brief["slot"], "pid": os.getpid(), **report})


def obey(drain=lambda: sys.exit(), hurry=lambda: sys.exit()):
    for line in lines:
        message = json.loads(line)
        with open(brief["diary"], "a") as diary:
            diary.write(json.dumps([brief["slot"], message]) + "\\n")
        {"drain": drain, "hurry": hurry}.get(message.get("do"), lambda: None)()
    sys.exit(3)


"""


class Scene:
    """A supervisor in a task, and what its workers did."""

    def __init__(self, supervisor: Supervisor, diary: Path, beside: Beside | None) -> None:
        self.supervisor = supervisor
        self.reports: list[dict[str, Any]] = []
        self._diary = diary
        self._complete = asyncio.Event()
        self.running = asyncio.create_task(supervisor.run(beside or self._once_complete))

    async def _once_complete(self, reports: Sequence[dict[str, Any]]) -> bool:
        self.reports = list(reports)
        self._complete.set()
        return False

    async def complete(self) -> None:
        async with asyncio.timeout(10):
            await self._complete.wait()

    def pid(self, slot: int) -> int:
        return self.supervisor._workers[slot].process.pid

    async def until_serving(self, *slots: int, other_than: int = 0) -> None:
        async with asyncio.timeout(10):
            while not all(
                (worker := self.supervisor._workers.get(slot)) and worker.serves and worker.process.pid != other_than
                for slot in slots
            ):
                await asyncio.sleep(0.01)

    @property
    def shares(self) -> dict[int, list[int]]:
        """Which slots each serving worker accepts for."""
        return {slot: worker._accepts for slot, worker in self.supervisor._workers.items() if worker.serves}

    async def kill(self, slot: int) -> None:
        """Kill a worker; returns when the supervisor knows."""
        worker = self.supervisor._workers[slot]
        worker.send(signal.SIGKILL)
        async with asyncio.timeout(10):
            while not worker.fate:
                await asyncio.sleep(0.01)

    def told(self, slot: int) -> list[dict[str, Any]]:
        entries = [json.loads(line) for line in self._diary.read_text().splitlines()]
        return [message for at, message in entries if at == slot]

    async def until_told(self, slot: int, message: dict[str, Any]) -> None:
        async with asyncio.timeout(10):
            while self.told(slot)[-1:] != [message]:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def supervised(
    folder: Path, program: str, *, processes: int = 2, beside: Beside | None = None, **how: Any
) -> AsyncIterator[Scene]:
    diary = folder / "diary"
    diary.touch()
    groups = listen_for_each("127.0.0.1", 0, processes)
    supervisor = Supervisor(
        (sys.executable, "-S", "-c", WORKER + program),
        lambda _slot: {"diary": str(diary)},
        groups,
        processes=processes,
        **{"drain_s": 5.0, "grace_s": 1.0, "pause_s": 0.01, **how},
    )
    scene = Scene(supervisor, diary, beside)
    try:
        yield scene
    finally:
        supervisor.stop()
        await asyncio.wait({scene.running})
        for group in groups:
            for bound in group:
                bound.close()


async def test_all_workers_serve_then_all_end(tmp_path: Path) -> None:
    """Their reports come together, once; asked to stop, each is told to finish what it has."""
    async with supervised(tmp_path, "serve(); obey()", processes=3) as scene:
        await scene.complete()
        assert [report["slot"] for report in scene.reports] == [0, 1, 2]
        scene.supervisor.stop()
        await scene.running
    assert [scene.told(slot)[-1] for slot in range(3)] == [{"do": "drain"}] * 3


async def test_a_killed_worker_is_replaced_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever died is named, with its signal; the others are the same processes as before."""
    async with supervised(tmp_path, "serve(); obey()") as scene:
        await scene.complete()
        first, other = scene.pid(0), scene.pid(1)
        os.kill(first, signal.SIGKILL)
        await scene.until_serving(0, 1, other_than=first)
        assert scene.pid(1) == other
    assert f"worker 1 (process {first}) was killed by SIGKILL; another takes its place" in caplog.messages


async def test_a_neighbour_accepts_for_a_worker_that_does_not_serve(tmp_path: Path) -> None:
    """What the kernel puts into a dead worker's queue does not wait for the next start."""
    program = "first = not os.path.exists(brief['diary'] + str(brief['slot'])); "
    program += "open(brief['diary'] + str(brief['slot']), 'w').close(); first or time.sleep(0.5); serve(); obey()"
    async with supervised(tmp_path, program, processes=3) as scene:
        await scene.complete()
        assert scene.shares == {0: [0], 1: [1], 2: [2]}
        await scene.kill(1)
        assert scene.shares == {0: [0], 2: [2, 1]}
        # The heir of the last is the first.
        await scene.kill(2)
        assert scene.shares == {0: [0, 1, 2]}
        await scene.until_serving(0, 1, 2)
        assert scene.shares == {0: [0], 1: [1], 2: [2]}
        await scene.until_told(0, {"accept": [0]})
    assert {"accept": [0, 1, 2]} in scene.told(0)


async def test_a_worker_that_cannot_serve_ends_the_start_with_its_reason(tmp_path: Path) -> None:
    """As one process would: what is wrong is the same for all, and no attempt mends it."""
    async with supervised(tmp_path, "tell(refuses='The disk is made of cheese.'); sys.exit(1)", processes=3) as scene:
        with pytest.raises(CannotStart, match=r"^The disk is made of cheese\.$"):
            await scene.running


async def test_workers_that_die_at_every_start_are_given_up(tmp_path: Path) -> None:
    """Without a reason a start is tried again; how the last one ended is in the error."""
    async with supervised(tmp_path, "sys.exit(7)", attempts=3) as scene:
        with pytest.raises(CannotStart, match=r"given up after 3 attempts: worker \d .* ended with exit status 7"):
            await scene.running


async def test_workers_that_die_as_soon_as_they_serve_are_given_up(tmp_path: Path) -> None:
    """A loop of starts that never lasts is no server."""
    async with supervised(tmp_path, "serve(); sys.exit(9)", attempts=3, processes=1) as scene:
        with pytest.raises(CannotStart, match="given up after 3 attempts"):
            await scene.running


async def test_the_pauses_between_failed_starts_grow(tmp_path: Path) -> None:
    """0.1, 0.2 and 0.4 s before the fourth attempt, which is the last."""
    began_s = time.monotonic()
    async with supervised(tmp_path, "sys.exit(7)", attempts=4, pause_s=0.1, processes=1) as scene:
        with pytest.raises(CannotStart):
            await scene.running
    assert time.monotonic() - began_s >= 0.7


async def test_a_serving_neighbour_is_not_given_up_for_one_that_cannot_start(tmp_path: Path) -> None:
    """A database may be away when one worker is replaced; the others answer what they can."""
    program = "brief['slot'] == 1 and tell(refuses='No.'); brief['slot'] == 1 and sys.exit(1); serve(); obey()"
    async with supervised(tmp_path, "time.sleep(0.3 * brief['slot']);" + program, attempts=2) as scene:
        await scene.until_serving(0)
        await asyncio.sleep(1.5)
        assert not scene.running.done()
        scene.supervisor.stop()
        await scene.running


async def test_one_that_does_not_end_in_time_is_killed(tmp_path: Path) -> None:
    """Nothing is left of it, and the command says that it failed."""
    async with supervised(tmp_path, "serve(); obey(drain=lambda: time.sleep(60))", drain_s=0.2, grace_s=0.2) as scene:
        await scene.complete()
        pids = [scene.pid(0), scene.pid(1)]
        scene.supervisor.stop()
        with pytest.raises(CommandFailed, match="did not were killed"):
            await scene.running
    assert not any(psutil.pid_exists(pid) for pid in pids)


async def test_the_second_signal_hurries_and_the_third_kills(tmp_path: Path) -> None:
    """Signals come to the supervisor; workers are told what they mean."""
    program = "serve(); obey(drain=lambda: None, hurry=lambda: None)"
    async with supervised(tmp_path, program, drain_s=60.0, grace_s=60.0) as scene:
        await scene.complete()
        scene.supervisor.hear_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        await scene.until_told(0, {"do": "drain"})
        os.kill(os.getpid(), signal.SIGINT)
        await scene.until_told(0, {"do": "hurry"})
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(CommandFailed):
            await scene.running


async def test_a_stop_during_the_start_ends_what_has_started(tmp_path: Path) -> None:
    """Workers that are not yet up hold nothing; they are not waited for."""
    began_s = time.monotonic()
    async with supervised(tmp_path, "time.sleep(60)", drain_s=60.0) as scene:
        while len(scene.supervisor._workers) < 2:
            await asyncio.sleep(0.01)
        scene.supervisor.stop()
        await scene.running
    assert time.monotonic() - began_s < 10
    assert scene.reports == []


@pytest.mark.parametrize("ending", [True, RuntimeError("enough")])
async def test_what_runs_beside_ends_the_server_by_returning_true_or_raising(tmp_path: Path, ending: Any) -> None:
    """The workers are ended in order first."""

    async def beside(_reports: Sequence[dict[str, Any]]) -> bool:
        if isinstance(ending, Exception):
            raise ending
        return True

    async with supervised(tmp_path, "serve(); obey()", beside=beside) as scene:
        if ending is True:
            await scene.running
        else:
            with pytest.raises(RuntimeError, match="enough"):
                await scene.running
    assert scene.told(0)[-1] == scene.told(1)[-1] == {"do": "drain"}


async def test_a_stop_ends_what_runs_beside(tmp_path: Path) -> None:
    """It is cancelled; a demonstration does not go on against a server that drains."""
    began, cancelled = asyncio.Event(), asyncio.Event()

    async def beside(_reports: Sequence[dict[str, Any]]) -> bool:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()
        return False

    async with supervised(tmp_path, "serve(); obey()", beside=beside) as scene:
        await asyncio.wait_for(began.wait(), 10)
        scene.supervisor.stop()
        await scene.running
    assert cancelled.is_set()


async def test_a_supervisor_that_is_cancelled_ends_its_workers_first(tmp_path: Path) -> None:
    """No worker is left behind, however the supervisor's own loop ends."""
    async with supervised(tmp_path, "serve(); obey()") as scene:
        await scene.complete()
        workers = [psutil.Process(scene.pid(slot)) for slot in (0, 1)]
        scene.running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await scene.running
    assert not any(worker.is_running() for worker in workers)


async def test_a_worker_knows_when_its_supervisor_is_gone(tmp_path: Path) -> None:
    """The leash breaks, whatever ended the supervisor; a worker that heeds it ends by itself."""
    diary = tmp_path / "diary"
    program = f"""
import asyncio, sys
from oncewise.api.sockets import listen_for_each
from oncewise.cli.supervisor import Supervisor
command = (sys.executable, "-S", "-c", {WORKER + "serve(); obey()"!r})
async def main():
    supervisor = Supervisor(command, lambda _: {{"diary": {str(diary)!r}}}, listen_for_each("127.0.0.1", 0, 2),
                            processes=2, drain_s=5)
    async def show(reports):
        print(*[report["pid"] for report in reports], flush=True)
        return False
    await supervisor.run(show)
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in (await process.stdout.readline()).split()]
    assert len(workers) == 2
    process.kill()
    await process.wait()
    _gone, alive = await asyncio.to_thread(psutil.wait_procs, workers, timeout=5)
    assert alive == []
