"""The one error class for what a user can do wrong."""


class UserError(ValueError):
    """A mistake the user can mend. Its text says what is wrong, where, and how to mend it, in at most 8 lines.

    The command line prints the text without a traceback and exits with status 2.
    """
