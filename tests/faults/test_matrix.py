"""The fault matrix, row by row: what is broken, and what of it is seen.

Some rows are smaller here than the matrix has them; `python -m tests.faults --figures matrix` runs all in full.

F07, F09, F24 to F26, F28, F30, F32 and F33, and twenty of each of F01 and F03 to F06, break the same thing many times
(`tests.faults.figures`). F19 is
`test_two_hundred_clients_that_never_read_cost_the_others_nothing` and F43, a row for each way in which a provider can
fail, `tests/acceptance/test_fault_matrix.py`.
"""

import asyncio
import ctypes.util
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from oncewise.api.app import App
from oncewise.api.server import Server
from oncewise.api.sockets import listen
from oncewise.api.sse import SseEncoder
from oncewise.bootstrap import Services, open_services
from oncewise.settings import ProviderSettings, Settings
from oncewise.storage.engines import open_database
from tests.faults.check import calls_of, violations
from tests.faults.clients import Ask, History, JsonClient, SseClient
from tests.faults.figures import FULL
from tests.faults.server import FailingDatabase, Point
from tests.faults.site import Deployment, Member, deployment
from tests.faults.storms import GENERATION_S, Trial, crowd, judge, kill, new_ask, served
from tests.support.fake_provider import FakeProvider
from tests.support.http import JSON, ORG, Site, parse_reply
from tests.support.postgres import roomy
from tests.support.server import serve_process
from tests.support.watching import terminal, text_of, until, watching

pytestmark = pytest.mark.slow


def sized(few: int, full: int) -> int:
    """How many: for the test suite, and as the matrix says."""
    return full if FULL in os.environ else few


@pytest.fixture
def chance() -> random.Random:
    return random.Random(11)


def readable(member: Member) -> psutil.Process:
    return psutil.Process(member.process.pid)


async def post(member: Site, ask: Ask, **fields: object):
    """One request without any retry."""
    path = f"/api/threads/{ask.thread}/messages"
    return await member.ask("POST", path, {**ask.body, **fields}, [*ask.headers, JSON])


# -- processes -----------------------------------------------------------------------------------------------------


async def test_a_leader_that_dies_or_stops_between_two_steps(tmp_path):
    """F01, F03 to F06, F35: answered, stored once, and not one call more than needed."""
    lease_s = 2
    rows = [
        (Point.AFTER_CLAIM, (JsonClient,), {1}),
        (Point.MID_STREAM, (JsonClient,), {2}),
        (Point.MID_STREAM, (SseClient,), {2}),
        (Point.AFTER_VISIBLE, (SseClient,), {2}),
        (Point.IN_TX, (JsonClient,), {2}),
        (Point.BEFORE_ACK, (JsonClient, SseClient), {1}),
        (Point.PAUSE_IN_TX, (JsonClient,), {2}),
    ]
    async with deployment(tmp_path, 3, lease_s=lease_s) as site:
        for number, (point, kinds, calls) in enumerate(rows):
            for place, member in enumerate(site.members):
                if not member.alive:
                    await site.restart(place)
            victim = await site.restart(0, CRASH_AT=point.value)
            waking = asyncio.ensure_future(_wake_later(victim, point))
            trial = await kill(site, Trial("matrix", 1, number), point, 0, kinds)
            await waking
            assert trial.struck == point, point
            assert trial.violations == [], point
            assert set(trial.calls) <= calls | {1}, point
            assert trial.after_s is not None
            assert _first_after_s(trial) < lease_s + 6 + GENERATION_S, point
            # Who is connected to a stopped server is answered when it goes on.
            assert trial.after_s < WAKE_S + GENERATION_S + 2, (point, trial.after_s)
            told = [told.code for told in trial.history.told]
            # Only text that was shown is a reason to be told of the loss.
            assert ("leader_lost" in told) == (kinds == (SseClient,) and point is not Point.BEFORE_ACK), (point, told)


WAKE_S = 9.0


async def _wake_later(member: Member, point: Point) -> None:
    """Let a stopped process go on when others must have had its turn."""
    if point is Point.PAUSE_IN_TX:
        with suppress(TimeoutError):
            async with asyncio.timeout(10):
                await member.ended(point)
        await asyncio.sleep(WAKE_S)
        member.go_on()


def _first_after_s(trial: Trial) -> float:
    """Seconds from the fault to the first whole answer."""
    fault_s = max(ended for _, _, ended in trial.history.waits.values() if ended is not None) - (trial.after_s or 0.0)
    return min(told.end_s for told in trial.history.told if told.state == "completed") - fault_s


