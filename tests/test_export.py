"""The command that exports, its proof, and the scoring of what it wrote."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from exports import CLASSES, exported, write_checkpoint
from tiny import TINY

import models
import train_test
from data.image import read_image
from data.transforms import TestTransform
from inference import formats
from inference.predictor import Predictor
from inference.proof import TOLERANCE, Comparison, PairOfAPs, compare, excess
from inference.runtime import cpu_has_bf16
from layers import Detect, PriorBox
from models import build_net, prior_config
from tools.export import main
from utils.build import EXTRAS
from utils.checkpoint import load_checkpoint, sha256_of

for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package)

EVERYTHING = ("--preprocess", "--with-nms", "--dynamic")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(models.BACKBONES, "tiny", TINY)


@pytest.fixture
def checkpoint(tmp_path, voc_folder):
    return write_checkpoint(tmp_path / "run" / "tiny.pth", voc_folder)


def run(*arguments):
    return main(list(map(str, arguments)))


def manifest(file):
    return json.loads(file.with_name(file.name + ".json").read_text())


def reference(checkpoint, pictures, **options):
    """Detections of the network as it was trained."""
    saved = load_checkpoint(checkpoint)
    version = saved["config"]["version"]
    net = build_net(version, 300, len(CLASSES) + 1).eval()
    net.load_state_dict(saved["model"])
    mean = torch.tensor([104.0, 117, 123]).view(3, 1, 1)
    images = [torch.from_numpy(TestTransform(300)(p)).permute(2, 0, 1) - mean for p in pictures]
    with torch.no_grad():
        loc, conf = net(torch.stack(images))
    detect = Detect(0.03, top_k=300, **options)
    priors = PriorBox(prior_config(version, "VOC", 300))()
    return detect(loc, conf, priors, [p.shape[1::-1] for p in pictures])


def assert_same(found, expected):
    """The same detections, in whatever order equal scores come."""
    found, expected = (
        [{key: each[key].numpy() for key in ("boxes", "scores", "labels")} for each in detections]
        for detections in (found, expected)
    )
    for one, other in zip(found, expected, strict=True):
        assert len(one["scores"]) == len(other["scores"]) > 0
    result = compare(expected, found, 0)
    assert result.matched == 1
    assert result.score_difference < 0.002  # OpenVINO's resizing rounds some pixels otherwise
    assert result.pixel_difference < 0.2


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    "form, options",
    [
        ("onnx", ("--with-nms",)),
        ("onnx", EVERYTHING),
        ("openvino", EVERYTHING),
    ],
)
def test_a_file_detects_what_the_network_does(checkpoint, voc_folder, form, options, capsys):
    file = exported(checkpoint, form, *options)
    kept = [f"{file.stem}.bin"] * (form == "openvino") + [f"{file.name}.json"]
    assert capsys.readouterr().out.endswith(f", with {' and '.join(kept)} beside it\n")
    assert all((file.parent / name).is_file() for name in kept)
    picture = voc_folder / "JPEGImages" / "t1.jpg"
    pictures = [read_image(picture), cv2.resize(read_image(picture), (333, 251))]
    assert_same(Predictor(file)(pictures), reference(checkpoint, pictures))
    told = manifest(file)
    assert (told["file"], told["sha256"]) == (file.name, sha256_of(file))
    assert told["classes"] == CLASSES
    assert told["checkpoint"] == {"file": "tiny.pth", "sha256": sha256_of(checkpoint)}
    for option, key in (("--preprocess",) * 2, ("--dynamic",) * 2, ("--with-nms", "nms")):
        assert told[key.removeprefix("--")] == (option in options)
    assert ("pictures" in told["inputs"]) == ("--preprocess" in options)
    assert ("sizes" in told["inputs"]) == ("--with-nms" in options)
    proof = told["proof"]
    assert proof["pictures"] == 4
    assert proof["of"] == f"{voc_folder} test"
    assert proof["boxes"] > 50
    assert proof["unmatched_network"] == proof["unmatched_file"] == 0
    assert proof["score_difference"] < 1e-4
    assert proof["ap"]["network"] == pytest.approx(proof["ap"]["file"], abs=1e-3)
    assert [p.name for p in checkpoint.parent.glob(".export*")] == []


def test_a_small_published_network_keeps_its_detections(tmp_path, voc_folder):
    checkpoint = write_checkpoint(tmp_path / "39ds.pth", voc_folder, "SSD_HarDNet39ds")
    file = exported(checkpoint, "onnx", *EVERYTHING)
    picture = read_image(voc_folder / "JPEGImages" / "t2.jpg")
    assert_same(Predictor(file)([picture]), reference(checkpoint, [picture]))


@pytest.mark.parametrize(
    "form, precision, options",
    [
        ("openvino", "bf16", ("--with-nms",)),
        ("openvino", "int8", ("--with-nms", "--preprocess")),
        ("onnx", "fp16", ("--with-nms",)),
    ],
)
def test_lower_precisions_are_compared_by_the_boxes_and_the_ap(
    checkpoint, monkeypatch, form, precision, options
):
    if precision == "int8":
        pytest.importorskip("nncf")
    logger = logging.getLogger("nncf")
    levels = [each.level for each in (logger, *logger.handlers)]
    if precision == "bf16" and not cpu_has_bf16():
        pytest.skip("no bfloat16 instructions")
    # Random weights have no AP to lose, and boxes everywhere.
    loose = replace(TOLERANCE[precision], matched=0.6, ap=100)
    monkeypatch.setitem(TOLERANCE, precision, loose)
    file = exported(checkpoint, form, "--precision", precision, *options)
    told = manifest(file)
    assert told["precision"] == precision
    assert 0 < told["proof"]["score_difference"] < 0.5
    assert told["proof"]["tolerance"]["matched"] == 0.6
    if precision == "int8":
        assert told["calibration"]["pictures"] == 6
        assert told["versions"]["nncf"]
        assert "FakeQuantize" in file.read_text()
        assert [each.level for each in (logger, *logger.handlers)] == levels
    weights = file.with_suffix(".bin") if form == "openvino" else file
    compressed = (form, precision) != ("openvino", "bf16")  # that computes so, no more
    assert (weights.stat().st_size < 0.8 * checkpoint.stat().st_size) == compressed


def test_thresholds_are_baked_in_or_handed_on(checkpoint, voc_folder):
    options = ("--score_threshold", 0.2, "--max_detections", 5)
    picture = read_image(voc_folder / "JPEGImages" / "t1.jpg")
    for more in ((), ("--with-nms",)):
        file = exported(checkpoint, "onnx", *options, *more)
        found = Predictor(file)(picture)
        assert len(found["scores"]) == 5
        assert found["scores"].min() > 0.2
        assert manifest(file)["detection"]["top_k"] == 5


def test_names_come_from_the_command_where_a_file_has_none(checkpoint, voc_folder, tmp_path):
    bare = tmp_path / "bare.pth"
    torch.save(load_checkpoint(checkpoint)["model"], bare)
    command = (bare, "--format", "onnx", "--images", voc_folder / "JPEGImages")
    assert run(*command) == 2
    assert run(*command, "--classes", "a,b,c") == 0
    assert manifest(tmp_path / "bare.onnx")["classes"] == ["a", "b", "c"]


# ---------------------------------------------------------------- what is refused


def test_names_that_a_file_does_not_have_are_refused(checkpoint, voc_folder, tmp_path, capsys):
    published = tmp_path / "voc.pth"
    torch.save(build_net("tiny", 300, 21).state_dict(), published)
    pictures = ("--images", voc_folder / "JPEGImages")
    command = ("--format", "onnx", *pictures, "--classes", "a,b,c")
    error = refused(capsys, published, *command)
    assert "voc.pth has the 20 classes aeroplane, " in error
    assert error.endswith(", not a, b, c; leave the names out\n")
    error = refused(capsys, checkpoint, *command)
    assert "tiny.pth has the 3 classes cell, platelet, rod, not a, b, c; leave" in error
    assert run(checkpoint, *command[:-1], ",".join(CLASSES)) == 0


def refused(capsys, *arguments):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_what_cannot_be_meant_is_refused_in_a_sentence(checkpoint, tmp_path, capsys):
    command = (checkpoint, "--format", "onnx")
    assert "does not exist" in refused(capsys, tmp_path / "no.pth", "--format", "onnx")
    assert "fp32, fp16" in refused(capsys, *command, "--precision", "int8")
    assert "ends in .onnx" in refused(capsys, *command, "--output", tmp_path / "x.xml")
    assert "--precision int8" in refused(capsys, *command, "--calibrate", tmp_path)
    error = refused(capsys, *command, "--calibrate_sets", "train")
    assert error == "error: --calibrate_sets goes with --precision int8\n"
    coarse = ("--precision", "bf16", "--preprocess", "--dynamic")
    assert "too coarse" in refused(capsys, checkpoint, "--format", "openvino", *coarse)
    assert "no image set" in refused(capsys, *command, "--sets", "2007_test")
    (tmp_path / "empty").mkdir()
    empty = ("--images", tmp_path / "empty")
    assert "neither images nor" in refused(capsys, *command, *empty)
    assert "does not exist" in refused(capsys, *command, "--images", tmp_path / "no")
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_without_pictures_nothing_is_claimed(checkpoint, voc_folder, capsys):
    voc_folder.rename(voc_folder.with_name("elsewhere"))
    error = refused(capsys, checkpoint, "--format", "onnx")
    assert "no images to prove the file with" in error
    assert "--images FOLDER" in error
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    folder = voc_folder.with_name("elsewhere") / "JPEGImages"
    assert run(checkpoint, "--format", "onnx", "--images", folder, "--limit", 3) == 0
    told = manifest(checkpoint.with_suffix(".onnx"))["proof"]
    assert (told["pictures"], told["of"], told["ap"]) == (3, str(folder), None)


def test_a_network_that_finds_nothing_proves_nothing(checkpoint, capsys):
    saved = load_checkpoint(checkpoint)
    for key in saved["model"]:
        if key.startswith("conf") and key.endswith("bias"):
            saved["model"][key].view(-1, 4)[:, 0] = 1000
    torch.save(saved, checkpoint)
    assert "so nothing can be proven" in refused(capsys, checkpoint, "--format", "onnx")
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_file_over_the_tolerance_is_not_kept(checkpoint, monkeypatch, capsys):
    file = exported(checkpoint, "onnx")
    before = file.read_bytes()
    capsys.readouterr()
    build = formats.build_graph

    def damaged(net, *arguments):
        graph = build(net, *arguments)
        with torch.no_grad():
            next(p for name, p in graph.named_parameters() if p.ndim == 4).mul_(1.2)
        return graph

    monkeypatch.setattr(formats, "build_graph", damaged)
    assert run(checkpoint, "--format", "onnx", "--output", file) == 1
    output, error = capsys.readouterr()
    assert "without a partner" in output
    assert error.startswith(f"error: {file} is not kept: ")
    assert error.count("\n") == 1
    assert file.read_bytes() == before
    assert manifest(file)["sha256"] == sha256_of(file)
    assert {p.name for p in checkpoint.parent.iterdir()} == {
        checkpoint.name, file.name, file.name + ".json",
    }  # fmt: skip


def test_image_sets_of_a_plain_folder_are_refused(checkpoint, voc_folder, capsys):
    plain = voc_folder / "JPEGImages"
    error = refused(capsys, checkpoint, "--format", "onnx", "--images", plain, "--sets", "test")
    assert f"{plain} is a plain folder of images, without image sets" in error
    assert "leave --sets test out" in error
    if importlib.util.find_spec("nncf"):
        command = (checkpoint, "--format", "openvino", "--precision", "int8")
        calibrate = ("--calibrate", plain, "--calibrate_sets", "train")
        assert "leave --calibrate_sets train out" in refused(capsys, *command, *calibrate)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


@pytest.mark.parametrize("part", ["loc", "conf"])
def test_a_network_that_gives_nan_is_refused(checkpoint, capsys, part):
    saved = load_checkpoint(checkpoint)
    saved["model"][f"{part}.0.bias"].fill_(torch.nan)
    torch.save(saved, checkpoint)
    error = refused(capsys, checkpoint, "--format", "onnx")
    assert f"the network of tiny.pth fails ({part} contains NaN or " in error
    assert "training diverged or its weights are damaged" in error
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


@pytest.mark.parametrize("options", [(), ("--with-nms",)])
def test_a_file_that_gives_nan_is_not_kept(checkpoint, monkeypatch, capsys, options):
    build = formats.build_graph

    def damaged(net, *arguments):
        net = copy.deepcopy(net)
        net.loc[0].bias.data.fill_(torch.nan)
        return build(net, *arguments)

    monkeypatch.setattr(formats, "build_graph", damaged)
    assert run(checkpoint, "--format", "onnx", *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "tiny.onnx is not kept: " in error
    assert options or error.endswith("loc contains NaN or infinity\n")
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime", "openvino", "nncf"])
def test_a_missing_package_is_named_with_its_installation(checkpoint, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    form = ("openvino", "--precision", "int8") if package in ("openvino", "nncf") else ("onnx",)
    error = refused(capsys, checkpoint, "--format", *form)
    assert f"pip install {package}" in error
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_what_an_exporter_cannot_do_is_told_in_a_sentence(checkpoint, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise torch.onnx.OnnxExporterError("\nNo decomposition for aten.new\n\nmore")

    monkeypatch.setattr(torch.onnx, "export", fail)
    error = refused(capsys, checkpoint, "--format", "onnx")
    assert "tiny cannot be exported to ONNX by PyTorch" in error
    assert "(No decomposition for aten.new); a newer PyTorch" in error


def test_the_page_installs_what_its_commands_need():
    page = Path("docs/exporting.md").read_text("utf-8")
    (extras,) = re.findall(r"pip install -e \.\[(.*)\]", page)
    packages = {re.match(r"[\w-]+", p)[0] for name in extras.split(",") for p in EXTRAS[name]}
    for form in re.findall(r"--format (\w+)", page):
        assert packages >= set(formats.FORMATS[form].packages)


# ---------------------------------------------------------------- the comparison


def detections(*rows):
    """(label, score, x1, y1, x2, y2) each."""
    table = np.array(rows, np.float32).reshape(-1, 6)
    return {
        "labels": table[:, 0].astype(np.int64), "scores": table[:, 1], "boxes": table[:, 2:],
    }  # fmt: skip


def test_boxes_are_compared_with_their_partners():
    one = detections((1, 0.9, 0, 0, 10, 10), (2, 0.5, 20, 20, 40, 40), (1, 0.05, 50, 50, 60, 60))
    other = detections((2, 0.48, 20, 20, 40, 41), (1, 0.9, 0, 0, 10, 10), (3, 0.7, 0, 0, 10, 10))
    found = compare([one], [other], 0.1)
    assert found.boxes == 2 + 3  # without the one under the floor
    assert (found.unmatched_network, found.unmatched_file) == (0, 1)
    assert found.matched == pytest.approx(4 / 5)
    assert found.score_difference == pytest.approx(0.02, abs=1e-6)
    assert found.pixel_difference == 1
    assert found.least_iou == pytest.approx(20 / 21)


def test_a_partner_has_one_partner_and_may_lie_under_the_floor():
    one = detections((1, 0.9, 0, 0, 10, 10), (1, 0.8, 0, 0, 10, 9))
    other = detections((1, 0.9, 0, 0, 10, 10))
    assert compare([one], [other], 0.1).unmatched_network == 1
    low = detections((1, 0.02, 0, 0, 10, 10))
    found = compare([other], [low], 0.1)
    assert (found.boxes, found.unmatched_network) == (1, 0)
    assert found.score_difference == pytest.approx(0.88)


def test_other_images_and_far_boxes_are_no_partners():
    one, nothing = detections((1, 0.9, 0, 0, 10, 10)), detections()
    found = compare([one, nothing], [nothing, one], 0.1)
    assert (found.unmatched_network, found.unmatched_file, found.matched) == (1, 1, 0)
    assert found.score_difference is found.pixel_difference is found.least_iou is None
    assert compare([one], [detections((1, 0.9, 6, 0, 16, 10))], 0.1).matched == 0
    assert compare([nothing], [nothing], 0.1).matched is None


@pytest.mark.parametrize(
    "change, ap, problem",
    [
        ({}, None, ""),
        ({"matched": 0.99}, None, "99.00 % of the boxes have a partner, 99.9 % are needed"),
        ({"score_difference": 0.01}, None, "a score differs by 0.01, 0.001 is allowed"),
        ({"pixel_difference": 2.0}, None, "a coordinate, in pixels, differs by 2, 0.5 is allowed"),
        ({}, 0.49, "it loses 1.00 points of AP, 0.1 are allowed"),
        ({}, 0.51, ""),
    ],
)
def test_what_is_over_the_tolerance_is_said(change, ap, problem):
    found = replace(Comparison(9, 0, 0, 1.0, 1e-6, 0.01, 0.99), **change)
    aps = ap and PairOfAPs("AP", 0.5, ap)
    assert excess(found, TOLERANCE["fp32"], aps).partition(" (a barely")[0] == problem


# ---------------------------------------------------------------- train_test.py --test FILE


def score(file, voc_folder, *options):
    arguments = ["--test", file, "--root", voc_folder, "--device", "cpu", "--num_workers", 0]
    return train_test.main(list(map(str, [*arguments, *options])))


@pytest.mark.parametrize("form, options", [("onnx", ()), ("openvino", EVERYTHING)])
def test_a_file_is_scored_like_its_checkpoint(checkpoint, voc_folder, tmp_path, form, options):
    file = exported(checkpoint, form, *options)
    folder = ("--save_folder", tmp_path / "w")
    assert score(checkpoint, voc_folder, *folder) == 0
    assert score(file, voc_folder, *folder) == 0
    expected, found = (
        json.loads((tmp_path / "w/tiny_300" / stem / "ss_predict" / name / "test/results.json")
                   .read_text())
        for stem, name in ((checkpoint.stem,) * 2, (file.stem, file.name))
    )  # fmt: skip
    assert found["value"] == pytest.approx(expected["value"], abs=1e-3)
    assert found["detection_count"] == expected["detection_count"]
    assert found["thresholds"] == expected["thresholds"]
    told = found["checkpoint"]
    assert (told["file"], told["sha256"]) == (file.name, sha256_of(file))
    assert told["made_of"] == expected["checkpoint"]
    assert told["runtime"].split()[0] == {"onnx": "onnxruntime"}.get(form, form)
    assert score(file, voc_folder, *folder, "--retest") == 0


def test_options_that_a_file_cannot_follow_are_refused(checkpoint, voc_folder, tmp_path, capsys):
    plain, inside = (exported(checkpoint, "onnx", *more) for more in ((), ("--with-nms",)))
    folder = ("--save_folder", tmp_path / "w")
    assert score(plain, voc_folder, *folder, "--score_threshold", 0.3, "--nms", "soft") == 0
    results = next((tmp_path / "w").rglob("results.json"))
    assert json.loads(results.read_text())["thresholds"]["score"] == 0.3
    capsys.readouterr()
    for file, options, problem in (
        (inside, ("--score_threshold", 0.01), "suppression inside"),
        (inside, ("--nms", "soft"), "suppression inside"),
        (plain, ("--amp", "bf16"), "--amp cannot change"),
        (plain, ("--class_map", "cell=rod"), "--class_map cannot change"),
        (plain, ("--classes", "cell"), "contradicts"),
    ):
        assert score(file, voc_folder, *folder, *options) == 2
        error = capsys.readouterr().err
        assert problem in error
        assert error.count("\n") == 1
    assert score(inside, voc_folder, *folder, "--score_threshold", 0.03) == 0


def test_fewer_detections_of_a_file_are_those_of_the_network(checkpoint, voc_folder):
    file = exported(checkpoint, "onnx", "--with-nms")
    picture = read_image(voc_folder / "JPEGImages" / "t1.jpg")
    chosen = {"score_threshold": 0.3, "max_detections": 7}
    found, expected = (Predictor(f, **chosen)([picture]) for f in (file, checkpoint))
    assert 0 < len(found[0]["scores"]) <= 7 and found[0]["scores"].min() > 0.3
    torch.testing.assert_close(found[0]["scores"], expected[0]["scores"], rtol=0, atol=1e-4)
