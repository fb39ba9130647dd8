"""The annotations of an image, as readers of all layouts but COCO's hold them."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from data.image_files import FileIndex
from data.image_sets import SET_WORDS, is_set_name, set_word
from data.skips import Skip, SkipKind
from utils.errors import UserError

T = TypeVar("T")
DATA_FOLDERS = {"annotations", "original_annotations", "xml", "xmls", "labels", "jpegimages",
                "images", "imgs", "img", "imagesets", "obj_train_data", "vocdevkit"}
"""Names of folders, in lower case, that mean something to a reader."""
OTHER_JSON = {b'"shapes"': "LabelMe's format", b'"dm_format_version"': "Datumaro's format",
              b'"coordinates"': "CreateML's format", b'"_via_img_metadata"': "VIA's format",
              b'"objects"': "Supervisely's format", b'"regions"': "VoTT's format"}
"""What a JSON file of a labelling tool holds."""
_DATA_SUFFIXES = {".xml", ".yaml", ".yml", ".names", ".jpg", ".jpeg", ".png", ".bmp",
                  ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Annotation:
    """The annotations of one image with n objects, n may be 0.

    path: the file that holds them, for messages.
    size: (width, height) in pixels; None where the file gives none or no positive one.
    names: class names, [n].
    boxes: float64 [n, 4], (x1, y1, x2, y2) in pixels counted from 0, both ends
        inside the box. They may have no area or lie outside the image.
    difficult: bool [n].
    filename: of the image, without folders; "" where the annotation names none.
    where: what messages call it; "" for the path.
    unread: whether it is empty because reading it failed.
    """

    path: Path
    size: tuple[int, int] | None
    names: tuple[str, ...]
    boxes: np.ndarray
    difficult: np.ndarray
    filename: str = ""
    where: str = ""
    unread: bool = False

    def __str__(self) -> str:
        return self.where or str(self.path)

    @classmethod
    def empty(cls, path: Path) -> Annotation:
        """Return an annotation without size and objects."""
        return cls(path, None, (), np.zeros((0, 4)), np.zeros(0, bool))

    def part(self, kept: np.ndarray) -> Annotation:
        """Return the annotation with the objects that are ``kept``, bool [n]."""
        if kept.all():
            return self
        names = tuple(name for name, keep in zip(self.names, kept, strict=True) if keep)
        return replace(self, names=names, boxes=self.boxes[kept], difficult=self.difficult[kept])


def join(annotations: Sequence[Annotation],
         classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the M objects of all annotations in a row.

    These are int64 [M] positions of their annotations, ascending, float64 [M, 4] boxes, int64 [M]
    labels, from 1, 0 for a name that is not in ``classes``, and bool [M] difficult flags.
    """
    label_of = {name: label for label, name in enumerate(classes, 1)}
    images = np.repeat(np.arange(len(annotations)), [len(each.names) for each in annotations])
    labels = [label_of.get(name, 0) for each in annotations for name in each.names]
    boxes = np.concatenate([np.empty((0, 4)), *(each.boxes for each in annotations)])
    flags = np.concatenate([np.empty(0, bool), *(each.difficult for each in annotations)])
    return images, boxes, np.array(labels, np.int64), flags


class Loaded(NamedTuple):
    """What a reader has read of some image sets; no image is opened for it.

    ids, images (files) and annotations have one entry an image.
    """

    ids: list[str]
    images: list[Path]
    annotations: list[Annotation]
    classes: tuple[str, ...]
    skipped: list[Skip]


def around_rotated(cx: float, cy: float, w: float, h: float, angle: float) -> list[float]:
    """Return x1, y1, x2, y2 of the box around one that is rotated by an angle in radians."""
    sin, cos = abs(math.sin(angle)), abs(math.cos(angle))
    x, y = (w * cos + h * sin) / 2, (w * sin + h * cos) / 2
    return [cx - x, cy - y, cx + x, cy + y]


