"""Where XML annotations, their images and the lists of image sets lie.

    root/VOC2007/, root/VOC2012/, ...             years of a devkit, each a folder like one of these
    root/ImageSets/Main/<set>.txt, ImageSets/     lists of image sets; Annotations/, JPEGImages/
    root/train.txt, root/val.txt, ...             such lists, too
    root/<set>/, root/Annotations/<set>/          sets by folder (Roboflow)
    root/Annotations/ or root/                    no sets (LabelImg)

Images lie in JPEGImages/ or images/ instead of Annotations/, or beside the annotations.
"""

import os
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from data.annotation import check_folder
from data.classes import is_background
from data.config import VOC_CLASSES
from data.image import IMAGE_SUFFIXES
from data.image_files import FileIndex
from data.image_sets import DEFAULT_SET, SET_WORDS, ImageSet, is_set_name, set_word
from data.split import SPLIT_SETS, VAL_SHARE, in_validation, list_files, read_list
from utils.errors import UserError
from utils.files import read_bytes, read_text

ANNOTATION_FOLDERS = ("Annotations", "annotations", "xml", "xmls", "labels")
IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "imgs", "img", "data")


class Listed(NamedTuple):
    """One image of an image set.

    where: its line in a list, or its annotation file. folder: of the data set, or of the year.
    annotation: its file; None if it does not exist. image: the file that the line names, or "".
    empty: the file is missing because the image has no objects; CVAT writes none then.
    """

    where: str
    folder: Path
    id: str
    annotation: Path | None
    image: str = ""
    empty: bool = False

    @property
    def path(self) -> Path:
        """The annotation file, or where it is missed."""
        return self.annotation or self.folder / "Annotations" / f"{self.id}.xml"


def year_folders(root: Path) -> dict[str | None, Path]:
    """Return year -> folder for each VOC<year> of a devkit or its parent, and None -> root."""
    folders = [*root.glob("VOCdevkit/VOC[0-9]*"), *root.glob("VOC[0-9]*")]
    folders += [root] if root.absolute().name.startswith("VOC2") else []
    return {None: root, **{folder.name[3:]: folder for folder in sorted(folders)}}


def recognise(root: str | Path) -> str | None:
    """Return the name of the layout under ``root``; see `data.DetectionData.recognise`."""
    root, index = Path(os.path.expanduser(root)), FileIndex((".xml",))
    if not os.path.isdir(root):
        return None
    for year, folder in year_folders(root).items():
        if year and index.holds_files(folder / "Annotations"):
            return "VOC devkit"
    base = annotation_folders(root, index)[0]
    files = index.inside(base)
    if not any(map(_is_annotation, files[:20])):
        return None
    if base != root:
        cvat = os.path.isfile(root / "labelmap.txt")
        return "CVAT VOC" if cvat else f"VOC XML in {base.name}/"
    if split_folders(root, index):
        return "VOC XML, a folder a set"
    inner = {each for folder in {file.parent for file in files}
             for each in (folder, *folder.parents) if root in each.parents}
    for folder in inner:  # the image sets that it declares must not be passed over
        if index.has_folder(folder / "ImageSets") or split_folders(folder, index):
            return None
    return "VOC XML beside images"


def _is_annotation(path: Path) -> bool:
    """Return whether an XML file begins like an annotation, and not like CVAT's <annotations>."""
    try:
        head = read_bytes(path, "annotation").replace(b"\0", b"")[:4096]  # NUL: of UTF-16
    except UserError:
        return False
    return re.search(rb"<(\w+:)?annotation[\s>/]", head, re.IGNORECASE) is not None


def list_image_sets(root: str | Path) -> list[ImageSet]:
    """Return the image sets of a devkit, or of a folder in VOC layout; none if ``root`` is missing.

    The official files of one class each, such as dog_train.txt, are left out.
    """
    found, index = [], FileIndex((".xml",))
    root = Path(os.path.expanduser(root))
    for year, folder in year_folders(root).items():
        classes = {*VOC_CLASSES, *(declared_classes(folder) or ((), ""))[0]}
        names = {name for name in set_lists(folder) if not _is_of_class(name, classes)}
        names |= (by_folder := split_folders(folder, index)).keys()
        if by_folder and any(_outside_sets(folder, index)):
            names.add(DEFAULT_SET)
        if not year or folder != root:  # else the year of VOC2007/ itself, which needs none
            found += [ImageSet(year, name) for name in sorted(names)]
    return found


def _is_of_class(name: str, classes: Collection[str]) -> bool:
    of, _, part = name.rpartition("_")
    return of in classes and part in SET_WORDS


def declared_classes(root: Path) -> tuple[list[str], str] | None:
    """Return the class names that ``root`` declares, and the file; None if it does not.

    The file is classes.txt, or labelmap.txt as CVAT writes it (name:colour:parts:actions).
    """
    for name in ("classes.txt", "labelmap.txt"):
        if os.path.lexists(path := root / name):
            names = read_text(path, "class names").splitlines()
            if name == "labelmap.txt":
                names = [line.partition(":")[0].strip() for line in names if line[:1] != "#"]
                names = [name for name in names if not is_background(name)]
            return [name for name in names if name.strip()], str(path)
    return None


