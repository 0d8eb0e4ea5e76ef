"""Calls of `/v1` over two workers of one process."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from types import MappingProxyType
from typing import Any

import pytest

from oncewise.coordination.memory import MemoryCoordination, World
from oncewise.core.pacing import LocalLimiter, Pacer
from oncewise.core.retry import RetryBudget
from oncewise.core.stream_hub import Position, StreamHub
from oncewise.errors import NotFound, OncewiseError, ProviderProtocolError, TurnCancelled
from oncewise.model import Role
from oncewise.service import shared_calls
from oncewise.service.attempts import ProviderLane
from oncewise.service.completions import CompletionAsk, Completions, Wish
from oncewise.service.fleet import Fleet
from oncewise.service.model_names import ModelNames
from oncewise.testing import ScriptedProvider
from tests.support.watching import until

BODY = {"model": "p/m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}


class Worker:
    """One worker's `/v1`."""

    def __init__(self, world: World, address: str, provider: ScriptedProvider) -> None:
        self.coordination: MemoryCoordination = world.worker(address)
        self.fleet = Fleet(b"secret", coordination=self.coordination)
        limiter = LocalLimiter(1e6, 1000, asyncio.get_running_loop().time)
        lane = ProviderLane(provider, Pacer(limiter, concurrency=50), "m", RetryBudget())
        ids = iter(range(10_000))
        self.desk = Completions(
            {"p": lane},
            ModelNames({"p": "m"}, default_provider="p"),
            logs=StreamHub(retention_s=60.0),
            ids=lambda: f"{address}-{next(ids)}",
            chance=lambda: 0.0,
            now_s=lambda: 7,
            fleet=self.fleet,
        )

    def send(self, org: str = "acme", *, stream: bool = False, body: Any = BODY, **fields: Any) -> Any:
        return self.desk.send(org, CompletionAsk("r1", MappingProxyType(body), stream=stream, **fields))

    async def ask(self, org: str = "acme", **fields: Any) -> tuple[Any, Role]:
        """A JSON request: the document, and what it was told of its role."""
        with self.send(org, **fields) as ticket:
            completion = await ticket.result()
            return json.loads(ticket.run.document(completion)), ticket.role

    async def stream(self, **fields: Any) -> tuple[str, Role]:
        """A streaming request: all it was sent, its end left out."""
        with self.send(stream=True, **fields) as ticket:
            chunks = [chunk async for chunk in ticket.run.log.view()]
            await ticket.result()
            return b"".join(chunks).decode(), ticket.role

    async def aclose(self) -> None:
        await self.desk.aclose()
        await self.fleet.aclose()
        await self.coordination.aclose()


class Pair:
    def __init__(self) -> None:
        self.world = World()
        self.provider = ScriptedProvider(deltas=[f"{number} " for number in range(20)], held=True)
        self.lead = Worker(self.world, "lead", self.provider)
        self.other = Worker(self.world, "other", self.provider)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with AsyncExitStack() as opened:
        pair = Pair()
        opened.push_async_callback(pair.lead.aclose)
        opened.push_async_callback(pair.other.aclose)
        opened.callback(pair.provider.go.set)
        yield pair


async def started(pair: Pair, *asking: Any) -> list[asyncio.Task[Any]]:
    """Requests of which the first leads."""
    first = asyncio.create_task(asking[0])
    await pair.provider.started.wait()
    rest = [asyncio.create_task(each) for each in asking[1:]]
    await asyncio.sleep(0.02)
    return [first, *rest]


async def made_anew(pair: Pair, tasks: list[asyncio.Task[Any]]) -> None:
    """The worker of the second request makes the call that the first one's was making."""
    await until(lambda: len(pair.provider.calls) == 2)
    pair.provider.go.set()
    assert (await tasks[1])[1] is Role.LEADER
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_requests_of_two_workers_are_one_call(pair):
    """JSON and streams; the same document and the same chunks."""
    tasks = await started(
        pair, pair.lead.ask(), pair.lead.stream(), pair.other.ask(), pair.other.stream(), pair.other.ask()
    )
    pair.provider.go.set()

    told = await asyncio.gather(*tasks)

    assert len(pair.provider.calls) == 1
    documents = [told[place][0] for place in (0, 2, 4)]
    assert documents[0] == documents[1] == documents[2]
    assert documents[0]["choices"][0]["message"]["content"] == pair.provider.text
    assert told[1][0] == told[3][0]
    assert [role for _, role in told] == [Role.LEADER] + [Role.FOLLOWER] * 4


