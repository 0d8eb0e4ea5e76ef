"""Rows of requests name who led them, and what their cost rests on."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add columns that older rows leave empty: nobody knows any more."""
    op.add_column("requests", sa.Column("leader_id", sa.Text(), nullable=True))
    op.add_column("requests", sa.Column("cost_basis", sa.Text(), nullable=True))
    op.add_column("requests", sa.Column("usage_estimated", sa.Boolean(), nullable=True))
