"""Frames, the sending loop, and streams read from rows."""

import asyncio
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncewise.api.auth import OpenGate
from oncewise.api.exchange import Exchange
from oncewise.api.limits import Limits
from oncewise.api.row_viewer import RowViewer
from oncewise.api.sse import EventStream, SseEncoder, Stalled, cancelled_frame
from oncewise.core.stream_hub import Position, StreamHub
from oncewise.errors import NotFound, StorageUnavailable
from oncewise.model import FinishReason, Message, MessageStatus, StoredTurn, TurnAsk, TurnState
from tests.support.http import read_events
from tests.support.virtual_time import virtual_time

ENCODER = SseEncoder()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_one_event_that_gives_it_back(text):
    """One line of data, LF only."""
    frame = ENCODER.delta(Position(2, 7), text)
    (event,) = read_events(frame)

    assert (event.name, event.id, event.data) == ("delta", "2-7", {"delta": text})
    assert frame.count(b"\n") == 4


def test_events_have_an_id_only_where_a_client_may_resume():
    """And there is no block of an id alone."""
    assert ENCODER.event("meta", {"a": 1}, None) == b'event: meta\ndata: {"a":1}\n\n'
    assert ENCODER.event("done", {}, Position(1, 3)) == b"event: done\nid: 1-3\ndata: {}\n\n"
    assert b"\nid:" not in cancelled_frame()


class Wire:
    """What was sent, and a way to stop taking more."""

    def __init__(self, *, blocks=False, takes=False, **limits):
        self.sent = b""
        self.blocks = blocks
        self.takes = takes
        self.aborted = False
        scope = {"type": "http", "method": "GET", "headers": [], "extensions": {"oncewise.connection": self}}
        self.exchange = Exchange(scope, None, self.send, gate=OpenGate(), limits=Limits(**limits), services=None)

    async def send(self, message):
        if self.blocks and message.get("body"):
            await asyncio.Event().wait()
        self.sent += message.get("body", b"")

    def ready(self):
        return False

    def push(self, chunk):
        if self.takes:
            self.sent += chunk
        return self.takes

    def abort(self):
        self.aborted = True


async def test_silence_is_broken_by_pings():
    """Every `ping_s` seconds of it, and only then."""
    wire = Wire(ping_s=0.02)
    log = StreamHub(ENCODER).open("k")
    stream = EventStream(wire.exchange, log.view())
    sending = asyncio.create_task(stream.follow())
    while wire.sent.count(b"event: ping") < 3:
        await asyncio.sleep(0.005)
    log.append("a")
    log.close("done", {})

    rest = read_events(wire.sent + await sending)
    assert [event.name for event in rest if event.name != "ping"] == ["delta", "done"]
    assert all(event.id is None for event in rest if event.name == "ping")


@virtual_time
async def test_by_default_a_ping_comes_after_every_fifteen_seconds_of_silence():
    """Counted from the last event, pushed or sent by the task; the first ping says so."""
    for pushed in (False, True):
        wire = Wire(takes=pushed)
        log = StreamHub(ENCODER).open("k")
        sending = asyncio.create_task(EventStream(wire.exchange, log.view()).follow())
        for silence_s in (10.0, 14.9, 31.0, 14.9):
            await asyncio.sleep(silence_s)
            log.append("a")
        log.close("done", {})
        await sending

        events = [event.name for event in read_events(wire.sent)]
        assert events == ["delta", "delta", "ping", "ping", "delta"] + ["delta"] * pushed


async def test_the_terminal_event_is_left_to_the_caller():
    """Who has accounts to write before it goes out."""
    wire = Wire()
    log = StreamHub(ENCODER).open("k")
    log.append("a")
    log.close("done", {})

    rest = await EventStream(wire.exchange, log.view()).follow()

    assert wire.sent == b""
    assert [event.name for event in read_events(rest)] == ["delta", "done"]


async def test_a_client_that_takes_nothing_is_dropped():
    """After `stall_s` seconds its connection is aborted."""
    wire = Wire(blocks=True, stall_s=0.02)
    log = StreamHub(ENCODER).open("k")
    log.append("a")

    with pytest.raises(Stalled):
        await EventStream(wire.exchange, log.view()).follow()
    assert wire.aborted


async def test_a_stopped_stream_ends_without_a_terminal_event():
    """So that its client resumes."""
    wire = Wire()
    stream = EventStream(wire.exchange, StreamHub(ENCODER).open("k").view())
    sending = asyncio.create_task(stream.follow())
    await asyncio.sleep(0)
    stream.stop()

    assert await sending == b""
    assert wire.sent == b""


