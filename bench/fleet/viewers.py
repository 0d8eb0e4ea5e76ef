"""Streams that one worker leads and another one's viewers see: `python -m bench.fleet.viewers`.

Each turn is led by a viewer at one server; its other viewers are at the second one, and have every delta through
Valkey. The provider writes the time into each delta, so lag is behind the provider's own clock. Those at the first
server show what of it is not the way between the workers.
"""

import time
import uuid
from collections import Counter
from collections.abc import Sequence

from bench.fleet.headline import metered
from bench.fleet.servers import Fleet, Server, Shared, shared
from bench.http.load import Answer, Events, Load, post, quantile
from bench.http.servers import ORG, pin_load
from bench.record import Run, command_of, parser_of, repeated, save

SHAPES = {"40x5": (40, 5, 100, 50, 4000), "600x1": (600, 1, 20, 1000, 18_000)}
"""Turns, viewers of each elsewhere, deltas, milliseconds between two, and before the first: all are there by then."""
WAVE, WAVE_S = 50, 0.3
"""They come one wave after the other: how long many who come at once wait is another figure."""
LIMIT_S = 90.0


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and record."""
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--turns", type=int, help="so many instead")
    parser.add_argument("--deltas", type=int, help="so many instead")
    parser.add_argument("--latency-ms", type=int, help="so many before the first delta instead")
    arguments = parser.parse_args(argv)
    pin_load()
    runs: list[Run] = []
    with shared() as common, Fleet([Server(common), Server(common)]) as fleet:
        watch(fleet, common, turns=2, viewers=2, deltas=5, gap_ms=20, latency_ms=500)
        for name in arguments.shapes:
            turns, viewers, deltas, gap_ms, latency_ms = SHAPES[name]
            shape = {
                "turns": arguments.turns or turns,
                "viewers": viewers,
                "deltas": arguments.deltas or deltas,
                "gap_ms": gap_ms,
                "latency_ms": arguments.latency_ms or latency_ms,
            }
            runs += repeated(lambda each=shape: watch(fleet, common, **each), arguments.times, arguments.extra)
    print(save(arguments.results, "fleet-viewers", command_of("bench.fleet.viewers", argv), runs))


def watch(fleet: Fleet, common: Shared, *, turns: int, viewers: int, deltas: int, gap_ms: int, latency_ms: int) -> Run:
    """So many turns at once, each seen by one viewer where it is led and by others elsewhere."""
    here, there = fleet.servers
    model = f"fake-lat{latency_ms}-n{deltas}-gap{gap_ms}"
    requests = [
        post(
            f"/api/threads/{fleet.new_thread()}/messages/stream",
            {"role": "user", "content": f"Tell me about {uuid.uuid4()}.", "provider": "openai", "model": model},
            ORG,
        )
        for _ in range(turns)
    ]
    common.provider.reset()
    with metered(fleet, common) as meter, Load(here.address) as load:
        _come(load, here, requests)
        cpu_before_s, began_s = (here.cpu_s(), there.cpu_s()), time.monotonic()
        _come(load, there, requests * viewers)
        load.receive(LIMIT_S)
        took_s = time.monotonic() - began_s
        answers = load.give_up()
        cpu_s = [now.cpu_s() - before for now, before in zip((here, there), cpu_before_s, strict=True)]
    led, watched = answers[:turns], answers[turns:]
    return {
        "turns": turns,
        "viewers": viewers,
        "deltas": deltas,
        "gap_ms": gap_ms,
        "complete": sum(_whole(answer, deltas) for answer in answers),
        "of": len(answers),
        "wrong": dict(Counter(_wrong(answer, deltas) for answer in answers if not _whole(answer, deltas))),
        "provider_calls": common.provider.stats()["calls"],
        **_lags("here", led),
        **_lags("there", watched),
        "leading_cores": round(cpu_s[0] / took_s, 2),
        "viewing_cores": round(cpu_s[1] / took_s, 2),
        "foreign_pct": meter.foreign_pct,
    }


def _come(load: Load, server: Server, requests: list[bytes]) -> None:
    for first in range(0, len(requests), WAVE):
        wave = requests[first : first + WAVE]
        load.connect(len(wave), server.address)
        load.send(*wave)
        load.receive(WAVE_S)


def _whole(answer: Answer, deltas: int) -> bool:
    if not answer.ok:
        return False
    stream = Events.read(answer.body)
    return len(answer.stamps()) == deltas and stream.last.get("state") == "completed"


def _wrong(answer: Answer, deltas: int) -> str:
    """Why an answer is not whole, in words."""
    if not answer.ok:
        return answer.error or f"status {answer.status}"
    stream = Events.read(answer.body)
    return f"{len(answer.stamps())} of {deltas} deltas, then {stream.last.get('code') or stream.last.get('state')}"


def _lags(where: str, answers: list[Answer]) -> dict[str, float | None]:
    lags = [(got - sent) / 1e6 for answer in answers if answer.ok for sent, got in answer.stamps()]
    found = {"p50": quantile(lags, 0.5), "p99": quantile(lags, 0.99)}
    return {f"{where}_{name}_ms": None if ms is None else round(ms, 1) for name, ms in found.items()}


if __name__ == "__main__":
    main()
