"""What a program that embeds Oncewise can rely on."""

import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

import oncewise
from oncewise import Role, Shared
from tests.typing import public_api

ROOT = Path(__file__).parents[2]


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_the_standard_library_only() -> None:
    """An embedder pays for asyncio, not for a web framework."""
    loaded = run_python(
        "import sys; before = set(sys.modules); import oncewise;"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    assert loaded.split() == ["oncewise"]


def test_importing_starts_nothing() -> None:
    """No thread, no event loop, no file: safe before a fork."""
    assert run_python("import threading, oncewise; print(threading.active_count())").split() == ["1"]


def test_the_example_of_the_readme_runs_as_printed() -> None:
    """Copied into a file and run: one leader, 49 followers, the same value for all."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "Coalescer" in block]
    printed = run_python(example).splitlines()
    assert sorted(line.partition(" ")[0] for line in printed) == ["follower"] * 49 + ["leader"]
    assert {line.partition(" ")[2] for line in printed} == {"Why is the sky blue? Because it scatters."}


def test_everything_public_is_listed() -> None:
    """`__all__` is sorted, and names exactly what the module offers."""
    offered = {
        name
        for name, value in vars(oncewise).items()
        if not name.startswith("_") and not inspect.ismodule(value) and getattr(value, "__module__", "") != "builtins"
    }
    assert oncewise.__all__ == sorted(offered)


def mentioned(annotation: Any) -> set[type]:
    """The classes of ours that an annotation speaks of."""
    found = {cls for argument in typing.get_args(annotation) if argument is not ... for cls in mentioned(argument)}
    origin = typing.get_origin(annotation) or annotation
    if inspect.isclass(origin) and origin.__module__.startswith("oncewise."):
        found.add(origin)
    return found


def annotations(value: Any) -> list[Any]:
    members = [value, *vars(value).values()] if inspect.isclass(value) else [value]
    functions = [getattr(member, "fget", member) for member in members]
    hints = [typing.get_type_hints(each) for each in functions if inspect.isfunction(each)]
    return [annotation for hint in hints for annotation in hint.values()]


@pytest.mark.parametrize("name", oncewise.__all__)
def test_what_the_public_speaks_of_is_public(name: str) -> None:
    """Nobody has to import from inside to annotate what a public function gives or takes."""
    value = getattr(oncewise, name)
    assert inspect.getdoc(value)
    spoken_of = {cls.__name__ for annotation in annotations(value) for cls in mentioned(annotation)}
    assert spoken_of <= set(oncewise.__all__)


async def test_the_typed_example_runs() -> None:
    """What mypy checks in tests/typing also does what it says."""
    shared, seven, text, waited_s = await public_api.main()
    assert shared == [Shared("HELLO", Role.LEADER), *[Shared("HELLO", Role.FOLLOWER)] * 2]
    assert (seven, text, waited_s) == (7, b"many readers", pytest.approx(0.0, abs=0.1))


def test_ten_lines_are_enough() -> None:
    """As a newcomer would write it: a hundred identical requests, one call."""
    printed = run_python(
        """
import asyncio
from oncewise import Coalescer, request_key
calls = []
async def ask(prompt):
    calls.append(prompt)
    await asyncio.sleep(0.05)
    return f"an answer to {prompt}"
async def main():
    flights = Coalescer()
    key = request_key("acme", "ask", "hello")
    answers = await asyncio.gather(*(flights.run(key, lambda: ask("hello")) for _ in range(100)))
    print(len(calls), len(answers), {answer.value for answer in answers})
asyncio.run(main())
"""
    )
    assert printed == "1 100 {'an answer to hello'}\n"
