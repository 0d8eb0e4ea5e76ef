"""Turns on a real ledger: cases C01 to C33 of the study of coalescers, as far as one process shows them.

C16, that nothing is left behind, is `Desk.settled`, which most of them end with. C15, C18 and C19 are the coalescer's
own (`tests/unit/core/test_coalesce.py`); C30 and C31 are seen best from outside (`tests/acceptance/test_streams_*`).
"""

import asyncio
import json
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from oncewise.errors import (
    HeadMoved,
    IdempotencyMismatch,
    LeaderLost,
    NotFound,
    OncewiseError,
    ProviderError,
    ProviderProtocolError,
    ProviderRateLimited,
    QueueFull,
    StorageUnavailable,
    ThreadBusy,
    TurnCancelled,
    WaitTimeout,
)
from oncewise.model import (
    Answer,
    ChatMessage,
    ChatRequest,
    FinishReason,
    Heartbeat,
    MessageStatus,
    OnBusy,
    OnDisconnect,
    Params,
    Thread,
    TurnClaim,
    TurnState,
    Usage,
)
from oncewise.ports import TextDelta
from oncewise.providers.call import Timers
from oncewise.providers.openai_compatible import OpenAICompatibleProvider
from oncewise.service.calls import Calls
from oncewise.service.turn_runs import TurnRun
from oncewise.storage.threads import SqlThreadStore
from tests.support.fake_provider import FakeProvider
from tests.support.ledgers import DisturbedLedger
from tests.support.scripted import Desk, ScriptedProvider, open_desk


@pytest.fixture
async def desk(tmp_path):
    async with open_desk(tmp_path / "ow.db") as desk:
        yield desk


@pytest.fixture
async def held(tmp_path):
    """A desk whose provider answers when the test says so."""
    async with open_desk(tmp_path / "ow.db", ScriptedProvider(held=True)) as desk:
        yield desk


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that no event tells of."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def roles(told: list[Any]) -> list[str]:
    return sorted(role for _, role in told)


async def test_ten_identical_messages_at_once_are_one_call_and_one_pair(desk):
    """C01."""
    thread = await desk.thread()

    told = await asyncio.gather(*(desk.told(thread) for _ in range(10)))

    assert len(desk.provider.calls) == 1
    assert await desk.messages(thread) == [("user", "Hello"), ("assistant", "pong")]
    assert len({result.stored.id for result, _ in told}) == 1
    assert roles(told) == ["follower"] * 9 + ["leader"]
    await desk.settled()


async def burst(desk: Desk, requests: int, connections: int) -> list[Any]:
    """`requests` identical messages, each connection sending its next when it has its answer."""
    thread = await desk.thread()
    left = iter(range(requests))

    async def connection() -> list[Any]:
        return [await desk.told(thread) for _ in left]

    told = [one for some in await asyncio.gather(*(connection() for _ in range(connections))) for one in some]
    assert len(await desk.messages(thread)) == 2
    return told


@pytest.mark.parametrize("connections", [10, 50])
async def test_the_headline_fifty_of_fifty_one_call_two_messages(tmp_path, connections):
    """C02: fifty requests at one call a second, over ten connections and over fifty."""
    async with open_desk(tmp_path / "ow.db", ScriptedProvider(delay_s=0.3), rps=1.0) as desk:
        told = await burst(desk, 50, connections)

        assert len(desk.provider.calls) == 1
        assert roles(told).count("leader") == 1
        assert roles(told).count("follower") == connections - 1
        assert roles(told).count("replayed") == 50 - connections
        assert len({json.dumps([r.stored.id, r.stored.assistant_message.content]) for r, _ in told}) == 1
        await desk.settled()


async def test_the_replay_window_runs_from_the_commit(tmp_path):
    """C03: an answer that took longer than the window is replayed all the same."""
    async with open_desk(tmp_path / "ow.db", ScriptedProvider(delay_s=0.5), replay_window_s=0.3) as desk:
        told = await burst(desk, 20, 5)

        assert len(desk.provider.calls) == 1
        assert roles(told).count("replayed") == 15


class SlowLedger:
    """The real ledger with random pauses before and after each call."""

    def __init__(self, ledger: Any) -> None:
        self._ledger = ledger
        self.random = random.Random()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._ledger, name)

        async def slowly(*args: Any, **kwargs: Any) -> Any:
            for _ in range(self.random.randrange(4)):
                await asyncio.sleep(0)
            result = await method(*args, **kwargs)
            for _ in range(self.random.randrange(4)):
                await asyncio.sleep(0)
            return result

        return slowly


@pytest.mark.slow
async def test_no_interleaving_with_the_ledger_makes_a_second_call(tmp_path):
    """C04: 500 seeds of the headline."""
    provider = ScriptedProvider(deltas=("x",))
    async with open_desk(tmp_path / "ow.db", provider, ledger=SlowLedger) as desk:
        for seed in range(500):
            desk.ledger.random.seed(seed)
            told = await burst(desk, 50, 10)

            assert len(provider.calls) == seed + 1, f"seed {seed}"
            assert roles(told).count("leader") == 1, f"seed {seed}"
            await desk.settled()


async def test_a_failure_is_shared_and_not_kept(desk):
    """C05, C06: equal errors, an object for each, nothing stored; the next request makes a new call."""
    thread = await desk.thread()
    desk.provider.failures = [(0, ProviderError("no", retryable=False))]

    errors = await asyncio.gather(*(desk.outcome(thread) for _ in range(4)))

    assert len(desk.provider.calls) == 1
    assert len({id(error) for error in errors}) == 4
    assert {(error.code, error.retryable) for error in errors} == {("provider_error", False)}
    assert await desk.messages(thread) == []
    await asyncio.sleep(2.05)
    assert (await desk.post(thread)).stored.state is TurnState.COMPLETED
    assert len(desk.provider.calls) == 2
    await desk.settled()


async def test_a_passing_failure_is_retried_inside_the_flight(desk):
    """Nobody hears of a 500 that a retry mended."""
    thread = await desk.thread()
    desk.provider.failures = [(0, ProviderError("passing"))]

    told = await asyncio.gather(*(desk.told(thread) for _ in range(4)))

    assert len(desk.provider.calls) == 2
    assert {result.stored.id for result, _ in told} == {told[0][0].stored.id}
    assert max(result.upstream_calls for result, _ in told) == 2


