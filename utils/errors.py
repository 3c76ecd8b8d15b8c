"""The one exception that means "the user can fix this"."""


class InputError(Exception):
    """The command line, a file or a folder is wrong.

    The message is one line: what is wrong with which flag or file, and the remedy. Scripts print it
    on stderr without a traceback and exit with code 2.
    """