async def test_all_are_killed_and_started_again(tmp_path, chance):
    """F08: who comes back is answered; what nobody waits for any more is ended a lease and some seconds later."""
    async with deployment(tmp_path, 2, lease_s=2) as site:
        for number in range(sized(1, 10)):
            trial = Trial("matrix", 1, 80 + number)
            before = site.provider.count
            ask, left = await new_ask(site, chance), await new_ask(site, chance, "hang")
            serving = asyncio.ensure_future(served(crowd(site, trial.history, ask, chance), chance))
            leaving = asyncio.ensure_future(post(site.members[0], left))
            await until(lambda before=before: site.provider.count == before + 2)
            await asyncio.sleep(0.3)
            for member in site.members:
                member.strike()
            await asyncio.gather(leaving, return_exceptions=True)
            await asyncio.gather(*(site.restart(place) for place in range(2)))
            began_s = time.monotonic()
            await serving
            assert await site.settle([left.thread], 15)
            # The lease, three seconds for those who may wait, and a sweep that comes once in a lease.
            assert time.monotonic() - began_s < 2 + 3 + 2 + 3
            await judge(site, trial)
            assert trial.violations == []


async def test_a_server_that_is_asked_to_stop_under_twenty_streams(tmp_path, chance):
    """F12: it is gone in time, and every stream goes on at another server, where it was."""
    async with deployment(tmp_path, 2, drain_s=0.6) as site:
        history = History()
        asks = [await new_ask(site, chance, "n30-gap50") for _ in range(4)]
        clients = [SseClient(site, history, number, asks[number % 4]) for number in range(20)]
        watching_all = asyncio.ensure_future(asyncio.gather(*(client.run(0) for client in clients)))
        await until(lambda: site.provider.count == 4)
        await asyncio.sleep(0.5)
        leaving = site.members[0]
        leaving.signal(signal.SIGTERM)
        began_s = time.monotonic()
        assert await leaving.exited(30) == 0
        assert time.monotonic() - began_s < 5
        await watching_all
        rows = await site.rows({ask.thread for ask in asks})
        assert violations(history, rows, site.provider.calls, bound_s=20, broken=asks) == []
        assert any(told.positions for told in history.told if told.state == "lost"), "no stream was cut"


async def test_files_run_out(tmp_path, chance):
    """F14: two hundred connections and room for fewer; it serves again when they are gone."""
    async with deployment(tmp_path, 1, postgres=False) as site:
        member = site.members[0]
        ask = await new_ask(site, chance, "n2")
        await post(member, ask)
        readable(member).rlimit(resource.RLIMIT_NOFILE, (member.open_files + 40, 4096))
        opened = await asyncio.gather(*(member.connect() for _ in range(200)))
        await asyncio.sleep(1.0)
        assert member.alive
        for _, writer in opened:
            writer.close()
        async with asyncio.timeout(4):
            assert (await post(member, await new_ask(site, chance, "n2"))).status == 200
        assert await site.leaks() == []


