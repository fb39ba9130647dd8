"""Prior boxes of one's own: read from a file, or fitted to the boxes of a training set."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from operator import itemgetter
from pathlib import Path

import numpy as np

from data import DetectionData
from data.config import PriorConfig
from engine.options import Options
from engine.rules import names_priors, priors
from layers import PriorBox
from utils.errors import UserError
from utils.files import read_text

MATCHED = Options.jaccard_threshold
"""IoU from which a prior box is positive in training."""
FIT = "fit"
"""Value of --priors that fits them to the training boxes."""
SAMPLE = 4000
"""Most boxes that sizes are fitted to."""
ENOUGH = 12
"""Positive prior boxes of an object beyond which a fit counts no more. With the published prior
boxes, an object of ordinary size has about so many."""
FREE = 2
"""Source maps whose second square box is fitted. They have most of the prior boxes."""
NEARLY = 0.01
"""Sizes whose share of objects is this near to the highest count as equal to it."""


def read_priors(text: str, size: int) -> str:
    """Return a value of --priors as options keep it: a name, `FIT`, or sizes in pixels.

    Args:
        text: a name, `FIT`, sizes separated by commas, or a JSON file that `tools.check
            --fit_priors` writes, {"300": "SIZES", "512": "SIZES"}; lists of sizes are as good.
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
        if not isinstance(sizes, str):
            sizes = ",".join(f"{float(side):g}" for side in sizes)
        return priors(sizes)
    except Exception as error:
        raise UserError(f'{path} has no "{size}": sizes of prior boxes ({error!r:.80}); '
                        f"python -m tools.check --fit_priors FILE -s {size} writes one") from error


def fit_to(dataset: DetectionData, config: PriorConfig) -> str:
    """Return the sizes of prior boxes that fit a data set best, as `Options.priors` keeps them."""
    images = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
    boxes = dataset.rows[:, :4] / np.tile(dataset.sizes[images], 2)
    return fitted(config, boxes, dataset.rows[:, 4]).text


def fitted(config: PriorConfig, boxes: np.ndarray, labels: np.ndarray) -> PriorConfig:
    """Return the preset with the sizes of prior boxes that fit best.

    They let (nearly) the highest share of objects reach `MATCHED`, and among those give an object
    the most positive prior boxes, at most `ENOUGH`. Both are means over each class, then over the
    classes. The share alone is no measure: it may take most of its positive prior boxes from a
    class that reaches `MATCHED` in any case.

    As in SSD, the first source map has its own size, and the other maps have evenly spaced sizes
    up to the preset's last size. Unlike SSD, the second square box of the first `FREE` maps may
    have any size between the map's own and the next map's. Small objects need the small cells of
    the first map, and so do larger ones that stand close together.

    Args:
        boxes: [n, 4], (x1, y1, x2, y2) relative to the image; n may be 0: the preset itself.
        labels: [n].
    """
    if not len(boxes):
        return config
    if len(boxes) > SAMPLE:
        chosen = np.random.default_rng(0).choice(len(boxes), SAMPLE, replace=False)
        boxes, labels = boxes[chosen], labels[chosen]
    classes = [labels == label for label in np.unique(labels)]

    @cache
    def of_map(k: int, smallest: float, largest: float) -> tuple[np.ndarray, np.ndarray]:
        one = config.source_map(k, smallest, largest)
        return best_overlaps(one, boxes), positives(one, boxes)

    def judge(candidate: PriorConfig) -> tuple[float, float]:
        sizes = zip(candidate.min_sizes, candidate.max_sizes, strict=True)
        best, count = zip(*(of_map(k, *pair) for k, pair in enumerate(sizes)), strict=True)
        best, count = np.max(best, 0), np.sum(count, 0).clip(max=ENOUGH)
        return (float(np.mean([share(best[own]) for own in classes])),
                float(np.mean([count[own].mean() for own in classes])))

    sides = np.geomspace(config.min_sizes[-1], config.min_sizes[-1] / 64, 37).round()
    judged = {candidate: judge(candidate) for candidate in (config, *_candidates(config, sides))}
    least = max(reached for reached, _ in judged.values()) - NEARLY
    fits = [(count, own) for own, (reached, count) in judged.items() if reached >= least]
    for i, (most, best) in enumerate(fits):
        for k in range(FREE):
            smaller, larger = best.min_sizes[k:k + 2]
            for side in sides[(sides > smaller) & (sides < larger)].tolist():
                other = best.with_second(k, side)
                reached, count = judge(other)
                if reached >= least and count > most:
                    most, best = count, other
        fits[i] = most, best
    return max(fits, key=itemgetter(0))[1]


