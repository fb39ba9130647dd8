"""Intervals of average precision: the images of a test set are drawn again and again.

The bootstrap over images (Efron 1979) answers how far a score would move on another test set of as
many images of the same kind. Detections are matched once; a draw only counts them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 1000
CONFIDENCE = 0.95


class Counted(NamedTuple):
    """The detections of one class that count, and its objects.

    images: int64 [n], the image of each detection, by falling score.
    hits: bool [n], whether it is correct.
    objects: int64 [images], objects of each image.
    """

    images: np.ndarray
    hits: np.ndarray
    objects: np.ndarray


def draw(images: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Return how often each draw has each image: float32 [draws, images], rows of equal sums."""
    chosen = np.random.default_rng(seed).integers(0, images, (draws, images))
    flat = (chosen + np.arange(draws)[:, None] * images).ravel()
    return np.bincount(flat, minlength=draws * images).reshape(draws, images).astype(np.float32)


def precisions(counted: Counted, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the average precision of each draw by the metrics of `data.voc_eval.METRICS`.

    weights: [draws, images], as `draw` returns them.

    Returns:
        float64 [draws] by the 11-point metric, and by the area metric; NaN for a draw that has no
        object.
    """
    images, hits, objects = counted
    found, total = images[hits], weights @ objects.astype(np.float32)
    # Precision falls between hits, so only the misses before each hit are counted.
    before = np.cumsum(hits)[~hits]
    misses = np.bincount(images[~hits] * (len(found) + 1) + before,
                         minlength=len(objects) * (len(found) + 1))
    misses = misses.reshape(len(objects), -1)[:, :-1].astype(np.float32)
    wrong = np.cumsum(weights @ misses, 1, np.float64)
    right = np.cumsum(weights[:, found], 1, np.float64)
    recall = right / np.where(total, total, np.nan)[:, None].astype(np.float64)
    precision = right / np.maximum(right + wrong, 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    area = (np.diff(recall, prepend=0) * envelope).sum(1)
    ends = np.hstack([envelope, np.zeros((len(weights), 1))])
    rows = np.arange(len(weights))
    # arange, not linspace, as in data.voc_eval.average_precision.
    points = [ends[rows, (recall < t).sum(1)] for t in np.arange(0, 1.1, 0.1)]
    missing = total == 0
    return tuple(np.where(missing, np.nan, each) for each in (np.mean(points, 0), area))


def mean(of_classes: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Return the mean over classes of each draw, of those that it has; None, no objects: 0."""
    found = [each for each in of_classes if each is not None]
    if not found or np.isnan(found).all(0).any():
        return None
    known = (~np.isnan(found)).sum(0) + len(of_classes) - len(found)
    return np.nansum(found, 0) / known


def interval(values: np.ndarray | None, confidence: float = CONFIDENCE) -> list[float] | None:
    """Return the percentile interval of draws, [low, high]; None if a draw has no value."""
    if values is None or np.isnan(values).any():
        return None
    tail = 100 * (1 - confidence) / 2
    return np.percentile(values, [tail, 100 - tail]).tolist()


def text(bounds: Sequence[float] | None) -> str:
    """Return an interval for people, "" for none."""
    return "" if bounds is None else f"{bounds[0]:.4f} to {bounds[1]:.4f}"
