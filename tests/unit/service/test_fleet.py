"""What workers tell each other, word by word."""

import asyncio
from typing import Any

import pytest

from oncewise.coordination.memory import World
from oncewise.core.coalesce import Coalescer, Flight, Waiter
from oncewise.core.stream_hub import StreamHub, StreamLog
from oncewise.errors import Failure, FlightCancelled, NotFound, OncewiseError, Overloaded, TurnCancelled
from oncewise.ports import Signal
from oncewise.service.fleet import ASK_S, LAPSE_S, RENEW_S, Fleet
from tests.support.virtual_time import turns, virtual_loop, virtual_time


class Work:
    """Something that is led, in a real flight; its one requester here leaves when the test says so."""

    def __init__(self) -> None:
        self.log: StreamLog = StreamHub().open("key")
        self.flights = Coalescer(deadline_s=None, abandon_after_s=0.0)
        self.go = asyncio.Event()
        self.watched = 0
        self.stops: list[tuple[Failure, bool]] = []
        self.mine: Waiter[str] = self.flights.join("key", self._run)

    async def _run(self, flight: Flight[str]) -> str:
        flight.mark_running()
        await self.go.wait()
        return "done"

    @property
    def requesters(self) -> int:
        return self.mine.flight.waiters

    async def watch(self) -> StreamLog | None:
        self.watched += 1
        return self.log

    def board(self) -> Waiter[Any] | None:
        return self.flights.follow_flight(self.mine.flight)

    def stop(self, failure: Failure, *, keep_partial: bool = True) -> None:
        self.stops.append((failure, keep_partial))
        self.flights.cancel(self.mine.flight, failure)


class Workers:
    """Fleets in one world; the first leads."""

    def __init__(self, number: int = 2) -> None:
        self.world = World()
        self.fleets = [Fleet(b"secret", coordination=self.world.worker(f"w{place}")) for place in range(number)]
        self.work = Work()
        self.name = self.lead.name("turn", "acme", "1")
        self.lead.lead(self.name, self.work)

    @property
    def lead(self) -> Fleet:
        return self.fleets[0]

    async def aclose(self) -> None:
        for fleet in self.fleets:
            await fleet.aclose()


def nothing() -> None:
    return None


@virtual_time
async def test_names_differ_by_tenant_kind_part_and_secret_and_tell_none_of_them() -> None:
    """Equal for all workers of a deployment, and for nobody else."""
    fleet, same, stranger = Fleet(b"secret"), Fleet(b"secret"), Fleet(b"other")
    names = {
        fleet.name("turn", "acme", "1"),
        fleet.name("turn", "globex", "1"),
        fleet.name("call", "acme", "1"),
        fleet.name("turn", "acme", "2"),
        fleet.name("turn", "acme", "1", ""),
        stranger.name("turn", "acme", "1"),
    }
    assert len(names) == 6
    assert fleet.name("turn", "acme", "1") == same.name("turn", "acme", "1")
    assert all(len(name) == 64 and "acme" not in name for name in names)


@virtual_time
async def test_who_holds_elsewhere_counts_here_until_it_lets_go() -> None:
    """Only who holds: one that only looks on does not."""
    workers = Workers()
    following = workers.fleets[1].follow(workers.name, "w0", nothing)
    await turns(5)
    assert workers.work.requesters == 1
    following.hold()
    await turns(5)
    assert workers.work.requesters == 2
    workers.work.mine.leave()
    await asyncio.sleep(30)
    assert workers.work.mine.flight.outcome is None
    following.let_go()
    await turns(5)
    assert isinstance(workers.work.mine.flight.outcome, Failure)
    assert workers.work.mine.flight.outcome.code == FlightCancelled.code
    assert workers.work.stops == []
    following.leave()
    await workers.aclose()


@virtual_time
async def test_a_withdrawal_that_is_the_last_stops_the_work() -> None:
    """It was cancelled and not only left; and it is told as that."""
    workers = Workers()
    following = workers.fleets[1].follow(workers.name, "w0", nothing)
    following.hold()
    await turns(5)
    following.let_go(withdrawn=True)
    await turns(5)
    assert workers.work.stops == []
    following.hold()
    await turns(5)
    workers.work.mine.leave()
    following.let_go(withdrawn=True)
    await turns(5)
    assert [failure.code for failure, _ in workers.work.stops] == [TurnCancelled.code]
    following.leave()
    await workers.aclose()


@virtual_time
async def test_interest_that_is_not_said_again_lapses() -> None:
    """A worker that died keeps nothing alive."""
    workers = Workers()
    following = workers.fleets[1].follow(workers.name, "w0", nothing)
    following.hold()
    await turns(5)
    workers.world.workers["w1"].die()
    await asyncio.sleep(LAPSE_S - 1.0)
    assert workers.work.requesters == 2
    await asyncio.sleep(RENEW_S + 1.0)
    assert workers.work.requesters == 1
    following.leave()
    await workers.aclose()


