"""A LiteLLM configuration as its how-to shows it, on a real server."""

import asyncio
import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import ROOT, oncewise, serving
from tests.support.fake_provider import FakeProvider

PAGE = (ROOT / "docs/how-to/from-litellm.md").read_text()
EXAMPLE = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0]
KEYS = {"OPENAI_API_KEY": "sk-secret-1", "ANTHROPIC_API_KEY": "sk-secret-2"}


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"content-type": "application/json", "x-org-id": "acme"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=20) as reply:
        return json.load(reply)


def ask(url: str, model: str) -> dict[str, Any]:
    thread = post(f"{url}/api/threads/", {})["thread_id"]
    return post(f"{url}/api/threads/{thread}/messages", {"content": "hi", "model": model})["assistant_message"]


def complete(url: str, model: str) -> dict[str, Any]:
    """As LiteLLM's clients ask."""
    return post(f"{url}/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": "hi"}]})


def models(url: str) -> list[str]:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=20) as reply:
        return [model["id"] for model in json.load(reply)["data"]]


async def test_the_example_answers_under_its_names(tmp_path: Path) -> None:
    """Each from its own provider, on its own wire, with its own key."""
    async with FakeProvider("n3") as fake:
        text = EXAMPLE.replace("http://127.0.0.1:9100/v1", fake.base_url)
        text = re.sub(r"( +)(api_key: os.environ/.*\n)", rf"\1\2\1api_base: {fake.base_url}\n", text)
        file = tmp_path / "litellm.yaml"
        file.write_text(text)
        with serving("--config", str(file), **KEYS) as url:
            names = ("gpt-4o", "claude", "house-model")
            said = [await asyncio.to_thread(ask, url, name) for name in names]
            answers = [await asyncio.to_thread(complete, url, name) for name in names]
            offered = await asyncio.to_thread(models, url)
            with pytest.raises(urllib.error.HTTPError) as refused:
                await asyncio.to_thread(ask, url, "nobody/gpt-4o")
            unknown = json.load(refused.value)
        headers = [call.headers for call in fake.calls]
        asked = [call.request["model"] for call in fake.calls]
    assert [message["status"] for message in said] == ["complete"] * 3
    assert asked == ["gpt-4o", "claude-haiku-5-5", "meta/llama"] * 2
    assert [answer["choices"][0]["finish_reason"] for answer in answers] == ["stop"] * 3
    assert {*names} < {*offered}
    assert (unknown["status"], unknown["code"]) == (422, "unknown_provider")
    assert headers[0]["authorization"] == "Bearer sk-secret-1"
    assert headers[1]["x-api-key"] == "sk-secret-2"
    assert "authorization" not in headers[2]


def test_the_page_shows_what_the_program_says(tmp_path: Path) -> None:
    """The warning, the aliases and the limits; no key."""
    file = tmp_path / "litellm.yaml"
    file.write_text(EXAMPLE)
    result = oncewise("config", "show", "--config", str(file), COLUMNS="200", **KEYS)
    assert result.returncode == 0, result.stderr
    (shown,) = re.findall(r"^warning: (.*)$", PAGE, re.MULTILINE)
    assert shown in " ".join(result.stderr.split())
    assert re.search(r"ONCEWISE_ALIASES claude +anthropic/claude-haiku-5-5", result.stdout)
    assert re.search(r"OPENAI_RPS +2\.0", result.stdout)
    assert re.search(r"ANTHROPIC_CONCURRENCY +5", result.stdout)
    assert "secret" not in result.stdout + result.stderr
