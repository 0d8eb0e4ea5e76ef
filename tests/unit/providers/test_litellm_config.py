"""A LiteLLM configuration, read as it is."""

from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncewise.providers.litellm_config import BadModelList, translated
from oncewise.settings import BadSetting, Loaded, load_settings

SECRET = "sk-do-not-print-me"
ENVIRON = {"OPENAI_API_KEY": SECRET, "ANTHROPIC_API_KEY": "a-key", "EU_KEY": "eu-key"}


def load(tmp_path: Path, text: str, environ: dict[str, str] | None = None, name: str = "config.yaml") -> Loaded:
    file = tmp_path / name
    file.write_text(dedent(text))
    return load_settings(config_file=file, environ=ENVIRON if environ is None else environ)


def test_a_models_name_becomes_an_alias_and_its_host_a_provider(tmp_path: Path) -> None:
    """With key and limits: rpm is calls a minute, and as many may run at a time."""
    loaded = load(
        tmp_path,
        """
        model_list:
          - model_name: gpt-4o
            litellm_params:
              model: openai/gpt-4o-2024
              api_key: os.environ/OPENAI_API_KEY
              rpm: 90
          - model_name: claude
            litellm_params:
              model: claude-haiku-5-5
              rpm: 600
              max_parallel_requests: 7
        """,
    )
    openai, anthropic = loaded.settings.providers["openai"], loaded.settings.providers["anthropic"]
    assert loaded.settings.aliases == {"gpt-4o": "openai/gpt-4o-2024", "claude": "anthropic/claude-haiku-5-5"}
    assert (openai.rps, openai.concurrency, openai.default_model) == (1.5, 90, "gpt-4o-2024")
    assert (anthropic.rps, anthropic.concurrency) == (10.0, 7)
    assert openai.api_key is not None
    assert openai.api_key.get_secret_value() == SECRET
    assert anthropic.api_key is not None
    assert anthropic.api_key.get_secret_value() == "a-key"
    assert loaded.warnings == ()


def test_an_own_host_never_gets_the_providers_own_name(tmp_path: Path) -> None:
    """Nor its key: that of OpenAI in the environment was not meant for another host."""
    loaded = load(
        tmp_path,
        """
        model_list:
          - model_name: mine
            litellm_params: {model: openai/llama, api_base: "http://127.0.0.1:9100/v1", api_key: own-key, rpm: 60}
          - model_name: vllm
            litellm_params: {model: hosted_vllm/org/llama, api_base: "http://127.0.0.1:9200/v1", rpm: 60}
          - model_name: keyless
            litellm_params: {model: openai/llama, api_base: "http://127.0.0.1:9300/v1", rpm: 60}
          - model_name: local
            litellm_params: {model: ollama_chat/llama3.2, api_base: "http://localhost:11434", rpm: 60}
          - model_name: claude
            litellm_params: {model: anthropic/c, api_base: "https://claude.example/v1/messages", rpm: 60}
        """,
    )
    found = {
        alias: (target, provider.base_url, provider.dialect, provider.api_key and provider.api_key.get_secret_value())
        for alias, target in loaded.settings.aliases.items()
        if (provider := loaded.settings.providers[target.partition("/")[0]])
    }
    assert found == {
        "mine": ("openai-compatible-1/llama", "http://127.0.0.1:9100/v1", "", "own-key"),
        "vllm": ("openai-compatible-2/org/llama", "http://127.0.0.1:9200/v1", "", None),
        "keyless": ("openai-compatible-3/llama", "http://127.0.0.1:9300/v1", "", None),
        "local": ("ollama-1/llama3.2", "http://localhost:11434/v1", "ollama", None),
        "claude": ("anthropic-1/c", "https://claude.example/v1", "anthropic", None),
    }
    assert "openai" not in loaded.settings.aliases.values()


