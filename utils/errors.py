"""The exceptions that mean "the user can fix this"."""

from collections.abc import Sequence


class InputError(Exception):
    """The message says in one line what is wrong, and the remedy; the `details` are lines to be printed before it."""

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.details = details


class UnreadableError(InputError):
    """A data file exists but cannot be read as what it should be."""
