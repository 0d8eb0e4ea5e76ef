"""A configuration of LiteLLM's proxy, read as it is: its `model_list` becomes providers and aliases.

=========================== ======================================================================================
`model_name`                an alias, which clients go on using
`model`                     `provider/model`; `custom_llm_provider` may name the provider instead
`api_base`, `api_key`       of the provider; `os.environ/NAME` is looked up, `environment_variables` included
`rpm`                       calls a minute; also the calls that may run at a time, as with LiteLLM
`max_parallel_requests`     the calls that may run at a time
`input_cost_per_token`,     the model's price, in `litellm_params` or `model_info`, if both are there
`output_cost_per_token`
=========================== ======================================================================================

Deployments that differ in host, key or limit are providers of their own, since here limits belong to providers. Those
with the default host take the name of their provider, so that its environment variables go on meaning it. An own host
never does and gets no key but its `api_key`: one that is in the environment for the provider was not meant for it.

Whatever else stands in the file is named in a warning, values never: any of them may be a key.

Deliberately absent: routing between deployments (the first of a name is used), and providers with a wire that no
adapter speaks (Azure, Bedrock, Vertex).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from oncewise.providers.catalogue import CATALOGUE

__all__ = ["BadModelList", "translated"]

Json = dict[str, Any]

_RENAMED = {"moonshot": "kimi", "ollama_chat": "ollama", "google_ai_studio": "gemini"}
_GENERIC = frozenset({
    "hosted_vllm", "vllm", "openai_like", "custom_openai", "lm_studio", "litellm_proxy", "llamafile", "xinference",
})  # fmt: skip
_INFERRED = {
    "gpt-": "openai",
    "o1": "openai",
    "o3": "openai",
    "o4": "openai",
    "claude-": "anthropic",
}
# Where LiteLLM looks for a key under another name than we do.
_OTHER_KEYS = {"kimi": "MOONSHOT_API_KEY", "perplexity": "PERPLEXITYAI_API_KEY"}
_COSTS = ("input_cost_per_token", "output_cost_per_token")
_READ = frozenset({"model", "custom_llm_provider", "api_base", "base_url", "api_key", "rpm", "max_parallel_requests"})
_MOST = 10_000


class BadModelList(Exception):
    """The file is no configuration of LiteLLM; the message names the place and no value."""


@dataclass(frozen=True)
class _Deployment:
    """One entry of the list, looked up and checked.

    Attributes:
        dialect: Name of the catalogue whose wire it speaks; empty for the plain OpenAI-compatible one.
        base_url: None for the provider's own host.
        rps: Calls per second; None if not limited.
        model: None for `provider/*`.
    """

    name: str
    dialect: str
    model: str | None
    base_url: str | None
    api_key: str | None = field(repr=False)
    rps: float | None
    concurrency: int | None
    price: tuple[float, float] | None = None

    @property
    def lane(self) -> tuple[Any, ...]:
        """What makes it the same provider as another one."""
        return (self.dialect, self.base_url, self.api_key, self.rps, self.concurrency)


def translated(text: str, environ: Mapping[str, str]) -> tuple[Json, tuple[str, ...]]:
    """The same in the words of our own settings file, and sentences about what of it has no meaning here.

    Raises:
        BadModelList: it is not YAML, or not of LiteLLM's form.
    """
    document = _parsed(text)
    variables = document.get("environment_variables")
    own = {str(name): str(value) for name, value in variables.items()} if isinstance(variables, dict) else {}
    reader = _Reader({**environ, **own})
    for index, entry in enumerate(_entries(document)):
        reader.take(entry, f"model_list[{index}]")
    unread = sorted(str(name) for name in document if name not in ("model_list", "environment_variables"))
    return reader.settings(), tuple(reader.warnings(unread))


def _parsed(text: str) -> Json:
    import yaml  # noqa: PLC0415  only those who come from LiteLLM need it

    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        # The parser's own message quotes the line, and with it a key. ValueError: a date that is none.
        raise BadModelList("is not YAML") from None
    if not isinstance(document, dict):
        raise BadModelList("must be a mapping with a model_list")
    return document


def _entries(document: Json) -> list[Json]:
    entries = document.get("model_list")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise BadModelList("model_list: must be a list of mappings")
    return entries


class _Reader:
    """Takes the entries of one list in their order."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._providers: dict[tuple[Any, ...], tuple[str, Json]] = {}
        self._aliases: dict[str, str] = {}
        self._prices: dict[str, Json] = {}
        self._seen: Counter[str] = Counter()
        self._without_meaning: set[str] = set()
        self._skipped: list[str] = []
        self._unlimited: list[str] = []

    def take(self, entry: Json, place: str) -> None:
        """Read one deployment."""
        name, given = entry.get("model_name"), entry.get("litellm_params")
        if not isinstance(name, str) or not name:
            raise BadModelList(f"{place}.model_name: must be a string")
        if not isinstance(given, dict):
            raise BadModelList(f"{place}.litellm_params: must be a mapping")
        info = entry.get("model_info")
        prices = {**(info if isinstance(info, dict) else {}), **given}
        price = _price(prices, place)
        self._note_unread(entry, given, info, () if price is None else _COSTS)
        deployment = self._deployment(name, given, f"{place}.litellm_params")
        if deployment is not None:
            deployment = replace(deployment, price=price)
            self._seen[name] += 1
            if self._seen[name] == 1:
                self._offer(deployment)

    def _note_unread(self, entry: Json, given: Json, info: Any, costs: tuple[str, ...]) -> None:
        known = {"model_name", "litellm_params"}
        if isinstance(info, dict) and info.keys() <= {*costs}:
            known.add("model_info")
        self._without_meaning |= {str(field) for field in entry if field not in known}
        self._without_meaning |= {f"litellm_params.{field}" for field in given if field not in {*_READ, *costs}}

    def settings(self) -> Json:
        """`providers`, `aliases` and `prices` as in our own file."""
        return {"providers": dict(self._providers.values()), "aliases": self._aliases, "prices": self._prices}

    def warnings(self, unread: list[str]) -> Iterator[str]:
        """What a user should know who expects LiteLLM's behaviour."""
        yield from self._skipped
        for name, count in self._seen.items():
            if count > 1:
                yield f"{name} has {count} deployments; the first is used."
        if self._unlimited:
            names = ", ".join(self._unlimited)
            yield f"No rpm is set for {names}: the limit is 1 call/s. Set rpm, or the variable {{PROVIDER}}_RPS."
        without_meaning = [*unread, *sorted(self._without_meaning)]
        if without_meaning:
            yield f"Without a meaning here, and ignored: {', '.join(without_meaning)}."

    def _deployment(self, name: str, given: Json, place: str) -> _Deployment | None:
        asked = given.get("model")
        if not isinstance(asked, str) or not asked:
            raise BadModelList(f"{place}.model: must be a string")
        provider, model = _split(asked, given.get("custom_llm_provider"))
        missing: list[str] = []
        base_url = self._looked_up(given, ("api_base", "base_url"), place, missing)
        api_key = self._looked_up(given, ("api_key",), place, missing)
        base_url = _own_host(provider, base_url)
        if provider in CATALOGUE and not base_url and not missing:
            api_key = api_key or self._key_of(provider, missing)
        why_not = f"{missing[0]} is not set" if missing else _why_not(provider, model, base_url)
        if why_not is not None:
            self._skipped.append(f"{name} is left out: {why_not}.")
            return None
        # An own host of `openai` is LiteLLM's way to say: any host that speaks this wire.
        plain = provider in _GENERIC or (provider == "openai" and base_url is not None)
        rps, concurrency = _limits(given, place)
        return _Deployment(
            name, "" if plain else provider, None if model == "*" else model, base_url, api_key, rps, concurrency
        )

    def _key_of(self, provider: str, missing: list[str]) -> str | None:
        names = (f"{provider.upper()}_API_KEY", _OTHER_KEYS.get(provider, ""))
        key = next((self._environ[name] for name in names if self._environ.get(name)), None)
        if key is None and CATALOGUE[provider].needs_key:
            missing.append(names[0])
        return key

    def _looked_up(self, given: Json, names: tuple[str, ...], place: str, missing: list[str]) -> str | None:
        name = next((name for name in names if given.get(name) is not None), None)
        if name is None:
            return None
        value = given[name]
        if not isinstance(value, str) or not value:
            raise BadModelList(f"{place}.{name}: must be a string")
        if not value.startswith("os.environ/"):
            return value
        variable = value.removeprefix("os.environ/")
        if not self._environ.get(variable):
            missing.append(variable)
        return self._environ.get(variable)

    def _offer(self, deployment: _Deployment) -> None:
        if deployment.lane not in self._providers:
            self._providers[deployment.lane] = self._table(deployment)
            if deployment.rps is None:
                self._unlimited.append(self._providers[deployment.lane][0])
        provider, table = self._providers[deployment.lane]
        if deployment.model is not None:
            self._set_price(f"{provider}/{deployment.model}", deployment.price)
            table.setdefault("default_model", deployment.model)
            if deployment.name != f"{provider}/{deployment.model}":
                self._aliases[deployment.name] = f"{provider}/{deployment.model}"

    def _set_price(self, model: str, price: tuple[float, float] | None) -> None:
        if price is not None:
            named = ("input_usd_per_mtok", "output_usd_per_mtok")
            # Rounded, since 2.5e-06 a million times is not quite 2.5.
            self._prices.setdefault(model, {name: round(usd * 1e6, 9) for name, usd in zip(named, price, strict=True)})

    def _table(self, deployment: _Deployment) -> tuple[str, Json]:
        dialect = deployment.dialect
        taken = {name for name, _ in self._providers.values()}
        in_environment = self._environ.get(f"{dialect.upper()}_API_KEY") if dialect else None
        own_name = dialect and not deployment.base_url and in_environment in (None, "", deployment.api_key)
        stem = dialect or "openai-compatible"
        names = (stem if own_name and not number else f"{stem}-{number + 1}" for number in range(len(taken) + 1))
        name = next(name for name in names if name not in taken)
        table = {
            "dialect": dialect if dialect and name != dialect else None,
            "base_url": deployment.base_url,
            "api_key": deployment.api_key,
            "rps": deployment.rps,
            "concurrency": deployment.concurrency,
        }
        return name, {field: value for field, value in table.items() if value is not None}


