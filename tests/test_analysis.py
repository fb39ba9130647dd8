"""Judged detections and their statistics against hand-made cases, literal loops, the data sets'
scores and hotcoco."""

import numpy as np
import pytest
from coco_files import annotation, write_set
from voc_found import score

from data.coco import COCODetection
from data.curves import load_curves
from data.judge import CORRECT, ERRORS, IGNORED, KINDS, Found, found_of, judge, match, overlaps
from data.truth import Truth
from data.voc0712 import VOCDetection
from data.voc_comp4 import read_comp4
from tools.analysis import ap_by_iou, best_f1, calibration, confusion_matrix, error_counts, gains

SQUARE = (0, 0, 100, 100)


def truth(rows, rule="coco"):
    """rows: (image, (x1, y1, x2, y2), label[, ignored])."""
    columns = zip(*((*row, 0)[:4] for row in rows), strict=True) if rows else [()] * 4
    images, boxes, labels, ignored = columns
    return Truth(np.array(images, int), np.array(boxes, float).reshape(-1, 4),
                 np.array(labels, int), np.array(ignored, bool), rule)  # fmt: skip


def found(rows):
    """rows: (image, (x1, y1, x2, y2), label, score)."""
    images, boxes, labels, scores = zip(*rows, strict=True) if rows else [()] * 4
    return Found(np.array(images, int), np.array(boxes, float).reshape(-1, 4),
                 np.array(labels, int), np.array(scores, float))  # fmt: skip


def high(height, left=0):
    """A box of the square's width; its IoU with the square is height / 100."""
    return (left, 0, left + 100, height)


def random_case(seed, rule, images=30, classes=3, ignored=0.1):
    """Objects, and detections of which most lie near one, with odd classes and distances."""
    rng = np.random.default_rng(seed)
    objects, detections = [], []
    for i in range(images):
        for _ in range(rng.integers(0, 6)):
            start, side = rng.integers(0, 100, 2), rng.integers(10, 80, 2)
            label = rng.integers(1, classes + 1)
            objects.append((i, (*start, *(start + side)), label, rng.random() < ignored))
            for _ in range(rng.integers(0, 5)):
                corners = np.array((*start, *(start + side))) + rng.normal(0, side.mean() / 6, 4)
                corners[2:] = np.maximum(corners[2:], corners[:2] + 2)
                claimed = label if rng.random() < 0.7 else rng.integers(1, classes + 1)
                detections.append((i, tuple(corners), claimed, rng.random()))
        start = rng.integers(0, 150, 2)
        detections.append((i, (*start, *(start + 20)), rng.integers(1, classes + 1), rng.random()))
    return truth(objects, rule), found(detections)


ONE = [(0, SQUARE, 1)]
CASES = {  # objects, detections, their kinds, missed objects
    "correct": (ONE, [(0, high(51), 1, 0.9)], ["correct"], 0),
    "localisation": (ONE, [(0, high(49), 1, 0.9)], ["localisation"], 0),
    "least localisation": (ONE, [(0, high(10), 1, 0.9)], ["localisation"], 0),
    "class": (ONE, [(0, high(80), 2, 0.9)], ["class"], 0),
    "duplicate": (ONE, [(0, high(80), 1, 0.8), (0, high(70), 1, 0.9)], ["duplicate", "correct"], 0),
    "both": (ONE, [(0, high(30), 2, 0.9)], ["both"], 1),
    "background": (ONE, [(0, high(9), 1, 0.9)], ["background"], 1),
    "other image": (ONE, [(1, SQUARE, 1, 0.9)], ["background"], 1),
    "localisation before class": (
        [(0, high(30), 1), (0, high(60), 2)], [(0, SQUARE, 1, 0.9)], ["localisation"], 1),
    "class before duplicate": (
        [(0, high(90), 1), (0, high(60), 2)], [(0, high(90), 1, 0.95), (0, SQUARE, 1, 0.9)],
        ["correct", "class"], 0),
    "ignored": (
        [(0, SQUARE, 1, True)], [(0, SQUARE, label, 0.9) for label in (1, 1, 2)],
        ["ignored", "ignored", "background"], 0),
    "nothing": ([], [], [], 0),
}  # fmt: skip


