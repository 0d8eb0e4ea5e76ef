"""The splitter: what is an event, however the bytes come."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncewise.providers.event_stream import Event, EventNotUtf8, EventStream, EventTooLarge
from tests.support.recorded_streams import RECORDED, Recorded
from tests.support.scripted_transport import split

Outcome = tuple[list[Event], type[Exception] | None]


def read(pieces: list[bytes], max_event_bytes: int = 1 << 20) -> Outcome:
    """All events of the pieces, and the error that ended them."""
    stream, events = EventStream(max_event_bytes), []
    try:
        for piece in pieces:
            for event in stream.feed(piece):
                events.append(event)  # noqa: PERF402  those before an error count
    except (EventNotUtf8, EventTooLarge) as error:
        return events, type(error)
    return events, None


def data(body: bytes) -> list[str]:
    events, error = read([body])
    assert error is None
    return [event.data for event in events]


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_each_line_end_of_the_standard_ends_a_line(end: bytes) -> None:
    """CR, LF and CRLF, also mixed in one stream."""
    assert data(end.join([b"data: a", b"data: b", b"", b"data: c", b"", b""])) == ["a\nb", "c"]
    assert data(b"data: a\rdata: b\ndata: c\r\n\r\n") == ["a\nb\nc"]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085", "\f", "\v", "\x1c"])
def test_nothing_else_ends_a_line(character: str) -> None:
    """What `str.splitlines` takes for a line end stays inside the data."""
    assert data(f"data: a{character}b\n\n".encode()) == [f"a{character}b"]


def test_fields_are_read_as_the_standard_says() -> None:
    """One leading space goes, comments and unknown fields are passed over, names and ids are kept."""
    body = b": hi\nevent: chunk\nid: 7\nretry: 250\nnonsense: x\ndata:  two spaces\ndata\n\ndata:next\n\n"
    events, _ = read([body])
    assert events == [Event(" two spaces\n", "chunk", "7", 250), Event("next", "", "7", None)]


@pytest.mark.parametrize("body", [b"", b"\n\n\n", b": comment\n\n", b"event: x\n\n", b"data: cut", b"data: cut\n"])
def test_what_has_no_data_or_no_end_is_no_event(body: bytes) -> None:
    """Comments, empty blocks, and a block whose blank line never came."""
    assert data(body) == []


def test_one_byte_order_mark_is_passed_over() -> None:
    """At the very beginning only; a second one is part of a field name."""
    assert data("\ufeffdata: a\n\n\ufeffdata: b\n\n".encode()) == ["a"]


def test_an_event_is_given_before_anything_follows_its_blank_line() -> None:
    """A CR may be half of a CRLF, but no event waits for the other half."""
    stream = EventStream()
    assert [event.data for event in stream.feed(b"data: a\r\n\r")] == ["a"]
    assert [event.data for event in stream.feed(b"\ndata: b\r\n\r\n")] == ["b"]


def test_a_crlf_cut_in_two_is_one_line_end() -> None:
    """Taken for two, it would end an event in its middle."""
    whole = b"data: a\r\ndata: b\r\n\r\n"
    for position in range(1, len(whole)):
        assert [event.data for event in read(split(whole, position))[0]] == ["a\nb"]


@pytest.mark.parametrize("body", [b"data: \xff\n\n", b"data: \xc3\n\n", b"data: \xed\xa0\x80\n\n", b"id: \xff\n\n"])
def test_text_that_is_not_utf8_is_an_error(body: bytes) -> None:
    """Strict: no replacement characters, no surrogates; events before it stand."""
    events, error = read([b"data: good\n\n" + body])
    assert ([event.data for event in events], error) == (["good"], EventNotUtf8)


@pytest.mark.parametrize(
    "body", [b"data: 0123456789abcdef\n\n", b"data: 01234567\ndata: 01234567\n\n", b":" + b"x" * 99]
)
def test_an_event_over_the_cap_is_an_error_before_it_is_complete(body: bytes) -> None:
    """One long line, many short ones, and a comment without end: none of them is collected."""
    assert read([body], max_event_bytes=16) == ([], EventTooLarge)
    assert read([body[:-2]], max_event_bytes=16) == ([], EventTooLarge)


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded.name)
def test_a_recorded_stream_split_anywhere_gives_the_same_events(recorded: Recorded) -> None:
    """Two pieces cut at every position, and one piece per byte."""
    whole = read([recorded.body])
    assert whole[1] is None
    for position in range(1, len(recorded.body)):
        assert read(split(recorded.body, position)) == whole
    assert read([bytes([byte]) for byte in recorded.body]) == whole


fragments = st.lists(
    st.sampled_from(
        [b"data: x", b"data:", b"event: e", b"id: 1", b"\r", b"\n", b"\r\n", b": c", b"\xef\xbb\xbf", b"\xff"]
    )
    | st.binary(max_size=12),
    max_size=30,
).map(b"".join)


@given(body=fragments, positions=st.lists(st.integers(0, 200), max_size=8))
def test_splitting_never_changes_the_events(body: bytes, positions: list[int]) -> None:
    """Nor the error that ends them; and no input raises anything but the two errors."""
    pieces = split(body, *(min(position, len(body)) for position in positions))
    assert read(pieces, 24) == read([body], 24) == read([bytes([byte]) for byte in body], 24)
