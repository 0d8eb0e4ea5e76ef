"""Threads: made, listed, read, changed, deleted, audited and restored."""

import asyncio
from base64 import urlsafe_b64encode

import pytest

from oncewise.errors import InvalidRequest, NotFound
from oncewise.model import ChatMessage, MessageStatus, Scope, TurnState, Usage
from oncewise.ports import Lead
from tests.support.storage import LOST, Storage, answer


async def test_a_new_thread_is_read_as_it_was_made(storage: Storage):
    """Empty, with what was told; the tenant appears with its first thread."""
    made = await storage.threads.create("new", title="t", description="d", user_id="u")

    assert made == await storage.threads.get("new", made.id)
    assert (made.title, made.description, made.user_id, made.pinned, made.messages) == ("t", "d", "u", False, ())
    assert made.created_at_ms == made.updated_at_ms
    assert made.last_message_preview is None


async def test_a_tenant_may_appear_in_many_requests_at_once(storage: Storage):
    """The first ones race to make its row."""
    made = await asyncio.gather(*(storage.thread("new") for _ in range(20)))

    assert len(set(made)) == 20


async def test_pages_are_newest_first_and_cover_every_thread_once(storage: Storage):
    """Also where many threads are as old as each other."""
    made = [await storage.thread() for _ in range(7)]

    seen: list[str] = []
    cursor = None
    while True:
        page = await storage.threads.list(storage.org, limit=3, cursor=cursor)
        seen += [item.id for item in page.items]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == made[::-1]


async def test_a_page_that_ends_the_list_has_no_cursor(storage: Storage):
    """Even if it is full."""
    for _ in range(3):
        await storage.thread()

    assert (await storage.threads.list(storage.org, limit=3, cursor=None)).next_cursor is None
    assert (await storage.threads.list("nobody", limit=3, cursor=None)).items == ()


async def test_a_cursor_stays_valid_while_threads_come_change_and_go(storage: Storage):
    """It names a place in time, not a row."""
    made = [await storage.thread() for _ in range(4)]
    page = await storage.threads.list(storage.org, limit=2, cursor=None)
    await storage.thread()
    await storage.threads.update(storage.org, made[0], {"title": "touched"})
    await storage.threads.delete(storage.org, made[2])

    rest = await storage.threads.list(storage.org, limit=2, cursor=page.next_cursor)
    assert [item.id for item in rest.items] == [made[1], made[0]]


@pytest.mark.parametrize(
    "cursor", ["", "x", "%%%%", "ü", "AAAA", urlsafe_b64encode(b"9999999999999999999:a").decode(), "MTo=\n"]
)
async def test_a_cursor_that_is_not_ours_is_refused_without_an_echo(storage: Storage, cursor: str):
    """Whatever was sent, the error does not repeat it."""
    with pytest.raises(InvalidRequest) as refused:
        await storage.threads.list(storage.org, limit=2, cursor=cursor)
    assert not cursor or cursor not in f"{refused.value.detail}{refused.value.errors}"


async def test_a_foreign_cursor_opens_only_ones_own_list(storage: Storage):
    """A cursor holds a time and an id, never a tenant."""
    for _ in range(2):
        await storage.thread("other")
    cursor = (await storage.threads.list("other", limit=1, cursor=None)).next_cursor
    mine = await storage.thread()
    assert (await storage.threads.list(storage.org, limit=5, cursor=cursor)).items == ()
    assert (await storage.threads.list(storage.org, limit=5, cursor=None)).items[0].id == mine


async def test_update_changes_what_is_named_and_nothing_else(storage: Storage):
    """An explicit null clears a field."""
    made = await storage.threads.create(storage.org, title="t", description="d", user_id=None)
    storage.clock.advance(1)
    changed = await storage.threads.update(storage.org, made.id, {"title": None, "pinned": True})

    assert (changed.title, changed.description, changed.pinned) == (None, "d", True)
    assert changed.updated_at_ms > made.updated_at_ms
    assert await storage.threads.update(storage.org, made.id, {}) == changed
    with pytest.raises(ValueError, match="title"):
        await storage.threads.update(storage.org, made.id, {"org_id": "other"})


async def test_deleting_takes_turns_and_messages_along(storage: Storage, thread: str):
    """Nothing of it can be read afterwards."""
    turn = await storage.answered(thread)
    await storage.threads.delete(storage.org, thread)

    for gone in (
        storage.threads.get(storage.org, thread),
        storage.threads.audit(storage.org, thread),
        storage.threads.delete(storage.org, thread),
        storage.ledger.turn(storage.org, thread, turn.id),
    ):
        with pytest.raises(NotFound):
            await gone
    assert await storage.ledger.history(storage.org, thread) == ()


