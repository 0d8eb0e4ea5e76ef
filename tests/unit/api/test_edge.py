"""What every request passes, without a server: the ASGI protocol by hand."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from oncewise.api.edge import Edge
from oncewise.api.limits import Limits
from oncewise.api.presence import ClientGone
from oncewise.errors import Overloaded


class Client:
    """Sends the parts it is given, then waits until it is told to leave."""

    def __init__(self, *parts, method="POST", headers=(), version="1.1"):
        fields = [(b"host", b"localhost"), *headers]
        self.scope = {"type": "http", "method": method, "headers": fields, "http_version": version, "path": "/"}
        self._parts = [(part, index < len(parts) - 1) for index, part in enumerate(parts)]
        self.left = asyncio.Event()
        self.status = None
        self.headers = {}
        self.body = b""

    async def receive(self):
        if self._parts:
            part, more = self._parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": more}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = dict(message["headers"])
        else:
            self.body += message["body"]

    async def meets(self, route, **limits):
        services = SimpleNamespace(settings=SimpleNamespace(max_body_bytes=10), keys=SimpleNamespace(exist=False))
        edge = Edge(route, limits=Limits(**limits))
        await edge.handle(self.scope, self.receive, self.send, services)
        return self

    @property
    def code(self):
        return json.loads(self.body)["code"]


async def echo_size(exchange):
    await exchange.answer(200, b"%d" % len(exchange.body))


async def test_a_body_in_parts_is_read_whole():
    """The route sees it at once."""
    client = await Client(b"ab", b"", b"c").meets(echo_size)

    assert (client.status, client.body) == (200, b"3")
    assert client.headers[b"content-length"] == b"1"
    assert client.headers[b"cache-control"] == b"no-store"


async def test_a_body_is_counted_while_it_comes():
    """The rest is read and thrown away, so that the client can read why."""
    client = Client(b"a" * 6, b"b" * 6, b"c" * 6)
    await client.meets(echo_size)

    assert (client.status, client.code) == (413, "body_too_large")
    assert client._parts == []


async def test_the_rest_of_a_refused_body_is_read_within_bounds():
    """Nobody is listened to for ever for having sent too much."""
    client = Client(*[b"a" * 6] * 100)
    await client.meets(echo_size, refused_bytes=30)

    assert (client.status, client.code) == (413, "body_too_large")
    assert len(client._parts) == 93, "two that were over the limit, and five of the rest"


async def test_a_body_that_does_not_end_is_given_up():
    """408, and the connection closes: the rest could be taken for a request."""
    client = Client(b"a")
    client._parts = [(b"a", True)]
    await client.meets(echo_size, body_s=0.02)

    assert (client.status, client.code) == (408, "request_timeout")
    assert client.headers[b"connection"] == b"close"


async def test_a_deliberate_error_of_a_route_becomes_a_problem():
    """With the request's own id."""

    async def route(_exchange):
        raise Overloaded(retry_after_s=2)

    client = await Client(b"", headers=[(b"x-request-id", b"r-1")]).meets(route)

    assert (client.status, client.code) == (503, "overloaded")
    assert client.headers[b"retry-after"] == b"2"
    assert client.headers[b"x-request-id"] == b"r-1"
    assert client.headers[b"x-content-type-options"] == b"nosniff"


async def test_an_answer_that_has_begun_is_not_followed_by_another():
    """The connection is all that is left to end."""

    async def route(exchange):
        await exchange.start(200, [])
        raise ValueError("k4n4ry")

    client = await Client(b"").meets(route)

    assert (client.status, client.body) == (200, b"")


async def test_an_unexpected_error_is_logged_by_its_place(caplog):
    """Its text may quote a message."""

    async def route(_exchange):
        raise ValueError("k4n" + "4ry")

    client = await Client(b"").meets(route)

    assert (client.status, client.code) == (500, "internal")
    assert "ValueError" in caplog.text
    assert "test_edge.py" in caplog.text
    assert "k4n4ry" not in caplog.text + client.body.decode()


async def test_a_client_that_leaves_cancels_the_wait_and_nothing_else():
    """The block ends with `ClientGone`; the log says 499."""
    ends = []

    async def route(exchange):
        try:
            with exchange.presence():
                await asyncio.Event().wait()
        except ClientGone:
            ends.append(asyncio.current_task().cancelling())
            raise

    client = Client(b"")
    meeting = asyncio.create_task(client.meets(route))
    await asyncio.sleep(0.01)
    client.left.set()
    await meeting

    assert ends == [0]
    assert client.status is None


async def test_cancelling_the_request_itself_passes_through():
    """A server that stops is not a client that left."""

    async def route(exchange):
        with exchange.presence():
            await asyncio.Event().wait()

    meeting = asyncio.create_task(Client(b"").meets(route))
    await asyncio.sleep(0.01)
    meeting.cancel()

    with pytest.raises(asyncio.CancelledError):
        await meeting


async def test_a_block_that_has_ended_is_not_cancelled_later():
    """The client may leave while it is answered."""

    async def route(exchange):
        with exchange.presence():
            pass
        client.left.set()
        await asyncio.sleep(0.01)
        await exchange.answer(200, b"")

    client = Client(b"")
    await client.meets(route)

    assert client.status == 200


@pytest.mark.parametrize(
    ("headers", "version", "status"),
    [
        ([(b"x-%d" % index, b"a") for index in range(99)], "1.1", 200),
        ([(b"x-%d" % index, b"a") for index in range(100)], "1.1", 431),
        ([(b"x-a", b"a" * 32_768)], "1.1", 431),
        ([], "2.0", 400),
        ([], "2", 200),
        ([(b"host", b"localhost")], "1.1", 400),
        ([(b"x-b", b"1"), (b"x-b", b"2")], "1.1", 200),
    ],
)
async def test_heads_are_judged_before_anything_else(headers, version, status):
    """Under any ASGI server."""
    assert (await Client(b"", headers=headers, version=version).meets(echo_size)).status == status
