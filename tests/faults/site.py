"""Servers, their database and their Redis on loopback, every process known, to be killed, stopped and started again.

A `Deployment` is what a user has: several servers, any of which may take a request. Its provider runs in the test's
process and logs every call.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from oncewise.errors import OncewiseError
from oncewise.settings import Settings
from oncewise.storage.database import Database
from oncewise.storage.engines import open_database, upgrade
from oncewise.storage.tables import attempts, messages, turns
from tests.faults.network import Network, network
from tests.faults.server import Point
from tests.support.commands import ROOT
from tests.support.fake_provider import FakeProvider
from tests.support.postgres import PostgresServer, own_server
from tests.support.redis_server import RedisServer
from tests.support.server import ServerProcess

__all__ = ["Deployment", "Member", "Rows", "deployment", "leaks_of"]

RSS_LIMIT_BYTES = 250 * 2**20
FILES_LIMIT = 200
TASKS_LIMIT = 60
"""A server that nobody asks has about twenty."""


class Member(ServerProcess):
    """One server of a deployment; started again, it is another."""

    @property
    def owner(self) -> str:
        """The name under which it claims turns."""
        return next(line.split()[1] for line in self.lines if line.startswith("owner "))

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    def stop(self) -> None:
        """Stop it as a debugger, or a host that is out of breath, does."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)

    def strike(self) -> None:
        """Kill it, without waiting for its end."""
        with suppress(ProcessLookupError):
            self.process.kill()

    async def ended(self, point: Point) -> None:
        """Wait until it was killed, or stopped, at its point."""
        if point is not Point.PAUSE_IN_TX:
            await self.process.wait()
            return
        while psutil.Process(self.process.pid).status() != psutil.STATUS_STOPPED:
            await asyncio.sleep(0.01)

    async def tasks(self) -> int:
        """How many tasks its event loop has."""
        seen = len(self.lines)
        self.signal(signal.SIGUSR2)
        async with asyncio.timeout(5):
            while not (said := [line for line in self.lines[seen:] if line.startswith("tasks ")]):
                await asyncio.sleep(0.01)
        return int(said[0].split()[1])

    @property
    def open_files(self) -> int:
        return int(psutil.Process(self.process.pid).num_fds())


@dataclass(frozen=True)
class Rows:
    """What the database holds."""

    turns: list[sa.Row[Any]]
    messages: list[sa.Row[Any]]
    attempts: list[sa.Row[Any]]


