"""`oncewise config show`: every setting as the server would use it, and where it comes from.

Secrets are never shown, only whether they are set.
"""

from collections.abc import Iterator

from pydantic import SecretStr
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from oncewise.settings import TABLES, Loaded, ModelPrice, ProviderSettings, Settings, shown_url, variable_of

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
        if name not in ("providers", *TABLES):
            value = getattr(loaded.settings, name)
            yield variable_of((name,)), _shown(value), loaded.origins.get((name,), "default")
    for table in TABLES:
        yield from _rows_of_table(loaded, table)
    for provider in loaded.settings.providers.values():
        for name in ProviderSettings.model_fields:
            if name != "name":
                path = ("providers", provider.name, name)
                yield variable_of(path), _shown(getattr(provider, name)), loaded.origins.get(path, "default")


def _rows_of_table(loaded: Loaded, table: str) -> Iterator[tuple[str, str, str]]:
    for name, value in getattr(loaded.settings, table).items():
        paths = [path for path in loaded.origins if path[:2] == (table, name)]
        origin = loaded.origins[paths[0]] if paths else "default"
        yield f"{variable_of((table,))} {name}", _shown(value), origin


def _shown(value: object) -> str:
    if isinstance(value, ModelPrice):
        return f"{value.input_usd_per_mtok}:{value.output_usd_per_mtok}"
    if isinstance(value, SecretStr):
        return "set"
    if value is None:
        return "not set"
    return shown_url(value) if isinstance(value, str) and "://" in value else str(value)
