"""The benchmark of stages and routes: its clock, its checks and its rows."""

import gc
import json
from functools import partial
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from nms_routines import needs_torchvision

from benchmarks import harness, roofline, routes, speed
from benchmarks.harness import CPU
from inference.predictor import Predictor
from tools.traffic import Layer, Profile
from utils.checkpoint import sha256_of


@pytest.fixture
def images(voc_folder):
    """A folder of six images."""
    (voc_folder / "JPEGImages" / "notes.txt").write_text("no image")
    return voc_folder / "JPEGImages"


@pytest.fixture
def detector(images, tmp_path, tiny, monkeypatch):
    """The folder of images, and a checkpoint of a tiny network."""
    monkeypatch.setattr(routes, "CLASSES", 5)
    monkeypatch.setattr(harness, "CLASSES", 5)
    return images, routes.new_weights("tiny", 300, tmp_path, speed.files_of(images))


def run(*args) -> int:
    return speed.main([*map(str, args), "--device", "cpu", "--rounds", "2"])


def rows_of(capsys, *args, status=0) -> list[dict]:
    assert run(*args, "--json", "-") == status
    return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


@pytest.mark.parametrize("groups", [1, 2])
def test_every_stage_has_its_own_time(monkeypatch, groups):
    """Stages that take 1, 10, 100 and 1000 seconds on a clock of their own."""
    clock = [0]

    def takes(seconds, call):
        def run(*arguments):
            clock[0] += seconds
            return call(*arguments)

        return run

    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])
    image_of = takes(1, lambda file: np.zeros((3, file, 3), np.uint8))
    monkeypatch.setattr(routes, "read_image", image_of)
    predictor = SimpleNamespace(
        device=CPU, batches=lambda images: [images] if groups == 1 else [images[:2], images[2:]],
        preprocess=takes(10, len), forward=takes(100, lambda batch: batch),
        postprocess=takes(1000, lambda outputs, sizes: sizes))
    route = routes.Route(None, "", "fp32", predictor)
    seconds, found = route.run([7, 8, 9, 10])
    times = {"preprocess": 10 * groups, "forward": 100 * groups, "postprocess": 1000 * groups}
    assert seconds == {"decode": 4, **times, "total": 4 + 1110 * groups}
    assert found == [(width, 3) for width in (7, 8, 9, 10)]
    assert route.forward(None) == {"forward": 100}


@pytest.mark.parametrize(("version", "count"), [("tiny", 1), ("SSD_HarDNet39ds", 2)])
def test_new_weights_give_a_few_hundred_scores(detector, tmp_path, version, count):
    files = speed.files_of(detector[0])[:count]
    predictor = Predictor(routes.new_weights(version, 300, tmp_path, files), device="cpu")
    outputs = predictor.forward(predictor.preprocess([cv2.imread(str(file)) for file in files]))
    scores = outputs["conf"].softmax(2)[..., 1:]
    assert int((scores > 0.02).sum()) == pytest.approx(count * routes.SCORES_OVER, abs=2)
    assert scores.max() > 0.2  # not all are close to the threshold
    assert outputs["loc"].std() == pytest.approx(0.5, abs=0.1)


@needs_torchvision
def test_all_routes_are_compared_and_timed(detector, capsys, monkeypatch):
    small = partial(roofline.measure, rounds=1, scale=1 / 16)
    monkeypatch.setattr(roofline, "measure", small)
    args = ("--version", "tiny", "--size", 300, "--images", detector[0], "--batch", 1, 3)
    limits, *rows = rows_of(capsys, *args, "--roofline")
    assert limits["limits"].keys() == {"fp32", "bf16", "int8"} and limits["bandwidth"] > 0
    ways = [("plain", "fp32"), ("deployed", "fp32"), ("deployed", "bf16")]
    assert [(row["batch"], row["route"], row["precision"]) for row in rows] == [
        (batch, *way) for batch in (1, 3) for way in ways
    ]
    for row in rows:
        assert (row["network"], row["size"]) == ("tiny", 300)
        assert set(row["seconds"]) == {"decode", "preprocess", "forward", "postprocess", "total"}
        assert row["images a second"] == pytest.approx(row["batch"] / row["seconds"]["total"])
        assert row["boxes"] > 10 and row["matched"] > (0.99 if row["precision"] == "fp32" else 0)
        assert row["shares"].keys() == {"bandwidth", "operations"}
    (row,) = rows_of(capsys, *args[:-1], "--routes", "deployed", "--amp", "bf16", "--forward")
    assert set(row["seconds"]) == {"forward"}


