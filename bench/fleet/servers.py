"""A fleet on this machine: PostgreSQL and Valkey as real processes, a fake provider, and any number of our servers.

PostgreSQL runs without waiting for the disk, as in the tests: what a commit costs a disk is that disk's figure, not
ours. All processes share the machine's cores; only the fake provider and the load keep to the last one.

Deliberately absent: machines, and networks between them.
"""

import asyncio
import http.client
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
from bench.http.servers import CORES, ORG, Process, Provider

from oncewise.storage.postgres import upgrade_postgres
from tests.support.postgres import PostgresServer, own_server
from tests.support.redis_server import RedisServer

__all__ = ["Fleet", "Server", "Shared", "cpu_s_of", "shared"]

DATABASE = "bench"
LIMIT_S = 60.0


def cpu_s_of(pid: int) -> float:
    """Processor time of a process and all below it so far, to the nanosecond; 0 for those that are gone."""
    total_s = 0.0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            # The kernel's clock of another process, as clock_getcpuclockid(3) makes its number.
            total_s += _clock_s(process.pid)
        except OSError:
            continue
    return total_s


def _clock_s(pid: int) -> float:
    return time.clock_gettime((~pid << 3) | 2)


@dataclass(frozen=True, slots=True)
class Shared:
    """What the servers of a fleet share.

    Attributes:
        postgres_port: Where they find PostgreSQL; that of the server itself, or of a tap before it.
        redis_port: The same of Valkey.
    """

    postgres: PostgresServer
    redis: RedisServer
    provider: Provider
    postgres_port: int
    redis_port: int

    @property
    def environment(self) -> dict[str, str]:
        """The settings of a server of this fleet."""
        return {
            "ONCEWISE_DATABASE_URL": (
                f"postgresql://postgres@127.0.0.1:{self.postgres_port}/{DATABASE}?sslmode=disable"
            ),
            "ONCEWISE_REDIS_URL": f"redis://127.0.0.1:{self.redis_port}/0",
            "ONCEWISE_DRAIN_S": "0",
            "OPENAI_API_KEY": "sk-bench",
            "OPENAI_BASE_URL": self.provider.base_url,
            "OPENAI_RPS": "10000",
            "OPENAI_BURST": "10000",
            "OPENAI_CONCURRENCY": "10000",
        }

    def cpu_s(self) -> float:
        """Processor time of all of it."""
        return cpu_s_of(self.postgres.pid) + cpu_s_of(self.redis.pid) + self.provider.cpu_s()


@contextmanager
def shared() -> Generator[Shared, None, None]:
    """PostgreSQL with the schema and its own count of statements, Valkey, and a provider."""
    with ExitStack() as stack:
        postgres = stack.enter_context(own_server())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="oncewise-bench-"))
        asyncio.run(_prepare(postgres))
        redis = RedisServer(Path(folder)).start()
        stack.callback(redis.kill)
        provider = stack.enter_context(Provider())
        yield Shared(postgres, redis, provider, postgres.port, redis.port)


async def _prepare(postgres: PostgresServer) -> None:
    await postgres.execute("ALTER SYSTEM SET shared_preload_libraries = 'pg_stat_statements'")
    postgres.stop(signal.SIGINT)
    postgres.start()
    await postgres.execute(f"CREATE DATABASE {DATABASE}")
    await postgres.execute("CREATE EXTENSION pg_stat_statements")
    await upgrade_postgres(postgres.url(DATABASE))


class Server(Process):
    """One of our servers, on any core; further workers are processes below it."""

    def __init__(self, shared: Shared, workers: int = 1, environment: dict[str, str] | None = None) -> None:
        super().__init__(
            [sys.executable, "-m", "oncewise", "serve", "--port", "{port}", "--workers", str(workers)],
            core=CORES[0],
            ready="/health/readiness",
            environment={**shared.environment, **(environment or {})},
        )
        for process in [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]:
            process.cpu_affinity(CORES)

    def send(self, path: str, body: object) -> tuple[int, bytes]:
        """POST on a connection of its own; the status and all that came back, to the end."""
        connection = http.client.HTTPConnection(*self.address, timeout=LIMIT_S)
        try:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json", **ORG})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def cpu_s(self) -> float:
        """Processor time of it and of all below it."""
        return cpu_s_of(self.pid) if psutil.pid_exists(self.pid) else 0.0

    def kill(self) -> None:
        """End it as the kernel does when memory runs out."""
        os.kill(self.pid, signal.SIGKILL)


class Fleet:
    """Several servers, and a thread for every request that waits for one of them."""

    def __init__(self, servers: list[Server]) -> None:
        self.servers = servers
        self._threads = ThreadPoolExecutor(max_workers=400)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._threads.shutdown(wait=True)
        for server in self.servers:
            server.stop()

    def ask(self, number: int, path: str, body: object) -> Any:
        """Send a request to one of them; the result of what this returns is its status and its whole body."""
        return self._threads.submit(self.servers[number].send, path, body)

    def new_thread(self) -> str:
        """The id of an empty thread."""
        status, document = self.servers[0].fetch("POST", "/api/threads/", {})
        if status != 201:
            raise RuntimeError(f"no thread: {status} {document}")
        thread: str = document["thread_id"]
        return thread
