"""The logger, which a command line sets up, and a progress line on a terminal."""

import logging
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from utils.console import printable, rewrite_line

LOGGER = logging.getLogger("ssd")


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _LogFile(logging.FileHandler):
    """A log file; the program goes on where it cannot be written, as on a full disk."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.told:
            self.told = True
            print(f"{self.baseFilename} cannot be written ({sys.exc_info()[1]}); the program goes "
                  "on, make room", file=sys.stderr)


def setup_logging(file: Path | None = None, quiet: bool = False) -> None:
    """Send messages with the time to standard output and, if given, to the end of ``file``.

    Args:
        quiet: drop them, because another process of the job sends the same.
    """
    close_logging()
    LOGGER.setLevel(logging.CRITICAL if quiet else logging.INFO)
    LOGGER.propagate = False
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if file is not None:
        handlers.append(_LogFile(file, encoding="utf-8", errors="backslashreplace"))
    for handler in handlers:
        handler.setFormatter(_Line("%(asctime)s %(message)s", "%H:%M:%S"))
        LOGGER.addHandler(handler)


def close_logging() -> None:
    """Undo ``setup_logging``."""
    LOGGER.setLevel(logging.NOTSET)
    LOGGER.propagate = True
    for handler in LOGGER.handlers[:]:
        LOGGER.removeHandler(handler)
        with suppress(OSError):  # what the file still lacks cannot be written either
            handler.close()


class Progress:
    """The progress of a loop of ``total`` steps.

    On a terminal one line is rewritten. In a file or a pipe a message follows every ``every``
    steps; 0: none.
    """

    def __init__(self, label: str, total: int, every: int, done: int = 0) -> None:
        self.label, self.total, self.every = label, total, every
        self.done = self.first = done
        self.images, self.shown, self.start = 0, 0.0, time.monotonic()
        self.live = sys.stdout.isatty() and LOGGER.isEnabledFor(logging.INFO)

    def update(self, images: int, **values: float) -> None:
        """Count one more step of ``images`` images; show ``values`` by their names."""
        self.done += 1
        self.images += images
        now = time.monotonic()
        if self.live and (now - self.shown > 0.1 or self.done == self.total):
            self.shown = now
            rewrite_line(self._line(now, values), sys.stdout)
        elif not self.live and self.every and self.done % self.every == 0:
            LOGGER.info(self._line(now, values))

    def close(self) -> None:
        """Clear the line for the next message."""
        if self.live and self.shown:
            rewrite_line("", sys.stdout)

    def images_per_second(self) -> float:
        return self.images / max(time.monotonic() - self.start, 1e-9)

    def _line(self, now: float, values: Mapping[str, float]) -> str:
        left = (self.total - self.done) * (now - self.start) / (self.done - self.first)
        shown = "".join(f"  {name} {value:.4g}" for name, value in values.items())
        return (f"{self.label} {self.done}/{self.total}{shown}  {self.images_per_second():.1f} "
                f"img/s  ETA {int(left) // 60}:{int(left) % 60:02d}")
