"""API keys: made, listed, revoked, and counted so that every change shows."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from oncewise.errors import NotFound
from oncewise.model import ApiKey, KeyRole
from tests.support.storage import Storage


async def made(storage: Storage, secret_hash: str = "h1", org_id: str | None = "acme", **fields: KeyRole) -> ApiKey:
    role = fields.get("role", KeyRole.TENANT)
    return await storage.keys.create(role, org_id, prefix="ow_12345678", secret_hash=secret_hash)


async def test_a_new_database_has_no_keys(storage: Storage):
    """Which is what makes a server open."""
    assert await storage.keys.list() == ()
    assert await storage.keys.counts() == (0, 0)


async def test_a_key_is_listed_as_it_was_made(storage: Storage):
    """Whole, and for a tenant that was never heard of before."""
    key = await made(storage)

    assert (key.role, key.org_id, key.prefix, key.revoked_at_ms) == (KeyRole.TENANT, "acme", "ow_12345678", None)
    assert await storage.keys.list() == (key,)
    assert await storage.keys.counts() == (1, 0)


async def test_keys_without_a_tenant_are_kept_too(storage: Storage):
    """Those of operators."""
    keys = [await made(storage, role.value, None, role=role) for role in (KeyRole.ADMIN, KeyRole.METRICS)]

    assert [(key.role, key.org_id) for key in await storage.keys.list()] == [(key.role, None) for key in keys]


async def test_keys_are_listed_oldest_first(storage: Storage):
    """As people made them."""
    keys = []
    for number in range(3):
        storage.clock.advance(1.0)
        keys.append(await made(storage, str(number)))

    assert await storage.keys.list() == tuple(keys)


async def test_a_revoked_key_stays_on_record_with_its_time(storage: Storage):
    """Nothing but the time of its end changes, and the other key not at all."""
    key, other = await made(storage), await made(storage, "h2")
    storage.clock.advance(5.0)

    revoked = await storage.keys.revoke(key.id)

    assert revoked == replace(key, revoked_at_ms=revoked.revoked_at_ms)
    assert revoked.revoked_at_ms is not None
    assert 4_990 <= revoked.revoked_at_ms - key.created_at_ms <= 8_000
    assert set(await storage.keys.list()) == {revoked, other}
    assert await storage.keys.counts() == (2, 1)


async def test_revoking_twice_keeps_the_first_time(storage: Storage):
    """A repeated request is answered the same."""
    key = await made(storage)
    once = await storage.keys.revoke(key.id)
    storage.clock.advance(5.0)

    assert await storage.keys.revoke(key.id) == once
    assert await storage.keys.counts() == (1, 1)


async def test_a_key_that_is_not_there_cannot_be_revoked(storage: Storage):
    """And nothing else is."""
    key = await made(storage)

    with pytest.raises(NotFound):
        await storage.keys.revoke("nobody")
    assert await storage.keys.list() == (key,)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda storage: made(storage, org_id=None), id="a tenant key without a tenant"),
        pytest.param(lambda storage: made(storage, role=KeyRole.ADMIN), id="an admin key of a tenant"),
        pytest.param(lambda storage: made(storage, "taken"), id="one secret for two keys"),
    ],
)
async def test_the_database_itself_refuses_a_key_that_cannot_be(storage: Storage, wrong: Callable[..., object]):
    """Whatever the code above it does."""
    first = await made(storage, "taken")

    with pytest.raises(Exception, match="constraint"):
        await wrong(storage)
    assert await storage.keys.list() == (first,)
