"""From a data set to batches: samples that depend on (seed, epoch, index) and on nothing else."""

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from data import DetectionData
from data.transforms import to_square
from utils.errors import UserError

# While one batch of a loading process waits, the next is made. This bridges a batch of large
# images; more would only take shared memory (25 MB a batch of 32 at 512).
PREFETCH_FACTOR = 2
SHARED_MEMORY = "/dev/shm"


def detection_collate(batch: list[tuple]) -> tuple:
    """Join samples of one size to a batch.

    A sample is an image, an array [S, S, 3] or a tensor [3, S, S], and further arrays, tensors or
    numbers. Returns the images as one tensor [B, 3, S, S] of their type, in channels-last memory
    if they were arrays, then a list for each further item. Targets stay one tensor [n, 5] an
    image, since n differs and may be 0.
    """
    images, *rest = zip(*batch, strict=True)
    stacked = default_collate(list(images))  # a loading process writes it to shared memory directly
    if isinstance(images[0], np.ndarray):
        stacked = stacked.permute(0, 3, 1, 2)
    lists = [[torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in xs] for xs in rest]
    return stacked, *lists


@dataclass
class TrainingSet(Dataset):
    """Augmented samples: item (epoch, index) -> (uint8 [S, S, 3], float32 [n, 5], index).

    The random numbers of a sample come from (seed, epoch, index), wherever it is loaded.

    augment: called as augment(image, target, rng), such as `data.transforms.SSDAugmentation`.
    pull: called instead of ``dataset.pull_image``, see `data.cache`; its result is not written to.
    """

    dataset: DetectionData
    augment: Callable
    seed: int
    pull: Callable[[int], np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, int]:
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        image = (self.pull or self.dataset.pull_image)(index)
        return *self.augment(image, self.dataset.target(index), rng), index


@dataclass
class TestSet(Dataset):
    """Images at network size: item index -> (uint8 [S, S, 3], int64 (width, height))."""

    dataset: DetectionData
    size: int
    __test__ = False  # pytest takes the name for a test's

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image = self.dataset.pull_image(index)
        return to_square(image, self.size), np.array(image.shape[1::-1])