async def test_one_worker_of_two_dies_again_and_again(tmp_path, chance):
    """F16: the other serves, and clients that ask again are all answered."""
    async with FakeProvider() as provider, serve_process(tmp_path, provider.base_url, workers=2, lease_s=3) as server:
        supervisor = psutil.Process(server.process.pid)
        thread = await server.thread()
        stopping = asyncio.Event()
        answered: list[int] = []

        async def ask(number: int) -> None:
            asked = 0
            while not stopping.is_set():
                asked += 1
                async with asyncio.timeout(20):
                    while (status := await _status(server, thread, f"{number}.{asked}")) != 200:
                        await asyncio.sleep(0.1)
                answered.append(status)

        asking = [asyncio.ensure_future(ask(number)) for number in range(4)]
        for _ in range(sized(5, 24)):
            await asyncio.sleep(1.2 if FULL not in os.environ else 5.0)
            workers = [child for child in supervisor.children() if "oncewise.cli.worker" in " ".join(child.cmdline())]
            chance.choice(workers).kill()
        await asyncio.sleep(1.0)
        stopping.set()
        await asyncio.gather(*asking)
        assert len(answered) > 20
        stored = [role for role, _ in await server.messages(thread)]
        assert stored == ["user", "assistant"] * (len(stored) // 2)


async def _status(server: Site, thread: str, content: str) -> int:
    try:
        body = json.dumps({"content": content, "model": "n2-gap20"}).encode()
        head = [server.host, ("connection", "close"), ORG, JSON, ("content-length", str(len(body)))]
        data = await server.raw(server.head("POST", f"/api/threads/{thread}/messages", head) + body)
        return parse_reply(data).status if data else 0
    except (OSError, ValueError, IndexError):
        return 0


@pytest.mark.parametrize("skew_s", [3600, -3600, 1, -1])
async def test_the_clock_of_one_server_is_wrong(tmp_path, chance, skew_s):
    """F41: leases and replays go by the database's clock, waits by one that nobody sets."""
    library = os.environ.get("ONCEWISE_TEST_FAKETIME") or _faketime()
    if library is None:
        pytest.skip("libfaketime is missing (ONCEWISE_TEST_FAKETIME names it); the simulation steps clocks as well")
    async with deployment(tmp_path, 2, lease_s=2) as site:
        await site.restart(
            1, LD_PRELOAD=library, FAKETIME=f"{skew_s:+d}", FAKETIME_DONT_FAKE_MONOTONIC="1", FAKETIME_NO_CACHE="1"
        )
        for number in range(sized(1, 8)):
            trial = Trial("matrix", 1, 410 + number)
            ask = await new_ask(site, chance, "n30-gap100")
            await served(crowd(site, trial.history, ask, chance), chance)
            await judge(site, trial, broken=False)
            assert (trial.violations, trial.calls) == ([], [1])


def _faketime() -> str | None:
    places = [*Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), Path("/usr/lib/faketime/libfaketime.so.1")]
    found = next((str(place) for place in places if place.exists()), None)
    return found or ctypes.util.find_library("faketime")


# -- clients -------------------------------------------------------------------------------------------------------


async def test_clients_leave(tmp_path, chance):
    """F17: the leader's own, and others stay. F18: all of them; the turn goes on, or stops if it was asked to."""
    async with deployment(tmp_path, 2) as site:
        here, there = site.members
        ask = await new_ask(site, chance)
        path = f"/api/threads/{ask.thread}/messages/stream"
        async with watching(here, path, ask.body, org=("x-org-id", ask.org)) as stream:
            await stream.until("delta")
            history = History()
            staying = asyncio.ensure_future(served(crowd(site, history, ask, chance, 4), chance, 0.0))
            await asyncio.sleep(0.3)
            stream.leave()
        await staying
        assert {told.state for told in history.told} == {"completed"}
        assert len(calls_of(ask, site.provider.calls)) == 1
        ends = [("continue", "completed"), ("cancel", "cancelled")] * sized(1, 8)
        for keeps_on, state in ends:
            for member in (here, there):
                ask = await new_ask(site, chance, "n40-gap50")
                path = f"/api/threads/{ask.thread}/messages/stream"
                body = {**ask.body, "on_disconnect": keeps_on}
                async with watching(member, path, body, org=("x-org-id", ask.org)) as stream:
                    await stream.until("delta")
                    stream.leave()
                began_s = time.monotonic()
                assert await site.settle([ask.thread], 10)
                (row,) = (await site.rows([ask.thread])).turns
                assert row.state == state
                assert state == "completed" or time.monotonic() - began_s < 2
        assert await site.leaks() == []


async def test_a_client_that_reads_a_byte_at_a_time_holds_nobody_up(tmp_path, chance):
    """F20: the leader finishes when it would have."""
    async with deployment(tmp_path, 1, postgres=False) as site:
        member = site.members[0]
        took_s = []
        for slow in (0, 50):
            ask = await new_ask(site, chance, "n100-gap10-tok400")
            body = json.dumps(ask.body).encode()
            fields = [member.host, *ask.headers, JSON, ("content-length", str(len(body)))]
            request = member.head("POST", f"/api/threads/{ask.thread}/messages/stream", fields) + body
            began_s = time.monotonic()
            answering = asyncio.ensure_future(post(member, ask))
            async with AsyncExitStack() as stack:
                trickling = []
                for _ in range(slow):
                    reader, writer = await asyncio.open_connection("127.0.0.1", member.port, limit=1)
                    stack.callback(writer.close)
                    writer.write(request)
                    trickling.append(asyncio.ensure_future(_trickle(reader)))
                reply = await answering
                took_s.append(time.monotonic() - began_s)
                for task in trickling:
                    task.cancel()
            assert reply.status == 200
        assert took_s[1] < took_s[0] * 1.05 + 0.3, took_s
        assert site.provider.count == 2