async def test_retries_are_bounded_in_number(desk):
    """Three calls, whatever the budget would allow; whoever waits is told of the last."""
    thread = await desk.thread()
    for _ in range(100):
        desk.calls.lanes["scripted"].budget.called(asyncio.get_running_loop().time())
    desk.provider.failures = [(0, ProviderError(f"{number}")) for number in range(9)]

    errors = await asyncio.gather(*(desk.outcome(thread) for _ in range(4)))

    assert {error.detail for error in errors} == {"2"}
    assert len(desk.provider.calls) == 3
    await desk.settled()


async def test_a_rate_limit_holds_everybody_back(desk):
    """After a 429 nobody calls before the provider's Retry-After, and whoever waited is served then."""
    threads = [await desk.thread() for _ in range(3)]
    desk.provider.failures = [(0, ProviderRateLimited(retry_after_s=0.3))]
    started_s = asyncio.get_running_loop().time()

    first = asyncio.create_task(desk.post(threads[0], "one"))
    await desk.provider.started.wait()
    await asyncio.sleep(0.01)
    others = [asyncio.create_task(desk.post(thread, thread.id)) for thread in threads[1:]]
    await asyncio.sleep(0.2)
    assert len(desk.provider.calls) == 1
    await asyncio.gather(first, *others)

    assert asyncio.get_running_loop().time() - started_s >= 0.3
    assert len(desk.provider.calls) == 4
    await desk.settled()


async def test_the_first_delta_ends_all_retries(desk):
    """C32: what was shown stands; the partial is stored and left out of the next prompt."""
    thread = await desk.thread()
    desk.provider.deltas = [str(digit) for digit in range(10)]
    desk.provider.failures = [(4, ProviderProtocolError())]

    errors = await asyncio.gather(*(desk.outcome(thread) for _ in range(3)))

    assert {error.code for error in errors} == {"provider_protocol"}
    assert len(desk.provider.calls) == 1
    stored = await desk.threads.get(thread.org_id, thread.id)
    assert [(m.content, m.status) for m in stored.messages] == [
        ("Hello", MessageStatus.COMPLETE),
        ("0123", MessageStatus.PARTIAL),
    ]
    await desk.post(thread, "Again")
    assert [message.content for message in desk.provider.calls[-1].messages] == ["Again"]


async def leave_early(desk: Desk, thread: Any, tasks: int, who: int) -> list[Any]:
    """`tasks` callers of one turn of whom number `who` leaves while the provider works."""
    callers = [asyncio.create_task(desk.post(thread)) for _ in range(tasks)]
    await desk.provider.started.wait()
    callers[who].cancel()
    await asyncio.sleep(0.01)
    desk.provider.go.set()
    return await asyncio.gather(*callers, return_exceptions=True)


@pytest.mark.parametrize("who", [0, 2])
async def test_a_caller_who_leaves_costs_nobody_else(held, who):
    """C07, C08: the first and the third of four."""
    thread = await held.thread()

    results = await leave_early(held, thread, 4, who)

    assert isinstance(results.pop(who), asyncio.CancelledError)
    assert {result.stored.assistant_message.content for result in results} == {"pong"}
    assert len(held.provider.calls) == 1
    await held.settled()


async def test_a_caller_may_be_less_patient_than_the_work(held):
    """C09."""
    thread = await held.thread()
    patient = asyncio.create_task(held.post(thread))
    await held.provider.started.wait()

    with held.turns.send(held.ask(thread), "hasty") as ticket, pytest.raises(WaitTimeout):
        await ticket._waiter.result(timeout_s=0.02)

    held.provider.go.set()
    assert (await patient).stored.assistant_message.content == "pong"


async def test_a_turn_left_in_the_queue_makes_no_call(tmp_path):
    """C10: the permit of the pacer is not lost either."""
    async with open_desk(tmp_path / "ow.db", ScriptedProvider(), rps=2.0) as desk:
        first, second, third = [await desk.thread() for _ in range(3)]
        await desk.post(first, "one")
        waiting = [asyncio.create_task(desk.post(second, "two")) for _ in range(3)]
        await asyncio.sleep(0.05)
        for task in waiting:
            task.cancel()
        result = await desk.post(third, "three")

        assert result.stored.assistant_message.content == "pong"
        assert [call.messages[-1].content for call in desk.provider.calls] == ["one", "three"]
        assert await desk.messages(second) == []
        await desk.settled()


async def test_a_running_call_outlives_its_callers(held):
    """C11: everybody leaves, the turn is stored."""
    thread = await held.thread()
    callers = [asyncio.create_task(held.post(thread)) for _ in range(3)]
    await held.provider.started.wait()
    for caller in callers:
        caller.cancel()
    await asyncio.sleep(0.01)
    held.provider.go.set()
    await held.settled()

    assert await held.messages(thread) == [("user", "Hello"), ("assistant", "pong")]


async def test_a_newcomer_never_gets_the_end_of_an_abandoned_turn(held):
    """C12: with on_disconnect=cancel, whoever comes a moment later gets a turn of his own."""
    thread = await held.thread()
    leaver = asyncio.create_task(held.post(thread, on_disconnect=OnDisconnect.CANCEL))
    await held.provider.started.wait()
    leaver.cancel()
    await asyncio.sleep(0.001)
    newcomer = asyncio.create_task(held.post(thread))
    await asyncio.sleep(0.05)
    held.provider.go.set()

    assert (await newcomer).stored.assistant_message.content == "pong"
    assert held.provider.closed_early == 1
    assert len(held.provider.calls) == 2
    await held.settled()


@pytest.mark.parametrize("by", ["leaving", "cancel"])
async def test_a_message_that_comes_while_its_twin_is_being_ended_gets_a_turn_of_its_own(tmp_path, by):
    """C12: however long that takes. The ledger names the twin still, and nobody can join it any more."""
    async with open_desk(tmp_path / "ow.db", ScriptedProvider(held=True), ledger=DisturbedLedger) as desk:
        thread = await desk.thread()
        end = desk.ledger.hold_before("end")
        first = asyncio.create_task(desk.outcome(thread, on_disconnect=OnDisconnect.CANCEL))
        await desk.provider.started.wait()
        turn = await desk.threads.active(thread.org_id, thread.id)
        if by == "leaving":
            first.cancel()
            cancel = None
        else:
            cancel = asyncio.create_task(desk.threads.cancel_turn(thread.org_id, thread.id, turn.id))
        await end.reached.wait()
        newcomer = asyncio.create_task(desk.told(thread))
        await until(lambda: desk.ledger.calls["admit"] == 2)
        end.open.set()
        desk.provider.go.set()

        result, role = await newcomer
        assert (result.stored.assistant_message.content, role) == ("pong", "leader")
        assert result.stored.id != turn.id
        assert desk.ledger.calls["admit"] == 3, "it waits for the end instead of asking again and again"
        if cancel is not None:
            assert (await cancel).state is TurnState.CANCELLED
        await desk.settled()


