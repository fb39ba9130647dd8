"""How well prior boxes fit the boxes of a data set, and which ones would fit better."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from data.config import PRIORS, PriorConfig
from layers import PriorBox
from tools.findings import MATCHED, Fit, Part, Record, Report

LOW_SHARE = 0.9
"""A class fits if this share of its boxes reaches the IoU `MATCHED` with some prior box."""
SAMPLE = 20_000
"""Most boxes that sizes of prior boxes are fitted to."""


def best_overlaps(config: PriorConfig, boxes: np.ndarray) -> np.ndarray:
    """Return the IoU of every box with the prior box that it overlaps most, float64 [n].

    Of the prior boxes of one shape, this is one whose centre is nearest along both axes. So a few
    dozen prior boxes are compared instead of thousands.

    Args:
        boxes: [n, 4], (x1, y1, x2, y2) relative to the image; n may be 0.
    """
    priors = PriorBox(config)().double().numpy()
    low, high = boxes[:, :2].astype(np.float64), boxes[:, 2:].astype(np.float64)
    area = (high - low).prod(1)
    best, start = np.zeros(len(boxes)), 0
    for side, shapes in zip(config.feature_maps, config.boxes_per_cell, strict=True):
        cells = priors[start : start + side * side * shapes].reshape(side, side, shapes, 4)
        start += side * side * shapes
        axis = cells[0, :, 0, 0]  # of rows as of columns
        centre = axis[np.searchsorted((axis[1:] + axis[:-1]) / 2, (low + high) / 2)]
        for shape in cells[0, 0, :, 2:]:
            shared = np.minimum(high, centre + shape / 2) - np.maximum(low, centre - shape / 2)
            shared = shared.clip(0).prod(1)
            np.maximum(best, shared / (area + shape.prod() - shared), out=best)
    return best


def check_priors(report: Report) -> None:
    """Add the fit of every class, and a warning with advice on classes that fit badly.

    The boxes are those of the training part, or of the test part if that alone could be opened.
    """
    if not report.parts:
        return
    name, part = next(iter(report.parts.items()))
    priors, sizes = report.options.priors, report.sizes
    boxes = part.boxes / np.tile(part.sizes[part.images], 2)
    best = {
        (kind, size): best_overlaps(PRIORS[kind, size], boxes)
        for size in sizes
        for kind in dict.fromkeys(kind for kind, _ in PRIORS)
    }
    report.fits = [fit for key in best for fit in _fits(part, best[key], *key)]
    for size in sizes:
        own = [fit for fit in report.fits if (fit.priors, fit.size) == (priors, size)]
        low = sorted((fit for fit in own if fit.share < LOW_SHARE), key=lambda fit: -fit.claimed)
        records = [_record(name, part, best[priors, size], fit) for fit in low]
        what = f"class that fits the prior boxes badly at {size} (IoU {MATCHED})"
        report.add("warning", name, what, records)
        if low:
            report.advice += _advice(low, part, boxes, best)


def _of_class(part: Part, name: str) -> np.ndarray:
    """Return which boxes are of the class, bool [M]."""
    return part.labels == part.dataset.classes.index(name) + 1


def _fits(part: Part, overlaps: np.ndarray, priors: str, size: int) -> Iterator[Fit]:
    for name in part.dataset.classes:
        own = overlaps[_of_class(part, name)]
        if len(own):
            claimed = int((own < MATCHED).sum())
            yield Fit(name, size, priors, len(own), _share(own), float(own.mean()), claimed)


def _record(name: str, part: Part, overlaps: np.ndarray, fit: Fit) -> Record:
    """Return the record of a class that fits badly, with its worst box."""
    worst = np.where(_of_class(part, fit.name), overlaps, np.inf).argmin()
    text = (
        f"{fit.name}: {fit.share:.0%} of {fit.boxes} boxes reach it, the others only claim the"
        f" prior box nearest to them, the worst at an IoU of {overlaps[worst]:.2f}"
    )
    return Record(text, ((name, int(part.images[worst])),), tuple(part.boxes[worst].tolist()))


def _advice(
    low: list[Fit], part: Part, boxes: np.ndarray, best: dict[tuple[str, int], np.ndarray]
) -> Iterator[str]:
    """Yield what the boxes of the classes in `low` are like, then each change that helps them."""
    priors, size = low[0].priors, low[0].size
    config, rows = PRIORS[priors, size], np.any([_of_class(part, f.name) for f in low], axis=0)
    here = _share(best[priors, size][rows])
    sides = (boxes[rows, 2:] - boxes[rows, :2]) * size
    small, large = np.quantile(np.sqrt(sides.prod(1)), (0.1, 0.9))
    long = np.quantile(sides.max(1) / sides.min(1), 0.9)
    names = ", ".join(fit.name for fit in low[:5]) + (" ..." if len(low) > 5 else "")
    yield (
        f"At {size}, {here:.1%} of the {rows.sum()} boxes of {names} reach an IoU of {MATCHED} with"
        f" a prior box. Eight in ten are {small:.0f} to {large:.0f} px large (root of the area);"
        f" one in ten is over {long:.1f} times as long as wide. Prior boxes begin at"
        f" {config.min_sizes[0]:g} px and are up to {max(map(max, config.aspect_ratios))} times as"
        " long as wide."
    )
    changes = {f"-s {s}": best[kind, s] for kind, s in best if kind == priors and s != size}
    others = {PRIORS[kind, s]: best[kind, s] for kind, s in best if kind != priors and s == size}
    fitted = _fitted(config, boxes, part.labels)
    for other, overlaps in {**others, fitted: best_overlaps(fitted, boxes)}.items():
        numbers = ", ".join(f"{side:g}" for side in other.min_sizes)
        line = f"{priors}_{size} = _ssd{size}(({numbers}), {other.max_sizes[-1]:g})"
        changes[f"{line} in data/config.py"] = overlaps
    for change, overlaps in sorted(changes.items(), key=lambda item: -_share(item[1][rows])):
        if _share(overlaps[rows]) > here + 0.01:
            yield f"  {change}: {_share(overlaps[rows]):.1%} ({_share(overlaps):.1%} of all boxes)"


def _share(overlaps: np.ndarray) -> float:
    return float((overlaps >= MATCHED).mean())


def _fitted(config: PriorConfig, boxes: np.ndarray, labels: np.ndarray) -> PriorConfig:
    """Return the preset with the sizes that fit these boxes best, by the mean share of classes.

    As in SSD, the first source map has its own size and the others have evenly spaced sizes up to
    the preset's last one. The search tries first sizes among those of the boxes, and steps to the
    second size.
    """
    if len(boxes) > SAMPLE:
        chosen = np.random.default_rng(0).choice(len(boxes), SAMPLE, replace=False)
        boxes, labels = boxes[chosen], labels[chosen]
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1)) * config.size
    last = config.min_sizes[-1]
    candidates = [config]
    for first in np.quantile(sides, (0.02, 0.05, 0.1, 0.2, 0.3)).clip(4, last / 4):
        for step in (1.5, 2, 2.5, 3):
            rest = np.linspace(first * step, last, len(config.min_sizes) - 1)
            sizes = tuple(float(round(side)) for side in (first, *rest))
            max_sizes = (*sizes[1:], config.max_sizes[-1])
            candidates.append(replace(config, min_sizes=sizes, max_sizes=max_sizes))
    classes = [labels == label for label in np.unique(labels)]
    shares = []
    for candidate in candidates:
        overlaps = best_overlaps(candidate, boxes)
        shares.append(np.mean([_share(overlaps[own]) for own in classes]))
    return candidates[np.argmax(shares)]
