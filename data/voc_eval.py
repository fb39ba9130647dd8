"""PASCAL VOC's detection score: average precision, both published metrics.

python -m data.voc_eval DETECTIONS_DIR --root DIR --set test [--year 2007]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import bootstrap
from data.annotation import Annotation, join
from data.classes import parse_classes
from data.curves import SIZE_RANGES, SIZES, write_curves
from data.detections import undetected
from data.image_sets import ImageSet, parse_image_sets
from data.skips import report_lines
from data.split import SPLIT_SETS, VAL_SHARE
from data.voc_comp4 import ClassDetections, comp4_set, read_comp4
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


def evaluate_voc(detections: dict[str, ClassDetections], annotations: Sequence[Annotation],
                 classes: Sequence[str], iou: float = 0.5) -> dict:
    """Score detections as the published devkits do; images are positions in ``annotations``.

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
        too few images have objects. "ground_truths" (not
        difficult) and "detections": {class: count}, "notes": lines, "curves": {class: {size:
        {"scores", "recall", "precision"} float64 [n]}}}, with the size "all" in the curves. A class
        without ground truth has AP 0 and counts in the mean, as in the published 11-point code; a
        note says so. Without ground truth of a size it has -1 there and is left out of that mean.
    """
    images, boxes, labels, difficult = join(annotations, classes)
    weights = bootstrap.draw(len(annotations))
    drawn: list[Sequence[np.ndarray | None]] = []
    keys = ("per_class", "per_class_interval", "per_size", "per_class_per_size")
    result: dict = {"iou": iou, **{m: {"mean": 0.0} | {k: {} for k in keys} for m in METRICS}}
    result |= {"ground_truths": {}, "detections": {}, "notes": [], "curves": {}}
    for label, name in enumerate(classes, 1):
        found, mine = detections[name], labels == label
        objects = _Objects(images[mine], boxes[mine], difficult[mine])
        curves, totals, counted = _class_curves(found, objects, iou, len(annotations))
        aps = bootstrap.precisions(counted, weights, METRICS)[:, 0] if totals["all"] else None
        drawn.append(2 * [None] if aps is None else aps)
        for metric, of_draws in zip(METRICS, drawn[-1], strict=True):
            scores = result[metric]
            aps = {size: average_precision(curve["recall"], curve["precision"], metric)
                   for size, curve in curves.items()}
            scores["per_class"][name] = aps["all"]
            scores["per_class_interval"][name] = bootstrap.interval(of_draws)
            scores["per_class_per_size"][name] = {size: aps[size] if totals[size] else -1.0
                                                  for size in SIZES}
        result["ground_truths"][name] = totals["all"]
        result["detections"][name] = len(found.scores)
        result["curves"][name] = curves
        result["notes"] += _notes(name, totals["all"], len(found.scores))
    for metric, of_classes in zip(METRICS, zip(*drawn, strict=True), strict=True):
        aps = result[metric]
        aps["interval"] = bootstrap.interval(bootstrap.mean(of_classes))
        aps["mean"] = float(np.mean(list(aps["per_class"].values())))
        for size in SIZES:
            known = [ap[size] for ap in aps["per_class_per_size"].values() if ap[size] > -1]
            aps["per_size"][size] = float(np.mean(known)) if known else -1.0
    return result


def _notes(name: str, objects: int, detections: int) -> list[str]:
    if not objects:
        return [f"0 ground truths for class {name}: its AP is set to 0 and counts in the mean"]
    return [] if detections else [f"0 detections for class {name}: its AP is 0"]


class _Objects(NamedTuple):
    """The M objects of a class: image positions [M], ascending, boxes [M, 4] and flags [M]."""

    images: np.ndarray
    boxes: np.ndarray
    difficult: np.ndarray


def _class_curves(
    found: ClassDetections, objects: _Objects, iou: float, images: int,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, int], bootstrap.Counted]:
    # The published code sorts unstably: its order of equal scores depends on the processor.
    order = np.argsort(-found.scores, kind="stable")
    boxes, counted = found.boxes[order], ~objects.difficult
    matched, first = _match(found.images[order], boxes, objects, iou)
    det_areas, areas = _area(boxes), _area(objects.boxes)
    curves, totals = {}, {}
    for size, (low, high) in SIZE_RANGES.items():
        valid = counted & (low <= areas) & (areas <= high)
        inside = (low <= det_areas) & (det_areas <= high)
        recall, precision = _curve(matched, first, valid, inside)
        curves[size] = {"scores": found.scores[order], "recall": recall, "precision": precision}
        totals[size] = int(valid.sum())
    counts = (matched < 0) | np.append(counted, False)[matched]
    of_image = np.bincount(objects.images[counted], minlength=images)
    part = bootstrap.Counted(found.images[order], first[None], counts[None], of_image)
    return curves, totals, part


def _match(images: np.ndarray, boxes: np.ndarray, objects: _Objects,
           iou: float) -> tuple[np.ndarray, np.ndarray]:
    """Assign detections, in order of score, to the objects of one class.

    Returns:
        int64 [n], the object of each detection, -1 for none; bool [n], where the detection is the
        first of an object that is not difficult.
    """
    start, end = (np.searchsorted(objects.images, images, side) for side in ("left", "right"))
    count = end - start
    # Every detection beside every object of its image: `det` and `obj` are the ends of a pair.
    det = np.repeat(np.arange(len(images)), count)
    obj = np.arange(len(det)) + np.repeat(start - (count.cumsum() - count), count)
    overlap = _iou(boxes[det], objects.boxes[obj])

    # For each detection the pair of the largest overlap; of equal ones that of the earlier object.
    pairs = np.lexsort((-overlap, det))  # stable
    pairs = pairs[np.unique(det[pairs], return_index=True)[1]]
    pairs = pairs[overlap[pairs] > iou]
    matched = np.full(len(images), -1)
    matched[det[pairs]] = obj[pairs]
    pairs = pairs[~objects.difficult[obj[pairs]]]
    first = np.zeros(len(images), bool)
    first[det[pairs[np.unique(obj[pairs], return_index=True)[1]]]] = True
    return matched, first


def _curve(matched: np.ndarray, first: np.ndarray, valid: np.ndarray,
           inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return recall [n] and precision [n] of what `_match` returns, for one size range.

    valid: which objects count; a detection of another one counts neither way.
    inside: bool [n], which detections count if they are wrong.
    """
    on_valid = np.append(valid, False)[matched]  # -1, no object, is the last
    hits = (first & on_valid).cumsum()
    misses = (~first & inside & (on_valid | (matched < 0))).cumsum()
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


def _area(boxes: np.ndarray) -> np.ndarray:
    """Return the areas [n] of boxes [n, 4] in pixel convention (width x2 - x1 + 1)."""
    return (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the IoU [n] of the boxes a[k] and b[k], [n, 4] each, in pixel convention."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]) + 1
    intersection = sides.clip(0).prod(1)
    union = _area(a) + _area(b) - intersection
    # Swapped corners can make the union 0 or negative, but then the intersection is 0.
    return np.divide(intersection, union, out=np.zeros_like(union), where=intersection > 0)


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
    _, truth = load_annotations(root, sets, classes, None, args.val_share, args.split_by)
    found, missing = read_comp4(args.detections, comp4_set(sets), truth.classes, truth.ids)
    result = evaluate_voc(found, truth.annotations, truth.classes)
    detected = len(np.unique(np.concatenate([each.images for each in found.values()])))
    if args.json:
        write_json(args.json, {metric: result[metric]["per_class"] for metric in METRICS})
    skipped = report_lines(truth.skipped)
    print(f"{', '.join(map(str, sets))} of {root}: {len(truth.ids)} images")
    lines = [*skipped, *missing, *undetected(detected, len(truth.ids)), *result["notes"]]
    print("\n".join([*lines, _table(result)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
