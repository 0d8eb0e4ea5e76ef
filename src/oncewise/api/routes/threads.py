"""Threads: make, list, read, change, delete, audit, export, import."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response

from oncewise.api.answers import audit_json, created_json, dump, message_json, page_json, thread_json
from oncewise.api.documents import Audit, ThreadCreated, ThreadList, ThreadOut
from oncewise.api.routes.common import Arrived, PathId, for_a_tenant, json_body, reply
from oncewise.api.schema import ThreadChanges, ThreadIn, WrittenOut, read_import, read_model

__all__ = ["router"]

router = APIRouter(prefix="/api/threads", tags=["threads"], dependencies=[Depends(for_a_tenant)])

_NDJSON = "application/x-ndjson"


@router.post("/", status_code=201, response_model=ThreadCreated, openapi_extra=json_body(ThreadIn))
@router.post("", status_code=201, response_model=ThreadCreated, include_in_schema=False)
async def create_thread(exchange: Arrived) -> Response:
    """Make an empty thread."""
    org_id = exchange.tenant()
    exchange.check_media_type()
    fields = read_model(ThreadIn, exchange.body)
    thread = await exchange.services.threads.create(org_id, **fields.model_dump())
    return reply(created_json(thread), 201)


@router.get("/", response_model=ThreadList)
@router.get("", response_model=ThreadList, include_in_schema=False)
async def list_threads(
    exchange: Arrived,
    limit: Annotated[int, WrittenOut, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=512)] = None,
) -> Response:
    """Threads of the tenant, newest first."""
    page = await exchange.services.threads.list(exchange.tenant(), limit=limit, cursor=cursor)
    return reply(page_json(page))


@router.post(
    "/import",
    status_code=201,
    response_model=ThreadCreated,
    openapi_extra={"requestBody": {"required": True, "content": {_NDJSON: {"schema": {"type": "string"}}}}},
)
async def import_thread(exchange: Arrived) -> Response:
    """Make a thread of an export, all or nothing."""
    org_id = exchange.tenant()
    exchange.check_media_type(_NDJSON.encode())
    thread = await exchange.services.threads.restore(org_id, read_import(exchange.body))
    return reply(created_json(thread), 201)


@router.get("/{thread_id}", response_model=ThreadOut)
async def get_thread(exchange: Arrived, thread_id: PathId) -> Response:
    """One thread with its messages in order."""
    return reply(thread_json(await exchange.services.threads.get(exchange.tenant(), thread_id)))


@router.patch("/{thread_id}", response_model=ThreadOut, openapi_extra=json_body(ThreadChanges))
async def change_thread(exchange: Arrived, thread_id: PathId) -> Response:
    """Change title, description or pinned."""
    org_id = exchange.tenant()
    exchange.check_media_type()
    changes = read_model(ThreadChanges, exchange.body).given()
    return reply(thread_json(await exchange.services.threads.update(org_id, thread_id, changes)))


@router.delete("/{thread_id}", status_code=204, response_class=Response)
async def delete_thread(exchange: Arrived, thread_id: PathId) -> Response:
    """Stop the thread's turns and delete it."""
    await exchange.services.threads.delete(exchange.tenant(), thread_id)
    return Response(status_code=204)


@router.get("/{thread_id}/audit", response_model=Audit)
async def audit_thread(exchange: Arrived, thread_id: PathId) -> Response:
    """One entry per stored turn, oldest first."""
    return reply(audit_json(await exchange.services.threads.audit(exchange.tenant(), thread_id)))


_LINES: dict[int | str, dict[str, Any]] = {200: {"content": {_NDJSON: {"schema": {"type": "string"}}}}}


@router.get("/{thread_id}/export", response_class=Response, responses=_LINES)
async def export_thread(exchange: Arrived, thread_id: PathId) -> Response:
    """The thread's messages, one JSON document a line."""
    thread = await exchange.services.threads.get(exchange.tenant(), thread_id)
    lines = b"".join(dump(message_json(message)) + b"\n" for message in thread.messages)
    return Response(lines, media_type=_NDJSON)