async def _trickle(reader: asyncio.StreamReader) -> None:
    while await reader.read(1):
        await asyncio.sleep(1.0)


async def test_streams_are_taken_up_again_from_anywhere_on_any_server(tmp_path, chance):
    """F21: what came before a position and what comes after it is the whole, while the turn runs and afterwards."""
    async with deployment(tmp_path, 2) as site:
        ask = await new_ask(site, chance, "n60-gap20")
        org = ("x-org-id", ask.org)
        parts: list[tuple[str, str]] = []
        async with watching(
            site.members[0], f"/api/threads/{ask.thread}/messages/stream", ask.body, org=org
        ) as leading:
            path = f"/api/threads/{ask.thread}/turns/{leading.turn_id}/stream"

            async def resume(member: Member, seen: str, after: str) -> None:
                async with watching(member, path, headers=[("last-event-id", after)], org=org) as again:
                    events = await again.rest()
                assert terminal(events).name == "done"
                # A server whose row is behind what the leader showed begins anew, and says so.
                anew = "stream-replayed-from" in again.reply.headers
                parts.append(("" if anew else seen, text_of(events)))

            resuming = []
            while (event := await leading.next()) is not None:
                if event.name == "delta":
                    after = leading.last_id
                    resuming += [asyncio.ensure_future(resume(member, leading.text, after)) for member in site.members]
            await asyncio.gather(*resuming)
            whole = leading.text
        positions = [event.id for event in leading.events if event.name == "delta"]
        for _ in range(sized(100, 500)):
            number = chance.randrange(len(positions))
            shown = text_of([event for event in leading.events if event.name == "delta"][: number + 1])
            await resume(chance.choice(site.members), shown, positions[number])
        assert len(parts) > 150
        assert {seen + rest for seen, rest in parts} == {whole}
        assert site.provider.count == 1


async def test_crowds_that_only_cost(tmp_path, chance):
    """F23: connections that never say what they want, and thousands of messages that nobody asked before."""
    kept_s = 3
    async with deployment(tmp_path, 1, postgres=False, log_retention_s=kept_s, replay_window_s=kept_s) as site:
        member = site.members[0]
        before_s = await _p95_of_good_clients(site, chance)
        slow = await asyncio.gather(*(member.connect() for _ in range(sized(500, 1000))))
        for _, writer in slow:
            writer.write(b"GET /health HTTP/1.1\r\nhost: ")
        opened_s = time.monotonic()
        # And a floor, below which a machine that is others' too cannot be measured.
        assert await _p95_of_good_clients(site, chance) < max(2 * before_s, 0.2)
        async with asyncio.timeout(20):
            assert all(await asyncio.gather(*(_closed(reader) for reader, _ in slow)))
        assert time.monotonic() - opened_s < 15 + 2
        for _, writer in slow:
            writer.close()
        await _never_asked_before(site, chance, sized(100, 5000))
        # What is kept of the last ten thousand requests, that they ended, is not yet half there; logs are kept a while.
        warm_bytes = member.rss_bytes
        await _never_asked_before(site, chance, sized(100, 5000))
        await asyncio.sleep(sized(0, kept_s + 5))
        assert await site.leaks() == []
        assert member.rss_bytes < warm_bytes * 1.1