@pytest.mark.parametrize("rule", ["voc", "coco"])
@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_error_by_hand(case, rule):
    objects, detections, kinds, missed = CASES[case]
    judged = judge(truth(objects, rule), found(detections))
    assert [KINDS[k] for k in judged.kind] == kinds
    assert judged.missed(0).sum() == missed
    counts = error_counts(judged, 2, 0)
    assert counts.sum() == missed + sum(kind not in ("correct", "ignored") for kind in kinds)
    assert counts[:, ERRORS.index("missed")].sum() == missed
    if not kinds:
        assert not confusion_matrix(judged, 2, 0).any()
        assert gains(judged, 2, "coco") == (0, dict.fromkeys(ERRORS, 0))


@pytest.mark.parametrize("rule, missed", [("voc", 0), ("coco", 2)])
def test_cocos_score_takes_the_100_best_detections_of_a_class_in_an_image(rule, missed):
    boxes = [(20 * k, 0, 20 * k + 10, 10) for k in range(102)]
    judged = judge(truth([(0, box, 1) for box in boxes], rule),
                   found([(0, box, 1, (k + 1) / 200) for k, box in enumerate(boxes)]))
    assert np.flatnonzero(judged.not_found(0)).tolist() == [*range(missed)]


def test_matching_by_hand():
    # Boxes of 10 x 10; shifted by 3 columns: 70 / 130 = .54, by 4: 60 / 140 = .43
    objects = truth([(0, (0, 0, 10, 10), 1), (0, (5, 0, 15, 10), 1), (0, (50, 50, 60, 60), 2)],
                    "voc")  # fmt: skip
    boxes = [
        (3, 0, 13, 10),  # 54 % of the first, 8 shared columns of the second: 80 / 120 = .67
        (5, 0, 15, 10),  # exactly the second
        (0, 0, 10, 10),  # exactly the first
        (50, 50, 60, 60),  # another class than the third
        (53, 50, 63, 60),  # 54 % of the third
        (54, 50, 64, 60),  # 43 % of it
    ]
    labels, scores = (1, 1, 1, 1, 2, 2), (0.8, 0.9, 0.7, 0.95, 0.3, 0.99)
    rows = [(0, *row) for row in zip(boxes, labels, scores, strict=True)]
    owners, hits = match(objects, found(rows), (0.5, 0.4))
    assert owners.tolist() == [[1, 1, 0, -1, 2, -1], [1, 1, 0, -1, 2, 2]]
    assert hits.tolist() == [[0, 1, 1, 0, 1, 0], [0, 1, 1, 0, 0, 1]]
    rows[0] = (*rows[0][:3], 0.95)  # now the best
    assert match(objects, found(rows), (0.5,))[1].tolist() == [[1, 0, 1, 0, 1, 0]]
    objects.ignored[1] = True  # any number of detections finds it
    assert match(objects, found(rows), (0.5,))[1].tolist() == [[1, 1, 1, 0, 1, 0]]


def test_the_two_rules_differ_in_the_object_that_is_taken_and_at_the_edge():
    objects = [(0, SQUARE, 1), (0, (0, 0, 100, 75), 1)]
    detections = found([(0, SQUARE, 1, 0.9), (0, high(95), 1, 0.8)])
    assert judge(truth(objects, "coco"), detections).objects.tolist() == [0, 1]
    judged = judge(truth(objects, "voc"), detections)
    assert [KINDS[k] for k in judged.kind] == ["correct", "duplicate"]
    edge = found([(0, high(50), 1, 0.9)])  # exactly 0.5
    assert judge(truth([(0, SQUARE, 1)], "coco"), edge).kind.tolist() == [CORRECT]
    judged = judge(truth([(0, SQUARE, 1)], "voc"), edge)
    assert KINDS[judged.kind[0]] == "localisation" and judged.overlaps.tolist() == [0.5]
    other = found([(0, high(50), 2, 0.9)])
    for rule, kind, row in (("coco", "class", [0, 1, 0]), ("voc", "both", [0, 0, 1])):
        judged = judge(truth([(0, SQUARE, 1)], rule), other)
        assert KINDS[judged.kind[0]] == kind
        assert confusion_matrix(judged, 2, 0)[0].tolist() == row


