"""The figures of docs/scale.md: by hand, and as the page has them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from docs import scale
from docs.scale import Job
from models import build_net
from tools.traffic import profile

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "scale.md").read_text("utf-8")
TABLES = re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)


@pytest.fixture
def round_figures(monkeypatch):
    """A network of 3 GMAC and 25 M parameters on GPUs of 100 TFLOP/s; a core loads 100."""
    figures = {"MACS": 3e9, "PARAMETERS": 25_000_000, "PEAK": 100e12, "FROM_JPEG": 100}
    for name, value in figures.items():
        monkeypatch.setattr(scale, name, value)


def test_constants_are_those_of_the_network():
    with torch.device("meta"):
        net = build_net("SSD_HarDNet68", 512, 81)
    result = profile(net, 512)
    assert (result.parameters, result.macs) == (scale.PARAMETERS, scale.MACS)
    assert 2 * result.traffic == scale.TRAFFIC
    assert sum(b.numel() for b in net.buffers()) == scale.BUFFERS
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == scale.NORMS
    # weights and momentum, and the average's weights; the rest is names and the zip's own
    both = 4 * (2 * result.parameters + scale.BUFFERS)
    assert 0 < scale.CHECKPOINT - both < 5e5
    assert 0 < scale.CHECKPOINT_EMA - both - 4 * (result.parameters + scale.BUFFERS) < 5e5


def test_times_and_limits_of_one_gpu(round_figures):
    job = Job(1, 0.24)  # 24 TFLOP/s; a picture's forward pass is 6 GFLOP, 0.25 ms
    assert (job.forward, job.backward) == pytest.approx((8e-3, 16e-3))
    assert job.exchange == 0
    assert job.limits["GPU"] == pytest.approx(4000 / 3)
    assert job.limits["loading"] == 800
    assert job.limits["PCIe"] == pytest.approx(40054, abs=1)
    assert (job.binding, job.rate) == ("loading", 800)


def test_an_exchange_takes_the_slowest_link(round_figures):
    # 100 MB of gradients, each over every link twice but for a GPU's share
    assert Job(8, 0.3, 100).exchange == pytest.approx(1.75 * 100e6 / 450e9)
    assert Job(16, 0.3, 100).exchange == pytest.approx(1.875 * 100e6 / 12.5e9)
    assert Job(64, 0.3, 400).exchange == pytest.approx(1.96875 * 100e6 / 50e9)


def test_gradients_bind_when_their_exchange_outlasts_the_backward_pass(round_figures):
    slow = Job(16, 0.96, 100)  # forward 2 ms, backward 4 ms, exchange 15 ms
    assert slow.binding == "loading"
    assert slow.limits["gradients"] == pytest.approx(512 / 17e-3)
    assert slow.limits["GPU"] == pytest.approx(512 / 6e-3)
    fast = Job(16, 0.96, 400)  # exchange 3.75 ms
    assert fast.limits["gradients"] > fast.limits["GPU"]
    lone = Job(16, 0.96, 100, batch=1)  # 0.0625 ms, 15 ms
    assert lone.binding == "gradients"
    assert lone.rate == pytest.approx(16 / 15.0625e-3)


def test_an_epoch_leaves_its_last_smaller_batch_out(round_figures):
    job = Job(1, 0.24)
    assert job.steps(100) == 3
    assert job.epoch(100) == pytest.approx(96 / 800)
    assert [Job(gpus, 0.3).steps() for gpus in (1, 8, 64)] == [3696, 462, 57]


def test_files_written_in_a_run():
    files = 0
    for epoch in range(1, 151):
        files += 1  # last.pth
        if epoch % 10 == 0:
            files += 3  # last.pth before the test, best.pth, the epoch's
    assert scale.SAVES == files + 2  # last.pth and Final_ in the end
    assert f"{scale.SAVES} files" in PAGE


def test_page_has_the_commands_output():
    """After a change, paste the tables of `python -m docs.scale` into docs/scale.md."""
    command = [sys.executable, "-m", "docs.scale"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    printed = [table + "\n" for table in done.stdout.rstrip("\n").split("\n\n")]
    assert TABLES[: len(printed)] == printed
    assert "python -m docs.scale\n" in PAGE


def cells(table: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_page_draws_its_conclusions_from_the_tables():
    binds = {tuple(row[:4]): row for row in cells(TABLES[3])}
    assert {row[-1] for row in binds.values() if row[0] != "64"} == {"GPU"}
    assert binds["64", "2,048", "400 Gb/s", "30 %"][-1] == "GPU"
    network, small = (
        binds["64", "2,048", "100 Gb/s", "30 %"],
        binds["64", "512", "100 Gb/s", "30 %"],
    )
    assert network[-1] == small[-1] == "gradients"
    gpu, gradients = (int(small[i].replace(",", "")) for i in (4, 7))
    assert gradients / gpu < 1 / 3 and "two thirds of the" in PAGE

    one, _, eight, _, many, _ = (
        [int(c.replace(",", "")) for c in row[2:]] for row in cells(TABLES[4])
    )
    told = re.search(
        r"So ([\d.]+) hours on one GPU, (\d+) minutes on 8, (\d+) minutes on 64 .*?"
        r"([\d.]+) times as fast as\s+one, 64 are (\d+) times",
        PAGE,
        re.DOTALL,
    ).groups()
    total = [row[-1] for row in (one, eight, many)]
    speedups = f"{total[0] / total[1]:.1f}", f"{total[0] / total[2]:.0f}"
    times = f"{total[0] / 3600:.1f}", f"{total[1] / 60:.0f}", f"{total[2] / 60:.0f}"
    assert told == times + speedups
    steps = f"{many[0]} steps and the run {150 * many[0]:,} instead of {150 * one[0]:,}"
    assert steps in PAGE
    assert f"{scale.PICTURES - 2048 * many[0]:,} pictures are left out" in PAGE
    assert f"{2 * scale.NORMS} x 30 µs = {2 * scale.NORMS * scale.LATENCY * 1e3:.1f} ms" in PAGE
