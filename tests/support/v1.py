"""A server of ours on a socket, in front of the scripted fake provider on another, for tests of `/v1`."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from oncewise.api.limits import Limits
from oncewise.settings import Settings, load_settings
from tests.support.fake_provider import FakeProvider
from tests.support.http import JSON, Reply, Site, serve

__all__ = ["V1", "chat", "chunks_of", "serve_v1", "settings_for"]

PATH = "/v1/chat/completions"


def settings_for(folder: Path, provider: FakeProvider, *, rps: float = 10_000.0, **fields: Any) -> Settings:
    """Settings of a server whose only provider is `openai`, at the fake one."""
    environ = {
        "OPENAI_API_KEY": "sk-upstream",
        "OPENAI_BASE_URL": provider.base_url,
        "OPENAI_RPS": str(rps),
        "OPENAI_BURST": "10000",
        "OPENAI_CONCURRENCY": "256",
    }
    return load_settings({"database_url": f"sqlite:///{folder / 'ow.db'}", **fields}, environ=environ).settings


def chat(model: str = "openai/n3", content: str = "Hello", **fields: Any) -> dict[str, Any]:
    """A body that shares by itself."""
    return {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}


def chunks_of(reply: Reply) -> list[Any]:
    """The data of a stream of chunks, read strictly."""
    text = reply.body.decode()
    assert "\r" not in text
    blocks = [block for block in text.replace(":\n", "").split("\n\n") if block]
    lines = [line for block in blocks for line in block.split("\n") if not line.startswith("id: ")]
    data = [line.removeprefix("data: ") for line in lines]
    return [value if value == "[DONE]" else orjson.loads(value) for value in data]


@dataclass
class V1:
    """Both servers."""

    site: Site
    provider: FakeProvider

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.site.port}/v1"

    async def post(self, body: Any = None, headers: Iterable[Any] = (), path: str = PATH) -> Reply:
        """One request, on a connection of its own."""
        sent = body if isinstance(body, bytes) else chat() if body is None else body
        return await self.site.ask("POST", path, sent, (JSON, *headers))

    async def get(self, path: str, headers: Iterable[Any] = ()) -> Reply:
        return await self.site.ask("GET", path, None, headers)


@asynccontextmanager
async def serve_v1(folder: Path, *, limits: Limits = Limits(), **settings: Any) -> AsyncIterator[V1]:  # noqa: B008
    """Serve on free ports."""
    async with FakeProvider() as provider:
        chosen = settings_for(folder, provider, **settings)
        others = {name: value for name, value in chosen if name != "database_url"}
        async with serve(folder, limits=limits, **others) as site:
            yield V1(site, provider)
