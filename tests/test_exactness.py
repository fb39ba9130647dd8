"""A run that is interrupted anywhere and resumed ends as if nothing had happened, to the last bit.

Child processes are killed for real; ``-m slow`` does it at many more instants.
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from layouts import LAYOUTS
from program import (
    PATIENCE,
    ROOT,
    assert_same,
    assert_same_run,
    options,
    run,
    start,
    state_of,
    wait_until,
)

import engine.evaluate
import engine.folder
import engine.trainer
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.files import atomic_write

# The run that is interrupted: evaluation, a kept average and kept checkpoints are in it, and its
# last epoch is scored at the very end.
EPOCHS, TESTED = 15, 4
RUN = ["-b", 2, "-max", EPOCHS, "--test_frequency", TESTED, "--save_frequency", 5, "--ema", 0.9]
RUN += ["--lr", 1e-3, "--date", "run"]

# All options that decide what a run learns, and when it ends; None: the option is not given.
DRAWN = {
    "--recipe": ("published", "modern"), "--optimizer": (None, "sgd", "adamw"),
    "--schedule": (None, "steps", "cosine"), "--norm_decay": (None, True, False),
    "--warm_epoch": (None, 0, 2), "--gamma": (None, 0.5), "--momentum": (None, 0.5),
    "--base_lr": (1, 0.1), "--freeze": ("", "base", "base:2", "heads"), "--clip_norm": (0, 5),
    "--ema": (None, 0, 0.9), "--accumulate": (1, 2), "--background_negatives": (0, 9),
    "--jaccard_threshold": (None, 0.4), "--priors": ("VOC", "COCO", "fit"),
    "--expansion": (None, 0),
    "--amp": ("off", "bf16"), "--patience": (0, 4), "--overfit": (0, 0, 6), "--seed": (0, 7),
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture
def train(call):
    """train(name, *options): a short run in this process; returns its status."""

    def train(name: str, *more) -> int:
        return call("-max", 4, "--ema", 0.9, "--test_frequency", 2, "--date", name, *more)

    train.folder = call.folder
    return train


def assert_same_files(a: Path, b: Path) -> None:
    """Two runs of one name left the same files, each with the same content but for times."""
    names = [sorted(str(p.relative_to(r)) for p in r.rglob("*") if p.is_file()) for r in (a, b)]
    # The checkpoint before the last one holds the times of other moments.
    assert [n for n in names[0] if n != "previous.pth"] == [
        n for n in names[1] if n != "previous.pth"
    ]
    for name in set(names[0]) - {"previous.pth", "train.log", "config.json"}:
        one, two = a / name, b / name
        if one.suffix == ".pth":
            assert_same(state_of(one), state_of(two), name)
        elif one.suffix == ".npz":
            with np.load(one) as first, np.load(two) as second:
                assert first.files == second.files
                for key in first.files:
                    np.testing.assert_array_equal(first[key], second[key], name)
        elif name != "log.jsonl":
            assert one.read_bytes() == two.read_bytes(), name
    assert_same_run(a, b)


def draw(seed: int, folder: Path) -> list[object]:
    """Print and return options of training at random, and data in one of four layouts."""
    rng = np.random.default_rng(seed)
    drawn = {name: values[rng.integers(len(values))] for name, values in DRAWN.items()}
    more = [f"{name}={value}" for name, value in drawn.items() if value is not None]
    more += ["--lr=1e-3", "--weight_decay=0.01"]
    layout = LAYOUTS[("voc", "coco", "yolo-list", "cvat")[seed % 4]]
    layout.write(folder)
    if layout.dataset == "COCO":
        more += [f"--crowds={rng.choice(['true', 'false'])}"]
        for path in folder.glob("annotations/*.json"):
            path.write_text(path.read_text().replace('"iscrowd": 0', '"iscrowd": 1', 2))
    print("seed", seed, *more, "-d", layout.dataset)
    return [*more, "-d", layout.dataset, "--root", folder]


def checkpoints(folder: Path) -> list[int]:
    """The steps of what --resume can go on from; every such file is whole."""
    paths = [folder / name for name in ("last.pth", "previous.pth")]
    return [load_checkpoint(path)["step"] for path in paths if path.exists()]


# ---------------------------------------------------------------- killed anywhere


def test_a_run_that_has_ended_stays_as_it_is_when_it_is_asked_to_go_on(train, capsys):
    assert train("run") == 0
    final = train.folder / "run" / "Final_tiny_VOC.pth"
    before = state_of(final)
    assert train("run", "--resume", "auto") == 0
    told = f"all {before['step']} steps are trained; a higher --max_epoch or --max_iters trains on"
    assert told in capsys.readouterr().out
    assert_same(before, state_of(final), "state")


class Interruptions:
    """One run that is interrupted again and again, and goes on by ``--resume auto`` each time."""

    def __init__(self, folder: Path, epochs: int, seed: int):
        self.epochs, self.drawn = epochs, draw(seed, folder / "data")
        self.rng = np.random.default_rng(seed)
        self.caches = ["off", "memory", str(folder / "pictures")]
        self.straight = folder / "straight" / "tiny_300" / "run"
        self.broken = folder / "broken" / "tiny_300" / "run"
        self.log = self.broken / "train.log"
        self.phases = Counter()
        before = time.monotonic()
        process = start(self.arguments("straight"))
        wait_until(lambda: self._begun(self.straight / "train.log"), process)
        self.start_up = time.monotonic() - before
        _, error = process.communicate(timeout=4 * PATIENCE)
        assert process.returncode == 0, error
        self.training = time.monotonic() - before - self.start_up

    def arguments(self, name: str, *more) -> list[str]:
        folder = self.straight.parents[2] / name
        return options("", folder, *RUN, "-max", self.epochs, *self.drawn, *more)

    def start(self, *more) -> subprocess.Popen:
        """The run in a new process, in which all that may not matter is chosen at random."""
        self.begin = self.log.stat().st_size if self.log.exists() else 0
        self.saved = max(checkpoints(self.broken), default=0)
        machine = ["--num_workers", self.rng.integers(4), "--cache", self.rng.choice(self.caches)]
        return start(self.arguments("broken", "--resume", "auto", *machine, *more))

    @staticmethod
    def _begun(log: Path, begin: int = 0) -> bool:
        return log.exists() and b"a step: " in log.read_bytes()[begin:]

    def begun(self) -> bool:
        """Whether the process trains, or has trained."""
        return self._begun(self.log, self.begin)

    def signal(self, process: subprocess.Popen, number: int) -> None:
        """Send a signal, as it comes, and look at what is left."""
        was_up = self.begun()
        os.killpg(process.pid, number)
        _, error = process.communicate(timeout=PATIENCE)
        phase = self._phase()
        self.phases[f"{signal.Signals(number).name} {phase}"] += 1
        if number == signal.SIGKILL:
            assert process.returncode in (0, -number)
        elif was_up:
            assert process.returncode in ((0, -number) if phase == "end" else (0, 130)), error
        assert max(checkpoints(self.broken), default=0) >= self.saved

    def _phase(self) -> str:
        if not self.begun():
            return "start-up"
        if self._saving():
            return "saving"
        lines = [line[9:] for line in self.log.read_bytes()[self.begin :].decode().splitlines()]
        line = lines[-1]
        if any(line.startswith("done: ") for line in lines):
            return "end"
        if line.startswith("epoch"):
            epoch = int(line.split()[1].rstrip(":"))
            return "evaluation" if not epoch % TESTED or epoch == self.epochs else "training"
        return "training"

    def _saving(self) -> bool:
        return any(self.broken.glob("*.part"))

    def at_random(self, kills: int) -> None:
        """``kills`` signals, each at an instant of the life of a process that chance chooses."""
        reach, sent = 1.3 * self.training / kills, 0
        while sent < kills:
            hours = self.rng.choice([0, 0, self.training / 3600 / kills])
            process = self.start("--max_hours", hours)
            early = self.rng.random() < 0.2
            if not early:
                wait_until(self.begun, process)
            delay = self.rng.uniform(0, self.start_up if early else reach)
            try:
                process.wait(delay)
            except subprocess.TimeoutExpired:
                kinds = [signal.SIGTERM, signal.SIGINT] * (not hours) + [signal.SIGKILL] * 3
                self.signal(process, int(self.rng.choice(kinds)))
                sent += 1
            else:  # the run has ended, and is asked to go on all the same, or its time is over
                _, error = process.communicate()
                assert process.returncode == 0, error
                self.phases["no signal"] += 1

    def in_savings(self, kills: int) -> None:
        """Kill until ``kills`` times a checkpoint was being written."""
        for _ in range(6 * kills):
            process = self.start()
            wait_until(self.begun, process)
            skip = self.rng.integers(5)  # savings
            while skip and process.poll() is None:
                while not self._saving() and process.poll() is None:
                    pass
                while self._saving() and process.poll() is None:
                    pass
                skip -= 1
            while not self._saving() and process.poll() is None:
                pass
            if process.poll() is None:
                self.signal(process, signal.SIGKILL)
            else:
                process.communicate()
            if self.phases["SIGKILL saving"] >= kills:
                return
        raise AssertionError(f"hit only {self.phases}")

    def finish(self) -> None:
        process = self.start()
        _, error = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, error
        print(*(f"{count} x {phase}" for phase, count in sorted(self.phases.items())), sep=", ")
        assert not list(self.broken.rglob("*.part"))
        assert_same_files(self.straight, self.broken)


@pytest.mark.parametrize(("length", "kills", "savings", "seed"), [
    (1, 3, 1, 0), *(pytest.param(2, 12, 2, seed, marks=pytest.mark.slow) for seed in range(1, 5)),
])
def test_run_interrupted_at_random_instants_ends_like_a_straight_one(
    tmp_path, length, kills, savings, seed
):
    interruptions = Interruptions(tmp_path, length * EPOCHS, seed)
    interruptions.at_random(kills)
    interruptions.in_savings(savings)
    interruptions.finish()


# ---------------------------------------------------------------- files that are damaged, or full


KILLED = """
import os, signal, sys
from pathlib import Path
from utils.files import atomic_write

