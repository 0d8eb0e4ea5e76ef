"""A log told to a relay and repeated from it."""

import asyncio
from collections.abc import Mapping
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import pytest

from oncewise.coordination.memory import MemoryCoordination, World
from oncewise.core.relaying import BATCH_BYTES, BATCH_DELTAS, Mirror, Outbox
from oncewise.core.stream_hub import Position, StreamHub, StreamLog
from oncewise.errors import ResponseTooLarge
from oncewise.ports import LogEntry, LogTail
from tests.support.virtual_time import turns, virtual_time


class Labelled:
    """`[1-2 text]` for deltas, `<name>` for notes, `<name 1-3>` for events with a position."""

    def delta(self, position: Position, text: str) -> bytes:
        return f"[{position} {text}]".encode()

    def event(self, name: str, data: Mapping[str, Any], position: Position | None) -> bytes:
        return f"<{name}>".encode() if position is None else f"<{name} {position}>".encode()


def opened(*texts: str, epoch: int = 1, **limits: Any) -> StreamLog:
    log = StreamHub(Labelled(), **limits).open("key", epoch)
    for text in texts:
        log.append(text)
    return log


def seen(log: StreamLog, after: Position | None = None) -> bytes:
    viewer = log.view(after)
    shown = viewer.take()
    viewer.close()
    return shown


def reset(epoch: int) -> tuple[str, dict[str, Any]]:
    return "reset", {"epoch": epoch}


def rest(log: StreamLog, after: int = 0, deltas: int = 64, size: int = 10_000) -> LogEntry | None:
    return log.entry(after, max_deltas=deltas, max_bytes=size)


# -- a log as values ---------------------------------------------------------------------------------------------


@virtual_time
async def test_events_are_told_up_to_the_limits_and_the_end_comes_with_the_last() -> None:
    """At least one, however large."""
    log = opened("a", "b", "c")
    log.close("done", {"n": 3})
    assert rest(log, deltas=2) == LogEntry(1, 0, ("a", "b"))
    assert rest(log, size=1) == LogEntry(1, 0, ("a",))
    assert rest(log, after=2) == LogEntry(1, 2, ("c",), end=("done", {"n": 3}))
    assert rest(log, after=3) == LogEntry(1, 3, end=("done", {"n": 3}))
    assert rest(log, after=4) is None


@virtual_time
async def test_a_note_goes_with_what_follows_it() -> None:
    """So that each is told once, and two entries never have the same place."""
    log = opened("a")
    log.note("meta", {"n": 1})
    assert rest(log) == LogEntry(1, 0, ("a",))
    assert rest(log, after=1) is None
    log.append("b")
    assert rest(log, after=1) == LogEntry(1, 1, ("b",), ((1, "meta", {"n": 1}),))
    log.note("meta", {"n": 2})
    log.close("done", {})
    assert rest(log, after=2) == LogEntry(1, 2, notes=((2, "meta", {"n": 2}),), end=("done", {}))


@virtual_time
async def test_a_log_that_was_severed_is_told_without_an_end() -> None:
    """Its viewers resume elsewhere; so do those of its mirrors."""
    log = opened("a")
    log.sever()
    assert rest(log) == LogEntry(1, 0, ("a",))
    assert rest(log, after=1) is None


@virtual_time
async def test_a_mirror_is_the_same_frame_by_frame() -> None:
    """Deltas, notes and the end, told in pieces that overlap."""
    log, copy = opened(), opened()
    log.note("meta", {})
    for text in "abcde":
        log.append(text)
    log.note("late", {})
    log.close("done", {})
    for entry in (rest(log, 0, 2), rest(log, 1, 2), rest(log, 0, 4), rest(log, 4, 9), rest(log, 2, 9)):
        assert entry is not None
        assert copy.mirror(entry)
    assert copy._frames == log._frames
    assert copy._notes == log._notes
    assert seen(copy) == seen(log)
    assert copy.closed


@virtual_time
async def test_a_mirror_leaves_no_gap_and_no_other_epoch() -> None:
    """What it cannot place it leaves."""
    copy = opened("a", epoch=2)
    assert not copy.mirror(LogEntry(2, 2, ("c",)))
    assert copy.mirror(LogEntry(1, 1, ("old",)))
    assert copy.mirror(LogEntry(3, 1, ("new",)))
    assert copy.text == "a"


# -- text whose deltas nobody knows ------------------------------------------------------------------------------


