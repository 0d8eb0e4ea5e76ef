"""What can be configured, and the one place that reads the environment.

Flags win over environment variables, those over the TOML file, that over the defaults. `Settings` is the frozen
result: making one by hand reads nothing but what is passed in.

Deliberately absent: what the settings mean for the objects they configure (`oncewise.bootstrap`), and a settings
library. The four layers are four flat mappings and their look-up a `ChainMap`, which also knows where each value came
from; pydantic checks the result.
"""

import difflib
import ipaddress
import os
import re
import tomllib
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo, field_validator

from oncewise.providers.catalogue import CATALOGUE, CatalogueEntry
from oncewise.providers.litellm_config import BadModelList, translated

__all__ = [
    "ENVIRONMENT_PREFIX",
    "PROVIDER_NAMES",
    "TABLES",
    "BadSetting",
    "Loaded",
    "ModelPrice",
    "ProviderSettings",
    "Settings",
    "is_loopback",
    "load_settings",
    "shown_url",
    "variable_of",
]

ENVIRONMENT_PREFIX = "ONCEWISE_"
PROVIDER_NAMES = tuple(CATALOGUE)

SettingPath = tuple[str, ...]
"""Where a value stands: `("port",)` or `("providers", "openai", "rps")`."""

ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/@-]{1,128}$")]
QualifiedModel = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}/[A-Za-z0-9_.:/@-]{1,128}$")]
TenantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Coalesce = Literal["always", "safe", "off"]

TABLES = ("aliases", "v1_coalesce_tenants", "v1_coalesce_models", "prices")
"""Settings that are tables in the file and `NAME=VALUE,…` in their one variable: no variable could have such a name."""

_PAIRS = {
    "aliases": "NAME=PROVIDER/MODEL",
    "v1_coalesce_tenants": "TENANT=always, safe or off",
    "v1_coalesce_models": "PROVIDER/MODEL=always, safe or off",
    "prices": "PROVIDER/MODEL=INPUT:OUTPUT",
}
_FLAGS = {"database_url": "--database", "redis_url": "--redis"}


class BadSetting(Exception):
    """A setting that cannot be used; the message names where it was set and never what it was set to."""


class ProviderSettings(BaseModel):
    """One provider that may be called. Limits are per server: all workers together stay below them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$", description="What requests call it.")
    api_key: SecretStr | None = Field(
        default=None,
        min_length=1,
        description="Secret the provider knows this server by; setting it enables the provider.",
    )
    dialect: str = Field(
        default="",
        description="Provider of the table below whose wire and quirks it has. Default: its own, and the plain "
        "OpenAI-compatible one for names that are not in the table.",
    )
    base_url: str = Field(
        description="Where the provider is, with everything before `/chat/completions` (Anthropic: `/messages`, "
        "Gemini: `/models`); plain http only on loopback."
    )
    default_model: ModelName = Field(description="Model of requests that name none, 1 to 128 characters.")
    rps: float = Field(default=1.0, gt=0, le=1_000_000, description="Calls started per second, above 0 to 1,000,000.")
    burst: int = Field(
        default=2,
        ge=1,
        le=1_000_000,
        description="Calls that may start together after a pause, 1 to 1,000,000. Never more than RPS rounded down (at "
        "least 1): a provider of 1 call/s would refuse the second of two at once. No second has more than RPS.",
    )
    concurrency: int = Field(default=3, ge=1, le=1_000_000, description="Calls that may run at a time, 1 to 1,000,000.")

    @property
    def entry(self) -> CatalogueEntry | None:
        """What is known of its dialect; None for the plain OpenAI-compatible one."""
        return CATALOGUE.get(self.dialect or self.name)

    @field_validator("dialect")
    @classmethod
    def _known(cls, value: str) -> str:
        if value and value not in CATALOGUE:
            raise ValueError(f"must be one of {', '.join(CATALOGUE)}")
        return value

    @field_validator("api_key")
    @classmethod
    def _fits_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        # A line end at the end of a copied key is the usual cause; seen here it is one sentence, later a traceback.
        if value is not None and not re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value()):
            raise ValueError("must be visible ASCII characters without spaces or line ends")
        return value

    @field_validator("base_url")
    @classmethod
    def _secure(cls, value: str) -> str:
        url = urlsplit(value)
        if url.scheme not in {"http", "https"} or not url.hostname:
            raise ValueError("must be an http:// or https:// URL")
        if url.username or url.password or url.query or url.fragment:
            raise ValueError("must not contain a user, a password, a query or a fragment")
        if url.scheme == "http" and not is_loopback(url.hostname):
            raise ValueError("must be https: plain http would send the key in the clear; it is for loopback only")
        return value.rstrip("/")


class ModelPrice(BaseModel):
    """What a model costs, in US dollars for a million tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    input_usd_per_mtok: float = Field(ge=0, le=1_000_000)
    output_usd_per_mtok: float = Field(ge=0, le=1_000_000)


