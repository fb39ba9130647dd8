"""Training samples a second on one core, beside bare ``cv2.imread`` of the same files.

    python -m benchmarks.loader --root VOCdevkit [--size 512 300] [--workers 2] [--json OUT]

The claim: reading, augmentation and collation together reach at least 0.4 of the rate at which
OpenCV alone decodes the images, in one process on one core. The path is that of training, from
``VOCDetection`` to the batches of ``training_loader``, in a process set up as a loading process.
The files are in the page cache after the first round, which does not count. --workers adds loading
processes on all cores, --cache the samples from decoded images; the first batches of all must be
equal bit by bit.
"""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.harness import Rows, options, program, race, run, using_threads
from data.cache import open_cache
from data.image_sets import parse_image_sets
from data.loading import EpochSampler, Loader, TrainingSet, set_up_loading, training_loader
from data.transforms import SSDAugmentation
from data.voc0712 import VOCDetection, list_image_sets
from utils.arguments import positive
from utils.errors import UserError, command

SEED = 0


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Be a loading process, bound to one core if the system can do that."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    with using_threads(1):
        set_up_loading()
        if cores:
            os.sched_setaffinity(0, {max(cores)})
        try:
            yield
        finally:
            if cores:
                os.sched_setaffinity(0, cores)


def open_sets(root: Path, sets: str | None) -> VOCDetection:
    """Open the image sets ``sets``, by default every trainval set under ``root``."""
    existing = list_image_sets(root)
    usual = [each for each in existing if each.name == "trainval"]
    chosen = parse_image_sets(sets, existing) if sets else usual
    if not chosen:
        raise UserError(f"{root}: no image set trainval; name others with --sets")
    return VOCDetection(root, chosen)


def spans(sampler: EpochSampler, steps: int) -> Iterator[None]:
    """Set ``sampler`` to each of the epochs that make ``steps`` steps; of the last only its end."""
    for epoch in range(-(-steps // sampler.steps)):
        sampler.set_epoch(epoch, max(0, (epoch + 1) * sampler.steps - steps))
        yield


def load(loader: Loader, steps: int) -> None:
    with contextlib.nullcontext() if loader.num_workers else one_core():
        for _ in spans(loader.batch_sampler, steps):
            for _ in loader:
                pass


def files(dataset: VOCDetection, sampler: EpochSampler, steps: int) -> list[str]:
    return [str(dataset.image_path(i)) for _ in spans(sampler, steps) for batch in sampler
            for _, i in batch]


def imread(paths: list[str]) -> None:
    with one_core():
        for path in paths:
            cv2.imread(path)


def first_batch(loader: Loader) -> list[torch.Tensor]:
    loader.batch_sampler.set_epoch(0, 0)
    images, targets, _ = next(iter(loader))
    return [images, *targets]


def loaders_of(args: argparse.Namespace, dataset: VOCDetection,
               pull: Callable[[int], np.ndarray] | None) -> dict[tuple[int, str], Loader]:
    """Return the loaders to time by (size, what); they give the same samples.

    Raises AssertionError: one does not.
    """
    ways = {"one core": (0, None)}
    if pull:
        ways[f"one core, --cache {args.cache}"] = 0, pull
    ways |= {f"{workers} processes": (workers, None) for workers in args.workers}
    loaders: dict[tuple[int, str], Loader] = {}
    for size in args.size:
        for what, (workers, source) in ways.items():
            samples = TrainingSet(dataset, SSDAugmentation(size), SEED, source)
            sampler = EpochSampler(len(dataset), args.batch, SEED)
            loader = training_loader(samples, sampler, workers, pin_memory=False)
            expected = first_batch(loaders.setdefault((size, "one core"), loader))
            if not all(map(torch.equal, first_batch(loader), expected)):
                raise AssertionError(f"{size} px, {what}: other samples")
            loaders[size, what] = loader
    return loaders


def load_all(args: argparse.Namespace, device: torch.device) -> Rows:
    dataset = open_sets(args.root, args.sets)
    loaders = loaders_of(args, dataset, open_cache(args.cache or "off", dataset))
    sampler = loaders[args.size[0], "one core"].batch_sampler
    steps = -(-args.images // sampler.batch_size)
    paths = files(dataset, sampler, steps)
    calls = {"cv2.imread": partial(imread, paths)}
    calls |= {key: partial(load, loader, steps) for key, loader in loaders.items()}
    times, _ = race(calls, args.rounds, device, warm_up=1)
    decoding = times.pop("cv2.imread")
    for (size, what), seconds in times.items():
        yield {"size": size, "way": what, "images": len(dataset), "samples": len(paths),
               "samples a second": len(paths) / seconds, "cv2.imread": len(paths) / decoding,
               "ratio": decoding / seconds}


def parser() -> argparse.ArgumentParser:
    p = program("loader", __doc__, options(load_all, 7, False))
    p.add_argument("--root", type=Path, required=True, help="a devkit, or a folder in VOC layout")
    p.add_argument("--sets", help="e.g. 2007_trainval,2012_trainval (all trainval sets)")
    p.add_argument("--size", type=positive, nargs="+", default=[512])
    p.add_argument("--batch", type=positive, default=32)
    p.add_argument("--images", type=positive, default=384, help="least number a round")
    p.add_argument("--workers", type=positive, nargs="+", default=[], help="loading processes")
    p.add_argument("--cache", help="memory, or a folder: time samples from decoded images, too")
    return p


main = command(partial(run, parser))

if __name__ == "__main__":
    raise SystemExit(main())
