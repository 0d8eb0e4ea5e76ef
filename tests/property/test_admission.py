"""Random histories of two tenants and their threads against the rules of admission as a list of plain records."""

import asyncio
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oncewise.errors import HeadMoved, IdempotencyMismatch, NotFound, OncewiseError, QueueFull, ThreadBusy
from oncewise.model import OnBusy, TurnAsk, TurnClaim, TurnState
from oncewise.ports import Admission, Follow, Lead, Replay
from oncewise.storage.ledger import SqlTurnLedger
from tests.support.storage import ENGINES, LOST, OVERLOADED, REFUSED, Storage, answer, ask, ids

DAY_MS = 86_400_000
WINDOW_MS = 30_000
LEASE_MS = 10_000
QUEUE_LIMIT = 2
PLACES = (("acme", 0), ("acme", 1), ("other", 0), ("other", 1))

# -- the model ---------------------------------------------------------------------------------------------------


@dataclass
class ModelTurn:
    id: str
    idx: int
    fingerprint: str
    key: str | None
    parent: str | None
    created_ms: int
    lease_until_ms: int
    epoch: int = 1
    state: TurnState = TurnState.PENDING
    done_ms: int = 0

    @property
    def open(self) -> bool:
        return not self.state.final


@dataclass
class ModelThread:
    """The rules of `ports.TurnLedger.admit`, told as plainly as they are written there."""

    turns: list[ModelTurn] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def decide(self, asked: TurnAsk, now_ms: int) -> ModelTurn | type[OncewiseError] | None:
        """The turn it belongs to, the error, or None for a new turn."""
        match = self._match(asked, now_ms)
        if match is not None:
            return match
        waiting = sum(turn.open for turn in self.turns)
        if waiting and asked.on_busy is OnBusy.REJECT:
            return ThreadBusy
        return QueueFull if waiting > QUEUE_LIMIT else None

    def _match(self, asked: TurnAsk, now_ms: int) -> ModelTurn | type[OncewiseError] | None:
        same = [turn for turn in self.turns if turn.fingerprint == asked.fingerprint]
        if asked.idempotency_key:
            return self._under_key(asked, same, now_ms)
        if asked.parent_message_id:
            return self._after_parent(asked, same)
        if asked.force_new:
            return None
        completed = [turn for turn in self.turns if turn.state is TurnState.COMPLETED]
        fresh = [turn for turn in completed[-1:] if now_ms - turn.done_ms <= WINDOW_MS]
        candidates = [turn for turn in same if turn.open or turn in fresh]
        return min(candidates, key=lambda turn: (not turn.open, turn.idx), default=None)

    def _under_key(self, asked: TurnAsk, same: list[ModelTurn], now_ms: int) -> ModelTurn | type[OncewiseError] | None:
        for turn in self.turns:
            if turn.key == asked.idempotency_key and now_ms - turn.created_ms < DAY_MS:
                return turn if turn in same else IdempotencyMismatch
        return None

    def _after_parent(self, asked: TurnAsk, same: list[ModelTurn]) -> ModelTurn | type[OncewiseError] | None:
        for turn in same:
            if turn.parent == asked.parent_message_id and (turn.open or turn.state is TurnState.COMPLETED):
                return turn
        return None if self.messages[-1:] == [asked.parent_message_id] else HeadMoved

    def add(self, turn_id: str, asked: TurnAsk, now_ms: int) -> None:
        for turn in self.turns:
            # A key belongs to one turn; an expired one was forgotten on the way.
            turn.key = None if turn.key == asked.idempotency_key else turn.key
        self.turns.append(
            ModelTurn(
                turn_id,
                len(self.turns),
                asked.fingerprint,
                asked.idempotency_key,
                asked.parent_message_id,
                now_ms,
                now_ms + LEASE_MS,
            )
        )


# -- histories ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Admit:
    org: str
    place: tuple[str, int]
    content: str
    key: str | None
    parent: str | None
    force_new: bool
    on_busy: OnBusy


@dataclass(frozen=True)
class End:
    """End the nth turn of a thread, under its epoch or an older one."""

    place: tuple[str, int]
    nth: int
    how: str
    stale: bool


@dataclass(frozen=True)
class TakeOver:
    place: tuple[str, int]
    nth: int


@dataclass(frozen=True)
class Wait:
    ms: int


@dataclass(frozen=True)
class Sweep:
    pass


