"""One reader for everything: who comes, who goes, and what is lost on the way."""

import asyncio
from typing import Any

from oncewise.coordination.reader import BLOCK_S, Reader
from oncewise.coordination.wire import Refused, WireFailed
from tests.support.virtual_time import turns, virtual_time


class FakeServer:
    """Streams that can be read with blocking; as a wire, and as whoever wakes it."""

    def __init__(self) -> None:
        self.streams: dict[str, list[tuple[int, int]]] = {}
        self.news = asyncio.Event()
        self.reads: list[dict[str, tuple[int, int]]] = []
        self.fails = 0
        self.hangs = False
        self.refuses = False
        self.closed = 0

    def add(self, key: str, *places: tuple[int, int]) -> None:
        self.streams.setdefault(key, []).extend(places)
        self.news.set()

    async def ask(self, commands: Any) -> list[Any]:
        await asyncio.sleep(0)
        if self.fails:
            self.fails -= 1
            raise WireFailed("ConnectionError")
        if self.hangs:
            await asyncio.Event().wait()
        return [await self.reply(command) for command in commands]

    async def reply(self, command: Any) -> Any:
        if self.refuses:
            return Refused("NOAUTH")
        if command[0] == "XREVRANGE":
            newest = max(self.streams.get(command[1], []), default=None)
            return [] if newest is None else [[b"%d-%d" % newest, [b"s", b"x"]]]
        half = (len(command) - 6) // 2
        keys, ids = command[6 : 6 + half], [place.split("-") for place in command[6 + half :]]
        places = dict(zip(keys, [(int(a), int(b)) for a, b in ids], strict=True))
        self.reads.append(places)
        try:
            async with asyncio.timeout(command[4] / 1000):
                while not (found := self.found(places)):
                    self.news.clear()
                    await self.news.wait()
        except TimeoutError:
            return None
        return found

    def found(self, places: dict[str, tuple[int, int]]) -> list[Any]:
        found = []
        for key, after in places.items():
            if entries := [place for place in self.streams.get(key, []) if place > after]:
                found.append([key.encode(), [[b"%d-%d" % place, [b"e", b"x"]] for place in entries]])
        return found

    async def close(self) -> None:
        self.closed += 1


def reading() -> tuple[FakeServer, Reader, list[Any]]:
    server: Any = FakeServer()
    woken = iter(range(1, 10_000))
    reader = Reader(server, lambda: server.add("inbox", (next(woken), 0)))
    heard: list[Any] = []
    reader.follow("inbox", lambda place, _fields: heard.append(place))
    return server, reader, heard


def following(reader: Reader, key: str, after: tuple[int, int] = (0, 0), **kind: bool) -> tuple[list[Any], Any]:
    taken: list[Any] = []
    return taken, reader.follow(key, lambda place, _fields: taken.append(place), after, **kind)


@virtual_time
async def test_a_key_that_is_added_while_the_read_blocks_is_seen_at_once() -> None:
    """Without waiting for the block to end."""
    server, reader, _ = reading()
    await asyncio.sleep(1.0)
    server.add("log", (1, 1), (1, 2))
    taken, _ = following(reader, "log")
    await turns(10)
    assert taken == [(1, 1), (1, 2)]
    await reader.aclose()


@virtual_time
async def test_followers_of_one_key_each_get_what_they_lack() -> None:
    """Nobody anything twice."""
    server, reader, _ = reading()
    server.add("log", (1, 1), (1, 2))
    early, _ = following(reader, "log")
    await turns(10)
    late, _ = following(reader, "log", (1, 1))
    whole, _ = following(reader, "log")
    await turns(10)
    server.add("log", (1, 3))
    await turns(10)
    assert (early, late, whole) == ([(1, 1), (1, 2), (1, 3)], [(1, 2), (1, 3)], [(1, 1), (1, 2), (1, 3)])
    await reader.aclose()


@virtual_time
async def test_a_key_that_nobody_follows_is_read_no_more() -> None:
    """And leaving twice does nothing."""
    server, reader, _ = reading()
    taken, leave = following(reader, "log")
    await turns(5)
    leave()
    leave()
    server.add("log", (1, 1))
    await asyncio.sleep(BLOCK_S)
    await turns(5)
    assert taken == []
    assert set(server.reads[-1]) == {"inbox"}
    await reader.aclose()


@virtual_time
async def test_reading_goes_on_after_the_connection_broke() -> None:
    """From where it was; nothing is missed and nothing comes twice."""
    server, reader, _ = reading()
    taken, _ = following(reader, "log")
    server.add("log", (1, 1))
    await turns(10)
    server.fails = 3
    server.add("log", (1, 2))
    await asyncio.sleep(2.0)
    assert taken == [(1, 1), (1, 2)]
    assert server.closed >= 3
    await reader.aclose()


@virtual_time
async def test_a_connection_that_breaks_makes_somebody_ask_the_server() -> None:
    """Nobody may have anything to say to it for seconds; that it is gone should be known sooner."""
    asked: list[int] = []
    server: Any = FakeServer()
    server.fails = 1
    reader = Reader(server, lambda: asked.append(server.closed))
    reader.follow("inbox", lambda _place, _fields: None)
    async with asyncio.timeout(5):
        while not server.reads:
            await asyncio.sleep(0.005)
    assert asked == [1]
    await reader.aclose()


async def test_a_read_that_does_not_come_back_is_given_up() -> None:
    """A network that swallows everything says nothing for ever."""
    server, reader, _ = reading()
    taken, _ = following(reader, "log")
    server.hangs = True
    server.add("inbox", (99_999, 0))
    await asyncio.sleep(1.0)
    server.hangs = False
    server.add("log", (1, 1))
    await asyncio.sleep(BLOCK_S + 3.0)
    assert taken == [(1, 1)]
    assert server.closed >= 1
    await reader.aclose()


@virtual_time
async def test_a_server_that_refuses_is_asked_again() -> None:
    """Not in a loop without rest."""
    server, reader, _ = reading()
    server.refuses = True
    server.add("inbox", (99_999, 0))
    await asyncio.sleep(3.0)
    refused = server.closed
    server.refuses = False
    taken, _ = following(reader, "log")
    server.add("log", (1, 1))
    await asyncio.sleep(2.0)
    assert 1 <= refused < 20
    assert taken == [(1, 1)]
    await reader.aclose()


@virtual_time
async def test_one_follower_that_raises_ends_nobody_elses_reading() -> None:
    """Its entry is lost to it alone."""
    server, reader, _ = reading()
    reader.follow("log", lambda _place, _fields: 1 / 0)
    taken, _ = following(reader, "log")
    server.add("log", (1, 1))
    await turns(10)
    server.add("log", (1, 2))
    await turns(10)
    assert taken == [(1, 1), (1, 2)]
    await reader.aclose()


@virtual_time
async def test_a_stream_of_times_that_began_anew_in_the_past_is_read_from_its_beginning() -> None:
    """The server was replaced by one whose clock is behind."""
    server, reader, _ = reading()
    words, _ = following(reader, "all", timed=True)
    log, _ = following(reader, "log")
    server.add("all", (1000, 0))
    server.add("log", (1, 5))
    await turns(10)
    server.streams["all"] = [(500, 0)]
    server.streams["log"] = [(1, 3)]
    await asyncio.sleep(BLOCK_S * 2 + 1)
    assert words == [(1000, 0), (500, 0)]
    assert log == [(1, 5)]
    await reader.aclose()