async def test_a_withdrawn_stream_ends_as_cancelled():
    """Without an id: the turn may go on."""
    wire = Wire()
    viewer = StreamHub(ENCODER).open("k").view()
    withdrawn = []
    sending = asyncio.create_task(EventStream(wire.exchange, viewer).follow(lambda: bool(withdrawn)))
    await asyncio.sleep(0)
    withdrawn.append(True)
    viewer.close()

    assert await sending == cancelled_frame()


# -- rows ----------------------------------------------------------------------------------------------------------

ASK = TurnAsk("o", "t", "Hi", "demo", "m", "f")
RUNNING = StoredTurn("u", "o", "t", 0, TurnState.STREAMING, 1, 1, "w", "f", ASK, 0, partial="ab", partial_seq=2)
ANSWER = Message("m2", "assistant", "abcd", 1, MessageStatus.COMPLETE, "u", 0)
DONE = replace(
    RUNNING, state=TurnState.COMPLETED, partial_seq=4, assistant_message=ANSWER, finish_reason=FinishReason.STOP
)


def rows(*turns):
    """A way to read a row that gives each of `turns`, then the last for ever."""
    left = list(turns)

    async def read():
        turn = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(turn, Exception):
            raise turn
        return turn

    return read


async def all_events(viewer):
    sent = b""
    while not viewer.ended and await viewer.wait(5):
        sent += viewer.take()
    return [(event.name, event.id, event.data.get("delta")) for event in read_events(sent)]


async def test_a_final_row_is_one_delta_and_the_terminal_event():
    """With the id it had in the log."""
    assert await all_events(RowViewer(DONE, rows(DONE), ENCODER)) == [("delta", "1-4", "abcd"), ("done", "1-5", None)]


async def test_a_running_row_is_shown_as_it_grows():
    """What the last heartbeat stored, then the rest; the database may be away for a moment."""
    viewer = RowViewer(RUNNING, rows(StorageUnavailable(), DONE), ENCODER)

    assert await all_events(viewer) == [("delta", "1-2", "ab"), ("delta", "1-4", "cd"), ("done", "1-5", None)]


async def test_a_turn_that_was_taken_over_drops_what_was_shown():
    """`reset` under the new epoch, then everything."""
    viewer = RowViewer(RUNNING, rows(replace(DONE, epoch=2)), ENCODER)

    assert await all_events(viewer) == [
        ("delta", "1-2", "ab"),
        ("reset", "2-0", None),
        ("delta", "2-4", "abcd"),
        ("done", "2-5", None),
    ]


async def test_a_position_in_a_row_is_found_where_it_can_be():
    """Terminal: nothing more; the last heartbeat's: what follows; an older epoch: reset; any other: from the start."""
    assert RowViewer(DONE, rows(DONE), ENCODER, Position(1, 5)).ended
    at_partial = RowViewer(RUNNING, rows(DONE), ENCODER, Position(1, 2))
    assert await all_events(at_partial) == [("delta", "1-4", "cd"), ("done", "1-5", None)]
    taken = replace(DONE, epoch=2)
    older = RowViewer(taken, rows(taken), ENCODER, Position(1, 3))
    assert [name for name, _, _ in await all_events(older)] == ["reset", "delta", "done"]
    assert RowViewer(DONE, rows(DONE), ENCODER, Position(1, 3)).from_start
    assert RowViewer(DONE, rows(DONE), ENCODER, Position(3, 0)).from_start


async def test_a_row_that_is_deleted_ends_the_wait():
    """Its thread is gone."""
    viewer = RowViewer(replace(RUNNING, partial="", partial_seq=0), rows(NotFound()), ENCODER)

    with pytest.raises(NotFound):
        await viewer.wait(5)


async def test_a_viewer_of_a_row_that_is_closed_waits_no_more():
    """At once, whatever the poll."""
    viewer = RowViewer(replace(RUNNING, partial="", partial_seq=0), rows(RUNNING), ENCODER)
    waiting = asyncio.create_task(viewer.wait(60))
    await asyncio.sleep(0)
    viewer.close()

    assert await asyncio.wait_for(waiting, 1) is False


def test_a_failed_row_ends_with_its_error():
    """As the log did."""
    failed = replace(
        RUNNING,
        state=TurnState.FAILED,
        failure_code="provider_error",
        failure_detail="No.",
        assistant_message=replace(ANSWER, content="ab", status=MessageStatus.PARTIAL),
    )
    events = read_events(RowViewer(failed, rows(failed), ENCODER).take())

    assert json.dumps(events[-1].data) == json.dumps(
        {"state": "failed", "code": "provider_error", "message": "No.", "retryable": False, "partial_chars": 2}
    )