calls = 0
def dying(call):
    def wrapped(*arguments):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*arguments)
        print(call.__name__, flush=True)
        return result
    return wrapped

path = Path(sys.argv[1])
for name in ("fsync", "replace"):
    setattr(os, name, dying(getattr(os, name)))
with atomic_write(path, path.with_name("previous")) as file:
    file.write(b"new" * 100_000)
"""


def test_file_killed_at_any_instant_of_its_writing_leaves_a_whole_one(tmp_path):
    old, new, left = b"old" * 100_000, b"new" * 100_000, []
    for instant in range(1, 6):
        folder = tmp_path / str(instant)
        folder.mkdir()
        (folder / "file").write_bytes(old)
        command = [sys.executable, "-c", KILLED, str(folder / "file"), str(instant)]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                                 timeout=PATIENCE)
        found = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".part"}
        assert set(found.values()) <= {old, new}
        left.append((process.returncode, found.get("file"), found.get("previous")))
    assert process.stdout.split() == ["fsync", "replace", "replace", "fsync"]
    killed = -signal.SIGKILL
    assert left == [(killed, old, None), (killed, old, None), (killed, None, old),
                    (killed, new, old), (0, new, old)]


@pytest.mark.parametrize("failing", [1, 2])
def test_file_that_cannot_be_renamed_leaves_the_earlier_one(tmp_path, monkeypatch, failing):
    path, previous = tmp_path / "file", tmp_path / "previous"
    path.write_text("old")
    replace, calls = os.replace, []

    def fail(*names):
        calls.append(names)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")
        replace(*names)

    monkeypatch.setattr(os, "replace", fail)
    with (pytest.raises(UserError, match="No space left on device"),
          atomic_write(path, previous) as f):
        f.write(b"new")
    (kept,) = tmp_path.iterdir()
    assert kept.name == ("file" if failing == 1 else "previous")
    assert kept.read_text() == "old"


DAMAGE = {
    "cut off": lambda data: data[: len(data) // 2],
    "a bit": lambda data: data[:-30_000] + bytes([data[-30_000] ^ 4]) + data[-29_999:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_put_aside_for_the_one_before(train, damage, capsys):
    assert train("straight") == 0
    assert train("broken", "--max_iters", 7) == 0
    last = train.folder / "broken" / "last.pth"
    damaged = DAMAGE[damage](last.read_bytes())
    last.write_bytes(damaged)
    assert train("broken", "--resume", str(last)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {last} is damaged")
    assert error.count("\n") == 1

    assert train("broken", "--resume", "auto") == 0
    output = capsys.readouterr().out
    assert "last.pth is damaged" in output
    assert "it is last.pth.damaged now" in output
    assert "previous.pth is taken" in output
    assert (last.parent / "last.pth.damaged").read_bytes() == damaged
    assert_same_run(train.folder / "straight", train.folder / "broken")


def test_run_whose_checkpoints_are_both_damaged_says_so(train, capsys):
    assert train("a", "--max_iters", 7) == 0
    for name in ("last.pth", "previous.pth"):
        (train.folder / "a" / name).write_bytes(b"nothing")
    assert train("a", "--resume", "auto") == 2
    assert "previous.pth is damaged" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="no limit of a file's size")
def test_full_disk_ends_the_run_in_a_sentence_and_it_goes_on_exactly(voc_folder, tmp_path, train):
    import resource

    assert train("straight") == 0
    assert train("full", "--max_iters", 6) == 0
    last = train.folder / "full" / "last.pth"
    good, limit = last.read_bytes(), last.stat().st_size // 2

    def no_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    more = ["-b", 2, "-max", 4, "--num_workers", 0, "--ema", 0.9, "--test_frequency", 2]
    arguments = options(voc_folder, tmp_path / "w", *more, "--date", "full", "--resume", "auto")
    status, output, error = run(arguments, preexec_fn=no_room)
    assert status == 2, error
    assert error.startswith("error: ")
    assert "last.pth: cannot be written" in error
    assert "make room" in error
    assert error.count("\n") == 1
    assert last.read_bytes() == good
    assert not list(last.parent.glob("*.part"))
    assert train("full", "--resume", "auto") == 0
    assert_same_run(train.folder / "straight", train.folder / "full")


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow)
                                               for seed in range(3, 40))])
def test_options_of_training_at_random_are_exact_on_resume(train, tmp_path, monkeypatch, seed):
    rng, more = np.random.default_rng(seed), draw(seed, tmp_path / "data")
    assert train("straight", *more) == 0
    last = train.folder / "broken" / "last.pth"
    for hours in rng.uniform(0, 4, 2):
        now = itertools.count(0, 600).__next__  # every look at the clock takes ten minutes
        with monkeypatch.context() as patch:
            patch.setattr(engine.trainer, "time", SimpleNamespace(monotonic=now))
            late = [f"--max_hours={hours}", "--save_minutes=0", "--resume=auto"]
            assert train("broken", *more, *late) == 0
    assert last.with_name("train.log").read_text().count(f"--resume {last}") == 2
    assert 2 <= load_checkpoint(last)["step"] < 12
    assert train("broken", *more, "--resume", "auto") == 0
    assert_same_run(train.folder / "straight", train.folder / "broken")


# ---------------------------------------------------------------- the best, and what does not count


def scored(monkeypatch, scores):
    """Let the evaluation of epoch n + 1 give ``scores[n]``."""
    def score(dataset, detections, origin, directory, scoring):
        epoch = directory.parent.name.removeprefix("epoch_")
        value = None if epoch == "final" else scores[int(epoch) - 1]
        return {"metric": "AP", "value": value, "per_class": {}}

    monkeypatch.setattr(engine.evaluate, "score", score)


def test_best_checkpoint_is_that_of_the_first_of_the_best_scores(train, monkeypatch):
    scored(monkeypatch, [0.2, 0.5, 0.5, None, 0.6, 0.3])
    common = ("-max", 6, "--test_frequency", 1, "--save_frequency", 1)
    found = []
    for stop in range(3, 19, 3):
        assert train("a", *common, "--max_iters", stop, "--resume", "auto") == 0
        best = load_checkpoint(train.folder / "a" / "best.pth")
        found.append((best["step"], best["best"]["value"]))
    assert found == [(3, 0.2), (6, 0.5), (6, 0.5), (6, 0.5), (15, 0.6), (15, 0.6)]
    kept = load_checkpoint(train.folder / "a" / "tiny_VOC_epoches_5.pth")
    assert_same(best["model"], kept["model"], "model")


def test_a_run_without_gain_ends_at_the_same_step_however_it_is_resumed(train, monkeypatch):
    scored(monkeypatch, [0.2, 0.5, 0.5, 0.4, 0.6, 0.7])
    common = ("-max", 6, "--test_frequency", 1)
    ends = {}
    for patience in (0, 1, 2, 3):
        assert train(f"p{patience}", *common, "--patience", patience) == 0
        final = load_checkpoint(train.folder / f"p{patience}" / "Final_tiny_VOC.pth")
        ends[patience] = final["step"] // 3, final["best"]["value"]
    assert ends == {0: (6, 0.7), 1: (3, 0.5), 2: (4, 0.5), 3: (6, 0.7)}
    for stop in (3, 9, 12, None, None):
        more = ("--max_iters", stop) if stop else ()
        assert train("again", *common, "--patience", 2, *more, "--resume", "auto") == 0
    assert load_checkpoint(train.folder / "again" / "Final_tiny_VOC.pth")["step"] == 12
    assert_same_run(train.folder / "p2", train.folder / "again")


@pytest.mark.parametrize(("workers", "cache"), [(1, "off"), (2, "memory"), (3, "folder")])
def test_number_of_loading_processes_and_cache_change_nothing(train, tmp_path, workers, cache):
    where = str(tmp_path / "pictures") if cache == "folder" else cache
    assert train("straight") == 0
    assert train("other", "--num_workers", workers, "--cache", where) == 0
    assert_same_run(train.folder / "straight", train.folder / "other")


def test_checkpoints_by_the_minute_lie_inside_epochs_and_are_exact(train, monkeypatch):
    assert train("straight") == 0
    now, steps = [0.0], []

    def monotonic() -> float:
        now[0] += 61
        return now[0]

    def keep(path, state, previous=None):
        save(path, state, previous)
        if path.name == "last.pth":
            steps.append(state["step"])
            shutil.copy(path, train.folder / f"{state['step']}.pth")

    save = engine.folder.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(engine.folder, "save_checkpoint", keep)
        patch.setattr(engine.trainer, "time", SimpleNamespace(monotonic=monotonic))
        assert train("a", "--save_minutes", 1) == 0
    assert sorted(set(steps)) == list(range(1, 13))
    assert_same_run(train.folder / "straight", train.folder / "a")
    for step in (1, 5, 11):
        there = train.folder / f"from_{step}"
        there.mkdir()
        shutil.copy(train.folder / f"{step}.pth", there / "last.pth")
        shutil.copy(train.folder / "a" / "config.json", there)
        assert train(there.name, "--resume", str(there / "last.pth")) == 0
        assert_same_run(train.folder / "straight", there)
