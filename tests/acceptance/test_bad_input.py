"""Input that no client should send: each gets a documented 4xx at once, leaves nothing behind and is never repeated.

The list is reliability.md §6.4. Every case is followed by a good request on the same server.
"""

import asyncio
import json

import pytest

from oncewise.api.errors import STATUS
from tests.support.http import JSON, ORG, parse_reply, serve

CANARY = "k4n4ry"
"""Stands in every value that is refused, and in no answer."""


@pytest.fixture
async def site(tmp_path):
    async with serve(tmp_path) as site:
        yield site


async def still_good(site):
    reply = await site.ask("GET", "/health/readiness", headers=())
    assert reply.status == 200


async def refused(site, thread, case, reply, codes=None):
    """One case: a documented 4xx in the form of a problem, no echo, nothing stored, no call."""
    assert 400 <= reply.status < 500, (case, reply)
    assert STATUS[reply.code] == reply.status, case
    assert codes is None or reply.code in codes, (case, reply.code)
    assert reply.headers["content-type"] == "application/problem+json", case
    assert CANARY not in str(reply.headers).lower(), case
    assert CANARY.encode() not in reply.body, case
    assert site.provider.calls == [], case
    assert await site.messages(thread) == [], case


async def timed(call):
    """The answer. It takes milliseconds; the rest is room for a busy machine, where the client is on the same core."""
    async with asyncio.timeout(5.0):
        return await call


BODIES = {
    "empty": b"",
    "cut": b'{"content":"' + CANARY.encode(),
    "null": b"null",
    "array": f'["{CANARY}"]'.encode(),
    "string": f'"{CANARY}"'.encode(),
    "byte order mark": b'\xef\xbb\xbf{"content":"k4n4ry"}',
    "invalid UTF-8": b'{"content":"k4n4ry\xff"}',
    "overlong UTF-8": b'{"content":"k4n4ry\xc0\xaf"}',
    "surrogate in UTF-8": b'{"content":"k4n4ry\xed\xa0\x80"}',
    "UTF-16": '{"content":"k4n4ry"}'.encode("utf-16"),
    "lone surrogate escape": b'{"content":"k4n4ry\\ud800"}',
    "NUL escape": b'{"content":"k4n4ry\\u0000"}',
    "raw control character": b'{"content":"k4n4ry\x01"}',
    "NaN": b'{"content":"k4n4ry","params":{"temperature":NaN}}',
    "infinity": b'{"content":"k4n4ry","params":{"temperature":-Infinity}}',
    "1e999": b'{"content":"k4n4ry","params":{"temperature":1e999}}',
    "5,000 digits": b'{"content":"k4n4ry","params":{"seed":' + b"1" * 5000 + b"}}",
    "100,000 levels": b"[" * 100_000,
    "deep object": b'{"content":"k4n4ry","params":' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
    "50,000 names": b"{" + b",".join(b'"k4n4ry-%d":1' % index for index in range(50_000)) + b"}",
    "trailing text": b'{"content":"k4n4ry"} k4n4ry',
    "two documents": b'{"content":"k4n4ry"}{"content":"k4n4ry"}',
    "duplicate member": b'{"content":"a","content":"k4n4ry"}',
    "duplicate member inside": b'{"content":"a","params":{"seed":1,"seed":2}}',
    "single quotes": b"{'content':'k4n4ry'}",
    "trailing comma": b'{"content":"k4n4ry",}',
    "comment": b'{"content":"k4n4ry"/**/}',
}


@pytest.mark.parametrize("route", ["messages", "messages/stream"])
async def test_bodies_that_are_not_one_strict_document(site, route):
    """400 for syntax, 422 for what the syntax allows and we do not."""
    thread = await site.thread()
    for case, body in BODIES.items():
        reply = await timed(site.ask("POST", f"/api/threads/{thread}/{route}", body))
        await refused(site, thread, case, reply, {"malformed_json", "invalid_request"})
    await still_good(site)


