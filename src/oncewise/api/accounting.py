"""The account of a request, closed by the route that answers it, just before its last byte is sent.

Whoever has the answer then sees it in the figures. A request whose client goes away is accounted for as well: it may
have led a call that has to be paid for.

Deliberately absent: what a row says, and when it is written (`oncewise.service.accounts`).
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from oncewise.api.exchange import Exchange
from oncewise.api.presence import ClientGone
from oncewise.api.sse import Stalled
from oncewise.service.accounts import CLIENT_GONE, Ended
from oncewise.service.completions import CompletionTicket
from oncewise.service.turns import TurnTicket

__all__ = ["account", "unless_gone"]

Ticket = TurnTicket | CompletionTicket


def account(exchange: Exchange, ticket: Ticket, result: object, error_code: str | None = None, *, stream: bool) -> None:
    """Close the account of a request; closing it again does nothing.

    Args:
        exchange: The request.
        ticket: Its interest in the work that answers it.
        result: What the work came to; None if it failed.
        error_code: Why it failed.
        stream: Whether the answer is a stream.
    """
    ended = Ended(
        request_id=exchange.request_id,
        org_id=ticket.org_id,
        surface=ticket.surface,
        stream=stream,
        arrived_s=exchange.arrived_s,
        ended_s=asyncio.get_running_loop().time(),
        finished_at_ms=time.time_ns() // 1_000_000,
        error_code=error_code,
    )
    exchange.services.accounts.close(ended, ticket, result)


@contextmanager
def unless_gone(exchange: Exchange, ticket: Ticket, *, stream: bool) -> Iterator[None]:
    """A block that ends with `ClientGone` when the client leaves, and accounts for the request then.

    Raises:
        ClientGone, Stalled: nobody takes the answer.
    """
    try:
        with exchange.presence():
            yield
    except (ClientGone, Stalled):
        account(exchange, ticket, None, CLIENT_GONE, stream=stream)
        raise
