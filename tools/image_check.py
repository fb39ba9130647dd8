"""Read every image of a data set: faults, EXIF orientations, faint images, copies and places."""

import os
import sys
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from data import DetectionData, list_sets
from data.image import IMAGE_SUFFIXES, read_image
from data.skips import SkipKind
from data.truth import digest
from tools.findings import BOTH, Record, Report
from utils.console import rewrite_line
from utils.errors import UserError

THUMBNAIL = 32  # side of the grey thumbnails that are compared
# Differences of thumbnails, in standard deviations of an image. Copies that were compressed again,
# resized or evenly brightened differ by 0.01 to 0.2 (root mean square). Different images of blood
# cells, of COCO and of drawn shapes differ by 0.5 or more. The maximum shows a moved object.
NEAR_RMS, NEAR_MAX = 0.25, 1.5
PLAIN = 2.0  # grey levels: an image with a smaller standard deviation has nothing to compare
PRODUCTS = 2**24  # computed at once: 64 MB, whatever the number of images
FAINT = 16  # grey levels between the darkest and the brightest pixel; 12 bits in 16 give 15
LISTS = {"classes", "obj", "readme", "test", "train", "val", "valid"}  # texts beside annotations
THREADS = 8  # OpenCV decodes without Python's lock


class Scan(NamedTuple):
    """What one image showed; an unreadable image has only a fault.

    fault: why training would stop at the image.
    turned: an EXIF orientation turns the image, and no size tells which way it was annotated.
    levels: the lowest and the highest grey level.
    digest: of the pixels.
    thumbnail: uint8 [32, 32], grey.
    """

    fault: str | None = None
    turned: bool = False
    levels: tuple[int, int] = (0, 255)
    digest: str | None = None
    thumbnail: np.ndarray = np.zeros((THUMBNAIL, THUMBNAIL), np.uint8)


def scan_images(dataset: DetectionData, part: str) -> list[Scan]:
    """Read every image of "train" or "test"; a terminal shows the progress."""
    scans, total = [], len(dataset)
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, total, 256):  # after an interrupt, one batch is still read
            scans += pool.map(scan_image, repeat(dataset), range(start, min(start + 256, total)))
            if sys.stderr.isatty():
                line = f"{part}: {len(scans):,} of {total:,} images" * (len(scans) < total)
                rewrite_line(line, sys.stderr)
    return scans


