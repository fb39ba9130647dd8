"""train_test.py as a program of its own, with the tiny network among its versions.

Beside it, how tests start it, wait for it and compare what it leaves.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tiny
import torch

from engine.distributed import end
from train_test import main
from utils.checkpoint import load_checkpoint

ROOT = Path(__file__).parent.parent
# The machine may be busy; what hangs is noticed all the same.
PATIENCE = 300
TIMINGS = {"seconds", "images_per_second", "waiting_for_data", "waited"}


def options(data: Path, folder: Path, *more: object) -> list[str]:
    """Arguments of a training run of the tiny network on the CPU."""
    common = ["-d", "VOC", "-v", "tiny", "-s", 300, "--root", data, "--save_folder", folder]
    return list(map(str, [*common, "--device", "cpu", "--log_iters", 0, *more]))


def torchrun(processes: int, restarts: int = 0) -> list[str]:
    """The command that starts this program's arguments as a job of several processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(processes), "--max-restarts", str(restarts), __file__]  # fmt: skip


@contextmanager
def locked_elsewhere(path: Path) -> Iterator[None]:
    """Let another process hold the lock ``path`` to the end of the block."""
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from utils.files import locked\n"
         "with locked(sys.argv[1], ''): print('held', flush=True); sys.stdin.read()", str(path)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    try:
        yield
    finally:
        holder.communicate("")


def start(arguments: Sequence[str], command: Sequence[str] = (), **how) -> subprocess.Popen:
    """``arguments`` of this program as a process group of its own, its output in pipes."""
    return subprocess.Popen(
        [*(command or (sys.executable, __file__)), *arguments], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True, **how,
    )


def run(arguments: Sequence[str], command: Sequence[str] = (), **how) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the program."""
    process = start(arguments, command, **how)
    output, error = process.communicate(timeout=PATIENCE)
    return process.returncode, output, error


def wait_until(happened: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait for something that ``process`` will do."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def epochs_done(run: Path) -> int:
    log = run / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def state_of(path: Path) -> dict:
    """A checkpoint without what may differ between equal runs."""
    state = load_checkpoint(path)
    # The one has the number of loading processes. From the other, whose numbers nothing uses,
    # PyTorch's loader draws at every start.
    del state["config"], state["rng"]
    return state


def assert_same_run(a: Path, b: Path) -> None:
    """Two runs ended in the same state to the last bit, and their logs say the same."""
    first, second = (state_of(next(run.glob("Final_tiny_*.pth"))) for run in (a, b))
    assert_same(first, second, "state")
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
            for run in (a, b)]  # fmt: skip
    assert_same(*logs, "log")


def assert_same(a, b, where: str) -> None:
    """Equality to the last bit of anything that a checkpoint holds, but for times."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - TIMINGS:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}.{number}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


if __name__ == "__main__":
    tiny.register()
    end(main())
