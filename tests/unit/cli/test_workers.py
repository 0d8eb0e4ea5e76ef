"""What several workers are started with."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from oncewise.cli.failure import WrongUse
from oncewise.cli.workers import private_folder, settings_for_workers, shared_server
from oncewise.settings import Settings, load_settings


def test_workers_have_the_settings_of_their_supervisor_to_the_last_secret(tmp_path: Path) -> None:
    """Whatever changed in files and variables since it was started."""
    file = tmp_path / "o.toml"
    file.write_text('lease_s = 7\n[providers.house]\nbase_url = "http://127.0.0.1:1/v1"\ndefault_model = "m"\n')
    environ = {
        "OPENAI_API_KEY": "sk-secret",
        "OPENAI_RPS": "2.5",
        "ONCEWISE_ALIASES": "fast=openai/small,a=house/b",
        "ONCEWISE_V1_COALESCE_TENANTS": "acme=off",
        "ONCEWISE_PRICES": "openai/small=1:2",
        "ONCEWISE_REDIS_URL": "redis://u:secret@h/0",
        "ONCEWISE_WORKERS": "3",
    }
    settings = load_settings(config_file=file, environ=environ).settings
    again = Settings.model_validate(settings_for_workers(settings))
    assert again == settings
    key = again.providers["openai"].api_key
    assert key is not None
    assert key.get_secret_value() == "sk-secret"


def test_a_server_that_is_named_comes_before_one_of_their_own() -> None:
    """Nobody starts a Valkey that nobody asked for."""
    named = Settings(redis_url="redis://localhost")
    assert shared_server(named, Path("valkey-server")) is None
    assert shared_server(Settings(), Path("valkey-server")) == Path("valkey-server")
    with pytest.raises(WrongUse, match="--redis"):
        shared_server(Settings(), None)


def test_the_folder_of_a_socket_has_a_short_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes little more than 100 bytes, and a directory for temporary files may be anywhere."""
    deep = tmp_path / ("d" * 80)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with private_folder() as folder:
        assert len(f"{folder}/valkey.sock") < 100
        assert Path(folder).stat().st_mode & 0o077 == 0


FORSAKE = """
import os, signal, sys
from pathlib import Path
from oncewise.cli.workers import private_folder
with private_folder(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_server_left_of_which_nothing_is_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """A service that ran out of memory is killed as a whole. Folders in use stay, and those that are not ours."""
    stranger = tmp_path / "oncewise-bench-1"
    stranger.mkdir()
    with private_folder(tmp_path) as used:
        subprocess.run([sys.executable, "-c", FORSAKE, str(tmp_path)], check=False)
        (left,) = set(tmp_path.iterdir()) - {Path(used), stranger}
        with private_folder(tmp_path):
            assert Path(used).exists()
            assert not left.exists()
    assert list(tmp_path.iterdir()) == [stranger]