def test_scores_decide_who_counts_and_who_is_missed():
    objects = truth([(0, SQUARE, 1), (1, SQUARE, 2)])
    detections = found([(0, SQUARE, 1, 0.3), (1, high(30), 2, 0.6)])
    judged = judge(objects, detections)
    assert judged.not_found(0.5).tolist() == [True, True]
    assert judged.missed(0.5).tolist() == [True, False]
    counts = error_counts(judged, 2, 0.5).sum(0)
    assert dict(zip(ERRORS, counts, strict=True)) == dict.fromkeys(ERRORS, 0) | {
        "localisation": 1, "missed": 1}  # fmt: skip


def test_overlap_is_that_of_a_literal_loop():
    rng = np.random.default_rng(0)
    a, b = (np.sort(rng.integers(0, 30, (20, 2, 2)), 1).reshape(-1, 4) for _ in range(2))
    pixels = [{(x, y) for x in range(x1, x2) for y in range(y1, y2)} for x1, y1, x2, y2 in
              (*a.tolist(), *b.tolist())]  # fmt: skip
    for n, one in enumerate(pixels[:20]):
        for m, other in enumerate(pixels[20:]):
            wanted = len(one & other) / max(len(one | other), 1)
            assert overlaps(a[n], b[m]) == pytest.approx(wanted)
            wanted = len(one & other) / max(len(one), 1)
            assert overlaps(a[n], b[m], True) == pytest.approx(wanted)


def literal_confusion(objects, detections, judged, classes, score):
    table = [[0] * (classes + 1) for _ in range(classes + 1)]
    left = {n for n in range(len(objects.images)) if not objects.ignored[n]}
    rest = []
    for n in sorted(range(len(detections.images)), key=lambda n: -detections.scores[n]):
        if detections.scores[n] < score or judged.kind[n] == IGNORED:
            continue
        if judged.kind[n] == CORRECT:
            table[detections.labels[n] - 1][detections.labels[n] - 1] += 1
            left.remove(judged.objects[n])
        else:
            rest.append(n)
    for n in rest:
        best, taken, row = 0, None, classes
        for m in sorted(left):
            if (objects.images[m] == detections.images[n]
                    and objects.labels[m] != detections.labels[n]):  # fmt: skip
                iou = overlaps(detections.boxes[n], objects.boxes[m])
                if iou >= 0.5 and iou > best:
                    best, taken, row = iou, m, objects.labels[m] - 1
        table[row][detections.labels[n] - 1] += 1
        left.discard(taken)
    for m in left:
        table[objects.labels[m] - 1][classes] += 1
    return table


@pytest.mark.parametrize("rule", ["voc", "coco"])
@pytest.mark.parametrize("score", [0, 0.4])
def test_confusion_matrix_is_that_of_a_literal_loop(rule, score):
    objects, detections = random_case(3, rule)
    judged = judge(objects, detections)
    matrix = confusion_matrix(judged, 3, score)
    assert matrix.tolist() == literal_confusion(objects, detections, judged, 3, score)
    assert matrix[:-1].sum() == (~objects.ignored).sum()  # every object once
    counted = (detections.scores >= score) & (judged.kind != IGNORED)
    assert matrix[:, :-1].sum() == counted.sum()  # every detection once
    assert (matrix[:-1, :-1] - np.diag(np.diag(matrix)[:-1])).sum() > 2


def test_calibration_by_hand():
    scores = np.array([0.05, 0.15, 0.1, 0.95, 1.0, 0.95, 0.91])
    correct = np.array([0, 1, 0, 1, 1, 1, 0], bool)
    result = calibration(scores, correct)
    assert result.counts.tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 4]
    assert result.precision[[0, 1, 9]].tolist() == [0, 0.5, 0.75]
    assert result.confidence[[0, 1, 9]] == pytest.approx([0.05, 0.125, 0.9525])
    assert np.isnan(result.precision[5])
    wanted = (1 * 0.05 + 2 * (0.5 - 0.125) + 4 * (0.9525 - 0.75)) / 7
    assert result.error == pytest.approx(wanted)
    assert np.isnan(calibration(np.zeros(0), np.zeros(0, bool)).error)


