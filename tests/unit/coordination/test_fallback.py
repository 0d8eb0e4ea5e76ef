"""Limits while the best way to share them is away."""

import asyncio

import pytest

from oncewise.coordination.fallback import FallbackLimiter, FallbackSlots
from oncewise.coordination.memory import World
from oncewise.core.pacing import Gcra, Starts
from tests.support.virtual_time import virtual_loop, virtual_time

SPACING_S = Gcra(1.0).spacing_s


class Ways:
    """Two worlds: the better one, and the one behind it."""

    def __init__(self) -> None:
        self.worlds = [World(), World()]
        self.known = 2

    def limiter(self, number: int) -> FallbackLimiter:
        limiters = [world.worker(str(number)).limiter("p", rate=1.0, burst=1) for world in self.worlds]
        return FallbackLimiter(lambda: limiters[: self.known], Starts(1.0, 1), virtual_loop().time)

    def slots(self, number: int) -> FallbackSlots:
        slots = [world.worker(str(number)).slots("p", limit=1) for world in self.worlds]
        return FallbackSlots(lambda: slots[: self.known])


@virtual_time
async def test_starts_keep_their_distance_over_every_change() -> None:
    """One process: from the best to the next, to none at all, and back, and after the state was lost."""
    ways = Ways()
    limiter = ways.limiter(1)
    starts = []

    async def book() -> None:
        starts.append(virtual_loop().time() + await limiter.reserve())

    await book()
    ways.worlds[0].down = True
    await book()
    ways.worlds[1].down = True
    await book()
    ways.worlds[0].down = False
    await book()
    ways.worlds[0].flush()
    await book()

    assert starts == pytest.approx([number * SPACING_S for number in range(5)])


@virtual_time
async def test_two_processes_share_the_next_best() -> None:
    """As they shared the best."""
    ways = Ways()
    ways.worlds[0].down = True
    first, second = ways.limiter(1), ways.limiter(2)
    delays = [await first.reserve(), await second.reserve(), await first.reserve()]
    assert delays == pytest.approx([0.0, SPACING_S, 2 * SPACING_S])


@virtual_time
async def test_a_start_is_given_back_where_it_was_booked() -> None:
    """Which may be away by then."""
    ways = Ways()
    limiter = ways.limiter(1)
    await limiter.reserve()
    ways.worlds[0].down = True
    await limiter.give_back()
    ways.worlds[0].down = False
    await limiter.reserve()
    await limiter.give_back()
    assert await limiter.reserve() == pytest.approx(SPACING_S)


@virtual_time
async def test_a_pause_is_told_to_all_that_answer() -> None:
    """So that it holds when workers change from one to the other."""
    ways = Ways()
    ways.worlds[0].down = True
    await ways.limiter(1).pause(10.0)
    assert await ways.limiter(2).reserve() == pytest.approx(10.0)
    ways.worlds[0].down = False
    assert await ways.limiter(3).reserve() == pytest.approx(0.0)


@virtual_time
async def test_a_process_that_is_alone_asks_nobody() -> None:
    """Until others are there."""
    ways = Ways()
    ways.known = 0
    limiter, slots = ways.limiter(1), ways.slots(1)
    assert await limiter.reserve() == 0.0
    assert await limiter.reserve() == pytest.approx(SPACING_S)
    await slots.take()
    ways.known = 2
    await slots.take()
    slots.give_back()
    slots.give_back()
    slots.give_back()
    assert [world.slots.get("p", set()) for world in ways.worlds] == [set(), set()]


@virtual_time
async def test_slots_are_given_back_where_they_were_taken() -> None:
    """One here, one there."""
    ways = Ways()
    slots, other = ways.slots(1), ways.slots(2)
    await slots.take()
    ways.worlds[0].down = True
    await slots.take()
    taking = asyncio.create_task(other.take())
    await asyncio.sleep(1.0)
    assert not taking.done()
    ways.worlds[0].down = False
    slots.give_back()
    slots.give_back()
    await asyncio.wait_for(taking, 5.0)


@virtual_time
async def test_what_nobody_else_shares_is_had_at_once() -> None:
    """With nobody to ask a start or a slot needs no wait; with somebody it does, whether or not one is free."""
    ways = Ways()
    limiter, slots = ways.limiter(1), ways.slots(1)
    assert (limiter.take_now(), slots.take_now()) == (False, False)
    ways.known = 0
    assert [limiter.take_now() for _ in range(2)] == [True, False], "one a second"
    assert await limiter.reserve() == pytest.approx(SPACING_S)
    assert [slots.take_now() for _ in range(2)] == [True, True], "the pacer counts its own"


@virtual_time
async def test_a_slot_had_at_once_is_given_back_to_nobody() -> None:
    """Whoever shares the limit by then has lent none."""
    ways = Ways()
    slots = ways.slots(1)
    ways.known = 0
    assert slots.take_now()
    ways.known = 2
    await slots.take()
    slots.give_back()
    late = asyncio.create_task(ways.slots(2).take())
    await asyncio.sleep(5)
    assert not late.done()
    slots.give_back()
    await late
