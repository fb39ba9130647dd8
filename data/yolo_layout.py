"""Where YOLO's labels and images lie, and what names the classes.

    root/data.yaml                         names, and where the images of train, val and test are
    root/images/<set>/, root/labels/<set>/
    root/<set>/images/, root/<set>/labels/
    root/<set>/ or root/                   .txt files beside the images

Without data.yaml, image sets are folders, or lists root/<set>.txt, and classes.txt or obj.names
names the classes.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from data.classes import check_classes
from data.image import IMAGE_SUFFIXES
from data.image_files import FileIndex
from data.split import ends
from utils.errors import UserError
from utils.files import read_text

try:
    import yaml
except ImportError:  # told when a data.yaml is there
    yaml = None

SETS = ("train", "trainval", "val", "valid", "validation", "dev", "test")
IMAGE_FOLDERS = {"images": "labels", "Images": "Labels", "IMAGES": "LABELS", "JPEGImages": "labels"}
NAME_FILES = ("classes.txt", "obj.names", "labels.txt", "_darknet.labels")
MOST_CLASSES = 10_000
BACKGROUND = ("background", "__background__")


class Folder(NamedTuple):
    """What is declared under a root.

    source: what declares the sets. sets: folders or lists of images by image set. bases: what they
    may be relative to. images: folders with all images, and whether with their subfolders. names:
    class names by number, None if nothing tells them. keypoints: values after the box. absent: sets
    to test on that have no files; tools declare them whether they are exported or not.
    """

    layout: str
    source: str
    sets: dict[str, list[str]]
    bases: list[Path]
    images: list[tuple[Path, bool]]
    names: dict[int, str] | None
    keypoints: int = 0
    absent: Mapping[str, list[str]] = MappingProxyType({})


# ---------------------------------------------------------------- what is declared


def find_folder(root: Path) -> Folder | None:
    """Return what is declared under ``root``, None if it holds no YOLO labels.

    Raises:
        UserError: data.yaml is malformed.
    """
    beside = _discover(root)
    found = _find_yaml(root)
    if found is None:
        return beside
    path, content = found
    sets = {key: _texts(path, key, content[key]) for key in SETS if content.get(key)}
    sets = {key: value for key, value in sets.items() if value}
    base = _texts(path, "path", content.get("path", ""))
    bases = [Path(root, each.replace("\\", "/")) for each in base] + [root]
    names = _read_names(path, content)
    if names is None and beside:
        names = beside.names
    keypoints = _read_keypoints(path, content)
    layout = f"YOLO ({path.name})"
    if not sets and beside is None:
        return Folder(layout, path.name, {}, bases, [], names, keypoints)
    absent = [key for key, values in sets.items() if not key.startswith("train")
              and not any(place.exists() for each in values for place in places(each, bases))]
    absent = {key: sets.pop(key) for key in absent}
    images = beside.images if beside else []
    return Folder(layout, path.name, sets or beside.sets, bases, images, names, keypoints, absent)


def _find_yaml(root: Path) -> tuple[Path, dict] | None:
    """Return the description of the data and its content; None if there is none."""
    paths = [path for path in sorted(root.glob("[!.]*.y*ml")) if path.suffix in (".yaml", ".yml")]
    found = []
    for path in sorted(paths, key=lambda path: path.stem != "data")[:20]:
        try:
            content = _read_yaml(path)
        except UserError:
            if path.stem == "data":
                raise
            continue
        if isinstance(content, dict) and ({*SETS, "names"} & content.keys()):
            if path.stem == "data":
                return path, content
            found.append((path, content))
    if len(found) > 1:
        files = ", ".join(path.name for path, _ in found)
        raise UserError(f"{root}: {files} all describe data; name the right one data.yaml")
    return found[0] if found else None


def _read_yaml(path: Path) -> object:
    if yaml is None:
        raise UserError(f"{path}: PyYAML is needed to read it; pip install pyyaml")
    text = read_text(path, "description of the data", 2**24)
    try:
        # All scalars stay texts: a class may be called "no" or 1.
        return yaml.load(text, Loader=yaml.BaseLoader)
    except Exception as error:  # whatever foreign text does to the parser
        said = " ".join(str(error).split())
        raise UserError(f"{path}: malformed YAML ({said:.200}); correct it") from error


def _texts(path: Path, key: str, value: object) -> list[str]:
    """Return a text or a list of texts as a list without empty ones."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) for each in values):
        raise UserError(f"{path}: {key} is {str(value):.60}; give a folder, or a list of folders")
    return [each.strip() for each in values if each.strip() not in ("", "null", "~")]


