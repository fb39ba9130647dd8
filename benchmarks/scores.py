"""Scoring of detections, beside the usual programs for it.

    python -m benchmarks.scores coco [--images 5000] [--detections 100] [--commands]
    python -m benchmarks.scores voc [--images 4952] [--detections 200] [--json OUT]

All data are made up. `coco` claims: for 5,000 images with 100 detections each, hotcoco is at least
20 times faster than pycocotools, and every digit is equal. Many scores are equal, some objects are
crowds. --commands also times `python -m data.coco_eval` on files; all backends must print the same.

`voc` claims: 4,952 images and 20 classes, as in VOC2007 test, take less than two seconds. Both
ways start from comp4 files and annotations in memory. The loop follows the published code,
detection by detection, for all object sizes together; every point of every curve must be equal.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.harness import Rows, options, program, race, run
from data.annotation import Annotation
from data.coco_eval import BACKENDS, evaluate_coco, load_backend
from data.config import VOC_CLASSES
from data.voc_comp4 import comp4_path, read_comp4, write_comp4
from data.voc_eval import METRICS, evaluate_voc
from utils.arguments import positive
from utils.errors import UserError, command

CATEGORIES = [{"id": id, "name": f"category {id}"} for id in range(1, 81)]
REFERENCE = "pycocotools itself"


class MadeUp(NamedTuple):
    """Objects and detections, both in the order of their images. Boxes are x, y, width, height."""

    image: np.ndarray
    label: np.ndarray
    boxes: np.ndarray
    found_image: np.ndarray
    found_label: np.ndarray
    found_boxes: np.ndarray
    right: np.ndarray  # whether a detection lies near an object of its class


def make_up(images: int, objects: int, detections: int, classes: int,
            size: Sequence[int] = (640, 480)) -> MadeUp:
    """Return ``objects`` in all and ``detections`` an image; some classes are rare.

    Three in five detections lie near an object of their image, the others anywhere.
    """
    rng = np.random.default_rng(0)
    image = np.sort(rng.integers(0, images, objects))
    label = np.minimum(rng.geometric(4 / classes, objects), classes)
    sides = np.exp(rng.normal(4, 1, (objects, 2))).clip(2, 0.8 * np.array(size))
    boxes = np.hstack([rng.random((objects, 2)) * (size - sides), sides])
    owner, total = np.repeat(np.arange(images), detections), images * detections
    first, last = (np.searchsorted(image, owner, side) for side in ("left", "right"))
    near = (rng.random(total) < 0.6) & (last > first)
    source = np.where(near, first + (rng.random(total) * (last - first)).astype(int), 0)
    found = boxes[source] + rng.normal(0, 0.1, (total, 4)) * np.tile(boxes[source, 2:], 2)
    found[~near] = (rng.random((total, 4)) * [400, 300, 200, 150])[~near]
    found[:, 2:] = found[:, 2:].clip(1)
    right = near & (rng.random(total) < 0.7)
    found_label = np.where(right, label[source], rng.integers(1, classes + 1, total))
    return MadeUp(image, label, boxes, owner, found_label, found, right)


# ---------------------------------------------------------------- COCO


def make_coco(images: int, detections: int) -> tuple[dict, list[dict]]:
    """Return (annotation document, detections), with 7 objects an image as in val2017."""
    made = make_up(images, 7 * images, detections, len(CATEGORIES))
    rng = np.random.default_rng(1)
    count, total = len(made.image), len(made.found_image)
    areas = (made.boxes[:, 2:].prod(1) * rng.uniform(0.4, 1, count)).round(4)
    crowds = (rng.random(count) < 0.01).astype(int)
    scores = (rng.random(total) * np.where(made.right, 1, 0.7)).round(3)
    document = {"images": [{"id": id, "width": 640, "height": 480} for id in range(1, images + 1)],
                "categories": CATEGORIES,
                "annotations": records(id=np.arange(1, count + 1), image_id=made.image + 1,
                                       category_id=made.label, bbox=made.boxes.round(2), area=areas,
                                       iscrowd=crowds)}
    return document, records(image_id=made.found_image + 1, category_id=made.found_label,
                             bbox=made.found_boxes.round(4), score=scores)


def records(**columns: np.ndarray) -> list[dict]:
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
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

    hotcoco and the printed tables must equal pycocotools'. faster-coco-eval may differ by rounding.
    """
    if isinstance(ours, str):
        if ours != theirs:
            raise AssertionError(f"{name} prints\n{ours}and pycocotools\n{theirs}")
        return "the same table"
    gap = np.abs(np.subtract(ours, theirs)).max()
    if not gap <= (0 if name.startswith("hotcoco") else 1e-14):  # NaN fails, too
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
        calls |= {
            versions[b]: partial(by_backend, b, found, truth) for b in versions if b != BACKENDS[0]
        }
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
    """Return (annotations, detections) of each image, 2.4 objects an image as in VOC2007 test."""
    made = make_up(images, int(2.4 * images), detections, len(VOC_CLASSES), (500, 375))
    rng, total = np.random.default_rng(1), len(made.found_image)
    names = np.array(VOC_CLASSES)[made.label - 1]
    difficult = rng.random(len(made.image)) < 0.15
    boxes, found = (
        np.hstack([x[:, :2], x[:, :2] + x[:, 2:]]) for x in (made.boxes.round(), made.found_boxes)
    )
    scores = (1 + rng.permutation(total)) / (total + 1)  # ties would depend on the way to sort
    annotations, results = [], []
    for i in range(images):
        mine = slice(*np.searchsorted(made.image, [i, i + 1]))
        each = tuple(names[mine].tolist()), boxes[mine], difficult[mine]
        annotations.append(Annotation(Path("made.xml"), (500, 375), *each))
        mine = slice(i * detections, (i + 1) * detections)
        columns = {"boxes": found, "scores": scores}
        result = {key: column[mine].astype(np.float32) for key, column in columns.items()}
        results.append({**result, "labels": made.found_label[mine]})
    return annotations, results


