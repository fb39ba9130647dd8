"""From a data set to batches: samples that depend on (seed, epoch, index) and on nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler


def detection_collate(batch: list[tuple]) -> tuple:
    """Samples of one size as a batch.

    Args:
        batch: tuples whose first item is an image, an array or tensor [S, S, 3] (or [3, S, S]
            where it is a tensor already), and whose further items are arrays, tensors or numbers.

    Returns:
        The images as one tensor [B, 3, S, S] of their own type, then one list a further item:
        targets stay one tensor [n, 5] per image, since n differs (and may be 0).
    """
    images, *rest = zip(*batch, strict=True)
    lists = [[torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in xs] for xs in rest]
    return torch.stack([_channels_first(image) for image in images]), *lists


def _channels_first(image: np.ndarray | Tensor) -> Tensor:
    if isinstance(image, np.ndarray):
        return torch.from_numpy(image).permute(2, 0, 1)
    return image


class TrainingSet(Dataset):
    """Augmented samples: item (epoch, index) -> (uint8 [S, S, 3], float32 [n, 5], index).

    The random numbers of a sample come from (seed, epoch, index): neither the number of workers
    nor the place in a batch changes it.
    """

    def __init__(self, dataset, augment: Callable, seed: int):
        self.dataset = dataset
        self.augment = augment
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, int]:
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        image, target = self.augment(*self.dataset[index], rng)
        return image, target, index


class TestSet(Dataset):
    """Pictures at network size: item index -> (uint8 [S, S, 3], int64 (width, height))."""

    __test__ = False  # its name is no test class for pytest

    def __init__(self, dataset, transform: Callable):
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image = self.dataset.pull_image(index)
        return self.transform(image), np.array(image.shape[1::-1])


class EpochSampler(Sampler):
    """Batches of (epoch, index) keys of one epoch after another, from any batch on.

    ``set_epoch(epoch, start)`` says which epoch the next iteration yields and how many of its
    batches were already used. The last, smaller batch of an epoch is left out, as in the
    published loop, unless it is the only one.
    """

    def __init__(self, length: int, batch_size: int, seed: int):
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.set_epoch(0, 0)

    def set_epoch(self, epoch: int, start: int) -> None:
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        return max(1, self.length // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length).tolist()
        for batch in range(self.start, len(self)):
            first = batch * self.batch_size
            yield [(self.epoch, i) for i in order[first : first + self.batch_size]]


def training_loader(
    dataset: TrainingSet, sampler: EpochSampler, workers: int, pin_memory: bool
) -> DataLoader:
    """Batches (images uint8 [B, 3, S, S], targets, indices) in the order of ``sampler``."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=detection_collate,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
    )


def test_loader(dataset: TestSet, batch_size: int, workers: int, pin_memory: bool) -> DataLoader:
    """Batches (images uint8 [B, 3, S, S], sizes) in the order of the data set."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=detection_collate,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
    )


test_loader.__test__ = False


def _start_worker(_: int) -> None:
    import cv2

    # The processes are the parallelism; OpenCV's own threads would only fight over the cores.
    cv2.setNumThreads(0)
    # Freed once, a block of this size has glibc keep the memory of pictures instead of handing it
    # back to the system and clearing it anew for every one (a third of a sample's time).
    np.empty(30 << 20, np.uint8)
    # A group of its own: Ctrl-C, or a SIGTERM to the whole group, is for the main process, which
    # saves its state and ends the workers in order (they also end by themselves when it dies).
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
