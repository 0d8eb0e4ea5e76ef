"""API keys over sockets: who may do what, when a key begins and ends, and that no secret is left anywhere."""

import asyncio
import http.client
import json
import logging
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from oncewise.api.limits import Limits
from oncewise.model import KeyRole
from tests.support.commands import ONCEWISE, environment, running
from tests.support.http import JSON, Reply, Site, serve
from tests.support.scripted import ScriptedProvider
from tests.support.v1 import chat, serve_v1

ORG_A, ORG_B = ("x-org-id", "acme"), ("x-org-id", "other")


@dataclass
class Secrets:
    """One key of each kind."""

    acme: str
    other: str
    admin: str
    metrics: str


def bearer(secret: str) -> tuple[str, str]:
    return "authorization", f"Bearer {secret}"


@pytest.fixture
async def site(tmp_path) -> AsyncIterator[Site]:
    async with serve(tmp_path) as site:
        yield site


@pytest.fixture
async def secrets(site) -> Secrets:
    create = site.services.keys.create
    return Secrets(
        acme=(await create(KeyRole.TENANT, "acme"))[1],
        other=(await create(KeyRole.TENANT, "other"))[1],
        admin=(await create(KeyRole.ADMIN))[1],
        metrics=(await create(KeyRole.METRICS))[1],
    )


async def until(site: Site, path: str, status: int, headers=()) -> Reply:
    """Ask until the answer has a status."""
    async with asyncio.timeout(5):
        while (reply := await site.ask("GET", path, headers=headers)).status != status:
            await asyncio.sleep(0.05)
    return reply


