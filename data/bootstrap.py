"""Intervals of average precision: the images of a test set are drawn again and again.

The bootstrap over images (Efron 1979) answers how far a score would move on another test set of as
many images of the same kind. Detections are matched once; a draw only counts them again. An image
that is drawn several times counts as often as that, its copies one detection after the other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 1000
CONFIDENCE = 0.95
FEWEST = 6
"""Images that an interval needs. Even if all favour one test, fewer are no evidence (2 / 2**5)."""
RARE = 0.01
"""Share of draws that may lack a class. Five images of a class, of many images, are in 99.3 %."""
RECALLS = {"voc07_11point": np.arange(0, 1.1, 0.1), "area": None, "coco": np.linspace(0, 1, 101)}
"""Recalls whose precisions a metric averages; None: the area.

arange's 0.30000000000000004 decides ties with 3 / 10 as published; linspace does not.
"""
AT_ONCE = 1 << 21
"""Numbers that a step of `precisions` holds."""


class Counted(NamedTuple):
    """The n detections of one class at T IoU thresholds, and its objects.

    images: int64 [n], the image of each detection, by falling score.
    hits: bool [T, n], whether it is correct.
    counts: bool [T, n], whether it is correct or wrong, not ignored.
    objects: int64 [images], objects of each image.
    """

    images: np.ndarray
    hits: np.ndarray
    counts: np.ndarray
    objects: np.ndarray


def draw(images: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Return how often each draw has each image: float32 [draws, images].

    Rows have equal sums: the number of images, or 0 if they are fewer than `FEWEST`.
    """
    rng, weights = np.random.default_rng(seed), np.zeros((draws, images), np.float32)
    if images < FEWEST:
        return weights
    for row in weights:
        row[:] = np.bincount(rng.integers(0, images, images), minlength=images)
    return weights


def precisions(counted: Counted, weights: np.ndarray, metrics: Sequence[str]) -> np.ndarray:
    """Return the average precision of each draw by metrics, keys of `RECALLS`.

    weights: [draws, images], as `draw` returns them.

    Returns:
        float64 [metrics, T, draws]; NaN for a draw that has no object.
    """
    images, hits, counts, objects = counted
    total = weights @ objects.astype(np.float32)
    found = np.flatnonzero(hits.any(0))
    aps = np.zeros((len(metrics), len(hits), len(weights)))
    if not len(found):
        return np.where(total, aps, np.nan)
    step = max(1, AT_ONCE // (found[-1] + 1))
    for start in range(0, len(weights), step):
        part = slice(start, start + step)
        some, wanted = weights[part], np.maximum(total[part, None], 1).astype(np.float64)
        # Precision falls between hits, so the detections between two are counted together.
        between = some[:, images[: found[-1] + 1]]
        seen = np.add.reduceat(between, np.append(0, found[:-1] + 1), 1).cumsum(1)
        for t in np.flatnonzero(hits.any(1)):
            (right,), (gone,) = hits[t].nonzero(), (~counts[t]).nonzero()
            ignored = np.pad(some[:, images[gone]].cumsum(1), ((0, 0), (1, 0)))
            ignored = ignored[:, np.searchsorted(gone, right)]
            counting = seen[:, np.searchsorted(found, right)] - ignored
            correct = some[:, images[right]].cumsum(1, np.float64)
            precision = correct / np.maximum(counting, 1)
            envelope = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
            for of_metric, metric in zip(aps, metrics, strict=True):
                reached, recalls = correct / wanted, RECALLS[metric]
                if recalls is not None:
                    reached = np.searchsorted(recalls, reached, "right") / len(recalls)
                # Of each rise of recall, the best precision from there on.
                of_metric[t, part] = np.einsum("dn,dn->d", reached, envelope)
                of_metric[t, part] -= np.einsum("dn,dn->d", reached[:, :-1], envelope[:, 1:])
    return np.where(total, aps.clip(0, 1), np.nan)  # rounding can pass 1


def mean(of_classes: Sequence[np.ndarray]) -> np.ndarray | None:
    """Return the mean over classes of each draw, of those that it has; NaN if it has none.

    So every draw has the score of its images, as COCO's code computes it. Return None without a
    class.
    """
    if not of_classes:
        return None
    known = (~np.isnan(of_classes)).sum(0)
    return np.where(known, np.nansum(of_classes, 0) / np.maximum(known, 1), np.nan)


def interval(values: np.ndarray | None) -> list[float] | None:
    """Return the percentile interval of draws, [low, high]; None if over `RARE` have no value."""
    if values is None or np.isnan(values).mean() > RARE:
        return None
    tail = 100 * (1 - CONFIDENCE) / 2
    return np.nanpercentile(values, [tail, 100 - tail]).tolist()


def text(bounds: Sequence[float] | None) -> str:
    """Return an interval for people, "" for none."""
    return "" if bounds is None else f"{bounds[0]:.4f} to {bounds[1]:.4f}"
