"""Read every image of a data set: faults, EXIF orientations, and copies."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from data import DetectionData
from data.image import read_image
from tools.findings import BOTH, Image, Record, Report
from utils.errors import UserError

THUMBNAIL, COARSE = 32, 16  # sides of the grey thumbnails that are compared
# Differences of thumbnails, in standard deviations of an image. Copies that were compressed again,
# resized or evenly brightened differ by 0.01 to 0.2 (root mean square); different images of blood
# cells, of COCO and of drawn shapes by 0.5 or more. One object at another place shows in the
# maximum.
NEAR_COARSE, NEAR_RMS, NEAR_MAX = 0.2, 0.25, 1.5
PLAIN = 2.0  # grey levels: an image with a smaller standard deviation has nothing to compare
PRODUCTS = 2**24  # computed at once: 64 MB, whatever the number of images
THREADS = 8  # OpenCV decodes without Python's lock


class Scan(NamedTuple):
    """What one image showed; an unreadable one has a fault alone.

    fault: why training would stop at it. turned: whether an EXIF orientation turns it and no size
    tells which way it was annotated. digest: of the pixels. thumbnail: uint8 [32, 32], grey.
    """

    fault: str | None = None
    turned: bool = False
    digest: bytes | None = None
    thumbnail: np.ndarray = np.zeros((THUMBNAIL, THUMBNAIL), np.uint8)


def scan_images(dataset: DetectionData, progress: Callable[[int, int], None]) -> list[Scan]:
    """Read every image; progress is called as progress(images done, images in all)."""
    scans, total = [], len(dataset)
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, total, 256):  # after an interrupt, one batch is still read
            indices = range(start, min(start + 256, total))
            scans += pool.map(scan_image, repeat(dataset), indices)
            progress(indices.stop, total)
    return scans


def scan_image(dataset: DetectionData, index: int) -> Scan:
    image, fault = read(dataset, index)
    if image is None:
        return Scan(fault)
    digest = hashlib.blake2b(str(image.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image).ravel())
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    small = cv2.resize(grey, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    turned = fault is None and _is_turned(dataset.image_path(index))
    return Scan(fault, turned, digest.digest(), small)


def read(dataset: DetectionData, index: int) -> tuple[np.ndarray | None, str | None]:
    """Return (image, why training would stop at it); an image can be readable all the same."""
    try:
        return dataset.pull_image(index), None
    except UserError as error:
        fault = str(error)
    try:
        return read_image(dataset.image_path(index)), fault
    except UserError:
        return None, fault


def _is_turned(path: Path) -> bool:
    with open(path, "rb") as file:
        if b"exif" not in file.read(1 << 16).lower():
            return False
    upright, stored = read_image(path), read_image(path, orient=False)
    # Where the shapes differ, the annotated size has told which image to read.
    return upright.shape == stored.shape and not np.array_equal(upright, stored)


def check_orientations(report: Report, part: str, scans: list[Scan]) -> None:
    images = [(part, i) for i, scan in enumerate(scans) if scan.turned]
    what = "image that an EXIF orientation turns: its boxes may be for the image before or after it"
    report.add("warning", part, what, [Record(str(report.path(x)), (x,)) for x in images])


# ---------------------------------------------------------------- copies


def check_copies(report: Report, scans: dict[str, list[Scan]]) -> None:
    """Find equal and nearly equal images in each part, and test images in the training part."""
    for part in scans:
        equal, near = _copies(report, scans, part, part)
        report.add("warning", part, "image that is there twice", equal)
        report.add("warning", part, "image that is nearly another one", near)
    if len(scans) == 2:
        equal, near = _copies(report, scans, "test", "train")
        report.add("error", BOTH, "test image that is trained on", equal)
        report.add("warning", BOTH, "test image that is nearly a training image", near)


def _copies(
    report: Report, scans: dict[str, list[Scan]], part: str, other: str
) -> tuple[list[Record], list[Record]]:
    """Return the images of `part` that are equal, and nearly equal, to an image of `other`.

    Within one part, a copy comes after its original.
    """
    first: dict[bytes, int] = {}
    for i, scan in enumerate(scans[other]):
        if scan.digest:
            first.setdefault(scan.digest, i)
    equal = {
        i: first[scan.digest]
        for i, scan in enumerate(scans[part])
        if scan.digest in first and (part, i) != (other, first[scan.digest])
    }
    new = [i for i in range(len(scans[part])) if i not in equal]
    queries, images = _comparable(scans[part], new)
    keys, originals = _comparable(scans[other], first.values())
    near = near_pairs(images, originals, earlier=part == other)
    return (
        [_record(report, "=", (part, i), (other, j)) for i, j in equal.items()],
        [_record(report, "~", (part, queries[i]), (other, keys[j])) for i, j in near],
    )


def _comparable(scans: list[Scan], indices: Iterable[int]) -> tuple[list[int], np.ndarray]:
    """Return the indices of images that are not plain, and their thumbnails [n, 32, 32]."""
    indices = [i for i in indices if scans[i].thumbnail.std() >= PLAIN]
    thumbnails = np.array([scans[i].thumbnail for i in indices], np.uint8)
    return indices, thumbnails.reshape(-1, THUMBNAIL, THUMBNAIL)


def _record(report: Report, sign: str, copy: Image, original: Image) -> Record:
    return Record(f"{report.path(copy)} {sign} {report.path(original)}", (copy, original))


def near_pairs(
    queries: np.ndarray, keys: np.ndarray, earlier: bool = False
) -> Iterator[tuple[int, int]]:
    """Yield (query, key) for every query that is a near copy of a key: of those the nearest.

    Near copies differ by at most `NEAR_COARSE` at 16 x 16 (root mean square), and by at most
    `NEAR_RMS` and `NEAR_MAX` at 32 x 32. The nearest key has the least difference at 16 x 16.

    Args:
        queries: uint8 [n, 32, 32], grey.
        keys: uint8 [m, 32, 32], grey.
        earlier: compare query i with the keys before i alone, to find copies within one array.
    """
    if not len(queries) or not len(keys):
        return
    a, b = _coarse(queries), _coarse(keys)
    squares = (b**2).sum(1)
    rows = 1 + PRODUCTS // len(keys)
    for start in range(0, len(a), rows):
        products = a[start : start + rows] @ (b[: start + rows] if earlier else b).T
        for i, row in enumerate(products, start):
            end = i if earlier else len(b)
            distances = squares[:end] + a[i] @ a[i] - 2 * row[:end]
            near = np.flatnonzero(distances <= NEAR_COARSE**2 * COARSE**2)
            near = near[np.argsort(distances[near], kind="stable")]
            if (key := _first_copy(queries[i], keys, near)) is not None:
                yield i, key


def _coarse(thumbnails: np.ndarray) -> np.ndarray:
    """Return thumbnails at 16 x 16, normalised: float32 [n, 256]."""
    cells = thumbnails.reshape(len(thumbnails), COARSE, 2, COARSE, 2)
    return _normalised(cells.mean((2, 4), dtype=np.float32))


def _first_copy(query: np.ndarray, keys: np.ndarray, candidates: np.ndarray) -> int | None:
    """Return the first of the candidates, indices of keys, that is a near copy at 32 x 32."""
    query = _normalised(query[None])
    for start in range(0, len(candidates), 64):
        few = candidates[start : start + 64]
        apart = np.abs(_normalised(keys[few]) - query)
        copies = ((apart**2).mean(1) <= NEAR_RMS**2) & (apart.max(1) <= NEAR_MAX)
        if copies.any():
            return int(few[copies.argmax()])
    return None


def _normalised(images: np.ndarray) -> np.ndarray:
    """Return float32 [n, pixels] of mean 0 and standard deviation 1, less for faint images."""
    pixels = images.reshape(len(images), -1).astype(np.float32)
    pixels -= pixels.mean(1, keepdims=True)
    return pixels / np.maximum(pixels.std(1, keepdims=True), 2 * PLAIN)
