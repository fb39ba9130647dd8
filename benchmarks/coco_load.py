"""Seconds and memory of reading train2017's annotations, beside json.load's and pycocotools'.

    python -m benchmarks.coco_load [--images 118287] [--boxes 860001] [--rounds 3] [--json OUT]

The claim: seconds, about what json.load alone takes; less memory than pycocotools, in the main
process and above all in the workers, where arrays stay shared. The annotation file is made up in
the size of train2017's (outlines, licences and links included); the pictures are empty files.
Every measurement is a process of its own: seconds of the call, its peak and what is left after it,
both beyond what the imports take. A worker's memory is what it holds alone (USS) after it was asked
for every target and every picture's place once: the reader's in a DataLoader, pycocotools' as a
data set does it (loadAnns, loadImgs).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from torch.utils.data import DataLoader, Dataset

from benchmarks.timing import CPU, machine, write
from data.coco import COCODetection

MIB = 2**20


def make_root(root: Path, images: int, boxes: int, seed: int = 0) -> Path:
    """Write a COCO root with a train2017 of this size; returns its annotation file."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(581_929, images, replace=False)).tolist()
    (root / "annotations").mkdir(parents=True)
    (root / "train2017").mkdir()
    for id in ids:
        (root / "train2017" / f"{id:012d}.jpg").touch()
    path = root / "annotations" / "instances_train2017.json"
    owner = rng.integers(0, images, boxes)
    sides = np.exp(rng.normal(4, 1, (boxes, 2))).clip(2, 400)
    corner = rng.random((boxes, 2)) * ([640, 480] - sides)
    box = np.hstack([corner, sides]).round(2).tolist()
    points = rng.geometric(1 / 20, boxes) + 3  # of an outline
    with open(path, "w") as file:
        file.write('{"info": {"year": 2017}, "licenses": [], "images": [')
        for n, id in enumerate(ids):
            name = f"{id:012d}.jpg"
            record = {
                "license": 3, "file_name": name, "height": 480, "width": 640, "id": id,
                "coco_url": f"http://images.cocodataset.org/train2017/{name}",
                "date_captured": "2013-11-14 11:18:45",
                "flickr_url": f"http://farm9.staticflickr.com/8186/{id:010d}_3c2b1d6d41_z.jpg",
            }  # fmt: skip
            file.write(", " * (n > 0) + json.dumps(record))
        file.write('], "annotations": [')
        for n in range(boxes):
            x, y, w, h = box[n]
            outline = (rng.random((points[n], 2)) * [w, h] + [x, y]).round(2).ravel().tolist()
            crowd = n % 86 == 0  # 10,000 of them
            runs = {"counts": [n % 997] * 200, "size": [480, 640]}
            record = {
                "segmentation": runs if crowd else [outline],
                "area": round(w * h * 0.6, 4), "iscrowd": int(crowd), "image_id": ids[owner[n]],
                "bbox": box[n], "category_id": n % 80 + 1, "id": 900_000 + n,
            }  # fmt: skip
            file.write(", " * (n > 0) + json.dumps(record))
        categories = [{"id": k, "name": f"category {k}"} for k in range(1, 81)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    return path


def resident(field: str = "VmRSS") -> int:
    """KiB of this process by /proc; "VmHWM" is the most there ever was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def private() -> int:
    """KiB that this process shares with no other (USS)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def load_json(path: Path) -> Callable[[], object] | None:
    with open(path) as file:
        kept = json.load(file)
    return kept.clear  # holds the records, as the others do


def load_pycocotools(path: Path) -> Callable[[], object]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))

    def walk() -> None:
        for id in coco.imgs:
            coco.loadAnns(coco.getAnnIds(id)), coco.loadImgs(id)

    return walk


def load_reader(path: Path) -> Callable[[], object]:
    return Walk(COCODetection(path.parent.parent, [("2017", "train")]))


class Walk:
    """Calls everything that a loader's worker asks the reader for, but the pictures' content."""

    def __init__(self, dataset: COCODetection):
        self.dataset = dataset

    def __call__(self) -> None:
        for i in range(len(self.dataset)):
            self.dataset.target(i), self.dataset.image_path(i), self.dataset.image_size(i)


class InWorker(Dataset):
    """One item: what a worker holds alone more after the walk than before it, in KiB."""

    def __init__(self, walk: Callable[[], object]):
        self.walk = walk

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> int:
        before = private()
        self.walk()
        return private() - before


LOADERS = {"json.load": load_json, "pycocotools": load_pycocotools, "reader": load_reader}


def measure(name: str, path: Path) -> dict[str, float]:
    """Seconds and MiB of one loader in this, a fresh, process."""
    before, start = resident(), time.perf_counter()
    walk = LOADERS[name](path)
    report = {"seconds": time.perf_counter() - start}
    report["peak"] = (resident("VmHWM") - before) / 1024
    report["left"] = (resident() - before) / 1024
    if name != "json.load":
        loader = DataLoader(
            InWorker(walk), batch_size=None, num_workers=1, multiprocessing_context="fork"
        )
        report["worker"] = next(iter(loader)) / 1024
    if name == "reader":
        report["sent"] = len(ForkingPickler.dumps(walk)) / MIB  # to a spawned worker
    return report


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--images", type=int, default=118_287)
    p.add_argument("--boxes", type=int, default=860_001)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--json", type=Path)
    args = p.parse_args(argv)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in LOADERS}
    with tempfile.TemporaryDirectory() as folder:
        path = make_root(Path(folder), args.images, args.boxes)
        size = path.stat().st_size / 1e6
        spawn = multiprocessing.get_context("spawn")
        for _ in range(args.rounds):
            for name in LOADERS:
                with ProcessPoolExecutor(1, spawn) as executor:
                    rounds[name].append(executor.submit(measure, name, path).result())
    medians = {
        name: {key: statistics.median(r[key] for r in found) for key in found[0]}
        for name, found in rounds.items()
    }
    print(machine(CPU))
    print(f"{args.images} pictures, {args.boxes} boxes, a file of {size:.0f} MB; MiB of memory")
    for name, found in medians.items():
        line = f"{name:12} {found['seconds']:6.2f} s (x{ratio(medians, name, 'seconds'):.2f})"
        line += f"   peak {found['peak']:6.0f}   left {found['left']:6.0f}"
        if "worker" in found:
            line += f"   a forked worker {found['worker']:6.1f}"
        if "sent" in found:
            line += f", another one {found['sent']:.1f}"
        print(line)
    write(args.json, CPU, images=args.images, boxes=args.boxes, megabytes=size, medians=medians)
    return 0


def ratio(medians: dict, name: str, key: str) -> float:
    return medians[name][key] / medians["json.load"][key]


if __name__ == "__main__":
    raise SystemExit(main())
