"""Beats of many turns in few transactions: who goes together, and what each is told when one goes wrong."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from oncewise.errors import StorageFull, StorageUnavailable
from oncewise.model import Heartbeat, TurnClaim
from oncewise.service.heartbeats import AT_ONCE, CHARS_AT_ONCE, Heartbeats
from tests.support.virtual_time import turns, virtual_time

LEASE_S = 9.0


class Ledger:
    """Beats as they come, each answered when the test says so.

    Attributes:
        transactions: What each was asked.
        fenced, busy: Turns of which it says that they are lost, or nothing.
        failures: What the next transactions raise.
    """

    def __init__(self) -> None:
        self.transactions: list[list[str]] = []
        self.fenced: set[str] = set()
        self.busy: set[str] = set()
        self.failures: list[Exception] = []
        self.go = asyncio.Event()

    async def beat(self, beats: Sequence[Heartbeat], *, lease_s: float) -> Mapping[TurnClaim, bool]:
        assert lease_s == LEASE_S
        self.transactions.append([beat.claim.turn_id for beat in beats])
        await self.go.wait()
        if self.failures:
            raise self.failures.pop(0)
        said = [beat.claim for beat in beats if beat.claim.turn_id not in self.busy]
        return {claim: claim.turn_id not in self.fenced for claim in said}


class Turns:
    """Turns that beat, each in a task."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.heartbeats = Heartbeats(self.ledger, lease_s=LEASE_S)

    async def beat(self, *names: str, text: str = "") -> list[asyncio.Task[bool]]:
        beats = [Heartbeat(TurnClaim("acme", "thread", name, 0, 1), text, 0) for name in names]
        tasks = [asyncio.create_task(self.heartbeats.beat(beat)) for beat in beats]
        await turns(3)
        return tasks


async def outcomes(tasks: list[asyncio.Task[bool]]) -> list[Any]:
    """Of each task what it returned, or the class of its error."""
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    return [type(end) if isinstance(end, BaseException) else end for end in ended]


@virtual_time
async def test_a_beat_goes_at_once_and_those_that_come_meanwhile_go_together():
    """The first waits for nobody; the others for one transaction, and not each for one of its own."""
    made = Turns()
    first = await made.beat("a")
    assert made.ledger.transactions == [["a"]]
    later = await made.beat("b", "c", "d")
    assert made.ledger.transactions == [["a"]]
    made.ledger.go.set()

    assert await outcomes(first + later) == [True] * 4
    assert made.ledger.transactions == [["a"], ["b", "c", "d"]]


@virtual_time
async def test_each_turn_is_told_of_its_own_lease():
    """Held, fenced, and a row that was in use: that lease is as it was, which is no loss of it."""
    made = Turns()
    first = await made.beat("first")
    made.ledger.fenced, made.ledger.busy = {"fenced"}, {"busy"}
    rest = await made.beat("held", "fenced", "busy")
    made.ledger.go.set()

    assert await outcomes(first + rest) == [True, True, False, StorageUnavailable]


@virtual_time
async def test_a_transaction_that_fails_is_told_to_its_turns_alone():
    """Those that come after it are asked anew."""
    made = Turns()
    first = await made.beat("a")
    rest = await made.beat("b")
    made.ledger.failures = [StorageFull()]
    made.ledger.go.set()

    assert await outcomes(first + rest) == [StorageFull, True]


@virtual_time
async def test_a_database_that_says_nothing_holds_up_no_later_beat():
    """A connection may be dead while others live. Without an end to waiting all leases would go with it."""
    made = Turns()
    loop = asyncio.get_running_loop()
    first = await made.beat("a")
    rest = await made.beat("b")

    assert await outcomes(first) == [StorageUnavailable]
    assert loop.time() == pytest.approx(LEASE_S / 3)
    made.ledger.go.set()
    assert await outcomes(rest) == [True]


@virtual_time
async def test_no_transaction_is_long():
    """Neither in turns nor in text; a single text that is too long goes alone."""
    made = Turns()
    tasks = await made.beat("first")
    tasks += await made.beat(*(f"{n}" for n in range(AT_ONCE + 1)))
    tasks += await made.beat("long", "too", text="x" * (CHARS_AT_ONCE // 2 + 1))
    tasks += await made.beat("longest", text="x" * (CHARS_AT_ONCE + 1))
    made.ledger.go.set()

    assert all(await outcomes(tasks))
    assert [len(asked) for asked in made.ledger.transactions] == [1, AT_ONCE, 2, 1, 1]
    assert made.ledger.transactions[2:] == [[f"{AT_ONCE}", "long"], ["too"], ["longest"]]


@virtual_time
async def test_who_does_not_wait_any_more_is_left_out():
    """Its turn has ended; the others' answers still come."""
    made = Turns()
    tasks = await made.beat("a")
    gone, stays = await made.beat("gone", "stays")
    gone.cancel()
    made.ledger.go.set()

    assert await outcomes([*tasks, stays]) == [True, True]
    assert made.ledger.transactions == [["a"], ["stays"]]


@pytest.mark.parametrize("failures", [[], [StorageUnavailable()]])
@virtual_time
async def test_who_leaves_while_its_transaction_runs_changes_nothing_for_the_others(failures):
    """An answer that nobody takes is dropped, whether it is one or an error."""
    made = Turns()
    made.ledger.failures = list(failures)
    gone, stays = await made.beat("gone", "stays")
    assert made.ledger.transactions == [["gone", "stays"]]
    gone.cancel()
    await turns(1)
    made.ledger.go.set()

    assert await outcomes([stays]) == [StorageUnavailable if failures else True]


class SlowLedger(Ledger):
    """Answers late: yes once, and then that it is away."""

    async def beat(self, beats: Sequence[Heartbeat], *, lease_s: float) -> Mapping[TurnClaim, bool]:
        self.transactions.append([beat.claim.turn_id for beat in beats])
        await asyncio.sleep(LEASE_S / 4)
        if len(self.transactions) > 1:
            raise StorageUnavailable
        return {beat.claim: True for beat in beats}


@virtual_time
async def test_a_lease_counts_from_when_it_was_asked_for():
    """When the database took it is not known, and from its end on another owner may lead: this one ends before that."""
    heartbeats = Heartbeats(SlowLedger(), lease_s=LEASE_S)
    await heartbeats.keep(TurnClaim("acme", "thread", "a", 0, 1), 0.0, lambda: ("", 0))
    asked_s = LEASE_S / 3
    assert asyncio.get_running_loop().time() == pytest.approx(asked_s + LEASE_S - LEASE_S / 10)


@virtual_time
async def test_closing_ends_what_is_left():
    """A transaction that is under way at the end keeps no worker from ending."""
    made = Turns()
    (left,) = await made.beat("a")
    left.cancel()
    await made.heartbeats.aclose()
    await made.heartbeats.aclose()

    assert asyncio.all_tasks() - {asyncio.current_task(), left} == set()
