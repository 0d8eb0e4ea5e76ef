"""A relayed log is what its owner told, in order, without gap and without repetition."""

import asyncio
from collections.abc import Callable

from oncewise.ports import LogEntry, LogTail
from tests.support.watching import until

KEEP_S = 30.0
NOTHING = LogTail(0, 0)


def entry(epoch: int, after: int, *texts: str, **more: object) -> LogEntry:
    return LogEntry(epoch, after, texts, **more)


class Reading:
    """What one reader was handed."""

    def __init__(self) -> None:
        self.entries: list[LogEntry] = []
        self.close: Callable[[], None] = lambda: None

    @property
    def texts(self) -> list[str]:
        return [text for each in self.entries for text in each.texts]


def reading(worker, name: str, after: LogTail = NOTHING) -> Reading:
    taken = Reading()
    taken.close = worker.relay.read(name, taken.entries.append, after)
    return taken


async def test_an_entry_is_read_by_another_worker_as_it_was_told(fleet):
    """Texts with every kind of character, a note, and the end."""
    owner, other = await fleet.worker(), await fleet.worker()
    told = LogEntry(
        1, 0, ("Hello ", "wörld\n", "\u2028🎉"), ((0, "meta", {"ttft_ms": 12}),), ("done", {"state": "completed"})
    )
    taken = reading(other, "n")

    assert await owner.relay.append("n", told, keep_s=KEEP_S) == (1, 4) == told.tail

    await until(lambda: taken.entries)
    assert taken.entries == [told]


async def test_a_reader_that_comes_late_gets_the_beginning_and_one_that_knows_some_gets_the_rest(fleet):
    """Replay and live are one reading."""
    owner, other = await fleet.worker(), await fleet.worker()
    await owner.relay.append("n", entry(1, 0, "a", "b"), keep_s=KEEP_S)
    await owner.relay.append("n", entry(1, 2, "c"), keep_s=KEEP_S)

    late, knowing = reading(other, "n"), reading(other, "n", LogTail(1, 2))
    await until(lambda: late.texts == ["a", "b", "c"] and knowing.texts == ["c"])
    await owner.relay.append("n", entry(1, 3, "d"), keep_s=KEEP_S)

    await until(lambda: late.texts == ["a", "b", "c", "d"] and knowing.texts == ["c", "d"])


async def test_an_entry_that_reaches_beyond_what_a_reader_knows_is_handed_over_whole(fleet):
    """Its beginning may be known; the reader sees from `after`."""
    worker = await fleet.worker()
    await worker.relay.append("n", entry(1, 0, "a", "b", "c"), keep_s=KEEP_S)

    taken = reading(worker, "n", LogTail(1, 2))

    await until(lambda: taken.entries)
    assert taken.entries == [entry(1, 0, "a", "b", "c")]


async def test_a_repeated_entry_adds_nothing(fleet):
    """The reply was lost, so it is sent again."""
    worker = await fleet.worker()
    taken = reading(worker, "n")
    for _ in range(3):
        assert await worker.relay.append("n", entry(1, 0, "a"), keep_s=KEEP_S) == (1, 1)
    assert await worker.relay.append("n", entry(1, 1, "b"), keep_s=KEEP_S) == (1, 2)
    assert await worker.relay.append("n", entry(1, 0, "a"), keep_s=KEEP_S) == (1, 2)

    await until(lambda: len(taken.texts) == 2)
    assert taken.texts == ["a", "b"]


async def test_a_fenced_owner_is_refused(fleet):
    """Whoever owned the turn before writes no more, whatever it sends."""
    old, new = await fleet.worker(), await fleet.worker()
    taken = reading(new, "n")
    await old.relay.append("n", entry(1, 0, "old"), keep_s=KEEP_S)
    await until(lambda: taken.texts == ["old"])
    assert await new.relay.append("n", entry(2, 0, "new"), keep_s=KEEP_S) == (2, 1)

    assert await old.relay.append("n", entry(1, 1, "late"), keep_s=KEEP_S) == (2, 1)
    assert await old.relay.append("n", entry(1, 0, "old"), keep_s=KEEP_S) == (2, 1)

    await until(lambda: taken.texts == ["old", "new"])
    late = reading(old, "n")
    await until(lambda: late.texts == ["new"])


async def test_what_would_leave_a_gap_is_refused(fleet):
    """The owner is told where to go on from."""
    worker = await fleet.worker()
    assert await worker.relay.append("n", entry(1, 2, "c"), keep_s=KEEP_S) == (0, 0)
    await worker.relay.append("n", entry(1, 0, "a"), keep_s=KEEP_S)
    assert await worker.relay.append("n", entry(1, 2, "c"), keep_s=KEEP_S) == (1, 1)
    assert await worker.relay.append("n", entry(2, 1, "x"), keep_s=KEEP_S) == (1, 1)


