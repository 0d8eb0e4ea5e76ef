"""A `Transport` that answers from memory, for bytes that no server on loopback could be asked to cut so finely."""

import itertools
from collections.abc import Iterable, Mapping

from oncewise.providers.transport import Reply

__all__ = ["ScriptedTransport", "split"]


class ScriptedTransport:
    """Answers every request with the same pieces.

    Attributes:
        posted: The `(path, body)` of all requests.
        read: Pieces taken from the bodies so far.
        open: Replies that were not closed.
    """

    def __init__(self, pieces: Iterable[bytes], *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.pieces = list(pieces)
        self.status = status
        self.headers = {"content-type": "text/event-stream", **(headers or {})}
        self.posted: list[tuple[str, bytes]] = []
        self.read = 0
        self.open = 0
        self.closed = False

    async def post(self, path: str, body: bytes) -> Reply:
        self.posted.append((path, body))
        self.open += 1
        left = iter(self.pieces)

        async def read() -> bytes:
            piece = next(left, b"")
            self.read += bool(piece)
            return piece

        return Reply(self.status, self.headers, read, self._close)

    def _close(self) -> None:
        self.open -= 1

    async def aclose(self) -> None:
        self.closed = True


def split(body: bytes, *positions: int) -> list[bytes]:
    """The body cut at these positions; no empty pieces."""
    edges = [0, *sorted(positions), len(body)]
    return [body[start:end] for start, end in itertools.pairwise(edges) if start < end]
