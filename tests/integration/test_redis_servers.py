"""Two server processes on one database file and one Valkey: they behave as one, whatever becomes of the Valkey."""

import asyncio
import json
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.fake_provider import FakeProvider
from tests.support.http import JSON, ORG, Event, Reply
from tests.support.redis_server import RedisServer
from tests.support.server import ServerProcess, serve_process
from tests.support.watching import Watch, names, terminal, until, watching

SLOW = "n40-gap50-tok12"
"""Two seconds of text."""


@dataclass
class Site:
    """Two servers, what lies between them, and the provider behind."""

    servers: tuple[ServerProcess, ServerProcess]
    valkey: RedisServer
    provider: FakeProvider

    @property
    def first(self) -> ServerProcess:
        return self.servers[0]

    @property
    def second(self) -> ServerProcess:
        return self.servers[1]


@asynccontextmanager
async def two_servers(folder: Path, *, redis: bool = True, **settings: object) -> AsyncIterator[Site]:
    async with AsyncExitStack() as opened:
        valkey = RedisServer(folder / "valkey")
        opened.callback(valkey.kill)
        if redis:
            valkey.start()
            settings["redis_url"] = valkey.url
        provider = await opened.enter_async_context(FakeProvider())
        servers = [
            await opened.enter_async_context(serve_process(folder, provider.base_url, **settings)) for _ in range(2)
        ]
        yield Site((servers[0], servers[1]), valkey, provider)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """One pair of servers for what leaves no trace."""
    async with two_servers(tmp_path_factory.mktemp("site")) as site:
        yield site


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def site(shared: Site) -> Site:
    shared.provider.reset()
    return shared


def calls(site: Site) -> int:
    return site.provider.count


async def stream_of(server: ServerProcess, thread: str, content: str = "Hello", **fields: Any) -> Any:
    body = {"content": content, **fields}
    return watching(server, f"/api/threads/{thread}/messages/stream", body)


def told(watch: Watch) -> bytes:
    """What every viewer of a turn is sent alike: all but the pings and its own first meta."""
    blocks = [block for block in watch.raw.split(b"\n\n") if block and not block.startswith((b"retry", b"event: ping"))]
    own = next(block for block in blocks if b'"request_id"' in block)
    blocks.remove(own)
    return b"\n\n".join(blocks)


# -- one turn, two servers ---------------------------------------------------------------------------------------


async def test_the_headline_over_two_servers(site):
    """Fifty requests over ten connections, JSON and streams, alternating: all answered alike by one call."""
    thread = await site.first.thread()
    left = iter(range(50))

    async def connection(number: int) -> list[Any]:
        answers = []
        for _ in left:
            server = site.servers[number % 2]
            if number % 4 < 2:
                answers.append(await server.say(thread, model="lat600-n5"))
            else:
                answers.append(await server.stream(thread, model="lat600-n5"))
        return answers

    replies = [one for some in await asyncio.gather(*(connection(number) for number in range(10))) for one in some]

    assert [reply.status for reply in replies] == [200] * 50
    assert calls(site) == 1
    messages = await site.second.messages(thread)
    assert [role for role, _ in messages] == ["user", "assistant"]
    bodies = {reply.body for reply in replies if reply.headers["content-type"] == "application/json"}
    assert len(bodies) == 1
    roles = Counter(reply.headers["x-coalesce"] for reply in replies)
    assert roles["leader"] == 1
    assert roles["follower"] + roles["replayed"] == 49


async def test_a_stream_on_another_server_is_the_leaders_byte_for_byte(site):
    """Of a request that follows, of a viewer from the start, and from the middle on of one that comes late."""
    thread = await site.first.thread()
    # The first text comes when all heads are out: whoever is not there yet gets what he missed in one piece.
    model = f"lat1800-{SLOW}"
    async with await stream_of(site.first, thread, model=model) as leading:
        place = leading.reply.headers["location"]
        async with (
            await stream_of(site.second, thread, model=model) as following,
            watching(site.second, place) as early,
        ):
            await leading.until("delta")
            await asyncio.sleep(0.5)
            async with watching(site.second, place) as late:
                await asyncio.gather(*(watch.rest() for watch in (leading, following, early, late)))
    assert following.text == early.text == leading.text
    assert told(following) == told(early) == told(leading)
    assert following.reply.headers["x-coalesce"] == "follower"
    assert late.text == leading.text
    assert late.events[-1].raw == leading.events[-1].raw
    assert calls(site) == 1