def set_lists(folder: Path) -> dict[str, Path]:
    """Return the lists of image sets in ImageSets/; in ``folder`` those to train and to test."""
    beside = {file.stem: file for file in sorted(folder.glob("[!.]*.txt"))
              if is_set_name(file.stem)}
    training = {set_word(name) in ("train", "trainval") for name in beside}
    return (beside if len(training) == 2 else {}) | list_files(folder)


def split_folders(folder: Path, index: FileIndex) -> dict[str, Path]:
    """Return the folders of image sets, such as train/ and Annotations/train/, that hold XML."""
    found: dict[str, Path] = {}
    for base in annotation_folders(folder, index):
        for path in index.subfolders(base):
            if is_set_name(path.name) and index.holds_files(path):
                found.setdefault(path.name, path)
    return found


def annotation_folders(folder: Path, index: FileIndex) -> list[Path]:
    """Return the folders from which ids count: Annotations/, or another with XML; ``folder``."""
    bases = [folder / name for name in ANNOTATION_FOLDERS if index.has_folder(folder / name)]
    used = [base for base in bases if index.holds_files(base)]
    return [*(used or ([] if index.holds_files(folder) else bases))[:1], folder]


def _find_set(root: Path, image_set: ImageSet, index: FileIndex) -> tuple[Path, Path | None]:
    """Return the folder of the data set, and an image set's list or folder; None for a rest."""
    check_folder(root)
    folder = year_folders(root).get(image_set.year, root / f"VOC{image_set.year}")
    declared = split_folders(folder, index) | set_lists(folder)
    if path := declared.get(image_set.name):
        return folder, path
    if image_set.name == DEFAULT_SET and split_folders(folder, index):
        return folder, None
    if not image_set.year and image_set.name in SPLIT_SETS:
        return folder, None
    if len(year_folders(root)) == 1 and not index.holds_files(root):
        raise UserError(f"{root} holds neither XML annotations nor the years of a devkit; "
                        "docs/own_data.md shows where images and annotations go")
    existing = ", ".join(map(str, list_image_sets(root))) or "none"
    lists = [str(folder / "ImageSets" / main / f"{image_set.name}.txt") for main in ("Main", "")]
    raise UserError(f'no image set "{image_set}" in {root}: looked for {" and ".join(lists)} '
                    f"(docs/own_data.md says how to make one); existing image sets: {existing}")


def list_images(root: Path, image_set: ImageSet, index: FileIndex, val_share: float = VAL_SHARE,
                split_by: str | None = None) -> Iterator[Listed]:
    """Yield the images of an image set; val_share, split_by: see `data.split.in_validation`."""
    folder, path = _find_set(root, image_set, index)
    if path is None and image_set.name == DEFAULT_SET:
        yield from _outside_sets(folder, index)
    elif path is None:
        yield from _part(root, image_set, index, val_share, split_by)
    elif path.suffix != ".txt":
        yield from _under(path, folder, index)
    else:
        bases = annotation_folders(folder, index)
        if not image_set.year:
            bases += [each / "Annotations" for year, each in year_folders(root).items() if year]
        cvat = FileIndex(IMAGE_SUFFIXES) if os.path.isfile(folder / "labelmap.txt") else None
        for where, line in read_list(path):
            yield _find_line(line, where, folder, bases, index, cvat)


def list_all(root: Path, index: FileIndex, faults: list[str],
             known: Collection[tuple[str | None, str]] = ()) -> list[Listed]:
    """Return the images of all image sets but the known ones; of the whole folder without sets.

    To divide them, images outside the folders of sets count, too.

    faults: gets a sentence for each list that cannot be read; lists of other things are passed.
    """
    declared = [each for each in list_image_sets(root) if each.name not in SPLIT_SETS]
    found: list[Listed] = []
    for image_set in declared:
        if image_set in known:
            continue
        try:
            listed = list(list_images(root, image_set, index))
        except UserError as error:  # a file that nobody asked for
            faults.append(str(error))
            continue
        if any(each.annotation for each in listed):
            found += listed
    only_parts = (len(year_folders(root)) == 1 and set_lists(root).keys() <= {*SPLIT_SETS}
                  and {name for _, name in known} <= {*SPLIT_SETS})
    if only_parts or not found and not {*known} & {*declared}:
        found += _under(annotation_folders(root, index)[0], root, index)
    first = {os.path.normpath(each.path): each for each in reversed(found)}
    return sorted(first.values(), key=lambda each: each.id)


