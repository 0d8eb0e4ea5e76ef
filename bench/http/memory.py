"""What a server holds: starting, idle, and for each request that waits: `python -m bench.http.memory`.

Proportional share (PSS) and resident memory as the kernel counts them. Its own socket buffers are in neither.
"""

import time
import uuid
from collections.abc import Sequence

from bench.http.burst import burst, new_thread
from bench.http.load import Load, post
from bench.http.servers import ORG, Process, Provider, oncewise, pin_load
from bench.record import Meter, Run, command_of, parser_of, repeated, save

CALL_MS = 20_000
IDLE_S = 3.0
LIMIT_S = 60.0


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and record."""
    parser = parser_of(__doc__)
    parser.add_argument("--followers", type=int, default=2000)
    parser.add_argument("--call-ms", type=int, default=CALL_MS)
    arguments = parser.parse_args(argv)
    pin_load()
    with Provider() as provider:
        runs = repeated(lambda: start(provider), arguments.times, arguments.extra)
        runs += repeated(
            lambda: waiting(provider, arguments.followers, arguments.call_ms), arguments.times, arguments.extra
        )
    print(save(arguments.results, "http-memory", command_of("bench.http.memory", argv), runs))


def start(provider: Provider) -> Run:
    """A start on an empty database, and the server left alone."""
    servers: list[Process] = []
    with Meter(lambda: provider.cpu_s() + sum(server.cpu_s() for server in servers)) as meter:
        servers.append(oncewise(provider))
    with servers[0] as server:
        time.sleep(IDLE_S)
        idle = server.memory()
        return {
            "what": "start",
            "ready_s": round(server.ready_s, 3),
            "cpu_s": round(server.cpu_s(), 3),
            "idle_pss_mib": round(idle.pss_kib / 1024, 1),
            "idle_rss_mib": round(idle.rss_kib / 1024, 1),
            "foreign_pct": meter.foreign_pct,
        }


def waiting(provider: Provider, followers: int, call_ms: int) -> Run:
    """Many requests that wait for one long call."""
    with oncewise(provider) as server:
        burst("oncewise", server, provider, 50, 0)
        provider.reset()
        body = {"role": "user", "content": f"{uuid.uuid4()}", "provider": "openai", "model": f"fake-lat{call_ms}-n1"}
        request = post(f"/api/threads/{new_thread(server)}/messages", body, ORG)
        before = server.memory()
        with Meter(lambda: server.cpu_s() + provider.cpu_s()) as meter, Load(server.address) as load:
            load.connect(followers)
            connected = server.memory()
            load.send(request)
            load.receive(call_ms / 2000)
            held = server.memory()
            load.receive(LIMIT_S)
            answers = load.give_up()
        return {
            "what": "waiting",
            "followers": followers,
            "ok": sum(answer.ok for answer in answers),
            "provider_calls": provider.stats()["calls"],
            "connected_pss_kib": round((connected.pss_kib - before.pss_kib) / followers, 1),
            "waiting_pss_kib": round((held.pss_kib - before.pss_kib) / followers, 1),
            "waiting_rss_kib": round((held.rss_kib - before.rss_kib) / followers, 1),
            "foreign_pct": meter.foreign_pct,
        }


if __name__ == "__main__":
    main()
