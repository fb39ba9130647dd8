"""The one exception for a user's mistake."""


class UserError(Exception):
    """Bad usage or bad input: one sentence that names the file, the value and the fix.

    Command lines print it to stderr without a traceback and exit with status 2.
    """
