"""The exceptions that mean "the user can fix this"."""

from collections.abc import Sequence


class InputError(Exception):
    """The command line, a file or a folder is wrong.

    The message is one line: what is wrong with which flag or file, and the remedy. Scripts print the `details`, one a
    line, then the message on stderr without a traceback, and exit with code 2.
    """

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.details = details


class UnreadableError(InputError):
    """A data file exists but cannot be read as what it should be."""
