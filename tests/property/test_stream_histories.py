"""Any history of publishing and viewing: every viewer ends with the log's text, and got each event once."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from oncewise.core.stream_hub import Position, StreamHub, StreamLog, Viewer
from tests.support.virtual_time import run_virtual, turns

Op = tuple[str, int, int]
"""What happens, a number that says to what, and how many turns of the loop go by afterwards."""

ops = st.lists(
    st.tuples(
        st.sampled_from(
            ["append"] * 6
            + ["note", "view", "view", "resume", "read", "feed", "feed", "jam"]
            + ["take", "take", "leave", "restart", "close"]
        ),
        st.integers(0, 30),
        st.integers(0, 3),
    ),
    max_size=60,
)


class Lines:
    """Each event one line of JSON."""

    def delta(self, position: Position, text: str) -> bytes:
        return json.dumps(["delta", str(position), text]).encode() + b"\n"

    def event(self, name: str, data: Mapping[str, Any], position: Position | None) -> bytes:
        return json.dumps([name, None if position is None else str(position), dict(data)]).encode() + b"\n"


@dataclass
class Screen:
    """What one client shows, made of the frames it was sent."""

    viewer: Viewer
    after: Position | None
    text: str = ""
    last: Position | None = None
    ended: int = 0
    frames: list[list[Any]] = field(default_factory=list)
    reading: asyncio.Task[None] | None = None
    jammed: bool = False

    def push(self, chunk: bytes) -> bool:
        if not self.jammed:
            self.show(chunk)
        return not self.jammed

    def show(self, chunk: bytes) -> None:
        for line in chunk.splitlines():
            name, position, data = frame = json.loads(line)
            self.frames.append(frame)
            assert self.ended == 0, "nothing comes after the terminal event"
            if name == "note":
                continue
            self._advance(Position.parse(position))
            if name == "delta":
                self.text += data
            elif name == "reset":
                self.text = ""
            else:
                self.ended += 1

    def _advance(self, position: Position | None) -> None:
        assert position is not None
        assert self.last is None or position > self.last, "ids grow, so nothing is shown twice"
        self.last = position

    async def read(self) -> None:
        async for chunk in self.viewer:
            self.show(chunk)


class History:
    """Plays operations on one log and watches every screen."""

    def __init__(self) -> None:
        self.hub = StreamHub(Lines())
        self.log: StreamLog = self.hub.open("key")
        self.texts: list[str] = []
        self.notes: list[list[Any]] = []
        self.screens: list[Screen] = []
        self.serial = 0

    async def play(self, history: list[Op]) -> None:
        for name, n, loop_turns in history:
            getattr(self, name)(n)
            self.check()
            await turns(loop_turns)
        self.close(0)
        for screen in self.screens:
            await (screen.reading or self.drain(screen))
            self.check_screen(screen)
        assert self.log.viewers == 0
        self.hub.close()
        assert self.hub.stats().bytes == 0

    async def drain(self, screen: Screen) -> None:
        assert await screen.viewer.wait(0.0) == (not screen.viewer.ended)
        screen.show(screen.viewer.take())
        screen.viewer.close()

    # -- operations ----------------------------------------------------------------------------------------------

    def append(self, _n: int) -> None:
        if not self.log.closed:
            self.serial += 1
            self.texts.append(f"{self.serial} ")
            position = self.log.append(self.texts[-1])
            assert position == Position(self.log.epoch, len(self.texts)) == self.log.tail

    def note(self, _n: int) -> None:
        if not self.log.closed:
            self.serial += 1
            self.notes.append(["note", None, {"n": self.serial, "at": len(self.texts)}])
            self.log.note("note", self.notes[-1][2])

    def view(self, _n: int) -> None:
        self.look(None)

    def resume(self, n: int) -> None:
        self.look(Position(1 + n % 3, n // 3))

    def look(self, after: Position | None) -> None:
        viewer = self.log.view(after)
        if viewer.from_start or after is None:
            self.screens.append(Screen(viewer, None))
            return
        # What a client with that id shows: the text up to it, or that of an attempt which is no more.
        text = "".join(self.texts[: after.seq]) if after.epoch == self.log.epoch else "of an older attempt"
        self.screens.append(Screen(viewer, after, text, after, ended=int(viewer.ended)))

    def read(self, n: int) -> None:
        if manual := [each for each in self.screens if each.reading is None and not each.viewer.ended]:
            screen = manual[n % len(manual)]
            screen.reading = asyncio.create_task(screen.read())

    def feed(self, n: int) -> None:
        """Read with a sink, which takes what is published before the task could."""
        if manual := [each for each in self.screens if each.reading is None and not each.viewer.ended]:
            manual[n % len(manual)].viewer.push_to(manual[n % len(manual)])
            self.read(n)

    def jam(self, n: int) -> None:
        """A sink takes nothing, or again."""
        if self.screens:
            screen = self.screens[n % len(self.screens)]
            screen.jammed = not screen.jammed

    def take(self, n: int) -> None:
        if manual := [each for each in self.screens if each.reading is None]:
            screen = manual[n % len(manual)]
            screen.show(screen.viewer.take())

    def leave(self, n: int) -> None:
        """A client goes, and comes back with the last id it saw."""
        if manual := [each for each in self.screens if each.reading is None]:
            screen = manual[n % len(manual)]
            self.screens.remove(screen)
            screen.viewer.close()
            if screen.last is not None:
                viewer = self.log.view(screen.last)
                assert not viewer.from_start, "an id that was sent is known"
                assert viewer.ended == (screen.ended == 1)
                self.screens.append(Screen(viewer, screen.last, screen.text, screen.last, screen.ended))

    def restart(self, n: int) -> None:
        if not self.log.closed:
            self.log.restart(self.log.epoch + 1 + n % 2, "reset", {})
            self.texts, self.notes = [], []

    def close(self, _n: int) -> None:
        self.log.close("done", {})

    # -- what must hold ------------------------------------------------------------------------------------------

    def check(self) -> None:
        assert self.log.text == "".join(self.texts)
        assert self.log.viewers == sum(not screen.viewer._closed for screen in self.screens)
        held = [*self.log._frames, *(frame for _, frame in self.log._notes)]
        assert self.hub.stats().bytes == sum(len(frame) for frame in held)

    def check_screen(self, screen: Screen) -> None:
        assert screen.ended == 1
        assert screen.text == "".join(self.texts)
        shown = [frame for frame in screen.frames if frame in self.notes]
        assert len(shown) == len({json.dumps(frame) for frame in shown}), "a viewer is shown a note once"
        if screen.after is None:
            assert shown == self.notes


@given(ops)
@example([("append", 0, 0), ("view", 0, 0), ("take", 0, 0), ("restart", 0, 0), ("restart", 0, 0), ("append", 0, 0)])
@example([("append", 0, 0), ("note", 0, 0), ("close", 0, 0), ("resume", 6, 0)])
@example([("close", 0, 0), ("resume", 3, 0), ("leave", 0, 0)])
@example([("view", 0, 0), ("feed", 0, 2), ("append", 0, 0), ("jam", 0, 0), *[("append", 0, 0)] * 2, ("note", 0, 2)])
@example([("view", 0, 0), ("feed", 0, 2), ("note", 0, 0), ("append", 0, 0), ("restart", 0, 2), ("append", 0, 0)])
@example([("append", 0, 0), ("view", 0, 0), ("read", 0, 2), ("append", 0, 0), ("append", 0, 0), ("close", 0, 0)])
def test_histories(history: list[Op]) -> None:
    """Every screen ends with the log's text, whenever it came, however it read, and wherever it resumed."""

    async def play() -> None:
        await History().play(history)

    run_virtual(play())
