"""Workers share a rate, running calls and words where they have nothing but the database, and a secret in any case."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_row_number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Make the tables between workers."""
    op.create_table(
        "deployment",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_deployment_one")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deployment")),
    )
    op.create_table(
        "paces",
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("free_at_s", sa.Double(), nullable=False),
        sa.Column("latest", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("provider", name=op.f("pk_paces")),
    )
    op.create_table(
        "call_slots",
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("until_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("provider", "name", name=op.f("pk_call_slots")),
    )
    op.create_table(
        "signals",
        sa.Column("number", _row_number, autoincrement=True, nullable=False),
        sa.Column("receiver", sa.Text(), nullable=True),
        sa.Column("sender", sa.Text(), nullable=False),
        sa.Column("word", sa.Text(), nullable=False),
        sa.Column("sent_at_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_signals")),
    )
    op.create_index(op.f("ix_signals_sent_at_s"), "signals", ["sent_at_s"])
