"""Jobs of several processes, run for real: they train, test, fail and stop like one.

As a program of its own (``launch`` starts it so) this file does what ``PARTS`` lists and leaves
what came out in a folder.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_voc
from program import (
    PATIENCE,
    ROOT,
    assert_same,
    assert_same_run,
    epochs_done,
    options,
    run,
    start,
    torchrun,
    wait_until,
)
from program import __file__ as PROGRAM
from tiny import TINY
from torch import nn

import models
from data.config import INPUT_MEAN, VOC_300
from data.loading import EpochSampler
from engine.distributed import (
    ALONE,
    CPUSyncBatchNorm,
    Elsewhere,
    World,
    join,
    launch,
    leave,
    synchronise_batch_norm,
)
from engine.steps import train_steps
from layers import MultiBoxLoss, PriorBox
from models import build_net
from utils.checkpoint import load_checkpoint

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")

# ---------------------------------------------------------------- what the processes of a job do


class InDouble(nn.Module):
    """A network of float64 weights on the images of the training loop, which are float32."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images.double())


def train_in_double(world: World, accumulate: int, norms: bool) -> dict:
    """Losses and weights of 6 steps, with or without batch normalisation."""
    torch.manual_seed(0)
    net = build_net("tiny", 300, 3).double()
    net.L2Norm = nn.Identity()  # it computes in float32
    if not norms:
        net.base[1] = nn.Identity()
    net = synchronise_batch_norm(net, torch.device("cpu")) if world.size > 1 else net
    forward = world.replicate(InDouble(net), torch.device("cpu"))
    rng = np.random.default_rng(1)
    images = torch.from_numpy(rng.integers(0, 255, (20, 3, 300, 300), np.uint8))
    corners = torch.from_numpy(rng.uniform(0, 0.6, (20, 3, 2)).astype(np.float32))
    sides = torch.from_numpy(rng.uniform(0.1, 0.4, (20, 3, 2)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(1, 3, (20, 3, 1)).astype(np.float32))
    targets = torch.cat([corners, corners + sides, labels], 2)
    sampler = EpochSampler(20, 8, 0, world.rank, world.size, accumulate)

    def batches():
        for epoch in range(4):
            sampler.set_epoch(epoch, 0)
            for keys in sampler:
                indices = [index for _, index in keys]
                # An unequal number of boxes, and pictures without any.
                yield images[indices], [targets[i, : i % 4] for i in indices], indices

    steps = train_steps(
        forward,
        MultiBoxLoss(3),
        PriorBox(VOC_300)(),
        batches(),
        torch.optim.SGD(net.parameters(), 4e-3, momentum=0.9, weight_decay=5e-4),
        torch.amp.GradScaler("cpu", enabled=False),
        [1e-3] * 2 + [4e-3] * 4,
        INPUT_MEAN,
        "off",
        accumulate=accumulate,
        clip_norm=20.0,
        world=world,
    )
    losses = [step.results() for step in steps]
    return {"losses": losses, "model": net.state_dict()}


def normalise(world: World) -> dict:
    """A layer over all processes' pictures, of which this one has some."""
    torch.manual_seed(3)
    x = torch.randn(6, 5, 7, 3, dtype=torch.float64) * 3 + 50
    factor = torch.randn_like(x)
    layer = nn.BatchNorm2d(5).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    net = nn.Sequential(layer)
    if world.size > 1:
        net = synchronise_batch_norm(net, torch.device("cpu"))
        assert type(net[0]) is CPUSyncBatchNorm
        cuts = {2: [0, 1, 6], 4: [0, 1, 3, 4, 6]}[world.size]  # unequal shares
        x, factor = (t[cuts[world.rank] : cuts[world.rank + 1]] for t in (x, factor))
    half = copy.deepcopy(net).float()
    x = x.clone().requires_grad_()
    y = net(x)
    (y * y * factor).sum().backward()
    gradients = {k: world.sum(p.grad.clone()) for k, p in net.named_parameters()}
    once = {k: v.clone() for k, v in net.state_dict().items()}
    net(x + 1)
    low = half(x.detach().bfloat16())
    assert low.dtype == torch.bfloat16
    return {
        "y": y.detach(),
        "x": x.grad,
        "parameters": gradients,
        "once": once,
        "twice": net.state_dict(),
        "low": low.detach(),
        "eval": net.eval()(x).detach(),
    }


COUNTS = [[], [4], [0], [2, 0, 3], [0, 0, 0], [1, 2, 0, 4, 0, 2, 1]]


def detections(counts: list[int]) -> list[dict[str, np.ndarray]]:
    """Some detections of each of several pictures."""
    rng = np.random.default_rng(len(counts))
    return [
        {
            "boxes": rng.random((n, 4), np.float32),
            "scores": rng.random(n, np.float32),
            "labels": rng.integers(1, 1 << 40, n),
        }
        for n in counts
    ]


def collect(world: World) -> list:
    found = []
    for counts in COUNTS:
        all_of_them = detections(counts)
        mine = [all_of_them[i] for i in world.share_of(len(counts))]
        found.append(world.collect(mine, len(counts)))
    return [
        rows and [{k: torch.from_numpy(v.copy()) for k, v in d.items()} for d in rows]
        for rows in found
    ]


def agree(world: World) -> dict:
    """What each process gets and meets when rank 0 decides, and when something goes wrong."""
    calls = []

    def fail(on: int):
        calls.append(on)
        if world.rank == on:
            raise ValueError(f"wrong on {on}")
        return on

    def outcome(do, *arguments):
        try:
            return do(*arguments)
        except (ValueError, Elsewhere) as error:
            return f"{type(error).__name__} {error}"

    return {
        "value": world.decide(lambda: ["ü 東", world.rank, None]),
        "none": world.decide(lambda: None),
        "failed": outcome(world.decide, lambda: fail(0)),
        "turn": outcome(world.in_turn, lambda: fail(world.size - 1)),
        "first": outcome(world.in_turn, lambda: fail(0)),
        "calls": calls,
        "sum": world.sum(torch.tensor([world.rank, 1.0])).tolist(),
    }


PARTS = {
    "norms": lambda world: train_in_double(world, 1, norms=True),
    "plain": lambda world: train_in_double(world, 1, norms=False),
    "accumulated": lambda world: train_in_double(world, 2, norms=False),
    "normalise": normalise,
    "collect": collect,
    "agree": agree,
}


def do_parts(folder: Path) -> None:
    world = join()
    done = {name: part(world) for name, part in PARTS.items()}
    torch.save(done, folder / f"{world.size}_{world.rank}.pth")
    leave()


# ---------------------------------------------------------------- starting jobs


@pytest.fixture(scope="module")
def alone():
    """What ``PARTS`` give in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.BACKBONES, "tiny", TINY)
        return {name: part(ALONE) for name, part in PARTS.items()}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """What ``PARTS`` give each process: {number of processes: [of rank 0, of rank 1, ...]}."""
    folder = tmp_path_factory.mktemp("jobs")
    for size in (2, 4):
        assert launch(size, [__file__, str(folder)]) == 0
    return {
        size: [torch.load(folder / f"{size}_{rank}.pth") for rank in range(size)] for size in (2, 4)
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """16 pictures to train on, an odd number to test on, and one."""
    rng = np.random.default_rng(0)

    def pictures(name: str, number: int) -> dict:
        return {
            f"{name}{i}": [
                (("cell", "rod")[int(k)], (int(x), int(y), int(x) + 25, int(y) + 18))
                for k, x, y in rng.integers((0, 1, 1), (2, 70, 50), (rng.integers(4), 3))
            ]
            for i in range(number)
        }

    test = pictures("t", 5)
    sets = {"trainval": pictures("a", 16), "test": test, "one": {"t1": test["t1"]}}
    return write_voc(tmp_path_factory.mktemp("data") / "voc", sets)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("w")


@pytest.fixture(scope="module")
def trained(data, folder):
    """Runs of 1, 2 and 4 processes of the command line; returns their folders and output."""
    outputs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.BACKBONES, "tiny", TINY)
        for size in (1, 2, 4):
            arguments = options(data, folder, "-b", 4, "-max", 2, "--lr", 1e-4, "--sync_bn")
            arguments += ["--num_workers", "1", "--test_frequency", "1", "--date", f"of_{size}"]
            status, output, error = run(arguments, torchrun(size) if size > 1 else ())
            assert status == 0, error
            outputs[size] = output
    return {size: (folder / "tiny_300" / f"of_{size}", out) for size, out in outputs.items()}


LONG = ["-b", 4, "-max", 14, "--num_workers", 1, "--ema", 0.9]
LONG += ["--test_frequency", 5, "--save_frequency", 5]


@pytest.fixture(scope="module")
def straight(data, folder):
    """An uninterrupted run of two processes, each with batch statistics of its own."""
    status, _, error = run(options(data, folder, *LONG, "--date", "straight"), torchrun(2))
    assert status == 0, error
    return folder / "tiny_300" / "straight"


def launcher(processes: int) -> list[str]:
    """The command that starts this program's arguments by ``launch``."""
    code = "import sys; from engine.distributed import launch; sys.exit(launch({}, sys.argv[1:]))"
    return [sys.executable, "-c", code.format(processes), PROGRAM]


def ranks_of(process: subprocess.Popen) -> dict[int, int]:
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
    return max(
        float((a[k].double() - b[k].double()).abs().max() / a[k].double().abs().max().clamp(1e-2))
        for k in a
    )


# ---------------------------------------------------------------- training as one


@pytest.mark.parametrize("size", [2, 4])
def test_processes_with_common_batch_statistics_train_like_one(alone, jobs, size):
    one = alone["norms"]
    for job in jobs[size]:
        # Losses are reported in float32.
        np.testing.assert_allclose(job["norms"]["losses"], one["losses"], rtol=5e-7)
        assert largest_difference(one["model"], job["norms"]["model"]) < 1e-9
    assert_same(jobs[size][0]["norms"], jobs[size][-1]["norms"], "ranks")


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", ["plain", "accumulated"])
def test_parts_of_a_batch_without_batch_statistics_train_like_the_whole(alone, jobs, size, name):
    one = alone["plain"]
    for job in [alone] if size == 1 else jobs[size]:
        np.testing.assert_allclose(job[name]["losses"], one["losses"], rtol=5e-7)
        assert largest_difference(one["model"], job[name]["model"]) < 1e-9


@pytest.mark.parametrize("size", [2, 4])
def test_common_batch_statistics_are_those_of_the_whole_batch(alone, jobs, size):
    one, parts = alone["normalise"], [job["normalise"] for job in jobs[size]]
    for key in ("y", "x", "eval"):
        whole = torch.cat([part[key] for part in parts])
        torch.testing.assert_close(whole, one[key], rtol=1e-11, atol=1e-11)
    for part in parts:
        for key in ("parameters", "once", "twice"):
            torch.testing.assert_close(part[key], one[key], rtol=1e-11, atol=1e-11)
    low = torch.cat([part["low"] for part in parts])
    torch.testing.assert_close(low.double(), one["y"], rtol=0.02, atol=0.2)


def test_command_line_of_1_2_and_4_processes_gives_the_same_run(trained):
    logs = {}
    for size, (folder, output) in trained.items():
        logs[size] = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in logs[size]] == [1, 2]
        assert output.count("epoch 1: loss") == 1
        assert (folder / "train.log").read_text().count("epoch 2: loss") == 1
        shape = f"a step: 4 pictures in all ({size} processes x 1 accumulation steps x {4 // size})"
        assert f"{shape}, learning rate 0.0001" in output
        names = {path.name for path in folder.iterdir()}
        assert names == {path.name for path in trained[1][0].iterdir()}
        for line, first in zip(logs[size], logs[1], strict=True):
            for key in ("loss_loc", "loss_conf"):
                assert line[key] == pytest.approx(first[key], rel=1e-5)
            assert line["value"] == pytest.approx(first["value"], abs=1e-3)
    one, two, four = (load_checkpoint(trained[n][0] / "last.pth")["model"] for n in (1, 2, 4))
    assert largest_difference(two, four) < 2e-6
    # In float32 PyTorch's batch normalisation of one process is the least exact of the three.
    assert largest_difference(one, two) < 1e-4