async def test_a_provider_that_cancels_itself_cancels_no_caller(desk):
    """C13."""
    thread = await desk.thread()
    desk.provider.failures = [(0, asyncio.CancelledError())]

    callers = [asyncio.create_task(desk.outcome(thread)) for _ in range(3)]
    errors = await asyncio.gather(*callers)

    assert {error.code for error in errors} == {"upstream_cancelled"}
    assert not any(caller.cancelling() for caller in callers)
    await desk.settled()


async def test_a_provider_that_says_nothing_is_given_up(tmp_path):
    """C14: every caller is told so in time, nothing is left, and the next request starts anew."""
    async with FakeProvider() as fake:
        timers = Timers(first_token_s=0.2)
        provider = OpenAICompatibleProvider.connect("scripted", fake.base_url, None, concurrency=5, timers=timers)
        async with open_desk(tmp_path / "ow.db", provider) as desk:
            thread = await desk.thread()

            async with asyncio.timeout(5):
                errors = await asyncio.gather(*(desk.outcome(thread, model="hang") for _ in range(5)))

            assert {error.code for error in errors} == {"provider_timeout"}
            assert fake.count <= 3
            await desk.settled()
            assert await desk.messages(thread) == []
            assert (await desk.post(thread, model="n3")).stored.state is TurnState.COMPLETED
        await provider.aclose()


async def test_callers_cannot_change_what_others_get(desk):
    """C17: the shared result is immutable."""
    thread = await desk.thread()
    (first, _), (second, _) = await asyncio.gather(desk.told(thread), desk.told(thread))

    with pytest.raises(AttributeError):
        first.stored.assistant_message.content = "forged"
    with pytest.raises(TypeError):
        first.stored.assistant_message.meta["forged"] = True
    assert second.stored.assistant_message.content == "pong"


async def test_two_tenants_share_nothing(held):
    """C20: same text, two calls."""
    threads = [await held.thread(org) for org in ("org_a", "org_b")]
    callers = [asyncio.create_task(held.post(thread)) for thread in threads]
    while len(held.provider.calls) < 2:
        await asyncio.sleep(0.001)
    held.provider.go.set()
    results = await asyncio.gather(*callers)

    assert results[0].stored.id != results[1].stored.id
    assert [await held.messages(thread) for thread in threads] == [[("user", "Hello"), ("assistant", "pong")]] * 2


async def test_a_foreign_tenant_cannot_join_a_running_turn(held):
    """C21: the thread of another tenant is an unknown thread, also while a turn of it runs."""
    thread = await held.thread("org_a")
    leader = asyncio.create_task(held.post(thread))
    await held.provider.started.wait()

    intruder = held.threads.prepare("org_b", thread.id, content="Hello")
    with held.turns.send(intruder, "x") as ticket, pytest.raises(NotFound):
        await ticket.result()

    held.provider.go.set()
    await leader


@pytest.mark.parametrize("fields", [{"model": "other"}, {"params": Params(temperature=0.5)}])
async def test_what_changes_the_answer_makes_a_turn_of_its_own(desk, fields):
    """C22: one after the other."""
    thread = await desk.thread()

    results = await asyncio.gather(desk.post(thread), desk.post(thread, **fields))

    assert len({result.stored.id for result in results}) == 2
    assert desk.provider.max_running == 1
    assert len(await desk.messages(thread)) == 4


async def test_different_messages_take_turns(desk):
    """C23: roles alternate, and each prompt holds the turns before it."""
    thread = await desk.thread()
    desk.provider.gap_s = 0.005
    began_s = asyncio.get_running_loop().time()

    await asyncio.gather(*(desk.post(thread, f"m{number}") for number in range(10)))

    # Half a second each if they were to look for their turn instead of being woken.
    assert asyncio.get_running_loop().time() - began_s < 4.0
    stored = await desk.messages(thread)
    assert [role for role, _ in stored] == ["user", "assistant"] * 10
    assert desk.provider.max_running == 1
    for number, call in enumerate(desk.provider.calls):
        assert [message.content for message in call.messages] == [text for _, text in stored[: 2 * number + 1]]
    await desk.settled()


async def test_a_key_names_a_turn_for_good(desk):
    """C24, C25: repeat and mismatch."""
    thread = await desk.thread()
    first = await desk.post(thread, idempotency_key="K")

    again, role = await desk.told(thread, idempotency_key="K")

    assert (again.stored.id, role) == (first.stored.id, "replayed")
    with pytest.raises(IdempotencyMismatch):
        await desk.post(thread, "Something else", idempotency_key="K")
    assert len(desk.provider.calls) == 1


async def test_two_keys_are_two_turns(desk):
    """C26: at once, and in sequence."""
    thread = await desk.thread()

    both = await asyncio.gather(desk.post(thread, idempotency_key="K1"), desk.post(thread, idempotency_key="K2"))
    again = await asyncio.gather(desk.post(thread, idempotency_key="K1"), desk.post(thread, idempotency_key="K2"))

    assert len({result.stored.id for result in both}) == 2
    assert {result.stored.id for result in again} == {result.stored.id for result in both}
    assert len(await desk.messages(thread)) == 4


async def test_without_a_key_a_repeat_is_replayed_for_a_while(tmp_path):
    """C27."""
    async with open_desk(tmp_path / "ow.db", replay_window_s=0.25) as desk:
        thread = await desk.thread()
        first = await desk.post(thread, "continue")
        replay, role = await desk.told(thread, "continue")
        await asyncio.sleep(0.3)
        later, later_role = await desk.told(thread, "continue")

        assert (replay.stored.id, role) == (first.stored.id, "replayed")
        assert later_role == "leader"
        assert later.stored.id != first.stored.id


