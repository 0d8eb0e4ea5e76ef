"""The HTTP server: uvicorn with httptools, narrowed where its defaults trust the client.

What is added, each measured as missing (reliability.md §4): bounds on a request's head in bytes, fields and seconds; a
small send buffer, so that a client that never reads holds 64 KiB instead of 4 MiB; an end for clients that go on
sending after they were refused; a request's own connection, so that a client's leaving is a call and not a task per
request; and a shutdown that drains running turns first.

Deliberately absent: routes. `oncewise.asgi:app` gives the same answers under any ASGI server; only these guards differ.
"""

import asyncio
import contextlib
import gc
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import FrameType
from typing import Any, cast

import httptools
import uvicorn
from starlette.types import Scope
from uuid_utils import uuid7
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from oncewise.api.app import App
from oncewise.api.errors import problem_body, problem_headers, status_of
from oncewise.api.listener import AT_ONCE, Listener
from oncewise.api.presence import CONNECTION, Headers
from oncewise.api.sockets import BACKLOG
from oncewise.errors import HeadersTooLarge, MalformedRequest, OncewiseError, RequestTimeout

__all__ = ["GuardedProtocol", "Server", "run"]


class GuardedProtocol(HttpToolsProtocol):
    """One connection. Lends itself to the application as `oncewise.api.presence.Connection`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = cast("App", self.config.app).limits
        self._tell_lost: Callable[[], None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._refusal: OncewiseError | None = None
        self._in_head = True
        self._chunk_bytes = 0
        self._field_bytes = 0
        self._late_bytes = 0
        self._unread_timer: asyncio.TimerHandle | None = None
        self._parting = False

    # -- the connection ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._end_within(self._limits.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_unread_timer()
        super().connection_lost(exc)
        if self._tell_lost is not None:
            self._tell_lost()

    def when_lost(self, tell: Callable[[], None] | None) -> None:
        """Call `tell` when the client is gone; soon if it is."""
        self._tell_lost = tell
        if tell is not None and self.transport.is_closing():
            self.loop.call_soon(tell)

    def abort(self) -> None:
        """Close now, throwing away what the client did not read."""
        # At once, and not when the transport tells: the request may end before that.
        self.cycle.disconnected = True
        self.transport.abort()

    def received(self) -> bool:
        """Whether the whole body of the request is there."""
        return not self.cycle.more_body

    def answer(self, scope: Scope, status: int, headers: Headers, body: bytes) -> bool:
        """Send a whole answer to the request of `scope`, past the ASGI interface; False if it must go through that.

        Head and body in one piece: each piece is a system call here and a wake-up there.
        """
        cycle = self.cycle
        if (
            # A request that came too early has taken the place of the one that is answered.
            cycle.scope is not scope
            or not cycle.keep_alive
            or (b"connection", b"close") in headers
            or scope["method"] == "HEAD"
            or cycle.response_started
            or cycle.disconnected
            or self.flow.write_paused
            or self.transport.is_closing()
        ):
            return False
        lines = [b"%b: %b\r\n" % field for field in (*cycle.default_headers, *headers)]
        head = b"".join((STATUS_LINE[status], *lines, b"\r\n"))
        if {head.count(b"\r"), head.count(b"\n")} != {len(lines) + 2}:
            raise ValueError("a header has a line break in it")
        self.transport.write(head + body)
        cycle.response_started = cycle.response_complete = True
        cycle.message_event.set()
        cycle.on_response()
        return True

    def ready(self) -> bool:
        """Whether the body of the answer can be written to now without waiting for the client."""
        cycle = self.cycle
        return (
            cycle.response_started
            and not cycle.response_complete
            and not cycle.disconnected
            and not self.flow.write_paused
            and not self.transport.is_closing()
        )

    def push(self, chunk: bytes) -> bool:
        """Write a piece of the body that is not the last, past the ASGI interface; False if it must wait."""
        cycle = self.cycle
        if (
            # Of a head that was sent; a request that came too early has taken the place of the one that is answered.
            not cycle.chunked_encoding
            or cycle.response_complete
            or cycle.disconnected
            or self.flow.write_paused
            or self.transport.is_closing()
        ):
            return False
        self.transport.write(_framed(chunk))
        return True

    def _end_within(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self._refusal is None and self._in_head and self._chunk_bytes:
            self._refuse(RequestTimeout())
        else:
            self.transport.abort()

    # -- the end of an answer -------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_unread()

    def shutdown(self) -> None:
        """Close when the running answer has ended; the server stops."""
        self._parting = True
        super().shutdown()
        self._watch_unread()

    def _watch_unread(self) -> None:
        """Drop a client that takes nothing of what is left of its answer: no request is left that could notice.

        Neither closing nor the keep-alive timer would do it. Both wait until everything is sent, and TCP asks a client
        with a full buffer for as long as it answers.
        """
        self._stop_unread_timer()
        left = self.transport.get_write_buffer_size()
        if left:
            patience_s = self._limits.parting_s if self._parting else self._limits.stall_s
            self._unread_timer = self.loop.call_later(patience_s, self._check_unread, left)

    def _check_unread(self, left: int) -> None:
        self._unread_timer = None
        if not self.cycle.response_complete:
            return
        if self.transport.get_write_buffer_size() >= left:
            self.transport.abort()
        else:
            self._watch_unread()

    def _stop_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    # -- bytes ---------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None or (not self._in_head and self.cycle.response_complete):
            self._discard(len(data))
            if self._refusal is not None:
                return
        if self._in_head:
            self._chunk_bytes += len(data)
            if self._timer is None:
                self._end_within(self._limits.head_s)
        super().data_received(data)
        # The parser shows a field when it is complete; an endless one is seen by its bytes only.
        if self._in_head and self._chunk_bytes > self._limits.head_bytes and self._refusal is None:
            self._refuse(HeadersTooLarge())

    def _discard(self, size: int) -> None:
        """Bear with a client that has its answer and goes on sending: closing now would take the answer from it."""
        self._late_bytes += size
        if self._late_bytes > self._limits.refused_bytes:
            self.transport.abort()
        elif self._timer is None:
            self._end_within(self._limits.head_s)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  uvicorn's sentence, for its own plain text
        self._refuse(self._refusal or MalformedRequest())

    def _refuse(self, error: OncewiseError) -> None:
        """Answer and close, without the application: there is no request that it could answer."""
        self._refusal = error
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.abort()
                return
        self.transport.write(_refusal_bytes(error))
        self.transport.write_eof()
        self._end_within(self._limits.linger_s)

    # -- the parser's calls --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        # ASGI wants documents as extensions; ours is never serialised, and an object cannot be mistaken for one.
        self.scope["extensions"] = cast("Any", {CONNECTION: self})
        self._field_bytes = self._late_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        # A trailer comes here too, when the application has judged the head: x-org-id must not change after that.
        if self._in_head:
            super().on_header(name, value)
            self._count(len(name) + len(value) + 4)

    def _count(self, size: int) -> None:
        self._field_bytes += size
        if self._field_bytes > self._limits.head_bytes or len(self.headers) > self._limits.fields:
            self._refusal = HeadersTooLarge()
            raise httptools.HttpParserError

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            # uvicorn names the class of the cycle itself; it has not taken its first step yet.
            self.cycle.__class__ = _UntilClose

    def on_message_complete(self) -> None:
        self._in_head = True
        self._chunk_bytes = 0
        self._stop_timer()
        super().on_message_complete()


class _UntilClose(RequestResponseCycle):
    """An answer to HTTP/1.0. One without a length ends with the connection, since chunks came with HTTP/1.1.

    ApacheBench and older proxies ask so; uvicorn sends them chunks, which are then part of the text.
    """

    async def send(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start":
            if not any(name.lower() == b"content-length" for name, _ in message.get("headers", ())):
                self.chunked_encoding = False
                self.keep_alive = False
        elif message["type"] == "http.response.body" and not self.keep_alive and not self.expected_content_length:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


@lru_cache(maxsize=4)
def _framed(chunk: bytes) -> bytes:
    """A chunk of a chunked body; made once for all who are sent the same bytes object."""
    return b"%x\r\n%b\r\n" % (len(chunk), chunk)


def _refusal_bytes(error: OncewiseError) -> bytes:
    request_id = str(uuid7())
    body = problem_body(error, request_id)
    headers = [
        *problem_headers(error),
        (b"x-request-id", request_id.encode("ascii")),
        (b"x-content-type-options", b"nosniff"),
        (b"cache-control", b"no-store"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    lines = b"".join(b"%b: %b\r\n" % header for header in headers)
    return STATUS_LINE[status_of(error)] + lines + b"\r\n" + body


class Server(uvicorn.Server):
    """Serves the application until a signal, then lets running turns end.

    The first signal starts the drain: readiness answers 503, new turns are refused, running ones go on for at most
    `drain_s` seconds. The second skips the wait, not the release of what is left. The third ends the process. That its
    terminal is gone (SIGHUP) counts once, as the first one: the shell says it as well as the kernel.

    Args:
        app: What is served.
        drain_s: See above.
        at_once: As in `Listener.open`, for the sockets it is started with.
    """

    def __init__(self, app: App, *, drain_s: float, at_once: int = AT_ONCE) -> None:
        # No uvicorn logging configuration: the process that embeds us has its own.
        super().__init__(
            uvicorn.Config(
                app,
                http=GuardedProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_graceful_shutdown=5,
            )
        )
        self._app = app
        self._drain_s = drain_s
        self._at_once = at_once
        self._signals = 0
        self._hurry = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the services and listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup([])
        for bound in sockets or ():
            await self.accept_on(bound, self._at_once)
        _spare_the_collector()

    async def accept_on(self, bound: socket.socket, at_once: int) -> Listener:
        """Accept on one more socket, until the returned listener is closed or all are. Errors as in `Listener.open`."""

        def protocol() -> GuardedProtocol:
            return GuardedProtocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

        listener = await Listener.open(bound, protocol, backlog=BACKLOG, at_once=at_once)
        # For what uvicorn does with its servers, a listener is one.
        self.servers.append(cast("Any", listener))
        return listener

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take signals while this runs. A hang-up is taken too, unless it is ignored, as under `nohup`."""
        with super().capture_signals():
            before = signal.getsignal(signal.SIGHUP)
            if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
                yield
                return
            signal.signal(signal.SIGHUP, self._hang_up)
            try:
                yield
            finally:
                signal.signal(signal.SIGHUP, before)

    def _hang_up(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            self.handle_exit(sig, frame)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  the signature of a handler
        """Take a signal. It is not raised again at the end: a drained server has done what it was asked."""
        self._signals += 1
        self.should_exit = True
        self._app.drain()
        if self._signals == 2 and self._loop is not None:
            # A signal handler does not wake the loop by itself.
            self._loop.call_soon_threadsafe(self._hurry.set)
        elif self._signals > 2:
            self.force_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then close connections and services."""
        self._app.drain()
        await self._drain()
        self._app.stop_streams()
        for listener in cast("list[Listener]", self.servers):
            listener.close()
            # uvicorn tells the connections that it knows; one that came after that would hold it for five seconds.
            await listener.handed_over()
        await super().shutdown(sockets)

    async def _drain(self) -> None:
        # The listener stays open: a balancer must see readiness answer 503, not a broken host.
        services = self._app.services
        if services is None or self.force_exit:
            return
        drained = asyncio.ensure_future(services.finish(self._drain_s))
        hurried = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait((drained, hurried), return_when=asyncio.FIRST_COMPLETED)
        if not drained.done():
            drained.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await drained
            await services.finish(0.0)
        hurried.cancel()


def _spare_the_collector() -> None:
    """Keep what was made at start-up out of every collection, and collect less often.

    Thousands of waiting requests are thousands of live objects: at the default thresholds a burst of 5,000 is walked
    again and again while it arrives, and none of it is garbage.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
    gc.enable()


def run(app: App, sockets: list[socket.socket], *, drain_s: float) -> None:
    """Serve until a signal; returns when everything is closed."""
    Server(app, drain_s=drain_s).run(sockets)
