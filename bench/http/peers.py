"""Other gateways, as released, beside which ours is measured; installed when they are first asked for.

They live in environments of their own in the user's cache directory, outside the repository and its dependencies: what
they need of an index is theirs. One that cannot be installed is left out.

Deliberately absent: tuning. Each is started as its documentation says for one worker, with logging turned down.
"""

import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

from bench.http.servers import SERVER_CORE, Process, Provider
from platformdirs import user_cache_path

__all__ = ["INSTALLERS", "KEY", "litellm", "portkey"]

KEY = "sk-bench-0123456789abcdef0123456789abcdef"
"""What the load sends as its key: one of these servers does not start without."""

HOME = user_cache_path("oncewise-bench")
LITELLM = "1.106.2"
PORTKEY = "1.15.2"

_LITELLM_CONFIG = """\
model_list:
  - model_name: "quick-*"
    litellm_params: {{model: "openai/quick-*", api_base: "{provider}", api_key: "sk-bench"}}
litellm_settings: {{telemetry: false, drop_params: true}}
"""
# With the newest server library in its range this gateway answers 500 to every stream.
_PORTKEY_PACKAGE = """\
{{
  "private": true,
  "dependencies": {{"@portkey-ai/gateway": "{version}"}},
  "overrides": {{"@hono/node-server": "1.13.8"}}
}}
"""
# It has no option for its address: whatever it listens on becomes loopback.
_LOOPBACK = """\
import net from "node:net";
const listen = net.Server.prototype.listen;
net.Server.prototype.listen = function (first, ...rest) {
  const port = typeof first === "object" ? first.port : first;
  return listen.call(this, { port, host: "127.0.0.1" }, rest.find((value) => typeof value === "function"));
};
"""


def install_litellm() -> None:
    """LiteLLM's proxy, in a virtual environment."""
    home = HOME / f"litellm-{LITELLM}"
    if not (home / "bin" / "litellm").exists():
        venv.create(home, with_pip=True, clear=True)
        _run([str(home / "bin" / "pip"), "install", "--quiet", f"litellm[proxy]=={LITELLM}"])


def install_portkey() -> None:
    """Portkey's gateway, in a directory for npm."""
    if shutil.which("npm") is None:
        raise RuntimeError("npm is missing")
    home = HOME / f"portkey-{PORTKEY}"
    home.mkdir(parents=True, exist_ok=True)
    (home / "package.json").write_text(_PORTKEY_PACKAGE.format(version=PORTKEY))
    (home / "loopback.mjs").write_text(_LOOPBACK)
    if not _portkey_main(home).exists():
        _run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(home)])


INSTALLERS: dict[str, Callable[[], None]] = {"litellm": install_litellm, "portkey": install_portkey}


def _run(command: list[str]) -> None:
    print(f"installing: {' '.join(command)}", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-500:]}")


def litellm(provider: Provider) -> Process:
    """LiteLLM's proxy with one worker: no database, one key, one route."""
    home = HOME / f"litellm-{LITELLM}"
    config = home / "config.yaml"
    config.write_text(_LITELLM_CONFIG.format(provider=provider.base_url))
    return Process(
        [str(home / "bin" / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", "{port}"],
        core=SERVER_CORE,
        ready="/health/liveliness",
        environment={
            "LITELLM_MASTER_KEY": KEY,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOG": "ERROR",
            "LITELLM_TELEMETRY": "False",
        },
    )


def portkey(_provider: Provider) -> Process:
    """Portkey's gateway; each request tells it which provider to ask."""
    home = HOME / f"portkey-{PORTKEY}"
    command = ["node", "--import", str(home / "loopback.mjs"), str(_portkey_main(home)), "--headless", "--port={port}"]
    return Process(command, core=SERVER_CORE, ready="/", environment={"NODE_ENV": "production"})


def _portkey_main(home: Path) -> Path:
    return home / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
