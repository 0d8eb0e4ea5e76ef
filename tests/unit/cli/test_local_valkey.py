"""A Valkey server of one's own. How it is seen by workers is in `tests/integration/test_workers.py`."""

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from oncewise.cli.local_valkey import LocalValkey, find_valkey
from oncewise.cli.start_up import CannotStart


@pytest.fixture(name="folder")
def _folder() -> Iterator[Path]:
    # The path of a socket is short; a test's own directory is not.
    path = Path(tempfile.mkdtemp(prefix="ow-"))
    yield path
    shutil.rmtree(path)


def program() -> Path:
    found = find_valkey()
    assert found is not None
    return found


async def answers(valkey: LocalValkey) -> bool:
    try:
        reader, writer = await asyncio.open_unix_connection(valkey.url.removeprefix("unix://"))
    except OSError:
        return False
    writer.write(b"PING\r\n")
    try:
        return await reader.readline() == b"+PONG\r\n"
    finally:
        writer.close()


async def test_it_answers_once_it_is_started_and_is_gone_once_it_is_closed(folder: Path) -> None:
    """Nothing of it is left but its directory, which is not its own."""
    valkey = LocalValkey(program(), folder)
    await valkey.start()
    process = psutil.Process(valkey.pid)
    assert await answers(valkey)
    await valkey.aclose()
    assert not process.is_running()


async def test_a_killed_one_is_replaced_at_the_same_place(folder: Path) -> None:
    """However often."""
    valkey = LocalValkey(program(), folder)
    await valkey.start()
    for _ in range(2):
        first = psutil.Process(valkey.pid)
        first.kill()
        async with asyncio.timeout(10):
            while valkey.pid == first.pid or not await answers(valkey):
                await asyncio.sleep(0.01)
    await valkey.aclose()


@pytest.mark.parametrize("bad", ["/bin/false", "/nowhere/valkey-server"])
async def test_one_that_does_not_start_is_an_error_with_a_way_out(folder: Path, bad: str) -> None:
    """Not a server without what its workers share."""
    valkey = LocalValkey(Path(bad), folder)
    with pytest.raises(CannotStart, match="ONCEWISE_REDIS_URL"):
        await valkey.start()
    await valkey.aclose()


async def test_one_that_does_not_answer_is_an_error_after_a_while(folder: Path) -> None:
    """And is not left behind."""
    valkey = LocalValkey(Path("/bin/cat"), folder, start_s=0.3)
    with pytest.raises(CannotStart):
        await valkey.start()
    await valkey.aclose()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
async def test_it_ends_with_a_parent_that_is_killed(folder: Path) -> None:
    """Also when no worker is left that could see to it."""
    parent = f"""
import asyncio
from pathlib import Path
from oncewise.cli.local_valkey import LocalValkey
async def main():
    valkey = LocalValkey(Path({str(program())!r}), Path({str(folder)!r}))
    await valkey.start()
    print(valkey.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", parent, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    valkey = psutil.Process(int(await process.stdout.readline()))
    process.kill()
    await process.wait()
    _gone, alive = await asyncio.to_thread(psutil.wait_procs, [valkey], timeout=5)
    assert alive == []
