"""Finished requests, written in batches and read back for figures."""

from dataclasses import replace

from oncewise.model import CostBasis, RequestRecord, Role
from tests.support.storage import Storage

RECORD = RequestRecord(
    request_id="r",
    org_id="acme",
    surface="threads",
    role=Role.LEADER,
    stream=True,
    provider="demo",
    model="small",
    finished_at_ms=1000,
    latency_ms=12.5,
)


def records(*times_ms: int, org_id: str = "acme") -> list[RequestRecord]:
    return [replace(RECORD, request_id=f"r{time}", finished_at_ms=time, org_id=org_id) for time in times_ms]


async def test_a_record_is_read_back_whole(storage: Storage):
    """Every field, null or not."""
    full = replace(
        RECORD,
        role=Role.REPLAYED,
        ttft_ms=1.5,
        queue_wait_ms=0.25,
        prompt_tokens=3,
        completion_tokens=4,
        upstream_calls=2,
        tokens_saved=7,
        cost_usd=0.5,
        cost_saved_usd=0.125,
        error_code="provider_error",
        turn_id="t",
        call_id="c",
        leader_id="r0",
        cost_basis=CostBasis.ESTIMATED,
        usage_estimated=True,
    )
    await storage.requests.record([RECORD, full])

    assert await storage.requests.last(5) == (full, RECORD)


async def test_the_latest_finished_come_first_whenever_they_were_written(storage: Storage):
    """Workers write in batches, late and out of order."""
    await storage.requests.record(records(3, 1))
    await storage.requests.record(records(2, 4))

    assert [record.finished_at_ms for record in await storage.requests.last(3)] == [4, 3, 2]


async def test_a_tenant_sees_its_own_only(storage: Storage):
    """The last n of a tenant, not those of a tenant among the last n of all."""
    await storage.requests.record(records(1, 2) + records(3, 4, 5, org_id="other"))

    assert [record.finished_at_ms for record in await storage.requests.last(2, "acme")] == [2, 1]
    assert await storage.requests.last(2, "nobody") == ()
    assert len(await storage.requests.last(10)) == 5


async def test_no_records_are_no_transaction(storage: Storage):
    """A flush with nothing to say is free."""
    await storage.requests.record([])

    assert await storage.requests.last(1) == ()


async def test_the_largest_figures_there_are_can_be_recorded(storage: Storage):
    """Both counts of a request, and their sum as saved."""
    most = 2**30 - 1
    record = replace(RECORD, prompt_tokens=most, completion_tokens=most, tokens_saved=2 * most, cost_usd=1e300)
    await storage.requests.record([record])

    assert await storage.requests.last(1) == (record,)
