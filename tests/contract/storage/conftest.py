"""Every suite here runs on every engine."""

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from tests.support.storage import ENGINES, Storage


@pytest.fixture(params=ENGINES)
async def storage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[Storage, None]:
    """The storage ports on a new, empty database."""
    async with ENGINES[request.param](tmp_path) as ports:
        yield ports


@pytest.fixture
async def thread(storage: Storage) -> str:
    """The id of an empty thread."""
    return await storage.thread()