async def test_a_follower_goes_by_the_name_of_the_call(pair):
    """So that a client sees one call, whichever worker it asked."""
    tasks = await started(pair, pair.lead.ask())
    with pair.other.send() as ticket:
        await until(lambda: ticket.run.holder)
        assert ticket.run.call_id.startswith("lead-")
        pair.provider.go.set()
        share = ticket.share(await ticket.result())
        assert (share.role, share.pays, share.calls, share.bill.usage.total_tokens) == (Role.FOLLOWER, False, 0, 23)
    await tasks[0]


async def test_other_bodies_tenants_and_choices_share_nothing(pair):
    """As inside one worker."""
    other_body = {**BODY, "messages": [{"role": "user", "content": "ho"}]}
    tasks = await started(
        pair,
        pair.lead.ask(),
        pair.other.ask("globex"),
        pair.other.ask(body=other_body),
        pair.other.ask(wish=Wish.OFF),
        pair.other.ask(body={**BODY, "temperature": 1}),
    )
    pair.provider.go.set()
    await asyncio.gather(*tasks)
    assert len(pair.provider.calls) == 5


async def test_a_call_that_ended_a_moment_ago_is_not_replayed(pair):
    """In flight only, over workers too."""
    pair.provider.go.set()
    await pair.lead.ask()
    await pair.other.ask()
    assert len(pair.provider.calls) == 2


async def test_a_failure_is_shared(pair):
    """The same error for all, and no second call for it."""
    pair.provider.failures = [(3, ProviderProtocolError())]
    tasks = await started(pair, pair.lead.ask(), pair.other.ask(), pair.other.stream())
    pair.provider.go.set()
    told = await asyncio.gather(*tasks, return_exceptions=True)
    assert [error.code for error in told] == ["provider_protocol"] * 3
    assert len(pair.provider.calls) == 1


async def test_who_waits_in_another_worker_keeps_a_call_alive(pair):
    """Its own requester left."""
    pair.lead.desk.flights._abandon_after_s = 0.05
    tasks = await started(pair, pair.lead.ask(), pair.other.ask())
    tasks[0].cancel()
    await asyncio.sleep(0.2)
    assert pair.provider.running == 1
    pair.provider.go.set()
    document, role = await tasks[1]
    assert document["choices"][0]["message"]["content"] == pair.provider.text
    assert role is Role.FOLLOWER


async def test_a_call_that_everybody_left_is_ended(pair):
    """Also those in other workers."""
    pair.lead.desk.flights._abandon_after_s = 0.05
    tasks = await started(pair, pair.lead.ask(), pair.other.ask())
    tasks[0].cancel()
    tasks[1].cancel()
    await until(lambda: pair.provider.running == 0)
    assert pair.provider.closed_early == 1


async def test_a_call_is_cancelled_from_any_worker(pair):
    """By a follower's worker, and by one that has nothing to do with it; others see the same end."""
    for canceller in (pair.other, Worker(pair.world, "third", pair.provider)):
        tasks = await started(pair, pair.lead.stream(), pair.other.ask())
        call_id = list(pair.lead.desk._runs)[-1][1]
        assert not await canceller.desk.cancel("acme", call_id)
        told = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(error) for error in told] == [TurnCancelled] * 2
        await until(lambda: pair.provider.running == 0)
        with pytest.raises(NotFound):
            await canceller.desk.cancel("globex", call_id)
        pair.provider.started.clear()