async def test_whoever_asks_for_a_new_turn_gets_one(desk):
    """C28: within the window, and beside a running twin."""
    thread = await desk.thread()
    first = await desk.post(thread)

    second, role = await desk.told(thread, force_new=True)

    assert role == "bypass"
    assert second.stored.id != first.stored.id


async def test_a_keyless_request_joins_a_twin_that_runs_under_a_key(held):
    """Rule 3: the same fingerprint running in this thread."""
    thread = await held.thread()
    keyed = asyncio.create_task(held.told(thread, idempotency_key="K"))
    await held.provider.started.wait()
    keyless = [asyncio.create_task(held.told(thread)) for _ in range(2)]
    await asyncio.sleep(0.05)
    held.provider.go.set()

    (first, role), *others = await asyncio.gather(keyed, *keyless)

    assert role == "leader"
    assert {(result.stored.id, role) for result, role in others} == {(first.stored.id, "follower")}
    assert len(held.provider.calls) == 1
    await held.settled()


async def test_whoever_streams_a_turn_that_another_leads_sees_that_ones_text(held):
    """A keyless stream of a turn under a key: two flights, one log."""
    thread = await held.thread()
    keyed = asyncio.create_task(held.told(thread, idempotency_key="K"))
    await held.provider.started.wait()

    with held.turns.send(held.ask(thread), "stream") as ticket:
        admitted = await ticket.admitted()
        log = await ticket.watch()
        held.provider.go.set()
        seen = b"".join([chunk async for chunk in log.view()])

    result, _ = await keyed
    assert (seen, admitted.turn_id) == (b"pong", result.stored.id)
    await held.settled()


async def test_the_last_of_two_flights_to_lose_interest_stops_the_call(held):
    """Withdrawn by their ids: the leading request first, then the one that follows through a flight of its own."""
    thread = await held.thread()

    async def caller(name: str, **fields: Any) -> Any:
        with held.turns.send(held.ask(thread, **fields), name) as ticket:
            return await ticket.result()

    keyed = asyncio.create_task(caller("keyed", idempotency_key="K"))
    await held.provider.started.wait()
    turn = await held.threads.active(thread.org_id, thread.id)
    keyless = asyncio.create_task(caller("keyless"))
    await until(lambda: held.threads.requesters(thread.org_id, turn.id) == 2)
    await held.turns.cancel_request("org_a", "keyed")
    await until(lambda: held.threads.requesters(thread.org_id, turn.id) == 1)
    assert held.provider.running == 1
    await held.turns.cancel_request("org_a", "keyless")
    async with asyncio.timeout(1):
        while held.provider.running:
            await asyncio.sleep(0.005)

    for task in (keyed, keyless):
        with pytest.raises(TurnCancelled):
            await task
    await held.settled()
    assert await held.messages(thread) == []


async def test_a_key_in_use_by_another_message_is_refused_at_once(held):
    """C25, while the first still runs: it is not joined."""
    thread = await held.thread()
    first = asyncio.create_task(held.post(thread, idempotency_key="K"))
    await held.provider.started.wait()
    with pytest.raises(IdempotencyMismatch):
        await held.post(thread, "Something else", idempotency_key="K")
    held.provider.go.set()

    assert (await first).stored.user_message.content == "Hello"
    assert len(held.provider.calls) == 1


async def test_two_messages_after_the_same_parent_are_two_turns(desk):
    """Rule 2, at once: neither is given the other's answer."""
    thread = await desk.thread()
    parent = (await desk.post(thread, "one")).stored.assistant_message.id

    both = await asyncio.gather(*(desk.post(thread, text, parent_message_id=parent) for text in ("two", "three")))

    assert [result.stored.user_message.content for result in both] == ["two", "three"]
    assert len(await desk.messages(thread)) == 6


async def test_requests_for_new_turns_share_nothing_though_they_are_one_object(desk):
    """C28: identical requests come with the same ask, which is made once for all of them."""
    thread = await desk.thread()
    ask = desk.ask(thread, force_new=True)

    async def caller(name: str) -> Any:
        with desk.turns.send(ask, name) as ticket:
            return await ticket.result()

    results = await asyncio.gather(*(caller(f"r{number}") for number in range(3)))

    assert len({result.stored.id for result in results}) == 3


async def test_a_message_waits_for_its_place_only_so_long(tmp_path):
    """Then it is told so, and made no call; the turn before it is not disturbed."""
    async with open_desk(tmp_path / "ow.db", ScriptedProvider(held=True), queue_wait_s=0.8) as desk:
        thread = await desk.thread()
        first = asyncio.create_task(desk.post(thread, "one"))
        await desk.provider.started.wait()

        error = await desk.outcome(thread, "two")

        assert error.code == "queue_timeout"
        desk.provider.go.set()
        assert (await first).stored.state is TurnState.COMPLETED
        assert len(desk.provider.calls) == 1
        await desk.settled()


async def test_a_parent_that_is_not_the_last_message_is_refused(desk):
    """Rule 2."""
    thread = await desk.thread()
    first = await desk.post(thread, "one")
    parent = first.stored.assistant_message.id

    second = await desk.post(thread, "two", parent_message_id=parent)
    repeat = await desk.post(thread, "two", parent_message_id=parent)

    assert repeat.stored.id == second.stored.id
    with pytest.raises(HeadMoved):
        await desk.post(thread, "three", parent_message_id=parent)


async def test_the_queue_of_a_thread_is_bounded_and_may_be_refused(held):
    """32 wait behind the running turn; `reject` waits behind none."""
    thread = await held.thread()
    callers = [asyncio.create_task(held.outcome(thread, f"m{number}")) for number in range(33)]
    await held.provider.started.wait()
    await asyncio.sleep(0.3)

    with pytest.raises(QueueFull):
        await held.post(thread, "one too many")
    with pytest.raises(ThreadBusy):
        await held.post(thread, "impatient", on_busy=OnBusy.REJECT)
    for caller in callers[1:]:
        caller.cancel()
    held.provider.go.set()
    assert (await callers[0]).stored.state is TurnState.COMPLETED
    await held.settled()
    assert len(held.provider.calls) == 1


async def test_the_wait_behind_another_turn_counts_as_waiting(held):
    """The caller is told of it, with how many turns came first."""
    thread = await held.thread()
    first, second, third = (asyncio.create_task(held.post(thread, f"m{number}")) for number in range(3))
    await held.provider.started.wait()
    await asyncio.sleep(0.2)
    held.provider.go.set()
    results = [await first, await second, await third]
    assert [result.queued_behind for result in results] == [0, 1, 2]
    assert results[0].queue_wait_ms < 150 < results[1].queue_wait_ms < results[2].queue_wait_ms


