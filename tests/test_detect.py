"""Detection: published goldens, limits, order, and degenerate inputs."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from nms_routines import EVERY, using

import data.config as config
import utils.nms
from layers import Detect, PriorBox
from layers.boxes import decode
from layers.detect import DetectConfig

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


@pytest.mark.parametrize("routine", EVERY)
@pytest.mark.parametrize("name", ["VOC_300", "COCO_512"])
def test_detections_equal_the_published_ones(name, routine):
    if (name, routine) == ("COCO_512", "torchvision"):
        pytest.skip("more boxes than torchvision is given")
    golden = np.load(GOLDENS / f"detect_{name}.npz")
    loc, conf, priors = golden_outputs(golden)
    detect = Detect(
        *(golden[key].item() for key in ("conf_thresh", "nms_thresh", "per_class", "top_k"))
    )
    with using(routine):
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


OPTIONS = [
    {},
    {"nms": "soft"},
    {"nms": "soft-gaussian"},
    {"class_agnostic": True},
    {"background_shortcut": True, "conf_thresh": 0.01},
    {"class_agnostic": True, "nms": "soft", "top_k": 30},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_equals_its_images_one_by_one(options):
    loc, conf, priors = random_outputs(3)
    conf[1, :, 0] += 6  # few candidates
    sizes = [(640, 480), (100, 900), (1, 1)]
    detect = Detect(**options)
    for i, found in enumerate(detect(loc, conf, priors, sizes)):
        (alone,) = detect(loc[i : i + 1], conf[i : i + 1], priors, sizes[i : i + 1])
        for key in found:
            assert torch.equal(found[key], alone[key])


def literal_detect(loc, conf, priors, size, conf_thresh, nms, class_agnostic, background_shortcut,
                   per_class, top_k):  # fmt: skip
    """One image's detections in the words of the docstring: everything decoded, class by class."""
    scores = conf.softmax(1)
    boxes = decode(loc, priors, (0.1, 0.2)) * torch.tensor([*size, *size])
    found = []
    sure = scores[:, 0] >= 0.9 if background_shortcut else torch.zeros(len(scores), dtype=bool)
    rows = [
        (prior, label)
        for label in range(1, conf.shape[1])
        for prior in ((scores[:, label] > conf_thresh) & ~sure).nonzero()[:, 0].tolist()
    ]
    for group in [0] if class_agnostic else range(1, conf.shape[1]):
        # Without classes, of equal scores the earlier prior comes first, then the lower class.
        mine = sorted(r for r in rows if class_agnostic or r[1] == group)
        table = torch.tensor([[*boxes[p].tolist(), scores[p, c].item()] for p, c in mine])
        table = table.reshape(-1, 5)
        if nms == "hard":
            kept = utils.nms.nms(table, 0.45)
            values = table[kept, 4]
        else:
            method = {"soft": "linear", "soft-gaussian": "gaussian"}[nms]
            kept, values = utils.nms.soft_nms(table, 0.45, method, 0.5, conf_thresh)
        counts = Counter()
        for k, value in zip(kept.tolist(), values.tolist(), strict=True):
            prior, label = mine[k]
            counts[label] += 1
            if counts[label] <= per_class:
                found.append((-value, label, boxes[prior].tolist(), prior))
    return sorted(found, key=lambda d: d[:1])[:top_k]


@pytest.mark.parametrize("nms", ["hard", "soft", "soft-gaussian"])
@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("background_shortcut", [False, True])
def test_equals_the_literal_steps(nms, class_agnostic, background_shortcut):
    loc, conf, priors = random_outputs(1, classes=5, seed=3)
    every = slice(None, None, 7)
    loc, conf, priors = loc[:, every], conf[:, every], priors[every]
    # Ties within and between classes, and scores on both sides of the shortcut.
    conf = conf.round()
    conf[..., 0] += 4
    chosen = {
        "conf_thresh": 0.01, "nms": nms, "class_agnostic": class_agnostic,
        "background_shortcut": background_shortcut, "per_class": 15, "top_k": 50,
    }  # fmt: skip
    (found,) = Detect(**chosen)(loc, conf, priors, [(640, 480)], with_priors=True)
    expected = literal_detect(loc[0], conf[0], priors, (640, 480), **chosen)
    assert len(found["scores"]) == 50 and found["labels"].bincount().max() == 15
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    scores, labels, boxes, indices = zip(*expected, strict=True)
    assert found["labels"].tolist() == [*labels] and found["priors"].tolist() == [*indices]
    torch.testing.assert_close(found["scores"], -torch.tensor(scores))
    torch.testing.assert_close(found["boxes"], torch.tensor(boxes))
    (plain,) = Detect(**chosen)(loc, conf, priors, [(640, 480)])
    assert found.keys() - plain.keys() == {"priors"}
    assert all(torch.equal(value, found[key]) for key, value in plain.items())


