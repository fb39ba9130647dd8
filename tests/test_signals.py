"""Signals as a wish to stop."""

import os
import signal

import pytest
import torch

from utils.checkpoint import load_checkpoint
from utils.signals import ENDING, Interrupted, StopSignal, heeded

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals")


@pytest.mark.parametrize("number", [signal.SIGINT, *ENDING])
def test_the_first_signal_is_answered_and_the_second_does_what_it_did(number, capfd):
    seen = []
    before = signal.signal(number, lambda *_: seen.append(number))
    with StopSignal(gentle=True, told=lambda: "finishing step 7", alone=True) as stop:
        stop.check()
        for _ in range(2):  # the second is a wrapper's copy
            signal.raise_signal(number)
        assert capfd.readouterr().err == "\nfinishing step 7\n" and not seen
        with pytest.raises(Interrupted):
            stop.check()
        stop.asked_at -= 1
        signal.raise_signal(number)
    signal.signal(number, before)
    assert seen == [number]


def test_a_signal_while_a_file_is_read_does_not_make_it_damaged(tmp_path, monkeypatch):
    torch.save({"model": {}}, path := tmp_path / "last.pth")

    def interrupted(*_, **__):
        raise Interrupted

    monkeypatch.setattr(torch, "load", interrupted)
    with pytest.raises(Interrupted):
        load_checkpoint(path)


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)
    assert not stop.asked and signal.SIGTERM in heeded(ENDING)
