"""The benchmark of stages and routes: its clock, its checks and its rows."""

import gc
import json

import cv2
import numpy as np
import pytest
import torch
from nms_routines import needs_torchvision
from tiny import TINY

import models
from benchmarks import harness, limits, routes, speed
from benchmarks.harness import CPU
from data.config import INPUT_MEAN
from inference import gathered_conv
from inference.predictor import Predictor
from tools.traffic import Profile
from utils.checkpoint import sha256_of
from utils.device import to_input


@pytest.fixture
def detector(tmp_path, monkeypatch):
    """A folder of images, and a checkpoint of a tiny network."""
    monkeypatch.setitem(models.BACKBONES, "tiny", TINY)
    monkeypatch.setattr(routes, "CLASSES", 5)
    folder = tmp_path / "images"
    folder.mkdir()
    files = routes.make_images(folder, 3, 64, 48)
    (folder / "notes.txt").write_text("no image")
    return folder, routes.new_weights("tiny", 300, tmp_path, files)


def run(*args) -> int:
    return speed.main([*map(str, args), "--device", "cpu", "--rounds", "2"])


def rows_of(capsys, *args, status=0) -> list[dict]:
    assert run(*args, "--json", "-") == status
    return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


class Clock:
    """A predictor whose stages take 1, 10, 100 and 1000 seconds on a clock of its own."""

    device, now = CPU, 0

    def __init__(self, monkeypatch, groups: int):
        self.groups = groups
        monkeypatch.setattr(harness.time, "perf_counter", lambda: self.now)
        image_of = self.stage(1, lambda file: np.zeros((3, file, 3), np.uint8))
        monkeypatch.setattr(routes, "read_image", image_of)
        self.preprocess = self.stage(10, len)
        self.forward = self.stage(100, lambda batch: batch)
        self.postprocess = self.stage(1000, lambda outputs, sizes: sizes)

    def stage(self, seconds, call):
        def run(*arguments):
            self.now += seconds
            return call(*arguments)

        return run

    def batches(self, images):
        size = len(images) // self.groups
        return [images[i : i + size] for i in range(0, len(images), size)]


@pytest.mark.parametrize("groups", [1, 2])
def test_every_stage_has_its_own_time(monkeypatch, groups):
    route = routes.Route(None, "", "fp32", Clock(monkeypatch, groups), None)
    seconds, found = route.run([7, 8, 9, 10])
    times = {"preprocess": 10 * groups, "forward": 100 * groups, "postprocess": 1000 * groups}
    assert seconds == {"decode": 4, **times, "total": 4 + 1110 * groups}
    assert found == [(width, 3) for width in (7, 8, 9, 10)]
    assert route.forward(None) == {"forward": 100}


@pytest.mark.parametrize(("version", "count"), [("tiny", 1), ("SSD_HarDNet39ds", 2)])
def test_new_weights_give_a_few_hundred_scores(detector, tmp_path, version, count):
    files = routes.make_images(tmp_path, count, 64, 48)
    predictor = Predictor(routes.new_weights(version, 300, tmp_path, files), device="cpu")
    outputs = predictor.forward(predictor.preprocess([cv2.imread(str(file)) for file in files]))
    scores = outputs["conf"].softmax(2)[..., 1:]
    assert int((scores > 0.02).sum()) == pytest.approx(count * routes.SCORES_OVER, abs=2)
    assert scores.max() > 0.2  # not all are close to the threshold
    assert outputs["loc"].std() == pytest.approx(0.5, abs=0.1)


@needs_torchvision
def test_all_routes_are_compared_and_timed(detector, capsys, monkeypatch):
    small = limits.measure
    monkeypatch.setattr(limits, "measure", lambda device: small(device, rounds=1, scale=1 / 16))
    args = ("--version", "tiny", "--size", 300, "--images", detector[0], "--batch", 1, 3)
    ceiling, *rows = rows_of(capsys, *args, "--threads", 1, "--limits")
    assert ceiling["limits"].keys() == {"fp32", "bf16", "int8"} and ceiling["bandwidth"] > 0
    ways = [("plain", "fp32"), ("deployed", "fp32"), ("deployed", "bf16")]
    assert [(row["batch"], row["route"], row["precision"]) for row in rows] == [
        (batch, *way) for batch in (1, 3) for way in ways
    ]
    for row in rows:
        assert (row["network"], row["size"], row["threads"]) == ("tiny", 300, 1)
        assert set(row["seconds"]) == {*routes.STAGES, "total"}
        assert row["images a second"] == pytest.approx(row["batch"] / row["seconds"]["total"])
        assert row["boxes"] > 20 and row["matched"] > (0.99 if row["precision"] == "fp32" else 0)
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
    monkeypatch.setitem(routes.WAYS, "deployed", routes.Way(wrap))
    args = ("--version", "tiny", "--size", 300, "--images", detector[0], "--amp", "off")
    plain, deployed = rows_of(capsys, *args, status=1)
    assert "error" not in plain and plain["matched"] == 1
    assert error in deployed["error"] and "seconds" not in deployed
    assert gc.isenabled()


class Exported(Predictor):
    """An exported file that runs the network of the checkpoint beside it; it holds a digest."""

    def __init__(self, file, threads=None):
        super().__init__(file.with_suffix(".pth"), device="cpu")
        origin = {"file": "tiny_300.pth", "sha256": file.read_text()}
        info = type("Info", (), {"checkpoint": origin, "precision": "int8"})
        self.exported = type("Model", (), {"info": info})

    def batches(self, images):
        return [images]

    def preprocess(self, images):
        return to_input(self.stack(images), INPUT_MEAN, self.device)

    def forward(self, batch):
        return dict(zip(("loc", "conf"), self.net(batch), strict=True))


