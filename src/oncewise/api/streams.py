"""The routes that answer with a stream of events: ask and watch, join, resume.

`POST …/messages/stream` holds its head for at most a second, so that what fails at once fails with its status; what
fails later is told inside the stream. The others watch a turn and never start one.

A stream is sent from the turn's log, or from its row where no log is left here. Streams that are open are in a set, so
that a server that stops can end them: clients resume where they were.

Deliberately absent: frames and the sending loop (`oncewise.api.sse`).
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import parse_qs

from oncewise.api.accounting import account, unless_gone
from oncewise.api.exchange import Exchange, Headers
from oncewise.api.messages import Messages, role_headers
from oncewise.api.row_viewer import RowViewer
from oncewise.api.schema import is_id
from oncewise.api.sse import EventStream
from oncewise.core.stream_hub import Position, Viewer
from oncewise.errors import NotFound, OncewiseError, ShuttingDown, TurnCancelled
from oncewise.model import Role, StoredTurn
from oncewise.service.turn_outcomes import TurnResult
from oncewise.service.turns import TurnTicket

__all__ = ["Streams"]

_REPLAYED = (b"stream-replayed-from", b"start")


class Streams:
    """Sends turns as they come, and knows which streams are open."""

    def __init__(self, messages: Messages) -> None:
        self._messages = messages
        self._open: dict[EventStream, Exchange] = {}
        self._stopped = False

    def stop(self) -> None:
        """End every open stream where it is, and each that is still to be opened; clients may resume."""
        self._stopped = True
        for stream in list(self._open):
            stream.stop()

    def end_refused(self) -> None:
        """End every open stream whose API key is no longer valid."""
        for stream, exchange in list(self._open.items()):
            try:
                exchange.tenant()
            except OncewiseError:
                stream.stop()

    @contextmanager
    def _opened(self, exchange: Exchange, source: Viewer | RowViewer) -> Iterator[EventStream]:
        stream = EventStream(exchange, source)
        self._open[stream] = exchange
        try:
            # Again: what was valid when the request came may have been revoked before its stream was open.
            exchange.tenant()
            if self._stopped:
                stream.stop()
            yield stream
        finally:
            del self._open[stream]
            source.close()

    # -- ask and watch -------------------------------------------------------------------------------------------

    async def post(self, exchange: Exchange, thread_id: str) -> None:
        """Take a message in and send its turn as it comes.

        Raises:
            OncewiseError: the message was refused.
            ClientGone, Stalled: nobody takes the answer.
        """
        with self._messages.ask(exchange, thread_id) as ticket, unless_gone(exchange, ticket, stream=True):
            try:
                source = await self._source(ticket, exchange)
            except OncewiseError as error:
                account(exchange, ticket, None, error.code, stream=True)
                await exchange.refuse(error, role_headers(ticket, None, exchange))
                return
            with self._opened(exchange, source) as stream:
                await self._send_turn(stream, ticket, exchange)

    async def _source(self, ticket: TurnTicket, exchange: Exchange) -> Viewer | RowViewer:
        """What to send the turn from, after waiting a moment for its first text or an early end.

        Raises:
            OncewiseError: how it ended, if that was before any text.
        """
        until_s = exchange.arrived_s + exchange.limits.hold_s
        await ticket.admitted()
        log = None if ticket.role() is Role.REPLAYED else await ticket.watch()
        if log is None:
            return await self._row_source(ticket, exchange, until_s)
        viewer = ticket.viewer = log.view()
        try:
            await viewer.wait(max(0.0, until_s - asyncio.get_running_loop().time()))
            if log.closed and not log.deltas:
                await _raise_failure(ticket)
        except BaseException:
            viewer.close()
            raise
        return viewer

    async def _row_source(self, ticket: TurnTicket, exchange: Exchange, until_s: float) -> RowViewer:
        try:
            async with asyncio.timeout_at(until_s):
                turn = (await ticket.result()).stored
        except TimeoutError:
            ask, admitted = ticket.ask, await ticket.admitted()
            turn = await exchange.services.threads.turn(ask.org_id, ask.thread_id, admitted.turn_id)
        return _row_viewer(exchange, turn)

    async def _send_turn(self, stream: EventStream, ticket: TurnTicket, exchange: Exchange) -> None:
        admitted = await ticket.admitted()
        place = f"/api/threads/{admitted.thread_id}/turns/{admitted.turn_id}/stream"
        headers = [*role_headers(ticket, None, exchange), (b"location", place.encode("ascii"))]
        await stream.open(headers, _meta_of_request(ticket, exchange))
        rest = await stream.follow(lambda: ticket.withdrawn)
        if stream.stopped:
            account(exchange, ticket, None, _why_stopped(exchange), stream=True)
        else:
            result, error_code = await _outcome(ticket)
            account(exchange, ticket, result, error_code, stream=True)
        await stream.write(rest, more=False)

    # -- watch ---------------------------------------------------------------------------------------------------

    async def resume(self, exchange: Exchange, thread_id: str, turn_id: str) -> None:
        """Send a turn from the position the client has on.

        Raises:
            NotFound: no such turn of this tenant and thread.
        """
        org_id = exchange.tenant()
        if not (is_id(thread_id) and is_id(turn_id)):
            raise NotFound
        turn = await exchange.services.threads.turn(org_id, thread_id, turn_id)
        sent = _last_event_id(exchange)
        await self._watch(exchange, turn, sent, None if sent is None else Position.parse(sent))

    async def join(self, exchange: Exchange, thread_id: str) -> None:
        """Send the thread's active turn from its beginning; 204 if the thread is idle.

        Nothing is left out for a Last-Event-ID: it does not say which turn it belongs to, and the one it came from may
        have ended. The client is told that all comes again. To resume there is the turn's own address.

        Raises:
            NotFound: no such thread of this tenant.
        """
        org_id = exchange.tenant()
        if not is_id(thread_id):
            raise NotFound
        turn = await exchange.services.threads.active(org_id, thread_id)
        if turn is None:
            await exchange.answer(204, b"", ())
        else:
            await self._watch(exchange, turn, _last_event_id(exchange), None)

    async def _watch(self, exchange: Exchange, turn: StoredTurn, sent: str | None, after: Position | None) -> None:
        log = await exchange.services.threads.watch(turn, after)
        source = _row_viewer(exchange, turn, after) if log is None else log.view(after)
        if source.ended:
            source.close()
            await exchange.answer(204, b"", ())
            return
        again = sent is not None and (after is None or source.from_start)
        live = log is not None and not log.closed
        with self._opened(exchange, source) as stream, exchange.presence():
            meta = await _meta_of_turn(exchange, turn, live=live, again=again)
            await stream.open(_watch_headers(turn, again=again), meta)
            await stream.write(await stream.follow(), more=False)


def _row_viewer(exchange: Exchange, turn: StoredTurn, after: Position | None = None) -> RowViewer:
    services = exchange.services
    read = partial(services.threads.turn, turn.org_id, turn.thread_id, turn.id)
    return RowViewer(turn, read, services.hub.encoder, after)


async def _raise_failure(ticket: TurnTicket) -> None:
    # A cancelled turn has a terminal event of its own, `done`; it is not a failure of the stream.
    try:
        await ticket.result()
    except TurnCancelled:
        return


def _why_stopped(exchange: Exchange) -> str:
    try:
        exchange.tenant()
    except OncewiseError as error:
        return error.code
    return ShuttingDown.code


async def _outcome(ticket: TurnTicket) -> tuple[TurnResult | None, str | None]:
    try:
        return await ticket.result(), None
    except OncewiseError as error:
        return None, error.code


def _last_event_id(exchange: Exchange) -> str | None:
    sent = exchange.headers.get(b"last-event-id")
    if sent is not None:
        return sent.decode("latin-1")
    values = parse_qs(exchange.scope["query_string"].decode("latin-1")).get("last_event_id")
    return values[0] if values else None


def _watch_headers(turn: StoredTurn, *, again: bool) -> Headers:
    headers = [(b"x-turn-id", turn.id.encode("ascii"))]
    return [*headers, _REPLAYED] if again else headers


def _meta_of_request(ticket: TurnTicket, exchange: Exchange) -> dict[str, Any]:
    admitted = ticket.run.admitted
    assert admitted is not None  # noqa: S101  awaited before
    role = ticket.role()
    state, position = ticket.run.now() or (admitted.state, admitted.position)
    return {
        **admitted.meta,
        "request_id": exchange.request_id,
        "turn_id": admitted.turn_id,
        "thread_id": admitted.thread_id,
        # Who asked for a turn of its own leads it.
        "role": (Role.LEADER if role is Role.BYPASS else role).value,
        "state": state.value,
        "queue_position": position,
        "provider": admitted.provider,
        "model": admitted.model,
    }


async def _meta_of_turn(exchange: Exchange, turn: StoredTurn, *, live: bool, again: bool) -> dict[str, Any]:
    state, position = await exchange.services.turns.state_of(turn)
    meta = {
        **exchange.services.turns.meta_of(turn),
        "request_id": exchange.request_id,
        "turn_id": turn.id,
        "thread_id": turn.thread_id,
        "role": (Role.FOLLOWER if live or not turn.state.final else Role.REPLAYED).value,
        "state": state.value,
        "queue_position": position,
        "provider": turn.ask.provider,
        "model": turn.ask.model,
    }
    # A page that uses EventSource never sees the header of that name.
    return {**meta, "replayed_from": "start"} if again else meta
