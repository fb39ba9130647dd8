"""The objects of a data set as arrays, and the digest that tells whether data are the same."""

import hashlib
from typing import NamedTuple

import numpy as np


class Truth(NamedTuple):
    """All ground-truth objects that a score counts, M may be 0, image by image.

    images: int64 [M], ascending indices in the data set.
    boxes: float64 [M, 4], (x1, y1, x2, y2) in pixels with x2 and y2 behind the last pixel, so that
        their plain IoU is that of the data set's score. Boxes are as annotated, not clipped.
    labels: int64 [M], from 1.
    ignored: bool [M], VOC's difficult objects and COCO's crowds: a detection of one is neither
        right nor wrong.
    rule: how detections are assigned to objects, "voc" or "coco".
    """

    images: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    rule: str


def digest(*values: object) -> str:
    """Return the sha256 of arrays (with their types and shapes) and of values with a repr."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, np.ndarray):
            found.update(f"{value.dtype} {value.shape}".encode())
            found.update(np.ascontiguousarray(value))
        else:
            found.update(repr(value).encode())
    return found.hexdigest()
