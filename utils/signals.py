"""Ctrl-C, SIGTERM and a closed terminal as a wish that a loop reads where it can stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What ends a program, by itself or (not on Windows) with its terminal."""
# A wrapper such as timeout hands a terminal's Ctrl-C on to processes that have received it
# themselves; the launcher of a job of several processes does, too, but later.
ALONE_SECONDS, SAME_SIGNAL_SECONDS = 0.3, 3


class Interrupted(BaseException):
    """Raised when a loop stops because of a signal. Not an error that a reader may catch."""


class TimeUp(Interrupted):
    """Raised when a loop stops because its time is over."""


def heeded(numbers: tuple[signal.Signals, ...]) -> list[signal.Signals]:
    """Leave out SIGHUP where it is ignored, as under nohup."""
    return [n for n in numbers
            if n.name != "SIGHUP" or signal.getsignal(n) is not signal.SIG_IGN]


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise ``Interrupted`` in the block when SIGTERM or SIGHUP comes, so that it cleans up.

    Only the main thread can: in another one these signals do what they did.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, _interrupt) for n in (heeded(ENDING) if is_main else ())}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _interrupt(number: int, _: FrameType | None) -> None:
    raise Interrupted


class StopSignal:
    """Context in which the first SIGINT, SIGTERM or SIGHUP sets ``asked``.

    A second signal, after three seconds, or 0.3 if the process is ``alone``, ends the process at
    once, or with ``gentle`` does what it did before the context: Ctrl-C raises KeyboardInterrupt,
    which closes files. ``told`` returns the answer to the first one, for standard error. A SIGHUP
    that was ignored before stays ignored.
    """

    def __init__(self, gentle: bool = False, told: Callable[[], str] | None = None,
                 alone: bool = False) -> None:
        self.gentle = gentle
        self.told = told
        self.same = ALONE_SECONDS if alone else SAME_SIGNAL_SECONDS
        self.asked_at: float | None = None

    @property
    def asked(self) -> bool:
        return self.asked_at is not None

    def check(self) -> None:
        """Raise ``Interrupted`` if a signal arrived."""
        if self.asked:
            raise Interrupted

    def __enter__(self) -> StopSignal:
        numbers = heeded((signal.SIGINT, *ENDING))
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
            if self.told:
                with suppress(OSError):  # no print: the signal may have come within one
                    os.write(2, f"\n{self.told()}\n".encode())
        elif now - self.asked_at > self.same:
            signal.signal(number, self._before[number] if self.gentle else signal.SIG_DFL)
            signal.raise_signal(number)
