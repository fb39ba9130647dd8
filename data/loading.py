"""From a data set to batches: samples that depend on (seed, epoch, index) and on nothing else."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from utils.errors import UserError

# One batch of a loading process waits while the next is made, which bridges a batch of large
# pictures; more would only take shared memory (25 MB a batch of 32 at 512).
PREFETCH_FACTOR = 2
SHARED_MEMORY = "/dev/shm"


def detection_collate(batch: list[tuple]) -> tuple:
    """Samples of one size as a batch.

    Args:
        batch: tuples whose first item is an image, an array [S, S, 3] or a tensor [3, S, S], and
            whose further items are arrays, tensors or numbers.

    Returns:
        The images as one tensor [B, 3, S, S] of their own type (arrays: in channels-last memory),
        then one list a further item: targets stay one tensor [n, 5] per image, since n differs
        (and may be 0).
    """
    images, *rest = zip(*batch, strict=True)
    stacked = default_collate(list(images))  # in a loading process, in shared memory at once
    if isinstance(images[0], np.ndarray):
        stacked = stacked.permute(0, 3, 1, 2)
    lists = [[torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in xs] for xs in rest]
    return stacked, *lists


class TrainingSet(Dataset):
    """Augmented samples: item (epoch, index) -> (uint8 [S, S, 3], float32 [n, 5], index).

    The random numbers of a sample come from (seed, epoch, index): neither the number of workers
    nor the place in a batch changes it. ``pull`` is called as ``dataset.pull_image`` in its place
    (see ``data.cache``); what it returns is not written to.
    """

    def __init__(
        self,
        dataset,
        augment: Callable,
        seed: int,
        pull: Callable[[int], np.ndarray] | None = None,
    ):
        self.dataset = dataset
        self.augment = augment
        self.seed = seed
        self.pull = pull or dataset.pull_image

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, int]:
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        image, target = self.augment(self.pull(index), self.dataset.target(index), rng)
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
    """Batches of (epoch, index) keys of one epoch after another, from any step on.

    ``set_epoch(epoch, start)`` says which epoch the next iteration yields and how many of its
    steps were already made. The last, smaller batch of an epoch is left out, as in the published
    loop, unless it is the only one.

    A step's batch is the same however it is divided: it is cut into ``world * accumulate`` equal
    parts, of which part ``m * world + rank`` is micro-batch ``m`` of the process ``rank``. A
    smaller only batch is shortened until that is possible.

    Args:
        length: pictures of the data set.
        batch_size: pictures of one optimiser step, over all processes and micro-batches.
        rank, world: which process this is, of how many that train together.
        accumulate: micro-batches of a step, yielded one after another.

    Raises:
        ValueError: the batch cannot be divided so, or there are fewer pictures than parts.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ):
        self.parts = world * accumulate
        if batch_size % self.parts:
            raise ValueError(f"a batch of {batch_size} is no multiple of {self.parts} parts")
        if length < self.parts:
            raise ValueError(f"{length} pictures are fewer than the {self.parts} parts of a batch")
        self.length = length
        self.batch_size = min(batch_size, length - length % self.parts)
        self.seed = seed
        self.rank = rank
        self.world = world
        self.accumulate = accumulate
        self.steps = length // self.batch_size
        self.set_epoch(0, 0)

    def set_epoch(self, epoch: int, start: int) -> None:
        self.epoch = epoch
        self.start = start
        self.order = np.random.default_rng((self.seed, epoch)).permutation(self.length)

    def batch(self, step: int) -> list[int]:
        """Indices of the whole batch of a step of the present epoch, of all processes."""
        return self.order[step * self.batch_size : (step + 1) * self.batch_size].tolist()

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.batch_size // self.parts
        for step in range(self.start, self.steps):
            batch = self.batch(step)
            for part in range(self.rank, self.parts, self.world):
                yield [(self.epoch, i) for i in batch[part * size : (part + 1) * size]]