def _candidates(config: PriorConfig, sides: np.ndarray) -> Iterator[PriorConfig]:
    """Yield a preset for each first size, at most a quarter of the last, and second size."""
    last, count = config.min_sizes[-1], len(config.min_sizes)
    for first in sides[sides <= last / 4]:
        for step in (1.5, 2, 2.5, 3, 3.5):
            rest = np.linspace(first * step, last, count - 1).round()
            sizes = (float(first), *rest.tolist(), config.max_sizes[-1])
            yield replace(config, min_sizes=sizes[:-1], max_sizes=sizes[1:])


def positives(config: PriorConfig, boxes: np.ndarray) -> np.ndarray:
    """Return how many prior boxes reach an IoU of `MATCHED` with a box of each size, float64 [n].

    The number is the mean over all positions of a box far from the border. Centres of a prior box
    that reach the IoU fill an area around the box's centre. The number is this area, in cells.

    boxes: [n, 4], (x1, y1, x2, y2) relative to the image; n may be 0.
    """
    sides = ((boxes[:, 2:] - boxes[:, :2]) * config.size).astype(np.float64)
    total = np.zeros(len(boxes))
    for cells, step in zip(_source_maps(config), config.steps, strict=True):
        for shape in cells[0, 0, :, 2:] * config.size:
            total += 4 * _quarter(*sides.T, *shape) / step**2
    return total


def _quarter(w: np.ndarray, h: np.ndarray, p: float, q: float) -> np.ndarray:
    """Return the area of shifts (x, y >= 0) at which boxes w x h and p x q reach `MATCHED`.

    At the shift (x, y) they share (min(w, p, (w + p) / 2 - x)) times the same of y, h and q. This
    must be `least`; so y is at most (h + q) / 2 - least / (shared width), and x is integrated.
    """
    least = MATCHED / (1 + MATCHED) * (w * h + p * q)
    wide, tall = np.minimum(w, p), np.minimum(h, q)
    reach = wide * tall >= least
    w, h, least, wide, tall = w[reach], h[reach], least[reach], wide[reach], tall[reach]
    flat, narrow = np.abs(w - p) / 2, least / tall  # x of a full shared width; its least width
    area = np.zeros(len(reach))
    area[reach] = (flat * ((h + q) / 2 - least / wide) + (h + q) / 2 * (wide - narrow)
                   - least * np.log(wide / narrow))
    return area


def share(overlaps: Sequence[float] | np.ndarray) -> float:
    """Return the share of overlaps that reach `MATCHED`."""
    return float((np.asarray(overlaps) >= MATCHED).mean())


def best_overlaps(config: PriorConfig, boxes: np.ndarray) -> np.ndarray:
    """Return the IoU of every box with the prior box that it overlaps most, float64 [n].

    boxes: [n, 4], (x1, y1, x2, y2) relative to the image; n may be 0. Among prior boxes of one
    shape, a box overlaps most the one with the nearest centre. So each box is compared with one
    prior box of every shape, a few dozen instead of thousands.
    """
    low, high = boxes[:, :2].astype(np.float64), boxes[:, 2:].astype(np.float64)
    area = (high - low).prod(1)
    best = np.zeros(len(boxes))
    for cells in _source_maps(config):
        axis = cells[0, :, 0, 0]  # of rows as of columns
        centre = axis[np.searchsorted((axis[1:] + axis[:-1]) / 2, (low + high) / 2)]
        for shape in cells[0, 0, :, 2:]:
            shared = np.minimum(high, centre + shape / 2) - np.maximum(low, centre - shape / 2)
            shared = shared.clip(0).prod(1)
            np.maximum(best, shared / (area + shape.prod() - shared), out=best)
    return best


def _source_maps(config: PriorConfig) -> Iterator[np.ndarray]:
    """Yield the prior boxes of each source map, float64 [side, side, boxes per cell, 4]."""
    parts = PriorBox(config)().double().split(config.priors_per_map)
    for part, side in zip(parts, config.feature_maps, strict=True):
        yield part.numpy().reshape(side, side, -1, 4)
