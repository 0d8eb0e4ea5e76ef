"""Many waits, one timer."""

import asyncio
import contextlib
import time

import pytest

from oncewise.providers.patience import Patience


def soon(patience: Patience, seconds: float) -> Patience:
    return patience.until(asyncio.get_running_loop().time() + seconds)


async def test_a_wait_ends_when_its_moment_comes() -> None:
    """And the task can wait again, as if nothing had been."""
    patience = Patience()
    for _ in range(2):
        begun_s = time.monotonic()
        with pytest.raises(TimeoutError), soon(patience, 0.02):
            await asyncio.sleep(5)
        assert 0.015 < time.monotonic() - begun_s < 1
        assert asyncio.current_task().cancelling() == 0
    with soon(patience, 5):
        await asyncio.sleep(0.001)


async def test_a_moment_that_moves_on_is_kept_to() -> None:
    """Each piece in time; then one that is not, measured from its own beginning."""
    patience = Patience()
    for _ in range(8):
        with soon(patience, 0.05):
            await asyncio.sleep(0.01)
    begun_s = time.monotonic()
    with pytest.raises(TimeoutError), soon(patience, 0.05):
        await asyncio.sleep(5)
    assert time.monotonic() - begun_s > 0.045


async def test_a_moment_may_come_nearer() -> None:
    """After the end of an answer little is waited for."""
    patience = Patience()
    with soon(patience, 5):
        await asyncio.sleep(0)
    with pytest.raises(TimeoutError), soon(patience, 0.01):
        await asyncio.sleep(1)


async def test_nothing_ends_between_two_waits() -> None:
    """A moment that passes while nobody waits is of no interest, whatever the task does then."""
    patience = Patience()
    with soon(patience, 0.01):
        await asyncio.sleep(0)
    await asyncio.sleep(0.03)
    with soon(patience, 5):
        await asyncio.sleep(0.01)
    patience.end()


async def test_a_moment_that_has_passed_ends_the_next_wait() -> None:
    """As with asyncio.timeout; what needs no wait is had all the same."""
    patience = Patience()
    with soon(patience, -1):
        pass
    with pytest.raises(TimeoutError), soon(patience, -1):
        await asyncio.sleep(1)


async def test_a_cancellation_passes_through() -> None:
    """By itself, and when it comes in the same turn of the loop as the moment."""
    for wait_s in (5, 0.01):

        async def waiting(wait_s: float = wait_s) -> None:
            with soon(Patience(), wait_s):
                await asyncio.sleep(1)

        task = asyncio.create_task(waiting())
        await asyncio.sleep(0)
        time.sleep(0.02)  # noqa: ASYNC251  both are due when the loop looks
        asyncio.get_running_loop().call_soon(task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_cancellation_passes_through_after_a_moment_that_came() -> None:
    """What ended the wait before has no part in this one."""

    async def waiting() -> None:
        patience = Patience()
        with contextlib.suppress(TimeoutError), soon(patience, 0):
            await asyncio.sleep(1)
        with soon(patience, 5):
            await asyncio.sleep(1)

    task = asyncio.create_task(waiting())
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_error_of_what_is_waited_for_stays_that_error() -> None:
    """Even if the moment comes while it is on its way."""
    patience = Patience()

    async def fails_late() -> None:
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            raise ZeroDivisionError from None

    with pytest.raises(ZeroDivisionError), soon(patience, 0.01):
        await fails_late()
    assert asyncio.current_task().cancelling() == 0


async def test_its_end_leaves_no_timer() -> None:
    """Nothing fires later."""
    patience = Patience()
    with soon(patience, 0.01):
        pass
    patience.end()
    patience.end()
    await asyncio.sleep(0.03)
