"""YOLO's text files: a line an object, in shares of the image's width and height.

`data.yolo_layout` says where they lie. An image without a label file is background.
"""

import math
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from data.annotated import AnnotatedImages
from data.annotation import (
    Annotation,
    Loaded,
    check_folder,
    check_objects,
    once,
    read_or_tell,
    refuse_missing,
    tell,
)
from data.classes import BACKGROUND, check_classes
from data.image import IMAGE_SUFFIXES, image_size
from data.image_files import FileIndex
from data.image_sets import ImageSet, sets_name
from data.skips import Skip, SkipKind
from data.split import choose, list_files
from data.yolo_layout import NAME_FILES, YOLOFolder, is_label, names_beside, relative
from utils.errors import UserError
from utils.files import read_text


def read_label(path: Path, keypoints: int = 0) -> tuple[list[float], np.ndarray, list[int]]:
    """Read one label file; ``keypoints`` is the number of values behind each box.

    Returns:
        The class numbers, [n]; float64 [n, 4], left, top, right and bottom in shares of the image,
        of the box around a polygon or a rotated box (four corners); and the positions of objects
        that have a value outside 0..1 beyond rounding.

    Raises:
        UserError: a line is no label. The message names file, line and value.
    """
    numbers, edges, outside = [], [], []
    for line, text in enumerate(read_text(path, "label file", 2**28).splitlines(), 1):
        if not (words := text.split()):
            continue
        where = f"{path}:{line}"
        number, *values = (_number(where, word) for word in words)
        if number < 0 or number % 1:
            raise UserError(f'{where}: "{words[0]:.60}" is no class number; write 0, 1, ...')
        if keypoints and len(values) == 4 + keypoints:
            values = values[:4]
        if min(values, default=0) < -0.001 or max(values, default=0) > 1.001:
            outside.append(len(numbers))
        numbers.append(number)
        edges.append(_edges(where, values))
    return numbers, np.array(edges, np.float64).reshape(-1, 4), outside


def _number(where: str, word: str) -> float:
    with suppress(ValueError):
        if math.isfinite(value := float(word)):
            return value
    raise UserError(f'{where}: "{word:.60}" is no number; write class x y width height')


def _edges(where: str, values: Sequence[float]) -> tuple[float, ...]:
    if (count := len(values)) == 4:
        x, y, width, height = values
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    if count >= 6 and count % 2 == 0:
        return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    hint = "write 5 for a box, or an odd number from 7 for a polygon"
    if count == 5:
        hint = "the sixth is the score of a detection, and labels have none; export without scores"
    raise UserError(f"{where}: {count + 1} numbers; {hint}")


class YOLODetection(AnnotatedImages):
    """Samples of a folder with YOLO labels; boxes are the edges in pixels, the far ones - 1.

    Args:
        image_sets: (None, name) pairs: a list in ImageSets/, a set of data.yaml, a folder, or a
            part of all images (`data.split`).
        classes: names without background. None: those of data.yaml, classes.txt or obj.names.
            Where nothing names the classes, ``classes[k]`` is the class number k.
        others: as of `AnnotatedImages`.
    """

    @staticmethod
    def recognise(root: str | Path) -> str | None:
        try:
            folder = YOLOFolder(Path(os.path.expanduser(root)))
        except UserError:  # told when it is read
            return "YOLO (data.yaml)"
        return folder.layout

    @staticmethod
    def near_miss(root: str | Path) -> str:
        with suppress(UserError):
            return YOLOFolder(Path(os.path.expanduser(root))).near_miss()
        return ""

    @staticmethod
    def list_image_sets(root: str | Path) -> list[ImageSet]:
        folder = YOLOFolder(Path(os.path.expanduser(root)))
        names = dict.fromkeys([*(folder.sets or folder.declared()), *list_files(root)])
        return [ImageSet(None, name) for name in names]

    def _find_size(self, index: int) -> tuple[int, int]:
        return self.annotations[index].size or (1, 1)  # of the image, or not read

    def hint(self, box: np.ndarray, size: tuple[int, int]) -> str:
        far = (np.abs(box) > 2 * max(size)).any()
        return ": pixels where shares of the image, 0 to 1, belong?" if far else ""

    def load(self, classes: Sequence[str] | None, faults: list[str] | None) -> Loaded:
        check_folder(self.root)
        folder = YOLOFolder(self.root)
        self.layout = folder.layout
        if self.layout is None:
            why = folder.near_miss() or "no data.yaml, no .txt files in labels/ or beside images"
            raise UserError(f"{self.root} holds no YOLO labels: {why} (docs/own_data.md)")
        classes = None if classes is None else check_classes(classes, "classes")
        source = self.root / folder.source
        if not folder.names:
            source, folder.names = names_beside(self.root) or (
                "--classes", dict(enumerate(classes or ())))
        what = f"{self.root}: the image set {sets_name(self.image_sets)}"
        skipped = [Skip(SkipKind.SET_ABSENT, None, None, f"{folder.source}: {key}: {values[0]}")
                   for key, values in folder.absent.items()]
        images = once(self._list(folder, faults), skipped)
        labels = [folder.label_of(image) for image in images]
        if not any(labels):
            tried = " or ".join(f"{each}.txt" for each in folder.label_stems(images[0])[:2])
            raise UserError(f"{what}: none of {len(images)} images has a label file, such as "
                            f"{tried}")
        skipped += _orphans(images, labels)
        annotations, unnamed = [], Counter()
        users: dict[Path, Path] = {}
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            if label and (other := users.setdefault(label, image)) != image:
                tell(f"{other} and {image} both have the label file {label}; keep one of the "
                     "images", faults)
            read = partial(_read, folder, i, image, label, skipped, unnamed)
            annotations.append(read_or_tell(read, label or image, faults))
            if label is None and not annotations[-1].unread:
                skipped.append(Skip(SkipKind.NO_LABEL_FILE, i, None, str(image)))
        if not folder.names:
            numbers = sorted({name for each in annotations for name in each.names}, key=float)
            raise UserError(f"{self.root}: nothing names the classes "
                            f"{', '.join(numbers[:20]) or '0, 1, ...'}; {_naming(folder)}")
        if unnamed:
            first = sorted(folder.names.items())[:20]
            named = ", ".join(f"{number} {name}" for number, name in first)
            tell(f"{source} names {named}; {unnamed.total()} labels of "
                 f"{sets_name(self.image_sets)} use "
                 f"{', '.join(map('{:g}'.format, sorted(unnamed)))}: add each name, "
                 "or correct the labels", faults)
        classes = classes or tuple(name for _, name in sorted(folder.names.items())
                                   if name not in BACKGROUND)
        self.numbers = {name: number for number, name in folder.names.items()}  # of all names
        if not unnamed or any(each.names for each in annotations):  # else that has been told
            skipped += check_objects(what, annotations, classes, faults)
        return Loaded(_ids(self.root, images), images, annotations, classes, skipped)

    def _list(self, folder: YOLOFolder, faults: list[str] | None) -> list[Path]:
        """Return the image files of the image sets, maybe some twice."""
        images: list[Path] = []
        missing: list[str] = []
        for name in map(str, self.image_sets):
            if name in folder.sets and name not in list_files(self.root):
                images += folder.of_set(name, missing)
                continue
            declared = folder.declared()
            index = {path: i for i, path in
                     enumerate(dict.fromkeys(chain(*declared.values(), folder.images)))}
            positions = {key: [index[path] for path in each] for key, each in declared.items()}
            every, names = list(index), [relative(path, self.root) for path in index]
            images += [every[i] for i in choose(self.root, ImageSet(None, name), names, positions,
                                                self.val_share, self.split_by)]
        if faults is None:
            refuse_missing(self.root, missing)
        return images


