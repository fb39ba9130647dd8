"""The benchmark of stages and routes: its clock, its checks, and what it makes of two runs."""

from __future__ import annotations

import gc
import itertools
import json
import re
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from nms_routines import needs_torchvision
from tiny import TINY

import models
from benchmarks import evidence, roofline, speed
from benchmarks.timing import CPU
from inference.predictor import Predictor
from layers import Detect, PriorBox
from models import build_net
from tools import export
from tools.traffic import Profile
from utils.checkpoint import sha256_of


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(models.BACKBONES, "tiny", TINY)
    monkeypatch.setattr(speed, "MADE_UP", (3, 64, 48))


def run(*args) -> int:
    return speed.main([str(arg) for arg in args])


# ---------------------------------------------------------------- stages and turns


class Stages:
    """A predictor whose stages take 1, 10, 100 and 1000 seconds on a clock of its own."""

    device = CPU

    def __init__(self, monkeypatch, groups: int):
        self.now, self.groups = 0, groups
        monkeypatch.setattr(speed.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(speed, "read_image", self.read)

    def takes(self, seconds, result):
        self.now += seconds
        return result

    def read(self, file):
        return self.takes(1, np.zeros((3, file, 3), np.uint8))

    def batches(self, images):
        size = len(images) // self.groups
        return [images[i : i + size] for i in range(0, len(images), size)]

    def preprocess(self, images):
        return self.takes(10, len(images))

    def forward(self, batch):
        return self.takes(100, batch)

    def postprocess(self, outputs, sizes):
        return self.takes(1000, sizes)


@pytest.mark.parametrize("groups", [1, 2])
def test_every_stage_has_its_own_time(monkeypatch, groups):
    stages = Stages(monkeypatch, groups)
    seconds, found = speed.Route(None, "", "fp32", stages, None).run([7, 8, 9, 10])
    each = {"decode": 4, "preprocess": 10, "forward": 100, "postprocess": 1000}
    expected = {stage: n if stage == "decode" else n * groups for stage, n in each.items()}
    assert seconds == {**expected, "total": sum(expected.values())}
    assert found == [(width, 3) for width in (7, 8, 9, 10)]


def test_routes_of_all_networks_take_turns_on_the_same_pictures(monkeypatch):
    ran = []

    class Recorded(speed.Route):
        def run(self, files):
            ran.append((str(self), files))
            return dict.fromkeys(self.seconds, len(ran)), [{} for _ in files]

    networks = [type("Network", (), {"name": name, "net": None})() for name in "ab"]
    monkeypatch.setattr(speed, "Route", Recorded)
    monkeypatch.setattr(speed, "Plain", lambda network, amp: None)
    monkeypatch.setattr(speed, "agreement", lambda *a: {})

    def make(network):
        return [Recorded(network, way, "fp32", None, None) for way in ("x", "y")]

    routes, _ = speed.measure(networks, make, [1, 2, 3], batch=2, rounds=2, warm_up=1)
    names = ["a x fp32", "a y fp32", "b x fp32", "b y fp32"]
    assert [str(route) for route in routes] == names
    turns = ran[-12:]  # of the last two rounds, and the one before, which does not count
    assert turns == [(n, files) for files in ([2, 3], [1, 2], [3, 1]) for n in names]
    assert all(len(times) == 2 for route in routes for times in route.seconds.values())
    assert routes[0].seconds["total"][1] - routes[0].seconds["total"][0] == 4


def test_the_best_batch_is_that_of_the_most_pictures_a_second(capsys):
    rows = [
        {**row([1.0]), "batch": batch, "median": {"forward": seconds}}
        for batch, seconds in ((1, 0.5), (8, 2.0), (32, 9.0))
    ]
    speed.show_best(rows)
    assert capsys.readouterr().out == (
        "a 512 deployed fp32, 2 threads: at best 4.0 pictures a second through the network, at "
        "batch 8\n"
    )


def test_what_does_not_fit_into_memory_is_left_out(monkeypatch, capsys):
    def agreement(route, *rest):
        if route.name == "x":
            raise torch.OutOfMemoryError
        return {}

    monkeypatch.setattr(speed, "agreement", agreement)
    monkeypatch.setattr(speed.Route, "run", lambda self, files: ({}, [{}]))
    monkeypatch.setattr(speed, "Plain", lambda network, amp: None)
    network = type("Network", (), {"name": "a", "net": None})()
    routes, _ = speed.measure(
        [network], lambda n: [speed.Route(n, w, "fp32", None, None) for w in "xy"], [1], 64, 1
    )
    assert [route.name for route in routes] == ["y"]
    assert (
        "a x fp32 at batch 64 is left out: the memory does not suffice" in capsys.readouterr().out
    )


def test_threads_are_as_before_afterwards():
    before = torch.get_num_threads(), cv2.getNumThreads()
    with speed.using_threads(1):
        assert torch.get_num_threads() == cv2.getNumThreads() == 1
    assert (torch.get_num_threads(), cv2.getNumThreads()) == before


# ---------------------------------------------------------------- networks and routes


@pytest.mark.parametrize(("version", "count"), [("tiny", 1), ("SSD_HarDNet39ds", 2)])
def test_new_weights_give_a_few_hundred_scores(tiny, tmp_path, version, count):
    files = speed.made_up(tmp_path, count, 64, 48)
    predictor = Predictor(speed.new_weights(version, 300, tmp_path, files))
    outputs = predictor.forward(predictor.preprocess([cv2.imread(str(file)) for file in files]))
    scores = outputs["conf"].softmax(2)[..., 1:]
    assert int((scores > 0.02).sum()) == pytest.approx(count * speed.SCORES_OVER, abs=2)
    assert scores.max() > 0.2  # and not all are close to the threshold
    assert outputs["loc"].std() == pytest.approx(0.5, abs=0.1)


@needs_torchvision
def test_plain_detections_are_those_of_detect():
    generator = torch.Generator().manual_seed(0)
    priors = PriorBox(models.prior_config("SSD_vgg", "VOC", 300))()
    loc = torch.randn(2, len(priors), 4, generator=generator)
    conf = torch.randn(2, len(priors), 4, generator=generator) * 2
    conf[..., 0] += 6
    detect, sizes = Detect(0.3, per_class=60, top_k=170), [(640, 480), (33, 100)]
    plain = speed.plain_detections(detect, loc, conf, priors, sizes)
    for one, other in zip(plain, detect(loc, conf, priors, sizes), strict=True):
        assert len(one["scores"]) == 170
        assert torch.equal(one["labels"], other["labels"])
        torch.testing.assert_close(one["boxes"], other["boxes"])
        torch.testing.assert_close(one["scores"], other["scores"])


@needs_torchvision
def test_all_is_measured_and_kept(tiny, tmp_path, capsys, monkeypatch):
    small = roofline.ceilings
    monkeypatch.setattr(speed, "ceilings", lambda device: small(device, rounds=1, scale=1 / 16))
    out = tmp_path / "out.json"
    args = ["--version", "tiny", "--size", 300, "--routes", "plain", "deployed"]
    args += ["--batch", 1, 3, "--threads", 1, "--device", "cpu", "--rounds", 2, "--roofline"]
    assert run(*args, "--json", out) == 0
    text = capsys.readouterr().out
    assert re.search(
        r"^measured: copies of \d+ GB/s, in a cache \d+; .* fp32 [\d.]+, bf16", text, re.M
    )
    assert re.search(r"^batch 3, 1 threads; milliseconds$", text, re.M)
    assert re.search(
        r"^tiny +300 deployed +bf16( +[\d.]+){7}  x *[\d.]+  \d+\.\d\d % of \d+, "
        r"\d+% of the bandwidth, \d+% of the operations$",
        text,
        re.M,
    )
    assert re.search(
        r"^tiny 300 deployed bf16, 1 threads: at best [\d.]+ pictures a second through the "
        r"network, at batch [13]$",
        text,
        re.M,
    )
    content = json.loads(out.read_text())
    ways = [("plain", "fp32"), ("deployed", "fp32"), ("deployed", "bf16")]
    rows = content["rows"]
    assert [(row["batch"], row["route"], row["precision"]) for row in rows] == [
        (batch, *way) for batch in (1, 3) for way in ways
    ]
    for row in rows:
        assert (row["network"], row["size"], row["threads"]) == ("tiny", 300, 1)
        assert all(len(times) == 2 for times in row["seconds"].values())
        parts = [row["seconds"][stage] for stage in speed.STAGES]
        assert np.sum(parts, 0) == pytest.approx(row["seconds"]["total"])
        assert row["median"]["total"] == pytest.approx(np.median(row["seconds"]["total"]))
        assert row["p95"]["total"] == pytest.approx(np.percentile(row["seconds"]["total"], 95))
        assert row["pictures_per_second"] == pytest.approx(row["batch"] / row["median"]["total"])
        assert row["agreement"]["boxes"] > 20
        # A route is of the precision that it is said to be.
        differs = row["agreement"]["score_difference"]
        assert differs > 1e-3 if row["precision"] == "bf16" else differs < 1e-3
    assert set(content["environment"]["versions"]) == {"python", "numpy", "opencv", "torch"}
    assert content["pictures"] == {"of": "made up", "count": 3}
    assert content["ceilings"].keys() == {"1"} and content["claims"] == content["differing"] == []


@needs_torchvision
def test_a_route_that_finds_other_boxes_is_left_out(tiny, tmp_path, monkeypatch, capsys):
    def wrong(net):
        def forward(images):
            loc, conf = net(images)
            return loc + 0.2, conf

        return forward

    monkeypatch.setitem(speed.WAYS, "wrong", speed.Way(wrap=wrong))
    out = tmp_path / "out.json"
    args = ["--version", "tiny", "--size", 300, "--routes", "plain", "wrong", "deployed"]
    args += ["--device", "cpu", "--amp", "off", "--threads", 1, "--rounds", 1]
    assert run(*args, "--json", out) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"error: tiny wrong fp32 finds other boxes than the plain network: a coordinate, in "
        r"pixels, differs by [\d.]+, 1 is allowed \(size 300, batch 1, 1 threads\)\n",
        error,
    )
    content = json.loads(out.read_text())
    assert [row["route"] for row in content["rows"]] == ["plain", "deployed"]
    assert content["differing"] == [error.removeprefix("error: ").strip()]


