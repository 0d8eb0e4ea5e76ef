"""Which processes that share a database file are alive: each holds a lock on a file of its own.

The kernel gives the lock back when a process ends, however it ends, so that a dead owner is known at once and not
after its lease. Lock and file names say nothing about time, which a suspended laptop or a stepped clock would falsify.

Deliberately absent: turns. Who owns what stands in the database.
"""

import fcntl
import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["OwnerLock", "alone"]


_LOOK_EVERY_S = 0.0005


@contextmanager
def alone(directory: Path, *, within_s: float) -> Generator[None, None, None]:
    """Keep all others that ask for the same out until the block ends, or this process does.

    Raises:
        TimeoutError: another process has been in its block for `within_s` seconds.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        _lock(handle, within_s)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, within_s: float) -> None:
    give_up_s = time.monotonic() + within_s
    while True:
        # The kernel's own queue would be fairer, but a process that was stopped inside its block would stop all others.
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() > give_up_s:
            raise TimeoutError
        time.sleep(_LOOK_EVERY_S)


class OwnerLock:
    """This process's sign of life in `directory`, from `__init__` to `close`.

    Args:
        owner: Name of this process, never used again by another one; becomes a file name.
        directory: One per database; made if it is missing.
    """

    def __init__(self, directory: Path, owner: str) -> None:
        self.owner = owner
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._file = self._hold(directory / owner)

    @staticmethod
    def _hold(path: Path) -> int:
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(file, fcntl.LOCK_EX)
            # A neighbour that was clearing up may have removed the file before it was locked.
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                return file
            os.close(file)

    def living(self) -> frozenset[str]:
        """Names of the owners that are alive, this one included; files of dead ones are removed."""
        return frozenset(path.name for path in self._directory.iterdir() if self._is_held(path))

    @staticmethod
    def _is_held(path: Path) -> bool:
        try:
            file = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            path.unlink(missing_ok=True)
            return False
        finally:
            os.close(file)

    def close(self) -> None:
        """Take the sign of life away."""
        (self._directory / self.owner).unlink(missing_ok=True)
        os.close(self._file)