async def test_an_entry_without_events_only_asks(fleet):
    """Where does it end?"""
    worker = await fleet.worker()
    assert await worker.relay.append("n", LogEntry(1, 0), keep_s=KEEP_S) == (0, 0)
    await worker.relay.append("n", entry(1, 0, "a"), keep_s=KEEP_S)
    assert await worker.relay.append("n", LogEntry(1, 1), keep_s=KEEP_S) == (1, 1)
    assert await worker.relay.append("n", LogEntry(2, 0), keep_s=KEEP_S) == (1, 1)


async def test_two_owners_at_once_never_mix(fleet):
    """Fifty entries each, concurrently: the readers' text is one owner's, then the other's."""
    old, new = await fleet.worker(), await fleet.worker()
    taken = reading(old, "n")

    async def write(worker, epoch: int) -> None:
        for place in range(50):
            await worker.relay.append("n", entry(epoch, place, f"{epoch}"), keep_s=KEEP_S)

    await asyncio.gather(write(old, 1), write(new, 2))

    await until(lambda: taken.texts.count("2") == 50)
    assert taken.texts == sorted(taken.texts)
    places = [each.tail for each in taken.entries]
    assert places == sorted(places)


async def test_a_log_that_was_lost_is_seen_as_lost_and_told_again(fleet):
    """The owner starts over; a reader that had some of it skips what it has by `after`."""
    owner, other = await fleet.worker(), await fleet.worker()
    taken = reading(other, "n")
    await owner.relay.append("n", entry(1, 0, "a", "b"), keep_s=KEEP_S)
    await until(lambda: taken.texts == ["a", "b"])

    await fleet.flush()

    assert await owner.relay.append("n", entry(1, 2, "c"), keep_s=KEEP_S) == (0, 0)
    assert await owner.relay.append("n", entry(1, 0, "a", "b", "c"), keep_s=KEEP_S) == (1, 3)
    await until(lambda: len(taken.entries) == 2)
    assert taken.entries[1] == entry(1, 0, "a", "b", "c")


async def test_a_log_lives_for_as_long_as_was_said(fleet):
    """After that it is gone by itself."""
    worker = await fleet.worker()
    await worker.relay.append("n", entry(1, 0, "a"), keep_s=0.2)
    assert await worker.relay.append("n", LogEntry(1, 1), keep_s=KEEP_S) == (1, 1)

    await asyncio.sleep(0.3)

    assert await worker.relay.append("n", LogEntry(1, 1), keep_s=KEEP_S) == (0, 0)


async def test_a_reader_that_was_closed_is_handed_nothing(fleet):
    """Nor does it hold up the others."""
    worker = await fleet.worker()
    gone, staying = reading(worker, "n"), reading(worker, "n")
    await worker.relay.append("n", entry(1, 0, "a"), keep_s=KEEP_S)
    await until(lambda: gone.texts and staying.texts)
    gone.close()

    await worker.relay.append("n", entry(1, 1, "b"), keep_s=KEEP_S)

    await until(lambda: staying.texts == ["a", "b"])
    assert gone.texts == ["a"]


async def test_names_do_not_touch_each_other(fleet):
    """A hundred logs at once, each read by one reader."""
    owner, other = await fleet.worker(), await fleet.worker()
    taken = [reading(other, f"n{number}") for number in range(100)]

    await asyncio.gather(
        *(owner.relay.append(f"n{number}", entry(1, 0, str(number)), keep_s=KEEP_S) for number in range(100))
    )

    await until(lambda: all(each.texts for each in taken))
    assert [each.texts for each in taken] == [[str(number)] for number in range(100)]


async def test_a_cancelled_append_harms_no_other(fleet):
    """The entry is there or not; what others asked for at the same time is answered rightly."""
    worker = await fleet.worker()
    appends = [
        asyncio.create_task(worker.relay.append(f"n{number}", entry(1, 0, str(number)), keep_s=KEEP_S))
        for number in range(20)
    ]
    await asyncio.sleep(0)
    for task in appends[::2]:
        task.cancel()
    done = await asyncio.gather(*appends, return_exceptions=True)

    assert done[1::2] == [LogTail(1, 1)] * 10
    for number in range(20):
        tail = await worker.relay.append(f"n{number}", entry(1, 0, str(number)), keep_s=KEEP_S)
        assert tail == (1, 1)
