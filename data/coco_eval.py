"""The twelve COCO detection metrics of a results JSON, by pycocotools or a faster equal of it.

    python -m data.coco_eval RESULTS.json ANNOTATIONS.json [--eval-backend NAME] [--json OUT]
    python -m data.coco_eval detections_test-dev2017_NAME_results.zip image_info_test-dev2017.json

The second checks a file for the evaluation server, which alone can score it.
Metrics and results format: https://cocodataset.org/#detection-eval, #format-results.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import re
import sys
import zipfile
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.classes import parse_classes
from data.coco_json import Annotations, box_column, column, positions, read_annotations, read_json
from data.curves import SIZES, write_curves
from utils.errors import UserError, command
from utils.files import check_writable, write_json

COCO_FIELDS = ("image_id", "category_id", "bbox", "score")
# The first is the reference.
BACKENDS = ("pycocotools", "hotcoco", "faster-coco-eval")
# (metric, IoU, area, detections a picture), in the order of pycocotools' stats.
STATS = (
    ("AP", "0.50:0.95", "all", 100),
    ("AP", "0.50", "all", 100),
    ("AP", "0.75", "all", 100),
    ("AP", "0.50:0.95", "small", 100),
    ("AP", "0.50:0.95", "medium", 100),
    ("AP", "0.50:0.95", "large", 100),
    ("AR", "0.50:0.95", "all", 1),
    ("AR", "0.50:0.95", "all", 10),
    ("AR", "0.50:0.95", "all", 100),
    ("AR", "0.50:0.95", "small", 100),
    ("AR", "0.50:0.95", "medium", 100),
    ("AR", "0.50:0.95", "large", 100),
)


class COCOResults(NamedTuple):
    """Detections as columns: what a results JSON says, without a dict for each.

    image_ids, category_ids: int64 [n], of the annotation file. boxes: float64 [n, 4], x, y, w, h in
    pixels, up to `data.detections.LARGEST`. scores: float64 [n]. All finite; n may be 0. The order
    decides between equal scores.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray


def evaluate_coco(
    results: str | Path | list[dict] | COCOResults,
    annotations_path: str | Path,
    backend: str = "pycocotools",
    curves: str | Path | None = None,
    classes: Sequence[str] | None = None,
    images: Sequence[int] | None = None,
) -> dict:
    """Score detections {"image_id", "category_id", "bbox": [x, y, w, h], "score"}: file or memory.

    Returns {"stats": the 12 numbers of `STATS`, "per_category": {name: AP at [.5:.95]}, "per_size":
    {"small", "medium", "large": AP, as in the stats}, "per_category_per_size": {name: {size: AP}},
    "backend": its name and version} over all pictures of the annotation file, with pycocotools'
    defaults. As there, -1 stands where there is no ground truth; no detections at all score 0.
    curves: also write the precision-recall arrays to this file, see `data.curves`. classes,
    images: score these categories, or the pictures of these ids, alone, as if the file had no
    others.

    hotcoco gives every number of pycocotools, the arrays included, bit by bit. faster-coco-eval
    does so for AR and the scores, but its precision of a lone correct detection is 1, and not
    pycocotools' 1 / (1 + 2**-52): where the two differ, by 2.2e-16, and AP by rounding (1e-15).

    UserError: a file that cannot be read or is malformed, results of a picture or a category that
    the annotation file does not list, a backend that is missing, too old or broken. ValueError: no
    such backend.
    """
    evaluate, version = load_backend(backend)
    truth = read_annotations(annotations_path)
    if classes is not None:
        truth = truth.of_classes(classes)
    if images is not None:
        truth = truth.of_images(images)
    source = results if isinstance(results, str | Path) else "results"
    if not isinstance(results, COCOResults):
        records = results if isinstance(results, list) else read_json(results)
        results = _columns(source, records)
    # Ids by position, from 1: exact in any number format, and in the order of the file's own.
    image = 1 + positions(
        source, "results", "image_id", results.image_ids, truth.image_ids, truth.path
    )
    category = 1 + positions(
        source, "results", "category_id", results.category_ids, truth.category_ids, truth.path
    )
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = evaluate(truth, image, category, results.boxes, results.scores)
    # [IoU, recall, category, area range, detections a picture], -1 without ground truth
    precision, scores = (
        np.ascontiguousarray(evaluation.eval[key][..., -1]) for key in ("precision", "scores")
    )
    if curves is not None:
        write_curves(
            curves,
            truth.classes,
            evaluation.params.iouThrs,
            recall=np.array(evaluation.params.recThrs),
            precision=precision,
            scores=scores,
        )
    stats = np.asarray(evaluation.stats).tolist()
    means = precision.mean(axis=(0, 1)).tolist()  # [category][area]
    return {
        "stats": stats,
        "per_category": {name: m[0] for name, m in zip(truth.classes, means, strict=True)},
        "per_size": dict(zip(SIZES, stats[3:6], strict=True)),
        "per_category_per_size": {
            name: dict(zip(SIZES, m[1:], strict=True))
            for name, m in zip(truth.classes, means, strict=True)
        },
        "backend": version,
    }


