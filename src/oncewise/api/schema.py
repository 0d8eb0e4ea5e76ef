"""What requests may say: the fields and bounds of the HTTP contract, exactly typed, nothing coerced, nothing extra.

An error names the place and the rule, never the value. Lengths are counted in Unicode code points.

Deliberately absent: JSON syntax (`oncewise.api.json_body`), defaults that a server is configured with, and answers
(`oncewise.api.answers`).
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.functional_validators import AfterValidator, BeforeValidator
from pydantic_core import ErrorDetails, PydanticCustomError

from oncewise.api.json_body import parse_json
from oncewise.errors import InvalidRequest, MalformedJson
from oncewise.model import ChatMessage, OnBusy, OnDisconnect, Params, Scope

__all__ = [
    "ImportedMessage",
    "KeyIn",
    "MessageIn",
    "ParamsIn",
    "ThreadChanges",
    "ThreadIn",
    "WrittenOut",
    "error_places",
    "is_id",
    "read_import",
    "read_message",
    "read_model",
]

MAX_CONTENT = 200_000

_INVISIBLE = frozenset(("Zs", "Zl", "Zp", "Cc", "Cf"))
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_WHOLE = re.compile(r"-?[0-9]{1,20}")
_SHOWABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")

M = TypeVar("M", bound=BaseModel)


def is_id(text: str) -> bool:
    """Whether this could be an id of ours; anything else is answered like an unknown one, without a look-up."""
    return _ID.fullmatch(text) is not None


def _visible(text: str) -> str:
    # Not all of category C: a character this Python's Unicode tables do not know yet may well be an emoji.
    if all(unicodedata.category(char) in _INVISIBLE for char in text):
        raise PydanticCustomError("invisible", "Text needs at least one visible character")
    return text


def _digits_only(value: object) -> object:
    # Pydantic reads "+5", "1.0", " 5" and "1_0" as whole numbers too.
    if isinstance(value, str) and _WHOLE.fullmatch(value) is None:
        raise PydanticCustomError("int_parsing", "Input should be a valid integer")
    return value


WrittenOut = BeforeValidator(_digits_only)
"""For whole numbers of a query, which come as text: digits, and nothing else that could be read as a number."""

Content = Annotated[str, StringConstraints(min_length=1, max_length=MAX_CONTENT), AfterValidator(_visible)]
Provider = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Model = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:/@-]{1,128}$")]
Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
OrgId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)


class ParamsIn(_Strict):
    """Sampling parameters; what is absent or null is left to the provider."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(min_length=1, max_length=16)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None

    def params(self) -> Params:
        """The same as a value of the model."""
        values = self.model_dump()
        stop = values.pop("stop")
        stops = (stop,) if isinstance(stop, str) else stop and tuple(stop)
        return Params(**values, stop=stops)


class MessageIn(_Strict):
    """A user message for a thread."""

    role: Literal["user"] = "user"
    content: Content
    provider: Provider | None = None
    model: Model | None = None
    reason: Annotated[str, StringConstraints(max_length=500)] | None = None
    user_id: Annotated[str, StringConstraints(max_length=128)] | None = None
    scope: Literal["private", "shared"] = "private"
    params: ParamsIn | None = None
    parent_message_id: Id | None = None
    on_busy: Literal["enqueue", "reject", "interrupt", "rollback"] = "enqueue"
    on_disconnect: Literal["continue", "cancel"] = "continue"


class ThreadIn(_Strict):
    """A new thread."""

    title: Annotated[str, StringConstraints(max_length=500)] | None = None
    description: Annotated[str, StringConstraints(max_length=5000)] | None = None
    user_id: Annotated[str, StringConstraints(max_length=128)] | None = None


class ThreadChanges(_Strict):
    """Changes to a thread; what is absent stays as it is."""

    title: Annotated[str, StringConstraints(max_length=500)] | None = None
    description: Annotated[str, StringConstraints(max_length=5000)] | None = None
    pinned: bool = False

    def given(self) -> dict[str, str | bool | None]:
        """The changes that were asked for."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class KeyIn(_Strict):
    """A new API key. A tenant key has a tenant, and no other key has one."""

    role: Literal["tenant", "admin", "metrics"]
    org_id: Annotated[OrgId | None, Field(validate_default=True)] = None

    @field_validator("org_id")
    @classmethod
    def _fits_role(cls, org_id: str | None, info: ValidationInfo) -> str | None:
        # A role that is wrong itself is not in the data, and has an error of its own.
        role = info.data.get("role")
        if role is not None and (role == "tenant") != (org_id is not None):
            raise PydanticCustomError("org_of_role", "A tenant key needs a tenant, and no other key has one")
        return org_id


class ImportedMessage(_Strict):
    """One line of an export. Ids, times and figures are taken in and not kept: the new thread gets its own."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, hide_input_in_errors=True)

    role: Literal["user", "assistant", "system"]
    content: Annotated[str, StringConstraints(max_length=MAX_CONTENT)]


def read_model(model: type[M], body: bytes) -> M:
    """The validated value of a JSON body.

    Raises:
        MalformedJson: not one strict JSON document.
        InvalidRequest: not a valid value; `errors` says where and why.
    """
    return _validated(model, parse_json(body))


def _validated(model: type[M], value: Any, place: tuple[str | int, ...] = ("body",)) -> M:
    if not isinstance(value, dict):
        raise InvalidRequest(errors=((place, "Input should be a JSON object"),))
    try:
        return model.model_validate(value)
    except ValidationError as error:
        # `from None`: the exception keeps the values.
        raise InvalidRequest(errors=error_places(error.errors(include_url=False), place)) from None


def error_places(
    errors: Iterable[ErrorDetails], place: tuple[str | int, ...] = ()
) -> tuple[tuple[tuple[str | int, ...], str], ...]:
    """Where and why, of at most 20 errors. A name that could be anything but a field's is not repeated."""
    first = islice(errors, 20)
    return tuple(((*place, *(_shown(part) for part in error["loc"])), error["msg"]) for error in first)


def _shown(part: str | int) -> str | int:
    return part if isinstance(part, int) or _SHOWABLE_NAME.fullmatch(part) else "?"


def read_message(body: bytes) -> Mapping[str, Any]:
    """The arguments that a message's body gives to `Threads.prepare`; nobody may change them.

    Raises:
        MalformedJson, InvalidRequest: as `read_model`.
    """
    message = read_model(MessageIn, body)
    return MappingProxyType(
        {
            "content": message.content,
            "provider": message.provider,
            "model": message.model,
            "params": message.params.params() if message.params else Params(),
            "scope": Scope(message.scope),
            "reason": message.reason,
            "user_id": message.user_id,
            "parent_message_id": message.parent_message_id,
            "on_busy": OnBusy(message.on_busy),
            "on_disconnect": OnDisconnect(message.on_disconnect),
        }
    )


def read_import(body: bytes) -> list[ChatMessage]:
    """The messages of an export, one JSON document a line.

    Raises:
        InvalidRequest: a line is not a message; nothing is said about the lines after it.
    """
    messages = []
    # Bytes are split at LF alone: str.splitlines would cut at U+2028 inside a message.
    for number, line in enumerate(body.split(b"\n")):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except MalformedJson as error:
            raise InvalidRequest(errors=((("body", number), error.detail),)) from None
        imported = _validated(ImportedMessage, value, ("body", number))
        messages.append(ChatMessage(imported.role, imported.content))
    return messages
