"""PostgreSQL as an operator meets it: commands, refusals, and threads that move between the two engines."""

import subprocess
import sys

import pytest

from tests.support.commands import environment, oncewise
from tests.support.fake_provider import FakeProvider
from tests.support.http import ORG
from tests.support.postgres import empty_database, fresh_database
from tests.support.server import serve_process

PASSWORD = "hunter2"


@pytest.fixture
async def empty():
    """The URL of an empty database, as somebody with a password has it."""
    async with empty_database() as url:
        yield url.replace("postgres@", f"postgres:{PASSWORD}@")


async def test_from_an_empty_database_to_a_server(empty, tmp_path):
    """Each step says what the next one is, and none shows the password."""
    database = ("--database", empty)
    said = []

    def step(*arguments: str, status: int = 0) -> str:
        done = oncewise(*arguments, *database)
        said.append(done.stdout + done.stderr)
        assert done.returncode == status, said[-1]
        return said[-1]

    assert step("db", "current").startswith("empty; this version's schema is ")
    assert step("db", "current", "--check", status=1) == step("db", "current")
    refused = step("serve", "--port", "0", status=1)
    assert "is empty" in refused
    assert "`oncewise db upgrade`" in refused
    assert step("db", "upgrade") == step("db", "current", "--check")
    open_to_all = step("serve", "--host", "0.0.0.0", "--port", "0", status=1)
    assert "oncewise keys create --org ORG --database postgresql://postgres:***@127.0.0.1:" in open_to_all
    made = step("keys", "create", "--org", "acme").splitlines()
    assert made[-1].startswith("ow_")
    async with FakeProvider() as fake, serve_process(tmp_path, fake.base_url, database_url=empty) as server:
        assert (await server.ask("GET", "/health/readiness")).status == 200
        assert "postgresql://postgres:***@127.0.0.1:" in "".join(server.lines)
        said.append("".join(server.lines))
    assert not [text for text in said if PASSWORD in text]


def test_without_the_driver_one_sentence_says_how_to_get_it():
    """It comes with an extra that one process with SQLite does not need."""
    without = "import sys; sys.modules['asyncpg'] = None; from oncewise.cli.main import main; main()"
    command = [sys.executable, "-c", without, "serve", "--port", "0", "--database", "postgresql://h/d"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 1
    assert done.stderr == "oncewise: PostgreSQL needs its driver: pip install 'oncewise[cluster]'.\n"


async def test_threads_move_between_the_engines(tmp_path):
    """Over HTTP and by the command line, there and back: the same messages, byte for byte."""
    text = "Grüße, 漢字, 🙂, \u2028 and a\ttab"
    async with (
        fresh_database() as url,
        FakeProvider() as fake,
        serve_process(tmp_path, fake.base_url) as on_sqlite,
        serve_process(tmp_path, fake.base_url, database_url=url) as on_postgres,
    ):
        thread = await on_sqlite.thread()
        for content in (text, "x" * 100_000):
            assert (await on_sqlite.say(thread, content, model="u2028-n3")).status == 200
        exported = (await on_sqlite.ask("GET", f"/api/threads/{thread}/export")).body
        sent = (ORG, ("content-type", "application/x-ndjson"))
        moved = (await on_postgres.ask("POST", "/api/threads/import", exported, sent)).json()["thread_id"]

        async def by_command(*arguments: str, server) -> str:
            at = ("--url", f"http://127.0.0.1:{server.port}", "--org", "acme")
            done = oncewise("threads", *arguments, *at)
            assert done.returncode == 0, done.stderr
            return done.stdout

        file = tmp_path / "thread.jsonl"
        file.write_text(await by_command("export", moved, server=on_postgres))
        back = (await by_command("import", str(file), server=on_sqlite)).strip()
        again = (await by_command("import", str(file), server=on_postgres)).strip()

        told = await on_sqlite.messages(thread)
        assert [content for _, content in told][::2] == [text, "x" * 100_000]
        assert await on_postgres.messages(moved) == told
        assert await on_sqlite.messages(back) == told
        assert await on_postgres.messages(again) == told
        # And it goes on.
        assert (await on_postgres.say(moved, "More", model="n2")).status == 200
        assert len(fake.calls[-1].request["messages"]) == 5
