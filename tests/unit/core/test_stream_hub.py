"""Logs, viewers and their limits."""

import asyncio
import gc
from collections.abc import Mapping
from typing import Any

import pytest

from oncewise.core.stream_hub import HubStats, PlainText, Position, StreamHub, StreamLog, Viewer
from oncewise.errors import Overloaded, ResponseTooLarge
from tests.support.virtual_time import turns, virtual_loop, virtual_time


class Labelled:
    """`[1-2 text]` for deltas, `<name>` for notes, `<name 1-3>` for events with a position; counts what it encodes."""

    def __init__(self) -> None:
        self.encoded = 0

    def delta(self, position: Position, text: str) -> bytes:
        self.encoded += 1
        return f"[{position} {text}]".encode()

    def event(self, name: str, data: Mapping[str, Any], position: Position | None) -> bytes:
        self.encoded += 1
        return f"<{name}>".encode() if position is None else f"<{name} {position}>".encode()


def opened(*texts: str, **limits: Any) -> tuple[StreamHub, StreamLog]:
    hub = StreamHub(Labelled(), **limits)
    log = hub.open(("acme", "turn"))
    for text in texts:
        log.append(text)
    return hub, log


# -- positions ---------------------------------------------------------------------------------------------------


def test_a_position_is_read_as_it_is_written() -> None:
    """`<epoch>-<seq>` there and back, ordered by epoch first."""
    assert Position.parse(str(Position(3, 14))) == Position(3, 14)
    assert Position(1, 99) < Position(2, 0)


@pytest.mark.parametrize(
    "text",
    ["", "-", "1", "1-", "-1", "1--1", "+1-1", "1-1 ", " 1-1", "1_0-1", "a-b", "1-1-1", "٣-1", "²-1", "1-" + "9" * 16],
)
def test_what_was_never_a_position_is_none(text: str) -> None:
    """Signs, spaces, digits of other scripts and endless numbers are not ours."""
    assert Position.parse(text) is None


# -- what a viewer sees ------------------------------------------------------------------------------------------


@virtual_time
async def test_a_viewer_from_the_start_sees_each_event_as_it_comes() -> None:
    """One frame for each delta, then the terminal event, once."""
    _, log = opened()
    viewer, seen = log.view(), []
    for text in ("a", "b"):
        assert log.append(text) == Position(1, len(seen) + 1)
        seen.append(viewer.take())
    log.close("done", {})
    seen.append(viewer.take())
    assert seen == [b"[1-1 a]", b"[1-2 b]", b"<done 1-3>"]
    assert viewer.ended
    assert viewer.take() == b""


@virtual_time
async def test_a_late_joiner_gets_the_beginning_in_one_frame() -> None:
    """The backlog is joined into one delta that carries the position of its last."""
    _, log = opened("a", "b", "c")
    viewer = log.view()
    assert viewer.take() == b"[1-3 abc]"
    log.append("d")
    assert viewer.take() == b"[1-4 d]"


@virtual_time
async def test_a_slow_viewer_finds_what_it_missed_in_one_frame() -> None:
    """A viewer that was away for three deltas costs one write."""
    _, log = opened("a")
    viewer = log.view()
    viewer.take()
    for text in "bcd":
        log.append(text)
    log.close("done", {})
    assert viewer.take() == b"[1-4 bcd]<done 1-5>"


@virtual_time
async def test_every_position_can_be_resumed_after() -> None:
    """After each id exactly the rest comes, no gap and no repeat; after the terminal one nothing (C30)."""
    texts = [f"t{n}" for n in range(6)]
    _, log = opened(*texts)
    log.close("done", {})
    for seq in range(7):
        viewer = log.view(Position(1, seq))
        assert not viewer.from_start
        joined = "".join(texts[seq:])
        frame = f"[1-6 {joined}]" if joined else ""
        assert viewer.take() == f"{frame}<done 1-7>".encode()
    assert log.tail == Position(1, 7)
    last = log.view(log.tail)
    assert (last.ended, last.take()) == (True, b"")