class EpochSampler(Sampler):
    """Batches of (epoch, index) keys of one epoch, from any step on.

    ``set_epoch(epoch, start)`` sets the epoch of the next iteration, and how many of its steps to
    leave out. The last, smaller batch of an epoch is left out, as in the published loop, unless it
    is the only one.

    A step's batch is the same however it is divided. It is cut into ``world * accumulate`` equal
    parts; part ``m * world + rank`` is micro-batch ``m`` of the process ``rank``. A smaller only
    batch is shortened until that is possible.

    Args:
        length: images in the data set.
        batch_size: images of one optimiser step, over all processes and micro-batches.
        rank, world: which of how many processes that train together this is.
        accumulate: micro-batches of a step, yielded one after another.

    Raises:
        ValueError: the batch cannot be divided so, or the images are fewer than the parts.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world: int = 1,
                 accumulate: int = 1) -> None:
        self.parts = world * accumulate
        if batch_size % self.parts:
            raise ValueError(f"a batch of {batch_size} is no multiple of {self.parts} parts")
        if length < self.parts:
            raise ValueError(f"{length} images are fewer than the {self.parts} parts of a batch")
        self.length = length
        self.batch_size = min(batch_size, length - length % self.parts)
        self.seed, self.rank, self.world, self.accumulate = seed, rank, world, accumulate
        self.steps = length // self.batch_size
        self.set_epoch(0, 0)

    def set_epoch(self, epoch: int, start: int) -> None:
        self.epoch, self.start = epoch, start
        self.order = np.random.default_rng((self.seed, epoch)).permutation(self.length)

    def batch(self, step: int) -> list[int]:
        """Return the indices of the whole batch of a step of this epoch, of all processes."""
        return self.order[step * self.batch_size : (step + 1) * self.batch_size].tolist()

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.batch_size // self.parts
        for step in range(self.start, self.steps):
            batch = self.batch(step)
            for part in range(self.rank, self.parts, self.world):
                yield [(self.epoch, i) for i in batch[part * size : (part + 1) * size]]


class WorkerDied(UserError):
    """A loading process has ended by itself."""


class Loader(DataLoader):
    """A ``DataLoader`` that reports failures as UserError.

    A UserError raised in a loading process is raised again here as it was. The death of a loading
    process, mostly for want of memory, becomes a WorkerDied. Both happen when the next batch is
    asked for. batching: ``DataLoader``'s ``batch_size`` or ``batch_sampler``.
    """

    def __init__(self, dataset: Dataset, workers: int, pin_memory: bool,
                 **batching: object) -> None:
        # PyTorch draws seeds that nothing uses; without ``generator``, from its global one.
        super().__init__(_Caught(dataset), num_workers=workers, collate_fn=_pack,
                         pin_memory=pin_memory, worker_init_fn=_start_worker,
                         prefetch_factor=PREFETCH_FACTOR if workers else None,
                         generator=torch.Generator(), **batching)

    processes: list[multiprocessing.process.BaseProcess] = []

    def __iter__(self) -> Iterator[tuple]:
        others = multiprocessing.active_children()
        try:
            with _sigchld_kept():
                iterator = super().__iter__()
            # With persistent processes an epoch but the first starts none.
            started = [p for p in multiprocessing.active_children() if p not in others]
            self.processes = started or self.processes
            for batch in iterator:
                if isinstance(batch, UserError):
                    try:
                        raise batch
                    finally:
                        # Otherwise the error's traceback holds the error, and the processes end
                        # only when the garbage collector finds it, which takes 5 seconds each.
                        del batch
                yield _unpack(batch)
        except (RuntimeError, ConnectionError, EOFError) as error:
            codes = {p.exitcode for p in self.processes} - {None}
            if not codes:
                raise
            fates = {signal.Signals(-c).name if c < 0 else f"exit status {c}" for c in codes}
            raise WorkerDied(f"a loading process died ({', '.join(sorted(fates))}), mostly for want"
                             " of memory or shared memory; give fewer --num_workers, or more of "
                             "both (docker run --memory, --shm-size)") from error


def training_loader(dataset: TrainingSet, sampler: EpochSampler, workers: int,
                    pin_memory: bool) -> Loader:
    """Return batches (images uint8 [B, 3, S, S], targets, indices) in the order of ``sampler``."""
    return Loader(dataset, workers, pin_memory, batch_sampler=sampler,
                  persistent_workers=workers > 0)


def check_shared_memory(workers: int, batch_size: int, size: int, processes: int = 1) -> None:
    """Raise UserError if the prefetched batches do not fit into the system's shared memory.

    A loading process would die of it without a message.

    workers: loading processes of a loader. processes: how many such loaders run on this machine.
    batch_size: images of one of its (micro-)batches, [3, size, size].
    """
    if not workers or not os.path.isdir(SHARED_MEMORY):
        return
    batch = processes * batch_size * 3 * size**2
    need, free = (workers * PREFETCH_FACTOR + 1) * batch, shutil.disk_usage(SHARED_MEMORY).free
    if need > free:
        fitting = max(0, (free // batch - 1) // PREFETCH_FACTOR)
        raise UserError(f"--num_workers {workers} needs {need / 2**20:.0f} MiB of shared memory "
                        f"for its batches, and {SHARED_MEMORY} has {free / 2**20:.0f} MiB free; "
                        f"give --num_workers {fitting}, or with Docker more shared memory (docker "
                        f"run --shm-size={-(-need // 2**30)}g)")


def set_up_loading() -> None:
    """Change settings of this whole process, for one of many that load images."""
    # The processes are the parallelism; OpenCV's own threads would only compete for the cores.
    cv2.setNumThreads(0)
    # Once glibc has freed a block of this size, it keeps the memory of images instead of returning
    # it to the system. A sample of 500 x 375 at 512 then takes 2.4 instead of 3.6 ms of a core.
    np.empty(30 << 20, np.uint8)


def _start_worker(_: int) -> None:
    set_up_loading()
    # In a process group of its own, it does not get Ctrl-C or a SIGTERM to the main process's
    # group. The main process saves its state, then ends it; it also ends when that dies.
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


@dataclass
class _Caught(Dataset):
    """Lists of items, or the UserError that one of them raised, as a value.

    PyTorch would put the traceback of a loading process into the text of a raised error.
    """

    dataset: Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list) -> list | UserError:
        try:
            return [self.dataset[key] for key in keys]
        except UserError as error:
            return error


def _pack(batch: list | UserError) -> tuple | UserError:
    """Collate, and join each list of tensors to (one tensor, lengths) for sending.

    Each tensor that is sent takes an open file, and time, in both processes.
    """
    if isinstance(batch, UserError):
        return batch
    images, *rest = detection_collate(batch)
    return images, *((torch.cat(x), [len(t) for t in x]) if isinstance(x[0], Tensor) else x
                     for x in rest)


def _unpack(batch: tuple) -> tuple:
    images, *rest = batch
    return images, *(list(x[0].split(x[1])) if isinstance(x[0], Tensor) else x for x in rest)


@contextmanager
def _sigchld_kept() -> Iterator[None]:
    """Undo PyTorch's handler for SIGCHLD, which it installs with the first loading process.

    The handler raises the death of one wherever the main thread is, such as within a step. Without
    it, the wait for the next batch notices, after 5 seconds.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if main and hasattr(signal, "SIGCHLD") else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGCHLD, before)
