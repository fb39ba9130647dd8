"""Statistics of judged detections: errors, what they cost, confusions, AP by IoU, calibration."""

from typing import NamedTuple

import numpy as np

from data.judge import CLASS, CORRECT, KINDS, LOCALISATION, Judged, is_match, match, pairs
from data.voc_eval import average_precision


class Calibration(NamedTuple):
    """Scores in B bins.

    counts: int64 [B]. confidence, precision: float64 [B], mean score and share of correct
    detections, NaN for an empty bin. error: the expected calibration error, NaN without detections.
    """

    counts: np.ndarray
    confidence: np.ndarray
    precision: np.ndarray
    error: float


def error_counts(judged: Judged, num_classes: int, score: float) -> np.ndarray:
    """Return the errors of detections of at least `score`, and missed objects, by class.

    int64 [num_classes, len(data.judge.ERRORS)]. A detection counts for the class that it claims.
    """
    counted, labels = judged.counted(score), judged.found.labels
    columns = [labels[counted & (judged.kind == kind)] for kind in range(LOCALISATION, len(KINDS))]
    columns.append(judged.truth.labels[judged.missed(score)])
    return np.stack([_per_class(column, num_classes) for column in columns], 1)


def gains(judged: Judged, num_classes: int, metric: str) -> tuple[float, dict[str, float]]:
    """Return AP at IoU 0.5, and by how much it would rise without the errors of each type.

    AP is the mean over the classes that have objects; all detections count. metric: "coco" (101
    recalls) or a key of `data.voc_eval.METRICS`. As in TIDE (section 2.3) a localisation or class
    error is made right if its object has not been found, by the best such detection, and is
    removed otherwise, like every other error. Missed objects are no longer asked for. The AP of a
    class without objects left is then 1, or 0 if it has detections that are wrong.
    """
    truth, found, objects = judged.truth, judged.found, judged.objects
    counted, right = judged.counted(-np.inf), judged.kind == CORRECT
    totals = _per_class(truth.labels[~truth.ignored], num_classes)

    def mean_ap(correct: np.ndarray, kept: np.ndarray, labels: np.ndarray,
                wanted: np.ndarray) -> float:
        aps = _class_aps(found.scores[kept], correct[kept], labels[kept], wanted, metric)
        return float(aps[totals > 0].mean()) if totals.any() else 0.0

    base = mean_ap(right, counted, found.labels, totals)
    free = np.append(judged.not_found(-np.inf), False)  # -1, no object, is the last
    rises = {}
    for number, name in enumerate(KINDS[LOCALISATION:], LOCALISATION):
        of_kind, correct, labels = judged.kind == number, right.copy(), found.labels.copy()
        kept = counted & ~of_kind
        if number in (LOCALISATION, CLASS):
            mended = _best_of_each(judged, of_kind & free[objects])
            correct[mended] = kept[mended] = True
            labels[mended] = truth.labels[objects[mended]]
        rises[name] = mean_ap(correct, kept, labels, totals) - base
    wanted = totals - _per_class(truth.labels[judged.missed(-np.inf)], num_classes)
    rises["missed"] = mean_ap(right, counted, found.labels, wanted) - base
    return base, rises


def ap_by_iou(judged: Judged, ious: np.ndarray, num_classes: int, metric: str) -> np.ndarray:
    """Return the AP of each class at each IoU threshold [T]: float64 [T, num_classes].

    NaN for a class without objects. metric: as in `gains`.
    """
    truth, found = judged.truth, judged.found
    totals = _per_class(truth.labels[~truth.ignored], num_classes)
    rows = []
    for objects, correct in zip(*match(truth, found, ious), strict=True):
        kept = ~np.append(truth.ignored, False)[objects]  # -1, no object, is the last
        aps = _class_aps(found.scores[kept], correct[kept], found.labels[kept], totals, metric)
        rows.append(np.where(totals, aps, np.nan))
    return np.array(rows)


