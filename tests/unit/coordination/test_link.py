"""The link: pipelines, one time limit, and a breaker that asks by itself."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from oncewise.coordination.link import BATCH, MAX_QUEUED, Link, Script
from oncewise.coordination.wire import Refused, WireFailed
from oncewise.errors import CoordinationUnavailable
from oncewise.ports import CoordinationChanged, CoordinationLate
from tests.support.virtual_time import turns, virtual_time


class FakeWire:
    """Echoes commands; may hang or fail."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.closed = 0
        self.hangs = False
        self.slow_s = 0.001
        self.fails: str | None = None
        self.reply: Callable[[Any], Any] = lambda command: command

    async def ask(self, commands: Any) -> list[Any]:
        self.batches.append(list(commands))
        await asyncio.sleep(self.slow_s)
        if self.hangs:
            await asyncio.Event().wait()
        if self.fails:
            raise WireFailed(self.fails)
        return [self.reply(command) for command in commands]

    async def close(self) -> None:
        self.closed += 1


def linked() -> tuple[FakeWire, Link, list[Any]]:
    wire: Any = FakeWire()
    told: list[Any] = []
    return wire, Link(wire, budget_s=0.25, listener=told.append), told


@virtual_time
async def test_what_is_asked_together_is_sent_together() -> None:
    """One round trip for fifty, and each gets its own reply."""
    wire, link, _ = linked()
    replies = await asyncio.gather(*(link.call("GET", number) for number in range(50)))
    assert replies == [("GET", number) for number in range(50)]
    assert len(wire.batches) <= 2
    await link.aclose()


@virtual_time
async def test_a_caller_that_is_cancelled_leaves_the_others_their_replies() -> None:
    """Its command is sent all the same."""
    wire, link, _ = linked()
    asking = [asyncio.create_task(link.call("GET", number)) for number in range(3)]
    await turns(1)
    asking[1].cancel()
    replies = await asyncio.gather(*asking, return_exceptions=True)
    assert replies[0] == ("GET", 0)
    assert isinstance(replies[1], asyncio.CancelledError)
    assert replies[2] == ("GET", 2)
    assert sum(len(batch) for batch in wire.batches) == 3
    await link.aclose()


@virtual_time
async def test_one_command_waits_for_a_server_that_hangs_and_the_next_are_told_at_once() -> None:
    """A quarter of a second once, not for each."""
    wire, link, told = linked()
    wire.hangs = True
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    results = await asyncio.gather(*(link.call("GET", number) for number in range(5)), return_exceptions=True)
    assert loop.time() - began_s == pytest.approx(0.25)
    assert all(isinstance(result, CoordinationUnavailable) for result in results)
    for _ in range(3):
        with pytest.raises(CoordinationUnavailable):
            await link.call("GET", 1)
    assert loop.time() - began_s == pytest.approx(0.25)
    assert not link.up
    assert told == [CoordinationLate(), CoordinationChanged(up=False, reason="timeout")]
    await link.aclose()


@virtual_time
async def test_who_has_another_way_is_told_that_the_server_is_late() -> None:
    """After a tenth of a second, or at once while it is; the others have their replies, and nothing was away."""
    wire, link, told = linked()
    wire.slow_s = 0.2
    loop = asyncio.get_running_loop()
    patient = asyncio.create_task(link.call("GET", 1))
    await turns(3)
    queued = asyncio.create_task(link.call("GET", 2, hasty=True))
    began_s = loop.time()
    with pytest.raises(CoordinationUnavailable):
        await link.call("GET", 3, hasty=True)
    assert loop.time() - began_s == pytest.approx(0.1)
    with pytest.raises(CoordinationUnavailable):
        await queued
    with pytest.raises(CoordinationUnavailable):
        await link.call("GET", 4, hasty=True)
    assert loop.time() - began_s == pytest.approx(0.1)
    assert (link.late, link.up, told) == (True, True, [CoordinationLate()])
    assert await patient == ("GET", 1)
    assert loop.time() - began_s == pytest.approx(0.2, abs=0.01)
    wire.slow_s = 0.001
    await asyncio.sleep(0.3)
    assert not link.late
    assert await link.call("GET", 5, hasty=True) == ("GET", 5)
    await link.aclose()


@virtual_time
async def test_one_that_was_hasty_may_have_left_when_the_server_is_away() -> None:
    """The reply that it does not wait for any more harms nobody, and neither does the lack of one."""
    wire, link, told = linked()
    wire.hangs = True
    hasty = asyncio.create_task(link.call("GET", 1, hasty=True))
    with pytest.raises(CoordinationUnavailable):
        await link.call("GET", 2)
    with pytest.raises(CoordinationUnavailable):
        await hasty
    assert told == [CoordinationLate(), CoordinationChanged(up=False, reason="timeout")]
    assert not link.late
    await link.aclose()


