"""Layers, bounds and messages of the settings."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from oncewise.cli.config import rows
from oncewise.providers.catalogue import CATALOGUE
from oncewise.settings import BadSetting, ProviderSettings, Settings, is_loopback, load_settings, shown_url

SECRET = "pplx-do-not-print-me"


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    """Each value comes from the highest layer that has it, and says from where."""
    file = tmp_path / "oncewise.toml"
    file.write_text('host = "127.0.0.4"\nport = 1001\nlease_s = 4\n')
    loaded = load_settings(
        {"port": 1003, "host": None},
        config_file=file,
        environ={"ONCEWISE_PORT": "1002", "ONCEWISE_LEASE_S": "5"},
    )
    assert (loaded.settings.port, loaded.settings.lease_s, loaded.settings.host) == (1003, 5.0, "127.0.0.4")
    assert loaded.settings.drain_s == 25.0
    assert loaded.origins[("port",)] == "--port"
    assert loaded.origins[("lease_s",)] == "ONCEWISE_LEASE_S"
    assert loaded.origins[("host",)] == f"host in {file}"
    assert ("drain_s",) not in loaded.origins


def test_a_key_enables_a_provider_with_the_documented_limits() -> None:
    """A key alone is enough; the limits are 1 call/s, 2 at once, 3 in parallel."""
    settings = load_settings(environ={"PERPLEXITY_API_KEY": SECRET}).settings
    provider = settings.providers["perplexity"]
    assert provider.api_key is not None
    assert provider.api_key.get_secret_value() == SECRET
    assert (provider.rps, provider.burst, provider.concurrency) == (1.0, 2, 3)
    assert provider.base_url == "https://api.perplexity.ai"
    assert settings.default_provider == "perplexity"


def test_provider_variables_and_tables_are_merged_field_by_field(tmp_path: Path) -> None:
    """The environment may hold the key while the file holds the limits."""
    file = tmp_path / "oncewise.toml"
    file.write_text("[providers.openai]\nrps = 8\nburst = 4\n")
    environ = {"OPENAI_API_KEY": SECRET, "OPENAI_BURST": "6", "OPENAI_DEFAULT_MODEL": "gpt-4.1"}
    provider = load_settings(config_file=file, environ=environ).settings.providers["openai"]
    assert (provider.rps, provider.burst, provider.default_model) == (8.0, 6, "gpt-4.1")


def test_providers_without_their_key_are_left_out() -> None:
    """Variables of a provider that cannot be called do not matter, not even broken ones."""
    settings = load_settings(environ={"OPENAI_BASE_URL": "http://elsewhere.example", "OPENAI_RPS": "many"}).settings
    assert settings.providers == {}
    assert settings.default_provider == "demo"


def test_a_provider_that_needs_no_key_is_enabled_by_its_base_url() -> None:
    """Ollama on this machine has no key."""
    settings = load_settings(environ={"OLLAMA_BASE_URL": "http://127.0.0.1:11434/v1"}).settings
    assert list(settings.providers) == ["ollama"]


def test_the_file_may_name_any_other_host(tmp_path: Path) -> None:
    """A table of its own is a provider, with variables of its own."""
    file = tmp_path / "oncewise.toml"
    file.write_text('[providers.my-vllm]\nbase_url = "http://127.0.0.1:9100/v1/"\ndefault_model = "m"\n')
    provider = load_settings(config_file=file, environ={"MY_VLLM_API_KEY": SECRET}).settings.providers["my-vllm"]
    assert provider.base_url == "http://127.0.0.1:9100/v1"
    assert provider.api_key is not None


def test_the_default_provider_is_the_first_enabled_one_in_the_order_of_the_catalogue() -> None:
    """Neither the order of variables nor of layers decides."""
    environ = {"GROQ_API_KEY": SECRET, "OPENAI_API_KEY": SECRET}
    assert load_settings(environ=environ).settings.default_provider == "openai"
    assert load_settings({"demo": True}, environ=environ).settings.default_provider == "demo"
    environ["ONCEWISE_DEFAULT_PROVIDER"] = "groq"
    assert load_settings(environ=environ).settings.default_provider == "groq"


def test_settings_made_by_hand_read_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is passed in is all there is."""
    monkeypatch.setenv("ONCEWISE_PORT", "1")
    assert Settings().port == 8000
    assert load_settings().settings.port == 1