async def command(site: Site, *arguments: str) -> list[str]:
    """Run `oncewise keys` on the site's database; its lines."""
    process = await asyncio.create_subprocess_exec(
        *(*ONCEWISE, "keys", *arguments),
        *("--database", site.services.settings.database_url),
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode().splitlines()


# -- who may do what -----------------------------------------------------------------------------------------------


async def test_a_tenants_key_reaches_its_own_threads_only(site, secrets):
    """Another tenant's thread is answered like one that does not exist, whoever is named."""
    thread = await site.thread([bearer(secrets.acme), JSON])
    own = await site.ask("GET", f"/api/threads/{thread}", headers=[("x-api-key", secrets.acme)])
    assert (own.status, own.json()["org_id"]) == (200, "acme")

    foreign = await site.ask("GET", f"/api/threads/{thread}", headers=[bearer(secrets.other)])
    named = await site.ask("GET", f"/api/threads/{thread}", headers=[bearer(secrets.other), ORG_A])
    assert (foreign.status, foreign.code) == (404, "not_found")
    assert (named.status, named.code) == (403, "org_mismatch")


TENANT_ROUTES = (
    ("POST", "/api/threads/"),
    ("GET", "/api/threads/"),
    ("GET", "/api/threads/?limit=0"),
    ("POST", "/api/threads/import"),
    ("GET", "/api/threads/{}"),
    ("PATCH", "/api/threads/{}"),
    ("DELETE", "/api/threads/{}"),
    ("GET", "/api/threads/not an id".replace(" ", "%20")),
    ("GET", "/api/threads/{}/audit"),
    ("GET", "/api/threads/{}/export"),
    ("POST", "/api/threads/{}/messages"),
    ("POST", "/api/threads/{}/messages/stream"),
    ("GET", "/api/threads/{}/stream"),
    ("GET", "/api/threads/{}/turns/{}"),
    ("GET", "/api/threads/{}/turns/{}/stream"),
    ("POST", "/api/threads/{}/turns/{}/cancel"),
    ("POST", "/api/threads/cancel/{}"),
)
V1_ROUTES = (
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/chat/completions/{}/stream"),
    ("POST", "/v1/chat/completions/{}/cancel"),
    ("POST", "/v1/coalesce/explain"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{}"),
)


@pytest.mark.parametrize(
    ("offered", "status", "code"),
    [
        (lambda _: [], 401, "unauthorized"),
        (lambda _: [ORG_A], 401, "unauthorized"),
        (lambda _: [ORG_A, bearer("sk-of-somebody-else")], 401, "unauthorized"),
        (lambda _: [ORG_A, bearer("ow_" + "x" * 43)], 401, "unauthorized"),
        (lambda keys: [bearer(keys.acme), ("x-api-key", keys.other)], 401, "unauthorized"),
        (lambda keys: [bearer(keys.acme), ORG_B], 403, "org_mismatch"),
        (lambda keys: [bearer(keys.admin)], 401, "missing_org"),
        (lambda keys: [bearer(keys.metrics), ORG_A], 403, "forbidden"),
    ],
)
async def test_every_route_of_a_tenant_asks_who_it_is(site, secrets, offered, status, code):
    """Before anything is said about what was asked for; nothing is called and nothing is stored."""
    headers = [*offered(secrets), JSON]
    for method, path in TENANT_ROUTES:
        reply = await site.ask(method, path.replace("{}", "01a20a45"), b"{}" if method != "GET" else None, headers)
        assert (reply.status, reply.code) == (status, code), path
        assert (reply.headers.get("www-authenticate") == 'Bearer realm="oncewise"') == (status == 401)
    for method, path in V1_ROUTES:
        reply = await site.ask(method, path.replace("{}", "01a20a45"), b"{}" if method != "GET" else None, headers)
        assert (reply.status, reply.json()["error"]["code"]) == (status, code), path
    assert site.provider.calls == []


async def test_a_key_said_twice_is_ambiguous(site, secrets):
    """400, as for every header that decides something."""
    reply = await site.ask("GET", "/api/threads/", headers=[bearer(secrets.acme), bearer(secrets.other)])
    assert (reply.status, reply.code) == (400, "duplicate_header")


async def test_an_admin_speaks_for_the_tenant_it_names(site, secrets):
    """And for another in the next request."""
    thread = await site.thread([bearer(secrets.admin), ORG_A, JSON])
    for org, status in ((ORG_A, 200), (ORG_B, 404)):
        reply = await site.ask("GET", f"/api/threads/{thread}", headers=[bearer(secrets.admin), org])
        assert reply.status == status


async def test_figures_are_for_operators_and_a_tenants_own_for_itself(site, secrets):
    """Performance, and Prometheus' page."""
    for secret in (secrets.acme, secrets.acme, secrets.other):
        thread = await site.thread([bearer(secret), JSON])
        asked = {"content": "Hello"}
        assert (await site.ask("POST", f"/api/threads/{thread}/messages", asked, [bearer(secret), JSON])).status == 200

    path = "/api/metrics/performance"
    seen = {}
    for name, secret in vars(secrets).items():
        seen[name] = (await site.ask("GET", path, headers=[bearer(secret)])).json()["total_requests"]
    assert seen == {"acme": 2, "other": 1, "admin": 3, "metrics": 3}

    statuses = [(await site.ask("GET", "/metrics", headers=[bearer(s)])).status for s in vars(secrets).values()]
    assert statuses == [403, 403, 200, 200]
    for closed in (path, f"{path}?last_n=0", f"{path}?org_id=a%20b", "/metrics"):
        reply = await site.ask("GET", closed, headers=[ORG_A])
        assert (reply.status, reply.code) == (401, "unauthorized")
    assert (await site.ask("GET", path, headers=[bearer(secrets.acme), ORG_B])).code == "org_mismatch"

    of_acme = f"{path}?org_id=acme"
    counts = [(await site.ask("GET", of_acme, headers=[bearer(s)])).json() for s in (secrets.acme, secrets.admin)]
    assert [figures["total_requests"] for figures in counts] == [2, 2]
    assert (await site.ask("GET", of_acme, headers=[bearer(secrets.other)])).code == "org_mismatch"
    assert (await site.ask("GET", f"{path}?org_id=a%20b", headers=[bearer(secrets.admin)])).status == 422


async def test_health_and_the_description_need_no_key(site, secrets):
    """Balancers and tools have none."""
    for path in ("/health", "/health/liveness", "/health/liveliness", "/health/readiness", "/openapi.json"):
        assert (await site.ask("GET", path, headers=[])).status == 200


async def test_with_keys_the_server_answers_under_any_name(site, secrets):
    """Behind a proxy it has another; without keys that is refused, with and without a key sent."""
    head = site.head("GET", "/api/threads/", [("host", "chat.example"), ("connection", "close"), bearer(secrets.acme)])
    assert (await site.raw(head)).startswith(b"HTTP/1.1 200 ")


# -- keys over HTTP ------------------------------------------------------------------------------------------------


async def test_an_admin_makes_lists_and_revokes_keys(site, secrets):
    """The secret is told once; a revoked key is refused from the answer on."""
    headers = [bearer(secrets.admin), JSON]
    made = await site.ask("POST", "/api/keys", {"org_id": "third", "role": "tenant"}, headers)
    assert made.status == 201
    key = made.json()
    assert (key["org_id"], key["role"]) == ("third", "tenant")
    thread = await site.thread([bearer(key["key"]), JSON])
    assert thread

    listed = await site.ask("GET", "/api/keys", headers=headers)
    assert [item["role"] for item in listed.json()["items"]] == ["tenant", "tenant", "admin", "metrics", "tenant"]
    assert listed.json()["items"][-1] == {name: value for name, value in key.items() if name != "key"}
    assert key["key"].encode() not in listed.body

    for _ in range(2):
        assert (await site.ask("DELETE", f"/api/keys/{key['id']}", headers=headers)).status == 204
    refused = await site.ask("GET", f"/api/threads/{thread}", headers=[bearer(key["key"])])
    assert (refused.status, refused.code) == (401, "unauthorized")
    last = (await site.ask("GET", "/api/keys", headers=headers)).json()["items"][-1]
    assert last["revoked_at"] >= last["created_at"]


@pytest.mark.parametrize("role", ["admin", "metrics"])
async def test_keys_of_operators_have_no_tenant(site, secrets, role):
    """They are made by role alone."""
    made = await site.ask("POST", "/api/keys", {"role": role}, [bearer(secrets.admin), JSON])
    assert (made.status, made.json()["org_id"], made.json()["role"]) == (201, None, role)
    assert (await site.ask("GET", "/metrics", headers=[bearer(made.json()["key"])])).status == 200


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, "role"),
        ({"role": "owner"}, "role"),
        ({"role": "tenant"}, "org_id"),
        ({"role": "tenant", "org_id": None}, "org_id"),
        ({"role": "tenant", "org_id": "a b"}, "org_id"),
        ({"role": "tenant", "org_id": "acme\n"}, "org_id"),
        ({"role": "admin", "org_id": "acme"}, "org_id"),
        ({"role": "admin", "key": "ow_mine"}, "key"),
    ],
)
async def test_a_key_that_cannot_be_is_refused(site, secrets, body, place):
    """422 with the place, and nothing is made."""
    reply = await site.ask("POST", "/api/keys", body, [bearer(secrets.admin), JSON])
    assert (reply.status, [error["loc"] for error in reply.json()["errors"]]) == (422, [["body", place]])
    assert len(await site.services.keys.list()) == 4


