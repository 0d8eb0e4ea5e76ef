"""Entered by Alembic. Migrations run on the connection and in the transaction of whoever calls `schema.upgrade`."""

from alembic import context

from oncewise.storage.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
