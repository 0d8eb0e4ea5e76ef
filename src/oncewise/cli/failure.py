"""What ends a command that could not do its work."""

__all__ = ["CommandFailed"]


class CommandFailed(Exception):
    """A command could not do its work, for a reason outside this program; the message is for the terminal."""
