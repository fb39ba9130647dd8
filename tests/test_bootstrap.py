"""The bootstrap over images against scoring every drawn test set from the start."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from coco_files import perfect
from test_coco_eval import random_set
from voc_found import by_class, score

from data import bootstrap
from data.annotation import Annotation
from data.coco import COCODetection
from data.coco_eval import BACKENDS, evaluate_coco
from data.judge import Found, count
from data.truth import Truth
from data.voc_eval import METRICS

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
    return by_class(*rows.values()), annotations


def scored_anew(found, annotations, classes, weights):
    """The score of a test set that has each image as often as its weight says."""
    chosen = np.repeat(np.arange(len(weights)), weights)
    rows = [np.flatnonzero(found.images == image) for image in chosen]
    several = Found(*(each[np.concatenate(rows)] for each in found))
    several = several._replace(images=np.repeat(np.arange(len(chosen)), [*map(len, rows)]))
    return score(several, [annotations[i] for i in chosen], classes)


def test_every_draw_is_the_score_of_the_drawn_images(monkeypatch):
    found, annotations = made_up(20)
    weights = bootstrap.draw(20, draws=40)
    assert (weights.sum(1) == 20).all()
    assert not bootstrap.draw(5).any()  # too few
    weights[0] = 1
    seen = []
    precisions = bootstrap.precisions

    def keep(counted, _, metrics):
        seen.append(precisions(counted, weights, metrics))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(bootstrap, "precisions", keep)
        whole = score(found, annotations, CLASSES)
    for k, metric in enumerate(METRICS):
        of_classes = [each[k, 0] for each in seen]
        assert [aps[0] for aps in of_classes] == pytest.approx(
            list(whole[metric]["per_class"].values())
        )
        means = bootstrap.mean(of_classes)
        for n, row in enumerate(weights.astype(int)):
            anew = scored_anew(found, annotations, CLASSES, row)[metric]
            assert [aps[n] for aps in of_classes] == pytest.approx([*anew["per_class"].values()])
            assert means[n] == pytest.approx(anew["mean"])


def test_intervals_hold_the_score_and_shrink_with_the_images():
    widths = []
    for images in (40, 640):
        result = score(*made_up(images), CLASSES)["area"]
        low, high = result["interval"]
        assert low < result["mean"] < high
        for name, (below, above) in result["per_class_interval"].items():
            assert below < result["per_class"][name] < above
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.4)  # the root of the images


def test_too_few_images_with_objects_have_no_interval():
    found, annotations = made_up(3, seed=1)
    empty = [a.part(np.zeros(len(a.names), bool)) for a in annotations[1:]]
    result = score(found, annotations[:1] + empty, CLASSES)
    assert result["area"]["interval"] is None
    assert set(result["area"]["per_class_interval"].values()) == {None}


@pytest.mark.parametrize("images, known", [(1, False), (3, False), (5, True)])
def test_a_class_of_few_images_has_no_interval(images, known):
    boxes = np.array([[10.0, 10, 40, 40]])
    truth = [Annotation(Path("x"), None, (CLASSES[n < images],), boxes, np.zeros(1, bool))
             for n in range(100)]
    everywhere = [(n, 1 - n / 200, *boxes[0]) for n in range(100)]
    result = score(by_class(everywhere, everywhere), truth, CLASSES)["area"]
    assert (result["per_class_interval"]["b"] is not None) == known
    assert result["per_class_interval"]["a"] and result["interval"]


def test_the_mean_of_one_class_has_the_interval_of_the_class():
    box = np.array([[10.0, 10, 40, 40]])
    truth = [Annotation(Path("x"), None, ("a",) * (n < 6), box[: n < 6], np.zeros(int(n < 6), bool))
             for n in range(50)]
    assert (bootstrap.draw(50)[:, :6].sum(1) == 0).any()  # a draw has no object
    result = score(by_class([(n, 1 - n / 99, *box[0]) for n in range(0, 9, 2)]), truth, ("a",))
    low, high = result["area"]["interval"]
    assert result["area"]["per_class_interval"] == {"a": [low, high]} and low < 0.5 < high


@pytest.mark.parametrize("images", [6, 11, 25, 47])
def test_a_perfect_class_has_no_bound_over_one(images):
    boxes = np.array([[10.0, 10, 40, 40]])
    truth = [Annotation(Path("x"), None, ("a",), boxes, np.zeros(1, bool))] * images
    result = score(by_class([(n, 1 - n / 99, *boxes[0]) for n in range(images)]), truth, ("a",))
    for metric in METRICS:
        assert max(result[metric]["interval"]) <= 1


def coco_anew(document, results, weights):
    """The score by pycocotools of a set that has each image as often as its weight says."""
    images = np.repeat(np.sort([image["id"] for image in document["images"]]), weights)
    several = {"categories": document["categories"], "annotations": [],
               "images": [{"id": new, "width": 640, "height": 480} for new in range(len(images))]}
    found = []
    for new, old in enumerate(images.tolist()):
        several["annotations"] += [each | {"image_id": new, "id": (new + 1) * 10_000 + n}
                                   for n, each in enumerate(document["annotations"])
                                   if each["image_id"] == old]
        found += [each | {"image_id": new} for each in results if each["image_id"] == old]
    return several, found


@pytest.mark.parametrize("seed", range(12))
def test_every_draw_is_the_coco_score_of_the_drawn_images(seed, tmp_path, monkeypatch):
    path, rng = tmp_path / "truth.json", np.random.default_rng(seed)
    columns = random_set(rng, path)
    document = json.loads(path.read_text())
    scores = rng.permutation(len(columns.scores)) / 1e6  # the order of equal ones is another
    columns = columns._replace(scores=scores)
    results = [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in
               zip(*(column.tolist() for column in columns), strict=True)]
    monkeypatch.setattr(bootstrap, "FEWEST", 1)
    weights = bootstrap.draw(len(document["images"]), 6, seed)
    weights[0] = 1
    with monkeypatch.context() as patch:
        patch.setattr(bootstrap, "draw", lambda _: weights)
        patch.setattr(bootstrap, "interval", lambda values: values)
        whole = evaluate_coco(columns, path)
    for n, row in enumerate(weights.astype(int)):
        several, found = coco_anew(document, results, row)
        path.write_text(json.dumps(several))
        anew = evaluate_coco(found, path, intervals=False)
        for part, key, wanted, mean in (
            (whole, "per_category", anew["per_category"], anew["stats"][0]),
            (whole["at_50"], "per_class", anew["at_50"]["per_class"], anew["stats"][1]),
        ):
            drawn = part[f"{key}_interval"]
            values = {name: -1 if aps is None or np.isnan(aps[n]) else aps[n]
                      for name, aps in drawn.items()}
            assert values == pytest.approx(wanted)
            drawn = part["interval"]
            assert (-1 if drawn is None else np.nan_to_num(drawn[n], nan=-1)) == pytest.approx(mean)


def test_coco_intervals_are_those_of_every_backend_and_hold_the_score(tmp_path):
    seeds = np.random.default_rng(1)
    while True:
        results = random_set(seeds, tmp_path / "truth.json")
        if len(set(results.image_ids.tolist())) == 20:
            break
    reports = []
    for backend in BACKENDS:
        pytest.importorskip(backend.replace("-", "_"))
        reports.append(evaluate_coco(results, tmp_path / "truth.json", backend))
        assert reports[0]["per_category_interval"] == reports[-1]["per_category_interval"]
    report = reports[0]
    low, high = report["interval"]
    assert low < report["stats"][0] < high
    low, high = report["at_50"]["interval"]
    assert low < report["at_50"]["mean"] == report["stats"][1] < high


def test_while_training_slow_intervals_are_left_out(coco_folder, tmp_path, monkeypatch):
    dataset = COCODetection(coco_folder, [("2017", "val")])
    found = perfect(dataset)
    dataset.quick_score = True
    assert dataset.evaluate(found, tmp_path)["per_class_interval"]
    monkeypatch.setattr("data.coco.QUICK", 0)
    assert dataset.evaluate(found, tmp_path)["per_class_interval"] == {}
    dataset.quick_score = False
    assert dataset.evaluate(found, tmp_path)["per_class_interval"]


@pytest.mark.slow
def test_intervals_of_coco_take_seconds():
    """5,000 images, 80 classes, 100 detections an image; about 12 s of one busy core."""
    rng, images, objects = np.random.default_rng(0), 5000, 36_000
    low = rng.random((objects, 2)) * 400
    boxes = np.hstack([low, low + np.exp(rng.uniform(2.5, 5.3, (objects, 2)))])
    labels = np.minimum(rng.zipf(1.4, objects), 80)
    truth = Truth(np.sort(rng.integers(0, images, objects)), boxes, labels,
                  rng.random(objects) < 0.01, "coco")
    source = np.sort(rng.integers(0, objects, 100 * images))
    near = boxes[source] + rng.normal(0, 8, (len(source), 4))
    found = Found(truth.images[source], near, labels[source], rng.random(len(source)))
    start = time.process_time()
    weights = bootstrap.draw(images)
    counted = count(truth, found, np.linspace(0.5, 0.95, 10), 80, images)
    aps = [bootstrap.precisions(each, weights, ("coco",)).mean((0, 1)) for each in counted]
    low, high = bootstrap.interval(bootstrap.mean(aps))
    assert 0 < low < high < 1 and time.process_time() - start < 60
