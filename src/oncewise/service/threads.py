"""Threads: everything a client can do with a conversation.

Deliberately absent: HTTP, SQL, and how a turn is brought to its answer (`oncewise.service.turn_runs`).
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256

from oncewise.core.keys import canonical
from oncewise.core.stream_hub import Position, StreamLog
from oncewise.model import (
    AuditEntry,
    ChatMessage,
    OnBusy,
    OnDisconnect,
    Params,
    Scope,
    StoredTurn,
    Thread,
    ThreadPage,
    TurnAsk,
)
from oncewise.ports import ThreadStore
from oncewise.service.model_names import ModelNames
from oncewise.service.turns import Turns, TurnTicket

__all__ = ["Threads"]


class Threads:
    """The use cases around threads. Every method takes the tenant first and raises `NotFound` for another's thread."""

    def __init__(self, store: ThreadStore, turns: Turns, *, names: ModelNames) -> None:
        self._store = store
        self._turns = turns
        self._names = names

    async def create(
        self, org_id: str, *, title: str | None = None, description: str | None = None, user_id: str | None = None
    ) -> Thread:
        """Make an empty thread."""
        return await self._store.create(org_id, title=title, description=description, user_id=user_id)

    async def get(self, org_id: str, thread_id: str) -> Thread:
        """One thread with its messages in order."""
        return await self._store.get(org_id, thread_id)

    async def list(self, org_id: str, *, limit: int, cursor: str | None) -> ThreadPage:
        """A page of threads, newest first."""
        return await self._store.list(org_id, limit=limit, cursor=cursor)

    async def update(self, org_id: str, thread_id: str, changes: Mapping[str, str | bool | None]) -> Thread:
        """Change title, description or pinned."""
        return await self._store.update(org_id, thread_id, dict(changes))

    async def delete(self, org_id: str, thread_id: str) -> None:
        """Stop the thread's turns, then delete it with all it holds."""
        await self._store.get(org_id, thread_id)
        await self._turns.cancel_thread(org_id, thread_id)
        await self._store.delete(org_id, thread_id)

    async def audit(self, org_id: str, thread_id: str) -> tuple[AuditEntry, ...]:
        """One entry per stored turn, oldest first."""
        return await self._store.audit(org_id, thread_id)

    async def restore(self, org_id: str, messages: Sequence[ChatMessage], *, title: str | None = None) -> Thread:
        """Make a thread of exported messages, all or nothing."""
        return await self._store.restore(org_id, messages, title=title)

    # -- turns ---------------------------------------------------------------------------------------------------

    def prepare(
        self,
        org_id: str,
        thread_id: str,
        *,
        content: str,
        provider: str | None = None,
        model: str | None = None,
        params: Params = Params(),  # noqa: B008  frozen
        scope: Scope = Scope.PRIVATE,
        reason: str | None = None,
        user_id: str | None = None,
        idempotency_key: str | None = None,
        parent_message_id: str | None = None,
        force_new: bool = False,
        on_busy: OnBusy = OnBusy.ENQUEUE,
        on_disconnect: OnDisconnect = OnDisconnect.CONTINUE,
    ) -> TurnAsk:
        """Fill in the server's defaults and the fingerprint of a new user message.

        Raises:
            UnknownProvider: no such provider is configured, or none has the model.
        """
        name, chosen = self._names.resolve(provider, model)
        return TurnAsk(
            org_id=org_id,
            thread_id=thread_id,
            content=content,
            provider=name,
            model=chosen,
            fingerprint=_fingerprint(content, name, chosen, params, scope),
            params=params,
            scope=scope,
            reason=reason,
            user_id=user_id,
            idempotency_key=idempotency_key,
            parent_message_id=parent_message_id,
            force_new=force_new,
            on_busy=on_busy,
            on_disconnect=on_disconnect,
        )

    def send(self, ask: TurnAsk, request_id: str) -> TurnTicket:
        """Join the turn a message belongs to, or start it. Never awaits.

        Raises:
            Overloaded, ShuttingDown: the request was not taken on.
        """
        return self._turns.send(ask, request_id)

    async def turn(self, org_id: str, thread_id: str, turn_id: str) -> StoredTurn:
        """One turn as it is stored."""
        return await self._turns.ledger.turn(org_id, thread_id, turn_id)

    async def active(self, org_id: str, thread_id: str) -> StoredTurn | None:
        """The turn of a thread that runs or comes next; None if it is idle."""
        return await self._turns.ledger.active(org_id, thread_id)

    async def watch(self, turn: StoredTurn, after: Position | None = None) -> StreamLog | None:
        """The log of a turn that runs, here or in another worker, or ended here; None if only the row is left.

        For who has seen the turn up to `after` a log that is brought here from elsewhere is brought as far as that.
        """
        run = self._turns.runs.of(turn.org_id, turn.id)
        if run is not None:
            return await run.watch()
        log = self._turns.hub.get((turn.org_id, turn.id))
        if turn.state.final or turn.owner == self._turns.owner or (log is not None and log.closed):
            return log
        return await self._turns.remotes.look_at(turn).watch(after)

    def requesters(self, org_id: str, turn_id: str) -> int:
        """How many requests wait for a turn in this process."""
        run = self._turns.runs.of(org_id, turn_id)
        return 0 if run is None else run.requesters

    async def cancel_request(self, org_id: str, request_id: str) -> bool:
        """Withdraw one request's interest in its turn, in whichever worker; False if it had ended by itself."""
        return await self._turns.cancel_request(org_id, request_id)

    async def cancel_turn(self, org_id: str, thread_id: str, turn_id: str) -> StoredTurn:
        """Stop a turn for everyone; a final turn stays as it is."""
        return await self._turns.cancel_turn(org_id, thread_id, turn_id)


def _fingerprint(content: str, provider: str, model: str, params: Params, scope: Scope) -> str:
    """What makes two messages the same message: everything that may change the answer, and the scope."""
    return sha256(canonical(["user", content, provider, model, params.given(), scope.value])).hexdigest()
