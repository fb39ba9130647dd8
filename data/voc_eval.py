"""PASCAL VOC's detection score: comp4 files and average precision, both published metrics.

python -m data.voc_eval DETECTIONS_DIR --root DIR --set test [--year 2007]
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.classes import parse_classes
from data.curves import SIZE_RANGES, SIZES, write_curves
from data.detections import as_columns
from data.image import report_lines
from data.image_sets import ImageSet
from data.voc_xml import Annotation, list_image_sets, load_annotations
from utils.errors import UserError, command
from utils.files import atomic_write, check_writable, write_json

METRICS = {"voc07_11point": "VOC07 11-point AP@.5", "area": "VOC area AP@.5"}


class ClassDetections(NamedTuple):
    """All detections of one class, n may be 0, in the order of their file.

    images: int64 [n], positions in the list of images. scores: float64 [n].
    boxes: float64 [n, 4], (x1, y1, x2, y2) in pixels counted from 0, both ends inside the box.
    """

    images: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray


def comp4_path(directory: str | Path, image_set: str, name: str) -> Path:
    """comp4_det_<set>_<class>.txt; a character that file names cannot hold becomes %XX."""
    name = re.sub(r'[<>:"/\\|?*%\x00-\x1f]', lambda match: f"%{ord(match[0]):02X}", name)
    return Path(directory) / f"comp4_det_{image_set}_{name}.txt"


def write_comp4(
    directory: str | Path,
    image_set: str,
    classes: Sequence[str],
    ids: Sequence[str],
    detections: Sequence[dict],
) -> None:
    """Write a comp4 file for every class, also where nothing was detected.

    detections: for every id {"boxes" [n, 4] (x1, y1, x2, y2) in pixels counted from 0, "scores"
    [n], "labels" [n], label k being classes[k - 1]}. A line is `id score x1 y1 x2 y2`, in pixels
    counted from 1; scores keep all bits of a float32, and so their order, boxes 1/1000 pixel.

    ValueError: as `data.detections.as_columns`. UserError: a file that cannot be written.
    """
    images, scores, labels, boxes = as_columns(detections, ids, len(classes))
    boxes = boxes + 1
    for label, name in enumerate(classes, 1):
        of_class = np.flatnonzero(labels == label)
        names = [ids[image] for image in images[of_class].tolist()]
        columns = (scores[of_class], *boxes[of_class].T)
        rows = zip(names, *(column.tolist() for column in columns), strict=True)
        lines = [
            f"{image_id} {score:.9g} {x1:.3f} {y1:.3f} {x2:.3f} {y2:.3f}\n"
            for image_id, score, x1, y1, x2, y2 in rows
        ]
        with atomic_write(comp4_path(directory, image_set, name)) as file:
            file.write("".join(lines).encode())


def read_comp4(
    directory: str | Path, image_set: str, classes: Sequence[str], ids: Sequence[str]
) -> tuple[dict[str, ClassDetections], list[str]]:
    """Read the comp4 files of an image set: ({class: ClassDetections}, one line a missing file).

    Raises UserError when there is no file at all, and with file and line for a malformed line or an
    image id that is not among `ids`.
    """
    paths = {name: comp4_path(directory, image_set, name) for name in classes}
    missing = {name: path for name, path in paths.items() if not path.is_file()}
    if len(missing) == len(paths):
        there = sorted(path.name for path in Path(directory).glob("comp4_det_*.txt"))
        raise UserError(
            f"{directory}: no detection file of the classes {', '.join(classes)}, such as "
            f"{comp4_path('', image_set, classes[0])}; there: {', '.join(there[:10]) or 'none'}"
        )
    position = {image_id.encode(): index for index, image_id in enumerate(ids)}
    found = {
        name: _read_class(None if name in missing else path, position)
        for name, path in paths.items()
    }
    return found, [
        f"{path}: no such file, {name} has no detections" for name, path in missing.items()
    ]


def _read_class(path: Path | None, position: dict[bytes, int]) -> ClassDetections:
    try:
        data = path.read_bytes() if path else b""
        columns = _parse_plain(data, position)
        if columns is None:
            columns = _parse_lines(path, data.decode("utf-8-sig"), position)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the detections cannot be read ({error})") from error
    images, numbers = columns
    numbers = np.array(numbers, np.float64).reshape(-1, 5)
    return ClassDetections(np.array(images, np.int64), numbers[:, 0], numbers[:, 1:] - 1)


def _parse_plain(data: bytes, position: dict[bytes, int]) -> tuple[list, np.ndarray] | None:
    """(images [n], numbers [5 n]) of a file as `write_comp4` writes it, all lines at once.

    None where anything is otherwise, be it an id with a space or an error: `_parse_lines` tells.
    """
    text = np.frombuffer(data, np.uint8)
    gaps = text[text <= ord(" ")]
    if len(gaps) % 6 or (gaps.reshape(-1, 6) != np.frombuffer(b"     \n", np.uint8)).any():
        return None
    numbers = data.split()
    # Else a gap of two spaces, one before the first word, or a word behind the last line's end.
    if len(numbers) != len(gaps) or not data.endswith(b"\n"):
        return None
    images = [*map(position.get, numbers[::6])]
    del numbers[::6]
    try:
        numbers = np.fromiter(map(float, numbers), np.float64, len(numbers))
    except ValueError:
        return None
    return (images, numbers) if None not in images and np.isfinite(numbers).all() else None


def _parse_lines(path: Path, text: str, position: dict[bytes, int]) -> tuple[list, list]:
    """`_parse_plain` for every form that is allowed; UserError with the line for any other."""
    images, numbers = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not (fields := line.strip().rsplit(maxsplit=5)):  # an id may hold spaces
            continue
        try:
            image_id, *values = fields
            values = [float(value) for value in values]
        except ValueError:
            values = []
        if len(values) != 5 or not all(map(math.isfinite, values)):
            raise UserError(
                f'{path}:{number}: "{line.strip()}" is not of the form `id score x1 y1 x2 y2`'
            )
        if image_id.encode() not in position:
            raise UserError(f'{path}:{number}: image id "{image_id}" is not in the image set')
        images.append(position[image_id.encode()])
        numbers += values
    return images, numbers


def average_precision(recall: np.ndarray, precision: np.ndarray, metric: str) -> float:
    """Average precision of a curve, recall [n] ascending and precision [n]; 0 when n is 0.

    "voc07_11point" is the mean over recalls 0, 0.1, ..., 1 of the best precision at that recall or
    a higher one, "area" the area under that envelope (VOC devkits until 2009 and from 2010).
    """
    if metric == "voc07_11point":
        # arange and not linspace: its 0.30000000000000004 decides ties with 3 / 10 as published
        best = [precision[recall >= t].max(initial=0) for t in np.arange(0, 1.1, 0.1)]
        return float(np.mean(best))
    if metric == "area":
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        return float((np.diff(recall, prepend=0) * envelope).sum())
    raise ValueError(f"metric {metric!r} is not one of {', '.join(METRICS)}")


def evaluate_voc(
    detections: dict[str, ClassDetections],
    annotations: Sequence[Annotation],
    classes: Sequence[str],
    iou: float = 0.5,
) -> dict:
    """Score detections as the published devkits do; images are positions in `annotations`.

    In order of falling score, a detection belongs to the object of its image and class that it
    overlaps most, in pixel convention. If that overlap is over `iou`, it is correct for the first
    detection, wrong for later ones, and neither if the object is difficult; else it is wrong.
    Every object counts, also one without area.

    As in COCO an object outside a size range counts neither way there, like a difficult one, and
    so does a detection outside it that is wrong; areas are in pixel convention. Every size uses the
    one assignment of detections to objects.

    Returns {"iou", "voc07_11point" and "area": {"mean", "per_class": {class: AP}, "per_size":
    {size: mean AP}, "per_class_per_size": {class: {size: AP}}}, "ground_truths" (not difficult) and
    "detections": {class: count}, "notes": lines, "curves": {class: {size: {"scores", "recall",
    "precision"} float64 [n]}}}, also of the size "all". A class without ground truth has AP 0 and
    counts in the mean, as in the published 11-point code; a note says so. A class without ground
    truth of a size has -1 there and is left out of that size's mean.
    """
    counts = [len(annotation.names) for annotation in annotations]
    names = np.array([name for annotation in annotations for name in annotation.names], object)
    images = np.repeat(np.arange(len(annotations)), counts)
    boxes = np.concatenate([np.empty((0, 4)), *(annotation.boxes for annotation in annotations)])
    difficult = np.concatenate([np.empty(0, bool), *(a.difficult for a in annotations)])

    keys = ("per_class", "per_size", "per_class_per_size")
    result: dict = {"iou": iou, **{m: {"mean": 0.0} | {k: {} for k in keys} for m in METRICS}}
    result |= {"ground_truths": {}, "detections": {}, "notes": [], "curves": {}}
    for name in classes:
        found, of_class = detections[name], np.flatnonzero(names == name)
        # As published: equal scores stand in the order of NumPy's default sort, which is not stable
        # and depends on the processor. Scores rounded to 3 digits feel it in the third digit of AP.
        order = np.argsort(-found.scores)
        det_boxes, objects, counted = found.boxes[order], boxes[of_class], ~difficult[of_class]
        starts = np.searchsorted(images[of_class], np.arange(len(annotations) + 1))
        matched, first = _match(found.images[order], det_boxes, starts, objects, counted, iou)
        det_areas, areas, scores = _area(det_boxes), _area(objects), found.scores[order]
        total, curves = {}, {}
        for size, (low, high) in SIZE_RANGES.items():
            valid = counted & (low <= areas) & (areas <= high)
            inside = (low <= det_areas) & (det_areas <= high)
            total[size] = int(valid.sum())
            recall, precision = _curve(matched, first, valid, inside)
            curves[size] = {"scores": scores, "recall": recall, "precision": precision}
        for metric in METRICS:
            aps = {
                size: average_precision(curve["recall"], curve["precision"], metric)
                for size, curve in curves.items()
            }
            result[metric]["per_class"][name] = aps["all"]
            result[metric]["per_class_per_size"][name] = {
                size: aps[size] if total[size] else -1.0 for size in SIZES
            }
        result["ground_truths"][name], result["detections"][name] = total["all"], len(order)
        result["curves"][name] = curves
        if not total["all"]:
            result["notes"].append(
                f"0 ground truths for class {name}: its AP is set to 0 and counts in the mean"
            )
        elif not len(order):
            result["notes"].append(f"0 detections for class {name}: its AP is 0")
    for metric in METRICS:
        values = result[metric]
        values["mean"] = float(np.mean(list(values["per_class"].values())))
        for size in SIZES:
            known = [ap[size] for ap in values["per_class_per_size"].values() if ap[size] > -1]
            values["per_size"][size] = float(np.mean(known)) if known else -1.0
    return result


def _match(
    det_images: np.ndarray,
    det_boxes: np.ndarray,
    starts: np.ndarray,
    boxes: np.ndarray,
    counted: np.ndarray,
    threshold: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The object of each detection, in order of score; image i has boxes[starts[i]:starts[i + 1]].

    Returns int64 [n], -1 for no object, and bool [n], where it is the first of a counted object.
    """
    start, count = starts[det_images], np.diff(starts)[det_images]
    # every detection beside every object of its image: `det` and `obj` are the two ends of a pair
    det = np.repeat(np.arange(len(det_images)), count)
    obj = np.arange(len(det)) + np.repeat(start - (count.cumsum() - count), count)
    overlap = _iou(det_boxes[det], boxes[obj])

    # for each detection the pair of the largest overlap, the earlier object if two are equal
    pairs = np.lexsort((-overlap, det))  # stable
    pairs = pairs[np.unique(det[pairs], return_index=True)[1]]
    pairs = pairs[overlap[pairs] > threshold]
    matched = np.full(len(det_images), -1)
    matched[det[pairs]] = obj[pairs]
    pairs = pairs[counted[obj[pairs]]]
    first = np.zeros(len(det_images), bool)
    first[det[pairs[np.unique(obj[pairs], return_index=True)[1]]]] = True
    return matched, first