def _split(asked: str, named: Any) -> tuple[str, str]:
    """Provider and model; an empty provider if nothing tells it."""
    head, slash, rest = asked.partition("/")
    if isinstance(named, str) and named:
        provider, model = named, rest if slash and head == named else asked
    elif slash:
        provider, model = head, rest
    else:
        provider = next((provider for prefix, provider in _INFERRED.items() if asked.startswith(prefix)), "")
        model = asked
    return _RENAMED.get(provider, provider), model


def _why_not(provider: str, model: str, base_url: str | None) -> str | None:
    """Why a deployment cannot be called from here; None if it can."""
    if not provider:
        return "its model names no provider"
    if provider not in CATALOGUE and provider not in _GENERIC:
        return "no adapter speaks the wire of its provider"
    if provider in _GENERIC and not base_url:
        return "it has no api_base"
    if "*" in model and (model != "*" or provider in _GENERIC):
        return "its model is a pattern"
    return None


def _own_host(provider: str, base_url: str | None) -> str | None:
    """The host where it is not the provider's own, with what our base URLs have and LiteLLM's leave out."""
    if base_url is None:
        return None
    base_url = base_url.rstrip("/").removesuffix("/messages")
    if provider in ("anthropic", "ollama") and not base_url.endswith("/v1"):
        base_url += "/v1"
    entry = CATALOGUE.get(provider)
    return None if entry and base_url == entry.base_url else base_url


def _limits(given: Json, place: str) -> tuple[float | None, int | None]:
    """Calls per second, and how many may run at a time: as LiteLLM has it, as many as may start in a minute."""
    rpm = _number(given.get("rpm"), f"{place}.rpm")
    parallel = _number(given.get("max_parallel_requests"), f"{place}.max_parallel_requests") or rpm
    rps = min(rpm / 60, _MOST) if rpm else None
    return rps, min(max(1, int(parallel)), _MOST) if parallel else None


def _price(given: Json, place: str) -> tuple[float, float] | None:
    """US dollars for a token of the prompt and of the answer; None unless both are there."""
    if any(given.get(name) is None for name in _COSTS):
        return None
    costs = []
    for name in _COSTS:
        value = given[name]
        try:
            # To YAML, 1e-6 is a text.
            cost = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else -1.0
        except (ValueError, OverflowError):
            cost = -1.0
        if not 0 <= cost <= 1:
            raise BadModelList(f"{place}.{name}: must be a number from 0 to 1")
        costs.append(cost)
    return costs[0], costs[1]


def _number(value: Any, place: str) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise BadModelList(f"{place}: must be a number above 0")
    return float(value)
