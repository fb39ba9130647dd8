"""Where a detector errs: every detection judged, error types, confusions, calibration.

Boxes here are extents, float64 (x1, y1, x2, y2) with x2 and y2 behind the last pixel, so that a
plain IoU is what the data set's own score computes. Error types are TIDE's (Bolya et al. 2020,
arXiv 2008.08115, section 2.2), with its thresholds: IoU 0.5 to be correct, 0.1 to be near.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.detections import as_columns
from data.truth import Truth
from data.voc_eval import average_precision

FOREGROUND, BACKGROUND = 0.5, 0.1
# What a detection can be. The errors stand in the order in which the first that fits is taken.
KINDS = ("correct", "ignored", "localisation", "class", "duplicate", "both", "background")
CORRECT, IGNORED, LOCALISATION, CLASS, DUPLICATE, BOTH, NOTHING = range(len(KINDS))
ERRORS = (*KINDS[LOCALISATION:], "missed")


class Found(NamedTuple):
    """All detections, N may be 0, image by image.

    images: int64 [N], ascending positions. boxes: float64 [N, 4], extents. labels: int64 [N] >= 1.
    scores: float64 [N].
    """

    images: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


class Judged(NamedTuple):
    """What became of each detection.

    kind: int64 [N], positions in `KINDS`. objects: int64 [N], the row of `Truth` that it is
    about, -1 for background. overlaps: float64 [N], IoU with it; of background the largest there
    is.
    """

    kind: np.ndarray
    objects: np.ndarray
    overlaps: np.ndarray


class Calibration(NamedTuple):
    """A bin of scores an entry, `edges` float64 [B + 1].

    counts: int64 [B]. confidence and precision: float64 [B], mean score and share correct, NaN
    where a bin is empty. error: the expected calibration error, NaN without detections.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    precision: np.ndarray
    error: float


def found_of(detections: Sequence[dict], ids: Sequence, num_classes: int) -> Found:
    """Detections, one dict an image, as columns of extents; errors as in `as_columns`."""
    images, scores, labels, boxes = as_columns(detections, ids, num_classes)
    return Found(images, boxes + (0, 0, 1, 1), labels, scores)


def overlaps(boxes: np.ndarray, objects: np.ndarray, crowds: np.ndarray | bool = False):
    """IoU float64 [n, m] of extents [n, 4] and [m, 4]; where `crowds`, the share of the box."""
    low = np.maximum(boxes[:, None, :2], objects[:, :2])
    shared = (np.minimum(boxes[:, None, 2:], objects[:, 2:]) - low).clip(0).prod(2)
    area, others = ((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, objects))
    union = np.where(crowds, area[:, None], area[:, None] + others - shared)
    return np.divide(shared, union, out=np.zeros(shared.shape), where=shared > 0)


def judge(truth: Truth, found: Found) -> Judged:
    """What became of each detection; a better one of its image comes first, as in a score.

    Correct: it has found an object of its class, by the rule of the score. "coco": of the objects
    left over it takes the one that it overlaps most, by IoU >= 0.5; a crowd is taken last and by
    any number. "voc": it belongs to the object that it overlaps most, and has found it by an
    IoU over 0.5 unless a better detection has. Ignored: what it has found is.

    An error is the first of these that fits; `own` and `other` are its largest IoU with an object
    of its class, and of another, ignored ones left out:
    localisation, 0.1 <= own < 0.5; class, other >= 0.5; duplicate, own >= 0.5; both,
    0.1 <= other; background. By the rule "voc" an IoU of exactly 0.5 is below it.
    """
    kind = np.full(len(found.images), NOTHING)
    objects = np.full(len(found.images), -1)
    best = np.zeros(len(found.images))
    for rows, there in _by_image(truth, found):
        if not len(there):
            continue
        rows = rows[np.argsort(-found.scores[rows], kind="stable")]
        ignored, labels = truth.ignored[there], truth.labels[there]
        crowds = ignored & (truth.rule == "coco")
        iou = overlaps(found.boxes[rows], truth.boxes[there], crowds)
        same = found.labels[rows, None] == labels
        matched = _assign(np.where(same, iou, 0), ignored, truth.rule)
        own = np.where(same & ~ignored, iou, 0)
        other = np.where(same | ignored, 0, iou)
        near_own, near_other = own.argmax(1), other.argmax(1)
        own, other = own.max(1), other.max(1)
        hit = matched >= 0
        of_kind = np.select(
            [hit & ignored[matched], hit, (own >= BACKGROUND) & ~_enough(own, truth.rule),
             _enough(other, truth.rule), _enough(own, truth.rule), other >= BACKGROUND],
            [IGNORED, CORRECT, LOCALISATION, CLASS, DUPLICATE, BOTH],
            NOTHING,
        )  # fmt: skip
        about = np.where(np.isin(of_kind, (LOCALISATION, DUPLICATE)), near_own, near_other)
        about = np.where(hit, matched, about)
        kind[rows] = of_kind
        objects[rows] = np.where(of_kind == NOTHING, -1, there[about])
        best[rows] = np.where(
            of_kind == NOTHING, np.maximum(own, other), iou[np.arange(len(rows)), about]
        )
    return Judged(kind, objects, best)


