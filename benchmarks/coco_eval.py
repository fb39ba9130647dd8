"""The twelve COCO numbers by each backend, as ratios to plain pycocotools in the same run.

    python -m benchmarks.coco_eval [--images 5000] [--detections 100] [--commands] [--json OUT]

The claim: for 5,000 pictures with 100 detections each, hotcoco is at least 20 times faster, and
every digit is equal. The set is made up: 80 categories, some rare; scores of 3 digits, so that many
are equal; crowds. Every call gets the same detections as a list in memory and the annotation file,
and has everything to do from there; --commands times `python -m data.coco_eval` on files, too, all
of which have to print the same.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.timing import CPU, machine, medians, write
from data.coco_eval import BACKENDS, evaluate_coco, load_backend
from utils.errors import UserError

CATEGORIES = 80
REFERENCE = "pycocotools itself"


def make_set(images: int, detections: int, seed: int = 0) -> tuple[dict, list[dict]]:
    """(annotation document, detections): 7 objects a picture, as in val2017."""
    rng = np.random.default_rng(seed)
    count, total = 7 * images, images * detections
    image = np.sort(rng.integers(0, images, count))
    category = np.minimum(rng.geometric(0.05, count), CATEGORIES)
    sides = np.exp(rng.normal(4, 1, (count, 2))).clip(2, 400)
    boxes = np.hstack([rng.random((count, 2)) * ([640, 480] - sides).clip(0), sides]).round(2)
    areas = (boxes[:, 2:].prod(1) * rng.uniform(0.4, 1, count)).round(4)
    crowds = (rng.random(count) < 0.01).astype(int)
    columns = (image + 1, category, boxes, areas, crowds)
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    rows = zip(range(1, count + 1), *(c.tolist() for c in columns), strict=True)
    document = {
        "images": [{"id": id, "width": 640, "height": 480} for id in range(1, images + 1)],
        "categories": [{"id": id, "name": f"category {id}"} for id in range(1, CATEGORIES + 1)],
        "annotations": [dict(zip(keys, row, strict=True)) for row in rows],
    }
    # Three in five are near an object of their picture, the others anywhere.
    owner = np.repeat(np.arange(images), detections)
    first, last = (np.searchsorted(image, owner, side) for side in ("left", "right"))
    near = (rng.random(total) < 0.6) & (last > first)
    source = np.where(near, first + (rng.random(total) * (last - first)).astype(int), 0)
    found = boxes[source] + rng.normal(0, 0.1, (total, 4)) * np.tile(boxes[source, 2:], 2)
    found[~near] = (rng.random((total, 4)) * [400, 300, 200, 150])[~near]
    found[:, 2:] = found[:, 2:].clip(1)
    same = near & (rng.random(total) < 0.7)
    label = np.where(same, category[source], rng.integers(1, CATEGORIES + 1, total))
    scores = (rng.random(total) * np.where(same, 1, 0.7)).round(3)
    columns = (owner + 1, label, found.round(4), scores)
    keys = ("image_id", "category_id", "bbox", "score")
    rows = zip(*(c.tolist() for c in columns), strict=True)
    return document, [dict(zip(keys, row, strict=True)) for row in rows]


def plain(records: list[dict], truth: Path) -> list[float]:
    """pycocotools as its own example uses it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        objects = COCO(str(truth))
        evaluation = COCOeval(objects, objects.loadRes(records), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def by_backend(backend: str, records: list[dict], truth: Path) -> list[float]:
    return evaluate_coco(records, truth, backend)["stats"]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--images", type=int, default=5000)
    p.add_argument("--detections", type=int, default=100, help="of a picture")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--commands", action="store_true", help="time the command line, too")
    p.add_argument("--json", type=Path)
    args = p.parse_args(argv)
    versions, stats, printed = {}, {}, {}
    for backend in BACKENDS:
        try:
            _, versions[backend] = load_backend(backend)
        except UserError as error:
            print(f"left out: {error}")
    document, records = make_set(args.images, args.detections)
    written_into = [dict(record) for record in records]  # pycocotools does that, to the same effect
    with tempfile.TemporaryDirectory() as folder:
        truth, results = Path(folder) / "truth.json", Path(folder) / "results.json"
        truth.write_text(json.dumps(document))
        results.write_text(json.dumps(records))

        def reference() -> None:
            stats[REFERENCE] = plain(written_into, truth)

        def score(backend: str) -> None:
            stats[versions[backend]] = by_backend(backend, records, truth)

        def command(backend: str) -> None:
            line = [sys.executable, "-m", "data.coco_eval", str(results), str(truth)]
            line += ["--eval-backend", backend]
            done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
            printed[f"command, {backend}"] = done.stdout

        calls = {REFERENCE: reference}
        calls |= {versions[b]: partial(score, b) for b in versions if b != BACKENDS[0]}
        if args.commands:
            calls |= {f"command, {b}": partial(command, b) for b in versions}
        times = medians(calls, args.rounds, CPU, warm_up=0)

    objects = len(document["annotations"])
    print(machine(CPU))
    print(
        f"{args.images} pictures, {objects} objects, {len(records)} detections; the twelve numbers"
    )
    for name in stats:
        gap = np.abs(np.subtract(stats[name], stats[REFERENCE])).max()
        digits = "every digit equal" if gap == 0 else f"differs by {gap:.1e} at most"
        ratio = f"x{times[REFERENCE] / times[name]:.1f}"
        print(f"{name:25} {times[name]:8.3f} s   {ratio:8} {digits}")
        if not gap <= (0 if name.startswith("hotcoco") else 1e-14):  # NaN is not, either
            raise AssertionError(f"{name}: {stats[name]}, pycocotools: {stats[REFERENCE]}")
    by_reference = f"command, {BACKENDS[0]}"
    for name, text in printed.items():
        print(f"{name:25} {times[name]:8.3f} s   x{times[by_reference] / times[name]:.1f}")
        if text != printed[by_reference]:
            raise AssertionError(f"{name} prints\n{text}and not\n{printed[by_reference]}")
    write(args.json, CPU, detections=len(records), seconds=times, stats=stats)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
