"""COCO detection data sets: samples and evaluation. `data.coco_layout` says where files lie."""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data import DetectionData, coco_layout
from data.annotation import outside_root, refuse_missing, tell, unannotated
from data.bootstrap import DRAWS
from data.classes import check_classes
from data.coco_eval import evaluate_coco, load_backend, notes
from data.coco_json import COCOAnnotations, extents, join, read_annotations
from data.coco_layout import Part, file_stem, is_test_split, normalise
from data.coco_results import COCOResults, write_archive, write_results
from data.curves import CURVES_FILE
from data.detections import as_columns
from data.image import IMAGE_SUFFIXES, image_size, read_image
from data.image_files import FileIndex
from data.image_sets import ImageSet
from data.skips import Skip, SkipKind
from data.split import SPLIT_SETS, VAL_SHARE, choose, list_files
from data.truth import Truth, digest
from utils.errors import UserError
from utils.logger import LOGGER

QUICK = 20_000_000
"""Detections times draws whose intervals take about a second."""


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Convert x, y, w, h [m, 4] to x1, y1, x2, y2 [m, 4] inside images of (width, height) [m, 2].

    As published, x2 = x1 + w - 1 with the x1 already clipped: a box that starts left of the image
    or above it is moved in, not cut. Boxes must overlap their image: one wholly to the left or
    above would be moved in, too, and one to the right or below gets x2 < x1 or y2 < y1.
    """
    start = np.maximum(boxes[:, :2], 0)
    return np.hstack([start, np.minimum(sizes - 1, start + np.maximum(boxes[:, 2:] - 1, 0))])


class COCODetection(DetectionData):
    """Samples of COCO image sets.

    ``ds[i]`` is (image, target): BGR uint8 [H, W, 3] and float32 [n, 5] of x1, y1, x2, y2 in
    pixels and the label, from 1; n may be 0, and is in a test split. Boxes without area or wholly
    outside their image are dropped, others are clipped (`clip_boxes`); ``skipped`` records that.

    Label k is ``classes[k - 1]`` and COCO's category ``category_ids[k]`` (80 labels, ids up to
    90). ``ids`` are ascending within an image set; ``file_ids`` are those of the annotation file.

    Args:
        root: a folder laid out as `data.coco_layout` describes.
        image_sets: (year, name) pairs such as ("2017", "val"); the year may be None.
        classes: names of the categories to read, in the order of their labels; None: all, by id.
        crowds: whether boxes around crowds are targets like other boxes, as published. A score
            always treats them as COCO does.
        eval_backend: what computes the score, one of `data.coco_eval.BACKENDS`.
        faults: for ``tools.check``. Given a list, a missing image raises when it is read.
        val_share, split_by: see `data.split.in_validation`.

    Raises:
        UserError: no annotation file of that name, a malformed one (see `read_annotations`),
            missing images, sets with different categories, an image in two sets, an unknown class.
    """

    def __init__(self, root: str | Path, image_sets: Sequence[tuple[str | None, str]],
                 transform: Callable | None = None, classes: Sequence[str] | None = None,
                 crowds: bool = True, eval_backend: str = "pycocotools",
                 faults: list[str] | None = None, val_share: float = VAL_SHARE,
                 split_by: str | None = None) -> None:
        if not image_sets:
            raise ValueError("image_sets is empty, expected e.g. [('2017', 'val')]")
        super().__init__(root, [normalise(*each) for each in image_sets], transform)
        classes = None if classes is None else check_classes(classes, "classes")
        self.crowds = crowds
        self.eval_backend = eval_backend
        self.val_share, self.split_by = val_share, split_by
        self._faults = faults
        self._turned: set[Path] = set()
        parts = [part for each in self.image_sets for part in self._open(each)]
        self._part_sets = [part.image_set for part in parts]
        files = self._choose_classes([part.file for part in parts], classes)
        self._files, known = [file.path for file in files], files[0].categories()
        self.classes = tuple(known if classes is None else classes)
        self.category_ids = {k: known[name] for k, name in enumerate(self.classes, 1)}
        self._digest = digest(self.classes, *(file.digest() for file in files))
        # What follows goes to every loader process. Arrays are shared there, or copied whole where
        # processes are not forked; of a list each object would be copied when it is first used.
        self._folders = [part.folder for part in parts]
        self._names = np.concatenate([part.names for part in parts])
        self.file_ids = np.concatenate([file.image_ids for file in files])
        self._set_of = np.repeat(np.arange(len(files)), [len(file.image_ids) for file in files])
        self.ids = self._unique_ids()
        used = coco_layout.set_folders(self.root)
        self.skipped += unannotated(used, FileIndex(IMAGE_SUFFIXES))
        self.skipped += outside_root(self.root, [*map(self.image_path, range(len(self)))])
        self.sizes = np.concatenate([file.sizes for file in files])
        starts = np.cumsum([0, *(len(file.image_ids) for file in files)])
        targets, counts = zip(*map(self._targets, files, starts.tolist()), strict=True)
        self.rows = np.concatenate(targets)
        self.offsets = np.append(0, np.cumsum(np.concatenate(counts)))
        labels = [self._labels(file)[~file.crowds] for file in files]
        self.check_losses(faults, np.concatenate(labels))

    recognise = staticmethod(coco_layout.recognise)
    list_image_sets = staticmethod(coco_layout.list_image_sets)

    def image_path(self, index: int) -> Path:
        return self._folders[self._set_of[index]] / str(self._names[index])

    def annotation_path(self, index: int) -> Path:
        """Return the annotation file of the image."""
        return self._files[self._set_of[index]]

    def pull_image(self, index: int) -> np.ndarray:
        """Return the image, BGR uint8 [H, W, 3], of the size that its boxes are for.

        An image that an EXIF tag turns, but that was annotated as it is stored, is read as stored;
        the log says so once. Raises UserError if it cannot be read or has another size.
        """
        path, size = self.image_path(index), self.image_size(index)
        image = read_image(path)
        if (found := image.shape[1::-1]) == size:
            return image
        file = self._files[self._set_of[index]]
        stored = read_image(path, orient=False)
        if stored.shape[1::-1] != size:
            raise UserError(f"{path}: the image is {found[0]} x {found[1]}, but {file} says"
                            f" {size[0]} x {size[1]}; restore the annotated image or correct the"
                            " file")
        if path not in self._turned:
            self._turned.add(path)
            LOGGER.warning("%s: an EXIF orientation tag turns the image to %d x %d, but %s says %d"
                           " x %d; it is read as stored", path, *found, file, *size)
        return stored

    def _keep(self, kept: list[int]) -> None:
        self._names, self.file_ids = self._names[kept], self.file_ids[kept]
        used, self._set_of = np.unique(self._set_of[kept], return_inverse=True)
        self._part_sets, self._files, self._folders = (
            [items[s] for s in used] for items in (self._part_sets, self._files, self._folders))
        self.image_sets = list(dict.fromkeys(self._part_sets))

    def check_scorable(self) -> None:
        if len(self.image_sets) > 1:
            sets = ", ".join(map(str, self.image_sets))
            raise UserError(f"{self.root}: COCO scores one image set at a time, not {sets}")
        if not is_test_split(self._files[0]):
            load_backend(self.eval_backend)

    def truth(self) -> Truth:
        """Return the objects to score against; the annotation files are read again."""
        file = self._read_again()
        return Truth(file.owners(), extents(file.boxes), self._labels(file), file.crowds, "coco")

    def _read_again(self) -> COCOAnnotations:
        """Return the images of all files with their boxes, under their `ids`."""
        files = []
        for k, path in enumerate(self._files):
            file = read_annotations(path, boxes=not is_test_split(path)).of_classes(self.classes)
            files.append(file.of_images(self.file_ids[self._set_of == k]))
        return replace(join(files), image_ids=np.array(self.ids))

    def fingerprint(self) -> dict:
        """Return plain data that is equal for equal ids, annotations and ``crowds``.

        After `keep_first`, changed annotations of the other images still count.
        """
        return {"images": len(self), "ids": digest(self.ids), "annotations": self._digest,
                "crowds": self.crowds}

    def evaluate(self, detections: Sequence[dict], directory: str | Path,
                 name: str = "SSD") -> dict:
        """Write the results JSON into ``directory`` and score it.

        The file is detections_<split>_results.json. As published, a ``bbox`` is x1, y1,
        x2 - x1 + 1, y2 - y1 + 1. That of a test split is detections_<split>_<name>_results.json,
        and is also packed into a .zip of the same stem for the evaluation server.

        name: of the detector; letters, digits and . + - _.

        Returns:
            {"metric", "value" (AP at [.5:.95]), "per_class" (the same a class), "iou",
            "max_dets", "image_set", "results" and "curves" (files in ``directory``, see
            `data.curves`), "stats" (the twelve numbers of `data.coco_eval.STATS`), "interval",
            "per_class_interval" and "at_50" (see `data.coco_eval.evaluate_coco`), "per_size" and
            "per_class_per_size" (AP of small, medium and large objects), "backend" (name and
            version), "notes" (lines for the log)}; -1 means no ground truth. For a test split
            "value" is None, "per_class" is empty, "archive" names the .zip, and numbers are left
            out.

        Raises ValueError for malformed detections (see `data.detections.as_columns`) or ``name``,
        UserError for a file that cannot be written.
        """
        if not re.fullmatch(r"[\w.+-]+", name, re.ASCII):
            raise ValueError(f"{name!r} cannot be in the name of a submitted file")
        self.check_scorable()
        images, scores, labels, corners = as_columns(detections, self.ids, len(self.classes))
        boxes = np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2] + 1]).round(4)
        categories = np.array(list(self.category_ids.values()))[labels - 1]
        results = COCOResults(np.array(self.ids)[images], categories, boxes, scores)
        [image_set], file = self.image_sets, self._files[0]
        test = is_test_split(file)
        split = f"{file_stem(image_set)}_{name}" if test else file_stem(image_set)
        path = Path(directory) / f"detections_{split}_results.json"
        write_results(path, results)
        report = {"metric": "COCO AP", "value": None, "per_class": {}, "iou": "0.50:0.95",
                  "max_dets": 100, "image_set": str(image_set), "results": path.name}
        if not test:
            return report | self._score(results, Path(directory))
        archive = write_archive(path)
        note = (f"{archive}: no score here, {file.name} has no ground truth; the evaluation server"
                " takes this file")
        return report | {"archive": archive.name, "notes": [note]}

    def _score(self, results: COCOResults, directory: Path) -> dict:
        few = len(results.scores) * DRAWS <= QUICK
        scored = evaluate_coco(results, self._read_again(), self.eval_backend,
                               directory / CURVES_FILE, intervals=few or not self.quick_score)
        return {"value": scored["stats"][0], "per_class": scored["per_category"],
                "interval": scored["interval"], "at_50": scored["at_50"],
                "per_class_interval": scored["per_category_interval"],
                "per_class_per_size": scored["per_category_per_size"],
                **{key: scored[key] for key in ("per_size", "stats", "backend")},
                "curves": CURVES_FILE, "notes": notes(scored)}

    def _open(self, image_set: ImageSet) -> list[Part]:
        """Read an image set's annotation file, or those parts of all that are listed or divided."""
        files, lists = coco_layout.annotation_files(self.root), list_files(self.root)
        name = str(image_set)
        if not files or name not in lists and (name not in SPLIT_SETS or name in files):
            return [self._read(coco_layout.find_annotations(self.root, image_set), image_set)]
        parts = [self._read(path, normalise(None, stem)) for stem, path in sorted(files.items())
                 if not is_test_split(path)]
        root, starts = os.path.abspath(self.root), np.cumsum([0, *(len(p.names) for p in parts)])
        paths = [os.path.relpath(p.folder / each, root) for p in parts for each in p.names.tolist()]
        declared = {str(part.image_set): range(*starts[k : k + 2]) for k, part in enumerate(parts)}
        chosen = choose(self.root, image_set, paths, declared, self.val_share, self.split_by)
        return [part._replace(image_set=image_set, names=part.names[which],
                              file=part.file.of_images(part.file.image_ids[which]))
                for part, span in zip(parts, declared.values(), strict=True)
                if len(which := np.intersect1d(chosen, span) - span[0])]

    def _read(self, path: Path, image_set: ImageSet) -> Part:
        file = read_annotations(path, boxes=not is_test_split(path))
        part = coco_layout.find_images(self.root, file, image_set)
        if self._faults is None:
            refuse_missing(self.root, [f"{part.folder / name} ({path})" for name in part.missing])
        if part.folder != part.usual:
            detail = f"{path.name}: {part.folder}, they are not in {part.usual}"
            self.skipped.append(Skip(SkipKind.OTHER_FOLDER, None, None, detail))
        first: dict[str, int] = {}
        for id, name in zip(file.image_ids.tolist(), part.names.tolist(), strict=True):
            if (other := first.setdefault(name, id)) != id:
                tell(f"{path}: image ids {other} and {id} have the same file {name}; leave one "
                     "out, and give its boxes to the other", self._faults)
        for n in np.flatnonzero(file.sizes[:, 0] == 0).tolist():
            file.sizes[n] = image_size(part.folder / str(part.names[n]))
        return part

    def _choose_classes(self, files: list[COCOAnnotations],
                        classes: Sequence[str] | None) -> list[COCOAnnotations]:
        """Return the files with these classes; None: all but roots that have no box in any file."""
        used = {file.classes[n - 1] for file in files for n in np.unique(file.labels).tolist()}
        if classes is None:
            _check_categories(files)
            classes = [n for n in files[0].classes if n in used or n not in files[0].roots]
        parts = [file.of_classes(classes) for file in files]
        _check_categories(parts)
        if used and used.isdisjoint(classes):
            tell(f"{self.root}: no box of {', '.join(classes)} in {files[0].path.name}; choose "
                 f"from {', '.join(sorted(used))} (--classes)", self._faults)
        for file, part in zip(files, parts, strict=True):
            left = set(file.classes) - set(classes)
            roots = [f"{file.path.name}: {name}" for name in left & file.roots - used]
            for detail in (*file.surplus, *roots):
                self.skipped.append(Skip(SkipKind.CATEGORY_SURPLUS, None, None, detail))
            if left - file.roots or left & used:
                detail = (f"{file.path.name}: {len(classes)} of {len(file.classes)} classes,"
                          f" {len(part.boxes)} of {len(file.boxes)} boxes")
                self.skipped.append(Skip(SkipKind.CLASSES_LEFT_OUT, None, None, detail))
        return parts

    def _unique_ids(self) -> list[int]:
        """Return the images' ids in their files; 0, 1, ... if the files use the same ids.

        Raises UserError for an id and a file name that occur twice.
        """
        ids = self.file_ids.tolist()
        images = [*zip(ids, map(os.path.basename, self._names.tolist()), strict=True)]
        if len(set(images)) < len(ids):
            (twice, _), _ = Counter(images).most_common(1)[0]
            files = " and ".join(map(str, self._files))
            raise UserError(f"{files}: image id {twice} is in more than one of them")
        several = len(self._files) > len(self.image_sets) or len(set(ids)) < len(ids)
        return list(range(len(ids))) if several else ids

    def _targets(self, file: COCOAnnotations, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the targets, float32 [m, 5], and how many of them each image has, int64 [N].

        start: index of the file's first image in the data set.
        """
        owners = file.owners()
        sizes, low = file.sizes[owners], file.boxes[:, :2]
        high = low + file.boxes[:, 2:]
        corners = clip_boxes(file.boxes, sizes)
        # 0.01: what COCO's two decimals leave of a box that touches the border.
        beyond = np.maximum(-low, high - sizes) > 0.01
        # Clipping would move some of these in.
        outside = ((high <= 0) | (low >= sizes)).any(1)
        # A box of one pixel has x2 = x1, and neither an IoU nor a logarithm of its width.
        flat = ~outside & (corners[:, 2:] <= corners[:, :2]).any(1)
        kept = ~outside & ~flat
        shares = flat & (0 < np.abs(file.boxes).max(initial=0) <= 1)
        crowd = kept & file.crowds & (not self.crowds)
        kept &= ~crowd
        for kind, rows in ((SkipKind.BOX_OUTSIDE, outside),
                           (SkipKind.BOX_WITHOUT_AREA, flat & ~shares),
                           (SkipKind.BOX_IN_SHARES, shares), (SkipKind.CROWD, crowd),
                           (SkipKind.BOX_CLIPPED, kept & beyond.any(1))):
            for n in np.flatnonzero(rows):
                x, y, w, h = bbox = file.boxes[n].tolist()
                detail = (f"{file.path.name}: annotation {file.annotation_ids[n]} of image"
                          f" {file.image_ids[owners[n]]}, bbox {bbox}")
                image = start + int(owners[n])
                self.skipped.append(Skip(kind, image, (x, y, x + w, y + h), detail))
        size = file.boxes[:, 2:]
        if (low < size).all() and (size <= sizes).all() and (high > 1.1 * sizes).any():
            detail = f"{file.path}: bbox {file.boxes[0].tolist()} and all others"
            self.skipped.append(Skip(SkipKind.BOX_FORMAT, None, None, detail))
        target = np.hstack([corners, self._labels(file)[:, None]])[kept].astype(np.float32)
        return target, np.bincount(owners[kept], minlength=len(file.image_ids))

    def _labels(self, file: COCOAnnotations) -> np.ndarray:
        label_of = [self.classes.index(name) + 1 for name in file.classes]
        return np.array(label_of, np.int64)[file.labels - 1]


def _check_categories(files: Sequence[COCOAnnotations]) -> None:
    for file in files:
        if file.categories() != files[0].categories():
            raise UserError(f"{file.path}: its categories differ from {files[0].path.name}'s")
