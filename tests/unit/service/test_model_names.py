"""Which provider and model a request means."""

import pytest

from oncewise.errors import UnknownProvider
from oncewise.service.model_names import ModelNames

NAMES = ModelNames(
    {"openai": "gpt-x", "groq": "llama-x", "demo": "demo-1"},
    default_provider="openai",
    aliases={"fast": "groq/openai/gpt-oss", "openai/old": "openai/new", "lost": "gone/model"},
)
KEYLESS = ModelNames({"demo": "demo-1"}, default_provider="demo")
DEMO = ModelNames({"demo": "demo-1"}, default_provider="demo", any_provider=True)


@pytest.mark.parametrize(
    ("provider", "model", "expected"),
    [
        (None, None, ("openai", "gpt-x")),
        ("groq", None, ("groq", "llama-x")),
        ("groq", "fast", ("groq", "fast")),
        ("groq", "openai/gpt-oss", ("groq", "openai/gpt-oss")),
        (None, "fast", ("groq", "openai/gpt-oss")),
        (None, "openai/old", ("openai", "new")),
        (None, "groq/openai/gpt-oss", ("groq", "openai/gpt-oss")),
        (None, "demo/demo-429", ("demo", "demo-429")),
        (None, "gpt-y", ("openai", "gpt-y")),
    ],
)
def test_the_first_rule_that_fits_decides(provider: str | None, model: str | None, expected: tuple[str, str]) -> None:
    """A given provider is final; an alias comes before a provider's name, and that before the default provider."""
    assert NAMES.resolve(provider, model) == expected


@pytest.mark.parametrize(
    ("names", "provider", "model"),
    [
        (NAMES, "gone", "model"),
        (NAMES, "gone", None),
        (NAMES, None, "gone/model"),
        (NAMES, None, "lost"),
        (NAMES, None, "openai/"),
        (NAMES, None, "/x"),
        (KEYLESS, None, "gpt-y"),
    ],
)
def test_a_name_nobody_answers_to_is_unknown(names: ModelNames, provider: str | None, model: str | None) -> None:
    """A misspelt provider never reaches another one, and no real model's name the demo of a server without keys."""
    with pytest.raises(UnknownProvider):
        names.resolve(provider, model)


def test_a_server_without_keys_answers_to_the_demos_names() -> None:
    """With and without the provider."""
    assert KEYLESS.resolve(None, "demo-fast") == ("demo", "demo-fast")
    assert KEYLESS.resolve(None, "demo/x") == ("demo", "x")
    assert KEYLESS.resolve("demo", "gpt-y") == ("demo", "gpt-y")


def test_the_demo_mode_answers_to_every_name() -> None:
    """That is what it is asked for."""
    assert DEMO.resolve("openai", None) == ("openai", "demo-1")
    assert DEMO.resolve(None, "openai/gpt-y") == ("openai", "gpt-y")
    assert DEMO.resolve(None, "gpt-y") == ("demo", "gpt-y")


def test_what_is_offered_can_be_asked_for() -> None:
    """Aliases first, then the default model of each provider, each name once."""
    assert NAMES.offered() == ("fast", "openai/old", "lost", "openai/gpt-x", "groq/llama-x", "demo/demo-1")
