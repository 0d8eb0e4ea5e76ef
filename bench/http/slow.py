"""Viewers that never read, beside those that do: `python -m bench.http.slow`.

The same stream twice on one server: once with viewers that read it, once with others beside them that open it and take
no byte, their own buffers as small as the kernel lets them be. Measured is what those add to the server's memory and to
the delay of the ones that read, once the buffers are full, and when they are cut off.
"""

import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bench.http.burst import new_thread
from bench.http.load import Load, post, quantile
from bench.http.servers import ORG, Process, Provider, oncewise, pin_load
from bench.record import Meter, Run, command_of, parser_of, repeated, save

READERS, SILENT = 100, 200
DELTAS, GAP_MS, DELTA_CHARS = 200, 25, 3000
LIMIT_S = 60.0


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and record."""
    parser = parser_of(__doc__)
    parser.add_argument("--readers", type=int, default=READERS)
    parser.add_argument("--silent", type=int, default=SILENT)
    parser.add_argument("--deltas", type=int, default=DELTAS)
    arguments = parser.parse_args(argv)
    pin_load()
    with Provider() as provider:
        runs = repeated(
            lambda: beside(provider, arguments.readers, arguments.silent, arguments.deltas),
            arguments.times,
            arguments.extra,
        )
    print(save(arguments.results, "http-slow", command_of("bench.http.slow", argv), runs))


def beside(provider: Provider, readers: int, silent: int, deltas: int) -> Run:
    """The two streams."""
    with oncewise(provider) as server, Meter(lambda: server.cpu_s() + provider.cpu_s()) as meter:
        alone = watched(server, readers, 0, deltas)
        crowded = watched(server, readers, silent, deltas)
    return {
        "what": "never read",
        "readers": readers,
        "silent": silent,
        "complete": alone["complete"] + crowded["complete"],
        "alone_p95_ms": alone["lag_p95_ms"],
        "beside_p95_ms": crowded["lag_p95_ms"],
        "beside_over_alone": round(crowded["lag_p95_ms"] / alone["lag_p95_ms"], 2),
        "added_mib": round(crowded["added_mib"] - alone["added_mib"], 1),
        "gone_after_s": crowded["gone_after_s"],
        "foreign_pct": meter.foreign_pct,
    }


def watched(server: Process, readers: int, silent: int, deltas: int) -> dict[str, Any]:
    """One stream: the delay of its second half for those that read, and what else it took."""
    thread = new_thread(server)
    model = f"fake-n{deltas}-gap{GAP_MS}-tok{DELTA_CHARS}"
    body = {"role": "user", "content": f"Tell me about {uuid.uuid4()}.", "provider": "openai", "model": model}
    with Load(server.address) as load:
        load.connect(readers)
        load.send(post(f"/api/threads/{thread}/messages/stream", body, ORG))
        load.receive(0.3)
        before = server.memory()
        with never_reading(server, f"/api/threads/{thread}/stream", silent):
            load.receive(0.8 * deltas * GAP_MS / 1000)
            during = server.memory()
            load.receive(LIMIT_S)
            answers = load.give_up()
            ended_s = time.monotonic()
            turn = f"/api/threads/{thread}/turns/{answers[0].headers['x-turn-id']}"
            while server.fetch("GET", turn)[1]["viewers"]:
                time.sleep(0.05)
            gone_s = time.monotonic() - ended_s
    lags = [(got - sent) / 1e6 for answer in answers for sent, got in answer.stamps()[deltas // 2 :]]
    return {
        "complete": sum(answer.ok and len(answer.stamps()) == deltas for answer in answers),
        "lag_p95_ms": round(quantile(lags, 0.95) or 0.0, 2),
        "added_mib": (during.pss_kib - before.pss_kib) / 1024,
        "gone_after_s": round(gone_s, 1),
    }


@contextmanager
def never_reading(server: Process, path: str, count: int) -> Iterator[None]:
    """So many clients that ask, and take nothing of the answer."""
    fields = "".join(f"{name}: {value}\r\n" for name, value in {"host": "127.0.0.1", **ORG}.items())
    request = f"GET {path} HTTP/1.1\r\n{fields}\r\n".encode()
    clients = []
    for _ in range(count):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(server.address)
        client.sendall(request)
        clients.append(client)
    try:
        yield
    finally:
        for client in clients:
            client.close()


if __name__ == "__main__":
    main()
