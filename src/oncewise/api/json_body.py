"""Strict JSON: what is taken in has one meaning only, whichever parser reads it.

Refused as `malformed_json`: anything but UTF-8, a byte order mark, duplicate members at any depth, NaN, infinities,
integers beyond 64 bits, nesting beyond 64 levels, trailing text. Refused as `invalid_request`: strings that no
database or file may hold (lone surrogates, NUL).

The parser is the standard library's, the only one here that shows duplicate members and the digits of a number; what
is read often goes through `BodyCache`.

Deliberately absent: what a document means; `oncewise.api.schema` says that.
"""

import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar

from oncewise.errors import InvalidRequest, MalformedJson

__all__ = ["BodyCache", "parse_json"]

_MAX_DEPTH = 64
_INT64 = range(-(2**63), 2**63)

T = TypeVar("T")


def parse_json(body: bytes) -> Any:
    """The value of a JSON document.

    Raises:
        MalformedJson: it is not one strict JSON document.
        InvalidRequest: a string in it holds NUL or a lone surrogate.
    """
    try:
        value = _STRICT.decode(body.decode("utf-8"))
    except (ValueError, RecursionError):
        # `from None`: the exception of json quotes the document.
        raise MalformedJson from None
    _check_depth(value, _MAX_DEPTH)
    # Raw control characters and raw surrogates are refused above, so only an escape can bring them in.
    if b"\\u" in body:
        _check_texts(value)
    return value


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError
    return members


def _integer(digits: str) -> int:
    if len(digits) > 20 or int(digits) not in _INT64:
        raise ValueError
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError
    return number


def _refuse(_name: str) -> NoReturn:
    raise ValueError


_STRICT = json.JSONDecoder(object_pairs_hook=_members, parse_int=_integer, parse_float=_finite, parse_constant=_refuse)


def _check_depth(value: Any, levels: int) -> None:
    if isinstance(value, dict | list):
        if levels == 0:
            raise MalformedJson
        for member in value.values() if isinstance(value, dict) else value:
            _check_depth(member, levels - 1)


def _check_texts(value: Any) -> None:
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, dict):
        for name, member in value.items():
            _check_text(name)
            _check_texts(member)
    elif isinstance(value, list):
        for member in value:
            _check_texts(member)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _bad_text() from None
    if "\0" in text:
        raise _bad_text()


def _bad_text() -> InvalidRequest:
    return InvalidRequest(errors=((("body",), "Text may not contain NUL or lone surrogates."),))


class BodyCache(Generic[T]):
    """Remembers what bodies were read as, so that 5,000 equal requests are parsed and validated once.

    Holds values that nobody changes. Bounded by the bytes of the bodies; the least recently used go first.

    Args:
        read: From the bytes of a body to the validated value.
        max_bytes: Bytes of all bodies together; a body above a sixteenth of it is not kept.
    """

    def __init__(self, read: Callable[[bytes], T], *, max_bytes: int = 1 << 20) -> None:
        self._read = read
        self._max_bytes = max_bytes
        self._values: OrderedDict[bytes, T] = OrderedDict()
        self.bytes = 0

    def __call__(self, body: bytes) -> T:
        """The value of a body.

        Raises:
            OncewiseError: as `read`; a refusal is not remembered.
        """
        value = self._values.get(body)
        if value is not None:
            self._values.move_to_end(body)
            return value
        value = self._read(body)
        if len(body) * 16 <= self._max_bytes:
            self._keep(body, value)
        return value

    def _keep(self, body: bytes, value: T) -> None:
        self._values[body] = value
        self.bytes += len(body)
        while self.bytes > self._max_bytes:
            old, _ = self._values.popitem(last=False)
            self.bytes -= len(old)
