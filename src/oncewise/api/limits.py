"""The bounds of the HTTP layer: what a client may send, hold and wait for.

Not settings: the contract names most of these numbers. They are values of one object, so that a test can be quick.
"""

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one server.

    Attributes:
        head_bytes: A request's head.
        fields: Header fields of a request.
        head_s: Within which a head must be complete: the first from the connection, later ones from their first byte.
        body_s: Within which a body must be complete.
        refused_bytes: What a client may go on sending although it was refused; many read an answer only afterwards.
        refused_s: For which it may do so before it is answered.
        linger_s: For which a client whose request was no HTTP has time to read that, before its connection is gone.
        hold_s: For which the head of a stream waits for an early failure.
        ping_s: Silence after which a ping says that a stream is alive.
        stall_s: For which a client may take no bytes of its stream.
        parting_s: The same, once the server stops.
    """

    head_bytes: int = 32 * 1024
    fields: int = 100
    head_s: float = 15.0
    body_s: float = 15.0
    refused_bytes: int = 8 * 2**20
    refused_s: float = 0.8
    linger_s: float = 2.0
    hold_s: float = 1.0
    ping_s: float = 15.0
    stall_s: float = 10.0
    parting_s: float = 0.2
