"""Where XML annotations, their images and the lists of image sets lie.

    root/VOC2007/, root/VOC2012/, ...             years of a devkit, each a folder like one of these
    root/ImageSets/Main/<set>.txt, ImageSets/     lists of image sets; Annotations/, JPEGImages/
    root/<set>/, root/Annotations/<set>/          sets by folder (Roboflow)
    root/Annotations/ or root/                    no sets (LabelImg)

Images lie in JPEGImages/ or images/ instead of Annotations/, or beside the annotations.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from data.annotation import Annotation, check_objects, unknown_objects
from data.classes import check_classes
from data.config import VOC_CLASSES
from data.image import IMAGE_SUFFIXES
from data.image_files import FileIndex
from data.image_sets import ImageSet
from data.skips import Skip, SkipKind
from data.voc_xml import read_annotation
from utils.errors import UserError
from utils.files import read_text

ANNOTATION_FOLDERS = ("Annotations", "annotations", "xml", "xmls", "labels")
IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "imgs", "img")
SPLITS = ("trainval", "train", "valid", "val", "validation", "dev", "test")


class Listed(NamedTuple):
    """One image of an image set.

    where: its line in a list, or its annotation file. folder: of the data set, or of the year.
    annotation: its file; None if it does not exist. image: the file that the line names, or "".
    """

    where: str
    folder: Path
    id: str
    annotation: Path | None
    image: str = ""


def year_folders(root: Path) -> dict[str | None, Path]:
    """Return year -> folder for each VOC<year> of a devkit or its parent, and None -> root."""
    folders = [*root.glob("VOCdevkit/VOC[0-9]*"), *root.glob("VOC[0-9]*")]
    folders += [root] if root.absolute().name.startswith("VOC2") else []
    return {None: root, **{folder.name[3:]: folder for folder in sorted(folders)}}


def recognise(root: str | Path) -> str | None:
    """Return the name of the layout under ``root``; see `data.DetectionData.recognise`."""
    folders = year_folders(Path(os.path.expanduser(root))).values()
    found = any(path for folder in folders for path in folder.glob("Annotations/*.xml"))
    return "VOC" if found else None


def list_image_sets(root: str | Path) -> list[ImageSet]:
    """Return the image sets of a devkit, or of a folder in VOC layout; none if ``root`` is missing.

    The official files of one class each, such as dog_train.txt, are left out.
    """
    found, index = [], FileIndex((".xml",))
    root = Path(os.path.expanduser(root))
    for year, folder in year_folders(root).items():
        files = [f for main in ("Main/", "") for f in folder.glob(f"ImageSets/{main}[!.]*.txt")]
        classes = {*VOC_CLASSES, *(declared_classes(folder) or ((), ""))[0]}
        names = {f.stem for f in files if f.stem.rpartition("_")[0] not in classes}
        names |= split_folders(folder, index).keys()
        found += [ImageSet(year, name) for name in sorted(names)]
    return found


def declared_classes(root: Path) -> tuple[list[str], str] | None:
    """Return the class names that ``root`` declares, and the file; None if it does not.

    The file is classes.txt, or labelmap.txt as CVAT writes it (name:colour:parts:actions).
    """
    for name in ("classes.txt", "labelmap.txt"):
        if os.path.isfile(path := root / name):
            names = read_text(path, "class names").splitlines()
            if name == "labelmap.txt":
                names = [line.partition(":")[0].strip() for line in names if line[:1] != "#"]
                names = [name for name in names if name != "background"]
            return [name for name in names if name.strip()], str(path)
    return None


def split_folders(folder: Path, index: FileIndex) -> dict[str, Path]:
    """Return the folders of image sets, such as train/ and Annotations/train/, that hold XML."""
    found = {}
    for base in annotation_folders(folder, index):
        names = sorted(os.listdir(base)) if os.path.isdir(base) else []
        for name in (name for name in names if name.lower() in SPLITS and name not in found):
            if os.path.isdir(base / name) and index.inside(base / name):
                found[name] = base / name
    return found


def annotation_folders(folder: Path, index: FileIndex) -> list[Path]:
    """Return the folders from which ids count: Annotations/, or another with XML; ``folder``."""
    for name in ANNOTATION_FOLDERS:
        base = folder / name
        if os.path.isdir(base) and (name == "Annotations" or index.inside(base)):
            return [base, folder]
    return [folder]


def _find_set(root: Path, image_set: ImageSet, index: FileIndex) -> tuple[Path, Path]:
    """Return the folder of the data set, and the list or the folder of an image set."""
    if not os.path.isdir(root):  # False, too, for a name that no file system takes
        raise UserError(
            f"{root}: no such data set folder; give the right one with --root "
            "(data/scripts/VOC2007.sh downloads VOC2007, docs/own_data.md is about own images)"
        )
    folder = year_folders(root).get(image_set.year, root / f"VOC{image_set.year}")
    lists = [folder / "ImageSets" / "Main", folder / "ImageSets"]
    lists = [parent / f"{image_set.name}.txt" for parent in lists]
    for path in lists:
        if os.path.lexists(path) and not os.path.isdir(path):
            return folder, path
    if path := split_folders(folder, index).get(image_set.name):
        return folder, path
    if len(year_folders(root)) == 1 and not index.inside(root):
        raise UserError(
            f"{root} holds neither XML annotations nor the years of a devkit; "
            "docs/own_data.md shows where images and annotations go"
        )
    existing = ", ".join(map(str, list_image_sets(root))) or "none"
    raise UserError(
        f'no image set "{image_set}" in {root}: looked for {lists[0]} and {lists[1]} '
        f"(docs/own_data.md says how to make one); existing image sets: {existing}"
    )


def list_images(root: Path, image_set: ImageSet, index: FileIndex) -> Iterator[Listed]:
    """Yield the images of an image set."""
    folder, path = _find_set(root, image_set, index)
    if os.path.isdir(path):
        yield from _under(folder, path, index)
        return
    bases = annotation_folders(folder, index)
    for number, line in enumerate(read_text(path, "image set").splitlines(), 1):
        if line := line.strip():
            yield _find_line(line, f"{path}:{number}", folder, bases, index)


def _under(folder: Path, path: Path, index: FileIndex) -> Iterator[Listed]:
    for file in index.inside(path):
        parts = os.path.splitext(os.path.relpath(file, folder))[0].split(os.sep)
        name = "/".join(part for part in parts if part not in ANNOTATION_FOLDERS)
        yield Listed(str(file), folder, name, file)


def _find_line(line: str, where: str, folder: Path, bases: Sequence[Path],
               index: FileIndex) -> Listed:
    """Return the image that a line of a list is about.

    A line is an id, which may hold spaces and folders. Additions are understood: the flag after the
    id in the official files of one class, an image suffix, back slashes, and leading folders that
    do not exist among the annotations. They are part of the id only if an annotation has that name.
    """
    plain = re.sub(r"\s+(-1|0|1)$", "", line)
    ids, image = [line, plain], re.split(r"[/\\]", plain)[-1]
    if image.lower().endswith(IMAGE_SUFFIXES):
        ids.append(os.path.splitext(plain)[0])
    else:
        image = ""
    ids = list(dict.fromkeys(ids))
    for base in bases:
        for each in chain(ids, _inner(ids[-1], base, index)):
            if found := index.by_stem(f"{base}{os.sep}{each}"):
                return Listed(where, folder, each, found[0], image)
    return Listed(where, folder, " or ".join(ids), None, image)


def _inner(name: str, base: Path, index: FileIndex) -> Iterator[str]:
    """Yield an id with slashes, then without each of its leading folders that is not in base."""
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".")]
    yield "/".join(parts)
    while len(parts) > 1 and not index.has_folder(base / parts[0]):
        yield "/".join(parts := parts[1:])


def image_folders(folder: Path, annotation: Path) -> list[str]:
    """Return the folders where the image of an annotation may lie, the usual one first."""
    parent = str(annotation.parent)
    parts = [part for part in os.path.relpath(parent, folder).split(os.sep) if part != "."]
    inner = [k for k, part in enumerate(parts) if part in ANNOTATION_FOLDERS]
    start, end = (parts[: inner[-1]], parts[inner[-1] + 1 :]) if inner else ([], parts)
    instead = [os.path.join(folder, *start, name, *end) for name in IMAGE_FOLDERS]
    if inner:
        return [*instead, parent, os.path.join(folder, *start, *end)]
    return [parent, *instead, *(os.path.join(parent, name) for name in IMAGE_FOLDERS)]


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
) -> VOCAnnotations:
    """Read the annotations of image sets; arguments and errors as of ``VOCDetection``."""
    root = Path(os.path.expanduser(root))
    index = FileIndex((".xml",))
    first: dict[str, int] = {}
    found, skipped = [], []
    for year, name in image_sets:
        for each in list_images(root, ImageSet(year or None, name), index):
            path = os.path.normpath(each.annotation or each.folder / "Annotations" / each.id)
            if path in first:
                detail = f"{each.where}: {each.id}"
                skipped.append(Skip(SkipKind.IMAGE_LISTED_TWICE, first[path], None, detail))
                continue
            first[path] = len(first)
            found.append(each)
    what = f"{root}: the image set {', '.join(str(ImageSet(*each)) for each in image_sets)}"
    if not found:
        raise UserError(f"{what} lists no image")
    paths = [each.annotation or each.folder / "Annotations" / f"{each.id}.xml" for each in found]
    if faults is None:
        missing = [path for each, path in zip(found, paths, strict=True) if not each.annotation]
        _refuse_missing("annotation", missing)
    annotations = [_read_or_note(path, faults) for path in paths]
    if classes is None:
        classes = _choose_classes(root, image_sets, annotations, skipped)
    else:
        classes = check_classes(classes, "classes")
    check_objects(what, annotations, classes, faults)
    skipped += unknown_objects(annotations, classes)
    return VOCAnnotations(found, annotations, classes, skipped)


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
                    annotations: Sequence[Annotation], skipped: list[Skip]) -> tuple[str, ...]:
    if (declared := declared_classes(root)) is not None:
        return check_classes(*declared)
    names = {name for annotation in annotations for name in annotation.names}
    if any(year for year, _ in image_sets) and names <= set(VOC_CLASSES):
        return VOC_CLASSES
    # The names in all image sets, so that each of them is read with the same classes.
    index, others, unread = FileIndex((".xml",)), set(), []
    for image_set in list_image_sets(root):
        try:
            others.update(each.annotation for each in list_images(root, image_set, index))
        except UserError as error:  # a file that nobody asked for
            unread.append(str(error))
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
        if (where := (each.folder, path.parent)) not in folders:
            folders[where] = image_folders(each.folder, path)
        stems = [os.path.join(folder, path.stem) for folder in folders[where]]
        found, rest = _find_image(stems, (annotation.filename, each.image), index)
        if rest:
            detail = f"{path}: {found} is taken, not {', '.join(file.name for file in rest)}"
            loaded.skipped.append(Skip(SkipKind.SEVERAL_IMAGES, i, None, detail))
        if found is None:
            missing.append(Path(stems[0]))
            found = missing[-1].with_name(path.stem + IMAGE_SUFFIXES[0])
        elif (other := users.setdefault(os.path.normpath(found), path)) is not path:
            fault = f"{other} and {path} both annotate {found}; keep one of them"
            if faults is None:
                raise UserError(fault)
            faults.append(fault)
        images.append(found)
    if faults is None:
        _refuse_missing(f"image ({'/'.join(IMAGE_SUFFIXES)})", missing)
    return images


def _find_image(stems: Sequence[str], names: Sequence[str],
                index: FileIndex) -> tuple[Path | None, list[Path]]:
    """Return an image file, and further ones between which nothing decides.

    stems: paths without suffix. names: of the file by the annotation and by the list; may be "".
    """
    wanted = [unicodedata.normalize("NFC", name) for name in names if name]
    for stem in stems:
        if files := index.by_stem(stem):
            named = {unicodedata.normalize("NFC", file.name): file for file in files}
            if chosen := next((named[name] for name in wanted if name in named), None):
                return chosen, []
            return files[0], files[1:]
    for stem in stems:
        folder, own = os.path.split(stem)
        for name in (own, *wanted):  # own: of a.jpg.xml, as detection names it beside a.png.xml
            path = os.path.join(folder, name)
            whole = name.lower().endswith(IMAGE_SUFFIXES)
            if file := index.by_name(path) if whole else next(iter(index.by_stem(path)), None):
                return file, []
    return None, []
