"""Opening exported files, and what is refused."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import torch
from exports import exported, write_checkpoint
from tiny import TINY

import models
from inference.runtime import INFO_KEY, SUFFIXES, identity, open_model
from models import build_net
from utils.checkpoint import load_checkpoint, sha256_of
from utils.errors import UserError

PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(models.BACKBONES, "tiny", TINY)


@pytest.mark.parametrize("form", PACKAGES)
def test_a_file_gives_the_outputs_of_the_network_and_describes_it(tmp_path, voc_folder, form):
    for package in ("onnx", "onnxscript", PACKAGES[form]):
        pytest.importorskip(package)
    checkpoint = write_checkpoint(tmp_path / "tiny.pth", voc_folder)
    file = exported(checkpoint, form)
    assert file.suffix in SUFFIXES
    model = open_model(file, threads=torch.get_num_threads())
    assert model.info["classes"] == ["cell", "platelet", "rod"]
    assert (model.info["version"], model.info["size"], model.info["priors"]) == ("tiny", 300, "VOC")
    assert model.info["detection"] == {
        "conf_thresh": 0.03, "nms_thresh": 0.45, "per_class": 50, "top_k": 300,
    }  # fmt: skip
    assert model.info["checkpoint"] == {"file": "tiny.pth", "sha256": sha256_of(checkpoint)}
    assert model.info["versions"]["torch"] == torch.__version__
    name, version = model.runtime
    assert (name, version) == (PACKAGES[form], sys.modules[PACKAGES[form]].__version__)
    net = build_net("tiny", 300, 4).eval()
    net.load_state_dict(load_checkpoint(checkpoint)["model"])
    for seed in (0, 1):  # the first result is not overwritten by the second
        images = torch.randn(1, 3, 300, 300, generator=torch.Generator().manual_seed(seed)) * 50
        outputs = model({"images": images.numpy()})
        if seed == 0:
            first = outputs
    with torch.no_grad():
        loc, conf = net(images)
    np.testing.assert_allclose(outputs["loc"], loc, atol=1e-3)
    np.testing.assert_allclose(outputs["conf"], conf, atol=1e-3)
    assert not np.array_equal(first["loc"], outputs["loc"])


def test_inputs_are_taken_by_name_in_whatever_order(tmp_path, voc_folder):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    checkpoint = write_checkpoint(tmp_path / "tiny.pth", voc_folder)
    model = open_model(exported(checkpoint, "onnx", "--preprocess", "--with-nms"))
    pictures = np.random.default_rng(0).integers(0, 256, (1, 300, 300, 3), np.uint8)
    inputs = {"pictures": pictures, "sizes": np.array([[500, 375]], np.float32)}
    expected, found = model(inputs), model(dict(reversed(inputs.items())))
    assert len(expected["scores"]) > 0
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_files_have_an_identity(tmp_path):
    for name in ("x.onnx", "x.xml", "x.bin"):
        (tmp_path / name).write_text(name)
    one = {"file": "x.onnx", "sha256": sha256_of(tmp_path / "x.onnx")}
    assert identity(tmp_path / "x.onnx") == one
    assert identity(tmp_path / "x.xml") == {
        "file": "x.xml",
        "sha256": sha256_of(tmp_path / "x.xml"),
        "weights": {"file": "x.bin", "sha256": sha256_of(tmp_path / "x.bin")},
    }


def test_what_is_no_exported_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"x\.pth is no exported file; their names end in \.onnx"):
        open_model(tmp_path / "x.pth")
    for suffix in SUFFIXES:
        with pytest.raises(UserError, match="does not exist or is not a file; check the path"):
            open_model(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_file_is_named_in_one_sentence(tmp_path, suffix):
    for package in ("onnxruntime", "openvino"):
        pytest.importorskip(package)
    for content in (b"", b"something else", bytes(range(256)) * 9):
        file = tmp_path / f"x{suffix}"
        file.write_bytes(content)
        file.with_suffix(".bin").write_bytes(content)
        with pytest.raises(UserError, match="cannot be opened") as caught:
            open_model(file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_openvino_weights_that_are_missing_are_named(tmp_path):
    (tmp_path / "x.xml").touch()
    with pytest.raises(UserError, match=r"x\.bin does not exist .*; it belongs beside x\.xml"):
        open_model(tmp_path / "x.xml")


DESCRIPTION = {
    "format": 1, "version": "tiny", "size": 300, "classes": ["a"], "dataset": "VOC",
    "priors": "VOC", "variance": [0.1, 0.2], "mean": [104, 117, 123], "preprocess": False,
    "nms": False, "dynamic": False, "precision": "fp32", "detection": {
        "conf_thresh": 0.03, "nms_thresh": 0.45, "per_class": 50, "top_k": 300,
    }, "checkpoint": {}, "versions": {},
}  # fmt: skip


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda text: "", "has no description of its detector"),
        (lambda text: "{", "its description is damaged"),
        (lambda text: "[]", "its description is damaged"),
        (lambda text: "{}", "its description is damaged"),
        (lambda text: json.dumps({**json.loads(text), "format": 2}), "by a newer version"),
        (lambda text: json.dumps({**json.loads(text), "size": "300"}), "has size '300'"),
        (lambda text: json.dumps({**json.loads(text), "detection": 5}), "has detection 5;"),
        (lambda text: json.dumps({**json.loads(text), "detection": None}), "has detection None;"),
        (lambda text: json.dumps({**json.loads(text), "detection": {}}), "has detection {};"),
        (lambda text: text.replace('"top_k": 300', '"top_k": 0'), "has detection {"),
        (lambda text: text.replace("0.45", '"0.45"'), "has detection {"),
        (lambda text: text.replace("0.03", "2"), "has detection {"),
        (lambda text: text.replace('["a"]', "[1]"), r"has classes [1];"),
        (lambda text: text.replace('["a"]', "[]"), r"has classes [];"),
        (lambda text: text.replace("[104, 117, 123]", "[104, 117]"), "has mean [104, 117];"),
        (lambda text: text.replace("[0.1, 0.2]", "[0.1, null]"), "has variance [0.1, None];"),
    ],
)
def test_a_description_that_is_not_ours_is_refused(tmp_path, change, problem):
    onnx = pytest.importorskip("onnx")
    about = json.dumps(DESCRIPTION)
    file = tmp_path / "x.onnx"
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> x (float[1] a) => (float[1] b) {b = Abs (a)}'
    )
    for text, refused in ((about, False), (change(about), True)):
        onnx.helper.set_model_props(model, {INFO_KEY: text})
        onnx.save(model, file)
        if not refused:
            assert open_model(file).info == DESCRIPTION
            continue
        with pytest.raises(UserError, match=re.escape(problem)):
            open_model(file)


def test_a_runtime_that_is_missing_is_named_with_its_installation(tmp_path, monkeypatch):
    for package, suffix in (("onnxruntime", ".onnx"), ("openvino", ".xml")):
        monkeypatch.setitem(sys.modules, package, None)
        file = tmp_path / f"x{suffix}"
        file.touch()
        file.with_suffix(".bin").touch()
        with pytest.raises(
            UserError, match=f"{package} cannot be imported .*pip install {package}"
        ):
            open_model(file)
