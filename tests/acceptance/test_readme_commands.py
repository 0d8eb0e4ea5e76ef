"""The README's own commands, as they stand there, in a shell."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import ROOT, environment, running, serving

NODE = ROOT / "tests" / "node"
PROVIDER = (sys.executable, "-m", "tests.support.fake_provider", "--port", "0", "--default", "lat1500-rps1")

pytestmark = pytest.mark.skipif(
    not (NODE / "node_modules" / "autocannon").exists() or not shutil.which("jq") or not shutil.which("curl"),
    reason="needs curl, jq and autocannon (npm ci in tests/node)",
)


def readme_commands(url: str) -> list[str]:
    """The block that makes a thread, bursts it, counts its messages and reads the figures; for another port."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "autocannon" in block]
    assert "http://localhost:8000" in block
    block = block.replace("localhost:8000", "localhost:" + url.rpartition(":")[2])
    commands = re.split(r"\n(?=THREAD=|npx|curl)", block.strip())
    assert len(commands) == 4
    return commands


def shell(commands: list[str]) -> list[str]:
    """What each command printed; they share one shell, as on a terminal."""
    script = "\necho ---\n".join(commands)
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=NODE, env=environment(), capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "non 2xx" not in result.stderr
    assert "errors" not in result.stderr
    return [part.strip() for part in result.stdout.split("---\n")]


def check(url: str) -> None:
    """50 of 50, two messages, no errors."""
    _thread, _burst, messages, figures = shell(readme_commands(url))
    assert messages == "2"
    assert json.loads(figures)["error_rate"] == "0%"
    performance = ["curl", "-s", f"{url}/api/metrics/performance?last_n=50"]
    counted = json.loads(subprocess.run(performance, capture_output=True, timeout=20, check=True).stdout)
    assert counted["total_requests"] == 50
    assert counted["upstream"]["calls"] == 1
    assert counted["coalesce"]["leaders"] == 1
    assert counted["coalesce"]["followers"] == 49


def test_the_commands_work_with_the_demo_provider() -> None:
    """On a machine without any key."""
    with serving("--demo", ONCEWISE_DEMO_LATENCY_MS=1500) as url:
        check(url)


def test_the_commands_work_with_a_real_provider_of_one_call_a_second(tmp_path: Path) -> None:
    """Over the wire, with the variables of the README; the provider itself counts one call and no refusal."""
    with running(PROVIDER, environment(tmp_path)) as provider:
        base_url = provider.wait_for(r"on (http://127\.0\.0\.1:\d+\S*)")[1]
        with serving(PERPLEXITY_API_KEY="test-key", PERPLEXITY_BASE_URL=base_url, PERPLEXITY_RPS=1) as url:
            check(url)
        stats = ["curl", "-s", re.sub(r"/v1$", "", base_url) + "/stats"]
        counted = json.loads(subprocess.run(stats, capture_output=True, timeout=20, check=True).stdout)
    assert counted["calls"] == 1, counted
