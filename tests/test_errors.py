"""How a command line ends, and what becomes of output that cannot be written."""

import errno
import io
import subprocess
import sys
from pathlib import Path

import pytest

from utils.errors import UserError, command
from utils.logger import LOGGER, Progress, close_logging, setup_logging

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
    (KeyboardInterrupt(), 130, "interrupted\n"),
], ids=repr)
def test_a_sentence_and_a_status_take_the_place_of_a_traceback(error, status, said, capsys):
    @command
    def main(argv=None):
        raise error

    assert main([]) == status
    assert capsys.readouterr() == ("", said)


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


def test_text_beyond_the_encoding_of_the_console_is_escaped(monkeypatch, tmp_path):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline="")
    monkeypatch.setattr(sys, "stdout", console)
    text = "é 漢 \udce9"  # the last one is of a file name that is not UTF-8

    @command
    def main(argv=None):
        print(text)
        setup_logging(tmp_path / "log")
        LOGGER.info(text)
        close_logging()
        return 0

    assert main([]) == 0
    printed, logged = console.buffer.getvalue().decode("cp1252").splitlines()
    assert printed == logged[9:] == r"é \u6f22 \udce9"
    assert (tmp_path / "log").read_text("utf-8")[9:] == "é 漢 \\udce9\n"


class Gone(io.StringIO):
    """A terminal that was closed."""

    def isatty(self):
        return True

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")


def test_a_program_goes_on_without_its_terminal(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "stdout", Gone())
    setup_logging(tmp_path / "log")
    progress = Progress("epoch 1", 2, every=1)
    progress.update(4, loss=1.5)
    LOGGER.info("a message")
    progress.update(4, loss=1.25)
    progress.close()
    close_logging()
    assert capsys.readouterr().err == ""
    assert [line[9:] for line in (tmp_path / "log").read_text().splitlines()][0] == "a message"
