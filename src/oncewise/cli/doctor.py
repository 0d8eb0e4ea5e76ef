"""`oncewise doctor`: would a server with these settings work here, and if not, what mends it?

Deliberately absent: what is looked at (`oncewise.cli.checks`).
"""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from oncewise.cli import checks
from oncewise.cli.checks import Finding, State
from oncewise.settings import Loaded

__all__ = ["run"]

_STYLE = {State.OK: "green", State.NOTE: "yellow", State.WRONG: "bold red"}


def run(loaded: Loaded, *, as_json_text: bool) -> bool:
    """Look at everything and print it; True if nothing is wrong."""
    here = [
        *checks.program(loaded),
        *checks.limits(),
        *checks.workers(loaded.settings),
        *checks.address(loaded.settings),
        *checks.demo(loaded.settings),
    ]
    findings = [*here, *asyncio.run(_elsewhere(loaded))]
    well = all(finding.state is not State.WRONG for finding in findings)
    if as_json_text:
        print(json.dumps({"ok": well, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print(findings, well=well)
    return well


async def _elsewhere(loaded: Loaded) -> list[Finding]:
    """What has to be asked over a network, or may have to. All at once: a host that is silent is waited for once."""

    async def listed(found: AsyncIterator[Finding]) -> list[Finding]:
        return [finding async for finding in found]

    settings = loaded.settings
    # With the demo behind every name no provider is called.
    configured = [] if settings.demo else settings.providers.values()
    groups = await asyncio.gather(
        listed(checks.database(settings)),
        listed(checks.redis(settings)),
        asyncio.gather(*(checks.provider(each) for each in configured)),
    )
    return [finding for group in groups for finding in group]


def _print(findings: list[Finding], *, well: bool) -> None:
    console = Console()
    table = Table(box=SIMPLE_HEAD)
    for heading in ("", "About", "Found", "What to do"):
        # What is shown is also what is copied.
        table.add_column(heading, overflow="fold")
    for finding in findings:
        # As text: what stands in square brackets is no markup, but the name of an extra.
        cells = (Text(finding.check), Text(finding.said), Text(finding.mend))
        table.add_row(Text(finding.state, style=_STYLE[finding.state]), *cells)
    console.print(table)
    wrong = sum(finding.state is State.WRONG for finding in findings)
    console.print("Nothing is wrong." if well else f"Wrong: {wrong}.", style="bold green" if well else "bold red")
