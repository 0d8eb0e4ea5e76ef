"""Any history of coming, going, giving up and standing still: never too many, in order, no place lost, nobody stuck."""

import asyncio
from dataclasses import dataclass

from hypothesis import example, given
from hypothesis import strategies as st

from oncewise.errors import StorageUnavailable
from oncewise.storage.places import Places
from tests.support.virtual_time import run_virtual, turns, virtual_loop

PATIENCE_S = 1.0
Op = tuple[str, int, int]

ops = st.lists(
    st.tuples(
        st.sampled_from(["come"] * 6 + ["go"] * 4 + ["give up", "pass", "pass a little", "turn away"]),
        st.integers(0, 7),
        st.integers(0, 3),
    ),
    max_size=30,
)


@dataclass
class Visitor:
    """One transaction: where it is, and since when."""

    number: int
    came_s: float
    task: asyncio.Task[None]
    leave: asyncio.Event
    inside: bool = False


class House:
    """Places, and everybody who ever came."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.places = Places(size, PATIENCE_S)
        self.visitors: list[Visitor] = []
        self.entered: list[Visitor] = []
        self.moved_s = 0.0
        self.told_s = -1.0
        self.queue: list[Visitor] = []
        self.queued_since_s = 0.0

    @property
    def inside(self) -> list[Visitor]:
        return [visitor for visitor in self.visitors if visitor.inside]

    @property
    def waiting(self) -> list[Visitor]:
        return [visitor for visitor in self.visitors if not visitor.inside and not visitor.task.done()]

    async def visit(self, visitor: Visitor) -> None:
        if not self.queue:
            self.queued_since_s = virtual_loop().time()
        self.queue.append(visitor)
        try:
            await self.stay(visitor)
        except StorageUnavailable:
            now_s = virtual_loop().time()
            if now_s != self.told_s:
                assert now_s - max(self.moved_s, self.queued_since_s) >= PATIENCE_S - 1e-9
            raise
        finally:
            if visitor in self.queue:
                self.queue.remove(visitor)

    async def stay(self, visitor: Visitor) -> None:
        async with self.places:
            self.queue.remove(visitor)
            visitor.inside = True
            self.entered.append(visitor)
            assert len(self.inside) <= self.size
            try:
                await visitor.leave.wait()
            finally:
                visitor.inside = False
                self.moved_s = virtual_loop().time()

    def come(self, _n: int) -> None:
        visitor = Visitor(len(self.visitors), virtual_loop().time(), None, asyncio.Event())  # type: ignore[arg-type]
        visitor.task = asyncio.ensure_future(self.visit(visitor))
        self.visitors.append(visitor)

    def go(self, n: int) -> None:
        if self.inside:
            self.inside[n % len(self.inside)].leave.set()

    def give_up(self, n: int) -> None:
        if self.waiting:
            self.waiting[n % len(self.waiting)].task.cancel()

    def turn_away(self, _n: int) -> None:
        self.told_s = virtual_loop().time()
        self.places.turn_away()

    def check(self) -> None:
        """Nobody waits beside a free place, or longer than patience without any movement."""
        if self.waiting:
            assert len(self.inside) == self.size
            since_s = max(self.moved_s, min(visitor.came_s for visitor in self.waiting))
            assert virtual_loop().time() - since_s <= PATIENCE_S
        order = [visitor.number for visitor in self.entered]
        assert order == sorted(order)

    async def play(self, history: list[Op]) -> None:
        for name, n, loop_turns in history:
            if name.startswith("pass"):
                await asyncio.sleep((0.1 if name == "pass a little" else 0.6) + n / 100)
            else:
                getattr(self, name.replace(" ", "_"))(n)
            await turns(loop_turns)
            if loop_turns == 3:
                self.check()
        for _ in range(2 * len(self.visitors)):
            self.go(0)
            await turns(4)
        assert not self.waiting
        assert not self.inside
        outcomes = await asyncio.gather(*(visitor.task for visitor in self.visitors), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} <= {type(None), StorageUnavailable, asyncio.CancelledError}
        await self.all_places_are_free()

    async def all_places_are_free(self) -> None:
        for _ in range(self.size):
            self.come(0)
        await turns(2)
        assert len(self.inside) == self.size
        for visitor in self.inside:
            visitor.leave.set()
        await turns(3)


async def play(size: int, history: list[Op]) -> None:
    await House(size).play(history)


@given(st.integers(1, 3), ops)
# First come, first served; also past somebody who has just given up.
@example(1, [("come", 0, 3)] * 3 + [("go", 0, 3)] * 3)
@example(1, [("come", 0, 3)] * 3 + [("go", 0, 0), ("give up", 0, 1), ("go", 0, 3)])
# A place is handed to somebody who gives up before he hears of it.
@example(1, [("come", 0, 3), ("come", 0, 3), ("go", 0, 1), ("give up", 0, 0), ("come", 0, 3)])
# Turned away and giving up at the same moment: no place was given, so none is given back.
@example(1, [("come", 0, 3)] * 3 + [("turn away", 0, 0), ("give up", 0, 0), ("come", 0, 3), ("go", 0, 3)])
# The first who waits gives up; patience begins anew with the next.
@example(
    1,
    [("come", 0, 3)] * 2 + [("pass", 7, 3), ("give up", 0, 3), ("pass a little", 0, 0), ("come", 0, 3), ("pass", 0, 3)],
)
@example(1, [("come", 0, 3), ("come", 0, 3), ("pass", 7, 0), ("pass", 7, 3), ("come", 0, 3)])
# Movement keeps patience alive for those who came later too.
@example(2, [("come", 0, 3)] * 4 + [("pass", 0, 0), ("go", 0, 3), ("pass", 0, 3), ("pass", 7, 3)])
def test_places_hold_so_many_in_order_and_lose_none(size: int, history: list[Op]):
    """Whatever comes together."""
    run_virtual(play(size, history))
