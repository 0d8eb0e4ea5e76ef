"""Turns: look at one, cancel one, withdraw one request."""

from fastapi import APIRouter, Depends, Response

from oncewise.api.answers import terminal_position, turn_json, turn_text
from oncewise.api.documents import TurnOut, Withdrawn
from oncewise.api.exchange import Exchange
from oncewise.api.routes.common import Arrived, PathId, TurnId, for_a_tenant, reply
from oncewise.core.stream_hub import Position
from oncewise.model import StoredTurn

__all__ = ["router"]

router = APIRouter(prefix="/api/threads", tags=["turns"], dependencies=[Depends(for_a_tenant)])


@router.post("/cancel/{request_id}", response_model=Withdrawn)
async def cancel_request(exchange: Arrived, request_id: str) -> Response:
    """Withdraw one request; the provider call stops when no other is interested."""
    withdrawn = await exchange.services.threads.cancel_request(exchange.tenant(), request_id)
    return reply({"request_id": request_id, "state": "cancelled" if withdrawn else "ended"})


@router.get("/{thread_id}/turns/{turn_id}", response_model=TurnOut)
async def get_turn(exchange: Arrived, thread_id: PathId, turn_id: TurnId) -> Response:
    """One turn and who is interested in it now."""
    return _turn(exchange, await exchange.services.threads.turn(exchange.tenant(), thread_id, turn_id))


@router.post("/{thread_id}/turns/{turn_id}/cancel", response_model=TurnOut)
async def cancel_turn(exchange: Arrived, thread_id: PathId, turn_id: TurnId) -> Response:
    """Stop a turn for everyone; a final turn stays as it is."""
    return _turn(exchange, await exchange.services.threads.cancel_turn(exchange.tenant(), thread_id, turn_id))


def _turn(exchange: Exchange, turn: StoredTurn) -> Response:
    services = exchange.services
    log = services.hub.get((turn.org_id, turn.id))
    if turn.state.final or log is None:
        text = turn_text(turn)
        position = terminal_position(turn) if turn.state.final else Position(turn.epoch, turn.partial_seq)
    else:
        text, position = log.text, log.tail
    return reply(
        turn_json(
            turn,
            text=text,
            position=position,
            viewers=0 if log is None else log.viewers,
            requesters=services.threads.requesters(turn.org_id, turn.id),
        )
    )
