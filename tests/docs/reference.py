"""The parts of the reference that are made from the code. `make docs` writes them, a test compares them.

A page keeps its prose; what stands between two marks is ours.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from typer.testing import CliRunner

from oncewise.api.app import create_app
from oncewise.api.errors import STATUS
from oncewise.cli.main import app as cli
from oncewise.errors import OncewiseError
from oncewise.providers.catalogue import CATALOGUE
from oncewise.settings import ProviderSettings, Settings, variable_of

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- made from the code by `make docs` -->", "<!-- end -->"
_BLOCK = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)

COMMANDS = (
    [], ["serve"], ["demo"], ["doctor"], ["burst"], ["ttft"], ["config", "show"], ["db", "current"], ["db", "upgrade"],
    ["keys", "create"], ["keys", "list"], ["keys", "revoke"],
    ["threads", "export"], ["threads", "import"],
)  # fmt: skip


def default_of(name: str) -> str:
    """What a setting is when nobody sets it."""
    field = Settings.model_fields[name]
    if field.default_factory is not None:
        return "a file in the user's data directory"
    return shown(field.default)


def shown(value: object) -> str:
    if value in (None, "", {}):
        return "none"
    return f"`{int(value) if isinstance(value, bool) else value}`"


def settings_table() -> Iterator[str]:
    yield "| Variable | Default | Meaning |"
    yield "|---|---|---|"
    for name, field in Settings.model_fields.items():
        if name != "providers":
            yield f"| `{variable_of((name,))}` | {default_of(name)} | {field.description} |"


def providers_table() -> Iterator[str]:
    yield "| Variable | Default | Meaning |"
    yield "|---|---|---|"
    for name, field in ProviderSettings.model_fields.items():
        if name != "name":
            default = "see below" if field.is_required() else shown(field.default)
            yield f"| `{{PROVIDER}}_{name.upper()}` | {default} | {field.description} |"


def catalogue_table() -> Iterator[str]:
    yield "| Provider | Variables | Base URL | Default model | Needs a key |"
    yield "|---|---|---|---|---|"
    for entry in CATALOGUE.values():
        prefix = variable_of(("providers", entry.name, ""))
        needs = "yes" if entry.needs_key else "no"
        yield f"| `{entry.name}` | `{prefix}*` | `{entry.base_url}` | `{entry.default_model}` | {needs} |"


def errors_table() -> Iterator[str]:
    yield "| Code | Status | Retryable | Meaning |"
    yield "|---|---|---|---|"
    for code, status in sorted(STATUS.items(), key=lambda item: (item[1], item[0])):
        kind = OncewiseError.with_code(code)
        meaning = (kind.__doc__ or "").partition("\n")[0]
        yield f"| `{code}` | {status} | {'yes' if kind.retryable else 'no'} | {meaning} |"


def routes_table() -> Iterator[str]:
    yield "| Route | Answer |"
    yield "|---|---|"
    paths = create_app(Settings())._rest.openapi()["paths"]
    for path, methods in sorted(paths.items()):
        for method, operation in methods.items():
            text = operation.get("description") or operation["summary"]
            yield f"| `{method.upper()} {path}` | {text.partition(chr(10) * 2)[0].replace(chr(10), ' ')} |"


def help_pages() -> Iterator[str]:
    for command in COMMANDS:
        result = CliRunner().invoke(cli, [*command, "--help"], prog_name="oncewise", terminal_width=80)
        assert result.exit_code == 0, result.output
        yield f"## {' '.join(['oncewise', *command])}"
        yield ""
        yield "```text"
        yield result.output.rstrip()
        yield "```"
        yield ""


def env_example() -> str:
    lines = [
        "# Every setting with its default. Copy to .env, load it with `set -a; . ./.env`, change what you need.",
        "",
    ]
    for name, field in Settings.model_fields.items():
        if name != "providers":
            value = "" if field.default_factory else shown(field.default).strip("`").replace("none", "")
            lines += [f"# {field.description}", f"# {variable_of((name,))}={value}", ""]
    lines += ["# A provider is enabled by its key; the same for every name in docs/reference/settings.md.", ""]
    for name, field in ProviderSettings.model_fields.items():
        if name != "name":
            value = "" if field.is_required() or field.default is None else field.default
            lines += [f"# {field.description}", f"# {variable_of(('providers', 'perplexity', name))}={value}", ""]
    return "\n".join(lines)


BLOCKS = {
    "docs/reference/settings.md": (settings_table, providers_table, catalogue_table),
    "docs/reference/errors.md": (errors_table,),
    "docs/reference/http.md": (routes_table,),
    "docs/reference/cli.md": (help_pages,),
}


def page(path: str) -> str:
    """A page as it should be: its own prose, and blocks made anew."""
    makers = iter(BLOCKS[path])
    return _BLOCK.sub(lambda _old: "\n".join([BEGIN, *next(makers)(), END]), (ROOT / path).read_text())


def write() -> None:
    for path in BLOCKS:
        (ROOT / path).write_text(page(path))
    (ROOT / ".env.example").write_text(env_example())


if __name__ == "__main__":
    write()