def no_memory(images):
    raise torch.OutOfMemoryError


def other_boxes(net):
    net.heads[0].bias.data += 1
    return net


@needs_torchvision
@pytest.mark.parametrize(("wrap", "error"), [
    (other_boxes, "finds other boxes"), (lambda net: no_memory, "OutOfMemoryError")])
def test_a_route_that_fails_is_a_row(detector, capsys, monkeypatch, wrap, error):
    monkeypatch.setitem(routes.WAYS, "deployed", (wrap, False))
    args = ("--version", "tiny", "--size", 300, "--images", detector[0], "--amp", "off")
    plain, deployed = rows_of(capsys, *args, status=1)
    assert "error" not in plain and plain["matched"] == 1
    assert error in deployed["error"] and "seconds" not in deployed
    assert gc.isenabled()


class Exported:
    """An exported file that runs the network of the checkpoint beside it; it holds a digest."""

    def __init__(self, file):
        self.network = Predictor(file.with_suffix(".pth"), device="cpu")
        origin = {"file": "tiny_300.pth", "sha256": file.read_text()}
        info = SimpleNamespace(checkpoint=origin, precision="int8")
        self.exported = SimpleNamespace(info=info)

    def __getattr__(self, name):
        return getattr(self.network, name)


@needs_torchvision
def test_an_exported_file_is_a_route_of_its_checkpoint(detector, capsys, monkeypatch):
    folder, checkpoint = detector
    exported = checkpoint.with_suffix(".xml")
    exported.write_text(sha256_of(checkpoint))

    def open_file(file, **more):
        return Exported(file) if file == exported else Predictor(file, **more)

    monkeypatch.setattr(routes, "Predictor", open_file)
    args = ("--checkpoint", checkpoint, "--exported", exported, "--images", folder)
    rows = rows_of(capsys, *args, "--amp", "off")
    ways = [(row["route"], row["precision"]) for row in rows]
    assert ways == [("plain", "fp32"), ("deployed", "fp32"), ("tiny_300.xml", "int8")]
    exported.write_text("another")
    assert run(*args) == 2
    assert "tiny_300.xml was made of another tiny_300.pth" in capsys.readouterr().err


@needs_torchvision
def test_a_network_that_finds_nothing_cannot_be_compared(detector, tmp_path, capsys):
    saved = torch.load(detector[1])
    for key, tensor in saved["model"].items():
        if key.startswith("conf") and key.endswith("bias"):
            tensor[::5] += 100
    torch.save(saved, tmp_path / "blind.pth")
    assert run("--checkpoint", tmp_path / "blind.pth") == 2
    assert "blind.pth finds nothing on" in capsys.readouterr().err


@pytest.mark.parametrize(("args", "message"), [
    (["--exported", "a.onnx"], "--exported goes with the --checkpoint"),
    (["--checkpoint", "a.pth", "--size", 300], "leave --version and --size out"),
    (["--amp", "tf32", "--routes", "graph"], "graph and tf32 (--routes, --amp) need a GPU"),
    (["--images", "none"], "none holds no images; give another folder")])
def test_mistakes_are_told(args, message, capsys):
    assert run(*args) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@needs_torchvision
