"""PASCAL VOC's layout: XML annotations, the lists of image sets, and where the files lie."""

from __future__ import annotations

import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.annotation import Annotation, check_objects, unknown_objects
from data.classes import check_classes, read_classes
from data.config import VOC_CLASSES
from data.image import IMAGE_SUFFIXES
from data.image_sets import ImageSet
from data.skips import Skip, SkipKind
from utils.errors import UserError


def read_annotation(path: str | Path) -> Annotation:
    """Read one VOC XML file. Tags other than <object>, <name> and <bndbox> are optional.

    Raises:
        UserError: the file is missing or malformed, or an object has no name or lacks a finite
            coordinate. The message names the file and the line, or the object, counted from 1.
    """
    path = Path(path)
    try:
        root = ElementTree.parse(path).getroot()
    except OSError as error:
        raise UserError(f"{path}: cannot read the annotation ({error.strerror})") from error
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
        names.append(name)
        boxes.append(_read_box(element, where))
        difficult.append(_read_difficult(element, where))
    boxes = np.array(boxes, np.float64).reshape(-1, 4) - 1
    return Annotation(path, _read_size(root), tuple(names), boxes, np.array(difficult, bool))


def _read_box(element: ElementTree.Element, where: str) -> list[float]:
    bndbox = element.find("bndbox")
    if bndbox is None:
        raise UserError(f"{where} has no <bndbox>")
    box = []
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        text = bndbox.findtext(tag)
        if text is None:
            raise UserError(f"{where}: <bndbox> has no <{tag}>")
        try:
            box.append(float(text))
        except ValueError:
            box.append(math.nan)
        if not math.isfinite(box[-1]):
            raise UserError(f'{where}: <{tag}> is "{text.strip()}", expected a number')
    return box


def _read_difficult(element: ElementTree.Element, where: str) -> bool:
    flag = (element.findtext("difficult") or "0").strip().lower()
    if flag not in ("", "0", "1", "false", "true", "unspecified"):
        raise UserError(f'{where}: <difficult> is "{flag}", expected 0 or 1')
    return flag in ("1", "true")