class Loader(DataLoader):
    """A ``DataLoader`` whose failures are for users.

    What a loading process cannot read arrives as the UserError that it raised there, and the death
    of one (memory, as a rule) as a UserError, both when the next batch is asked for.
    """

    def __init__(self, dataset: Dataset, workers: int, pin_memory: bool, **batching):
        super().__init__(
            _Caught(dataset),
            num_workers=workers,
            collate_fn=_pack,
            pin_memory=pin_memory,
            prefetch_factor=PREFETCH_FACTOR if workers else None,
            worker_init_fn=_start_worker,
            # Seeds of PyTorch's that nothing uses; drawn from its own, they would change that one.
            generator=torch.Generator(),
            **batching,
        )

    def __iter__(self) -> Iterator[tuple]:
        with _sigchld_kept():
            iterator = super().__iter__()
        processes = multiprocessing.active_children()
        try:
            for batch in iterator:
                if isinstance(batch, UserError):
                    try:
                        raise batch
                    finally:
                        # An error that its own traceback holds would be left to the garbage
                        # collector, and it takes 5 seconds a loading process to end them.
                        del batch
                yield _unpack(batch)
        except RuntimeError as error:
            codes = [process.exitcode for process in processes]
            if not any(codes):
                raise
            fates = {signal.Signals(-c).name if c < 0 else f"exit status {c}" for c in codes if c}
            raise UserError(
                f"a loading process died ({', '.join(sorted(fates))}), mostly for want of memory "
                "or shared memory; give fewer --num_workers, or more of both (docker run --memory, "
                "--shm-size)"
            ) from error


def training_loader(
    dataset: TrainingSet, sampler: EpochSampler, workers: int, pin_memory: bool
) -> Loader:
    """Batches (images uint8 [B, 3, S, S], targets, indices) in the order of ``sampler``."""
    return Loader(
        dataset, workers, pin_memory, batch_sampler=sampler, persistent_workers=workers > 0
    )


def test_loader(dataset: Dataset, batch_size: int, workers: int, pin_memory: bool) -> Loader:
    """Batches (images uint8 [B, 3, S, S], sizes) in the order of a ``TestSet``.

    Process ``rank`` of ``world`` takes its share as ``Subset(samples, range(rank, n, world))``.
    """
    return Loader(dataset, workers, pin_memory, batch_size=batch_size)


test_loader.__test__ = False


def check_shared_memory(workers: int, batch_size: int, size: int, processes: int = 1) -> None:
    """Refuse more batches under way than the shared memory of the system holds.

    Args:
        workers: loading processes of a loader.
        batch_size: pictures of one of its (micro-)batches, [3, size, size].
        processes: how many such loaders run on this machine.

    Raises:
        UserError: they do not fit; without a word a loading process would die of it.
    """
    if not workers or not os.path.isdir(SHARED_MEMORY):
        return
    batch = processes * batch_size * 3 * size**2
    need, free = (workers * PREFETCH_FACTOR + 1) * batch, shutil.disk_usage(SHARED_MEMORY).free
    if need > free:
        fitting = max(0, (free // batch - 1) // PREFETCH_FACTOR)
        raise UserError(
            f"--num_workers {workers} needs {need / 2**20:.0f} MiB of shared memory for its "
            f"batches, and {SHARED_MEMORY} has {free / 2**20:.0f} MiB free; give --num_workers "
            f"{fitting}, or with Docker more shared memory (docker run --shm-size="
            f"{-(-need // 2**30)}g)"
        )


def set_up_loading() -> None:
    """Make this process one that loads pictures beside others: settings for all of it."""
    import cv2

    # The processes are the parallelism; OpenCV's own threads would only fight over the cores.
    cv2.setNumThreads(0)
    # Freed once, a block of this size has glibc keep the memory of pictures instead of handing it
    # back to the system and clearing it anew for every one (a third of a sample's time).
    np.empty(30 << 20, np.uint8)


def _start_worker(_: int) -> None:
    set_up_loading()
    # A group of its own: Ctrl-C, or a SIGTERM to the whole group, is for the main process, which
    # saves its state and ends the workers in order (they also end by themselves when it dies).
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


class _Caught(Dataset):
    """Lists of items, or the UserError that one of them raised.

    As a value it is sent as it is; PyTorch would put the process's traceback into its text.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list) -> list | UserError:
        try:
            return [self.dataset[key] for key in keys]
        except UserError as error:
            return error


def _pack(batch: list | UserError) -> tuple | UserError:
    """``detection_collate`` with lists of tensors as (one tensor, lengths).

    Every tensor that is sent takes an open file and time of both processes.
    """
    if isinstance(batch, UserError):
        return batch
    images, *rest = detection_collate(batch)
    return images, *(
        (torch.cat(x), [len(t) for t in x]) if isinstance(x[0], Tensor) else x for x in rest
    )


def _unpack(batch: tuple) -> tuple:
    images, *rest = batch
    return images, *(list(x[0].split(x[1])) if isinstance(x[0], Tensor) else x for x in rest)


@contextmanager
def _sigchld_kept() -> Iterator[None]:
    """Undo PyTorch's handler for SIGCHLD, installed with the first loading process.

    It raises the death of one wherever the main thread is, such as in the midst of a step; without
    it, the wait for the next batch notices (after 5 seconds).
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if main and hasattr(signal, "SIGCHLD") else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGCHLD, before)
