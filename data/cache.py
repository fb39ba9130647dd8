"""Decoded pictures, kept for the next epoch: in shared memory, or in a folder.

A cache is called as a data set's ``pull_image`` in its place, by any number of loading processes at
once, however they are started. Pictures are kept whole and as they were decoded, so every sample
is the same, bit for bit, as without. What is returned may be read-only.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import torch

from data.loading import SHARED_MEMORY
from utils.errors import UserError

MEMORY_SHARE = 0.8  # of what is free; the rest is for batches, the network and the system


def open_cache(where: str, dataset) -> Callable[[int], np.ndarray] | None:
    """The cache that --cache names: "off" (None), "memory", or a folder."""
    if where == "off":
        return None
    return MemoryCache(dataset) if where == "memory" else DiskCache(dataset, where)


class MemoryCache:
    """Pictures in one block of shared memory, reserved at once, filled as they are asked for.

    A picture of another size than ``dataset.image_size`` says is decoded every time. Processes
    that train together but were started apart have a block each.

    Raises:
        UserError: the pictures do not fit into what is free of memory and of shared memory.
    """

    def __init__(self, dataset):
        self.dataset = dataset
        sizes = np.array([dataset.image_size(i) for i in range(len(dataset))], np.int64)
        self.ends = np.cumsum(3 * sizes.prod(1))
        need, free = int(self.ends[-1]), free_memory()
        refusal = (
            f"--cache memory needs {_gb(need)} for {len(dataset)} decoded pictures, and of the "
            f"{_gb(free)} that are free it takes {MEMORY_SHARE:.0%} at most; give a folder "
            "(--cache DIR), or --cache off"
        )
        if need > MEMORY_SHARE * free:
            raise UserError(refusal)
        try:
            self.pixels = torch.empty(need, dtype=torch.uint8).share_memory_()
        except RuntimeError as error:  # another process was faster
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
            place[:] = image  # by several processes at once, maybe: they write the same
            self.filled[index] = True
        place.flags.writeable = False
        return place


class DiskCache:
    """Pictures as uncompressed .npy files in a folder, which further runs use, too.

    A file's name stands for the picture's path, size and time of change and for what else decides
    its pixels; files of pictures that have changed stay behind. A file that is cut off or not what
    it should be is written anew; changed pixels in it are not noticed. A picture of another size
    than ``dataset.image_size`` says is decoded every time.

    Raises:
        UserError: the pictures that are not there yet do not fit on the disk, the folder cannot be
            written to, or, later, a picture cannot be kept.
    """

    def __init__(self, dataset, directory: str | Path):
        self.dataset = dataset
        self.directory = Path(directory).expanduser()
        # One array: of a list, each loading process would come to copy every object.
        self.names = np.array([self._name(i) for i in range(len(dataset))])
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            there = set(os.listdir(self.directory))
            free = shutil.disk_usage(self.directory).free
        except OSError as error:
            raise UserError(
                f"--cache {directory}: {error.strerror}; give another folder"
            ) from error
        missing = [i for i, name in enumerate(self.names.tolist()) if name not in there]
        need = sum(len(_header(s)) + int(np.prod(s)) for s in map(self._shape, missing))
        if need > free:
            raise UserError(
                f"--cache {directory} needs {_gb(need)} for {len(missing)} decoded pictures, and "
                f"its disk has {_gb(free)} free; make room, give another folder, or --cache off"
            )

    def __call__(self, index: int) -> np.ndarray:
        path, shape = self.directory / str(self.names[index]), self._shape(index)
        try:
            image = _read(path, shape)
            if image is None:
                image = self.dataset.pull_image(index)
                if image.shape == shape:
                    _write(path, image)
        except OSError as error:
            raise UserError(
                f"{path}: the decoded picture cannot be kept ({error.strerror}); make room, give "
                "another folder, or --cache off"
            ) from error
        return image

    def _shape(self, index: int) -> tuple[int, int, int]:
        width, height = self.dataset.image_size(index)
        return height, width, 3

    def _name(self, index: int) -> str:
        path = self.dataset.image_path(index)
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"{path}: the picture cannot be read ({error.strerror})") from error
        # The annotated size decides whether a picture is turned, the version how it is decoded.
        known = [str(path.absolute()), stat.st_size, stat.st_mtime_ns, self._shape(index)]
        text = repr([*known, cv2.__version__])
        return f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.npy"


def free_memory() -> float:
    """Bytes that are available to this process and fit into shared memory; inf: nobody knows."""
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


def _header(shape: tuple[int, int, int]) -> bytes:
    """How the .npy file of a picture begins."""
    file = io.BytesIO()
    fields = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()


def _read(path: Path, shape: tuple[int, int, int]) -> np.ndarray | None:
    """The picture, mapped into memory; None unless the file is a picture of that shape, whole."""
    header = _header(shape)
    with suppress(FileNotFoundError), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(len(header)) == header and size == len(header) + np.prod(shape):
            return np.asarray(np.memmap(file, np.uint8, "r", len(header), shape))
    return None


def _write(path: Path, image: np.ndarray) -> None:
    # A name of its own, of which there is one even among containers that share the folder. It is
    # not flushed to the disk: what a crash cuts off is written anew.
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "wb") as file:
            file.write(_header(image.shape))
            file.write(np.ascontiguousarray(image))
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
