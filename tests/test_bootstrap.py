"""The bootstrap over images against scoring every drawn test set from the start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data import bootstrap
from data.annotation import Annotation
from data.voc_comp4 import ClassDetections
from data.voc_eval import METRICS, evaluate_voc

CLASSES = ("a", "b")


def made_up(images=12, seed=0):
    """Annotations with some difficult objects, and detections near and far from objects."""
    rng = np.random.default_rng(seed)
    annotations, rows = [], {name: [] for name in CLASSES}
    for image in range(images):
        count = int(rng.integers(0, 4))
        low = rng.integers(0, 200, (count, 2))
        boxes = np.hstack([low, low + rng.integers(20, 60, (count, 2))]).astype(np.float64)
        names = tuple(rng.choice(CLASSES, count).tolist())
        annotations.append(Annotation(Path("x"), None, names, boxes, rng.random(count) < 0.2))
        for name, box in zip(names, boxes, strict=True):
            for _ in range(rng.integers(0, 3)):
                rows[name].append((image, rng.random(), *(box + rng.normal(0, 4, 4))))
        for name in CLASSES:
            rows[name].append((image, rng.random(), *(rng.random(2) * 200), 250, 250))
    tables = {name: np.array(each) for name, each in rows.items()}
    found = {name: ClassDetections(t[:, 0].astype(int), t[:, 1], t[:, 2:])
             for name, t in tables.items()}
    return annotations, found


def scored_anew(annotations, found, weights):
    """The score of a test set that has each image as often as its weight says."""
    chosen = np.repeat(np.arange(len(weights)), weights)
    several = {}
    for name, each in found.items():
        pairs = [(new, k) for new, image in enumerate(chosen)
                 for k in np.flatnonzero(each.images == image)]
        index = np.array([k for _, k in pairs], int)
        images = np.array([new for new, _ in pairs], int)
        several[name] = ClassDetections(images, each.scores[index], each.boxes[index])
    return evaluate_voc(several, [annotations[i] for i in chosen], CLASSES)


def test_every_draw_is_the_score_of_the_drawn_images(monkeypatch):
    annotations, found = made_up(20)
    weights = bootstrap.draw(20, draws=40)
    assert (weights.sum(1) == 20).all()
    weights[0] = 1
    seen = []
    precisions = bootstrap.precisions

    def keep(counted, _):
        seen.append(precisions(counted, weights))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(bootstrap, "precisions", keep)
        whole = evaluate_voc(found, annotations, CLASSES)
    for k, metric in enumerate(METRICS):
        of_classes = [each[k] for each in seen]
        assert [aps[0] for aps in of_classes] == pytest.approx(
            list(whole[metric]["per_class"].values())
        )
        means = bootstrap.mean(of_classes)
        for n, row in enumerate(weights.astype(int)):
            anew = scored_anew(annotations, found, row)[metric]
            assert [aps[n] for aps in of_classes] == pytest.approx([*anew["per_class"].values()])
            assert means[n] == pytest.approx(anew["mean"])


def test_intervals_hold_the_score_and_shrink_with_the_images():
    widths = []
    for images in (40, 640):
        result = evaluate_voc(*reversed(made_up(images)), CLASSES)["area"]
        low, high = result["interval"]
        assert low < result["mean"] < high
        for name, (below, above) in result["per_class_interval"].items():
            assert below < result["per_class"][name] < above
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.4)  # the root of the images


def test_too_few_images_with_objects_have_no_interval():
    annotations, found = made_up(3, seed=1)
    result = evaluate_voc(found, annotations[:1] + [a.part(np.zeros(len(a.names), bool))
                                                    for a in annotations[1:]], CLASSES)
    assert result["area"]["interval"] is None
    assert set(result["area"]["per_class_interval"].values()) == {None}


def test_a_thousand_draws_of_five_thousand_images_are_fast_enough_to_be_usual():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 5000, 20_000)
    counted = bootstrap.Counted(images, rng.random(20_000) < 0.05, rng.integers(0, 2, 5000))
    eleven, area = bootstrap.precisions(counted, bootstrap.draw(5000))
    assert eleven.shape == area.shape == (1000,) and (area > 0).all()
