"""What a provider may be configured with."""

import ssl
import subprocess
import sys

import pytest

from oncewise.providers.catalogue import CATALOGUE, Wire
from oncewise.providers.openai_compatible import OpenAICompatibleProvider
from oncewise.providers.transport import _tls, check_base_url

SECRET = "hunter2"


@pytest.mark.parametrize(
    "url",
    [
        "https://api.example.org/v1",
        "https://api.example.org:8443/v1/",
        "http://127.0.0.1:9100/v1",
        "http://127.8.9.10/v1",
        "http://localhost:11434/v1",
        "http://[::1]:9100/v1",
        *(entry.base_url for entry in CATALOGUE.values()),
    ],
)
def test_https_and_loopback_are_taken(url: str) -> None:
    """And with them everything the catalogue knows."""
    check_base_url(url)


@pytest.mark.parametrize(
    "url",
    [
        f"http://{SECRET}.example.org/v1",
        f"http://127.0.0.1.{SECRET}.org/v1",
        f"http://localhost.{SECRET}.org/v1",
        "http://10.0.0.1/v1",
        "http://0.0.0.0:9100/v1",
        f"https://user:{SECRET}@example.org/v1",
        f"https://example.org/v1?key={SECRET}",
        f"https://example.org/v1#{SECRET}",
        f"ftp://{SECRET}/v1",
        f"{SECRET}",
        "https://",
        f"https://exa mple.org/{SECRET}",
        f"https://example.org/\n{SECRET}",
        f"http://[::1/{SECRET}",
        f"https://example.org:port{SECRET}/",
        f"https://{'a' * 64}.{SECRET}.org/v1",
        f"https://xn--\u2603.{SECRET}/v1",
        f"https://example.org/{SECRET}/{'a' * 70_000}",
        "",
    ],
)
def test_everything_else_is_refused_without_repeating_it(url: str) -> None:
    """A key or a prompt in the clear, a password in a URL, or no URL at all."""
    with pytest.raises(ValueError, match="base URL") as caught:
        OpenAICompatibleProvider.connect("acme", url, None, concurrency=1)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("key", [f"{SECRET}\r\nx-evil: 1", f"{SECRET}é", f"{SECRET} ", f"{SECRET}\0"])
def test_a_key_that_no_header_can_carry_is_refused_without_repeating_it(key: str) -> None:
    """A line break would begin a header of its own; a trailing blank is a copying mistake."""
    with pytest.raises(ValueError, match="authorization") as caught:
        OpenAICompatibleProvider.connect("acme", "https://example.org/v1", key, concurrency=1)
    assert SECRET not in str(caught.value)


def test_certificates_are_verified() -> None:
    """By the pool's own context, whatever the environment says."""
    context = _tls()
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED


def test_importing_the_adapters_does_not_import_the_client() -> None:
    """A server with the demo provider alone starts without it."""
    program = (
        "import sys, oncewise.providers.openai_compatible, oncewise.providers.demo\n"
        "sys.exit(any(name.startswith(('httpx', 'httpcore')) for name in sys.modules) * 3)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_catalogue_names_what_the_contract_promises() -> None:
    """Every provider of API.md §7 that is called over a network, in its order, each with a model and a key rule."""
    expected = [
        "perplexity", "openai", "anthropic", "gemini", "openrouter", "kimi", "mistral", "groq", "deepseek", "xai",
        "ollama",
    ]  # fmt: skip
    assert list(CATALOGUE) == expected
    assert [name for name, entry in CATALOGUE.items() if entry.wire is not Wire.OPENAI] == ["anthropic", "gemini"]
    assert all(name == entry.name and entry.default_model for name, entry in CATALOGUE.items())
    assert [name for name, entry in CATALOGUE.items() if not entry.needs_key] == ["ollama"]
