"""How evenly connections at once are spread over processes on one port, and how.

    python bench/core/accept.py [--rounds 20] [--out FILE]

`shared`: all accept on one listening socket. `one`: the same, one connection per turn of the loop. `each`: a socket
each with SO_REUSEPORT, as `oncewise serve --workers` has it. What counts is the share of the busiest process. Each
connection costs its process 0.2 ms of work.
"""

import argparse
import asyncio
import os
import signal
import time
from collections import Counter
from statistics import median

import uvloop
from reporting import write

from oncewise.api.sockets import SocketGroup, listen, listen_for_each

BACKLOG = 8192


class Answering(asyncio.Protocol):
    """Tells which process it is."""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, _data):
        until_s = time.perf_counter() + 0.0002
        while time.perf_counter() < until_s:
            pass
        self.transport.write(b"%d\n" % os.getpid())


async def serve(group: SocketGroup, *, one_a_turn: bool) -> None:
    loop = asyncio.get_running_loop()
    (listener,) = group

    def accept() -> None:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return
        connection.setblocking(False)
        tasks.add(loop.create_task(loop.connect_accepted_socket(Answering, connection)))

    tasks: set[asyncio.Task[object]] = set()
    if one_a_turn:
        loop.add_reader(listener, accept)
    else:
        await loop.create_server(Answering, sock=listener, backlog=BACKLOG)
    await asyncio.Event().wait()


def start(how: str, processes: int) -> tuple[int, list[int]]:
    """The port and the processes."""
    if how == "each":
        groups = listen_for_each("127.0.0.1", 0, processes)
    else:
        groups = [listen("127.0.0.1", 0)]
        groups[0][0].listen(BACKLOG)
    pids = []
    for number in range(processes):
        pid = os.fork()
        if pid == 0:
            uvloop.run(serve(groups[number % len(groups)], one_a_turn=how == "one"))
        pids.append(pid)
    port: int = groups[0][0].getsockname()[1]
    for group in groups:
        group[0].close()
    return port, pids


async def burst(port: int, connections: int) -> Counter[bytes]:
    async def one() -> tuple[bytes, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"?")
        return await reader.readline(), writer

    opened = await asyncio.gather(*(one() for _ in range(connections)))
    for _, writer in opened:
        writer.close()
    return Counter(who for who, _ in opened)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out")
    options = parser.parse_args()
    rows = []
    for processes in (2, 4):
        for how in ("shared", "one", "each"):
            port, pids = start(how, processes)
            time.sleep(0.5)
            for connections in (10, 50, 500):
                bursts = [asyncio.run(burst(port, connections)) for _ in range(options.rounds)]
                shares = [max(one.values()) / connections for one in bursts]
                figures = {"busiest": f"{median(shares):.2f}", "worst": f"{max(shares):.2f}"}
                rows.append({"processes": processes, "how": how, "connections": connections, **figures})
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    write(rows, options.out)


if __name__ == "__main__":
    main()
