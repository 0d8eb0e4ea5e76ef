"""The rules: no sockets, SQL, settings or wall clock."""
