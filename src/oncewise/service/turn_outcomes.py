"""What requests are told of a turn: when it is known, when it is done, and when it failed.

Live, resumed and replayed, from memory or from a row, the same turn is told in the same words; that is why the events'
data is made here, from the stored turn.

Deliberately absent: how a turn comes to its end (`oncewise.service.turns`), and the wire.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oncewise.core.stream_hub import StreamLog
from oncewise.errors import Failure, FlightFailed, Overloaded, ResponseTooLarge
from oncewise.model import Role, StoredTurn, TurnState

__all__ = ["RESET", "Admitted", "TurnResult", "done_event", "error_event", "failure_of", "show_stored"]

RESET = "reset"
"""The event that tells viewers to drop what they were shown."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """What is known of a request as soon as its turn is.

    Attributes:
        position: Turns of the thread that come first.
        meta: What the provider's lane says of itself, e.g. that it is the demo.
    """

    turn_id: str
    thread_id: str
    role: Role
    state: TurnState
    epoch: int
    position: int
    provider: str
    model: str
    meta: Mapping[str, Any]


class TurnResult:
    """A completed turn and how it came about; one object for all requests that share it.

    Attributes:
        stored: The turn with both messages, as any later read returns it.
        upstream_calls: Requests made to the provider by this flight; 0 if another flight or an earlier turn paid.
        queue_wait_ms: Milliseconds from the start of the flight to that of its call.
        queued_behind: Turns of the thread, or calls to the provider, that came first when it joined that queue.
        first_delta_s: When the first text was there, by the event loop's clock; None for a replay.
        body: A place for the encoded answer, so that all who share it are sent the same bytes.
    """

    __slots__ = (
        "body",
        "call_id",
        "first_delta_s",
        "queue_wait_ms",
        "queued_behind",
        "stored",
        "upstream_calls",
    )

    def __init__(
        self,
        stored: StoredTurn,
        *,
        upstream_calls: int = 0,
        queue_wait_ms: float = 0.0,
        queued_behind: int = 0,
        first_delta_s: float | None = None,
    ) -> None:
        self.stored = stored
        self.upstream_calls = upstream_calls
        self.queue_wait_ms = queue_wait_ms
        self.queued_behind = queued_behind
        self.first_delta_s = first_delta_s
        self.body: bytes | None = None


def done_event(turn: StoredTurn) -> dict[str, Any]:
    """The data of a turn's `done` event, from its row: the same live, resumed and replayed."""
    cancelled = turn.state is TurnState.CANCELLED
    user, assistant, usage = turn.user_message, turn.assistant_message, turn.usage
    return {
        "state": turn.state.value,
        "reason": "cancelled" if cancelled or turn.finish_reason is None else turn.finish_reason.value,
        "user_message_id": user.id if user else None,
        "assistant_message_id": assistant.id if assistant else None,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
            "estimated": usage.estimated,
        }
        if usage
        else None,
        "chars": len(assistant.content) if assistant else 0,
    }


def error_event(failure: Failure, state: TurnState, partial_chars: int) -> dict[str, Any]:
    """The data of a turn's `error` event."""
    return {
        "state": state.value,
        "code": failure.code,
        "message": failure.detail,
        "retryable": failure.retryable,
        "partial_chars": partial_chars,
    }


def failure_of(turn: StoredTurn) -> Failure:
    """Why a final turn is not completed."""
    return Failure(
        turn.failure_code or FlightFailed.code,
        turn.failure_detail or FlightFailed().detail,
        retryable=turn.failure_retryable,
    )


def show_stored(log: StreamLog, turn: StoredTurn) -> None:
    """End a log as the row of its turn says, with the row's text as far as the log lacks it."""
    if log.closed:
        return
    text = turn.assistant_message.content if turn.assistant_message is not None else ""
    try:
        if turn.epoch > log.epoch:
            log.restart(turn.epoch, RESET, {"epoch": turn.epoch, "reason": "leader_lost"})
        if len(text) > len(log.text):
            log.append_joined(text[len(log.text) :], turn.partial_seq)
    except (ResponseTooLarge, Overloaded):
        # Its viewers may resume, and are then shown the row.
        log.sever()
        return
    if turn.state in (TurnState.COMPLETED, TurnState.CANCELLED):
        log.close("done", done_event(turn))
    else:
        log.close("error", error_event(failure_of(turn), turn.state, len(text)))