async def test_keys_are_the_admins_business(site, secrets):
    """Nobody else's, and unknown ones are not found by the admin either."""
    asked = (("POST", "/api/keys", b"{}"), ("GET", "/api/keys", None), ("DELETE", "/api/keys/a%20b", None))
    for method, path, body in asked:
        for headers, status in (([ORG_A], 401), ([bearer(secrets.acme)], 403), ([bearer(secrets.metrics)], 403)):
            assert (await site.ask(method, path, body, [*headers, JSON])).status == status
    for key_id in ("unknown", "a%20b", "01a20a45-0776-732e-ab10-ed5d8e638962"):
        assert (await site.ask("DELETE", f"/api/keys/{key_id}", headers=[bearer(secrets.admin)])).status == 404


async def test_without_keys_nobody_makes_the_first_one_over_http(site):
    """It would shut out everybody else; the answer names the command."""
    for method, body in (("POST", {"role": "admin"}), ("GET", None)):
        reply = await site.ask(method, "/api/keys", body)
        assert (reply.status, reply.code) == (401, "unauthorized")
        assert "oncewise keys create --admin" in reply.json()["detail"]
    assert (await site.ask("GET", "/api/threads/")).status == 200


# -- when a key begins and ends --------------------------------------------------------------------------------------


async def test_the_first_key_of_another_process_closes_an_open_server(site):
    """Made by the command while the server runs; revoked by it, nobody comes in, and the server stays closed."""
    assert (await site.ask("GET", "/api/threads/", headers=[ORG_A, bearer("sk-ignored")])).status == 200

    secret = (await command(site, "create", "--org", "acme"))[-1]
    assert (await until(site, "/api/threads/", 401, [ORG_A])).code == "unauthorized"
    assert (await site.ask("GET", "/api/threads/", headers=[bearer(secret)])).status == 200

    listed = await command(site, "list")
    assert secret[:11] in listed[-1]
    await command(site, "revoke", listed[-1].split()[0])
    await until(site, "/api/threads/", 401, [bearer(secret)])
    assert (await site.ask("GET", "/api/threads/", headers=[ORG_A])).status == 401