async def test_text_comes_to_another_server_as_soon_as_it_is_there(site):
    """Within a tenth of a second of its making, however long the turn."""
    thread = await site.first.thread()
    lags = []
    async with (
        await stream_of(site.first, thread, model=SLOW),
        await stream_of(site.second, thread, model=SLOW) as following,
    ):
        while (event := await following.next()) is not None:
            if event.name == "delta":
                stamps = re.findall(r"@\d+:\d+:(\d+)@", event.data["delta"])
                lags += [(time.monotonic_ns() - int(stamp)) / 1e6 for stamp in stamps]
    assert len(lags) == 40
    assert sorted(lags)[20] < 100
    assert "done" in names(following.events)


async def test_a_stream_is_resumed_on_either_server_from_any_position(site):
    """While it runs and after its end; the client joins the pieces to the whole."""
    thread = await site.first.thread()
    async with await stream_of(site.first, thread, model=SLOW) as leading:
        place = leading.reply.headers["location"]
        text, last_id, servers = "", None, iter(range(1000))
        ended: list[Event] = []
        while not ended:
            server = site.servers[next(servers) % 2]
            headers = [] if last_id is None else [("last-event-id", last_id)]
            async with watching(server, place, headers=headers) as watch:
                assert "stream-replayed-from" not in watch.reply.headers
                for _ in range(6):
                    event = await watch.next()
                    if event is None:
                        break
                    if event.name == "delta":
                        text += event.data["delta"]
                    if event.id is not None:
                        last_id = event.id
                    if event.name in ("done", "error"):
                        ended.append(event)
        await leading.rest()
    assert text == leading.text
    assert ended[0].raw == leading.events[-1].raw
    for server in site.servers:
        again = await server.ask("GET", place, headers=(ORG, ("last-event-id", last_id)))
        assert again.status == 204
    assert calls(site) == 1


async def test_a_thread_is_joined_on_the_other_server(site):
    """`GET …/stream` finds the turn that runs, wherever it does; another tenant finds nothing."""
    thread = await site.first.thread()
    async with await stream_of(site.first, thread, model=SLOW) as leading:
        await leading.until("delta")
        async with watching(site.second, f"/api/threads/{thread}/stream") as joined:
            await asyncio.gather(leading.rest(), joined.rest())
        stranger = await site.second.ask("GET", leading.reply.headers["location"], headers=(("x-org-id", "globex"),))
        assert stranger.status == 404
    assert joined.text == leading.text


@pytest.mark.parametrize("by", ["turn", "request"])
async def test_a_turn_is_cancelled_from_the_other_server(site, by):
    """The provider is left within a second; whoever watches sees the same end."""
    thread = await site.first.thread()
    request_id = f"mine-{by}"
    body = {"content": "Hello", "model": "n400-gap25"}
    path = f"/api/threads/{thread}/messages/stream"
    async with watching(site.first, path, body, [("x-request-id", request_id)]) as leading:
        await leading.until("delta")
        place = leading.reply.headers["location"]
        async with watching(site.second, place) as viewer:
            await viewer.until("delta")
            began_s = time.monotonic()
            if by == "turn":
                cancelled = await site.second.ask("POST", place.replace("/stream", "/cancel"))
                assert cancelled.json()["state"] == "cancelled"
            else:
                cancelled = await site.second.ask("POST", f"/api/threads/cancel/{request_id}")
                assert cancelled.json()["state"] == "cancelled"
            assert cancelled.status == 200
            call = await site.provider.call(1)
            async with asyncio.timeout(1):
                await call.ended.wait()
            assert call.closed_by_client
            assert time.monotonic() - began_s < 1.0
            ends = [terminal(await watch.rest()) for watch in (leading, viewer)]
    assert {end.data["state"] for end in ends} == {"cancelled"}
    if by == "turn":
        assert ends[0].raw == ends[1].raw


