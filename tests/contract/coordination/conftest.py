"""Every suite here runs on the memory implementation and on every server program there is."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from oncewise.coordination.memory import World
from oncewise.coordination.redis import open_redis
from oncewise.ports import Coordination
from tests.support.redis_server import SERVERS, RedisServer

Joins = Callable[..., Awaitable[Any]]


@pytest.fixture(scope="package", params=["memory", *SERVERS])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer | None]:
    """A server, or None for memory."""
    if request.param == "memory":
        yield None
        return
    server = RedisServer(tmp_path_factory.mktemp("redis"), SERVERS[request.param]).start()
    yield server
    server.kill()


class Fleet:
    """Workers that share one coordination, as many as a test wants."""

    def __init__(self, backend: RedisServer | None, opened: AsyncExitStack) -> None:
        self.backend = backend
        self._opened = opened
        self._deployment = uuid4().hex
        self._world = World()

    async def worker(self, address: str = "") -> Coordination:
        address = address or uuid4().hex
        if self.backend is None:
            worker: Coordination = self._world.worker(address)
        else:
            worker = await open_redis(self.backend.url, deployment=self._deployment, address=address, patience_s=5)
        self._opened.push_async_callback(worker.aclose)
        return worker

    def flush(self) -> None:
        """Lose everything that is held."""
        if self.backend is None:
            self._world.flush()
        else:
            self.backend.flush()


@pytest.fixture
async def fleet(backend: RedisServer | None, tmp_path: Path) -> AsyncIterator[Fleet]:
    """An empty coordination that workers may join."""
    async with AsyncExitStack() as opened:
        yield Fleet(backend, opened)