def test_with_a_key_the_server_listens_on_every_address(tmp_path):
    """Its banner says that a key is needed, and so does its answer."""
    env = environment(tmp_path, ONCEWISE_DATABASE_URL=f"sqlite:///{tmp_path / 'ow.db'}")
    made = subprocess.run([*ONCEWISE, "keys", "create", "--org", "acme"], env=env, capture_output=True, check=True)
    with running((*ONCEWISE, "serve", "--port", "0", "--host", "0.0.0.0"), env) as server:
        port = server.wait_for(r"API\s+http://0\.0\.0\.0:(\d+)/")[1]
        server.wait_for("Mode .*every request needs an API key")
        server.wait_for("Try .*authorization: Bearer ow_")
        statuses = []
        for headers in ({}, {"authorization": f"Bearer {made.stdout.decode().splitlines()[-1]}"}):
            connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
            connection.request("GET", "/api/threads/", headers=headers)
            statuses.append(connection.getresponse().status)
            connection.close()
    assert statuses == [401, 200]


async def test_a_restarted_server_knows_its_keys_from_the_first_request(tmp_path):
    """There is no moment in which it is open."""
    async with serve(tmp_path) as site:
        _, secret = await site.services.keys.create(KeyRole.TENANT, "acme")
    async with serve(tmp_path) as site:
        assert (await site.ask("GET", "/api/threads/", headers=[ORG_A])).status == 401
        assert (await site.ask("GET", "/api/threads/", headers=[bearer(secret)])).status == 200


