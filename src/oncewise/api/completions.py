"""`/v1`: chat completions as OpenAI's clients know them, models, and the calls behind them.

A stream is `data:` blocks only. Silence is broken by a comment line that no blank line follows: after an `id:` line
anywhere before it, the Python clients would take comment and blank line for an empty event (streams.md §6.1). A stream
that failed ends with an error and without `[DONE]`; one that the server has to cut off does too, since a bare end looks
like success to those clients.

Deliberately absent: which requests share a call (`oncewise.service.completions`).
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs

import orjson

from oncewise.api.accounting import account, unless_gone
from oncewise.api.exchange import Exchange, Headers
from oncewise.api.json_body import BodyCache
from oncewise.api.openai_errors import openai_body
from oncewise.api.openai_request import CompletionBody, ask_of, read_completion, tenant_of
from oncewise.api.sse import STREAM_HEADERS, EventStream, Source
from oncewise.core.coalesce import Landed, Waiter
from oncewise.core.stream_hub import Position, Viewer
from oncewise.errors import ModelNotFound, NotFound, OncewiseError, ShuttingDown
from oncewise.model import Role
from oncewise.service.completions import Completion, CompletionRun, CompletionTicket, RemoteCall

__all__ = ["CompletionRoutes"]

PATH = "/v1/chat/completions"

_JSON = (b"content-type", b"application/json")
_DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b":\n"
_POSITION = b"x-queue-position"
_CACHE_STATUS = {
    Role.LEADER: b"oncewise; fwd=miss",
    Role.BYPASS: b"oncewise; fwd=bypass",
    Role.FOLLOWER: b"oncewise; hit; detail=follower; collapsed",
    Role.REPLAYED: b"oncewise; hit; detail=failure",
}


class CompletionRoutes:
    """Answers the routes of `/v1`, and knows which streams are open."""

    def __init__(self) -> None:
        self._read: BodyCache[CompletionBody] = BodyCache(read_completion)
        self._open: dict[_ChunkStream, Exchange] = {}

    def stop(self) -> None:
        """End every open stream, with an error; clients may ask again."""
        for stream in list(self._open):
            stream.stop()

    def end_refused(self) -> None:
        """End every open stream whose API key is no longer valid, with an error that says so."""
        for stream, exchange in list(self._open.items()):
            try:
                tenant_of(exchange)
            except OncewiseError:
                stream.stop()

    async def post(self, exchange: Exchange) -> None:
        """Answer `POST /v1/chat/completions`, as JSON or as a stream.

        Raises:
            OncewiseError: the request is not valid, or was not taken on.
            ClientGone, Stalled: nobody takes the answer.
        """
        org_id = tenant_of(exchange)
        exchange.check_media_type()
        body = self._read(exchange.body)
        ask = ask_of(exchange, body)
        send = exchange.services.completions.send
        with send(org_id, ask) as ticket, unless_gone(exchange, ticket, stream=body.stream):
            if body.stream:
                await self._stream(exchange, ticket, wants_usage=body.wants_usage, numbered=ask.resumable)
            else:
                await self._whole(exchange, ticket)

    async def _whole(self, exchange: Exchange, ticket: CompletionTicket) -> None:
        try:
            completion = await ticket.result()
        except OncewiseError as error:
            await _refuse(exchange, ticket, error)
            return
        account(exchange, ticket, completion, stream=False)
        headers = [_JSON, *_call_headers(ticket), *_timings(exchange, ticket.run)]
        await exchange.answer(200, ticket.run.document(completion), headers)

    async def _stream(self, exchange: Exchange, ticket: CompletionTicket, *, wants_usage: bool, numbered: bool) -> None:
        run = ticket.run
        viewer = run.log.view()
        with self._opened(exchange, viewer, numbered=numbered) as stream:
            # An early failure keeps its status; what waits longer is told by keep-alives that it is alive.
            await viewer.wait(exchange.limits.hold_s)
            if run.log.closed and not run.log.deltas:
                try:
                    await ticket.result()
                except OncewiseError as error:
                    await _refuse(exchange, ticket, error)
                    return
            await stream.begin([*_call_headers(ticket), (_POSITION, b"%d" % run.queue_position)])
            rest = await stream.follow()
            ending = await self._ending(exchange, ticket, stream, wants_usage=wants_usage)
            await stream.write(rest + ending, more=False)

    async def _ending(
        self, exchange: Exchange, ticket: CompletionTicket, stream: "_ChunkStream", *, wants_usage: bool
    ) -> bytes:
        try:
            _check_stopped(exchange, stream)
            completion = await ticket.result()
        except OncewiseError as error:
            account(exchange, ticket, None, error.code, stream=True)
            return _error_event(error)
        account(exchange, ticket, completion, stream=True)
        return _good_end(completion, wants_usage=wants_usage)

    @contextmanager
    def _opened(
        self, exchange: Exchange, viewer: Viewer, *, numbered: bool, after: int = 0
    ) -> Iterator["_ChunkStream"]:
        source: Source = _Numbered(viewer, after) if numbered else viewer
        stream = _ChunkStream(exchange, source)
        self._open[stream] = exchange
        try:
            yield stream
        finally:
            del self._open[stream]
            viewer.close()

    # -- one call ------------------------------------------------------------------------------------------------

    async def resume(self, exchange: Exchange, call_id: str) -> None:
        """Answer `GET /v1/chat/completions/{call}/stream`: everything after the chunk the client has last.

        Raises:
            NotFound: no such call of this tenant runs, or ended a moment ago with a stream to be resumed.
        """
        after = _starting_after(exchange)
        seq = 0 if after is None else after.seq
        run, waiter = await exchange.services.completions.watch(tenant_of(exchange), call_id, seq)
        if after is not None and after.seq > run.log.deltas:
            after = None
        viewer = run.log.view(after)
        start = 0 if after is None or viewer.from_start else after.seq
        try:
            with self._opened(exchange, viewer, numbered=True, after=start) as stream, exchange.presence():
                await stream.begin([(b"x-call-id", call_id.encode("ascii"))])
                rest = await stream.follow()
                try:
                    _check_stopped(exchange, stream)
                    ending = _good_end(await _end_of(run, waiter), wants_usage=True)
                except OncewiseError as error:
                    ending = _error_event(error)
                await stream.write(rest + ending, more=False)
        finally:
            if waiter is not None:
                waiter.leave()

    async def cancel(self, exchange: Exchange, call_id: str) -> None:
        """Answer `POST /v1/chat/completions/{call}/cancel`: stop the call for everyone.

        Raises:
            NotFound: no such call of this tenant.
        """
        ended_well = await exchange.services.completions.cancel(tenant_of(exchange), call_id)
        state = "completed" if ended_well else "cancelled"
        await exchange.answer(200, orjson.dumps({"id": call_id, "object": "chat.completion.call", "state": state}))

    async def explain(self, exchange: Exchange) -> None:
        """Answer `POST /v1/coalesce/explain`: whether this body, with these headers, would share, and why.

        Raises:
            OncewiseError: as `post`; nobody is called.
        """
        org_id = tenant_of(exchange)
        exchange.check_media_type()
        body = self._read(exchange.body)
        completions = exchange.services.completions
        plan = completions.plan(org_id, ask_of(exchange, body))
        key = plan.key or plan.body_key
        document = {
            "object": "coalesce.explanation",
            "coalesces": plan.key is not None,
            "policy": plan.policy.value,
            "reason": plan.reason,
            "key": key.digest,
            "provider": plan.request.provider,
            "model": plan.request.model,
            "ignored_fields": completions.ignored(body.fields),
        }
        await exchange.answer(200, orjson.dumps(document))

    # -- models --------------------------------------------------------------------------------------------------

    async def models(self, exchange: Exchange) -> None:
        """Answer `GET /v1/models`."""
        tenant_of(exchange)
        listed = [_model(name) for name in exchange.services.names.offered()]
        await exchange.answer(200, orjson.dumps({"object": "list", "data": listed}))

    async def model(self, exchange: Exchange, name: str) -> None:
        """Answer `GET /v1/models/{id}`; the name may contain slashes.

        Raises:
            ModelNotFound: it is not in the list.
        """
        tenant_of(exchange)
        if name not in exchange.services.names.offered():
            raise ModelNotFound
        await exchange.answer(200, orjson.dumps(_model(name)))


def _check_stopped(exchange: Exchange, stream: "_ChunkStream") -> None:
    """Say why the server ended a stream, if it did.

    Raises:
        Unauthorized: the API key was revoked.
        ShuttingDown: the server stops.
    """
    if stream.stopped:
        tenant_of(exchange)
        raise ShuttingDown(retry_after_s=1.0)


class _ChunkStream(EventStream):
    """A response that is a stream of chunks."""

    async def begin(self, headers: Headers) -> None:
        """Send the head, and one keep-alive so that it leaves every buffer on its way."""
        await self._exchange.start(200, self._exchange.head([*STREAM_HEADERS, *headers]))
        await self.write(_KEEP_ALIVE)

    async def follow(self, *_withdrawn: object) -> bytes:
        """Send chunks as they come, until there are no more; return the bytes that are left to send.

        Raises:
            Stalled: the client takes no bytes.
        """
        source = self._source
        while not self.stopped:
            if await source.wait(self._limits.ping_s):
                chunk = source.take()
                if source.ended:
                    return chunk
                await self.write(chunk)
            elif not self.stopped:
                await self.write(_KEEP_ALIVE)
        return b""


class _Numbered:
    """A viewer whose chunks carry their position, for clients that asked to be able to resume."""

    def __init__(self, viewer: Viewer, after: int) -> None:
        self._viewer = viewer
        self._seq = after

    @property
    def ended(self) -> bool:
        return self._viewer.ended

    def take(self) -> bytes:
        """What is new."""
        blocks = self._viewer.take().split(b"\n\n")[:-1]
        first = self._seq + 1
        self._seq += len(blocks)
        return b"".join(b"id: 1-%d\n%b\n\n" % (first + at, block) for at, block in enumerate(blocks))

    async def wait(self, timeout_s: float) -> bool:
        """Wait until something is new."""
        return await self._viewer.wait(timeout_s)

    def close(self) -> None:
        """Look no more."""
        self._viewer.close()


async def _end_of(run: CompletionRun | RemoteCall, waiter: Waiter[Completion] | None) -> Completion:
    outcome = run.flight.outcome if waiter is None else await waiter.outcome()
    if isinstance(outcome, Landed):
        return outcome.value
    raise outcome.error() if outcome is not None else NotFound()


def _starting_after(exchange: Exchange) -> Position | None:
    sent = exchange.headers.get(b"last-event-id", b"").decode("latin-1")
    query = parse_qs(exchange.scope["query_string"].decode("latin-1")).get("starting_after", [])
    place = query[0] if query else sent
    # A bare number, as OpenAI counts events: chunks are never taken back here, so all are of the first epoch.
    return Position.parse(place if "-" in place else f"1-{place}")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": name.partition("/")[0]}


def _event(document: Any) -> bytes:
    return b"data: " + orjson.dumps(document) + b"\n\n"


def _error_event(error: OncewiseError) -> bytes:
    return b"data: " + openai_body(error) + b"\n\n"


def _good_end(completion: Completion, *, wants_usage: bool) -> bytes:
    if not wants_usage:
        return _DONE
    return _event({**completion.head, "choices": [], "usage": completion.figures}) + _DONE


def _call_headers(ticket: CompletionTicket) -> Headers:
    return [
        (b"x-coalesce", ticket.role.value.encode("ascii")),
        (b"x-call-id", ticket.run.call_id.encode("ascii")),
        (b"cache-status", _CACHE_STATUS[ticket.role]),
    ]


def _timings(exchange: Exchange, run: CompletionRun) -> Headers:
    waited_ms = (asyncio.get_running_loop().time() - exchange.arrived_s) * 1000
    queued_ms = (run.queue_wait_s or 0.0) * 1000
    return [
        # Who joined late did not wait for what was already there.
        (_POSITION, b"%d" % run.queued_behind),
        (b"x-queue-wait-ms", b"%d" % min(queued_ms, waited_ms)),
        (b"x-ttft-ms", b"%d" % max(0.0, (run.first_s - exchange.arrived_s) * 1000)),
    ]


async def _refuse(exchange: Exchange, ticket: CompletionTicket, error: OncewiseError) -> None:
    account(exchange, ticket, None, error.code, stream=ticket.ask.stream)
    await exchange.refuse(error, _call_headers(ticket))
