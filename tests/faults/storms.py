"""Faults by the hundred: one function is one trial of one kind, and says what it saw.

A trial asks for turns of its own, lets many clients wait for each, breaks something at a moment that its seed decides,
and has the checker judge. Between trials the deployment is made whole again. So a violation is named by three words,
the kind, the seed and the number of the trial, and can be had again by them.
"""

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from tests.faults.check import calls_of, violations
from tests.faults.clients import Ask, Client, History, JsonClient, SseClient, Told
from tests.faults.network import Network
from tests.faults.server import Point
from tests.faults.site import Deployment, Member
from tests.support.http import JSON

__all__ = [
    "GENERATION_S",
    "Trial",
    "disconnect",
    "headline",
    "kill",
    "load",
    "lose_commit",
    "restart_postgres",
    "stop",
    "trouble_redis",
]

MODEL = "n20-gap50"
GENERATION_S = 1.0
"""How long the provider takes for an answer."""
CROWD = 9
BOUND_S = 25.0
"""When a client counts as one that waits for ever: far above every promise, so that a busy machine is no hang."""

Kinds = Sequence[type[Client]]
KINDS: Kinds = (JsonClient, SseClient)

_numbers = count()


@dataclass
class Trial:
    """What one trial saw.

    Attributes:
        struck: What was broken, and when it is known; None if the fault met nothing.
        after_s: From the fault to the last answer; None if nothing was hit.
        calls: Provider calls of each turn.
        waits_s: How long each client waited.
        violations: In words.
    """

    kind: str
    seed: int
    number: int
    struck: str | None = None
    after_s: float | None = None
    calls: list[int] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    history: History = field(default_factory=History)

    @property
    def random(self) -> random.Random:
        return random.Random(f"{self.kind}/{self.seed}/{self.number}")


# -- asking --------------------------------------------------------------------------------------------------------


async def new_ask(site: Deployment, chance: random.Random, model: str = MODEL) -> Ask:
    """A message that was never sent before, in a new thread of one of several tenants."""
    org = f"org{chance.randrange(3)}"
    for attempt in count():
        member = site.members[attempt % len(site.members)]
        with suppress(OSError, AssertionError, ValueError, IndexError, TimeoutError):
            thread = await member.thread([("x-org-id", org), JSON])
            return Ask(org, thread, f"{org} asks {next(_numbers)}: five bullets, please", model)
        await asyncio.sleep(0.1)
    raise AssertionError


def crowd(
    site: Deployment, history: History, ask: Ask, chance: random.Random, size: int = CROWD, kinds: Kinds = KINDS
) -> list[Client]:
    """Clients who want the same, some the whole and some as it comes."""
    chosen = [chance.choice(kinds) for _ in range(size)]
    return [kind(site, history, next(_numbers), ask, BOUND_S) for kind in chosen]


