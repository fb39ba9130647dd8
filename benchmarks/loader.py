"""Training samples a second on one core, beside bare ``cv2.imread`` of the same files.

    python -m benchmarks.loader --root VOCdevkit [--size 512 300] [--workers 2] [--json OUT]

The claim: reading, augmentation and collation together reach at least 0.4 of the rate at which
OpenCV alone decodes the pictures, in one process on one core. It is the path of training, from
``VOCDetection`` to the batches of ``training_loader``, in a process that is set up as a loading
process is. The files are in the page cache after the first round, which does not count. --workers
adds as many loading processes on all cores, --cache the samples from decoded pictures; the first
batches of all have to be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.timing import CPU, machine, medians, write
from data.cache import open_cache
from data.image_sets import parse_image_sets
from data.loading import EpochSampler, Loader, TrainingSet, set_up_loading, training_loader
from data.transforms import SSDAugmentation
from data.voc0712 import VOCDetection
from data.voc_xml import list_image_sets
from utils.errors import UserError

SEED = 0


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Be a loading process, on one core where the system can bind a process to it."""
    threads, cv2_threads = torch.get_num_threads(), cv2.getNumThreads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    set_up_loading()
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
        cv2.setNumThreads(cv2_threads)


def open_sets(root: Path, sets: str | None) -> VOCDetection:
    """The image sets of --sets, else every trainval set that ``root`` has."""
    existing = list_image_sets(root)
    usual = [each for each in existing if each.name == "trainval"]
    chosen = parse_image_sets(sets, existing) if sets else usual
    if not chosen:
        raise UserError(f"{root}: no image set trainval; name others with --sets")
    return VOCDetection(root, chosen)


def spans(sampler: EpochSampler, steps: int) -> Iterator[tuple[int, int]]:
    """(epoch, first step in it) that yield so many steps in all."""
    epoch = 0
    while steps > 0:
        yield epoch, max(0, sampler.steps - steps)
        steps -= sampler.steps
        epoch += 1


def load(loader: Loader, steps: int) -> None:
    for span in spans(loader.batch_sampler, steps):
        loader.batch_sampler.set_epoch(*span)
        for _ in loader:
            pass


def files(dataset: VOCDetection, sampler: EpochSampler, steps: int) -> list[str]:
    """The files that ``load`` reads, in its order."""
    found = []
    for epoch, start in spans(sampler, steps):
        sampler.set_epoch(epoch, start)
        for step in range(start, sampler.steps):
            found += [str(dataset.image_path(i)) for i in sampler.batch(step)]
    return found


def first_batch(loader: Loader) -> list[torch.Tensor]:
    loader.batch_sampler.set_epoch(0, 0)
    images, targets, _ = next(iter(loader))
    return [images, *targets]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--root", type=Path, required=True, help="a devkit, or a folder in VOC layout")
    p.add_argument("--sets", help="e.g. 2007_trainval,2012_trainval; default: all trainval sets")
    p.add_argument("--size", type=int, nargs="+", default=[512])
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--pictures", type=int, default=384, help="of a round, at least")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--workers", type=int, nargs="+", default=[], help="loading processes")
    p.add_argument("--cache", help="memory, or a folder: time samples from decoded pictures, too")
    p.add_argument("--json", type=Path, help="a file, or - for the last line of the output")
    args = p.parse_args(argv)
    try:
        dataset = open_sets(args.root, args.sets)
        pull = open_cache(args.cache or "off", dataset)
    except UserError as error:
        p.error(str(error))

    def loader(size: int, workers: int, pull) -> Loader:
        samples = TrainingSet(dataset, SSDAugmentation(size), SEED, pull)
        sampler = EpochSampler(len(dataset), args.batch, SEED)
        return training_loader(samples, sampler, workers, pin_memory=False)

    loaders = {}
    for size in args.size:
        plain = loaders[size, "one core"] = loader(size, 0, None)
        if pull:
            loaders[size, f"one core, --cache {args.cache}"] = loader(size, 0, pull)
        for workers in args.workers:
            loaders[size, f"{workers} processes"] = loader(size, workers, None)
        expected = first_batch(plain)
        for key, other in loaders.items():
            if key[0] == size and not all(map(torch.equal, first_batch(other), expected)):
                raise AssertionError(f"{key}: other samples")

    sampler = plain.batch_sampler
    steps = -(-args.pictures // sampler.batch_size)
    paths = files(dataset, sampler, steps)

    def imread() -> None:
        with one_core():
            for path in paths:
                cv2.imread(path)

    def run(loader: Loader) -> None:
        with contextlib.nullcontext() if loader.num_workers else one_core():
            load(loader, steps)

    calls = {"cv2.imread": imread} | {key: partial(run, loaders[key]) for key in loaders}
    times = medians(calls, args.rounds, CPU, warm_up=1)
    rates = {key: len(paths) / seconds for key, seconds in times.items()}
    decoded = rates.pop("cv2.imread")
    rows = [
        {"size": size, "what": what, "samples_per_second": rate, "ratio": rate / decoded}
        for (size, what), rate in rates.items()
    ]
    sets = ",".join(map(str, dataset.image_sets))
    print(machine(CPU))
    print(f"{len(dataset)} pictures ({sets}), {len(paths)} a round; {decoded:.0f} a second decoded")
    for row in rows:
        rate = f"{row['samples_per_second']:7.1f} samples/s"
        print(f"{row['size']:4} {row['what']:28} {rate}   x{row['ratio']:.3f} of cv2.imread")
    content = {
        "samples_per_second_one_core": rows[0]["samples_per_second"],
        "cv2_imread_per_second": decoded,
        "ratio": rows[0]["ratio"],
        "size": args.size[0],
        "batch": sampler.batch_size,
        "pictures": len(dataset),
        "rows": rows,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "opencv": cv2.__version__,
        },
    }
    write(args.json, CPU, **content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