def missed_objects(
    truth: Truth, found: Found, judged: Judged, score: float
) -> tuple[np.ndarray, np.ndarray]:
    """Bool [M] each: objects that no detection of at least `score` found, and TIDE's missed ones.

    Those are the ones that no localisation or class error of that score is about, either.
    """
    counted = found.scores >= score
    lost = ~truth.ignored
    lost[judged.objects[counted & (judged.kind == CORRECT)]] = False
    missed = lost.copy()
    missed[judged.objects[counted & np.isin(judged.kind, (LOCALISATION, CLASS))]] = False
    return lost, missed


def error_counts(
    truth: Truth, found: Found, judged: Judged, num_classes: int, score: float
) -> np.ndarray:
    """int64 [num_classes, len(ERRORS)]: errors of detections of at least `score`, and missed.

    A detection counts for the class that it claims.
    """
    counted = found.scores >= score
    counts = np.zeros((num_classes, len(ERRORS)), np.int64)
    for column in range(len(ERRORS) - 1):
        of_kind = counted & (judged.kind == LOCALISATION + column)
        counts[:, column] = _per_class(found.labels[of_kind], num_classes)
    _, missed = missed_objects(truth, found, judged, score)
    counts[:, -1] = _per_class(truth.labels[missed], num_classes)
    return counts


def gains(
    truth: Truth, found: Found, judged: Judged, num_classes: int, metric: str
) -> tuple[float, dict[str, float]]:
    """AP at IoU 0.5, and by how much it would rise without the errors of each type.

    The mean over the classes that have objects; all detections count. metric: "coco" (101 recalls),
    or one of `data.voc_eval.METRICS`. As in TIDE (section 2.3) a localisation or class error is
    made right if its object has not been found, by the best such detection, and else is removed
    like every other; missed objects are no longer asked for. The AP of a class of which nothing is
    asked for any more is then 1, or 0 if it has detections that are wrong.
    """
    kind, objects, _ = judged
    counted = kind != IGNORED
    _, missed = missed_objects(truth, found, judged, -np.inf)
    totals = _per_class(truth.labels[~truth.ignored], num_classes)
    base = _mean_ap(found, kind == CORRECT, counted, found.labels, totals, metric)
    free = ~truth.ignored
    free[objects[kind == CORRECT]] = False
    rises = {}
    for number, name in enumerate(ERRORS, LOCALISATION):
        correct, kept, labels, wanted = kind == CORRECT, counted, found.labels, totals
        if name == "missed":
            wanted = totals - _per_class(truth.labels[missed], num_classes)
        else:
            wrong = np.flatnonzero(kind == number)
            kept = counted & (kind != number)
            if number in (LOCALISATION, CLASS):
                wrong = wrong[free[objects[wrong]]]
                wrong = wrong[np.argsort(-found.scores[wrong], kind="stable")]
                wrong = wrong[np.unique(objects[wrong], return_index=True)[1]]
                correct, labels = correct.copy(), labels.copy()
                correct[wrong] = kept[wrong] = True
                labels[wrong] = truth.labels[objects[wrong]]
        rises[name] = _mean_ap(found, correct, kept, labels, wanted, metric, totals) - base
    return base, rises


def confusion_matrix(
    truth: Truth, found: Found, judged: Judged, num_classes: int, score: float
) -> np.ndarray:
    """int64 [K + 1, K + 1]: objects of class k in row k - 1, found as the column's class.

    Of detections of at least `score`. The diagonal are the correct ones. Then each other one, best
    first, takes of the objects of other classes that are left the one that it overlaps most, by
    IoU >= 0.5 ("voc": over 0.5). The last column are objects that nothing found, the last row
    detections of nothing.
    """
    matrix = np.zeros((num_classes + 1,) * 2, np.int64)
    counted = found.scores >= score
    hits = counted & (judged.kind == CORRECT)
    np.add.at(matrix, (found.labels[hits] - 1,) * 2, 1)
    free, _ = missed_objects(truth, found, judged, score)
    wrong = counted & (judged.kind >= LOCALISATION)
    for rows, there in _by_image(truth, found):
        rows, there = rows[wrong[rows]], there[free[there]]
        rows = rows[np.argsort(-found.scores[rows], kind="stable")]
        iou = overlaps(found.boxes[rows], truth.boxes[there])
        iou[found.labels[rows, None] == truth.labels[there]] = 0
        for row, line in zip(rows, iou, strict=True):
            taken = line.argmax() if len(there) else 0
            if len(there) and _enough(line[taken], truth.rule):
                matrix[truth.labels[there[taken]] - 1, found.labels[row] - 1] += 1
                free[there[taken]], iou[:, taken] = False, 0
            else:
                matrix[-1, found.labels[row] - 1] += 1
    matrix[:-1, -1] = _per_class(truth.labels[free], num_classes)
    return matrix


