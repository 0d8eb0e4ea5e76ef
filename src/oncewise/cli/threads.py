"""`oncewise threads`: conversations in and out of a running server, one message a line."""

import asyncio
from pathlib import Path
from urllib.parse import quote

from oncewise.cli.client import BrokenAnswer, Reply, Server
from oncewise.cli.load import ServerRefused, not_oncewise

__all__ = ["export_thread", "import_thread"]


def export_thread(server: Server, thread: str) -> bytes:
    """The messages of a thread as JSONL; errors as in `Server.fetch`.

    Raises:
        ServerRefused: no such thread.
    """
    return _expect(asyncio.run(server.fetch("GET", f"/api/threads/{quote(thread, safe='')}/export")), 200).body


def import_thread(server: Server, file: Path) -> str:
    """Make a thread of a file that was exported; return its id. Errors as in `Server.fetch`.

    Raises:
        ServerRefused: the file is not an exported thread; nothing was stored.
    """
    own = Server(server.host, server.port, server.tls, {**server.headers, "content-type": "application/x-ndjson"})
    reply = _expect(asyncio.run(own.fetch("POST", "/api/threads/import", file.read_bytes())), 201)
    return str(reply.json()["thread_id"])


def _expect(reply: Reply, status: int) -> Reply:
    if reply.status == status:
        return reply
    try:
        detail = reply.json()["detail"]
    except (BrokenAnswer, KeyError, TypeError):
        raise not_oncewise(reply) from None
    raise ServerRefused(f"the server answered {reply.status}: {detail}")