class Settings(BaseModel):
    """Everything that can be configured, checked and frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on. Any but a loopback address needs an API key first.",
    )
    port: int = Field(
        default=8000, ge=0, le=65_535, description="TCP port to listen on, 0 to 65,535; 0 takes any free one."
    )
    workers: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Server processes on one port, 1 to 64. More than one needs a Redis or Valkey between them, or the "
        "extra `oncewise[local]`, which brings one.",
    )
    database_url: str = Field(
        default_factory=lambda: f"sqlite:///{platformdirs.user_data_path('oncewise') / 'oncewise.db'}",
        repr=False,
        description="Where threads are stored: `sqlite:///relative/path`, `sqlite:////absolute/path`, or "
        "`postgresql://user:password@host:port/database` (PostgreSQL 15 or newer), which several servers may share.",
    )
    database_connections: int = Field(
        default=5,
        ge=1,
        le=100,
        description="Connections to PostgreSQL that a process opens at most, 1 to 100; one more shows the others that "
        "it is alive. SQLite needs none.",
    )
    database_transaction_pooling: bool = Field(
        default=False,
        description="Whether a pooler stands before PostgreSQL that gives each transaction another session, as "
        "PgBouncer does in transaction mode. Turns of a process that was killed are then taken over when their lease "
        "has lapsed, not at once.",
    )
    redis_url: str | None = Field(
        default=None,
        repr=False,
        pattern=r"^(rediss?|unix)://",
        description="Redis 7.0 or newer, or Valkey, that all workers and servers on one database share (`redis://`, "
        "`rediss://` or `unix://`). One process needs none.",
    )
    replay_window_s: float = Field(
        default=30.0,
        ge=0,
        le=3600,
        description="Seconds after a turn is stored in which the same message is answered from it, 0 to 3,600; 0 = "
        "never. Per thread.",
    )
    v1_coalesce: Coalesce = Field(
        default="safe",
        description="Which identical requests on `/v1` share a running call: `always`; `safe`, those with "
        "`temperature: 0`, a `seed`, the same `Idempotency-Key` or `x-coalesce: on`; `off`.",
    )
    lease_s: float = Field(
        default=10.0,
        ge=1,
        le=300,
        description="Seconds without a sign of life after which another process may take a turn over, 1 to 300. Per "
        "turn, extended every third of it.",
    )
    log_retention_s: float = Field(
        default=60.0,
        ge=0,
        le=3600,
        description="Seconds for which the events of a finished stream stay in memory for viewers that resume, 0 to "
        "3,600. Per turn; afterwards they are answered from the stored turn.",
    )
    max_body_bytes: int = Field(
        default=1_048_576, ge=1024, le=67_108_864, description="Largest request body in bytes, 1 KiB to 64 MiB."
    )
    demo: bool = Field(
        default=False, description="Whether the built-in demo provider answers for every provider name, without keys."
    )
    demo_latency_ms: int = Field(
        default=5000,
        ge=0,
        le=110_000,
        description="Milliseconds the demo provider takes for an answer, 0 to 110,000. Per call.",
    )
    demo_rps: float = Field(
        default=1.0,
        gt=0,
        le=10_000,
        description="Calls per second the demo provider takes, above 0 to 10,000; it refuses any above.",
    )
    drain_s: float = Field(
        default=25.0,
        ge=0,
        le=300,
        description="Seconds for which running turns go on after the server is asked to stop, 0 to 300.",
    )
    providers: dict[str, ProviderSettings] = Field(
        default_factory=dict,
        description="The enabled providers by name; in the TOML file also any other host.",
    )
    aliases: dict[ModelName, QualifiedModel] = Field(
        default={},
        description="Model names of your own: `NAME=PROVIDER/MODEL,…`, in the TOML file a table. Wherever a request "
        "names a model without its provider, NAME stands for that model of that provider.",
    )
    v1_coalesce_tenants: dict[TenantName, Coalesce] = Field(
        default={},
        description="`ONCEWISE_V1_COALESCE` for single tenants: `TENANT=off,…`, in the TOML file a table.",
    )
    v1_coalesce_models: dict[QualifiedModel, Coalesce] = Field(
        default={},
        description="`ONCEWISE_V1_COALESCE` for single models: `PROVIDER/MODEL=always,…`, in the TOML file a table. "
        "Where a tenant and a model have one, the stricter counts: `off`, `safe`, `always`.",
    )
    prices: dict[QualifiedModel, ModelPrice] = Field(
        default={},
        description="Prices of models in US dollars for a million tokens, 0 to 1,000,000: "
        "`PROVIDER/MODEL=INPUT:OUTPUT,…`, in the TOML file a table each. For calls whose cost the provider does not "
        "tell; what is not here is looked up in a built-in table of public prices.",
    )
    default_provider: str = Field(
        default="",
        validate_default=True,
        description="Provider of requests that name none; the first enabled one, or the demo provider if there is "
        "none.",
    )

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, value: str) -> str:
        if value.startswith(("postgresql://", "postgres://", "postgresql+asyncpg://")):
            return value
        if value.startswith("postgres"):
            raise ValueError("must begin with postgresql://, without the name of a driver")
        if not value.startswith("sqlite:///") or value in {"sqlite:///", "sqlite:///:memory:"}:
            raise ValueError(
                "must name a file, as sqlite:///relative/path or sqlite:////absolute/path, or a database, as "
                "postgresql://user:password@host:port/database"
            )
        if "?" in value:
            # It would begin the options of the URL, of which there are none: another file would be opened.
            raise ValueError("must not contain a question mark")
        return value

    @field_validator("providers")
    @classmethod
    def _not_demo(cls, value: dict[str, ProviderSettings]) -> dict[str, ProviderSettings]:
        if "demo" in value:
            raise ValueError("the name demo belongs to the built-in provider")
        return value

    @field_validator("aliases")
    @classmethod
    def _answered(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        enabled = {"demo", *info.data.get("providers", ())}
        for name, target in value.items():
            if target.partition("/")[0] not in enabled and not info.data.get("demo"):
                raise ValueError(f"{name} stands for a model of a provider that is not enabled")
        return value

    @field_validator("v1_coalesce_models", "prices")
    @classmethod
    def _of_enabled(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        # A misspelt provider would be without effect, and nobody would see it.
        enabled = {"demo", *info.data.get("providers", ())}
        for name in value:
            if name.partition("/")[0] not in enabled and not info.data.get("demo"):
                raise ValueError(f"{name} is a model of a provider that is not enabled")
        return value

    @field_validator("default_provider")
    @classmethod
    def _offered(cls, value: str, info: ValidationInfo) -> str:
        enabled = [*info.data.get("providers", ())]
        demo = bool(info.data.get("demo"))
        if value and value not in {"demo", *enabled} and not demo:
            raise ValueError("is not an enabled provider")
        return value or ("demo" if demo or not enabled else enabled[0])


@dataclass(frozen=True)
class Loaded:
    """Settings and where they came from.

    Attributes:
        origins: Where a value was set: `--port`, `ONCEWISE_PORT`, `port in oncewise.toml`. Defaults are not in it.
        warnings: Sentences about variables that look like settings and are none, and about what of a foreign file has
            no meaning here.
    """

    settings: Settings
    origins: Mapping[SettingPath, str]
    warnings: tuple[str, ...]


def load_settings(
    flags: Mapping[str, Any] | None = None,
    *,
    config_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """Read all layers and check the result.

    Args:
        flags: Field name → value from the command line; None stands for a flag that was not given.
        config_file: A TOML file with the fields of `Settings`, providers as `[providers.NAME]`; or, if its name ends in
            `.yaml` or `.yml`, a configuration of LiteLLM's proxy, of which the `model_list` is read.
        environ: Instead of the environment of the process.

    Raises:
        BadSetting: the first value that cannot be used, or a file that cannot be read.
    """
    environ, linked = _without_links(os.environ if environ is None else environ)
    from_flags: dict[SettingPath, Any] = {(name,): value for name, value in (flags or {}).items() if value is not None}
    written, hints = _read_file(config_file, environ) if config_file else ({}, ())
    from_file = dict(_flatten(written))
    custom = {path[1] for path in from_file if path[0] == "providers" and len(path) > 1}
    from_environment = _read_environment(environ, [*PROVIDER_NAMES, *sorted(custom - {*PROVIDER_NAMES})])
    origins = {path: f"{'.'.join(path)} in {config_file}" for path in from_file}
    origins |= {path: variable_of(path) for path in from_environment}
    origins |= {path: _FLAGS.get(path[0], f"--{path[0]}") for path in from_flags}
    try:
        settings = Settings(**_nest(ChainMap(from_flags, dict[SettingPath, Any](from_environment), from_file)))
    except ValidationError as error:
        raise BadSetting(_sentence(error, origins)) from None
    return Loaded(settings, origins, (*hints, *linked, *_strangers(environ)))


def variable_of(path: SettingPath) -> str:
    """The environment variable of a setting."""
    if path[0] == "providers":
        return "_".join(path[1:]).upper().replace("-", "_")
    return ENVIRONMENT_PREFIX + path[0].upper()


def shown_url(url: str) -> str:
    """A database's or Redis's URL without its password."""
    if url.startswith("sqlite:"):
        return url
    place, question, options = url.partition("?")
    scheme, _, rest = place.partition("://")
    # The last @: a password may hold one, unquoted.
    who, at, where = rest.rpartition("@")
    user, colon, _password = who.partition(":")
    hidden = f"{scheme}://{user}{':***' if colon else ''}{at}{where}"
    return hidden + question + re.sub(r"(?i)((?:^|&)[a-z]*password=)[^&]*", r"\1***", options)


def is_loopback(host: str) -> bool:
    """Whether an address or name can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# -- the layers --------------------------------------------------------------------------------------------------


