"""PASCAL VOC's comp4 files: one text file a class, one detection a line."""

import hashlib
import math
import re
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from data.detections import as_columns
from data.image_sets import ImageSet, sets_name
from data.judge import Found
from utils.errors import UserError
from utils.files import atomic_write, read_text

COMP4_FILES = "comp4_det_*.txt"
"""Pattern of the files of all sets and classes in a folder."""


def comp4_set(image_sets: Sequence[ImageSet]) -> str:
    """Return image sets as comp4 files name them: a single set by its official name, no year."""
    return image_sets[0].name if len(image_sets) == 1 else sets_name(image_sets)


def comp4_path(directory: str | Path, image_set: str, name: str, whole: bool = False) -> Path:
    """Return comp4_det_<set>_<class>.txt. A character that file names cannot hold becomes %XX.

    A long name ends in a digest. whole: escape all but a-z and 0-9, for a class whose name some
    disks confuse with another one's, such as "Cat" and "cat".
    """
    unfit = "[^a-z0-9]" if whole else r'[<>:"/\\|?*%\x00-\x1f]'
    name = re.sub(unfit, lambda match: "".join(f"%{b:02X}" for b in match[0].encode()), name)
    if len(data := name.encode()) > 150:
        name = f"{data[:130].decode(errors='ignore')}%{hashlib.sha256(data).hexdigest()[:16]}"
    return Path(directory) / f"comp4_det_{image_set}_{name}.txt"


def write_comp4(directory: str | Path, image_set: str, classes: Sequence[str], ids: Sequence[str],
                detections: Sequence[dict]) -> None:
    """Write a comp4 file for each class, also for one without detections.

    A line is `id score x1 y1 x2 y2`, in pixels counted from 1. Scores keep all bits of a float32,
    and so their order; boxes are rounded to 1/1000 pixel.

    detections: one dict an id as in `data.detections.as_columns`, which says what is malformed.
    Raises UserError for a file that cannot be written.
    """
    images, scores, labels, boxes = as_columns(detections, ids, len(classes))
    boxes, seen = boxes + 1, set()
    for label, name in enumerate(classes, 1):
        of_class = np.flatnonzero(labels == label)
        names = [ids[image] for image in images[of_class].tolist()]
        columns = (scores[of_class], *boxes[of_class].T)
        rows = zip(names, *(column.tolist() for column in columns), strict=True)
        lines = [f"{image_id} {score:.9g} {x1:.3f} {y1:.3f} {x2:.3f} {y2:.3f}\n"
                 for image_id, score, x1, y1, x2, y2 in rows]
        key = unicodedata.normalize("NFC", name).casefold()
        with atomic_write(comp4_path(directory, image_set, name, whole=key in seen)) as file:
            file.write("".join(lines).encode())
        seen.add(key)


def read_comp4(directory: str | Path, image_set: str, classes: Sequence[str],
               ids: Sequence[str]) -> tuple[Found, list[str]]:
    """Return the detections of an image set, class by class, and a line for each missing file.

    Raises UserError, with file and line, for no file at all, a malformed line, or an image id that
    is not in ``ids``.
    """
    paths = {name: comp4_path(directory, image_set, name, whole=True) for name in classes}
    paths = {name: path if path.is_file() else comp4_path(directory, image_set, name)
             for name, path in paths.items()}
    missing = {name: path for name, path in paths.items() if not path.is_file()}
    if len(missing) == len(paths):
        existing = sorted(path.name for path in Path(directory).glob(COMP4_FILES))[:10]
        raise UserError(f"{directory}: no detection file of the classes {', '.join(classes)}, such "
                        f"as {comp4_path('', image_set, classes[0])}; existing: "
                        f"{', '.join(existing) or 'none'}")
    position = {image_id: index for index, image_id in enumerate(ids)}
    parts = [_read_class(path, position, label) for label, (name, path)
             in enumerate(paths.items(), 1) if name not in missing]
    found = Found(*map(np.concatenate, zip(*parts, strict=True)))
    return found, [f"{path}: no such file, {name} has no detections" for name, path
                   in missing.items()]


def _read_class(path: Path, position: dict[str, int], label: int) -> Found:
    text = read_text(path, "detections")
    lines, words = text.splitlines(), text.split()
    if len(words) == 6 * len(lines) and all(line.count(" ") == 5 for line in lines):
        # As `write_comp4` writes it: several times faster. What fails is told below.
        with suppress(KeyError, ValueError):
            images = np.array([position[word] for word in words[::6]], np.int64)
            del words[::6]
            columns = np.fromiter(map(float, words), np.float64, len(words)).reshape(-1, 5)
            if np.isfinite(columns).all():
                return _found(images, columns, label)
    images, numbers = [], []
    for number, line in enumerate(lines, 1):
        if not (line := line.strip()):
            continue
        try:
            image_id, *values = line.rsplit(maxsplit=5)  # an id may hold spaces
            values = [*map(float, values)]
        except ValueError:
            values = []
        if len(values) != 5 or not all(map(math.isfinite, values)):
            raise UserError(f'{path}:{number}: "{line}" is not of the form `id score x1 y1 x2 y2`')
        if image_id not in position:
            raise UserError(f'{path}:{number}: image id "{image_id}" is not in the image set; give '
                            "the image sets, --val_share and --split_by of the test")
        images.append(position[image_id])
        numbers += values
    columns = np.array(numbers, np.float64).reshape(-1, 5)
    return _found(np.array(images, np.int64), columns, label)


def _found(images: np.ndarray, columns: np.ndarray, label: int) -> Found:
    return Found(images, columns[:, 1:] - (1, 1, 0, 0), np.full(len(images), label), columns[:, 0])
