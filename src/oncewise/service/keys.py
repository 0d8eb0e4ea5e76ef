"""API keys: made, listed, revoked, and found by their secret on every request.

A request must not wait for the database, so all valid keys are held here, by their public prefix. Keys that another
process makes or revokes are seen within about a second: two counts tell whether anything changed, and only then the
keys are read again. While the database does not answer, what was known last stands.

Once a key was made, keys are needed for ever, also when all of them are revoked: revoking the last one must not open
the server to everybody.

Deliberately absent: headers and status codes (`oncewise.api.auth`), and secrets: one is known to its maker alone.
"""

import asyncio
import secrets
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from hmac import compare_digest

from oncewise.errors import OncewiseError
from oncewise.model import ApiKey, KeyRole
from oncewise.ports import KeyStore

__all__ = ["Keys"]

_MARK = "ow_"
_PREFIX_CHARS = len(_MARK) + 8
_SECRET_BYTES = 32


def _new_secret() -> str:
    return _MARK + secrets.token_urlsafe(_SECRET_BYTES)


def _hash(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()


class Keys:
    """The API keys of one server. Call `refresh` before the first request.

    Args:
        store: Where keys are kept, for all processes.

    Attributes:
        exist: Whether a key was ever made; requests then need one.
        changed: Called after keys were made or revoked, here or elsewhere. Must neither block nor raise.
    """

    def __init__(self, store: KeyStore) -> None:
        self.exist = False
        self.changed: Callable[[], None] = lambda: None
        self._store = store
        self._known = (0, 0)
        self._by_prefix: dict[str, tuple[ApiKey, ...]] = {}
        self._reading = asyncio.Lock()

    def find(self, secret: str) -> ApiKey | None:
        """The valid key with this secret. Never waits.

        The look-up tells by its duration at most the prefix, which is public; the hash of the rest is compared in
        constant time.
        """
        offered = _hash(secret)
        for key in self._by_prefix.get(secret[:_PREFIX_CHARS], ()):
            if compare_digest(key.secret_hash, offered):
                return key
        return None

    async def create(self, role: KeyRole, org_id: str | None = None) -> tuple[ApiKey, str]:
        """Make a key; return it and its secret, which nobody can be told again.

        Raises:
            ValueError: a tenant key without a tenant, or another key with one.
        """
        if (role is KeyRole.TENANT) != (org_id is not None):
            raise ValueError("a tenant key has a tenant, and no other key has one")
        secret = _new_secret()
        key = await self._store.create(role, org_id, prefix=secret[:_PREFIX_CHARS], secret_hash=_hash(secret))
        await self.refresh()
        return key, secret

    async def list(self) -> tuple[ApiKey, ...]:
        """All keys, the revoked ones too, oldest first."""
        return await self._store.list()

    async def revoke(self, key_id: str) -> None:
        """End a key; here it is refused from the return of this call on, elsewhere within about a second.

        Raises:
            NotFound: there is no such key.
        """
        await self._store.revoke(key_id)
        await self.refresh()

    async def refresh(self) -> None:
        """Read the keys if any changed.

        Raises:
            StorageUnavailable: the store did not answer; what was known stands.
        """
        # One at a time: a slow reader must not put back what a later one has seen revoked.
        async with self._reading:
            # Counted before it is read: a change in between is then read twice, not missed.
            counts = await self._store.counts()
            if counts == self._known:
                return
            self._hold(await self._store.list())
            self._known = counts
        self.changed()

    def _hold(self, keys: tuple[ApiKey, ...]) -> None:
        by_prefix: dict[str, tuple[ApiKey, ...]] = {}
        for key in keys:
            if key.revoked_at_ms is None:
                by_prefix[key.prefix] = (*by_prefix.get(key.prefix, ()), key)
        self._by_prefix = by_prefix
        self.exist = bool(keys)

    async def run(self, every_s: float = 0.5) -> None:
        """Look for changes of other processes again and again until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            with suppress(OncewiseError):
                await self.refresh()
