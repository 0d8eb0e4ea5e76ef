"""A name is held by one worker at a time."""

import asyncio


async def test_one_of_many_gets_a_name(fleet):
    """Fifty at once, from two workers: one holder, and all are told who."""
    workers = [await fleet.worker(), await fleet.worker()]

    told = await asyncio.gather(
        *(workers[number % 2].claims.claim("n", f"h{number}", lease_s=30.0) for number in range(50))
    )

    assert len(set(told)) == 1
    assert told[int(told[0][1:])] == told[0]


async def test_a_name_that_was_released_is_free(fleet):
    """At once."""
    worker = await fleet.worker()
    await worker.claims.claim("n", "one", lease_s=30.0)
    await worker.claims.release("n", "one")
    assert await worker.claims.claim("n", "two", lease_s=30.0) == "two"


async def test_nobody_touches_the_claim_of_another(fleet):
    """Neither by releasing it nor by extending it."""
    worker = await fleet.worker()
    await worker.claims.claim("n", "one", lease_s=30.0)
    await worker.claims.release("n", "two")
    assert not await worker.claims.extend("n", "two", lease_s=30.0)
    assert await worker.claims.claim("n", "three", lease_s=30.0) == "one"


async def test_a_claim_lapses_unless_it_is_extended(fleet):
    """A holder that died holds nothing up."""
    worker = await fleet.worker()
    await worker.claims.claim("n", "one", lease_s=0.4)
    await worker.claims.claim("m", "one", lease_s=0.4)
    await asyncio.sleep(0.25)
    assert await worker.claims.extend("n", "one", lease_s=30.0)
    await asyncio.sleep(0.25)

    assert await worker.claims.claim("n", "two", lease_s=30.0) == "one"
    assert await worker.claims.claim("m", "two", lease_s=30.0) == "two"
    assert not await worker.claims.extend("m", "one", lease_s=30.0)


async def test_a_claim_that_was_lost_is_free(fleet):
    """Which costs a second call, and its holder is told when it extends it."""
    worker = await fleet.worker()
    await worker.claims.claim("n", "one", lease_s=30.0)
    await fleet.flush()
    assert not await worker.claims.extend("n", "one", lease_s=30.0)
    assert await worker.claims.claim("n", "two", lease_s=30.0) == "two"
