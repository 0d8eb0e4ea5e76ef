"""Two workers in one process on one database: with a quick way between them, and with the database alone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from oncewise.api.sse import SseEncoder
from oncewise.coordination.memory import World
from oncewise.core.stream_hub import Position
from oncewise.errors import LeaderLost, NotFound, OncewiseError, ProviderProtocolError, TurnCancelled
from oncewise.model import OnBusy, OnDisconnect, TurnState
from tests.support.http import Event, read_events
from tests.support.scripted import Desk, ScriptedProvider, open_desk
from tests.support.watching import names, terminal, text_of, until

QUICK, SLOW = "quick", "slow"


@dataclass
class Pair:
    """Two desks; `lead` and `other` share a provider, a database and, if it is there, a world."""

    lead: Desk
    other: Desk
    provider: ScriptedProvider
    world: World | None

    async def settled(self) -> None:
        for desk in (self.lead, self.other):
            await desk.settled()
            await until(lambda desk=desk: not desk.turns.remotes._turns)
            assert desk.fleet._following == {}


@pytest.fixture(params=[QUICK, SLOW])
async def pair(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as opened:
        yield await open_pair(opened, tmp_path, World() if request.param == QUICK else None)


@pytest.fixture
async def quick(tmp_path: Path) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as opened:
        yield await open_pair(opened, tmp_path, World())


async def open_pair(opened: AsyncExitStack, folder: Path, world: World | None, **rules: Any) -> Pair:
    provider = ScriptedProvider(deltas=[f"{number} " for number in range(20)], held=True)
    desks = [
        await opened.enter_async_context(
            open_desk(folder / "ow.db", provider, owner=name, world=world, encoder=SseEncoder(), **rules)
        )
        for name in ("lead", "other")
    ]
    opened.callback(provider.go.set)
    return Pair(*desks, provider, world)


class Sse:
    """One streaming request or viewer on a desk, as its client sees it."""

    def __init__(self, viewer: Any) -> None:
        self.viewer = viewer
        self.raw = b""
        self.task = asyncio.create_task(self._read())

    def push(self, chunk: bytes) -> bool:
        self.raw += chunk
        return True

    async def _read(self) -> None:
        # As a connection: what is published is sent at once, delta by delta.
        self.viewer.push_to(self)
        while not self.viewer.ended:
            await self.viewer.wait(30.0)
            self.raw += self.viewer.take()
        self.viewer.close()

    @property
    def events(self) -> list[Event]:
        return read_events(self.raw)

    async def rest(self) -> list[Event]:
        async with asyncio.timeout(15):
            await self.task
        return self.events


async def post(desk: Desk, thread: Any, content: str = "Hello", **fields: Any) -> Any:
    """A JSON request that has been admitted."""
    task = asyncio.create_task(desk.told(thread, content, **fields))
    await until(lambda: task.done() or desk.turns._tickets)
    return task


async def admitted(desk: Desk, thread: Any) -> str:
    """The id of the turn that runs in a thread."""
    async with asyncio.timeout(10):
        while (turn := await desk.ledger.active(thread.org_id, thread.id)) is None:
            await asyncio.sleep(0.005)
    return turn.id


async def stream(desk: Desk, thread: Any, content: str = "Hello", **fields: Any) -> Sse:
    """A streaming request, as the API makes it."""
    ticket = desk.turns.send(desk.ask(thread, content, **fields), f"r{next(desk.numbers)}")
    ticket.__enter__()
    await ticket.admitted()
    log = await ticket.watch()
    assert log is not None
    ticket.viewer = log.view()
    watched = Sse(ticket.viewer)
    watched.task.add_done_callback(lambda _task: ticket.__exit__(None, None, None))
    return watched


async def look(desk: Desk, thread: Any, turn_id: str, after: Position | None = None) -> Sse:
    """A viewer, as the API makes it."""
    log = await desk.threads.watch(await desk.threads.turn(thread.org_id, thread.id, turn_id))
    assert log is not None
    return Sse(log.view(after))


# -- sharing -----------------------------------------------------------------------------------------------------


async def test_requests_of_two_workers_are_one_turn(pair):
    """Ten each, half before the provider answers."""
    thread = await pair.lead.thread()
    first = await post(pair.lead, thread)
    await admitted(pair.lead, thread)
    rest = [await post(desk, thread) for desk in (pair.lead, pair.other) for _ in range(10)]
    await pair.provider.started.wait()
    pair.provider.go.set()

    told = await asyncio.gather(first, *rest)

    assert len(pair.provider.calls) == 1
    assert {result.stored.assistant_message.content for result, _ in told} == {pair.provider.text}
    assert {role for _, role in told[1:]} <= {"follower", "replayed"}
    assert len(await pair.other.messages(thread)) == 2
    await pair.settled()


async def test_a_follower_hears_of_the_end_at_once(quick):
    """It does not look at the row until then: one reading when it comes, and one a second."""
    thread = await quick.lead.thread()
    leading = await post(quick.lead, thread)
    await admitted(quick.lead, thread)
    following = await post(quick.other, thread)
    await quick.provider.started.wait()
    await asyncio.sleep(0.3)
    loop = asyncio.get_running_loop()
    ended_s = []
    leading.add_done_callback(lambda _task: ended_s.append(loop.time()))
    following.add_done_callback(lambda _task: ended_s.append(loop.time()))

    quick.provider.go.set()
    await asyncio.gather(leading, following)

    assert ended_s[1] - ended_s[0] < 0.2
    await quick.settled()


async def test_a_follower_hears_soon_of_an_end_while_the_quick_way_is_away(quick):
    """Also one that had begun to wait when the way was still there: it looks at the row as soon as that is known."""
    thread = await quick.lead.thread()
    leading = await post(quick.lead, thread)
    await admitted(quick.lead, thread)
    following = await post(quick.other, thread)
    await quick.provider.started.wait()
    await asyncio.sleep(0.05)
    quick.world.down = True
    for desk in (quick.lead, quick.other):
        desk.turns.remotes.look_again()
    loop = asyncio.get_running_loop()
    ended_s = []
    leading.add_done_callback(lambda _task: ended_s.append(loop.time()))
    following.add_done_callback(lambda _task: ended_s.append(loop.time()))

    await asyncio.sleep(0.7)
    quick.provider.go.set()
    await asyncio.gather(leading, following)

    assert ended_s[1] - ended_s[0] < 0.25
    quick.world.down = False
    await quick.settled()


async def test_a_stream_elsewhere_ends_at_once_when_the_quick_way_is_late(quick):
    """Its last words are taken from the row, for those of the relay may never come; also if that is found out late."""
    quick.provider.gap_s = 0.02
    thread = await quick.lead.thread()
    leading = await stream(quick.lead, thread)
    await admitted(quick.lead, thread)
    following = await stream(quick.other, thread)
    remotes = quick.other.turns.remotes
    quick.provider.go.set()
    await until(lambda: len(following.events) > 5)
    # It hangs, and nobody knows: what is said from now on is not heard.
    (remote,) = remotes._turns.values()
    remote._following._mirror.close()

    await leading.rest()
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    await until(lambda: remote.row.state.final)
    remotes.look_again()
    await following.rest()

    assert loop.time() - began_s < 0.15
    assert text_of(following.events) == quick.provider.text
    assert terminal(following.events).raw == terminal(leading.events).raw
    await quick.settled()


async def test_many_turns_that_are_followed_meanwhile_do_not_become_many_queries(quick):
    """Five hundred looks a second, whatever there is to look at."""
    remotes = quick.other.turns.remotes
    assert remotes.look_s(0.4) == 1.0
    quick.world.down = True
    assert remotes.look_s(0.4) == 0.1
    remotes._turns.update({("acme", str(number)): None for number in range(600)})
    assert remotes.look_s(0.4) == 1.2
    remotes._turns.clear()
    quick.world.down = False
    assert remotes.look_s(0.4) == 1.0
    # Told that it came back, it does not yet rely on it: others may not have noticed.
    remotes.look_again()
    assert remotes.look_s(0.4) == 0.1


# -- streams -----------------------------------------------------------------------------------------------------


async def test_a_remote_stream_equals_the_leaders_byte_for_byte(quick):
    """Deltas with their ids, the note at the first token, and the end: a follower, a viewer, and a late one."""
    quick.provider.gap_s = 0.02
    thread = await quick.lead.thread()
    leading = await stream(quick.lead, thread)
    turn_id = await admitted(quick.lead, thread)
    following = await stream(quick.other, thread)
    watching = await look(quick.other, thread, turn_id)
    quick.provider.go.set()
    await until(lambda: len(leading.events) > 8)
    late = await look(quick.other, thread, turn_id)

    for each in (leading, following, watching, late):
        await each.rest()

    assert following.raw == watching.raw == leading.raw
    assert text_of(late.events) == quick.provider.text
    assert late.events[-1].raw == leading.events[-1].raw
    assert len(quick.provider.calls) == 1
    await quick.settled()


async def test_without_a_quick_way_a_stream_is_the_same_text_from_the_row(tmp_path):
    """In larger pieces, and with the same terminal id."""
    async with AsyncExitStack() as opened:
        pair = await open_pair(opened, tmp_path, None, lease_s=0.6)
        pair.provider.gap_s = 0.05
        thread = await pair.lead.thread()
        leading = await stream(pair.lead, thread)
        following = await stream(pair.other, thread)
        pair.provider.go.set()
        await until(lambda: "delta" in names(following.events) or following.task.done())
        before_the_end = not leading.task.done()

        await leading.rest()
        await following.rest()

        assert before_the_end
        assert text_of(following.events) == text_of(leading.events) == pair.provider.text
        assert terminal(following.events).raw == terminal(leading.events).raw
        await pair.settled()


async def test_a_viewer_resumes_on_another_worker_from_every_position(quick):
    """Whatever it saw on the leader: the rest follows, once."""
    thread = await quick.lead.thread()
    leading = await stream(quick.lead, thread)
    turn_id = await admitted(quick.lead, thread)
    held = await look(quick.other, thread, turn_id)
    quick.provider.go.set()
    await leading.rest()
    await held.rest()
    deltas = [event for event in leading.events if event.name == "delta"]

    for seq in range(len(deltas) + 1):
        shown = await look(quick.other, thread, turn_id, Position(1, seq))
        rest = await shown.rest()
        assert "".join(event.data["delta"] for event in deltas[:seq]) + text_of(rest) == quick.provider.text
        assert terminal(rest).id == f"1-{len(deltas) + 1}"
    await quick.settled()


async def test_nothing_is_told_of_a_turn_that_nobody_elsewhere_looks_at(quick):
    """And such a turn is not visible: a lost leader may be replaced."""
    thread = await quick.lead.thread()
    leading = await post(quick.lead, thread)
    turn_id = await admitted(quick.lead, thread)
    following = await post(quick.other, thread)
    quick.provider.go.set()
    await asyncio.gather(leading, following)
    assert quick.world.logs == {}
    assert not (await quick.lead.threads.turn(thread.org_id, thread.id, turn_id)).visible
    await quick.settled()


async def test_a_turn_that_is_looked_at_elsewhere_is_visible_before_its_text_leaves(quick):
    """Shown text is never replaced in silence, wherever it is shown."""
    quick.provider.gap_s = 0.02
    thread = await quick.lead.thread()
    leading = await post(quick.lead, thread)
    turn_id = await admitted(quick.lead, thread)
    quick.provider.go.set()
    await until(lambda: (log := quick.lead.hub.get((thread.org_id, turn_id))) is not None and log.deltas > 3)
    assert not (await quick.lead.threads.turn(thread.org_id, thread.id, turn_id)).visible

    watching = await look(quick.other, thread, turn_id)
    await until(lambda: watching.raw)

    assert (await quick.lead.threads.turn(thread.org_id, thread.id, turn_id)).visible
    await watching.rest()
    assert text_of(watching.events) == quick.provider.text
    await leading
    await quick.settled()


async def test_a_failure_after_some_text_is_the_same_everywhere(quick):
    """The same deltas and one error."""
    quick.provider.failures = [(5, ProviderProtocolError())]
    thread = await quick.lead.thread()
    leading = await stream(quick.lead, thread)
    following = await stream(quick.other, thread)
    answer = await post(quick.other, thread)
    quick.provider.go.set()
    await leading.rest()
    await following.rest()
    with pytest.raises(ProviderProtocolError):
        await answer
    assert following.raw == leading.raw
    assert terminal(following.events).data["code"] == "provider_protocol"
    await quick.settled()


# -- while the quick way is away ---------------------------------------------------------------------------------


async def test_a_stream_goes_on_while_the_relay_is_away_and_catches_up_after(tmp_path):
    """From the row meanwhile; in the end every delta once, at every viewer."""
    async with AsyncExitStack() as opened:
        world = World()
        pair = await open_pair(opened, tmp_path, world, lease_s=0.9)
        pair.provider.deltas = [f"{number} " for number in range(100)]
        pair.provider.gap_s = 0.02
        thread = await pair.lead.thread()
        leading = await stream(pair.lead, thread)
        turn_id = await admitted(pair.lead, thread)
        following = await stream(pair.other, thread)
        pair.provider.go.set()
        await until(lambda: len(following.events) > 5)
        world.down = True
        shown = len(text_of(following.events))
        await until(lambda: len(text_of(following.events)) > shown + 60)
        assert not leading.task.done()
        world.down = False
        late = await look(pair.other, thread, turn_id)

        for each in (leading, following, late):
            await each.rest()

        assert text_of(following.events) == text_of(late.events) == text_of(leading.events) == pair.provider.text
        assert terminal(following.events).raw == terminal(late.events).raw == terminal(leading.events).raw
        ids = [Position.parse(event.id) for event in following.events if event.id]
        assert ids == sorted(set(ids))
        await pair.settled()


async def test_a_turn_ends_well_while_the_relay_stays_away(quick):
    """No request fails, and all are told the same."""
    thread = await quick.lead.thread()
    leading = await stream(quick.lead, thread)
    following = await stream(quick.other, thread)
    answer = await post(quick.other, thread)
    await quick.provider.started.wait()
    quick.world.down = True
    quick.provider.go.set()

    await leading.rest()
    await following.rest()
    result, role = await answer

    assert role == "follower"
    assert result.stored.assistant_message.content == quick.provider.text
    assert text_of(following.events) == quick.provider.text
    assert terminal(following.events).raw == terminal(leading.events).raw
    quick.world.down = False
    await quick.settled()


async def test_a_relay_that_was_emptied_is_filled_again(quick):
    """In the middle of a turn: for viewers that were there, and for those that come."""
    quick.provider.gap_s = 0.03
    thread = await quick.lead.thread()
    leading = await stream(quick.lead, thread)
    turn_id = await admitted(quick.lead, thread)
    following = await stream(quick.other, thread)
    quick.provider.go.set()
    await until(lambda: len(following.events) > 5)
    quick.world.flush()
    await asyncio.sleep(0.1)
    late = await look(quick.other, thread, turn_id)

    for each in (leading, following, late):
        await each.rest()

    assert following.raw == leading.raw
    assert text_of(late.events) == quick.provider.text
    await quick.settled()


# -- leaving and cancelling --------------------------------------------------------------------------------------


async def test_a_turn_is_cancelled_from_any_worker(pair):
    """For everyone, and the provider is left at once."""
    pair.provider.gap_s = 0.05
    thread = await pair.lead.thread()
    leading = await stream(pair.lead, thread)
    turn_id = await admitted(pair.lead, thread)
    following = await post(pair.other, thread)
    pair.provider.go.set()
    await until(lambda: len(leading.events) > 2)
    began_s = asyncio.get_running_loop().time()

    turn = await pair.other.threads.cancel_turn(thread.org_id, thread.id, turn_id)

    took_s = asyncio.get_running_loop().time() - began_s
    assert turn.state is TurnState.CANCELLED
    assert pair.provider.closed_early == 1
    assert took_s < 1.0
    assert terminal(await leading.rest()).data["state"] == "cancelled"
    with pytest.raises(TurnCancelled):
        await following
    await pair.settled()


async def test_a_request_is_withdrawn_from_any_worker(pair):
    """By its id; it ends, and the turn goes on for the others."""
    thread = await pair.lead.thread()
    mine = asyncio.create_task(ask_as(pair.lead, thread, "mine"))
    await admitted(pair.lead, thread)
    other = asyncio.create_task(ask_as(pair.lead, thread, "other"))
    await pair.provider.started.wait()

    assert await pair.other.threads.cancel_request(thread.org_id, "mine")

    with pytest.raises(TurnCancelled):
        await mine
    assert await pair.other.threads.cancel_request(thread.org_id, "mine")
    pair.provider.go.set()
    assert (await other).stored.state is TurnState.COMPLETED
    assert not await pair.other.threads.cancel_request(thread.org_id, "other")
    await pair.settled()


async def ask_as(desk: Desk, thread: Any, request_id: str, **fields: Any) -> Any:
    with desk.turns.send(desk.ask(thread, **fields), request_id) as ticket:
        return await ticket.result()


async def test_a_request_that_nobody_has_is_not_found(pair):
    """Nor one of another tenant; as soon as all have said so."""
    thread = await pair.lead.thread()
    mine = asyncio.create_task(ask_as(pair.lead, thread, "mine"))
    await pair.provider.started.wait()
    began_s = asyncio.get_running_loop().time()
    for org_id, request_id in ((thread.org_id, "none"), ("org_b", "mine")):
        with pytest.raises(NotFound):
            await pair.other.threads.cancel_request(org_id, request_id)
    assert asyncio.get_running_loop().time() - began_s < 1.0
    pair.provider.go.set()
    await mine
    await pair.settled()


async def test_a_worker_that_is_alone_says_so_at_once(tmp_path):
    """Nobody waits for answers of workers that are not there."""
    for world in (None, World()):
        async with open_desk(tmp_path / "ow.db", owner="alone", world=world) as desk:
            began_s = asyncio.get_running_loop().time()
            with pytest.raises(NotFound):
                await desk.threads.cancel_request("org_a", "none")
            assert asyncio.get_running_loop().time() - began_s < 0.2


async def test_the_last_withdrawal_stops_the_turn_wherever_it_is_made(pair):
    """The leader's own request has gone; the one that is left is in the other worker."""
    thread = await pair.lead.thread()
    mine = asyncio.create_task(ask_as(pair.lead, thread, "mine"))
    turn_id = await admitted(pair.lead, thread)
    theirs = asyncio.create_task(ask_as(pair.other, thread, "theirs"))
    await pair.provider.started.wait()
    await asyncio.sleep(0.2)
    mine.cancel()
    await asyncio.sleep(0.05)
    assert pair.provider.running == 1

    assert await pair.other.threads.cancel_request(thread.org_id, "theirs")

    with pytest.raises(TurnCancelled):
        await theirs
    await until(lambda: pair.provider.running == 0)
    async with asyncio.timeout(5):
        while (turn := await pair.lead.threads.turn(thread.org_id, thread.id, turn_id)).state.final is False:
            await asyncio.sleep(0.01)
    assert turn.state is TurnState.CANCELLED
    await pair.settled()


