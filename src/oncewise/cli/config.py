"""`oncewise config show`: every setting as the server would use it, and where it comes from.

Secrets are never shown, only whether they are set.
"""

from collections.abc import Iterator

from pydantic import SecretStr
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from oncewise.settings import Loaded, ProviderSettings, Settings, shown_url, variable_of

__all__ = ["rows", "show"]


def show(loaded: Loaded, *, origin: bool) -> None:
    """Print the settings."""
    table = Table(box=SIMPLE_HEAD)
    for heading in ("Setting", "Value", *(["From"] if origin else [])):
        # Neither names nor values are cut: what is shown is also what is copied.
        table.add_column(heading, overflow="fold")
    for row in rows(loaded):
        table.add_row(*(row if origin else row[:2]))
    Console().print(table)
    for warning in loaded.warnings:
        Console(stderr=True).print(warning)


def rows(loaded: Loaded) -> Iterator[tuple[str, str, str]]:
    """Variable, value and origin of every setting; secrets only as `set` or `not set`."""
    for name in Settings.model_fields:
        if name not in ("providers", "aliases"):
            value = getattr(loaded.settings, name)
            yield variable_of((name,)), _shown(value), loaded.origins.get((name,), "default")
    for alias, target in loaded.settings.aliases.items():
        yield f"{variable_of(('aliases',))} {alias}", target, loaded.origins.get(("aliases", alias), "default")
    for provider in loaded.settings.providers.values():
        for name in ProviderSettings.model_fields:
            if name != "name":
                path = ("providers", provider.name, name)
                yield variable_of(path), _shown(getattr(provider, name)), loaded.origins.get(path, "default")


def _shown(value: object) -> str:
    if isinstance(value, SecretStr):
        return "set"
    if value is None:
        return "not set"
    return shown_url(value) if isinstance(value, str) and "://" in value else str(value)