async def _never_asked_before(site: Deployment, chance: random.Random, many: int) -> None:
    for _ in range(many // 50):
        asked = [await new_ask(site, chance, "n1") for _ in range(10)]
        keyed = [replace(each, key=f"key-{number}") for each in asked for number in range(5)]
        replies = await asyncio.gather(*(post(site.members[0], each) for each in keyed))
        assert {reply.status for reply in replies} == {200}


async def _p95_of_good_clients(site: Deployment, chance: random.Random) -> float:
    took_s = []
    for _ in range(40):
        asked = [await new_ask(site, chance, "n1") for _ in range(5)]
        began_s = time.monotonic()
        replies = await asyncio.gather(*(post(site.members[0], each) for each in asked))
        took_s.append(time.monotonic() - began_s)
        assert {reply.status for reply in replies} == {200}
    return sorted(took_s)[-3]


async def _closed(reader: asyncio.StreamReader) -> bool:
    with suppress(ConnectionError):
        data = await reader.read()
        return data == b"" or b" 408 " in data
    return True


# -- storage -------------------------------------------------------------------------------------------------------


async def test_postgresql_is_stopped_for_five_seconds(tmp_path, chance):
    """F31: who asks meanwhile is refused or waits, nothing is used up, and two seconds later all is as before."""
    async with deployment(tmp_path, 2, lease_s=3) as site:
        assert site.postgres is not None
        trial = Trial("matrix", 1, 31)
        ask = await new_ask(site, chance)
        serving = asyncio.ensure_future(served(crowd(site, trial.history, ask, chance), chance))
        await asyncio.sleep(0.4)
        engine = psutil.Process(site.postgres.pid)
        stopped = [engine, *engine.children(recursive=True)]
        asked = [await new_ask(site, chance, "n2") for _ in range(20)]
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        meanwhile = [asyncio.ensure_future(post(site.members[n % 2], each)) for n, each in enumerate(asked)]
        await asyncio.sleep(5)
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        began_s = time.monotonic()
        async with asyncio.timeout(10):
            while (await post(site.members[0], await new_ask(site, chance, "n2"))).status != 200:
                await asyncio.sleep(0.05)
        assert time.monotonic() - began_s < 3
        replies = await asyncio.gather(*meanwhile)
        # A claim that was made late has no lease any more.
        assert {reply.status if reply.status == 200 else reply.code for reply in replies} <= {
            200, "storage_unavailable", "leader_lost",
        }  # fmt: skip
        await serving
        await judge(site, trial)
        assert trial.violations == []
        assert await site.leaks() == []


async def test_the_disk_is_full(chance):
    """F37: told as such, what was stored is read as before, and it goes on by itself when there is room."""
    # In memory: what is written there is not slower for what others write.
    folder = Path(roomy() or ".") / f"oncewise-full-{os.getpid()}"
    folder.mkdir()
    try:
        async with deployment(folder, 1, postgres=False) as site:
            member = site.members[0]
            ask = await new_ask(site, chance, "n20")
            stored = (await post(member, ask)).json()["assistant_message"]["content"]
            size = max(file.stat().st_size for file in folder.iterdir() if file.is_file())
            readable(member).rlimit(resource.RLIMIT_FSIZE, (size + 40_000, resource.RLIM_INFINITY))
            large = {"content": "x" * 150_000, "model": "n2"}
            refused = await member.ask("POST", f"/api/threads/{ask.thread}/messages", large, [*ask.headers, JSON])
            assert (refused.status, refused.code) == (507, "storage_full")
            read = await member.ask("GET", f"/api/threads/{ask.thread}", headers=ask.headers)
            assert [message["content"] for message in read.json()["messages"]] == [ask.content, stored]
            readable(member).rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            began_s = time.monotonic()
            async with asyncio.timeout(10):
                while (
                    await member.ask("POST", f"/api/threads/{ask.thread}/messages", large, [*ask.headers, JSON])
                ).status != 200:
                    await asyncio.sleep(0.1)
            assert time.monotonic() - began_s < 5
            assert len((await site.rows([ask.thread])).messages) == 4
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def test_the_disk_is_full_when_the_log_is_folded_into_the_file(chance):
    """F37, in a checkpoint: turns are stored in the log as long as that has room; then told, and nothing is lost."""
    folder = Path(roomy() or ".") / f"oncewise-folding-{os.getpid()}"
    folder.mkdir()
    try:
        async with deployment(folder, 1, postgres=False) as site:
            member = site.members[0]
            stored: list[Ask] = []

            async def send() -> tuple[int, str | None]:
                ask = replace(await new_ask(site, chance, "n2"), content="x" * 150_000)
                reply = await post(member, ask)
                if reply.status == 200:
                    stored.append(ask)
                return reply.status, None if reply.status == 200 else reply.code

            # A file that is larger than its log is when that is folded, so that the limit is met by the file first.
            while (file := folder / "ow.db").stat().st_size < 12 * 2**20:
                assert await send() == (200, None)
            size = file.stat().st_size
            readable(member).rlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            before = len(stored)
            while (told := await send()) == (200, None):
                assert len(stored) < before + 100
            assert told == (507, "storage_full")
            assert len(stored) > before
            assert (folder / "ow.db-wal").stat().st_size > 5 * 2**20, "the log was not too long to be folded"
            assert file.stat().st_size == size
            await _all_are_read(member, stored)
            readable(member).rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            async with asyncio.timeout(5):
                while await send() != (200, None):
                    await asyncio.sleep(0.1)
            await _all_are_read(member, stored)
            await _all_are_read(await site.restart(0), stored)
            assert file.stat().st_size > size
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _all_are_read(member: Member, stored: list[Ask]) -> None:
    for ask in stored:
        read = await member.ask("GET", f"/api/threads/{ask.thread}", headers=ask.headers)
        assert [message["role"] for message in read.json()["messages"]] == ["user", "assistant"]
        assert read.json()["messages"][0]["content"] == ask.content


@pytest.mark.parametrize(("held_s", "status"), [(3.0, 200), (8.0, 503)])
async def test_another_program_holds_the_lock_of_the_file(tmp_path, chance, held_s, status):
    """F39: waited for five seconds, then told; whatever needs no writing is answered at once meanwhile."""
    async with deployment(tmp_path, 1, postgres=False) as site:
        member = site.members[0]
        ask = await new_ask(site, chance, "n2")
        other = sqlite3.connect(tmp_path / "ow.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        loop = asyncio.get_running_loop()
        loop.call_later(held_s, other.execute, "COMMIT")
        began_s = loop.time()
        asking = asyncio.ensure_future(post(member, ask))
        stalls = []
        while not asking.done():
            looked_s = loop.time()
            assert (await member.ask("GET", f"/api/threads/{ask.thread}", headers=ask.headers)).status == 200
            stalls.append(loop.time() - looked_s)
            await asyncio.sleep(0.05)
        reply = await asking
        assert reply.status == status
        assert loop.time() - began_s < 7
        # All but a few: the machine is others' too.
        assert sorted(stalls)[int(len(stalls) * 0.9)] < 0.15
        await asyncio.sleep(max(0.0, held_s - (loop.time() - began_s)) + 0.1)
        assert (await post(member, ask)).status == 200
        other.close()


# -- the n-th operation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [False, True], ids=["refused", "done but not told"])
async def test_every_single_operation_of_the_database_fails_once(tmp_path, done):
    """F45: for every n, the n-th; whatever that is, all who come back are answered and nothing is left behind."""
    async with FakeProvider() as provider:
        failed: list[str] = []
        for nth in range(1, 200):
            opened: list[FailingDatabase] = []
            folder = tmp_path / str(nth)
            folder.mkdir()
            seen = await _with_one_failure(folder, provider, nth, opened, done=done)
            assert seen == [], (nth, opened[0].failed)
            if opened[0].failed is None:
                break
            failed.append(opened[0].failed)
        else:
            raise AssertionError("more operations than that?")
    # What it met; a name that is not here was renamed, or is not reached any more.
    assert {"admit", "record_call", "mark_visible", "commit"} <= set(failed)


class _Refusing(Server):
    """Returns if it cannot start; uvicorn's leaves the process."""

    async def startup(self, sockets=None):
        try:
            await super().startup(sockets)
        except SystemExit:
            self.should_exit = True


async def _with_one_failure(
    folder: Path, provider: FakeProvider, nth: int, opened: list[FailingDatabase], *, done: bool
) -> list[str]:
    openai = ProviderSettings(
        name="openai", api_key="sk-test", base_url=provider.base_url, default_model="n3", rps=1000, burst=100,
        concurrency=100,
    )  # fmt: skip
    settings = Settings(database_url=f"sqlite:///{folder / 'ow.db'}", providers={"openai": openai}, lease_s=1)

    async def storage(chosen: Settings, owner: str) -> FailingDatabase:
        opened.append(FailingDatabase(await open_database(chosen, owner=owner), nth, done=done))
        return opened[-1]

    async def open_all() -> Services:
        return await open_services(settings, SseEncoder(), open_storage=storage)

    app = App(open_all)
    server = _Refusing(app, drain_s=0.0)
    sockets = listen("127.0.0.1", 0)
    serving = asyncio.create_task(server.serve(sockets))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.005)
    if not server.started:
        # It said why; started again it does.
        for bound in sockets:
            bound.close()
        return []
    site = Deployment(folder, provider, settings.database_url, settings={"lease_s": 1})
    member = Site(sockets[0].getsockname()[1], app.services, None, server)
    site.members = [member]  # type: ignore[list-item]
    history = History()
    chance = random.Random(nth)
    ask = await new_ask(site, chance, "n3-gap5")
    clients = [JsonClient(site, history, 0, ask, 10), SseClient(site, history, 1, ask, 10)]
    await asyncio.gather(*(client.run() for client in clients))
    await site.settle([ask.thread], 8)
    rows = await site.rows([ask.thread])
    seen = violations(history, rows, provider.calls, bound_s=10, broken=[ask])
    stats = app.services.turns.flights.stats()
    if stats.flights:
        seen.append(f"I8 {stats}")
    server.should_exit = True
    await serving
    await site.database.aclose()
    return seen
