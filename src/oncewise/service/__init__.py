"""Use cases, in terms of ports."""