@pytest.mark.parametrize("threshold", [0.0, 0.001, 0.3, 0.5, 0.9, 0.999, 0.999999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_score_over_the_threshold_is_missed(threshold, dtype):
    generator = torch.Generator().manual_seed(1)
    conf = torch.randn(2, 1000, 3, generator=generator) * 8
    conf[1] = torch.tensor([0, -20, 0])
    conf[1, :, 2] = torch.linspace(13, 15, 1000)  # scores of about 0.999999
    conf = conf.to(dtype)
    # Priors far apart, so that suppression takes nothing away.
    priors = torch.tensor([[i * 10.0, 0.5, 1e-3, 1e-3] for i in range(1000)])
    loc = torch.zeros(2, 1000, 4)
    detect = Detect(threshold, per_class=1000, top_k=2000)
    for i, found in enumerate(detect(loc, conf, priors, [(100, 100)] * 2)):
        scores = conf[i].float().softmax(1)[:, 1:]
        expected = scores[scores > threshold].sort(descending=True).values
        torch.testing.assert_close(found["scores"], expected, rtol=0, atol=0)


def test_outputs_of_a_diverged_network_are_refused():
    loc, conf, priors = random_outputs(1)
    for value in (torch.nan, torch.inf):
        for column in (0, 2):
            broken = conf.clone()
            broken[0, 5, column] = value
            with pytest.raises(FloatingPointError, match=r"conf contains NaN or \+infinity"):
                Detect()(loc, broken, priors, [(10, 10)])
        broken = loc.clone()
        for column in (0, 2):
            broken[0, conf[0, :, 1].argmax(), column] = value
            with pytest.raises(FloatingPointError, match="loc contains NaN or infinity"):
                Detect()(broken, conf, priors, [(10, 10)])
            broken = loc.clone()


def test_settings_that_are_not_valid_are_refused():
    for wrong, said in (
        ({"nms": "linear"}, "nms is 'linear', .* hard, soft, soft-gaussian"),
        ({"top_k": 0}, "top_k 0"), ({"per_class": 0}, "per_class 0"),
        ({"nms_thresh": 1.5}, "nms_thresh 1.5"), ({"conf_thresh": float("nan")}, "conf_thresh nan"),
    ):
        for kind in (Detect, DetectConfig):
            with pytest.raises(ValueError, match=said):
                kind(**wrong)


def test_a_layer_keeps_its_settings_and_can_be_made_of_them():
    config = DetectConfig(0.1, 0.5, 7, 15, "soft", True, True)
    layer = Detect.of(config, (0.2, 0.3))
    assert (layer.config, layer.variance) == (config, (0.2, 0.3))
    assert config.with_limits(None, 3) == DetectConfig(0.1, 0.5, 7, 3, "soft", True, True)
    assert Detect(0.1, 0.5, 7, 15, (0.1, 0.2), "soft", True, True).config == config
    assert Detect().config == DetectConfig()


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


def test_nothing_to_find_gives_empty_tensors_and_no_image_an_empty_list():
    loc, conf, priors = random_outputs(2)
    for found in Detect(conf_thresh=1.0)(loc, conf, priors, [(10, 10)] * 2):
        assert found["boxes"].shape == (0, 4)
        assert found["scores"].shape == found["labels"].shape == (0,)
        assert found["labels"].dtype == torch.int64
    assert Detect()(loc[:0], conf[:0], priors, []) == []


def test_inputs_that_do_not_fit_are_refused():
    loc, conf, priors = random_outputs(2)
    sizes = [(10, 10)] * 2
    for wrong, problem in (
        ((conf, priors, sizes[:1]), "1 image sizes"),
        ((conf, PriorBox(config.VOC_512)(), sizes), "32756 priors"),
        ((conf[:, :100], priors, sizes), r"conf \[2, 100, 4\]"),
        ((conf[..., :1], priors, sizes), r"conf \[2, 11620, 1\]"),
    ):
        with pytest.raises(ValueError, match=problem):
            Detect()(loc, *wrong)
