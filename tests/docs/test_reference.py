"""The reference says what the code does, and nothing else."""

import re

import pytest

from oncewise.api.errors import STATUS
from oncewise.cli.main import app
from oncewise.settings import Settings, load_settings, variable_of
from tests.docs.reference import BLOCKS, COMMANDS, ROOT, env_example, page

FIELDS = [name for name in Settings.model_fields if name != "providers"]


@pytest.mark.parametrize("path", BLOCKS)
def test_a_page_has_what_the_code_says(path: str) -> None:
    """If this fails, run `make docs` and look at the difference."""
    assert (ROOT / path).read_text() == page(path)


@pytest.mark.parametrize("path", BLOCKS)
def test_every_block_of_a_page_is_made(path: str) -> None:
    """A page has as many blocks as there are makers, so none is forgotten."""
    assert (ROOT / path).read_text().count("<!-- made from the code") == len(BLOCKS[path])


def test_every_setting_and_error_code_is_on_its_page() -> None:
    """Checked by name as well, in case that a maker leaves something out."""
    settings_page = (ROOT / "docs/reference/settings.md").read_text()
    errors_page = (ROOT / "docs/reference/errors.md").read_text()
    assert [name for name in FIELDS if f"`{variable_of((name,))}`" not in settings_page] == []
    assert [code for code in STATUS if f"`{code}`" not in errors_page] == []


def test_every_command_is_on_the_page() -> None:
    """Commands and those below them."""
    known = {command.callback.__name__ for command in app.registered_commands if command.callback}
    for group in app.registered_groups:
        commands = group.typer_instance.registered_commands if group.typer_instance else []
        known |= {command.callback.__name__ for command in commands if command.callback}
    assert {"_".join(command) for command in COMMANDS if command} == known


@pytest.mark.parametrize("name", FIELDS)
def test_a_setting_has_a_unit_or_none_and_names_its_bounds(name: str) -> None:
    """What, unit, bound, scope: a number names both bounds, and its unit stands in its name."""
    field = Settings.model_fields[name]
    assert field.description
    assert field.description.endswith(".")
    bounds = [
        bound
        for item in field.metadata
        for kind in ("ge", "gt", "le")
        if (bound := getattr(item, kind, None)) is not None
    ]
    for bound in bounds:
        spelt = {f"{bound:,}", {1024: "1 KiB", 67_108_864: "64 MiB"}.get(bound, "")} - {""}
        assert any(text in field.description for text in spelt), (name, bound)


def test_the_example_of_an_environment_is_what_the_code_says() -> None:
    """If this fails, run `make docs`."""
    assert (ROOT / ".env.example").read_text() == env_example()


def test_the_example_of_an_environment_changes_nothing() -> None:
    """With every line uncommented the server has its defaults."""
    lines = re.findall(r"^# ([A-Z_]+)=(.*)$", env_example(), re.MULTILINE)
    assert len(lines) > len(FIELDS)
    assert load_settings(environ=dict(lines)).settings == load_settings(environ={}).settings