def _curve(
    matched: np.ndarray, first: np.ndarray, valid: np.ndarray, inside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision, [n] each, of what `_match` returns in a size range.

    valid: the objects that count, others count neither way. inside [n]: the detections that count
    where they are wrong.
    """
    on_valid = np.append(valid, False)[matched]  # -1, no object, is the last
    hits = (first & on_valid).cumsum()
    misses = (~first & inside & (on_valid | (matched < 0))).cumsum()
    return hits / max(valid.sum(), 1), hits / np.maximum(hits + misses, 1)


def write_voc_curves(path: str | Path, result: dict) -> None:
    """Keep the curves of `evaluate_voc` for plots, see `data.curves`.

    Of all points only those of correct detections: the rest of a curve falls straight below them,
    and both average precisions follow from these.
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
    """Area [n] of boxes [n, 4] in pixel convention (width x2 - x1 + 1)."""
    return (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU [n] of the boxes a[k] and b[k], [n, 4] each, in pixel convention."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]) + 1
    intersection = sides.clip(0).prod(1)
    union = _area(a) + _area(b) - intersection
    # swapped corners can make the union 0 or negative, never the intersection positive
    return np.divide(intersection, union, out=np.zeros_like(union), where=intersection > 0)


def _find_year(root: Path, image_set: str) -> str | None:
    """The only year of a devkit that has the image set; None for a folder in VOC layout."""
    years = [year for year, name in list_image_sets(root) if name == image_set]
    if len(years) > 1 and None not in years:
        raise UserError(
            f'{root}: the image set "{image_set}" is in {" and ".join(years)}; choose with --year'
        )
    return years[0] if years else None


def _table(result: dict) -> str:
    """Counts and AP of every class, and under them the mean of all and of every size."""
    width = max(map(len, (*result["ground_truths"], "mean, medium")))
    lines = [f"{'class':{width}}  ground truths  detections  " + "  ".join(METRICS.values())]
    for name, total in result["ground_truths"].items():
        values = [f"{result[m]['per_class'][name]:{len(title)}.4f}" for m, title in METRICS.items()]
        counts = f"{total:13}  {result['detections'][name]:10}"
        lines.append("  ".join([f"{name:{width}}", counts, *values]))
    means = {"mean": [result[metric]["mean"] for metric in METRICS]}
    for size in SIZES:  # -1: no ground truth
        means[f"mean, {size}"] = [result[metric]["per_size"][size] for metric in METRICS]
    for title, row in means.items():
        values = [f"{v:{len(m)}.4f}" for v, m in zip(row, METRICS.values(), strict=True)]
        lines.append("  ".join([f"{title:{width}}", " " * 25, *values]))
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.voc_eval",
        description="Score comp4 detection files: average precision per class, both VOC metrics.",
    )
    parser.add_argument("detections", metavar="DETECTIONS_DIR", type=Path)
    parser.add_argument("--root", type=Path, required=True, help="devkit or folder in VOC layout")
    parser.add_argument("--set", required=True, help="image set, such as test")
    parser.add_argument("--year", help="of a devkit; may be left out where one year has the set")
    parser.add_argument("--classes", help="a,b,c or a file with one name a line")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the AP values here")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.json:
        check_writable(args.json)
    root = Path(os.path.expanduser(args.root))
    year = args.year or _find_year(root, args.set)
    classes = parse_classes(args.classes) if args.classes is not None else None
    truth = load_annotations(root, [(year, args.set)], classes)
    found, missing = read_comp4(args.detections, args.set, truth.classes, truth.ids)
    result = evaluate_voc(found, truth.annotations, truth.classes)
    if args.json:
        write_json(args.json, {metric: result[metric]["per_class"] for metric in METRICS})
    skipped = report_lines(truth.skipped)
    print(f"{ImageSet(year, args.set)} of {root}: {len(truth.ids)} images")
    print("\n".join([*skipped, *missing, *result["notes"], _table(result)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
