"""Distinct requests through `/v1`, beside other gateways: `python -m bench.http.passthrough`.

No two requests are equal, so that nothing is shared and every one of them costs a provider call. All servers have the
same core, the same provider and the same load, one after the other, each with one worker; `direct` is the load on the
provider itself, and what a server adds to it is its overhead.
"""

import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

from bench.http import peers
from bench.http.closed_loop import Asked, ask
from bench.http.load import post, quantile
from bench.http.servers import Process, Provider, oncewise, pin_load
from bench.record import Meter, Run, command_of, parser_of, repeated, save

CONNECTIONS = [1, 16, 64, 256]
SECONDS = 4.0
DELTAS = 20
PLACE = "tag-000000000"

Start = Callable[[Provider], Process]

SERVERS: dict[str, Start | None] = {
    "direct": None,
    "oncewise": oncewise,
    "portkey": peers.portkey,
    "litellm": peers.litellm,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and record."""
    parser = parser_of(__doc__)
    parser.add_argument("--connections", type=int, nargs="+", default=CONNECTIONS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--deltas", type=int, default=DELTAS, help="of which the provider's stream is made")
    parser.add_argument("--kinds", nargs="+", choices=["json", "stream"], default=["json", "stream"])
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=[*SERVERS])
    arguments = parser.parse_args(argv)
    pin_load()
    runs: list[Run] = []
    with Provider("bench.http.quick_provider") as provider:
        for name in _installed(arguments.servers):
            start = SERVERS[name]
            with nullcontext(provider) if start is None else start(provider) as server:
                for kind in arguments.kinds:
                    runs += _passed(name, server, provider, kind, arguments)
    runs = sorted(_with_overhead(runs), key=lambda run: run["connections"])
    print(save(arguments.results, "http-passthrough", command_of("bench.http.passthrough", argv), runs))


def _passed(name: str, server: Process, provider: Provider, kind: str, arguments: Namespace) -> Iterable[Run]:
    """One server with one kind of request, at each number of connections."""
    request = _request(name, provider, kind=kind, deltas=arguments.deltas)
    ask(server.address, request, 16, min(1.0, arguments.seconds))
    for connections in arguments.connections:
        about: Run = {"what": kind, "server": name, "connections": connections}
        yield from repeated(
            lambda about=about: about | _measured(server, provider, request, about["connections"], arguments.seconds),
            arguments.times,
            arguments.extra,
        )


def _installed(names: Iterable[str]) -> list[str]:
    """Those of the servers that are here, or can be installed."""
    found = []
    for name in names:
        try:
            peers.INSTALLERS.get(name, lambda: None)()
        except (RuntimeError, OSError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
        else:
            found.append(name)
    return found


def _request(name: str, provider: Provider, *, kind: str, deltas: int) -> Callable[[bytes], bytes]:
    """What makes the bytes of a request of its tag."""
    headers = {"authorization": f"Bearer {peers.KEY}"}
    if name == "portkey":
        headers |= {"x-portkey-provider": "openai", "x-portkey-custom-host": provider.base_url}
    body: dict[str, Any] = {
        "model": f"openai/quick-{deltas}" if name == "oncewise" else f"quick-{deltas}",
        # With a temperature of 0 equal requests share: what it takes to find that these are not equal is in the figure.
        "temperature": 0,
        "messages": [{"role": "user", "content": f"prompt {PLACE}, please answer in one line"}],
        **({"stream": True} if kind == "stream" else {}),
    }
    before, _, after = post("/v1/chat/completions", body, headers).partition(PLACE.encode())
    return lambda tag: before + tag + after


def _measured(
    server: Process, provider: Provider, request: Callable[[bytes], bytes], connections: int, seconds: float
) -> Run:
    provider.reset()
    server.reset_peak()
    through = server is not provider
    with Meter(lambda: server.cpu_s() + (provider.cpu_s() if through else 0.0)) as meter:
        cpu_before_s = server.cpu_s()
        asked = ask(server.address, request, connections, seconds)
        cpu_s = server.cpu_s() - cpu_before_s
    calls = provider.stats()["calls"]
    return {
        "requests": len(asked.latencies_ms),
        "failed": asked.wrong.total(),
        "wrong": dict(asked.wrong),
        "provider_calls": calls,
        **_figures(asked),
        "server_cpu_ms": round(1000 * cpu_s / max(1, len(asked.latencies_ms)), 3) if through else None,
        "peak_rss_mib": round(server.peak_rss_kib() / 1024, 1) if through else None,
        "foreign_pct": meter.foreign_pct,
    }


def _figures(asked: Asked) -> dict[str, Any]:
    shares = {"p50_ms": 0.5, "p99_ms": 0.99, "max_ms": 1.0}
    return {
        "per_s": round(asked.per_s, 1),
        **{name: round(quantile(asked.latencies_ms, share) or 0.0, 3) for name, share in shares.items()},
    }


def _with_overhead(runs: list[Run]) -> list[Run]:
    """What each run takes longer than the provider itself does at as many connections."""
    for run in runs:
        same = [
            other
            for other in runs
            if other["server"] == "direct"
            and other["counts"]
            and (other["what"], other["connections"]) == (run["what"], run["connections"])
        ]
        for name in ("p50", "p99"):
            direct = statistics.median(other[f"{name}_ms"] for other in same) if same else None
            run[f"{name}_over_ms"] = (
                None if direct is None or run["server"] == "direct" else round(run[f"{name}_ms"] - direct, 3)
            )
    return runs


if __name__ == "__main__":
    main()
