"""CVAT's own XML "for images": one file with the annotations of all images."""

from __future__ import annotations

import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.annotated import AnnotatedImages
from data.annotation import (
    Annotation,
    Loaded,
    check_folder,
    check_objects,
    outside_root,
    refuse_missing,
    unknown_objects,
)
from data.classes import BACKGROUND, check_classes
from data.image import IMAGE_SUFFIXES
from data.image_files import FileIndex
from data.image_sets import ImageSet, sets_name
from data.skips import Skip, SkipKind
from data.split import choose, list_files
from data.voc_xml import read_xml
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
        self.path, self.element = path, element
        self.name, self.subset = ((element.get(key) or "").strip() for key in ("name", "subset"))
        self.subset = self.subset or path.stem.removeprefix("annotations")  # Datumaro's Train.xml
        self.where = f'{path}: image {number} ("{self.name}")'
        if not self.name:
            raise UserError(f"{path}: image {number} has no name; export the task again")

    def read(self) -> Annotation:
        """Return the boxes around all shapes that have an area.

        Raises UserError for a shape without a label, or a value that is no finite number.
        """
        names, edges, size = [], [], None
        if "width" in self.element.attrib and "height" in self.element.attrib:
            width, height = (_number(f"{self.where}: {key}", self.element.get(key))
                             for key in ("width", "height"))
            if min(width, height) < 1:
                raise UserError(f"{self.where} is {width:g} x {height:g}; write the image's size")
            size = int(width), int(height)
        for number, shape in enumerate(self.element, 1):
            if shape.tag in AREAS:
                names.append((shape.get("label") or "").strip())
                where = f'{self.where}: {shape.tag} {number} ("{names[-1]}")'
                if not names[-1]:
                    raise UserError(f"{where} has no label; export the task again")
                edges.append(_edges(where, shape))
        boxes = np.array(edges, np.float64).reshape(-1, 4) - (0, 0, 1, 1)
        flags = np.zeros(len(names), bool)
        return Annotation(self.path, size, tuple(names), boxes, flags, where=self.where)


def _number(where: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or abs(value) > 1e9:
        raise UserError(f'{where} is "{text or ""}", expected a number of pixels; correct it')
    return value


def _edges(where: str, shape: ElementTree.Element) -> tuple[float, ...]:
    """Return left, top, right and bottom of the box around a shape."""

    def values(*keys: str) -> list[float]:
        return [_number(f"{where}: {key}", shape.get(key)) for key in keys]

    angle = math.radians(_number(f"{where}: rotation", shape.get("rotation", "0")))
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    if shape.tag == "polygon":
        words = re.split(r"[,;]", (shape.get("points") or "").strip("; "))
        points = [_number(f"{where}: points", word) for word in words]
        if len(points) < 4 or len(points) % 2:
            raise UserError(f"{where}: {len(points)} numbers in points; write x,y;x,y;x,y")
        x, y = points[::2], points[1::2]
        return min(x), min(y), max(x), max(y)
    if shape.tag == "mask":
        left, top, width, height = values("left", "top", "width", "height")
        return left, top, left + width, top + height
    if shape.tag == "ellipse":
        x, y, rx, ry = values("cx", "cy", "rx", "ry")
        half = math.hypot(rx * cos, ry * sin), math.hypot(rx * sin, ry * cos)
    else:
        left, top, right, bottom = values("xtl", "ytl", "xbr", "ybr")
        if not angle:
            return left, top, right, bottom
        x, y, w, h = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
        half = (w * cos + h * sin) / 2, (w * sin + h * cos) / 2
    return x - half[0], y - half[1], x + half[0], y + half[1]


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
                            'the task as "CVAT for images" or in another format')  # fmt: skip
        if stray := [each.tag for each in document if each.tag != "image"
                     and any(inner.tag in AREAS for inner in each.iter())]:
            raise UserError(f"{path}: <{stray[0]}> holds shapes that are in no <image>; export the"
                            " task again")
        images += [_Image(path, k, each) for k, each in enumerate(document.findall("image"), 1)]
        for label in document.iterfind("./meta//label"):
            kind = (label.findtext("type") or "any").strip()
            if label.find("parent") is None and kind in ("any", "rectangle", *AREAS):
                labels[(label.findtext("name") or "").strip()] = None
    return images, [label for label in labels if label and label not in BACKGROUND]


def _subsets(images: Sequence[_Image]) -> dict[str, list[int]]:
    """Return the positions of the images of each subset; none if there is only CVAT's own."""
    found: dict[str, list[int]] = {}
    for i, image in enumerate(images):
        found.setdefault(image.subset or "default", []).append(i)
    return {} if found.keys() <= {"default"} else found


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
                            'task as "CVAT for images"')  # fmt: skip
        names = [f"{image.subset}/{image.name}".strip("/") for image in every]
        chosen: dict[int, int] = {}
        skipped = []
        for image_set in self.image_sets:
            for i in choose(self.root, image_set, names, _subsets(every), self.val_share,
                            self.split_by):
                if i in chosen:
                    where = every[i].where
                    skipped.append(Skip(SkipKind.IMAGE_LISTED_TWICE, chosen[i], None, where))
                chosen.setdefault(i, len(chosen))
        images = [every[i] for i in chosen]
        paths = self._find(images, faults)
        annotations = [_read_or_note(image, faults) for image in images]
        if classes is None:
            used = {(shape.get("label") or "").strip() for image in every
                    for shape in image.element if shape.tag in AREAS}
            classes = [*labels, *sorted(used - {*labels, ""})]
        classes = check_classes(classes, str(self.root)) if classes else ()
        what = f"{self.root}: the image set {sets_name(self.image_sets)}"
        tags = sorted({shape.tag for image in images for shape in image.element})
        if tags and not {*AREAS} & {*tags} and faults is None:
            raise UserError(f"{what} has no {', '.join(AREAS)}, only {', '.join(tags)}; draw boxes")
        check_objects(what, annotations, classes, faults)
        skipped += [*unknown_objects(annotations, classes), *outside_root(self.root, paths)]
        skipped += [Skip(SkipKind.OTHER_SHAPE, i, None, f"{image.where}: {shape.tag} {number}")
                    for i, image in enumerate(images)
                    for number, shape in enumerate(image.element, 1) if shape.tag not in AREAS]
        return Loaded([names[i] for i in chosen], paths, annotations, classes, skipped)

    def _find(self, images: Sequence[_Image], faults: list[str] | None) -> list[Path]:
        index, users, paths, missing, twice = FileIndex(IMAGE_SUFFIXES), {}, [], [], []
        for image in images:
            tried = [self.root / folder / name
                     for name in (image.name, re.split(r"[/\\]", image.name)[-1])
                     for folder in (f"images/{image.subset}", "images", image.subset, "")]
            found = next(filter(None, map(index.by_name, tried)), None)
            missing += [] if found else [f"{tried[0]} ({image.where})"]
            if found and (other := users.setdefault(found, image)) is not image:
                twice.append(f"{other.where} and {image.where} are both {found}; keep one of them")
            paths.append(found or tried[0])
        if faults is not None:
            faults += twice
        elif twice:
            raise UserError(twice[0])
        else:
            refuse_missing(self.root, missing)
        return paths


def _read_or_note(image: _Image, faults: list[str] | None) -> Annotation:
    try:
        return image.read()
    except UserError as error:
        if faults is None:
            raise
        faults.append(str(error))
        return Annotation.empty(image.path)
