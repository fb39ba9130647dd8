"""Jobs of several processes, run for real: they train, test, fail and stop like one.

As a program of its own (``launch`` starts it so) this file does what ``PARTS`` and ``runs`` list,
one after the other, and saves the results in a folder.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from subprocess import Popen

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import write_voc
from program import (
    PATIENCE,
    assert_same,
    assert_same_run,
    epochs_done,
    options,
    start,
    torchrun,
    wait_until,
)
from program import __file__ as PROGRAM
from tiny import PLAIN, TINY, register
from torch import nn

import engine.job
import models
import train_test
from data.config import VOC_300
from data.loading import EpochSampler
from engine.distributed import (
    SINGLE_PROCESS,
    RankZeroFailed,
    World,
    check_shares,
    check_sync_bn,
    is_lost_connection,
    join,
    launch,
    leave,
)
from engine.job import run_job
from engine.steps import TrainStep
from layers import MultiBoxLoss, PriorBox
from models import build_net
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.files import load_arrays

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
SIZE = 2
"""Processes of a job."""

# ---------------------------------------------------------------- what the processes of a job do


class InDouble(nn.Module):
    """A network of float64 weights on the images of the training loop, which are float32."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images.double())


def train_in_double(world: World, accumulate: int) -> dict:
    """Losses and weights of 4 steps without batch normalisation."""
    torch.manual_seed(0)
    net = build_net("plain", 300, 3).double()
    net.L2Norm = nn.Identity()  # it computes in float32
    forward = world.replicate(InDouble(net), torch.device("cpu"))
    rng = np.random.default_rng(1)
    images = torch.from_numpy(rng.integers(0, 255, (8, 3, 300, 300), np.uint8))
    corners = torch.from_numpy(rng.uniform(0, 0.6, (8, 3, 2)).astype(np.float32))
    sides = torch.from_numpy(rng.uniform(0.1, 0.4, (8, 3, 2)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(1, 3, (8, 3, 1)).astype(np.float32))
    targets = torch.cat([corners, corners + sides, labels], 2)
    sampler = EpochSampler(8, 4, 0, world.rank, world.size, accumulate)

    optimizer = torch.optim.SGD(net.parameters(), 4e-3, momentum=0.9, weight_decay=5e-4)
    priors = PriorBox(VOC_300)()
    step = TrainStep(forward, MultiBoxLoss(3), priors, optimizer, clip_norm=20.0, world=world)
    losses, parts = [], []
    for epoch in range(2):
        sampler.set_epoch(epoch, 0)
        for keys in sampler:
            indices = [index for _, index in keys]
            # An unequal number of boxes, and images without any.
            parts.append((images[indices], [targets[i, : i % 4] for i in indices], indices))
            if len(parts) == accumulate:
                losses.append(step(parts, 1e-3 if len(losses) < 2 else 4e-3).results())
                parts = []
    return {"losses": losses, "model": net.state_dict()}


COUNTS = [[], [4], [0], [2, 0, 3], [0, 0, 0], [1, 2, 0, 4, 0, 2, 1]]


def detections(counts: list[int]) -> list[dict[str, np.ndarray]]:
    """Some detections of each of several images."""
    rng = np.random.default_rng(len(counts))
    return [{"boxes": rng.random((n, 4), np.float32), "scores": rng.random(n, np.float32),
             "labels": rng.integers(1, 1 << 40, n)} for n in counts]


def as_tensors(found: list[dict[str, np.ndarray]]) -> list[dict[str, torch.Tensor]]:
    return [{k: torch.from_numpy(v.copy()) for k, v in d.items()} for d in found]


def collect(world: World) -> list:
    collected = []
    for counts in COUNTS:
        all_of_them = detections(counts)
        mine = [all_of_them[i] for i in world.share_of(len(counts))]
        found = world.collect(mine, len(counts))
        collected.append(found and as_tensors(found))
    return collected


def agree(world: World) -> dict:
    """What each process gets when rank 0 decides, and when something goes wrong."""
    calls = []

    def fail(on: int):
        calls.append(on)
        if world.rank == on:
            raise ValueError(f"wrong on {on}")
        return on

    def outcome(do, *arguments):
        try:
            return do(*arguments)
        except (ValueError, RankZeroFailed) as error:
            return f"{type(error).__name__} {error}"

    return {"value": world.decide(lambda: ["ü 東", world.rank, None]),
            "none": world.decide(lambda: None), "failed": outcome(world.decide, lambda: fail(0)),
            "turn": outcome(world.in_turn, lambda: fail(world.size - 1)),
            "first": outcome(world.in_turn, lambda: fail(0)), "calls": calls,
            "sum": world.sum(torch.tensor([world.rank, 1.0])).tolist()}


PARTS = {
    "whole": lambda world: train_in_double(world, 1),
    "accumulated": lambda world: train_in_double(world, 2), "collect": collect, "agree": agree,
}


LONG = ["-b", 4, "-max", 10, "--num_workers", 1, "--ema", 0.9]
LONG += ["--test_frequency", 5, "--save_frequency", 5]
SHORT = ["-v", "plain", "-b", 4, "-max", 2, "--lr", 1e-4, "--num_workers", 0]
SHORT += ["--test_frequency", 1]


def scoring(folder: Path, place: str) -> list[str]:
    """Test the network that ``SHORT`` trained, by the same number of processes or another."""
    return ["--test", str(folder / "plain_300" / "of_1" / "last.pth"), "--device", "cpu",
            "--num_workers", "0", "--save_folder", str(folder / place)]


def runs(data: Path, folder: Path) -> dict[str, list[str]]:
    """Return command lines of train_test.py."""
    return {"straight": options(data, folder, *LONG, "--date", "straight"),
            "short": options(data, folder, *SHORT, "--date", f"of_{SIZE}"),
            "test": scoring(folder, f"tested_{SIZE}"),
            "mistake": options(data, folder / "none", "-b", 5)}


def do_all(data: Path, folder: Path) -> None:
    world = join()
    done = {name: part(world) for name, part in PARTS.items()}
    leave()
    for restarts, (name, arguments) in enumerate(runs(data, folder).items(), start=1):
        # Another job's processes have other addresses, as after a restart by torchrun.
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restarts)
        done[name] = train_test.main(arguments)
    torch.save(done, folder / f"{world.rank}.pth")
    leave()