FIELDS = {
    **{f"role {role}": {"role": role} for role in ("system", "tool", "assistant", "USER", "", None, 1)},
    **{f"content {value!r:.20}": {"content": value} for value in ("", "  \n\t", "\u200b\u2060\ufeff", None, 5, ["x"])},
    "content object": {"content": {"text": CANARY}},
    "content of 200,001": {"content": "ä" * 200_001},
    **{f"provider {name:.12}": {"provider": name} for name in ("__proto__", "../x", f"{CANARY} ", "A", "a" * 65, "")},
    "unknown provider": {"provider": CANARY},
    **{f"model {name!r:.12}": {"model": name} for name in ("a\r\nb", "a\0", "m" * 10_000, "", "a b", "ä", "a\n")},
    "base_url": {"base_url": f"http://{CANARY}"},
    "api_key": {"api_key": CANARY},
    "headers": {"headers": {CANARY: CANARY}},
    "a name that is no field's": {f'"><script>{CANARY}': 1},
    "reason too long": {"reason": CANARY * 100},
    "reason number": {"reason": 5},
    "user_id too long": {"user_id": CANARY * 30},
    "scope": {"scope": CANARY},
    "scope list": {"scope": ["private"]},
    "on_busy": {"on_busy": CANARY},
    "on_disconnect": {"on_disconnect": True},
    "parent": {"parent_message_id": f"{CANARY}/../"},
    "params list": {"params": [CANARY]},
    "params extra": {"params": {"logit_bias": {CANARY: 1}}},
    **{f"temperature {value!r}": {"params": {"temperature": value}} for value in (True, "1", -0.1, 2.1, [])},
    **{f"max_tokens {value!r}": {"params": {"max_tokens": value}} for value in (True, "5", 1.0, 1.5, 0, -1, 10**7)},
    **{f"seed {value!r}": {"params": {"seed": value}} for value in (False, "1", 1.0)},
    **{f"stop {value!r:.12}": {"params": {"stop": value}} for value in ("", [], [""], [1], 5, ["x"] * 17)},
}


@pytest.mark.parametrize("route", ["messages", "messages/stream"])
async def test_fields_of_a_message(site, route):
    """422 that names the place and never the value; nothing is coerced."""
    thread = await site.thread()
    for case, fields in FIELDS.items():
        body = {"content": "Hello", **fields}
        reply = await timed(site.ask("POST", f"/api/threads/{thread}/{route}", body))
        await refused(site, thread, case, reply, {"invalid_request", "unknown_provider", "body_too_large"})
        if reply.code == "invalid_request":
            assert all(set(error) == {"loc", "msg"} for error in reply.json()["errors"]), case
            assert reply.json()["errors"], case
    await still_good(site)


HEADERS = {
    "no org": ([JSON], "missing_org"),
    "empty org": ([("x-org-id", ""), JSON], "missing_org"),
    "org of 65": ([("x-org-id", "a" * 65), JSON], "missing_org"),
    "org not ASCII": ([("x-org-id", f"{CANARY}ä"), JSON], "missing_org"),
    "org with a space": ([("x-org-id", f"{CANARY} b"), JSON], "missing_org"),
    "org with SQL": ([("x-org-id", f"{CANARY}' OR 1=1--"), JSON], "missing_org"),
    "two orgs": ([ORG, ORG, JSON], "duplicate_header"),
    "two other orgs": ([ORG, ("X-Org-Id", CANARY), JSON], "duplicate_header"),
    "two authorizations": ([ORG, JSON, ("authorization", CANARY), ("Authorization", "b")], "duplicate_header"),
    "two keys": ([ORG, JSON, ("x-api-key", CANARY), ("x-api-key", "b")], "duplicate_header"),
    "two content types": ([ORG, JSON, JSON], "duplicate_header"),
    "two hosts": ([ORG, JSON, ("host", "127.0.0.1")], "duplicate_header"),
    "no content type": ([ORG], "unsupported_media_type"),
    "text": ([ORG, ("content-type", "text/plain")], "unsupported_media_type"),
    "form": ([ORG, ("content-type", "application/x-www-form-urlencoded")], "unsupported_media_type"),
    "UTF-16": ([ORG, ("content-type", "application/json;charset=utf-16")], "unsupported_media_type"),
    "another JSON": ([ORG, ("content-type", f"application/json+{CANARY}")], "unsupported_media_type"),
    "gzip": ([ORG, JSON, ("content-encoding", "gzip")], "unsupported_media_type"),
    "gzip and none": (
        [ORG, JSON, ("content-encoding", "gzip"), ("content-encoding", "identity")],
        "unsupported_media_type",
    ),
    "long key": ([ORG, JSON, ("idempotency-key", CANARY * 50)], "invalid_request"),
}


