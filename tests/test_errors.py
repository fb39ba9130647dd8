"""How a command line ends, and what becomes of output that cannot be written."""

import errno
import io
import json
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.folder import RunLog
from utils.errors import UserError, command
from utils.logger import LOGGER, Progress, close_logging, setup_logging
from utils.signals import ENDING

LONG = """
import sys
from utils.errors import command
from utils.logger import LOGGER, setup_logging

@command
def main(argv=None):
    setup_logging()
    LOGGER.info("started")
    for _ in range(20_000):
        LOGGER.info("a message")
    for _ in range(20_000):
        print("a line")
    return 0

sys.exit(main())
"""


@pytest.mark.parametrize("error, status, said", [
    (UserError("a.jpg is no image"), 2, "error: a.jpg is no image\n"),
    (FileNotFoundError(2, "No such file", "a.jpg"), 2, "error: a.jpg: No such file\n"),
    (OSError(28, "No space left on device"), 2, "error: No space left on device\n"),
    (OSError("no more images"), 2, "error: no more images\n"),
    (OSError(), 2, "error: OSError\n"),
    (KeyboardInterrupt(), 130, "interrupted\n")], ids=repr)
def test_a_sentence_and_a_status_take_the_place_of_a_traceback(error, status, said, capsys):
    @command
    def main(argv=None):
        raise error

    assert main([]) == status
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_a_command_as_ctrl_c_does(number, capsys, tmp_path):
    @command
    def main(argv=None):
        with tempfile.TemporaryDirectory(dir=tmp_path):
            signal.raise_signal(number)

    before = signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
    try:
        assert main([]) == 130 and signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert capsys.readouterr() == ("", "interrupted\n") and not [*tmp_path.iterdir()]


def test_a_command_runs_in_a_thread_which_cannot_heed_signals():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(command(lambda argv=None: 0), []).result() == 0


@pytest.mark.parametrize("error", [ZeroDivisionError(), ConnectionResetError(104, "by peer")])
def test_a_fault_of_the_program_keeps_its_traceback_and_a_result_its_status(error):
    @command
    def main(argv=None):
        if argv:
            return 1
        raise error

    assert main(["x"]) == 1
    with pytest.raises(type(error)):
        main([])


def test_who_reads_the_output_may_leave_early():
    program = subprocess.Popen([sys.executable, "-c", LONG], cwd=Path(__file__).parent.parent,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert program.stdout.readline().endswith("started\n")
    program.stdout.close()
    assert (program.stderr.read(), program.wait()) == ("", 0)


NAME = "é 漢 \udce9 \x1b[31m \u202e"
"""Bytes that are not UTF-8, a colour of terminals, and a mark that turns the direction of text."""


@pytest.mark.parametrize("encoding, expected", [
    ("utf-8", r"é 漢 \udce9 \x1b[31m \u202e"), ("cp1252", r"é \u6f22 \udce9 \x1b[31m \u202e"),
    ("ascii", r"\xe9 \u6f22 \udce9 \x1b[31m \u202e")])
def test_what_a_console_cannot_show_is_escaped(encoding, expected, monkeypatch, tmp_path):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])

    @command
    def main(argv=None):
        print(NAME)
        setup_logging(tmp_path / "log")
        LOGGER.info("%s\nand", NAME)
        close_logging()
        raise UserError(f"{NAME}\r\n")

    assert main([]) == 2
    streams[1].flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    printed, logged = out.splitlines()
    assert (printed, logged[9:]) == (expected, rf"{expected}\nand")
    assert err == rf"error: {expected}\r\n" + "\n"
    assert (tmp_path / "log").read_text("utf-8")[9:] == r"é 漢 \udce9 \x1b[31m \u202e\nand" + "\n"


class Gone(io.StringIO):
    """A terminal or file that cannot be written any more."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def isatty(self):
        return True

    def write(self, text):
        raise OSError(self.number, "no")


@pytest.mark.parametrize("stream, status", [
    (None, 0), (Gone(errno.EIO), 0), (Gone(errno.EPIPE), 0), (Gone(errno.ENOSPC), 2),
], ids=["none", "EIO", "EPIPE", "ENOSPC"])  # fmt: skip
def test_a_command_goes_on_without_its_output_and_its_log(stream, status, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    @command
    def main(argv=None):
        for file in (tmp_path / "log", Path("/dev/full")):
            setup_logging(file)
            progress = Progress("epoch 1", 2, every=1)
            progress.update(4, loss=1.5)
            LOGGER.info("a message")
            progress.close()
            close_logging()
        log = RunLog(tmp_path, [])
        log.path.unlink()
        log.path.symlink_to("/dev/full")
        log.add({"epoch": 1})
        log.path.unlink()  # there is room again
        log.add({"epoch": 2})
        print("the end", file=sys.stderr)
        return 0

    assert main([]) == status
    assert (tmp_path / "log").read_text().splitlines()[-1].endswith("a message")
    assert (tmp_path / "log.jsonl").read_text() == '{"epoch": 1}\n{"epoch": 2}\n'


def test_a_resumed_runs_log_is_replaced_whole_or_not_at_all(tmp_path):
    resource = pytest.importorskip("resource")
    log, before = tmp_path / "log.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    history = [{"epoch": epoch} for epoch in range(1000)]
    log.write_text("before\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(UserError, match=f"{log}: cannot be written .*make room"):
            RunLog(tmp_path, history)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert log.read_text() == "before\n" and [*tmp_path.iterdir()] == [log]
    RunLog(tmp_path, history)
    assert [*map(json.loads, log.read_text().splitlines())] == history
