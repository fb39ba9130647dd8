"""PASCAL VOC's detection score: average precision, both published metrics.

python -m data.voc_eval DETECTIONS_DIR --root DIR --set test [--year 2007]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data import bootstrap
from data.annotation import Annotation, join
from data.classes import parse_classes
from data.curves import SIZE_RANGES, SIZES, write_curves
from data.detections import undetected
from data.image_sets import ImageSet, parse_image_sets
from data.judge import Found, count_matched, match
from data.skips import report_lines
from data.split import SPLIT_SETS, VAL_SHARE
from data.truth import Truth
from data.voc_comp4 import comp4_set, read_comp4
from data.voc_layout import list_image_sets
from data.voc_read import load_annotations
from utils.arguments import Parser, number
from utils.errors import UserError, command
from utils.files import check_writable, write_json

METRICS = {"voc07_11point": "VOC07 11-point AP@.5", "area": "VOC area AP@.5"}


def average_precision(recall: np.ndarray, precision: np.ndarray, metric: str) -> float:
    """Return the average precision of a curve, 0 if it is empty.

    Args:
        recall: [n], ascending.
        precision: [n].
        metric: "voc07_11point" (VOC until 2009) and "coco", the mean over 11 and 101 recalls from 0
            to 1 of the best precision at that recall or a higher one; "area" (VOC from 2010), the
            area under that envelope.
    """
    recalls, envelope = bootstrap.RECALLS[metric], np.maximum.accumulate(precision[::-1])[::-1]
    if recalls is None:
        return float((np.diff(recall, prepend=0) * envelope).sum())
    return float(np.append(envelope, 0)[np.searchsorted(recall, recalls)].mean())


def voc_truth(annotations: Sequence[Annotation], classes: Sequence[str]) -> Truth:
    """Return the objects of ``classes``; images are positions in ``annotations``."""
    images, boxes, labels, ignored = join(annotations, classes)
    known = labels > 0
    return Truth(images[known], boxes[known] + (0, 0, 1, 1), labels[known], ignored[known], "voc")


def evaluate_voc(found: Found, truth: Truth, classes: Sequence[str], images: int,
                 iou: float = 0.5) -> dict:
    """Score detections, in any order of ``images`` images, as the published devkits do.

    Detections are taken by falling score; of equal scores the earlier one comes first. A detection
    belongs to the object of its image and class that it overlaps most, in pixel convention. If
    that overlap is over ``iou``, the first detection of the object is correct and later ones are
    wrong; a detection of a difficult object counts neither way. All other detections are wrong.
    Every object counts, also one without area.

    For a size range, objects outside it are ignored (like difficult ones), and so are wrong
    detections outside it. Areas are in pixel convention. Detections are assigned to objects once,
    for all sizes.

    Returns:
        {"iou", "voc07_11point" and "area": {"mean", "interval", "per_class": {class: AP},
        "per_class_interval": {class: interval}, "per_size": {size: mean AP}, "per_class_per_size":
        {class: {size: AP}}}; an interval is [low, high] of 95 % by `data.bootstrap`, None where
        too few images have objects. "ground_truths" (not difficult) and "detections": {class:
        count}, "notes": lines, "curves": {class: {size: {"scores", "recall", "precision"} float64
        [n]}}}, with the size "all" in the curves. -1 means no ground truth, of a class or of its
        size; no mean counts it, and a note names such classes.
    """
    (owners,), (hits,) = matched = match(truth, found, (iou,))
    parts = count_matched(truth, found, *matched, len(classes), images)
    weights = bootstrap.draw(images)
    # The published code sorts unstably: its order of equal scores depends on the processor.
    order = np.lexsort((-found.scores, found.labels))
    areas, sides = ((each.boxes[:, 2:] - each.boxes[:, :2]).prod(1) for each in (truth, found))
    drawn: list[np.ndarray] = []
    keys = ("per_class", "per_class_interval", "per_size", "per_class_per_size")
    result: dict = {"iou": iou, **{m: {"mean": 0.0} | {k: {} for k in keys} for m in METRICS}}
    result |= {"ground_truths": {}, "detections": {}, "curves": {}}
    for label, (name, counted) in enumerate(zip(classes, parts, strict=True), 1):
        rows, mine = order[found.labels[order] == label], (truth.labels == label) & ~truth.ignored
        own, curves, totals = owners[rows], {}, {}
        for size, (low, high) in SIZE_RANGES.items():
            valid = mine & (low <= areas) & (areas <= high)
            inside = (low <= sides[rows]) & (sides[rows] <= high)
            recall, precision = _curve(own, hits[rows], valid, inside)
            curves[size] = {"scores": found.scores[rows], "recall": recall, "precision": precision}
            totals[size] = int(valid.sum())
        of_draws = bootstrap.precisions(counted, weights, METRICS)[:, 0]
        drawn += [of_draws] if totals["all"] else []
        for metric, draws in zip(METRICS, of_draws, strict=True):
            scores = result[metric]
            aps = {size: average_precision(curve["recall"], curve["precision"], metric)
                   if totals[size] else -1.0 for size, curve in curves.items()}
            scores["per_class"][name] = aps.pop("all")
            scores["per_class_interval"][name] = bootstrap.interval(draws)
            scores["per_class_per_size"][name] = aps
        result["ground_truths"][name] = totals["all"]
        result["detections"][name] = len(rows)
        result["curves"][name] = curves
    for k, aps in enumerate(map(result.get, METRICS)):
        aps["interval"] = bootstrap.interval(bootstrap.mean([each[k] for each in drawn]))
        aps["mean"] = _mean(aps["per_class"].values())
        aps["per_size"] = {size: _mean(ap[size] for ap in aps["per_class_per_size"].values())
                           for size in SIZES}
    return result | {"notes": _notes(result)}


def _mean(aps: Iterable[float]) -> float:
    known = [ap for ap in aps if ap > -1]
    return float(np.mean(known)) if known else -1.0


def _notes(result: dict) -> list[str]:
    totals = result["ground_truths"]
    absent = [name for name, total in totals.items() if not total]
    notes = [f"0 detections for class {name}: its AP is 0" for name, total in totals.items()
             if total and not result["detections"][name]]
    if absent:
        notes.append(f"0 ground truths (-1) for {len(absent)} classes: {', '.join(absent)}")
    return notes


def _curve(matched: np.ndarray, found: np.ndarray, valid: np.ndarray,
           inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return recall [n] and precision [n] of what `match` returns, for one size range.

    valid: which objects count; a detection of another one counts neither way.
    inside: bool [n], which detections count if they are wrong.
    """
    on_valid = np.append(valid, False)[matched]  # -1, no object, is the last
    hits = (found & on_valid).cumsum()
    misses = (~found & inside & (on_valid | (matched < 0))).cumsum()
    return hits / max(valid.sum(), 1), hits / np.maximum(hits + misses, 1)


