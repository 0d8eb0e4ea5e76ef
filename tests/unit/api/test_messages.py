"""What a message's body becomes, without a server."""

import json
from types import SimpleNamespace

from oncewise.api.messages import Messages


async def test_a_body_is_never_taken_for_one_that_stood_in_its_place():
    """Bodies too large to be kept are compared by the identity of what they were read as, which is held meanwhile."""
    messages, sent = Messages(), []
    threads = SimpleNamespace(
        prepare=lambda _org, _thread, **fields: fields["content"], send=lambda ask, _id: sent.append(ask)
    )
    texts = [f"{number} " + "x" * 70_000 for number in range(200)]
    for text in texts:
        exchange = SimpleNamespace(
            body=json.dumps({"content": text}).encode(),
            headers={},
            request_id="r",
            services=SimpleNamespace(threads=threads),
            tenant=lambda: "acme",
            check_media_type=lambda: None,
        )
        messages.ask(exchange, "thread")
        assert id(messages._fields) == messages._last[0][-1], "what is compared by identity is alive"
    assert sent == texts
