"""Words between workers arrive where they were sent, and only there."""

import asyncio

from oncewise.ports import Signal
from tests.support.watching import until

ON_DATABASES_TOO = True


def listening(worker) -> list[Signal]:
    heard: list[Signal] = []
    worker.signals.listen(heard.append)
    return heard


async def test_a_word_to_one_worker_is_heard_by_that_one(fleet):
    """With all it says, and who says it."""
    sender, receiver, other = [await fleet.worker() for _ in range(3)]
    heard, overheard = listening(receiver), listening(other)

    await sender.signals.send(Signal("stop", "turn", data={"keep": True, "n": 3}), receiver.signals.address)

    await until(lambda: heard)
    assert heard == [Signal("stop", "turn", sender.signals.address, {"keep": True, "n": 3})]
    await asyncio.sleep(0.05)
    assert overheard == []


async def test_a_word_to_all_is_heard_by_all_others(fleet):
    """The sender knows already."""
    workers = [await fleet.worker() for _ in range(3)]
    heard = [listening(worker) for worker in workers]

    await workers[0].signals.send(Signal("pause", "openai"))

    await until(lambda: heard[1] and heard[2])
    assert [len(each) for each in heard] == [0, 1, 1]


async def test_words_of_one_sender_keep_their_order(fleet):
    """A hundred of them."""
    sender, receiver = await fleet.worker(), await fleet.worker()
    heard = listening(receiver)

    for number in range(100):
        await sender.signals.send(Signal("count", str(number)), receiver.signals.address)

    await until(lambda: len(heard) == 100)
    assert [signal.name for signal in heard] == [str(number) for number in range(100)]


async def test_what_was_said_before_a_worker_came_is_not_for_it(fleet):
    """It listens to what is said to all from its start on."""
    early = await fleet.worker()
    await early.signals.send(Signal("old"))
    late = await fleet.worker()
    heard = listening(late)

    await early.signals.send(Signal("new"))

    await until(lambda: heard)
    assert [signal.kind for signal in heard] == ["new"]


async def test_a_word_to_nobody_is_lost_in_silence(fleet):
    """Workers come and go."""
    worker = await fleet.worker()
    await worker.signals.send(Signal("hello"), "nobody")


async def test_listening_goes_on_after_everything_was_lost(fleet):
    """A server that was emptied, or started again."""
    sender, receiver = await fleet.worker(), await fleet.worker()
    heard = listening(receiver)
    await sender.signals.send(Signal("one"), receiver.signals.address)
    await until(lambda: heard)

    await fleet.flush()
    await sender.signals.send(Signal("two"), receiver.signals.address)
    await sender.signals.send(Signal("three"))

    await until(lambda: len(heard) == 3)
    assert {signal.kind for signal in heard} == {"one", "two", "three"}


async def test_who_is_alive_is_known(fleet):
    """And who has left is not counted."""
    first = await fleet.worker()
    assert await first.signals.others() == 0
    second = await fleet.worker()
    assert (await first.signals.others(), await second.signals.others()) == (1, 1)
    await second.aclose()
    assert await first.signals.others() == 0
    assert first.signals.prompt is (fleet.backend not in {"sqlite", "postgresql"})
