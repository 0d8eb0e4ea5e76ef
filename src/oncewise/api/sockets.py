"""Listening sockets: for one server process, or a set for several on one port.

Several processes get a socket each (`SO_REUSEPORT`), between which the kernel spreads connections evenly. On one shared
socket whoever wakes first takes all that waits: of 50 connections at once the busier of two workers got 44, not 27
(docs/decisions/0028).

Deliberately absent: who accepts (`oncewise.api.server`), and every import but the standard library's: the supervisor
of several workers makes their sockets, and is to be small.
"""

import socket
import sys
from contextlib import ExitStack
from typing import Any

__all__ = ["BACKLOG", "SocketGroup", "listen", "listen_for_each"]

SEND_BUFFER = 64 * 1024
BACKLOG = 8192

SocketGroup = list[socket.socket]
"""Sockets of one address, one per address family it has."""


def listen(host: str, port: int, *, shared: bool = False) -> SocketGroup:
    """Sockets bound to an address.

    Args:
        host: A name or an address.
        port: 0 takes any free one.
        shared: Whether further sockets of this user may be bound to the same address.

    Raises:
        OSError: the address is unknown or in use.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    with ExitStack() as opened:
        sockets = [
            opened.enter_context(_bound(family, kind, protocol, address, shared=shared))
            for family, kind, protocol, _, address in dict.fromkeys(found)
        ]
        opened.pop_all()
    return sockets


def _bound(family: int, kind: int, protocol: int, address: Any, *, shared: bool) -> socket.socket:
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Accepted connections inherit it.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
        bound.setblocking(False)
    except BaseException:
        bound.close()
        raise
    return bound


def listen_for_each(host: str, port: int, processes: int) -> list[SocketGroup]:
    """A group for each of several processes on one port, all listening; one for all where only that is fair.

    Connections wait in them from now on, whether a process accepts them yet or not. Errors as in `listen`.
    """
    if port:
        # Sockets that share an address could be bound beside those of another server, and nobody would notice.
        for bound in listen(host, port):
            bound.close()
    # Elsewhere the kernel lets sockets share a port as well, but gives all connections to one of them.
    count = processes if sys.platform == "linux" else 1
    groups: list[SocketGroup] = []
    for _ in range(count):
        group = listen(host, port, shared=count > 1)
        port = group[0].getsockname()[1]
        groups.append(group)
    for bound in (bound for group in groups for bound in group):
        bound.listen(BACKLOG)
    return groups
