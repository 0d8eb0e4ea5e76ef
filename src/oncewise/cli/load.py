"""A burst: many requests over few connections, and what became of each.

Every connection sends its next request when the last one was answered, as autocannon does. The figures come from two
places: what the clients saw (status, role, time, text), and what the server stored and called, read back from it.

Deliberately absent: printing. `oncewise.cli.report` shows what is measured here.
"""

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from oncewise.cli.client import BrokenAnswer, Connection, NoServer, Reply, Server, read_events
from oncewise.cli.failure import CommandFailed
from oncewise.service.metrics import quantile

__all__ = [
    "Answer",
    "Burst",
    "BurstResult",
    "ServerRefused",
    "create_thread",
    "not_oncewise",
    "run_burst",
    "stored_messages",
]

REQUEST_TIMEOUT_S = 150.0
ACCOUNT_WAIT_S = 2.0
METRICS_WINDOW = 10_000


class ServerRefused(CommandFailed):
    """A request that everything else depends on was refused; the message says how."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request.

    Attributes:
        status: HTTP status; 0 if there was no answer.
        error: None for a success, else an error code or what went wrong on the way.
        role: The `x-coalesce` header.
        ttft_s: Seconds to the first delta of a stream; None if it had none.
        digest: Hash of what was answered; equal for equal answers.
    """

    status: int
    error: str | None
    role: str
    latency_s: float
    ttft_s: float | None = None
    digest: str = ""

    @property
    def ok(self) -> bool:
        """Whether it was answered in full."""
        return self.error is None


@dataclass(frozen=True, slots=True)
class Burst:
    """What to send.

    Attributes:
        threads: Ids of the threads the requests go to, in turn.
        body: The JSON body of every request.
    """

    threads: Sequence[str]
    body: dict[str, Any]
    requests: int = 50
    connections: int = 10
    stream: bool = False


@dataclass(frozen=True, slots=True)
class BurstResult:
    """What a burst came to.

    Attributes:
        provider_calls: Calls made for these requests.
        messages: Messages now stored in the threads of the burst.
        shared: Stored turns whose provider call was made for another turn.
    """

    burst: Burst
    answers: tuple[Answer, ...]
    elapsed_s: float
    provider_calls: int
    messages: int
    shared: int

    @property
    def succeeded(self) -> int:
        """Requests answered in full."""
        return sum(answer.ok for answer in self.answers)

    @property
    def roles(self) -> Counter[str]:
        """Answers by role."""
        return Counter(answer.role for answer in self.answers if answer.ok)

    @property
    def errors(self) -> Counter[str]:
        """Failures by what went wrong."""
        return Counter(answer.error for answer in self.answers if answer.error)

    @property
    def distinct_answers(self) -> int:
        """Different answers that were given."""
        return len({answer.digest for answer in self.answers if answer.ok})

    def latency_s(self, share: float) -> float | None:
        """A quantile over all answers, failures included."""
        return quantile(sorted(answer.latency_s for answer in self.answers), share)

    def ttft_s(self, share: float) -> float | None:
        """A quantile over the streams that had a delta."""
        return quantile(sorted(answer.ttft_s for answer in self.answers if answer.ttft_s is not None), share)

    @property
    def as_promised(self) -> bool:
        """All succeeded, with one provider call and one stored pair for each thread."""
        return (
            self.succeeded == len(self.answers) == self.burst.requests
            and self.provider_calls == 1
            and self.messages == 2 * len(set(self.burst.threads))
            and self.distinct_answers == len(set(self.burst.threads))
        )


async def create_thread(server: Server, title: str = "oncewise burst") -> str:
    """Make an empty thread; return its id.

    Raises:
        NoServer, NoAnswer, OSError, BrokenAnswer: no answer.
        ServerRefused: the server did not make one, or is not Oncewise.
    """
    reply = await server.fetch("POST", "/api/threads/", {"title": title})
    document = _accepted(reply, 201)
    if "thread_id" not in document:
        raise not_oncewise(reply)
    return str(document["thread_id"])


async def stored_messages(server: Server, thread: str) -> int:
    """How many messages a thread holds; errors as in `create_thread`."""
    reply = await server.fetch("GET", f"/api/threads/{quote(thread)}")
    return len(_accepted(reply, 200)["messages"])


