"""How freely identical requests of `/v1` share a running call: what the operator chose for whom.

A choice may be made for the server, for a tenant and for a model. Where a tenant and a model have one, the stricter
counts: neither a tenant that must not share nor a model that must not be shared is opened up by the other.

Deliberately absent: what a request itself says about sharing, and its identity (`oncewise.service.completions`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

__all__ = ["Policies", "Policy"]


class Policy(StrEnum):
    """Which identical requests share a running call; from the strictest."""

    OFF = "off"
    SAFE = "safe"
    ALWAYS = "always"


_STRICTEST_FIRST = tuple(Policy)


@dataclass(frozen=True, slots=True)
class Policies:
    """The operator's choices.

    Attributes:
        server: Where no other applies.
        tenants: By tenant.
        models: By `provider/model`.
    """

    server: Policy = Policy.SAFE
    tenants: Mapping[str, Policy] = field(default_factory=lambda: MappingProxyType({}))
    models: Mapping[str, Policy] = field(default_factory=lambda: MappingProxyType({}))

    def of(self, org_id: str, provider: str, model: str) -> Policy:
        """The policy for one request, its model resolved."""
        tenant = self.tenants.get(org_id)
        named = self.models.get(f"{provider}/{model}") if self.models else None
        chosen = [policy for policy in (tenant, named) if policy is not None]
        return min(chosen, key=_STRICTEST_FIRST.index, default=self.server)
