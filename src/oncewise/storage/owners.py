"""Which processes that share a database file are alive: each holds a lock on a file of its own.

The kernel gives the lock back when a process ends, however it ends, so that a dead owner is known at once and not
after its lease. Lock and file names say nothing about time, which a suspended laptop or a stepped clock would falsify.

Deliberately absent: turns. Who owns what stands in the database.
"""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["OwnerLock", "alone"]


@contextmanager
def alone(directory: Path) -> Generator[None, None, None]:
    """Keep all others that ask for the same out until the block ends, or this process does."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


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