def test_more_networks_are_compiled_than_the_compiler_keeps(detector):
    from torch._dynamo.utils import counters

    folder, checkpoint = detector
    names = [f"tiny{i}" for i in range(9)]
    counters.clear()
    networks = [routes.open_network(checkpoint, CPU)._replace(name=name) for name in names]
    args = speed.parser().parse_args(["--routes", "compiled", "--amp", "off", "--rounds", "1"])
    with routes.compilations(CPU):
        found = speed.measure(networks, args, speed.files_of(folder), 1)
    assert [route.network.name for route in found if route.times] == names
    # One graph each: its weights are frozen in it.
    assert counters["stats"]["unique_graphs"] == len(names)


@pytest.mark.gpu
@pytest.mark.usefixtures("tf32", "one_tile")
@pytest.mark.parametrize(
    ("ways", "amps"), [(["deployed", "graph"], [*routes.PRECISIONS]), ([*routes.WAYS], ["bf16"])],
    ids=["precisions", "routes"])
def test_every_route_on_a_gpu(capsys, ways, amps):
    args = ["--version", "SSD_HarDNet39ds", "--size", 300, "--batch", 2, "--rounds", 2]
    args += ["--routes", "plain", *ways, "--amp", *amps]
    assert speed.main([*map(str, args), "--device", "cuda", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert len(rows) == (1 + len(ways)) * len(amps)
    assert all(row["matched"] > 0.5 for row in rows)


def series(seconds, rounds=10):
    return [seconds * (1 + i / 1e3) for i in range(rounds)]


def test_claims_are_judged_where_both_networks_were_measured():
    times = {("SSD_vgg", "deployed"): 10, ("SSD_HarDNet68", "deployed"): 4,
             ("SSD_vgg", "plain"): 10, ("SSD_HarDNet68", "plain"): 7,
             ("SSD_resnet101", "deployed"): 10, ("SSD_HarDNet85", "deployed"): 10,
             ("SSD_HarDNet68", "compiled"): 1}
    forward = {(*key, "fp32", 8): series(value) for key, value in times.items()}
    forward |= {("SSD_vgg", "plain", "bf16", 1): series(10, 2),
                ("SSD_HarDNet68", "plain", "bf16", 1): series(4, 2)}  # too few
    rows = list(speed.claims(forward))
    assert [(row["claim"], row["route"], row["verdict"], row["batch"]) for row in rows] == [
        ("time of SSD_HarDNet68 / SSD_vgg", "deployed", "holds", 8),
        ("time of SSD_HarDNet68 / SSD_vgg", "plain", "does not hold", 8),
        ("time of SSD_HarDNet85 / SSD_resnet101", "deployed", "no evidence", 8),
        ("time of SSD_HarDNet68 / SSD_vgg", "plain", "no evidence", 1),
    ]
    assert rows[0]["ratio"] == pytest.approx(0.4, rel=1e-2)
    assert rows[0]["interval"][1] < 0.55 and rows[-1]["interval"] is None


def test_limits_are_of_the_bytes_and_operations_that_were_timed(monkeypatch):
    def race(calls, rounds, device):
        for call in calls.values():
            call()
        return dict.fromkeys(calls, 0.5), {}

    monkeypatch.setattr(roofline, "race", race)
    found = roofline.measure(CPU, scale=1 / 16)
    assert found["bandwidth"] == 2 * (16 << 20) / 0.5
    product, convolution = 2 * 96**3 / 0.5, 2 * 9 * 16**2 * 64**2 / 0.5  # the faster counts
    assert product < convolution
    assert found["operations"] == {"fp32": convolution, "bf16": convolution,
                                   "int8": convolution}


def test_shares_are_those_of_the_profile():
    ceiling = {"bandwidth": 1000.0, "operations": {"bf16": 10_000.0}}
    layers = Layer("a", "conv", (), (), macs=500), Layer("b", "conv", (), (), cio=300)
    counted = Profile(layers, parameters=100, sums=50)
    assert roofline.shares(counted, 4, "bf16", 2.0, ceiling) == {
        "bandwidth": 2 * (4 * 350 + 100) / 2 / 1000, "operations": 2 * 4 * 500 / 2 / 10_000}
    assert roofline.shares(counted, 1, "fp32", 1.0, ceiling).keys() == {"bandwidth"}