def check_submission(archive: str | Path, annotations_path: str | Path) -> int:
    """The number of detections in a zip that COCO's evaluation server takes.

    Its rules: the zip has one file and no folder; that is detections_<split>_<name>_results.json, a
    list of objects of exactly four fields: image_id and category_id, integers that the split's
    image_info_<split>.json lists, bbox, four finite numbers, and score, a finite number
    (https://cocodataset.org/#upload, #format-results). UserError with the first that is broken.
    """
    split = Path(annotations_path).stem.removeprefix("image_info_")
    try:
        with zipfile.ZipFile(archive) as members:
            names = members.namelist()
            pattern = rf"detections_{re.escape(split)}_[\w.+-]+_results\.json"
            if len(names) != 1 or not re.fullmatch(pattern, names[0], re.ASCII):
                raise UserError(
                    f"{archive}: holds {', '.join(names) or 'nothing'}, where the server wants"
                    f" detections_{split}_<name>_results.json alone, in no folder"
                )
            records = json.loads(members.read(names[0]))
    except OSError as error:
        raise UserError(f"{archive}: cannot be read ({error.strerror})") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{archive}: not a zip that can be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{archive}: {names[0]} is not a JSON file ({error})") from error
    source = f"{archive}: {names[0]}"
    truth = read_annotations(annotations_path, boxes=False)
    results = _columns(source, records)
    for n, record in enumerate(records):
        if record.keys() != set(COCO_FIELDS):
            raise UserError(
                f"{source}: results[{n}] has the fields {', '.join(record)}, where the server wants"
                f" {', '.join(COCO_FIELDS)}"
            )
        if not all(isinstance(record[field], int) for field in COCO_FIELDS[:2]):
            raise UserError(f"{source}: results[{n}] has an id that is no integer: {record}")
    positions(source, "results", "image_id", results.image_ids, truth.image_ids, truth.path)
    positions(
        source, "results", "category_id", results.category_ids, truth.category_ids, truth.path
    )
    return len(records)


def _columns(source, records) -> COCOResults:
    image, category = (
        column(source, "results", records, field, dtype=np.int64) for field in COCO_FIELDS[:2]
    )
    boxes = box_column(source, "results", records)
    return COCOResults(image, category, boxes, column(source, "results", records, "score"))


