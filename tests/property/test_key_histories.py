"""Any history of making, revoking and looking again in two processes: no revoked key comes back, no key is missed."""

import asyncio
from collections.abc import Coroutine
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from oncewise.errors import StorageUnavailable
from oncewise.model import ApiKey, KeyRole
from oncewise.service.keys import Keys
from tests.support.virtual_time import run_virtual, turns

Op = tuple[str, int, int, int]

ops = st.lists(
    st.tuples(
        st.sampled_from(["create", "create", "revoke", "revoke", "look", "look", "give up", "fail"]),
        st.integers(0, 7),
        st.integers(0, 4),
        st.integers(0, 8),
    ),
    max_size=25,
)


class SlowStore:
    """A `KeyStore` that acts at once and answers some turns of the loop later, as a database in a thread does."""

    slowness: ContextVar[int] = ContextVar("slowness", default=0)
    """How many turns later, in the task that asks."""

    def __init__(self) -> None:
        self.keys: dict[str, ApiKey] = {}
        self.failing = 0

    async def _answer(self) -> None:
        if self.failing:
            self.failing -= 1
            raise StorageUnavailable
        await turns(self.slowness.get())

    async def create(self, role: KeyRole, org_id: str | None, *, prefix: str, secret_hash: str) -> ApiKey:
        key = ApiKey(str(len(self.keys)), role, org_id, prefix, secret_hash, created_at_ms=0)
        self.keys[key.id] = key
        await turns(self.slowness.get())
        return key

    async def list(self) -> tuple[ApiKey, ...]:
        seen = tuple(self.keys.values())
        await self._answer()
        return seen

    async def revoke(self, key_id: str) -> ApiKey:
        self.keys[key_id] = replace(self.keys[key_id], revoked_at_ms=1)
        await turns(self.slowness.get())
        return self.keys[key_id]

    async def counts(self) -> tuple[int, int]:
        seen = len(self.keys), sum(key.revoked_at_ms is not None for key in self.keys.values())
        await self._answer()
        return seen


@dataclass
class Site:
    """Two processes on one store, and what each was told."""

    store: SlowStore = field(default_factory=SlowStore)
    secrets: dict[str, str] = field(default_factory=dict)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.processes = [Keys(self.store), Keys(self.store)]
        self.gone: list[set[str]] = [set(), set()]

    async def create(self, where: int) -> None:
        key, secret = await self.processes[where].create(KeyRole.ADMIN)
        self.secrets[key.id] = secret
        # Whoever has the secret may use it at once, unless it was revoked meanwhile.
        assert self.processes[where].find(secret) or self.store.keys[key.id].revoked_at_ms

    async def revoke(self, where: int, key_id: str) -> None:
        await self.processes[where].revoke(key_id)
        self.gone[where].add(key_id)

    async def look(self, where: int) -> None:
        gone = {key.id for key in self.store.keys.values() if key.revoked_at_ms}
        await self.processes[where].refresh()
        self.gone[where] |= gone

    def check(self) -> None:
        """What a process was told to be revoked it never finds again."""
        for process, gone in zip(self.processes, self.gone, strict=True):
            assert not any(process.find(self.secrets[key_id]) for key_id in gone & self.secrets.keys())

    def start(self, kind: str, who: int) -> Coroutine[Any, Any, None] | None:
        where, known = who % 2, list(self.secrets)
        if kind == "create":
            return self.create(where)
        if kind == "revoke" and known:
            return self.revoke(where, known[who % len(known)])
        return self.look(where) if kind == "look" else None


async def history(operations: list[Op]) -> None:
    site = Site()
    for kind, who, slowness, gap in operations:
        site.store.slowness.set(slowness)
        if kind == "fail":
            site.store.failing = 1
        elif kind == "give up" and site.tasks:
            site.tasks[who % len(site.tasks)].cancel()
        elif work := site.start(kind, who):
            site.tasks.append(asyncio.create_task(work))
        await turns(gap)
        site.check()
    for result in await asyncio.gather(*site.tasks, return_exceptions=True):
        assert result is None or isinstance(result, StorageUnavailable | asyncio.CancelledError)
    site.check()
    site.store.failing = 0
    for process in site.processes:
        await process.refresh()
        found = {key_id for key_id, secret in site.secrets.items() if process.find(secret)}
        assert found == {key_id for key_id in site.secrets if site.store.keys[key_id].revoked_at_ms is None}
        assert process.exist == bool(site.store.keys)


@given(ops)
@example([("create", 0, 0, 8), ("create", 1, 0, 8), ("look", 0, 4, 6), ("revoke", 0, 0, 8), ("create", 1, 0, 8)])
def test_no_revoked_key_comes_back_and_no_key_is_missed(operations: list[Op]):
    """Whoever looks slowly, gives up or fails in between."""
    run_virtual(history(operations))
