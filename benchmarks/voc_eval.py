"""VOC's average precision from comp4 files, beside a loop over the detections of each class.

    python -m benchmarks.voc_eval [--images 4952] [--detections 200] [--json OUT]

The claim: 4,952 pictures and 20 classes, as many as in VOC2007 test, take less than two seconds.
The set is made up. The loop goes through files and detections one by one, as the published code
does, for all sizes together; `data.voc_eval` gives small, medium and large objects, too. Both start
from the comp4 files and the annotations in memory; every point of every curve has to be the same.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.timing import CPU, machine, medians, write
from data.config import VOC_CLASSES
from data.voc_comp4 import comp4_path, read_comp4, write_comp4
from data.voc_eval import METRICS, evaluate_voc
from data.voc_xml import Annotation


def make_set(images: int, detections: int, seed: int = 0) -> tuple[list[Annotation], list[dict]]:
    """(annotations, detections) of each picture: 2.4 objects, as in VOC2007 test."""
    rng = np.random.default_rng(seed)
    names, classes = np.array(VOC_CLASSES), len(VOC_CLASSES)
    annotations, results = [], []
    for _ in range(images):
        count = 1 + rng.poisson(1.4)
        labels = rng.integers(0, classes, count)
        corners, sides = (
            rng.random((count, 2)) * [300, 225],
            8 + rng.random((count, 2)) * [180, 130],
        )
        boxes = np.hstack([corners, corners + sides]).round()
        difficult = rng.random(count) < 0.15
        name = tuple(names[labels].tolist())
        annotations.append(Annotation(Path("made.xml"), (500, 375), name, boxes, difficult))
        near = rng.integers(0, count, detections)
        moves = rng.normal(0, 0.1, (detections, 4)) * np.tile(sides[near], 2)
        found = boxes[near] + moves
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        same = rng.random(detections) < 0.5
        other = rng.integers(0, classes, detections)
        results.append(
            {
                "boxes": found.astype(np.float32),
                "scores": rng.random(detections, np.float32).round(4),
                "labels": 1 + np.where(same, labels[near], other),
            }
        )
    return annotations, results


def loop(folder: Path, ids: list[str], annotations: list[Annotation], name: str) -> tuple:
    """(recall, precision) of one class, line by line and detection by detection."""
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
        box, best = boxes[k], -np.inf
        if len(truth):
            width = np.minimum(truth[:, 2], box[2]) - np.maximum(truth[:, 0], box[0]) + 1
            height = np.minimum(truth[:, 3], box[3]) - np.maximum(truth[:, 1], box[1]) + 1
            shared = np.maximum(width, 0) * np.maximum(height, 0)
            area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
            areas = (truth[:, 2] - truth[:, 0] + 1) * (truth[:, 3] - truth[:, 1] + 1)
            overlaps = shared / (area + areas - shared)
            best, which = overlaps.max(), overlaps.argmax()
        if best <= 0.5:
            wrong[n] = 1
        elif not difficult[which]:
            (wrong if taken[which] else correct)[n] = 1
            taken[which] = True
    hits, misses = correct.cumsum(), wrong.cumsum()
    return hits / max(total, 1), hits / np.maximum(hits + misses, 1)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--images", type=int, default=4952)
    p.add_argument("--detections", type=int, default=200, help="of a picture")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--json", type=Path)
    args = p.parse_args(argv)
    annotations, results = make_set(args.images, args.detections)
    ids = [f"{n:06d}" for n in range(args.images)]
    outcome = {}
    with tempfile.TemporaryDirectory() as folder:

        def write_files() -> None:
            write_comp4(folder, "test", VOC_CLASSES, ids, results)

        def read() -> None:
            outcome["found"], _ = read_comp4(folder, "test", VOC_CLASSES, ids)

        def score() -> None:
            outcome["result"] = evaluate_voc(outcome["found"], annotations, VOC_CLASSES)

        def loops() -> None:
            outcome["curves"] = {
                name: loop(Path(folder), ids, annotations, name) for name in VOC_CLASSES
            }

        calls = {"write": write_files, "read": read, "score": score, "loop": loops}
        times = medians(calls, args.rounds, CPU, warm_up=0)
    result = outcome["result"]
    for name, (recall, precision) in outcome["curves"].items():
        curve = result["curves"][name]["all"]
        if not np.array_equal(curve["recall"], recall):
            raise AssertionError(f"{name}: the recalls differ")
        if not np.array_equal(curve["precision"], precision):
            raise AssertionError(f"{name}: the precisions differ")
    both = times["read"] + times["score"]
    objects = sum(len(annotation.names) for annotation in annotations)
    count = sum(result["detections"].values())
    means = ", ".join(f"{title} {result[m]['mean']:.4f}" for m, title in METRICS.items())
    print(machine(CPU))
    print(f"{args.images} pictures, {objects} objects, {count} detections; {means}")
    print(f"write the files           {times['write']:8.3f} s")
    print(f"read and score them       {both:8.3f} s   x{times['loop'] / both:.1f}")
    print(f"  read {times['read']:.3f} s, score {times['score']:.3f} s, all four sizes")
    print(f"a loop over everything    {times['loop']:8.3f} s   every point of every curve equal")
    write(args.json, CPU, detections=count, seconds=times)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