def loop(folder: Path, ids: list[str], annotations: list[Annotation], name: str) -> tuple:
    """Return (recall, precision) of one class, line by line and detection by detection."""
    objects, total = {}, 0
    for image_id, annotation in zip(ids, annotations, strict=True):
        mine = [k for k, other in enumerate(annotation.names) if other == name]
        difficult = annotation.difficult[mine]
        objects[image_id] = (annotation.boxes[mine] + 1, difficult, [False] * len(mine))
        total += int((~difficult).sum())
    with open(comp4_path(folder, "test", name)) as file:
        lines = [line.strip().split(" ") for line in file]
    scores = np.array([float(fields[1]) for fields in lines])
    boxes = np.array([[float(value) for value in fields[2:]] for fields in lines]).reshape(-1, 4)
    correct, wrong = np.zeros(len(lines)), np.zeros(len(lines))
    for n, k in enumerate(np.argsort(-scores)):
        truth, difficult, taken = objects[lines[k][0]]
        overlaps = overlaps_of(truth, boxes[k])
        which = overlaps.argmax() if len(truth) else None
        if which is None or overlaps[which] <= 0.5:
            wrong[n] = 1
        elif not difficult[which]:
            (wrong if taken[which] else correct)[n] = 1
            taken[which] = True
    hits, misses = correct.cumsum(), wrong.cumsum()
    return hits / max(total, 1), hits / np.maximum(hits + misses, 1)


def overlaps_of(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    shared = np.maximum(high - low + 1, 0).prod(1)
    area, areas = (box[2:] - box[:2] + 1).prod(), (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
    return shared / (area + areas - shared)


def score(folder: Path, ids: list[str], annotations: list[Annotation]) -> dict:
    found, _ = read_comp4(folder, "test", VOC_CLASSES, ids)
    return evaluate_voc(found, annotations, VOC_CLASSES)


def loops(folder: Path, ids: list[str], annotations: list[Annotation]) -> dict[str, tuple]:
    return {name: loop(folder, ids, annotations, name) for name in VOC_CLASSES}


def voc(args: argparse.Namespace, device: torch.device) -> Rows:
    annotations, results = make_voc(args.images, args.detections)
    ids = [f"{n:06d}" for n in range(args.images)]
    with tempfile.TemporaryDirectory() as folder:
        write_comp4(folder, "test", VOC_CLASSES, ids, results)
        ways = {"ours": score, "loop": loops}
        calls = {name: partial(way, Path(folder), ids, annotations) for name, way in ways.items()}
        times, outcomes = race(calls, args.rounds, device, warm_up=0)
    result = outcomes["ours"]
    for name, curves in outcomes["loop"].items():
        for key, points in zip(("recall", "precision"), curves, strict=True):
            if not np.array_equal(result["curves"][name]["all"][key], points):
                raise AssertionError(f"{name}: another {key} than the loop's")
    yield {"images": args.images, "objects": sum(len(each.names) for each in annotations),
           "detections": sum(result["detections"].values()), "seconds": times,
           "times faster": times["loop"] / times["ours"],
           "AP": {metric: result[metric]["mean"] for metric in METRICS}}


def parser() -> argparse.ArgumentParser:
    p = program("scores", __doc__)
    commands = p.add_subparsers(required=True, metavar="COMMAND")
    q = commands.add_parser("coco", parents=[options(coco, 3, False)], help="COCO's numbers")
    q.add_argument("--images", type=positive, default=5000)
    q.add_argument("--detections", type=positive, default=100, help="an image")
    q.add_argument("--commands", action="store_true", help="time the command line, too")
    q = commands.add_parser("voc", parents=[options(voc, 3, False)], help="VOC's precision")
    q.add_argument("--images", type=positive, default=4952)
    q.add_argument("--detections", type=positive, default=200, help="an image")
    return p


main = command(partial(run, parser))

if __name__ == "__main__":
    raise SystemExit(main())