async def run_burst(
    server: Server, burst: Burst, *, on_answer: Callable[[Answer], None] = lambda _answer: None
) -> BurstResult:
    """Send all requests, then read back what they came to; errors as in `create_thread`."""
    finished_before = (await _performance(server, METRICS_WINDOW))["total_requests"]
    began_s = time.perf_counter()
    answers = await _send_all(server, burst, on_answer)
    elapsed_s = time.perf_counter() - began_s
    await _accounted(server, finished_before + len(answers))
    counted = (await _performance(server, max(1, len(answers))))["upstream"]["calls"]
    threads = sorted(set(burst.threads))
    audits = [_accepted(await server.fetch("GET", f"/api/threads/{t}/audit"), 200)["items"] for t in threads]
    turns = [entry for entries in audits for entry in entries]
    return BurstResult(
        burst,
        tuple(answers),
        elapsed_s,
        # The metrics count retries too, the audit only calls that became a stored turn; neither may hide a call.
        provider_calls=max(counted, len({entry["call_id"] for entry in turns})),
        messages=sum([await stored_messages(server, thread) for thread in threads]),
        shared=sum(bool(entry["shared"]) for entry in turns),
    )


# -- the clients' side -------------------------------------------------------------------------------------------


async def _send_all(server: Server, burst: Burst, on_answer: Callable[[Answer], None]) -> list[Answer]:
    todo = iter(range(burst.requests))
    answers: list[Answer] = []

    async def work() -> None:
        async with Connection(server) as connection:
            for number in todo:
                answer = await _send(connection, burst, burst.threads[number % len(burst.threads)])
                answers.append(answer)
                on_answer(answer)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(burst.connections, burst.requests)):
            group.create_task(work())
    return answers


async def _send(connection: Connection, burst: Burst, thread: str) -> Answer:
    path = f"/api/threads/{quote(thread)}/messages"
    began_s = time.perf_counter()
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            if burst.stream:
                return await _read_stream(connection, f"{path}/stream", burst.body, began_s)
            reply = await connection.fetch("POST", path, burst.body)
    except (OSError, TimeoutError, BrokenAnswer, NoServer) as error:
        connection.close()
        return Answer(0, type(error).__name__, "none", time.perf_counter() - began_s)
    return Answer(
        reply.status,
        None if reply.status == 200 else _code(reply),
        reply.headers.get("x-coalesce", "none"),
        time.perf_counter() - began_s,
        digest=hashlib.sha256(reply.body).hexdigest(),
    )


async def _read_stream(connection: Connection, path: str, body: object, began_s: float) -> Answer:
    text, ttft_s = hashlib.sha256(), None
    error: str | None = "no_terminal_event"
    async with connection.stream("POST", path, body) as (reply, chunks):
        role = reply.headers.get("x-coalesce", "none")
        if reply.status != 200:
            reply.body = b"".join([chunk async for chunk in chunks])
            return Answer(reply.status, _code(reply), role, time.perf_counter() - began_s)
        async with aclosing(read_events(chunks)) as events:
            async for event in events:
                if event.name == "delta":
                    ttft_s = ttft_s or time.perf_counter() - began_s
                    text.update(json.loads(event.data)["delta"].encode())
                elif event.name in {"done", "error"}:
                    data = json.loads(event.data)
                    error = None if data["state"] == "completed" else data.get("code", data["state"])
                    text.update(str(data.get("assistant_message_id")).encode())
    return Answer(reply.status, error, role, time.perf_counter() - began_s, ttft_s, text.hexdigest())


# -- the server's side -------------------------------------------------------------------------------------------


async def _performance(server: Server, last_n: int) -> dict[str, Any]:
    reply = await server.fetch("GET", f"/api/metrics/performance?last_n={min(last_n, METRICS_WINDOW)}")
    return _accepted(reply, 200)


async def _accounted(server: Server, finished: int) -> None:
    """Wait until all of the burst's requests are in the figures: they are counted after they were answered."""
    deadline_s = time.monotonic() + ACCOUNT_WAIT_S
    while time.monotonic() < deadline_s:
        if (await _performance(server, METRICS_WINDOW))["total_requests"] >= min(finished, METRICS_WINDOW):
            return
        await asyncio.sleep(0.02)


def _accepted(reply: Reply, status: int) -> dict[str, Any]:
    document: object = _document(reply)
    if not isinstance(document, dict) or (reply.status != status and "code" not in document):
        raise not_oncewise(reply)
    if reply.status != status:
        raise ServerRefused(f"the server answered {reply.status} {document['code']}")
    return document


def not_oncewise(reply: Reply) -> ServerRefused:
    """What to say of an answer that is not one of ours."""
    return ServerRefused(f"the server answered {reply.status} and not as Oncewise does; is it another program's?")


def _document(reply: Reply) -> object:
    """The body as JSON; None if it is none."""
    try:
        return json.loads(reply.body)
    except ValueError:
        return None


def _code(reply: Reply) -> str:
    """The error code of a refusal."""
    document = _document(reply)
    return str(document["code"]) if isinstance(document, dict) and "code" in document else f"http_{reply.status}"