def test_another_key_or_limit_is_another_provider(tmp_path: Path) -> None:
    """Limits belong to providers here; equal deployments share theirs, so that neither exceeds its own."""
    loaded = load(
        tmp_path,
        """
        model_list:
          - model_name: a
            litellm_params: {model: openai/a, rpm: 60}
          - model_name: b
            litellm_params: {model: openai/b, rpm: 60}
          - model_name: c
            litellm_params: {model: openai/c, rpm: 120}
          - model_name: eu
            litellm_params: {model: openai/d, api_key: os.environ/EU_KEY, rpm: 60}
        """,
    )
    assert loaded.settings.aliases == {"a": "openai/a", "b": "openai/b", "c": "openai-2/c", "eu": "openai-1/d"}
    keys = {name: provider.api_key for name, provider in loaded.settings.providers.items()}
    assert {name: key.get_secret_value() for name, key in keys.items() if key and "openai" in name} == {
        "openai": SECRET,
        "openai-2": SECRET,
        "openai-1": "eu-key",
    }
    assert loaded.settings.providers["openai-1"].base_url == "https://api.openai.com/v1"


def test_what_has_no_meaning_is_named_and_its_value_is_not(tmp_path: Path) -> None:
    """Fields, sections and deployments that are left out, and a limit that a user of LiteLLM would not expect."""
    loaded = load(
        tmp_path,
        f"""
        model_list:
          - model_name: gpt
            model_info: {{mode: chat}}
            litellm_params: {{model: openai/gpt, organization: {SECRET}, tpm: 5, timeout: 3}}
          - model_name: gpt
            litellm_params: {{model: openai/gpt, api_key: {SECRET}, api_base: "https://eu.example/v1"}}
          - model_name: azure
            litellm_params: {{model: azure/gpt, api_key: {SECRET}}}
          - model_name: keyless
            litellm_params: {{model: groq/llama}}
          - model_name: unset
            litellm_params: {{model: openai/x, api_key: os.environ/NO_SUCH_KEY}}
          - model_name: nobody
            litellm_params: {{model: some-model}}
        general_settings: {{master_key: {SECRET}}}
        litellm_settings: {{drop_params: true}}
        """,
    )
    assert loaded.warnings == (
        "azure is left out: no adapter speaks the wire of its provider.",
        "keyless is left out: GROQ_API_KEY is not set.",
        "unset is left out: NO_SUCH_KEY is not set.",
        "nobody is left out: its model names no provider.",
        "gpt has 2 deployments; the first is used.",
        "No rpm is set for openai: the limit is 1 call/s. Set rpm, or the variable {PROVIDER}_RPS.",
        (
            "Without a meaning here, and ignored: general_settings, litellm_settings, litellm_params.organization, "
            "litellm_params.timeout, litellm_params.tpm, model_info."
        ),
    )
    assert loaded.settings.aliases == {"gpt": "openai/gpt"}
    assert SECRET not in f"{loaded.settings!r} {loaded.warnings}"


def test_variables_of_the_file_and_patterns(tmp_path: Path) -> None:
    """`provider/*` needs no alias: every model is reached by that name anyway."""
    loaded = load(
        tmp_path,
        """
        environment_variables: {MY_KEY: from-the-file}
        model_list:
          - model_name: "groq/*"
            litellm_params: {model: "groq/*", api_key: os.environ/MY_KEY, rpm: 30}
          - model_name: some
            litellm_params: {model: "openai/gpt-*"}
          - model_name: own
            litellm_params: {model: gpt-x, custom_llm_provider: mistral, api_key: k, rpm: 30}
        """,
    )
    groq = loaded.settings.providers["groq"]
    assert groq.api_key is not None
    assert (groq.api_key.get_secret_value(), groq.rps) == ("from-the-file", 0.5)
    assert loaded.settings.aliases == {"own": "mistral/gpt-x"}
    assert loaded.warnings == ("some is left out: its model is a pattern.",)


