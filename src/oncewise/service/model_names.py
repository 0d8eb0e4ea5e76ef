"""Which provider and model a request means: the one place where names are read.

Four rules, the first that fits:

1. Provider and model given: those.
2. Only a provider: its default model. Neither: the default provider's.
3. Only a model: an alias stands for what it was configured for; `provider/model` names both.
4. Any other model goes to the default provider, which judges it. But not `something/model` with an unknown provider,
   which is most likely a misspelt one; and not to the demo provider where it is only the stand-in of a server without
   a key: an answer made up by it to a question meant for a real model would mislead.

Deliberately absent: whether a provider offers a model. Only the provider knows.
"""

from collections.abc import Mapping

from oncewise.errors import UnknownProvider

__all__ = ["DEMO", "ModelNames"]

DEMO = "demo"


class ModelNames:
    """Reads names; made once, from the settings."""

    def __init__(
        self,
        default_models: Mapping[str, str],
        *,
        default_provider: str,
        aliases: Mapping[str, str] | None = None,
        any_provider: bool = False,
    ) -> None:
        """Make one.

        Args:
            default_models: Name of each provider → model of requests that name none.
            default_provider: One of them.
            aliases: Name → `provider/model`.
            any_provider: Every other provider name is answered as well, by the default provider (`--demo`).
        """
        self._default_models = dict(default_models)
        self._default_provider = default_provider
        self._aliases = dict(aliases or {})
        self._any_provider = any_provider

    def resolve(self, provider: str | None, model: str | None) -> tuple[str, str]:
        """Provider and model of a request.

        Raises:
            UnknownProvider: no provider of that name is configured, or none answers to that model name.
        """
        if provider is None and model is not None:
            return self._of_model(model)
        name = provider or self._default_provider
        if name not in self._default_models and not self._any_provider:
            raise UnknownProvider
        return name, model or self._default_models.get(name) or self._default_models[self._default_provider]

    def offered(self) -> tuple[str, ...]:
        """The names for a list of models: the aliases, then each provider's default model as `provider/model`."""
        defaults = (f"{provider}/{model}" for provider, model in self._default_models.items())
        return (*self._aliases, *(name for name in defaults if name not in self._aliases))

    def _of_model(self, name: str) -> tuple[str, str]:
        provider, slash, model = self._aliases.get(name, name).partition("/")
        if slash and model and (provider in self._default_models or self._any_provider):
            return provider, model
        stand_in = self._default_provider == DEMO and not self._any_provider
        if slash or (stand_in and not name.startswith(DEMO)):
            raise UnknownProvider("No configured provider or alias has a model of that name.")
        return self._default_provider, name
