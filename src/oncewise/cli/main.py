"""The `oncewise` command: names, options and exit codes. What a command does is imported when it runs.

Exit codes: 0 done and as promised; 1 it ran and something was not as promised or failed; 2 wrong use or a setting that
cannot be used; 130 interrupted.

Deliberately absent: the work. Each command is a module of its own beside this one, loaded only when it runs.
"""

import gc
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from oncewise import __version__
from oncewise.cli.failure import CommandFailed
from oncewise.errors import OncewiseError

if TYPE_CHECKING:
    from oncewise.cli.client import Server
    from oncewise.settings import Loaded, Settings

__all__ = ["app", "main"]

_GROUPS = {
    "Run": ("serve", "demo", "doctor", "config", "db", "keys"),
    "Measure a running server": ("burst", "ttft"),
    "Data": ("threads",),
}


_ORG = r"[A-Za-z0-9_.-]{1,64}"
_ORG_FORM = "must be 1 to 64 of A-Z, a-z, 0-9, _, . and -"


class _Grouped(TyperGroup):
    """Lists commands by what they are for."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002  the base class's form
        for heading, names in _GROUPS.items():
            with formatter.section(heading):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(70)) for name in names])


_PLAIN: dict[str, Any] = {"rich_markup_mode": None, "no_args_is_help": True}

app = typer.Typer(
    cls=_Grouped,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    **_PLAIN,
)
config_app = typer.Typer(help="Show the settings.", **_PLAIN)
db_app = typer.Typer(help="Look at the database's schema, or bring it up to date.", **_PLAIN)
keys_app = typer.Typer(help="Make, list and revoke API keys.", **_PLAIN)
threads_app = typer.Typer(help="Export and import conversations.", **_PLAIN)
app.add_typer(config_app, name="config")
app.add_typer(db_app, name="db")
app.add_typer(keys_app, name="keys")
app.add_typer(threads_app, name="threads")

ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML file with settings, or LiteLLM's YAML.")
]
Url = Annotated[str | None, typer.Argument(help="Server, default http://127.0.0.1 with the configured port.")]
UrlOption = Annotated[str | None, typer.Option("--url", help="Server, default http://127.0.0.1:PORT.")]
Org = Annotated[str, typer.Option(help="Tenant the requests speak for.")]
Key = Annotated[str | None, typer.Option(help="API key, for a server that has keys; it decides the tenant.")]
Provider = Annotated[str | None, typer.Option(help="Provider to ask; default: the server's.")]
Model = Annotated[str | None, typer.Option(help="Model to ask; default: the provider's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print figures as JSON, times in seconds.")]


def main() -> None:
    """Run the command line and exit; deliberate errors are one line each, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character must not end the program.
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except (CommandFailed, OncewiseError, OSError) as error:
        typer.echo(f"oncewise: {str(error) or type(error).__name__}", err=True)
        sys.exit(getattr(error, "exit_code", 1))


