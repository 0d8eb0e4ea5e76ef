"""`oncewise.asgi:app`, for any ASGI server: the settings come from the environment."""

from oncewise.api.app import create_app
from oncewise.api.foreign import SelfDraining
from oncewise.settings import load_settings

__all__ = ["app"]

_settings = load_settings().settings

app = SelfDraining(create_app(_settings), drain_s=_settings.drain_s)
