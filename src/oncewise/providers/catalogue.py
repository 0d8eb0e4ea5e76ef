"""The providers known by name: where they are, what they answer with by default, and where their wire differs.

Pure data. A base URL includes whatever comes before `/chat/completions` (Anthropic: `/messages`, Gemini: `/models`).
Default models are plain chat models that were offered in November 2026; they are retired within a year or two, so a
deployment is expected to name its own.

Deliberately absent: keys, limits and prices, which belong to an account and not to a provider.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

__all__ = ["CATALOGUE", "CatalogueEntry", "Quirks", "Wire"]


class Wire(StrEnum):
    """Which language a provider speaks."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    GEMINI = "gemini"


@dataclass(frozen=True, slots=True)
class Quirks:
    """Where a provider's dialect of the OpenAI wire differs.

    Attributes:
        usage_option: Whether it takes `stream_options.include_usage`; those that do not send usage unasked.
        done_ends: Whether `[DONE]` completes an answer that had no finish reason.
        alternates: Whether it refuses messages whose roles do not take turns.
        renamed: Our name of a parameter → its name for it.
    """

    usage_option: bool = True
    done_ends: bool = False
    alternates: bool = False
    renamed: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """What is known of a provider before anything is configured.

    Attributes:
        needs_key: Whether it refuses calls without a key.
        quirks: Of the OpenAI wire; without meaning for the others.
    """

    name: str
    base_url: str
    default_model: str
    needs_key: bool = True
    quirks: Quirks = Quirks()
    wire: Wire = Wire.OPENAI


# OpenAI's reasoning models refuse `max_tokens`; its other models take both names.
_OPENAI = Quirks(renamed=MappingProxyType({"max_tokens": "max_completion_tokens"}))
# Mistral answers 422 to fields it does not know (avante-corp/avante.nvim#2347), and sends usage unasked.
_MISTRAL = Quirks(usage_option=False, renamed=MappingProxyType({"seed": "random_seed"}))
# Perplexity wants user and assistant in turn after the system message (perplexityai/api-discussion#265).
_PERPLEXITY = Quirks(alternates=True)
# Ollama sends a null finish reason on complete answers (pydantic/pydantic-ai#6610).
_OLLAMA = Quirks(done_ends=True)

CATALOGUE: Mapping[str, CatalogueEntry] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            # Perplexity is reported to have closed this wire on its own host on 27 September 2026 in favour of OpenAI's
            # Responses (danielmiessler/Fabric PR #2276, @ai-sdk/perplexity 3.1.0), which no adapter here speaks.
            CatalogueEntry("perplexity", "https://api.perplexity.ai", "sonar", quirks=_PERPLEXITY),
            CatalogueEntry("openai", "https://api.openai.com/v1", "gpt-6-luna", quirks=_OPENAI),
            CatalogueEntry("anthropic", "https://api.anthropic.com/v1", "claude-haiku-5-5", wire=Wire.ANTHROPIC),
            CatalogueEntry(
                "gemini", "https://generativelanguage.googleapis.com/v1beta", "gemini-3.5-flash-lite", wire=Wire.GEMINI
            ),
            CatalogueEntry("openrouter", "https://openrouter.ai/api/v1", "openrouter/auto"),
            CatalogueEntry("kimi", "https://api.moonshot.ai/v1", "kimi-k2.6"),
            CatalogueEntry("mistral", "https://api.mistral.ai/v1", "mistral-small-latest", quirks=_MISTRAL),
            CatalogueEntry("groq", "https://api.groq.com/openai/v1", "openai/gpt-oss-120b"),
            CatalogueEntry("deepseek", "https://api.deepseek.com/v1", "deepseek-flash"),
            CatalogueEntry("xai", "https://api.x.ai/v1", "grok-4.3"),
            CatalogueEntry("ollama", "http://127.0.0.1:11434/v1", "llama3.2", needs_key=False, quirks=_OLLAMA),
        )
    }
)
"""Name → entry, in the order in which a server offers them."""