def _load_settings(flags: dict[str, Any] | None = None, config_file: Path | None = None) -> "Loaded":
    """Load the settings; a bad one ends the program."""
    from oncewise.settings import BadSetting, load_settings

    try:
        return load_settings(flags, config_file=config_file)
    except BadSetting as error:
        typer.echo(f"oncewise: {error}", err=True)
        raise typer.Exit(2) from None


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Many identical LLM requests, one provider call, one stored turn."""
    if version:
        typer.echo(f"oncewise {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


# -- run -----------------------------------------------------------------------------------------------------------


@app.command()
def serve(
    *,
    host: Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes any free one [8000].")] = None,
    workers: Annotated[int | None, typer.Option(help="Server processes [1].")] = None,
    database: Annotated[str | None, typer.Option(metavar="URL", help="Where threads are stored.")] = None,
    redis: Annotated[str | None, typer.Option(metavar="URL", help="Redis or Valkey shared by workers.")] = None,
    demo: Annotated[bool | None, typer.Option("--demo", help="Answer for every provider, without keys.")] = None,
    config: ConfigFile = None,
) -> None:
    """Serve until Ctrl-C."""
    flags = {
        "host": host,
        "port": port,
        "workers": workers,
        "database_url": database,
        "redis_url": redis,
        "demo": demo,
    }
    loaded = _load_settings(flags, config)
    if loaded.settings.workers > 1:
        from oncewise.cli.workers import run
    else:
        # Nothing of what is loaded now is garbage; the server turns the collector on again when it is ready.
        gc.disable()
        from oncewise.cli.serve import run

    run(loaded, typer.echo, lambda text: typer.echo(f"warning: {text}", err=True))


@app.command()
def demo(
    *,
    port: Annotated[int | None, typer.Option(help="Port to listen on [8000, or a free one].")] = None,
    once: Annotated[bool, typer.Option("--once", help="End after the verdict.")] = False,
) -> None:
    """Show the promise kept: server, slow provider, bursts, verdict."""
    from oncewise.cli.demo import FLAGS, run

    _end(kept=run(_load_settings({"port": port, **FLAGS}), once=once))


@app.command()
def doctor(
    *,
    host: Annotated[str | None, typer.Option(help="Address the server would listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port it would listen on.")] = None,
    workers: Annotated[int | None, typer.Option(help="Server processes it would have.")] = None,
    database: Annotated[str | None, typer.Option(metavar="URL", help="Database to look at.")] = None,
    redis: Annotated[str | None, typer.Option(metavar="URL", help="Redis or Valkey to look at.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    config: ConfigFile = None,
) -> None:
    """Would a server with these settings work here? Changes and costs nothing."""
    from oncewise.cli.doctor import run

    flags = {"host": host, "port": port, "workers": workers, "database_url": database, "redis_url": redis}
    _end(kept=run(_load_settings(flags, config), as_json_text=as_json))


@config_app.command("show")
def config_show(
    *,
    origin: Annotated[bool, typer.Option("--origin", help="Say where each value comes from.")] = False,
    config: ConfigFile = None,
) -> None:
    """Print every setting as the server would use it."""
    from oncewise.cli.config import show

    show(_load_settings(config_file=config), origin=origin)


@db_app.command("current")
def db_current(
    *,
    check: Annotated[bool, typer.Option("--check", help="End with exit code 1 unless they are the same.")] = False,
    database: Annotated[str | None, typer.Option(metavar="URL", help="Database to look at.")] = None,
    config: ConfigFile = None,
) -> None:
    """Print the revision of the database's schema, and that of this version."""
    from oncewise.cli.db import current, is_current

    settings = _settings(database, config)
    typer.echo(current(settings))
    if check and not is_current(settings):
        raise typer.Exit(1)


@db_app.command("upgrade")
def db_upgrade(
    *,
    database: Annotated[str | None, typer.Option(metavar="URL", help="Database to upgrade.")] = None,
    config: ConfigFile = None,
) -> None:
    """Bring the database to this version's schema. An SQLite file serve upgrades itself, PostgreSQL it does not."""
    from oncewise.cli.db import upgrade

    typer.echo(upgrade(_settings(database, config)))


_Database = Annotated[str | None, typer.Option("--database", metavar="URL", help="Database the keys are in.")]


@keys_app.command("create")
def keys_create(
    *,
    org: Annotated[str | None, typer.Option(help="A key that speaks for this tenant.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="A key for everything, other keys included.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="A key that reads figures of all tenants.")] = False,
    database: _Database = None,
    config: ConfigFile = None,
) -> None:
    """Make an API key; the last line is its secret. From the first one on, every request needs a key."""
    if (org is not None) + admin + metrics != 1:
        raise typer.BadParameter("choose one of --org ORG, --admin and --metrics")
    if org is not None and re.fullmatch(_ORG, org) is None:
        raise typer.BadParameter(_ORG_FORM, param_hint="--org")
    from oncewise.cli.keys import create
    from oncewise.model import KeyRole

    role = KeyRole.ADMIN if admin else KeyRole.METRICS if metrics else KeyRole.TENANT
    for line in create(_settings(database, config), role, org):
        typer.echo(line)


