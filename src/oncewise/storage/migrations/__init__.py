"""The Alembic environment: it travels inside the package and needs no file beside it."""