async def test_who_waits_in_another_worker_keeps_a_turn_alive(quick):
    """Its leader's only caller leaves, and would have ended it."""
    thread = await quick.lead.thread()
    mine = asyncio.create_task(ask_as(quick.lead, thread, "mine", on_disconnect=OnDisconnect.CANCEL))
    await admitted(quick.lead, thread)
    theirs = await post(quick.other, thread, on_disconnect=OnDisconnect.CANCEL)
    await quick.provider.started.wait()
    await asyncio.sleep(0.05)

    mine.cancel()
    await asyncio.sleep(0.05)
    quick.provider.go.set()

    result, _ = await theirs
    assert result.stored.state is TurnState.COMPLETED
    assert len(quick.provider.calls) == 1
    await quick.settled()


async def test_who_left_in_another_worker_keeps_nothing_alive(quick):
    """The last one anywhere ends it."""
    thread = await quick.lead.thread()
    mine = asyncio.create_task(ask_as(quick.lead, thread, "mine", on_disconnect=OnDisconnect.CANCEL))
    await admitted(quick.lead, thread)
    theirs = asyncio.create_task(ask_as(quick.other, thread, "theirs", on_disconnect=OnDisconnect.CANCEL))
    await quick.provider.started.wait()
    await asyncio.sleep(0.05)
    mine.cancel()
    await asyncio.sleep(0.05)
    assert quick.provider.running == 1

    theirs.cancel()

    await until(lambda: quick.provider.running == 0)
    await quick.settled()


