"""CVAT's own XML "for images": one file with the annotations of all images."""

import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
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
    turned,
)
from data.classes import BACKGROUND, check_classes, spelled
from data.image import IMAGE_SUFFIXES
from data.image_files import FileIndex
from data.image_sets import DEFAULT_SET, ImageSet, sets_name
from data.skips import Skip, SkipKind
from data.split import choose, list_files
from data.voc_xml import finite, read_xml
from utils.errors import UserError

AREAS = ("box", "polygon", "ellipse", "mask")
"""Shapes that are read, as the boxes around them."""


def find_files(root: Path) -> list[Path]:
    """Return the XML files in ``root``, not below it, whose first tag is <annotations>."""
    files = [file for file in root.glob("[!.]*.xml") if file.is_file()]
    found = []
    for file in sorted(files, key=lambda file: (file.name != "annotations.xml", file.name)):
        with open(file, "rb") as opened:
            head = opened.read(4096).replace(b"\0", b"")
        tag = re.search(rb"<([A-Za-z]\w*)", head)
        if file.name != "annotations.xml" and not (tag and tag[1] == b"annotations"):
            break  # a folder may hold thousands of VOC's
        if not (tag and tag[1] == b"annotation"):
            found.append(file)
    return found


class _Image:
    """One <image> of a file."""

    def __init__(self, path: Path, number: int, element: ElementTree.Element) -> None:
        self.path, self.element, self.name = path, element, element.get("name", "").strip()
        self.subset = element.get("subset", "").strip()
        self.subset = self.subset or path.stem.removeprefix("annotations")  # Datumaro's Train.xml
        self.where = f'{path}: image {number} ("{self.name}")'
        if not self.name:
            raise UserError(f"{path}: image {number} has no name; export the task again")

    def read(self) -> Annotation:
        """Return the boxes around all shapes that have an area.

        Raises UserError for a shape without a label, or a value that is no finite number.
        """
        names, edges, size, where = [], [], None, self.where
        try:
            if {"width", "height"} <= {*self.element.keys()}:
                width, height = _values(self.element, "width", "height")
                if min(width, height) < 1:
                    raise ValueError(f"{width:g} x {height:g}; write the image's size")
                size = int(width), int(height)
            for number, shape in enumerate(self.element, 1):
                if shape.tag in AREAS:
                    names.append(spelled(shape.get("label", "")))
                    where = f'{self.where}: {shape.tag} {number} ("{names[-1]}")'
                    if not names[-1]:
                        raise ValueError("no label; export the task again")
                    edges.append(_edges(shape))
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        boxes = np.array(edges, np.float64).reshape(-1, 4) - (0, 0, 1, 1)
        flags = np.zeros(len(names), bool)
        return Annotation(self.path, size, tuple(names), boxes, flags, where=self.where)


def _values(element: ElementTree.Element, *keys: str) -> list[float]:
    return [finite(element.get(key), key) for key in keys]


def _edges(shape: ElementTree.Element) -> Sequence[float]:
    """Return left, top, right and bottom of the box around a shape."""
    rotation = finite(shape.get("rotation", "0"), "rotation")
    if shape.tag == "polygon":
        words = re.split(r"[,;]", shape.get("points", "").strip("; "))
        points = [finite(word, "points") for word in words]
        if len(points) < 4 or len(points) % 2:
            raise ValueError(f"{len(points)} numbers in points; write x,y;x,y;x,y")
        x, y = points[::2], points[1::2]
        return min(x), min(y), max(x), max(y)
    if shape.tag == "mask":
        left, top, width, height = _values(shape, "left", "top", "width", "height")
        return left, top, left + width, top + height
    if shape.tag == "ellipse":
        x, y, rx, ry = _values(shape, "cx", "cy", "rx", "ry")
        cos, sin = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
        half = math.hypot(rx * cos, ry * sin), math.hypot(rx * sin, ry * cos)
        return x - half[0], y - half[1], x + half[0], y + half[1]
    return turned(_values(shape, "xtl", "ytl", "xbr", "ybr"), rotation)


