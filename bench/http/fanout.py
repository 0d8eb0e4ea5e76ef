"""One stream, many viewers: `python -m bench.http.fanout`.

Every viewer asks for the same message; the provider is called once and writes the time into each delta. Measured is how
far behind the provider each viewer is, what that costs the server, and how soon somebody who comes late has everything.
Two other servers run in the same minutes: a plain one of the usual parts, and one that only copies bytes.
"""

import sys
import uuid
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from bench.http.burst import new_thread
from bench.http.load import Answer, Events, Load, post, quantile
from bench.http.servers import ORG, Process, Provider, oncewise, pin_load, python_server
from bench.record import Meter, Run, command_of, parser_of, repeated, save

DELTAS, GAP_MS = 200, 20
BACKLOG_DELTAS = 50_000
LIMIT_S = 60.0
SAMPLES = 50
"""Viewers whose every delta is looked at; of the others, the first and the last."""

SERVERS = {
    "bare": lambda provider: python_server("bench.http.bare", provider),
    "rival": lambda provider: python_server("bench.http.rival", provider),
    "oncewise": oncewise,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and record."""
    parser = parser_of(__doc__)
    parser.add_argument("--viewers", type=int, nargs="+", default=[1, 100, 1000, 2000])
    parser.add_argument("--deltas", type=int, default=DELTAS)
    parser.add_argument("--backlog", type=int, default=BACKLOG_DELTAS, help="deltas before the late joiner")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=_installed())
    arguments = parser.parse_args(argv)
    pin_load()
    runs: list[Run] = []
    with Provider() as provider:
        for count in arguments.viewers:
            for name in arguments.servers:
                runs += repeated(
                    lambda n=count, who=name: _fresh(who, provider, n, arguments.deltas),
                    arguments.times,
                    arguments.extra,
                )
        runs += repeated(lambda: late_joiner(provider, arguments.backlog), arguments.times, arguments.extra)
    print(save(arguments.results, "http-fanout", command_of("bench.http.fanout", argv), runs))


def _installed() -> list[str]:
    """All servers, without the one whose library is not there: it is in the dependency group `bench` alone."""
    missing = set() if find_spec("sse_starlette") else {"rival"}
    for name in missing:
        print(f"{name} is left out: install the dependency group bench to measure it too", file=sys.stderr)
    return [name for name in SERVERS if name not in missing]


def _fresh(name: str, provider: Provider, viewers: int, deltas: int) -> Run:
    """A run on a server of its own: memory that an earlier run gave back to the allocator hides what this one takes."""
    with SERVERS[name](provider) as server:
        fan_out(name, server, provider, viewers=10, deltas=10, gap_ms=0)
        return fan_out(name, server, provider, viewers=viewers, deltas=deltas, gap_ms=GAP_MS)


def fan_out(name: str, server: Process, provider: Provider, *, viewers: int, deltas: int, gap_ms: int) -> Run:
    """One stream, looked at by so many."""
    request = _request(server, name, f"fake-n{deltas}-gap{gap_ms}")
    provider.reset()
    before = server.memory()
    with Meter(lambda: server.cpu_s() + provider.cpu_s()) as meter, Load(server.address) as load:
        load.connect(viewers)
        cpu_before_s = server.cpu_s()
        load.send(request)
        load.receive(deltas * gap_ms / 2000)
        during = server.memory()
        load.receive(LIMIT_S)
        cpu_s = server.cpu_s() - cpu_before_s
        answers = load.give_up()
    return {
        "what": "fan-out",
        "server": name,
        "viewers": viewers,
        **_figures(answers, deltas),
        "provider_calls": provider.stats()["calls"],
        "server_cpu_s": round(cpu_s, 3),
        "events_per_cpu_s": round(viewers * deltas / cpu_s),
        "pss_kib_per_viewer": round((during.pss_kib - before.pss_kib) / viewers, 1),
        "foreign_pct": meter.foreign_pct,
    }


def _request(server: Process, name: str, model: str) -> bytes:
    thread = new_thread(server) if name == "oncewise" else "any"
    body = {"role": "user", "content": f"Tell me about {uuid.uuid4()}.", "provider": "openai", "model": model}
    return post(f"/api/threads/{thread}/messages/stream", body, ORG)


def _figures(answers: list[Answer], deltas: int) -> dict[str, Any]:
    told = [answer for answer in answers if answer.ok]
    stamps = [answer.stamps() for answer in told]
    streams = [Events.read(answer.body) for answer in told]
    whole = [each for each, seen in zip(streams, stamps, strict=True) if _whole(each, seen, deltas)]
    errors = Counter(answer.error or f"status {answer.status}" for answer in answers if not answer.ok)
    seen = [each for each in stamps if each]
    lags = [(got - sent) / 1e6 for each in seen[:: max(1, len(seen) // SAMPLES)] for sent, got in each]
    first = [(each[0][1] - answer.sent_ns) / 1e6 for answer, each in zip(told, stamps, strict=True) if each]
    last_byte = [(answer.ended_ns - each[-1][0]) / 1e6 for answer, each in zip(told, stamps, strict=True) if each]
    return {
        "complete": len(whole),
        "errors": dict(errors),
        "distinct_texts": len({each.text for each in streams}),
        "distinct_ends": len({each.last.get("assistant_message_id") for each in streams}),
        "ttft_p95_ms": _ms(first, 0.95),
        "delta_lag_p50_ms": _ms(lags, 0.5),
        "delta_lag_p95_ms": _ms(lags, 0.95),
        "last_delta_lag_p95_ms": _ms([(each[-1][1] - each[-1][0]) / 1e6 for each in seen], 0.95),
        "last_byte_lag_p50_ms": _ms(last_byte, 0.5),
        "last_byte_lag_p95_ms": _ms(last_byte, 0.95),
    }


def _whole(stream: Events, stamps: list[tuple[int, int]], deltas: int) -> bool:
    return len(stamps) == deltas and stream.names["done"] == 1 and stream.last.get("state") == "completed"


def _ms(values: Sequence[float], share: float) -> float | None:
    value = quantile(values, share)
    return None if value is None else round(value, 2)


def late_joiner(provider: Provider, deltas: int) -> Run:
    """Somebody who joins a running stream that has so many deltas, and how long until all of them are there."""
    with oncewise(provider) as server, Load(server.address) as early, Load(server.address) as late:
        # It falls silent after the last delta, so the stream is running when the second viewer comes.
        request = _request(server, "oncewise", f"fake-n{deltas}-stall{deltas}")
        with Meter(lambda: server.cpu_s() + provider.cpu_s()) as meter:
            _receive_stamps(early, request, deltas)
            _receive_stamps(late, request, deltas)
        (first,), (second,) = early.answers, late.answers
        return {
            "what": "late joiner",
            "server": "oncewise",
            "deltas": deltas,
            "role": second.headers.get("x-coalesce"),
            "identical": Events.read(first.body).text == Events.read(second.body).text,
            "backlog_bytes": len(second.body),
            "backlog_ms": round((second.stamps()[-1][1] - second.sent_ns) / 1e6, 1),
            "foreign_pct": meter.foreign_pct,
        }


def _receive_stamps(load: Load, request: bytes, count: int) -> None:
    load.connect(1)
    load.send(request)
    (answer,) = load.answers
    last = b":%d:" % (count - 1)
    for _ in range(int(LIMIT_S / 0.02)):
        load.receive(0.02)
        # The last stamp may be cut between two pieces.
        if answer.ended_ns or last in b"".join(piece for _, piece in answer.pieces[-2:]):
            break
    if len(answer.stamps()) != count:
        raise RuntimeError(f"{len(answer.stamps())} of {count} deltas came: {answer.status} {answer.error}")


if __name__ == "__main__":
    main()
