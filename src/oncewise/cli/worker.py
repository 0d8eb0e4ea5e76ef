"""One worker process of `oncewise serve --workers N`: the server of `oncewise.api`, on a supervisor's leash.

Started as `python -m oncewise.cli.worker FD`, where FD is the leash (`oncewise.cli.supervisor`). A signal lets it
finish what it has and end, however often it comes: a process manager may signal every process of a service, and what
was meant once must not count as the second signal that skips the wait. Only the supervisor says `hurry`.

Deliberately absent: settings of its own. All workers have those that the supervisor was started with.
"""

import asyncio
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from signal import SIGTERM
from types import FrameType
from typing import Any, NoReturn, cast

from oncewise.api.app import App
from oncewise.api.listener import AT_ONCE, Listener
from oncewise.api.server import Server
from oncewise.api.sockets import SocketGroup
from oncewise.api.sse import SseEncoder
from oncewise.bootstrap import Services, open_services
from oncewise.cli.keys import any_key
from oncewise.cli.start_up import log_to_terminal
from oncewise.errors import OncewiseError
from oncewise.settings import Settings, is_loopback
from oncewise.telemetry.shared_figures import SharedFigures

__all__ = ["main"]

Message = dict[str, Any]


class Leash:
    """The line to the supervisor, at the worker's end. Read in a thread: it must be heard while the loop is stuck.

    Args:
        end: Of the pair of sockets.
        grace_s: Seconds this process has to end by itself when the supervisor is gone.

    Attributes:
        brief: What the supervisor said first.
    """

    def __init__(self, end: socket.socket, *, grace_s: float = 5.0) -> None:
        self._end = end
        self._grace_s = grace_s
        self._lines = end.makefile("rb")
        first = self._lines.readline()
        if not first:
            sys.exit(1)
        self.brief: Message = json.loads(first)

    def tell(self, message: Message) -> None:
        # Of a supervisor that is gone the thread hears.
        with suppress(OSError):
            self._end.sendall(json.dumps(message).encode() + b"\n")

    def refuse(self, reason: str) -> NoReturn:
        """Say why this worker cannot serve, and end it."""
        self.tell({"refuses": reason})
        # Not by an exception: uvicorn would print the reason as well, once for each worker.
        os._exit(1)

    def listen(self, obey: Callable[[Message], None]) -> None:
        """Call `obey` in the running loop with each message, and with `{"do": "end"}` when the supervisor is gone."""
        loop = asyncio.get_running_loop()

        def follow() -> None:
            with suppress(OSError):
                for line in self._lines:
                    loop.call_soon_threadsafe(obey, json.loads(line))
            # The loop is closed if this worker was ending already.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(obey, {"do": "end"})
            shutil.rmtree(self.brief["folder"], ignore_errors=True)
            time.sleep(self._grace_s)
            os._exit(1)

        threading.Thread(target=follow, name="oncewise-leash", daemon=True).start()


class WorkerServer(Server):
    """The server of one worker; does what the supervisor says from the moment it serves.

    Args:
        app: What is served.
        leash: The line to the supervisor.
        groups: The sockets of all workers.
        drain_s: Seconds running turns may go on.
    """

    def __init__(self, app: App, leash: Leash, groups: list[SocketGroup], *, drain_s: float) -> None:
        # Who takes all that waits on a socket for several would leave nothing to the others.
        super().__init__(app, drain_s=drain_s, at_once=AT_ONCE if len(groups) > 1 else 0)
        self._leash = leash
        self._groups = groups
        self._inherited: dict[int, list[Listener]] = {}
        self._hurried = False
        self._orders: asyncio.Queue[Message] = asyncio.Queue()
        self._obeying: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the services, listen, tell the supervisor."""
        await super().startup(sockets)
        self._leash.listen(self._orders.put_nowait)
        self._obeying = asyncio.create_task(self._obey())
        services = self._app.services
        assert services is not None  # noqa: S101  the start-up opened them
        self._leash.tell({"serves": {"has_keys": services.keys.exist, "warnings": services.warnings}})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal: the first one drains, others change nothing."""
        if not self.should_exit:
            super().handle_exit(sig, frame)

    def hurry(self) -> None:
        """Wait for nothing any more; hand back what runs."""
        self.handle_exit(SIGTERM, None)
        if not self._hurried:
            self._hurried = True
            # The second signal of our server; a third one would skip the hand-back as well.
            super().handle_exit(SIGTERM, None)

    async def _drain(self) -> None:
        await super()._drain()
        # The listeners close now. Ports inherited after that would be closed by nobody.
        if self._obeying is not None:
            self._obeying.cancel()

    # -- orders --------------------------------------------------------------------------------------------------

    async def _obey(self) -> None:
        while True:
            match await self._orders.get():
                case {"accept": [*slots]}:
                    # No file descriptor left: connections wait for their own worker then, as before.
                    with suppress(OSError):
                        await self._accept_for({slot for slot in slots if slot != self._leash.brief["slot"]})
                case {"do": "drain"}:
                    self.handle_exit(SIGTERM, None)
                case {"do": "hurry"}:
                    self.hurry()
                case {"do": "end"}:
                    self._release_port()
                    self.hurry()

    async def _accept_for(self, slots: set[int]) -> None:
        """Accept on the sockets of workers that cannot, in their stead."""
        for slot in self._inherited.keys() - slots:
            for listener in self._inherited.pop(slot):
                listener.close()
                self.servers.remove(cast("Any", listener))
        for slot in slots - self._inherited.keys():
            # Copies: closing a server closes its socket, and ours may be needed again.
            # One at a time: their own worker may be serving already, and is to have its share.
            self._inherited[slot] = [await self.accept_on(bound.dup(), 0) for bound in self._groups[slot]]

    def _release_port(self) -> None:
        """Stop listening at once, so that another server can be started while this one ends."""
        for server in self.servers:
            server.close()
        for bound in (bound for group in self._groups for bound in group):
            bound.close()


def main() -> None:
    """Serve until the supervisor or a signal says otherwise."""
    leash = Leash(_inherited(int(sys.argv[1])))
    brief = leash.brief
    settings = Settings.model_validate(brief["settings"])
    log_to_terminal(brief["slot"] + 1)
    groups = [[_inherited(fd) for fd in group] for group in brief["groups"]]
    try:
        if not is_loopback(settings.host) and not any_key(settings):
            leash.refuse(brief["no_key"])
    except OncewiseError as error:
        leash.refuse(error.detail)

    figures = SharedFigures(Path(brief["folder"]) / "figures", str(brief["slot"]))

    async def open_all() -> Services:
        try:
            return await open_services(settings, SseEncoder(), figures)
        except OncewiseError as error:
            leash.refuse(error.detail)

    server = WorkerServer(App(open_all), leash, groups, drain_s=settings.drain_s)
    server.run(groups[brief["slot"] % len(groups)])


def _inherited(fd: int) -> socket.socket:
    """A socket that the supervisor passed on; not for processes that this one starts."""
    passed = socket.socket(fileno=fd)
    passed.set_inheritable(False)
    return passed


if __name__ == "__main__":
    main()
