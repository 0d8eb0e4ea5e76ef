"""What ends a command that could not do its work."""

__all__ = ["CommandFailed", "WrongUse"]


class CommandFailed(Exception):
    """A command could not do its work, for a reason outside this program; the message is for the terminal."""

    exit_code = 1


class WrongUse(CommandFailed):
    """A command was asked for what cannot be done with these flags and settings."""

    exit_code = 2