def calibration(scores: np.ndarray, correct: np.ndarray, bins: int = 10) -> Calibration:
    """How well scores [N] in 0..1 say the share that is correct, bool [N].

    Bins of equal width; a score on an edge is in the bin above it, 1 in the last one. The expected
    calibration error is the mean over detections of |precision - mean score| of their bins
    (Guo et al. 2017, arXiv 1706.04599).
    """
    edges = np.linspace(0, 1, bins + 1)
    where = np.searchsorted(edges[1:-1], scores, side="right")
    counts = np.bincount(where, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(where, scores, bins) / counts
        precision = np.bincount(where, correct, bins) / counts
    gaps = np.abs(precision - confidence)[counts > 0] * counts[counts > 0]
    error = float(gaps.sum() / len(scores)) if len(scores) else np.nan
    return Calibration(edges, counts, confidence, precision, error)


def best_f1(scores: np.ndarray, correct: np.ndarray, total: int) -> tuple[float, float]:
    """The largest F1 of detections of at least some score, and the highest score that has it.

    scores [N], correct bool [N], total: how many objects there are. (0, NaN) where none is found.
    """
    order = np.argsort(-scores, kind="stable")
    hits = correct[order].cumsum()
    last = np.append(scores[order][1:] != scores[order][:-1], True)[: len(order)]  # of its score
    if not total or not len(order) or not hits[-1]:
        return 0.0, np.nan
    f1 = np.where(last, 2 * hits / (np.arange(1, len(order) + 1) + total), 0)
    return float(f1.max()), float(scores[order][f1.argmax()])


def _by_image(truth: Truth, found: Found):
    """(rows of found, rows of truth) of every image with detections."""
    images, starts, counts = np.unique(found.images, return_index=True, return_counts=True)
    low, high = (np.searchsorted(truth.images, images, side) for side in ("left", "right"))
    for start, count, first, last in zip(starts, counts, low, high, strict=True):
        yield np.arange(start, start + count), np.arange(first, last)


def _enough(iou: np.ndarray, rule: str) -> np.ndarray:
    """Whether it finds an object."""
    return iou > FOREGROUND if rule == "voc" else iou >= FOREGROUND


def _assign(iou: np.ndarray, ignored: np.ndarray, rule: str) -> np.ndarray:
    """The object of each detection of an image, best first: int64 [n], -1 for none; see `judge`."""
    matched = np.full(len(iou), -1)
    taken = np.zeros(len(ignored), bool)
    least = _enough(iou, rule)
    for n in np.flatnonzero(least.any(1)):
        if rule == "voc":
            k = iou[n].argmax()
            if ignored[k] or not taken[k]:
                matched[n], taken[k] = k, True
            continue
        for choice in (least[n] & ~taken & ~ignored, least[n] & ignored):
            if choice.any():
                k = np.flatnonzero(choice)[::-1]  # of equal overlaps the last, as in pycocotools
                k = k[iou[n, k].argmax()]
                matched[n], taken[k] = k, True
                break
    return matched


def _per_class(labels: np.ndarray, num_classes: int) -> np.ndarray:
    return np.bincount(labels, minlength=num_classes + 1)[1:]


def _mean_ap(found, correct, kept, labels, totals, metric, asked=None) -> float:
    """Mean AP over the classes with `asked` objects, of detections that are `kept`; see `gains`."""
    rows = np.flatnonzero(kept)
    rows = rows[np.lexsort((-found.scores[rows], labels[rows]))]
    starts = np.searchsorted(labels[rows], np.arange(1, len(totals) + 2))
    values = []
    for k in np.flatnonzero(totals if asked is None else asked):
        hits = correct[rows[starts[k] : starts[k + 1]]].cumsum()
        if not totals[k]:
            values.append(float(not len(hits)))
            continue
        recall, precision = hits / totals[k], hits / np.arange(1, len(hits) + 1)
        if metric == "coco":
            best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
            recalls = np.linspace(0, 1, 101)
            values.append(best[np.searchsorted(recall, recalls, side="left")].mean())
        else:
            values.append(average_precision(recall, precision, metric))
    return float(np.mean(values)) if values else 0.0