def _part(root: Path, image_set: ImageSet, index: FileIndex, val_share: float,
          split_by: str | None) -> Iterator[Listed]:
    """Yield the images of split_train or split_val; a list of the other one leaves the rest."""
    pool = list_all(root, index, [])
    train, val = (ImageSet(None, name) for name in SPLIT_SETS)
    other = val if image_set == train else train
    if other.name in list_files(root):
        taken = {each.path for each in list_images(root, other, index)}
        yield from (each for each in pool if each.path not in taken)
        return
    images, names = FileIndex(IMAGE_SUFFIXES), []
    for each in pool:
        parent, name = os.path.split(os.path.splitext(each.path)[0])
        file, _ = find_image(name, image_folders(each.folder, parent), (each.image,), images)
        names.append(os.path.relpath(file, root) if file else f"{each.id}{IMAGE_SUFFIXES[0]}")
    chosen = in_validation(names, val_share, split_by)
    yield from (each for each, taken in zip(pool, chosen, strict=True)
                if taken == (image_set == val))


def _outside_sets(folder: Path, index: FileIndex) -> Iterator[Listed]:
    """Yield the images that are in no folder of an image set."""
    sets = {*split_folders(folder, index).values()}
    for each in _under(annotation_folders(folder, index)[0], folder, index):
        if sets.isdisjoint(each.annotation.parents) and _is_annotation(each.annotation):
            yield each


def _under(path: Path, folder: Path, index: FileIndex) -> Iterator[Listed]:
    bases = annotation_folders(folder, index)
    for file in index.inside(path):
        base = next((each for each in bases if file.is_relative_to(each)), folder)
        name = os.path.splitext(os.path.relpath(file, base))[0]
        yield Listed(str(file), folder, name.replace(os.sep, "/"), file)


def _find_line(line: str, where: str, folder: Path, bases: Sequence[Path],
               index: FileIndex, cvat: FileIndex | None) -> Listed:
    """Return the image that a line of a list is about.

    A line is an id, which may hold spaces and folders. Additions are understood: the flag after the
    id in the official files of one class, or the annotation file, as PaddleDetection writes it; an
    image suffix, back slashes, and leading folders that do not exist among the annotations. They
    are part of the id only if an annotation has that name.

    cvat: finds images without objects in CVAT's layout.
    """
    line = re.sub(r"^(\.[/\\])+", "", line)
    plain = re.sub(r"(\.[A-Za-z]+)\s.*\.xml$", r"\1", re.sub(r"\s+(-1|0|1)$", "", line))
    stem, suffix = os.path.splitext(plain)
    image = re.split(r"[/\\]", plain)[-1] if suffix.lower() in IMAGE_SUFFIXES else ""
    ids = [*dict.fromkeys([line, plain, stem if image else plain])]
    for base in bases:
        for each in chain(ids, _inner(ids[-1], base, index)):
            if found := index.by_stem(f"{base}{os.sep}{each}"):
                if len(found) > 1:
                    raise UserError(f"{found[0]} and {found[1]} annotate one image; keep one")
                return Listed(where, folder, each, found[0], image)
    for each in ids if cvat else ():
        parent, name = os.path.split(bases[0] / each)
        if find_image(name, image_folders(folder, parent), (image,), cvat)[0]:
            return Listed(where, folder, each, None, image, empty=True)
    return Listed(where, folder, " or ".join(ids), None, image)


def _inner(name: str, base: Path, index: FileIndex) -> Iterator[str]:
    """Yield an id with slashes, then without each of its leading folders that is not in base."""
    parts = [part for part in re.split(r"[/\\]", name) if part]
    yield "/".join(parts)
    while len(parts) > 1 and not index.has_folder(base / parts[0]):
        yield "/".join(parts := parts[1:])


def image_folders(folder: Path, parent: str) -> list[str]:
    """Return the folders where images may lie whose annotations lie in ``parent``, usual first."""
    parts = Path(os.path.relpath(parent, folder)).parts
    inner = [k for k, part in enumerate(parts) if part in ANNOTATION_FOLDERS]
    below = parts[inner[-1] + 1 :] if inner else parts
    above = [os.path.join(folder, *parts[:k]) for k in reversed(inner)] or [folder]
    replaced = [os.path.join(start, name, *below) for start in above for name in IMAGE_FOLDERS]
    if inner:
        return [*replaced, parent, os.path.join(above[0], *below)]
    return [parent, *replaced, *(os.path.join(parent, name) for name in IMAGE_FOLDERS)]


def find_image(stem: str, folders: Sequence[str], names: Sequence[str],
                index: FileIndex) -> tuple[Path | None, list[Path]]:
    """Return an image file, and further ones between which nothing decides.

    names: of the file by the annotation and by the list; may be "".
    """
    for folder in folders:
        if files := index.by_stem(f"{folder}{os.sep}{stem}"):
            if len(files) == 1:
                return files[0], []
            named = {unicodedata.normalize("NFC", file.name): file for file in files}
            wanted = [named.get(unicodedata.normalize("NFC", name)) for name in names]
            chosen = next(filter(None, wanted), None)
            return (chosen, []) if chosen else (files[0], files[1:])
    for folder in folders:
        for name in (stem, *names):  # the stem of a.jpg.xml, as detection names it beside a.png.xml
            path = os.path.join(folder, name)
            whole = name.lower().endswith(IMAGE_SUFFIXES)
            if file := index.by_name(path) if whole else next(iter(index.by_stem(path)), None):
                return file, []
    return None, []
