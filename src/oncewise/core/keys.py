"""Identity of shared work: tenant first, then kind, then canonical bytes of everything that could change the answer.

Two keys are equal when tenant, kind and bytes are equal; the digest only makes looking up cheap. A collision of digests
therefore costs a separate flight and never gives one request another's answer.

Deliberately absent: which fields belong into a key. Whoever owns a request decides that, by deny-list: a field that
nobody thought of must keep two requests apart.
"""

import json
from collections.abc import Callable
from hashlib import sha256
from typing import Any

from oncewise.errors import InvalidRequest

__all__ = ["RequestKey", "canonical", "request_key"]

Digest = Callable[[bytes], bytes]

_SPELLED = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical(value: Any) -> bytes:
    """The one spelling of a JSON value: members sorted, no space, UTF-8, nothing normalised or coerced.

    `1`, `1.0` and `true` differ, and so do the composed and decomposed forms of a letter. Lists and tuples are the same
    JSON array.

    Raises:
        InvalidRequest: the value is not JSON: NaN, infinity, a lone surrogate, a member name that is no string,
            nesting too deep, or an object of another type.
    """
    try:
        _only_text_names(value)
        return _SPELLED.encode(value).encode()
    except (TypeError, ValueError, RecursionError):
        # `from None`: the exception of json or codecs quotes the value.
        raise InvalidRequest("The request is not a JSON value.") from None


def _only_text_names(value: Any) -> None:
    # The encoder writes {1: ...} and {"1": ...} alike; two requests would share a key.
    if isinstance(value, dict):
        for name, member in value.items():
            if not isinstance(name, str):
                raise TypeError
            _only_text_names(member)
    elif isinstance(value, list | tuple):
        for member in value:
            _only_text_names(member)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("A key is made of text without lone surrogates.") from None


def _sha256(data: bytes) -> bytes:
    return sha256(data).digest()


class RequestKey:
    """Names one piece of work that identical requests share.

    Attributes:
        tenant: Who pays. Never empty; keys of two tenants are never equal.
        kind: What sort of work, e.g. `call`; keeps routes apart that happen to have equal parts.
        canonical: The canonical bytes of the parts.
        digest: Hex digest over tenant, kind and bytes. It does not contain them, but whoever guesses all of them can
            tell that the guess is right.
    """

    __slots__ = ("_hash", "canonical", "digest", "kind", "tenant")

    def __init__(self, tenant: str, kind: str, parts: bytes, digest: Digest = _sha256) -> None:
        if not tenant:
            raise InvalidRequest("A key needs a tenant.")
        head = [_utf8(tenant), _utf8(kind)]
        self.tenant = tenant
        self.kind = kind
        self.canonical = parts
        # Each part behind its own length: ("a", "bc") and ("ab", "c") must not meet.
        self.digest = digest(b"".join(len(text).to_bytes(4, "big") + text for text in head) + parts).hex()
        self._hash = hash(self.digest)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, RequestKey):
            return NotImplemented
        return (self.tenant, self.kind, self.canonical) == (other.tenant, other.kind, other.canonical)

    def __repr__(self) -> str:
        return f"<RequestKey {self.kind} {self.digest[:8]}>"


def request_key(tenant: str, kind: str, *parts: Any) -> RequestKey:
    """The key of a piece of work, from JSON values that together decide its result.

    Raises:
        InvalidRequest: no tenant, or a part that is not JSON.
    """
    return RequestKey(tenant, kind, canonical(parts))