# ---------------------------------------------------------------- starting jobs


@pytest.fixture(scope="module", autouse=True)
def tiny_networks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.BACKBONES, "tiny", TINY)
        patch.setitem(models.BACKBONES, "plain", PLAIN)
        yield


@pytest.fixture(scope="module")
def alone(tiny_networks):
    """What ``PARTS`` give in one process."""
    return {name: part(SINGLE_PROCESS) for name, part in PARTS.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """16 images to train on, and an odd number to test on."""
    rng = np.random.default_rng(0)

    def images(name: str, number: int) -> dict:
        return {f"{name}{i}": [
            (("cell", "rod")[int(k)], (int(x), int(y), int(x) + 25, int(y) + 18))
            for k, x, y in rng.integers((0, 1, 1), (2, 70, 50), (rng.integers(4), 3))
        ] for i in range(number)}

    sets = {"trainval": images("a", 16), "test": images("t", 5)}
    return write_voc(tmp_path_factory.mktemp("data") / "voc", sets)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("w")


@pytest.fixture(scope="module")
def of_one(data, folder):
    """The folder of the run ``SHORT`` by one process, and of its test."""
    assert train_test.main(options(data, folder, *SHORT, "--date", "of_1")) == 0
    assert train_test.main(scoring(folder, "tested_1")) == 0
    return folder / "plain_300" / "of_1"


@pytest.fixture(scope="module")
def ended(data, folder, of_one):
    """The job that does everything: output and error, and [results of rank 0, of rank 1, ...]."""
    process = start([str(data), str(folder)], launched(SIZE, __file__))
    said = process.communicate(timeout=2 * PATIENCE)
    assert process.returncode == 0, said[1][-4000:]
    return said, [torch.load(folder / f"{rank}.pth") for rank in range(SIZE)]


@pytest.fixture(scope="module")
def job(ended):
    return ended[1]


@pytest.fixture(scope="module")
def straight(ended, folder):
    """An uninterrupted run of two processes, each with batch statistics of its own."""
    return folder / "tiny_300" / "straight"


def launched(processes: int, program: str = PROGRAM) -> list[str]:
    """The command that starts a Python program, and the arguments behind it, by ``launch``."""
    code = "import sys; from engine.distributed import launch; sys.exit(launch({}, sys.argv[1:]))"
    return [sys.executable, "-c", code.format(processes), program]


def ranks_of(process: Popen) -> dict[int, int]:
    """{rank: process id} of the processes that torchrun has started."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            continue
        ranks = [int(v[5:]) for v in variables if v.startswith(b"RANK=")]
        if parent == process.pid and ranks:
            found[ranks[0]] = int(entry.name)
    return found


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Over all tensors, relative to each one's largest value (0.01, if that is less)."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).double().abs().max() / a[k].double().abs().max().clamp(1e-2))
               for k in a)


# ---------------------------------------------------------------- training and testing as one


@pytest.mark.parametrize("name", ["whole", "accumulated"])
def test_parts_of_a_batch_train_like_the_whole(alone, job, name):
    for done in (alone, *job):
        # Losses are reported in float32.
        np.testing.assert_allclose(done[name]["losses"], alone["whole"]["losses"], rtol=5e-7)
        assert largest_difference(alone["whole"]["model"], done[name]["model"]) < 1e-9


def test_synchronised_norms_need_gpus_for_several_processes():
    check_sync_bn(torch.device("cpu"), 1)
    check_sync_bn(torch.device("cuda"), 2)
    with pytest.raises(UserError, match=r"--sync_bn .*2 processes.*CPU.*--sync_bn false"):
        check_sync_bn(torch.device("cpu"), 2)


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_command_line_of_one_and_of_two_processes_gives_the_same_run(job, of_one):
    of_two = of_one.with_name("of_2")
    for one, two in zip(lines_of(of_one), lines_of(of_two), strict=True):
        for key in ("loss_loc", "loss_conf"):
            assert two[key] == pytest.approx(one[key], rel=1e-5)
        assert two["value"] == pytest.approx(one["value"], abs=1e-3)
    assert {path.name for path in of_one.iterdir()} == {path.name for path in of_two.iterdir()}
    one, two = (load_checkpoint(run / "last.pth")["model"] for run in (of_one, of_two))
    assert largest_difference(one, two) < 2e-6
    said = (of_two / "train.log").read_text()
    assert said.count("epoch 2: loss") == 1
    assert "(2 processes x 1 accumulation steps x 2), learning rate 0.0001" in said
    configs = [json.loads((run / "config.json").read_text()) for run in (of_one, of_two)]
    assert [config["ngpu"] for config in configs] == [1, 2]


def test_detections_are_collected_in_order(job):
    for counts, *found in zip(COUNTS, *(done["collect"] for done in job), strict=True):
        assert_same(found[0], as_tensors(detections(counts)), "detections")
        assert found[1:] == [None] * (SIZE - 1)


def test_processes_that_test_together_leave_the_files_of_one(job, folder):
    places = [folder / f"tested_{size}" for size in (1, 2)]
    left = [next(place.rglob("results.json")).parent for place in places]
    names = [{path.name for path in files.iterdir()} for files in left]
    assert names[0] == names[1]
    for name in sorted(names[0] - {"detections.npz"}):
        assert (left[0] / name).read_bytes() == (left[1] / name).read_bytes(), name
    one, two = (load_arrays(files / "detections.npz") for files in left)
    assert list(one) == list(two)
    for key, array in one.items():
        assert np.array_equal(array, two[key]), key


def test_scores_during_training_are_those_of_the_kept_weights(straight):
    """Each process has batch statistics of its own; those of rank 0 are scored and kept."""
    arguments = ["--test", str(straight / "tiny_VOC_epoches_5.pth"), "--device", "cpu"]
    assert train_test.main([*arguments, "--score_threshold", "0.01", "--num_workers", "0"]) == 0
    one, two = (load_arrays(straight / "ss_predict" / name / "test" / "detections.npz")
                for name in ("tiny_VOC_epoches_5", "epoch_5"))
    for key in ("scores", "labels", "boxes"):
        np.testing.assert_allclose(one[key], two[key], rtol=1e-5, atol=1e-4)


def test_a_job_reports_once(ended, folder):
    (output, error), done = ended
    for results in done:
        assert [results[name] for name in ("straight", "short", "test", "mistake")] == [0, 0, 0, 2]
    assert output.count("epoch 1: loss") == 2  # of two runs
    assert output.count("detections of score") == 5
    assert error.count("error: ") == 1
    assert "error: --batch_size 5 is the batch of all 2 processes" in error
    assert "Traceback" not in error + output
    assert not (folder / "none").exists()


# ---------------------------------------------------------------- agreeing, and failing


def test_rank_0_decides_for_all_and_its_failure_ends_all(job):
    for rank, done in enumerate(job):
        said, last = done["agree"], SIZE - 1
        assert said["value"] == ["ü 東", 0, None]
        assert said["none"] is None
        assert said["failed"] == ("ValueError wrong on 0" if rank == 0 else "RankZeroFailed ")
        assert said["turn"] == (f"ValueError wrong on {last}" if rank == last else last)
        assert said["first"] == ("ValueError wrong on 0" if rank == 0 else "RankZeroFailed ")
        assert said["calls"] == ([0, last, 0] if rank == 0 else [last])
        assert said["sum"] == [sum(range(SIZE)), SIZE]


def test_one_process_decides_for_itself(alone):
    said = alone["agree"]
    assert said["value"] == ["ü 東", 0, None]
    assert said["failed"] == said["turn"] == said["first"] == "ValueError wrong on 0"
    assert said["sum"] == [0, 1]


@pytest.mark.parametrize(("error", "lost"), [
    (RuntimeError("Read error [127.0.0.1]:4930: Connection reset by peer. This is"), True),
    (RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:4930"), True),
    (dist.DistBackendError("ncclRemoteError: A call failed possibly due to a network"), True),
    (dist.DistNetworkError("The client socket has failed to connect to [host]:29500"), True),
    (ConnectionResetError(104, "Connection reset by peer"), True),
    (dist.DistBackendError("ncclInvalidUsage: Duplicate GPU detected: rank 1"), False),
    (RuntimeError("gloo: expected scalar type Float but found Double"), False),
    (OSError(5, "Input/output error"), False),
], ids=repr)
def test_a_lost_process_is_told_from_a_misuse(error, lost):
    assert is_lost_connection(error) == lost


def test_a_lost_process_is_reported_with_its_cause_and_a_misuse_passes(monkeypatch, capsys):
    def run_with(error: Exception) -> int:
        def train(*_):
            raise error

        return run_job("train_test.py", [], train, train)

    lost = RuntimeError("Connection closed by peer [127.0.0.1]:4930\nmore")
    with pytest.raises(ConnectionResetError):  # not of a file, and there is no other process
        run_with(ConnectionResetError(104, "Connection reset by peer"))
    monkeypatch.setattr(engine.job, "join", lambda: World(rank=1, size=2))
    assert run_with(lost) == 1
    error = capsys.readouterr().err
    assert error.startswith("[process 1] error: ") and error.count("\n") == 1
    assert "Connection closed by peer [127.0.0.1]:4930" in error and "--resume auto" in error
    with pytest.raises(RuntimeError, match="Duplicate GPU"):
        run_with(dist.DistBackendError("ncclInvalidUsage: Duplicate GPU detected"))
    assert run_with(RankZeroFailed()) == 2
    assert run_with(FileNotFoundError(2, "No such file", "a.pth")) == 2
    assert capsys.readouterr().err == "[process 1] error: a.pth: No such file\n"


def fill_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory.\nmuch more")


@pytest.mark.parametrize("fill, memory", [
    (lambda: torch.empty(1 << 50), "main memory"), (lambda: np.empty(1 << 55), "main memory"),
    (lambda: bytearray(1 << 60), "main memory"), (fill_gpu, "the GPU's memory"),
])
def test_full_memory_is_told_with_the_options_that_need_less(fill, memory, capsys):
    assert run_job("train_test.py", [], lambda *_: fill(), None) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {memory} ") and error.count("\n") == 1
    assert all(option in error for option in ("--batch_size", "--accumulate", "--recompute"))


@pytest.mark.parametrize(("code", "status"), [
    ("sys.exit(2)", 2), ("sys.exit(3 if os.environ['RANK'] == '1' else time.sleep(600))", 3),
    ("os.kill(os.getpid(), 9) if os.environ['RANK'] == '0' else time.sleep(600)", 137),
])
def test_launch_returns_the_status_of_what_ended_first(code, status, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert launch(2, ["-c", f"import os, sys, time; {code}"]) == status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "Traceback" not in capfd.readouterr().err


def test_a_batch_that_cannot_be_divided_is_refused_with_a_multiple_that_can():
    check_shares(32, 2, 16)
    with pytest.raises(UserError, match=r"--batch_size 24 .*2 processes.* multiple of 32"):
        check_shares(24, 2, 16)


@linux
@pytest.mark.parametrize(("command", "number", "rank", "restarts"), [
    (launched, signal.SIGTERM, 0, 1),
    pytest.param(launched, signal.SIGINT, 1, 0, marks=pytest.mark.slow),
    pytest.param(torchrun, signal.SIGTERM, 1, 1, marks=pytest.mark.slow),
    pytest.param(torchrun, signal.SIGINT, 0, 0, marks=pytest.mark.slow),
])
def test_job_that_is_interrupted_and_then_loses_a_process_goes_on_exactly(
    data, folder, straight, command, number, rank, restarts
):
    name = f"{command.__name__}_{number}"
    run_folder = folder / "tiny_300" / name
    arguments = options(data, folder, *LONG, "--resume", "auto", "--date", name)
    job = start(arguments, command(2))
    wait_until(lambda: epochs_done(run_folder) >= 1, job)
    os.killpg(job.pid, number)
    output, error = job.communicate(timeout=PATIENCE)
    assert "stopped at step" in output
    assert error.count("interrupted") == 1
    assert job.returncode == (130 if command is launched else 1)
    assert command is torchrun or "Traceback" not in error
    stopped = load_checkpoint(run_folder / "last.pth")["step"]
    assert 4 <= stopped < 40

    job = start(arguments, torchrun(2, restarts))
    wait_until(lambda: epochs_done(run_folder) > stopped // 4 + 1, job)
    os.kill(ranks_of(job)[rank], signal.SIGKILL)
    killed = time.monotonic()
    output, error = job.communicate(timeout=PATIENCE)
    assert "resumed at step" in output
    assert "Traceback" not in output
    if restarts:
        assert job.returncode == 0, error
    else:
        assert job.returncode != 0
        assert time.monotonic() - killed < 120
        # The log is a little ahead of the checkpoint.
        assert stopped < load_checkpoint(run_folder / "last.pth")["step"] < 40
        job = start(arguments, torchrun(2))
        assert job.communicate(timeout=PATIENCE) and job.returncode == 0
    assert_same_run(straight, run_folder)


if __name__ == "__main__":
    register()
    do_all(*map(Path, sys.argv[1:]))