def test_best_f1_by_hand():
    # at 0.9: 1 right of 1, 4 objects: 2/5; at 0.8: 2 of 2: 4/6; at 0.7: 2 of 4: 4/8; at 0.1: 6/9
    scores = np.array([0.7, 0.9, 0.7, 0.1, 0.8])
    correct = np.array([0, 1, 0, 1, 1], bool)
    assert best_f1(scores, correct, 4) == (pytest.approx(2 / 3), 0.8)
    assert best_f1(np.array([0.5, 0.5]), np.array([1, 0], bool), 1) == (pytest.approx(2 / 3), 0.5)
    for nothing in ((scores, correct & False, 4), (scores[:0], correct[:0], 4)):
        value, score = best_f1(*nothing)
        assert value == 0 and np.isnan(score)


@pytest.mark.parametrize("metric", ["coco", "area", "voc07_11point"])
def test_a_class_that_is_not_asked_for_any_more_is_right_unless_something_false_is_left(metric):
    objects = truth([(0, SQUARE, 1), (1, SQUARE, 2)], "coco" if metric == "coco" else "voc")
    one, nothing = (0, SQUARE, 1, 0.9), (2, SQUARE, 2, 0.8)  # of the second class none is found
    for rows, missed in (([one], 0.5), ([one, nothing], 0)):
        detections = found(rows)
        base, rises = gains(judge(objects, detections), 2, metric)
        assert base == pytest.approx(0.5)
        assert rises == pytest.approx({**dict.fromkeys(ERRORS, 0), "missed": missed})


# ---------------------------------------------------------------- against the data sets' scores


def as_detections(detections, count):
    """What a data set's `evaluate` takes."""
    columns = detections._replace(boxes=detections.boxes - (0, 0, 1, 1))._asdict()
    return [{key: column[detections.images == i] for key, column in columns.items()}
            for i in range(count)]  # fmt: skip


def test_voc_correct_detections_are_those_of_the_score(tmp_path, make_voc):
    objects, detections = random_case(5, "voc")
    names = ("a", "b", "c")
    samples = {f"i{i:02}": [] for i in range(30)}
    for i, box, label, ignored in zip(*objects[:4], strict=True):
        corners = box + (1, 1, 0, 0)  # the XML counts from 1, and its corners are inside
        samples[f"i{i:02}"].append((names[label - 1], tuple(corners), ignored))
    root = make_voc(tmp_path / "data", {"test": samples}, size=(300, 300))
    dataset = VOCDetection(root, [(None, "test")], classes=names)
    read = dataset.truth()
    for one, other in zip(read[:4], objects[:4], strict=True):
        assert np.array_equal(one, other)
    # Boxes as the official files have them, to 1/1000 pixel.
    detections = detections._replace(boxes=detections.boxes.round(3))
    each = as_detections(detections, 30)
    again = found_of(each, dataset.ids, 3)
    assert np.allclose(again.boxes, detections.boxes)
    judged = judge(read, detections)
    result = dataset.evaluate(each, tmp_path / "out")
    curves = load_curves(tmp_path / "out" / "curves.npz")
    for label, name in enumerate(names, 1):
        hits = (judged.kind == CORRECT) & (detections.labels == label)
        points = curves.curve(name)["scores"]
        assert points == pytest.approx(np.sort(detections.scores[hits])[::-1], abs=1e-8)
    files, _ = read_comp4(tmp_path / "out", "test", names, dataset.ids)
    for metric in ("area", "voc07_11point"):
        aps = ap_by_iou(judged, np.array([0.5, 0.75]), 3, metric)
        for row, iou in zip(aps, (0.5, 0.75), strict=True):
            wanted = score(files, dataset.annotations, names, iou)[metric]["per_class"]
            assert row == pytest.approx([*wanted.values()], abs=1e-12)
        base, rises = gains(judged, 3, metric)
        assert base == pytest.approx(result[metric]["mean"], abs=1e-12)
        assert all(rise > -1e-12 for rise in rises.values()) and sum(rises.values()) > 0.05


