"""Any history of interest in shared work over workers: once words get through, the leader counts who is interested."""

import asyncio
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from oncewise.coordination.memory import World
from oncewise.core.coalesce import Coalescer, Flight, Waiter
from oncewise.core.stream_hub import StreamHub, StreamLog
from oncewise.errors import Failure
from oncewise.service.fleet import LAPSE_S, RENEW_S, Fleet, Following
from tests.support.virtual_time import run_virtual, turns

Op = tuple[str, int, int]
"""What happens, a number that says to what, and how many turns of the loop go by afterwards."""

ops = st.lists(
    st.tuples(
        st.sampled_from(
            ["follow"] * 3
            + ["hold", "hold", "let_go", "leave", "repeat", "append", "append", "down", "up", "flush", "die", "pass"]
        ),
        st.integers(0, 30),
        st.integers(0, 4),
    ),
    max_size=40,
)


class Work:
    """What is led; its own requester stays."""

    def __init__(self) -> None:
        self.log: StreamLog = StreamHub().open("key")
        self.flights = Coalescer(deadline_s=None)
        self.mine: Waiter[str] = self.flights.join("key", self._run)

    async def _run(self, _flight: Flight[str]) -> str:
        await asyncio.Event().wait()
        return ""

    @property
    def requesters(self) -> int:
        return self.mine.flight.waiters

    async def watch(self) -> StreamLog | None:
        return self.log

    def board(self) -> Waiter[Any] | None:
        return self.flights.follow_flight(self.mine.flight)

    def stop(self, failure: Failure, *, keep_partial: bool = True) -> None:
        self.flights.cancel(self.mine.flight, failure)


class Follower:
    """One worker that may be interested."""

    def __init__(self, world: World, number: int) -> None:
        self.coordination = world.worker(f"w{number}")
        self.fleet = Fleet(b"s", coordination=self.coordination)
        self.following: Following | None = None
        self.holds = False
        self.copy: StreamLog | None = None
        self.dead = False


class History:
    def __init__(self) -> None:
        self.world = World()
        self.lead = Fleet(b"s", coordination=self.world.worker("lead"))
        self.work = Work()
        self.lead.lead("n", self.work)
        self.followers = [Follower(self.world, number) for number in range(3)]

    async def play(self, history: list[Op]) -> None:
        for name, n, loop_turns in history:
            follower = self.followers[n % 3]
            if name in ("down", "up"):
                self.world.down = name == "down"
            elif name == "flush":
                self.world.flush()
            elif name == "append":
                self.work.log.append(f"{n} ")
            elif name == "pass":
                await asyncio.sleep(n / 3)
            elif not follower.dead:
                getattr(self, name)(follower)
            await turns(loop_turns)
        await self.settle()

    def follow(self, follower: Follower) -> None:
        if follower.following is None:
            follower.following = follower.fleet.follow("n", "lead", lambda: None)

    def hold(self, follower: Follower) -> None:
        if follower.following is not None and not follower.holds:
            follower.holds = True
            follower.following.hold()

    def let_go(self, follower: Follower) -> None:
        if follower.following is not None and follower.holds:
            follower.holds = False
            follower.following.let_go()

    def repeat(self, follower: Follower) -> None:
        if follower.following is not None and follower.copy is None:
            follower.copy = StreamHub().open("copy")
            follower.following.repeat(follower.copy, lambda epoch: ("reset", {"epoch": epoch}), lambda: None)

    def leave(self, follower: Follower) -> None:
        if follower.following is not None:
            follower.following.leave()
            follower.following, follower.copy, follower.holds = None, None, False

    def die(self, follower: Follower) -> None:
        follower.dead = True
        follower.coordination.die()

    async def settle(self) -> None:
        self.world.down = False
        await asyncio.sleep(LAPSE_S * 2 + RENEW_S)
        living = [each for each in self.followers if not each.dead]
        assert self.work.requesters == 1 + sum(each.holds for each in living)
        interested = [each for each in living if each.following is not None]
        assert len(self.lead._led["n"].interests) == len(interested)
        for each in living:
            assert each.copy is None or each.copy.text == self.work.log.text
        assert self.lead._outbox.tells("n") == any(each.copy is not None for each in living)
        self.lead.ended("n", self.work)
        assert (self.work.requesters, self.lead.idle) == (1, True)
        for each in self.followers:
            self.leave(each)
            assert each.fleet.idle
            await each.fleet.aclose()
        await self.lead.aclose()
        await self.work.flights.aclose()


@given(ops)
@example([("follow", 0, 0), ("hold", 0, 0), ("down", 0, 0), ("let_go", 0, 0), ("up", 0, 0)])
@example([("follow", 0, 0), ("repeat", 0, 3), ("append", 1, 0), ("flush", 0, 0), ("append", 2, 3), ("die", 0, 0)])
@example([("down", 0, 0), ("follow", 0, 0), ("hold", 0, 0), ("repeat", 0, 0), ("append", 0, 0), ("pass", 30, 0)])
@example([("follow", 1, 0), ("hold", 1, 0), ("leave", 1, 0), ("follow", 1, 0), ("hold", 1, 0)])
def test_histories(history: list[Op]) -> None:
    """Nobody is counted who is not there, nobody is forgotten who is, and everybody's copy is whole."""

    async def play() -> None:
        await History().play(history)

    run_virtual(play())
