"""The command that exports, its proof, and what train_test.py and Predictor do with its files."""

import importlib
import json
import logging
import re
import shutil
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import write_blood
from exports import CLASSES, exported, write_checkpoint
from tiny import TINY

import models
import train_test
from data.image import read_image
from data.image_sets import ImageSet
from inference import formats
from inference.export import ExportOptions, export
from inference.export_info import ExportInfo
from inference.images import TrainedOn, find_images
from inference.predictor import Predictor, arrays
from inference.proof import TOLERANCE, APs, Comparison, TooDifferent, compare, excess, prove
from inference.runtime import cpu_has_bf16, open_model
from layers import DetectConfig
from models.info import DetectorInfo, load_detector
from tools.export import main
from utils.build import EXTRAS
from utils.checkpoint import load_checkpoint, sha256_of
from utils.errors import UserError

for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package)

EVERYTHING = ("--preprocess", "--with-nms", "--dynamic")


@pytest.fixture(autouse=True, scope="module")
def backbones():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.BACKBONES, "tiny", TINY)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_blood(tmp_path_factory.mktemp("data") / "blood")


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """made(version, form, *options) -> a checkpoint and what the command makes of it, made once."""
    folders = cache(tmp_path_factory.mktemp)

    @cache
    def make(version, form, *options):
        folder = folders(version)
        checkpoint = folder / f"{version}.pth"
        if not checkpoint.exists():
            write_checkpoint(checkpoint, data, version)
        return checkpoint, exported(checkpoint, form, *options)

    return make


@pytest.fixture
def checkpoint(tmp_path, data):
    return write_checkpoint(tmp_path / "run" / "tiny.pth", data)


def manifest(file):
    return json.loads(file.with_name(file.name + ".json").read_text())


@pytest.mark.parametrize("version, form, options", [
    ("tiny", "onnx", ()), ("tiny", "onnx", EVERYTHING), ("tiny", "openvino", EVERYTHING),
    pytest.param("SSD_HarDNet39ds", "onnx", EVERYTHING, marks=pytest.mark.slow)])
def test_a_file_detects_what_the_network_does(made, data, version, form, options):
    checkpoint, file = made(version, form, *options)
    image = read_image(data / "JPEGImages" / "t1.jpg")
    images = [image, cv2.resize(image, (333, 251))]
    expected, found = (arrays(Predictor(each)(images)) for each in (checkpoint, file))
    result = compare(expected, found, 0)
    assert result.matched == 1 and result.boxes > 100
    assert result.score_difference < 0.002  # OpenVINO's resizing rounds some pixels otherwise
    assert result.pixel_difference < 0.2
    told = manifest(file)
    assert (told["file"], told["sha256"]) == (file.name, sha256_of(file))
    assert told["classes"] == CLASSES
    assert told["checkpoint"] == {"file": checkpoint.name, "sha256": sha256_of(checkpoint)}
    everything = options == EVERYTHING
    assert [told[key] for key in ("preprocess", "nms", "dynamic")] == [everything] * 3
    assert [*told["inputs"]] == (["pictures", "sizes"] if everything else ["images"])
    proof = told["proof"]
    assert (proof["pictures"], proof["of"]) == (4, f"{data} test")
    assert proof["boxes"] > 50
    assert proof["unmatched_network"] == proof["unmatched_file"] == 0
    assert proof["score_difference"] < 1e-4
    assert proof["ap"]["network"] == pytest.approx(proof["ap"]["file"], abs=1e-3)
    assert [p.name for p in checkpoint.parent.glob(".ssd*")] == []


@pytest.mark.parametrize("form, precision, options", [
    ("openvino", "bf16", ("--with-nms",)), ("openvino", "int8", ("--with-nms", "--preprocess")),
    ("onnx", "fp16", ("--with-nms",))])
def test_lower_precisions_are_compared_by_the_boxes_and_the_ap(checkpoint, monkeypatch, form,
                                                               precision, options):
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