async def begun(site: Site, thread: str, secret: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream whose head has come."""
    reader, writer = await site.connect()
    body = b'{"content": "Hello"}'
    headers = [site.host, ("connection", "close"), JSON, ("content-length", str(len(body))), bearer(secret)]
    writer.write(site.head("POST", f"/api/threads/{thread}/messages/stream", headers) + body)
    await reader.readuntil(b"event: meta")
    return reader, writer


async def test_a_revoked_keys_running_streams_end(tmp_path):
    """Without a terminal event; the stream of another key of that tenant goes on, and so does the turn."""
    provider = ScriptedProvider(held=True)
    async with serve(tmp_path, provider, limits=Limits(hold_s=0.01)) as site, asyncio.timeout(10):
        (key, revoked), (_, valid) = [await site.services.keys.create(KeyRole.TENANT, "acme") for _ in range(2)]
        thread = await site.thread([bearer(valid), JSON])
        (ended, one), (going, two) = [await begun(site, thread, secret) for secret in (revoked, valid)]

        await site.services.keys.revoke(key.id)
        assert b"event: done" not in await ended.read()
        provider.go.set()
        assert b"event: done" in await going.read()
        for writer in (one, two):
            writer.close()
    assert len(provider.calls) == 1


async def test_a_key_revoked_while_its_stream_waits_to_begin_gets_none(tmp_path):
    """401: the head is held for a moment, and the key is asked for again when it goes out."""
    provider = ScriptedProvider(held=True)
    async with serve(tmp_path, provider) as site, asyncio.timeout(10):
        key, secret = await site.services.keys.create(KeyRole.TENANT, "acme")
        thread = await site.thread([bearer(secret), JSON])
        path = f"/api/threads/{thread}/messages/stream"
        waiting = asyncio.create_task(site.ask("POST", path, {"content": "Hello"}, [bearer(secret), JSON]))
        await provider.started.wait()

        await site.services.keys.revoke(key.id)
        provider.go.set()
        refused = await waiting
    assert (refused.status, refused.code) == (401, "unauthorized")


@pytest.mark.parametrize("stall", ["hang", "stall2"])
async def test_a_revoked_keys_chat_completions_end_too(tmp_path, stall):
    """With an error that says why, before or after the first text; then every route of `/v1` is closed to it."""
    async with serve_v1(tmp_path, limits=Limits(hold_s=0.01)) as both, asyncio.timeout(10):
        site = both.site
        key, secret = await site.services.keys.create(KeyRole.TENANT, "acme")
        body = json.dumps(chat(f"openai/n5-{stall}", stream=True)).encode()
        headers = [site.host, ("connection", "close"), JSON, ("content-length", str(len(body))), bearer(secret)]
        reader, writer = await site.connect()
        writer.write(site.head("POST", "/v1/chat/completions", headers) + body)
        await reader.readuntil(b"\r\n\r\n")

        await site.services.keys.revoke(key.id)
        rest = await reader.read()
        writer.close()
        assert b'"code":"unauthorized"' in rest
        assert b"[DONE]" not in rest
        for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/openai/n5")):
            reply = await site.ask(method, path, chat() if method == "POST" else None, [bearer(secret), JSON])
            assert (reply.status, reply.json()["error"]["code"]) == (401, "unauthorized")


# -- secrets ---------------------------------------------------------------------------------------------------------


async def test_no_secret_is_left_anywhere(tmp_path, caplog):
    """Not in logs, errors, figures, the description or the files of the database."""
    caplog.set_level(logging.DEBUG)
    wrong = "ow_" + "w" * 43
    async with serve(tmp_path) as site:
        _, admin = await site.services.keys.create(KeyRole.ADMIN)
        made = await site.ask("POST", "/api/keys", {"org_id": "acme", "role": "tenant"}, [bearer(admin), JSON])
        tenant = made.json()["key"]
        thread = await site.thread([bearer(tenant), JSON])
        heard = []
        for secret in (admin, tenant, wrong):
            headers = [bearer(secret), JSON]
            heard += [
                await site.ask("POST", f"/api/threads/{thread}/messages", {"content": "Hello"}, headers),
                await site.ask("POST", f"/api/threads/{thread}/messages", {"content": 1}, headers),
                await site.ask("POST", f"/api/threads/{thread}/messages", {"content": "Hello"}, [*headers, ORG_B]),
                await site.ask("DELETE", f"/api/keys/{secret}", headers=headers),
                await site.ask("GET", "/api/keys", headers=headers),
                await site.ask("GET", "/metrics", headers=headers),
                await site.ask("GET", f"/api/threads/{thread}/audit", headers=headers),
            ]
        files = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]

    everything = b"".join([*files, *(reply.body + json.dumps(reply.headers).encode() for reply in heard)])
    for secret in (admin, tenant, wrong):
        assert secret[11:].encode() not in everything
        assert secret[11:] not in caplog.text
    # What a key is known by is there, or this test has looked in the wrong places.
    assert tenant[:11].encode() in everything
