"""How a command line ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from utils.errors import UserError, command

LONG = """
import sys
from utils.errors import command

@command
def main(argv=None):
    for _ in range(100_000):
        print("a line")
    return 0

sys.exit(main())
"""


@pytest.mark.parametrize(
    "error, status, said",
    [
        (UserError("a.jpg is no picture"), 2, "error: a.jpg is no picture\n"),
        (FileNotFoundError(2, "No such file", "a.jpg"), 2, "error: a.jpg: No such file\n"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device\n"),
        (OSError("no more pictures"), 2, "error: no more pictures\n"),
        (OSError(), 2, "error: OSError\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=repr,
)
def test_a_sentence_and_a_status_take_the_place_of_a_traceback(error, status, said, capsys):
    @command
    def main(argv=None):
        raise error

    assert main([]) == status
    assert capsys.readouterr() == ("", said)


def test_a_fault_of_the_program_keeps_its_traceback_and_a_result_its_status():
    @command
    def main(argv=None):
        return 1 // len(argv)

    assert main(["x"]) == 1
    with pytest.raises(ZeroDivisionError):
        main([])


@pytest.mark.parametrize("unbuffered", [(), ("-u",)], ids=str)
def test_who_reads_the_output_may_leave_early(unbuffered):
    program = subprocess.Popen(
        [sys.executable, *unbuffered, "-c", LONG],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout.readline() == "a line\n"
    program.stdout.close()
    assert program.stderr.read() == ""
    assert program.wait() == 0
