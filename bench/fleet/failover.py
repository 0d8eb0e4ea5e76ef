"""From the death of a leader to the answer of its followers: `python -m bench.fleet.failover`.

Requests for one turn wait at a server that does not lead it. The one that does is killed with signal 9 somewhere
between the start of its call and the end; the survivors find out, take the turn over, and the provider is asked again.
Recorded is what they waited after the kill beyond one generation.
"""

import json
import random
import threading
import time
import uuid
from collections.abc import Sequence

from bench.fleet.headline import metered
from bench.fleet.servers import Fleet, Server, Shared, shared
from bench.http.burst import stored_messages
from bench.record import Run, command_of, parser_of, repeated, save

GENERATION_MS = 1000
FOLLOWERS = 10


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and record."""
    parser = parser_of(__doc__)
    parser.add_argument("--kills", type=int, default=10)
    arguments = parser.parse_args(argv)
    chance = random.Random(1)
    runs: list[Run] = []
    with shared() as common, Fleet([Server(common)]) as survivors:
        for _ in range(arguments.kills):
            at_s = chance.uniform(0.3, 0.9) * GENERATION_MS / 1000
            runs += repeated(lambda when=at_s: kill(survivors, common, when), 1, 0)
    print(save(arguments.results, "fleet-failover", command_of("bench.fleet.failover", argv), runs))


def kill(survivors: Fleet, common: Shared, at_s: float) -> Run:
    """Kill a leader so long after its turn began."""
    thread = survivors.new_thread()
    path = f"/api/threads/{thread}/messages"
    content = f"Tell me about {uuid.uuid4()}."
    body = {"role": "user", "content": content, "provider": "openai", "model": f"fake-lat{GENERATION_MS}-n20"}
    (survivor,) = survivors.servers
    leader = Server(common)
    try:
        common.provider.reset()
        with metered(survivors, common) as meter:
            threading.Thread(target=_lost, args=(leader, path, body), daemon=True).start()
            while common.provider.stats()["calls"] == 0:
                time.sleep(0.005)
            began_s = time.monotonic()
            asked = [survivors.ask(0, path, body) for _ in range(FOLLOWERS)]
            time.sleep(max(0.0, began_s + at_s - time.monotonic()))
            leader.kill()
            killed_s = time.monotonic()
            answers = [each.result() for each in asked]
            waited_s = time.monotonic() - killed_s
    finally:
        leader.stop()
    good = [json.loads(text) for status, text in answers if status == 200]
    return {
        "killed_after_s": round(at_s, 2),
        "followers": FOLLOWERS,
        "ok": len(good),
        "distinct_bodies": len({text for _, text in answers}),
        "provider_calls": common.provider.stats()["calls"],
        "messages": stored_messages(survivor, thread),
        "waited_s": round(waited_s, 2),
        "beyond_s": round(waited_s - GENERATION_MS / 1000, 2),
        "foreign_pct": meter.foreign_pct,
    }


def _lost(server: Server, path: str, body: object) -> None:
    """A request whose server dies."""
    try:
        server.send(path, body)
    except OSError:
        return
    except Exception as error:
        if type(error).__module__ != "http.client":
            raise


if __name__ == "__main__":
    main()
