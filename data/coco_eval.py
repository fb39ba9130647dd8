"""The twelve COCO detection metrics of a results JSON, by pycocotools.

    python -m data.coco_eval RESULTS.json ANNOTATIONS.json [--json OUT]

Metrics and results format: https://cocodataset.org/#detection-eval, #format-results.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path

import numpy as np

from data.coco import column, positions, read_annotations, read_json
from utils.errors import UserError
from utils.files import check_writable, write_json

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


def evaluate_coco(results: str | Path | list[dict], annotations_path: str | Path) -> dict:
    """Score detections {"image_id", "category_id", "bbox": [x, y, w, h], "score"}, a file or list.

    Returns {"stats": the 12 numbers of `STATS`, "per_category": {name: AP at [.5:.95]}} over all
    pictures of the annotation file, with pycocotools' defaults. As there, -1 stands where there is
    no ground truth; no detections at all score 0.

    UserError: a file that cannot be read or is malformed, results of a picture or a category that
    the annotation file does not list, pycocotools not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise UserError("COCO scores need pycocotools (pip install pycocotools)") from error

    truth = read_annotations(annotations_path)
    source = "results" if isinstance(results, list) else results
    records = results if isinstance(results, list) else read_json(results)
    image, category = (
        column(source, "results", records, field, dtype=np.int64)
        for field in ("image_id", "category_id")
    )
    positions(source, "results", "image_id", image, truth.image_ids, truth.path)
    positions(source, "results", "category_id", category, truth.category_ids, truth.path)
    boxes = column(source, "results", records, "bbox", (4,))
    scores = column(source, "results", records, "score")

    def index(image_ids, category_ids, boxes, **more):
        # Own ids from 1: pycocotools takes a match with id 0 for none, and joins equal ones.
        keys = ("id", "image_id", "category_id", "bbox", *more)
        values = (image_ids, category_ids, boxes, *more.values())
        rows = zip(range(1, len(boxes) + 1), *(v.tolist() for v in values), strict=True)
        coco = COCO()
        coco.dataset = {
            "images": [{"id": id} for id in truth.image_ids.tolist()],
            "categories": [{"id": id} for id in truth.category_ids.tolist()],
            "annotations": [dict(zip(keys, row, strict=True)) for row in rows],
        }
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(
            index(
                np.repeat(truth.image_ids, np.diff(truth.offsets)),
                truth.category_ids[truth.labels - 1],
                truth.boxes,
                area=truth.areas,
                iscrowd=truth.crowds,
            ),
            index(image, category, boxes, area=boxes[:, 2] * boxes[:, 3], score=scores),
            "bbox",
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # precision: [IoU, recall, category, area range, detections a picture], -1 without ground truth
    precision = evaluation.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1))
    return {
        "stats": evaluation.stats.tolist(),
        "per_category": dict(zip(truth.classes, precision.tolist(), strict=True)),
    }


def notes(report: dict) -> list[str]:
    """What zeros and -1 in a report of `evaluate_coco` stand for, as lines for the log."""
    lines = []
    if report["stats"][8] == 0:
        lines += ["no detection overlaps an object of its class by IoU 0.50 or more"]
    absent = [name for name, ap in report["per_category"].items() if ap == -1]
    if absent:
        lines += [f"no ground truth (-1) for {len(absent)} classes: {', '.join(absent)}"]
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data.coco_eval", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("results", help="results JSON: image_id, category_id, bbox, score")
    parser.add_argument("annotations", help="annotation JSON, e.g. instances_val2017.json")
    parser.add_argument("--json", metavar="OUT", help="write stats and per_category to this file")
    args = parser.parse_args(argv)
    try:
        if args.json:
            check_writable(args.json)
        report = evaluate_coco(args.results, args.annotations)
        if args.json:
            write_json(args.json, report)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
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
