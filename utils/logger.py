"""One logger, set up once by the command line; a progress line on a terminal; a log per run."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

LOGGER = logging.getLogger("ssd")


def setup_logging(file: Path | None = None, quiet: bool = False) -> None:
    """Send messages to standard output and, if given, to ``file`` (appended), with the time.

    ``quiet``: drop them, as another process of the job says the same.
    """
    close_logging()
    LOGGER.setLevel(logging.CRITICAL if quiet else logging.INFO)
    LOGGER.propagate = False
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if file is not None:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
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
    """How far a loop of ``total`` steps is: one line that renews itself on a terminal.

    Elsewhere (a file, a pipe) it is a message every ``every`` steps; 0 means none.
    """

    def __init__(self, label: str, total: int, every: int, done: int = 0):
        self.label = label
        self.total = total
        self.every = every
        self.done = self.first = done
        self.images = 0
        self.start = time.monotonic()
        self.live = sys.stdout.isatty() and LOGGER.isEnabledFor(logging.INFO)
        self.shown = 0.0

    def update(self, images: int, **values: float) -> None:
        """One more step, of ``images`` pictures; ``values`` are shown as they are named."""
        self.done += 1
        self.images += images
        now = time.monotonic()
        if self.live and (now - self.shown > 0.1 or self.done == self.total):
            self.shown = now
            sys.stdout.write(f"\r\033[K{self._line(now, values)}")
            sys.stdout.flush()
        elif not self.live and self.every and self.done % self.every == 0:
            LOGGER.info(self._line(now, values))

    def close(self) -> None:
        """Clear the line so that the next message starts clean."""
        if self.live and self.shown:
            sys.stdout.write("\r\033[K")
            sys.stdout.flush()

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
    """``log.jsonl`` of a run: one JSON object a line and epoch, and optionally TensorBoard."""

    def __init__(self, directory: Path, history: list[dict], tensorboard: bool, write: bool = True):
        """Starts from ``history``, the lines of a run that is resumed: later ones are dropped.

        ``write``: False for a process that leaves it to another one.
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
        """Named values; one that is None (a test set without ground truth) is left out."""
        if self.writer is not None:
            for name, value in values.items():
                if value is not None:
                    self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, draw: Callable[[], np.ndarray]) -> None:
        """What ``draw()`` returns, uint8 [H, W, 3] BGR; it is not called where nobody looks."""
        if self.writer is not None:
            self.writer.add_image(name, draw()[:, :, ::-1], step, dataformats="HWC")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