async def test_headers_that_decide_something(site):
    """Each with the code that is its own."""
    thread = await site.thread()
    for case, (headers, code) in HEADERS.items():
        for path in (f"/api/threads/{thread}/messages", f"/api/threads/{thread}/messages/stream"):
            reply = await timed(site.ask("POST", path, {"content": "Hello"}, headers))
            await refused(site, thread, case, reply, {code})
    await still_good(site)


async def test_good_headers_in_unusual_forms(site):
    """What the standard allows is taken."""
    for form in ("application/json; charset=utf-8", 'Application/JSON;Charset="UTF-8"', "application/json ;x=y"):
        thread = await site.thread()
        reply = await site.ask(
            "POST", f"/api/threads/{thread}/messages", {"content": "Hi"}, (ORG, ("content-type", form))
        )
        assert reply.status == 200, form


async def test_a_request_id_that_is_not_well_formed_is_replaced(site):
    """And a good one comes back, on errors too."""
    for bad in (CANARY + " x", "x" * 129, "", "ä", "a\tb"):
        reply = await site.ask("GET", "/nowhere", headers=[("x-request-id", bad)])
        assert reply.headers["x-request-id"] != bad
        assert len(reply.headers["x-request-id"]) == 36
    reply = await site.ask("GET", "/nowhere", headers=[("x-request-id", "a.B:1-_")])
    assert reply.headers["x-request-id"] == reply.json()["request_id"] == "a.B:1-_"


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "192.168.0.1", "0.0.0.0:80", "[::2]", "a b"]
)
async def test_a_host_that_is_not_loopback_is_misdirected(site, host):
    """Against names that an attacker's DNS points here."""
    data = site.head("GET", "/health", [("host", host), ("connection", "close")])
    reply = parse_reply(await site.raw(data))

    assert (reply.status, reply.code) == (421, "misdirected_host")
    assert host.encode() not in reply.body


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:9", "127.0.0.1", "127.9.9.9:1", "[::1]:80", "[::1]", "localhost."]
)
async def test_a_loopback_host_is_ours(site, host):
    """In any spelling."""
    data = site.head("GET", "/health", [("host", host), ("connection", "close")])

    assert parse_reply(await site.raw(data)).status == 200


async def test_ids_and_paths_that_are_not_ours(site):
    """404 like any unknown id; nothing is looked up."""
    thread = await site.thread()
    paths = [
        "/api/threads/%00",
        "/api/threads/%2e%2e",
        "/api/threads/..%2f..%2fetc",
        f"/api/threads/{thread.upper()}x",
        f"/api/threads/{thread};a=b",
        f"/api/threads//{thread}",
        f"/api/threads/{thread}/",
        f"/api//threads/{thread}",
        "/api/threads/" + "a" * 10_000,
        "/api/threads/%F0%9F%92%A9",
        "/api/threads/'%20OR%201=1--",
        "/api/nothing",
        "/%ff%fe",
        "//evil.example/",
    ]
    for path in paths:
        reply = await timed(site.ask("GET", path))
        await refused(site, thread, path, reply, {"not_found"})
    await still_good(site)


async def test_query_values_out_of_bounds(site):
    """422, without the value; what no route knows is not looked at."""
    thread = await site.thread()
    for query in (
        "limit=0",
        "limit=201",
        "limit=k4n4ry",
        "limit=",
        "limit=%2B5",
        "limit=1.0",
        "limit=1_0",
        "limit=%205",
        "cursor=k4n4ry",
        "cursor=" + "k4n4ry" * 200,
    ):
        reply = await timed(site.ask("GET", f"/api/threads/?{query}"))
        await refused(site, thread, query, reply, {"invalid_request"})
    for query in ("last_n=0", "last_n=10001", "last_n=1.5", "last_n=k4n4ry"):
        reply = await timed(site.ask("GET", f"/api/metrics/performance?{query}", headers=()))
        await refused(site, thread, query, reply, {"invalid_request"})
    assert (await site.ask("GET", "/api/threads/?" + "q=" + "x" * 10_000)).status == 200


