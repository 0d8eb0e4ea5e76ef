"""The checker finds what it is there for: each promise is broken here once, by hand."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from oncewise.model import TurnAsk
from oncewise.storage.rows import ask_columns
from tests.faults.check import violations
from tests.faults.clients import Ask, History, Told
from tests.faults.site import Rows, deployment, leaks_of
from tests.support.fake_provider import Call

ASK = Ask("acme", "thread-1", "acme asks: five bullets", "n3")
OTHER = Ask("other", "thread-2", "other asks: a secret", "n3")
TEXT = "".join(f"@1:{index}:17@ lorem " for index in range(3))


class Case:
    """A history that keeps every promise: one turn, told whole and as it came."""

    def __init__(self) -> None:
        self.told = [
            Told("json", 0, ASK, 0.0, 1.0, 200, state="completed", turn="turn-1", text=TEXT),
            Told("sse", 1, ASK, 0.0, 1.0, 200, None, "completed", "turn-1", TEXT, [(1, 1), (1, 2), (1, 3)]),
        ]
        self.waits: dict[int, Any] = {0: (ASK, 0.0, 1.0), 1: (ASK, 0.0, 1.0)}
        self.turns = [self.turn()]
        self.messages = [self.message("user", ASK.content, 0), self.message("assistant", TEXT, 1)]
        self.attempts = [SimpleNamespace(turn_id="turn-1")]
        self.calls = [self.call(1)]
        self.broken: list[Ask] = []
        self.leaks: list[str] = []
        self.bound_s = 5.0

    def turn(self, number: int = 1, ask: Ask = ASK, **values: Any) -> Any:
        asked = TurnAsk(ask.org, ask.thread, ask.content, "openai", ask.model, "fingerprint")
        row = {"id": f"turn-{number}", "idx": number - 1, "state": "completed", "epoch": 1, "visible": True}
        return SimpleNamespace(**ask_columns(asked) | row | {"done_at_ms": 5} | values)

    def message(self, role: str, content: str, sequence: int, turn: int = 1, **values: Any) -> Any:
        row = {"org_id": ASK.org, "thread_id": ASK.thread, "turn_id": f"turn-{turn}", "status": "complete"}
        return SimpleNamespace(**row | {"role": role, "content": content, "sequence": sequence} | values)

    def call(self, number: int, ask: Ask = ASK) -> Call:
        body = f'{{"model": "n3", "messages": [{{"role": "user", "content": "{ask.content}"}}]}}'
        return Call(number, 0.0, {}, body.encode())

    def add_turn(self, **values: Any) -> None:
        """A second turn of the same message, with a pair of its own."""
        self.turns.append(self.turn(2, **values))
        self.messages += [self.message("user", ASK.content, 2, 2), self.message("assistant", TEXT, 3, 2)]
        self.attempts.append(SimpleNamespace(turn_id="turn-2"))

    def end(self, state: str, kept: str) -> None:
        """The turn did not complete; both clients were told so."""
        self.turns[0].state, self.messages[1].content, self.messages[1].status = state, kept, "partial"
        self.told[0].state, self.told[0].status, self.told[0].text = "refused", 502, ""
        self.told[1].state = state
        self.broken = [ASK]

    def seen(self) -> list[str]:
        rows = Rows(self.turns, self.messages, self.attempts)
        return violations(
            History(self.told, self.waits),
            rows,
            self.calls,
            bound_s=self.bound_s,
            broken=self.broken,
            leaks=self.leaks,
        )


def test_a_good_history_breaks_no_promise():
    assert Case().seen() == []


def test_a_retry_after_a_fault_breaks_none_either():
    """Taken over under the next epoch: two calls, and one client asked twice."""
    case = Case()
    case.told.insert(0, Told("json", 0, ASK, 0.0, 0.5))
    case.turns[0].epoch, case.broken = 2, [ASK]
    case.told[2].positions = [(2, 1), (2, 2), (2, 3)]
    case.calls.append(case.call(2))
    case.attempts.append(SimpleNamespace(turn_id="turn-1"))
    assert case.seen() == []


def test_a_stream_that_was_told_of_an_interruption_is_no_violation():
    """What it saw is the beginning of what was kept, or more than that."""
    case = Case()
    case.end("interrupted", TEXT[:20])
    case.waits = {}
    assert case.seen() == []


def lost_row(case: Case) -> None:
    case.turns, case.messages = [], []


def lost_pair(case: Case) -> None:
    case.messages.pop()


def undone(case: Case) -> None:
    case.turns[0].state = "interrupted"


def half_a_pair(case: Case) -> None:
    case.messages[1].status = "partial"


def two_pairs(case: Case) -> None:
    case.messages += [case.message("user", ASK.content, 2), case.message("assistant", TEXT, 3)]


def two_turns(case: Case) -> None:
    case.add_turn()
    case.calls.append(case.call(2))
    case.broken = [ASK]


def a_gap(case: Case) -> None:
    case.messages[1].sequence = 2


def user_after_user(case: Case) -> None:
    case.messages.append(case.message("user", "And?", 2, 2))


def another_text(case: Case) -> None:
    case.told[0].text = TEXT.replace(":17@", ":18@")


def another_end(case: Case) -> None:
    case.told[1].state = "interrupted"


def a_mixture(case: Case) -> None:
    case.messages[1].content = case.told[0].text = case.told[1].text = TEXT.replace("@1:2:", "@2:2:")
    case.calls.append(case.call(2))
    case.turns[0].epoch, case.broken = 2, [ASK]
    case.told[1].positions = [(2, 1), (2, 2), (2, 3)]
    case.attempts.append(SimpleNamespace(turn_id="turn-1"))


def cut_short(case: Case) -> None:
    text = TEXT.replace("@1:1:17@ lorem ", "")
    case.messages[1].content = case.told[0].text = case.told[1].text = text


def more_calls_than_epochs(case: Case) -> None:
    case.calls.append(case.call(2))
    case.attempts.append(SimpleNamespace(turn_id="turn-1"))
    case.broken = [ASK]


def a_call_off_the_record(case: Case) -> None:
    case.calls.append(case.call(2))
    case.turns[0].epoch, case.broken = 2, [ASK]
    case.told[1].positions = [(2, 1), (2, 2), (2, 3)]


def a_second_call_for_nothing(case: Case) -> None:
    case.calls.append(case.call(2))
    case.turns[0].epoch = 2
    case.told[1].positions = [(2, 1), (2, 2), (2, 3)]
    case.attempts.append(SimpleNamespace(turn_id="turn-1"))


def a_client_waits(case: Case) -> None:
    case.waits[1] = (ASK, 0.0, None)


def a_client_waits_long(case: Case) -> None:
    case.waits[1] = (ASK, 0.0, 5.5)


def a_client_is_sent_away(case: Case) -> None:
    case.told[0].state, case.told[0].status, case.told[0].text = "refused", 502, ""


def a_piece_twice(case: Case) -> None:
    case.told[1].positions = [(1, 1), (1, 2), (1, 2), (1, 3)]


def a_malformed_stream(case: Case) -> None:
    case.told[1].broken = ["malformed: an event without a name"]


def a_stranger_in_the_partial(case: Case) -> None:
    case.end("interrupted", "@9:0:17@")


def silently_replaced(case: Case) -> None:
    case.turns[0].epoch, case.broken = 2, [ASK]


def a_strangers_answer(case: Case) -> None:
    case.calls = [case.call(1, OTHER), case.call(2)]


def a_strangers_row(case: Case) -> None:
    case.turns[0].org_id = "other"


def a_strangers_message(case: Case) -> None:
    case.messages[1].org_id = "other"


def lost_in_the_middle(case: Case) -> None:
    case.end("interrupted", TEXT[:20])
    case.told[1].text = TEXT[20:]


def never_asked(case: Case) -> None:
    case.calls = []


def told_to_nobody(case: Case) -> None:
    case.told.pop()


def an_open_turn(case: Case) -> None:
    case.add_turn(state="streaming", done_at_ms=None)
    case.messages = case.messages[:2]
    case.broken = [ASK]


def a_flight_that_stays(case: Case) -> None:
    case.leaks = ["worker-1: oncewise_live_flights 1"]


PLANTED = {
    "I1": [lost_row, lost_pair, undone, half_a_pair],
    "I2": [two_pairs, two_turns, a_gap, user_after_user],
    "I3": [another_text, another_end, a_mixture, cut_short],
    "I4": [never_asked, more_calls_than_epochs, a_call_off_the_record, a_second_call_for_nothing],
    "I5": [told_to_nobody, a_client_waits, a_client_waits_long, a_client_is_sent_away],
    "I6": [lost_in_the_middle, a_piece_twice, a_malformed_stream, a_stranger_in_the_partial, silently_replaced],
    "I7": [a_strangers_answer, a_strangers_row, a_strangers_message],
    "I8": [an_open_turn, a_flight_that_stays],
}


@pytest.mark.parametrize(
    ("name", "plant"),
    [(name, plant) for name, plants in PLANTED.items() for plant in plants],
    ids=lambda each: str(getattr(each, "__name__", each)),
)
def test_a_planted_violation_is_found(name, plant):
    case = Case()
    plant(case)
    assert any(seen.startswith(f"{name} ") for seen in case.seen()), case.seen()


class Server:
    """What a member of a deployment says of itself when nobody asks it anything."""

    owner = "worker-1"

    def __init__(self, rss_mib: int = 120, open_files: int = 40, tasks: int = 20, flights: int = 0, viewers: int = 0):
        self.rss_bytes = rss_mib * 2**20
        self.open_files = open_files
        self._tasks = tasks
        self._metrics = f"# HELP\noncewise_live_flights {flights}.0\noncewise_live_viewers {viewers}.0\n"

    async def tasks(self) -> int:
        return self._tasks

    async def ask(self, *_request: Any, **_more: Any) -> Any:
        return SimpleNamespace(body=self._metrics.encode())


@pytest.mark.parametrize(
    ("held", "leak"),
    [
        ({}, []),
        ({"flights": 1}, ["worker-1: oncewise_live_flights 1.0"]),
        ({"viewers": 2}, ["worker-1: oncewise_live_viewers 2.0"]),
        ({"rss_mib": 251}, ["worker-1: 251 MiB"]),
        ({"open_files": 201}, ["worker-1: 201 open files"]),
        ({"tasks": 61}, ["worker-1: 61 tasks"]),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, dict) else "",
)
async def test_what_a_server_still_holds_is_found(held, leak):
    assert await leaks_of(Server(**held)) == leak


async def test_a_server_says_how_many_tasks_it_has(tmp_path):
    """About twenty: far below what is a leak, so that one of a few dozen is seen."""
    async with deployment(tmp_path, 1, postgres=False) as site:
        assert 1 < await site.members[0].tasks() <= 40
        assert await site.leaks() == []


def test_the_history_is_written_without_texts(tmp_path):
    """One line for each attempt; it may lie about for days."""
    history = History(Case().told)
    history.write(tmp_path / "history.jsonl")
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert "lorem" not in "".join(lines)
    assert history.final(1) is history.told[1]
    assert replace(history.told[0], text="").line() != lines[0]
