"""Reading the annotations of image sets in PASCAL VOC's layouts, and finding their images."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.annotation import Annotation, check_objects, unknown_objects
from data.classes import check_classes
from data.config import VOC_CLASSES
from data.image import IMAGE_SUFFIXES
from data.image_files import FileIndex
from data.image_sets import ImageSet
from data.skips import Skip, SkipKind
from data.split import VAL_SHARE
from data.voc_layout import (
    Listed,
    declared_classes,
    find_image,
    image_folders,
    list_all,
    list_images,
)
from data.voc_xml import read_annotation
from utils.errors import UserError


@dataclass(frozen=True)
class VOCAnnotations:
    """The annotations of some image sets, one entry an image; no image is opened for them."""

    listed: list[Listed]
    annotations: list[Annotation]
    classes: tuple[str, ...]
    skipped: list[Skip]

    @property
    def ids(self) -> list[str]:
        return [each.id for each in self.listed]


def load_annotations(
    root: str | Path, image_sets: Sequence[tuple[str | None, str]],
    classes: Sequence[str] | None = None, faults: list[str] | None = None,
    val_share: float = VAL_SHARE, split_by: str | None = None,
) -> VOCAnnotations:
    """Read the annotations of image sets; arguments and errors as of ``VOCDetection``."""
    root = Path(os.path.expanduser(root))
    index = FileIndex((".xml",))
    first: dict[str, int] = {}
    found, skipped = [], []
    for year, name in image_sets:
        for each in list_images(root, ImageSet(year or None, name), index, val_share, split_by):
            path = _key(each.path)
            if path in first:
                detail = f"{each.where}: {each.id}"
                skipped.append(Skip(SkipKind.IMAGE_LISTED_TWICE, first[path], None, detail))
                continue
            first[path] = len(first)
            found.append(each)
    what = f"{root}: the image set {', '.join(str(ImageSet(*each)) for each in image_sets)}"
    if not found:
        raise UserError(f"{what} lists no image")
    if faults is None:
        missing = [each.path for each in found if not (each.annotation or each.empty)]
        _refuse_missing("annotation", missing)
    annotations = [Annotation.empty(each.path) if each.empty else _read_or_note(each.path, faults)
                   for each in found]  # fmt: skip
    skipped += [Skip(SkipKind.EMPTY_IN_CVAT, i, None, f"{each.where}: {each.id}")
                for i, each in enumerate(found) if each.empty]
    if classes is None:
        classes = _choose_classes(root, image_sets, annotations, skipped, index)
    else:
        classes = check_classes(_nfc(classes), "classes")
    check_objects(what, annotations, classes, faults)
    skipped += unknown_objects(annotations, classes)
    return VOCAnnotations(found, annotations, classes, skipped)


def _nfc(names: Iterable[str]) -> list[str]:
    """Return names in the form in which those of annotations are read."""
    return [unicodedata.normalize("NFC", name) for name in names]


def _key(path: Path) -> str:
    """Return an equal text for equal paths."""
    return os.path.normpath(path) if ".." in (text := str(path)) else text


def _refuse_missing(what: str, paths: Sequence[Path]) -> None:
    if paths:
        first = ", ".join(str(path) for path in paths[:10]) + (", ..." if len(paths) > 10 else "")
        raise UserError(f"{len(paths)} {what} file(s) of the image set missing: {first}")


def _read_or_note(path: Path, faults: list[str] | None) -> Annotation:
    try:
        return read_annotation(path)
    except UserError as error:
        if faults is None:
            raise
        faults.append(str(error))
        return Annotation.empty(path)


def _choose_classes(root: Path, image_sets: Sequence[tuple[str | None, str]],
                    annotations: Sequence[Annotation], skipped: list[Skip],
                    index: FileIndex) -> tuple[str, ...]:
    if (declared := declared_classes(root)) is not None:
        return check_classes(_nfc(declared[0]), declared[1])
    names = {name for annotation in annotations for name in annotation.names}
    if any(year for year, _ in image_sets) and names <= set(VOC_CLASSES):
        return VOC_CLASSES
    # The names in all image sets, so that each of them is read with the same classes.
    unread: list[str] = []
    others = {each.annotation for each in list_all(root, index, unread, image_sets)}
    for path in sorted(others - {None, *(annotation.path for annotation in annotations)}):
        try:
            names.update(read_annotation(path).names)
        except UserError as error:
            unread.append(str(error))
    skipped += [Skip(SkipKind.OTHER_SET_UNREAD, None, None, detail) for detail in unread]
    return check_classes(sorted(names), str(root)) if names else ()


def find_images(loaded: VOCAnnotations, faults: list[str] | None) -> list[Path]:
    """Return the image files, and add to ``loaded.skipped`` where others have the same name.

    Raises UserError for missing ones and for two annotations of one image, unless there are
    ``faults``.
    """
    index, folders = FileIndex(IMAGE_SUFFIXES), {}
    images, missing, users = [], [], {}
    for i, (each, annotation) in enumerate(zip(loaded.listed, loaded.annotations, strict=True)):
        path = annotation.path
        parent, name = os.path.split(path)
        if (where := (each.folder, parent)) not in folders:
            folders[where] = image_folders(each.folder, parent)
        stem = os.path.splitext(name)[0]
        found, rest = find_image(stem, folders[where], (annotation.filename, each.image), index)
        if rest:
            detail = f"{path}: {found} is taken, not {', '.join(file.name for file in rest)}"
            loaded.skipped.append(Skip(SkipKind.SEVERAL_IMAGES, i, None, detail))
        if found is None:
            missing.append(Path(folders[where][0], stem))
            found = missing[-1].with_name(stem + IMAGE_SUFFIXES[0])
        elif ".." in str(found) and os.path.relpath(found, each.folder)[:2] == "..":
            loaded.skipped.append(Skip(SkipKind.OUTSIDE_ROOT, i, None, str(found)))
        if (other := users.setdefault(_key(found), path)) is not path:
            fault = f"{other} and {path} both annotate {found}; keep one of them"
            if faults is None:
                raise UserError(fault)
            faults.append(fault)
        images.append(found)
    if faults is None:
        _refuse_missing(f"image ({'/'.join(IMAGE_SUFFIXES)})", missing)
    loaded.skipped.extend(_without_annotation(loaded.listed, images, index))
    return images


def _without_annotation(listed: Sequence[Listed], images: Sequence[Path],
                        index: FileIndex) -> Iterator[Skip]:
    """Yield a record for each image that no annotation is for, where no list says what belongs."""
    annotations, parents = FileIndex((".xml",)), {}
    for each, image in zip(listed, images, strict=True):
        if each.where == str(each.annotation):
            parents.setdefault(image.parent, set()).add(each.annotation.parent)
    beside = (file for folder in parents for file in index.inside(folder))
    for file in sorted({file for file in beside if file.parent in parents}.difference(images)):
        names = [each / name for each in parents[file.parent] for name in (file.stem, file.name)]
        if not any(map(annotations.by_stem, names)):
            yield Skip(SkipKind.NO_ANNOTATION_FILE, None, None, str(file))
