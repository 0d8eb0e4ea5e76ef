"""A process's advisory lock: kept through lost connections, never trusted right after one."""

import asyncio
from collections.abc import Callable

import pytest

from oncewise.storage.sign_of_life import SignOfLife
from tests.support.virtual_time import virtual_loop, virtual_time


class Server:
    """The locks of a PostgreSQL, and the connections that hold them.

    Attributes:
        away: Refuses new connections.
        mute: Says nothing on those there are.
        held_by_a_ghost: Takes the lock for one that it has not yet seen to be gone.
    """

    def __init__(self) -> None:
        self.away = self.mute = self.held_by_a_ghost = False
        self.sessions: list[Session] = []
        self.attempts = 0

    async def connect(self) -> "Session":
        self.attempts += 1
        if self.away:
            raise ConnectionRefusedError
        self.sessions.append(Session(self))
        return self.sessions[-1]

    @property
    def holders(self) -> list["Session"]:
        return [session for session in self.sessions if session.holds]


class Session:
    """A connection of asyncpg's kind."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.closed = self.holds = False
        self.listeners: list[Callable[[object], None]] = []

    async def fetchval(self, query: str, *_args: object, timeout: float | None = None) -> object:  # noqa: ASYNC109
        async with asyncio.timeout(timeout):
            while self.server.mute:
                await asyncio.sleep(1)
        if "lock" in query:
            self.holds = not self.server.holders and not self.server.held_by_a_ghost
            return self.holds
        return 1

    def add_termination_listener(self, listener: Callable[[object], None]) -> None:
        self.listeners.append(listener)

    def is_closed(self) -> bool:
        return self.closed

    async def close(self) -> None:
        self.terminate()

    def terminate(self) -> None:
        self.closed, self.holds = True, False
        for listener in self.listeners:
            listener(self)


async def given(server: Server) -> SignOfLife:
    sign = SignOfLife(server.connect, "me")
    await sign.give()
    return sign


@virtual_time
async def test_the_lock_is_held_from_the_start_to_the_end():
    """Nobody can take its owner for dead in between."""
    server = Server()
    sign = await given(server)
    assert (len(server.holders), sign.may_judge) == (1, True)
    await asyncio.sleep(3600)
    assert (len(server.holders), server.attempts) == (1, 1)

    await sign.withdraw()
    assert (server.holders, sign.may_judge) == ([], False)
    assert all(session.closed for session in server.sessions)


@virtual_time
async def test_a_lost_lock_is_taken_again_at_once_and_nobody_is_judged_for_a_while():
    """All who share the database may have lost theirs, and some are back before others."""
    server = Server()
    sign = await given(server)
    server.sessions[0].terminate()
    await asyncio.sleep(0.01)

    assert (len(server.holders), sign.may_judge) == (1, False)
    await asyncio.sleep(2.9)
    assert not sign.may_judge
    await asyncio.sleep(0.2)
    assert sign.may_judge
    await sign.withdraw()


@virtual_time
async def test_a_server_that_is_away_is_tried_until_it_is_back():
    """A few times a second; without a lock nobody is judged."""
    server = Server()
    sign = await given(server)
    server.away = True
    server.sessions[0].terminate()
    await asyncio.sleep(60)

    assert 200 < server.attempts < 400
    assert not sign.may_judge
    server.away = False
    await asyncio.sleep(0.3)
    assert len(server.holders) == 1
    await sign.withdraw()


@virtual_time
async def test_a_silent_server_is_noticed_and_left():
    """Unplugged, it says no goodbye; the connection would look alive for hours."""
    server = Server()
    sign = await given(server)
    server.mute = True
    await asyncio.sleep(5)

    assert server.sessions[0].closed
    assert not sign.may_judge
    server.mute = False
    await asyncio.sleep(5)
    assert len(server.holders) == 1
    await sign.withdraw()


@virtual_time
async def test_a_ghost_of_the_last_session_is_outlived():
    """PostgreSQL may see later than we that a connection is gone."""
    server = Server()
    sign = await given(server)
    server.held_by_a_ghost = True
    server.sessions[0].terminate()
    await asyncio.sleep(10)
    assert not sign.may_judge

    server.held_by_a_ghost = False
    await asyncio.sleep(0.3)
    assert len(server.holders) == 1
    assert sum(not session.closed for session in server.sessions) == 1
    await sign.withdraw()


@virtual_time
async def test_a_server_that_is_away_at_the_start_is_told():
    """Better no server than one whose turns look dead."""
    server = Server()
    server.away = True
    with pytest.raises(ConnectionRefusedError):
        await given(server)
    assert virtual_loop().time() == 0
