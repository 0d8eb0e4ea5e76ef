"""The ASGI application: which route answers what, and the life of the services behind them.

The hot routes are dispatched here, before FastAPI: a waiting request is one task with few frames. All others are
FastAPI's, under the same edge.

Deliberately absent: sockets and signals (`oncewise.api.server`), and the environment (`oncewise.asgi`).
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Message, Receive, Scope, Send

from oncewise import __version__
from oncewise.api.completions import CompletionRoutes
from oncewise.api.edge import Edge
from oncewise.api.errors import problem_body, problem_headers, status_of
from oncewise.api.exchange import Exchange
from oncewise.api.limits import Limits
from oncewise.api.messages import Messages
from oncewise.api.openapi import with_raw_routes
from oncewise.api.routes import keys, operations, threads, turns
from oncewise.api.routes.common import EXCHANGE
from oncewise.api.schema import error_places
from oncewise.api.sse import SseEncoder
from oncewise.api.streams import Streams
from oncewise.bootstrap import Services, open_services
from oncewise.errors import InternalError, InvalidRequest, MethodNotAllowed, NotFound, OncewiseError
from oncewise.settings import Settings

__all__ = ["App", "create_app"]

logger = logging.getLogger("oncewise.http")

Opener = Callable[[], Awaitable[Services]]
Raw = Callable[[Exchange], Awaitable[None]]


def create_app(settings: Settings) -> "App":
    """The application for these settings; its services are opened and closed by the ASGI lifespan.

    What an operator should know about them is logged then.
    """

    async def open_all() -> Services:
        services = await open_services(settings, SseEncoder())
        for warning in services.warnings:
            logger.warning("%s", warning)
        return services

    return App(open_all)


class App:
    """The ASGI application.

    Attributes:
        services: What answers requests; set by the start-up of the ASGI lifespan.
        limits: Bounds of what clients may do.
    """

    def __init__(self, open_all: Opener, limits: Limits = Limits()) -> None:  # noqa: B008  frozen
        self.services: Services | None = None
        self.limits = limits
        self._open_all = open_all
        self._messages = Messages()
        self._streams = Streams(self._messages)
        self._completions = CompletionRoutes()
        self._rest = _fastapi()
        self._edge = Edge(self._route, limits=limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of the ASGI protocol."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        elif self.services is None:
            raise RuntimeError("the application needs a server that runs the ASGI lifespan")
        else:
            await self._edge.handle(scope, receive, send, self.services)

    # -- life ----------------------------------------------------------------------------------------------------

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            self.services = await self._open_all()
        except OncewiseError as error:
            await send({"type": "lifespan.startup.failed", "message": error.detail})
            return
        self.services.keys.changed = self._end_refused
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.stop_streams()
        await self.services.aclose(0.0)
        await send({"type": "lifespan.shutdown.complete"})

    def drain(self) -> None:
        """Take nothing new on; readiness says so."""
        if self.services is not None:
            self.services.drain()

    def stop_streams(self) -> None:
        """End every open stream where it is; clients may resume, or ask again."""
        self._streams.stop()
        self._completions.stop()

    def _end_refused(self) -> None:
        self._streams.end_refused()
        self._completions.end_refused()

    # -- routes --------------------------------------------------------------------------------------------------

    async def _route(self, exchange: Exchange) -> None:
        path = exchange.scope["path"]
        raw = self._v1_route(path.split("/")[2:]) if path.startswith("/v1/") else self._raw_route(path)
        if raw is None:
            await self._pass_on(exchange)
            return
        method, answer = raw
        if exchange.scope["method"] != method:
            await exchange.refuse(MethodNotAllowed(), [(b"allow", method.encode())])
        else:
            await answer(exchange)

    def _raw_route(self, path: str) -> tuple[str, Raw] | None:
        """The method and endpoint of a hot route; None for a path of FastAPI's."""
        match path.split("/"):
            case ["", "api", "threads", "cancel", _]:
                return None
            case ["", "api", "threads", thread_id, "messages"]:
                return "POST", lambda exchange: self._messages.post(exchange, thread_id)
            case ["", "api", "threads", thread_id, "messages", "stream"]:
                return "POST", lambda exchange: self._streams.post(exchange, thread_id)
            case ["", "api", "threads", thread_id, "stream"]:
                return "GET", lambda exchange: self._streams.join(exchange, thread_id)
            case ["", "api", "threads", thread_id, "turns", turn_id, "stream"]:
                return "GET", lambda exchange: self._streams.resume(exchange, thread_id, turn_id)
        return None

    def _v1_route(self, path: list[str]) -> tuple[str, Raw]:
        """The method and endpoint of a route below `/v1`.

        Raises:
            NotFound: there is none.
        """
        routes = self._completions
        match path:
            case ["chat", "completions"]:
                return "POST", routes.post
            case ["chat", "completions", call_id, "stream"]:
                return "GET", lambda exchange: routes.resume(exchange, call_id)
            case ["chat", "completions", call_id, "cancel"]:
                return "POST", lambda exchange: routes.cancel(exchange, call_id)
            case ["coalesce", "explain"]:
                return "POST", routes.explain
            case ["models"]:
                return "GET", routes.models
            case ["models", *name]:
                return "GET", lambda exchange: routes.model(exchange, "/".join(name))
        raise NotFound

    async def _pass_on(self, exchange: Exchange) -> None:
        """Let FastAPI answer, with the headers of every answer."""
        scope = {**exchange.scope, EXCHANGE: exchange}
        if scope["method"] == "HEAD":
            # The answer to HEAD is that to GET; the server leaves the body out.
            scope["method"] = "GET"

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.started = True
                message = {**message, "headers": exchange.head(message.get("headers", ()))}
            await exchange.send(message)

        await self._rest(scope, exchange.receive, send)


