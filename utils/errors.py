"""The exception for a user's mistake, and the way a command line reports it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

from utils.console import accept_any_text, discard_output


class UserError(Exception):
    """Bad usage or bad input; its text is one sentence with the file, the value and the fix.

    Command lines print it to stderr without a traceback and exit with status 2.
    """


def reason(error: OSError) -> str:
    """Return what is wrong, with the file if the system names one."""
    what = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {what}" if error.filename else what


def first_line(error: BaseException) -> str:
    """Return the first line with text of an error, else the name of its type."""
    lines = map(str.strip, str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def command(main: Callable[..., int]) -> Callable[[Sequence[str] | None], int]:
    """Decorate the ``main`` of a command line: report mistakes in a sentence, not a traceback.

    Exit status: 2 after a ``UserError`` or an error of a file, 130 after Ctrl-C, 0 when the reader
    of standard output has left (``| head``). Other exceptions pass.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        accept_any_text()
        try:
            status = main(argv)
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            discard_output()
            return 0
        except ConnectionError:  # of another process; no file of the user
            raise
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
