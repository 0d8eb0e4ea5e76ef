"""Who is accepted when many come at once, over real sockets, on uvloop."""

import asyncio
import resource
import socket
import struct
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from itertools import pairwise
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from oncewise.api.listener import AT_ONCE, Listener
from oncewise.api.sockets import listen

BACKLOG = 4096


class Counted(asyncio.Protocol):
    """A connection that answers with the byte it gets; all of them are in `seen`."""

    def __init__(self, seen: list["Counted"]) -> None:
        self.transport: asyncio.Transport | None = None
        seen.append(self)

    def connection_made(self, transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Arriving:
    """A listener, and clients that connect while its loop does something else."""

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self.at_once = at_once
        self.seen: list[Counted] = []
        (self.bound,) = listen("127.0.0.1", 0)
        self.address = self.bound.getsockname()
        self.clients: list[socket.socket] = []

    async def open(self, protocol: Callable[[], asyncio.Protocol] | None = None) -> Listener:
        make = protocol or (lambda: Counted(self.seen))
        self.listener = await Listener.open(self.bound, make, backlog=BACKLOG, at_once=self.at_once)
        return self.listener

    def come(self, count: int) -> list[socket.socket]:
        """Connect; the kernel does its part without the loop."""
        come = [socket.create_connection(self.address, timeout=5) for _ in range(count)]
        self.clients += come
        return come

    @property
    def made(self) -> int:
        return sum(protocol.transport is not None for protocol in self.seen)

    async def until(self, made: int) -> None:
        async with asyncio.timeout(10):
            while self.made < made:
                await asyncio.sleep(0.001)

    async def end(self) -> None:
        self.listener.close()
        await self.listener.handed_over()
        for protocol in self.seen:
            if protocol.transport is not None:
                protocol.transport.abort()
        for client in self.clients:
            client.close()
        await self.listener.wait_closed()


def on_uvloop(steps: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(steps())


async def busy_turns(arriving: Arriving, made: int, *, turn_s: float = 0.003) -> int:
    """How many turns, each so long, it takes until so many are connected."""
    turns = 0
    while arriving.made < made:
        turns += 1
        time.sleep(turn_s)  # noqa: ASYNC251  the loop is busy with others
        await asyncio.sleep(0)
    return turns


@pytest.mark.parametrize(("at_once", "least", "most"), [(AT_ONCE, 1, 12), (0, 256, 600)])
def test_a_busy_loop_accepts_who_waits_in_a_few_turns(at_once: int, least: int, most: int) -> None:
    """Without it, the last of 256 waits for as many turns."""

    async def steps() -> None:
        arriving = Arriving(at_once)
        await arriving.open()
        arriving.come(256)
        turns = await busy_turns(arriving, 256, turn_s=0.002)
        assert least <= turns <= most
        await arriving.end()

    on_uvloop(steps)


def test_no_turn_accepts_more_than_it_may() -> None:
    """Those who are connected wait for it."""

    async def steps() -> None:
        arriving = Arriving(at_once=10)
        await arriving.open()
        arriving.come(100)
        counts = [0]
        while counts[-1] < 100:
            time.sleep(0.002)  # noqa: ASYNC251  the loop is busy with others
            await asyncio.sleep(0)
            counts.append(len(arriving.seen))
        # Ten, and the one that the loop accepts itself.
        assert max(after - before for before, after in pairwise(counts)) <= 11
        await arriving.end()

    on_uvloop(steps)


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_a_thousand_at_once_are_all_answered(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """On the loop without uvloop too."""

    async def steps() -> None:
        arriving = Arriving()
        await arriving.open()
        clients = arriving.come(1000)
        for number, client in enumerate(clients):
            client.sendall(bytes([number % 251]))
        await arriving.until(1000)
        await asyncio.sleep(0.2)
        for number, client in enumerate(clients):
            assert client.recv(2) == bytes([number % 251])
        assert len(arriving.seen) == 1000
        await arriving.end()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(steps())


def test_one_that_left_before_it_was_accepted_disturbs_nobody() -> None:
    """Reset while it waited."""

    async def steps() -> None:
        arriving = Arriving()
        await arriving.open()
        for client in arriving.come(60)[::2]:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        await busy_turns(arriving, 60)
        for client in arriving.clients[1::2]:
            client.sendall(b"?")
        await asyncio.sleep(0.1)
        assert [client.recv(2) for client in arriving.clients[1::2]] == [b"?"] * 30
        await arriving.end()

    on_uvloop(steps)


def test_a_connection_that_cannot_be_handed_over_is_closed() -> None:
    """And the next one is served."""

    async def steps() -> None:
        arriving = Arriving()
        failed = 0

        def protocol() -> asyncio.Protocol:
            nonlocal failed
            # A task hands over; the loop itself accepts outside of any.
            if asyncio.current_task() is not None and not failed:
                failed = 1
                raise OSError("no options on this one")
            return Counted(arriving.seen)

        await arriving.open(protocol)
        arriving.come(5)
        await busy_turns(arriving, 4)
        ends = []
        for client in arriving.clients:
            client.settimeout(0.2)
            with suppress(TimeoutError):
                ends.append(client.recv(1))
        assert ends == [b""]
        await arriving.end()

    on_uvloop(steps)


def test_it_goes_on_when_file_descriptors_have_run_out() -> None:
    """Some are turned away; when there is room again, the next ones are served."""

    async def steps() -> None:
        arriving = Arriving()
        await arriving.open()
        arriving.come(200)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with ExitStack() as limits:
            highest = max(client.fileno() for client in arriving.clients)
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 30, hard))
            limits.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            for _ in range(20):
                time.sleep(0.002)  # noqa: ASYNC251  the loop is busy with others
                await asyncio.sleep(0)
            assert 0 < arriving.made < 200
            began_s = time.process_time()
            await asyncio.sleep(0.3)
            assert time.process_time() - began_s < 0.2, "it asks again and again"
            for client in arriving.clients:
                client.close()
            for protocol in arriving.seen:
                if protocol.transport is not None:
                    protocol.transport.abort()
            await asyncio.sleep(0.05)
        before = arriving.made
        arriving.come(20)
        await arriving.until(before + 20)
        await arriving.end()

    on_uvloop(steps)


def test_who_waits_when_it_closes_is_turned_away_and_who_was_accepted_is_known() -> None:
    """What was accepted has its protocol before anybody is told to end."""

    async def steps() -> None:
        arriving = Arriving(at_once=10)
        await arriving.open()
        arriving.come(100)
        time.sleep(0.005)  # noqa: ASYNC251  the loop is busy with others
        while len(arriving.seen) < 5:
            await asyncio.sleep(0)
            time.sleep(0.002)  # noqa: ASYNC251  the loop is busy with others
        arriving.listener.close()
        arriving.listener.close()
        await arriving.listener.handed_over()
        known = arriving.made
        assert known == len(arriving.seen) < 100
        await asyncio.sleep(0.05)
        assert len(arriving.seen) == known
        with pytest.raises(ConnectionError):
            arriving.come(1)
        await arriving.end()

    on_uvloop(steps)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["come", "come 20", "reset", "turn", "busy turn", "soon"]), max_size=12),
    st.sampled_from([0, 1, 3, AT_ONCE]),
)
def test_whatever_happens_each_client_has_one_connection(history: list[str], at_once: int) -> None:
    """Arrivals, resets and turns in any order, then the close: no client is lost or accepted twice."""

    async def steps() -> None:
        arriving = Arriving(at_once)
        await arriving.open()
        for step in history:
            match step:
                case "come" | "come 20":
                    arriving.come(20 if step.endswith("20") else 1)
                case "reset" if arriving.clients:
                    client = arriving.clients[-1]
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    client.close()
                    arriving.clients.pop()
                case "busy turn":
                    time.sleep(0.002)  # noqa: ASYNC251  the loop is busy with others
                    await asyncio.sleep(0)
                case "soon":
                    await asyncio.sleep(0.002)
                case _:
                    await asyncio.sleep(0)
        for client in arriving.clients:
            client.sendall(b"?")
        loop = asyncio.get_running_loop()
        for client in arriving.clients:
            client.setblocking(False)
            async with asyncio.timeout(5):
                assert await loop.sock_recv(client, 2) == b"?"
        assert len(arriving.seen) <= sum(step == "come" for step in history) + 20 * history.count("come 20")
        await arriving.end()
        assert all(protocol.transport is not None for protocol in arriving.seen)

    on_uvloop(steps)