@dataclass
class Deployment:
    """Servers on one database.

    Attributes:
        members: One for each place; a place keeps its number when its server is started again.
        networks: What lies between the servers and `postgres` or `redis`; the checker has its own way.
        settings: `ONCEWISE_*` of all servers, in lower case and without the prefix.
    """

    folder: Path
    provider: FakeProvider
    url: str
    postgres: PostgresServer | None = None
    redis: RedisServer | None = None
    networks: dict[str, Network] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    members: list[Member] = field(default_factory=list)
    database: Database | None = None

    # -- servers -------------------------------------------------------------------------------------------------

    async def launch(self, **fault: str) -> Member:
        """A server more, with the faults that its environment names."""
        member = Member(await self._spawn(fault))
        await member.ready()
        return member

    async def _spawn(self, fault: dict[str, str]) -> asyncio.subprocess.Process:
        urls = {"database_url": self._url("postgres", self.postgres, self.url)}
        if self.redis is not None:
            urls["redis_url"] = self._url("redis", self.redis, self.redis.url)
        settings = {**urls, "port": 0, "drain_s": 0.5, **self.settings}
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "OPENAI_API_KEY": "sk-test",
            "OPENAI_BASE_URL": self.provider.base_url,
            "OPENAI_RPS": "1000",
            "OPENAI_BURST": "100",
            "OPENAI_CONCURRENCY": "100",
            **{f"ONCEWISE_{name.upper()}": str(value) for name, value in settings.items()},
            **fault,
        }
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.faults.server",
            env=environment, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip

    def _url(self, name: str, server: PostgresServer | RedisServer | None, url: str) -> str:
        between = self.networks.get(name)
        return url if between is None or server is None else url.replace(f":{server.port}/", f":{between.port}/")

    async def restart(self, place: int, **fault: str) -> Member:
        """Make sure that the server of a place is gone, and start it again."""
        member = self.members[place]
        member.go_on()
        await member.kill()
        self.members[place] = await self.launch(**fault)
        return self.members[place]

    def member_of(self, owner: str) -> Member | None:
        return next((member for member in self.members if member.alive and member.owner == owner), None)

    # -- rows ----------------------------------------------------------------------------------------------------

    async def read(self, statement: sa.Select[Any]) -> list[sa.Row[Any]]:
        """Rows of the database, which may be away for a moment."""
        if self.database is None:
            self.database = await open_database(Settings(database_url=self.url), owner="checker", visit=True)
        database = self.database
        async with asyncio.timeout(20):
            while True:
                try:
                    return await database.read(lambda conn: list(conn.execute(statement)))
                except OncewiseError:
                    await asyncio.sleep(0.1)

    async def leader(self, thread: str) -> Member | None:
        """The server that leads the running turn of a thread."""
        asked = sa.select(turns.c.owner).where(turns.c.thread_id == thread, turns.c.done_at_ms.is_(None))
        owners = [row.owner for row in await self.read(asked)]
        return self.member_of(owners[0]) if owners else None

    async def rows(self, threads: Iterable[str]) -> Rows:
        """All that is stored of some threads."""
        ids = list(threads)
        of_turns = await self.read(sa.select(turns).where(turns.c.thread_id.in_(ids)).order_by(turns.c.idx))
        said = sa.select(messages).where(messages.c.thread_id.in_(ids)).order_by(messages.c.sequence)
        tried = sa.select(attempts).where(attempts.c.turn_id.in_([row.id for row in of_turns]))
        return Rows(of_turns, await self.read(said), await self.read(tried))

    async def settle(self, threads: Iterable[str], timeout_s: float) -> bool:
        """Wait until no turn of some threads is open; False if one stays so."""
        ids = list(threads)
        still = sa.select(sa.func.count()).where(turns.c.thread_id.in_(ids), turns.c.done_at_ms.is_(None))
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while (await self.read(still))[0][0]:
                    await asyncio.sleep(0.1)
                return True
        return False

    # -- leaks ---------------------------------------------------------------------------------------------------

    async def leaks(self) -> list[str]:
        """What servers hold though nobody asks them anything; what they had in flight may end for some seconds."""
        found: list[str] = []
        with suppress(TimeoutError):
            async with asyncio.timeout(12):
                while found := [leak for member in self.members if member.alive for leak in await leaks_of(member)]:
                    await asyncio.sleep(0.3)
        return found

    async def aclose(self) -> None:
        for member in self.members:
            member.go_on()
            await member.kill()
        if self.database is not None:
            await self.database.aclose()


async def leaks_of(member: Member) -> list[str]:
    """What one server holds beyond its bounds, in words."""
    text = (await member.ask("GET", "/metrics", headers=())).body.decode()
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    live = ("oncewise_live_flights", "oncewise_live_viewers")
    found = [f"{name} {figures[name]}" for name in live if float(figures.get(name, 0))]
    if member.rss_bytes > RSS_LIMIT_BYTES:
        found.append(f"{member.rss_bytes / 2**20:.0f} MiB")
    if member.open_files > FILES_LIMIT:
        found.append(f"{member.open_files} open files")
    if (tasks := await member.tasks()) > TASKS_LIMIT:
        found.append(f"{tasks} tasks")
    return [f"{member.owner}: {leak}" for leak in found]


@asynccontextmanager
async def deployment(
    folder: Path,
    servers: int = 3,
    *,
    postgres: bool = True,
    redis: bool = False,
    between: bool = False,
    **settings: Any,
) -> AsyncIterator[Deployment]:
    """Servers on a database of their own, PostgreSQL or an SQLite file, with a Redis beside them or without.

    Args:
        folder: Where files lie.
        servers: How many.
        postgres: Whether the database is PostgreSQL.
        redis: Whether they share a Redis.
        between: Whether they reach both over a `Network`.
        settings: `ONCEWISE_*`, in lower case and without the prefix.
    """
    async with AsyncExitStack() as stack:
        provider = await stack.enter_async_context(FakeProvider())
        engine = stack.enter_context(own_server()) if postgres else None
        url = f"sqlite:///{folder / 'ow.db'}" if engine is None else engine.url()
        shared = None
        if redis:
            shared = RedisServer(folder / "redis").start()
            stack.callback(shared.kill)
        await upgrade(Settings(database_url=url), owner="setup")
        networks = {}
        for name, server in (("postgres", engine), ("redis", shared)):
            if between and server is not None:
                networks[name] = await stack.enter_async_context(network(server.port))
        made = Deployment(folder, provider, url, engine, shared, networks, settings)
        stack.push_async_callback(made.aclose)
        made.members = list(await asyncio.gather(*(made.launch() for _ in range(servers))))
        yield made
