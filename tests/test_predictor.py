"""Predictor finds what the evaluation finds, stage by stage."""

import io
from dataclasses import replace
from functools import partial

import cv2
import numpy as np
import PIL.Image
import pytest
import torch

from data.config import COCO_300, COCO_CLASSES, VOC_300, VOC_CLASSES
from data.image import read_image
from data.transforms import to_square
from engine.steps import detect_all
from inference.predictor import Predictor, _load
from layers import Detect, PriorBox
from models import build_net
from utils.errors import UserError

VERSION = "SSD_HarDNet39ds"


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_net(VERSION, 300, 21).eval()


@pytest.fixture(scope="module")
def file(net, tmp_path_factory):
    """A checkpoint like the published ones: a bare state dict of VOC's classes."""
    path = tmp_path_factory.mktemp("weights") / "voc.pth"
    torch.save(net.state_dict(), path)
    return path


def made_up(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    small = (rng.integers(0, 256, (9, 9, 3), np.uint8) for _ in sizes)
    return [*map(partial(cv2.resize, interpolation=cv2.INTER_CUBIC), small, sizes)]


def evaluated(net, images, priors, **chosen) -> list[dict]:
    """What ``train_test.py --test`` finds: the trained network, and the loop over batches."""
    inputs = [torch.from_numpy(to_square(x, 300)).permute(2, 0, 1)[None] for x in images]
    sizes = [torch.tensor([[image.shape[1], image.shape[0]]]) for image in images]
    batches = list(zip(inputs, sizes, strict=True))
    return detect_all(net, Detect(**chosen), PriorBox(priors)(), batches)


def assert_same(found: list[dict], wanted: list[dict]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert len(a["scores"]) == len(b["scores"]) > 0
        torch.testing.assert_close(a["scores"], torch.from_numpy(b["scores"]))
        # Boxes of the same score can change places.
        for key in ("labels", "boxes"):
            close = np.isclose(a[key].numpy(), b[key], rtol=1e-3, atol=1e-2)
            assert close.reshape(len(close), -1).all(1).mean() > 0.98, key


def test_finds_what_the_evaluation_finds(net, file, tmp_path):
    predictor = Predictor(file)
    assert (predictor.file, predictor.info.version) == ("voc.pth", VERSION)
    assert predictor.info.classes == VOC_CLASSES
    images = made_up((64, 48), (30, 100))
    found = predictor(images)
    chosen = {"conf_thresh": 0.03, "top_k": 300}
    assert_same(found, evaluated(net, images, VOC_300, **chosen))
    assert found[0]["names"] == [VOC_CLASSES[k - 1] for k in found[0]["labels"].tolist()]
    types = {key: value.dtype for key, value in found[1].items() if key != "names"}
    assert types == {"boxes": torch.float32, "scores": torch.float32, "labels": torch.int64}
    # A single image, as an array and as a file.
    cv2.imwrite(str(tmp_path / "image.png"), images[0])
    for image in (images[0], tmp_path / "image.png", str(tmp_path / "image.png")):
        one = predictor(image)
        assert one["names"] == found[0]["names"]
        torch.testing.assert_close(one["boxes"], found[0]["boxes"])


def test_options_mean_what_those_of_the_evaluation_mean(net, file):
    images = made_up((64, 48))
    predictor = Predictor(file, score_threshold=0.04, max_detections=7, nms="soft")
    chosen = {"conf_thresh": 0.04, "top_k": 7, "nms": "soft"}
    assert_same(predictor(images), evaluated(net, images, VOC_300, **chosen))
    predictor.config = replace(predictor.config, top_k=3, nms="hard")
    chosen |= {"top_k": 3, "nms": "hard"}
    assert_same(predictor(images), evaluated(net, images, VOC_300, **chosen))
    with pytest.raises(ValueError, match="conf_thresh 2 "):
        Predictor(file, score_threshold=2)


def test_prior_boxes_and_thresholds_are_those_of_the_weights(tmp_path):
    torch.manual_seed(1)
    coco = build_net(VERSION, 300, 81).eval()
    for head in coco.conf:
        head.bias.data[7::81] += 4  # a class over the threshold
    torch.save(coco.state_dict(), tmp_path / "coco.pth")
    images = made_up((64, 48))
    predictor = Predictor(tmp_path / "coco.pth")
    assert predictor.info.classes == COCO_CLASSES
    found = predictor(images)
    assert_same(found, evaluated(coco, images, COCO_300))
    assert found[0]["names"][0] == COCO_CLASSES[6]


def test_the_stages_one_by_one_are_the_whole(file):
    predictor = Predictor(file, amp="bf16")
    images = made_up((64, 48), (50, 50))
    outputs = predictor.forward(predictor.preprocess(images))
    assert outputs["loc"].shape == (2, 11620, 4) and outputs["conf"].shape == (2, 11620, 21)
    found = predictor.postprocess(outputs, [(64, 48), (50, 50)])
    for part, whole in zip(found, predictor(images), strict=True):
        assert all(torch.equal(part[key], whole[key]) for key in part)


def test_no_images_and_no_detections(file):
    predictor = Predictor(file, score_threshold=1)
    assert predictor([]) == []
    (found,) = predictor(made_up((20, 20)))
    assert found["boxes"].shape == (0, 4) and found["names"] == [] and len(found["labels"]) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_no_detection(file, value):
    """Neither of a network, nor of a graph that suppresses by itself."""
    predictor = Predictor(file)
    conf = torch.zeros(1, 11620, 21)
    conf[0, 5, 2] = 9
    loc = torch.zeros(1, 11620, 4)
    loc[0, 5, 0] = value
    boxes = torch.tensor([[1.0, 2, value, 4]])
    rows = {"scores": torch.ones(1), "labels": torch.ones(1).long(), "image": torch.zeros(1).long()}
    for outputs in ({"loc": loc, "conf": conf}, {"boxes": boxes, **rows}):
        with pytest.raises(FloatingPointError, match="NaN or infinity"):
            predictor.postprocess(outputs, [(64, 48)])


def test_an_image_is_a_path_an_array_or_a_pil_image_of_any_mode(tmp_path):
    rgb = PIL.Image.fromarray(made_up((20, 30))[0])
    rgb.getexif()[0x112] = 6  # turns a quarter
    rgb.save(tmp_path / "a.png", exif=rgb.getexif())
    bgr = read_image(tmp_path / "a.png")
    assert bgr.shape == (20, 30, 3)
    alpha = np.dstack([bgr, bgr[:, :, 0]])
    turned = PIL.Image.fromarray(bgr[:, :, ::-1]).convert("RGBA")
    for image in (rgb, str(tmp_path / "a.png"), PIL.Image.open(tmp_path / "a.png"), bgr, alpha,
                  bgr[:, ::-1][:, ::-1], turned):  # fmt: skip
        assert np.array_equal(_load(image), bgr)
    for mode in ("1", "L", "LA", "P", "CMYK", "HSV", "YCbCr", "I;16"):
        assert _load(turned.convert("L").convert(mode)).shape == (20, 30, 3)
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    deep = PIL.Image.fromarray(grey.astype(np.uint16) * 256 + 99)
    for image in (grey, grey[:, :, None], PIL.Image.fromarray(grey), deep):
        assert np.array_equal(_load(image), np.dstack([grey] * 3))


def test_lists_tuples_and_generators_are_taken_and_what_is_no_image_is_refused(file, monkeypatch):
    predictor = Predictor(file, score_threshold=1)
    image = made_up((20, 20))[0]
    mixed = [image, PIL.Image.fromarray(image), np.zeros((1, 9000), np.uint8)]
    for images in (mixed, tuple(mixed), iter(mixed)):
        assert len(predictor(images)) == 3
    cut = io.BytesIO()
    PIL.Image.fromarray(image).save(cut, "png")
    for wrong in (None, 3, b"abc", {"a.jpg": image}, torch.zeros(3, 4, 4), [image, None], [[image]],
                  np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8),
                  np.zeros((2, 4, 4, 3), np.uint8), np.zeros((4, 4, 2), np.uint8),
                  *(PIL.Image.new(mode, (4, 4)) for mode in "FI"), PIL.Image.new("RGB", (0, 4)),
                  PIL.Image.open(io.BytesIO(cut.getvalue()[:90]))):
        with pytest.raises(UserError, match="; give a path, a BGR or grey array .* PIL image"):
            predictor(wrong)
    monkeypatch.setenv("SSD_MAX_PIXELS", "399")
    with pytest.raises(UserError, match="20 x 20, more than 399 pixels.*--max_pixels 400"):
        predictor(mixed[1])


def test_mistakes_are_told(file, tmp_path):
    predictor = Predictor(file)
    with pytest.raises(UserError, match=r"none\.jpg"):
        predictor(tmp_path / "none.jpg")
    torch.save(build_net(VERSION, 300, 4).state_dict(), tmp_path / "own.pth")
    with pytest.raises(UserError, match="3 classes and no names"):
        Predictor(tmp_path / "own.pth")
    assert Predictor(tmp_path / "own.pth", classes=["a", "b", "c"]).info.classes == ("a", "b", "c")
    for options, message in (
            ({"amp": "half"}, "amp is 'half', should be one of off, bf16, fp16"),
            ({"threads": 2}, "threads is for exported files"),
            ({"device": "gpu"}, "--device gpu is unknown"),
            ({"classes": ["a", "b"]}, "has the 20 classes aeroplane, .*, not a, b; leave")):
        with pytest.raises(UserError, match=message):
            Predictor(file, **options)
    assert Predictor(file, classes=VOC_CLASSES).info.classes == VOC_CLASSES
