"""Decoded images, kept for the next epoch: in shared memory, or in a folder.

A cache stands in for a data set's ``pull_image``, in any number of loading processes at once,
however they are started. It keeps images whole and as they were decoded, so samples are equal bit
for bit to those without a cache. The arrays it returns may be read-only. An image whose size
differs from ``dataset.image_size`` is decoded every time.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import torch

from data import DetectionData
from data.loading import SHARED_MEMORY
from utils.errors import UserError
from utils.files import create_temporary, remove_abandoned

HEADER = 128  # bytes of an .npy file before the pixels
MEMORY_SHARE = 0.8
"""Share of the free memory that may be used; batches, the network and the system need the rest."""


def open_cache(where: str, dataset: DetectionData,
               processes: int = 1) -> Callable[[int], np.ndarray] | None:
    """Return the cache that --cache names: "off" (None), "memory", or a folder.

    processes: how many processes of this machine open such a cache, this one included.
    """
    if where == "off":
        return None
    return MemoryCache(dataset, processes) if where == "memory" else DiskCache(dataset, where)


class MemoryCache:
    """Images in one block of shared memory, reserved at once and filled as they are asked for.

    Loading processes share the block; each of the ``processes`` of a distributed training has its
    own. Raises UserError if these blocks do not fit together into the free and shared memory.
    """

    def __init__(self, dataset: DetectionData, processes: int = 1) -> None:
        self.dataset = dataset
        self.ends = np.cumsum(3 * dataset.sizes.prod(1))
        size, free = int(self.ends[-1]), free_memory()
        times = f" in each of {processes} processes" if processes > 1 else ""
        refusal = (f"--cache memory needs {_gb(size)} for {len(dataset)} decoded images{times}, and"
                   f" may use {MEMORY_SHARE:.0%} of the {_gb(free)} that are free; give a folder"
                   " (--cache DIR), or --cache off")
        if processes * size > MEMORY_SHARE * free:
            raise UserError(refusal)
        try:
            self.pixels = torch.empty(size, dtype=torch.uint8).share_memory_()
        except RuntimeError as error:  # another program took the memory meanwhile
            raise UserError(refusal) from error
        self.filled = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def __call__(self, index: int) -> np.ndarray:
        width, height = self.dataset.image_size(index)
        end = int(self.ends[index])
        place = self.pixels[end - 3 * width * height : end].numpy().reshape(height, width, 3)
        if not self.filled[index]:
            image = self.dataset.pull_image(index)
            if image.shape != place.shape:
                return image
            place[:] = image  # processes that do so at once write the same
            self.filled[index] = True
        place.flags.writeable = False
        return place


class DiskCache:
    """Images as uncompressed .npy files in a folder, which later runs use, too.

    A file's name is a hash of the image's path, size, time of change and whatever else decides its
    pixels; files of images that have changed are left behind. A truncated or malformed file is
    written anew; changed pixels in it are not noticed. Raises UserError if the missing images do
    not fit on the disk, the folder cannot be written to, or, later, an image cannot be written.
    """

    def __init__(self, dataset: DetectionData, directory: str | Path) -> None:
        self.dataset = dataset
        self.directory = Path(directory).expanduser()
        # An array, because loading processes would copy each object of a list.
        self.names = np.array([self._name(i) for i in range(len(dataset))])
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self.directory)
            there = set(os.listdir(self.directory))
            free = shutil.disk_usage(self.directory).free
        except OSError as error:
            fault = f"--cache {directory}: {error.strerror}; give another folder"
            raise UserError(fault) from error
        missing = [i for i, name in enumerate(self.names.tolist()) if name not in there]
        need = int((HEADER + 3 * dataset.sizes[missing].prod(1)).sum())
        if need > free:
            raise UserError(f"--cache {directory} needs {_gb(need)} for {len(missing)} decoded"
                            f" images, and its disk has {_gb(free)} free; make room, give another"
                            " folder, or --cache off")

    def __call__(self, index: int) -> np.ndarray:
        path, shape = self.directory / str(self.names[index]), self._shape(index)
        try:
            image = _read(path, shape)
            if image is None:
                image = self.dataset.pull_image(index)
                if image.shape == shape:
                    _write(path, image)
        except OSError as error:
            raise UserError(f"{path}: cannot write the decoded image ({error.strerror or error});"
                            " make room, give another folder, or --cache off") from error
        return image

    def _shape(self, index: int) -> tuple[int, int, int]:
        width, height = self.dataset.image_size(index)
        return height, width, 3

    def _name(self, index: int) -> str:
        path = self.dataset.image_path(index)
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"{path}: cannot read the image ({error.strerror})") from error
        # The annotated size decides whether an image is turned, the version how it is decoded.
        known = repr([str(path.absolute()), stat.st_size, stat.st_mtime_ns, self._shape(index),
                      cv2.__version__])
        return f"{hashlib.sha256(known.encode()).hexdigest()[:40]}.npy"


def free_memory() -> float:
    """Return the bytes of memory and of shared memory that are free; inf if it is unknown."""
    lines = dict(line.split(":") for line in _lines("/proc/meminfo"))
    room = [int(lines["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in lines else []
    if os.path.isdir(SHARED_MEMORY):
        room.append(shutil.disk_usage(SHARED_MEMORY).free)
    group = Path("/sys/fs/cgroup")  # of a container with a limit
    if limit := [int(line) for line in _lines(group / "memory.max") if line.isdecimal()]:
        used = int(_lines(group / "memory.current")[0])
        stat = dict(line.split() for line in _lines(group / "memory.stat"))
        room.append(limit[0] - used + int(stat["inactive_file"]))
    return min(room, default=math.inf)


def _lines(path: str | Path) -> list[str]:
    with suppress(OSError):
        return Path(path).read_text().splitlines()
    return []


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def _read(path: Path, shape: tuple[int, int, int]) -> np.ndarray | None:
    """Return the image, mapped into memory; None if the file does not hold all of that shape."""
    with suppress(FileNotFoundError, ValueError):  # ValueError: not a whole .npy file
        image = np.lib.format.open_memmap(path, mode="r")
        if image.shape == shape and image.dtype == np.uint8:
            return np.asarray(image)
    return None


def _write(path: Path, image: np.ndarray) -> None:
    # The file is not flushed to the disk: one that a crash cuts off is written anew.
    part, file = create_temporary(path.parent)
    try:
        with file:
            np.save(file, image)
        with suppress(FileNotFoundError):  # a new process has taken it for abandoned
            os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
