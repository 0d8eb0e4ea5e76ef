"""The rules of a flight (DESIGN §3), each with a test that fails without it."""

import asyncio
import copy
import gc
import traceback
import weakref
from contextvars import ContextVar
from typing import Any

import pytest

from oncewise.core.coalesce import Coalescer, CoalescerStats, Flight, FlightLanded, Landed, Waiter
from oncewise.core.keys import RequestKey, request_key
from oncewise.errors import (
    Failure,
    FlightCancelled,
    FlightFailed,
    FlightTimeout,
    OncewiseError,
    Overloaded,
    ProviderError,
    ProviderRateLimited,
    ReentrantFlight,
    ShuttingDown,
    TurnCancelled,
    WaitTimeout,
    WrongLoop,
)
from oncewise.model import Role
from tests.support.virtual_time import VirtualTimeLoop, turns, virtual_loop, virtual_time

IDLE = CoalescerStats(flights=0, waiters=0, tasks=0, remembered=0)
TIDY_S = 2.0


class Held:
    """Work that ends when told to; one future for each time it was begun."""

    def __init__(self, *, running: bool = True, tidy_s: float = 0.0) -> None:
        self.begun: list[asyncio.Future[Any]] = []
        self.cancelled = 0
        self.running = running
        self.tidy_s = tidy_s

    async def __call__(self, flight: Flight[Any] | None = None) -> Any:
        end = asyncio.get_running_loop().create_future()
        self.begun.append(end)
        if flight is not None and self.running:
            flight.mark_running()
        try:
            return await end
        except asyncio.CancelledError:
            await asyncio.sleep(self.tidy_s)
            self.cancelled += 1
            raise

    @property
    def calls(self) -> int:
        return len(self.begun)

    def end(self, value: Any, n: int = -1) -> None:
        self.begun[n].set_result(value)

    def fail(self, error: BaseException, n: int = -1) -> None:
        self.begun[n].set_exception(error)


def callers(flights: Coalescer, work: Held, n: int, **kwargs: Any) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(flights.run("key", work, **kwargs)) for _ in range(n)]