def test_settings_cannot_be_changed() -> None:
    """They are read once."""
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.port = 1


def test_an_empty_variable_counts_as_not_set() -> None:
    """`ONCEWISE_PORT=` in a file of variables is how people switch a setting off."""
    assert load_settings(environ={"ONCEWISE_PORT": "", "OPENAI_API_KEY": ""}).settings == Settings()


@pytest.mark.parametrize(
    ("environ", "where", "what"),
    [
        ({"ONCEWISE_PORT": SECRET}, "ONCEWISE_PORT", "integer"),
        ({"ONCEWISE_PORT": "70000"}, "ONCEWISE_PORT", "65535"),
        ({"ONCEWISE_LEASE_S": "nan"}, "ONCEWISE_LEASE_S", "finite"),
        ({"ONCEWISE_DEMO_RPS": "0"}, "ONCEWISE_DEMO_RPS", "greater than 0"),
        ({"ONCEWISE_V1_COALESCE": SECRET}, "ONCEWISE_V1_COALESCE", "'always', 'safe' or 'off'"),
        ({"ONCEWISE_WORKERS": "65"}, "ONCEWISE_WORKERS", "less than or equal to 64"),
        ({"ONCEWISE_DEFAULT_PROVIDER": SECRET}, "ONCEWISE_DEFAULT_PROVIDER", "not an enabled provider"),
        ({"ONCEWISE_DATABASE_URL": f"postgresql+psycopg://u:{SECRET}@h/d"}, "ONCEWISE_DATABASE_URL", "driver"),
        ({"ONCEWISE_DATABASE_URL": f"mysql://u:{SECRET}@h/d"}, "ONCEWISE_DATABASE_URL", "postgresql://"),
        ({"ONCEWISE_DATABASE_URL": "sqlite://"}, "ONCEWISE_DATABASE_URL", "must name a file"),
        ({"ONCEWISE_REDIS_URL": f"http://:{SECRET}@h"}, "ONCEWISE_REDIS_URL", "pattern"),
        ({"OPENAI_API_KEY": SECRET, "OPENAI_RPS": "many"}, "OPENAI_RPS", "number"),
        ({"OPENAI_API_KEY": SECRET, "OPENAI_BASE_URL": "http://h.example/v1"}, "OPENAI_BASE_URL", "https"),
        ({"OPENAI_API_KEY": SECRET, "OPENAI_BASE_URL": f"https://u:{SECRET}@h.example"}, "OPENAI_BASE_URL", "password"),
        ({"OPENAI_API_KEY": SECRET, "OPENAI_BASE_URL": SECRET}, "OPENAI_BASE_URL", "http"),
    ],
)
def test_a_bad_setting_is_named_and_its_value_is_not(environ: dict[str, str], where: str, what: str) -> None:
    """One line: which variable, and what is wrong with it."""
    with pytest.raises(BadSetting) as caught:
        load_settings(environ=environ)
    sentence = str(caught.value)
    assert sentence.startswith(f"{where}: ")
    assert what in sentence
    assert SECRET not in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("port = 'x'", "port in "),
        ("prot = 1", "is not a setting"),
        (f"port = {SECRET}", "is not TOML"),
        ("providers = 3", "must be tables"),
        ("[providers]\nopenai = 3", "must be tables"),
        ("[providers.other]\ndefault_model = 'm'", "providers.other.base_url: Field required"),
        ("[providers.demo]\nbase_url = 'http://localhost/v1'\ndefault_model = 'm'", "belongs to the built-in"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, what: str) -> None:
    """The file and the place in it are named, its text is not quoted."""
    file = tmp_path / "oncewise.toml"
    file.write_text(text)
    with pytest.raises(BadSetting) as caught:
        load_settings(config_file=file, environ={})
    assert what in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A file that was asked for must be there."""
    with pytest.raises(BadSetting, match="No such file"):
        load_settings(config_file=tmp_path / "none.toml", environ={})


def test_a_flag_is_named_as_the_user_typed_it() -> None:
    """The flag of a field may be shorter than its name."""
    with pytest.raises(BadSetting, match=r"^--database: must name a file"):
        load_settings({"database_url": "sqlite://"}, environ={})
    with pytest.raises(BadSetting, match=r"^--database: must not contain a question mark"):
        load_settings({"database_url": "sqlite:////data/a?b.db"}, environ={})


def test_secrets_do_not_show_in_any_text_of_the_settings() -> None:
    """Neither `str` nor `repr` nor JSON has them."""
    environ = {
        "OPENAI_API_KEY": SECRET,
        "ONCEWISE_REDIS_URL": f"redis://:{SECRET}@127.0.0.1",
        "ONCEWISE_DATABASE_URL": f"sqlite:////tmp/{SECRET}.db",
    }
    settings = load_settings(environ=environ).settings
    assert SECRET not in f"{settings} {settings!r}"
    assert SECRET not in settings.model_dump_json(include={"providers"})


def test_a_variable_that_is_nearly_a_setting_is_reported() -> None:
    """A misspelt variable would otherwise be silently without effect."""
    (warning,) = load_settings(environ={"ONCEWISE_REPLY_WINDOW_S": "1"}).warnings
    assert "did you mean ONCEWISE_REPLAY_WINDOW_S?" in warning


def test_what_kubernetes_puts_beside_a_service_of_our_name_is_no_setting() -> None:
    """Otherwise every pod of the namespace would end with a port that is no number."""
    links = {
        "ONCEWISE_PORT": "tcp://10.96.3.4:80",
        "ONCEWISE_PORT_80_TCP": "tcp://10.96.3.4:80",
        "ONCEWISE_PORT_80_TCP_ADDR": "10.96.3.4",
        "ONCEWISE_SERVICE_HOST": "10.96.3.4",
        "ONCEWISE_SERVICE_PORT": "80",
        "ONCEWISE_SERVICE_PORT_HTTP": "80",
    }
    loaded = load_settings(environ={**links, "ONCEWISE_WORKERS": "2"})
    assert (loaded.settings.port, loaded.settings.workers) == (8000, 2)
    (warning,) = loaded.warnings
    assert "enableServiceLinks" in warning
    with pytest.raises(BadSetting):
        load_settings(environ={"ONCEWISE_PORT": "10.96.3.4:80"})


@pytest.mark.parametrize("base_url", ["http://localhost:1/v1", "http://127.9.0.1/v1", "http://[::1]:1/v1", "https://h"])
def test_plain_http_is_allowed_to_this_machine_only(base_url: str) -> None:
    """Every spelling of loopback is allowed."""
    assert ProviderSettings(name="p", base_url=base_url, default_model="m").base_url == base_url


def test_names_that_only_look_like_loopback_are_not() -> None:
    """A name is judged as a whole."""
    assert not any(map(is_loopback, ["localhost.example", "127.0.0.1.example", "0.0.0.0", "10.0.0.1", "::", ""]))


# -- wires, dialects, aliases --------------------------------------------------------------------------------------


def test_native_providers_are_enabled_like_the_others() -> None:
    """By their key, with limits of their own and a host of their own."""
    environ = {"ANTHROPIC_API_KEY": SECRET, "GEMINI_API_KEY": SECRET, "GEMINI_RPS": "4", "ANTHROPIC_CONCURRENCY": "9"}
    providers = load_settings(environ=environ).settings.providers
    assert (providers["anthropic"].base_url, providers["anthropic"].concurrency) == ("https://api.anthropic.com/v1", 9)
    assert (providers["gemini"].rps, providers["gemini"].default_model) == (4.0, "gemini-3.5-flash-lite")
    with pytest.raises(BadSetting, match=r"^GEMINI_BASE_URL: must be https"):
        load_settings(environ={"GEMINI_API_KEY": SECRET, "GEMINI_BASE_URL": "http://gemini.example/v1beta"})


def test_a_dialect_tells_how_another_host_is_spoken_to(tmp_path: Path) -> None:
    """It brings the known host and model, for a second account."""
    file = tmp_path / "oncewise.toml"
    file.write_text('[providers.second]\ndialect = "anthropic"\napi_key = "k"\nbase_url = "https://eu.example/v1"\n')
    provider = load_settings(config_file=file, environ={}).settings.providers["second"]
    assert provider.entry is CATALOGUE["anthropic"]
    assert (provider.base_url, provider.default_model) == ("https://eu.example/v1", "claude-haiku-5-5")
    file.write_text('[providers.second]\ndialect = "klingon"\nbase_url = "https://h/v1"\ndefault_model = "m"\n')
    with pytest.raises(BadSetting, match=r"^providers\.second\.dialect in .*: must be one of perplexity, openai"):
        load_settings(config_file=file, environ={})


def test_aliases_come_from_file_and_environment(tmp_path: Path) -> None:
    """Name by name, the environment before the file; names may have dots."""
    file = tmp_path / "oncewise.toml"
    file.write_text('[aliases]\n"gpt-4.1" = "openai/a"\nfast = "openai/b"\n')
    environ = {"OPENAI_API_KEY": SECRET, "ONCEWISE_ALIASES": "fast=openai/c, smart=demo/demo-fast,"}
    loaded = load_settings(config_file=file, environ=environ)
    assert loaded.settings.aliases == {"gpt-4.1": "openai/a", "fast": "openai/c", "smart": "demo/demo-fast"}
    assert loaded.origins[("aliases", "fast")] == "ONCEWISE_ALIASES"
    assert loaded.origins[("aliases", "gpt-4.1")] == f"aliases.gpt-4.1 in {file}"
    assert loaded.warnings == ()


@pytest.mark.parametrize(
    ("aliases", "what"),
    [
        ("fast", "must be NAME=PROVIDER/MODEL"),
        ("fast=gpt", "String should match"),
        ("a b=openai/gpt", "String should match"),
        ("fast=groq/llama", "fast stands for a model of a provider that is not enabled"),
    ],
)
def test_an_alias_that_nobody_answers_is_refused_at_the_start(aliases: str, what: str) -> None:
    """A request would meet it much later."""
    with pytest.raises(BadSetting, match=what):
        load_settings(environ={"OPENAI_API_KEY": SECRET, "ONCEWISE_ALIASES": aliases})
    assert load_settings({"demo": True}, environ={"ONCEWISE_ALIASES": "fast=groq/llama"}).settings.aliases


def test_policies_and_prices_come_from_file_and_environment(tmp_path: Path) -> None:
    """Name by name, and of a price even number by number."""
    file = tmp_path / "oncewise.toml"
    file.write_text(
        '[v1_coalesce_tenants]\nacme = "off"\nbeta = "always"\n'
        '[v1_coalesce_models]\n"openai/gpt-4.1" = "always"\n'
        '[prices."openai/gpt-4.1"]\ninput_usd_per_mtok = 2\noutput_usd_per_mtok = 8\n'
    )
    environ = {
        "OPENAI_API_KEY": SECRET,
        "ONCEWISE_V1_COALESCE_TENANTS": "beta=safe",
        "ONCEWISE_PRICES": "openai/o9=0.5:1.25, demo/demo-1=0:0",
    }
    loaded = load_settings(config_file=file, environ=environ)
    assert loaded.settings.v1_coalesce_tenants == {"acme": "off", "beta": "safe"}
    assert loaded.settings.v1_coalesce_models == {"openai/gpt-4.1": "always"}
    prices = {name: tuple(price.model_dump().values()) for name, price in loaded.settings.prices.items()}
    assert prices == {"openai/gpt-4.1": (2.0, 8.0), "openai/o9": (0.5, 1.25), "demo/demo-1": (0.0, 0.0)}
    assert loaded.origins[("v1_coalesce_tenants", "beta")] == "ONCEWISE_V1_COALESCE_TENANTS"
    assert loaded.origins[("prices", "openai/o9", "input_usd_per_mtok")] == "ONCEWISE_PRICES"
    assert loaded.warnings == ()
    shown = {name: (value, origin) for name, value, origin in rows(loaded)}
    assert shown["ONCEWISE_PRICES openai/o9"] == ("0.5:1.25", "ONCEWISE_PRICES")
    assert shown["ONCEWISE_V1_COALESCE_TENANTS acme"] == ("off", f"v1_coalesce_tenants.acme in {file}")


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("V1_COALESCE_TENANTS", "acme", "must be TENANT=always, safe or off"),
        ("V1_COALESCE_TENANTS", "acme=never", "'always', 'safe' or 'off'"),
        ("V1_COALESCE_TENANTS", "a b=off", "String should match"),
        ("V1_COALESCE_MODELS", "gpt-4.1=off", "String should match"),
        ("V1_COALESCE_MODELS", "opnai/gpt-4.1=off", "of a provider that is not enabled"),
        ("PRICES", "openai/gpt=1", "must be PROVIDER/MODEL=INPUT:OUTPUT"),
        ("PRICES", "openai/gpt=1:x", "valid number"),
        ("PRICES", "openai/gpt=-1:2", "greater than or equal to 0"),
        ("PRICES", "groq/llama=1:2", "of a provider that is not enabled"),
    ],
)
def test_a_policy_or_price_that_would_be_without_effect_is_refused(name: str, value: str, what: str) -> None:
    """With the variable's name."""
    with pytest.raises(BadSetting, match=what) as caught:
        load_settings(environ={"OPENAI_API_KEY": SECRET, f"ONCEWISE_{name}": value})
    # Where names of several origins are judged together, the message has the name instead.
    assert str(caught.value).startswith((f"ONCEWISE_{name}: ", f"{name.lower()}: "))