async def test_who_may_not_ask_is_told_so_before_anything_about_what_was_asked(site):
    """A stranger learns nothing of ids, bodies or bounds."""
    for method, path in (
        ("GET", "/api/threads/?limit=0"),
        ("GET", "/api/threads/%00"),
        ("PATCH", "/api/threads/x"),
        ("GET", "/api/threads/x/turns/y"),
        ("POST", "/api/threads/x/messages"),
        ("POST", "/api/threads/x/messages/stream"),
        ("POST", "/api/threads/import"),
    ):
        reply = await timed(site.ask(method, path, b"{" if method != "GET" else None, ()))
        assert (reply.status, reply.code) == (401, "missing_org"), path


async def test_a_thread_that_cannot_be_is_unknown_without_a_look_up(site):
    """No transaction for a text that is no id of ours."""
    site.services.turns.ledger = None
    for thread in ("%00", "a%20b", "..%2f", "%ff", "a" * 65):
        reply = await timed(site.ask("POST", f"/api/threads/{thread}/messages", {"content": "Hello"}))
        assert (reply.status, reply.code) == (404, "not_found"), thread


async def test_bodies_of_threads(site):
    """The other routes that take JSON are as strict."""
    thread = await site.thread()
    for method, path, body in (
        ("POST", "/api/threads/", b""),
        ("POST", "/api/threads/", b'{"title":"a","title":"k4n4ry"}'),
        ("POST", "/api/threads/", b'{"title":5}'),
        ("POST", "/api/threads/", b'{"k4n4ry":5}'.replace(b"k4n4ry", b"k4n4ry!")),
        ("POST", "/api/threads/", json.dumps({"title": CANARY * 200}).encode()),
        ("PATCH", f"/api/threads/{thread}", b'{"pinned":1}'),
        ("PATCH", f"/api/threads/{thread}", b'{"pinned":null}'),
        ("PATCH", f"/api/threads/{thread}", b'{"org_id":"k4n4ry"}'),
        ("PATCH", f"/api/threads/{thread}", b"[]"),
    ):
        reply = await timed(site.ask(method, path, body))
        await refused(site, thread, (path, body[:40]), reply, {"malformed_json", "invalid_request"})


async def test_imports_that_are_not_an_export(site):
    """422, and nothing is stored."""
    ndjson = ("content-type", "application/x-ndjson")
    good = b'{"role":"user","content":"a"}\n'
    for body in (
        b"k4n4ry",
        b'{"role":"user"}',
        b'{"role":"k4n4ry","content":"x"}',
        b'{"role":"tool","content":"x"}',
        good + good,
        b'{"role":"assistant","content":"x"}',
        good + b'{"role":"assistant","content":"x"',
        good + b'{"role":"assistant","content":5}',
    ):
        reply = await timed(site.ask("POST", "/api/threads/import", body, (ORG, ndjson)))
        assert (reply.status, reply.code) == (422, "invalid_request"), body
        assert CANARY.encode() not in reply.body
    assert (await site.ask("GET", "/api/threads/")).json()["items"] == []


async def test_an_import_may_end_its_lines_as_other_systems_do(site):
    """CR is white space between JSON's tokens; a line separator inside a message is text."""
    text = "a\u2028b\u0085c"
    lines = f'{{"role":"user",\r"content":"{text}"}}\r\n{{"role":"assistant","content":"x"}}\r\n\r\n'
    ndjson = ("content-type", "application/x-ndjson")
    reply = await site.ask("POST", "/api/threads/import", lines.encode(), (ORG, ndjson))

    assert reply.status == 201
    assert await site.messages(reply.json()["thread_id"]) == [("user", text), ("assistant", "x")]


class Broken:
    """Figures that nobody can have."""

    async def performance(self, _last_n, _org_id):
        return 1 / 0

    def record(self, _record):
        return None


async def test_a_failure_of_our_own_says_nothing_of_itself(site, caplog):
    """500 without text; the log has the request id and the place, not the message."""
    site.services.metrics = Broken()

    reply = await site.ask("GET", "/api/metrics/performance", headers=[("x-request-id", "the-one")])

    assert (reply.status, reply.code) == (500, "internal")
    assert b"division" not in reply.body
    assert "the-one failed: ZeroDivisionError" in caplog.text
    assert "division by zero" not in caplog.text