@virtual_time
async def test_nothing_lapses_while_nothing_can_be_said() -> None:
    """A server that is away for long ends no turn."""
    workers = Workers()
    following = workers.fleets[1].follow(workers.name, "w0", nothing)
    following.hold()
    await turns(5)
    workers.work.mine.leave()
    workers.world.down = True
    await asyncio.sleep(60.0)
    assert workers.work.mine.flight.outcome is None
    workers.world.down = False
    await asyncio.sleep(LAPSE_S + RENEW_S)
    assert workers.work.requesters == 1
    following.leave()
    await workers.aclose()


@virtual_time
async def test_a_log_is_told_while_somebody_wants_it() -> None:
    """From its beginning; not before, and no more after."""
    workers = Workers()
    workers.work.log.append("a")
    await asyncio.sleep(1.0)
    assert (workers.world.logs, workers.work.watched) == ({}, 0)
    copy = StreamHub().open("copy")
    following = workers.fleets[1].follow(workers.name, "w0", nothing)
    following.repeat(copy, lambda epoch: ("reset", {"epoch": epoch}), nothing)
    await turns(10)
    assert copy.text == "a"
    workers.work.log.append("b")
    await asyncio.sleep(0.1)
    assert copy.text == "ab"
    following.leave()
    await turns(5)
    workers.work.log.append("c")
    await asyncio.sleep(1.0)
    assert copy.text == "ab"
    assert workers.world.log(workers.name).tail == (1, 2)
    await workers.aclose()


@virtual_time
async def test_a_fleet_that_closes_tells_what_has_ended_and_then_nothing() -> None:
    """A log that goes on is told no more; one that has ended has a moment to be told."""
    workers = Workers()
    goes_on = Work()
    workers.lead.lead("goes on", goes_on)
    followings = [workers.fleets[1].follow(name, "w0", nothing) for name in (workers.name, "goes on")]
    for following in followings:
        following.repeat(StreamHub().open("copy"), lambda epoch: ("reset", {"epoch": epoch}), nothing)
    await turns(10)
    workers.work.log.append("a")
    workers.work.log.close("done", {})
    await workers.lead.aclose()
    assert followings[0].ending == ("done", {})
    goes_on.log.append("a")
    await asyncio.sleep(1.0)
    assert workers.world.log("goes on").tail == (0, 0)
    for following in followings:
        following.leave()
    await workers.aclose()


@virtual_time
async def test_one_of_two_readers_that_leaves_takes_nothing_from_the_other() -> None:
    """The log is told for as long as anybody wants it."""
    workers = Workers(3)
    copies = [StreamHub().open("copy") for _ in range(2)]
    followings = [fleet.follow(workers.name, "w0", nothing) for fleet in workers.fleets[1:]]
    for following, copy in zip(followings, copies, strict=True):
        following.repeat(copy, lambda epoch: ("reset", {"epoch": epoch}), nothing)
    await turns(10)
    followings[0].leave()
    await turns(5)
    workers.work.log.append("a")
    await asyncio.sleep(0.1)
    assert [copy.text for copy in copies] == ["", "a"]
    followings[1].leave()
    await workers.aclose()


@virtual_time
async def test_followers_are_told_of_the_end_and_late_ones_too() -> None:
    """Whoever asks for work that is led no more hears that."""
    workers = Workers()
    ended: list[str] = []
    following = workers.fleets[1].follow(workers.name, "w0", lambda: ended.append("first"))
    await turns(5)
    other = Work()
    workers.lead.ended(workers.name, other)
    await turns(5)
    assert ended == []
    workers.lead.ended(workers.name, workers.work)
    await turns(5)
    assert ended == ["first"]
    late = workers.fleets[1].follow(workers.name, "w0", lambda: ended.append("late"))
    await turns(5)
    assert "late" in ended
    assert workers.lead.idle
    following.leave()
    late.leave()
    assert workers.fleets[1].idle
    # Kept until here: a flight that the collector finds is an error of its own.
    other.go.set()
    await workers.aclose()


@virtual_time
async def test_work_that_is_stored_nowhere_is_told_to_who_comes_late() -> None:
    """For a moment; then it is gone."""
    workers = Workers()
    workers.work.log.append("a")
    workers.work.log.close("end", {"how": "well"})
    workers.lead.ended(workers.name, workers.work, linger_s=2.0)
    copy = StreamHub().open("copy")
    with workers.fleets[1].follow(workers.name, "w0", nothing) as following:
        following.repeat(copy, lambda epoch: ("reset", {"epoch": epoch}), nothing, closes=False)
        await turns(15)
        assert (copy.text, following.ending, copy.closed) == ("a", ("end", {"how": "well"}), False)
    await asyncio.sleep(2.5)
    assert workers.lead.idle
    await workers.aclose()


