"""Clients that come at once to a server that is busy, or to one that is not: `python -m bench.http.arrivals`.

Some connections ask again as soon as they are answered; beside them others come at once, with one request each. For
those the time is from the connect to the first byte, for the ones that were there from the send to the last byte, until
all are answered. Servers differ in how many connections they accept beside the first; they take turns.
"""

import argparse
import select
import socket
import statistics
import sys
import time
from collections.abc import Sequence

from bench.http.closed_loop import _Connection
from bench.http.load import post, quantile
from bench.http.servers import SERVER_CORE, Process, Provider, pin_load

SHAPES = [(0, 256), (0, 1000), (64, 256), (64, 1000), (256, 16)]
ALONE = 200
BUSY_S = 0.4
LIMIT_S = 60.0
TAG = b"tag-000000000"


def serve(port: int, at_once: int) -> None:
    """The server under test, configured by the environment."""
    from oncewise.api.app import create_app  # noqa: PLC0415  the load does without
    from oncewise.api.server import Server  # noqa: PLC0415
    from oncewise.api.sockets import listen  # noqa: PLC0415
    from oncewise.settings import load_settings  # noqa: PLC0415

    Server(create_app(load_settings().settings), drain_s=0, at_once=at_once).run(listen("127.0.0.1", port))


def server(provider: Provider, at_once: int) -> Process:
    return Process(
        [sys.executable, "-m", "bench.http.arrivals", "--serve", "{port}", "--at-once", str(at_once)],
        core=SERVER_CORE,
        ready="/health/readiness",
        environment={
            "ONCEWISE_DATABASE_URL": "sqlite:///{directory}/oncewise.db",
            "OPENAI_API_KEY": "sk-bench",
            "OPENAI_BASE_URL": provider.base_url,
            "OPENAI_RPS": "10000",
            "OPENAI_BURST": "10000",
            "OPENAI_CONCURRENCY": "10000",
        },
    )


class Arrivals:
    """One run against one server."""

    def __init__(self, address: tuple[str, int], request: bytes) -> None:
        self.address = address
        self.request = request
        self.poll = select.epoll()
        self.there: dict[int, _Connection] = {}
        self.new: dict[int, tuple[_Connection, int]] = {}
        self.there_ms: list[float] = []
        self.new_ms: list[float] = []
        self.asked = 0

    def send(self, connection: _Connection) -> None:
        self.asked += 1
        tag = b"tag-%09d" % (time.monotonic_ns() % 10**6 * 1000 + self.asked % 1000)
        connection.send(tag, self.request.replace(TAG, tag))

    def connect(self) -> tuple[_Connection, int]:
        began_ns = time.monotonic_ns()
        connection = _Connection(self.address)
        self.send(connection)
        self.poll.register(connection.socket.fileno(), select.EPOLLIN)
        return connection, began_ns

    def step(self) -> None:
        for fd, _ in self.poll.poll(0.05, 4096):
            if fd in self.new:
                connection, began_ns = self.new.pop(fd)
                connection.receive()
                if connection.received[9:12] != b"200":
                    raise RuntimeError(f"status {connection.received[9:12].decode('latin-1')}")
                self.new_ms.append((time.monotonic_ns() - began_ns) / 1e6)
                self.poll.unregister(fd)
                connection.socket.close()
            elif (connection := self.there[fd]).receive():
                if connection.wrong:
                    raise RuntimeError(connection.wrong)
                self.there_ms.append((time.monotonic_ns() - connection.sent_ns) / 1e6)
                self.send(connection)

    def run(self, there: int, new: int) -> None:
        for _ in range(there):
            connection, _ = self.connect()
            self.there[connection.socket.fileno()] = connection
        until_s = time.monotonic() + BUSY_S
        while there and time.monotonic() < until_s:
            self.step()
        self.there_ms.clear()
        for _ in range(new):
            connection, began_ns = self.connect()
            self.new[connection.socket.fileno()] = connection, began_ns
        until_s = time.monotonic() + LIMIT_S
        while self.new and time.monotonic() < until_s:
            self.step()
        for connection in self.there.values():
            connection.socket.close()
        self.poll.close()


def alone_ms(address: tuple[str, int]) -> list[float]:
    """One client, a connection for each request."""
    took_ms = []
    for _ in range(ALONE):
        began_ns = time.monotonic_ns()
        with socket.create_connection(address) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            client.recv(65_536)
            took_ms.append((time.monotonic_ns() - began_ns) / 1e6)
    return took_ms


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at-once", type=int, nargs="+", default=[0, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--serve", type=int, metavar="PORT", help="be the server")
    arguments = parser.parse_args(argv)
    if arguments.serve is not None:
        serve(arguments.serve, arguments.at_once[0])
        return
    pin_load()
    message = {"role": "user", "content": TAG.decode()}
    body = {"model": "openai/quick-20", "temperature": 0, "messages": [message]}
    request = post("/v1/chat/completions", body, {"authorization": "Bearer sk-bench"})
    with Provider("bench.http.quick_provider") as provider:
        servers: dict[int, Process] = {}
        try:
            for at_once in arguments.at_once:
                servers[at_once] = server(provider, at_once)
            measure(servers, request, arguments.rounds)
        finally:
            for one in servers.values():
                one.stop()


def measure(servers: dict[int, Process], request: bytes, rounds: int) -> None:
    for there, new in SHAPES:
        figures: dict[int, list[tuple[float, ...]]] = {at_once: [] for at_once in servers}
        for _ in range(rounds):
            for at_once, one in servers.items():
                run = Arrivals(one.address, request)
                run.run(there, new)
                new_ms, there_ms = run.new_ms, run.there_ms or [0.0]
                figures[at_once].append(
                    (quantile(new_ms, 0.99) or 0.0, max(new_ms), quantile(there_ms, 0.99) or 0.0, max(there_ms))
                )
        for at_once, rows in figures.items():
            medians = [statistics.median(column) for column in zip(*rows, strict=True)]
            names = ("new p99", "new slowest", "there p99", "there slowest")
            said = ", ".join(f"{name} {value:.0f} ms" for name, value in zip(names, medians, strict=True))
            print(f"{there} there, {new} at once, {at_once} beside the first: {said}", flush=True)
    alone: dict[int, list[float]] = {at_once: [] for at_once in servers}
    for _ in range(4 * rounds):
        for at_once, one in servers.items():
            alone[at_once] += alone_ms(one.address)
    for at_once, took_ms in alone.items():
        print(f"alone, {at_once} beside the first: p50 {statistics.median(took_ms):.3f} ms")


if __name__ == "__main__":
    main()
