"""Many identical messages at the same moment: `python -m bench.http.burst`.

All connections stand before the first request is sent. Latency is one request's own, from its send to its last byte,
over the latency of the provider; the bare row is what the load, the kernel and a server that only copies bytes need.
"""

import json
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bench.http.load import Answer, Load, post, quantile
from bench.http.servers import ORG, Process, Provider, oncewise, pin_load, python_server
from bench.record import Meter, Run, command_of, parser_of, repeated, save

PROVIDER_MS = 1000
LIMIT_S = 60.0


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and record."""
    parser = parser_of(__doc__)
    parser.add_argument("--requests", type=int, nargs="+", default=[50, 500, 5000])
    parser.add_argument("--provider-ms", type=int, default=PROVIDER_MS)
    arguments = parser.parse_args(argv)
    pin_load()
    runs: list[Run] = []
    with Provider() as provider:
        for name, start in SERVERS.items():
            with start(provider) as server:
                burst(name, server, provider, 50, 0)
                for count in arguments.requests:
                    runs += repeated(
                        lambda n=count, who=name, at=server: burst(who, at, provider, n, arguments.provider_ms),
                        arguments.times,
                        arguments.extra,
                    )
    print(save(arguments.results, "http-burst", command_of("bench.http.burst", argv), runs))


SERVERS = {
    "bare": lambda provider: python_server("bench.http.bare", provider),
    "oncewise": oncewise,
}


def burst(name: str, server: Process, provider: Provider, count: int, provider_ms: int) -> Run:
    """One burst on a fresh thread."""
    thread = new_thread(server) if name == "oncewise" else "any"
    content = f"Give me 5 bullets about {uuid.uuid4()}."
    body = {"role": "user", "content": content, "provider": "openai", "model": f"fake-lat{provider_ms}-n1"}
    provider.reset()
    server.reset_peak()
    with Meter(lambda: server.cpu_s() + provider.cpu_s()) as meter, Load(server.address) as load:
        load.connect(count)
        cpu_before_s = server.cpu_s()
        load.send(post(f"/api/threads/{thread}/messages", body, ORG))
        load.receive(LIMIT_S)
        cpu_s = server.cpu_s() - cpu_before_s
        answers = load.give_up()
    return {
        "server": name,
        "requests": count,
        **_figures(answers, provider_ms),
        "provider_calls": provider.stats()["calls"],
        "messages": stored_messages(server, thread) if name == "oncewise" else None,
        "server_cpu_s": round(cpu_s, 3),
        "peak_rss_mib": round(server.peak_rss_kib() / 1024, 1),
        "foreign_pct": meter.foreign_pct,
    }


def _figures(answers: list[Answer], provider_ms: int) -> dict[str, Any]:
    taken = [answer.latency_ms for answer in answers if answer.ok]
    over = {name: quantile(taken, share) for name, share in (("p50", 0.5), ("p95", 0.95), ("max", 1.0))}
    errors = Counter(answer.error or f"status {answer.status}" for answer in answers if not answer.ok)
    return {
        "ok": len(taken),
        "errors": dict(errors),
        "roles": dict(Counter(answer.headers.get("x-coalesce", "-") for answer in answers if answer.ok)),
        "distinct_bodies": len({_verified(answer) for answer in answers if answer.ok}),
        **{f"{name}_ratio": round(ms / provider_ms, 3) if ms and provider_ms else None for name, ms in over.items()},
        **{f"{name}_ms": round(ms, 1) if ms else None for name, ms in over.items()},
    }


def _verified(answer: Answer) -> bytes:
    """The body; raises if it is not JSON of the length that was promised."""
    json.loads(answer.body)
    return answer.body


def new_thread(server: Process) -> str:
    """The id of an empty thread."""
    status, document = server.fetch("POST", "/api/threads/", {})
    if status != 201:
        raise RuntimeError(f"no thread: {status} {document}")
    return document["thread_id"]


def stored_messages(server: Process, thread: str) -> int:
    """How many messages a thread holds."""
    return len(server.fetch("GET", f"/api/threads/{thread}")[1]["messages"])


if __name__ == "__main__":
    main()
