"""How well prior boxes fit the boxes of a data set, and which prior boxes would fit better."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from data.config import PRIORS, PriorConfig
from layers import PriorBox
from tools.findings import MATCHED, Fit, Part, Record, Report

LOW_SHARE = 0.9  # a class fits if this share of its boxes reaches the IoU `MATCHED`
SAMPLE = 20_000  # most boxes that sizes of prior boxes are fitted to


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


def check_priors(report: Report) -> None:
    """Add the fit of every class, and a warning with advice on classes that fit badly.

    The boxes are those of the training part, or of the test part if only this could be opened.
    """
    if not report.parts:
        return
    name, part = next(iter(report.parts.items()))
    priors, boxes = report.options.priors, part.boxes / np.tile(part.sizes[part.images], 2)
    best = {key: best_overlaps(PRIORS[key], boxes) for key in PRIORS if key[1] in report.sizes}
    report.fits = [fit for key in best for fit in _fits(part, best[key], *key)]
    for size in report.sizes:
        low = [fit for fit in report.fits
               if (fit.priors, fit.size) == (priors, size) and fit.share < LOW_SHARE]
        low.sort(key=lambda fit: -fit.claimed)
        records = [_record(name, part, best[priors, size], fit) for fit in low]
        what = f"class that fits the prior boxes badly at {size} (IoU {MATCHED})"
        report.add("warning", name, what, records)
        if low:
            report.advice += _advice(low, part, boxes, best)


def _fits(part: Part, overlaps: np.ndarray, priors: str, size: int) -> Iterator[Fit]:
    for name in part.dataset.classes:
        own = overlaps[part.of_class(name)]
        if len(own):
            claimed = int((own < MATCHED).sum())
            yield Fit(name, size, priors, len(own), _share(own), float(own.mean()), claimed)


def _record(name: str, part: Part, overlaps: np.ndarray, fit: Fit) -> Record:
    worst = np.where(part.of_class(fit.name), overlaps, np.inf).argmin()
    text = (f"{fit.name}: {fit.share:.0%} of {fit.boxes} boxes reach it. Each other box only claims"
            f" the prior box that it overlaps most, the worst with an IoU of {overlaps[worst]:.2f}")
    return Record(text, ((name, int(part.images[worst])),), tuple(part.boxes[worst].tolist()))


def _advice(low: list[Fit], part: Part, boxes: np.ndarray,
            best: dict[tuple[str, int], np.ndarray]) -> Iterator[str]:
    """Yield a description of the boxes of the classes in `low`, then each change that helps."""
    priors, size = low[0].priors, low[0].size
    config, rows = PRIORS[priors, size], np.any([part.of_class(f.name) for f in low], axis=0)
    here = _share(best[priors, size][rows])
    sides = (boxes[rows, 2:] - boxes[rows, :2]) * size
    small, large = np.quantile(np.sqrt(sides.prod(1)), (0.1, 0.9))
    long = np.quantile(sides.max(1) / sides.min(1), 0.9)
    names = ", ".join(fit.name for fit in low[:5]) + (" ..." if len(low) > 5 else "")
    yield (
        f"At {size}, {here:.1%} of the {rows.sum()} boxes of {names} reach an IoU of {MATCHED} with"
        f" a prior box. Eight in ten are {small:.0f} to {large:.0f} px large (root of the area)."
        f" One in ten is over {long:.1f} times as long as wide. The smallest prior box has"
        f" {config.min_sizes[0]:g} px; prior boxes are at most"
        f" {max(map(max, config.aspect_ratios))} times as long as wide."
    )
    changes = {f"-s {s}": best[kind, s] for kind, s in best if kind == priors and s != size}
    presets = [PRIORS[kind, s] for kind, s in best if kind != priors and s == size]
    for preset in (*presets, _fitted(config, boxes, part.labels)):
        numbers = ", ".join(f"{side:g}" for side in preset.min_sizes)
        line = f"{priors}_{size} = _ssd{size}(({numbers}), {preset.max_sizes[-1]:g})"
        changes[f"{line} in data/config.py"] = best_overlaps(preset, boxes)
    for change, overlaps in sorted(changes.items(), key=lambda item: -_share(item[1][rows])):
        if _share(overlaps[rows]) > here + 0.01:
            yield f"  {change}: {_share(overlaps[rows]):.1%} ({_share(overlaps):.1%} of all boxes)"


def _share(overlaps: np.ndarray) -> float:
    return float((overlaps >= MATCHED).mean())


def _fitted(config: PriorConfig, boxes: np.ndarray, labels: np.ndarray) -> PriorConfig:
    """Return the preset with the sizes of prior boxes that fit best, by the mean share of classes.

    As in SSD, the first source map has its own size, and the other maps have evenly spaced sizes
    up to the preset's last size. The search tries quantiles of the boxes' sizes as first size, and
    its multiples as second size.
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
    overlaps = (best_overlaps(candidate, boxes) for candidate in candidates)
    shares = [np.mean([_share(best[own]) for own in classes]) for best in overlaps]
    return candidates[np.argmax(shares)]