places = st.sampled_from(PLACES)
# Mostly the plain request in the tenant's own thread; everything else often enough to meet the others.
admits = st.builds(
    lambda place, foreign, **fields: Admit(org="acme" if foreign else place[0], place=place, **fields),
    place=places,
    foreign=st.sampled_from([False] * 9 + [True]),
    content=st.sampled_from(["a", "b"]),
    key=st.sampled_from([None, None, None, "k1", "k2"]),
    parent=st.sampled_from([None, None, None, "head", "first", "foreign"]),
    force_new=st.sampled_from([False, False, False, True]),
    on_busy=st.sampled_from([OnBusy.ENQUEUE, OnBusy.ENQUEUE, OnBusy.ENQUEUE, OnBusy.REJECT]),
)
ends = st.builds(
    End,
    place=places,
    nth=st.integers(0, 3),
    how=st.sampled_from(["commit", "commit", "commit", "overloaded", "refused", "cancelled", "partial"]),
    stale=st.sampled_from([False] * 5 + [True]),
)
waits = st.builds(Wait, st.sampled_from([1, 9_999, 10_000, 29_999, 30_000, 30_001, DAY_MS - 1, DAY_MS]))
histories = st.lists(
    st.one_of(admits, admits, ends, ends, waits, st.builds(TakeOver, places, st.integers(0, 3)), st.just(Sweep())),
    max_size=25,
)


