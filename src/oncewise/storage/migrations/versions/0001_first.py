"""The first schema: tenants, threads, turns, messages, provider calls and finished requests."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make all tables."""
    op.create_table(
        "attempts",
        sa.Column("call_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.Column("turn_id", sa.Text(), nullable=True),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("started_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("ended_at_ms", sa.BigInteger(), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("prompt_tokens", sa.Integer(), nullable=True),
        sa.Column("completion_tokens", sa.Integer(), nullable=True),
        sa.Column("usage_estimated", sa.Boolean(), nullable=True),
        sa.PrimaryKeyConstraint("call_id", "attempt", name=op.f("pk_attempts")),
    )
    op.create_index(op.f("ix_attempts_org_id_turn_id"), "attempts", ["org_id", "turn_id"], unique=False)
    op.create_table(
        "orgs",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_orgs")),
    )
    op.create_table(
        "requests",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.Column("surface", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("stream", sa.Boolean(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("finished_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("latency_ms", sa.Double(), nullable=False),
        sa.Column("ttft_ms", sa.Double(), nullable=True),
        sa.Column("queue_wait_ms", sa.Double(), nullable=True),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("completion_tokens", sa.Integer(), nullable=False),
        sa.Column("upstream_calls", sa.Integer(), nullable=False),
        sa.Column("tokens_saved", sa.Integer(), nullable=False),
        sa.Column("cost_usd", sa.Double(), nullable=False),
        sa.Column("cost_saved_usd", sa.Double(), nullable=False),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("turn_id", sa.Text(), nullable=True),
        sa.Column("call_id", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_requests")),
    )
    op.create_index(op.f("ix_requests_finished_at_ms_number"), "requests", ["finished_at_ms", "number"], unique=False)
    op.create_index(
        op.f("ix_requests_org_id_finished_at_ms_number"),
        "requests",
        ["org_id", "finished_at_ms", "number"],
        unique=False,
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=True),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("secret_hash", sa.Text(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("revoked_at_ms", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("(role = 'tenant') = (org_id IS NOT NULL)", name=op.f("ck_api_keys_org")),
        sa.CheckConstraint("role IN ('tenant', 'admin', 'metrics')", name=op.f("ck_api_keys_role")),
        sa.ForeignKeyConstraint(["org_id"], ["orgs.id"], name=op.f("fk_api_keys_org_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("secret_hash", name=op.f("uq_api_keys_secret_hash")),
    )
    op.create_table(
        "threads",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.Column("title", sa.Text(), nullable=True),
        sa.Column("description", sa.Text(), nullable=True),
        sa.Column("user_id", sa.Text(), nullable=True),
        sa.Column("pinned", sa.Boolean(), nullable=False),
        sa.Column("last_provider", sa.Text(), nullable=True),
        sa.Column("last_model", sa.Text(), nullable=True),
        sa.Column("last_message_preview", sa.Text(), nullable=True),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["org_id"], ["orgs.id"], name=op.f("fk_threads_org_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_threads")),
        sa.UniqueConstraint("org_id", "id", name=op.f("uq_threads_org_id_id")),
    )
    op.create_index(
        op.f("ix_threads_org_id_created_at_ms_id"), "threads", ["org_id", "created_at_ms", "id"], unique=False
    )
    op.create_table(
        "turns",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.Column("thread_id", sa.Text(), nullable=False),
        sa.Column("idx", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("lease_until_s", sa.Double(), nullable=False),
        sa.Column("visible", sa.Boolean(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("parent_message_id", sa.Text(), nullable=True),
        sa.Column("ask", sa.Text(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("partial", sa.Text(), nullable=False),
        sa.Column("partial_seq", sa.Integer(), nullable=False),
        sa.Column("done_at_ms", sa.BigInteger(), nullable=True),
        sa.Column("finish_reason", sa.Text(), nullable=True),
        sa.Column("failure_code", sa.Text(), nullable=True),
        sa.Column("failure_detail", sa.Text(), nullable=True),
        sa.Column("failure_retryable", sa.Boolean(), nullable=False),
        sa.Column("call_id", sa.Text(), nullable=True),
        sa.Column("shared", sa.Boolean(), nullable=False),
        sa.Column("cost_usd", sa.Double(), nullable=True),
        sa.Column("response_hash", sa.Text(), nullable=True),
        sa.CheckConstraint("(state IN ('pending', 'streaming')) = (done_at_ms IS NULL)", name=op.f("ck_turns_done")),
        sa.CheckConstraint(
            "state IN ('pending', 'streaming', 'completed', 'failed', 'cancelled', 'interrupted')",
            name=op.f("ck_turns_state"),
        ),
        sa.CheckConstraint("idx >= 0 AND epoch >= 1", name=op.f("ck_turns_counts")),
        sa.ForeignKeyConstraint(
            ["org_id", "thread_id"],
            ["threads.org_id", "threads.id"],
            name=op.f("fk_turns_org_id_thread_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_turns")),
        sa.UniqueConstraint(
            "org_id", "thread_id", "idempotency_key", name=op.f("uq_turns_org_id_thread_id_idempotency_key")
        ),
        sa.UniqueConstraint("thread_id", "idx", name=op.f("uq_turns_thread_id_idx")),
    )
    op.create_index(
        "ix_turns_leases",
        "turns",
        ["lease_until_s"],
        unique=False,
        sqlite_where=sa.text("done_at_ms IS NULL"),
        postgresql_where=sa.text("done_at_ms IS NULL"),
    )
    op.create_index(
        "ix_turns_open",
        "turns",
        ["org_id", "thread_id", "idx"],
        unique=False,
        sqlite_where=sa.text("done_at_ms IS NULL"),
        postgresql_where=sa.text("done_at_ms IS NULL"),
    )
    op.create_index(
        "ix_turns_parents",
        "turns",
        ["org_id", "thread_id", "parent_message_id", "idx"],
        unique=False,
        sqlite_where=sa.text("parent_message_id IS NOT NULL"),
        postgresql_where=sa.text("parent_message_id IS NOT NULL"),
    )
    op.create_table(
        "messages",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.Column("thread_id", sa.Text(), nullable=False),
        sa.Column("turn_id", sa.Text(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=True),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("citations", sa.Text(), nullable=True),
        sa.Column("prompt_tokens", sa.Integer(), nullable=True),
        sa.Column("completion_tokens", sa.Integer(), nullable=True),
        sa.Column("usage_estimated", sa.Boolean(), nullable=True),
        sa.Column("meta", sa.Text(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("role IN ('user', 'assistant', 'system')", name=op.f("ck_messages_role")),
        sa.CheckConstraint("status IN ('complete', 'partial')", name=op.f("ck_messages_status")),
        sa.CheckConstraint("sequence >= 0", name=op.f("ck_messages_sequence")),
        sa.ForeignKeyConstraint(
            ["org_id", "thread_id"],
            ["threads.org_id", "threads.id"],
            name=op.f("fk_messages_org_id_thread_id"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(["turn_id"], ["turns.id"], name=op.f("fk_messages_turn_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_messages")),
        sa.UniqueConstraint("thread_id", "sequence", name=op.f("uq_messages_thread_id_sequence")),
        sa.UniqueConstraint("turn_id", "role", name=op.f("uq_messages_turn_id_role")),
    )
