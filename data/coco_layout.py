"""Where COCO's annotation files and images lie.

    root/annotations/instances_<set><year>.json    train2014 val2014 minival2014 valminusminival2014
                                                   train2017 val2017
    root/annotations/image_info_<set><year>.json   test2015 test-dev2015 test2017 test-dev2017
    root/images/<split>/COCO_<split>_<id>.jpg      images before 2017, <id> of 12 digits
    root/<split>/<id>.jpg                          images since

Own data are read alike, with or without a year, with any set name, categories and ids. A set that
has an image_info file alone is a test split without ground truth. The files may also lie in
root/original_annotations/.

Annotation files of other names are read if none of these exists: root/<set>/_annotations.coco.json
(Roboflow), root/result.json (Label Studio), and any JSON file in root or in one of its folders that
looks like COCO's. The set is the part of the file's name that says train, val, ..., else the name
of a folder with images, else the file's.

Where an image's ``file_name`` exists, it decides; it may have folders in it and start from the
annotation file's folder, root/<split>/, root/images/<split>/, root/images/ or root/. Else Unicode
forms, back slashes, and the folders of another machine or of a URL are looked through.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np

from data.annotation import looks_like_coco
from data.coco_json import COCOAnnotations
from data.image import IMAGE_SUFFIXES
from data.image_files import FileIndex
from data.image_sets import SET_WORDS, ImageSet, is_set_name, set_word
from data.split import list_files
from utils.errors import UserError

# Sets that are parts of another split and have no image folder of their own.
IMAGES_OF = {"minival": "val", "valminusminival": "val", "test-dev": "test"}
ANNOTATION_FOLDERS = ("annotations", "original_annotations")
ANNOTATION_KINDS = ("instances_", "image_info_")
ROBOFLOW = "_annotations.coco.json"
SET_IN_NAME = re.compile(
    r"(?:.*[^a-z])?((?:train[_-]?val|train|training|(?<!train[_-])(?:val|validation|valid)|dev|eval|"
    r"evaluation|testing|test)(?:20\d\d)?)(?:[^a-z].*)?")


def normalise(year: str | None, name: str) -> ImageSet:
    """Return ("2017", "val") for that pair and for (None, "val2017")."""
    if not year and (match := re.fullmatch(r"(.+?)(20\d\d)", name)):
        name, year = match.groups()
    return ImageSet(year or None, name)


def file_stem(image_set: ImageSet) -> str:
    """Return "val2017" for ("2017", "val")."""
    return image_set.name + (image_set.year or "")


def is_test_split(path: Path) -> bool:
    """Return whether an annotation file has no ground truth."""
    return path.name.startswith("image_info")


def recognise(root: str | Path) -> str | None:
    """Return the name of the layout under ``root``; see `data.DetectionData.recognise`."""
    paths = annotation_files(Path(os.path.expanduser(root))).values()
    if {path.name for path in paths} == {ROBOFLOW}:
        return "Roboflow COCO"
    known = {(): None, ("result.json",): "Label Studio COCO"}
    return known.get(tuple(path.name for path in paths), "COCO")


def list_image_sets(root: str | Path) -> list[ImageSet]:
    """Return the image sets under ``root`` that have an annotation file or a list."""
    found = {normalise(None, stem) for stem in annotation_files(Path(os.path.expanduser(root)))}
    found |= {ImageSet(None, name) for name in list_files(root)} if found else set()
    return sorted(found, key=lambda each: (each.year or "", each.name))


def annotation_files(root: Path) -> dict[str, Path]:
    """Return the annotation file of each image set, by `file_stem`; ground truth comes first."""
    if not os.path.isdir(root):
        return {}
    found = {path.stem.removeprefix(kind): path for folder in ANNOTATION_FOLDERS[::-1]
             for kind in ANNOTATION_KINDS[::-1] for path in (root / folder).glob(f"{kind}?*.json")}
    paths = [] if found else [*root.glob("*.json"), *root.glob("*/*.json")]
    paths.sort(key=lambda path: (len(path.stem), path))  # train.json before old_train.json
    for path in paths:
        # A tool that writes many files writes one an image, and not COCO's.
        if path.name == ROBOFLOW or (len(paths) < 200 and looks_like_coco(path)):
            beside = path.parent != root and path.parent.name not in ANNOTATION_FOLDERS
            match = SET_IN_NAME.fullmatch(path.stem.lower())
            name = match[1] if match else path.parent.name if beside else path.stem
            taken = "_".join(path.relative_to(root).with_suffix("").parts)
            found[taken if name in found else name] = path
    return found


def set_folders(root: Path) -> list[Path]:
    """Return the folders of image sets that hold the annotation files; none if any lies outside."""
    folders = [path.parent for path in annotation_files(root).values()]
    return folders if all(is_set_name(each.name) and each != root
                          for each in folders) else []


def find_annotations(root: Path, image_set: ImageSet) -> Path:
    """Return the annotation file of an image set; one with ground truth comes first.

    Raises:
        UserError: no such file. The message names the image sets that exist.
    """
    name = file_stem(image_set)
    if path := annotation_files(root).get(name):
        return path
    existing = ", ".join(map(str, list_image_sets(root))) or "none"
    raise UserError(f"{root / ANNOTATION_FOLDERS[0]}/instances_{name}.json: no such annotation"
                    f" file, nor image_info_{name}.json, nor one of them in"
                    f" {ANNOTATION_FOLDERS[1]}/; image sets in {root}: {existing} (--root,"
                    " --train_sets, --test_sets; docs/own_data.md)")


class Part(NamedTuple):
    """Images of an annotation file that belong to an image set, and where they are.

    usual: the folder where they are expected. folder: where they are. names: str [N], of their
    files, in the order of ``file``; may hold folders. missing: those that do not exist.
    """

    image_set: ImageSet
    file: COCOAnnotations
    usual: Path
    folder: Path
    names: np.ndarray
    missing: list[str]


def find_images(root: Path, file: COCOAnnotations, image_set: ImageSet) -> Part:
    """Find the folder that has most of the images of an annotation file.

    Raises:
        UserError: the usual folder does not exist, and no other has any of the images.
    """
    year, name = image_set
    splits = [file_stem(ImageSet(year, IMAGES_OF.get(name, name))), file.split]
    before_2017 = year in ("2014", "2015")
    places = ("images", "") if before_2017 else ("", "images")
    folders = [root / place / split for split in splits if split for place in places]
    folders += [root / "images", root, file.path.parent, file.path.parent / "images"]
    usual, best, index = folders[0], None, FileIndex(IMAGE_SUFFIXES)
    there = [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]
    for folder, loosely in [(folder, loosely) for loosely in (False, True) for folder in there]:
        prefix = f"COCO_{folder.name}_" if before_2017 else ""
        names, missing = _names_in(folder, prefix, file, index if loosely else None)
        if best is None or len(missing) < len(best.missing):
            expected = usual if year else folder
            best = Part(image_set, file, expected, folder, np.array(names), missing)
        if not missing:
            return best
    if best and len(best.missing) < len(file.image_ids):
        return best
    # Any other folder that has all of them, and is not of another image set.
    first, word = file.file_names[0].replace("\\", "/").rpartition("/")[2], set_word(name)
    folders = {path.parent for path in index.inside(root) if path.name == first}.difference(there)
    others = []
    for folder in sorted(folders):
        names, missing = _names_in(folder, "", file, None)
        if not missing and set_word(folder.name) not in {*SET_WORDS} - {word}:
            others.append(Part(image_set, file, folder, folder, np.array(names), []))
    if len(others) > 1:
        raise UserError(f"{others[0].folder} and {others[1].folder} both hold images of the names"
                        f" in {file.path.name}; copy the right ones to {usual}")
    if others:
        return others[0]
    if best is None or not os.path.isdir(usual):
        raise UserError(f"{usual}: no such folder, for the images of {file.path.name}, such as"
                        f" {file.file_names[0] or file.image_ids[0]}; nor are they in another"
                        f" folder of {root}")
    return best


def _names_in(folder: Path, prefix: str, file: COCOAnnotations,
              index: FileIndex | None) -> tuple[list[str], list[str]]:
    """Return the file of each image, and which do not exist; index: also look for other forms."""
    existing = set(os.listdir(folder))
    names, missing = [], []
    for id, name in zip(file.image_ids.tolist(), file.file_names.tolist(), strict=True):
        usual = f"{prefix}{id:012d}.jpg"
        name = usual if not name or (name not in existing and usual in existing) else name
        # The listing has no names with a folder in them.
        if name not in existing and not os.path.isfile(folder / name):
            found = index and next(filter(None, map(index.by_name, _forms(folder, name))), None)
            if found:
                name = os.path.join(os.getcwd(), found)
            else:
                missing.append(name)
        names.append(name)
    return names, missing


def _forms(folder: Path, name: str) -> Iterator[Path]:
    """Yield the paths that a file_name may mean: itself, then its last part, also of a URL."""
    yield folder / name
    last = name.replace("\\", "/").split("?d=")[-1]
    for text in (last, last.split("?")[0], unquote(last.split("?")[0])):
        yield folder / text.rpartition("/")[2]
