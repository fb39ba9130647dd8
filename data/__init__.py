"""Data sets by name: what they have in common, one row each, and how to open one.

A reader's module is imported when its data set is opened. Importing ``data`` needs neither OpenCV
nor PyTorch nor pycocotools.
"""

import importlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from data.annotation import check_folder, holds_data, other_format, tell
from data.image_sets import DEFAULT_SET, ImageSet, set_word, sets_name
from data.skips import Skip, SkipKind, report_lines
from data.split import SPLIT_TRAIN, SPLIT_VAL
from data.truth import Truth, digest
from utils.errors import UserError

_EXPORTS = {"COCODetection": "data.coco", "CVATDetection": "data.cvat",
            "VOCDetection": "data.voc0712", "YOLODetection": "data.yolo",
            "VOC_CLASSES": "data.config", "detection_collate": "data.loading"}


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'data' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


class DetectionData:
    """Base class of the readers: samples of some image sets, and their score.

    A reader is constructed as ``Reader(root, image_sets, classes=..., **options)`` with the
    options of its row in `DATASETS`. It sets the attributes below and adds the methods that raise
    NotImplementedError here. It raises UserError for missing or malformed files. Given a list as
    ``faults``, it goes on where it can, for ``tools.check``: it adds the sentence to the list, or
    leaves it to ``pull_image`` to raise. ``transform`` is called as transform(image, target) on
    every sample.
    """

    ids: list
    """One name an image, a string or an integer."""
    classes: Sequence[str]
    """Class names without background; label k is ``classes[k - 1]``."""
    skipped: list[Skip]
    """What the reader changed or left out."""
    unread: Collection[int] = ()
    """Images whose annotation could not be read; only with ``faults``."""
    sizes: np.ndarray
    """int64 [N, 2], width and height of each image."""
    rows: np.ndarray
    """float32 [M, 5], the targets of all images in a row."""
    offsets: np.ndarray
    """int64 [N + 1]; image i has ``rows[offsets[i]:offsets[i + 1]]``."""
    quick_score = False
    """Whether `evaluate` leaves out intervals that take more than a second or so."""

    layout: str | None = None
    """Its name, where a reader that needs long to recognise it has done so to load it."""

    def __init__(self, root: str | Path, image_sets: Sequence[ImageSet],
                 transform: Callable | None = None) -> None:
        self.root = Path(os.path.expanduser(root))
        self.image_sets = image_sets
        self.transform = transform
        self.skipped = []

    @staticmethod
    def recognise(root: str | Path) -> str | None:
        """Return the name of the layout under ``root``, None if this reader does not know it.

        "" if it cannot tell. Annotation files may be looked into; no image is opened.
        """
        return ""

    @staticmethod
    def near_miss(root: str | Path) -> str:
        """Return what ``root`` lacks to be of a layout of this reader; "" if it cannot tell."""
        return ""

    @staticmethod
    def list_image_sets(root: str | Path) -> list[ImageSet]:
        """Return the image sets declared under ``root``; none if it does not exist."""
        raise NotImplementedError

    def image_path(self, index: int) -> Path:
        """Return the image's file."""
        raise NotImplementedError

    def pull_image(self, index: int) -> np.ndarray:
        """Return the image, BGR uint8 [H, W, 3].

        Raises UserError if it cannot be read, or if its size is not the annotated one.
        """
        raise NotImplementedError

    def truth(self) -> Truth:
        """Return the objects that `evaluate` scores against, nothing clipped or dropped."""
        raise NotImplementedError

    def evaluate(self, detections: Sequence[dict], directory: str | Path,
                 name: str = "SSD") -> dict:
        """Write detections into ``directory`` in the data set's format, and score them.

        detections: one dict an image with "boxes" float32 [n, 4], (x1, y1, x2, y2) in pixels
            counted from 0, "scores" float32 [n] and "labels" int64 [n], from 1; n may be 0.
        name: of the detector, for files that an evaluation server takes.

        Returns a dict with at least "metric" (str), "value" (float, None without ground truth),
        "per_class" (class -> float) and "notes" (lines for the log); maybe "interval" and
        "per_class_interval", see `data.bootstrap.interval`.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (`pull_image`, `target`), transformed if there is a transform."""
        image, target = self.pull_image(index), self.target(index)
        return self.transform(image, target) if self.transform else (image, target)

    def image_size(self, index: int) -> tuple[int, int]:
        """Return (width, height) in pixels without decoding the image."""
        width, height = self.sizes[index].tolist()
        return width, height

    def target(self, index: int) -> np.ndarray:
        """Return the objects to train on, float32 [n, 5], n may be 0.

        A row is x1, y1, x2, y2 in pixels counted from 0, inside the image, and the label.
        """
        index = range(len(self))[index]
        return self.rows[self.offsets[index] : self.offsets[index + 1]].copy()

    def keep_first(self, n: int) -> None:
        """Keep only the first ``n`` images that have an object; they are then scored alone.

        Raises UserError if there are fewer, ValueError for ``n`` below 1.
        """
        if n < 1:
            raise ValueError(f"cannot keep {n} images, wanted 1 or more")
        counts = np.diff(self.offsets)
        kept = np.flatnonzero(counts)[:n].tolist()
        if len(kept) < n:
            raise UserError(f"{self.root}: {sets_name(self.image_sets)}: {len(kept)} of "
                            f"{len(self)} images have objects, too few to keep {n}; ask for fewer "
                            "(--overfit) or take another image set (--train_sets)")
        self.rows = np.concatenate([self.target(i) for i in kept])
        self.offsets = np.append(0, np.cumsum(counts[kept]))
        self.sizes = self.sizes[kept]
        self.ids = [self.ids[i] for i in kept]
        index = {old: new for new, old in enumerate(kept)} | {None: None}
        self.skipped = [skip._replace(image=index[skip.image])
                        for skip in self.skipped if skip.image in index]
        self._keep(kept)

    def _keep(self, kept: list[int]) -> None:
        """Keep these images in what else a reader holds of each image."""

    def describe(self) -> str:
        """Return one line: the folder, its layout, the image sets and what they hold."""
        layout = self.layout or self.recognise(self.root)
        return (f"{self.root}{f' ({layout})' if layout else ''} {sets_name(self.image_sets)}: "
                f"{len(self)} images, {len(self.rows)} boxes, {len(self.classes)} classes")

    def check_losses(self, faults: list[str] | None = None,
                     labels: np.ndarray | None = None) -> None:
        """Record each image and class that lost all its boxes; for the end of the constructor.

        labels: of all annotated boxes; None: those of `truth`.
        Raises UserError, or adds it to ``faults``, if no box is left of those annotated.
        """
        dropped = [skip for skip in self.skipped if skip.box and skip.kind.level == "warning"]
        if not dropped:
            return
        if not len(self.rows):
            tell(f"{self.root}: {sets_name(self.image_sets)}: none of the annotated boxes is left, "
                 f"so there is nothing to learn or to score: {'; '.join(report_lines(dropped))}",
                 faults)
        empty = {skip.image: skip for skip in reversed(dropped) if skip.image is not None}
        for image in (i for i in sorted(empty) if self.offsets[i] == self.offsets[i + 1]):
            detail = f"{self.image_path(image)} ({empty[image].kind.text}: {empty[image].detail})"
            self.skipped.append(Skip(SkipKind.IMAGE_EMPTIED, image, None, detail))
        if labels is None:
            labels = (truth := self.truth()).labels[~truth.ignored]
        for label in np.setdiff1d(labels, self.rows[:, 4]).tolist():
            detail = f"{self.root}: {sets_name(self.image_sets)}: {self.classes[int(label) - 1]}"
            self.skipped.append(Skip(SkipKind.CLASS_EMPTIED, None, None, detail))

    def report(self) -> list[str]:
        """Return `skipped` as lines for the log."""
        return report_lines(self.skipped)

    def check_scorable(self) -> None:
        """Raise UserError if `evaluate` cannot score these image sets."""

    def fingerprint(self) -> dict:
        """Return plain JSON data that is equal for equal images, annotations and options.

        "images" is the number of images.
        """
        annotations = digest(self.classes, *self.truth()[:4], self.sizes)
        return {"images": len(self), "ids": digest(self.ids), "annotations": annotations}


