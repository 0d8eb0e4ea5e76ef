"""Keys that are held in memory, over a store that several processes write to."""

import asyncio
from dataclasses import replace

import pytest

from oncewise.errors import NotFound, StorageUnavailable
from oncewise.model import ApiKey, KeyRole
from oncewise.service.keys import Keys


class MemoryStore:
    """A `KeyStore` that counts how often it is asked, and fails or waits when a test says so."""

    def __init__(self) -> None:
        self.keys: dict[str, ApiKey] = {}
        self.lists = 0
        self.away = False
        self.holds: list[asyncio.Event] = []
        """What the next lists wait for after they have read."""
        self.entered = asyncio.Event()

    async def create(self, role: KeyRole, org_id: str | None, *, prefix: str, secret_hash: str) -> ApiKey:
        key = ApiKey(str(len(self.keys)), role, org_id, prefix, secret_hash, created_at_ms=0)
        self.keys[key.id] = key
        return key

    async def list(self) -> tuple[ApiKey, ...]:
        self.lists += 1
        seen = tuple(self.keys.values())
        self.entered.set()
        if self.holds:
            await self.holds.pop(0).wait()
        return seen

    async def revoke(self, key_id: str) -> ApiKey:
        if key_id not in self.keys:
            raise NotFound
        self.keys[key_id] = replace(self.keys[key_id], revoked_at_ms=1)
        return self.keys[key_id]

    async def counts(self) -> tuple[int, int]:
        if self.away:
            raise StorageUnavailable
        return len(self.keys), sum(key.revoked_at_ms is not None for key in self.keys.values())


async def test_a_secret_is_long_random_and_marked():
    """`ow_` and 256 bits; no two are the same."""
    keys = Keys(MemoryStore())
    secrets = {(await keys.create(KeyRole.ADMIN))[1] for _ in range(20)}

    assert len(secrets) == 20
    assert all(secret.startswith("ow_") and len(secret) == 46 for secret in secrets)


async def test_the_store_hears_the_hash_and_the_prefix_only():
    """Neither the store nor what is printed of a key gives the secret away."""
    store = MemoryStore()
    key, secret = await Keys(store).create(KeyRole.TENANT, "acme")

    assert key.prefix == secret[:11]
    assert secret not in str(vars(store))
    assert len(key.secret_hash) == 64
    assert key.secret_hash not in repr(key)


async def test_a_key_is_found_by_its_whole_secret():
    """By nothing that is nearly it, the hash included."""
    keys = Keys(MemoryStore())
    key, secret = await keys.create(KeyRole.TENANT, "acme")

    assert keys.find(secret) == key
    for wrong in (secret[:-1], secret + "a", secret[:-1] + "~", key.prefix, key.secret_hash, ""):
        assert keys.find(wrong) is None


async def test_keys_with_one_prefix_are_told_apart():
    """The prefix is public and short: only the hash decides."""
    keys = Keys(MemoryStore())
    _, secret = await keys.create(KeyRole.TENANT, "acme")
    twin = secret[:11] + "x" * 35
    assert keys.find(twin) is None

    other = Keys(keys._store)
    await keys._store.create(KeyRole.TENANT, "other", prefix=secret[:11], secret_hash=_sha256(twin))
    await other.refresh()

    found = [other.find(secret), other.find(twin)]
    assert [key and key.org_id for key in found] == ["acme", "other"]


def _sha256(text: str) -> str:
    from hashlib import sha256

    return sha256(text.encode()).hexdigest()


async def test_a_key_must_fit_its_role():
    """Refused before anything is stored."""
    keys = Keys(MemoryStore())
    for role, org_id in ((KeyRole.TENANT, None), (KeyRole.ADMIN, "acme"), (KeyRole.METRICS, "acme")):
        with pytest.raises(ValueError, match="tenant"):
            await keys.create(role, org_id)
    assert await keys.list() == ()


async def test_a_revoked_key_is_unknown_at_once():
    """The other one is not."""
    keys = Keys(MemoryStore())
    (key, secret), (_, other) = await keys.create(KeyRole.ADMIN), await keys.create(KeyRole.ADMIN)

    await keys.revoke(key.id)

    assert keys.find(secret) is None
    assert keys.find(other) is not None
    with pytest.raises(NotFound):
        await keys.revoke("nobody")


async def test_revoking_the_last_key_does_not_open_the_server():
    """It may listen to the whole network by now."""
    keys = Keys(MemoryStore())
    assert not keys.exist
    key, _ = await keys.create(KeyRole.ADMIN)
    assert keys.exist

    await keys.revoke(key.id)
    assert keys.exist
    later = Keys(keys._store)
    await later.refresh()
    assert later.exist


async def test_keys_of_another_process_are_seen_by_looking_again():
    """Made and revoked; and those who want to know are told."""
    store = MemoryStore()
    here, there = Keys(store), Keys(store)
    told = []
    here.changed = lambda: told.append(here.exist)

    key, secret = await there.create(KeyRole.ADMIN)
    assert here.find(secret) is None
    await here.refresh()
    assert here.find(secret) == key

    await there.revoke(key.id)
    await here.refresh()
    assert here.find(secret) is None
    assert told == [True, True]


async def test_looking_again_reads_no_keys_when_none_changed():
    """Two counts are enough, however many keys there are."""
    store = MemoryStore()
    keys = Keys(store)
    await keys.create(KeyRole.ADMIN)
    before = store.lists

    for _ in range(5):
        await keys.refresh()

    assert store.lists == before


async def test_while_the_store_is_away_what_was_known_stands():
    """The look-out goes on and sees the change when the store is back."""
    store = MemoryStore()
    keys = Keys(store)
    key, secret = await keys.create(KeyRole.ADMIN)
    changed = asyncio.Event()
    keys.changed = changed.set
    store.away = True
    with pytest.raises(StorageUnavailable):
        await keys.refresh()
    looking = asyncio.create_task(keys.run(every_s=0.001))
    await store.revoke(key.id)
    await asyncio.sleep(0.01)
    assert keys.find(secret) is not None

    store.away = False
    async with asyncio.timeout(5):
        await changed.wait()
    assert keys.find(secret) is None
    looking.cancel()


async def test_a_slow_look_does_not_bring_a_revoked_key_back():
    """It read the keys before the revocation and comes home after it."""
    store = MemoryStore()
    keys = Keys(store)
    key, secret = await keys.create(KeyRole.ADMIN)
    await store.create(KeyRole.ADMIN, None, prefix="ow_other", secret_hash="h")
    store.entered.clear()
    go = asyncio.Event()
    store.holds.append(go)
    slow = asyncio.create_task(keys.refresh())
    await store.entered.wait()

    revoking = asyncio.create_task(keys.revoke(key.id))
    await asyncio.wait({revoking}, timeout=0.05)
    go.set()
    await asyncio.gather(slow, revoking)

    assert keys.find(secret) is None