def scan_image(dataset: DetectionData, index: int) -> Scan:
    image, fault = read(dataset, index)
    if image is None:
        return Scan(fault)
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    small = cv2.resize(grey, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    turned = fault is None and _is_turned(dataset.image_path(index))
    return Scan(fault, turned, (int(grey.min()), int(grey.max())), digest(image), small)


def read(dataset: DetectionData, index: int) -> tuple[np.ndarray | None, str | None]:
    """Return (image, why training would stop at it); both if only its size is wrong."""
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


def check_images(report: Report, name: str, faults: list[str], scans: list[Scan]) -> None:
    """Add what reading the images and annotations of a part showed."""
    images = {scan.fault: ((name, i),) for i, scan in enumerate(scans) if scan.fault}
    records = [Record(text, images.get(text, ())) for text in dict.fromkeys([*faults, *images])]
    report.add("error", name, "record that training stops at", records)
    turned = [(name, i) for i, scan in enumerate(scans) if scan.turned]
    what = "image that an EXIF orientation turns: its boxes may be for the image before or after it"
    report.add("warning", name, what, [Record(str(report.path(x)), (x,)) for x in turned])
    faint = {(name, i): scan.levels for i, scan in enumerate(scans) if np.ptp(scan.levels) < FAINT}
    report.add("warning", name, "image of one colour or nearly so (12 bits stored in 16?)", (
        Record("{}: grey levels {} to {} of 0 to 255".format(report.path(x), *levels), (x,))
        for x, levels in faint.items()))


def check_places(report: Report) -> None:
    """Find images outside the root, and in the folders of the images what belongs to no part."""
    root, images, used = os.path.realpath(report.options.root), set(), set()
    for name, part in report.parts.items():
        told = {skip.image for skip in part.dataset.skipped if skip.kind is SkipKind.OUTSIDE_ROOT}
        paths = {i: report.path((name, i)) for i in range(len(part.sizes))}
        real = {i: Path(os.path.realpath(paths[i])) for i in paths if i not in told}
        report.add("warning", name, f"{SkipKind.OUTSIDE_ROOT.text}, reached by a link", (
            Record(f"{paths[i]} is {path}", ((name, i),)) for i, path in real.items()
            if not path.is_relative_to(root)))
        images.update(paths.values())
        used |= {each.path for each in getattr(part.dataset, "annotations", ())}
    if len(report.parts) < 2:
        return
    found, stems = _beside(images, IMAGE_SUFFIXES), {*map(_stem, used)}
    names = {*map(_stem, found | images)}
    # Where one file holds all annotations, its name says nothing.
    more = _beside(used, {path.suffix for path in used}) if names & stems else set()
    stems = (stems | {*map(_stem, more)}) if more else names
    sets = {*list_sets(report.options.dataset, root)}
    others = sets - {*report.options.train_sets, *report.options.test_sets}  # may list them
    what = "image in these folders, but in neither part"
    report.add("note" if others else "warning", BOTH, what, (
        Record(f"{path}" + ", without an annotation file" * (_stem(path) not in stems))
        for path in sorted(found - images)))
    report.add("warning", BOTH, "annotation file without an image", (
        Record(str(path)) for path in sorted(more - used)
        if _stem(path) not in names and path.name.split(".")[0].lower() not in LISTS))


def _beside(paths: Iterable[Path], suffixes: Collection[str]) -> set[Path]:
    """Return the files with these suffixes in the folders of other files."""
    folders = {path.parent for path in paths}
    return {path for folder in folders if folder.is_dir() for path in folder.iterdir()
            if path.suffix.lower() in suffixes and path.name[0] != "."}


def _stem(path: Path) -> str:
    return unicodedata.normalize("NFC", path.stem)


def check_copies(report: Report, scans: dict[str, list[Scan]]) -> None:
    """Find equal and nearly equal images in each part, and test images in the training part."""
    for part in scans:
        equal, near = _copies(report, scans, part, part)
        report.add("warning", part, "image that occurs twice", equal)
        report.add("warning", part, "image that is nearly another one", near)
    if len(scans) == 2:
        equal, near = _copies(report, scans, "test", "train")
        report.add("error", BOTH, "test image that is a training image", equal)
        report.add("warning", BOTH, "test image that is nearly a training image", near)


def _copies(report: Report, scans: dict[str, list[Scan]],
            part: str, other: str) -> list[list[Record]]:
    """Return equal and near copies in `part` of images of `other`; an original is no copy."""
    first: dict[str | None, int] = {}
    for i, scan in enumerate(scans[other]):
        first.setdefault(scan.digest, i)
    first.pop(None, None)  # unreadable images
    equal = {(part, i): (other, first[scan.digest]) for i, scan in enumerate(scans[part])
             if scan.digest in first and (part, i) != (other, first[scan.digest])}
    thumbnails = (np.array([scan.thumbnail for scan in scans[name]]) for name in (part, other))
    near = {(part, i): (other, j) for i, j in near_pairs(*thumbnails, earlier=part == other)
            if (part, i) not in equal}
    return [[Record(f"{report.path(copy)} {sign} {report.path(original)}", (copy, original))
             for copy, original in pairs.items()] for sign, pairs in (("=", equal), ("~", near))]


def near_pairs(queries: np.ndarray, keys: np.ndarray,
               earlier: bool = False) -> Iterator[tuple[int, int]]:
    """Yield (query, nearest key) for every query that is a near copy of a key.

    Near copies differ by at most `NEAR_RMS` (root mean square) and `NEAR_MAX`. A plain image has
    no near copy.

    Args:
        queries: uint8 [n, 32, 32], grey; n may be 0.
        keys: uint8 [m, 32, 32], grey; m may be 0.
        earlier: compare query i only with keys before i, to find copies within one array.
    """
    (a, own), (b, squares) = _normalised(queries), _normalised(keys)
    rows = 1 + PRODUCTS // (1 + len(b))
    for start in range(0, len(a), rows):
        products = a[start : start + rows] @ (b[: start + rows] if earlier else b).T
        for i, row in enumerate(products, start):
            end = i if earlier else len(b)
            distances = squares[:end] + own[i] - 2 * row[:end]
            near = np.flatnonzero(distances <= NEAR_RMS**2 * THUMBNAIL**2)
            for key in near[np.argsort(distances[near], kind="stable")].tolist():
                if np.abs(b[key] - a[i]).max() <= NEAR_MAX:
                    yield i, key
                    break


def _normalised(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 [n, 1024] of mean 0 and standard deviation 1, and the sums of squares."""
    pixels = images.reshape(len(images), THUMBNAIL**2).astype(np.float32)
    pixels -= pixels.mean(1, keepdims=True)
    deviation = pixels.std(1)
    pixels /= np.maximum(deviation, 2 * PLAIN)[:, None]  # noise in faint images stays small
    squares = np.einsum("np,np->n", pixels, pixels)
    return pixels, np.where(deviation < PLAIN, np.inf, squares)  # plain images are far from all