async def test_who_waits_on_another_server_keeps_the_turn_alive(site):
    """Its leader's client leaves, and would have stopped it."""
    thread = await site.first.thread()
    fields = {"model": "lat2000-n5", "on_disconnect": "cancel"}
    async with await stream_of(site.first, thread, **fields) as leading:
        await until(lambda: calls(site) == 1)
        following = asyncio.create_task(site.second.say(thread, **fields))
        await asyncio.sleep(0.3)
        leading.leave()
    reply = await following
    assert (reply.status, reply.headers["x-coalesce"]) == (200, "follower")
    assert calls(site) == 1


async def test_a_different_message_on_another_server_waits_its_turn(site):
    """In order of arrival, with the turn before in its prompt, and soon after that has ended."""
    thread = await site.first.thread()
    first = asyncio.create_task(site.first.say(thread, "one", model="lat800-n3"))
    await until(lambda: calls(site) == 1)
    second = asyncio.create_task(site.second.say(thread, "two", model="n3"))
    assert (await first).status == 200
    ended_s = time.monotonic()
    assert (await second).status == 200
    assert time.monotonic() - ended_s < 0.45
    prompt = (await site.provider.call(2)).request["messages"]
    assert [message["role"] for message in prompt] == ["user", "assistant", "user"]


async def ask_v1(server: ServerProcess, body: dict[str, Any]) -> Reply:
    return await server.ask("POST", "/v1/chat/completions", body)


# -- /v1 ---------------------------------------------------------------------------------------------------------


