"""Characters that a provider cut in two.

JSON may write a character beyond the first 65,536, such as an emoji, as an escaped pair of halves. A provider that cuts
its text where JavaScript counts, in such halves, sends one at the end of an event and the other at the beginning of the
next. Strict readers refuse both events, and an answer that is paid for would be lost. Here the first half waits for the
second, at the same place of the next events.

A half that never finds its other one is no character: at the end of the text it is left out, as of an answer that was
cut for its length; before other text it is an error, as for every strict reader.

Deliberately absent: what an event means.
"""

import json
import re
from typing import Any, NoReturn

import orjson

__all__ = ["Halves"]

Place = tuple[str | int, ...]

_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class Halves:
    """Reads the events of one answer, in their order."""

    def __init__(self) -> None:
        self._waiting: dict[Place, str] = {}

    def read(self, data: str) -> Any:
        """The JSON value of an event, whole characters only.

        Raises:
            ValueError: it is not JSON, or has a half without the other.
        """
        if not self._waiting:
            try:
                return orjson.loads(data)
            except orjson.JSONDecodeError:
                if _ESCAPED_HALF.search(data) is None:
                    raise
        try:
            # Numbers as the strict reader takes them, who need not fear them when they are written again.
            value = json.loads(data, parse_constant=_refuse, parse_int=orjson.loads, parse_float=orjson.loads)
            return self._mended(value, ())
        except RecursionError:
            raise ValueError("nested too deeply") from None

    def _mended(self, value: Any, place: Place) -> Any:
        if isinstance(value, str):
            return self._joined(value, place)
        if isinstance(value, dict):
            return {_whole(name): self._mended(item, (*place, name)) for name, item in value.items()}
        if isinstance(value, list):
            return [self._mended(item, (*place, index)) for index, item in enumerate(value)]
        return value

    def _joined(self, text: str, place: Place) -> str:
        text = self._waiting.pop(place, "") + text
        if text and "\ud800" <= text[-1] <= "\udbff":
            self._waiting[place] = text[-1]
            text = text[:-1]
        return _whole(text)


def _whole(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)
