"""Events as log lines: a stable action, and fields. Never message text, keys of requests or secrets.

Deliberately absent: where logs go and how they look. The program that starts the server decides that.
"""

import logging

from oncewise.core.breaker import BreakerChanged, BreakerState
from oncewise.core.coalesce import FlightLanded
from oncewise.core.keys import RequestKey
from oncewise.ports import CoordinationChanged

__all__ = ["log_event"]

logger = logging.getLogger("oncewise.flights")
providers = logging.getLogger("oncewise.providers")
coordination = logging.getLogger("oncewise.coordination")


def log_event(event: object) -> None:
    """Write a line for a landed flight, at debug level if it ended well, else at info level; for a breaker; for Redis.

    That a breaker opened is a warning: requests are refused from then on. So is that Redis is away: none is, but
    workers see each other's text late.
    """
    if isinstance(event, FlightLanded):
        level = logging.DEBUG if event.code is None else logging.INFO
        if logger.isEnabledFor(level):
            logger.log(level, "flight landed", extra=_fields(event))
    elif isinstance(event, BreakerChanged):
        opened = event.state is BreakerState.OPEN
        level = logging.WARNING if opened else logging.INFO
        providers.log(level, "breaker opened" if opened else "breaker closed", extra=_breaker_fields(event))
    elif isinstance(event, CoordinationChanged) and event.up:
        coordination.warning("Redis answers again")
    elif isinstance(event, CoordinationChanged):
        coordination.warning("Redis does not answer (%s); requests are served without it", event.reason)


def _fields(event: FlightLanded) -> dict[str, object]:
    key = event.key
    return {
        # Enough of the digest to correlate, nothing to leak.
        "flight": f"{key.kind}:{key.digest[:8]}" if isinstance(key, RequestKey) else "",
        "joined": event.joined,
        "abandoned": event.abandoned,
        "duration_ms": round(event.duration_s * 1000),
        "code": event.code or "ok",
    }


def _breaker_fields(event: BreakerChanged) -> dict[str, object]:
    return {
        "provider": event.provider,
        "model": event.model,
        "failures": event.failures,
        "calls": event.calls,
        "open_ms": round(event.open_s * 1000),
    }
