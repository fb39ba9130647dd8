"""PASCAL VOC's annotations: XML files, split files, and where both lie."""

from __future__ import annotations

import functools
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.classes import check_classes, read_classes
from data.config import VOC_CLASSES
from data.image import IMAGE_SUFFIXES
from data.image_sets import ImageSet
from utils.errors import UserError


@dataclass(frozen=True)
class Annotation:
    """What one XML file says.

    size: (width, height), None when the file gives none or no positive one. names: one an object.
    boxes: float64 [n, 4], (x1, y1, x2, y2) in pixels counted from 0, the XML's value - 1, both ends
    inside the box; as found, also without area or outside the picture. difficult: bool [n].
    n may be 0.
    """

    path: Path
    size: tuple[int, int] | None
    names: tuple[str, ...]
    boxes: np.ndarray
    difficult: np.ndarray


def read_annotation(path: str | Path) -> Annotation:
    """Read one VOC XML file; the tags besides <object>, <name> and <bndbox> are optional.

    Raises UserError naming the file, and the line or the object (counted from 1), when it is
    missing or malformed, or an object has no name or lacks a finite coordinate.
    """
    path = Path(path)
    try:
        root = ElementTree.parse(path).getroot()
    except OSError as error:
        raise UserError(f"{path}: the annotation cannot be read ({error.strerror})") from error
    except ElementTree.ParseError as error:
        raise UserError(f"{path}:{error.position[0]}: malformed XML ({error})") from error
    except (ValueError, LookupError) as error:  # an encoding that the parser does not know
        raise UserError(f"{path}: malformed XML ({error})") from error
    names, boxes, difficult = [], [], []
    for index, element in enumerate(root.findall("object"), 1):
        where = f"{path}: object {index}"
        name = (element.findtext("name") or "").strip()
        if not name:
            raise UserError(f"{where} has no <name>")
        where += f' ("{name}")'
        bndbox = element.find("bndbox")
        if bndbox is None:
            raise UserError(f"{where} has no <bndbox>")
        flag = (element.findtext("difficult") or "0").strip().lower()
        if flag not in ("", "0", "1", "false", "true", "unspecified"):
            raise UserError(f'{where}: <difficult> is "{flag}", expected 0 or 1')
        names.append(name)
        boxes.append([_coordinate(bndbox, tag, where) for tag in ("xmin", "ymin", "xmax", "ymax")])
        difficult.append(flag in ("1", "true"))
    boxes = np.array(boxes, np.float64).reshape(-1, 4) - 1
    return Annotation(path, _size(root), tuple(names), boxes, np.array(difficult, bool))


