"""What a checkpoint says about its detector, and loading it."""

import logging

import pytest
import torch

from data.config import COCO_300, COCO_CLASSES, VOC_300, VOC_CLASSES
from layers.detect import DetectConfig
from models import build_net
from models.info import DetectorInfo, load_detector
from utils.checkpoint import save_checkpoint
from utils.errors import UserError

CONFIG = {"version": "SSD_HarDNet39ds", "size": 300, "dataset": "VOC", "priors": "COCO"}


@pytest.fixture(scope="module")
def states():
    """State dicts of a small network, by number of classes with background."""
    return {n: build_net("SSD_HarDNet39ds", 300, n).state_dict() for n in (3, 21, 81)}


def test_a_configuration_describes_the_detector(states, tmp_path):
    saved = {"model": states[3], "classes": ["a", "b"], "config": CONFIG}
    save_checkpoint(tmp_path / "own.pth", saved)
    net, info = load_detector(tmp_path / "own.pth", ["a", "b"])
    assert info == DetectorInfo("SSD_HarDNet39ds", 300, ("a", "b"), "VOC", "COCO", assumed=False)
    assert info.prior_config() == COCO_300
    assert info.detection() == DetectConfig(conf_thresh=0.03, top_k=300)
    assert not net.training
    assert all(torch.equal(value, states[3][key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(("count", "dataset", "names"),
                         [(21, "VOC", VOC_CLASSES), (81, "COCO", COCO_CLASSES)])
def test_classes_of_a_published_file_are_assumed(states, tmp_path, caplog, count, dataset, names):
    torch.save(states[count], tmp_path / "published.pth")
    with caplog.at_level(logging.INFO):
        _, info = load_detector(tmp_path / "published.pth")
    assert info == DetectorInfo("SSD_HarDNet39ds", 300, names, dataset, dataset, assumed=True)
    assert "published.pth" in caplog.text and dataset in caplog.text


def test_names_that_are_given_are_not_assumed(states):
    names = [f"own {i}" for i in range(20)]
    with pytest.raises(UserError, match=r"own\.pth has the 2 classes a, b, not b, a; leave"):
        saved = {"model": states[3], "classes": ["a", "b"], "config": CONFIG}
        DetectorInfo.of(saved, "own.pth").check_names(["b", "a"], "own.pth")
    info = DetectorInfo.of({"model": states[21]}, "own.pth", names)
    assert (info.classes, info.assumed) == (tuple(names), False)
    assert DetectorInfo.of({"model": states[3]}, "own.pth", ["a", "b"]).prior_config() == VOC_300


def test_classes_of_data_name_those_of_a_file_only_if_they_are_as_many(states):
    own = {"model": states[3], "classes": ["a", "b"], "config": CONFIG}
    assert DetectorInfo.of(own, "own.pth", ["c"]).classes == ("a", "b")
    bare = {"model": states[21]}
    assert DetectorInfo.of(bare, "bare.pth", ["cat", "dog"]).classes == VOC_CLASSES
    assert DetectorInfo.of(bare, "bare.pth", COCO_CLASSES[:20]).classes == COCO_CLASSES[:20]
    unknown = DetectorInfo.of({"model": states[3]}, "bare.pth", ["a", "b"], "COCO")
    assert (unknown.dataset, unknown.priors, unknown.assumed) == ("COCO", "COCO", False)


@pytest.mark.parametrize(("entry", "value"), [
    ("version", "SSD_none"), ("version", None), ("size", "300"), ("size", 301), ("size", True),
    ("dataset", "MINE"), ("dataset", []), ("priors", "MINE"), ("priors", None),
])
def test_a_configuration_that_is_not_valid_is_refused(states, entry, value):
    saved = {"model": states[3], "classes": ["a", "b"], "config": {**CONFIG, entry: value}}
    with pytest.raises(UserError, match=r"own\.pth") as refused:
        DetectorInfo.of(saved, "own.pth")
    assert repr(value) in str(refused.value)


@pytest.mark.parametrize("classes", [[], None, "ab", [1, 2], ["a", "a"], ["a", "b", "c"],
                                     [f"c{n}" for n in range(200_000)]])
def test_names_that_are_not_those_of_the_heads_are_refused(states, classes):
    with pytest.raises(UserError, match=r"own\.pth.* classes"):
        DetectorInfo.of({"model": states[3], "classes": classes, "config": CONFIG}, "own.pth")


@pytest.mark.parametrize(("count", "names", "said"), [
    (3, None, "2 classes and no names for them; give --classes"),
    (3, ["a"], "2 classes, but --classes names 1"),
    (21, ["a"], "the 20 classes aeroplane, .*, not a; leave the names out"),
])
def test_names_that_do_not_fit_are_refused(states, count, names, said):
    with pytest.raises(UserError, match=rf"bare\.pth .*{said}"):
        DetectorInfo.of({"model": states[count]}, "bare.pth", names).check_names(names, "bare.pth")


def test_a_file_that_is_no_detector_is_refused():
    with pytest.raises(UserError, match=r"half\.pth: these tensors belong to no known detector"):
        DetectorInfo.of({"model": {"base.0.conv.weight": torch.zeros(1)}}, "half.pth")