@virtual_time
async def test_a_joined_piece_is_one_frame_with_the_place_of_its_last_delta() -> None:
    """And later deltas go on from there."""
    log = opened("a")
    viewer = log.view()
    assert viewer.take() == b"[1-1 a]"
    log.append_joined("bcd", 4)
    assert viewer.take() == b"[1-4 bcd]"
    log.append("e")
    assert viewer.take() == b"[1-5 e]"
    log.close("done", {})
    assert viewer.take() == b"<done 1-6>"
    assert seen(log) == b"[1-5 abcde]<done 1-6>"
    assert seen(log, Position(1, 1)) == b"[1-5 bcde]<done 1-6>"
    assert seen(log, Position(1, 4)) == b"[1-5 e]<done 1-6>"


@virtual_time
async def test_a_position_inside_a_joined_piece_shows_everything_again() -> None:
    """Another process told it; here nobody knows where it is in the text."""
    log = opened("a")
    log.append_joined("bcd", 4)
    for seq in (2, 3):
        viewer = log.view(Position(1, seq))
        assert viewer.from_start
        assert viewer.take() == b"[1-4 abcd]"
        viewer.close()
    assert not log.view(Position(1, 4)).from_start


@virtual_time
async def test_a_joined_piece_repeats_nothing_and_obeys_the_limits() -> None:
    """What is there is there."""
    log = opened("a", "b", max_deltas=5)
    log.append_joined("ab", 2)
    log.append_joined("a", 1)
    assert log.text == "ab"
    with pytest.raises(ResponseTooLarge):
        log.append_joined("cdef", 6)
    log.close("done", {})
    log.append_joined("c", 3)
    assert log.text == "ab"


@virtual_time
async def test_a_relay_that_comes_back_goes_on_after_a_joined_piece() -> None:
    """The row told four deltas, the relay then has all of them one by one."""
    copy = opened("a")
    copy.append_joined("bcd", 4)
    assert copy.mirror(LogEntry(1, 0, ("a", "b", "c", "d", "e", "f")))
    assert copy.text == "abcdef"
    assert copy.tail == Position(1, 6)


# -- the outbox --------------------------------------------------------------------------------------------------


class Slow:
    """A relay that notes when it was told what."""

    def __init__(self, relay: Any) -> None:
        self._relay = relay
        self.told: list[tuple[float, LogEntry]] = []

    async def append(self, name: str, entry: LogEntry, *, keep_s: float) -> LogTail:
        self.told.append((asyncio.get_running_loop().time(), entry))
        tail: LogTail = await self._relay.append(name, entry, keep_s=keep_s)
        return tail

    def read(self, *args: Any) -> Any:
        return self._relay.read(*args)


class Pair:
    """An owner's log, and a mirror of it."""

    def __init__(self, epoch: int = 1) -> None:
        self.world = World()
        self.owner: MemoryCoordination = self.world.worker("owner")
        self.relay = Slow(self.owner.relay)
        self.outbox = Outbox(self.relay, keep_s=60.0)
        self.log = opened(epoch=epoch)
        self.copy = opened(epoch=epoch)
        self.mirror = Mirror(self.world.worker("other").relay, "n", self.copy, reset)

    @property
    def sizes(self) -> list[int]:
        return [len(entry.texts) for _, entry in self.relay.told]


@virtual_time
async def test_the_first_delta_goes_at_once_and_the_rest_in_batches() -> None:
    """A hundred deltas a second for half a second: twenty entries and one."""
    pair = Pair()
    pair.outbox.publish("n", pair.log)
    await turns(3)
    pair.log.append("x")
    await turns(3)
    assert pair.copy.text == "x"
    for _ in range(50):
        await asyncio.sleep(0.01)
        pair.log.append("x")
    await asyncio.sleep(0.1)
    assert pair.copy.text == "x" * 51
    assert pair.sizes[0] == 1
    assert 18 <= len(pair.sizes) <= 23
    times = [at for at, _ in pair.relay.told]
    assert min(after - before for before, after in pairwise(times)) >= 0.025 - 1e-9
    await pair.outbox.aclose()