def _read_size(root: ElementTree.Element) -> tuple[int, int] | None:
    try:
        width, height = (int(float(root.findtext(f"size/{t}", "0"))) for t in ("width", "height"))
    except (ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None


class _FileFinder:
    """Finds files by id and suffix; each folder is listed once.

    One listing is faster than several stat calls an id, most of all on network disks.

    suffixes: lower case, in order of preference; files may have them in any case.
    """

    def __init__(self, suffixes: Sequence[str]) -> None:
        self.suffixes = suffixes
        self._listings: dict[Path, dict[str, Path]] = {}

    def find(self, path: Path) -> Path | None:
        """Return the file of a path without suffix; None if it does not exist."""
        if path.parent not in self._listings:
            self._listings[path.parent] = self._list(path.parent)
        return self._listings[path.parent].get(path.name)

    def _list(self, folder: Path) -> dict[str, Path]:
        try:
            names = [n for n in os.listdir(folder) if Path(n).suffix.lower() in self.suffixes]
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UserError(f"{folder}: cannot read the folder ({error.strerror})") from error
        names.sort(key=lambda n: (self.suffixes.index(Path(n).suffix.lower()), n), reverse=True)
        return {Path(name).stem: folder / name for name in names}


def _refuse_missing(what: str, paths: Sequence[Path]) -> None:
    if paths:
        first = ", ".join(str(path) for path in paths[:10]) + (", ..." if len(paths) > 10 else "")
        raise UserError(f"{len(paths)} {what} file(s) of the image set missing: {first}")


def _year_folders(root: Path) -> dict[str | None, Path]:
    """Return year -> folder for each VOC<year> of a devkit or its parent, and None -> root."""
    folders = [*root.glob("VOCdevkit/VOC[0-9]*"), *root.glob("VOC[0-9]*")]
    folders += [root] if root.absolute().name.startswith("VOC2") else []
    return {None: root, **{folder.name[3:]: folder for folder in sorted(folders)}}


def list_image_sets(root: str | Path) -> list[ImageSet]:
    """Return the image sets of a devkit, or of a folder in VOC layout; none if ``root`` is missing.

    The official files of one class each, such as dog_train.txt, are left out.
    """
    found = []
    for year, folder in _year_folders(Path(os.path.expanduser(root))).items():
        files = [f for main in ("Main/", "") for f in folder.glob(f"ImageSets/{main}[!.]*.txt")]
        names = {f.stem for f in files if f.stem.rpartition("_")[0] not in VOC_CLASSES}
        found += [ImageSet(year, name) for name in sorted(names)]
    return found


def _find_set(root: Path, image_set: ImageSet) -> tuple[Path, Path]:
    if not os.path.isdir(root):  # False, too, for a name that no file system takes
        raise UserError(
            f"{root}: no such data set folder; give the right one with --root "
            "(data/scripts/VOC2007.sh downloads VOC2007, docs/own_data.md is about own images)"
        )
    folder = _year_folders(root).get(image_set.year, root / f"VOC{image_set.year}")
    lists = [folder / "ImageSets" / "Main", folder / "ImageSets"]
    lists = [parent / f"{image_set.name}.txt" for parent in lists]
    for path in lists:
        if os.path.isfile(path):
            return folder, path
    if len(_year_folders(root)) == 1 and not (root / "Annotations").is_dir():
        raise UserError(
            f"{root} holds neither Annotations/ and JPEGImages/ nor the years of a devkit; "
            "docs/own_data.md shows where images and annotations go"
        )
    existing = ", ".join(map(str, list_image_sets(root))) or "none"
    raise UserError(
        f'no image set "{image_set}" in {root}: looked for {lists[0]} and {lists[1]} '
        f"(docs/own_data.md says how to make one); existing image sets: {existing}"
    )


def _list_images(root: Path, image_set: ImageSet,
                 finder: _FileFinder) -> Iterator[tuple[str, Path, str, Path | None]]:
    """Yield (file and line, folder, id, annotation file or None) of each image of an image set.

    A line is an id, which may hold spaces and folders. Two additions are understood: the flag
    after the id in the official files of one class, and an image suffix. They are part of the id
    only if an annotation has that name.
    """
    folder, path = _find_set(root, image_set)
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the image set ({error})") from error
    for number, line in enumerate(lines, 1):
        if not (line := line.strip()):
            continue
        plain = re.sub(r"\s+(-1|0|1)$", "", line)
        stem, suffix = os.path.splitext(plain)
        ids = dict.fromkeys([line, plain, stem if suffix.lower() in IMAGE_SUFFIXES else plain])
        found = ((each, finder.find(folder / "Annotations" / each)) for each in ids)
        missing = (" or ".join(ids), None)
        yield f"{path}:{number}", folder, *next((f for f in found if f[1]), missing)


@dataclass(frozen=True)
class VOCAnnotations:
    """The annotations of some image sets; no image is opened for them.

    ids, folders (which hold JPEGImages/) and annotations have one entry an image.
    """

    ids: list[str]
    folders: list[Path]
    annotations: list[Annotation]
    classes: tuple[str, ...]
    skipped: list[Skip]


def load_annotations(
    root: str | Path, image_sets: Sequence[tuple[str | None, str]],
    classes: Sequence[str] | None = None, faults: list[str] | None = None,
) -> VOCAnnotations:
    """Read the annotations of image sets; arguments and errors as of ``VOCDetection``."""
    root = Path(os.path.expanduser(root))
    finder = _FileFinder((".xml",))
    first: dict[tuple[Path, str], int] = {}
    paths, missing, skipped = [], [], []
    for year, name in image_sets:
        listed = _list_images(root, ImageSet(year or None, name), finder)
        for where, folder, image_id, path in listed:
            if (key := (folder, image_id)) in first:
                detail = f"{where}: {image_id}"
                skipped.append(Skip(SkipKind.IMAGE_LISTED_TWICE, first[key], None, detail))
                continue
            first[key] = len(first)
            paths.append(path or folder / "Annotations" / f"{image_id}.xml")
            missing += [] if path else [paths[-1]]
    what = f"{root}: the image set {', '.join(str(ImageSet(*each)) for each in image_sets)}"
    if not paths:
        raise UserError(f"{what} lists no image")
    if faults is None:
        _refuse_missing("annotation", missing)
    annotations = [_read_or_note(path, faults) for path in paths]
    classes = _choose_classes(root, image_sets, classes, annotations, faults)
    check_objects(what, annotations, classes, faults)
    skipped += unknown_objects(annotations, classes)
    folders, ids = zip(*first, strict=True)
    return VOCAnnotations(list(ids), list(folders), annotations, classes, skipped)


def _read_or_note(path: Path, faults: list[str] | None) -> Annotation:
    try:
        return read_annotation(path)
    except UserError as error:
        if faults is None:
            raise
        faults.append(str(error))
        return Annotation.empty(path)


def _choose_classes(
    root: Path, image_sets: Sequence[tuple[str | None, str]], classes: Sequence[str] | None,
    annotations: Sequence[Annotation], faults: list[str] | None,
) -> tuple[str, ...]:
    if classes is not None:
        return check_classes(classes, "classes")
    if (root / "classes.txt").is_file():
        return read_classes(root / "classes.txt")
    names = {name for annotation in annotations for name in annotation.names}
    if any(year for year, _ in image_sets) and names <= set(VOC_CLASSES):
        return VOC_CLASSES
    # The names in all image sets, so that each of them is read with the same classes.
    finder = _FileFinder((".xml",))
    listed = (_list_images(root, each, finder) for each in list_image_sets(root))
    others = {path for lines in listed for *_, path in lines}
    others -= {None, *(annotation.path for annotation in annotations)}
    found = names.union(*(_read_or_note(path, faults).names for path in sorted(others)))
    return check_classes(sorted(found), str(root)) if found else ()


def find_images(loaded: VOCAnnotations, faults: list[str] | None) -> list[Path]:
    """Return the image files. Raises UserError for missing ones, unless there are ``faults``."""
    finder = _FileFinder(IMAGE_SUFFIXES)
    wanted = [f / "JPEGImages" / i for f, i in zip(loaded.folders, loaded.ids, strict=True)]
    found = [finder.find(path) for path in wanted]
    if faults is None:
        missing = [path for path, file in zip(wanted, found, strict=True) if file is None]
        _refuse_missing(f"image ({'/'.join(IMAGE_SUFFIXES)})", missing)
    return [
        file or path.with_name(path.name + IMAGE_SUFFIXES[0])
        for path, file in zip(wanted, found, strict=True)
    ]
