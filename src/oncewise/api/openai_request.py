"""What a request on `/v1` asks for: as much of its body as has a meaning here, judged; the rest passes to the provider.

Deliberately absent: which provider and model a name means, and what shares.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oncewise.api.exchange import Exchange
from oncewise.api.json_body import parse_json
from oncewise.errors import InvalidRequest
from oncewise.service.completions import CompletionAsk, Wish

__all__ = ["DEFAULT_ORG", "CompletionBody", "ask_of", "read_completion", "tenant_of"]

DEFAULT_ORG = "default"

_MODEL = re.compile(r"[A-Za-z0-9_.:/@-]{1,160}")
_KEY = re.compile(rb"[\x21-\x7e]{1,255}")
_WISHES = {b"on": Wish.ON, b"off": Wish.OFF}


@dataclass(frozen=True, slots=True)
class CompletionBody:
    """A body that was read.

    Attributes:
        wants_usage: Its stream is to end with a chunk of figures.
    """

    fields: Mapping[str, Any]
    stream: bool
    wants_usage: bool


def read_completion(body: bytes) -> CompletionBody:
    """Read a chat completion request.

    Raises:
        MalformedJson: it is not one strict JSON document.
        InvalidRequest: what has a meaning here is not of its type.
    """
    fields = parse_json(body)
    if not isinstance(fields, dict):
        raise _wrong("body", "Must be an object")
    model, messages = fields.get("model"), fields.get("messages")
    if not isinstance(model, str) or _MODEL.fullmatch(model) is None:
        raise _wrong("model", "Must be the name of a model")
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        raise _wrong("messages", "Must be a list of at least one message")
    stream, options, n = fields.get("stream"), fields.get("stream_options"), fields.get("n")
    if stream is not None and not isinstance(stream, bool):
        raise _wrong("stream", "Must be true or false")
    if options is not None and not isinstance(options, dict):
        raise _wrong("stream_options", "Must be an object")
    if n is not None and (type(n) is not int or not 1 <= n <= 128):  # OpenAI's own bound
        raise _wrong("n", "Must be an integer from 1 to 128")
    return CompletionBody(fields, stream is True, (options or {}).get("include_usage") is True)


def ask_of(exchange: Exchange, body: CompletionBody) -> CompletionAsk:
    """The request that a body and the headers make.

    Raises:
        InvalidRequest: the Idempotency-Key is not of its form.
    """
    headers = exchange.headers
    key = headers.get(b"idempotency-key")
    if key is not None and _KEY.fullmatch(key) is None:
        raise _wrong("idempotency-key", "Must be 1 to 255 visible ASCII characters", "header")
    retries = headers.get(b"x-stainless-retry-count", b"0")
    return CompletionAsk(
        exchange.request_id,
        body.fields,
        stream=body.stream,
        wish=_WISHES.get(headers.get(b"x-coalesce", b"").strip().lower(), Wish.NONE),
        idempotency_key=None if key is None else key.decode("ascii"),
        is_retry=retries.isdigit() and int(retries[:9]) > 0,
        resumable=headers.get(b"x-stream-resume") == b"1",
    )


def tenant_of(exchange: Exchange) -> str:
    """The tenant; OpenAI's clients name none, so that without keys there is one for all who do not.

    Raises:
        OncewiseError: as `Exchange.tenant`.
    """
    if b"x-org-id" not in exchange.headers and not exchange.services.keys.exist:
        return DEFAULT_ORG
    return exchange.tenant()


def _wrong(name: str, problem: str, at: str = "") -> InvalidRequest:
    return InvalidRequest(
        f"{name}: {problem[0].lower()}{problem[1:]}.", errors=(((at, name) if at else (name,), problem),)
    )
