"""Standard output that takes any text, and that may lose its reader."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def accept_any_text() -> None:
    """Escape characters that standard output cannot encode (Windows' cp1252, file names)."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Discard standard output from now on, after its reader or its terminal has gone.

    What is still buffered is discarded too: Python would fail on it at its end.
    """
    with suppress(OSError, AttributeError):  # a stream without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
