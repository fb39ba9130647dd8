"""The logger, which a command line sets up; a progress line on a terminal; the log of a run."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from utils.console import accept_any_text, discard_output

LOGGER = logging.getLogger("ssd")


class _Console(logging.StreamHandler):
    """Messages on standard output; the program goes on when nobody reads them any more."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            discard_output()
        else:
            super().handleError(record)


def setup_logging(file: Path | None = None, quiet: bool = False) -> None:
    """Send messages with the time to standard output and, if given, to the end of ``file``.

    Args:
        quiet: drop them, because another process of the job sends the same.
    """
    close_logging()
    accept_any_text()
    LOGGER.setLevel(logging.CRITICAL if quiet else logging.INFO)
    LOGGER.propagate = False
    handlers: list[logging.Handler] = [_Console(sys.stdout)]
    if file is not None:
        handlers.append(logging.FileHandler(file, encoding="utf-8", errors="backslashreplace"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        LOGGER.addHandler(handler)


def close_logging() -> None:
    """Undo ``setup_logging``."""
    LOGGER.setLevel(logging.NOTSET)
    LOGGER.propagate = True
    for handler in LOGGER.handlers[:]:
        LOGGER.removeHandler(handler)
        handler.close()


class Progress:
    """The progress of a loop of ``total`` steps.

    On a terminal one line is rewritten. In a file or a pipe a message follows every ``every``
    steps; 0: none.
    """

    def __init__(self, label: str, total: int, every: int, done: int = 0) -> None:
        self.label = label
        self.total = total
        self.every = every
        self.done = self.first = done
        self.images = 0
        self.start = time.monotonic()
        self.live = sys.stdout.isatty() and LOGGER.isEnabledFor(logging.INFO)
        self.shown = 0.0

    def update(self, images: int, **values: float) -> None:
        """Count one more step of ``images`` images; show ``values`` by their names."""
        self.done += 1
        self.images += images
        now = time.monotonic()
        if self.live and (now - self.shown > 0.1 or self.done == self.total):
            self.shown = now
            self._rewrite(self._line(now, values))
        elif not self.live and self.every and self.done % self.every == 0:
            LOGGER.info(self._line(now, values))

    def close(self) -> None:
        """Clear the line for the next message."""
        if self.live and self.shown:
            self._rewrite("")

    def _rewrite(self, text: str) -> None:
        try:
            sys.stdout.write(f"\r\033[K{text}")
            sys.stdout.flush()
        except OSError:  # the terminal was closed
            discard_output()
            self.live = False

    def images_per_second(self) -> float:
        return self.images / max(time.monotonic() - self.start, 1e-9)

    def _line(self, now: float, values: Mapping[str, float]) -> str:
        left = (self.total - self.done) * (now - self.start) / (self.done - self.first)
        shown = "".join(f"  {name} {value:.4g}" for name, value in values.items())
        return (
            f"{self.label} {self.done}/{self.total}{shown}"
            f"  {self.images_per_second():.1f} img/s  ETA {int(left) // 60}:{int(left) % 60:02d}"
        )


class RunLog:
    """The file ``log.jsonl`` of a run, one JSON object per epoch, and optionally TensorBoard."""

    def __init__(self, directory: Path, history: list[dict], tensorboard: bool,
                 write: bool = True) -> None:
        """Open the log of a run.

        Args:
            history: the lines of a resumed run; later lines of the file are dropped.
            write: False in a process that leaves the log to another one.
        """
        self.path = directory / "log.jsonl" if write else None
        self.writer = None
        if self.path:
            self.path.write_text("".join(f"{json.dumps(line)}\n" for line in history))
        if self.path and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(directory / "tensorboard")

    def add(self, record: dict) -> None:
        if self.path:
            with open(self.path, "a") as file:
                file.write(f"{json.dumps(record)}\n")

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Send named values to TensorBoard, but for None (a test set without ground truth)."""
        if self.writer is not None:
            for name, value in values.items():
                if value is not None:
                    self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, draw: Callable[[], np.ndarray]) -> None:
        """Send the image that ``draw()`` returns, uint8 [H, W, 3] BGR, to TensorBoard.

        Without TensorBoard it is not called.
        """
        if self.writer is not None:
            self.writer.add_image(name, draw()[:, :, ::-1], step, dataformats="HWC")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
