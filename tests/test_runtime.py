"""Opening exported files, and what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from inference.export_info import INFO_KEY, ExportInfo
from inference.predictor import Predictor
from inference.runtime import EXPORTED_SUFFIXES, ExportedModel, identity, open_model
from layers.detect import DetectConfig
from utils.checkpoint import sha256_of
from utils.errors import UserError

DESCRIPTION = {
    "format": 1, "version": "tiny", "size": 300, "dataset": "VOC", "priors": "VOC",
    "classes": ["a"], "variance": [0.1, 0.2], "mean": [104, 117, 123], "preprocess": False,
    "nms": False, "dynamic": False, "precision": "fp32", "detection": {
        "conf_thresh": 0.03, "nms_thresh": 0.45, "per_class": 50, "top_k": 300,
    }, "checkpoint": {"file": "a.pth", "sha256": "0"}, "versions": {"torch": "2"},
}


pytestmark = pytest.mark.usefixtures("tiny")


def test_files_have_an_identity(tmp_path):
    files = [tmp_path / name for name in ("x.onnx", "x.xml", "x.bin")]
    for file in files:
        file.write_text(file.name)
    graph, model, weights = ({"file": f.name, "sha256": sha256_of(f)} for f in files)
    assert identity(files[0]) == graph
    assert identity(files[1]) == {**model, "weights": weights}


def test_what_is_no_exported_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"x\.pth is no exported file; their names end in \.onnx"):
        open_model(tmp_path / "x.pth")
    for suffix in EXPORTED_SUFFIXES:
        with pytest.raises(UserError, match="does not exist or is not a file; check the path"):
            open_model(tmp_path / f"x{suffix}")
    (tmp_path / "x.xml").touch()
    with pytest.raises(UserError, match=r"x\.bin does not exist .*; it belongs beside x\.xml"):
        open_model(tmp_path / "x.xml")


@pytest.mark.parametrize("suffix", EXPORTED_SUFFIXES)
def test_a_damaged_file_is_named_in_one_sentence(tmp_path, suffix):
    for package in ("onnxruntime", "openvino"):
        pytest.importorskip(package)
    for content in (b"", b"something else", bytes(range(256)) * 9, b"<?xml version='1.0'?><net/>"):
        file = tmp_path / f"x{suffix}"
        file.write_bytes(content)
        file.with_suffix(".bin").write_bytes(content)
        with pytest.raises(UserError, match="cannot be opened .*export the detector again") as e:
            open_model(file)
        assert str(file) in str(e.value)
        assert "\n" not in str(e.value)


def test_a_description_that_is_no_text_is_refused(tmp_path, capfd):
    file = write_onnx(tmp_path / "x.onnx", "description", "loc conf")
    file.write_bytes(file.read_bytes().replace(b"description", b"\xffescription"))
    with pytest.raises(UserError, match=f"{file} cannot be opened .*export the detector again"):
        open_model(file)
    assert capfd.readouterr() == ("", "")


def write_onnx(file: Path, text: str | None, outputs: str, priors: int = 11620) -> Path:
    """A graph that gives zeros under the names ``outputs`` ("loc conf")."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    first, second = outputs.split()
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 18]>
        x (float[1, 3, 300, 300] images) => (float[1, {priors}, 4] {first}, float[1, P, C] {second})
        <int64[3] a = {{1, {priors}, 4}}, int64[3] b = {{1, {priors}, 2}}>
        {{ {first} = ConstantOfShape (a) {second} = ConstantOfShape (b) }}""")
    if text is not None:
        onnx.helper.set_model_props(model, {INFO_KEY: text})
    onnx.save(model, file)
    return file


def test_a_foreign_graph_is_refused(tmp_path):
    about, file = json.dumps(DESCRIPTION), tmp_path / "x.onnx"
    image = np.zeros((40, 30, 3), np.uint8)
    assert len(Predictor(write_onnx(file, about, "loc conf"))(image)["scores"]) > 0
    for (text, outputs, priors), problem in (
        ((None, "loc conf", 11620), "has no description of its detector; export it with python -m"),
        ((about, "boxes scores", 11620), "gives boxes, scores, where .* says loc, conf; export"),
        ((about, "loc conf", 8732), r"gives loc .*\[1, 8732, 4\], .* \[1, 11620, 4\]; export"),
    ):
        with pytest.raises(UserError, match=rf"x\.onnx {problem}"):
            Predictor(write_onnx(file, text, outputs, priors))(image)


@pytest.mark.parametrize("change, told", [
    ({"labels": np.array([1, 2])}, "labels that are not in 1..1"),
    ({"image": np.array([0, 1])}, "image that are not in 0..0"),
    ({"image": np.array([0.0, 0.0])}, r"image float64 \[2\], .* int \[2\]"),
    ({"scores": ["a", "b"]}, r"scores <U1 \[2\]"),
    ({"boxes": np.zeros((2, 5), np.float32)}, r"boxes float32 \[2, 5\], .* \[2, 4\]")])
def test_outputs_that_no_detector_gives_are_refused(change, told):
    arrays = {"boxes": np.zeros((2, 4), np.float32), "scores": np.zeros(2, np.float32),
              "labels": np.array([1, 1]), "image": np.array([0, 0])}
    info = ExportInfo.parse(changed(nms=True), Path("x.onnx"))
    for outputs in (arrays, arrays | change):
        model = ExportedModel(Path("x.onnx"), info, ("runtime", "1"), list(outputs),
                              lambda _, found=outputs: found.values())
        if outputs is arrays:
            assert model({"images": np.zeros((1, 3, 300, 300), np.float32)}) == arrays
    with pytest.raises(UserError, match=rf"^x\.onnx gives {told}.*; export the detector again"):
        model({"images": np.zeros((1, 3, 300, 300), np.float32)})


def changed(**changes: object) -> str:
    return json.dumps({**DESCRIPTION, **changes})


def detection(**changes: object) -> str:
    return changed(detection={**DESCRIPTION["detection"], **changes})


@pytest.mark.parametrize("text, problem", [
    ("", "has no description of its detector"), ("{", "Expecting"), ("[]", "must be integers"),
    ("[" * 100_000, "recursion"), ("1" * 5_000, "4300"), (changed(size=2**70), "size"),
    ("{}", "no 'format'"), (changed(format=2), "format 2 of a newer version"),
    (changed(size="300"), "size '300'"), (changed(version="other"), "unknown version 'other'"),
    (changed(dataset="other"), "dataset 'other'"),
    (changed(priors="other"), "no prior boxes 'other'"), (changed(detection=5), "detection 5"),
    (detection(other=1), "'other'"), (detection(top_k=0), "top_k 0"),
    (detection(nms_thresh="0.45"), "'str'"), (detection(conf_thresh=2), "conf_thresh 2"),
    (changed(classes=[1]), "classes [1]"), (changed(classes=[]), "classes []"),
    (changed(mean=[104, 117]), "mean [104, 117]"),
    (changed(mean=[10**40, 117, 123]), f"mean [{10**40}, 117, 123]"),
    (changed(variance=[0.1, None]), "variance [0.1, None]"),
])
def test_a_description_that_is_not_ours_is_refused(text, problem):
    with pytest.raises(UserError, match=r"^x\.onnx.* export it") as e:
        ExportInfo.parse(text, Path("x.onnx"))
    assert problem in str(e.value)


def test_a_description_is_read_as_it_was_written():
    for more in ({}, {"calibration": {"pictures": 3, "of": "folder"}, "nms": True}):
        info = ExportInfo.parse(changed(**more), Path("x.onnx"))
        assert info.detector.classes == ("a",) and info.nms == bool(more)
        assert info.detection == DetectConfig(0.03, 0.45, 50, 300)
        stored = info.plain()
        assert stored.pop("detection").items() >= DESCRIPTION["detection"].items()
        assert stored.keys() >= DESCRIPTION.keys() - {"detection"}
        assert ExportInfo.parse(json.dumps(info.plain()), Path("x.onnx")) == info


def test_a_runtime_that_is_missing_is_named_with_its_installation(tmp_path, monkeypatch):
    for package, suffix in (("onnxruntime", ".onnx"), ("openvino", ".xml")):
        monkeypatch.setitem(sys.modules, package, None)
        file = tmp_path / f"x{suffix}"
        file.touch()
        file.with_suffix(".bin").touch()
        told = f"{package}, which cannot be imported .*pip install {package}"
        with pytest.raises(UserError, match=told):
            open_model(file)