@dataclass(frozen=True)
class DataSetRow:
    """All that the program knows of a data set by name.

    reader: "module:Class" of a `DetectionData`.
    folder: the default root is ``~/data/<folder>``.
    detection: fields of ``layers.DetectConfig`` that the data set's published test decides.
    epochs, weight_decay: of the published training.
    train_sets, test_sets: image sets of the published training and test.
    options: names of options beyond the common ones that the reader or its score takes.
    priors: whose prior boxes detectors of this data set have, "VOC" or "COCO".
    """

    reader: str
    folder: str
    detection: dict[str, float]
    epochs: int
    weight_decay: float
    train_sets: tuple[ImageSet, ...]
    test_sets: tuple[ImageSet, ...]
    options: frozenset[str] = frozenset()
    priors: str = "VOC"


_SPLIT = frozenset({"val_share", "split_by"})
DATASETS = {
    "VOC": DataSetRow(reader="data.voc0712:VOCDetection", folder="VOCdevkit",
                      detection={"conf_thresh": 0.03, "top_k": 300}, epochs=300, weight_decay=5e-4,
                      train_sets=(ImageSet("2007", "trainval"), ImageSet("2012", "trainval")),
                      test_sets=(ImageSet("2007", "test"),), options=_SPLIT),
    "COCO": DataSetRow(reader="data.coco:COCODetection", folder="COCO",
                       detection={"conf_thresh": 0.02, "top_k": 200}, epochs=150, weight_decay=1e-4,
                       train_sets=(ImageSet("2017", "train"),),
                       test_sets=(ImageSet("2017", "val"),),
                       options=_SPLIT | {"crowds", "eval_backend"}, priors="COCO"),
}
# Own data in other layouts are trained as VOC's.
DATASETS |= {
    name: replace(DATASETS["VOC"], reader=reader, folder=name,
                  train_sets=(ImageSet(None, "train"),), test_sets=(ImageSet(None, "val"),))
    for name, reader in (("YOLO", "data.yolo:YOLODetection"), ("CVAT", "data.cvat:CVATDetection"))
}


