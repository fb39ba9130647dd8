"""PASCAL VOC and every folder in its layout: samples and evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data import voc_eval
from data.curves import CURVES_FILE
from data.image import IMAGE_SUFFIXES, read_image, report_lines
from data.image_sets import ImageSet, first_with_objects, sets_name
from data.voc_xml import (
    Annotation,
    VOCAnnotations,
    finder,
    list_image_sets,
    load_annotations,
    refuse_missing,
    without_objects,
)
from utils.errors import UserError


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
                    annotation, size = without_objects(annotation.path), (1, 1)
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
    find = finder(IMAGE_SUFFIXES)
    wanted = [(f / "JPEGImages", i) for f, i in zip(loaded.folders, loaded.ids, strict=True)]
    found = [find(*pair) for pair in wanted]
    if faults is None:
        refuse_missing(
            f"picture ({'/'.join(IMAGE_SUFFIXES)})",
            [folder / i for (folder, i), path in zip(wanted, found, strict=True) if path is None],
        )
    usual = [folder / f"{i}{IMAGE_SUFFIXES[0]}" for folder, i in wanted]
    return [path or other for path, other in zip(found, usual, strict=True)]
