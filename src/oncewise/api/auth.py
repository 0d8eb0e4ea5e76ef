"""Who is asking: the tenant of a request, and what it may do, from its head alone.

Open mode, while no API key was ever made: `x-org-id` names the tenant, and the server listens on loopback only. A page
of another origin must not reach it through a name that an attacker's DNS points to 127.0.0.1, so the Host must be a
loopback name too. `Authorization` and `x-api-key` are ignored, since every SDK sends one.

Key mode, from the first key on: the key decides, and `x-org-id` may only repeat what it says. An admin key speaks for
the tenant that `x-org-id` names; a metrics key speaks for none.

Deliberately absent: where keys are kept and how one is found (`oncewise.service.keys`).
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from ipaddress import ip_address
from typing import Protocol

from oncewise.errors import Forbidden, MisdirectedHost, MissingOrg, OrgMismatch, Unauthorized
from oncewise.model import ApiKey, KeyRole
from oncewise.service.keys import Keys

__all__ = ["Gate", "KeyGate", "OpenGate", "gate_of", "is_loopback_host"]

_ORG = re.compile(rb"[A-Za-z0-9_.-]{1,64}")
_SECRET = re.compile(rb"ow_[A-Za-z0-9_-]{43}")

FieldValues = Mapping[bytes, bytes]
"""Header fields of one request; names are lower case."""


class Gate(Protocol):
    """Decides whether a request may come in, for whom it speaks, and what it may see."""

    def check_host(self, host: bytes) -> None:
        """Refuse a Host this server does not answer for.

        Raises:
            MisdirectedHost: it does not.
        """
        ...

    def tenant(self, headers: FieldValues) -> str:
        """The tenant a request speaks for.

        Raises:
            MissingOrg: it names none.
            Unauthorized, OrgMismatch, Forbidden: its key is not valid, is another tenant's, or speaks for nobody.
        """
        ...

    def figures_of(self, headers: FieldValues) -> str | None:
        """The tenant whose figures a request may see; None for those of all.

        Raises:
            Unauthorized, OrgMismatch: its key is not valid, or is another tenant's.
        """
        ...

    def check_operator(self, headers: FieldValues) -> None:
        """Refuse a request that may not see what concerns all tenants.

        Raises:
            Unauthorized, Forbidden: its key is not valid, or is a tenant's.
        """
        ...

    def check_admin(self, headers: FieldValues) -> None:
        """Refuse a request that may not make or revoke keys.

        Raises:
            Unauthorized, Forbidden: its key is not valid, or is no admin key.
        """
        ...


class OpenGate:
    """Loopback only, no keys."""

    def check_host(self, host: bytes) -> None:
        if not is_loopback_host(host):
            raise MisdirectedHost

    def tenant(self, headers: FieldValues) -> str:
        return _named_org(headers)

    def figures_of(self, headers: FieldValues) -> str | None:  # noqa: ARG002  they are open
        return None

    def check_operator(self, headers: FieldValues) -> None:
        """Let everybody see: only this machine can ask."""

    def check_admin(self, headers: FieldValues) -> None:  # noqa: ARG002  nobody can be an admin yet
        # The first key shuts everybody else out, so it takes more than a request from this machine to make it.
        raise Unauthorized("There is no admin key yet; on the server, `oncewise keys create --admin` makes one.")


class KeyGate:
    """Everybody who has a key, under any host name.

    Args:
        keys: The keys that are valid now.
    """

    __slots__ = ("_keys",)

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def check_host(self, host: bytes) -> None:
        """Let every name pass: a page of another origin has no key."""

    def tenant(self, headers: FieldValues) -> str:
        key = self._key(headers)
        if key.org_id is not None:
            return _own_org(key.org_id, headers)
        if key.role is not KeyRole.ADMIN:
            raise Forbidden
        return _named_org(headers)

    def figures_of(self, headers: FieldValues) -> str | None:
        key = self._key(headers)
        return None if key.org_id is None else _own_org(key.org_id, headers)

    def check_operator(self, headers: FieldValues) -> None:
        if self._key(headers).role is KeyRole.TENANT:
            raise Forbidden

    def check_admin(self, headers: FieldValues) -> None:
        if self._key(headers).role is not KeyRole.ADMIN:
            raise Forbidden

    def _key(self, headers: FieldValues) -> ApiKey:
        secret = _secret(headers)
        key = None if _SECRET.fullmatch(secret) is None else self._keys.find(secret.decode("ascii"))
        if key is None:
            raise Unauthorized
        return key


_OPEN = OpenGate()


def gate_of(keys: Keys) -> Gate:
    """The gate of one request: which mode it came in stays as it is until its answer."""
    return KeyGate(keys) if keys.exist else _OPEN


def _named_org(headers: FieldValues) -> str:
    org = headers.get(b"x-org-id", b"")
    if _ORG.fullmatch(org) is None:
        raise MissingOrg
    return org.decode("ascii")


def _own_org(org_id: str, headers: FieldValues) -> str:
    if headers.get(b"x-org-id", org_id.encode("ascii")) != org_id.encode("ascii"):
        raise OrgMismatch
    return org_id


def _secret(headers: FieldValues) -> bytes:
    """What a request offers as its key; empty if that is nothing.

    Raises:
        Unauthorized: it offers two keys. Choosing one would let whoever adds a header decide for whom it speaks.
    """
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    # Basic and others may be meant for a proxy in between.
    offered = {token.strip()} if scheme.lower() == b"bearer" else set()
    if b"x-api-key" in headers:
        offered.add(headers[b"x-api-key"])
    if len(offered) > 1:
        raise Unauthorized("Authorization and x-api-key name different API keys.")
    return offered.pop() if offered else b""


@lru_cache(maxsize=256)
def is_loopback_host(host: bytes) -> bool:
    """Whether a Host header names this machine, whatever its port."""
    name, _, port = host.decode("latin-1").rpartition(":")
    if not name or not port.isdigit():
        name = host.decode("latin-1")
    if name.lower().rstrip(".") == "localhost":
        return True
    try:
        return ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