@virtual_time
async def test_after_the_terminal_position_there_are_no_notes_either() -> None:
    """Whoever has seen the end has seen everything; news of it would be news for ever."""
    _, log = opened("a")
    log.note("meta", {})
    log.close("done", {})
    viewer = log.view(log.tail)
    assert await viewer.wait(3600.0) is False
    assert viewer.take() == b""
    assert virtual_loop().time() == 0.0


@pytest.mark.parametrize("position", [Position(1, 9), Position(2, 1), Position(0, 1), Position(1, 3)])
@virtual_time
async def test_a_position_this_log_never_reached_shows_everything(position: Position) -> None:
    """An unknown or future id, or the terminal one of a log that still runs, starts over and says so."""
    _, log = opened("a", "b")
    viewer = log.view(position)
    assert viewer.from_start
    assert viewer.take() == b"[1-2 ab]"


@virtual_time
async def test_notes_stand_where_they_were_made() -> None:
    """Between the deltas before and after; a resumed viewer is shown all of them, since they have no position."""
    _, log = opened()
    log.note("meta", {})
    log.append("a")
    log.append("b")
    log.note("token", {})
    log.append("c")
    assert log.view().take() == b"<meta>[1-2 ab]<token>[1-3 c]"
    assert log.view(Position(1, 1)).take() == b"<meta>[1-2 b]<token>[1-3 c]"
    assert log.view(Position(1, 3)).take() == b"<meta><token>"


@virtual_time
async def test_the_same_backlog_is_encoded_once_for_all() -> None:
    """A hundred late joiners share one encoded frame."""
    hub, log = opened("a", "b", "c")
    before = hub.encoder.encoded
    frames = [log.view().take() for _ in range(100)]
    assert hub.encoder.encoded == before + 1
    assert all(frame is frames[0] for frame in frames)


@virtual_time
async def test_text_and_deltas_say_what_was_published() -> None:
    """For whoever stores the answer."""
    _, log = opened("a", "ü", "日")
    assert (log.text, log.deltas, log.tail, log.closed) == ("aü日", 3, Position(1, 3), False)


def test_plain_text_is_the_text_alone() -> None:
    """The encoder of programs without a wire."""
    log = StreamHub().open("key")
    log.note("meta", {})
    log.append("grüß")
    log.append(" dich")
    assert log.view().take().decode() == "grüß dich"


# -- epochs ------------------------------------------------------------------------------------------------------


@virtual_time
async def test_a_restart_tells_viewers_to_drop_what_they_showed() -> None:
    """Reset first, then the text of the new epoch; nothing of the old one comes after."""
    _, log = opened("a", "b")
    viewer, fresh = log.view(), log.view()
    viewer.take()
    log.restart(2, "reset", {})
    log.append("x")
    assert viewer.take() == b"<reset 2-0>[2-1 x]"
    assert fresh.take() == b"[2-1 x]"
    assert log.text == "x"


@virtual_time
async def test_a_resume_from_an_older_epoch_gets_the_reset_and_everything() -> None:
    """Whether the log saw the restart itself or was opened by the attempt that took over."""
    _, log = opened("a")
    log.restart(3, "reset", {})
    log.append("x")
    assert log.view(Position(1, 1)).take() == b"<reset 3-0>[3-1 x]"
    assert log.view(Position(2, 0)).take() == b"<reset 3-0>[3-1 x]"
    taken_over = StreamHub(Labelled()).open("turn", epoch=2)
    taken_over.append("y")
    viewer = taken_over.view(Position(1, 7))
    assert viewer.take() == b"<reset 2-0>[2-1 y]"
    assert not viewer.from_start
    assert taken_over.view(Position(2, 0)).take() == b"[2-1 y]"


