"""Open mode, key mode, and what each key may do."""

import pytest

from oncewise.api.auth import KeyGate, OpenGate, gate_of, is_loopback_host
from oncewise.errors import Forbidden, MissingOrg, OrgMismatch, Unauthorized
from oncewise.model import ApiKey, KeyRole

ACME, ADMIN, METRICS = (f"ow_{letter * 43}" for letter in "abc")
ORG = b"x-org-id"


class FixedKeys:
    """Knows three secrets."""

    exist = True

    def find(self, secret: str) -> ApiKey | None:
        roles = {ACME: KeyRole.TENANT, ADMIN: KeyRole.ADMIN, METRICS: KeyRole.METRICS}
        if secret not in roles:
            return None
        return ApiKey(secret[3], roles[secret], "acme" if secret == ACME else None, secret[:11], "hash", 0)


GATE = KeyGate(FixedKeys())


def bearer(secret: str) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + secret.encode()}


@pytest.mark.parametrize("org", [b"a", b"A-b_c.9", b"x" * 64])
def test_in_open_mode_the_tenant_is_what_the_header_says(org):
    """Keys that every SDK sends are ignored."""
    assert OpenGate().tenant({b"x-org-id": org, b"authorization": b"Bearer x"}) == org.decode()


@pytest.mark.parametrize(
    "headers", [{}, {b"x-org-id": b""}, {b"x-org-id": b"a" * 65}, {b"x-org-id": b"a b"}, {b"x-org-id": b"a\n"}]
)
def test_without_a_well_formed_tenant_nobody_is_asking(headers):
    """401, and no default tenant; an admin key does not make up for it."""
    with pytest.raises(MissingOrg):
        OpenGate().tenant(headers)
    with pytest.raises(MissingOrg):
        GATE.tenant(headers | bearer(ADMIN))


def test_in_open_mode_everybody_sees_figures_and_nobody_makes_keys():
    """The refusal names the command that makes the first key."""
    OpenGate().check_operator({})
    assert OpenGate().figures_of({ORG: b"acme"}) is None
    with pytest.raises(Unauthorized, match="oncewise keys create --admin"):
        OpenGate().check_admin(bearer(ADMIN))


def test_the_first_key_ends_open_mode():
    """Asked anew for every request."""
    keys = FixedKeys()
    assert isinstance(gate_of(keys), KeyGate)
    keys.exist = False
    assert isinstance(gate_of(keys), OpenGate)


@pytest.mark.parametrize(
    "headers",
    [
        bearer(ACME),
        {b"authorization": b"bEaReR  " + ACME.encode()},
        {b"x-api-key": ACME.encode()},
        {b"x-api-key": ACME.encode(), **bearer(ACME)},
        {b"x-api-key": ACME.encode(), b"authorization": b"Basic dTpw"},
    ],
)
@pytest.mark.parametrize("named", [{}, {ORG: b"acme"}])
def test_a_tenants_key_says_who_is_asking(headers, named):
    """In either header; x-org-id may repeat it."""
    assert GATE.tenant(headers | named) == "acme"


@pytest.mark.parametrize("org", [b"other", b"ACME", b"", b"acme\n", b"\xff"])
def test_a_tenants_key_speaks_for_no_other(org):
    """Neither for messages nor for figures."""
    for ask in (GATE.tenant, GATE.figures_of):
        with pytest.raises(OrgMismatch):
            ask({ORG: org, **bearer(ACME)})


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer(""),
        bearer("ow_"),
        bearer(f"ow_{'z' * 43}"),
        bearer(ACME[:-1]),
        bearer(ACME + "a"),
        bearer(f"{ACME} {ACME}"),
        {b"authorization": ACME.encode()},
        {b"authorization": b"Basic " + ACME.encode()},
        {b"x-api-key": b""},
        {b"x-api-key": b"\xff" * 46},
        {b"x-api-key": b"Bearer " + ACME.encode()},
    ],
)
def test_whoever_has_no_valid_key_is_nobody(headers):
    """Unknown and malformed keys alike; a tenant's name does not help, nor does what is asked for."""
    for ask in (GATE.tenant, GATE.figures_of, GATE.check_operator, GATE.check_admin):
        with pytest.raises(Unauthorized):
            ask({ORG: b"acme", **headers})


@pytest.mark.parametrize("second", [ADMIN, "ow_unknown", ""])
def test_two_different_keys_are_refused(second):
    """Whoever can add a header must not decide for whom the request speaks."""
    for headers in (
        bearer(ACME) | {b"x-api-key": second.encode()},
        bearer(second) | {b"x-api-key": ACME.encode()},
    ):
        with pytest.raises(Unauthorized, match="different"):
            GATE.tenant(headers)


def test_an_admin_key_speaks_for_the_tenant_that_is_named():
    """And sees and does all the rest."""
    assert GATE.tenant({ORG: b"other", **bearer(ADMIN)}) == "other"
    assert GATE.figures_of(bearer(ADMIN)) is None
    GATE.check_operator(bearer(ADMIN))
    GATE.check_admin(bearer(ADMIN))


def test_a_metrics_key_sees_figures_and_nothing_else():
    """Of all tenants."""
    assert GATE.figures_of(bearer(METRICS)) is None
    GATE.check_operator(bearer(METRICS))
    with pytest.raises(Forbidden):
        GATE.tenant({ORG: b"acme", **bearer(METRICS)})
    with pytest.raises(Forbidden):
        GATE.check_admin(bearer(METRICS))


def test_a_tenants_key_sees_its_own_figures_only():
    """What concerns all tenants is refused, and so are keys."""
    assert GATE.figures_of(bearer(ACME)) == "acme"
    for ask in (GATE.check_operator, GATE.check_admin):
        with pytest.raises(Forbidden):
            ask(bearer(ACME))


def test_a_refusal_never_repeats_what_was_sent():
    """Keys of other services are sent here by mistake."""
    sent = "sk-canary-8d2f"
    with pytest.raises(Unauthorized) as refusal:
        GATE.tenant(bearer(sent))
    assert sent not in str(refusal.value)
    assert sent not in repr(refusal.value)


@pytest.mark.parametrize(
    "host", [b"localhost", b"LocalHost:1", b"127.1.2.3:80", b"[::1]", b"[::1]:8000", b"localhost."]
)
def test_loopback_names_are_ours(host):
    """With or without a port."""
    assert is_loopback_host(host)


@pytest.mark.parametrize(
    "host",
    [b"", b"evil", b"localhost.evil", b"127.0.0.1.evil:80", b"0.0.0.0", b"[::]", b"10.0.0.1", b"localhost:x", b"\xff"],
)
def test_no_other_name_is(host):
    """Nor an address that merely looks alike; with keys every name is fine."""
    assert not is_loopback_host(host)
    GATE.check_host(host)