async def test_a_call_is_resumed_in_any_worker(pair):
    """From a chunk on, or from the start; also one that shares with nobody, and one that has ended."""
    fields: dict[str, Any] = {"body": {**BODY, "temperature": 1}, "resumable": True}
    (task,) = await started(pair, pair.lead.stream(**fields))
    call_id = next(iter(pair.lead.desk._runs))[1]
    pair.provider.gap_s = 0.01
    pair.provider.go.set()
    await until(lambda: pair.lead.desk._runs["acme", call_id].log.deltas > 5)

    for _ in range(2):
        run, waiter = await pair.other.desk.watch("acme", call_id, 3)
        viewer = run.log.view(Position(1, 3))
        assert not viewer.from_start
        rest = b"".join([chunk async for chunk in viewer]).decode()
        outcome = await waiter.outcome()
        waiter.leave()
        sent, _ = await task
        assert sent.endswith(rest)
        assert sent.count("\n\n") == rest.count("\n\n") + 3
        assert outcome.value.usage.total_tokens == 23

    with pytest.raises(NotFound):
        await pair.other.desk.watch("globex", call_id)


async def test_a_call_that_had_ended_when_it_was_asked_for_is_led_no_more(pair, monkeypatch):
    """Its whole text is told to who resumes it; then there is nothing that others could have a word about."""
    monkeypatch.setattr(shared_calls, "LATE_S", 0.1)
    (task,) = await started(pair, pair.lead.stream(body={**BODY, "temperature": 1}, resumable=True))
    call_id = next(iter(pair.lead.desk._runs))[1]
    pair.provider.go.set()
    sent, _ = await task
    run, waiter = await pair.other.desk.watch("acme", call_id, 0)
    assert b"".join([chunk async for chunk in run.log.view()]).decode() == sent
    waiter.leave()
    await until(lambda: pair.lead.fleet.idle)


async def test_who_comes_for_a_call_that_just_ended_is_told_it(pair, monkeypatch):
    """Its claim was held a moment ago. For a while only: then the call is led no more."""
    monkeypatch.setattr(shared_calls, "LATE_S", 0.5)
    (leading,) = await started(pair, pair.lead.ask())
    claims = pair.other.fleet.claims
    claim, asked, late = claims.claim, asyncio.Event(), asyncio.Event()

    async def slowly(name, holder, *, lease_s):
        held = await claim(name, holder, lease_s=lease_s)
        asked.set()
        await late.wait()
        return held

    monkeypatch.setattr(claims, "claim", slowly)
    following = asyncio.create_task(pair.other.ask())
    await asked.wait()
    pair.provider.go.set()
    document, _ = await leading
    late.set()
    assert (await following)[0] == document
    assert len(pair.provider.calls) == 1
    await until(lambda: pair.lead.fleet.idle)


async def test_a_call_that_is_resumed_may_be_silent(pair):
    """For longer than it takes to look whether anything was lost."""
    (task,) = await started(pair, pair.lead.stream(resumable=True))
    call_id = next(iter(pair.lead.desk._runs))[1]
    pair.provider.gap_s = 3 * shared_calls.LOOK_S
    pair.provider.go.set()
    run, waiter = await pair.other.desk.watch("acme", call_id, 0)
    await until(lambda: run.log.deltas > 1)
    pair.provider.gap_s = 0.0
    rest = b"".join([chunk async for chunk in run.log.view()]).decode()
    waiter.leave()
    assert (await task)[0] == rest


# -- what is lost ------------------------------------------------------------------------------------------------


async def test_a_lost_worker_costs_a_second_call(pair):
    """For those who have seen nothing."""
    tasks = await started(pair, pair.lead.ask(), pair.other.ask(), pair.other.stream())
    pair.lead.coordination.die()
    pair.world.claims.clear()
    await until(lambda: len(pair.provider.calls) == 2)
    pair.provider.deltas = ["other ", "answer"]
    pair.provider.go.set()

    told = await asyncio.gather(*tasks[1:])

    assert told[0][0]["choices"][0]["message"]["content"] == "other answer"
    assert told[0][1] is Role.LEADER
    assert len(pair.provider.calls) == 2


async def test_a_worker_that_stops_costs_a_second_call(pair):
    """It says so."""
    tasks = await started(pair, pair.lead.ask(), pair.other.ask())
    stopping = asyncio.create_task(pair.lead.desk.aclose())
    await until(lambda: len(pair.provider.calls) == 2)
    pair.provider.go.set()
    document, _ = await tasks[1]
    assert document["choices"][0]["message"]["content"] == pair.provider.text
    with pytest.raises(OncewiseError):
        await tasks[0]
    await stopping