@virtual_time
async def test_nothing_of_the_old_epoch_is_shown_in_the_new() -> None:
    """Neither the joined frame that was encoded for the same places, nor a count of notes already shown."""
    _, log = opened("a", "b")
    log.note("old", {})
    viewer = log.view()
    assert viewer.take() == b"[1-2 ab]<old>"
    log.restart(2, "reset", {})
    log.note("new", {})
    log.append("x")
    log.append("y")
    assert viewer.take() == b"<reset 2-0><new>[2-2 xy]"
    assert log.view().take() == b"<new>[2-2 xy]"


@virtual_time
async def test_two_restarts_are_one_reset() -> None:
    """A viewer that slept through an epoch is told once."""
    _, log = opened("a")
    viewer = log.view()
    viewer.take()
    log.restart(2, "reset", {})
    log.append("x")
    log.restart(3, "reset", {})
    log.close("done", {})
    assert viewer.take() == b"<reset 3-0><done 3-1>"


@virtual_time
async def test_a_restart_needs_a_higher_epoch_and_an_open_log() -> None:
    """A fenced attempt must not write over its successor."""
    _, log = opened("a")
    with pytest.raises(RuntimeError):
        log.restart(1, "reset", {})
    log.close("done", {})
    with pytest.raises(RuntimeError):
        log.restart(2, "reset", {})


# -- endings -----------------------------------------------------------------------------------------------------


@virtual_time
async def test_nothing_is_published_after_the_end() -> None:
    """Exactly one terminal event; the second is ignored, deltas and notes are errors."""
    _, log = opened("a")
    log.close("done", {})
    log.close("error", {})
    with pytest.raises(RuntimeError):
        log.append("b")
    with pytest.raises(RuntimeError):
        log.note("meta", {})
    assert log.view().take() == b"[1-1 a]<done 1-2>"


@virtual_time
async def test_a_severed_log_ends_its_viewers_without_a_terminal_event() -> None:
    """They got what was there and may resume elsewhere; the hub holds nothing of it."""
    hub, log = opened("a")
    viewer = log.view()
    waiting = asyncio.create_task(_chunks(viewer))
    await turns(2)
    log.sever()
    log.sever()
    assert await waiting == [b"[1-1 a]"]
    assert hub.get(log.key) is None
    assert hub.stats() == HubStats(logs=0, open_logs=0, viewers=0, bytes=0)


async def _chunks(viewer: Viewer) -> list[bytes]:
    return [chunk async for chunk in viewer]


# -- waking ------------------------------------------------------------------------------------------------------


@virtual_time
async def test_iteration_gives_everything_and_closes() -> None:
    """`async for` over a viewer ends with the terminal event and gives the place back."""
    _, log = opened("a")
    reading = asyncio.create_task(_chunks(log.view()))
    await turns(2)
    log.append("b")
    log.note("token", {})
    await turns(3)
    log.close("done", {})
    assert await reading == [b"[1-1 a]", b"[1-2 b]<token>", b"<done 1-3>"]
    assert log.viewers == 0


@virtual_time
async def test_a_cancelled_reader_gives_its_place_back_and_harms_nobody() -> None:
    """The cancel passes through; the other reader gets the rest."""
    _, log = opened("a")
    one, other = (asyncio.create_task(_chunks(log.view())) for _ in range(2))
    await turns(2)
    one.cancel()
    with pytest.raises(asyncio.CancelledError):
        await one
    assert log.viewers == 1
    assert len(log._sleepers) == 1
    log.append("b")
    log.close("done", {})
    assert b"".join(await other) == b"[1-1 a][1-2 b]<done 1-3>"


@virtual_time
async def test_wait_says_whether_something_came_in_time() -> None:
    """True at once for news, True when it comes, False after the time given; nothing is lost by waiting again."""
    _, log = opened("a")
    loop, viewer = virtual_loop(), log.view()
    assert await viewer.wait(15.0)
    viewer.take()
    assert not await viewer.wait(15.0)
    assert loop.time() == pytest.approx(15.0)
    loop.call_later(4.0, log.append, "b")
    assert await viewer.wait(15.0)
    assert loop.time() == pytest.approx(19.0)
    assert viewer.take() == b"[1-2 b]"
    assert not await viewer.wait(1.0)
    assert loop.time() == pytest.approx(20.0)
    assert not await viewer.wait(0.0)
    viewer.close()