@virtual_time
async def test_a_stop_reaches_the_leader_with_what_becomes_of_the_text() -> None:
    """Wherever it comes from; one for other work changes nothing."""
    workers = Workers()
    workers.fleets[1].stop("another name", "w0")
    workers.fleets[1].stop(workers.name, "w0", keep_partial=False)
    await turns(5)
    assert [kept for _, kept in workers.work.stops] == [False]
    await workers.aclose()


@virtual_time
async def test_the_first_answer_counts_and_all_refusals_together() -> None:
    """Nobody waits for a worker that said no, or for one that is not there."""
    workers = Workers(4)
    workers.fleets[2].answer("find", lambda signal: {"place": signal.data["what"]} if signal.name == "x" else None)
    answer = await workers.lead.ask("find", "x", {"what": 7})
    assert (answer["place"], answer["sender"]) == (7, "w2")
    for fleet in workers.fleets[1:]:
        fleet.answer("find", lambda _signal: None)
    with pytest.raises(NotFound):
        await workers.lead.ask("find", "y")
    assert virtual_loop().time() < 0.1
    assert workers.lead.idle or workers.lead._asked == {}
    await workers.aclose()


@virtual_time
async def test_an_answer_that_does_not_come_is_not_waited_for_long() -> None:
    """Nor one of a server that is away."""
    workers = Workers()
    with pytest.raises(NotFound):
        await workers.lead.ask("what nobody knows")
    assert virtual_loop().time() == pytest.approx(ASK_S)
    workers.world.down = True
    with pytest.raises(NotFound):
        await workers.lead.ask("find")
    assert virtual_loop().time() == pytest.approx(ASK_S)
    alone = Fleet(b"secret")
    with pytest.raises(NotFound):
        await alone.ask("find")
    await workers.aclose()


@virtual_time
async def test_what_must_arrive_goes_the_slow_way_when_the_quick_one_is_away() -> None:
    """And only that."""
    quick, slow = World(), World()
    fleets = [
        Fleet(b"secret", coordination=quick.worker(f"w{place}"), slow=slow.worker(f"w{place}").signals)
        for place in range(2)
    ]
    heard: list[str] = []
    fleets[1].hear("word", lambda signal: heard.append(signal.name))
    fleets[0].tell(Signal("word", "1"), "w1")
    fleets[0].tell(Signal("word", "2"), "w1", surely=True)
    await turns(5)
    quick.down = True
    fleets[0].tell(Signal("word", "3"), "w1")
    fleets[0].tell(Signal("word", "4"), None, surely=True)
    await turns(5)
    assert heard == ["1", "2", "4"]
    for fleet in fleets:
        await fleet.aclose()


@virtual_time
async def test_words_nobody_knows_and_work_that_is_full_harm_nobody() -> None:
    """A worker of another version, and a flight at its limit."""
    workers = Workers()

    def full() -> Waiter[Any] | None:
        raise Overloaded

    workers.work.board = full  # type: ignore[method-assign]
    workers.fleets[1].tell(Signal("from the future", workers.name), "w0")
    following = workers.fleets[1].follow(workers.name, "w0", nothing)
    following.hold()
    await turns(5)
    assert workers.work.requesters == 1
    following.leave()
    await workers.aclose()


@virtual_time
async def test_a_fleet_without_others_says_and_keeps_nothing() -> None:
    """One process with SQLite: the same calls, and no effect."""
    fleet, work = Fleet(b"secret"), Work()
    assert (fleet.address, fleet.prompt, fleet.idle) == ("", False, True)
    fleet.lead("n", work)
    fleet.stop("n", "somebody")
    following = fleet.follow("m", "somebody", nothing)
    following.repeat(work.log, lambda epoch: ("reset", {"epoch": epoch}), nothing)
    following.hold()
    following.let_go(withdrawn=True)
    following.leave()
    fleet.ended("n", work)
    assert fleet.idle
    with pytest.raises(OncewiseError):
        await fleet.ask("find")
    await fleet.aclose()


@virtual_time
async def test_what_lingers_does_not_take_the_next_of_its_name_along() -> None:
    """The same call, made again while late followers may still be told of the one before."""
    workers = Workers()
    workers.lead.ended(workers.name, workers.work, linger_s=2.0)
    again = Work()
    workers.lead.lead(workers.name, again)
    await asyncio.sleep(3.0)
    following = workers.fleets[1].follow(workers.name, "w0", nothing)
    following.hold()
    await turns(5)
    assert again.requesters == 2
    following.leave()
    await workers.aclose()