def turned(box: Sequence[float], rotation: object) -> Sequence[float]:
    """Return x1, y1, x2, y2 of the box around ``box`` turned about its centre.

    CVAT writes a box before its rotation, and the angle in degrees as the attribute "rotation". A
    value that is no number is an attribute of another kind.
    """
    try:
        angle = math.radians(float(rotation))
    except (TypeError, ValueError):
        return box
    if not angle or not math.isfinite(angle):
        return box
    x1, y1, x2, y2 = box
    return around_rotated((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, angle)


def tell(fault: str, faults: list[str] | None) -> None:
    """Raise UserError, or add its sentence to ``faults``."""
    if faults is None:
        raise UserError(fault)
    faults.append(fault)


def read_or_tell(read: Callable[[], Annotation], path: Path,
                 faults: list[str] | None) -> Annotation:
    """Return ``read()``, or an empty annotation after a fault that was added to ``faults``."""
    try:
        return read()
    except UserError as error:
        tell(str(error), faults)
        return replace(Annotation.empty(path), unread=True)


def check_ids(ids: Sequence[str], images: Sequence[Path], faults: list[str] | None) -> None:
    """Refuse images whose id no line of a text file can hold, or add that to ``faults``."""
    for id, image in zip(ids, images, strict=True):
        unfit = not id.isprintable() and {*map(unicodedata.category, id)} & {"Cc", "Cs", "Zl", "Zp"}
        if unfit or id != id.strip():
            tell(f"{str(image)!a}: the name of the image has a control character, half of a "
                 "surrogate pair or a space at an end; rename the image and its annotation", faults)


def check_folder(root: Path) -> None:
    """Raise UserError if ``root`` is no folder."""
    if not os.path.isdir(root):  # False, too, for a name that no file system takes
        raise UserError(f"{root}: no such data set folder; give the right one with --root "
                        "(data/scripts/ downloads published data, docs/own_data.md on others)")


def holds_data(root: Path) -> bool:
    """Return whether ``root`` itself holds files or folders of a data set."""
    for path in root.glob("[!.]*"):
        name, suffix = path.name.lower(), path.suffix.lower()
        if path.is_dir():
            if name in DATA_FOLDERS or name.startswith("voc2") or set_word(name) in SET_WORDS:
                return True
        elif suffix in _DATA_SUFFIXES or suffix == ".json" and looks_like_coco(path) or (
                suffix == ".txt" and (path.stem.lower() in ("classes", "labels", "labelmap")
                                      or set_word(path.stem) in SET_WORDS)):
            return True
    return False


def looks_like_coco(path: Path) -> bool:
    """Return whether the start and the end of a file are of an object with images and boxes."""
    try:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            ends = file.read(2**16)
            file.seek(max(0, os.path.getsize(path) - 2**16))
            ends = (ends + file.read(2**16)).replace(b"\0", b"")  # of UTF-16, too
    except OSError:
        return False
    wanted = (rb'"(images|categories)"\s*:\s*\[', rb'"image_id"\s*:|"annotations"\s*:\s*\[\s*\]')
    return re.match(rb"[^\w\[]*\{", ends) is not None and all(re.search(w, ends) for w in wanted)


def other_format(root: Path, *suffixes: str) -> str:
    """Return which annotations that no reader takes are under ``root``; "" for none."""
    for suffix in suffixes:
        for path in FileIndex((suffix,)).inside(root)[:20]:
            with suppress(OSError), open(path, "rb") as file:
                head = file.read(2**16)
                tool = next((tool for key, tool in OTHER_JSON.items() if key in head), "")
                if tool or suffix != ".json":
                    return f"{path} is of {tool or 'a format'} that is not read; convert the data "\
                           "to COCO or VOC"
    return ""


def refuse_missing(place: object, missing: Sequence[object], what: str = "images") -> None:
    """Raise UserError for files that annotations or lists name and that do not exist."""
    if missing:
        first = ", ".join(map(str, missing[:5])) + ", ..." * (len(missing) > 5)
        raise UserError(f"{place}: {what} missing ({len(missing)}): {first}; copy them there, or "
                        "correct the names")


def unannotated(used: Collection[Path], images: FileIndex) -> list[Skip]:
    """Return records of the folders of image sets beside those ``used`` that hold images alone."""
    beside = (each for parent in sorted({each.parent for each in used})
              for each in images.subfolders(parent))
    return [Skip(SkipKind.SET_UNANNOTATED, None, None, f"{each} has {count} images")
            for each in beside if is_set_name(each.name) and each not in used
            and (count := len(images.inside(each)))]


def outside_root(root: Path, images: Sequence[Path]) -> list[Skip]:
    """Return records of the images that do not lie under ``root``, links not followed."""
    start = os.path.join(os.path.abspath(root), "")
    return [Skip(SkipKind.OUTSIDE_ROOT, i, None, str(image)) for i, image in enumerate(images)
            if not os.path.abspath(image).startswith(start)]


def once(found: Iterable[T], skipped: list[Skip], where: Callable[[T], str] = str,
         key: Callable[[T], object] = str) -> list[T]:
    """Return each image once; ``skipped`` gets a record ``where`` it is found again by its key."""
    first: dict[object, int] = {}
    kept = []
    for each in found:
        if (index := first.setdefault(key(each), len(kept))) == len(kept):
            kept.append(each)
        else:
            skipped.append(Skip(SkipKind.IMAGE_LISTED_TWICE, index, None, where(each)))
    return kept


def check_objects(what: str, annotations: Sequence[Annotation], classes: Sequence[str],
                  faults: list[str] | None) -> list[Skip]:
    """Return a record for each object whose class is not in ``classes``.

    Refuse image sets without an object of ``classes``, or add that to ``faults``.
    """
    names, known = {name for each in annotations for name in each.names}, {*classes}
    if not names & known:
        tell(f"{what} has no object of the classes {', '.join(classes) or '(none)'}; its "
             f"annotations name: {', '.join(sorted(names)) or 'no object at all'}", faults)
    return [Skip(SkipKind.UNKNOWN_CLASS, image, tuple(each.boxes[k].tolist()),
                 f'{each}: object {k + 1} ("{name}")')
            for image, each in enumerate(annotations)
            for k, name in enumerate(each.names) if name not in known]