@pytest.fixture
def detector(tiny, tmp_path):
    """A folder of pictures, a checkpoint, and what was exported of it."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    files = speed.made_up(folder, 3, 64, 48)
    (folder / "notes.txt").write_text("no picture")
    checkpoint = speed.new_weights("tiny", 300, tmp_path, files)
    exported = tmp_path / "tiny.onnx"
    args = [checkpoint, "--format", "onnx", "--images", folder, "--output", exported]
    assert export.main([str(arg) for arg in args]) == 0
    return folder, checkpoint, exported


@needs_torchvision
def test_an_exported_file_is_a_route_of_its_checkpoint(detector, tmp_path, capsys):
    folder, checkpoint, exported = detector
    out = tmp_path / "out.json"
    args = [
        "--checkpoint",
        checkpoint,
        "--exported",
        exported,
        "--pictures",
        folder,
        "--amp",
        "off",
    ]
    assert run(*args, "--batch", 2, "--rounds", 1, "--device", "cpu", "--json", out) == 0
    content = json.loads(out.read_text())
    ways = [(row["route"], row["precision"]) for row in content["rows"]]
    assert ways == [("plain", "fp32"), ("deployed", "fp32"), ("tiny.onnx", "fp32")]
    assert content["pictures"] == {"of": str(folder), "count": 3}
    other = tmp_path / "other.pth"
    shutil.copy(checkpoint, other)
    with open(other, "ab") as file:
        file.write(b"0")
    assert sha256_of(other) != sha256_of(checkpoint)
    assert run("--checkpoint", other, "--exported", exported) == 2
    assert "was made of another tiny_300.pth, which is none of" in capsys.readouterr().err


@needs_torchvision
def test_a_network_that_finds_nothing_cannot_be_compared(detector, tmp_path, capsys):
    _, checkpoint, _ = detector
    net = build_net("tiny", 300, 81)
    net.load_state_dict(torch.load(checkpoint))
    for head in net.conf:
        head.bias.data[::81] += 100
    torch.save(net.state_dict(), tmp_path / "blind.pth")
    assert run("--checkpoint", tmp_path / "blind.pth", "--device", "cpu") == 2
    assert "blind.pth finds nothing on the first 2 pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--exported", "a.onnx"], "--exported goes with the --checkpoint"),
        (["--checkpoint", "a.pth", "--size", 300], "--checkpoint knows its network"),
        (["--device", "cpu", "--amp", "tf32"], "--amp tf32 needs a GPU"),
        (["--device", "cpu", "--amp", "fp16"], "--amp fp16 needs a GPU"),
        (["--device", "cpu", "--routes", "graph"], "--routes graph needs a GPU"),
        (["--device", "cpu", "--checkpoint", "none.pth"], "none.pth does not exist"),
        (["--device", "cpu", "--pictures", "none"], "none holds no pictures"),
        (["--compare", "none.json", "none.json"], "none.json cannot be read (No such file"),
    ],
)
def test_mistakes_are_told(args, message, capsys):
    assert run(*args) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@needs_torchvision
def test_compiled_networks_of_more_kinds_than_the_compiler_keeps(tiny, tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    names = [f"tiny{i}" for i in range(9)]
    counters.clear()
    files = speed.made_up(tmp_path, 1, 64, 48)
    checkpoint = speed.new_weights("tiny", 300, tmp_path, files)
    networks = [replace(speed.open_network(checkpoint, "cpu"), name=name) for name in names]
    with speed.using_threads(1), speed.compilations(CPU):
        routes, _ = speed.measure(
            networks, lambda n: speed.routes_of(n, ["compiled"], ["off"], [], 1), files, 1, 1
        )
    assert [route.network.name for route in routes] == names
    # Its own graph for each, as its weights are frozen in it.
    assert counters["stats"]["unique_graphs"] == len(names)


@pytest.mark.gpu
def test_every_route_on_a_gpu(tmp_path, capsys):
    out = tmp_path / "out.json"
    args = ["--version", "SSD_HarDNet39ds", "--size", 300, "--batch", 1, 2, "--rounds", 2]
    args += ["--routes", "plain", *speed.WAYS, "--amp", *speed.PRECISIONS, "--roofline"]
    assert run(*args, "--device", "cuda", "--json", out) == 0
    content = json.loads(out.read_text())
    assert len(content["rows"]) == 2 * (1 + len(speed.WAYS)) * len(speed.PRECISIONS)
    for row in content["rows"]:
        assert row["agreement"]["bytes"] > 0
        assert row["agreement"]["matched"] > 0.5
        assert row["shares"].keys() == {"bandwidth", "operations"}


# ---------------------------------------------------------------- evidence


def series(rng, median: float, noise: float = 0.02, rounds: int = 10) -> list[float]:
    return (median * np.exp(rng.normal(0, noise, rounds))).tolist()


def test_the_same_gives_evidence_no_more_often_than_stated():
    rng = np.random.default_rng(0)
    found = [evidence.ratio(series(rng, 1), series(rng, 1), 0.9) for _ in range(1000)]
    assert 0.05 < np.mean([not r.low <= 1 <= r.high for r in found]) < 0.11
    judged = [evidence.judge(series(rng, 1), series(rng, 1))["verdict"] for _ in range(1000)]
    assert np.mean([verdict != "no evidence" for verdict in judged]) <= 0.01


@pytest.mark.parametrize(("factor", "verdict"), [(0.9, "faster"), (1.1, "slower")])
def test_a_tenth_is_evidence_where_there_is_little_noise(factor, verdict):
    rng = np.random.default_rng(0)
    found = [evidence.judge(series(rng, 1), series(rng, factor)) for _ in range(200)]
    assert np.mean([each["verdict"] == verdict for each in found]) > 0.99
    assert np.mean([each["low"] < factor < each["high"] for each in found]) > 0.97
    words = rf"{verdict}: \d\.\d{{3}} to \d\.\d{{3}} of the time"
    assert re.fullmatch(words, evidence.describe(found[0]))


def test_the_interval_is_that_of_the_table_of_the_test():
    """Of 5 against 5 times the third pair from either end, as the critical value of U is 2."""
    before, after = [1, 2, 3, 4, 5], [16, 32, 64, 128, 256]
    pairs = sorted(b / a for a, b in itertools.product(before, after))
    found = evidence.ratio(before, after, 0.95)
    assert (found.low, found.high) == pytest.approx((pairs[2], pairs[-3]))
    assert found.estimate == pytest.approx(pairs[12])


def test_few_rounds_and_a_drifting_run_are_no_evidence():
    few = evidence.judge([1.0, 1.0], [0.5, 0.5])
    assert few == {"ratio": 0.5, "low": None, "high": None, "verdict": "no evidence"}
    assert evidence.describe(few) == "no evidence (too few rounds)"
    steady, drifting = [1 + i / 1e4 for i in range(20)], [1.02**i for i in range(20)]
    judged = evidence.judge(steady, [1.15 * t for t in steady])
    assert judged["verdict"] == "slower"
    judged = evidence.judge(steady, drifting)
    assert judged["low"] > 1 and judged["verdict"] == "no evidence"
    with pytest.raises(ValueError, match="all of them positive"):
        evidence.ratio([1.0], [0.0])
    with pytest.raises(ValueError, match="both series need times"):
        evidence.ratio([], [1.0])


# ---------------------------------------------------------------- two runs, and claims


def row(forward, network="a", route="deployed", size=512, decode=None):
    seconds = dict.fromkeys((*speed.STAGES, "total"), [1 + i / 1e3 for i in range(10)])
    seconds |= {"forward": forward, "decode": decode or seconds["decode"]}
    key = (network, size, route, "fp32", 1, 2)
    return {**dict(zip(speed.KEY, key, strict=True)), "seconds": seconds}


def content(*rows, torch_version="2.15"):
    environment = {"cpu": "x", "versions": {"torch": torch_version}}
    return {"environment": environment, "pictures": {"of": "made up"}, "rows": rows}


def test_two_runs_are_compared_row_by_row(tmp_path, capsys):
    rng = np.random.default_rng(0)
    before = content(row(series(rng, 1)), row(series(rng, 1), "only"))
    after = content(row(series(rng, 0.8)), torch_version="2.16")
    files = [tmp_path / "before.json", tmp_path / "after.json"]
    for file, run_content in zip(files, (before, after), strict=True):
        file.write_text(json.dumps(run_content))
    assert run("--compare", *files, "--json", tmp_path / "out.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "not the same: environment versions torch: 2.15 / 2.16",
        "a 512 deployed fp32, batch 1, 2 threads",
    ]
    assert re.fullmatch(r"  forward +x0\.\d+  faster: 0\.7\d\d to 0\.8\d\d of the time", lines[4])
    assert re.fullmatch(r"  total +x1\.000  no evidence \(0\.\d+ to 1\.\d+\)", lines[6])
    assert lines[7:] == ["in one of the files only: only 512 deployed fp32 1 2"]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["rows"][0]["stages"]["forward"]["verdict"] == "faster"


def test_another_state_of_the_machine_shows_in_the_decoding(capsys):
    rng = np.random.default_rng(0)
    runs = [content(row(series(rng, x), decode=series(rng, x))) for x in (1, 1.3)]
    speed.show_comparison(speed.compare_runs(*runs))
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"decoding, in which no network has a part, is slower: 1\.[23]\d+ to", last)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"rows": [{}]}', '{"rows": [3]}', '{"rows": []}']
)
def test_another_file_is_refused(tmp_path, capsys, text):
    (tmp_path / "x.json").write_text(text)
    assert run("--compare", tmp_path / "x.json", tmp_path / "x.json") == 2
    assert "x.json is no file of benchmarks.speed" in capsys.readouterr().err


def test_claims_are_judged_where_both_networks_were_measured(capsys):
    rng = np.random.default_rng(0)
    rows = [
        row(series(rng, 10), "SSD_vgg"),
        row(series(rng, 4), "SSD_HarDNet68"),
        row(series(rng, 10), "SSD_vgg", "plain"),
        row(series(rng, 7), "SSD_HarDNet68", "plain"),
        row(series(rng, 10), "SSD_resnet101"),
        row(series(rng, 10), "SSD_HarDNet85"),
        row(series(rng, 10), "SSD_vgg", size=300),
        row(series(rng, 4), "SSD_HarDNet68", size=300),
        row(series(rng, 1), "SSD_HarDNet68", "compiled"),
    ]
    found = speed.judge_claims(rows)
    assert [(x["network"], x["route"], x["verdict"]) for x in found] == [
        ("SSD_HarDNet68", "deployed", "holds"),
        ("SSD_HarDNet68", "plain", "does not hold"),
        ("SSD_HarDNet85", "deployed", "no evidence"),
    ]
    speed.show_claims(found[:1])
    assert re.match(
        r"SSD_HarDNet68's forward pass takes 0\.\d+ \(0\.3\d+ to 0\.4\d+\) of SSD_vgg's \(deployed "
        r"fp32, batch 1, 2 threads\); at most 0\.55: holds$",
        capsys.readouterr().out,
    )


def test_other_work_is_measured(monkeypatch):
    if speed.OtherWork().cores() is None:
        pytest.skip("this system does not tell")
    ticks = speed.os.sysconf("SC_CLK_TCK")
    busy, clock = iter([0, 3 * ticks]), iter([10, 12])
    text = "cpu {} 0 0 5 5 0 0 {} 0 0\ncpu0 0"
    monkeypatch.setattr(
        speed.Path, "read_text", lambda self: text.format(*[next(busy)] * 2)
    )  # user and stolen
    monkeypatch.setattr(speed.time, "monotonic", lambda: next(clock))
    own = iter([0.5, 1.5])
    monkeypatch.setattr(speed.time, "process_time", lambda: next(own))
    work = speed.OtherWork()
    assert work.cores() == (3 + 3 - 1) / 2
    assert speed.disturbed(2.5) and not speed.disturbed(0.05) and not speed.disturbed(None)


def test_other_work_is_told(capsys):
    runs = [content({**row([1.0] * 9), "others": others}) for others in (0.02, 1.4)]
    speed.show_comparison(speed.compare_runs(*runs))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("after, other programs used up to 1.4 cores: that is in its times, too")


def test_a_disturbed_run_changes_nothing_beside_plain():
    rng = np.random.default_rng(0)
    runs = []
    for factor in (1, 1.5):
        rows = [row(series(rng, 1), route=way) for way in ("plain", "deployed")]
        for each in rows:
            each["seconds"]["total"] = series(rng, factor)
        runs.append(content(*rows))
    plain, deployed = (each["stages"] for each in speed.compare_runs(*runs)["rows"])
    assert "total beside plain" not in plain
    assert deployed["total"]["verdict"] == "slower"
    assert deployed["total beside plain"]["verdict"] == "no evidence"


def test_nothing_is_collected_in_a_time():
    with speed.no_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


# ---------------------------------------------------------------- roofline


def test_ceilings_are_of_the_bytes_and_operations_that_were_timed(monkeypatch):
    def medians(calls, rounds, device):
        for call in calls.values():
            call()
        return dict.fromkeys(calls, 0.5)

    monkeypatch.setattr(roofline, "medians", medians)
    found = roofline.ceilings(CPU, scale=1 / 16)
    assert found["bandwidth"] == 2 * (16 << 20) / 0.5
    assert found["bandwidth_in_cache"] == 2 * (16 << 10) * roofline.REPEATS / 0.5
    product, convolution = 2 * 96**3 / 0.5, 2 * 9 * 16**2 * 64**2 / 0.5  # the faster counts
    assert product < convolution
    assert found["operations"] == {"fp32": convolution, "bf16": convolution, "int8": product}


def test_shares_are_those_of_the_profile():
    class Counted(Profile):
        macs, traffic = 500, 300

    ceiling = {"bandwidth": 1000.0, "operations": {"bf16": 10_000.0}}
    counted = Counted((), parameters=100, sums=50)
    assert roofline.shares(counted, 4, "bf16", 2.0, ceiling) == {
        "bandwidth": 2 * (4 * 350 + 100) / 2 / 1000,
        "operations": 2 * 4 * 500 / 2 / 10_000,
    }
    assert roofline.shares(counted, 1, "fp32", 1.0, ceiling).keys() == {"bandwidth"}


def test_float32_is_tf32_within_the_block_only():
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    for allowed in (True, False):
        with roofline.tensor_float(allowed):
            assert [flag.allow_tf32 for flag in flags] == [allowed] * 2
    assert [flag.allow_tf32 for flag in flags] == before
