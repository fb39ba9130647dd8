"""Every detection judged: correct, ignored, or which kind of error; and which objects are missed.

Boxes here are extents, float64 (x1, y1, x2, y2) with x2 and y2 behind the last pixel, so that a
plain IoU is what the data set's own score computes. Kinds of errors are TIDE's (Bolya et al. 2020,
arXiv 2008.08115, section 2.2), with its thresholds: IoU 0.5 to be correct, 0.1 to be near.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from data.bootstrap import Counted
from data.detections import as_columns
from data.truth import Truth

FOREGROUND, BACKGROUND = 0.5, 0.1
MOST = 100  # detections of a class in an image that COCO's score takes
# Kinds of detections. Errors stand in the order in which the first that fits is taken.
KINDS = ("correct", "ignored", "localisation", "class", "duplicate", "both", "background")
CORRECT, IGNORED, LOCALISATION, CLASS, DUPLICATE, BOTH, NOTHING = range(len(KINDS))
ERRORS = (*KINDS[LOCALISATION:], "missed")


class Found(NamedTuple):
    """All detections, N may be 0; image by image, where it is not said otherwise.

    images: int64 [N], indices in the data set.
    boxes: float64 [N, 4], extents.
    labels: int64 [N], from 1.
    scores: float64 [N].
    """

    images: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Judged:
    """The objects of a data set, the detections, and what each detection is.

    kind: int64 [N], indices in `KINDS`.
    objects: int64 [N], the row in `truth` of the object that a detection is about, -1 for none.
    overlaps: float64 [N], the IoU with that object; without one, the largest IoU with any object.
    """

    truth: Truth
    found: Found
    kind: np.ndarray
    objects: np.ndarray
    overlaps: np.ndarray

    def counted(self, score: float) -> np.ndarray:
        """Return which detections of at least `score` are right or wrong, bool [N]."""
        return (self.found.scores >= score) & (self.kind != IGNORED)

    def not_found(self, score: float) -> np.ndarray:
        """Return which objects have no correct detection of at least `score`, bool [M]."""
        lost = ~self.truth.ignored
        lost[self.objects[self.counted(score) & (self.kind == CORRECT)]] = False
        return lost

    def missed(self, score: float) -> np.ndarray:
        """Return which objects are not found nor the subject of an error, bool [M].

        These are TIDE's missed objects: no localisation or class error of at least `score` is
        about them.
        """
        missed = self.not_found(score)
        near = np.isin(self.kind, (LOCALISATION, CLASS))
        missed[self.objects[self.counted(score) & near]] = False
        return missed


def found_of(detections: Sequence[dict], ids: Sequence, num_classes: int) -> Found:
    """Return detections, one dict an image, as columns; raises what `as_columns` raises."""
    images, scores, labels, boxes = as_columns(detections, ids, num_classes)
    return Found(images, boxes + (0, 0, 1, 1), labels, scores)


def overlaps(boxes: np.ndarray, objects: np.ndarray,
             crowds: np.ndarray | bool = False) -> np.ndarray:
    """Return the IoU, float64, of extents [..., 4], broadcast against each other.

    For objects that are `crowds`, bool, it is the share of the box that lies in the object.
    """
    low = np.maximum(boxes[..., :2], objects[..., :2])
    shared = (np.minimum(boxes[..., 2:], objects[..., 2:]) - low).clip(0).prod(-1)
    area, others = ((b[..., 2:] - b[..., :2]).prod(-1) for b in (boxes, objects))
    union = np.where(crowds, area, area + others - shared)
    return np.divide(shared, union, out=np.zeros(shared.shape), where=shared > 0)


def judge(truth: Truth, found: Found) -> Judged:
    """Return what each detection is, by the rule of the data set's score.

    A correct detection has found an object of its class (`match`), an ignored one an ignored
    object. Other detections are errors. With `own` and `other`, the largest IoU with an object of
    the detection's class and of another class, ignored objects left out, an error is the first of:
    localisation (0.1 <= own < 0.5), class (other >= 0.5), duplicate (own >= 0.5), both
    (other >= 0.1), background. By the rule "voc" an IoU of exactly 0.5 is below 0.5. `Judged.found`
    has the detections that the score takes, see `count`.
    """
    found = _scored(truth, found)
    (matched,), (hits,) = match(truth, found, (FOREGROUND,))
    kind = np.full(len(found.images), NOTHING)
    objects, best = matched.copy(), np.zeros(len(found.images))
    for rows, there, iou, same in pairs(truth, found):
        ignored, hit = truth.ignored[there], hits[rows]
        own, other = np.where(same & ~ignored, iou, 0), np.where(same | ignored, 0, iou)
        near_own, near_other = own.argmax(1), other.argmax(1)
        own, other = own.max(1), other.max(1)
        kind[rows] = of_kind = np.select(
            [hit & truth.ignored[matched[rows]], hit,
             (own >= BACKGROUND) & ~is_match(own, truth.rule), is_match(other, truth.rule),
             is_match(own, truth.rule), other >= BACKGROUND],
            [IGNORED, CORRECT, LOCALISATION, CLASS, DUPLICATE, BOTH],
            NOTHING,
        )  # fmt: skip
        nothing, of_own = of_kind == NOTHING, np.isin(of_kind, (LOCALISATION, DUPLICATE))
        about = np.where(of_own, near_own, near_other)
        about = np.where(hit, matched[rows] - there[0], about)
        objects[rows] = np.where(nothing, -1, there[about])
        of_about = iou[np.arange(len(rows)), about]
        best[rows] = np.where(nothing, np.maximum(own, other), of_about)
    return Judged(truth, found, kind, objects, best)


def match(truth: Truth, found: Found,
          thresholds: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the object that each detection belongs to at IoU thresholds, int64 [T, N], -1: none.

    Also return whether it has found that object, bool [T, N]. Better detections of an image come
    first. By the rule "coco" a detection takes, of the objects of its class that are left, the one
    that it overlaps most, with an IoU of at least the threshold; an ignored object (a crowd) is
    taken last, and by any number of detections. By the rule "voc" a detection belongs to the object
    of its class that it overlaps most, with an IoU over the threshold, and has found it unless a
    better detection has; an ignored object (a difficult one) is found by any number.
    """
    if truth.rule == "voc":
        return _match_voc(truth, found, thresholds)
    matched = np.full((len(thresholds), len(found.images)), -1)
    for rows, there, iou, same in pairs(truth, found):
        for at, threshold in zip(matched, thresholds, strict=True):
            chosen = _assign(np.where(same, iou, 0), truth.ignored[there], threshold)
            at[rows] = np.where(chosen < 0, -1, there[chosen])
    return matched, matched >= 0