async def test_the_same_prompt_in_twenty_threads_is_one_call_and_twenty_pairs(desk):
    """The call is shared inside the tenant; every thread stores its own pair, and the audit says so."""
    desk.provider.delay_s = 0.1
    threads = [await desk.thread() for _ in range(20)]

    results = await asyncio.gather(*(desk.post(thread) for thread in threads))

    assert len(desk.provider.calls) == 1
    assert len({result.stored.assistant_message.id for result in results}) == 20
    assert sum(result.upstream_calls for result in results) == 1
    audits = [(await desk.threads.audit("org_a", thread.id))[0] for thread in threads]
    assert sorted(entry.shared for entry in audits) == [False] + [True] * 19
    assert len({entry.call_id for entry in audits}) == 1
    await desk.settled()


async def test_whoever_joins_a_running_call_may_leave_it_too(held):
    """C11 for a turn that shares the call of another thread: that costs something by then, so the turn is stored."""
    first, second = [await held.thread() for _ in range(2)]
    leader = asyncio.create_task(held.post(first))
    await held.provider.started.wait()
    joined = asyncio.create_task(held.post(second))
    await until(lambda: held.calls.flights.stats().waiters == 2)
    joined.cancel()
    await asyncio.sleep(0.01)
    held.provider.go.set()
    await leader
    await held.settled()

    assert await held.messages(second) == [("user", "Hello"), ("assistant", "pong")]
    assert len(held.provider.calls) == 1


