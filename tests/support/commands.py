"""The `oncewise` command and other programs as a user starts them: processes with an environment of their own."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

__all__ = ["ONCEWISE", "ROOT", "Running", "environment", "oncewise", "running", "serving"]

ROOT = Path(__file__).parents[2]
ONCEWISE = (sys.executable, "-m", "oncewise")
_FOREIGN = re.compile(r"ONCEWISE_|[A-Z]+_(API_KEY|BASE_URL|RPS|BURST|CONCURRENCY)$")


def environment(home: Path | None = None, **own: object) -> dict[str, str]:
    """The environment of this process without anybody's settings, and with `own` ones."""
    kept = {name: value for name, value in os.environ.items() if not _FOREIGN.match(name)}
    kept |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if home:
        kept |= {"HOME": str(home), "XDG_DATA_HOME": str(home / "data")}
    return kept | {name: str(value) for name, value in own.items()}


def oncewise(*arguments: str, timeout_s: float = 60.0, **own: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*ONCEWISE, *arguments],
        env=environment(**own), capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip


@dataclass
class Running:
    """A program that runs, and what it has printed so far."""

    process: subprocess.Popen[str]
    output: list[str]
    _out: IO[str]

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read its output up to a line that has the pattern; fails if it ends before."""
        for line in self._out:
            self.output.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"it ended without {pattern}:\n{''.join(self.output)}")

    def stop(self, number: signal.Signals = signal.SIGINT) -> tuple[int, float]:
        """Send it a signal; its exit code, and the seconds until it was gone."""
        began_s = time.monotonic()
        self.process.send_signal(number)
        self.output += list(self._out)
        return self.process.wait(20.0), time.monotonic() - began_s


@contextmanager
def running(command: tuple[str, ...], env: dict[str, str]) -> Iterator[Running]:
    """Start a program; killed at the end if it still runs."""
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        yield Running(process, [], process.stdout)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def serving(*arguments: str, **own: object) -> Iterator[str]:
    """A server on a free port with a database of its own; yields its URL."""
    with tempfile.TemporaryDirectory() as folder:
        env = environment(Path(folder), **own)
        with running((*ONCEWISE, "serve", "--port", "0", *arguments), env) as server:
            yield server.wait_for(r"API\s+(http://127\.0\.0\.1:\d+)/")[1]