async def test_a_turn_that_was_abandoned_is_asked_anew_by_who_waits_elsewhere(tmp_path):
    """Its leader knew of nobody: the word was lost. Nobody's request fails for it."""
    async with AsyncExitStack() as opened:
        pair = await open_pair(opened, tmp_path, None)
        thread = await pair.lead.thread()
        mine = asyncio.create_task(ask_as(pair.lead, thread, "mine", on_disconnect=OnDisconnect.CANCEL))
        await admitted(pair.lead, thread)
        theirs = await post(pair.other, thread)
        await pair.provider.started.wait()
        mine.cancel()
        await until(lambda: pair.provider.closed_early == 1)
        pair.provider.go.set()

        result, role = await theirs

        assert (result.stored.state, role) == (TurnState.COMPLETED, "leader")
        assert len(pair.provider.calls) == 2
        assert len(await pair.lead.messages(thread)) == 2
        await pair.settled()


async def test_a_thread_is_deleted_with_turns_that_other_workers_lead(pair):
    """They are cancelled first."""
    thread = await pair.lead.thread()
    mine = asyncio.create_task(ask_as(pair.lead, thread, "mine"))
    await pair.provider.started.wait()

    await pair.other.threads.delete(thread.org_id, thread.id)

    with pytest.raises(TurnCancelled):
        await mine
    with pytest.raises(NotFound):
        await pair.lead.threads.get(thread.org_id, thread.id)
    await pair.settled()