async def test_nobody_fails_for_a_server_that_is_away(pair):
    """Before the call, and while it runs: everybody is answered, by a call of his worker's own if need be."""
    pair.world.down = True
    tasks = await started(pair, pair.lead.ask(), pair.other.ask(), pair.other.stream())
    pair.provider.go.set()
    await asyncio.gather(*tasks)
    assert len(pair.provider.calls) == 2

    pair.world.down = False
    pair.provider.go.clear()
    pair.provider.started.clear()
    tasks = await started(pair, pair.lead.ask(), pair.other.ask(), pair.other.stream())
    pair.world.down = True
    await until(lambda: len(pair.provider.calls) == 4)
    pair.provider.go.set()
    told = await asyncio.gather(*tasks)
    assert told[1][0]["choices"][0]["message"]["content"] == pair.provider.text


async def test_a_whole_answer_that_was_told_in_part_is_asked_for_anew(pair):
    """Nobody has seen the part."""
    pair.provider.gap_s = 0.02
    tasks = await started(pair, pair.lead.ask(), pair.other.ask())
    pair.provider.go.set()
    await until(lambda: next(iter(pair.other.desk._runs.values())).log.deltas > 3)
    pair.lead.coordination.die()
    pair.world.claims.clear()
    document, role = await tasks[1]
    assert document["choices"][0]["message"]["content"] == pair.provider.text
    assert role is Role.LEADER
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_stream_that_was_shown_waits_for_a_server_that_comes_back(pair):
    """And then has every chunk once."""
    pair.provider.gap_s = 0.02
    pair.provider.deltas = [f"{number} " for number in range(60)]
    tasks = await started(pair, pair.lead.stream(), pair.other.stream())
    pair.provider.go.set()
    await until(lambda: next(iter(pair.other.desk._runs.values())).log.deltas > 3)
    pair.world.down = True
    await asyncio.sleep(0.3)
    pair.world.down = False
    pair.world.flush()
    told = await asyncio.gather(*tasks)
    assert told[0][0] == told[1][0]
    assert len(pair.provider.calls) == 1


async def test_a_claim_that_was_lost_gives_nobody_anothers_answer(pair):
    """It costs a call."""
    tasks = await started(pair, pair.lead.ask())
    pair.world.claims.clear()
    tasks.append(asyncio.create_task(pair.other.ask()))
    await until(lambda: len(pair.provider.calls) == 2)
    pair.provider.go.set()
    told = await asyncio.gather(*tasks)
    assert [role for _, role in told] == [Role.LEADER, Role.LEADER]


async def test_a_worker_that_is_known_to_be_dead_is_not_waited_for(pair):
    """Its claim would hold for ten seconds; it is given up for it, also by who comes later."""
    tasks = await started(pair, pair.lead.ask(), pair.other.ask())
    pair.lead.coordination.die()
    began_s = asyncio.get_running_loop().time()
    pair.other.fleet.owners_lost(frozenset({"lead"}))
    await until(lambda: len(pair.provider.calls) == 2)
    assert asyncio.get_running_loop().time() - began_s < 1.0
    await made_anew(pair, tasks)


async def test_who_comes_to_a_dead_workers_claim_makes_the_call_at_once(pair, monkeypatch):
    """There is nothing to be heard from it, so that not even its last words are waited for."""
    monkeypatch.setattr(shared_calls, "LAST_WORDS_S", 60.0)
    tasks = await started(pair, pair.lead.ask())
    pair.lead.coordination.die()
    pair.other.fleet.owners_lost(frozenset({"lead"}))
    assert len(pair.world.claims) == 1
    tasks.append(asyncio.create_task(pair.other.ask()))
    await made_anew(pair, tasks)


async def test_who_has_shown_nothing_waits_for_no_claim_to_be_taken_again(pair, monkeypatch):
    """The worker died and nobody knows; as soon as its claim has lapsed, the call is made anew."""
    monkeypatch.setattr(shared_calls, "LEASE_S", 0.5)
    monkeypatch.setattr(shared_calls, "ASK_S", 0.1)
    monkeypatch.setattr(shared_calls, "REGAIN_S", 60.0)
    tasks = await started(pair, pair.lead.ask(), pair.other.ask())
    pair.lead.coordination.die()
    await made_anew(pair, tasks)