def confusion_matrix(judged: Judged, num_classes: int, score: float) -> np.ndarray:
    """Return int64 [K + 1, K + 1]: objects of class k in row k - 1, found as the column's class.

    Of detections of at least `score`. The diagonal counts the correct ones. Each other detection,
    best first, takes of the objects of other classes that are left the one that it overlaps most,
    if that IoU is a match. The last column counts objects that nothing found, the last row
    detections of no object.
    """
    truth, found = judged.truth, judged.found
    matrix = np.zeros((num_classes + 1,) * 2, np.int64)
    counted, free = judged.counted(score), judged.not_found(score)
    hits = counted & (judged.kind == CORRECT)
    np.add.at(matrix, (found.labels[hits] - 1,) * 2, 1)
    wrong, takes = counted & ~hits, np.full(len(found.images), -1)
    for rows, there, iou, same in pairs(truth, found):
        iou = np.where(same, 0, iou) * free[there]
        for row, line in zip(rows, iou, strict=True):
            k = line.argmax()
            if wrong[row] and is_match(line[k], truth.rule):
                takes[row], free[there[k]], iou[:, k] = there[k], False, 0
    lines = np.append(truth.labels - 1, num_classes)[takes[wrong]]  # -1, no object, is the last
    np.add.at(matrix, (lines, found.labels[wrong] - 1), 1)
    matrix[:-1, -1] = _per_class(truth.labels[free], num_classes)
    return matrix


def calibration(scores: np.ndarray, correct: np.ndarray, bins: int = 10) -> Calibration:
    """Return how well scores [N] in 0..1 state the share that is correct, bool [N].

    Bins have equal width; a score on an edge is in the bin above it, 1 in the last one. The
    expected calibration error is the mean over detections of |precision - mean score| of their
    bins (Guo et al. 2017, arXiv 1706.04599).
    """
    where = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], scores, side="right")
    counts = np.bincount(where, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(where, scores, bins) / counts
        precision = np.bincount(where, correct, bins) / counts
    gaps = np.abs(precision - confidence)[counts > 0] * counts[counts > 0]
    error = float(gaps.sum() / len(scores)) if len(scores) else np.nan
    return Calibration(counts, confidence, precision, error)


def best_f1(scores: np.ndarray, correct: np.ndarray, total: int) -> tuple[float, float]:
    """Return the largest F1 of detections of at least some score, and the highest such score.

    scores [N], correct bool [N], total: number of objects. (0, NaN) if no object is found.
    """
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], correct[order].cumsum()
    last = np.append(scores[1:] != scores[:-1], True)[: len(order)]  # of its score
    if not hits.any():
        return 0.0, np.nan
    f1 = np.where(last, 2 * hits / (np.arange(1, len(order) + 1) + total), 0)
    return float(f1.max()), float(scores[f1.argmax()])


def _per_class(labels: np.ndarray, num_classes: int) -> np.ndarray:
    return np.bincount(labels, minlength=num_classes + 1)[1:]


def _best_of_each(judged: Judged, chosen: np.ndarray) -> np.ndarray:
    """Return the rows of the best `chosen` detection, bool [N], about each object."""
    rows = np.flatnonzero(chosen)
    rows = rows[np.argsort(-judged.found.scores[rows], kind="stable")]
    return rows[np.unique(judged.objects[rows], return_index=True)[1]]


def _class_aps(scores: np.ndarray, correct: np.ndarray, labels: np.ndarray, totals: np.ndarray,
               metric: str) -> np.ndarray:
    """Return the AP of each class, float64 [K], of detections [n] and `totals` [K] objects.

    Without objects it is 1, or 0 if there are detections.
    """
    order = np.lexsort((-scores, labels))
    starts = np.searchsorted(labels[order], np.arange(1, len(totals) + 2))
    aps = np.zeros(len(totals))
    for k, total in enumerate(totals):
        hits = correct[order[starts[k] : starts[k + 1]]].cumsum()
        if not total:
            aps[k] = not len(hits)
            continue
        recall, precision = hits / total, hits / np.arange(1, len(hits) + 1)
        aps[k] = average_precision(recall, precision, metric)
    return aps