@virtual_time
async def test_the_patience_of_each_wait_is_counted_anew() -> None:
    """One timer serves many waits and still gives each its full time."""
    _, log = opened()
    loop, viewer = virtual_loop(), log.view()
    for n in range(1, 6):
        loop.call_later(10.0, log.append, "x")
        assert await viewer.wait(15.0)
        viewer.take()
        assert loop.time() == pytest.approx(10.0 * n)
    assert not await viewer.wait(15.0)
    assert loop.time() == pytest.approx(65.0)
    viewer.close()


@virtual_time
async def test_notes_restarts_and_the_end_wake_too() -> None:
    """Every change of a log is news."""
    _, log = opened("a")
    viewer = log.view()
    for change in (
        lambda: log.note("meta", {}),
        lambda: log.restart(2, "reset", {}),
        lambda: log.close("done", {}),
    ):
        viewer.take()
        waiting = asyncio.create_task(viewer.wait(60.0))
        await turns(2)
        change()
        assert await waiting
    assert virtual_loop().time() == 0.0


@virtual_time
async def test_closing_a_viewer_ends_its_wait_and_its_iteration() -> None:
    """Somebody else closes it: the wait says False, a further one does not sleep, loops on `ended` end."""
    _, log = opened()
    viewer, iterated = log.view(), log.view()
    waiting = asyncio.create_task(viewer.wait(3600.0))
    reading = asyncio.create_task(_chunks(iterated))
    await turns(2)
    viewer.close()
    viewer.close()
    iterated.close()
    assert await waiting is False
    assert await reading == []
    assert viewer.ended
    assert await viewer.wait(3600.0) is False
    assert virtual_loop().time() == 0.0
    assert log.viewers == 0


@virtual_time
async def test_a_viewer_that_never_reads_costs_nobody() -> None:
    """5,000 deltas beside a stalled viewer: publishing never waits, memory is the log's, everyone else gets all."""
    hub, log = opened()
    stalled = log.view()
    reading = asyncio.create_task(_chunks(log.view()))
    await turns(2)
    for n in range(5_000):
        log.append("x")
        if n % 100 == 0:
            await turns(2)
    held = hub.stats().bytes
    log.close("done", {})
    text = b"".join(await reading)
    assert text.count(b"x") == 5_000
    assert text.endswith(b"<done 1-5001>")
    assert held == sum(len(frame) for frame in log._frames)
    assert stalled.take().count(b"x") == 5_000


@virtual_time
async def test_publishing_wakes_a_reader_once_for_all_that_came() -> None:
    """Deltas of one turn of the loop are one chunk."""
    _, log = opened()
    reading = asyncio.create_task(_chunks(log.view()))
    await turns(2)
    for text in "abc":
        log.append(text)
    log.close("done", {})
    assert await reading == [b"[1-3 abc]<done 1-4>"]


# -- limits ------------------------------------------------------------------------------------------------------


@virtual_time
async def test_deltas_are_bounded() -> None:
    """At the limit, yes; one above, `ResponseTooLarge`, and the log is as before."""
    hub, log = opened("a", "b", max_deltas=2)
    before = hub.stats()
    with pytest.raises(ResponseTooLarge):
        log.append("c")
    assert (hub.stats(), log.text, log.tail) == (before, "ab", Position(1, 2))
    log.close("error", {})
    assert log.view().take().endswith(b"<error 1-3>")


@virtual_time
async def test_the_bytes_of_a_log_are_bounded() -> None:
    """Exactly at the limit, yes; one byte above, no. Notes count like deltas."""
    size = len("[1-1 aaaa]")
    hub, log = opened("aaaa", max_log_bytes=2 * size)
    log.append("aaaa")
    for publish in (lambda: log.append("a"), lambda: log.note("meta", {})):
        with pytest.raises(ResponseTooLarge):
            publish()
    assert hub.stats().bytes == 2 * size
    assert log.view().take() == b"[1-2 aaaaaaaa]"