async def settled(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    return await asyncio.gather(*tasks, return_exceptions=True)


# -- one call for many -------------------------------------------------------------------------------------------


@virtual_time
async def test_concurrent_identical_requests_cost_one_call() -> None:
    """Ten callers, one call, one leader and nine followers, all with the value (C01)."""
    flights, work = Coalescer(), Held()
    tasks = callers(flights, work, 10)
    await turns(2)
    assert flights.stats() == CoalescerStats(flights=1, waiters=10, tasks=1, remembered=0)
    work.end("pong")
    shared = await settled(tasks)
    assert {each.value for each in shared} == {"pong"}
    assert [each.role for each in shared] == [Role.LEADER] + [Role.FOLLOWER] * 9
    assert work.calls == 1
    assert flights.stats() == IDLE


@virtual_time
async def test_different_keys_do_not_share() -> None:
    """Two tenants with the same parts are two flights (C20)."""
    flights, work = Coalescer(), Held()
    keys = [request_key(tenant, "call", "hello") for tenant in ("acme", "globex")]
    tasks = [asyncio.create_task(flights.run(key, work)) for key in keys]
    await turns(2)
    work.end("for acme", 0)
    work.end("for globex", 1)
    assert [each.value for each in await settled(tasks)] == ["for acme", "for globex"]


@virtual_time
async def test_keys_that_differ_but_collide_in_their_digest_do_not_share() -> None:
    """A forced collision of digests costs a second call and never gives one request the other's answer."""
    flights, work = Coalescer(), Held()
    keys = [RequestKey("acme", "call", parts, digest=lambda _: b"same") for parts in (b"one", b"two")]
    assert keys[0].digest == keys[1].digest
    tasks = [asyncio.create_task(flights.run(key, work)) for key in keys]
    await turns(2)
    work.end("one", 0)
    work.end("two", 1)
    assert [each.value for each in await settled(tasks)] == ["one", "two"]


@virtual_time
async def test_a_request_after_the_landing_starts_anew() -> None:
    """Nothing is replayed: the coalescer shares what is in progress only."""
    flights, work = Coalescer(), Held()
    for answer in ("first", "second"):
        (task,) = callers(flights, work, 1)
        await turns(2)
        work.end(answer)
        assert (await task).value == answer
    assert work.calls == 2


@virtual_time
async def test_follow_joins_what_runs_and_starts_nothing() -> None:
    """`follow` gives None where `join` would lead."""
    flights, work = Coalescer(), Held()
    assert flights.follow("key") is None
    (task,) = callers(flights, work, 1)
    await turns(2)
    waiter = flights.follow("key")
    assert waiter is not None
    with waiter:
        work.end(1)
        assert (waiter.role, await waiter.result()) == (Role.FOLLOWER, 1)
    await task


@virtual_time
async def test_a_flight_is_followed_itself_and_not_its_successor() -> None:
    """While it can be joined; a forgotten, cancelled or landed one cannot, whatever flies under its key."""
    flights, work = Coalescer(), Held()
    with flights.join("key", work) as waiter:
        await turns(2)
        with flights.follow_flight(waiter.flight) as follower:
            assert (follower.role, waiter.flight.waiters) == (Role.FOLLOWER, 2)
        flights.forget("key")
        assert flights.follow_flight(waiter.flight) is None
        with flights.join("key", work) as successor:
            await turns(2)
            assert flights.follow_flight(waiter.flight) is None
            work.end("one", 0)
            work.end("two", 1)
            assert (await waiter.result(), await successor.result()) == ("one", "two")
        assert flights.follow_flight(successor.flight) is None
    assert flights.stats() == IDLE


@virtual_time
async def test_waiters_wake_in_the_order_they_came() -> None:
    """First come, first answered: no order of memory addresses."""
    flights, work, order = Coalescer(), Held(), list[int]()

    async def ask(n: int) -> None:
        await flights.run("key", work)
        order.append(n)

    tasks = [asyncio.create_task(ask(n)) for n in range(50)]
    await turns(2)
    work.end(None)
    await settled(tasks)
    assert order == list(range(50))


# -- rule 1: the table owns the work -----------------------------------------------------------------------------


@virtual_time
@pytest.mark.parametrize("ending", ["value", "error", "dropped", "cancelled", "closed"])
async def test_what_comes_after_a_flight_comes_after_every_ending(ending: str) -> None:
    """Once, with the outcome there to be read; at once if it has landed. Work that never began is no exception."""
    flights, work = Coalescer(), Held()
    waiter: Waiter[Any] = flights.join("key", work)
    seen: list[bool] = []
    waiter.flight.after(lambda: seen.append(waiter.flight.outcome is not None))
    if ending != "dropped":
        await turns()
    if ending == "value":
        work.end(1)
    elif ending == "error":
        work.fail(ProviderError())
    elif ending == "cancelled":
        flights.cancel(waiter.flight, TurnCancelled().failure())
    elif ending == "dropped":
        waiter.leave()
    else:
        await flights.aclose()
    await turns(3)
    assert seen == [True]
    waiter.flight.after(lambda: seen.append(True))
    assert seen == [True, True]


@virtual_time
async def test_the_first_caller_may_leave() -> None:
    """The leader's task is cancelled; the other three get the value of the same call (C07)."""
    flights, work = Coalescer(), Held()
    first, *others = callers(flights, work, 4)
    await turns(2)
    first.cancel()
    await turns(2)
    work.end("pong")
    assert [each.value for each in await settled(others)] == ["pong"] * 3
    assert first.cancelled()
    assert (work.calls, work.cancelled) == (1, 0)


@virtual_time
async def test_a_follower_may_leave() -> None:
    """One cancelled follower is nobody else's business (C08)."""
    flights, work = Coalescer(), Held()
    tasks = callers(flights, work, 4)
    await turns(2)
    tasks[2].cancel()
    await turns(2)
    work.end("pong")
    results = await settled(tasks)
    assert isinstance(results.pop(2), asyncio.CancelledError)
    assert [each.value for each in results] == ["pong"] * 3


@virtual_time
async def test_the_work_sees_no_context_of_a_caller() -> None:
    """Two callers set a variable; the work sees neither value (C19)."""
    tenant: ContextVar[str] = ContextVar("tenant", default="nobody")
    seen = []

    async def work() -> None:
        await asyncio.sleep(1)
        seen.append(tenant.get())

    async def ask(name: str) -> None:
        tenant.set(name)
        await flights.run("key", work)

    flights = Coalescer()
    await asyncio.gather(ask("acme"), ask("globex"))
    assert seen == ["nobody"]


@virtual_time
async def test_the_work_is_no_part_of_a_callers_task_group() -> None:
    """A caller's task group that fails cancels the caller and not the work."""
    flights, work = Coalescer(), Held()

    async def fails() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(flights.run("key", work))
            await turns(2)
            raise LookupError

    failing_caller = asyncio.create_task(fails())
    await turns()
    (other,) = callers(flights, work, 1)
    await asyncio.wait([failing_caller])
    assert isinstance(failing_caller.exception(), ExceptionGroup)
    work.end("pong")
    assert (await other).value == "pong"


@virtual_time
async def test_hanging_work_is_ended_at_the_flights_own_deadline() -> None:
    """Five callers get a timeout at 120 s, the table is empty, the next request starts anew (C14)."""
    flights, work = Coalescer(deadline_s=120.0), Held()
    tasks = callers(flights, work, 5)
    results = await settled(tasks)
    assert {type(each) for each in results} == {FlightTimeout}
    assert virtual_loop().time() == pytest.approx(120.0)
    assert flights.stats() == IDLE
    (task,) = callers(flights, work, 1)
    await turns(2)
    work.end("pong")
    assert (await task).value == "pong"


@virtual_time
async def test_work_that_turns_its_cancellation_into_an_error_still_times_out() -> None:
    """What foreign code makes of being cancelled does not hide that the deadline was the reason."""

    async def work() -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            raise ValueError("gave up") from None

    with pytest.raises(FlightTimeout):
        await Coalescer(deadline_s=1.0).run("key", work)


@virtual_time
async def test_a_timeout_inside_the_work_is_not_the_flights() -> None:
    """Only the flight's own deadline is a `FlightTimeout`; a TimeoutError of the work's own is its failure."""

    async def work() -> None:
        async with asyncio.timeout(1):
            await asyncio.sleep(3600)

    with pytest.raises(FlightFailed) as caught:
        await Coalescer(deadline_s=5.0).run("key", work)
    assert isinstance(caught.value.__cause__, TimeoutError)


@virtual_time
async def test_a_callers_patience_is_its_own() -> None:
    """A follower with 50 ms gets its timeout at 50 ms, the others get the value (C09)."""
    flights = Coalescer()

    async def work() -> str:
        await asyncio.sleep(0.2)
        return "pong"

    patient = [asyncio.create_task(flights.run("key", work, timeout_s=3600.0)) for _ in range(2)]
    await turns()
    with pytest.raises(WaitTimeout):
        await flights.run("key", work, timeout_s=0.05)
    assert virtual_loop().time() == pytest.approx(0.05)
    assert [each.value for each in await settled(patient)] == ["pong"] * 2
    assert virtual_loop().timers() == [], "patience that was not needed leaves nothing"


@virtual_time
async def test_an_answer_that_comes_with_the_end_of_patience_counts() -> None:
    """Work and patience both end at 1 s; the work is first by a hair, and the answer that is there is given."""
    flights = Coalescer()

    async def work() -> str:
        await asyncio.sleep(1.0)
        return "pong"

    first = asyncio.create_task(flights.run("key", work))
    await turns(2)
    assert (await flights.run("key", work, timeout_s=1.0)).value == "pong"
    await first


# -- rule 3: there is always an outcome --------------------------------------------------------------------------


@virtual_time
async def test_an_error_reaches_everyone_and_is_not_kept() -> None:
    """Four callers get the same error from one call; the next request makes a new call (C05)."""
    flights, work = Coalescer(), Held()
    tasks = callers(flights, work, 4)
    await turns(2)
    work.fail(ProviderError("The provider answered 500.", retry_after_s=2.0))
    results = await settled(tasks)
    assert {(type(each), each.detail, each.retry_after_s) for each in results} == {
        (ProviderError, "The provider answered 500.", 2.0)
    }
    assert work.calls == 1
    (task,) = callers(flights, work, 1)
    await turns(2)
    work.end("pong")
    assert (await task).value == "pong"


@virtual_time
async def test_every_caller_gets_an_exception_of_its_own() -> None:
    """Four distinct objects, none of which grows with the number of callers that raise it (C06)."""
    flights, work = Coalescer(), Held()
    tasks = callers(flights, work, 4)
    await turns(2)
    work.fail(LookupError("secret"))
    results = await settled(tasks)
    assert len({id(each) for each in results}) == 4
    assert {type(each) for each in results} == {FlightFailed}
    assert {len(traceback.extract_tb(each.__traceback__)) for each in results} == {2}
    assert {str(each) for each in results} == {"The shared work ended with an unexpected error."}
    assert all(isinstance(each.__cause__, LookupError) for each in results)


@virtual_time
async def test_a_failure_says_itself_whether_a_retry_helps() -> None:
    """`retryable` of the object, not of its class, is what the callers get."""
    flights, work = Coalescer(), Held()
    (task,) = callers(flights, work, 1)
    await turns(2)
    work.fail(ProviderError(retryable=False))
    with pytest.raises(ProviderError) as caught:
        await task
    assert caught.value.retryable is False


@virtual_time
async def test_work_that_is_cancelled_from_inside_is_an_error_and_cancels_nobody() -> None:
    """The work raises CancelledError; three callers get `upstream_cancelled`, no task of theirs is cancelled (C13)."""
    flights, work = Coalescer(), Held()
    tasks = callers(flights, work, 3)
    await turns(2)
    work.fail(asyncio.CancelledError())
    results = await settled(tasks)
    assert {type(each) for each in results} == {FlightCancelled}
    assert not any(task.cancelled() for task in tasks)
    assert flights.stats() == IDLE


class Unusual(BaseException):
    """Not an Exception, as those of some test and task libraries."""


@virtual_time
async def test_even_an_exception_outside_the_usual_tree_is_an_outcome() -> None:
    """`except Exception` would miss it and leave everybody waiting."""
    flights, work = Coalescer(), Held()
    tasks = callers(flights, work, 3)
    await turns(2)
    work.fail(Unusual())
    results = await settled(tasks)
    assert {type(each) for each in results} == {FlightFailed}


@virtual_time
async def test_work_that_fails_before_its_first_await_is_an_outcome() -> None:
    """A plain function that raises when called fails like work that raises later."""

    def work() -> Any:
        raise LookupError

    with pytest.raises(FlightFailed):
        await Coalescer().run("key", work)


@virtual_time
async def test_a_task_cancelled_before_its_first_step_lands() -> None:
    """Nobody waits for ever for work that was never entered."""
    flights, work = Coalescer(), Held()
    waiter = flights.join("key", work)
    flights.cancel(waiter.flight, TurnCancelled().failure())
    assert await waiter.outcome() == TurnCancelled().failure()
    waiter.leave()
    assert (work.calls, flights.stats()) == (0, IDLE)


@virtual_time
async def test_a_foreign_cancel_of_the_task_lands() -> None:
    """Whoever cancels all tasks of the loop, as `asyncio.run` does at its end, leaves no waiter behind."""
    flights, work = Coalescer(), Held()
    me = asyncio.current_task()
    waiter = flights.join("key", work)
    for task in asyncio.all_tasks() - {me}:
        task.cancel()
    with pytest.raises(FlightCancelled):
        await waiter.result()
    waiter.leave()


@virtual_time
async def test_a_value_is_copied_for_each_caller_where_asked() -> None:
    """With `copy`, what one caller does to its answer is not seen by another (C17)."""
    flights, work = Coalescer(copy=copy.deepcopy), Held()
    tasks = callers(flights, work, 2)
    await turns(2)
    work.end({"items": [1]})
    first, second = await settled(tasks)
    first.value["items"].append(2)
    assert second.value == {"items": [1]}


@virtual_time
async def test_without_copy_everyone_gets_the_same_object() -> None:
    """The documented default: values are shared, not copied."""
    flights, work, value = Coalescer(), Held(), object()
    tasks = callers(flights, work, 2)
    await turns(2)
    work.end(value)
    assert all(each.value is value for each in await settled(tasks))


@virtual_time
async def test_an_outcome_can_be_had_without_an_exception() -> None:
    """`outcome` gives the frozen record itself."""
    flights, work = Coalescer(), Held()
    with flights.join("key", work) as waiter:
        await turns(2)
        work.end(7)
        assert await waiter.outcome() == Landed(7)
        assert await waiter.outcome() == Landed(7)


# -- rule 4: landing is one step ---------------------------------------------------------------------------------


@virtual_time
async def test_a_retry_at_the_moment_of_failure_meets_no_dead_flight() -> None:
    """Whoever asks again as soon as it is woken starts new work."""
    flights, work = Coalescer(max_flights=1), Held()

    async def stubborn() -> Any:
        try:
            return await flights.run("key", work)
        except ProviderError:
            return await flights.run("key", work)

    tasks = [asyncio.create_task(stubborn()) for _ in range(3)]
    await turns(2)
    work.fail(ProviderError())
    await turns(4)
    assert work.calls == 2
    work.end("pong")
    assert [each.value for each in await settled(tasks)] == ["pong"] * 3


@virtual_time
async def test_the_key_is_free_before_anyone_is_woken() -> None:
    """At the very moment of the waking the key is free and the outcome set, whatever runs first then."""
    flights, work, seen = Coalescer(), Held(), []
    with flights.join("key", work) as waiter:

        class Woken(asyncio.Future[None]):
            def set_result(self, result: None) -> None:
                seen.append((flights.follow("key"), waiter.flight.outcome))
                super().set_result(result)

        waiter.flight._futures[Woken()] = None
        await turns(2)
        work.end(1)
        await waiter.result()
    assert seen == [(None, Landed(1))]


@pytest.mark.parametrize("fails", [False, True])
@virtual_time
async def test_a_forgotten_flight_that_lands_late_leaves_the_next_alone(fails: bool) -> None:
    """Forget, start B, end A: A's waiters get A, B stays joinable, a third caller joins B (C15)."""
    flights, work = Coalescer(), Held()
    (first,) = callers(flights, work, 1)
    await turns(2)
    flights.forget("key")
    (second,) = callers(flights, work, 1)
    await turns(2)
    if fails:
        work.fail(ProviderError("A"), 0)
    else:
        work.end("A", 0)
    await turns(3)
    (third,) = callers(flights, work, 1)
    await turns(2)
    assert work.calls == 2
    work.end("B", 1)
    assert [(await task).value for task in (second, third)] == ["B", "B"]
    (outcome,) = await settled([first])
    assert str(outcome) == "A" if fails else outcome.value == "A"
    assert flights.stats() == IDLE


@virtual_time
async def test_a_listener_that_raises_leaves_nobody_waiting() -> None:
    """Foreign code runs after everyone was woken; its error is reported to the loop."""

    def listener(_event: object) -> None:
        raise LookupError

    flights, work = Coalescer(listener=listener), Held()
    tasks = callers(flights, work, 2)
    await turns(2)
    work.end("pong")
    assert [each.value for each in await settled(tasks)] == ["pong"] * 2
    assert flights.stats() == IDLE
    del tasks
    await turns(3)
    gc.collect()
    (report,) = virtual_loop().unhandled
    assert isinstance(report["exception"], LookupError)
    virtual_loop().unhandled.clear()


@virtual_time
async def test_a_rule_of_memory_that_raises_leaves_nobody_waiting() -> None:
    """`remember` is foreign code too."""

    def remember(_failure: Failure) -> float:
        raise LookupError

    flights, work = Coalescer(remember=remember), Held()
    (task,) = callers(flights, work, 1)
    await turns(2)
    work.fail(ProviderError())
    with pytest.raises(ProviderError):
        await task
    assert flights.follow("key") is None
    await turns(3)
    gc.collect()
    virtual_loop().unhandled.clear()


@virtual_time
async def test_every_flight_is_reported_once() -> None:
    """The event counts followers, tells abandonment, duration and code, and has no content."""
    events: list[object] = []
    flights, work = Coalescer(listener=events.append), Held()
    tasks = callers(flights, work, 3)
    await asyncio.sleep(1.5)
    work.fail(ProviderError("text of an answer"))
    await settled(tasks)
    with flights.join("other", work):
        await turns(2)
    work.end(None)
    await turns(3)
    assert events == [
        FlightLanded("key", joined=2, abandoned=False, duration_s=pytest.approx(1.5), code="provider_error"),
        FlightLanded("other", joined=0, abandoned=True, duration_s=0.0, code=None),
    ]


# -- rule 5: leaving ---------------------------------------------------------------------------------------------


@virtual_time
async def test_queued_work_is_dropped_with_its_last_waiter() -> None:
    """Work that never said it costs something is cancelled at once (C10)."""
    flights, work = Coalescer(), Held(running=False)
    waiters = [flights.join("key", work) for _ in range(2)]
    await turns(2)
    waiters[0].leave()
    waiters[0].leave()
    await turns(2)
    assert (work.cancelled, flights.stats().waiters) == (0, 1)
    waiters[1].leave()
    await turns(3)
    assert (work.cancelled, flights.stats()) == (1, IDLE)


@virtual_time
async def test_running_work_is_finished_for_nobody() -> None:
    """With the default policy a call that is paid for ends by itself (C11)."""
    flights, work = Coalescer(), Held()
    flights.join("key", work).leave()
    with flights.join("key", work):
        await turns(2)
    await asyncio.sleep(60)
    assert (work.cancelled, flights.stats().tasks) == (0, 1)
    late = flights.follow("key")
    assert late is not None
    work.end("pong")
    assert await late.result() == "pong"
    late.leave()
    assert flights.stats() == IDLE


@virtual_time
async def test_run_counts_as_running_from_its_first_step() -> None:
    """The work of `run` cannot say when it begins to cost, so it does from the start."""
    flights, work = Coalescer(), Held()
    (task,) = callers(flights, work, 1)
    await turns(2)
    task.cancel()
    await asyncio.sleep(60)
    assert (work.cancelled, flights.stats().tasks) == (0, 1)
    work.end(None)
    await turns(2)


@virtual_time
async def test_running_work_is_cancelled_after_its_grace() -> None:
    """With `abandon_after_s` nobody's call ends that many seconds after the last waiter left."""
    flights, work = Coalescer(abandon_after_s=5.0), Held()
    (task,) = callers(flights, work, 1)
    await turns(2)
    task.cancel()
    await asyncio.sleep(4.9)
    assert work.cancelled == 0
    await asyncio.sleep(0.2)
    assert (work.cancelled, flights.stats()) == (1, IDLE)


@virtual_time
async def test_work_that_ends_within_its_grace_leaves_no_timer() -> None:
    """A timer would hold the flight and its value until the grace is over."""
    flights, work = Coalescer(abandon_after_s=60.0), Held()
    with flights.join("key", work):
        await turns(2)
    work.end("pong")
    await turns(2)
    assert virtual_loop().timers() == []


@virtual_time
async def test_a_newcomer_within_the_grace_keeps_the_work() -> None:
    """Joining abandoned work in time stops its clock."""
    flights, work = Coalescer(abandon_after_s=5.0), Held()
    (task,) = callers(flights, work, 1)
    await turns(2)
    task.cancel()
    await asyncio.sleep(4.0)
    (late,) = callers(flights, work, 1)
    await asyncio.sleep(10.0)
    work.end("pong")
    assert (await late).value == "pong"
    assert (work.calls, work.cancelled) == (1, 0)


@virtual_time
async def test_a_flight_may_choose_its_own_grace() -> None:
    """`Flight.abandon_after` speaks for one flight."""
    flights, work = Coalescer(), Held()
    with flights.join("key", work) as waiter:
        await turns(2)
        waiter.flight.abandon_after(1.0)
    await asyncio.sleep(1.1)
    assert (work.cancelled, flights.stats()) == (1, IDLE)


@virtual_time
async def test_a_newcomer_never_joins_work_that_is_being_cancelled() -> None:
    """The key is free before the cancel: while the old work tidies up, a newcomer gets a value of its own (C12)."""
    flights, work = Coalescer(abandon_after_s=0.0), Held(tidy_s=TIDY_S)
    (task,) = callers(flights, work, 1)
    await turns(2)
    task.cancel()
    await asyncio.sleep(0.001)
    assert flights.stats() == CoalescerStats(flights=0, waiters=0, tasks=1, remembered=0)
    (late,) = callers(flights, work, 1)
    await turns(2)
    work.end("pong")
    assert (await late).value == "pong"
    await asyncio.sleep(TIDY_S)
    assert (work.calls, work.cancelled, flights.stats()) == (2, 1, IDLE)


@virtual_time
async def test_a_withdrawn_waiter_gets_its_own_failure_and_nobody_else_does() -> None:
    """`withdraw` ends one interest, in the middle of its wait."""
    flights, work = Coalescer(), Held()
    one, other = (flights.join("key", work) for _ in range(2))
    waits = [asyncio.create_task(waiter.outcome()) for waiter in (one, other)]
    await turns(2)
    one.withdraw(TurnCancelled().failure())
    assert await waits[0] == TurnCancelled().failure()
    assert await one.outcome() == TurnCancelled().failure()
    assert one.flight.waiters == 1
    work.end(1)
    assert await waits[1] == Landed(1)
    other.leave()


@virtual_time
async def test_cancel_ends_a_flight_for_everyone_with_the_given_failure() -> None:
    """An explicit stop is not a disconnect; a second one and one after the landing change nothing."""
    flights, work = Coalescer(), Held()
    tasks = callers(flights, work, 3)
    await turns(2)
    flight = flights.follow("key").flight
    flights.cancel(flight, TurnCancelled().failure())
    flights.cancel(flight, ShuttingDown().failure())
    assert {type(each) for each in await settled(tasks)} == {TurnCancelled}
    flights.cancel(flight, ShuttingDown().failure())
    assert (flight.outcome, work.cancelled) == (TurnCancelled().failure(), 1)


@virtual_time
async def test_cancelled_work_may_still_say_how_it_ended() -> None:
    """What was stored a moment before the cancel came stays true for everyone."""

    async def work(_flight: Flight[str]) -> str:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            return "stored"
        return "never"

    flights = Coalescer()
    with flights.join("key", work) as waiter:
        await turns(2)
        flights.cancel(waiter.flight, TurnCancelled().failure())
        assert await waiter.result() == "stored"


@virtual_time
async def test_an_announcement_wakes_before_the_landing() -> None:
    """Who waits for an announcement hears it at once, later comers without waiting, and the landing is one too."""
    flights, work = Coalescer(), Held()
    with flights.join("key", work) as early, flights.join("key", work) as late:
        hearing = asyncio.create_task(early.announced())
        await turns(2)
        assert not hearing.done()
        early.flight.announce()
        await hearing
        await late.announced()
        assert early.flight.outcome is None
        work.end(None)
    with flights.join("silent", work) as waiter:
        await turns(2)
        work.end(None)
        await waiter.announced()


# -- rule 7: what is remembered ----------------------------------------------------------------------------------


def five_seconds(_failure: Failure) -> float:
    return 5.0


async def failing(flights: Coalescer, work: Held, error: BaseException, key: str = "key") -> None:
    task = asyncio.create_task(flights.run(key, work))
    await turns(2)
    work.fail(error)
    with pytest.raises(OncewiseError):
        await task


@virtual_time
async def test_a_remembered_failure_answers_for_its_time() -> None:
    """Equal requests within five seconds get the failure without a call, as `replayed`; later ones call again."""
    flights, work = Coalescer(remember=five_seconds), Held()
    await failing(flights, work, ProviderRateLimited(retry_after_s=5.0))
    assert flights.stats() == CoalescerStats(flights=0, waiters=0, tasks=0, remembered=1)
    await asyncio.sleep(4.9)
    with flights.join("key", work) as waiter:
        assert waiter.role is Role.REPLAYED
        with pytest.raises(ProviderRateLimited):
            await waiter.result()
    assert work.calls == 1
    await asyncio.sleep(0.2)
    (task,) = callers(flights, work, 1)
    await turns(2)
    assert work.calls == 2
    work.end(None)
    await task


@virtual_time
async def test_values_are_never_remembered() -> None:
    """`remember` is asked about failures only."""
    flights, work = Coalescer(remember=five_seconds), Held()
    (task,) = callers(flights, work, 1)
    await turns(2)
    work.end(None)
    await task
    assert flights.stats() == IDLE


@virtual_time
async def test_a_cancellation_is_never_remembered() -> None:
    """Neither one from inside the work nor one from outside says anything about the request."""
    flights, work = Coalescer(remember=five_seconds), Held()
    await failing(flights, work, asyncio.CancelledError())
    assert flights.stats() == IDLE
    with flights.join("key", work) as waiter:
        await turns(2)
        flights.cancel(waiter.flight, ProviderError().failure())
        await waiter.outcome()
    assert flights.stats() == IDLE


@virtual_time
async def test_a_forgotten_failure_answers_no_more_and_its_end_hits_nobody_else() -> None:
    """Forgetting frees the key; the old expiry leaves the newer memory of the key alone."""
    flights, work = Coalescer(remember=five_seconds), Held()
    await failing(flights, work, ProviderError())
    flights.forget("key")
    await asyncio.sleep(3)
    await failing(flights, work, ProviderError())
    assert work.calls == 2
    await asyncio.sleep(3)
    assert flights.stats().remembered == 1
    await asyncio.sleep(3)
    assert flights.stats() == IDLE


@virtual_time
async def test_a_forgotten_flight_is_not_remembered_over_its_successor() -> None:
    """A failure that lands late must not take the key from the work that runs now."""
    flights, work = Coalescer(remember=five_seconds), Held()
    (first,) = callers(flights, work, 1)
    await turns(2)
    flights.forget("key")
    (second,) = callers(flights, work, 1)
    await turns(2)
    work.fail(ProviderError(), 0)
    await settled([first])
    work.end("B", 1)
    assert (await second).value == "B"


# -- rule 10: bounds ---------------------------------------------------------------------------------------------


@virtual_time
async def test_flights_are_bounded() -> None:
    """At the limit, yes; one above, `Overloaded` with a hint; followers of what runs are still welcome."""
    flights, work = Coalescer(max_flights=2), Held()
    waiters = [flights.join(key, work) for key in "ab"]
    with pytest.raises(Overloaded) as caught:
        flights.join("c", work)
    assert caught.value.retry_after_s == 1.0
    waiters.append(flights.join("a", work))
    await turns(2)
    work.end(None, 0)
    await turns(2)
    waiters.append(flights.join("c", work))
    await turns(2)
    for end in work.begun[1:]:
        end.set_result(None)
    for waiter in waiters:
        await waiter.result()
        waiter.leave()
    assert flights.stats() == IDLE


@virtual_time
async def test_forgotten_flights_count_until_they_end() -> None:
    """Forgetting is no way around the limit: the work still runs."""
    flights, work = Coalescer(max_flights=1), Held()
    with flights.join("key", work) as waiter:
        await turns(2)
        flights.forget("key")
        with pytest.raises(Overloaded):
            flights.join("key", work)
        work.end(None)
        await waiter.result()


@virtual_time
async def test_waiters_are_bounded_per_flight() -> None:
    """At the limit, yes; one above, `Overloaded`; a place that is left is free again."""
    flights, work = Coalescer(max_waiters=2), Held()
    waiters = [flights.join("key", work) for _ in range(2)]
    with pytest.raises(Overloaded):
        flights.join("key", work)
    waiters.pop().leave()
    waiters.append(flights.join("key", work))
    await turns(2)
    work.end(None)
    for waiter in waiters:
        await waiter.result()
        waiter.leave()


@virtual_time
async def test_memory_of_failures_is_bounded_and_keeps_nobody_out() -> None:
    """More failing keys than flights allowed: the surplus is not remembered, new work still starts."""
    flights, work = Coalescer(remember=five_seconds, max_flights=3), Held()
    for n in range(5):
        await failing(flights, work, ProviderError(), key=f"key {n}")
    assert flights.stats().remembered == 3
    assert work.calls == 5
    await asyncio.sleep(5.1)
    assert flights.stats() == IDLE


# -- rule 11: re-entrancy ----------------------------------------------------------------------------------------


@virtual_time
async def test_work_that_asks_for_its_own_key_gets_an_error() -> None:
    """Immediately and typed instead of waiting for itself for ever (C18)."""
    flights = Coalescer()

    async def work() -> Any:
        return await flights.run("key", work)

    with pytest.raises(ReentrantFlight):
        await flights.run("key", work)
    assert flights.stats() == IDLE


@virtual_time
async def test_a_circle_over_two_keys_and_two_tables_is_found() -> None:
    """A waits for B in another table, B asks for A, from a task of its own."""
    ones, others = Coalescer(), Coalescer()

    async def a() -> Any:
        return (await others.run("b", b)).value

    async def b() -> Any:
        return (await asyncio.create_task(ones.run("a", a))).value

    with pytest.raises(ReentrantFlight):
        await ones.run("a", a)
    assert (ones.stats(), others.stats()) == (IDLE, IDLE)


@virtual_time
async def test_shared_parts_are_no_circle() -> None:
    """Two flights may wait for the same third one, which a fourth waits for twice over."""
    flights = Coalescer()

    async def part() -> int:
        await asyncio.sleep(1)
        return 1

    async def half() -> int:
        return (await flights.run("part", part)).value

    async def whole() -> int:
        halves = await asyncio.gather(flights.run("left", half), flights.run("right", half))
        return sum(each.value for each in halves)

    assert (await flights.run("whole", whole)).value == 2


@virtual_time
async def test_the_search_for_a_circle_visits_each_flight_once() -> None:
    """Forty layers of two flights that each wait for both of the next: two to the fortieth ways, eighty flights."""
    flights = Coalescer()

    def layer(n: int) -> Any:
        async def work() -> None:
            if n < 40:
                await asyncio.gather(*(flights.run((n + 1, side), layer(n + 1)) for side in "ab"))
            else:
                await asyncio.sleep(10)

        return work

    first = asyncio.create_task(flights.run((0, "a"), layer(0)))
    await asyncio.sleep(1)

    async def late() -> None:
        await flights.run((0, "a"), layer(0))

    await flights.run("late", late)
    await first


@virtual_time
async def test_a_flight_may_ask_again_for_what_it_left() -> None:
    """Only what a flight waits for now counts."""
    flights = Coalescer()

    async def inner() -> str:
        waiter = flights.join("outer", outer)
        waiter.leave()
        return "never"

    async def outer(_flight: Flight[str] | None = None) -> str:
        try:
            await flights.run("inner", inner)
        except ReentrantFlight:
            return "told"
        return "not told"

    with flights.join("outer", outer) as waiter:
        assert await waiter.result() == "told"
    assert waiter.flight.awaits == []


@virtual_time
async def test_a_deep_chain_is_searched_without_recursion() -> None:
    """Two thousand flights, each waiting for the next, and the last asks for the first."""
    flights = Coalescer()

    def link(n: int) -> Any:
        async def work() -> Any:
            return await flights.run((n + 1) % 2000, link(n + 1))

        return work

    with pytest.raises(ReentrantFlight):
        await flights.run(0, link(0))
    assert flights.stats() == IDLE


# -- closing, loops, leaks ---------------------------------------------------------------------------------------


@virtual_time
async def test_closing_waits_for_what_ends_in_time_and_ends_the_rest() -> None:
    """In the drain no new key starts, followers still join; what is left gets `ShuttingDown`."""
    flights, quick, slow = Coalescer(), Held(), Held()
    done = asyncio.create_task(flights.run("quick", quick))
    cut = asyncio.create_task(flights.run("slow", slow))
    await turns(2)
    closing = asyncio.create_task(flights.aclose(10.0))
    await turns(2)
    with pytest.raises(ShuttingDown):
        flights.join("new", quick)
    follower = asyncio.create_task(flights.run("quick", quick))
    await asyncio.sleep(1)
    quick.end("pong")
    assert [(await task).value for task in (done, follower)] == ["pong"] * 2
    await closing
    assert virtual_loop().time() == pytest.approx(10.0)
    with pytest.raises(ShuttingDown):
        await cut
    assert (slow.cancelled, flights.stats()) == (1, IDLE)
    await flights.aclose()


@virtual_time
async def test_closing_waits_for_work_that_tidies_up_and_cancels_it_once() -> None:
    """Two who close at once do not interrupt the tidying."""
    flights, work = Coalescer(), Held(tidy_s=TIDY_S)
    (task,) = callers(flights, work, 1)
    await turns(2)
    await asyncio.gather(flights.aclose(), flights.aclose(1.0))
    assert work.cancelled == 1
    assert virtual_loop().time() == pytest.approx(TIDY_S)
    with pytest.raises(ShuttingDown):
        await task


@virtual_time
async def test_closing_forgets_what_was_remembered() -> None:
    """A closed table is empty."""
    flights, work = Coalescer(remember=five_seconds), Held()
    await failing(flights, work, ProviderError())
    await flights.aclose()
    assert flights.stats() == IDLE


async def test_a_table_belongs_to_one_loop_at_a_time() -> None:
    """Use from a second running loop is an error, not a wait for ever."""
    flights, work = Coalescer(), Held()
    with flights.join("key", work) as waiter:
        await turns(2)

        def elsewhere() -> None:
            asyncio.run(flights.run("key", work))

        with pytest.raises(WrongLoop):
            await asyncio.to_thread(elsewhere)
        work.end(None)
        await waiter.result()


def test_a_new_loop_starts_with_an_empty_table() -> None:
    """A loop that died in mid-flight leaves nothing that could be joined, and its waiters' ends hurt nobody."""
    flights, work = Coalescer(abandon_after_s=0.0), Held()
    loop = VirtualTimeLoop()
    waiter = loop.run_until_complete(_begin(flights, work))
    loop.close()
    waiter.leave()
    loop = VirtualTimeLoop()
    task = loop.create_task(flights.run("key", work))
    loop.run_until_complete(turns(2))
    work.end("pong")
    assert loop.run_until_complete(task).value == "pong"
    assert flights.stats() == IDLE
    loop.close()


async def _begin(flights: Coalescer, work: Held) -> Waiter[Any]:
    waiter = flights.join("key", work)
    await turns(2)
    # The task would complain of its destruction; what a dying loop says is not under test.
    waiter.flight._task._log_destroy_pending = False
    return waiter


@virtual_time
async def test_an_idle_table_is_empty_and_silent() -> None:
    """After ends of all kinds nothing is held and nothing goes unretrieved (C16)."""
    flights, work = Coalescer(abandon_after_s=0.0, deadline_s=10.0), Held()
    for error in (None, LookupError(), asyncio.CancelledError(), Unusual(), ProviderError()):
        tasks = callers(flights, work, 3)
        await turns(2)
        tasks[1].cancel()
        work.end(None) if error is None else work.fail(error)
        await settled(tasks)
    leaving = callers(flights, work, 3)
    await turns(2)
    for task in leaving:
        task.cancel()
    await settled(leaving)
    await settled(callers(flights, work, 2))
    assert flights.stats() == IDLE
    assert not flights._table
    assert not flights._flying
    assert asyncio.all_tasks() == {asyncio.current_task()}
    del tasks, leaving, error, work
    gc.collect()
    assert virtual_loop().unhandled == []


@virtual_time
async def test_landed_flights_are_freed_without_the_garbage_collector() -> None:
    """No cycle keeps a flight, its task or its value after everyone has left."""

    class Value:
        pass

    flights = Coalescer()

    async def work() -> Value:
        return Value()

    gc.disable()
    try:
        value = weakref.ref((await flights.run("key", work)).value)
        await turns(2)
        assert value() is None
    finally:
        gc.enable()


@virtual_time
async def test_a_waiter_that_left_early_holds_nothing_of_the_flight() -> None:
    """A thousand impatient callers leave no future behind while the work goes on."""
    flights, work = Coalescer(), Held()
    with flights.join("key", work) as patient:
        tasks = callers(flights, work, 1000, timeout_s=0.01)
        assert {type(each) for each in await settled(tasks)} == {WaitTimeout}
        assert (patient.flight.waiters, len(patient.flight._futures)) == (1, 0)
        assert len(virtual_loop().timers()) == 1, "the flight's own deadline"
        work.end(None)
        await patient.result()


@virtual_time
async def test_an_unhashable_key_is_refused_before_anything_starts() -> None:
    """The caller's mistake is the caller's error."""
    flights = Coalescer()
    with pytest.raises(TypeError):
        flights.join([], Held())
    assert flights.stats() == IDLE


class KnowsItsFlight:
    """Work as the services have it: an object that keeps the flight it belongs to."""

    def __init__(self, *, fails: bool) -> None:
        self.fails = fails

    async def __call__(self, flight: Flight[str]) -> str:
        self.flight = flight
        flight.after(self.over)
        if self.fails:
            raise ProviderError
        return "value"

    def over(self) -> None:
        """Told when the flight has landed."""


@pytest.mark.parametrize("fails", [False, True])
async def test_work_that_knows_its_flight_needs_no_collection(fails: bool) -> None:
    """Neither after a good end nor after one that was remembered for a while."""
    gc.collect()
    gc.disable()
    try:
        flights = Coalescer(remember=lambda _failure: 0.01)
        work = KnowsItsFlight(fails=fails)
        gone = weakref.ref(work)
        with flights.join("key", work) as waiter:
            await waiter.outcome()
        del work, waiter
        await asyncio.sleep(0.03)
        flights.stats()  # lets go of what is remembered no longer
        assert gone() is None
        await flights.aclose()
    finally:
        gc.enable()
