"""Precision-recall curves of an evaluation, kept in one file for plots: `curves.npz`.

Every file has `classes` str [K], `areas` str [A] ("all", "small", "medium" and "large") and `ious`
float64 [T], and these arrays, float64 except `counts`:
COCO, as pycocotools accumulates them, at 100 detections an image:
    `recall` [R]; `precision` and `scores` [T, R, K, A], -1 without ground truth
VOC, a point for each correct detection, best score first:
    `counts` int64 [T, K, A]; `recall`, `precision` and `scores` [counts.sum()], curve after curve
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import atomic_write, load_arrays

CURVES_FILE = "curves.npz"  # beside results.json
# COCO's limits, in square pixels. An object on a limit is in both ranges.
SIZE_RANGES = {
    "all": (-math.inf, math.inf), "small": (0, 32**2), "medium": (32**2, 96**2),
    "large": (96**2, 1e5**2),
}
SIZES = tuple(SIZE_RANGES)[1:]


@dataclass(frozen=True)
class Curves:
    """Curves by class, size and IoU threshold. The module's description says what `arrays` hold."""

    classes: tuple[str, ...]
    areas: tuple[str, ...]
    ious: np.ndarray
    arrays: dict[str, np.ndarray]

    def curve(self, name: str, area: str = "all", iou: float = 0.5) -> dict[str, np.ndarray]:
        """Return {"recall", "precision", "scores"}, float64 [n] each, by ascending recall.

        VOC's curve has a point for each correct detection, with its precision. COCO's has one for
        each recall threshold, none without ground truth. Its precision is the best at that recall
        or a higher one; precision and score are 0 where that recall is not reached.

        Raises:
            ValueError: an unknown class, area or threshold.
        """
        near = np.flatnonzero(np.isclose(self.ious, iou, rtol=0, atol=1e-9))
        if name not in self.classes or area not in self.areas or not len(near):
            raise ValueError(f"no curve of {name!r}, {area!r}, IoU {iou}; choose from "
                             f"{', '.join(self.classes)}, {', '.join(self.areas)}, IoU "
                             f"{', '.join(f'{t:g}' for t in self.ious)}")
        t, k, a = near[0], self.classes.index(name), self.areas.index(area)
        keys = ("recall", "precision", "scores")
        if "counts" in self.arrays:
            ends = self.arrays["counts"].ravel().cumsum()
            n = np.ravel_multi_index((t, k, a), self.arrays["counts"].shape)
            start = ends[n] - self.arrays["counts"][t, k, a]
            return {key: self.arrays[key][start : ends[n]] for key in keys}
        known = self.arrays["precision"][t, :, k, a] > -1
        found = (self.arrays[key] for key in keys)
        return {key: (array if array.ndim == 1 else array[t, :, k, a])[known]
                for key, array in zip(keys, found, strict=True)}


def write_curves(path: str | Path, classes: Sequence[str], ious: Sequence[float],
                 **arrays: np.ndarray) -> None:
    """Write the arrays of `Curves`; they must cover all of `SIZE_RANGES`."""
    with atomic_write(path) as file:
        np.savez_compressed(file, classes=np.array(classes, str), areas=np.array([*SIZE_RANGES]),
                            ious=np.array(ious, np.float64), **arrays)


def load_curves(path: str | Path) -> Curves:
    """Read what `write_curves` wrote. Raises UserError if the file is missing or another one."""
    try:
        arrays = load_arrays(path, classes=("U", 1), areas=("U", 1), ious=("f", 1), recall=("f", 1))
        classes, areas = (tuple(arrays.pop(key).tolist()) for key in ("classes", "areas"))
        curves = Curves(classes, areas, arrays.pop("ious"), arrays)
        shape = (len(curves.ious), len(classes), len(areas))
        counts, recall = arrays.get("counts"), arrays["recall"]
        points = (shape[0], len(recall), *shape[1:])
        fits = areas == tuple(SIZE_RANGES)
        if counts is not None:
            points = (len(recall),)
            fits &= counts.shape == shape and counts.dtype.kind in "iu" and counts.min() >= 0
            fits &= counts.sum() == len(recall)
        drawn = [arrays[key] for key in ("precision", "scores")]
        fits &= all(each.shape == points and each.dtype.kind == "f" for each in drawn)
        fits &= all(np.isfinite(each).all() for each in (curves.ious, recall, *drawn))
        if not fits:
            raise ValueError("its arrays do not fit together, or are not finite")
    except OSError as error:
        raise UserError(f"{path}: cannot read the curves ({error})") from error
    except Exception as error:  # of any values
        raise UserError(f"{path}: not a file of curves ({error!r:.200}); test again") from error
    return curves