class History:
    """One history on fresh threads: every step is done to both, and both must say the same."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.now_ms = 1_800_000_000_000
        self.ledger = SqlTurnLedger(storage.database, ids=ids, clock=lambda _conn: self.now_ms / 1000)
        self.threads: dict[tuple[str, int], str] = {}
        self.model = {place: ModelThread() for place in PLACES}

    async def run(self, steps: list[Any]) -> None:
        for place in PLACES:
            self.threads[place] = await self.storage.thread(place[0])
        try:
            for step in steps:
                await getattr(self, f"_{type(step).__name__.lower()}")(step)
            for place in PLACES:
                await self._compare(place)
        finally:
            # The next history's sweep must find nothing of this one.
            self.now_ms += LEASE_MS
            await self.ledger.sweep()

    def _parent(self, step: Admit) -> str | None:
        other = self.model[PLACES[(PLACES.index(step.place) + 1) % 4]].messages
        own = self.model[step.place].messages
        candidates = {"head": own[-1:], "first": own[:1], "foreign": other[-1:]}
        return (candidates[step.parent] or ["nothing"])[0] if step.parent else None

    async def _admit(self, step: Admit) -> None:
        thread, model = self.threads[step.place], self.model[step.place]
        asked = ask(
            step.org,
            thread,
            step.content,
            idempotency_key=step.key,
            parent_message_id=self._parent(step),
            force_new=step.force_new,
            on_busy=step.on_busy,
        )
        expected = NotFound if step.org != step.place[0] else model.decide(asked, self.now_ms)
        admission = await self._outcome(asked)
        if isinstance(admission, type):
            assert admission is expected
            return
        if isinstance(admission, Lead):
            assert expected is None
            assert admission.position == sum(turn.open for turn in model.turns)
            assert admission.claim.idx == len(model.turns)
            model.add(admission.claim.turn_id, asked, self.now_ms)
            return
        assert isinstance(expected, ModelTurn)
        assert isinstance(admission, Follow if expected.open else Replay)
        assert (admission.turn.id, admission.turn.org_id) == (expected.id, step.org)

    async def _outcome(self, asked: TurnAsk) -> Admission | type[OncewiseError]:
        rules = {"lease_s": LEASE_MS / 1000, "replay_window_s": WINDOW_MS / 1000, "queue_limit": QUEUE_LIMIT}
        try:
            return await self.ledger.admit(asked, owner="w", **rules)
        except OncewiseError as error:
            return type(error)

    def _nth(self, place: tuple[str, int], nth: int) -> tuple[ModelTurn, TurnClaim] | None:
        turns = self.model[place].turns
        if nth >= len(turns):
            return None
        turn = turns[-1 - nth]
        return turn, TurnClaim(place[0], self.threads[place], turn.id, turn.idx, turn.epoch)

    async def _end(self, step: End) -> None:
        if (found := self._nth(step.place, step.nth)) is None:
            return
        turn, claim = found
        held = replace(claim, epoch=claim.epoch - 1) if step.stale else claim
        state, failure, partial = {
            "commit": (TurnState.COMPLETED, None, ""),
            "overloaded": (TurnState.FAILED, OVERLOADED, ""),
            "refused": (TurnState.FAILED, REFUSED, ""),
            "cancelled": (TurnState.CANCELLED, REFUSED, "par"),
            "partial": (TurnState.INTERRUPTED, LOST, "par"),
        }[step.how]
        if failure is None:
            ended = await self.ledger.commit(held, answer(turn.id))
        else:
            ended = await self.ledger.end(held, state, failure, partial=partial, partial_seq=1, call_id=None)
        assert (ended is not None) == (turn.open and not step.stale)
        if ended is not None:
            self._ended(step.place, turn, state, retryable=failure is not None and failure.retryable)
            if ended.assistant_message is not None:
                self.model[step.place].messages += [ended.user_message.id, ended.assistant_message.id]

    def _ended(self, place: tuple[str, int], turn: ModelTurn, state: TurnState, *, retryable: bool) -> None:
        turn.state, turn.done_ms = state, self.now_ms
        if retryable:
            turn.key = None

    async def _takeover(self, step: TakeOver) -> None:
        if (found := self._nth(step.place, step.nth)) is None:
            return
        turn, claim = found
        taken = await self.ledger.take_over(claim, owner="x", lease_s=LEASE_MS / 1000)
        assert (taken is not None) == (turn.open and turn.lease_until_ms <= self.now_ms)
        if taken is not None:
            turn.epoch, turn.lease_until_ms = taken.epoch, self.now_ms + LEASE_MS

    async def _sweep(self, _step: Sweep) -> None:
        lost = [
            (place, turn)
            for place, thread in self.model.items()
            for turn in thread.turns
            if turn.open and turn.lease_until_ms <= self.now_ms
        ]
        assert await self.ledger.sweep() == len(lost)
        for place, turn in lost:
            self._ended(place, turn, TurnState.INTERRUPTED, retryable=True)
            turn.epoch += 1

    async def _wait(self, step: Wait) -> None:
        self.now_ms += step.ms

    async def _compare(self, place: tuple[str, int]) -> None:
        org, thread = place[0], self.threads[place]
        stored = await self.storage.threads.get(org, thread)
        assert [message.id for message in stored.messages] == self.model[place].messages
        assert [message.sequence for message in stored.messages] == list(range(len(stored.messages)))
        for turn in self.model[place].turns:
            read = await self.ledger.turn(org, thread, turn.id)
            assert (read.state, read.epoch, read.idx) == (turn.state, turn.epoch, turn.idx)
        completed = sum(turn.state is TurnState.COMPLETED for turn in self.model[place].turns)
        assert len(await self.ledger.history(org, thread)) == 2 * completed


@pytest.fixture(scope="module", params=ENGINES)
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Generator[tuple[asyncio.Runner, Storage], None, None]:
    """One loop and one database for all histories: each has threads of its own."""
    with asyncio.Runner() as runner:
        opening = ENGINES[request.param](tmp_path_factory.mktemp("admission"))
        yield runner, runner.run(opening.__aenter__())
        runner.run(opening.__aexit__(None, None, None))


def plain(content: str = "a", key: str | None = None, parent: str | None = None) -> Admit:
    return Admit("acme", PLACES[0], content, key, parent, force_new=False, on_busy=OnBusy.ENQUEUE)


COMMIT = End(PLACES[0], 0, "commit", stale=False)


@settings(max_examples=200, deadline=None)
@given(histories)
@example([plain(), COMMIT, Wait(30_000), plain(), Wait(1), plain()])
@example([plain(key="k1"), COMMIT, Wait(DAY_MS - 1), plain(key="k1"), Wait(1), plain("b", key="k1")])
@example([plain(), COMMIT, plain("b", parent="head"), COMMIT, plain("b", parent="first"), plain("a", parent="first")])
@example([plain(key="k1"), Wait(LEASE_MS), Sweep(), plain(key="k1")])
@example([plain(), Wait(LEASE_MS), TakeOver(PLACES[0], 0), End(PLACES[0], 0, "commit", stale=True), COMMIT])
def test_every_history_is_admitted_as_the_rules_say(world: tuple[asyncio.Runner, Storage], steps: list[Any]):
    """Same decision, same turn, same error at every step; the same turns and messages at the end."""
    runner, storage = world
    runner.run(History(storage).run(steps))
