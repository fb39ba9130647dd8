"""Standard output and error that take any text, and that may lose their reader."""

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

# Control characters; those that hide text or change its direction; halves of characters.
_CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
_IN_STREAM = re.compile(f"[{_CONTROLS}\ud800-\udfff]")
_IN_LINE = re.compile(f"[{_CONTROLS}\ud800-\udfff\t\n]")
_NO_READER = (errno.EPIPE, errno.EIO)
"""Errors of a pipe whose reader has left (``| head``), and of a terminal that was closed."""


def printable(text: object) -> str:
    """Return text as one line without control characters: they are escaped, as in "\\x1b"."""
    return _IN_LINE.sub(_escape, str(text))


def _escape(character: re.Match[str]) -> str:
    return character[0].encode("unicode_escape").decode()


class Stream:
    """A text stream that escapes what it cannot show, and that goes on without its reader."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream or open(os.devnull, "w")  # None: the process started without it
        self.failure: OSError | None = None  # of the first write that failed; later text is lost

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.write_raw(_IN_STREAM.sub(_escape, text))
        return len(text)

    def write_raw(self, text: str) -> None:
        """Write control characters, too."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        self._try(self.stream.write, text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def lost(self) -> OSError | None:
        """Return the error that lost text which somebody may still want to read."""
        self.flush()
        return self.failure if self.failure and self.failure.errno not in _NO_READER else None

    def _try(self, do: Callable[..., object], *text: str) -> None:
        try:
            do(*text)
        except OSError as error:
            self.failure, null = self.failure or error, open(os.devnull, "w")
            # What is still buffered is discarded, too: Python would fail on it at its end.
            with suppress(OSError, AttributeError):  # a stream without a file
                os.dup2(null.fileno(), self.stream.fileno())
            self.stream = null


@contextmanager
def console() -> Iterator[None]:
    """Put a ``Stream`` in the place of standard output and of standard error."""
    before = sys.stdout, sys.stderr
    if isinstance(before[0], Stream):
        yield
        return
    sys.stdout, sys.stderr = map(Stream, before)
    try:
        yield
    finally:
        if error := sys.stdout.lost():
            print(f"standard output could not be written ({error})", file=sys.stderr)
        sys.stderr.flush()
        # A process that started without them keeps the streams that discard.
        sys.stdout, sys.stderr = before[0] or sys.stdout, before[1] or sys.stderr


def rewrite_line(text: str, stream: TextIO | Stream) -> None:
    """Put text in the place of the last line of a terminal; "" clears the line."""
    line = f"\r\033[K{printable(text)}"
    stream.write_raw(line) if isinstance(stream, Stream) else stream.write(line)
    stream.flush()