async def served(clients: Sequence[Client], chance: random.Random, within_s: float = 0.1) -> None:
    """Let all ask, spread over the servers and a moment."""

    async def one(number: int, client: Client, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        await client.run(number)

    await asyncio.gather(*(one(n, client, chance.uniform(0, within_s)) for n, client in enumerate(clients)))


async def judge(site: Deployment, trial: Trial, *, broken: bool = True, leaks: bool = False) -> Trial:
    """Wait until all is quiet, and let the checker look."""
    history = trial.history
    asks = {told.ask for told in history.told} | {ask for ask, _, _ in history.waits.values()}
    threads = {ask.thread for ask in asks}
    # A turn that nobody waits for any more is ended by the sweep, a lease and some seconds after its owner.
    await site.settle(threads, float(site.settings.get("lease_s", 10)) * 2 + 5)
    rows = await site.rows(threads)
    held = await site.leaks() if leaks else []
    calls = [call for ask in asks for call in calls_of(ask, site.provider.calls)]
    trial.violations += violations(
        history, rows, site.provider.calls, bound_s=BOUND_S, broken=asks if broken else (), leaks=held
    )
    trial.calls = [len(calls_of(ask, calls)) for ask in asks]
    trial.waits_s = [ended - began for _, began, ended in history.waits.values() if ended is not None]
    return trial


def _ends(history: History) -> list[float]:
    return [ended for _, _, ended in history.waits.values() if ended is not None]


def _note_end(trial: Trial, fault_s: float) -> None:
    ends = _ends(trial.history)
    if trial.struck is not None and ends:
        trial.after_s = max(0.0, max(ends) - fault_s)


# -- processes -----------------------------------------------------------------------------------------------------


async def kill(
    site: Deployment, trial: Trial, point: Point | None = None, place: int = 0, kinds: Kinds = KINDS
) -> Trial:
    """kill -9 of the server that leads: at a named point in the server of `place`, which must have been started with
    it, else at any time.
    """
    chance, loop = trial.random, asyncio.get_running_loop()
    ask = await new_ask(site, chance)
    clients = crowd(site, trial.history, ask, chance, kinds=kinds)
    if point is Point.AFTER_VISIBLE:
        clients[0] = SseClient(site, trial.history, clients[0].number, ask, BOUND_S)
    if point is None:
        serving = asyncio.ensure_future(served(clients, chance))
        await asyncio.sleep(chance.uniform(0.0, GENERATION_S * 1.15))
        victim = await site.leader(ask.thread)
        fault_s = loop.time()
        if victim is not None:
            victim.strike()
            trial.struck = "any time"
    else:
        victim = site.members[place]
        leading = asyncio.ensure_future(clients[0].run(place))
        await asyncio.sleep(chance.uniform(0.0, 0.1))
        others = served(clients[1:], chance)
        serving = asyncio.ensure_future(_both(leading, others))
        with suppress(TimeoutError):
            async with asyncio.timeout(GENERATION_S + 4):
                await victim.ended(point)
                trial.struck = point.value
        fault_s = loop.time()
    await serving
    _note_end(trial, fault_s)
    return await judge(site, trial, broken=trial.struck is not None)


async def _both(leading: Awaitable[Any], others: Awaitable[Any]) -> None:
    await asyncio.gather(leading, others)


async def stop(site: Deployment, trial: Trial) -> Trial:
    """SIGSTOP of the server that leads for longer than its lease, then SIGCONT: it must find out that it was fenced."""
    chance, loop = trial.random, asyncio.get_running_loop()
    ask = await new_ask(site, chance)
    clients = crowd(site, trial.history, ask, chance)
    serving = asyncio.ensure_future(served(clients, chance))
    await asyncio.sleep(chance.uniform(0.0, GENERATION_S * 1.15))
    victim = await site.leader(ask.thread)
    fault_s = loop.time()
    if victim is not None:
        victim.stop()
        trial.struck = "stopped"
        await asyncio.sleep(chance.uniform(0.9, 2.5) * float(site.settings["lease_s"]))
        victim.go_on()
    await serving
    _note_end(trial, fault_s)
    return await judge(site, trial, broken=trial.struck is not None)


# -- what servers share --------------------------------------------------------------------------------------------


async def load(
    site: Deployment, trial: Trial, seconds: float, *, every_s: float = 0.4, size: int = 6, model: str = "n10-gap50"
) -> None:
    """Turns, one after the other began, each of several clients on all servers; returns when all are answered."""
    chance, loop = trial.random, asyncio.get_running_loop()
    until_s = loop.time() + seconds
    asked = []
    while loop.time() < until_s:
        ask = await new_ask(site, chance, model)
        clients = crowd(site, trial.history, ask, chance, size)
        asked.append(asyncio.ensure_future(served(clients, chance)))
        await asyncio.sleep(every_s)
    await asyncio.gather(*asked)


async def trouble_redis(site: Deployment, trial: Trial, how: str) -> Trial:
    """Redis `killed`, `down` for half a minute, `paused` for five seconds or `flushed` under load, or the way to it
    `late`, `lossy`, `reset` or `silent` for a while, or `nothing`: no request may notice.
    """
    assert site.redis is not None
    chance = trial.random
    away_s = {"paused": 5.0, "down": 30.0}.get(how, 0.0)
    loading = asyncio.ensure_future(load(site, trial, 2.5 + away_s))
    await asyncio.sleep(chance.uniform(0.3, 1.5))
    trial.struck = how
    if how in ("killed", "down"):
        site.redis.kill()
        await asyncio.sleep(away_s or chance.uniform(0.3, 1.5))
        await asyncio.to_thread(site.redis.start)
    elif how == "paused":
        site.redis.pause()
        await asyncio.sleep(away_s)
        site.redis.resume()
    elif how == "flushed":
        site.redis.flush()
    elif how != "nothing":
        await _bad_network(site.networks["redis"], how)
    await loading
    # Without a fault in its own way: each turn must have been one call, and each client answered at the first try.
    await judge(site, trial, broken=False)
    trial.violations += [f"client {told.client}: {told.state} {told.status}" for told in _retried(trial.history)]
    return trial


async def _bad_network(way: Network, how: str) -> None:
    way.delay_s = 0.2 if how == "late" else 0.0
    way.loss = 0.1 if how == "lossy" else 0.0
    way.silent = how == "silent"
    for _ in range(10):
        if how == "reset":
            way.cut()
        await asyncio.sleep(0.1)
    way.delay_s, way.loss, way.silent = 0.0, 0.0, False


def _retried(history: History) -> list[Told]:
    return [told for told in history.told if told.state != "completed"]


async def restart_postgres(site: Deployment, trial: Trial) -> Trial:
    """PostgreSQL ends as in a crash under load, and is started again a moment later."""
    assert site.postgres is not None
    chance, loop = trial.random, asyncio.get_running_loop()
    loading = asyncio.ensure_future(load(site, trial, 1.5, model=MODEL))
    probed = [await new_ask(site, chance, "n2") for _ in site.members]
    await asyncio.sleep(chance.uniform(0.2, 1.4))
    trial.struck, fault_s = "restarted", loop.time()
    await asyncio.to_thread(site.postgres.stop, signal.SIGQUIT)
    refused: list[tuple[float, int]] = []
    down_s = chance.uniform(0.0, 1.0)
    while not refused or loop.time() - fault_s < down_s:
        # All the time, not only at its beginning: what a server does about it may be what takes long.
        asking = (_refused(member, ask) for member, ask in zip(site.members, probed, strict=True))
        refused += await asyncio.gather(*asking)
        await asyncio.sleep(0.1)
    await asyncio.to_thread(site.postgres.start)
    began_s = loop.time()
    await loading
    _note_end(trial, fault_s)
    trial.figures["refused_s"] = max(seconds for seconds, _ in refused)
    trial.figures["recovered_s"] = max(0.0, max(_ends(trial.history)) - began_s)
    for seconds, status in refused:
        # How soon is judged over all trials: it is a caller's time, with the delay of a busy machine in it.
        if status != 503:
            trial.violations.append(f"while PostgreSQL was down: {status} after {seconds:.2f} s")
    return await judge(site, trial)


async def disconnect(site: Deployment, trial: Trial) -> Trial:
    """Every session in the database is ended at once, as an operator or a failover does it."""
    assert site.postgres is not None
    return await _during_a_turn(site, trial, "disconnected", lambda: site.postgres.disconnect("postgres"))


async def lose_commit(site: Deployment, trial: Trial) -> Trial:
    """One COMMIT is done and its answer lost: of the claim, of a heartbeat, or of the pair."""

    async def lose() -> None:
        site.networks["postgres"].swallow = b"COMMIT;\0"

    return await _during_a_turn(site, trial, "answer lost", lose)


async def _during_a_turn(site: Deployment, trial: Trial, name: str, strike: Callable[[], Awaitable[None]]) -> Trial:
    chance, loop = trial.random, asyncio.get_running_loop()
    ask = await new_ask(site, chance)
    serving = asyncio.ensure_future(served(crowd(site, trial.history, ask, chance), chance))
    await asyncio.sleep(chance.uniform(0.0, GENERATION_S * 1.15))
    trial.struck, fault_s = name, loop.time()
    await strike()
    await serving
    _note_end(trial, fault_s)
    return await judge(site, trial)


async def _refused(member: Member, ask: Ask) -> tuple[float, int]:
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    reply = await member.ask("POST", f"/api/threads/{ask.thread}/messages", ask.body, [*ask.headers, JSON])
    return loop.time() - began_s, reply.status


async def headline(site: Deployment, trial: Trial, fault: Callable[[random.Random], Awaitable[None]]) -> Trial:
    """Fifty identical requests over ten connections, while something breaks that must not be noticed: no retries."""
    chance = trial.random
    ask = await new_ask(site, chance, "lat400-n10-gap60")
    left = list(range(50))
    told: list[Told] = []

    async def connection(number: int) -> None:
        while left:
            left.pop()
            kind = chance.choice(KINDS)
            client = kind(site, trial.history, next(_numbers), ask, BOUND_S)
            answer = await client.run(number)
            if answer is not None:
                told.append(answer)

    breaking = asyncio.ensure_future(fault(chance))
    await asyncio.gather(*(connection(number) for number in range(10)))
    await breaking
    await judge(site, trial, broken=False)
    rows = await site.rows([ask.thread])
    succeeded = sum(answer.state == "completed" for answer in told)
    seen = (succeeded, len(trial.history.told), len(rows.messages), trial.calls)
    if seen != (50, 50, 2, [1]):
        trial.violations.append(f"answered, tries, messages, calls: {seen}")
    return trial
