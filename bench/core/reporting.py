"""A table for people and a record that says how it came about."""

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path


def write(rows: Sequence[Mapping[str, object]], out: str | None) -> None:
    """Print rows as a table; with `out`, write them as JSON with command, commit, date and machine."""
    names = list(rows[0])
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in names}
    for line in (dict(zip(names, names, strict=True)), *rows):
        print("  ".join(str(line[name]).rjust(widths[name]) for name in names))
    if out is not None:
        Path(out).write_text(json.dumps({**_circumstances(), "rows": rows}, indent=2) + "\n", encoding="utf-8")


def _circumstances() -> dict[str, object]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "machine": f"{platform.system()} {platform.machine()}",
    }