def _read_names(path: Path, content: Mapping) -> dict[int, str] | None:
    names = content.get("names")
    if names in (None, "", "null", "~"):
        return None
    if isinstance(names, list):
        names = {str(number): name for number, name in enumerate(names)}
    fits = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    if not fits or not all(str(key).isdecimal() for key in names):
        raise UserError(
            f"{path}: names is {str(content['names']):.60}; give a list of texts, or number: name"
        )
    names = {int(key): name.strip() for key, name in names.items()}
    if (count := content.get("nc")) is not None and str(count) != str(len(names)):
        raise UserError(
            f"{path}: nc is {str(count):.60}, but there are {len(names)} names; correct one of them"
        )
    return _checked(names, path)


def _checked(names: dict[int, str], path: Path) -> dict[int, str]:
    if len(names) > MOST_CLASSES:
        raise UserError(f"{path}: {len(names):,} class names, more than {MOST_CLASSES:,}")
    names = {number: name for number, name in names.items() if name not in BACKGROUND}
    check_classes(list(names.values()), str(path))
    return names


def _read_keypoints(path: Path, content: Mapping) -> int:
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    numbers = shape if isinstance(shape, list) else [shape]
    if len(numbers) != 2 or not all(str(each).isdecimal() for each in numbers):
        raise UserError(f"{path}: kpt_shape is {str(shape):.60}; give [points, 2 or 3]")
    return int(numbers[0]) * int(numbers[1])


def _discover(root: Path) -> Folder | None:
    """Return what the folders alone tell."""
    index, texts = FileIndex(IMAGE_SUFFIXES), FileIndex((".txt",))
    folders = [Path(entry.path) for entry in _entries(root) if entry.is_dir()]
    pairs = [root / name for name in IMAGE_FOLDERS if (root / name) in folders]
    pairs = [(each, root / IMAGE_FOLDERS[each.name]) for each in pairs]
    inner = [(each / name, each / IMAGE_FOLDERS[name]) for each in folders
             for name in IMAGE_FOLDERS if (each / name).is_dir()]
    for images, labels in pairs:
        if any(map(is_label, texts.inside(labels)[:50])):
            subs = [Path(entry.path) for entry in _entries(images) if entry.is_dir()]
            sets = {sub.name: [str(sub)] for sub in subs if index.inside(sub)}
            return _found(root, "images and labels", sets, [(images, True)])
    if any(map(is_label, (file for _, labels in inner for file in texts.inside(labels)[:50]))):
        sets = {images.parent.name: [str(images)] for images, _ in inner if index.inside(images)}
        return _found(root, "images and labels", sets, [(images, True) for images, _ in inner])
    having = [folder for folder in [root, *folders] if _has_labels(folder, index)]
    if not having:
        return None
    sets = {folder.name: [str(folder)] for folder in having if folder != root}
    return _found(root, "images and labels beside", sets, [(each, each != root) for each in having])


def _found(root: Path, layout: str, sets: dict[str, list[str]],
           images: list[tuple[Path, bool]]) -> Folder:
    lists = {name: [f"{name}.txt"] for name in SETS if (root / f"{name}.txt").is_file()}
    if lists or "obj_train_data" in sets:  # one folder of Darknet's for all images
        sets = lists
    places = [root, root / "labels", *(folder for folder, _ in images)]
    places += [folder.parent for folder, _ in images]
    return Folder(f"YOLO ({layout})", "the layout", sets, [root], images, _names_beside(places))


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if e.name[0] != "."), key=lambda entry: entry.name)
    except OSError:
        return []