def _match_voc(truth: Truth, found: Found,
               thresholds: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    shape = len(thresholds), len(found.images)
    matched, hits = np.full(shape, -1), np.zeros(shape, bool)
    span = 1 + max(truth.labels.max(initial=0), found.labels.max(initial=0))
    keys = truth.images * span + truth.labels
    objects, best = (np.argsort(x, kind="stable") for x in (keys, -found.scores))
    wanted = (found.images * span + found.labels)[best]
    start, end = (np.searchsorted(keys[objects], wanted, side) for side in ("left", "right"))
    count = end - start
    # Every detection beside every object of its image and class: `det` and `obj` are the ends.
    det = np.repeat(np.arange(len(best)), count)
    obj = objects[np.arange(len(det)) + np.repeat(start - (count.cumsum() - count), count)]
    overlap = overlaps(found.boxes[best[det]], truth.boxes[obj])
    # For each detection the pair of the largest overlap; of equal ones that of the earlier object.
    largest = np.lexsort((-overlap, det))  # stable
    largest = largest[np.unique(det[largest], return_index=True)[1]]
    for t, threshold in enumerate(thresholds):
        over = largest[overlap[largest] > threshold]
        rows, owners = best[det[over]], obj[over]
        matched[t, rows], hits[t, rows] = owners, truth.ignored[owners]
        hits[t, rows[np.unique(owners, return_index=True)[1]]] = True
    return matched, hits


def count(truth: Truth, found: Found, thresholds: Sequence[float], num_classes: int,
          num_images: int) -> list[Counted]:
    """Return what the average precision of each class counts, see `match`.

    By the rule "coco" the `MOST` best detections of a class in an image count.
    """
    found = _scored(truth, found)
    return count_matched(truth, found, *match(truth, found, thresholds), num_classes, num_images)


def count_matched(truth: Truth, found: Found, matched: np.ndarray, hits: np.ndarray,
                  num_classes: int, num_images: int) -> list[Counted]:
    """Return what the average precision of each class counts, of what `match` returned."""
    counts = ~np.append(truth.ignored, False)[matched]  # -1, no object, is the last
    hits = hits & counts
    order = np.lexsort((-found.scores, found.labels))
    ends = np.searchsorted(found.labels[order], np.arange(1, num_classes + 2))
    counted = []
    for label in range(1, num_classes + 1):
        rows = order[ends[label - 1] : ends[label]]
        objects = truth.images[(truth.labels == label) & ~truth.ignored]
        counted.append(Counted(found.images[rows], hits[:, rows], counts[:, rows],
                               np.bincount(objects, minlength=num_images)))
    return counted


def _scored(truth: Truth, found: Found) -> Found:
    """Return the detections that the score takes, see `count`, in the order of `found`."""
    if truth.rule != "coco":
        return found
    order = np.lexsort((-found.scores, found.labels, found.images))
    groups = np.stack([found.images, found.labels])[:, order]
    new = np.append(True, (groups[:, 1:] != groups[:, :-1]).any(0))[: len(order)]
    ranks = np.arange(len(order)) - np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    kept = np.sort(order[ranks < MOST])
    return Found(*(column[kept] for column in found))


def pairs(truth: Truth,
          found: Found) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the detections and the objects of every image that has both.

    Each time: rows [n] of `found`, best score first; rows [m] of `truth`, consecutive; their IoU
    float64 [n, m], for a crowd as in `overlaps`; whether their classes are the same, bool [n, m].
    """
    images, starts, counts = np.unique(found.images, return_index=True, return_counts=True)
    low, high = (np.searchsorted(truth.images, images, side) for side in ("left", "right"))
    for start, count, first, last in zip(starts, counts, low, high, strict=True):
        if first == last:
            continue
        order = np.argsort(-found.scores[start : start + count], kind="stable")
        rows, there = start + order, np.arange(first, last)
        crowds = truth.ignored[there] & (truth.rule == "coco")
        iou = overlaps(found.boxes[rows, None], truth.boxes[there], crowds)
        yield rows, there, iou, found.labels[rows, None] == truth.labels[there]


def is_match(iou: np.ndarray, rule: str, threshold: float = FOREGROUND) -> np.ndarray:
    """Return whether an IoU is enough to find an object."""
    return iou > threshold if rule == "voc" else iou >= threshold


def _assign(iou: np.ndarray, ignored: np.ndarray, threshold: float) -> np.ndarray:
    """Return the column of each row of `iou` [n, m], best row first: int64 [n]; see `match`."""
    matched, taken, ignored = np.full(len(iou), -1), set(), ignored.tolist()
    rows, columns = np.nonzero(iou >= threshold)
    cells = zip(rows.tolist(), columns.tolist(), iou[rows, columns].tolist(), strict=True)
    for n, row in groupby(cells, itemgetter(0)):  # of equal overlaps the last, as in pycocotools
        if free := [(not ignored[k], value, k) for _, k, value in row if k not in taken]:
            matched[n] = k = max(free)[2]
            taken.update([k] if not ignored[k] else [])
    return matched
