"""Training samples a second on one core, beside bare ``cv2.imread`` of the same files.

    python -m benchmarks.loader --root VOCdevkit [--size 512 300] [--workers 2] [--json OUT]

The claim: reading, augmentation and collation together reach at least 0.4 of the rate at which
OpenCV alone decodes the images, in one process of one thread. The path is that of training, from
``VOCDetection`` to the batches of ``training_loader``, in a process set up as a loading process.
The files are in the page cache after the first round, which does not count. A round takes the first
--images of the sets, or fewer images several times. --workers adds loading processes,
--cache the samples from decoded images; the first batches of all must be equal bit by bit.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import cv2
import torch

from benchmarks.harness import Rows, options, program, race, run
from data.cache import open_cache
from data.loading import EpochSampler, Loader, TrainingSet, set_up_loading, training_loader
from data.transforms import SSDAugmentation
from data.voc0712 import VOCDetection, list_image_sets
from utils.arguments import positive
from utils.errors import UserError, command

SEED = 0


def open_sets(root: Path) -> VOCDetection:
    """Open every trainval set under ``root``."""
    chosen = [each for each in list_image_sets(root) if each.name == "trainval"]
    if not chosen:
        raise UserError(f"{root} has no image set trainval; give --root another folder")
    return VOCDetection(root, chosen)


def epochs(sampler: EpochSampler, count: int) -> Iterator[None]:
    for epoch in range(count):
        sampler.set_epoch(epoch, 0)
        yield


def load(loader: Loader, count: int) -> None:
    for _ in epochs(loader.batch_sampler, count):
        for _ in loader:
            pass


def imread(paths: list[str]) -> None:
    for path in paths:
        cv2.imread(path)


def loaders_of(args: argparse.Namespace, dataset: VOCDetection) -> dict[tuple[int, str], Loader]:
    """Return the loaders to time by (size, way)."""
    ways = {"one thread": (0, None)}
    if args.cache:
        ways[f"one thread, --cache {args.cache}"] = 0, open_cache(args.cache, dataset)
    ways |= {f"{workers} processes": (workers, None) for workers in args.workers}
    loaders = {}
    for size, (way, (workers, pull)) in product(args.size, ways.items()):
        samples = TrainingSet(dataset, SSDAugmentation(size), SEED, pull)
        sampler = EpochSampler(min(args.images, len(dataset)), args.batch, SEED)
        loaders[size, way] = training_loader(samples, sampler, workers, pin_memory=False)
    return loaders


def first_batch(loader: Loader) -> list[torch.Tensor]:
    images, targets, _ = next(iter(loader))
    return [images, *targets]


def load_all(args: argparse.Namespace, device: torch.device) -> Rows:
    torch.set_num_threads(1)
    set_up_loading()
    dataset = open_sets(args.root)
    loaders = loaders_of(args, dataset)
    for (size, way), loader in loaders.items():
        expected = first_batch(loaders[size, "one thread"])
        if not all(map(torch.equal, first_batch(loader), expected)):
            raise AssertionError(f"{size} px, {way}: other samples")
    sampler = loaders[args.size[0], "one thread"].batch_sampler
    count = -(-args.images // (sampler.steps * sampler.batch_size))
    paths = [str(dataset.image_path(i)) for _ in epochs(sampler, count)
             for batch in sampler for _, i in batch]
    calls = {"cv2.imread": partial(imread, paths)}
    calls |= {key: partial(load, loader, count) for key, loader in loaders.items()}
    times, _ = race(calls, args.rounds, device, warm_up=1)
    decoding = times.pop("cv2.imread")
    for (size, way), seconds in times.items():
        yield {"size": size, "way": way, "images": sampler.length, "samples": len(paths),
               "samples a second": len(paths) / seconds, "cv2.imread": len(paths) / decoding,
               "ratio": decoding / seconds}


def parser() -> argparse.ArgumentParser:
    p = program("loader", __doc__, options(load_all, 7))
    p.add_argument("--root", type=Path, required=True, help="a devkit, or a folder in VOC layout")
    p.add_argument("--size", type=positive, nargs="+", default=[512])
    p.add_argument("--batch", type=positive, default=32)
    p.add_argument("--images", type=positive, default=384, help="about as many a round")
    p.add_argument("--workers", type=positive, nargs="+", default=[], help="loading processes")
    p.add_argument("--cache", help="memory, or a folder: time samples from decoded images, too")
    return p


main = command(partial(run, parser))

if __name__ == "__main__":
    raise SystemExit(main())
