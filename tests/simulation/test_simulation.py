"""Thousands of histories of a fleet under faults keep every promise, and a fleet with a planted bug is found out."""

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings

from oncewise.model import ChatRequest
from tests.property import test_admission as admission
from tests.simulation.bugs import PLANTED
from tests.simulation.histories import FAULTS, history
from tests.simulation.ledger import Records
from tests.simulation.run import broken, many

SEEDS = 2_000


@pytest.mark.slow
def test_no_history_breaks_a_promise():
    """A sample of what `make simulate` runs."""
    found = [bad for chunk, _ in many(0, SEEDS) for bad in chunk]

    assert found == []


@pytest.mark.parametrize("seed", [7_000_037, 7_000_826, 900_594])
def test_histories_that_broke_a_promise_once(seed: int):
    """A turn was taken over while a viewer here began to look at it: its log was begun under the new epoch already."""
    assert broken(seed) == []


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str):
    """Within two thousand seeds; most within a hundred."""
    assert any(broken(seed, PLANTED[bug]) for seed in range(SEEDS))


def test_everything_happens_that_promises_are_about():
    """What is never tried breaks no promise."""
    counts: Counter[str] = Counter()
    for seed in range(300):
        broken(seed, counts=counts)

    faults = {fault.__name__.strip("_").replace("_", " ") for fault in FAULTS}
    happens = {"entries relayed", "claims", "claims refused", "messages lost", "turns taken over", "turns completed"}
    assert {what for what, times in counts.items() if times} >= faults | happens | {"steps in another order"}


def test_turns_of_several_workers_share_calls():
    """Nor does that go untried: turns are stored with the text of a call that another worker made."""
    shared = 0
    for seed in range(100):
        fleet = history(seed)
        makers = {call.text: call.worker for call in fleet.provider_calls if isinstance(call.request, ChatRequest)}
        answers = [(turn.owner, turn.assistant_message) for turn in fleet.completed()]
        shared += sum(said is not None and makers.get(said.content, owner) != owner for owner, said in answers)
        fleet.tear_down()

    assert shared > 0


def told(seed: int) -> list[Any]:
    fleet = history(seed)
    fleet.tear_down()
    return [(client.tries, client.told) for client in fleet.clients]


@pytest.mark.parametrize("seed", range(20))
def test_a_seed_is_one_history(seed: int):
    """Or a seed in a report would be worth nothing."""
    assert told(seed) == told(seed)


# -- the ledger in memory ----------------------------------------------------------------------------------------


class AsyncRecords:
    """The records as the port has them."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._records, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            return method(*args, **kwargs)

        return call


class RecordsHistory(admission.History):
    """The history that holds the SQL ledger to the rules, on the records."""

    def __init__(self) -> None:
        self.now_ms = 1_800_000_000_000
        records = Records(lambda: self.now_ms / 1000)
        self.ledger = AsyncRecords(records)  # type: ignore[assignment]
        self.threads = {}
        self.model = {place: admission.ModelThread() for place in admission.PLACES}

        async def thread(org_id: str) -> str:
            return records.make_thread(org_id, f"{org_id}-{len(records.threads)}").id

        async def get(org_id: str, thread_id: str) -> Any:
            return records.threads[org_id, thread_id]

        self.storage: Any = SimpleNamespace(thread=thread, threads=SimpleNamespace(get=get))


@settings(max_examples=200, deadline=None)
@given(admission.histories)
def test_the_ledger_in_memory_obeys_the_rules_of_the_real_one(steps: list[Any]):
    """Same decision, same turn, same error at every step; else the simulation would be of something else."""
    asyncio.run(RecordsHistory().run(steps))