def test_a_call_is_the_whole_request_and_its_tenant():
    """Whatever the provider would be told keeps two calls apart, and nothing else does."""
    calls = Calls({}, ledger=None, flights=None, logs=None, ids=str)
    hello = (ChatMessage("user", "Hello"),)

    def key(org: str = "acme", provider: str = "p", model: str = "m", messages: Any = hello, **params: Any) -> Any:
        return calls.key(org, ChatRequest(provider, model, messages, Params(**params)))

    keys = [
        key(),
        key(org="other"),
        key(provider="q"),
        key(model="n"),
        key(messages=(ChatMessage("user", "Hello "),)),
        key(messages=(ChatMessage("system", "Hello"),)),
        key(messages=hello * 2),
        *(key(**{name: 1}) for name in ("temperature", "top_p", "max_tokens", "seed")),
        *(key(**{name: 1}) for name in ("presence_penalty", "frequency_penalty")),
        key(stop=("x",)),
        key(seed=0),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == key()


async def test_a_provider_that_ends_without_a_verified_completion_has_failed(tmp_path):
    """What it said may be half of an answer: it is kept as that."""

    class Unverified(ScriptedProvider):
        async def stream(self, request: ChatRequest) -> Any:
            self.calls.append(request)
            yield TextDelta("half")

    async with open_desk(tmp_path / "ow.db", Unverified()) as desk:
        thread = await desk.thread()

        assert (await desk.outcome(thread)).code == "provider_protocol"
        assert (await desk.threads.get(thread.org_id, thread.id)).messages[1].status is MessageStatus.PARTIAL
        await desk.settled()


async def test_an_answer_is_not_lost_to_its_accounting(tmp_path):
    """How a call ended could not be written down; what it said is stored."""
    async with open_desk(tmp_path / "ow.db", ledger=DisturbedLedger) as desk:
        thread = await desk.thread()
        desk.ledger.fail("finish_call", StorageUnavailable())

        assert (await desk.post(thread)).stored.state is TurnState.COMPLETED


async def test_a_late_viewer_gets_the_whole_text(tmp_path):
    """C29, C33: JSON and streaming requests share one call, and a late one misses nothing."""
    provider = ScriptedProvider(deltas=[f"{number} " for number in range(100)], gap_s=0.002)
    async with open_desk(tmp_path / "ow.db", provider) as desk:
        thread = await desk.thread()
        json_caller = asyncio.create_task(desk.post(thread))
        await provider.started.wait()
        await asyncio.sleep(0.06)

        with desk.turns.send(desk.ask(thread), "stream") as ticket:
            await ticket.admitted()
            log = await ticket.watch()
            seen = b"".join([chunk async for chunk in log.view()])

        result = await json_caller
        assert seen.decode() == provider.text == result.stored.assistant_message.content
        assert len(provider.calls) == 1
        turn = await desk.ledger.turn(thread.org_id, thread.id, result.stored.id)
        assert turn.visible


async def test_a_turn_that_nobody_streams_is_never_marked_visible(desk):
    """So that another process may call again when this one is lost: nobody has seen any text."""
    thread = await desk.thread()
    result = await desk.post(thread)
    turn = await desk.ledger.turn(thread.org_id, thread.id, result.stored.id)
    assert not turn.visible


async def test_a_request_is_withdrawn_alone_and_the_last_one_stops_the_call(held):
    """Cancel by request id is one caller's interest."""
    thread = await held.thread()

    async def caller(name: str) -> Any:
        with held.turns.send(held.ask(thread), name) as ticket:
            return await ticket.result()

    callers = [asyncio.create_task(caller(f"c{number}")) for number in range(3)]
    await held.provider.started.wait()
    with pytest.raises(NotFound):
        await held.turns.cancel_request("org_b", "c1")
    await held.turns.cancel_request("org_a", "c0")
    with pytest.raises(TurnCancelled):
        await callers[0]
    assert held.provider.running == 1
    await held.turns.cancel_request("org_a", "c1")
    await held.turns.cancel_request("org_a", "c2")
    async with asyncio.timeout(1):
        while held.provider.running:
            await asyncio.sleep(0.005)
    for task in callers[1:]:
        with pytest.raises(TurnCancelled):
            await task
    assert await held.turns.cancel_request("org_a", "c0")
    for org_id, request_id in (("org_b", "c1"), ("org_a", "nobody")):
        with pytest.raises(NotFound):
            await held.turns.cancel_request(org_id, request_id)
    await held.settled()
    assert await held.messages(thread) == []


async def test_the_ends_of_the_last_requests_are_remembered(desk):
    """So many and no more; the same id again is the newest."""
    thread = await desk.thread()
    desk.turns._ended = {("org_a", str(number)): True for number in range(10_000)}
    with desk.turns.send(desk.ask(thread), "1") as ticket:
        await ticket.result()
    assert not await desk.turns.cancel_request("org_a", "1")
    with desk.turns.send(desk.ask(thread), "new") as ticket:
        await ticket.result()

    assert len(desk.turns._ended) == 10_000
    assert list(desk.turns._ended)[-2:] == [("org_a", "1"), ("org_a", "new")]
    with pytest.raises(NotFound):
        await desk.turns.cancel_request("org_a", "0")


async def test_cancelling_a_turn_twice_is_cancelling_it_once(held):
    """Idempotent, final, and never touches the next turn."""
    thread = await held.thread()
    caller = asyncio.create_task(held.outcome(thread))
    await held.provider.started.wait()
    turn = await held.threads.active(thread.org_id, thread.id)

    first = await held.threads.cancel_turn(thread.org_id, thread.id, turn.id)
    held.provider.go.set()
    after = await held.post(thread)
    second = await held.threads.cancel_turn(thread.org_id, thread.id, turn.id)

    assert (await caller).code == "turn_cancelled"
    assert (first.state, second.state) == (TurnState.CANCELLED, TurnState.CANCELLED)
    assert after.stored.state is TurnState.COMPLETED


async def test_a_cancel_that_reads_the_row_just_before_the_commit_says_how_the_turn_ended(tmp_path):
    """The row said `streaming`, and by the time that is known the run has gone: the reply is the final state."""
    async with open_desk(tmp_path / "ow.db", ScriptedProvider(held=True), ledger=DisturbedLedger) as desk:
        thread = await desk.thread()
        caller = asyncio.create_task(desk.post(thread))
        await desk.provider.started.wait()
        turn = await desk.threads.active(thread.org_id, thread.id)

        read = desk.ledger.hold_after("turn")
        cancel = asyncio.create_task(desk.threads.cancel_turn(thread.org_id, thread.id, turn.id))
        await read.reached.wait()
        desk.provider.go.set()
        await caller
        await desk.settled()
        read.open.set()

        assert (await cancel).state is TurnState.COMPLETED


async def test_a_cancel_that_comes_before_the_run_has_entered_stops_it(tmp_path):
    """Between the transaction that admits a turn and its run's first step anybody may read and cancel it."""
    async with open_desk(tmp_path / "ow.db", ScriptedProvider(held=True), ledger=DisturbedLedger, poll_s=0.01) as desk:
        thread = await desk.thread()
        admit = desk.ledger.hold_after("admit")
        caller = asyncio.create_task(desk.outcome(thread))
        await admit.reached.wait()
        turn = await desk.threads.active(thread.org_id, thread.id)

        cancel = asyncio.create_task(desk.threads.cancel_turn(thread.org_id, thread.id, turn.id))
        await asyncio.sleep(0.03)
        admit.open.set()

        assert (await cancel).state is TurnState.CANCELLED
        assert (await caller).code == "turn_cancelled"
        await desk.settled()


async def test_a_turn_that_its_process_left_open_can_be_cancelled(tmp_path):
    """Nobody leads it any more: its partial is kept, and it ends as cancelled under the next epoch."""
    async with open_desk(tmp_path / "ow.db") as desk:
        thread = await desk.thread()
        lead = await desk.ledger.admit(
            desk.ask(thread), owner="lost", lease_s=0.05, replay_window_s=30.0, queue_limit=32
        )
        await desk.ledger.beat([Heartbeat(lead.claim, "so far", 2)], lease_s=0.05)

        turn = await desk.threads.cancel_turn(thread.org_id, thread.id, lead.claim.turn_id)

        assert (turn.state, turn.epoch) == (TurnState.CANCELLED, 2)
        assert await desk.messages(thread) == [("user", "Hello"), ("assistant", "so far")]


@pytest.mark.parametrize("on_busy", [OnBusy.INTERRUPT, OnBusy.ROLLBACK])
async def test_an_impatient_message_stops_the_running_turn(tmp_path, on_busy):
    """`interrupt` keeps what was said so far, `rollback` does not; either way the new message runs next."""
    provider = ScriptedProvider(deltas=[f"{number} " for number in range(1000)], gap_s=0.01)
    async with open_desk(tmp_path / "ow.db", provider) as desk:
        thread = await desk.thread()
        first = asyncio.create_task(desk.outcome(thread, "long story"))
        await provider.started.wait()
        await asyncio.sleep(0.05)
        provider.deltas = ["short"]

        result = await desk.post(thread, "stop that", on_busy=on_busy)

        assert (await first).code == "turn_cancelled"
        assert result.stored.assistant_message.content == "short"
        texts = [text for _, text in await desk.messages(thread)]
        assert texts[-2:] == ["stop that", "short"]
        assert len(texts) == (4 if on_busy is OnBusy.INTERRUPT else 2)
        assert [message.content for message in provider.calls[-1].messages] == ["stop that"]
        await desk.settled()


async def test_an_impatient_message_stops_only_the_one_that_runs(held):
    """Those that wait between them keep their places."""
    thread = await held.thread()
    running = asyncio.create_task(held.outcome(thread, "one"))
    await held.provider.started.wait()
    waiting = asyncio.create_task(held.post(thread, "two"))
    await until(lambda: len(held.turns.runs.led) == 2)
    impatient = asyncio.create_task(held.post(thread, "three", on_busy=OnBusy.INTERRUPT))
    assert (await running).code == "turn_cancelled"
    held.provider.go.set()
    await asyncio.gather(waiting, impatient)

    assert [text for role, text in await held.messages(thread) if role == "user"] == ["two", "three"]
    await held.settled()


async def test_the_first_reason_to_stop_is_the_one_that_counts(held):
    """A turn that is rolled back keeps no partial, though somebody cancels it in the same moment."""
    held.provider.deltas, held.provider.gap_s = ["shown", "never"], 0.05
    thread = await held.thread()
    caller = asyncio.create_task(held.outcome(thread))
    await held.provider.started.wait()
    turn = await held.threads.active(thread.org_id, thread.id)
    run = held.turns.runs.of(thread.org_id, turn.id)
    held.provider.go.set()
    while not run.log.deltas:
        await asyncio.sleep(0.005)
    run.stop(TurnCancelled().failure(), keep_partial=False)
    run.stop(LeaderLost().failure(), keep_partial=True)

    assert (await caller).code == "turn_cancelled"
    assert await held.messages(thread) == []


async def test_an_impatient_identical_message_joins(held):
    """The policy is for different messages."""
    thread = await held.thread()
    first = asyncio.create_task(held.post(thread))
    await held.provider.started.wait()
    second = asyncio.create_task(held.post(thread, on_busy=OnBusy.INTERRUPT))
    await asyncio.sleep(0.02)
    held.provider.go.set()

    assert (await first).stored.id == (await second).stored.id


async def test_deleting_a_thread_stops_its_turns_first(held):
    """Running and queued ones."""
    thread = await held.thread()
    callers = [asyncio.create_task(held.outcome(thread, text)) for text in ("one", "two")]
    await held.provider.started.wait()
    await asyncio.sleep(0.02)

    await held.threads.delete(thread.org_id, thread.id)

    assert [(await caller).code for caller in callers] == ["turn_cancelled"] * 2
    with pytest.raises(NotFound):
        await held.threads.get(thread.org_id, thread.id)
    await held.settled()


async def test_a_thread_that_another_process_deletes_leaves_nothing_open(held):
    """Its turns find their rows gone: callers are told that there is no such thing, viewers end where they are."""
    thread = await held.thread()
    callers = [asyncio.create_task(held.outcome(thread, text)) for text in ("one", "two")]
    await held.provider.started.wait()
    turn = await held.threads.active(thread.org_id, thread.id)
    viewer = (await held.threads.watch(turn)).view()
    store = SqlThreadStore(held.database, ids=str)
    await store.delete(thread.org_id, thread.id)
    held.provider.go.set()

    assert [(await caller).code for caller in callers] == ["not_found"] * 2
    assert [chunk async for chunk in viewer] == []
    await held.settled()


async def test_the_text_of_a_running_call_counts_against_the_memory_of_streams(held):
    """Once for the call, and once for each turn that copies it."""
    held.provider.gap_s = 0.05
    thread = await held.thread()
    caller = asyncio.create_task(held.post(thread))
    await held.provider.started.wait()
    held.provider.go.set()
    while not held.calls.logs.stats().bytes:
        await asyncio.sleep(0.005)
        assert not caller.done()
    await caller
    await held.settled()


async def test_a_call_that_is_left_before_its_first_step_leaves_nothing_behind(desk):
    """No log, which nobody would ever close."""
    thread = await desk.thread()
    lead = await desk.ledger.admit(desk.ask(thread), owner="x", lease_s=10.0, replay_window_s=0.0, queue_limit=32)
    request = ChatRequest("scripted", "scripted-1", (ChatMessage("user", "Hello"),), Params())

    waiter, _ = desk.calls.join(thread.org_id, request, lead.claim)
    waiter.leave()

    await desk.settled()
    assert desk.provider.calls == []


@pytest.mark.parametrize("method", ["admit", "history", "record_call"])
async def test_a_database_that_fails_early_costs_no_call(tmp_path, method):
    """503 before any provider call; the next request is served."""
    async with open_desk(tmp_path / "ow.db", ledger=DisturbedLedger) as desk:
        thread = await desk.thread()
        desk.ledger.fail(method, StorageUnavailable())

        error = await desk.outcome(thread)

        assert isinstance(error, OncewiseError)
        assert error.code == "storage_unavailable"
        assert desk.provider.calls == []
        assert (await desk.post(thread)).stored.state is TurnState.COMPLETED
        await desk.settled()


async def test_a_commit_is_tried_again(tmp_path):
    """The answer is paid for: it is not thrown away because the database was away for a moment."""
    async with open_desk(tmp_path / "ow.db", ledger=DisturbedLedger) as desk:
        thread = await desk.thread()
        desk.ledger.fail("commit", StorageUnavailable(), times=2)

        result = await desk.post(thread)

        assert result.stored.assistant_message.content == "pong"
        assert len(desk.provider.calls) == 1
        assert len(await desk.messages(thread)) == 2


async def test_an_answer_that_cannot_be_stored_is_not_told_as_done(tmp_path):
    """`not_persisted` after the patience for commits."""
    async with open_desk(tmp_path / "ow.db", ledger=DisturbedLedger, commit_patience_s=0.2) as desk:
        thread = await desk.thread()
        desk.ledger.fail("commit", StorageUnavailable(), times=99)

        error = await desk.outcome(thread)

        assert isinstance(error, OncewiseError)
        assert error.code == "not_persisted"


async def test_a_pause_of_the_database_does_not_end_a_running_turn(tmp_path):
    """The first delta waits until the turn is marked visible; nobody fails because that took a while."""
    async with open_desk(tmp_path / "ow.db", ledger=DisturbedLedger) as desk:
        desk.ledger.fail("mark_visible", StorageUnavailable(), times=2)
        thread = await desk.thread()
        with desk.turns.send(desk.ask(thread), "r") as ticket:
            await ticket.admitted()
            log = await ticket.watch()
            result = await ticket.result()

        assert b"".join([chunk async for chunk in log.view()]) == b"pong"
        assert result.stored.visible


async def test_a_failure_is_stored_before_it_is_told(tmp_path):
    """Though the database was away for a moment: else the row would end in another way than its callers were told."""
    provider = ScriptedProvider(deltas=["half"])
    provider.failures = [(1, ProviderProtocolError())]
    async with open_desk(tmp_path / "ow.db", provider, ledger=DisturbedLedger) as desk:
        desk.ledger.fail("end", StorageUnavailable(), times=2)
        thread = await desk.thread()

        error = await desk.outcome(thread)

        stored = (await desk.threads.get(thread.org_id, thread.id)).messages[1]
        turn = await desk.ledger.turn(thread.org_id, thread.id, stored.turn_id)
        assert (error.code, turn.failure_code, stored.content) == ("provider_protocol", "provider_protocol", "half")


# -- lost leaders ------------------------------------------------------------------------------------------------


OTHERS = Answer("PONG", FinishReason.STOP, Usage(1, 1), model="m", call_id="c", deltas=1)


async def fenced(desk: Desk, thread: Thread) -> tuple[TurnRun, TurnClaim]:
    """The run of a thread's active turn, and the claim of the owner that took the turn from it."""
    await desk.provider.started.wait()
    turn = await desk.ledger.active(thread.org_id, thread.id)
    run = desk.turns.runs.of(thread.org_id, turn.id)
    await desk.ledger.release(run._claim)
    taken = await desk.ledger.take_over(run._claim, owner="other", lease_s=10.0)
    assert taken is not None
    return run, taken


async def test_a_fenced_leader_serves_what_another_stored(tmp_path):
    """Its own text is discarded: told is stored."""
    async with open_desk(tmp_path / "ow.db", ScriptedProvider(held=True)) as desk:
        thread = await desk.thread()
        caller = asyncio.create_task(desk.post(thread))
        _, taken = await fenced(desk, thread)
        desk.provider.go.set()
        await asyncio.sleep(0.05)

        await desk.ledger.commit(taken, OTHERS)

        assert (await caller).stored.assistant_message.content == "PONG"
        assert await desk.messages(thread) == [("user", "Hello"), ("assistant", "PONG")]


async def test_a_leader_that_is_fenced_twice_still_tells_how_its_turn_ended(tmp_path):
    """By the first delta and by the heartbeat: the second must not interrupt the look at the row."""
    async with open_desk(tmp_path / "ow.db", ScriptedProvider(held=True), lease_s=0.3) as desk:
        thread = await desk.thread()
        with desk.turns.send(desk.ask(thread), "r") as ticket:
            await ticket.admitted()
            log = await ticket.watch()
            run, taken = await fenced(desk, thread)
            run._fence()
            await asyncio.sleep(0.3)  # a heartbeat later

            await desk.ledger.commit(taken, OTHERS)

            assert (await ticket.result()).stored.assistant_message.content == "PONG"
            assert b"".join([chunk async for chunk in log.view()]) == b"PONG"


async def test_what_a_fenced_leader_has_is_shown_to_nobody(tmp_path):
    """Deltas that no viewer had asked for yet, and a viewer that asks after the turn was taken over."""
    async with open_desk(tmp_path / "ow.db", ScriptedProvider(deltas=["po", "ng"], gap_s=0.1)) as desk:
        thread = await desk.thread()
        with desk.turns.send(desk.ask(thread), "r") as ticket:
            run, taken = await fenced(desk, thread)
            while run.log is None or run.log.deltas == 0:
                await asyncio.sleep(0.01)
            watching = asyncio.create_task(ticket.watch())
            await asyncio.sleep(0.05)
            await desk.ledger.end(
                taken, TurnState.FAILED, ProviderError().failure(), partial="PO", partial_seq=1, call_id=None
            )
            log = await watching

            assert b"".join([chunk async for chunk in log.view()]) == b"PO"
            with pytest.raises(ProviderError):
                await ticket.result()


async def test_a_turn_that_outlived_its_lease_is_ended_by_its_owner(tmp_path):
    """The database was away for longer than the lease: nobody took the turn over, so nobody else would end it."""
    async with open_desk(tmp_path / "ow.db", ScriptedProvider(held=True)) as desk:
        thread = await desk.thread()
        caller = asyncio.create_task(desk.outcome(thread))
        await desk.provider.started.wait()
        turn = await desk.ledger.active(thread.org_id, thread.id)

        desk.turns.runs.of(thread.org_id, turn.id)._fence()

        assert (await caller).code == "leader_lost"
        assert (await desk.ledger.turn(thread.org_id, thread.id, turn.id)).state is TurnState.INTERRUPTED


async def test_a_turn_of_a_lost_process_is_taken_over(tmp_path):
    """Leader lost, nothing shown: whoever comes next calls again under the next epoch."""
    async with open_desk(tmp_path / "ow.db", lease_s=0.2) as desk:
        thread = await desk.thread()
        await desk.ledger.admit(desk.ask(thread), owner="lost", lease_s=0.05, replay_window_s=30.0, queue_limit=32)

        result, role = await desk.told(thread)

        assert result.stored.assistant_message.content == "pong"
        assert result.stored.epoch == 2
        assert role in ("leader", "follower")
        assert len(await desk.messages(thread)) == 2


class LastMoment:
    """The real ledger, whose lost owner shows its first text in the moment before it is fenced."""

    def __init__(self, ledger: Any) -> None:
        self._ledger = ledger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ledger, name)

    async def take_over(self, claim: TurnClaim, **owner: Any) -> TurnClaim | None:
        assert await self._ledger.mark_visible(claim)
        return await self._ledger.take_over(claim, **owner)


