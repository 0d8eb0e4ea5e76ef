"""What no tracked file may contain, and what the repository must have."""

import re
import subprocess
import tomllib
from functools import cache

import pytest

from tests.docs.reference import ROOT

REGISTRIES = ("pypi" + ".org", "python" + "hosted.org", "npm" + "js.org", "npm" + "js.com", "yarn" + "pkg.com")
MACHINE = ("/wo" + "rk/", "/ro" + "ot/", "/opt/py" + "pi", ".py" + "env/")
AUTHORSHIP = (
    "co-authored" + "-by:",
    "generated " + "with [",
    "as an ai " + "language",
    "chat" + "gpt",
    "github " + "copilot",
)


@cache
def tracked() -> dict[str, str]:
    """Text files of the repository, by path; what is about to be committed counts too."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [path for path in listed.stdout.split("\0") if path and (ROOT / path).is_file()]
    contents = {path: (ROOT / path).read_bytes() for path in paths}
    return {path: data.decode() for path, data in contents.items() if b"\0" not in data}


@pytest.mark.parametrize("needles", [REGISTRIES, MACHINE, AUTHORSHIP], ids=["registries", "machine", "authorship"])
def test_no_file_names_a_registry_host_this_machine_or_an_author_tool(needles: tuple[str, ...]) -> None:
    """The lock works with any index; nothing depends on where or how it was written."""
    found = [(path, needle) for path, text in tracked().items() for needle in needles if needle in text.lower()]
    assert found == []


def test_every_decision_that_is_referred_to_is_there() -> None:
    """By its number, wherever it is named, and each number is given once."""
    numbers = [path.name[:4] for path in (ROOT / "docs/decisions").glob("*.md")]
    assert sorted(numbers) == [f"{number:04d}" for number in range(1, len(numbers) + 1)]
    named = {(path, number) for path, text in tracked().items() for number in re.findall(r"decisions/(\d{4})", text)}
    assert [each for each in named if each[1] not in numbers] == []


@pytest.mark.parametrize("path", ["requirements.lock", "tests/langchain/requirements.lock"])
def test_the_lock_has_a_hash_for_every_package_and_no_address(path: str) -> None:
    """Every line is a pinned name, a hash or a comment."""
    lock = (ROOT / path).read_text()
    assert "://" not in lock
    packages = re.split(r"\n(?=[a-z])", lock)
    assert all(re.match(r"[a-z0-9-]+(\[[a-z,-]+\])?==\S+ ", package) for package in packages)
    assert all("--hash=sha256:" in package for package in packages)


def test_the_lock_has_every_dependency_that_is_declared() -> None:
    """A dependency that was added without `make lock` would be missing on a fresh machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = list(project["project"]["dependencies"])
    declared += [entry for group in project["dependency-groups"].values() for entry in group if isinstance(entry, str)]
    locked = set(
        re.findall(r"^([a-z0-9-]+)(?:\[[a-z,-]+\])?==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    )
    names = {re.split(r"[\[<>=~! ]", entry)[0].lower().replace("_", "-") for entry in declared}
    assert names - locked == set()


def test_the_node_lock_has_hashes_and_no_address_of_a_package() -> None:
    """`npm ci` asks whatever registry the machine is configured for."""
    lock = (ROOT / "tests/node/package-lock.json").read_text()
    assert '"resolved"' not in lock
    assert lock.count('"integrity"') == lock.count('"node_modules/')


def test_what_a_newcomer_looks_for_is_there() -> None:
    """Licence, how to contribute, how to report a hole, what changed."""
    for name in ("LICENSE", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "README.md", ".env.example"):
        assert (ROOT / name).stat().st_size > 0, name
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_every_change_fragment_says_its_kind() -> None:
    """`changes/NN.kind.md`, one sentence or more each."""
    for fragment in (ROOT / "changes").glob("*.md"):
        if fragment.name != "README.md":
            assert re.fullmatch(r"[0-9a-z-]+\.(added|changed|fixed|removed|security)\.md", fragment.name)
            assert fragment.read_text().strip().endswith(".")


def test_links_inside_the_documents_lead_somewhere() -> None:
    """Relative links of every Markdown file."""
    links = [
        (path, target)
        for path, text in tracked().items()
        if path.endswith(".md")
        for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", re.sub(r"(?s)```.*?```", "", text))
    ]
    assert [(path, target) for path, target in links if not ((ROOT / path).parent / target).exists()] == []
