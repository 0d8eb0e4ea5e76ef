"""Many identical requests, one call: the part of Oncewise that any asyncio program can embed.

Importing this package loads the standard library only. The server is `oncewise serve`.
"""

from oncewise.core.coalesce import Coalescer, CoalescerStats, Flight, FlightLanded, Landed, Shared, Waiter
from oncewise.core.keys import RequestKey, canonical, request_key
from oncewise.core.pacing import Gcra, LocalLimiter, Pacer, PacerStats, Permit, Place
from oncewise.core.stream_hub import Encoder, HubStats, PlainText, Position, Sink, StreamHub, StreamLog, Viewer
from oncewise.errors import Failure, OncewiseError
from oncewise.model import Role
from oncewise.ports import CallSlots, LogEntry, LogTail, StartLimiter

__version__ = "0.1.0"

__all__ = [
    "CallSlots",
    "Coalescer",
    "CoalescerStats",
    "Encoder",
    "Failure",
    "Flight",
    "FlightLanded",
    "Gcra",
    "HubStats",
    "Landed",
    "LocalLimiter",
    "LogEntry",
    "LogTail",
    "OncewiseError",
    "Pacer",
    "PacerStats",
    "Permit",
    "Place",
    "PlainText",
    "Position",
    "RequestKey",
    "Role",
    "Shared",
    "Sink",
    "StartLimiter",
    "StreamHub",
    "StreamLog",
    "Viewer",
    "Waiter",
    "canonical",
    "request_key",
]