def test_a_models_price_is_taken_over(tmp_path: Path) -> None:
    """From either place; a token's price becomes that of a million. Half a price is none, and said to be ignored."""
    loaded = load(
        tmp_path,
        """
        model_list:
          - model_name: one
            litellm_params: {model: openai/a, rpm: 60, input_cost_per_token: 0.0000025, output_cost_per_token: 1e-5}
          - model_name: two
            litellm_params: {model: openai/b, rpm: 60, output_cost_per_token: 0}
            model_info: {input_cost_per_token: 1.5e-06, output_cost_per_token: 3}
          - model_name: one
            litellm_params: {model: openai/a, rpm: 60, input_cost_per_token: 1, output_cost_per_token: 1}
          - model_name: half
            litellm_params: {model: openai/c, rpm: 60, input_cost_per_token: 1.0e-06}
        """,
    )
    prices = {name: tuple(price.model_dump().values()) for name, price in loaded.settings.prices.items()}
    assert prices == {"openai/a": (2.5, 10.0), "openai/b": (1.5, 0.0)}
    assert loaded.warnings == (
        "one has 2 deployments; the first is used.",
        "Without a meaning here, and ignored: litellm_params.input_cost_per_token.",
    )


def test_keys_are_found_where_litellm_finds_them(tmp_path: Path) -> None:
    """Two providers have another name there."""
    text = "model_list: [{model_name: kimi, litellm_params: {model: moonshot/kimi-k2.6, rpm: 60}}]"
    loaded = load(tmp_path, text, {"MOONSHOT_API_KEY": "m-key"})
    key = loaded.settings.providers["kimi"].api_key
    assert key is not None
    assert key.get_secret_value() == "m-key"
    assert loaded.settings.aliases == {"kimi": "kimi/kimi-k2.6"}


def test_the_environment_still_wins(tmp_path: Path) -> None:
    """For providers under their own name, as with our own file."""
    text = "model_list: [{model_name: gpt, litellm_params: {model: openai/gpt, rpm: 60}}]"
    loaded = load(tmp_path, text, {**ENVIRON, "OPENAI_RPS": "5"}, name="config.yml")
    assert loaded.settings.providers["openai"].rps == 5.0


ONE = "model_list: [{model_name: a, litellm_params: {model: openai/x}"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (f"key: [{SECRET}", "is not YAML"),
        ("- a", "must be a mapping"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
        ("model: x", "model_list: must be a list"),
        (f"model_list: {SECRET}", "model_list: must be a list"),
        ("model_list: [{}]", "model_list[0].model_name"),
        ("model_list: [{model_name: a}]", "model_list[0].litellm_params"),
        ("model_list: [{model_name: a, litellm_params: {}}]", "model_list[0].litellm_params.model"),
        (
            "model_list: [{model_name: a, litellm_params: {model: openai/x, api_key: 5}}]",
            "model_list[0].litellm_params.api_key",
        ),
        (
            f"model_list: [{{model_name: a, litellm_params: {{model: openai/x, rpm: {SECRET}}}}}]",
            "model_list[0].litellm_params.rpm",
        ),
        (
            f"{ONE}, model_info: {{input_cost_per_token: {SECRET}, output_cost_per_token: 1}}}}]",
            "model_list[0].input_cost_per_token",
        ),
        (
            f"model_list: [{{model_name: a, litellm_params: {{model: openai/x, api_base: 'http://{SECRET}/v1'}}}}]",
            "base_url in",
        ),
        (f"model_list: [{{model_name: '{SECRET} ', litellm_params: {{model: openai/x}}}}]", "aliases"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, text: str, where: str) -> None:
    """The place, and nothing of what stands there but names."""
    with pytest.raises(BadSetting) as caught:
        load(tmp_path, text)
    assert where in str(caught.value)
    if where != "aliases":
        assert SECRET not in str(caught.value)


yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["a", "openai/x", "os.environ/X", "*", "groq/*"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["model_list", "model_name", "litellm_params", "model", "api_key", "api_base", "rpm",
                 "environment_variables", "max_parallel_requests", "custom_llm_provider", "model_info",
                 "input_cost_per_token", "output_cost_per_token"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=14,
)  # fmt: skip


@given(yaml_values)
def test_any_document_is_read_or_refused(value: Any) -> None:
    """Nothing else is raised. JSON is YAML."""
    import json

    try:
        translated(json.dumps(value), {"X": "1"})
    except BadModelList:
        return