# -- FastAPI -------------------------------------------------------------------------------------------------------


_ROUTERS = (operations.router, keys.router, turns.router, threads.router)


class _Documented(FastAPI):
    """FastAPI with the raw routes in its OpenAPI document."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = with_raw_routes(super().openapi())
        return self.openapi_schema


def _fastapi() -> FastAPI:
    app = _Documented(
        title="Oncewise",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # Its own telemetry halves throughput with its spans and logs the messages of exceptions.
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
        },
    )
    for router in _ROUTERS:
        app.include_router(router)
    app.add_exception_handler(OncewiseError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _unrouted)
    app.add_exception_handler(Exception, _unknown)
    return app


def _problem(request: Request, error: OncewiseError) -> Response:
    body = problem_body(error, request.scope[EXCHANGE].request_id)
    headers = {name.decode("ascii"): value.decode("ascii") for name, value in problem_headers(error)}
    return Response(body, status_of(error), headers)


async def _known(request: Request, error: Exception) -> Response:
    assert isinstance(error, OncewiseError)  # noqa: S101  registered for it
    return _problem(request, error)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101  registered for it
    return _problem(request, InvalidRequest(errors=error_places(error.errors())))


async def _unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101  registered for it
    if error.status_code != 405:
        return _problem(request, NotFound())
    answer = _problem(request, MethodNotAllowed())
    answer.headers["allow"] = ", ".join(sorted(_methods(request)))
    return answer


def _methods(request: Request) -> set[str]:
    # The framework names only those of the first route that has the path.
    scope = request.scope
    routes = [route for router in _ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    fitting = [route for route in routes if route.matches(scope)[0] is not Match.NONE]
    exact = [route for route in fitting if route.path == scope["path"]]
    found = {method for route in exact or fitting for method in route.methods or ()}
    return found | {"HEAD"} if "GET" in found else found


async def _unknown(request: Request, error: Exception) -> Response:  # noqa: ARG001  the edge logs it
    return _problem(request, InternalError())