# ---------------------------------------------------------------- testing as one


@pytest.mark.parametrize("size", [2, 4])
def test_detections_are_collected_in_order(jobs, size):
    for counts, *found in zip(COUNTS, *(job["collect"] for job in jobs[size]), strict=True):
        expected = [{k: torch.from_numpy(v) for k, v in d.items()} for d in detections(counts)]
        assert_same(found[0], expected, "detections")
        assert found[1:] == [None] * (size - 1)


@pytest.mark.parametrize("sets", ["test", pytest.param("one", marks=pytest.mark.slow)])
def test_processes_that_test_together_leave_the_files_of_one(trained, folder, data, sets):
    checkpoint, left = trained[1][0] / "last.pth", []
    for size in (1, 2):
        there = ["--save_folder", str(folder / f"tested_{size}_{sets}"), "--num_workers", "0"]
        arguments = ["--test", str(checkpoint), *there, "--device", "cpu", "--test_sets", sets]
        status, output, error = run(arguments, torchrun(2) if size > 1 else ())
        assert status == 0, error
        assert output.count("AP@.5") == 1
        (results,) = (folder / f"tested_{size}_{sets}").rglob("results.json")
        left.append(results.parent)
    names = [{path.name for path in files.iterdir()} for files in left]
    assert names[0] == names[1]
    for name in sorted(names[0] - {"detections.npz"}):
        assert (left[0] / name).read_bytes() == (left[1] / name).read_bytes(), name
    one, two = (np.load(files / "detections.npz") for files in left)
    assert one.files == two.files
    for key in one.files:
        assert np.array_equal(one[key], two[key]), key


