"""Ctrl-C and SIGTERM as a wish that a loop reads where it can stop."""

from __future__ import annotations

import signal
import time
from types import FrameType

# A launcher hands a terminal's Ctrl-C on to processes that have received it themselves.
SAME_SIGNAL_SECONDS = 3


class Interrupted(Exception):
    """Raised when a loop stops because of SIGINT or SIGTERM."""


class StopSignal:
    """Context in which the first SIGINT or SIGTERM sets ``asked``.

    A second signal, after at least three seconds, ends the process at once, or with ``gentle`` does
    what it did before the context: Ctrl-C raises KeyboardInterrupt, which closes files.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, gentle: bool = False) -> None:
        self.gentle = gentle
        self.asked_at: float | None = None

    @property
    def asked(self) -> bool:
        return self.asked_at is not None

    def check(self) -> None:
        """Raise ``Interrupted`` if a signal arrived."""
        if self.asked:
            raise Interrupted

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
        elif now - self.asked_at > SAME_SIGNAL_SECONDS:
            signal.signal(number, self._before[number] if self.gentle else signal.SIG_DFL)
            signal.raise_signal(number)
