"""The processes of a measurement: a provider, a server, and what the system says they cost.

The server under test has the first core for itself; the provider and the load share the last one. Processor time and
memory come from the kernel, not from the server.

Deliberately absent: more than one process per server, and any address but loopback.
"""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

__all__ = ["SERVER_CORE", "Memory", "Process", "Provider", "oncewise", "pin_load", "python_server"]

ROOT = Path(__file__).resolve().parents[2]
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORE = CORES[0], CORES[-1]
ORG = {"x-org-id": "bench"}
READY_LIMIT_S = 60.0
STOP_LIMIT_S = 15.0


def pin_load() -> None:
    """Keep this process off the server's core."""
    os.sched_setaffinity(0, {LOAD_CORE})


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a process in KiB: its proportional share, and what is resident."""

    pss_kib: int
    rss_kib: int


class Process:
    """A server process on loopback, with a directory of its own; ended by its `with` block.

    Attributes:
        ready_s: From the start of the process to the first 200.
    """

    def __init__(
        self, command: list[str], *, core: int, ready: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="oncewise-bench-")
        directory = self._directory.name
        port = _free_port()
        log = Path(directory) / "log"
        began_s = time.monotonic()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [part.format(port=port) for part in command],
                cwd=ROOT,
                env={
                    **os.environ,
                    **{name: value.format(directory=directory) for name, value in (environment or {}).items()},
                },
                stdout=output,
                stderr=output,
            )
        self.pid = self._process.pid
        self.address = ("127.0.0.1", port)
        os.sched_setaffinity(self.pid, {core})
        try:
            self._wait_until_ready(ready, log)
        except BaseException:
            self.stop()
            raise
        self.ready_s = time.monotonic() - began_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _wait_until_ready(self, path: str, log: Path) -> None:
        end_s = time.monotonic() + READY_LIMIT_S
        while time.monotonic() < end_s:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-2000:]}")
            try:
                if self._answer("GET", path)[0] == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(0.005)
        raise RuntimeError("the server was not ready in time")

    def fetch(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """One request of its own connection: status and JSON body, None where there is none."""
        status, data = self._answer(method, path, None if body is None else json.dumps(body))
        return status, json.loads(data) if data else None

    def _answer(self, method: str, path: str, content: str | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(*self.address, timeout=20)
        try:
            connection.request(method, path, content, {"content-type": "application/json", **ORG})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def cpu_s(self) -> float:
        """Processor time of all its threads so far, to the nanosecond."""
        # The kernel's clock of another process, as clock_getcpuclockid(3) makes its number; /proc counts in 10 ms.
        return time.clock_gettime((~self.pid << 3) | 2)

    def memory(self) -> Memory:
        """What it holds now."""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return Memory(_kib("Pss", text), _kib("Rss", text))

    def reset_peak(self) -> None:
        """Forget the most it ever held."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def peak_rss_kib(self) -> int:
        """The most it held since the start or the last reset."""
        return _kib("VmHWM", Path(f"/proc/{self.pid}/status").read_text())

    def stop(self) -> None:
        """End it, with force if it does not end by itself."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._directory.cleanup()


def _kib(name: str, text: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the kernel does not tell {name}")
    return int(found[1])


class Provider(Process):
    """A fake provider: that of the tests, whose model names say what it does, or another with the same counters."""

    def __init__(self, module: str = "tests.support.fake_provider") -> None:
        super().__init__([sys.executable, "-m", module, "--port", "{port}"], core=LOAD_CORE, ready="/health")

    @property
    def base_url(self) -> str:
        """What a client is configured with."""
        return f"http://127.0.0.1:{self.address[1]}/v1"

    def reset(self) -> None:
        """Forget all calls."""
        self.fetch("POST", "/reset", {})

    def stats(self) -> dict[str, Any]:
        """What it counted since the start or the last reset."""
        return self.fetch("GET", "/stats")[1]


def oncewise(provider: Provider) -> Process:
    """A server of ours on a database of its own, with a provider whose limits are out of the way."""
    return Process(
        [sys.executable, "-m", "oncewise", "serve", "--port", "{port}"],
        core=SERVER_CORE,
        ready="/health/readiness",
        environment={
            "ONCEWISE_DATABASE_URL": "sqlite:///{directory}/oncewise.db",
            "ONCEWISE_DRAIN_S": "0",
            "OPENAI_API_KEY": "sk-bench",
            "OPENAI_BASE_URL": provider.base_url,
            "OPENAI_RPS": "10000",
            "OPENAI_BURST": "10000",
            "OPENAI_CONCURRENCY": "10000",
        },
    )


def python_server(module: str, provider: Provider) -> Process:
    """Another server of this directory, in the place of ours."""
    return Process(
        [sys.executable, "-m", module, "--port", "{port}", "--provider", provider.base_url],
        core=SERVER_CORE,
        ready="/health/readiness",
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
