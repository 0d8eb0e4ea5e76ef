"""The schema: what the database itself refuses, whatever the code above it does.

Tenant-owned rows carry `org_id`, and turns and messages reach their thread by tenant *and* id, so that a row cannot
belong to another tenant's thread. Times that people read are integers of milliseconds; leases are seconds of the
database's own clock.

Deliberately absent: queries, and anything that only one engine understands.
"""

from typing import Any

import sqlalchemy as sa

__all__ = [
    "api_keys",
    "attempts",
    "call_slots",
    "deployment",
    "messages",
    "metadata",
    "orgs",
    "paces",
    "requests",
    "signals",
    "threads",
    "turns",
]

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite counts rows up only for a key declared INTEGER.
_RowNumber = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


# The check "done" on turns makes this the same as being in a state that is not final.
_OPEN = sa.text("done_at_ms IS NULL")
_WITH_PARENT = sa.text("parent_message_id IS NOT NULL")


def _text(name: str, *args: Any, null: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text, *args, nullable=null)


def _ms(name: str, *, null: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=null)


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer, nullable=False)


def _flag(name: str) -> sa.Column[bool]:
    return sa.Column(name, sa.Boolean, nullable=False)


def _usage() -> tuple[sa.Column[Any], ...]:
    """Tokens, all three null where nobody counted them."""
    return (
        sa.Column("prompt_tokens", sa.Integer),
        sa.Column("completion_tokens", sa.Integer),
        sa.Column("usage_estimated", sa.Boolean),
    )


def _in_thread() -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["org_id", "thread_id"], ["threads.org_id", "threads.id"], ondelete="CASCADE")


orgs = sa.Table(
    "orgs",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _ms("created_at_ms"),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    # Null for admin and metrics keys, which belong to no tenant.
    _text("org_id", sa.ForeignKey("orgs.id"), null=True),
    _text("role"),
    # Public, for people; the secret itself is nowhere.
    _text("prefix"),
    _text("secret_hash"),
    _ms("created_at_ms"),
    _ms("revoked_at_ms", null=True),
    sa.CheckConstraint("role IN ('tenant', 'admin', 'metrics')", name="role"),
    sa.CheckConstraint("(role = 'tenant') = (org_id IS NOT NULL)", name="org"),
    sa.UniqueConstraint("secret_hash"),
)

threads = sa.Table(
    "threads",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _text("org_id", sa.ForeignKey("orgs.id")),
    _text("title", null=True),
    _text("description", null=True),
    _text("user_id", null=True),
    _flag("pinned"),
    _text("last_provider", null=True),
    _text("last_model", null=True),
    _text("last_message_preview", null=True),
    _ms("created_at_ms"),
    _ms("updated_at_ms"),
    sa.UniqueConstraint("org_id", "id"),
    sa.Index(None, "org_id", "created_at_ms", "id"),
)

turns = sa.Table(
    "turns",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _text("org_id"),
    _text("thread_id"),
    _count("idx"),
    _text("state"),
    # Who may work on it.
    _count("epoch"),
    _count("attempt"),
    _text("owner"),
    sa.Column("lease_until_s", sa.Double, nullable=False),
    _flag("visible"),
    # What was asked.
    _text("fingerprint"),
    _text("idempotency_key", null=True),
    _text("parent_message_id", null=True),
    _text("ask"),
    _ms("created_at_ms"),
    # How far it is.
    _text("partial"),
    _count("partial_seq"),
    # How it ended.
    _ms("done_at_ms", null=True),
    _text("finish_reason", null=True),
    _text("failure_code", null=True),
    _text("failure_detail", null=True),
    _flag("failure_retryable"),
    # What the audit shows beside the ask and the assistant message.
    _text("call_id", null=True),
    _flag("shared"),
    sa.Column("cost_usd", sa.Double),
    _text("response_hash", null=True),
    _in_thread(),
    sa.UniqueConstraint("thread_id", "idx"),
    sa.UniqueConstraint("org_id", "thread_id", "idempotency_key"),
    # Partial indexes: few turns name a parent, and few are open (who is next in a thread, whose lease has lapsed).
    sa.Index(
        "ix_turns_parents",
        "org_id",
        "thread_id",
        "parent_message_id",
        "idx",
        sqlite_where=_WITH_PARENT,
        postgresql_where=_WITH_PARENT,
    ),
    sa.Index("ix_turns_open", "org_id", "thread_id", "idx", sqlite_where=_OPEN, postgresql_where=_OPEN),
    sa.Index("ix_turns_leases", "lease_until_s", sqlite_where=_OPEN, postgresql_where=_OPEN),
    sa.CheckConstraint(
        "state IN ('pending', 'streaming', 'completed', 'failed', 'cancelled', 'interrupted')", name="state"
    ),
    sa.CheckConstraint("(state IN ('pending', 'streaming')) = (done_at_ms IS NULL)", name="done"),
    sa.CheckConstraint("idx >= 0 AND epoch >= 1", name="counts"),
)

