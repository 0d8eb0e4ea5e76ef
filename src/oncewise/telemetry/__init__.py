"""Listeners that turn events into logs and figures."""