def write_voc_curves(path: str | Path, result: dict) -> None:
    """Write the curves of `evaluate_voc` for plots, see `data.curves`.

    Only the points of correct detections are kept. Precision falls between them, so both average
    precisions follow from these points.
    """
    curves = [curve for sizes in result["curves"].values() for curve in sizes.values()]
    rises = [np.diff(curve["recall"], prepend=0) > 0 for curve in curves]
    counts = np.reshape([rise.sum() for rise in rises], (1, -1, len(SIZE_RANGES))).astype(np.int64)
    columns = {
        key: np.concatenate([[], *(c[key][rise] for c, rise in zip(curves, rises, strict=True))])
        for key in ("recall", "precision", "scores")
    }
    write_curves(path, list(result["curves"]), [result["iou"]], counts=counts, **columns)


def _find_sets(root: Path, text: str, year: str | None) -> list[ImageSet]:
    """Return the image sets of a text; a set that one year of a devkit has needs no year."""
    existing, found = list_image_sets(root), []
    for each in parse_image_sets(text, existing):
        years = [year] if year else [y for y, name in existing if name == each.name]
        if each.year or None in years or not years:
            found.append(each)
        elif len(years) > 1:
            raise UserError(f'{root}: the image set "{each}" is in {" and ".join(years)}; choose '
                            "with --year")
        else:
            found.append(ImageSet(years[0], each.name))
    return found


def _table(result: dict) -> str:
    width = max(map(len, (*result["ground_truths"], "mean, medium")))
    heads = [f"{title:>18}  {'95 % interval':16}" for title in METRICS.values()]
    lines = [f"{'class':{width}}  ground truths  detections  " + "  ".join(heads)]
    for name, total in result["ground_truths"].items():
        counts = f"{total:13}  {result['detections'][name]:10}"
        cells = [_cell(found["per_class"][name], found["per_class_interval"][name])
                 for found in map(result.get, METRICS)]
        lines.append("  ".join([f"{name:{width}}", counts, *cells]))
    means = {"mean": [_cell(result[m]["mean"], result[m]["interval"]) for m in METRICS]}
    for size in SIZES:  # -1: no ground truth
        means[f"mean, {size}"] = [_cell(result[m]["per_size"][size]) for m in METRICS]
    lines += ["  ".join([f"{title:{width}}", " " * 25, *row]) for title, row in means.items()]
    return "\n".join(map(str.rstrip, lines))


def _cell(value: float, bounds: Sequence[float] | None = None) -> str:
    return f"{value:18.4f}  {bootstrap.text(bounds):16}"


def build_parser() -> Parser:
    parser = Parser(prog="python -m data.voc_eval", description="Score comp4 detection files: "
                    "average precision per class, both VOC metrics.")
    parser.add_argument("detections", metavar="DETECTIONS_DIR", type=Path)
    parser.add_argument("--root", type=Path, required=True, help="devkit or folder in VOC layout")
    parser.add_argument("--set", required=True, help="image sets of the test, such as test")
    parser.add_argument("--year", help="of a devkit; not needed if one year has the set")
    parser.add_argument("--classes", help="a,b,c or a file with one name a line")
    parser.add_argument("--val_share", type=number, default=VAL_SHARE, metavar="X",
                        help=f"of the test, for {' and '.join(SPLIT_SETS)} (%(default)s)")
    parser.add_argument("--split_by", metavar="REGEX", help="of the test, for the same sets")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the AP values here")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.json:
        check_writable(args.json)
    root = Path(os.path.expanduser(args.root))
    sets = _find_sets(root, args.set, args.year)
    classes = parse_classes(args.classes) if args.classes is not None else None
    _, data = load_annotations(root, sets, classes, None, args.val_share, args.split_by)
    found, missing = read_comp4(args.detections, comp4_set(sets), data.classes, data.ids)
    truth, images = voc_truth(data.annotations, data.classes), len(data.ids)
    result = evaluate_voc(found, truth, data.classes, images)
    detected = len(np.unique(found.images))
    if args.json:
        write_json(args.json, {metric: result[metric]["per_class"] for metric in METRICS})
    skipped = report_lines(data.skipped)
    print(f"{', '.join(map(str, sets))} of {root}: {images} images")
    lines = [*skipped, *missing, *undetected(detected, images), *result["notes"]]
    print("\n".join([*lines, _table(result)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
