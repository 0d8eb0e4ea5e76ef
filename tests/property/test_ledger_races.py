"""Several processes on one thread at the same moment, whatever they do: no turn twice, no pair twice, no gaps."""

import asyncio
from collections import Counter
from collections.abc import Generator
from contextlib import AsyncExitStack

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oncewise.model import Heartbeat, StoredTurn, TurnClaim, TurnState
from oncewise.ports import Follow, Lead, Replay
from tests.support.storage import ENGINES, LEASE_S, LOST, Storage, answer, ask, beside

WORKERS = 3
Op = tuple[str, int, int]
"""What, by which worker, with which of the messages or claims there are."""

batches = st.lists(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["admit"] * 5 + ["commit"] * 3 + ["end", "take over", "take over", "lapse", "sweep", "beat", "show"]
            ),
            st.integers(0, WORKERS - 1),
            st.integers(0, 3),
        ),
        min_size=1,
        max_size=8,
    ),
    max_size=6,
)


class Race:
    """One thread, and what each worker was told about it."""

    def __init__(self, workers: list[Storage], thread: str) -> None:
        self.workers = workers
        self.thread = thread
        self.claims: list[TurnClaim] = []
        self.answers: dict[str, list[StoredTurn]] = {}
        self.followed: set[str] = set()

    async def run(self, history: list[list[Op]]) -> None:
        for batch in history:
            await asyncio.gather(*(self.act(*op) for op in batch))
        for turn in await self.check():
            # Nothing is left for the next history's sweep.
            if not turn.state.final:
                claim = TurnClaim("acme", self.thread, turn.id, turn.idx, turn.epoch)
                await self.workers[0].ended(claim, TurnState.CANCELLED)

    async def act(self, name: str, worker: int, n: int) -> None:
        if name == "admit":
            await self._admit(worker, n)
        elif name == "sweep":
            await self.workers[worker].ledger.sweep(dead_owners=["worker-9"])
        elif name == "lapse":
            await self.workers[worker].ledger.lapse([f"worker-{n}"])
        elif self.claims:
            await self._under(name, worker, self.claims[-1 - n % len(self.claims)])

    async def _admit(self, worker: int, n: int) -> None:
        storage = self.workers[worker]
        asked = ask("acme", self.thread, "ab"[n % 2], idempotency_key="k" if n == 3 else None)
        match await storage.ledger.admit(asked, owner=storage.owner, **storage.options):
            case Lead(claim, _):
                self.claims.append(claim)
            case Follow(turn) | Replay(turn):
                self.followed.add(turn.id)

    async def _under(self, name: str, worker: int, claim: TurnClaim) -> None:
        ledger, owner = self.workers[worker].ledger, self.workers[worker].owner
        if name == "commit":
            stored = await ledger.commit(claim, answer(f"{claim.turn_id} under {claim.epoch} by {owner}"))
            self._told(claim, stored)
        elif name == "end":
            ended = await ledger.end(claim, TurnState.FAILED, LOST, partial="par", partial_seq=1, call_id=None)
            self._told(claim, ended)
        elif name == "take over":
            taken = await ledger.take_over(claim, owner=owner, lease_s=LEASE_S)
            if taken is not None:
                self.claims.append(taken)
        elif name == "beat":
            await ledger.beat([Heartbeat(claim, "par", 1)], lease_s=LEASE_S)
        else:
            await ledger.mark_visible(claim)

    def _told(self, claim: TurnClaim, stored: StoredTurn | None) -> None:
        if stored is not None:
            # Nobody ends a turn under a claim that another has taken over.
            assert stored.epoch == claim.epoch
            self.answers.setdefault(stored.id, []).append(stored)

    async def check(self) -> list[StoredTurn]:
        """The turns of the thread, after everything that must hold."""
        storage = self.workers[0]
        # One winner for each epoch of each turn, and nobody else was told that his text is the turn's.
        assert len(set(self.claims)) == len(self.claims)
        assert all(len(told) == 1 for told in self.answers.values())
        led = {claim.turn_id: claim.idx for claim in self.claims}
        assert sorted(led.values()) == list(range(len(led)))
        assert self.followed <= led.keys()
        turns = [await storage.ledger.turn("acme", self.thread, turn_id) for turn_id in led]
        for turn in turns:
            epoch = max(claim.epoch for claim in self.claims if claim.turn_id == turn.id)
            # A sweep ends a turn under the next one.
            assert turn.epoch in (epoch, epoch + 1 if turn.state is TurnState.INTERRUPTED else epoch)
            for told in self.answers.get(turn.id, ()):
                assert (told.state, told.epoch, told.assistant_message) == (
                    turn.state,
                    turn.epoch,
                    turn.assistant_message,
                )
        open_ = Counter(turn.fingerprint for turn in turns if not turn.state.final and not turn.ask.idempotency_key)
        assert set(open_.values()) <= {1}
        messages = (await storage.threads.get("acme", self.thread)).messages
        assert [message.sequence for message in messages] == list(range(len(messages)))
        pairs = Counter(message.turn_id for message in messages)
        assert set(pairs.values()) <= {2}
        assert pairs.keys() == {turn.id for turn in turns if turn.assistant_message is not None}
        return turns


@pytest.fixture(scope="module", params=ENGINES)
def workers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Generator[tuple[asyncio.Runner, list[Storage]], None, None]:
    """Several processes' worth of connections to one database, and the loop they live on."""

    async def open_all(opened: AsyncExitStack) -> list[Storage]:
        first = await opened.enter_async_context(ENGINES[request.param](tmp_path_factory.mktemp("races")))
        others = [await opened.enter_async_context(beside(first, f"worker-{n}")) for n in range(2, WORKERS + 1)]
        return [first, *others]

    with asyncio.Runner() as runner:
        opened = AsyncExitStack()
        yield runner, runner.run(open_all(opened))
        runner.run(opened.aclose())


@settings(max_examples=200, deadline=None)
@given(batches)
@example([[("admit", n % 3, 0) for n in range(8)], [("commit", n % 3, 0) for n in range(6)]])
@example(
    [
        [("admit", 0, 0)],
        [("lapse", 0, 1)],
        [("take over", n % 3, 0) for n in range(6)],
        [("commit", 0, 0), ("commit", 1, 1)],
    ]
)
@example(
    [[("admit", 0, 0), ("admit", 1, 1)], [("lapse", 0, 1), ("lapse", 1, 2)], [("sweep", n % 3, 0) for n in range(3)]]
)
def test_whatever_workers_do_at_once_the_thread_is_in_order(
    workers: tuple[asyncio.Runner, list[Storage]], history: list[list[Op]]
):
    """After every history: gapless, paired, told once."""
    runner, storages = workers

    async def race() -> None:
        await Race(storages, await storages[0].thread()).run(history)

    runner.run(race())