async def test_text_shown_in_the_last_moment_is_not_replaced(tmp_path):
    """The row is looked at again under the new epoch: the turn is interrupted and nobody is called."""
    async with open_desk(tmp_path / "ow.db", ledger=LastMoment, lease_s=0.2) as desk:
        thread = await desk.thread()
        await desk.ledger.admit(desk.ask(thread), owner="lost", lease_s=0.05, replay_window_s=30.0, queue_limit=32)

        assert (await desk.outcome(thread)).code == "leader_lost"
        assert desk.provider.calls == []


async def test_turns_of_a_lost_process_keep_their_order(tmp_path):
    """Whoever asks first again: the later turn waits for the earlier one, and its prompt holds it."""
    async with open_desk(tmp_path / "ow.db", lease_s=0.2) as desk:
        thread = await desk.thread()
        for content in ("one", "two"):
            await desk.ledger.admit(
                desk.ask(thread, content), owner="lost", lease_s=0.05, replay_window_s=30.0, queue_limit=32
            )
        await asyncio.sleep(0.06)

        later = asyncio.create_task(desk.post(thread, "two"))
        await asyncio.sleep(0.1)
        await desk.post(thread, "one")
        await later

        assert [text for _, text in await desk.messages(thread)] == ["one", "pong", "two", "pong"]
        assert [len(call.messages) for call in desk.provider.calls] == [1, 3]


async def test_shutting_down_hands_a_turn_back(tmp_path):
    """Whoever waits is told to retry; the turn can be taken over at once."""
    async with open_desk(tmp_path / "ow.db", ScriptedProvider(held=True)) as desk:
        thread = await desk.thread()
        caller = asyncio.create_task(desk.outcome(thread))
        await desk.provider.started.wait()

        await desk.turns.aclose(0.05)

        error = await caller
        assert isinstance(error, OncewiseError)
        assert error.code == "shutting_down"
        turn = await desk.ledger.active(thread.org_id, thread.id)
        assert turn.lease_lapsed
        with suppress(OncewiseError):
            await desk.post(thread)