async def test_requests_of_v1_share_one_call_over_two_servers(site):
    """Streams and whole answers; the same id, text and figures for all, and one call."""
    body = {"model": "openai/lat500-n8-gap20", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    asked = [
        ask_v1(site.servers[number % 2], body | ({"stream": True} if number % 4 < 2 else {})) for number in range(12)
    ]
    replies: list[Reply] = await asyncio.gather(*asked)
    assert [reply.status for reply in replies] == [200] * 12
    assert calls(site) == 1
    streams = {reply.body.replace(b":\n", b"") for reply in replies if reply.body.startswith((b"data", b":"))}
    whole = {reply.body for reply in replies if reply.headers["content-type"] == "application/json"}
    assert (len(streams), len(whole)) == (1, 1)
    roles = Counter(reply.headers["x-coalesce"] for reply in replies)
    assert roles == {"leader": 1, "follower": 11}
    assert len({reply.headers["x-call-id"] for reply in replies}) == 1


async def test_a_call_of_v1_is_cancelled_and_resumed_on_the_other_server(site):
    """By its id, which the first answer names."""
    body = {"model": "openai/n60-gap20", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    async with v1_stream(site.first, body) as (headers, read):
        call_id = headers["x-call-id"]
        await read(4)
        rest = asyncio.create_task(site.second.ask("GET", f"/v1/chat/completions/{call_id}/stream", headers=(ORG,)))
        await asyncio.sleep(0.3)
        reply = await site.second.ask("POST", f"/v1/chat/completions/{call_id}/cancel", headers=(ORG,))
        assert (reply.status, reply.json()["state"]) == (200, "cancelled")
    resumed = await rest
    assert resumed.status == 200
    assert resumed.body.startswith(b":\nid: 1-1\ndata: ")
    assert b"turn_cancelled" in resumed.body
    call = await site.provider.call(1)
    async with asyncio.timeout(1):
        await call.ended.wait()
    assert (await site.second.ask("GET", "/v1/chat/completions/none/stream", headers=(ORG,))).status == 404


@asynccontextmanager
async def v1_stream(server: ServerProcess, body: dict[str, Any]) -> AsyncIterator[Any]:
    content = json.dumps(body).encode()
    fields = [server.host, ("connection", "close"), ORG, JSON, ("x-stream-resume", "1")]
    reader, writer = await server.connect()
    writer.write(
        server.head("POST", "/v1/chat/completions", [*fields, ("content-length", str(len(content)))]) + content
    )
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)

    async def read(events: int) -> bytes:
        seen = b""
        while seen.count(b"\n\n") < events:
            seen += await reader.read(4096)
        return seen

    try:
        yield headers, read
    finally:
        writer.close()


# -- what the Valkey is told -------------------------------------------------------------------------------------


async def test_keys_tell_nothing_of_tenants_ids_or_text(site):
    """Nor do they stay: everything has a lifetime."""
    thread = await site.first.thread()
    body = {"model": "openai/lat2000-n3", "messages": [{"role": "user", "content": "secret words"}], "temperature": 0}
    async with (
        await stream_of(site.first, thread, "secret words", model=SLOW) as leading,
        await stream_of(site.second, thread, "secret words", model=SLOW) as following,
    ):
        asking = [asyncio.create_task(ask_v1(server, body)) for server in site.servers]
        keys: set[str] = set()
        async with asyncio.timeout(10):
            while not all(any(kind in key for key in keys) for kind in (":log:", ":claim:", ":slots:", ":in:")):
                keys |= set(re.findall(r"^oncewise\S+", site.valkey.ask("KEYS", "*"), re.MULTILINE))
                await asyncio.sleep(0.02)
        lifetimes = {key: site.valkey.ask("PTTL", key) for key in keys}
        await asyncio.gather(leading.rest(), following.rest(), *asking)
    turn_id = leading.turn_id
    for word in ("acme", thread, turn_id, "secret", "hi"):
        assert not [key for key in keys if word in key.removeprefix("oncewise")]
    assert [key for key, answer in lifetimes.items() if answer.startswith(":-1")] == []


# -- limits of providers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("redis", [True, False], ids=["redis", "database"])
async def test_two_servers_keep_one_rate_and_one_number_of_calls(tmp_path, monkeypatch, redis):
    """Ten calls at five a second, three at a time, over both; and a pause that one was told holds both."""
    limits = {"OPENAI_RPS": "5", "OPENAI_BURST": "1", "OPENAI_CONCURRENCY": "3"}
    async with two_servers_with(tmp_path, limits, redis=redis) as site:
        # A process that was alone on a database sees within a second that it no longer is.
        await asyncio.sleep(1.2)
        threads = [await site.first.thread() for _ in range(10)]
        replies = await asyncio.gather(
            *(
                site.servers[number % 2].say(thread, str(number), model="lat700-n1")
                for number, thread in enumerate(threads)
            )
        )
        assert [reply.status for reply in replies] == [200] * 10
        check_starts([call.started_s for call in site.provider.calls])
        assert site.provider.max_running <= 3

        site.provider.reset()
        threads = [await site.first.thread() for _ in range(5)]
        refused = asyncio.create_task(site.first.say(threads[0], "again", model="first1-err429-retryafter1-n1"))
        await until(lambda: calls(site) == 1)
        await asyncio.sleep(0.3)
        others = await asyncio.gather(
            *(site.servers[number % 2].say(thread, model="n1") for number, thread in enumerate(threads[1:]))
        )
        assert {reply.status for reply in (await refused, *others)} == {200}
        starts = sorted(call.started_s for call in site.provider.calls)
        assert starts[1] - starts[0] >= 1.0 - 0.05
        check_starts(starts[1:])


def check_starts(starts: list[float]) -> None:
    """Five a second, as far as a busy machine lets processes keep the moments that they booked."""
    starts = sorted(starts)
    assert min(after - before for before, after in pairwise(starts)) > 0.06
    assert starts[-1] - starts[0] > 0.2 * (len(starts) - 1) - 0.1


@asynccontextmanager
async def two_servers_with(folder: Path, limits: dict[str, str], *, redis: bool) -> AsyncIterator[Site]:
    async with two_servers(folder, redis=redis, environment=limits) as site:
        yield site


# -- when the Valkey goes ----------------------------------------------------------------------------------------


async def ready(server: ServerProcess, state: str) -> None:
    """Wait until a server, which is ready in any case, says that of its coordination."""
    async with asyncio.timeout(8):
        while True:
            reply = await server.ask("GET", "/health/readiness")
            assert reply.status == 200
            if reply.json()["checks"]["coordination"] == state == reply.json()["status"]:
                return
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("fault", ["kill", "pause", "flush", "restart"])
async def test_nothing_fails_when_the_valkey_goes_in_the_middle(tmp_path, fault):
    """Turns that run finish, streams elsewhere go on, new turns are served; each by one call."""
    async with two_servers(tmp_path, lease_s=3) as site:
        threads = [await site.first.thread() for _ in range(6)]
        model = "n40-gap50-tok12"
        async with AsyncExitStack() as opened:
            watches = []
            for number, thread in enumerate(threads):
                leader, other = site.servers[number % 2], site.servers[(number + 1) % 2]
                for server in (leader, other):
                    watch = await opened.enter_async_context(await stream_of(server, thread, f"{number}", model=model))
                    watches.append(watch)
                    if server is leader:
                        await until(lambda number=number: calls(site) == number + 1)
            answers = [
                asyncio.create_task(site.servers[number % 2].say(threads[number], f"{number}", model=model))
                for number in range(6)
            ]
            for watch in watches:
                await watch.until("delta")
            if fault == "flush":
                site.valkey.flush()
            elif fault == "pause":
                site.valkey.pause()
                asyncio.get_running_loop().call_later(5.0, site.valkey.resume)
            else:
                site.valkey.kill()
            fresh = [await site.first.thread() for _ in range(2)]
            began_s = time.monotonic()
            new = await asyncio.gather(
                *(
                    site.servers[number % 2].say(fresh[number // 2], f"new {number // 2}", model="n2")
                    for number in range(4)
                )
            )
            took_s = time.monotonic() - began_s
            if fault == "restart":
                site.valkey.start()
            replies = await asyncio.gather(*answers)
            for watch in watches:
                await watch.rest()

        assert [reply.status for reply in (*replies, *new)] == [200] * 10
        assert took_s < 2.0
        assert calls(site) == 8
        for place, thread in enumerate(threads):
            stored = (await site.first.messages(thread))[1][1]
            leading, following = watches[2 * place : 2 * place + 2]
            assert leading.text == following.text == stored
            assert terminal(following.events).raw == terminal(leading.events).raw
            assert [event.name for event in following.events if event.name in ("reset", "error")] == []
        await ready(site.first, "degraded" if fault == "kill" else "ok")


async def test_servers_start_without_their_valkey_and_find_it_later(tmp_path):
    """They say so, and serve meanwhile."""
    async with AsyncExitStack() as opened:
        valkey = RedisServer(tmp_path / "valkey")
        opened.callback(valkey.kill)
        provider = await opened.enter_async_context(FakeProvider())
        servers = [
            await opened.enter_async_context(serve_process(tmp_path, provider.base_url, redis_url=valkey.url))
            for _ in range(2)
        ]
        thread = await servers[0].thread()
        replies = await asyncio.gather(*(server.say(thread, model="lat300-n3") for server in servers))
        assert [reply.status for reply in replies] == [200, 200]
        assert provider.count == 1
        await ready(servers[0], "degraded")
        valkey.start()
        for server in servers:
            await ready(server, "ok")
        await asyncio.sleep(0.3)
        model = f"lat1800-{SLOW}"
        async with (
            await stream_of(servers[0], thread, "more", model=model) as leading,
            await stream_of(servers[1], thread, "more", model=model) as following,
        ):
            await asyncio.gather(leading.rest(), following.rest())
        assert told(leading) == told(following)


# -- without one -------------------------------------------------------------------------------------------------


async def test_two_servers_on_one_file_coalesce_without_a_valkey(tmp_path):
    """Through the database: one call, equal answers, streams from the row, cancels within a second."""
    async with two_servers(tmp_path, redis=False, lease_s=1) as site:
        thread = await site.first.thread()
        replies = await asyncio.gather(
            *(site.servers[number % 2].say(thread, model="lat600-n5") for number in range(20))
        )
        assert [reply.status for reply in replies] == [200] * 20
        assert len({reply.body for reply in replies}) == 1
        assert calls(site) == 1

        other = await site.first.thread()
        async with (
            await stream_of(site.first, other, model=SLOW) as leading,
            await stream_of(site.second, other, model=SLOW) as following,
        ):
            await asyncio.gather(leading.rest(), following.rest())
        assert following.text == leading.text
        assert terminal(following.events).raw == terminal(leading.events).raw

        third = await site.first.thread()
        async with await stream_of(site.first, third, model="n400-gap25") as running:
            await running.until("delta")
            place = running.reply.headers["location"]
            began_s = time.monotonic()
            cancelled = await site.second.ask("POST", place.replace("/stream", "/cancel"))
            assert cancelled.json()["state"] == "cancelled"
            assert time.monotonic() - began_s < 1.2
            assert terminal(await running.rest()).data["state"] == "cancelled"


# -- what cannot be used -----------------------------------------------------------------------------------------


async def refusal(folder: Path, *, url: str, without_driver: bool = False) -> str:
    """What a server that does not start says."""
    program = "from oncewise.cli.main import main; main()"
    if without_driver:
        program = f"import sys; sys.modules['redis'] = None; {program}"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, "serve", "--port", "0", "--redis", url,
        env={"PATH": "", "HOME": str(folder), "ONCEWISE_DATABASE_URL": f"sqlite:///{folder / 'ow.db'}"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    async with asyncio.timeout(30):
        output, _ = await process.communicate()
    assert process.returncode == 1
    assert b"Traceback" not in output
    return output.decode()


async def test_a_server_without_the_driver_says_what_to_install(tmp_path):
    """And a URL that cannot be used is named, not shown."""
    assert "pip install 'oncewise[cluster]'" in await refusal(tmp_path, url="redis://h", without_driver=True)
    said = await refusal(tmp_path, url="redis://:hunter2@h:99999999/0")
    assert "ONCEWISE_REDIS_URL" in said
    assert "hunter2" not in said


# -- one call, many turns ----------------------------------------------------------------------------------------


async def test_threads_of_two_servers_that_send_one_prompt_make_one_call(site):
    """JSON and streams, twenty turns: one text, one call, paid for once in the figures of both."""
    threads = [await site.servers[number % 2].thread() for number in range(20)]
    said = {"content": "the same everywhere", "model": "lat600-n5"}
    before = await upstream_calls(site)
    asked = [
        (site.servers[number % 2].say if number % 4 < 2 else site.servers[number % 2].stream)(thread, **said)
        for number, thread in enumerate(threads)
    ]

    replies = await asyncio.gather(*asked)

    assert [reply.status for reply in replies] == [200] * 20
    assert calls(site) == 1
    assert len({(await site.first.messages(thread))[1] for thread in threads}) == 1
    async with asyncio.timeout(5):
        while await upstream_calls(site) != before + 1:
            await asyncio.sleep(0.1)


async def upstream_calls(site: Site) -> int:
    figures = await site.second.ask("GET", "/api/metrics/performance?last_n=1000")
    return int(figures.json()["upstream"]["calls"])


async def test_a_killed_server_costs_those_that_shared_its_call_one_more(tmp_path):
    """Whoever has been shown nothing is answered within seconds; who has seen something is told, and keeps it."""
    async with two_servers(tmp_path) as site:
        mine, unseen, seen = [await site.second.thread() for _ in range(3)]
        said = {"content": "the same everywhere", "model": "n40-gap100"}
        leading = asyncio.ensure_future(site.first.say(mine, **said))
        await until(lambda: calls(site) == 1)
        waiting = asyncio.ensure_future(site.second.say(unseen, **said))
        async with await stream_of(site.second, seen, **said) as watch:
            await watch.until("delta")
            site.first.signal(signal.SIGKILL)
            killed_s = time.monotonic()
            ending = terminal(await watch.rest())
            assert time.monotonic() - killed_s < 4
            reply = await waiting

    assert (ending.data["code"], ending.data["retryable"]) == ("leader_lost", True)
    assert reply.status == 200
    assert time.monotonic() - killed_s < 4 + 5
    assert calls(site) == 2
    await asyncio.gather(leading, return_exceptions=True)