# -- queues ------------------------------------------------------------------------------------------------------


async def test_turns_of_two_workers_run_in_the_order_they_came(pair):
    """Each prompt has what came before; and nobody waits long after the turn before has ended."""
    thread = await pair.lead.thread()
    tasks = []
    for number in range(6):
        desk = (pair.lead, pair.other)[number % 2]
        tasks.append(asyncio.create_task(ask_as(desk, thread, str(number), content=f"q{number}")))
        async with asyncio.timeout(5):
            while not (tasks[-1].done() or len(desk.turns.runs.led) > number // 2):
                await asyncio.sleep(0.002)
    await pair.provider.started.wait()
    began_s = asyncio.get_running_loop().time()
    pair.provider.go.set()

    await asyncio.gather(*tasks)

    assert [content for role, content in await pair.lead.messages(thread) if role == "user"] == [
        f"q{number}" for number in range(6)
    ]
    assert [len(call.messages) for call in pair.provider.calls] == [1, 3, 5, 7, 9, 11]
    if pair.world is not None:
        assert asyncio.get_running_loop().time() - began_s < 1.5
    await pair.settled()


@pytest.mark.parametrize(("on_busy", "kept"), [(OnBusy.INTERRUPT, 4), (OnBusy.ROLLBACK, 2)])
async def test_a_message_makes_way_through_a_turn_of_another_worker(pair, on_busy, kept):
    """With or without what that had said so far."""
    pair.provider.gap_s = 0.05
    thread = await pair.lead.thread()
    running = await stream(pair.lead, thread, "first")
    pair.provider.go.set()
    await until(lambda: "delta" in names(running.events))

    pushing = asyncio.create_task(ask_as(pair.other, thread, "push", content="second", on_busy=on_busy))

    assert terminal(await running.rest()).data["state"] == "cancelled"
    assert (await pushing).stored.state is TurnState.COMPLETED
    assert len(await pair.lead.messages(thread)) == kept
    await pair.settled()


# -- a leader that is lost ---------------------------------------------------------------------------------------


class Pausable:
    """The ledger of a worker that may be paused: nothing it asks for is done until it goes on."""

    def __init__(self, ledger: Any) -> None:
        self._ledger = ledger
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._ledger, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            await self.goes_on.wait()
            return await method(*args, **kwargs)

        return call


@pytest.fixture
async def losing(tmp_path: Path) -> AsyncIterator[Pair]:
    """A pair whose first desk may be paused, and whose leases are short."""
    async with AsyncExitStack() as opened:
        provider = ScriptedProvider(deltas=[f"{number} " for number in range(20)], held=True)
        world = World()
        desks = [
            await opened.enter_async_context(
                open_desk(
                    tmp_path / "ow.db",
                    provider,
                    owner=name,
                    world=world,
                    encoder=SseEncoder(),
                    ledger=wrapper,
                    lease_s=1.2,
                )
            )
            for name, wrapper in (("lead", Pausable), ("other", None))
        ]
        opened.callback(desks[0].ledger.goes_on.set)
        opened.callback(provider.go.set)
        yield Pair(*desks, provider, world)


async def test_a_turn_of_a_lost_leader_is_taken_over_with_its_viewers(losing):
    """Nothing was shown yet: a second call, one stored turn, and the viewer sees it from the start."""
    thread = await losing.lead.thread()
    mine = await post(losing.lead, thread)
    turn_id = await admitted(losing.lead, thread)
    theirs = await post(losing.other, thread)
    watching = await look(losing.other, thread, turn_id)
    await losing.provider.started.wait()
    losing.lead.ledger.goes_on.clear()
    await until(lambda: len(losing.provider.calls) == 2)
    losing.provider.deltas = ["second ", "answer"]
    losing.provider.go.set()

    result, role = await theirs
    shown = await watching.rest()

    assert (result.stored.assistant_message.content, role) == ("second answer", "leader")
    assert result.stored.epoch == 2
    assert text_of(shown) == "second answer"
    assert "reset" not in names(shown)
    assert {event.id[:2] for event in shown if event.id} == {"2-"}
    losing.lead.ledger.goes_on.set()
    told, _ = await mine
    assert told.stored.assistant_message.content == "second answer"
    assert len(await losing.lead.messages(thread)) == 2
    await losing.settled()


async def test_what_was_shown_of_a_lost_leaders_turn_is_not_replaced(losing):
    """Its viewers elsewhere get what was stored of it, and why there is no more."""
    losing.provider.gap_s = 0.05
    losing.provider.deltas = [f"{number} " for number in range(60)]
    thread = await losing.lead.thread()
    mine = await post(losing.lead, thread)
    await admitted(losing.lead, thread)
    theirs = await stream(losing.other, thread)
    losing.provider.go.set()
    await until(lambda: len(theirs.events) > 12)
    losing.lead.ledger.goes_on.clear()

    shown = await theirs.rest()

    end = terminal(shown)
    assert end.data["code"] == "leader_lost"
    assert "reset" in names(shown)
    stored = await losing.other.threads.get(thread.org_id, thread.id)
    assert text_of(shown) == stored.messages[-1].content
    assert losing.provider.text.startswith(text_of(shown))
    assert len(losing.provider.calls) == 1
    losing.lead.ledger.goes_on.set()
    with pytest.raises(LeaderLost):
        await mine
    await losing.settled()


async def test_two_followers_of_a_lost_leader_make_one_call(losing):
    """In one worker, under different identities: one takes over, the other follows it."""
    thread = await losing.lead.thread()
    mine = await post(losing.lead, thread, idempotency_key="k")
    await admitted(losing.lead, thread)
    theirs = [await post(losing.other, thread, idempotency_key="k"), await post(losing.other, thread)]
    await losing.provider.started.wait()
    losing.lead.ledger.goes_on.clear()
    await until(lambda: len(losing.provider.calls) == 2)
    losing.provider.go.set()

    told = await asyncio.gather(*theirs)

    assert len({result.stored.id for result, _ in told}) == 1
    assert len(losing.provider.calls) == 2
    losing.lead.ledger.goes_on.set()
    await mine
    await losing.settled()


async def test_a_server_that_stops_hands_its_turns_to_who_waits(losing):
    """At once, and not when their lease has lapsed."""
    thread = await losing.lead.thread()
    mine = await post(losing.lead, thread)
    await admitted(losing.lead, thread)
    theirs = await post(losing.other, thread)
    await losing.provider.started.wait()
    await asyncio.sleep(0.1)
    losing.provider.go.set()
    losing.provider.delay_s = 0.05
    began_s = asyncio.get_running_loop().time()
    losing.provider.go.clear()
    stopping = asyncio.create_task(losing.lead.turns.aclose(0.0))
    await until(lambda: len(losing.provider.calls) == 2)
    took_s = asyncio.get_running_loop().time() - began_s
    losing.provider.go.set()

    result, role = await theirs

    assert (result.stored.state, role) == (TurnState.COMPLETED, "leader")
    assert took_s < 1.0
    with pytest.raises(OncewiseError):
        await mine
    await stopping


class SlowToTakeOver:
    """A ledger that says late who took a turn over."""

    def __init__(self, ledger: Any) -> None:
        self._ledger = ledger
        self.taken = asyncio.Event()
        self.goes_on = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ledger, name)

    async def take_over(self, claim: Any, **fields: Any) -> Any:
        taken = await self._ledger.take_over(claim, **fields)
        if taken is not None:
            self.taken.set()
            await self.goes_on.wait()
        return taken


