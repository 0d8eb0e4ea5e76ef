"""What the FastAPI routes have in common: the exchange they serve, ids in paths, and answers as bytes of our own."""

from typing import Annotated, Any

from fastapi import Depends, Response
from pydantic import BaseModel
from starlette.requests import Request

from oncewise.api.answers import dump
from oncewise.api.exchange import Exchange
from oncewise.api.schema import is_id
from oncewise.errors import NotFound

__all__ = ["EXCHANGE", "Arrived", "KeyId", "PathId", "TurnId", "for_a_tenant", "json_body", "reply"]

EXCHANGE = "oncewise.exchange"
"""Where the exchange stands in the ASGI scope of a FastAPI route."""


def _exchange(request: Request) -> Exchange:
    exchange: Exchange = request.scope[EXCHANGE]
    return exchange


Arrived = Annotated[Exchange, Depends(_exchange)]


def _known_form(value: str) -> str:
    # Not a validation error: a text that cannot be an id is answered exactly as an unknown one.
    if not is_id(value):
        raise NotFound
    return value


def _thread_id(thread_id: str) -> str:
    return _known_form(thread_id)


def _turn_id(turn_id: str) -> str:
    return _known_form(turn_id)


def _key_id(key_id: str) -> str:
    return _known_form(key_id)


PathId = Annotated[str, Depends(_thread_id)]
TurnId = Annotated[str, Depends(_turn_id)]
KeyId = Annotated[str, Depends(_key_id)]


async def for_a_tenant(exchange: Arrived) -> None:
    """For routes of one tenant: who may not ask is told so before anything about what was asked."""
    exchange.tenant()


def reply(value: Any, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(dump(value), status, media_type="application/json")


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of a body that the route reads itself, since FastAPI's reader is lax."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}
