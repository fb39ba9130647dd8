"""The one exception for a user's mistake, and how a command line ends on it."""

import functools
import os
import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """Bad usage or bad input: one sentence that names the file, the value and the fix.

    Command lines print it to stderr without a traceback and exit with status 2.
    """


def reason(error: OSError) -> str:
    """The file, if the system names one, and what is wrong with it."""
    what = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {what}" if error.filename else what


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, else the name of its type."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def command(main: Callable[..., int]) -> Callable[[Sequence[str] | None], int]:
    """A ``main`` that ends with a sentence on stderr, and a status, instead of with a traceback.

    2 after a ``UserError`` or a file that cannot be read or written; 130 after Ctrl-C. Who reads
    the output may leave before its end (``| head``): that is no error, and status 0.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            status = main(argv)
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is buffered
            return 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            print(f"error: {reason(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return run
