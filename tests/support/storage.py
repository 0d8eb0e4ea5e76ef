"""The storage ports on every engine, with a clock that tests can move, and short ways to a turn in any state."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import uuid_utils

from oncewise.errors import Failure, LeaderLost, ProviderError, TurnCancelled
from oncewise.model import Answer, FinishReason, StoredTurn, TurnAsk, TurnClaim, TurnState, Usage
from oncewise.ports import Admission, KeyStore, Lead, RequestLog, ThreadStore, TurnLedger
from oncewise.storage import ledger, pairs, requests, threads
from oncewise.storage.database import Database, database_time_s
from oncewise.storage.keys import SqlKeyStore
from oncewise.storage.ledger import SqlTurnLedger
from oncewise.storage.postgres import open_postgres
from oncewise.storage.requests import SqlRequestLog
from oncewise.storage.sqlite import open_sqlite
from oncewise.storage.threads import SqlThreadStore
from tests.support.postgres import fresh_database

LEASE_S = 10.0
WINDOW_S = 30.0
DAY_S = 24 * 60 * 60.0
QUEUE_LIMIT = 32

REFUSED = ProviderError(retryable=False).failure()
OVERLOADED = ProviderError().failure()
CANCELLED = TurnCancelled().failure()
LOST = LeaderLost().failure()


def ids() -> str:
    """Identifiers as production makes them."""
    return str(uuid_utils.uuid7())


class ShiftedClock:
    """The database's clock, moved by as much as a test says."""

    def __init__(self) -> None:
        self.offset_s = 0.0

    def __call__(self, conn: sa.Connection) -> float:
        return database_time_s(conn) + self.offset_s

    def advance(self, seconds: float) -> None:
        self.offset_s += seconds


def ask(org_id: str, thread_id: str, content: str = "hello", **fields: Any) -> TurnAsk:
    """A request for a turn; its fingerprint follows the content."""
    fingerprint = sha256(content.encode()).hexdigest()
    return TurnAsk(org_id, thread_id, content, "demo", "small", fingerprint, **fields)


def answer(text: str = "an answer", **fields: Any) -> Answer:
    """A complete answer."""
    return replace(Answer(text, FinishReason.STOP, Usage(3, 5), "small", "call-1", deltas=2), **fields)


def timeless(turn: StoredTurn | None) -> StoredTurn:
    """A stored turn without its age, the one field that reading later changes."""
    assert turn is not None
    return replace(turn, age_s=0.0)


@dataclass(frozen=True)
class Storage:
    """The ports on one database."""

    database: Database
    ledger: TurnLedger
    threads: ThreadStore
    requests: RequestLog
    keys: KeyStore
    clock: ShiftedClock
    org: str = "acme"
    owner: str = "worker-1"
    reopen: Callable[[str], Awaitable[Database]] | None = None
    options: dict[str, Any] = field(
        default_factory=lambda: {"lease_s": LEASE_S, "replay_window_s": WINDOW_S, "queue_limit": QUEUE_LIMIT}
    )

    async def thread(self, org: str | None = None) -> str:
        """The id of a new thread."""
        made = await self.threads.create(org or self.org, title=None, description=None, user_id=None)
        return made.id

    async def admit(self, thread: str, content: str = "hello", **fields: Any) -> Admission:
        org = fields.pop("org_id", self.org)
        return await self.ledger.admit(ask(org, thread, content, **fields), owner=self.owner, **self.options)

    async def lead(self, thread: str, content: str = "hello", **fields: Any) -> TurnClaim:
        """Admit what must become a new turn; return its claim."""
        admission = await self.admit(thread, content, **fields)
        assert isinstance(admission, Lead), admission
        return admission.claim

    async def answered(self, thread: str, content: str = "hello", **fields: Any) -> StoredTurn:
        """A turn of this content, completed."""
        turn = await self.ledger.commit(await self.lead(thread, content, **fields), answer(f"to {content}"))
        assert turn is not None
        return turn

    async def ended(
        self, claim: TurnClaim, state: TurnState, failure: Failure = REFUSED, partial: str = ""
    ) -> StoredTurn:
        """The claimed turn, ended as `state`."""
        turn = await self.ledger.end(claim, state, failure, partial=partial, partial_seq=len(partial), call_id="call-1")
        assert turn is not None
        return turn

    async def read(self, claim: TurnClaim) -> StoredTurn:
        return await self.ledger.turn(claim.org_id, claim.thread_id, claim.turn_id)


def storage_on(
    database: Database, owner: str = "worker-1", reopen: Callable[[str], Awaitable[Database]] | None = None
) -> Storage:
    """The ports on an open database; `reopen` opens it once more, as another process does."""
    clock = ShiftedClock()
    ledger = SqlTurnLedger(database, ids=ids, clock=clock)
    threads = SqlThreadStore(database, ids=ids, clock=clock)
    keys = SqlKeyStore(database, ids=ids, clock=clock)
    return Storage(database, ledger, threads, SqlRequestLog(database), keys, clock, owner=owner, reopen=reopen)


@asynccontextmanager
async def beside(storage: Storage, owner: str) -> AsyncGenerator[Storage, None]:
    """The same database as another process has it."""
    assert storage.reopen is not None
    database = await storage.reopen(owner)
    try:
        yield storage_on(database, owner)
    finally:
        await database.aclose()


@asynccontextmanager
async def _first(reopen: Callable[[str], Awaitable[Database]]) -> AsyncGenerator[Storage, None]:
    database = await reopen("worker-1")
    try:
        yield storage_on(database, reopen=reopen)
    finally:
        await database.aclose()


@asynccontextmanager
async def sqlite_storage(directory: Path) -> AsyncGenerator[Storage, None]:
    """The ports on a new SQLite file."""
    async with _first(lambda owner: open_sqlite(str(directory / "oncewise.db"), owner=owner)) as storage:
        yield storage


@asynccontextmanager
async def postgres_storage(_directory: Path) -> AsyncGenerator[Storage, None]:
    """The ports on a new PostgreSQL database."""
    async with fresh_database() as url, _first(lambda owner: open_postgres(url, owner=owner)) as storage:
        yield storage


def statements() -> dict[str, sa.Executable]:
    """Every statement that is made before it is needed, by its module and name."""
    return {
        f"{module.__name__}.{name}": value
        for module in (ledger, pairs, threads, requests)
        for name, value in vars(module).items()
        if isinstance(value, sa.Select | sa.Update | sa.Delete)
    }


ENGINES: dict[str, Callable[[Path], AbstractAsyncContextManager[Storage]]] = {
    "sqlite": sqlite_storage,
    "postgresql": postgres_storage,
}
"""Every engine behind the ports; a new one is one more entry."""
