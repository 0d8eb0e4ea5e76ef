"""What every engine owes the queries: whole transactions, whatever happens to callers and neighbours."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import sqlalchemy as sa
from sqlalchemy.util import await_only

from oncewise.errors import StorageUnavailable
from oncewise.storage.database import database_time_s
from oncewise.storage.tables import orgs
from tests.support.storage import Storage


class Broken(Exception):
    """Raised by a test's own transaction."""


def adding(name: str) -> Callable[[sa.Connection], str]:
    def add(conn: sa.Connection) -> str:
        conn.execute(sa.insert(orgs).values(id=name, created_at_ms=0))
        return name

    return add


def names(conn: sa.Connection) -> list[str]:
    return list(conn.execute(sa.select(orgs.c.id).order_by(orgs.c.id)).scalars())


def failing_after(work: Callable[[sa.Connection], object], error: Exception) -> Callable[[sa.Connection], object]:
    def fail(conn: sa.Connection) -> object:
        work(conn)
        raise error

    return fail


class Gate:
    """Holds a transaction until the test lets it go on: its thread, or on an asyncio driver its task."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self, conn: sa.Connection) -> None:
        self.entered.set()
        if conn.dialect.is_async:
            assert await_only(asyncio.to_thread(self.opened.wait, 10))
        else:
            assert self.opened.wait(10)


async def test_a_result_is_there_for_every_reader_once_it_is_told(storage: Storage):
    """Told means committed."""
    assert await storage.database.write(adding("a")) == "a"
    assert await storage.database.read(names) == ["a"]


async def test_a_transaction_that_raises_leaves_nothing_and_raises_to_its_caller(storage: Storage):
    """The very exception."""
    error = Broken()
    with pytest.raises(Broken) as raised:
        await storage.database.write(failing_after(adding("a"), error))

    assert raised.value is error
    assert await storage.database.read(names) == []


async def test_one_failure_in_a_group_harms_none_of_its_neighbours(storage: Storage):
    """Functions that share a commit are still transactions of their own."""
    gate = Gate()
    held = asyncio.ensure_future(storage.database.write(gate))
    await asyncio.to_thread(gate.entered.wait, 10)
    works = [adding("a"), failing_after(adding("b"), Broken()), adding("c"), adding("a"), adding("d")]
    group = [asyncio.ensure_future(storage.database.write(work)) for work in works]
    await asyncio.sleep(0)
    gate.opened.set()

    outcomes = await asyncio.gather(*group, return_exceptions=True)
    await held
    assert [outcomes[n] for n in (2, 4)] == ["c", "d"]
    assert isinstance(outcomes[1], Broken)
    # Whichever of the two came first.
    assert sorted(type(outcomes[n]).__name__ for n in (0, 3)) == ["IntegrityError", "str"]
    assert await storage.database.read(names) == ["a", "c", "d"]


async def test_a_cancelled_callers_transaction_is_whole_and_its_own(storage: Storage):
    """Cancelled in the middle or in the queue: it commits by itself, and the next one is not mixed up with it."""
    unheard: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unheard.append(context))
    gate = Gate()

    def slow(conn: sa.Connection) -> None:
        adding("a")(conn)
        gate(conn)
        adding("b")(conn)

    running = asyncio.ensure_future(storage.database.write(slow))
    await asyncio.to_thread(gate.entered.wait, 10)
    queued = asyncio.ensure_future(storage.database.write(adding("c")))
    await asyncio.sleep(0)
    for task in (running, queued):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    gate.opened.set()

    with pytest.raises(Broken):
        await storage.database.write(failing_after(adding("d"), Broken()))
    async with asyncio.timeout(5):
        # Engines that run several transactions at a time owe no order to those that nobody waits for.
        while len(seen := await storage.database.read(names)) < 3:
            await asyncio.sleep(0.01)
    assert seen == ["a", "b", "c"]
    assert unheard == []


async def test_a_reader_sees_one_moment(storage: Storage):
    """Two statements of one read never see a commit that came between them."""

    def twice(conn: sa.Connection) -> tuple[list[str], list[str]]:
        first = names(conn)
        gate(conn)
        return first, names(conn)

    gate = Gate()
    reading = asyncio.ensure_future(storage.database.read(twice))
    await asyncio.to_thread(gate.entered.wait, 10)
    await storage.database.write(adding("a"))
    gate.opened.set()

    assert await reading == ([], [])


async def test_reads_go_on_while_a_transaction_is_open(storage: Storage):
    """A slow writer delays writers only."""
    gate = Gate()
    writing = asyncio.ensure_future(storage.database.write(gate))
    await asyncio.to_thread(gate.entered.wait, 10)

    assert await storage.database.read(names) == []
    gate.opened.set()
    await writing


async def test_a_read_cannot_write(storage: Storage):
    """The database refuses, not only the code."""
    with pytest.raises((StorageUnavailable, sa.exc.DBAPIError)):
        await storage.database.read(adding("a"))
    assert await storage.database.read(names) == []


async def test_closing_finishes_what_was_asked_and_refuses_what_comes_after(storage: Storage):
    """Drain, then close; and closing twice is closing once."""
    writes = [asyncio.ensure_future(storage.database.write(adding(f"{n}"))) for n in range(50)]
    await asyncio.sleep(0)
    await asyncio.gather(storage.database.aclose(), storage.database.aclose())

    assert await asyncio.gather(*writes) == [f"{n}" for n in range(50)]
    for refused in (storage.database.write(adding("late")), storage.database.read(names)):
        with pytest.raises(StorageUnavailable):
            await refused


async def test_the_first_look_at_the_clock_is_of_the_beginning_and_later_ones_are_not(
    storage: Storage,
):
    """An engine may bring the time along with the beginning; it is never an older transaction's."""

    def looks(conn: sa.Connection) -> tuple[float, float]:
        return database_time_s(conn), database_time_s(conn)

    def no_look(_conn: sa.Connection) -> None:
        return None

    before_s = await storage.database.read(database_time_s)
    await storage.database.write(no_look)
    await asyncio.sleep(0.05)
    first_s, second_s = await storage.database.write(looks)
    after_s = await storage.database.read(database_time_s)

    # SQLite counts in milliseconds.
    assert before_s + 0.04 < first_s <= second_s <= after_s


async def test_a_process_that_runs_alone_knows_so_and_is_not_dead(storage: Storage):
    """Its own open turns are not of the dead, and nobody else's can be waited for."""
    await storage.lead(await storage.thread())

    assert await storage.database.dead_owners() == ()
    assert await storage.database.alone()


async def test_turns_of_a_name_that_nobody_bears_are_of_the_dead(storage: Storage):
    """Whatever their lease says. A server that has only just started is not asked who is missing."""
    await replace(storage, owner="gone").lead(await storage.thread())

    async with asyncio.timeout(5):
        while not (dead := await storage.database.dead_owners()):
            await asyncio.sleep(0.1)
    assert dead == ("gone",)
