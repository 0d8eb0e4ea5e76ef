"""Every suite here runs on memory and on every server program there is; what a database can do alone, on that too."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa

from oncewise.coordination.memory import World
from oncewise.coordination.redis import open_redis
from oncewise.ports import CallSlots, Coordination, SharedLimiter
from oncewise.storage.pacing import SqlCallSlots, SqlLimiter
from oncewise.storage.postgres import open_postgres
from oncewise.storage.signals import SqlSignals
from oncewise.storage.sqlite import open_sqlite
from oncewise.storage.tables import call_slots, paces, signals
from tests.support.postgres import fresh_database
from tests.support.redis_server import SERVERS, RedisServer


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        databases = ["sqlite", "postgresql"] if getattr(metafunc.module, "ON_DATABASES_TOO", False) else []
        metafunc.parametrize("backend", ["memory", *SERVERS, *databases], indirect=True, scope="package")


@pytest.fixture(scope="package")
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer | str]:
    """A server, or the name of what needs none."""
    if request.param not in SERVERS:
        yield request.param
        return
    server = RedisServer(tmp_path_factory.mktemp("redis"), SERVERS[request.param]).start()
    yield server
    server.kill()


class OnDatabase:
    """What one worker has of a database."""

    def __init__(self, database: Any, address: str, others: Callable[[], Awaitable[int]]) -> None:
        self.signals = SqlSignals(database, address, others=others, poll_s=0.02)
        self._database = database
        self._slots: list[SqlCallSlots] = []

    def limiter(self, provider: str, *, rate: float, burst: int) -> SharedLimiter:
        return SqlLimiter(self._database, provider, rate=rate, burst=burst)

    def slots(self, provider: str, *, limit: int) -> CallSlots:
        self._slots.append(SqlCallSlots(self._database, provider, limit=limit, owner=self.signals.address))
        return self._slots[-1]

    async def aclose(self) -> None:
        for slots in self._slots:
            await slots.aclose()
        await self.signals.aclose()
        await self._database.aclose()


class Fleet:
    """Workers that share one coordination, as many as a test wants."""

    def __init__(self, backend: RedisServer | str, folder: Path, opened: AsyncExitStack) -> None:
        self.backend = backend
        self._folder = folder
        self._opened = opened
        self._deployment = uuid4().hex
        self._world = World()
        self._databases: list[Any] = []
        self._url: str | None = None

    async def worker(self) -> Coordination | Any:
        address = uuid4().hex
        if isinstance(self.backend, RedisServer):
            worker: Any = await open_redis(self.backend.url, deployment=self._deployment, address=address, patience_s=5)
        elif self.backend == "memory":
            worker = self._world.worker(address)
        else:
            worker = await self._on_database(address)
        self._opened.push_async_callback(worker.aclose)
        return worker

    async def _on_database(self, address: str) -> OnDatabase:
        if self.backend == "sqlite":
            database: Any = await open_sqlite(str(self._folder / "ow.db"), owner=address)
        else:
            self._url = self._url or await self._opened.enter_async_context(fresh_database())
            database = await open_postgres(self._url, owner=address)
        self._databases.append(database)
        worker = OnDatabase(database, address, database.neighbours)
        await worker.signals.begin()
        return worker

    async def flush(self) -> None:
        """Lose everything that is held."""
        if isinstance(self.backend, RedisServer):
            self.backend.flush()
        elif self.backend == "memory":
            self._world.flush()
        else:
            for table in (paces, call_slots, signals):
                await self._databases[0].write(lambda conn, table=table: conn.execute(sa.delete(table)).close())


@pytest.fixture
async def fleet(backend: RedisServer | str, tmp_path: Path) -> AsyncIterator[Fleet]:
    """An empty coordination that workers may join."""
    async with AsyncExitStack() as opened:
        yield Fleet(backend, tmp_path, opened)
