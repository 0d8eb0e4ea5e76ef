"""`oncewise serve` as a user runs it: a process of its own, configured by environment variables."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from signal import SIGKILL, Signals
from types import MappingProxyType

import psutil

from tests.support.http import Site

__all__ = ["ServerProcess", "serve_process"]

START_S = 30.0
_API = re.compile(r"API\s+http://127\.0\.0\.1:(\d+)/")


class ServerProcess(Site):
    """A running server process; requests are made as to any `Site`.

    Attributes:
        lines: What it has printed, both streams together.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.port = 0
        self.lines: list[str] = []
        self._reading: asyncio.Task[None] | None = None

    async def ready(self) -> None:
        """Wait for the banner; the server answers from then on."""
        assert self.process.stdout is not None
        async with asyncio.timeout(START_S):
            while not self.port:
                line = (await self.process.stdout.readline()).decode()
                assert line, "the server did not start: " + "".join(self.lines)
                self.lines.append(line)
                if found := _API.search(line):
                    self.port = int(found[1])
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        # To the end: a full pipe would stop the server.
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(line.decode())

    def signal(self, number: Signals) -> None:
        self.process.send_signal(number)

    async def exited(self, timeout_s: float) -> int:
        """The exit status; also waits for the last line of its output."""
        async with asyncio.timeout(timeout_s):
            status = await self.process.wait()
        if self._reading is not None:
            await self._reading
        return status

    async def kill(self) -> None:
        """End it as the kernel does when memory runs out."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.send_signal(SIGKILL)
        await self.exited(10)

    @property
    def rss_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)


@asynccontextmanager
async def serve_process(
    folder: Path, base_url: str, environment: Mapping[str, str] = MappingProxyType({}), **settings: object
) -> AsyncIterator[ServerProcess]:
    """Serve the database in `folder`, with the provider at `base_url` as `openai`; killed at the end if it still runs.

    Args:
        folder: Where the database is, or will be made.
        base_url: Of an OpenAI-compatible provider, `/v1` included.
        environment: Further variables, or others than usual.
        settings: `ONCEWISE_*` variables, in lower case and without the prefix.
    """
    variables = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "ONCEWISE_DATABASE_URL": f"sqlite:///{folder / 'ow.db'}",
        "ONCEWISE_PORT": "0",
        "OPENAI_API_KEY": "sk-test",
        "OPENAI_BASE_URL": base_url,
        "OPENAI_RPS": "1000",
        "OPENAI_BURST": "100",
        "OPENAI_CONCURRENCY": "100",
        **{f"ONCEWISE_{name.upper()}": str(value) for name, value in settings.items()},
        **environment,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "oncewise", "serve"),
        env=variables,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    server = ServerProcess(process)
    try:
        await server.ready()
        yield server
    finally:
        await server.kill()
