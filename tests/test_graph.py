"""What stands before and behind a network in a graph, against OpenCV and ``Detect``."""

import cv2
import numpy as np
import pytest
import torch

from data.config import VOC_300
from inference.graph import Preprocess, detect_onnx
from layers import Detect, PriorBox
from layers.detect import DetectConfig

SIZES = [(500, 300), (640, 480), (200, 700)]
MEAN = (104.0, 117.0, 123.0)


@pytest.mark.parametrize("side", [300, 512])
@pytest.mark.parametrize("shape", [(480, 640), (500, 333), (72, 96), (1, 1), (2, 3), (1024, 600)])
def test_resizes_to_the_bit_as_opencv(shape, side):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    expected = cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR)
    images = Preprocess(side, MEAN, resize=True)(torch.from_numpy(image)[None])
    assert images.shape == (1, 3, side, side)
    found = images[0].permute(1, 2, 0).numpy() + np.float32(MEAN)
    np.testing.assert_array_equal(found, expected)


def test_images_of_the_right_size_only_lose_the_mean():
    images = torch.randint(0, 256, (2, 300, 300, 3), dtype=torch.uint8)
    found = Preprocess(300, MEAN, resize=False)(images)
    assert torch.equal(found, images.permute(0, 3, 1, 2) - torch.tensor(MEAN).view(3, 1, 1))


def outputs(batch, background, seed=0):
    generator = torch.Generator().manual_seed(seed)
    priors = PriorBox(VOC_300)()
    loc = torch.randn(batch, len(priors), 4, generator=generator)
    conf = torch.randn(batch, len(priors), 5, generator=generator) * 3
    conf[..., 0] += background
    return loc, conf, priors


def run(loc, conf, sizes, priors, options):
    ort = pytest.importorskip("onnxruntime")
    config = DetectConfig(**options)
    model = detect_onnx(priors, conf.shape[2], (0.1, 0.2), config, opset=18, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString())
    feed = {"loc": loc.numpy(), "conf": conf.numpy(), "sizes": np.array(sizes, np.float32)}
    return session.run(["boxes", "scores", "labels", "image"], feed)


@pytest.mark.parametrize("batch, background, limits", [
    (1, 5, {}), (3, 5, {}), (3, 8, {"top_k": 7}), (2, 5, {"per_class": 3}),
    (2, 100, {}),  # nothing is found
    (2, 5, {"conf_thresh": 0.9, "nms_thresh": 0.2}),
])
def test_a_graph_detects_what_detect_does(batch, background, limits):
    loc, conf, priors = outputs(batch, background)
    if batch == 3:
        conf[1, :, 0] += 100  # an image without detections between two with some
    options = {"conf_thresh": 0.03, "nms_thresh": 0.45, "per_class": 50, "top_k": 200} | limits
    boxes, scores, labels, image = run(loc, conf, SIZES[:batch], priors, options)
    assert (boxes.dtype, scores.dtype) == (np.float32, np.float32)
    assert (labels.dtype, image.dtype) == (np.int64, np.int64)
    assert (np.diff(image) >= 0).all()
    for i, expected in enumerate(Detect(**options)(loc, conf, priors, SIZES[:batch])):
        mine = image == i
        np.testing.assert_array_equal(labels[mine], expected["labels"])
        np.testing.assert_allclose(scores[mine], expected["scores"], atol=1e-6)
        np.testing.assert_allclose(boxes[mine], expected["boxes"], atol=1e-3)


def test_equal_scores_come_in_the_order_of_detect():
    loc, conf, priors = outputs(1, 5)
    conf = (conf / 2).round() * 2
    options = {"conf_thresh": 0.3, "nms_thresh": 0.45, "per_class": 50, "top_k": 200}
    (expected,) = Detect(**options)(loc, conf, priors, SIZES[:1])
    assert len(expected["scores"].unique()) < len(expected["scores"]) / 2
    # ONNX Runtime's softmax differs in the last bit, which decides between some of them.
    _, scores, _, _ = run(loc, conf, SIZES[:1], priors, options)
    np.testing.assert_allclose(scores, expected["scores"], atol=1e-6)
