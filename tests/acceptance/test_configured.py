"""A TOML file as the reference shows it, on a real server: a table for each provider, aliases, policies, prices."""

import asyncio
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import serving
from tests.support.fake_provider import FakeProvider

FILE = """
default_provider = "house"

[providers.house]
base_url = "{url}"
default_model = "n3-lat300"
rps = 100
burst = 100
concurrency = 16

[providers.second-account]
dialect = "anthropic"
base_url = "{url}"
api_key = "sk-second"
rps = 100

[providers.openai]
base_url = "{url}"

[aliases]
fast = "house/n3-lat300"
clever = "second-account/n3"

[v1_coalesce_models]
"house/n3-lat300" = "always"

[v1_coalesce_tenants]
apart = "off"

[prices."house/n3-lat300"]
input_usd_per_mtok = 2
output_usd_per_mtok = 8
"""


def call(url: str, path: str, body: Any = None, org: str = "default") -> tuple[Any, dict[str, str]]:
    headers = {"content-type": "application/json", "x-org-id": org}
    request = urllib.request.Request(f"{url}{path}", None if body is None else json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=20) as reply:
        return json.load(reply), dict(reply.headers)


def ask(url: str, model: str, org: str = "default") -> tuple[Any, dict[str, str]]:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    return call(url, "/v1/chat/completions", body, org)


async def test_every_table_means_what_the_reference_says(tmp_path: Path) -> None:
    """Names reach their provider on its wire with its key; what shares, and what it costs, is as it was set."""
    async with FakeProvider() as fake:
        file = tmp_path / "oncewise.toml"
        file.write_text(FILE.format(url=fake.base_url))
        with serving("--config", str(file), OPENAI_API_KEY="sk-from-environment") as url:
            listed = [model["id"] for model in (await asyncio.to_thread(call, url, "/v1/models"))[0]["data"]]
            alone = [(await asyncio.to_thread(ask, url, name))[0] for name in ("clever", "openai/n1", "n2")]
            shared = await asyncio.gather(*(asyncio.to_thread(ask, url, "fast") for _ in range(3)))
            apart = await asyncio.gather(*(asyncio.to_thread(ask, url, "fast", "apart") for _ in range(2)))
            with pytest.raises(urllib.error.HTTPError) as unknown:
                await asyncio.to_thread(ask, url, "groq/llama")
            figures, _ = await asyncio.to_thread(call, url, "/api/metrics/performance?org_id=apart")
        calls = [(call.request["model"], call.headers, call.url) for call in fake.calls]

    assert {"fast", "clever", "house/n3-lat300"} < {*listed}
    assert [model for model, _, _ in calls] == ["n3", "n1", "n2"] + ["n3-lat300"] * 3
    assert calls[0][1]["x-api-key"] == "sk-second"
    assert calls[0][2].endswith("/messages")
    assert calls[1][1]["authorization"] == "Bearer sk-from-environment"
    assert "authorization" not in calls[2][1]
    assert all(answer["choices"][0]["finish_reason"] == "stop" for answer in alone)
    assert sorted(headers["x-coalesce"] for _, headers in shared) == ["follower", "follower", "leader"]
    assert [headers["x-coalesce"] for _, headers in apart] == ["bypass", "bypass"]
    with unknown.value as refused:
        assert (refused.code, json.load(refused)["error"]["code"]) == (404, "model_not_found")
    # Two calls of 10 tokens in and 3 out.
    assert figures["upstream"]["cost_usd"] == pytest.approx(2 * (10 * 2 + 3 * 8) / 1e6)
