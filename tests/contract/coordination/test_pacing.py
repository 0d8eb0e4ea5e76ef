"""One rate and one number of running calls for all workers together."""

import asyncio
from itertools import pairwise

import pytest

from oncewise.core.pacing import Gcra
from tests.support.watching import until

ON_DATABASES_TOO = True


async def booked(limiters, starts: int) -> list[float]:
    """When so many starts would be, booked in turn over the limiters; in seconds from the first booking."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    times = []
    for number in range(starts):
        delay_s = await limiters[number % len(limiters)].reserve()
        times.append(loop.time() - began_s + delay_s)
    return times


async def test_starts_of_all_workers_are_spaced_by_the_rate(fleet):
    """Three workers, ten starts."""
    limiters = [(await fleet.worker()).limiter("p", rate=10.0, burst=1) for _ in range(3)]

    times = await booked(limiters, 10)

    spacing_s = Gcra(10.0).spacing_s
    gaps = [after - before for before, after in pairwise(times)]
    assert times[0] == pytest.approx(0.0, abs=0.05)
    # The time of the server's clock is turned into one of ours: a few milliseconds of a busy machine.
    assert min(gaps) > spacing_s - 0.05
    assert times[-1] == pytest.approx(9 * spacing_s, abs=0.1)


async def test_starts_that_are_booked_at_once_do_not_meet(fleet):
    """Twenty bookings of two workers, none awaited before the next."""
    limiters = [(await fleet.worker()).limiter("p", rate=100.0, burst=1) for _ in range(2)]
    spacing_s = Gcra(100.0).spacing_s

    delays = sorted(await asyncio.gather(*(limiters[number % 2].reserve() for number in range(20))))

    assert delays[-1] == pytest.approx(19 * spacing_s, abs=0.06)


async def test_a_burst_may_come_together_after_a_pause(fleet):
    """And no more than that."""
    limiters = [(await fleet.worker()).limiter("p", rate=5.0, burst=3) for _ in range(2)]

    times = await booked(limiters, 5)

    assert [time < 0.15 for time in times] == [True, True, True, False, False]


async def test_no_second_has_more_starts_than_the_rate(fleet):
    """A burst does not come on top of it, whichever worker had it; a provider that counts by the second refuses."""
    limiters = [(await fleet.worker()).limiter("p", rate=4.0, burst=3) for _ in range(2)]

    times = await booked(limiters, 12)

    assert [time < 0.15 for time in times[:4]] == [True, True, True, False]
    assert min(times[place + 4] - times[place] for place in range(8)) > 1.0 - 0.05


async def test_providers_have_rates_of_their_own(fleet):
    """One that is busy holds nobody else up."""
    worker = await fleet.worker()
    one, two = worker.limiter("one", rate=1.0, burst=1), worker.limiter("two", rate=1.0, burst=1)
    await one.reserve()
    assert await one.reserve() > 0.5
    assert await two.reserve() < 0.1


async def test_a_start_that_is_not_used_is_given_back(fleet):
    """The next one gets it, whoever that is."""
    mine, other = [(await fleet.worker()).limiter("p", rate=1.0, burst=1) for _ in range(2)]
    await mine.reserve()
    first_s = await mine.reserve()
    await mine.give_back()
    assert await other.reserve() <= first_s


async def test_a_start_is_not_given_back_over_a_later_one(fleet):
    """Or two would start at the same time."""
    mine, other = [(await fleet.worker()).limiter("p", rate=1.0, burst=1) for _ in range(2)]
    await mine.reserve()
    later_s = await other.reserve()
    await mine.give_back()
    assert await mine.reserve() > later_s + 0.5


async def test_a_pause_holds_everybody(fleet):
    """What one worker was told by the provider; and no burst comes at its end."""
    mine, other = [(await fleet.worker()).limiter("p", rate=2.0, burst=2) for _ in range(2)]
    await mine.reserve()
    await mine.pause(3.0)
    await mine.pause(0.1)

    delays = [await other.reserve(), await mine.reserve(), await other.reserve()]

    assert delays[0] == pytest.approx(3.0, abs=0.1)
    assert delays[1] > delays[0] + 0.3
    assert delays[2] > delays[1] + 0.3


async def test_calls_run_no_more_at_a_time_than_the_limit_over_all_workers(fleet):
    """Three slots, two workers, twenty calls."""
    slots = [(await fleet.worker()).slots("p", limit=3) for _ in range(2)]
    running = most = 0

    async def call(number: int) -> None:
        nonlocal running, most
        await slots[number % 2].take()
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        slots[number % 2].give_back()

    async with asyncio.timeout(15):
        await asyncio.gather(*(call(number) for number in range(20)))

    assert most == 3


async def test_a_slot_that_is_given_back_goes_to_a_worker_that_waits(fleet):
    """Soon, and not when somebody happens to ask."""
    mine, other = [(await fleet.worker()).slots("p", limit=1) for _ in range(2)]
    await mine.take()
    taking = asyncio.create_task(other.take())
    await asyncio.sleep(0.1)
    assert not taking.done()

    mine.give_back()

    async with asyncio.timeout(2):
        await taking


async def test_a_wait_that_is_cancelled_has_taken_nothing(fleet):
    """However late it is cancelled."""
    mine, other = [(await fleet.worker()).slots("p", limit=1) for _ in range(2)]
    for turns in range(6):
        taking = asyncio.create_task(mine.take())
        for _ in range(turns):
            await asyncio.sleep(0.0005)
        taking.cancel()
        if not (await asyncio.gather(taking, return_exceptions=True))[0]:
            mine.give_back()

    async with asyncio.timeout(5):
        await other.take()


async def test_slots_of_a_worker_that_ends_are_free_again(fleet):
    """Those it had not given back."""
    mine, other = await fleet.worker(), await fleet.worker()
    slots = mine.slots("p", limit=1)
    await slots.take()
    slots.give_back()
    await mine.aclose()

    async with asyncio.timeout(2):
        await other.slots("p", limit=1).take()


async def test_too_many_given_back_are_nobody_elses(fleet):
    """A slot is given back once."""
    mine, other = [(await fleet.worker()).slots("p", limit=1) for _ in range(2)]
    await mine.take()
    other.give_back()
    taking = asyncio.create_task(other.take())
    await asyncio.sleep(0.1)
    assert not taking.done()
    taking.cancel()
    await until(taking.done)
