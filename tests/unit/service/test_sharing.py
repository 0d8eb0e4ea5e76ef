"""Whose policy counts."""

import pytest

from oncewise.service.sharing import Policies, Policy


@pytest.mark.parametrize(
    ("server", "tenant", "model", "counts"),
    [
        ("safe", None, None, "safe"),
        ("off", "always", None, "always"),
        ("off", None, "safe", "safe"),
        ("always", None, "off", "off"),
        ("always", "safe", None, "safe"),
        ("safe", "off", "always", "off"),
        ("safe", "always", "off", "off"),
        ("off", "always", "safe", "safe"),
        ("off", "always", "always", "always"),
    ],
)
def test_the_stricter_of_tenant_and_model_counts(
    server: str, tenant: str | None, model: str | None, counts: str
) -> None:
    """The server's only where neither has one."""
    policies = Policies(
        Policy(server),
        {"acme": Policy(tenant)} if tenant else {},
        {"p/m": Policy(model)} if model else {},
    )
    assert policies.of("acme", "p", "m") == counts


def test_a_policy_is_one_tenants_and_one_models() -> None:
    """Neither another tenant nor a model of the same name elsewhere has it."""
    policies = Policies(Policy.SAFE, {"acme": Policy.OFF}, {"p/m": Policy.ALWAYS})
    assert policies.of("other", "q", "m") is Policy.SAFE
    assert policies.of("other", "p", "m2") is Policy.SAFE
    assert policies.of("other", "p", "m") is Policy.ALWAYS