async def test_a_foreign_thread_cannot_be_told_from_none(storage: Storage, thread: str):
    """Every operation, same error; and the owner still has it all."""
    await storage.answered(thread)
    operations = (
        lambda place: storage.threads.get("other", place),
        lambda place: storage.threads.update("other", place, {"title": "mine"}),
        lambda place: storage.threads.update("other", place, {}),
        lambda place: storage.threads.delete("other", place),
        lambda place: storage.threads.audit("other", place),
    )
    for operation in operations:
        failures = []
        for place in (thread, "nowhere"):
            with pytest.raises(NotFound) as missing:
                await operation(place)
            failures.append(missing.value.failure())
        assert failures[0] == failures[1]
    assert len((await storage.threads.get(storage.org, thread)).messages) == 2
    assert (await storage.threads.list("other", limit=5, cursor=None)).items == ()


async def test_the_audit_has_one_entry_per_stored_turn_oldest_first(storage: Storage, thread: str):
    """Completed and partial ones; a turn that stored nothing is not in it."""
    whole = await storage.lead(thread, "a", reason="because", user_id="u", scope=Scope.SHARED)
    await storage.ledger.commit(whole, answer(model="small-2026", shared=True))
    await storage.ended(await storage.lead(thread, "b"), TurnState.FAILED)
    partial = await storage.lead(thread, "c")
    await storage.ended(partial, TurnState.INTERRUPTED, LOST, "par")

    first, second = await storage.threads.audit(storage.org, thread)
    assert (first.turn_id, first.provider, first.model) == (whole.turn_id, "demo", "small-2026")
    assert (first.reason, first.user_id, first.scope) == ("because", "u", Scope.SHARED)
    assert (first.usage, first.call_id, first.shared) == (Usage(3, 5), "call-1", True)
    assert len(first.package_hash) == len(first.response_hash) == 64
    assert (second.turn_id, second.model, second.usage.total_tokens) == (partial.turn_id, "small", 0)


async def test_a_restored_thread_reads_like_the_exported_one(storage: Storage):
    """Same words in the same places, as completed turns that later prompts begin with."""
    exported = [ChatMessage(role, f"{role} {n}") for n in range(3) for role in ("user", "assistant")]
    thread = await storage.threads.restore(storage.org, exported, title="back")

    assert thread == await storage.threads.get(storage.org, thread.id)
    assert [(message.role, message.content) for message in thread.messages] == [
        (message.role, message.content) for message in exported
    ]
    assert [message.sequence for message in thread.messages] == list(range(6))
    assert {message.status for message in thread.messages} == {MessageStatus.COMPLETE}
    assert await storage.ledger.history(storage.org, thread.id) == tuple(exported)
    assert (thread.title, thread.last_message_preview) == ("back", "assistant 2")
    assert len(await storage.threads.audit(storage.org, thread.id)) == 3


async def test_a_restored_thread_goes_on(storage: Storage):
    """The next turn comes behind, and no imported answer is replayed for it."""
    exported = [ChatMessage("user", "hello"), ChatMessage("assistant", "hi")]
    thread = await storage.threads.restore(storage.org, exported, title=None)

    assert isinstance(admission := await storage.admit(thread.id, "hello"), Lead)
    assert (admission.claim.idx, admission.position) == (1, 0)


async def test_an_empty_export_restores_an_empty_thread(storage: Storage):
    """It was a thread nobody wrote into."""
    assert (await storage.threads.restore(storage.org, [], title=None)).messages == ()


@pytest.mark.parametrize(
    "roles",
    [("assistant", "user"), ("user", "user"), ("user", "assistant", "user"), ("system",), ("user", "robot"), ("user",)],
)
async def test_roles_that_do_not_alternate_restore_nothing(storage: Storage, roles: tuple[str, ...]):
    """All or nothing, and the error does not repeat what was sent."""
    with pytest.raises(InvalidRequest) as refused:
        await storage.threads.restore(storage.org, [ChatMessage(role, "secret") for role in roles], title=None)

    assert "secret" not in f"{refused.value.detail}{refused.value.errors}"
    assert "robot" not in f"{refused.value.detail}{refused.value.errors}"
    assert (await storage.threads.list(storage.org, limit=5, cursor=None)).items == ()