def _read_file(file: Path, environ: Mapping[str, str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The settings of a file, and sentences about what of it has no meaning here."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise BadSetting(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadSetting(f"{file}: is not in UTF-8") from None
    if file.suffix.lower() not in {".yaml", ".yml"}:
        return _read_toml(file, text), ()
    try:
        return translated(text, environ)
    except BadModelList as error:
        raise BadSetting(f"{file}: {error}") from None


def _read_toml(file: Path, text: str) -> dict[str, Any]:
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        # The parser's own message may quote the line, and with it a key.
        raise BadSetting(f"{file}: is not TOML in UTF-8") from None
    providers = values.get("providers", {})
    if not isinstance(providers, dict) or not all(isinstance(table, dict) for table in providers.values()):
        raise BadSetting(f"providers in {file}: must be tables, as [providers.openai]")
    for name in TABLES:
        if not isinstance(values.get(name, {}), dict):
            raise BadSetting(f"{name} in {file}: must be a table")
    if not all(isinstance(price, dict) for price in values.get("prices", {}).values()):
        raise BadSetting(f'prices in {file}: must be tables, as [prices."openai/gpt-4.1"]')
    return values


def _flatten(values: Mapping[str, Any], at: SettingPath = ()) -> Iterator[tuple[SettingPath, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, (*at, name))
        else:
            yield (*at, name), value


_LINK = re.compile(rf"{ENVIRONMENT_PREFIX}(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_\w+)?)")
_LINKED = (
    "a Kubernetes service named oncewise has put variables like ONCEWISE_PORT=tcp://... here; they are ignored, and "
    "enableServiceLinks: false leaves them out of the pod."
)


def _without_links(environ: Mapping[str, str]) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """The environment without what Kubernetes puts into each pod beside a service of our name, and a word about it.

    `ONCEWISE_PORT=tcp://10.0.0.1:80` is the one that collides with a setting; no value of that looks so.
    """
    if not environ.get(f"{ENVIRONMENT_PREFIX}PORT", "").startswith(("tcp://", "udp://", "sctp://")):
        return environ, ()
    return {name: value for name, value in environ.items() if not _LINK.fullmatch(name)}, (_LINKED,)


def _read_environment(environ: Mapping[str, str], providers: list[str]) -> dict[SettingPath, str]:
    """Every setting that has a variable; an empty one counts as not set."""
    paths: list[SettingPath] = [(name,) for name in Settings.model_fields if name not in {"providers", *TABLES}]
    fields = [name for name in ProviderSettings.model_fields if name != "name"]
    paths += [("providers", provider, field) for provider in providers for field in fields]
    found = {path: environ[variable_of(path)] for path in paths if environ.get(variable_of(path))}
    for table in TABLES:
        found |= _read_pairs(table, environ.get(variable_of((table,)), ""))
    return found


def _read_pairs(table: str, text: str) -> Iterator[tuple[SettingPath, str]]:
    variable = variable_of((table,))
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise BadSetting(f"{variable}: must be {_PAIRS[table]}, separated by commas")
        if table != "prices":
            yield (table, name), value
            continue
        price_in, colon, price_out = value.partition(":")
        if not colon:
            raise BadSetting(f"{variable}: must be {_PAIRS[table]}, separated by commas")
        yield (table, name, "input_usd_per_mtok"), price_in
        yield (table, name, "output_usd_per_mtok"), price_out


def _nest(values: Mapping[SettingPath, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in values.items():
        node = nested
        for step in path[:-1]:
            node = node.setdefault(step, {})
        node[path[-1]] = value
    return nested | {"providers": _enabled(nested.get("providers", {}))}


def _enabled(tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The providers that may be called, filled up from the catalogue and in its order.

    Those without the key they need are left out unread: `OPENAI_BASE_URL` alone may be meant for another program.
    """
    enabled = {}
    for name in sorted(tables, key=lambda name: (*PROVIDER_NAMES, name).index(name)):
        table, entry = tables[name], CATALOGUE.get(name)
        if not entry or table.get("api_key") or not entry.needs_key:
            enabled[name] = {"name": name, **_known_of(entry or CATALOGUE.get(str(table.get("dialect")))), **table}
    return enabled


def _known_of(entry: CatalogueEntry | None) -> dict[str, str]:
    return {"base_url": entry.base_url, "default_model": entry.default_model} if entry else {}


# -- what is wrong -----------------------------------------------------------------------------------------------


def _sentence(error: ValidationError, origins: Mapping[SettingPath, str]) -> str:
    """The first problem in one line. Neither input nor context is shown: either may hold a secret."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = tuple(str(step) for step in problem["loc"])
    where = next((origins[path[:size]] for size in range(len(path), 0, -1) if path[:size] in origins), ".".join(path))
    if problem["type"] == "extra_forbidden":
        return f"{where}: is not a setting"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}"


def _strangers(environ: Mapping[str, str]) -> Iterator[str]:
    known = [variable_of((name,)) for name in Settings.model_fields if name != "providers"]
    for name in sorted(environ):
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            yield f"{name} is not a setting" + (f"; did you mean {close[0]}?" if close else ".")