def load_backend(name: str):
    """(function of truth, images, categories, boxes, scores -> evaluation, "name version").

    UserError where its package is not installed, too old or broken; ValueError for a name not in
    `BACKENDS`.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
    module = name.replace("-", "_")
    try:
        if name == "hotcoco":
            import hotcoco

            evaluate = partial(_evaluate_arrays, hotcoco)
        elif name == "faster-coco-eval":
            from faster_coco_eval import COCO, COCOeval_faster

            evaluate = partial(_evaluate_dicts, COCO, COCOeval_faster)
        else:
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval

            evaluate = partial(_evaluate_dicts, COCO, COCOeval)
    except (ImportError, ValueError) as error:  # ValueError: compiled for another NumPy
        if isinstance(error, ModuleNotFoundError) and str(error.name).split(".")[0] == module:
            problem = f"need it installed (pip install {name})"
        else:
            problem = f"cannot be had, its import fails: {error} (pip install -U {name} may help)"
        raise UserError(f"COCO scores by {name} {problem}") from error
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a module without a package's metadata
        version = getattr(sys.modules[module], "__version__", "of unknown version")
    if name == "hotcoco" and not hasattr(hotcoco.COCO, "from_arrays"):
        raise UserError(
            f"COCO scores by hotcoco need hotcoco>=1.2, found {version} (pip install -U hotcoco)"
        )
    return evaluate, f"{name} {version}"


def _evaluate_dicts(COCO, COCOeval, truth: Annotations, images, categories, boxes, scores):
    """By pycocotools' interface, in which every box is a dict."""

    def index(images, categories, boxes, **more):
        # Own ids from 1: pycocotools takes a match with id 0 for none, and joins equal ones.
        keys = ("id", "image_id", "category_id", "bbox", *more)
        values = (images, categories, boxes, *more.values())
        rows = zip(range(1, len(boxes) + 1), *(v.tolist() for v in values), strict=True)
        coco = COCO()
        coco.dataset = {
            **_lists(truth),
            "annotations": [dict(zip(keys, row, strict=True)) for row in rows],
        }
        coco.createIndex()
        return coco

    evaluation = COCOeval(
        index(_owners(truth), truth.labels, truth.boxes, area=truth.areas, iscrowd=truth.crowds),
        index(images, categories, boxes, area=boxes[:, 2] * boxes[:, 3], score=scores),
        "bbox",
    )
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def _evaluate_arrays(hotcoco, truth: Annotations, images, categories, boxes, scores):
    """By hotcoco's interface for columns."""
    objects = hotcoco.COCO.from_arrays(
        *_lists(truth).values(),
        _owners(truth),
        truth.labels,
        truth.boxes,
        area=truth.areas,
        iscrowd=truth.crowds,
    )
    found = objects.load_res(np.column_stack([images, boxes, scores, categories]))
    evaluation = hotcoco.COCOeval(objects, found, "bbox")
    evaluation.run()
    return evaluation


def _lists(truth: Annotations) -> dict:
    """The records of the pictures and categories, by position."""
    return {
        "images": [{"id": id} for id in range(1, len(truth.image_ids) + 1)],
        "categories": [{"id": id, "name": name} for id, name in enumerate(truth.classes, 1)],
    }


def _owners(truth: Annotations) -> np.ndarray:
    return np.repeat(np.arange(1, len(truth.image_ids) + 1), np.diff(truth.offsets))


def notes(report: dict) -> list[str]:
    """What zeros and -1 in a report of `evaluate_coco` stand for, as lines for the log."""
    lines = []
    if report["stats"][8] == 0:
        lines += [
            "none of the 100 best detections of a class in a picture overlaps an object of that"
            " class by IoU 0.50 or more"
        ]
    absent = [name for name, ap in report["per_category"].items() if ap == -1]
    if absent:
        lines += [f"no ground truth (-1) for {len(absent)} classes: {', '.join(absent)}"]
    return lines


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data.coco_eval", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "results",
        help="results JSON: image_id, category_id, bbox, score; or the .zip of a test set",
    )
    parser.add_argument("annotations", help="annotation JSON, e.g. instances_val2017.json")
    parser.add_argument(
        "--eval-backend",
        choices=BACKENDS,
        default=BACKENDS[0],
        help="what computes the numbers (%(default)s): hotcoco gives the same bits, much faster",
    )
    parser.add_argument(
        "--classes", metavar="NAMES", help="score these alone: a,b,c or a file with one name a line"
    )
    parser.add_argument("--json", metavar="OUT", help="write stats, per_category, ... to this file")
    args = parser.parse_args(argv)
    if args.json:
        check_writable(args.json)
    if args.results.endswith(".zip"):
        count = check_submission(args.results, args.annotations)
        print(f"{args.results}: {count} detections, as the evaluation server takes them")
        return 0
    classes = parse_classes(args.classes) if args.classes else None
    report = evaluate_coco(args.results, args.annotations, args.eval_backend, classes=classes)
    if args.json:
        write_json(args.json, report)
    for (metric, iou, area, count), value in zip(STATS, report["stats"], strict=True):
        long = {"AP": "Average Precision", "AR": "Average Recall"}[metric]
        print(
            f" {long:<18} ({metric}) @[ IoU={iou:<9} | area={area:>6s} | maxDets={count:>3d} ]"
            f" = {value:0.4f}"
        )
    for line in notes(report):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
