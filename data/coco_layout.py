"""Where COCO's annotation files and images lie.

    root/annotations/instances_<set><year>.json    train2014 val2014 minival2014 valminusminival2014
                                                   train2017 val2017
    root/annotations/image_info_<set><year>.json   test2015 test-dev2015 test2017 test-dev2017
    root/images/<split>/COCO_<split>_<id>.jpg      images before 2017, <id> of 12 digits
    root/<split>/<id>.jpg                          images since

Own data are read alike, with or without a year, with any set name, categories and ids. A set that
has an image_info file alone is a test split without ground truth. The files may also lie in
root/original_annotations/. Where an image's ``file_name`` exists, it decides; it may have folders
in it and start from root/<split>/, root/images/<split>/, root/images/ or root/.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.coco_json import COCOAnnotations
from data.image_sets import ImageSet
from utils.errors import UserError

# Sets that are parts of another split and have no image folder of their own.
IMAGES_OF = {"minival": "val", "valminusminival": "val", "test-dev": "test"}
ANNOTATION_FOLDERS = ("annotations", "original_annotations")
ANNOTATION_KINDS = ("instances_", "image_info_")


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
    return "COCO" if list_image_sets(root) else None


def list_image_sets(root: str | Path) -> list[ImageSet]:
    """Return the image sets under ``root`` that have an annotation file."""
    found = {
        normalise(None, path.stem.removeprefix(kind))
        for folder in ANNOTATION_FOLDERS
        for kind in ANNOTATION_KINDS
        for path in (Path(os.path.expanduser(root)) / folder).glob(f"{kind}?*.json")
    }
    return sorted(found, key=lambda each: (each.year or "", each.name))


def find_annotations(root: Path, image_set: ImageSet) -> Path:
    """Return the annotation file of an image set; one with ground truth comes first.

    Raises:
        UserError: no such file. The message names the image sets, or the JSON files, that exist.
    """
    paths = [
        root / folder / f"{kind}{file_stem(image_set)}.json"
        for folder in ANNOTATION_FOLDERS
        for kind in ANNOTATION_KINDS
    ]
    for path in paths:
        if os.path.isfile(path):  # False, too, for a name that no file system takes
            return path
    existing = ", ".join(map(str, list_image_sets(root)))
    if not existing:
        files = sorted(path for glob in ("*.json", "*/*.json") for path in root.glob(glob))
        files = ", ".join(str(path.relative_to(root)) for path in files[:10])
        existing = f"none; JSON files there: {files or 'none'}"
    raise UserError(
        f"{paths[0]}: no such annotation file, nor {paths[1].name}, nor one of them in"
        f" {ANNOTATION_FOLDERS[1]}/; image sets in {root}: {existing} (--root, --train_sets,"
        " --test_sets; docs/own_data.md)"
    )


class ImageFiles(NamedTuple):
    """The image files of one annotation file.

    usual: the folder where they are expected. folder: where they are. names: str [N], in the
    order of the annotation file; may hold folders. missing: those that do not exist.
    """

    usual: Path
    folder: Path
    names: np.ndarray
    missing: list[str]


def find_images(root: Path, file: COCOAnnotations, image_set: ImageSet) -> ImageFiles:
    """Find the folder that has most of the images of an annotation file.

    Raises:
        UserError: the usual folder does not exist, and no other has any of the images.
    """
    year, name = image_set
    splits = [file_stem(ImageSet(year, IMAGES_OF.get(name, name))), file.split]
    before_2017 = year in ("2014", "2015")
    places = ("images", "") if before_2017 else ("", "images")
    folders = [root / place / split for split in splits if split for place in places]
    usual, best = folders[0], None
    for folder in dict.fromkeys([*folders, root / "images", root]):
        if os.path.isdir(folder):
            prefix = f"COCO_{folder.name}_" if before_2017 else ""
            names, missing = _names_in(folder, prefix, file)
            if best is None or len(missing) < len(best.missing):
                best = ImageFiles(usual, folder, np.array(names), missing)
            if not missing:
                return best
    if not os.path.isdir(usual) and (best is None or len(best.missing) == len(file.image_ids)):
        raise UserError(
            f"{usual}: no such folder, for the images of {file.path.name}, such as"
            f" {file.file_names[0] or file.image_ids[0]}; nor are they in"
            f" {', '.join(map(str, folders[1:]))}, {root / 'images'} or {root}"
        )
    return best


def _names_in(folder: Path, prefix: str, file: COCOAnnotations) -> tuple[list[str], list[str]]:
    existing = set(os.listdir(folder))
    names, missing = [], []
    for id, name in zip(file.image_ids.tolist(), file.file_names.tolist(), strict=True):
        usual = f"{prefix}{id:012d}.jpg"
        name = usual if not name or (name not in existing and usual in existing) else name
        names.append(name)
        # The listing has no names with a folder in them.
        if name not in existing and not os.path.isfile(folder / name):
            missing.append(name)
    return names, missing
