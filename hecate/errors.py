"""The one error class for what a user can do wrong."""

USER_ERROR_EXIT = 2
"""exit status of the command line after such an error"""


class UserError(ValueError):
    """A mistake the user can mend. Its text says what is wrong, where, and how to mend it, in at most 8 lines.

    The command line prints the text without a traceback and exits with `USER_ERROR_EXIT`.
    """