async def test_a_viewer_that_comes_while_a_turn_is_taken_over_sees_it(tmp_path):
    """The row is this worker's by then, and nobody leads the turn in it yet."""
    async with AsyncExitStack() as opened:
        provider = ScriptedProvider(deltas=["an ", "answer"], held=True)
        opened.callback(provider.go.set)
        lead, other = [
            await opened.enter_async_context(
                open_desk(tmp_path / "ow.db", provider, owner=name, world=None, ledger=wrapper, lease_s=1.2)
            )
            for name, wrapper in (("lead", Pausable), ("other", SlowToTakeOver))
        ]
        opened.callback(lead.ledger.goes_on.set)
        opened.callback(other.ledger.goes_on.set)
        thread = await lead.thread()
        mine = await post(lead, thread)
        await admitted(lead, thread)
        theirs = await post(other, thread)
        await provider.started.wait()
        lead.ledger.goes_on.clear()
        await other.ledger.taken.wait()
        (remote,) = other.turns.remotes._turns.values()
        remote.look()
        await until(lambda: remote.row.epoch == 2)
        viewer = (await remote.watch()).view()
        other.ledger.goes_on.set()
        provider.go.set()

        assert (await theirs)[0].stored.epoch == 2
        assert b"".join([chunk async for chunk in viewer]).decode() == provider.text
        lead.ledger.goes_on.set()
        await mine
