"""Many identical messages at the same moment, over a fleet: `python -m bench.fleet.headline`.

As `bench.http.burst`, half of the requests for JSON and half for events, on one worker and on two that share PostgreSQL
and Valkey. What a second worker adds to the time of an answer is what it takes to follow a turn that another one leads.
"""

import json
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from bench.fleet.servers import Fleet, Server, Shared, shared
from bench.http.burst import stored_messages
from bench.http.load import Answer, Events, Load, post, quantile
from bench.http.servers import ORG, pin_load
from bench.record import Meter, Run, command_of, parser_of, repeated, save

PROVIDER_MS = 1000
LIMIT_S = 60.0

FLEETS: dict[str, Callable[[Shared], list[Server]]] = {
    "1 worker": lambda common: [Server(common)],
    "2 workers of a server": lambda common: [Server(common, workers=2)],
    "2 servers": lambda common: [Server(common), Server(common)],
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and record."""
    parser = parser_of(__doc__)
    parser.add_argument("--requests", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--provider-ms", type=int, default=PROVIDER_MS)
    parser.add_argument("--fleets", nargs="+", choices=FLEETS, default=[*FLEETS])
    arguments = parser.parse_args(argv)
    pin_load()
    runs: list[Run] = []
    with shared() as common:
        for name in arguments.fleets:
            with Fleet(FLEETS[name](common)) as fleet:
                burst(name, fleet, common, 20, 0)
                for count in arguments.requests:
                    runs += repeated(
                        lambda n=count, who=name, at=fleet: burst(who, at, common, n, arguments.provider_ms),
                        arguments.times,
                        arguments.extra,
                    )
    print(save(arguments.results, "fleet-headline", command_of("bench.fleet.headline", argv), runs))


def metered(fleet: Fleet, common: Shared) -> AbstractContextManager[Meter]:
    """A meter that knows every process of a fleet."""
    return Meter(lambda: common.cpu_s() + sum(server.cpu_s() for server in fleet.servers))


def burst(name: str, fleet: Fleet, common: Shared, count: int, provider_ms: int) -> Run:
    """One burst on a fresh thread, spread over all servers."""
    thread = fleet.new_thread()
    content = f"Give me 5 bullets about {uuid.uuid4()}."
    body = {"role": "user", "content": content, "provider": "openai", "model": f"fake-lat{provider_ms}-n1"}
    path = f"/api/threads/{thread}/messages"
    common.provider.reset()
    with metered(fleet, common) as meter, Load(fleet.servers[0].address) as load:
        for server in fleet.servers:
            load.connect(count // len(fleet.servers), server.address)
        cpu_before_s = sum(server.cpu_s() for server in fleet.servers)
        load.send(post(path, body, ORG), post(f"{path}/stream", body, ORG))
        load.receive(LIMIT_S)
        cpu_s = sum(server.cpu_s() for server in fleet.servers) - cpu_before_s
        answers = load.give_up()
    return {
        "fleet": name,
        "requests": count,
        **_figures(answers, provider_ms),
        "provider_calls": common.provider.stats()["calls"],
        "messages": stored_messages(fleet.servers[0], thread),
        "server_cpu_s": round(cpu_s, 3),
        "foreign_pct": meter.foreign_pct,
    }


def _figures(answers: list[Answer], provider_ms: int) -> dict[str, Any]:
    told = [answer for answer in answers if answer.ok]
    documents = [answer.body for answer in told if answer.headers["content-type"] == "application/json"]
    streams = [Events.read(answer.body) for answer in told if answer.headers["content-type"] != "application/json"]
    texts = {json.loads(body)["assistant_message"]["content"] for body in documents} | {
        stream.text for stream in streams
    }
    over = {name: quantile([each.latency_ms for each in told], share) for name, share in SHARES.items()}
    return {
        "ok": len(documents) + sum(stream.last.get("state") == "completed" for stream in streams),
        "distinct_bodies": len(set(documents)),
        "distinct_texts": len(texts),
        **{f"{name}_ratio": round(ms / provider_ms, 3) if ms and provider_ms else None for name, ms in over.items()},
    }


SHARES = {"p50": 0.5, "p95": 0.95, "max": 1.0}


if __name__ == "__main__":
    main()
