"""Where YOLO's images and labels lie, and what names the classes.

    root/data.yaml                             names, and the images of train, val and test
    root/images/<set>/, root/labels/<set>/     else image sets by folder
    root/<set>/images/, root/<set>/labels/
    root/<set>/ or root/                       .txt files beside the images
    root/<set>.txt, classes.txt, obj.names     lists of images, class names
"""

import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from data.classes import BACKGROUND, check_classes, spelled
from data.image import IMAGE_SUFFIXES
from data.image_files import FileIndex
from data.image_sets import DEFAULT_SET, SET_WORDS, is_set_name, set_word
from data.split import ends, read_list
from utils.errors import UserError
from utils.files import read_text

try:
    import yaml
except ImportError:  # told when a data.yaml is there
    yaml = None

IMAGE_FOLDERS = {"images": "labels", "Images": "Labels", "IMAGES": "LABELS", "JPEGImages": "labels"}
NAME_FILES = ("classes.txt", "obj.names", "labels.txt", "_darknet.labels")
_shown = reprlib.Repr().repr  # YAML's references make short texts that are endless values


class YOLOFolder:
    """What a folder declares.

    names: class names by number; None where data.yaml has none. keypoints: number of values behind
    each box. sets: folders or lists by image set; empty where the folders of the images are the
    sets. absent: sets to test on that are declared but have no files, which tools write.

    Raises UserError if data.yaml is malformed.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.bases, self.source, self.keypoints = root, [root], "", 0
        self.index, self._texts = FileIndex(IMAGE_SUFFIXES), FileIndex((".txt",))
        self.names, self.absent = None, {}
        self.sets = {file.stem: [file.name] for file in sorted(root.glob("*.txt"))
                     if is_set_name(file.stem) and file.is_file()}
        if found := _find_yaml(root):
            path, content = found
            self.source = path.name
            lists = {key: values for key in content if str(key).lower() in SET_WORDS
                     and (values := _as_texts(path, key, content[key]))}
            base = _as_texts(path, "path", content.get("path", ""))
            self.bases = [*(root / each.replace("\\", "/") for each in base), root]
            self.absent = {key: values for key, values in lists.items()
                           if key.lower()[:5] != "train" and not any(map(self._place, values))}
            lists = {key: values for key, values in lists.items() if key not in self.absent}
            self.sets = lists or self.sets
            self.names, self.keypoints = _read_names(path, content), _read_keypoints(path, content)

    @property
    def layout(self) -> str | None:
        """Name for people; None if there are neither labels nor a data.yaml with image sets."""
        if self.source and self.sets:
            return f"YOLO ({self.source})"
        if not self.images or (not self.source and any(self.root.glob("*/data.yaml"))):
            return None  # that of a subfolder is to be read from there
        darknet = {path.parent for path in self.root.glob("*/obj.data")}
        if not self.sets and all(darknet & {*image.parents} for image in self.images):
            return None  # likewise
        apart = any(IMAGE_FOLDERS.keys() & set(self._folders_of(each)) for each in self.images)
        return f"YOLO ({self.source or 'images and labels' + ' beside' * (not apart)})"

    def near_miss(self) -> str:
        """Return why images in a folder images/ and labels are no data set; "" for other files."""
        every = self.index.inside(self.root)
        label = next(filter(is_label, [] if every else self._texts.inside(self.root)[:20]), None)
        if label:
            return f"label files, such as {label}, but no images; copy the images beside them"
        images = [each for each in every if IMAGE_FOLDERS.keys() & {*self._folders_of(each)}]
        if not images:
            return ""
        folder = next(each for each in self._folders_of(images[0]) if each in IMAGE_FOLDERS)
        place = IMAGE_FOLDERS[folder]
        labels = [each for each in self._texts.inside(self.root)
                  if place in self._folders_of(each) and each.name not in NAME_FILES]
        found = f"{len(images)} images in {folder}/, {len(labels)} label files in {place}/"
        if not labels:
            return f"{found}; copy them there, such as {images[0].stem}.txt"
        same = [label for label in map(self.label_of, images) if label]
        if not same:
            return (f"{found}, no name in common, e.g. {labels[0].name} and {images[0].name}; give "
                    "each label file the name of its image")
        if not any(label.stat().st_size for label in same):
            return f"{found}, all empty, e.g. {same[0].name}; export them again"
        return f"{found}, no labels in them, e.g. {same[0].name}; write class x y width height"

    @cached_property
    def images(self) -> list[Path]:
        """All images in folders that hold an image with a label, and in all folders images/."""
        every = self.index.inside(self.root)
        having, tries, apart = set(), Counter(), False
        for image in every:
            folder = image.parent
            if folder not in having and tries[folder] < 50 and (label := self.label_of(image)):
                tries[folder] += label.stat().st_size > 0
                if is_label(label):
                    having.add(folder)
                    apart |= label.parent != folder
        return [image for image in every if image.parent in having
                or (apart and IMAGE_FOLDERS.keys() & set(self._folders_of(image)))]

    def _folders_of(self, image: Path) -> list[str]:
        return relative(image, self.root).split("/")[:-1]

    def label_of(self, image: Path) -> Path | None:
        """Return the label file of an image, None if there is none."""
        return next((found[0] for each in self.label_stems(image)
                     if (found := self._texts.by_stem(each))), None)

    def label_stems(self, image: Path) -> list[str]:
        """Return where the label file of an image may be, without suffix."""
        stem = os.path.splitext(image)[0]
        parts = stem.split(os.sep)
        k = max((k for k, part in enumerate(parts[:-1]) if part in IMAGE_FOLDERS), default=None)
        swapped = [] if k is None else [[*parts[:k], IMAGE_FOLDERS[parts[k]], *parts[k + 1 :]]]
        inner = os.path.splitext(relative(image, self.root))[0]
        return [*map(os.sep.join, swapped), stem, os.path.join(self.root, "labels", inner)]

    def declared(self) -> dict[str, list[Path]]:
        """Return the images of all declared image sets; "default": those in no folder of a set."""
        if self.sets:
            return {name: self.of_set(name, []) for name in self.sets}
        found: dict[str, list[Path]] = {}
        for image in self.images:
            folders = [each for each in self._folders_of(image) if each not in IMAGE_FOLDERS]
            folders = [each for each in folders if set_word(each) in SET_WORDS] or folders
            if folders[:1] == ["obj_train_data"]:  # Darknet's folder of all images
                folders = []
            found.setdefault(folders[0] if folders else DEFAULT_SET, []).append(image)
        return found if found.keys() - {DEFAULT_SET} else {}

    def of_set(self, name: str, missing: list[str]) -> list[Path]:
        """Return the images of one of ``sets``, maybe some twice; add missing ones of a list.

        Raises:
            UserError: a folder or a list does not exist, or holds no image.
        """
        images: list[Path] = []
        for value in self.sets[name]:
            if (place := self._place(value)) is None:
                raise UserError(f"{self.root / self.source}: {name} is {value}, but there is no "
                                f"{' and no '.join(str(base / value) for base in self.bases)}; "
                                "correct it")
            folder = os.path.isdir(place)
            found = self.index.inside(place) if folder else self._listed(place, missing)
            if not found:
                raise UserError(f"{place}: the image set {name} of {self.root} holds no image")
            images += found
        return images

    def _listed(self, path: Path, missing: list[str]) -> list[Path]:
        found = []
        for where, line in read_list(path):
            places = list(self._places(line, path.parent))
            file = next(filter(None, map(self.index.by_name, places)), None)
            missing += [] if file else [f"{line} ({where})"]
            found.append(file or places[0])
        return found

    def _place(self, text: str) -> Path | None:
        return next(filter(os.path.exists, self._places(text)), None)

    def _places(self, text: str, *bases: Path) -> Iterator[Path]:
        """Yield where a path may lead: from each base, then without its folders of elsewhere."""
        text = text.replace("\\", "/")
        if text.startswith("/"):
            yield Path(text)
        for k, end in enumerate(ends(re.sub("^[A-Za-z]:/", "/", text))):
            if k == 0 or end not in IMAGE_FOLDERS:  # all images, of whatever set
                for base in (*bases, *self.bases):
                    yield Path(os.path.normpath(base / end))


def relative(path: Path, root: Path) -> str:
    """Return the path of an image from the root, with slashes."""
    return os.path.relpath(path, root).replace(os.sep, "/")


def is_label(path: Path) -> bool:
    """Return whether a file begins with five or more numbers."""
    try:
        words = read_text(path, "label file", 2**24).lstrip().split("\n", 1)[0].split()
        return len(words) >= 5 and all(math.isfinite(float(word)) for word in words)
    except (UserError, ValueError):
        return False


def _find_yaml(root: Path) -> tuple[Path, Mapping] | None:
    """Return the file that describes the data, and its content; None if there is none."""
    found = []
    paths = (path for path in root.glob("[!.]*.y*ml") if path.suffix in (".yaml", ".yml"))
    for path in sorted(paths, key=lambda path: (path.stem != "data", path.name))[:20]:
        try:
            content = _read_yaml(path)
        except UserError:
            if path.stem == "data":
                raise
            continue
        if isinstance(content, dict) and {*SET_WORDS, "names"} & content.keys():
            found.append((path, content))
    if len(found) > 1 and found[0][0].stem != "data":
        files = ", ".join(path.name for path, _ in found)
        raise UserError(f"{root}: {files} all describe data; name the right one data.yaml")
    return found[0] if found else None


def _read_yaml(path: Path) -> object:
    if yaml is None:
        raise UserError(f"{path}: PyYAML is needed to read it; pip install pyyaml")
    text = read_text(path, "description of the data", 2**20)
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)  # texts: a class may be called no or 1
    except Exception as error:  # whatever foreign text does to the parser
        said = " ".join(str(error).split())
        raise UserError(f"{path}: malformed YAML ({said:.200}); correct it") from error


def _as_texts(path: Path, key: str, value: object) -> list[str]:
    """Return a text or a list of texts as a list, without empty ones."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) and "\0" not in each for each in values):
        raise UserError(f"{path}: {key} is {_shown(value)}; give a folder, or a list of folders")
    return [each.strip() for each in values if each.strip() not in ("", "null", "~")]


