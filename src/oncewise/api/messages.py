"""`POST /api/threads/{id}/messages`: ask, wait, and answer with the turn.

The hot route: thousands of equal requests arrive at once and are answered at once. Each costs one task, no framework,
and shares the parsed body and the encoded answer with the others.

Deliberately absent: what joins what (`oncewise.service.turns`).
"""

import asyncio
import re
from collections.abc import Mapping
from typing import Any

from oncewise.api.accounting import account, unless_gone
from oncewise.api.answers import turn_answer
from oncewise.api.exchange import Exchange, Headers
from oncewise.api.json_body import BodyCache
from oncewise.api.schema import is_id, read_message
from oncewise.errors import InvalidRequest, NotFound, OncewiseError
from oncewise.model import Role, StoredTurn, TurnAsk
from oncewise.service.turn_outcomes import TurnResult
from oncewise.service.turns import TurnTicket

__all__ = ["Messages", "role_headers"]

KEY_KEPT_S = 24 * 3600
_KEY = re.compile(rb"[\x21-\x7e]{1,255}")
_JSON = (b"content-type", b"application/json")
_CACHE_STATUS = {
    Role.LEADER: b"oncewise; fwd=miss",
    Role.BYPASS: b"oncewise; fwd=bypass",
    Role.FOLLOWER: b"oncewise; hit; detail=follower; collapsed",
}


class Messages:
    """Takes messages in, and answers them as JSON."""

    def __init__(self) -> None:
        self._read: BodyCache[Mapping[str, Any]] = BodyCache(read_message)
        self._last: tuple[tuple[object, ...], TurnAsk | None] = ((), None)
        self._fields: Mapping[str, Any] = {}  # held, so that no other object can take its identity

    def ask(self, exchange: Exchange, thread_id: str) -> TurnTicket:
        """Decode a message and join its turn, or start it.

        Raises:
            OncewiseError: the message is not valid, or was not taken on.
        """
        org_id = exchange.tenant()
        exchange.check_media_type()
        fields = self._read(exchange.body)
        if not is_id(thread_id):
            raise NotFound
        key, force_new = _idempotency_key(exchange.headers), _wants_own_turn(exchange.headers)
        last, ask = self._last
        # Of a burst of identical requests all but the first are this one again. The fields are compared by identity:
        # equal bodies share them, and other bodies never do.
        this = (org_id, thread_id, key, force_new, id(fields))
        if ask is None or this != last:
            ask = exchange.services.threads.prepare(
                org_id, thread_id, idempotency_key=key, force_new=force_new, **fields
            )
            self._last = (this, ask)
            self._fields = fields
        return exchange.services.threads.send(ask, exchange.request_id)

    async def post(self, exchange: Exchange, thread_id: str) -> None:
        """Answer with the turn, once it is stored.

        Raises:
            OncewiseError: before anything is known of a turn.
            ClientGone: nobody is there to be answered.
        """
        with self.ask(exchange, thread_id) as ticket:
            try:
                with unless_gone(exchange, ticket, stream=False):
                    result = await ticket.result()
            except OncewiseError as error:
                account(exchange, ticket, None, error.code, stream=False)
                await exchange.refuse(error, role_headers(ticket, None, exchange))
                return
            account(exchange, ticket, result, stream=False)
            if result.body is None:
                result.body = turn_answer(result.stored)
            headers = [_JSON, *role_headers(ticket, result, exchange), *_timings(exchange, ticket, result)]
            await exchange.answer(200, result.body, headers)


def _idempotency_key(headers: Mapping[bytes, bytes]) -> str | None:
    key = headers.get(b"idempotency-key")
    if key is None:
        return None
    if _KEY.fullmatch(key) is None:
        raise InvalidRequest(errors=((("header", "idempotency-key"), "Must be 1 to 255 visible ASCII characters"),))
    return key.decode("ascii")


def _wants_own_turn(headers: Mapping[bytes, bytes]) -> bool:
    if headers.get(b"x-coalesce", b"").strip().lower() == b"off":
        return True
    directives = headers.get(b"cache-control", b"").lower().split(b",")
    return any(directive.strip() == b"no-cache" for directive in directives)


def role_headers(ticket: TurnTicket, result: TurnResult | None, exchange: Exchange) -> Headers:
    """What this request was to its turn; nothing while no turn is known."""
    admitted = ticket.run.admitted
    if admitted is None:
        return []
    role = ticket.role()
    return [
        (b"x-coalesce", role.value.encode("ascii")),
        (b"x-turn-id", admitted.turn_id.encode("ascii")),
        (b"cache-status", _CACHE_STATUS.get(role) or _replay_status(ticket, result, exchange)),
    ]


def _replay_status(ticket: TurnTicket, result: TurnResult | None, exchange: Exchange) -> bytes:
    keyed = ticket.ask.idempotency_key is not None
    kept_s = KEY_KEPT_S if keyed else exchange.services.settings.replay_window_s
    age_s = result.stored.age_s if result is not None else 0.0
    return b"oncewise; hit; ttl=%d" % max(0, int(kept_s - age_s))


def _timings(exchange: Exchange, ticket: TurnTicket, result: TurnResult) -> Headers:
    now_s = asyncio.get_running_loop().time()
    waited_ms = (now_s - exchange.arrived_s) * 1000
    first_ms = waited_ms if result.first_delta_s is None else (result.first_delta_s - exchange.arrived_s) * 1000
    # Who joined late did not wait for what was already there.
    headers = [
        (b"x-queue-position", b"%d" % result.queued_behind),
        (b"x-queue-wait-ms", b"%d" % min(result.queue_wait_ms, waited_ms)),
        (b"x-ttft-ms", b"%d" % max(0.0, first_ms)),
    ]
    if ticket.role() is Role.REPLAYED:
        headers.append((b"age", b"%d" % _age_s(result.stored)))
    return headers


def _age_s(turn: StoredTurn) -> int:
    return max(0, int(turn.age_s))
