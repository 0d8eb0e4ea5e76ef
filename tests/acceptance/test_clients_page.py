"""The page of clients, as it is: each of its programs runs against a server and says what the server said."""

import asyncio
import re
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.docs.reference import ROOT
from tests.support.http import Site, serve

PAGE = (ROOT / "docs/how-to/clients.md").read_text()
PROGRAMS = dict(re.findall(r"^## ([^\n]+)\n\n```\w+\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
NODE = ROOT / "tests/node/node_modules"
LANGCHAIN = ROOT / "tests/langchain/.venv/bin/python"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with serve(tmp_path) as site:
        yield site


def command(client: str, file: Path) -> list[str]:
    """How a program is run; skipped where its client is not installed."""
    needed = {"curl": shutil.which("curl"), "openai-python": True, "LangChain": LANGCHAIN.exists()}
    if not needed.get(client, (NODE / "openai").exists()):
        pytest.skip("run `make clients`")
    programs = {"curl": "sh", "openai-python": sys.executable, "LangChain": str(LANGCHAIN)}
    return [programs.get(client, "node"), str(file)]


@pytest.mark.parametrize("client", PROGRAMS)
async def test_a_program_of_the_page_runs(site: Site, tmp_path: Path, client: str) -> None:
    """With nothing changed but the port."""
    assert "http://localhost:8000" in PROGRAMS[client]
    (tmp_path / "node_modules").symlink_to(NODE)
    file = tmp_path / "program.mjs"
    file.write_text(PROGRAMS[client].replace("localhost:8000", f"127.0.0.1:{site.port}"))
    process = await asyncio.create_subprocess_exec(*command(client, file), stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(60):
        out, _ = await process.communicate()
    assert process.returncode == 0
    assert site.provider.text in out.decode()
    assert site.provider.calls[0].body["messages"] == [{"role": "user", "content": "Hi"}]


def test_the_page_has_every_client_that_is_tested() -> None:
    """And the reference has its address."""
    assert list(PROGRAMS) == ["curl", "openai-python", "openai-node", "Vercel AI SDK", "LangChain"]