def _coordinate(bndbox: ElementTree.Element, tag: str, where: str) -> float:
    text = bndbox.findtext(tag)
    if text is None:
        raise UserError(f"{where}: <bndbox> has no <{tag}>")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f'{where}: <{tag}> is "{text.strip()}", expected a number')
    return value


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    try:
        width, height = (int(float(root.findtext(f"size/{t}", "0"))) for t in ("width", "height"))
    except (ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None


def _year_folders(root: Path) -> dict[str | None, Path]:
    """Year -> folder for the VOC<year> in a devkit or its parent; None -> root itself."""
    folders = [*root.glob("VOCdevkit/VOC[0-9]*"), *root.glob("VOC[0-9]*")]
    folders += [root] if root.absolute().name.startswith("VOC2") else []
    return {None: root, **{folder.name[3:]: folder for folder in sorted(folders)}}


def list_image_sets(root: str | Path) -> list[ImageSet]:
    """The image sets of a devkit, with their years, and of a folder in VOC layout."""
    root = Path(os.path.expanduser(root))
    found = []
    for year, folder in _year_folders(root).items():
        files = [f for main in ("Main/", "") for f in folder.glob(f"ImageSets/{main}[!.]*.txt")]
        # the official Main/ also holds a file per class and set
        stems = {f.stem for f in files if f.stem.rpartition("_")[0] not in VOC_CLASSES}
        found += [ImageSet(year, stem) for stem in sorted(stems)]
    return found


def _find_set(root: Path, year: str | None, image_set: str) -> tuple[Path, Path]:
    """(folder that holds Annotations/, split file) of one image set, or UserError."""
    if not os.path.isdir(root):  # False, too, for a name that no file system takes
        raise UserError(
            f"{root}: no such data set folder; give its place with --root (data/scripts/VOC2007.sh "
            "downloads VOC2007, docs/own_data.md is about own pictures)"
        )
    folder = _year_folders(root).get(year or None, root / f"VOC{year}")
    splits = [folder / "ImageSets" / "Main", folder / "ImageSets"]
    splits = [split / f"{image_set}.txt" for split in splits]
    for split in splits:
        if os.path.isfile(split):
            return folder, split
    if len(_year_folders(root)) == 1 and not (root / "Annotations").is_dir():
        raise UserError(
            f"{root} holds neither Annotations/ and JPEGImages/ nor the years of a devkit; "
            "docs/own_data.md shows where pictures and annotations go"
        )
    there = ", ".join(map(str, list_image_sets(root))) or "none"
    raise UserError(
        f'no image set "{ImageSet(year, image_set)}" in {root}: looked for {splits[0]} and '
        f"{splits[1]} (docs/own_data.md says how to make one); image sets there: {there}"
    )


@dataclass(frozen=True)
class VOCAnnotations:
    """The annotations of some image sets, without a look at the pictures.

    ids, folders (that hold JPEGImages/) and annotations run in parallel, one an image.
    skipped: reason -> one "file: detail" a record.
    """

    ids: list[str]
    folders: list[Path]
    annotations: list[Annotation]
    classes: tuple[str, ...]
    skipped: dict[str, list[str]]


def load_annotations(
    root: str | Path,
    image_sets: Sequence[tuple[str | None, str]],
    classes: Sequence[str] | None = None,
    faults: list[str] | None = None,
) -> VOCAnnotations:
    """Read the image sets' split files and annotations; arguments and errors as in VOCDetection."""
    root = Path(os.path.expanduser(root))
    find = finder((".xml",))
    skipped = defaultdict(list)
    ids, folders, paths, missing, seen = [], [], [], [], set()
    for year, image_set in image_sets:
        for where, folder, image_id, path in _list_images(root, year, image_set, find):
            if (folder, image_id) in seen:
                skipped["image listed twice"].append(f"{where}: {image_id}")
                continue
            seen.add((folder, image_id))
            ids.append(image_id)
            folders.append(folder)
            paths.append(path)
            if path is None:
                paths[-1] = folder / "Annotations" / f"{image_id}.xml"
                missing.append(paths[-1])
    what = ", ".join(str(ImageSet(*pair)) for pair in image_sets)
    if not ids:
        raise UserError(f"{root}: the image set {what} lists no image")
    if faults is None:
        refuse_missing("annotation", missing)
    annotations = [_read_or_note(path, faults) for path in paths]

    names = {name for annotation in annotations for name in annotation.names}
    declared = root / "classes.txt"
    if classes is not None:
        classes = check_classes(classes, "classes")
    elif declared.is_file():
        classes = read_classes(declared)
    elif any(year for year, _ in image_sets) and names <= set(VOC_CLASSES):
        classes = VOC_CLASSES
    else:  # of all image sets, so that every one of them gets the same classes
        listed = (_list_images(root, *pair, find) for pair in list_image_sets(root))
        others = {path for images in listed for *_, path in images} - {None, *paths}
        found = names.union(*(_read_or_note(path, faults).names for path in sorted(others)))
        classes = check_classes(sorted(found), str(root)) if found else ()
    if not names & set(classes):
        fault = (
            f"{root}: the image set {what} has no object of the classes "
            f"{', '.join(classes) or '(none)'}; "
            f"its annotations name: {', '.join(sorted(names)) or 'no object at all'}"
        )
        if faults is None:
            raise UserError(fault)
        faults.append(fault)
    for annotation in annotations:
        for index, name in enumerate(annotation.names, 1):
            if name not in classes:
                reason = f'object of unknown class "{name}" skipped'
                skipped[reason].append(f"{annotation.path}: object {index}")
    return VOCAnnotations(ids, folders, annotations, classes, dict(skipped))


def without_objects(path: Path) -> Annotation:
    return Annotation(path, None, (), np.zeros((0, 4)), np.zeros(0, bool))


def _read_or_note(path: Path, faults: list[str] | None) -> Annotation:
    """`read_annotation`; given a list, an error is added to it, and the picture has no objects."""
    try:
        return read_annotation(path)
    except UserError as error:
        if faults is None:
            raise
        faults.append(str(error))
        return without_objects(path)


def _list_images(
    root: Path, year: str | None, image_set: str, find: Callable
) -> Iterator[tuple[str, Path, str, Path | None]]:
    """(file and line, folder that holds Annotations/, id, annotation file) of an image set.

    A line is an id, maybe with spaces or folders in it. A class's split file has a flag behind it,
    some tools write a picture's suffix: they belong to the id only if an annotation is named so.
    Without an annotation file the id is all that was looked for.
    """
    folder, split = _find_set(root, year, image_set)
    try:
        lines = split.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{split}: the image set cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if line := line.strip():
            plain = re.sub(r"\s+(-1|0|1)$", "", line)
            stem, suffix = os.path.splitext(plain)
            names = dict.fromkeys(
                [line, plain, stem if suffix.lower() in IMAGE_SUFFIXES else plain]
            )
            found = ((name, find(folder / "Annotations", name)) for name in names)
            nothing = (" or ".join(names), None)
            yield f"{split}:{number}", folder, *next((f for f in found if f[1]), nothing)


def finder(suffixes: Sequence[str]) -> Callable[[Path, str], Path | None]:
    """find(folder, id): the file of that id, the first suffix of those there are, in any case."""

    @functools.cache  # several stat calls for each of thousands of ids are slow on network disks
    def listing(folder: Path) -> dict[str, Path]:
        try:
            names = [n for n in os.listdir(folder) if Path(n).suffix.lower() in suffixes]
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UserError(f"{folder}: the folder cannot be read ({error.strerror})") from error
        names.sort(key=lambda n: (suffixes.index(Path(n).suffix.lower()), n), reverse=True)
        return {Path(name).stem: folder / name for name in names}

    def find(folder: Path, image_id: str) -> Path | None:
        path = folder / image_id
        return listing(path.parent).get(path.name)

    return find


def refuse_missing(what: str, paths: list[Path]) -> None:
    if paths:
        first = ", ".join(str(path) for path in paths[:10]) + (", ..." if len(paths) > 10 else "")
        raise UserError(f"{len(paths)} {what} file(s) of the image set missing: {first}")
