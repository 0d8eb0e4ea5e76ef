"""Any history of owners, faults and readers: a mirror shows some owner's log, a prefix of it, and in the end all."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from oncewise.coordination.memory import World
from oncewise.core.relaying import Mirror, Outbox
from oncewise.core.stream_hub import Position, StreamHub, StreamLog
from tests.support.virtual_time import run_virtual, turns

Op = tuple[str, int, int]
"""What happens, a number that says to what, and how many turns of the loop go by afterwards."""

ops = st.lists(
    st.tuples(
        st.sampled_from(
            ["append"] * 8
            + ["burst", "note", "look", "look", "ask", "late", "late", "die", "down", "up", "lose", "flush", "pass"]
        ),
        st.integers(0, 90),
        st.integers(0, 4),
    ),
    max_size=60,
)


class Lines:
    """Each event one line."""

    def delta(self, position: Position, text: str) -> bytes:
        return f"{position} {text}\n".encode()

    def event(self, name: str, data: Mapping[str, Any], position: Position | None) -> bytes:
        return f"{position} {name} {dict(data)}\n".encode()


@dataclass
class Owner:
    """One attempt at the turn. `alive` while nobody has taken over; it may go on writing all the same."""

    log: StreamLog
    outbox: Outbox
    alive: bool = True


class History:
    """Plays operations on one turn and watches every mirror."""

    def __init__(self) -> None:
        self.world = World()
        self.serial = 0
        self.owners: list[Owner] = []
        self.mirrors: list[tuple[StreamLog, Mirror]] = []
        self.take_over()

    @property
    def owner(self) -> Owner:
        return self.owners[-1]

    async def play(self, history: list[Op]) -> None:
        for name, n, loop_turns in history:
            result = getattr(self, name)(n)
            if result is not None:
                await result
            self.check()
            await turns(loop_turns)
            self.check()
        self.owner.log.close("done", {})
        self.up(0)
        self.ask(0)
        self.look(0)
        await asyncio.sleep(5.0)
        self.check()
        for copy, mirror in self.mirrors:
            assert copy.closed
            assert copy.epoch == self.owner.log.epoch
            # The same events, and each delta encoded as the owner's viewers were shown it.
            assert copy._frames == self.owner.log._frames
            assert copy._notes == self.owner.log._notes
            assert copy._end == self.owner.log._end
            mirror.close()
        for owner in self.owners:
            await owner.outbox.aclose()
        assert not self.world.readers

    def take_over(self) -> None:
        epoch = len(self.owners) + 1
        log = StreamHub(Lines()).open("key", epoch)
        outbox = Outbox(self.world.worker(f"worker {epoch}").relay, keep_s=600.0)
        self.owners.append(Owner(log, outbox))
        outbox.publish("n", log)

    # -- operations ----------------------------------------------------------------------------------------------

    def append(self, _n: int) -> None:
        self.serial += 1
        self.owner.log.append(f"{self.serial} ")

    def burst(self, n: int) -> None:
        for _ in range(n):
            self.append(0)

    def note(self, n: int) -> None:
        self.owner.log.note("note", {"n": n})

    def look(self, _n: int) -> None:
        copy = StreamHub(Lines()).open("key", 1)
        mirror = Mirror(
            self.world.worker(f"viewer {len(self.mirrors)}").relay, "n", copy, lambda epoch: ("reset", {"epoch": epoch})
        )
        self.mirrors.append((copy, mirror))

    def ask(self, _n: int) -> None:
        self.owner.outbox.publish("n", self.owner.log)

    def late(self, n: int) -> None:
        """An owner that was paused and does not know that it lost the turn writes on."""
        lost = self.owners[n % len(self.owners)]
        if lost is not self.owner:
            lost.log.append("late ")

    def die(self, n: int) -> Any:
        """The owner is lost, with what it had not told yet, or only paused; somebody takes over."""
        lost = self.owner
        self.take_over()
        return lost.outbox.aclose(0.0) if n % 2 else None

    def down(self, _n: int) -> None:
        self.world.down = True

    def up(self, _n: int) -> None:
        self.world.down = False
        self.world.lose_answers = 0

    def lose(self, n: int) -> None:
        self.world.lose_answers = n % 3

    def flush(self, _n: int) -> None:
        self.world.flush()

    def pass_(self, n: int) -> Any:
        return asyncio.sleep(n / 100)

    def __getattr__(self, name: str) -> Any:
        return self.pass_ if name == "pass" else object.__getattribute__(self, name)

    # -- what must hold ------------------------------------------------------------------------------------------

    def check(self) -> None:
        for copy, _ in self.mirrors:
            told = self.owners[copy.epoch - 1].log
            assert copy._texts == told._texts[: copy.deltas], "a prefix of what that owner wrote, delta by delta"
            assert copy._notes == [note for note in told._notes if note in copy._notes]


@given(ops)
@example([("append", 0, 2), ("look", 0, 3), ("flush", 0, 0), ("append", 0, 3), ("look", 0, 2)])
@example([("append", 0, 2), ("look", 0, 3), ("die", 0, 0), ("late", 0, 2), ("append", 0, 2), ("late", 0, 2)])
@example([("lose", 2, 0), ("append", 0, 4), ("burst", 90, 0), ("down", 0, 1), ("append", 0, 0), ("up", 0, 0)])
@example([("burst", 90, 4), ("look", 0, 4), ("flush", 0, 0), ("burst", 90, 0), ("flush", 0, 0), ("pass", 90, 0)])
def test_histories(history: list[Op]) -> None:
    """Whoever looks, whenever, sees one owner's text without gap or repetition, and in the end the last owner's."""

    async def play() -> None:
        await History().play(history)

    run_virtual(play())