@virtual_time
async def test_the_bytes_of_all_logs_are_bounded() -> None:
    """The sum is refused with `Overloaded`, and what was refused counts for nothing."""
    hub = StreamHub(Labelled(), max_total_bytes=20)
    first, second = hub.open("first"), hub.open("second")
    first.append("aaaa")
    second.append("bbbb")
    for log in (first, second):
        with pytest.raises(Overloaded) as caught:
            log.append("x")
        assert caught.value.retry_after_s == 1.0
    assert hub.stats().bytes == 20
    hub.drop("first")
    second.append("bbbb")
    assert (hub.stats().bytes, second.text) == (20, "bbbbbbbb")


@virtual_time
async def test_what_has_ended_makes_room_for_what_runs() -> None:
    """Closed logs that nobody views go first, the oldest before the younger; viewed ones stay."""
    hub = StreamHub(Labelled(), max_total_bytes=40)
    logs = [hub.open(name) for name in ("viewed", "old", "young", "running")]
    viewer = logs[0].view()
    for log in logs:
        log.append("aaaa")
    for log in logs[:3]:
        log.close("done", {})
    logs[3].append("aaaa")
    assert [hub.get(name) is not None for name in ("viewed", "old", "young", "running")] == [True, False, True, True]
    logs[3].append("aaaa")
    with pytest.raises(Overloaded):
        logs[3].append("aaaa")
    assert hub.get("viewed") is logs[0]
    viewer.close()
    logs[3].append("aaaa")
    assert hub.stats() == HubStats(logs=1, open_logs=1, viewers=0, bytes=40)


@virtual_time
async def test_a_closed_log_is_kept_for_its_retention() -> None:
    """Readable and resumable for that long, then gone with its bytes."""
    hub, log = opened("a", retention_s=2.0)
    log.close("done", {})
    await asyncio.sleep(1.9)
    assert hub.get(log.key) is log
    assert log.view(Position(1, 1)).take() == b"<done 1-2>"
    await asyncio.sleep(0.2)
    assert hub.get(log.key) is None
    assert hub.stats() == HubStats(logs=0, open_logs=0, viewers=0, bytes=0)


@virtual_time
async def test_the_end_of_an_old_log_leaves_the_newer_of_its_key_alone() -> None:
    """Expiry, severing and writing of a replaced log touch neither its successor nor the count of bytes."""
    hub, old = opened("a", retention_s=2.0)
    newer = hub.open(old.key, epoch=2)
    old.append("b")
    old.restart(2, "reset", {})
    old.append("c")
    old.close("done", {})
    await asyncio.sleep(3)
    assert hub.get(old.key) is newer
    assert hub.stats().bytes == 0
    newer.append("x")
    third = hub.open(old.key, epoch=3)
    newer.sever()
    assert hub.get(old.key) is third
    assert hub.stats().bytes == 0


@virtual_time
async def test_a_closed_log_that_is_replaced_leaves_no_timer() -> None:
    """The retention of the old log must not end the new one early."""
    hub, log = opened("a", retention_s=2.0)
    log.close("done", {})
    await asyncio.sleep(1)
    newer = hub.open(log.key, epoch=2)
    assert virtual_loop().timers() == [], "a timer would hold the old log's memory"
    newer.append("x")
    await asyncio.sleep(2)
    assert hub.get(log.key) is newer


@virtual_time
async def test_a_dropped_log_goes_on_for_those_who_hold_it() -> None:
    """Its viewers see what is still written, and none of it counts."""
    hub, log = opened("a")
    reading = asyncio.create_task(_chunks(log.view()))
    await turns(2)
    hub.drop(log.key)
    hub.drop(log.key)
    log.append("b")
    log.close("done", {})
    assert b"".join(await reading) == b"[1-1 a][1-2 b]<done 1-3>"
    assert hub.stats() == HubStats(logs=0, open_logs=0, viewers=0, bytes=0)
    assert virtual_loop().timers() == [], "nothing is retained"