@pytest.mark.parametrize(
    "text", ["prices = 1", '[prices]\n"openai/gpt" = 1', 'v1_coalesce_models = "off"', "v1_coalesce_tenants = []"]
)
def test_a_table_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    """Whatever the environment adds to it."""
    file = tmp_path / "oncewise.toml"
    file.write_text(text)
    environ = {"OPENAI_API_KEY": SECRET, "ONCEWISE_PRICES": "openai/gpt=1:2"}
    with pytest.raises(BadSetting, match=r" in .*oncewise\.toml: must be "):
        load_settings(config_file=file, environ=environ)


@pytest.mark.parametrize("key", ["sk-canary\n", "sk canary", "sk-canäry", "\x00sk-canary"])
def test_a_key_that_no_header_may_carry_is_named_and_not_shown(key):
    """A line end that came along with a copied key."""
    with pytest.raises(BadSetting) as caught:
        load_settings(environ={"OPENAI_API_KEY": key})
    assert str(caught.value).startswith("OPENAI_API_KEY: ")
    assert "can" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:secret@h:5432/d", "postgresql://u:***@h:5432/d"),
        ("postgres://u:s@e@c:r/et@h/d", "postgres://u:***@h/d"),
        (
            "postgresql://u@h/d?sslmode=require&password=secret&x=1",
            "postgresql://u@h/d?sslmode=require&password=***&x=1",
        ),
        ("postgresql:///d?sslpassword=secret", "postgresql:///d?sslpassword=***"),
        ("postgresql://h1:1,h2:2/d", "postgresql://h1:1,h2:2/d"),
        ("redis://:secret@h/0", "redis://:***@h/0"),
        ("sqlite:////home/a:b@c/x.db", "sqlite:////home/a:b@c/x.db"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    """Wherever it stands in it, and however it was written."""
    assert shown_url(url) == shown


@pytest.mark.parametrize("url", ["postgresql://u:p@h:5432/d", "postgres://h/d", "postgresql+asyncpg:///d?host=/tmp"])
def test_the_urls_of_postgresql_that_are_taken(url: str) -> None:
    """As libpq, hosting services and SQLAlchemy write them."""
    assert load_settings({"database_url": url}, environ={}).settings.database_url == url
