"""API keys: make, list, revoke. For admin keys only; the first one is made with `oncewise keys create`."""

from fastapi import APIRouter, Depends, Response

from oncewise.api.answers import key_json, keys_json
from oncewise.api.documents import KeyCreated, KeyList
from oncewise.api.routes.common import Arrived, KeyId, json_body, reply
from oncewise.api.schema import KeyIn, read_model
from oncewise.model import KeyRole

__all__ = ["router"]


async def _for_admins(exchange: Arrived) -> None:
    exchange.check_admin()


router = APIRouter(prefix="/api/keys", tags=["keys"], dependencies=[Depends(_for_admins)])


@router.post("", status_code=201, response_model=KeyCreated, openapi_extra=json_body(KeyIn))
async def create_key(exchange: Arrived) -> Response:
    """Make a key; its secret is in this answer and nowhere else."""
    exchange.check_media_type()
    asked = read_model(KeyIn, exchange.body)
    key, secret = await exchange.services.keys.create(KeyRole(asked.role), asked.org_id)
    return reply({"key": secret, **key_json(key)}, 201)


@router.get("", response_model=KeyList)
async def list_keys(exchange: Arrived) -> Response:
    """All keys without their secrets, the revoked ones too, oldest first."""
    return reply(keys_json(await exchange.services.keys.list()))


@router.delete("/{key_id}", status_code=204, response_class=Response)
async def revoke_key(exchange: Arrived, key_id: KeyId) -> Response:
    """End a key: at once for requests here, within a second for other workers."""
    await exchange.services.keys.revoke(key_id)
    return Response(status_code=204)