@virtual_time
async def test_closing_the_hub_ends_every_viewer_and_holds_nothing() -> None:
    """Open logs are severed, closed ones dropped, no timer is left."""
    hub, log = opened("a")
    other = hub.open("other")
    other.close("done", {})
    readings = [asyncio.create_task(_chunks(each.view())) for each in (log, other)]
    await turns(2)
    hub.close()
    assert [b"".join(await reading) for reading in readings] == [b"[1-1 a]", b"<done 1-1>"]
    assert hub.stats() == HubStats(logs=0, open_logs=0, viewers=0, bytes=0)
    assert not hub._retained
    hub.close()


@virtual_time
async def test_stats_count_what_is_held() -> None:
    """Logs, those still open, their viewers and their bytes."""
    hub, log = opened("a")
    viewers = [log.view(), log.view()]
    hub.open("other").close("done", {})
    assert hub.stats() == HubStats(logs=2, open_logs=1, viewers=2, bytes=len("[1-1 a]"))
    for viewer in viewers:
        viewer.close()
    assert hub.stats().viewers == 0


@virtual_time
async def test_memory_grows_with_the_stream_and_not_with_the_audience() -> None:
    """A thousand stalled viewers hold no frame of their own."""
    _, log = opened(*(["x" * 100] * 100))
    viewers = [log.view() for _ in range(1000)]
    gc.collect()
    assert sum(isinstance(held, bytes | str | list) for viewer in viewers for held in gc.get_referents(viewer)) == 0


def test_plain_text_events_are_silent() -> None:
    """Notes and ends of a plain stream are no text."""
    assert PlainText().event("done", {}, Position(1, 1)) == b""


# -- news without a task -----------------------------------------------------------------------------------------


class Basket:
    """A sink that can be closed for a while."""

    def __init__(self) -> None:
        self.open = True
        self.chunks: list[bytes] = []

    def push(self, chunk: bytes) -> bool:
        if self.open:
            self.chunks.append(chunk)
        return self.open


@virtual_time
async def test_a_sink_is_given_news_while_the_task_sleeps() -> None:
    """Deltas and notes are pushed as they come; the task wakes for the end alone."""
    log = StreamHub().open("s")
    viewer, basket = log.view(), Basket()
    viewer.push_to(basket)
    waiting = asyncio.create_task(viewer.wait(100.0))
    await asyncio.sleep(0)
    for text in ("a", "b", "c"):
        log.append(text)
        await asyncio.sleep(1.0)
    assert (basket.chunks, waiting.done()) == ([b"a", b"b", b"c"], False)
    log.close("done", {})
    assert await waiting
    assert viewer.take() == b""
    assert viewer.ended


@virtual_time
async def test_a_sink_that_takes_nothing_leaves_it_to_the_task() -> None:
    """Nothing is taken for a sink that is not ready, so nothing is lost."""
    log = StreamHub().open("s")
    viewer, basket = log.view(), Basket()
    viewer.push_to(basket)
    basket.open = False
    waiting = asyncio.create_task(viewer.wait(100.0))
    await asyncio.sleep(0)
    log.append("a")
    log.append("b")
    assert await waiting
    assert (basket.chunks, viewer.take()) == ([], b"ab")


@virtual_time
async def test_what_was_pushed_counts_as_a_sign_of_life() -> None:
    """The wait times out so many seconds after the last push, not after its beginning."""
    log = StreamHub().open("s")
    viewer = log.view()
    viewer.push_to(Basket())
    waiting = asyncio.create_task(viewer.wait(10.0))
    await asyncio.sleep(8.0)
    log.append("a")
    assert not await waiting
    assert asyncio.get_running_loop().time() == 18.0