def _has_labels(folder: Path, index: FileIndex) -> bool:
    files = [entry for entry in _entries(folder) if entry.name.endswith(".txt")]
    stems = ((entry, os.path.splitext(entry.path)[0]) for entry in files)
    pairs = [Path(entry.path) for entry, stem in stems if index.by_stem(stem)]
    return any(map(is_label, pairs[:50]))


def is_label(path: Path) -> bool:
    """Return whether a file begins with five or more numbers."""
    try:
        words = read_text(path, "label file", 2**24).split("\n", 1)[0].split()
        return len(words) >= 5 and all(math.isfinite(float(word)) for word in words)
    except (UserError, ValueError):
        return False


def _names_beside(folders: Sequence[Path]) -> dict[int, str] | None:
    """Return the class names of a file with one a line; several files must agree."""
    found: dict[Path, dict[int, str]] = {}
    for folder in dict.fromkeys(folders):
        for path in (folder / name for name in NAME_FILES):
            if path.is_file():
                lines = read_text(path, "class names", 2**24).rstrip().splitlines()
                found[path] = _checked({k: line.strip() for k, line in enumerate(lines)}, path)
    if len({tuple(names.items()) for names in found.values()}) > 1:
        raise UserError(f"{' and '.join(map(str, found))} differ; make them equal, or keep one")
    return next(iter(found.values()), None)


# ---------------------------------------------------------------- images


def places(text: str, bases: Sequence[Path]) -> Iterator[Path]:
    """Yield where a path may lead: from the bases, then without its folders of elsewhere."""
    text = text.replace("\\", "/")
    if text.startswith("/"):
        yield Path(text)
    for k, end in enumerate(ends(re.sub("^[A-Za-z]:/", "/", text))):
        if k == 0 or end not in IMAGE_FOLDERS:  # all images, of whatever set
            yield from (Path(os.path.normpath(base / end)) for base in bases)


class Images:
    """Finds the images of image sets under a root."""

    def __init__(self, root: Path, folder: Folder) -> None:
        self.root = root
        self.folder = folder
        self._index = FileIndex(IMAGE_SUFFIXES)

    def all(self) -> list[Path]:
        """Return the images of all folders and declared sets."""
        found = [file for folder, deep in self.folder.images for file in self._index.inside(folder)
                 if deep or file.parent == folder]
        declared = [file for name in self.folder.sets for file in self.of_set(name, [])]
        return list(dict.fromkeys(declared or found))

    def of_set(self, name: str, missing: list[str]) -> list[Path]:
        """Return the images of a declared set, maybe some twice; add missing ones of a list.

        Raises:
            UserError: a folder or a list does not exist, or holds no image.
        """
        found: list[Path] = []
        for value in self.folder.sets[name]:
            place = next((p for p in places(value, self.folder.bases) if p.exists()), None)
            if place is None:
                tried = " and ".join(str(base / value) for base in self.folder.bases)
                raise UserError(
                    f"{self.root}: {self.folder.source} says {name}: {value}, but there is no "
                    f"{tried}; correct it"
                )
            files = self._index.inside(place) if place.is_dir() else self._listed(place, missing)
            if not files:
                raise UserError(f"{place}: the image set {name} of {self.root} holds no image")
            found += files
        return found

    def _listed(self, path: Path, missing: list[str]) -> list[Path]:
        """Return the images that a list names; those that are missing as the list has them."""
        found = []
        bases = [path.parent, *self.folder.bases]
        for number, line in enumerate(read_text(path, "image set").splitlines(), 1):
            if line := line.strip():
                tried = list(places(line, bases))
                file = next(filter(None, map(self._index.by_name, tried)), None)
                missing += [] if file else [f"{line} ({path}:{number})"]
                found.append(file or tried[0])
        return found