@virtual_time
async def test_what_a_lost_worker_led_has_ended_for_who_follows_it() -> None:
    """Not for those of other workers; and it is remembered for longer than it could hold anything."""
    workers = Workers()
    ended: list[str] = []
    fleet = workers.fleets[1]
    with (
        fleet.follow(workers.name, "w0", lambda: ended.append("w0")),
        fleet.follow("other", "w2", lambda: ended.append("w2")),
    ):
        fleet.owners_lost(frozenset({"w0"}))
        assert ended == ["w0"]
    assert fleet.is_lost("w0")
    assert not fleet.is_lost("w2")
    await asyncio.sleep(21.0)
    assert not fleet.is_lost("w0")
    fleet.owners_lost(frozenset())
    assert fleet._lost == {}
    await workers.aclose()


@virtual_time
async def test_a_log_that_nobody_wants_any_more_when_it_is_there_is_not_told() -> None:
    """To mark a turn visible takes its time, and who asked for its text may have left meanwhile."""
    workers = Workers()
    relay: Any = workers.lead.relay
    told: list[str] = []
    append = relay.append

    async def noting(name: str, *args: Any, **options: Any) -> Any:
        told.append(name)
        return await append(name, *args, **options)

    relay.append = noting
    shown, watch = asyncio.Event(), workers.work.watch

    async def watch_slowly() -> StreamLog | None:
        await shown.wait()
        return await watch()

    workers.work.watch = watch_slowly  # type: ignore[method-assign]
    following = workers.fleets[1].follow(workers.name, "w0", nothing)
    following.repeat(StreamHub().open("copy"), lambda epoch: ("reset", {"epoch": epoch}), nothing)
    await turns(5)
    following.leave()
    await turns(5)
    shown.set()
    workers.work.log.append("a")
    await asyncio.sleep(0.1)
    assert told == []
    await workers.aclose()


@virtual_time
async def test_only_what_must_arrive_goes_through_the_database() -> None:
    """Where there is no quick way, every heartbeat of a follower would be a row."""
    slow = World().worker("me").signals
    sent: list[str] = []

    async def send(signal: Signal, _to: str | None = None) -> None:
        sent.append(signal.kind)

    slow.send = send  # type: ignore[method-assign]
    fleet = Fleet(b"secret", slow=slow)
    with fleet.follow("name", "other", nothing) as following:
        following.hold()
        await asyncio.sleep(10)
        following.let_go(withdrawn=True)
        await turns(5)
    assert sent == ["let_go"]
    await fleet.aclose()


@virtual_time
async def test_an_interest_that_begins_is_told_in_one_word() -> None:
    """That it is there, that requests wait and that the text is wanted."""
    workers = Workers()
    heard: list[Any] = []
    workers.lead.hear("follow", lambda signal: heard.append(dict(signal.data)))
    with workers.fleets[1].follow(workers.name, "w0", nothing) as following:
        following.hold()
        following.repeat(StreamHub().open("copy"), lambda epoch: ("reset", {"epoch": epoch}), nothing)
        await turns(10)
    assert heard == [{"text": True, "holds": True}]
    await workers.aclose()


@virtual_time
async def test_an_interest_that_ends_as_it_begins_is_never_told() -> None:
    """A word after the parting would make the leader count somebody who is gone."""
    workers = Workers()
    with workers.fleets[1].follow(workers.name, "w0", nothing) as following:
        following.hold()
    await turns(10)
    assert workers.work.requesters == 1
    assert workers.lead._led[workers.name].interests == {}
    await workers.aclose()


@virtual_time
async def test_a_letting_go_that_was_lost_is_made_good_by_the_next_word() -> None:
    """Else the work would go on for a worker where nobody waits."""
    workers = Workers()
    following = workers.fleets[1].follow(workers.name, "w0", nothing)
    following.hold()
    await turns(5)
    workers.world.down = True
    following.let_go()
    await turns(5)
    workers.world.down = False
    assert workers.work.requesters == 2
    await asyncio.sleep(RENEW_S + 0.1)
    assert workers.work.requesters == 1
    following.leave()
    await workers.aclose()


@virtual_time
async def test_work_that_is_led_no_more_is_held_by_nobody() -> None:
    """No waiter and no timer of others is left with it."""
    workers = Workers()
    following = workers.fleets[1].follow(workers.name, "w0", nothing)
    following.hold()
    await turns(5)
    (interest,) = workers.lead._led[workers.name].interests.values()
    workers.lead.ended(workers.name, workers.work)
    assert workers.work.requesters == 1
    assert interest.timer is not None
    assert interest.timer.cancelled()
    following.leave()
    await workers.aclose()