@needs_torchvision
def test_an_exported_file_is_a_route_of_its_checkpoint(detector, capsys, monkeypatch):
    folder, checkpoint = detector
    exported = checkpoint.with_suffix(".xml")
    exported.write_text(sha256_of(checkpoint))

    def open_file(file, **more):
        return (Exported if file == exported else Predictor)(file, **more)

    monkeypatch.setattr(speed, "Predictor", open_file)
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
    assert "blind.pth finds nothing on the first 2 images" in capsys.readouterr().err


@pytest.mark.parametrize(("args", "message"), [
    (["--exported", "a.onnx"], "--exported goes with the --checkpoint"),
    (["--checkpoint", "a.pth", "--size", 300], "leave --version and --size out"),
    (["--amp", "tf32"], "--amp tf32 needs a GPU"),
    (["--routes", "graph"], "--routes graph needs a GPU"),
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
    setting = speed.Setting(speed.files_of(folder), 1, 1, 1, False)
    with speed.using_threads(1), routes.compilations(CPU):
        found = speed.measure(networks, lambda net: routes.routes_of(net, ["compiled"], ["off"]),
                              setting)
    assert [route.network.name for route in found if speed.fine(route)] == names
    # One graph each: its weights are frozen in it.
    assert counters["stats"]["unique_graphs"] == len(names)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("ways", "amps"), [(["deployed", "graph"], [*routes.PRECISIONS]), ([*routes.WAYS], ["bf16"])],
    ids=["precisions", "routes"])
def test_every_route_on_a_gpu(capsys, monkeypatch, ways, amps):
    # One tile: every trial of another one compiles all layers again.
    monkeypatch.setattr(gathered_conv, "TILES", ((64, 32),))
    monkeypatch.setattr(gathered_conv, "_fitting", lambda configs, *_, **__: configs)
    args = ["--version", "SSD_HarDNet39ds", "--size", 300, "--batch", 2, "--rounds", 2]
    args += ["--routes", "plain", *ways, "--amp", *amps, "--limits"]
    gathered_conv._kernel.cache_clear()
    try:
        assert speed.main([*map(str, args), "--device", "cuda", "--json", "-"]) == 0
    finally:
        gathered_conv._kernel.cache_clear()
    _, *rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert len(rows) == (1 + len(ways)) * len(amps)
    for row in rows:
        assert row["MiB"] > 0 and row["matched"] > 0.5
        assert row["shares"].keys() == {"bandwidth", "operations"}


def measured(network, route, seconds, size=512):
    info = type("Info", (), {"size": size})
    predictor = type("Predictor", (), {"info": info})
    found = routes.Route(routes.Network(network, None, None, predictor), route, "fp32", None, None)
    found.times["forward"] = [seconds * (1 + i / 1e3) for i in range(10)]
    return found


def test_claims_are_judged_where_both_networks_were_measured():
    found = [measured("SSD_vgg", "deployed", 10), measured("SSD_HarDNet68", "deployed", 4),
             measured("SSD_vgg", "plain", 10), measured("SSD_HarDNet68", "plain", 7),
             measured("SSD_resnet101", "deployed", 10), measured("SSD_HarDNet85", "deployed", 10),
             measured("SSD_HarDNet68", "compiled", 1), measured("SSD_vgg", "graph", 9, 300),
             measured("SSD_HarDNet68", "graph", 4, 300)]
    rows = list(speed.claims(found, speed.Setting([], 8, 1, 10, True)))
    assert [(row["claim"], row["route"], row["verdict"], row["batch"]) for row in rows] == [
        ("time of SSD_HarDNet68 / SSD_vgg", "deployed", "holds", 8),
        ("time of SSD_HarDNet68 / SSD_vgg", "plain", "does not hold", 8),
        ("time of SSD_HarDNet85 / SSD_resnet101", "deployed", "no evidence", 8),
    ]
    assert rows[0]["ratio"] == pytest.approx(0.4, rel=1e-2)


def test_limits_are_of_the_bytes_and_operations_that_were_timed(monkeypatch):
    def race(calls, rounds, device):
        for call in calls.values():
            call()
        return dict.fromkeys(calls, 0.5), {}

    monkeypatch.setattr(limits, "race", race)
    found = limits.measure(CPU, scale=1 / 16)
    assert found["bandwidth"] == 2 * (16 << 20) / 0.5
    product, convolution = 2 * 96**3 / 0.5, 2 * 9 * 16**2 * 64**2 / 0.5  # the faster counts
    assert product < convolution
    assert found["operations"] == {"fp32": convolution, "bf16": convolution, "int8": product}


def test_shares_are_those_of_the_profile():
    ceiling = {"bandwidth": 1000.0, "operations": {"bf16": 10_000.0}}
    counted = Profile((), parameters=100, sums=50, macs=500, cio=300)
    assert limits.shares(counted, 4, "bf16", 2.0, ceiling) == {
        "bandwidth": 2 * (4 * 350 + 100) / 2 / 1000, "operations": 2 * 4 * 500 / 2 / 10_000,
    }
    assert limits.shares(counted, 1, "fp32", 1.0, ceiling).keys() == {"bandwidth"}


def test_settings_last_for_their_block_only():
    def settings():
        flags = torch.backends.cudnn, torch.backends.cuda.matmul
        allowed = [flag.allow_tf32 for flag in flags]
        return *allowed, torch.get_num_threads(), cv2.getNumThreads()

    before = settings()
    for allowed in (True, False):
        with limits.tensor_float(allowed), speed.using_threads(1):
            assert settings() == (allowed, allowed, 1, 1)
    assert settings() == before