def test_scores_during_training_are_those_of_the_kept_weights(straight, data):
    """Without common batch statistics the processes have different ones; one's are kept."""
    arguments = ["--test", str(straight / "tiny_VOC_epoches_10.pth"), "--device", "cpu"]
    status, _, error = run([*arguments, "--score_threshold", "0.01", "--num_workers", "0"])
    assert status == 0, error
    one, two = (
        np.load(straight / "ss_predict" / name / "test" / "detections.npz")
        for name in ("tiny_VOC_epoches_10", "epoch_10")
    )
    for key in ("scores", "labels", "boxes"):
        np.testing.assert_allclose(one[key], two[key], rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------- agreeing, and failing


@pytest.mark.parametrize("size", [2, 4])
def test_rank_0_decides_for_all_and_its_failure_ends_all(jobs, size):
    for rank, job in enumerate(jobs[size]):
        said, last = job["agree"], size - 1
        assert said["value"] == ["ü 東", 0, None]
        assert said["none"] is None
        assert said["failed"] == ("ValueError wrong on 0" if rank == 0 else "Elsewhere ")
        assert said["turn"] == (f"ValueError wrong on {last}" if rank == last else last)
        assert said["first"] == ("ValueError wrong on 0" if rank == 0 else "Elsewhere ")
        assert said["calls"] == ([0, last, 0] if rank == 0 else [last])
        assert said["sum"] == [sum(range(size)), size]


def test_one_process_decides_for_itself(alone):
    said = alone["agree"]
    assert said["value"] == ["ü 東", 0, None]
    assert said["failed"] == said["turn"] == said["first"] == "ValueError wrong on 0"
    assert said["sum"] == [0, 1]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("sys.exit(2)", 2),
        ("sys.exit(3 if os.environ['RANK'] == '1' else time.sleep(600))", 3),
        ("os.kill(os.getpid(), 9) if os.environ['RANK'] == '0' else time.sleep(600)", 137),
    ],
)
def test_launch_returns_the_status_of_what_ended_first(code, status):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert launch(2, ["-c", f"import os, sys, time; {code}"]) == status
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (("--root", "/nowhere"), "error: /nowhere"),
        (("-b", "5"), "error: --batch_size 5 is the batch of all 2 processes"),
        (("-b", "32", "--accumulate", "16"), "error: 16 pictures cannot be cut into 32 parts"),
    ],
)
def test_mistake_under_several_processes_is_told_once(tmp_path, data, capfd, mistake, words):
    arguments = options(data, tmp_path / "w", "-b", 4, *mistake)
    assert launch(2, [PROGRAM, *arguments]) == 2
    output, error = capfd.readouterr()
    assert error.count("error: ") == 1
    assert words in error
    assert "Traceback" not in error + output
    assert not (tmp_path / "w").exists()


