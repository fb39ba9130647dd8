"""Prior boxes of one's own: read from a file, or fitted to the boxes of a training set."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data import DetectionData
from data.config import PriorConfig
from engine.options import Options
from engine.rules import names_priors
from layers import PriorBox
from utils.errors import UserError
from utils.files import read_text

MATCHED = Options.jaccard_threshold
"""IoU from which a prior box is positive in training."""
FIT = "fit"
"""Value of --priors that fits them to the training boxes."""
SAMPLE = 20_000
"""Most boxes that sizes are fitted to."""


def read_priors(text: str, size: int) -> str:
    """Return a value of --priors as options keep it: a name, `FIT`, or sizes in pixels.

    Args:
        text: a name, `FIT`, sizes separated by commas, or a JSON file that `tools.check
            --fit_priors` writes, {"300": [sizes], "512": [sizes]}.
        size: the side of the network's input.

    Raises:
        UserError: no such file, or no sizes for the input in it.
    """
    if names_priors(text):
        return text
    path = Path(text).expanduser()
    if not path.is_file():
        raise UserError(f"--priors {text} is no file; give VOC, COCO, fit or a file of sizes")
    try:
        sizes = json.loads(read_text(path, "prior boxes"))[str(size)]
        return ",".join(f"{float(side):g}" for side in sizes)
    except Exception as error:
        raise UserError(f'{path} has no list "{size}" of sizes of prior boxes ({error!r:.80}); '
                        f"python -m tools.check --fit_priors FILE -s {size} writes one") from error


def fit_to(dataset: DetectionData, config: PriorConfig) -> str:
    """Return the sizes of prior boxes that fit a data set best, as `Options.priors` keeps them."""
    images = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
    boxes = dataset.rows[:, :4] / np.tile(dataset.sizes[images], 2)
    return fitted(config, boxes, dataset.rows[:, 4]).text


def fitted(config: PriorConfig, boxes: np.ndarray, labels: np.ndarray) -> PriorConfig:
    """Return the preset with the sizes of prior boxes that fit best, by the mean share of classes.

    As in SSD, the first source map has its own size, and the other maps have evenly spaced sizes
    up to the preset's last size. The search tries quantiles of the boxes' sizes as first size, and
    its multiples as second size.

    Args:
        boxes: [n, 4], (x1, y1, x2, y2) relative to the image; n may be 0: the preset itself.
        labels: [n].
    """
    if not len(boxes):
        return config
    if len(boxes) > SAMPLE:
        chosen = np.random.default_rng(0).choice(len(boxes), SAMPLE, replace=False)
        boxes, labels = boxes[chosen], labels[chosen]
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1)) * config.size
    last = config.min_sizes[-1]
    candidates = [config]
    for first in np.quantile(sides, (0.02, 0.05, 0.1, 0.2, 0.3)).clip(4, last / 4):
        for step in (1.5, 2, 2.5, 3):
            rest = np.linspace(first * step, last, len(config.min_sizes) - 1)
            sizes = [float(round(side)) for side in (first, *rest)]
            candidates.append(config.with_sizes([*sizes, config.max_sizes[-1]]))
    classes = [labels == label for label in np.unique(labels)]
    overlaps = (best_overlaps(candidate, boxes) for candidate in candidates)
    shares = [np.mean([share(best[own]) for own in classes]) for best in overlaps]
    return candidates[np.argmax(shares)]


def share(overlaps: Sequence[float] | np.ndarray) -> float:
    """Return the share of overlaps that reach `MATCHED`."""
    return float((np.asarray(overlaps) >= MATCHED).mean())


def best_overlaps(config: PriorConfig, boxes: np.ndarray) -> np.ndarray:
    """Return the IoU of every box with the prior box that it overlaps most, float64 [n].

    boxes: [n, 4], (x1, y1, x2, y2) relative to the image; n may be 0. Among prior boxes of one
    shape, a box overlaps most the one with the nearest centre. So each box is compared with one
    prior box of every shape, a few dozen instead of thousands.
    """
    priors = PriorBox(config)().double().numpy()
    low, high = boxes[:, :2].astype(np.float64), boxes[:, 2:].astype(np.float64)
    area = (high - low).prod(1)
    best, start = np.zeros(len(boxes)), 0
    for side, shapes in zip(config.feature_maps, config.boxes_per_cell, strict=True):
        end = start + side * side * shapes
        cells, start = priors[start:end].reshape(side, side, shapes, 4), end
        axis = cells[0, :, 0, 0]  # of rows as of columns
        centre = axis[np.searchsorted((axis[1:] + axis[:-1]) / 2, (low + high) / 2)]
        for shape in cells[0, 0, :, 2:]:
            shared = np.minimum(high, centre + shape / 2) - np.maximum(low, centre - shape / 2)
            shared = shared.clip(0).prod(1)
            np.maximum(best, shared / (area + shape.prod() - shared), out=best)
    return best
