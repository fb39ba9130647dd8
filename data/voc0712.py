"""PASCAL VOC and every folder in its layout: annotations, samples, evaluation."""

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

from data.config import VOC_CLASSES
from data.curves import CURVES_FILE
from data.image import read_image, report_lines
from data.image_sets import ImageSet, sets_name
from utils.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")  # in order of preference, any case


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


def first_with_objects(counts: Sequence[int], n: int, source: str) -> list[int]:
    """Positions of the first n pictures that have objects; counts: how many each one has.

    UserError if there are fewer, `source` says of what. ValueError for n below 1.
    """
    if n < 1:
        raise ValueError(f"cannot keep {n} pictures, wanted 1 or more")
    found = np.flatnonzero(counts)
    if len(found) < n:
        raise UserError(
            f"{source}: {len(found)} of {len(counts)} pictures have objects, too few to keep {n};"
            " ask for fewer (--overfit) or take another image set (--train_sets)"
        )
    return found[:n].tolist()


def check_classes(classes: Sequence[str], source: str) -> tuple[str, ...]:
    """The class names as a tuple; UserError when one is empty, repeated or the background."""
    names = tuple(name.strip() for name in classes)
    if not names or "" in names:
        raise UserError(f"{source}: a class name is empty")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{source}: class names must be unique, repeated: {', '.join(repeated)}")
    if background := {"background", "__background__"} & set(names):
        raise UserError(
            f'{source}: leave "{background.pop()}" out, the background is no class of the data set'
        )
    return names


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names from a file with one name a line; empty lines do not count."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the class names cannot be read ({error})") from error
    return check_classes([line for line in lines if line.strip()], str(path))


def parse_classes(text: str) -> tuple[str, ...]:
    """The command line's --classes: "a,b,c", or a file with one name a line."""
    path = os.path.expanduser(text)
    if os.path.isfile(path):
        return read_classes(Path(path))
    return check_classes(text.split(","), "--classes")


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
    find = _finder((".xml",))
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
        _refuse_missing("annotation", missing)
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


def _without_objects(path: Path) -> Annotation:
    return Annotation(path, None, (), np.zeros((0, 4)), np.zeros(0, bool))


def _read_or_note(path: Path, faults: list[str] | None) -> Annotation:
    """`read_annotation`; given a list, an error is added to it, and the picture has no objects."""
    try:
        return read_annotation(path)
    except UserError as error:
        if faults is None:
            raise
        faults.append(str(error))
        return _without_objects(path)


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
            names = dict.fromkeys([line, plain, stem if suffix.lower() in SUFFIXES else plain])
            found = ((name, find(folder / "Annotations", name)) for name in names)
            nothing = (" or ".join(names), None)
            yield f"{split}:{number}", folder, *next((f for f in found if f[1]), nothing)


def _finder(suffixes: Sequence[str]) -> Callable[[Path, str], Path | None]:
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


def _refuse_missing(what: str, paths: list[Path]) -> None:
    if paths:
        first = ", ".join(str(path) for path in paths[:10]) + (", ..." if len(paths) > 10 else "")
        raise UserError(f"{len(paths)} {what} file(s) of the image set missing: {first}")


