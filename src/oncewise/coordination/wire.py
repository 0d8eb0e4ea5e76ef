"""The one door to the Redis driver: a connection that sends commands and returns replies, and nothing more.

The driver's client would retry (ten times, each with its own time-out: 25 s on a paused server), drop idle blocking
reads after 5 s, and pool connections that a cancelled request may leave with somebody else's reply in them. Its bare
connection does none of that. Whoever holds a `Wire` is the only one that uses it, from a task that no request cancels.

Deliberately absent: what is sent, time limits, and what to do about failures.
"""

from collections.abc import Sequence
from typing import Any

from redis.asyncio import ConnectionPool
from redis.exceptions import RedisError, ResponseError

__all__ = ["BadAddress", "Refused", "Wire", "WireFailed"]

Command = Sequence[str | bytes | int]


class BadAddress(Exception):
    """The URL cannot be used; the message does not contain it."""


class WireFailed(Exception):
    """The connection could not be made or broke; nobody knows which commands were carried out."""


class Refused(Exception):
    """The server understood a command and refused it.

    Attributes:
        code: The first word of its answer, e.g. `NOSCRIPT`.
    """

    def __init__(self, code: str) -> None:
        self.code = code
        super().__init__(code)


class Wire:
    """One connection, made at first use and again after `close`.

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        name: How the server lists this client.

    Raises:
        BadAddress: the URL is none of these.
    """

    def __init__(self, url: str, *, name: str) -> None:
        try:
            # RESP2, and no word about the driver: one round trip less to be ready.
            pool = ConnectionPool.from_url(url, protocol=2, socket_timeout=None, client_name=name, driver_info=None)
            self._connection: Any = pool.make_connection()  # type: ignore[no-untyped-call]
        except (ValueError, TypeError) as error:
            raise BadAddress(str(type(error).__name__)) from None

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands together and return a reply for each; a `Refused` stands where one was refused.

        Raises:
            WireFailed: there is no connection, or not any more.
        """
        connection = self._connection
        try:
            await connection.connect()
            await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
            return [await self._reply() for _ in commands]
        except ResponseError as error:
            # While connecting: wrong password, no such database, too many clients.
            raise WireFailed(_code(error)) from None
        except (RedisError, OSError) as error:
            raise WireFailed(type(error).__name__) from None

    async def _reply(self) -> Any:
        try:
            return await self._connection.read_response()
        except ResponseError as error:
            return Refused(_code(error))

    async def close(self) -> None:
        """Drop the connection, whatever is under way on it."""
        await self._connection.disconnect(nowait=True)


def _code(error: ResponseError) -> str:
    code = getattr(error, "status_code", None) or str(error).partition(" ")[0]
    return str(code)