def _read_names(path: Path, content: Mapping) -> dict[int, str] | None:
    given = content.get("names")
    if given in (None, "", "null", "~"):
        return None
    names = dict(enumerate(given)) if isinstance(given, list) else given
    if not (isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
            and all(re.fullmatch("[0-9]{1,9}", str(key)) for key in names)):
        raise UserError(f"{path}: names is {_shown(given)}; give a list of texts, or number: name")
    if (count := content.get("nc")) is not None and count != str(len(names)):
        raise UserError(f"{path}: nc is {_shown(count)} for {len(names)} names; correct one")
    return _checked({int(key): name for key, name in names.items()}, path)


def _checked(names: dict[int, str], path: Path) -> dict[int, str]:
    names = {number: spelled(name) for number, name in names.items()}
    check_classes([name for name in names.values() if name not in BACKGROUND], str(path))
    return names


def _read_keypoints(path: Path, content: Mapping) -> int:
    shape = content.get("kpt_shape", ["0", "0"])
    if not (isinstance(shape, list) and len(shape) == 2
            and all(re.fullmatch("[0-9]{1,4}", str(each)) for each in shape)):
        raise UserError(f"{path}: kpt_shape is {_shown(shape)}; give [points, 2 or 3]")
    return int(shape[0]) * int(shape[1])


def names_beside(root: Path) -> tuple[Path, dict[int, str]] | None:
    """Return a file with a class name a line, in the root or up to two folders deep, and them."""
    found: dict[Path, dict[int, str]] = {}
    for names in (NAME_FILES, ("*.names",)):
        for path in (path for depth in ("", "*/", "*/*/") for name in names
                     for path in sorted(root.glob(depth + name))):
            lines = read_text(path, "class names", 2**24).rstrip().splitlines()
            found[path] = _checked(dict(enumerate(lines)), path)
        if found:
            break
    if len({tuple(names.items()) for names in found.values()}) > 1:
        raise UserError(f"{' and '.join(map(str, found))} differ; make them equal, or keep one")
    return next(iter(found.items()), None)
