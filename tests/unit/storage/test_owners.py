"""Signs of life of processes that share a database file."""

import fcntl
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from oncewise.storage.owners import OwnerLock

PROGRAM = """
import sys
from pathlib import Path
from oncewise.storage.owners import OwnerLock
lock = OwnerLock(Path(sys.argv[1]), "other")
print("held", flush=True)
sys.stdin.read()
"""


def other_process(directory: Path) -> subprocess.Popen[str]:
    """A process that lives as the owner `other`, once this returns."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_an_owner_is_alive_until_its_process_is_killed(tmp_path: Path):
    """`kill -9` runs no code of the process; the kernel gives the lock back. Its file is cleared away."""
    lock = OwnerLock(tmp_path, "mine")
    with other_process(tmp_path) as process:
        assert lock.living() == {"mine", "other"}
        process.kill()
        process.wait(10)
        assert lock.living() == {"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    lock.close()


def test_a_closed_owner_leaves_no_file(tmp_path: Path):
    """And is dead to the others."""
    first, second = OwnerLock(tmp_path, "first"), OwnerLock(tmp_path, "second")
    first.close()

    assert second.living() == {"second"}
    second.close()
    assert list(tmp_path.iterdir()) == []


def test_asking_who_lives_does_not_end_ones_own_sign_of_life(tmp_path: Path):
    """With POSIX locks it would: closing any handle of a file gives back all of the process's locks on it."""
    first, second = OwnerLock(tmp_path, "first"), OwnerLock(tmp_path, "second")
    for _ in range(3):
        assert first.living() == second.living() == {"first", "second"}
    first.close()
    second.close()


def test_an_owner_whose_file_is_cleared_away_at_birth_makes_another(tmp_path: Path):
    """Between making its file and locking it, a neighbour may take the file for a dead owner's."""
    path = tmp_path / "born"
    with ThreadPoolExecutor(1) as other_process:
        with path.open("w") as clearing:
            fcntl.flock(clearing, fcntl.LOCK_EX)
            born = other_process.submit(OwnerLock, tmp_path, "born")
            while sum(file.path == str(path) for file in psutil.Process().open_files()) < 2:
                assert not born.done()
            path.unlink()
        lock = born.result(10)
    neighbour = OwnerLock(tmp_path, "neighbour")

    assert neighbour.living() == {"born", "neighbour"}
    neighbour.close()
    lock.close()