def build_dataset(name: str, root: str | Path, image_sets: Collection[tuple[str | None, str]],
                  classes: Sequence[str] | None = None, **options: object) -> DetectionData:
    """Open image sets, (year, name) pairs, of the data set ``name`` (a key of `DATASETS`).

    `find_layout` tells the name, `default_sets` the image sets.

    classes: names to read; None: those that the data set declares or holds. options: passed to
    the reader. Raises ValueError for an unknown ``name``, UserError for what the reader refuses.
    """
    return _reader(name)(root, image_sets, classes=classes, **options)


def split_options(name: str, values: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments of `data.split.in_validation` in ``values`` that ``name`` takes."""
    taken = _SPLIT & DATASETS[name].options
    return {key: value for key, value in values.items() if key in taken}


def find_layout(root: str | Path, preferred: str | None = None) -> tuple[str, str]:
    """Return what ``root`` holds: a key of `DATASETS`, and the layout's name for people.

    preferred: a key of `DATASETS` that is taken where its reader knows the layout, or cannot tell.

    Raises UserError: ``root`` is no folder, or holds no such layout, several, or inner data sets.
    """
    root = Path(os.path.expanduser(root))
    if preferred and (layout := _layout(preferred, root)) is not None:
        return preferred, layout
    check_folder(root)
    found, inside = layouts(root), {}
    if not found or not holds_data(root):
        inside = _data_sets(root, "[!.]*/") or _data_sets(root, "[!.]*/[!.]*/")
    # Folders of labels beside images, all of one layout, are parts of one data set.
    parts = found[:1] if found and {*inside.values()} == {found[0]} else []
    if not (parts and "beside" in parts[0][1]):
        _refuse_inside(root, inside, found)
    if len(found) > 1:
        several = " and ".join(f"{layout} (-d {name})" for name, layout in found)
        raise UserError(f"{root} holds several layouts: {several}; say by -d which one to read")
    if found:
        return found[0]
    whys = [other_format(root, ".json"), *(_reader(row).near_miss(root) for row in DATASETS),
            other_format(root, ".csv", ".tfrecord", ".parquet")]
    why = next((f" ({each})" for each in whys if each), "")
    raise UserError(f"{root} holds no data set in a layout that is understood{why}. Understood "
                    "are VOC (a devkit; XML files in Annotations/ or beside the images), COCO "
                    "(JSON), YOLO (data.yaml; images/ and labels/; .txt files beside the images) "
                    "and CVAT for images (annotations.xml): docs/own_data.md")


def _data_sets(root: Path, pattern: str) -> dict[Path, tuple[str, str]]:
    """Return what the first folders of a pattern hold, as of `layouts`."""
    folders = [each for each in sorted(root.glob(pattern))[:20] if os.access(each, os.R_OK)]
    return {each: found[0] for each in folders if (found := layouts(each))}


def _refuse_inside(root: Path, inside: Mapping[Path, tuple[str, str]],
                   found: Sequence[tuple[str, str]]) -> None:
    """Raise UserError if there are data sets ``inside`` folders of ``root``.

    found: what readers find in ``root`` itself.
    """
    if len(inside) == 1:
        [(folder, (_, layout))] = inside.items()
        raise UserError(f"{root} holds a data set in a folder, {folder.name} ({layout}); give "
                        f"{folder} as --root")
    if inside:
        one = len(found) == 1 and {name for name, _ in inside.values()} == {found[0][0]}
        whole = f", or -d {found[0][0]} to read all as one" if one else ""
        names = [f"{folder.name} ({layout})" for folder, (_, layout) in inside.items()]
        several = ", ".join(names[:8] + ["..."] * (len(names) > 8))
        whole = f"{min(inside, key=lambda folder: 'test' in folder.name.lower())}{whole}"
        raise UserError(f"{root} holds several data sets: {several}; if they are sets of one, put "
                        f"them into one folder, else give one as --root, such as {whole}")


def _layout(name: str, root: str | Path) -> str | None:
    """Return what the reader of ``name`` recognises; None, too, if ``root`` is no folder."""
    return _reader(name).recognise(root) if _is_folder(root) else None


def _is_folder(root: str | Path) -> bool:
    """Return False, too, for a name that no file system takes."""
    return os.path.isdir(os.path.expanduser(root))


def layouts(root: Path) -> list[tuple[str, str]]:
    """Return all that `find_layout` may find under ``root``, one a reader."""
    readers = {row.reader: name for name, row in reversed(DATASETS.items())}
    return [(name, layout) for name in reversed(readers.values())
            if (layout := _layout(name, root))]


def check_layout(name: str, root: str | Path) -> None:
    """Raise UserError if only another data set's layout is under ``root``."""
    root = Path(os.path.expanduser(root))
    if _layout(name, root) is None and (others := layouts(root)):
        raise UserError(f"{root} holds {others[0][1]}, which -d {name} does not read; give -d "
                        f"{others[0][0]}, or leave -d out")


def default_root(name: str) -> Path:
    """Return the folder where the data set ``name`` is looked for without --root."""
    return Path.home() / "data" / DATASETS[name].folder


def default_sets(name: str, root: str | Path) -> tuple[tuple[ImageSet, ...], tuple[ImageSet, ...]]:
    """Return the image sets to train on and to test on without --train_sets and --test_sets.

    These are the published ones if they are there, or if ``root`` has their years or does not tell.
    Else, and in one such year with both, they are trainval and test; else train, trainval or
    default, and the first of val, valid, validation, dev and test; all of a kind, as train1 and
    train2. Without one of both, images are divided as `data.split.in_validation` does. Raises
    UserError: there are several of both kinds, as train1, train2, val1 and val2.
    """
    root = Path(os.path.expanduser(root))
    row, existing = DATASETS[name], list_sets(name, root)
    published = {*row.train_sets, *row.test_sets}
    years = {year for year, _ in existing}
    devkit = None not in years and years & {year for year, _ in published}
    told = existing or _layout(name, root)
    if published <= {*existing} or devkit and len(years) > 1 or not told:
        return row.train_sets, row.test_sets
    tests = ("val", "valid", "validation", "dev", "test")
    for words in (("trainval", "test"), *product(("train", "trainval", DEFAULT_SET), tests)):
        train, test = (tuple(s for s in existing if set_word(s.name) == word) for word in words)
        if len(train) > 1 < len(test) and None in years:
            raise UserError(f"{root} has several image sets to train and to test on, maybe folds: "
                            f"{sets_name(train + test)}; give --train_sets and --test_sets")
        if train and test:
            return train, test
    parts = (ImageSet(None, SPLIT_TRAIN),), (ImageSet(None, SPLIT_VAL),)
    return (row.train_sets, row.test_sets) if devkit else parts


def list_sets(name: str, root: str | Path) -> list[ImageSet]:
    """Return the image sets under ``root``, read as the data set ``name``."""
    return _reader(name).list_image_sets(root) if _is_folder(root) else []


def _reader(name: str) -> type:
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}, choose from {', '.join(DATASETS)}")
    module, _, reader = DATASETS[name].reader.partition(":")
    return getattr(importlib.import_module(module), reader)
