"""Reading the annotations of image sets in PASCAL VOC's layouts, and finding their images."""

import os
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

from data.annotation import (
    Annotation,
    Loaded,
    check_objects,
    once,
    read_or_tell,
    refuse_missing,
    tell,
    unannotated,
)
from data.classes import check_classes
from data.config import VOC_CLASSES
from data.image import IMAGE_SUFFIXES
from data.image_files import FileIndex
from data.image_sets import ImageSet, sets_name
from data.skips import Skip, SkipKind
from data.split import VAL_SHARE
from data.voc_layout import (
    IMAGE_FOLDERS,
    Listed,
    declared_classes,
    find_image,
    image_folders,
    list_all,
    list_images,
    split_folders,
)
from data.voc_xml import read_annotation
from utils.errors import UserError


def load_annotations(root: str | Path, image_sets: Sequence[tuple[str | None, str]],
                     classes: Sequence[str] | None = None, faults: list[str] | None = None,
                     val_share: float = VAL_SHARE,
                     split_by: str | None = None) -> tuple[list[Listed], Loaded]:
    """Read the annotations of image sets, and look for no image.

    Arguments and errors as of ``VOCDetection``.
    """
    root, index = Path(os.path.expanduser(root)), FileIndex((".xml",))
    sets = [ImageSet(year or None, name) for year, name in image_sets]
    what = f"{root}: the image set {sets_name(sets)}"
    every = (each for image_set in sets
             for each in list_images(root, image_set, index, val_share, split_by))
    skipped: list[Skip] = []
    listed = once(every, skipped, "{0.where}: {0.id}".format,
                  lambda each: os.path.normpath(each.path))
    if not listed:
        raise UserError(f"{what} lists no image")
    if faults is None:
        missing = [each.path for each in listed if not (each.annotation or each.empty)]
        refuse_missing(what, missing, "annotations")
    annotations = [Annotation.empty(each.path) if each.empty
                   else read_or_tell(partial(read_annotation, each.path), each.path, faults)
                   for each in listed]
    skipped += [Skip(SkipKind.EMPTY_IN_CVAT, i, None, f"{each.where}: {each.id}")
                for i, each in enumerate(listed) if each.empty]
    folders = {each.folder for each in listed}
    used = {path for each in folders for path in split_folders(each, index).values()}
    skipped += unannotated(used, FileIndex(IMAGE_SUFFIXES))
    if classes is None:
        classes = _choose_classes(root, sets, annotations, skipped, index)
    else:
        classes = check_classes(classes, "classes")
    skipped += check_objects(what, annotations, classes, faults)
    return listed, Loaded([each.id for each in listed], [], annotations, classes, skipped)


def _choose_classes(root: Path, image_sets: Sequence[ImageSet], annotations: Sequence[Annotation],
                    skipped: list[Skip], index: FileIndex) -> tuple[str, ...]:
    if (declared := declared_classes(root)) is not None:
        return check_classes(*declared)
    names = {name for annotation in annotations for name in annotation.names}
    if any(year for year, _ in image_sets) and names <= set(VOC_CLASSES):
        return VOC_CLASSES
    # The names in all image sets, so that each of them is read with the same classes.
    unread: list[str] = []
    others = {each.annotation for each in list_all(root, index, unread, image_sets)}
    for path in sorted(others - {None, *(annotation.path for annotation in annotations)}):
        names.update(read_or_tell(partial(read_annotation, path), path, unread).names)
    skipped += [Skip(SkipKind.OTHER_SET_UNREAD, None, None, detail) for detail in unread]
    return check_classes(sorted(names), str(root)) if names else ()


def find_images(listed: Sequence[Listed], annotations: Sequence[Annotation],
                faults: list[str] | None) -> tuple[list[Path], list[Skip]]:
    """Return the image files, and records of further files between which nothing decides.

    Raises UserError for missing ones and for two annotations of one image, unless there are
    ``faults``.
    """
    index, image_folders_of = FileIndex(IMAGE_SUFFIXES), cache(image_folders)
    images, missing, skipped, users = [], [], [], {}
    for i, (each, annotation) in enumerate(zip(listed, annotations, strict=True)):
        path = annotation.path
        parent, stem = os.path.split(os.path.splitext(path)[0])
        folders = image_folders_of(each.folder, parent)
        found, rest = find_image(stem, folders, (annotation.filename, each.image), index)
        if rest:
            detail = f"{path}: {found} is taken, not {', '.join(file.name for file in rest)}"
            skipped.append(Skip(SkipKind.SEVERAL_IMAGES, i, None, detail))
        if found is None:
            place = next(filter(os.path.isdir, folders[: len(IMAGE_FOLDERS)]), folders[0])
            named = [each.image, annotation.filename, f"{stem}{IMAGE_SUFFIXES[0]}"]
            found = Path(place, next(name for name in named if name.startswith(f"{stem}.")))
            missing.append(f"{found} ({path})")
        if (other := users.setdefault(os.path.normpath(found), path)) is not path:
            tell(f"{other} and {path} both annotate {found}; keep one of them", faults)
        images.append(found)
    _check_root(listed, annotations, len(missing), index)
    if faults is None:
        refuse_missing(listed[0].folder, missing)
    return images, [*skipped, *_without_annotation(listed, images, index)]


def _check_root(listed: Sequence[Listed], annotations: Sequence[Annotation], missing: int,
                index: FileIndex) -> None:
    """Raise UserError if no image is found, but would be from the folder above."""
    if missing < len(listed):
        return
    above, path = listed[0].folder.absolute().parent, annotations[0].path.absolute()
    folders = image_folders(above, str(path.parent))
    if find_image(path.stem, folders, (annotations[0].filename,), index)[0]:
        raise UserError(f"{listed[0].folder} holds annotations without their images, which lie "
                        f"beside it; give the folder above, --root {above}")


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
