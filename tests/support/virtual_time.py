"""An event loop on which waiting takes no time.

When nothing is ready to run, `time()` jumps to the next timer: a minute of pacing is tested in a millisecond, and equal
schedules give equal histories. Loop time is the only time that jumps; `time.monotonic` goes on as ever.

Deliberately absent: threads and sockets. The clock would run ahead of whatever happens outside the loop.
"""

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

DEADLOCK_S = 2.0


class _JumpingSelector(selectors.DefaultSelector):
    """Moves the clock instead of sleeping."""

    clock_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            # No timer is left: only a thread, such as an executor's that shuts down, can still wake this loop.
            events = super().select(DEADLOCK_S)
            if not events:
                raise RuntimeError("deadlock: every task waits and no timer is set")
            return events
        events = super().select(0)
        if not events:
            self.clock_s += timeout
        return events


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop whose clock starts at 0.0 and moves only when nothing else can.

    Attributes:
        unhandled: What was reported to the loop's exception handler, e.g. exceptions that nobody retrieved.
    """

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)
        self.unhandled: list[dict[str, Any]] = []
        self.set_exception_handler(lambda _loop, context: self.unhandled.append(context))

    def time(self) -> float:
        """Seconds of virtual time."""
        return self._jumping.clock_s

    def timers(self) -> list[asyncio.TimerHandle]:
        """Timers that are set."""
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        return [timer for timer in scheduled if not timer.cancelled()]

    def oversleep(self, seconds: float) -> None:
        """Let time pass as if a callback had blocked the loop for so long."""
        self._jumping.clock_s += seconds


def run_virtual(main: Coroutine[Any, Any, Any]) -> Any:
    """Run `main` on a loop of its own; fail on exceptions that nobody handled."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        result = runner.run(main)
        loop = runner.get_loop()
    assert isinstance(loop, VirtualTimeLoop)
    assert loop.unhandled == [], loop.unhandled
    return result


def virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Decorate a coroutine test so that it runs in virtual time."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        run_virtual(test(*args, **kwargs))

    return run


def virtual_loop() -> VirtualTimeLoop:
    """The running virtual loop."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    return loop


async def turns(n: int = 1) -> None:
    """Let everything that is ready run, `n` times over."""
    for _ in range(n):
        await asyncio.sleep(0)