@pytest.mark.parametrize("form, options", [("openvino", ()), ("onnx", ("--with-nms",))])
def test_thresholds_and_names_are_in_the_file(checkpoint, data, tmp_path, form, options, capsys):
    bare, folder = tmp_path / "bare.pth", data / "JPEGImages"
    torch.save(load_checkpoint(checkpoint)["model"], bare)
    names = ("--classes", "a,b,c", "--images", folder, "--limit", 3)
    file = exported(bare, form, "--score_threshold", 0.2, "--max_detections", 5, *names, *options)
    kept = [f"{file.stem}.bin"] * (form == "openvino") + [f"{file.name}.json"]
    assert capsys.readouterr().out.endswith(f", with {' and '.join(kept)} beside it\n")
    assert all((file.parent / name).is_file() for name in kept)
    told = manifest(file)
    assert (told["classes"], told["detection"]["top_k"]) == (["a", "b", "c"], 5)
    told = told["proof"]
    assert (told["pictures"], told["of"], told["ap"]) == (3, str(folder), None)
    image = read_image(folder / "t1.jpg")
    found = Predictor(file)(image)
    assert len(found["scores"]) == 5 and found["scores"].min() > 0.2
    inside = {"score_threshold": 0.2, "max_detections": 5}
    fewer = {"score_threshold": 0.25, "max_detections": 3}
    others = [{"score_threshold": 0.1}, {"max_detections": 6}, {"nms": "soft"}]
    if options:
        for more in others:
            with pytest.raises(UserError, match=r"scores over 0\.2, at most 5 .*; export it again"):
                Predictor(file, **more)
        with pytest.raises(UserError, match=f"{file.name} .* it again without --with-nms"):
            Predictor(file, explain=True)
        others = []
    else:
        ours, its = (Predictor(f, explain=True, **inside)(image) for f in (checkpoint, file))
        assert its["priors"].tolist() == ours["priors"].tolist()
    for chosen in (fewer, *({**inside, **other} for other in others)):
        found, expected = (Predictor(f, **chosen)(image)["scores"] for f in (file, checkpoint))
        assert len(found) == chosen["max_detections"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    if form == "openvino":
        check_graph(file, checkpoint, "openvino")


def test_a_file_gives_the_outputs_of_the_network_and_describes_it(made):
    checkpoint, file = made("tiny", "onnx")
    info = open_model(file).info
    detector = info.detector
    assert (detector.version, detector.size, detector.priors) == ("tiny", 300, "VOC")
    assert detector.classes == ("cell", "platelet", "rod")
    assert info.detection == DetectConfig(0.03, 0.45, 50, 300)
    check_graph(file, checkpoint, "onnxruntime")


def check_graph(file, checkpoint, runtime):
    """Compare outputs with the network's; the second call must not change those of the first."""
    model = open_model(file, threads=torch.get_num_threads())
    assert model.info.versions["torch"] == torch.__version__
    assert model.runtime == (runtime, sys.modules[runtime].__version__)
    net, _ = load_detector(checkpoint)
    batches = torch.randn(2, 1, 3, 300, 300, generator=torch.manual_seed(0)) * 50
    found = [model({"images": images.numpy()}) for images in batches]
    with torch.no_grad():
        for images, outputs in zip(batches, found, strict=True):
            for name, value in zip(("loc", "conf"), net(images), strict=True):
                np.testing.assert_allclose(outputs[name], value, atol=1e-3)
    for wrong in ({"images": np.zeros((1, 3, 200, 300), np.float32)}, {"other": np.zeros(1)}):
        problem = rf"{file.name} cannot run on {next(iter(wrong))} float.*; give"
        with pytest.raises(UserError, match=problem):
            model(wrong)


def test_a_file_over_the_tolerance_is_not_kept(made, tmp_path, monkeypatch, capsys):
    checkpoint, good = made("tiny", "onnx")
    file = tmp_path / good.name
    for name in (good.name, good.name + ".json"):
        shutil.copy(good.with_name(name), tmp_path)
    build = formats.build_graph

    def damaged(net, *arguments):
        graph = build(net, *arguments)
        with torch.no_grad():
            next(p for name, p in graph.named_parameters() if p.ndim == 4).mul_(1.2)
        return graph

    monkeypatch.setattr(formats, "build_graph", damaged)
    assert main([str(checkpoint), "--format", "onnx", "--output", str(file)]) == 1
    output, error = capsys.readouterr()
    assert "without a partner" in output
    assert error.startswith(f"error: {file} is not kept: ") and error.count("\n") == 1
    assert manifest(file)["sha256"] == sha256_of(file) == sha256_of(good)
    assert {p.name for p in tmp_path.iterdir()} == {file.name, file.name + ".json"}


def refused(checkpoint, form="onnx", **options):
    with pytest.raises(UserError) as error:
        export(ExportOptions(checkpoint, form, **options))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_meant_is_refused_in_a_sentence(checkpoint, tmp_path):
    assert "no.pth does not exist" in refused(tmp_path / "no.pth")
    assert "int8 does not go with --format onnx" in refused(checkpoint, precision="int8")
    assert "x.xml: an ONNX file's name ends in .onnx" in refused(checkpoint, output=Path("x.xml"))
    for option in ("calibrate", "calibrate_sets"):
        assert f"--{option} goes with --precision int8" in refused(checkpoint, **{option: "train"})
    coarse = {"precision": "bf16", "preprocess": True, "dynamic": True}
    assert "too coarse; leave --preprocess or" in refused(checkpoint, "openvino", **coarse)
    assert "tiny.pth has the 3 classes cell, platelet, rod, not a" in refused(checkpoint,
                                                                              classes=("a",))
    assert "no image set" in refused(checkpoint, sets="2007_test")
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_without_images_nothing_is_claimed(tmp_path, voc_folder):
    checkpoint = write_checkpoint(tmp_path / "run" / "tiny.pth", voc_folder)
    voc_folder.rename(voc_folder.with_name("moved"))
    error = refused(checkpoint)
    assert f"tiny.pth was tested on {voc_folder}, which does not exist; give --images" in error
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime", "openvino", "nncf"])
def test_a_missing_package_is_named_with_its_installation(checkpoint, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    form = ("openvino", "int8") if package in ("openvino", "nncf") else ("onnx", "fp32")
    assert f"pip install {package}" in refused(checkpoint, form[0], precision=form[1])


def test_what_an_exporter_cannot_do_is_told_in_a_sentence(checkpoint, monkeypatch):
    def fail(*arguments, **options):
        raise torch.onnx.OnnxExporterError("\nNo decomposition for aten.new\n\nmore")

    monkeypatch.setattr(torch.onnx, "export", fail)
    error = refused(checkpoint)
    assert "tiny cannot be exported to ONNX by PyTorch" in error
    assert "(No decomposition for aten.new); a newer PyTorch" in error


@pytest.mark.parametrize("form, module, function", [
    ("onnx", "onnx", "save"), ("openvino", "onnx", "save"), ("openvino", "openvino", "save_model")])
def test_full_disk_is_told_with_the_file_and_leaves_nothing(form, module, function, checkpoint,
                                                            monkeypatch):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    package = importlib.import_module(module)
    save = getattr(package, function)

    def full(*arguments, **options):
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        save(*arguments, **options)

    monkeypatch.setattr(package, function, full)
    try:
        error = refused(checkpoint, form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file = checkpoint.with_suffix(formats.FORMATS[form].suffix)
    assert error.startswith(f"{file}: ") and "make room" in error and "PyTorch" not in error
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_the_page_installs_what_its_commands_need():
    page = Path("docs/exporting.md").read_text("utf-8")
    (extras,) = re.findall(r"pip install -e \.\[(.*)\]", page)
    packages = {re.match(r"[\w-]+", p)[0] for name in extras.split(",") for p in EXTRAS[name]}
    for form in re.findall(r"--format (\w+)", page):
        assert packages >= set(formats.FORMATS[form].packages)


def test_images_are_those_of_the_checkpoint_unless_others_are_named(data):
    detector = DetectorInfo("tiny", 300, tuple(CLASSES), "VOC", "VOC")
    trained_on = TrainedOn(data, (ImageSet(None, "test"),), (ImageSet(None, "trainval"),))
    plain = data / "JPEGImages"
    for root, sets, limit, training, about, count, scored in (
        (None, None, 0, False, "trainval", 6, True), (None, None, 0, True, "test", 4, False),
        (str(data), "test", 0, False, "test", 4, True), (None, None, 3, False, "trainval", 3, True),
        (None, None, 3, True, "test", 3, False), (str(plain), None, 3, False, "", 3, False),
    ):
        images = find_images(root, sets, limit, trained_on, detector, training)
        folder = plain if root == str(plain) else data
        assert images.about == f"{folder} {about}".strip()
        assert (len(images), images.scored) == (count, scored)
        assert [len(batch) for batch in images.batches(4)] == [count] if count < 5 else [4, 2]
        assert images.read(0).shape == (72, 96, 3)
    # The sets of another root are the published ones.
    other = replace(trained_on, root=plain)
    assert find_images(str(data), None, 0, other, detector).about == f"{data} test"
    assert find_images(None, None, 0, TrainedOn(), detector) is None
    for root, sets, problem in (
        (plain, "test", f"{plain} is a plain folder of images; leave --sets test out"),
        (data / "ImageSets", None, "ImageSets holds neither images nor a data set in VOC"),
        (data / "no", None, "no is no folder; give a folder"),
    ):
        with pytest.raises(UserError, match=problem):
            find_images(str(root), sets, 0, trained_on, detector)


def test_the_data_of_a_checkpoint_are_read_from_its_configuration(tmp_path):
    path = tmp_path / "x.pth"
    config = {"root": str(tmp_path), "train_sets": [["2007", "train"]], "test_sets": [[None, "t"]]}
    assert TrainedOn.of({"config": config}, path) == TrainedOn(
        tmp_path, (ImageSet("2007", "train"),), (ImageSet(None, "t"),)
    )
    assert TrainedOn.of({}, path) == TrainedOn()
    for wrong in ({"root": 5}, {"test_sets": [5]}, {"train_sets": 5}, {"train_sets": [["a"]]}):
        with pytest.raises(UserError, match=r"x\.pth: its configuration has .*not valid; give"):
            TrainedOn.of({"config": {**config, **wrong}}, path)


def proven(checkpoint, data, change, *where):
    """``prove`` with changed weights in the "network" or the "file", which may be a checkpoint."""
    net, detector = load_detector(checkpoint)
    images = find_images(str(data / "JPEGImages"), None, 0, TrainedOn(), detector)
    info = ExportInfo(detector, variance=(0.1, 0.2), mean=(104, 117, 123), preprocess=False,
                      nms=False, dynamic=True, precision="fp32", detection=detector.detection(),
                      checkpoint={"file": checkpoint.name}, versions={})
    saved = load_checkpoint(checkpoint)
    change(saved["model"])
    if "network" in where:
        net.load_state_dict(saved["model"])
    if "file" in where:
        torch.save(saved, checkpoint)
    return prove(net, info, checkpoint, images)


@pytest.mark.parametrize("part", ["loc", "conf"])
def test_nan_of_the_network_and_of_the_file_are_told_apart(checkpoint, data, part):
    def change(model):
        model[f"{part}.0.weight"].fill_(3e38)  # finite, but its sums overflow

    with pytest.raises(UserError, match=rf"network of tiny\.pth fails \({part} contains NaN .*;"):
        proven(checkpoint, data, change, "network")
    with pytest.raises(TooDifferent, match=rf"tiny\.pth is not kept: {part} contains NaN"):
        proven(checkpoint, data, change, "file")


def test_a_network_that_finds_nothing_proves_nothing(checkpoint, data):
    def change(model):
        for key in model:
            if key.startswith("conf") and key.endswith("bias"):
                model[key].view(-1, 4)[:, 0] = 1000

    with pytest.raises(UserError, match="nothing of score 0.08 or more "
                       r"\(--score_threshold 0.03 .*can be proven; give a lower"):
        proven(checkpoint, data, change, "network", "file")


def detections(*rows):
    """(label, score, x1, y1, x2, y2) each."""
    table = np.array(rows, np.float32).reshape(-1, 6)
    return {"labels": table[:, 0].astype(np.int64), "scores": table[:, 1],
            "boxes": table[:, 2:]}


def test_boxes_are_compared_with_their_partners():
    one = detections((1, 0.9, 0, 0, 10, 10), (2, 0.5, 20, 20, 40, 40), (1, 0.05, 50, 50, 60, 60))
    other = detections((2, 0.48, 20, 20, 40, 41), (1, 0.9, 0, 0, 10, 10), (3, 0.7, 0, 0, 10, 10))
    found = compare([one], [other], 0.1)  # of one without the box under the floor
    assert (found.boxes, found.unmatched_network, found.unmatched_file) == (2 + 3, 0, 1)
    assert found.matched == pytest.approx(4 / 5)
    assert found.score_difference == pytest.approx(0.02, abs=1e-6)
    assert (found.pixel_difference, found.least_iou) == (1, pytest.approx(20 / 21))


def test_a_partner_is_one_box_of_the_image_near_by_of_any_score():
    one, nothing = detections((1, 0.9, 0, 0, 10, 10)), detections()
    two = detections((1, 0.9, 0, 0, 10, 10), (1, 0.8, 0, 0, 10, 9))
    assert compare([two], [one], 0.1).unmatched_network == 1
    found = compare([one], [detections((1, 0.02, 0, 0, 10, 10))], 0.1)
    assert (found.boxes, found.unmatched_network) == (1, 0)
    assert found.score_difference == pytest.approx(0.88)
    found = compare([one, nothing], [nothing, one], 0.1)
    assert (found.unmatched_network, found.unmatched_file, found.matched) == (1, 1, 0)
    assert found.score_difference is found.pixel_difference is found.least_iou is None
    assert compare([one], [detections((1, 0.9, 6, 0, 16, 10))], 0.1).matched == 0
    assert compare([nothing], [nothing], 0.1).matched is None


@pytest.mark.parametrize("change, ap, problem", [
    ({}, None, ""),
    ({"matched": 0.99}, None, "99.00 % of the boxes have a partner, 99.9 % are needed"),
    ({"score_difference": 0.01}, None, "a score differs by 0.01, 0.001 is allowed"),
    ({"pixel_difference": 2.0}, None, "a coordinate, in pixels, differs by 2, 0.5 is allowed"),
    ({}, 0.49, "it loses 1.00 points of AP, 0.1 are allowed"),
    ({}, 0.51, "")])
def test_what_is_over_the_tolerance_is_said(change, ap, problem):
    found = replace(Comparison(9, 0, 0, 1.0, 1e-6, 0.01, 0.99), **change)
    aps = ap and APs("AP", 0.5, ap)
    assert excess(found, TOLERANCE["fp32"], aps).partition(" (a barely")[0] == problem


def test_a_file_is_scored_like_its_checkpoint(made, data, tmp_path, capsys):
    checkpoint, file = made("tiny", "onnx", *EVERYTHING)

    def score(file, *options):
        arguments = ["--test", file, "--root", data, "--save_folder", tmp_path, "--num_workers", 0]
        return train_test.main(list(map(str, [*arguments, "--device", "cpu", *options])))

    assert score(checkpoint) == score(file) == 0
    expected, found = (
        json.loads((tmp_path / "tiny_300" / stem / "ss_predict" / name / "test/results.json")
                   .read_text())
        for stem, name in ((checkpoint.stem,) * 2, (file.stem, file.name))
    )
    assert found["value"] == pytest.approx(expected["value"], abs=1e-3)
    assert found["detection_count"] == expected["detection_count"]
    assert found["thresholds"] == expected["thresholds"]
    told = found["checkpoint"]
    assert (told["file"], told["sha256"]) == (file.name, sha256_of(file))
    assert told["made_of"] == expected["checkpoint"]
    assert told["runtime"].split()[0] == "onnxruntime"
    assert score(file, "--retest") == 0
    capsys.readouterr()
    for options, problem in ((("--nms", "soft"), "suppression inside"),
                             (("--amp", "bf16"), "--amp cannot change"),
                             (("--class_map", "cell=rod"), "--class_map cannot change"),
                             (("--classes", "cell"), "contradicts")):
        assert score(file, *options) == 2
        error = capsys.readouterr().err
        assert problem in error and error.count("\n") == 1