messages = sa.Table(
    "messages",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _text("org_id"),
    _text("thread_id"),
    _text("turn_id", sa.ForeignKey("turns.id", ondelete="CASCADE")),
    _count("sequence"),
    _text("role"),
    _text("content"),
    _text("status"),
    _text("provider", null=True),
    _text("model", null=True),
    _text("citations", null=True),
    *_usage(),
    _text("meta"),
    _ms("created_at_ms"),
    _in_thread(),
    sa.UniqueConstraint("thread_id", "sequence"),
    sa.UniqueConstraint("turn_id", "role"),
    sa.CheckConstraint("sequence >= 0", name="sequence"),
    sa.CheckConstraint("role IN ('user', 'assistant', 'system')", name="role"),
    sa.CheckConstraint("status IN ('complete', 'partial')", name="status"),
)

# Money that was spent stays on record when the thread goes: no foreign key to the turn.
attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("call_id", sa.Text, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True, autoincrement=False),
    _text("org_id"),
    _text("turn_id", null=True),
    _count("epoch"),
    _text("provider"),
    _text("model"),
    _ms("started_at_ms"),
    _ms("ended_at_ms", null=True),
    _text("outcome", null=True),
    *_usage(),
    sa.Index(None, "org_id", "turn_id"),
)

requests = sa.Table(
    "requests",
    metadata,
    sa.Column("number", _RowNumber, primary_key=True, autoincrement=True),
    _text("request_id"),
    _text("org_id"),
    _text("surface"),
    _text("role"),
    _flag("stream"),
    _text("provider"),
    _text("model"),
    _ms("finished_at_ms"),
    sa.Column("latency_ms", sa.Double, nullable=False),
    sa.Column("ttft_ms", sa.Double),
    sa.Column("queue_wait_ms", sa.Double),
    _count("prompt_tokens"),
    _count("completion_tokens"),
    _count("upstream_calls"),
    _count("tokens_saved"),
    sa.Column("cost_usd", sa.Double, nullable=False),
    sa.Column("cost_saved_usd", sa.Double, nullable=False),
    _text("error_code", null=True),
    _text("turn_id", null=True),
    _text("call_id", null=True),
    _text("leader_id", null=True),
    _text("cost_basis", null=True),
    sa.Column("usage_estimated", sa.Boolean),
    sa.Index(None, "finished_at_ms", "number"),
    sa.Index(None, "org_id", "finished_at_ms", "number"),
)

# -- between workers: nothing here outlives them, but for the deployment's secret -------------------------------------

deployment = sa.Table(
    "deployment",
    metadata,
    # One row: everybody who shares the database is one deployment.
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    _text("secret"),
    sa.CheckConstraint("id = 1", name="one"),
)

paces = sa.Table(
    "paces",
    metadata,
    sa.Column("provider", sa.Text, primary_key=True),
    # When the bucket of starts is full again.
    sa.Column("free_at_s", sa.Double, nullable=False),
    # The latest starts, newest last, where so many may not come within a second: numbers in JSON.
    _text("latest"),
)

call_slots = sa.Table(
    "call_slots",
    metadata,
    sa.Column("provider", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("until_s", sa.Double, nullable=False),
)

signals = sa.Table(
    "signals",
    metadata,
    sa.Column("number", _RowNumber, primary_key=True, autoincrement=True),
    # Null for what is said to all.
    _text("receiver", null=True),
    _text("sender"),
    _text("word"),
    sa.Column("sent_at_s", sa.Double, nullable=False),
    sa.Index(None, "sent_at_s"),
)
