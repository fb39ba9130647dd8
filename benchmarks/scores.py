"""Scoring of detections: COCO's numbers beside pycocotools, and VOC's AP.

    python -m benchmarks.scores coco [--images 5000] [--detections 100] [--commands]
    python -m benchmarks.scores voc [--images 4952] [--detections 200] [--json OUT]

All data are made up. `coco` claims: for 5,000 images with 100 detections each, hotcoco is at least
20 times faster than pycocotools, and every digit is equal. Some objects are crowds. --commands also
times `python -m data.coco_eval` on files; all backends must print the same.

`voc` claims: 4,952 images and 20 classes, as in VOC2007 test, take less than four seconds from
comp4 files, with annotations in memory, to the AP of all objects and of three sizes.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.harness import Rows, options, program, race, run
from data.annotation import Annotation
from data.coco_eval import BACKENDS, evaluate_coco, load_backend
from data.config import VOC_CLASSES
from data.voc_comp4 import read_comp4, write_comp4
from data.voc_eval import METRICS, evaluate_voc, voc_truth
from utils.arguments import positive
from utils.errors import UserError, command

CATEGORIES = [{"id": id, "name": f"category {id}"} for id in range(1, 81)]
REFERENCE = "pycocotools itself"


class MadeUp(NamedTuple):
    """Objects and detections of every image. Boxes are x, y, width, height."""

    labels: np.ndarray  # [images, objects], as are the boxes
    boxes: np.ndarray
    found_labels: np.ndarray  # [images, detections], as are the two below
    found_boxes: np.ndarray
    scores: np.ndarray


def make_up(images: int, objects: int, detections: int, classes: int) -> MadeUp:
    """Return ``objects`` and ``detections`` an image of 640 x 480 pixels; some classes are rare.

    Three in five detections lie near an object of their image, the others anywhere. Many scores are
    equal.
    """
    rng = np.random.default_rng(0)
    labels = np.minimum(rng.geometric(4 / classes, (images, objects)), classes)
    sides = np.exp(rng.normal(4, 1, (images, objects, 2))).clip(2, (512, 384))
    boxes = np.concatenate([rng.random(sides.shape) * ((640, 480) - sides), sides], 2)
    of = rng.integers(0, objects, (images, detections))
    near, right = rng.random((2, *of.shape)) < 0.6
    found = np.take_along_axis(boxes, of[..., None], 1)
    found += rng.normal(0, 0.1, found.shape) * np.tile(found[..., 2:], 2)
    found[~near] = (rng.random(found.shape) * [400, 300, 200, 150])[~near]
    found[..., 2:] = found[..., 2:].clip(1)
    others = rng.integers(1, classes + 1, of.shape)
    found_labels = np.where(near & right, np.take_along_axis(labels, of, 1), others)
    scores = (rng.random(of.shape) * np.where(near & right, 1, 0.7)).round(3)
    return MadeUp(labels, boxes, found_labels, found, scores)


# ---------------------------------------------------------------- COCO


def make_coco(images: int, detections: int) -> tuple[dict, list[dict]]:
    """Return (annotation document, detections), with 7 objects an image as in val2017."""
    made, rng = make_up(images, 7, detections, len(CATEGORIES)), np.random.default_rng(1)
    shape = made.labels.shape
    areas = (made.boxes[..., 2:].prod(2) * rng.uniform(0.4, 1, shape)).round(4)
    objects = records(category_id=made.labels, bbox=made.boxes.round(2), area=areas,
                      id=np.arange(1, areas.size + 1).reshape(shape),
                      iscrowd=(rng.random(shape) < 0.01).astype(int))
    document = {"images": [{"id": id, "width": 640, "height": 480} for id in range(1, images + 1)],
                "categories": CATEGORIES, "annotations": objects}
    return document, records(category_id=made.found_labels, bbox=made.found_boxes.round(4),
                             score=made.scores)


def records(**columns: np.ndarray) -> list[dict]:
    """Return a dict for each place of arrays [images, n, ...], with the number of its image."""
    images, n = next(iter(columns.values())).shape[:2]
    columns["image_id"] = np.arange(1, images + 1).repeat(n).reshape(images, n)
    rows = zip(*(column.reshape(images * n, *column.shape[2:]).tolist()
                 for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def plain_coco(found: list[dict], truth: Path) -> list[float]:
    """Return the twelve numbers by pycocotools, used as its own example does."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        objects = COCO(str(truth))
        evaluation = COCOeval(objects, objects.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def by_backend(backend: str, found: list[dict], truth: Path) -> list[float]:
    return evaluate_coco(found, truth, backend)["stats"]


def by_command(backend: str, results: Path, truth: Path) -> str:
    line = [sys.executable, "-m", "data.coco_eval", results, truth, "--eval-backend", backend]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


def difference(name: str, ours: object, theirs: object) -> str:
    """Return how two backends differ, in words; raise AssertionError if they differ too much.

    The printed tables must equal pycocotools'. Numbers may differ by rounding.
    """
    if isinstance(ours, str):
        if ours != theirs:
            raise AssertionError(f"{name} prints\n{ours}and pycocotools\n{theirs}")
        return "the same table"
    gap = np.abs(np.subtract(ours, theirs)).max()
    if not gap <= 1e-14:  # NaN fails, too
        raise AssertionError(f"{name}: {ours}, pycocotools: {theirs}")
    return "every digit equal" if gap == 0 else f"differs by {gap:.1e} at most"


def coco(args: argparse.Namespace, device: torch.device) -> Rows:
    versions = {}
    for backend in BACKENDS:
        with contextlib.suppress(UserError):  # not installed
            _, versions[backend] = load_backend(backend)
    document, found = make_coco(args.images, args.detections)
    written_into = [dict(record) for record in found]  # pycocotools adds keys
    with tempfile.TemporaryDirectory() as folder:
        truth, results = Path(folder, "truth.json"), Path(folder, "results.json")
        truth.write_text(json.dumps(document))
        results.write_text(json.dumps(found))
        calls = {REFERENCE: partial(plain_coco, written_into, truth)}
        calls |= {version: partial(by_backend, b, found, truth)
                  for b, version in versions.items() if b != BACKENDS[0]}
        if args.commands:
            calls |= {f"command, {b}": partial(by_command, b, results, truth) for b in versions}
        times, outcomes = race(calls, args.rounds, device, warm_up=0)
    for name in times:
        reference = f"command, {BACKENDS[0]}" if name.startswith("command") else REFERENCE
        yield {"scorer": name, "images": args.images, "detections": len(found),
               "seconds": {"median": times[name]}, "times faster": times[reference] / times[name],
               "result": difference(name, outcomes[name], outcomes[reference])}


# ---------------------------------------------------------------- VOC


def make_voc(images: int, detections: int) -> tuple[list[Annotation], list[dict]]:
    """Return (annotations, detections) of each image, 3 objects an image."""
    made = make_up(images, 3, detections, len(VOC_CLASSES))
    for boxes in (made.boxes, made.found_boxes):
        boxes[..., 2:] += boxes[..., :2]
    difficult = np.random.default_rng(1).random(made.labels.shape) < 0.15
    annotations = [
        Annotation(Path("made.xml"), (640, 480), tuple(VOC_CLASSES[k - 1] for k in labels), *rest)
        for labels, *rest in zip(made.labels, made.boxes.round(), difficult, strict=True)]
    found = zip(made.found_boxes.astype(np.float32), made.scores.astype(np.float32),
                made.found_labels, strict=True)
    return annotations, [dict(zip(("boxes", "scores", "labels"), each, strict=True))
                         for each in found]


def score(folder: Path, ids: list[str], annotations: list[Annotation]) -> dict:
    found, _ = read_comp4(folder, "test", VOC_CLASSES, ids)
    truth = voc_truth(annotations, VOC_CLASSES)
    return evaluate_voc(found, truth, VOC_CLASSES, len(ids))


def voc(args: argparse.Namespace, device: torch.device) -> Rows:
    annotations, results = make_voc(args.images, args.detections)
    ids = [f"{n:06d}" for n in range(args.images)]
    with tempfile.TemporaryDirectory() as folder:
        write_comp4(folder, "test", VOC_CLASSES, ids, results)
        calls = {"scoring": partial(score, Path(folder), ids, annotations)}
        times, outcomes = race(calls, args.rounds, device, warm_up=0)
    result = outcomes["scoring"]
    yield {"images": args.images, "detections": sum(result["detections"].values()),
           "seconds": times, "AP": {metric: result[metric]["mean"] for metric in METRICS}}


def parser() -> argparse.ArgumentParser:
    p = program("scores", __doc__)
    commands = p.add_subparsers(required=True, metavar="COMMAND")
    for rows, images, detections in (coco, 5000, 100), (voc, 4952, 200):
        q = commands.add_parser(rows.__name__, parents=[options(rows, 3)])
        q.add_argument("--images", type=positive, default=images)
        q.add_argument("--detections", type=positive, default=detections, help="an image")
        if rows is coco:
            q.add_argument("--commands", action="store_true", help="time the command line, too")
    return p


main = command(partial(run, parser))

if __name__ == "__main__":
    raise SystemExit(main())
