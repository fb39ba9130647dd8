"""YOLO's text files: a line an object, in shares of the image's width and height.

`data.yolo_layout` says where they lie. The label file of an image has its name; an image without
one is background.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.annotated import AnnotatedImages
from data.annotation import Annotation, Loaded, check_objects, unknown_objects
from data.classes import check_classes
from data.image import IMAGE_SUFFIXES, image_size
from data.image_files import FileIndex
from data.image_sets import ImageSet, sets_name
from data.skips import Skip, SkipKind
from data.split import choose, list_files
from data.yolo_layout import IMAGE_FOLDERS, NAME_FILES, Images, find_folder, is_label
from utils.errors import UserError
from utils.files import read_text

# ---------------------------------------------------------------- labels


def read_label(path: Path, keypoints: int = 0) -> tuple[list[float], np.ndarray, list[int]]:
    """Read one label file.

    keypoints: number of values that follow each box.

    Returns:
        numbers: of the classes, [n].
        edges: float64 [n, 4], left, top, right and bottom in shares of the image. Those of a
            polygon, or of a rotated box (four corners), are those of the box around it.
        outside: positions of objects that have a value outside 0..1 beyond rounding.

    Raises:
        UserError: a line is no label. The message names file, line and value.
    """
    numbers, edges, outside = [], [], []
    for line, text in enumerate(read_text(path, "label file", 2**28).splitlines(), 1):
        if words := text.split():
            values = _read_line(f"{path}:{line}", words)
            numbers.append(values[0])
            edges.append(_edges(f"{path}:{line}", values[1:], keypoints))
            used = values[1 : 5 if keypoints else None]
            if min(used) < -0.001 or max(used) > 1.001:
                outside.append(len(numbers) - 1)
    return numbers, np.array(edges, np.float64).reshape(-1, 4), outside


def _read_line(where: str, words: Sequence[str]) -> list[float]:
    values = []
    for word in words:
        try:
            values.append(float(word))
        except ValueError:
            values.append(math.nan)
        if not math.isfinite(values[-1]):
            raise UserError(f'{where}: "{word:.60}" is no number; write class x y width height')
    if values[0] < 0 or values[0] % 1:
        raise UserError(f'{where}: "{words[0]:.60}" is no class number; write 0, 1, ...')
    return values


def _edges(where: str, values: Sequence[float], keypoints: int) -> tuple[float, ...]:
    """Return left, top, right and bottom of an object."""
    count = len(values)
    if count == 4 or (keypoints and count == 4 + keypoints):
        x, y, width, height = values[:4]
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    if count >= 6 and count % 2 == 0:
        return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    hint = "5 for a box, or an odd number from 7 for a polygon"
    if count == 5:
        hint = "labels have no sixth number, the score of a detection; export without scores"
    raise UserError(f"{where}: {count + 1} numbers; write {hint}")


# ---------------------------------------------------------------- reader


class YOLODetection(AnnotatedImages):
    """Samples of a folder with YOLO labels, see the module; boxes are continuous edges - (0, 1).

    Args:
        image_sets: (None, name) pairs. A set is a list in ImageSets/, an entry of data.yaml, a
            folder, or a part of all images (`data.split`).
        classes: names without background. None: those of data.yaml, classes.txt or obj.names.
            Where nothing names the classes, ``classes[k]`` is the class number k.
        others: as of `AnnotatedImages`.
    """

    @staticmethod
    def recognise(root: str | Path) -> str | None:
        try:
            found = find_folder(Path(os.path.expanduser(root)))
        except UserError:  # told when it is read
            return "YOLO (data.yaml)"
        return found.layout if found and (found.sets or found.images) else None

    @staticmethod
    def list_image_sets(root: str | Path) -> list[ImageSet]:
        root = Path(os.path.expanduser(root))
        found = find_folder(root)
        names = dict.fromkeys([*(found.sets if found else ()), *list_files(root)])
        return [ImageSet(None, name) for name in names]

    def _find_size(self, index: int) -> tuple[int, int]:
        return self.annotations[index].size  # read from the image

    def hint(self, box: np.ndarray, size: tuple[int, int]) -> str:
        far = (np.abs(box) > 2 * max(size)).any()
        return ": pixels where shares of the image, 0 to 1, belong?" if far else ""

    def load(self, classes: Sequence[str] | None, faults: list[str] | None) -> Loaded:
        found = find_folder(self.root)
        if found is None:
            raise UserError(
                f"{self.root} holds no YOLO labels: no data.yaml, and no .txt files in labels/ or "
                "beside the images; docs/own_data.md shows where they go"
            )
        if classes is not None:
            classes = check_classes(classes, "classes")
        names = found.names
        if names is None and classes is not None:
            names = dict(enumerate(classes))
        what = f"{self.root}: the image set {sets_name(self.image_sets)}"
        images, skipped = self._list(Images(self.root, found), faults)
        labels = _Labels(self.root, names, found.keypoints, faults)
        annotations = [labels.read(i, path) for i, path in enumerate(images)]
        labels.record_orphans()
        skipped += labels.skipped
        if images and len(labels.missing) == len(images):
            raise UserError(
                f"{what}: none of {len(images)} images has a label file, such as "
                f"{' or '.join(f'{each}.txt' for each in _label_stems(images[0], self.root)[:2])}"
            )
        if names is None:
            numbers = sorted({name for each in annotations for name in each.names}, key=float)
            raise UserError(
                f"{self.root}: nothing names the classes {', '.join(numbers[:20]) or '0, 1, ...'}; "
                "give --classes a,b,c in the order of their numbers, or write classes.txt, one a "
                "line"
            )
        if classes is None:
            classes = tuple(names[number] for number in sorted(names))
        check_objects(what, annotations, classes, faults)
        skipped += unknown_objects(annotations, classes)
        return Loaded(image_ids(images, self.root), images, annotations, classes, skipped)

    def _list(self, files: Images, faults: list[str] | None) -> tuple[list[Path], list[Skip]]:
        """Return the image files of the image sets, each once."""
        images: dict[Path, int] = {}
        missing: list[str] = []
        skipped = [
            Skip(SkipKind.SET_ABSENT, None, None, f"{files.folder.source}: {key}: {values[0]}")
            for key, values in files.folder.absent.items()
        ]
        lists = list_files(self.root)
        for image_set in self.image_sets:
            if str(image_set) in files.folder.sets and str(image_set) not in lists:
                found = files.of_set(str(image_set), missing)
            else:
                every = files.all()
                index = {path: i for i, path in enumerate(every)}
                names = [relative(path, self.root) for path in every]
                declared = {name: [index[path] for path in files.of_set(name, [])]
                            for name in files.folder.sets}  # fmt: skip
                chosen = choose(self.root, image_set, names, declared, self.val_share,
                                self.split_by)
                found = [every[i] for i in chosen]
            for path in found:
                if path in images:
                    skipped.append(Skip(SkipKind.IMAGE_LISTED_TWICE, images[path], None, str(path)))
                images.setdefault(path, len(images))
        if missing and faults is None:
            more = ", ..." if len(missing) > 5 else ""
            raise UserError(
                f"{self.root}: {len(missing)} images that a list names are missing: "
                f"{', '.join(missing[:5])}{more}"
            )
        for path, i in images.items():
            if relative(path, self.root).startswith("../"):
                skipped.append(Skip(SkipKind.OUTSIDE_ROOT, i, None, str(path)))
        return list(images), skipped


class _Labels:
    """Reads the label files of images, and records what is wrong with them."""

    def __init__(self, root: Path, names: dict[int, str] | None, keypoints: int,
                 faults: list[str] | None) -> None:
        self.root = root
        self.names = names
        self.keypoints = keypoints
        self.faults = faults
        self.missing: list[Path] = []
        self.skipped: list[Skip] = []
        self._index = FileIndex((".txt",))
        self._image_of: dict[Path, Path] = {}
        self._folders: set[tuple[Path, Path]] = set()

    def read(self, index: int, image: Path) -> Annotation:
        """Return the annotation of an image, in pixels; empty without a label file."""
        found = (self._index.by_stem(stem) for stem in _label_stems(image, self.root))
        path = next((files[0] for files in found if files), None)
        try:
            size = image_size(image)
            if path is None:
                self.missing.append(image)
                self.skipped.append(Skip(SkipKind.NO_LABEL_FILE, index, None, str(image)))
                return replace(Annotation.empty(image), size=size)
            self._folders.add((path.parent, image.parent))
            if (other := self._image_of.setdefault(path, image)) != image:
                raise UserError(f"{other} and {image} both have the label file {path}; keep one")
            return self._pixels(index, path, size)
        except UserError as error:
            if self.faults is None:
                raise
            self.faults.append(str(error))
            return replace(Annotation.empty(path or image), size=(1, 1))

    def record_orphans(self) -> None:
        """Record the label files beside those read that have no image."""
        images, stems = FileIndex(IMAGE_SUFFIXES), {}
        for labels, folder in self._folders:
            stems.setdefault(labels, []).append(folder)
        for labels, folders in stems.items():
            for file in self._index.inside(labels):
                if file.parent != labels or file in self._image_of or file.name in NAME_FILES:
                    continue
                if not any(images.by_stem(folder / file.stem) for folder in folders):
                    if is_label(file):
                        self.skipped.append(
                            Skip(SkipKind.LABEL_WITHOUT_IMAGE, None, None, str(file))
                        )

    def _pixels(self, index: int, path: Path, size: tuple[int, int]) -> Annotation:
        numbers, edges, outside = read_label(path, self.keypoints)
        names = [f"{number:g}" for number in numbers]
        if self.names is not None:
            names = [self.names.get(number, f"number {number:g}, without a name")
                     for number in numbers]
        for k in outside:
            detail = f"{path}: object {k + 1}, edges {', '.join(f'{v:g}' for v in edges[k])}"
            self.skipped.append(Skip(SkipKind.VALUE_OUTSIDE, index, None, detail))
        boxes = edges * (*size, *size) - (0, 0, 1, 1)
        return Annotation(path, size, tuple(names), boxes, np.zeros(len(names), bool))


def _label_stems(image: Path, root: Path) -> list[str]:
    """Return where the label file of an image may be, without suffix."""
    stem = os.path.splitext(image)[0]
    folder, name = os.path.split(stem)
    parts = folder.split(os.sep)
    k = next((k for k in reversed(range(len(parts))) if parts[k] in IMAGE_FOLDERS), None)
    swapped = [] if k is None else [
        os.sep.join([*parts[:k], IMAGE_FOLDERS[parts[k]], *parts[k + 1 :], name])
    ]
    inner = os.path.splitext(relative(image, root))[0]
    own = [os.path.join(folder, "labels", name), os.path.join(root, "labels", inner)]
    return [*swapped, stem, *own]


def relative(path: Path, root: Path) -> str:
    """Return the path of an image from the root, with slashes."""
    return os.path.relpath(path, root).replace(os.sep, "/")


def image_ids(images: Sequence[Path], root: Path) -> list[str]:
    """Return the path of each image from the root, without suffix where that is its own."""
    names = [relative(path, root) for path in images]
    stems = [os.path.splitext(name)[0] for name in names]
    counts = Counter(stems)
    return [stem if counts[stem] == 1 else name for stem, name in zip(stems, names, strict=True)]