class VOCDetection:
    """Samples of a VOC devkit or of a folder in VOC layout; see `__getitem__`.

    root: a devkit (VOC2007/, VOC2012/, ...) with image_sets such as [("2007", "trainval")], or a
    folder with Annotations/, JPEGImages/ and ImageSets/, and image_sets such as [(None, "test")].
    A set is read from ImageSets/Main/<set>.txt, else ImageSets/<set>.txt: one id a line, which may
    hold spaces and folders.
    transform: called as transform(image, target) on every sample.
    classes: names without background; label k is classes[k - 1]. None: those of root/classes.txt,
    else VOC_CLASSES in a devkit whose chosen sets name no other, else all names in the annotations
    of root's image sets, sorted.
    faults: given a list, what is wrong with single annotations and pictures, or with the classes,
    is added to it instead of raised, for `tools.check`: such a picture has no objects here, and one
    that is missing is told when it is read.

    Annotations are read here, pictures only where an annotation gives no size or a box leaves it.
    Boxes are the XML's values - 1, floats kept. A target is made of the objects of known classes,
    difficult ones too, clipped to 0..width-1 and 0..height-1, without boxes that have no area
    (x2 <= x1 or y2 <= y1) before or after; everything skipped or changed is in `skipped`.

    Raises UserError for missing sets, annotations and pictures, for malformed annotations, and when
    no object of a known class is left.
    """

    def __init__(
        self,
        root: str | Path,
        image_sets: Sequence[tuple[str | None, str]],
        transform: Callable | None = None,
        classes: Sequence[str] | None = None,
        faults: list[str] | None = None,
    ):
        self.root = Path(os.path.expanduser(root))
        self.image_sets = [ImageSet(year or None, image_set) for year, image_set in image_sets]
        self.transform = transform
        loaded = load_annotations(self.root, self.image_sets, classes, faults)
        self.ids, self.annotations, self.classes = loaded.ids, loaded.annotations, loaded.classes
        self.skipped: dict[str, list[str]] = loaded.skipped
        self._scored = self.classes
        self._pictures = _find_pictures(loaded, faults)
        self._sizes: list[tuple[int, int]] = []
        self._targets: list[np.ndarray] = []
        self._difficult: list[np.ndarray] = []
        label_of = {name: label for label, name in enumerate(self.classes, 1)}
        for annotation, picture in zip(self.annotations, self._pictures, strict=True):
            size = annotation.size
            if size is None or (annotation.boxes[:, 2:] > np.subtract(size, 1)).any():
                try:
                    size = _checked_size(read_image(picture), picture, annotation)
                except UserError as error:
                    if faults is None:
                        raise
                    faults.append(str(error))
                    annotation, size = _without_objects(annotation.path), (1, 1)
                if annotation.size and not _near(annotation.size, size):
                    self.skipped.setdefault("<size> with width and height swapped", []).append(
                        f"{annotation.path}: {picture.name} is {size[0]} x {size[1]}"
                    )
            target, difficult = self._make_target(annotation, size, label_of)
            self._sizes.append(size)
            self._targets.append(target)
            self._difficult.append(difficult)

    def _make_target(
        self, annotation: Annotation, size: tuple[int, int], label_of: dict[str, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        labels = np.array([label_of.get(name, 0) for name in annotation.names], np.int64)
        boxes = annotation.boxes
        clipped = boxes.clip(0, np.subtract((*size, *size), 1))
        known = labels > 0
        area = (boxes[:, 2:] > boxes[:, :2]).all(1)
        inside = (clipped[:, 2:] > clipped[:, :2]).all(1)
        changed = (clipped != boxes).any(1)
        for reason, which in (
            ("box without area dropped", known & ~area),
            ("box outside the picture dropped", known & area & ~inside),
            ("box clipped to the picture", known & area & inside & changed),
        ):
            for k in np.flatnonzero(which):
                box = ", ".join(f"{value:g}" for value in boxes[k] + 1)
                self.skipped.setdefault(reason, []).append(
                    f'{annotation.path}: object {k + 1} ("{annotation.names[k]}") ({box})'
                    f" in {size[0]} x {size[1]}"
                )
        keep = known & area & inside
        target = np.hstack([clipped[keep], labels[keep, None]]).astype(np.float32)
        return target, annotation.difficult[keep]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int):
        """(`pull_image`, `target`): BGR uint8 [H, W, 3] and float32 [n, 5]; transformed if asked.

        Raises UserError when the picture cannot be read or is not the annotated one.
        """
        image, target = self.pull_image(index), self.target(index)
        return self.transform(image, target) if self.transform else (image, target)

    list_image_sets = staticmethod(list_image_sets)

    def image_path(self, index: int) -> Path:
        return self._pictures[index]

    def image_size(self, index: int) -> tuple[int, int]:
        """(width, height) of the annotation; of the picture if it has none or a box leaves it."""
        return self._sizes[index]

    def pull_image(self, index: int) -> np.ndarray:
        """The picture, BGR uint8 [H, W, 3].

        Raises UserError when <size> says otherwise, by more than a pixel of rounding, or the boxes
        are for the picture before its EXIF orientation. A <size> with width and height swapped
        passes if all boxes lie inside the picture.
        """
        path = self._pictures[index]
        image = read_image(path)
        _checked_size(image, path, self.annotations[index])
        return image

    def target(self, index: int) -> np.ndarray:
        """float32 [n, 5]: x1, y1, x2, y2 in pixels counted from 0, label >= 1; n may be 0."""
        return self._targets[index].copy()

    def difficult(self, index: int) -> np.ndarray:
        """bool [n]: which rows of `target` are difficult objects."""
        return self._difficult[index].copy()

    def report(self) -> list[str]:
        """A line for the log for every reason in `skipped`, with the count and an example."""
        return report_lines(self.skipped)

    def keep_first(self, n: int) -> None:
        """Restrict the data set, in place, to the first n pictures with an object in their target.

        What `evaluate` returns is then about these pictures, and about the classes that have ground
        truth there, so that perfect detections score 1. `skipped` is left as it is. UserError if
        there are fewer such pictures, ValueError for n below 1.
        """
        counts = [len(target) for target in self._targets]
        kept = first_with_objects(counts, n, f"{self.root}: {sets_name(self.image_sets)}")
        for name in ("ids", "annotations", "_pictures", "_sizes", "_targets", "_difficult"):
            setattr(self, name, [getattr(self, name)[i] for i in kept])
        counted = {
            name
            for annotation in self.annotations
            for name, difficult in zip(annotation.names, annotation.difficult, strict=True)
            if not difficult
        }
        # Where all are difficult there is nothing to score; the notes of a score say so.
        self._scored = tuple(c for c in self.classes if c in counted) or self.classes

    def check_scorable(self) -> None:
        """Raise UserError if `evaluate` could not score these image sets: an id in two years."""
        if len(set(self.ids)) < len(self):
            raise UserError(
                f"{self.root}: pictures of different years have the same image id, and comp4 files "
                "cannot tell them apart; evaluate the image sets one by one"
            )

    def evaluate(
        self, detections: Sequence[dict], directory: str | Path, name: str = "SSD"
    ) -> dict:
        """Write comp4 files into `directory` and score them, with both metrics.

        `name`, of the detector, is in no comp4 file.

        detections: one {"boxes" float32 [n, 4] pixels from 0, "scores" [n], "labels" [n]} an image,
        in the data set's order. The metric is the 11-point one for the years before 2010, the area
        one else. Returns {"metric", "value" (mean over classes), "per_class", "iou", "image_set",
        "voc07_11point" and "area" (see `data.voc_eval.evaluate_voc`), "per_size" and
        "per_class_per_size" (of the metric), "ground_truths" and "detections" (counts per class),
        "curves" (a file in `directory`, see `data.curves`), "notes" (lines for the log)}; the
        numbers come from the written files.
        """
        from data import voc_eval

        if len(detections) != len(self):
            raise ValueError(f"{len(detections)} detections for {len(self)} images")
        self.check_scorable()
        # The official spelling of a single set has no year.
        stem = sets_name(self.image_sets) if len(self.image_sets) > 1 else self.image_sets[0].name
        voc_eval.write_comp4(directory, stem, self.classes, self.ids, detections)
        read, _ = voc_eval.read_comp4(directory, stem, self._scored, self.ids)
        result = voc_eval.evaluate_voc(read, self.annotations, self._scored)
        if left_out := [c for c in self.classes if c not in self._scored]:
            result["notes"].append(
                f"no ground truth in the {len(self)} pictures kept, so not scored, for"
                f" {len(left_out)} classes: {', '.join(left_out)}"
            )
        old = all(year and year.isdigit() and int(year) < 2010 for year, _ in self.image_sets)
        main = "voc07_11point" if old else "area"
        voc_eval.write_voc_curves(Path(directory) / CURVES_FILE, result)
        return {
            "metric": voc_eval.METRICS[main],
            "value": result[main]["mean"],
            **{key: result[main][key] for key in ("per_class", "per_size", "per_class_per_size")},
            "image_set": stem,
            **result,
            "curves": CURVES_FILE,
        }


def _checked_size(image: np.ndarray, path: Path, annotation: Annotation) -> tuple[int, int]:
    """(width, height) of the picture; UserError when its annotation is for another one."""
    size, stated, corners = image.shape[1::-1], annotation.size, annotation.boxes[:, 2:]
    outside = (corners > size).any(1)  # size and not size - 1: a pixel is rounding
    if _near(stated, size) if stated else not outside.any():
        return size
    raw = read_image(path, orient=False).shape[1::-1]
    if _near(stated, raw) if stated else (outside & (corners <= raw).all(1)).any():
        raise UserError(
            f"{path}: an EXIF orientation tag turns the picture to {size[0]} x {size[1]}, but the "
            f"boxes in {annotation.path} are for {raw[0]} x {raw[1]}; remove the tag "
            "(exiftool -Orientation= FILE) or label the turned picture"
        )
    if stated and (outside.any() or not _near(stated[::-1], size)):
        raise UserError(
            f"{annotation.path}: <size> says {stated[0]} x {stated[1]}, but the picture {path.name}"
            f" is {size[0]} x {size[1]}; restore the annotated picture, or take <size> out if the "
            "boxes are right for this one"
        )
    return size


def _near(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return abs(a[0] - b[0]) <= 1 and abs(a[1] - b[1]) <= 1


def _find_pictures(loaded: VOCAnnotations, faults: list[str] | None) -> list[Path]:
    find = _finder(SUFFIXES)
    wanted = [(f / "JPEGImages", i) for f, i in zip(loaded.folders, loaded.ids, strict=True)]
    found = [find(*pair) for pair in wanted]
    if faults is None:
        _refuse_missing(
            f"picture ({'/'.join(SUFFIXES)})",
            [folder / i for (folder, i), path in zip(wanted, found, strict=True) if path is None],
        )
    usual = [folder / f"{i}{SUFFIXES[0]}" for folder, i in wanted]
    return [path or other for path, other in zip(found, usual, strict=True)]