def _read_files(root: Path) -> tuple[list[_Image], list[str]]:
    """Return the images of all files, and the labels that may have an area."""
    images, labels = [], {}
    for path in find_files(root):
        document = read_xml(path)
        for element in document.iter():
            element.tag = element.tag.rpartition("}")[2]
        if document.tag != "annotations":
            raise UserError(f"{path}: its first tag is <{document.tag}>, not <annotations>")
        if document.find("track") is not None:
            raise UserError(f'{path}: an export "for video", whose tracks name no images; export '
                            'the task as "CVAT for images" or in another format')
        if stray := [each.tag for each in document if each.tag != "image"
                     and any(inner.tag in AREAS for inner in each.iter())]:
            raise UserError(f"{path}: <{stray[0]}> holds shapes that are in no <image>; export the"
                            " task again")
        images += [_Image(path, k, each) for k, each in enumerate(document.findall("image"), 1)]
        for label in document.iterfind("./meta//label"):
            kind = (label.findtext("type") or "any").strip()
            if label.find("parent") is None and kind in ("any", "rectangle", *AREAS):
                labels[spelled(label.findtext("name") or "")] = None
    return images, [label for label in labels if label and label not in BACKGROUND]


def _subsets(images: Sequence[_Image]) -> dict[str, list[int]]:
    """Return the positions of the images of each subset; none if there is only CVAT's own."""
    found: dict[str, list[int]] = {}
    for i, image in enumerate(images):
        found.setdefault(image.subset or DEFAULT_SET, []).append(i)
    return {} if found.keys() <= {DEFAULT_SET} else found


class CVATDetection(AnnotatedImages):
    """Samples of a task or a project that CVAT exported "for images" into ``root``.

    Boxes are those around boxes, polygons, ellipses and masks, also rotated ones, as continuous
    edges - (0, 1); other shapes are recorded. Images lie in images/, images/SUBSET/ or beside the
    XML. Image sets are subsets of a project, or files of other names, else lists or parts
    (`data.split`). Arguments as of `AnnotatedImages`; classes are the labels of the task, in order.
    """

    @staticmethod
    def recognise(root: str | Path) -> str | None:
        return "CVAT for images" if find_files(Path(os.path.expanduser(root))) else None

    @staticmethod
    def list_image_sets(root: str | Path) -> list[ImageSet]:
        root = Path(os.path.expanduser(root))
        names = dict.fromkeys([*_subsets(_read_files(root)[0]), *list_files(root)])
        return [ImageSet(None, name) for name in names]

    def load(self, classes: Sequence[str] | None, faults: list[str] | None) -> Loaded:
        check_folder(self.root)
        every, labels = _read_files(self.root)
        if not every:
            raise UserError(f"{self.root}: no annotations.xml of CVAT with an <image>; export the "
                            'task as "CVAT for images"')
        names = [f"{image.subset}/{image.name}".strip("/") for image in every]
        skipped: list[Skip] = []
        listed = (i for each in self.image_sets
                  for i in choose(self.root, each, names, _subsets(every), self.val_share,
                                  self.split_by))
        chosen = once(listed, skipped, lambda i: every[i].where)
        images = [every[i] for i in chosen]
        paths = self._find(images, faults)
        annotations = [read_or_tell(image.read, image.path, faults) for image in images]
        if classes is None:
            used = {spelled(shape.get("label", "")) for image in every
                    for shape in image.element if shape.tag in AREAS}
            classes = [*labels, *sorted(used - {*labels, ""})]
        classes = check_classes(classes, str(self.root)) if classes else ()
        what = f"{self.root}: the image set {sets_name(self.image_sets)}"
        tags = sorted({shape.tag for image in images for shape in image.element})
        if tags and not {*AREAS} & {*tags} and faults is None:
            raise UserError(f"{what} has no {', '.join(AREAS)}, only {', '.join(tags)}; draw boxes")
        skipped += check_objects(what, annotations, classes, faults)
        skipped += [Skip(SkipKind.OTHER_SHAPE, i, None, f"{image.where}: {shape.tag} {number}")
                    for i, image in enumerate(images)
                    for number, shape in enumerate(image.element, 1) if shape.tag not in AREAS]
        return Loaded([names[i] for i in chosen], paths, annotations, classes, skipped)

    def _find(self, images: Sequence[_Image], faults: list[str] | None) -> list[Path]:
        index, users, paths, missing = FileIndex(IMAGE_SUFFIXES), {}, [], []
        for image in images:
            tried = [self.root / folder / name
                     for name in (image.name, re.split(r"[/\\]", image.name)[-1])
                     for folder in (f"images/{image.subset}", "images", image.subset, "data", "")]
            found = next(filter(None, map(index.by_name, tried)), None)
            found = found or next(chain.from_iterable(map(index.by_stem, tried)), None)  # a frame
            if found is None:
                missing.append(f"{tried[0]} ({image.where})")
            elif (other := users.setdefault(found, image)) is not image:
                tell(f"{other.where} and {image.where} are both {found}; keep one of them", faults)
            paths.append(found or tried[0])
        if faults is None:
            refuse_missing(self.root, missing)
        return paths
