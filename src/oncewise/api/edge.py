"""The outermost layer: what every request passes and every answer has, under any ASGI server.

A request gets its id, its head is checked, its body is read within bounds of size and time, and whatever goes wrong
inside becomes one well-formed error. Exceptions that are not ours are logged by type and place; their texts may
quote a message or a secret, so they go neither to the client nor to the log.

Deliberately absent: tenants (each route asks for its own), routes, and cross-origin grants: there are none.
"""

import contextlib
import logging
import traceback
from collections.abc import Awaitable, Callable

from starlette.types import Receive, Scope, Send

from oncewise.api.auth import gate_of
from oncewise.api.exchange import WITH_BODY, Exchange
from oncewise.api.limits import Limits
from oncewise.api.presence import ClientGone
from oncewise.api.sse import Stalled
from oncewise.bootstrap import Services
from oncewise.errors import InternalError, OncewiseError

__all__ = ["Edge"]

logger = logging.getLogger("oncewise.http")

Route = Callable[[Exchange], Awaitable[None]]


class Edge:
    """Lets requests in, one by one, and catches what comes back."""

    def __init__(self, route: Route, *, limits: Limits) -> None:
        self._route = route
        self._limits = limits

    async def handle(self, scope: Scope, receive: Receive, send: Send, services: Services) -> None:
        """Answer one HTTP request, whatever happens."""
        gate = gate_of(services.keys)
        exchange = Exchange(scope, receive, send, gate=gate, limits=self._limits, services=services)
        try:
            exchange.check_head()
            if scope["method"] in WITH_BODY:
                await exchange.read_body(services.settings.max_body_bytes)
            await self._route(exchange)
        except OncewiseError as error:
            await _refuse(exchange, error)
        except (ClientGone, Stalled):
            # 499 is nginx's word for it; nobody is there to be told.
            logger.info("client gone", extra={"request_id": exchange.request_id, "status": 499})
        except Exception as error:  # noqa: BLE001  the last catch there is
            _log(exchange, error)
            await _refuse(exchange, InternalError())


async def _refuse(exchange: Exchange, error: OncewiseError) -> None:
    # Of an answer that has begun nothing can be taken back: the server closes the connection.
    if not exchange.started:
        with contextlib.suppress(ClientGone):
            await exchange.refuse(error)


def _log(exchange: Exchange, error: Exception) -> None:
    places = traceback.format_list(traceback.extract_tb(error.__traceback__, limit=-20))
    logger.error(
        "request %s failed: %s\n%s",
        exchange.request_id,
        type(error).__name__,
        "".join(places),
        extra={"request_id": exchange.request_id, "status": 500},
    )
