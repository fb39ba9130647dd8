"""The exception for a user's mistake, and the way a command line reports it."""

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from utils.console import console, printable
from utils.signals import Interrupted, interruptible


class UserError(Exception):
    """Bad usage or bad input; its text is one sentence with the file, the value and the fix.

    Control characters in it, as of file names, are escaped. Command lines print it to stderr
    without a traceback and exit with status 2.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def reason(error: OSError) -> str:
    """Return what is wrong, with the file if the system names one."""
    what = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {what}" if error.filename else what


def first_line(error: BaseException) -> str:
    """Return the first line with text of an error, else the name of its type."""
    lines = map(str.strip, str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def import_package(module: str, user: object) -> ModuleType:
    """Import an optional package; a UserError names it and its ``user``, such as a file."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken package raises anything
        raise UserError(f"{user} needs {module}, which cannot be imported ({first_line(error)}); "
                        f"pip install {module.partition('.')[0]}") from error


def command(main: Callable[..., int]) -> Callable[[Sequence[str] | None], int]:
    """Decorate the ``main`` of a command line: report mistakes in a sentence, not a traceback.

    Exit status: 2 after a ``UserError``, an error of a file or output that could not be written,
    130 after Ctrl-C, SIGTERM or SIGHUP. When the reader of the output leaves (``| head``), the
    command goes on to its end without it. Other exceptions pass.
    """

    @functools.wraps(main)
    @console()
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            with interruptible():
                status = main(argv)
            return 2 if sys.stdout.lost() else status
        except ConnectionError:  # of another process; no file of the user
            raise
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            print(f"error: {printable(reason(error))}", file=sys.stderr)
            return 2
        except (KeyboardInterrupt, Interrupted):
            print("interrupted", file=sys.stderr)
            return 130

    return run