@linux
@pytest.mark.parametrize(
    ("rank", "restarts"),
    [
        (0, 1),
        pytest.param(1, 0, marks=pytest.mark.slow),
        pytest.param(1, 1, marks=pytest.mark.slow),
        pytest.param(0, 0, marks=pytest.mark.slow),
    ],
)
def test_job_of_which_a_process_is_killed_ends_and_goes_on_exactly(
    data, folder, straight, rank, restarts
):
    name = f"killed_{rank}_{restarts}"
    run_folder = folder / "tiny_300" / name
    arguments = options(data, folder, *LONG, "--resume", "auto", "--date", name)
    job = start(arguments, torchrun(2, restarts))
    wait_until(lambda: epochs_done(run_folder) >= 2, job)
    os.kill(ranks_of(job)[rank], signal.SIGKILL)
    killed = time.monotonic()
    output, error = job.communicate(timeout=PATIENCE)
    assert "Traceback" not in output
    if restarts:
        assert job.returncode == 0, error
        assert "resumed at step" in output
    else:
        assert job.returncode != 0
        assert time.monotonic() - killed < 120
        # The log is a little ahead of the checkpoint.
        assert 4 <= load_checkpoint(run_folder / "last.pth")["step"] < 56
        assert run(arguments, torchrun(2))[0] == 0
    assert_same_run(straight, run_folder)


@linux
@pytest.mark.parametrize(
    ("command", "number"),
    [
        (launcher, signal.SIGTERM),
        pytest.param(launcher, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(torchrun, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(torchrun, signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_interrupted_job_saves_its_state_and_goes_on_exactly(
    data, folder, straight, command, number
):
    name = f"{command.__name__}_{number}"
    run_folder = folder / "tiny_300" / name
    arguments = options(data, folder, *LONG, "--resume", "auto", "--date", name)
    job = start(arguments, command(2))
    wait_until(lambda: epochs_done(run_folder) >= 2, job)
    os.killpg(job.pid, number)
    output, error = job.communicate(timeout=PATIENCE)
    assert "stopped at step" in output
    assert error.count("interrupted") == 1
    if command is launcher:
        assert job.returncode == 130
        assert "Traceback" not in error
    assert job.returncode != 0
    step = load_checkpoint(run_folder / "last.pth")["step"]
    assert 8 <= step < 56
    assert run(arguments, command(2))[0] == 0
    assert_same_run(straight, run_folder)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    models.BACKBONES["tiny"] = TINY
    do_parts(Path(sys.argv[1]))