@virtual_time
async def test_a_batch_is_full_with_so_many_deltas_or_bytes_and_then_does_not_wait() -> None:
    """Sixty-four, or sixteen KiB."""
    pair = Pair()
    pair.outbox.publish("n", pair.log)
    for _ in range(BATCH_DELTAS * 2 + 1):
        pair.log.append("x")
    await turns(20)
    assert pair.sizes == [64, 64]
    await asyncio.sleep(0.03)
    assert pair.sizes == [64, 64, 1]
    for _ in range(4):
        pair.log.append("y" * (BATCH_BYTES // 2))
    await turns(20)
    assert pair.sizes[3:] in ([2, 2], [1, 2, 1], [2, 1, 1])
    await pair.outbox.aclose()


@virtual_time
async def test_the_end_does_not_wait_for_its_batch() -> None:
    """Whoever waits for the answer elsewhere waits for this."""
    pair = Pair()
    pair.outbox.publish("n", pair.log)
    pair.log.append("a")
    await turns(3)
    pair.log.append("b")
    pair.log.close("done", {"n": 1})
    await turns(6)
    assert pair.copy.closed
    assert seen(pair.copy) == seen(pair.log)
    await turns(3)
    assert not pair.outbox.tells("n")


@virtual_time
async def test_publishing_never_waits_for_a_relay_that_is_away() -> None:
    """A thousand deltas while it is; all of them afterwards, without gap or repetition."""
    pair = Pair()
    pair.outbox.publish("n", pair.log)
    pair.log.append("0 ")
    await turns(3)
    pair.world.down = True
    for number in range(1000):
        pair.log.append(f"{number} ")
        if number % 100 == 0:
            await asyncio.sleep(0.05)
    assert pair.copy.text == "0 "
    pair.world.down = False
    await asyncio.sleep(2.0)
    assert pair.copy.text == pair.log.text
    assert pair.copy._frames == pair.log._frames
    await pair.outbox.aclose()


@virtual_time
async def test_an_answer_that_is_lost_leaves_no_repetition() -> None:
    """The entry was added, and is sent again."""
    pair = Pair()
    pair.world.lose_answers = 2
    pair.outbox.publish("n", pair.log)
    pair.log.append("a")
    await asyncio.sleep(1.0)
    pair.log.append("b")
    await asyncio.sleep(1.0)
    assert pair.copy.text == "ab"
    await pair.outbox.aclose()


@virtual_time
async def test_a_copy_that_was_lost_is_told_again_from_its_beginning() -> None:
    """With the next delta; or, if none comes, when somebody asks."""
    pair = Pair()
    pair.outbox.publish("n", pair.log)
    pair.log.append("a")
    await turns(3)
    pair.world.flush()
    pair.log.append("b")
    await asyncio.sleep(1.0)
    assert pair.copy.text == "ab"
    assert pair.world.log("n").tail == (1, 2)

    pair.world.flush()
    pair.outbox.publish("n", pair.log)
    await asyncio.sleep(1.0)
    assert pair.world.log("n").tail == (1, 2)
    assert pair.copy.text == "ab"
    await pair.outbox.aclose()


@virtual_time
async def test_a_fenced_owner_tells_nothing_more() -> None:
    """Its line ends; the log goes on for those who look at it here."""
    pair = Pair()
    pair.outbox.publish("n", pair.log)
    pair.log.append("old")
    await turns(3)
    newer = opened("new", epoch=2)
    other = Outbox(pair.owner.relay, keep_s=60.0)
    other.publish("n", newer)
    await turns(3)
    pair.log.append("late")
    await asyncio.sleep(0.1)
    assert not pair.outbox.tells("n")
    assert pair.copy.text == "new"
    assert seen(pair.copy) == b"[2-1 new]"
    assert pair.log.tap is None
    await other.aclose()


@virtual_time
async def test_the_end_of_a_log_is_not_offered_for_ever() -> None:
    """A relay that stays away costs no memory of what has ended."""
    pair = Pair()
    pair.world.down = True
    pair.outbox.publish("n", pair.log)
    pair.log.append("a")
    pair.log.close("done", {})
    await asyncio.sleep(4.0)
    assert pair.outbox.tells("n")
    await asyncio.sleep(3.0)
    assert not pair.outbox.tells("n")


@virtual_time
async def test_a_log_that_was_withdrawn_is_told_no_more_and_may_be_told_anew() -> None:
    """Nobody elsewhere looked for a while, and then somebody does."""
    pair = Pair()
    pair.outbox.publish("n", pair.log)
    pair.log.append("a")
    await turns(3)
    pair.outbox.withdraw("n")
    pair.log.append("b")
    await asyncio.sleep(0.1)
    assert pair.copy.text == "a"
    pair.outbox.publish("n", pair.log)
    await asyncio.sleep(0.1)
    assert pair.copy.text == "ab"
    await pair.outbox.aclose()
    assert not pair.outbox.tells("n")


@virtual_time
async def test_no_more_logs_are_told_than_the_limit() -> None:
    """Further ones are read from their rows."""
    world = World()
    outbox = Outbox(world.worker("owner").relay, keep_s=60.0, max_logs=2)
    for name in ("a", "b", "c"):
        outbox.publish(name, opened("x"))
    await turns(3)
    assert [outbox.tells(name) for name in ("a", "b", "c")] == [True, True, False]
    await outbox.aclose()


@virtual_time
async def test_what_has_ended_is_told_before_the_outbox_closes() -> None:
    """A server that stops leaves its last words."""
    pair = Pair()
    pair.outbox.publish("n", pair.log)
    pair.log.append("a")
    pair.log.close("done", {})
    await pair.outbox.aclose()
    await turns(3)
    assert pair.copy.closed


@virtual_time
async def test_a_log_that_begins_again_is_told_again() -> None:
    """Under its new epoch."""
    pair = Pair()
    pair.outbox.publish("n", pair.log)
    pair.log.append("a")
    await turns(3)
    pair.log.restart(2, "reset", {})
    pair.log.append("b")
    await asyncio.sleep(0.1)
    assert seen(pair.copy) == b"[2-1 b]"
    await pair.outbox.aclose()


@virtual_time
async def test_a_mirror_that_grows_too_large_ends_where_it_is() -> None:
    """Its viewers may resume, and are then shown the row."""
    pair = Pair()
    copy = opened(max_deltas=2)
    Mirror(pair.owner.relay, "n", copy, reset)
    pair.outbox.publish("n", pair.log)
    for text in "abc":
        pair.log.append(text)
    await turns(5)
    assert copy.closed
    assert copy.text == "ab"
    await pair.outbox.aclose()


class Telling:
    """A relay that hands a mirror what a test says."""

    def read(self, _name: str, take: Any, _after: LogTail) -> Any:
        self.take = take
        return lambda: None


@virtual_time
async def test_a_mirror_takes_nothing_of_an_attempt_that_is_over_nor_the_middle_of_the_next() -> None:
    """The end of an old attempt is not the end, and nobody's text is taken away for one that cannot be shown."""
    relay: Any = Telling()
    copy = opened("a", epoch=2)
    mirror = Mirror(relay, "n", copy, reset, closes=False)
    relay.take(LogEntry(1, 0, ("x",), end=("error", {})))
    relay.take(LogEntry(3, 1, ("y",)))
    assert (copy.epoch, copy.text, mirror.heard, mirror.ending) == (2, "a", 0, None)
    relay.take(LogEntry(3, 0, ("z",), end=("done", {})))
    assert (copy.epoch, copy.text, mirror.heard, mirror.ending) == (3, "z", 1, ("done", {}))
    copy.close("done", {})
    relay.take(LogEntry(4, 0, ("late",)))
    assert (copy.epoch, copy.text, mirror.heard) == (3, "z", 1)


@virtual_time
async def test_a_line_that_ends_late_leaves_the_next_of_its_name_alone() -> None:
    """A turn that is told anew, at once after nobody looked at it any more."""
    pair = Pair()
    pair.outbox.publish("n", pair.log)
    await turns(3)
    pair.outbox.withdraw("n")
    pair.outbox.publish("n", pair.log)
    await turns(3)
    assert pair.outbox.tells("n")
    pair.log.append("a")
    await turns(3)
    assert pair.copy.text == "a"
    await pair.outbox.aclose()


@virtual_time
async def test_what_is_told_is_nobodys_request() -> None:
    """Whoever asked for it may have a context of their own, which the telling must not keep alive."""
    pair = Pair()
    asker = ContextVar("asker", default="nobody")
    asker.set("somebody")
    seen_by: list[str] = []
    append = pair.relay.append

    async def noting(name: str, entry: LogEntry, *, keep_s: float) -> LogTail:
        seen_by.append(asker.get())
        return await append(name, entry, keep_s=keep_s)

    pair.relay.append = noting  # type: ignore[method-assign]
    pair.outbox.publish("n", pair.log)
    pair.log.append("a")
    await turns(5)
    assert seen_by == ["nobody"]
    await pair.outbox.aclose()
