"""What is released: a wheel, installed where nothing else is."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from oncewise import __version__
from tests.support.commands import ROOT, environment


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", folder, ROOT], timeout=100, check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_has_every_file_of_the_package_and_the_licence(wheel: Path) -> None:
    """Also those that are no modules: migrations, marks of typing, data."""
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src"
    ours = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {name for name in ours if "__pycache__" not in name} - names == set()
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_installed_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    """In a clean environment with locked dependencies and nothing of the test tools, the demo keeps its promises."""
    lock = (ROOT / "requirements.lock").read_text()
    pins = re.findall(r"^[a-z0-9-]+(?:\[[a-z,-]+\])?==[^\\\n]+", lock, re.MULTILINE)
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("\n".join(re.sub(r"\[.*?\]", "", pin) for pin in pins))
    clean = tmp_path / "clean"
    subprocess.run([sys.executable, "-m", "venv", clean], timeout=100, check=True)
    pip = [clean / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-qq", "-c", constraints, wheel], timeout=300, check=True)
    installed = json.loads(subprocess.run([*pip, "list", "--format=json"], capture_output=True, check=True).stdout)
    assert "pytest" not in {entry["name"] for entry in installed}
    env = environment(tmp_path, ONCEWISE_DEMO_LATENCY_MS=300)
    env.pop("PYTHONPATH")
    program = clean / "bin" / "oncewise"
    version = subprocess.run([program, "--version"], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert version.stdout == f"oncewise {__version__}\n"
    command = [program, "demo", "--once", "--port", "0"]
    demo = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert demo.returncode == 0, demo.stdout + demo.stderr
