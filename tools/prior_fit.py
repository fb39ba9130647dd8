"""How well prior boxes fit the boxes of a data set, and which prior boxes would fit better."""

from collections.abc import Iterator

import numpy as np

from data.config import PRIORS
from engine.priors import MATCHED, best_overlaps, fit_to, fitted, share
from tools.findings import Fit, Part, Record, Report

LOW_SHARE = 0.9  # a class fits if this share of its boxes reaches the IoU `MATCHED`


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


def fitted_sizes(report: Report) -> dict[str, str]:
    """Return sizes of prior boxes that fit the training part, by input size, for --priors FILE."""
    dataset, priors = report.parts["train"].dataset, report.options.priors
    return {str(size): fit_to(dataset, PRIORS[priors, size]) for size in report.sizes}


def _fits(part: Part, overlaps: np.ndarray, priors: str, size: int) -> Iterator[Fit]:
    for name in part.dataset.classes:
        own = overlaps[part.of_class(name)]
        if len(own):
            claimed = int((own < MATCHED).sum())
            yield Fit(name, size, priors, len(own), share(own), float(own.mean()), claimed)


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
    here = share(best[priors, size][rows])
    sides = (boxes[rows, 2:] - boxes[rows, :2]) * size
    small, large = np.quantile(np.sqrt(sides.prod(1)), (0.1, 0.9))
    long = np.quantile(sides.max(1) / sides.min(1), 0.9)
    names = ", ".join(fit.name for fit in low[:5]) + (" ..." if len(low) > 5 else "")
    yield (f"At {size}, {here:.1%} of the {rows.sum()} boxes of {names} reach an IoU of {MATCHED}"
           f" with a prior box. Eight in ten are {small:.0f} to {large:.0f} px large (root of the"
           f" area). One in ten is over {long:.1f} times as long as wide. The smallest prior box"
           f" has {config.min_sizes[0]:g} px; prior boxes are at most"
           f" {max(map(max, config.aspect_ratios))} times as long as wide.")
    changes = {f"-s {s}": best[kind, s] for kind, s in best if kind == priors and s != size}
    others = [kind for kind, s in best if kind != priors and s == size]
    changes |= {f"--priors {kind}": best[kind, size] for kind in others}
    own = fitted(config, boxes, part.labels)
    changes[f"--priors fit ({own.text})"] = best_overlaps(own, boxes)
    for change, overlaps in sorted(changes.items(), key=lambda item: -share(item[1][rows])):
        if share(overlaps[rows]) > here + 0.01:
            yield f"  {change}: {share(overlaps[rows]):.1%} ({share(overlaps):.1%} of all boxes)"