@virtual_time
async def test_the_link_comes_back_by_itself() -> None:
    """Within half a second of the server, without a request that tries."""
    wire, link, told = linked()
    wire.fails = "ConnectionError"
    with pytest.raises(CoordinationUnavailable):
        await link.call("GET", 1)
    await asyncio.sleep(5.0)
    assert 8 <= len(wire.batches) <= 16
    assert wire.closed >= 8
    wire.fails = None
    await asyncio.sleep(0.6)
    assert link.up
    assert await link.call("GET", 1) == ("GET", 1)
    assert told == [CoordinationChanged(up=False, reason="ConnectionError"), CoordinationChanged(up=True)]
    await link.aclose()


@virtual_time
async def test_a_refusal_concerns_one_command() -> None:
    """Its neighbours are answered, and the link stays up."""
    wire, link, _ = linked()
    wire.reply = lambda command: Refused("OOM") if command[1] == 1 else command
    results = await asyncio.gather(*(link.call("GET", number) for number in range(3)), return_exceptions=True)
    assert (results[0], results[2]) == (("GET", 0), ("GET", 2))
    assert isinstance(results[1], CoordinationUnavailable)
    assert link.up
    await link.aclose()


@pytest.mark.parametrize("code", ["READONLY", "LOADING"])
@virtual_time
async def test_a_server_that_is_no_primary_any_more_is_left(code: str) -> None:
    """The name may lead to another one by now."""
    wire, link, _ = linked()
    wire.reply = lambda _command: Refused(code)
    with pytest.raises(CoordinationUnavailable):
        await link.call("SET", "a", 1)
    assert wire.closed == 1
    await link.aclose()


@virtual_time
async def test_a_script_is_sent_when_the_server_does_not_know_it() -> None:
    """By its digest at first."""
    wire, link, _ = linked()
    script = Script("post")
    wire.reply = lambda command: Refused("NOSCRIPT") if command[0] == "EVALSHA" else b"done"
    assert await link.run(script, ("k",), 1) == b"done"
    assert [batch[0][0] for batch in wire.batches] == ["EVALSHA", "EVAL"]
    assert wire.batches[1][0][1:] == (script.text, 1, "k", 1)
    await link.aclose()


@virtual_time
async def test_closing_tells_everybody_who_waits() -> None:
    """And whoever asks later."""
    wire, link, _ = linked()
    wire.hangs = True
    asking = asyncio.create_task(link.call("GET", 1))
    await turns(3)
    await link.aclose()
    with pytest.raises(CoordinationUnavailable):
        await asking
    with pytest.raises(CoordinationUnavailable):
        await link.call("GET", 1)
    assert wire.closed == 1


@virtual_time
async def test_a_probe_waits_for_an_answer_but_not_for_ever() -> None:
    """At the start of a server, whose first requests should find the link up."""
    wire, link, _ = linked()
    wire.fails = "ConnectionError"
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    await link.probe(1.0)
    await link.probe(1.0)
    assert not link.up
    assert loop.time() - began_s <= 2.0
    loop.call_later(0.3, setattr, wire, "fails", None)
    await link.probe(5.0)
    assert link.up
    assert loop.time() - began_s <= 3.0
    await link.aclose()


@virtual_time
async def test_a_probe_waits_for_a_server_that_is_only_starting() -> None:
    """Its first attempt is refused, and that is not the last word."""
    wire, link, _ = linked()
    wire.fails = "ConnectionError"
    loop = asyncio.get_running_loop()
    loop.call_later(0.3, setattr, wire, "fails", None)
    await link.probe(5.0)
    assert link.up
    assert 0.3 <= loop.time() < 1.0
    await link.aclose()


@virtual_time
async def test_what_is_asked_of_a_server_that_hangs_is_bounded() -> None:
    """Memory must not grow with what many ask in the quarter of a second until that is found out."""
    wire, link, _ = linked()
    wire.hangs = True
    asking = [asyncio.create_task(link.call("GET", number)) for number in range(MAX_QUEUED + BATCH + 10)]
    await turns(2)
    refused = [task for task in asking if task.done()]
    assert 0 < len(refused) <= BATCH + 10
    assert all(isinstance(task.exception(), CoordinationUnavailable) for task in refused)
    await asyncio.gather(*asking, return_exceptions=True)
    await link.aclose()
