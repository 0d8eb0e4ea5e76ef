"""`oncewise burst`: identical requests to a running server, and whether it kept its promise."""

import asyncio
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from oncewise.cli.client import Server
from oncewise.cli.load import Burst, BurstResult, create_thread, run_burst
from oncewise.cli.report import as_html, as_json, print_burst

__all__ = ["PROMPT", "burst_with_progress", "message", "progress_bar", "run"]

PROMPT = "Give me 5 bullets about request coalescing."


def message(content: str, provider: str | None = None, model: str | None = None) -> dict[str, Any]:
    """The body of a message; what is None is left to the server."""
    named = {"provider": provider, "model": model}
    return {"role": "user", "content": content, "reason": "burst-test"} | {k: v for k, v in named.items() if v}


def progress_bar(console: Console) -> Progress:
    """A bar over requests; it disappears when it is done and is not drawn where nobody watches."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


async def burst_with_progress(server: Server, burst: Burst, progress: Progress, name: str) -> BurstResult:
    """Run one burst and move a bar with it."""
    task = progress.add_task(name, total=burst.requests)
    return await run_burst(server, burst, on_answer=lambda _answer: progress.advance(task))


def run(
    server: Server,
    body: dict[str, Any],
    *,
    requests: int,
    connections: int,
    stream: bool,
    as_json_text: bool,
    html: Path | None,
) -> bool:
    """Run a burst against a fresh thread and print what it came to; True if all was as promised."""
    console = Console(stderr=as_json_text)

    async def burst() -> BurstResult:
        thread = await create_thread(server)
        with progress_bar(console) as progress:
            plan = Burst([thread], body, requests, connections, stream)
            return await burst_with_progress(server, plan, progress, f"{requests} requests")

    result = asyncio.run(burst())
    if as_json_text:
        print(json.dumps(as_json(result), indent=2))
    else:
        print_burst(console, result)
    if html:
        # Last: a file that cannot be written must not take the figures with it.
        html.write_text(as_html(result), encoding="utf-8")
    return result.as_promised