def test_coco_ap_is_the_score_of_the_data_set(tmp_path):
    objects, detections = random_case(7, "coco")  # with crowds
    sides = np.hstack([objects.boxes[:, :2], objects.boxes[:, 2:] - objects.boxes[:, :2]])
    rows = [annotation(n, 10 + i, box, 4 * label, iscrowd=int(crowd)) for n, (i, box, label, crowd)
            in enumerate(zip(objects.images.tolist(), sides.tolist(), objects.labels.tolist(),
                             objects.ignored, strict=True), 1)]  # fmt: skip
    root = write_set(tmp_path, "instances_val.json", "val", {10 + i: f"{i}.jpg" for i in range(30)},
                     rows, categories=[{"id": 4 * k, "name": f"class {k}"} for k in (1, 2, 3)])
    dataset = COCODetection(root, [(None, "val")])
    detections = detections._replace(boxes=detections.boxes.round(3))
    for one, other in zip(dataset.truth(), objects, strict=True):
        assert np.array_equal(one, other)
    judged = judge(objects, detections)
    assert (judged.kind == IGNORED).sum() > 2
    result = dataset.evaluate(as_detections(detections, 30), tmp_path / "out")
    base, _ = gains(judged, 3, "coco")
    assert base == pytest.approx(result["stats"][1], abs=1e-12)
    aps = ap_by_iou(judged, np.linspace(0.5, 0.95, 10), 3, "coco")
    assert aps.mean(0) == pytest.approx([*result["per_class"].values()], abs=1e-12)
    assert np.isnan(ap_by_iou(judged, [0.5], 4, "coco")[0, 3])  # has no objects


@pytest.mark.parametrize("seed", [4, 5, 8])
def test_coco_errors_gains_and_calibration_are_hotcocos(seed, capsys):
    hotcoco = pytest.importorskip("hotcoco")
    objects, detections = random_case(seed, "coco", ignored=0)
    # hotcoco lets the localisation and class errors of an object compete for being made right,
    # where the publication makes right the errors of one type: so here no object has both.
    judged = judge(objects, detections)
    kind, about = judged.kind, judged.objects
    mislocated = about[kind == KINDS.index("localisation")]
    alone = ~((kind == KINDS.index("class")) & np.isin(about, mislocated))
    assert 0 < (~alone).sum() < 30
    detections = Found(*(column[alone] for column in detections))
    sides = np.hstack([objects.boxes[:, :2], objects.boxes[:, 2:] - objects.boxes[:, :2]])
    reference = hotcoco.COCO.from_arrays(
        [{"id": i + 1, "width": 300, "height": 300} for i in range(30)],
        [{"id": k, "name": str(k)} for k in (1, 2, 3)], objects.images + 1, objects.labels, sides,
        area=sides[:, 2:].prod(1), iscrowd=objects.ignored,
    )  # fmt: skip
    columns = [detections.images + 1, detections.boxes[:, :2],
               detections.boxes[:, 2:] - detections.boxes[:, :2], detections.scores,
               detections.labels]  # fmt: skip
    results = reference.load_res(np.column_stack(columns))
    evaluation = hotcoco.COCOeval(reference, results, "bbox")
    evaluation.run()
    capsys.readouterr()
    judged = judge(objects, detections)
    assert set(detections.labels[judged.kind == CORRECT]) == {1, 2, 3}  # each is asked for
    wanted, short = evaluation.tide_errors(), ("Loc", "Cls", "Dupe", "Both", "Bkg", "Miss")
    counts = error_counts(judged, 3, 0).sum(0).tolist()
    assert counts == [wanted["counts"][key] for key in short] and all(counts)
    base, rises = gains(judged, 3, "coco")
    assert base == pytest.approx(wanted["ap_base"], abs=1e-12)
    assert [*rises.values()] == pytest.approx([wanted["delta_ap"][key] for key in short])
    counted = judged.kind != IGNORED
    ours = calibration(detections.scores[counted], judged.kind[counted] == CORRECT)
    theirs = evaluation.calibration()
    assert ours.counts.tolist() == [b["count"] for b in theirs["bins"]]
    assert ours.error == pytest.approx(theirs["ece"])