def _naming(folder: YOLOFolder) -> str:
    """Return how to name the classes of a folder."""
    above = Path(os.path.abspath(folder.root)).parent
    if any((above / name).is_file() for name in (*NAME_FILES, "data.yaml", "data.yml")):
        return f"give {above} as --root, which names them"
    if folder.source:
        return f"add names: [a, b, c] to {folder.root / folder.source}, in the order of numbers"
    return "give --classes a,b,c in the order of their numbers, or write classes.txt, one a line"


def _ids(root: Path, images: Sequence[Path]) -> list[str]:
    """Return the paths of images from the root, without suffix where they differ so."""
    names = [relative(path, root) for path in images]
    stems = [os.path.splitext(name)[0] for name in names]
    counts = Counter(stems)
    return [stem if counts[stem] == 1 else name for stem, name in zip(stems, names, strict=True)]


def _read(folder: YOLOFolder, index: int, image: Path, label: Path | None,
          skipped: list[Skip], unnamed: Counter) -> Annotation:
    """Return the annotation of an image, in pixels; empty without a label file.

    unnamed: counts the numbers without a name, whose objects are left out.
    """
    size = image_size(image)
    if label is None:
        return replace(Annotation.empty(Path(f"{folder.label_stems(image)[0]}.txt")), size=size)
    numbers, edges, outside = read_label(label, folder.keypoints)
    for k in outside:
        detail = f"{label}: object {k + 1}, edges {', '.join(f'{value:g}' for value in edges[k])}"
        skipped.append(Skip(SkipKind.VALUE_OUTSIDE, index, None, detail))
    names = [folder.names.get(number, f"{number:g}") for number in numbers]
    boxes = edges * (*size, *size) - (0, 0, 1, 1)
    annotation = Annotation(label, size, tuple(names), boxes, np.zeros(len(names), bool))
    if not folder.names:
        return annotation
    named = np.array([number in folder.names for number in numbers], bool)
    unnamed.update(number for number in numbers if number not in folder.names)
    return annotation.part(named)


def _orphans(images: Sequence[Path], labels: Sequence[Path | None]) -> list[Skip]:
    """Return records of the label files beside those read that have no image."""
    used = set(labels)
    folders = {(label.parent, image.parent)
               for image, label in zip(images, labels, strict=True) if label}
    texts, index = FileIndex((".txt",)), FileIndex(IMAGE_SUFFIXES)
    found = []
    for folder in sorted({folder for folder, _ in folders}):
        for file in texts.inside(folder):
            if file.parent == folder and file not in used and file.name not in NAME_FILES:
                places = [images / file.stem for each, images in folders if each == folder]
                if not any(map(index.by_stem, places)) and is_label(file):
                    found.append(Skip(SkipKind.LABEL_WITHOUT_IMAGE, None, None, str(file)))
    return found