async def test_silence_while_the_claim_was_held_does_not_count_when_it_is_lost(pair, monkeypatch):
    """A stream that was shown waits as long for its worker to take the claim again, however long it said nothing."""
    monkeypatch.setattr(shared_calls, "LEASE_S", 1.5)
    monkeypatch.setattr(shared_calls, "LOOK_S", 0.02)
    monkeypatch.setattr(shared_calls, "ASK_S", 0.02)
    monkeypatch.setattr(shared_calls, "REGAIN_S", 2.0)
    pair.provider.gap_s = 0.05
    tasks = await started(pair, pair.lead.stream(), pair.other.stream())
    run = next(iter(pair.other.desk._runs.values()))
    pair.provider.go.set()
    await until(lambda: run.log.deltas > 1)
    pair.provider.gap_s = 4.0
    await asyncio.sleep(2.5)
    pair.world.claims.clear()
    await asyncio.sleep(0.1)
    pair.provider.gap_s = 0.0
    told = await asyncio.gather(*tasks)
    assert told[0][0] == told[1][0]
    assert len(pair.provider.calls) == 1


async def test_the_end_may_come_in_the_moment_of_a_look(pair, monkeypatch):
    """It was then taken for lost, though all of it was there."""
    monkeypatch.setattr(shared_calls, "LOOK_S", 0.0)
    tasks = await started(pair, pair.lead.ask(), pair.other.ask(), pair.other.stream())
    pair.provider.go.set()
    told = await asyncio.gather(*tasks)
    assert told[0][0] == told[1][0]
    assert len(pair.provider.calls) == 1


async def test_the_end_may_come_after_the_claim_was_given_up(pair, monkeypatch):
    """Its worker gives up first and tells then: who asks between the two waits for the last words."""
    monkeypatch.setattr(shared_calls, "LOOK_S", 0.01)
    monkeypatch.setattr(shared_calls, "ASK_S", 0.01)
    monkeypatch.setattr(shared_calls, "LAST_WORDS_S", 30.0)
    tasks = await started(pair, pair.lead.ask(), pair.other.ask())
    asked = []
    claims = pair.other.fleet.claims
    free = claims.release

    async def released(name, holder):
        asked.append(holder)
        await free(name, holder)

    monkeypatch.setattr(claims, "release", released)
    pair.world.claims.clear()
    await until(lambda: asked)
    pair.provider.go.set()
    told = await asyncio.gather(*tasks)
    assert told[0][0] == told[1][0]
    assert len(pair.provider.calls) == 1


async def test_a_claim_whose_answer_was_lost_is_given_up_too(pair):
    """It may have been made; for as long as it lasts, other workers would look for a call that has ended."""
    pair.world.lose_answers = 1
    (task,) = await started(pair, pair.lead.ask())
    assert pair.world.lose_answers == 0
    assert len(pair.world.claims) == 1
    pair.provider.go.set()
    await task
    await until(lambda: pair.world.claims == {})


async def test_who_followed_a_call_gives_up_no_claim(pair):
    """It was never its own: nothing is asked of the server for it."""
    tasks = await started(pair, pair.lead.ask(), pair.other.ask())
    released = []
    claims = pair.other.fleet.claims

    class Watched:
        def __getattr__(self, name):
            released.append(name)
            return getattr(claims, name)

    pair.other.fleet.claims = Watched()
    tasks.append(asyncio.create_task(pair.other.ask(body={**BODY, "seed": 1})))
    await until(lambda: len(pair.provider.calls) == 2)
    tasks.append(asyncio.create_task(pair.lead.ask(body={**BODY, "seed": 2})))
    await until(lambda: len(pair.provider.calls) == 3)
    tasks.append(asyncio.create_task(pair.other.ask(body={**BODY, "seed": 2})))
    await asyncio.sleep(0.05)
    pair.provider.go.set()
    await asyncio.gather(*tasks)
    await asyncio.sleep(0.05)
    assert released == ["claim", "claim", "release"]
