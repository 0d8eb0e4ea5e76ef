"""The worker's end of the line to its supervisor."""

import asyncio
import json
import socket
import sys
from pathlib import Path

PROGRAM = """
import asyncio, socket, sys, time
from oncewise.cli.worker import Leash

async def main():
    leash = Leash(socket.socket(fileno=int(sys.argv[1])), grace_s=0.2)
    leash.listen(lambda message: print(message, flush=True))
    leash.tell({"serves": {}})
    await asyncio.sleep(0.2)
    if sys.argv[2] == "stuck":
        time.sleep(60)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def leashed(folder: Path, how: str) -> tuple[asyncio.subprocess.Process, asyncio.StreamWriter]:
    """A process that has begun to listen."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PROGRAM, str(theirs.fileno()), how),
            pass_fds=[theirs.fileno()],
            stdout=asyncio.subprocess.PIPE,
        )
    reader, writer = await asyncio.open_connection(sock=ours)
    writer.write(json.dumps({"folder": str(folder)}).encode() + b"\n")
    assert json.loads(await asyncio.wait_for(reader.readline(), 20)) == {"serves": {}}
    return process, writer


async def test_orders_are_heard_and_then_the_end(tmp_path: Path) -> None:
    """The end comes as an order, removes what the workers shared, and leaves a moment to obey it."""
    folder = tmp_path / "shared"
    folder.mkdir()
    process, writer = await leashed(folder, "idle")
    writer.write(b'{"do": "drain"}\n')
    writer.close()
    async with asyncio.timeout(10):
        output, _ = await process.communicate()
    assert output.decode().splitlines() == ["{'do': 'drain'}", "{'do': 'end'}"]
    assert process.returncode == 1
    assert not folder.exists()


async def test_a_worker_that_is_stuck_ends_all_the_same(tmp_path: Path) -> None:
    """Nothing that blocks its loop keeps it alive without a supervisor: it would hold the port."""
    process, writer = await leashed(tmp_path / "shared", "stuck")
    await asyncio.sleep(0.4)
    writer.close()
    async with asyncio.timeout(10):
        assert await process.wait() == 1


async def test_a_worker_without_a_brief_ends(tmp_path: Path) -> None:
    """Its supervisor died while it was started."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "oncewise.cli.worker", str(theirs.fileno())),
            pass_fds=[theirs.fileno()],
            stderr=asyncio.subprocess.PIPE,
        )
    ours.close()
    async with asyncio.timeout(20):
        _, errors = await process.communicate()
    assert process.returncode == 1
    assert errors == b""
