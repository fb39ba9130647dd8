"""Detection: published goldens, limits, order, and degenerate inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import data.config as config
from layers import Detect, PriorBox
from layers.boxes import decode

GOLDENS = Path(__file__).parent / "goldens"


def golden_outputs(golden):
    priors = PriorBox(getattr(config, str(golden["config"])))()
    noise = np.random.RandomState(int(golden["seed"]))
    loc = (0.5 * noise.standard_normal((len(priors), 4))).astype(np.float32)
    conf = noise.standard_normal((len(priors), int(golden["num_classes"]))).astype(np.float32)
    conf *= np.float32(golden["conf_spread"])
    conf[:, 0] += np.float32(golden["background_shift"])
    return torch.from_numpy(loc)[None], torch.from_numpy(conf)[None], priors


def rows(detections):
    """(class, x1, y1, x2, y2, score), sorted by class, then score, as the goldens are."""
    table = torch.cat(
        [detections["labels"][:, None], detections["boxes"], detections["scores"][:, None]], 1
    ).numpy()
    return table[np.lexsort((-table[:, 5], table[:, 0]))]


@pytest.mark.parametrize("name", ["VOC_300", "COCO_512"])
def test_detections_equal_the_published_ones(name):
    golden = np.load(GOLDENS / f"detect_{name}.npz")
    loc, conf, priors = golden_outputs(golden)
    detect = Detect(
        conf_thresh=float(golden["conf_thresh"]),
        nms_thresh=float(golden["nms_thresh"]),
        per_class=int(golden["per_class"]),
        top_k=int(golden["top_k"]),
    )
    (found,) = detect(loc, conf, priors, [(int(golden["width"]), int(golden["height"]))])
    expected = golden["detections"]
    measured = rows(found)
    assert measured.shape == expected.shape
    np.testing.assert_array_equal(measured[:, 0], expected[:, 0])
    np.testing.assert_allclose(measured[:, 1:5], expected[:, 1:5], rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(measured[:, 5], expected[:, 5], atol=1e-5)


def random_outputs(batch, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    priors = PriorBox(config.VOC_300)()
    loc = torch.randn(batch, len(priors), 4, generator=generator)
    conf = torch.randn(batch, len(priors), classes, generator=generator) * 3
    return loc, conf, priors


def test_best_score_first_and_limits_hold():
    loc, conf, priors = random_outputs(1)
    (found,) = Detect(per_class=7, top_k=15)(loc, conf, priors, [(640, 480)])
    assert len(found["scores"]) == 15
    assert (found["scores"].diff() <= 0).all()
    assert found["labels"].bincount().max() <= 7
    assert found["labels"].min() >= 1
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32


def test_a_batch_equals_its_images_one_by_one():
    loc, conf, priors = random_outputs(3)
    sizes = [(640, 480), (100, 900), (1, 1)]
    detect = Detect()
    for i, found in enumerate(detect(loc, conf, priors, sizes)):
        (alone,) = detect(loc[i : i + 1], conf[i : i + 1], priors, sizes[i : i + 1])
        for key in found:
            assert torch.equal(found[key], alone[key])


def test_one_confident_prior_becomes_one_box_in_pixels():
    priors = PriorBox(config.VOC_300)()
    loc = torch.zeros(1, len(priors), 4)
    loc[0, 5000] = torch.tensor([1.0, -2.0, 0.5, 0.0])
    conf = torch.zeros(1, len(priors), 3)
    conf[..., 0] = 20
    conf[0, 5000] = torch.tensor([0.0, 0.0, 10.0])
    (found,) = Detect()(loc, conf, priors, [(500, 200)])
    expected = decode(loc[0, 5000], priors[5000], (0.1, 0.2)) * torch.tensor([500, 200, 500, 200])
    torch.testing.assert_close(found["boxes"], expected[None])
    assert found["labels"].tolist() == [2]
    assert found["scores"].item() == pytest.approx(1 / (1 + 2 * np.exp(-10)), rel=1e-6)


def test_no_score_over_the_threshold_gives_empty_tensors():
    loc, conf, priors = random_outputs(2)
    for found in Detect(conf_thresh=1.0)(loc, conf, priors, [(10, 10)] * 2):
        assert found["boxes"].shape == (0, 4)
        assert found["scores"].shape == found["labels"].shape == (0,)
        assert found["labels"].dtype == torch.int64


def test_empty_batch_gives_an_empty_list():
    loc, conf, priors = random_outputs(1)
    assert Detect()(loc[:0], conf[:0], priors, []) == []


def test_inputs_that_do_not_fit_are_refused():
    loc, conf, priors = random_outputs(2)
    with pytest.raises(ValueError, match="1 image sizes"):
        Detect()(loc, conf, priors, [(10, 10)])
    with pytest.raises(ValueError, match="32756 priors"):
        Detect()(loc, conf, PriorBox(config.VOC_512)(), [(10, 10)] * 2)