@keys_app.command("list")
def keys_list(*, database: _Database = None, config: ConfigFile = None) -> None:
    """Print all API keys, the revoked ones too: id, first characters, for whom, times."""
    from oncewise.cli.keys import listed

    for line in listed(_settings(database, config)):
        typer.echo(line)


@keys_app.command("revoke")
def keys_revoke(
    key: Annotated[str, typer.Argument(help="Id of the key, as `list` shows it.")],
    *,
    database: _Database = None,
    config: ConfigFile = None,
) -> None:
    """End an API key for ever; a running server refuses it within a second."""
    from oncewise.cli.keys import revoke

    revoke(_settings(database, config), key)


# -- measure -------------------------------------------------------------------------------------------------------


@app.command()
def burst(
    url: Url = None,
    *,
    requests: Annotated[int, typer.Option(min=1, max=100_000, help="Identical requests to send.")] = 50,
    connections: Annotated[int, typer.Option(min=1, max=10_000, help="Connections to send them over.")] = 10,
    stream: Annotated[bool, typer.Option("--stream", help="Ask for event streams.")] = False,
    provider: Provider = None,
    model: Model = None,
    org: Org = "org_demo",
    key: Key = None,
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a report as a web page.")] = None,
) -> None:
    """Send identical requests; were all answered from one provider call?"""
    from oncewise.cli.burst import PROMPT, message, run

    kept = run(
        _server(url, org, key),
        message(PROMPT, provider, model),
        requests=requests,
        connections=connections,
        stream=stream,
        as_json_text=as_json,
        html=html,
    )
    _end(kept=kept)


@app.command()
def ttft(
    url: Url = None,
    *,
    requests: Annotated[int, typer.Option(min=1, max=10_000, help="Streams, one after the other.")] = 10,
    provider: Provider = None,
    model: Model = None,
    org: Org = "org_demo",
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Measure the time to the first token, and how long a stop takes."""
    from oncewise.cli.burst import PROMPT, message
    from oncewise.cli.ttft import run

    kept = run(_server(url, org, key), message(PROMPT, provider, model), requests=requests, as_json_text=as_json)
    _end(kept=kept)


# -- data ----------------------------------------------------------------------------------------------------------


@threads_app.command("export")
def threads_export(
    thread: Annotated[str, typer.Argument(help="Id of the thread.")],
    *,
    url: UrlOption = None,
    org: Org = "org_demo",
    key: Key = None,
) -> None:
    """Print a thread as JSON, one message a line."""
    from oncewise.cli.threads import export_thread

    typer.echo(export_thread(_server(url, org, key), thread), nl=False)


@threads_app.command("import")
def threads_import(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="An exported thread.")],
    *,
    url: UrlOption = None,
    org: Org = "org_demo",
    key: Key = None,
) -> None:
    """Make a thread of an exported one; print its id."""
    from oncewise.cli.threads import import_thread

    typer.echo(import_thread(_server(url, org, key), file))


def _server(url: str | None, org: str, key: str | None) -> "Server":
    from oncewise.cli.client import Server

    if key and re.fullmatch(r"[\x21-\x7e]+", key) is None:
        raise typer.BadParameter("must be visible ASCII characters without spaces", param_hint="--key")
    if re.fullmatch(_ORG, org) is None:
        raise typer.BadParameter(_ORG_FORM, param_hint="--org")
    headers = {"authorization": f"Bearer {key}"} if key else {"x-org-id": org}
    try:
        return Server.at(url or f"http://127.0.0.1:{_load_settings().settings.port}", headers)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="URL") from None


def _settings(database: str | None, config: Path | None) -> "Settings":
    return _load_settings({"database_url": database}, config).settings


def _end(*, kept: bool) -> None:
    raise typer.Exit(0 if kept else 1)
