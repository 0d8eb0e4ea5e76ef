"""`oncewise demo`: a server on a database of its own, three bursts against it, and whether it kept its promises.

Server and clients share one process and one event loop, but talk over sockets like anybody else. The provider is the
built-in one, slow and limited as a real one is.
"""

import socket
from dataclasses import dataclass
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from oncewise.cli.burst import burst_with_progress, message, progress_bar
from oncewise.cli.client import Server
from oncewise.cli.load import Burst, BurstResult, create_thread
from oncewise.cli.report import Promise, burst_promises, milliseconds, print_promises
from oncewise.cli.serve import run_server
from oncewise.cli.start_up import CannotStart, address_url, create_thread_command, take_port
from oncewise.settings import Loaded, Settings

__all__ = ["FLAGS", "ROUNDS", "Round", "promises", "run"]

ORG = "org_demo"


@dataclass(frozen=True, slots=True)
class Round:
    """One burst of the demonstration."""

    name: str
    prompt: str
    requests: int
    connections: int
    threads: int = 1


ROUNDS = (
    Round("50 over 10 connections", "Give me 5 bullets about request coalescing.", 50, 10),
    Round("50 over 50 connections", "Why is one answer enough for fifty readers?", 50, 50),
    Round("20 threads, one prompt", "What does a café know about caching?", 20, 20, threads=20),
)


def promises(round_: Round, result: BurstResult) -> list[Promise]:
    """What should hold for one round: the burst's promises, and who led and who followed."""
    led, followed = _shares(round_, result)
    shared = Promise(f"{led} led and {followed} followed", led == 1 and followed == round_.requests - 1)
    return [*burst_promises(result), shared]


def _shares(round_: Round, result: BurstResult) -> tuple[int, int]:
    """How many led and how many followed."""
    if round_.threads > 1:
        # Each thread leads a turn of its own; what they share is the provider call.
        return result.messages // 2 - result.shared, result.shared
    return result.roles["leader"], result.roles["follower"] + result.roles["replayed"]


# Nothing here is worth waiting for when the user has seen enough.
FLAGS = {"host": "127.0.0.1", "demo": True, "drain_s": 0}
"""Settings of every demonstration."""


def run(loaded: Loaded, *, once: bool) -> bool:
    """Run the demonstration; True if every promise held. Without `once` the server then stays up until a signal.

    Args:
        loaded: Settings with `FLAGS`; the database is replaced by one of its own.
        once: Whether to end after the verdict.

    Raises:
        CannotStart: the server cannot be started.
        KeyboardInterrupt: a signal came before the verdict.
    """
    console = Console()
    with TemporaryDirectory(prefix="oncewise-demo-") as directory:
        settings = loaded.settings.model_copy(update={"database_url": f"sqlite:///{directory}/demo.db"})
        sockets = _take_port(loaded, console)
        show = _Demonstration(settings, address_url(sockets), console)

        async def rounds() -> bool:
            await show.run()
            if not once:
                show.invite()
            return once

        run_server(settings, sockets, rounds())
    if show.verdict is None:
        raise KeyboardInterrupt
    return show.verdict


def _take_port(loaded: Loaded, console: Console) -> list[socket.socket]:
    """The port that was asked for; instead of the default one any that is free."""
    settings = loaded.settings
    try:
        return take_port(settings.host, settings.port)
    except CannotStart:
        if ("port",) in loaded.origins:
            raise
    sockets = take_port(settings.host, 0)
    console.print(f"Port {settings.port} is taken; this demo uses {address_url(sockets)}.", highlight=False)
    return sockets


class _Demonstration:
    """The rounds, and what is shown of them.

    Attributes:
        verdict: Whether every promise held; None before all rounds are over.
    """

    def __init__(self, settings: Settings, url: str, console: Console) -> None:
        self.verdict: bool | None = None
        self._settings = settings
        self._server = Server.at(url, {"x-org-id": ORG})
        self._console = console

    async def run(self) -> None:
        """Run the rounds one after the other and print what they came to."""
        self._say(f"A server at {self._server.url}, and a provider that {self._limits()}.\n")
        results = []
        with progress_bar(self._console) as progress:
            for round_ in ROUNDS:
                threads = [await create_thread(self._server, round_.name) for _ in range(round_.threads)]
                burst = Burst(threads, message(round_.prompt), round_.requests, round_.connections)
                results.append(await burst_with_progress(self._server, burst, progress, round_.name))
        self._console.print(self._table(results))
        self._say(f"{self._beside_the_provider(results)}\n")
        self._judge(results)

    def invite(self) -> None:
        """Say what can be done with the server now."""
        url = self._server.url
        self._say(f"\nThe server stays up until Ctrl-C: {url}/openapi.json, {url}/api/metrics/performance")
        self._say(f"  {create_thread_command(url)}")
        self._say(f"  oncewise burst {url}")

    def _limits(self) -> str:
        settings = self._settings
        return f"takes {milliseconds(settings.demo_latency_ms / 1000)} per answer and {settings.demo_rps:g} call/s"

    def _table(self, results: list[BurstResult]) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column("Round", no_wrap=True)
        for heading in ("Answers", "Calls", "Stored", "Led", "Followed", "p50", "p95"):
            table.add_column(heading, justify="right", no_wrap=True)
        for round_, result in zip(ROUNDS, results, strict=True):
            led, followed = _shares(round_, result)
            table.add_row(
                round_.name,
                f"{result.succeeded}/{round_.requests}",
                f"{result.provider_calls}",
                f"{result.messages}",
                f"{led}",
                f"{followed}",
                milliseconds(result.latency_s(0.5)),
                milliseconds(result.latency_s(0.95)),
            )
        return table

    def _beside_the_provider(self, results: list[BurstResult]) -> str:
        """What the slowest round took beside one request alone."""
        call_s = self._settings.demo_latency_ms / 1000
        slowest_s = max(result.latency_s(0.95) or 0.0 for result in results)
        times = f"{slowest_s / call_s:.2f} times" if call_s else "more than"
        return f"p95 is at most {times} the {milliseconds(call_s)} that the provider takes for one request alone."

    def _judge(self, results: list[BurstResult]) -> None:
        kept = True
        for round_, result in zip(ROUNDS, results, strict=True):
            self._say(f"{round_.name}:")
            judged = promises(round_, result)
            print_promises(self._console, judged)
            kept = kept and all(promise.kept for promise in judged)
        requests, calls = sum(r.burst.requests for r in results), sum(r.provider_calls for r in results)
        style = "bold green" if kept else "bold red"
        self._console.print(
            f"\n{'PASS' if kept else 'FAIL'}: {requests} requests, {calls} provider calls", style=style, highlight=False
        )
        self.verdict = kept

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)
