"""Base class of the readers whose annotations are `Annotation` records: targets and VOC's score."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data import DetectionData
from data.annotation import Annotation, Loaded, check_ids, join, outside_root, tell
from data.curves import CURVES_FILE
from data.image import read_image
from data.image_sets import ImageSet
from data.skips import Skip, SkipKind
from data.split import VAL_SHARE
from data.truth import Truth
from data.voc_comp4 import comp4_set, read_comp4, write_comp4
from data.voc_eval import METRICS, evaluate_voc, voc_truth, write_voc_curves
from utils.errors import UserError


class AnnotatedImages(DetectionData):
    """Samples of annotated images. A reader adds ``load`` and ``list_image_sets``.

    ``ds[i]`` is (image, target): BGR uint8 [H, W, 3] and float32 [n, 5] of x1, y1, x2, y2 in
    pixels counted from 0 and the label, from 1; n may be 0. Targets hold the objects of known
    classes, difficult ones too, clipped to 0..W-1 and 0..H-1. Boxes without area (x2 <= x1 or
    y2 <= y1), before or after clipping, are dropped. ``skipped`` records everything that was
    dropped or changed.

    Annotations are read by the constructor. An image is read by it only if its annotation has no
    size or a box that leaves the image.

    Args:
        image_sets: (year, name) pairs, year None in a folder without years.
        classes: names without background; label k is ``classes[k - 1]``. None: those that the
            layout declares, else all names in the annotations.
        faults: for ``tools.check``. Given a list, errors of single annotations and images, and of
            the classes, are appended to it instead of raised. Such an image has no objects; a
            missing image raises when it is read.
        val_share, split_by: see `data.split.in_validation`.
    """

    offset = (0, 0, 1, 1)
    """What turns boxes into the values of annotation files, for messages."""
    scores_dropped = False
    """Whether the score counts objects that training drops."""

    def __init__(self, root: str | Path, image_sets: Sequence[tuple[str | None, str]],
                 transform: Callable | None = None, classes: Sequence[str] | None = None,
                 faults: list[str] | None = None, val_share: float = VAL_SHARE,
                 split_by: str | None = None) -> None:
        self.val_share, self.split_by = val_share, split_by
        sets = [ImageSet(year or None, name) for year, name in image_sets]
        super().__init__(root, sets, transform)
        loaded = self.load(classes, faults)
        self.ids, self._paths, self.annotations, self.classes, self.skipped = loaded
        check_ids(self.ids, self._paths, faults)
        self.skipped += outside_root(self.root, self._paths)
        images, boxes, *_ = join(self.annotations, self.classes)
        self.sizes = np.array([each.size or (0, 0) for each in self.annotations], np.int64)
        unsure = (self.sizes == 0).any(1)
        unsure[images[(boxes[:, 2:] > self.sizes[images] - 1).any(1)]] = True
        for index in np.flatnonzero(unsure).tolist():
            try:
                self.sizes[index] = self._find_size(index)
            except UserError as error:
                tell(str(error), faults)
                empty = Annotation.empty(self.annotations[index].path)
                self.annotations[index] = replace(empty, unread=True)
                self.sizes[index] = 1
        self.unread = {i for i, each in enumerate(self.annotations) if each.unread}
        kept = self._make_targets()
        self.check_losses(faults)
        if not self.scores_dropped:
            parts = np.split(kept, np.cumsum([len(each.names) for each in self.annotations])[:-1])
            self.annotations = [*map(Annotation.part, self.annotations, parts)]

    def load(self, classes: Sequence[str] | None, faults: list[str] | None) -> Loaded:
        """Read the annotations of ``image_sets`` under ``root``; arguments as of the class.

        Raises:
            UserError: missing or malformed files, or no object of a known class.
        """
        raise NotImplementedError

    def _find_size(self, index: int) -> tuple[int, int]:
        """Return (width, height) where the annotation has none, or a box that leaves it."""
        annotation, path = self.annotations[index], self._paths[index]
        found = _checked_size(read_image(path), path, annotation)
        if annotation.size and not _near(annotation.size, found):
            detail = f"{annotation}: {path.name} is {found[0]} x {found[1]}"
            self.skipped.append(Skip(SkipKind.SIZE_SWAPPED, index, None, detail))
        return found

    def _make_targets(self) -> np.ndarray:
        """Set ``rows`` and ``offsets``. Return which of all objects are in them, bool [M]."""
        images, boxes, labels, _ = join(self.annotations, self.classes)
        clipped = boxes.clip(0, np.tile(self.sizes[images] - 1, 2))
        known = labels > 0
        area = (boxes[:, 2:] > boxes[:, :2]).all(1)
        inside = (clipped[:, 2:] > clipped[:, :2]).all(1)
        # 0.01: what the decimals of shares leave of a box that touches the border.
        changed = (np.abs(clipped - boxes) > 0.01).any(1)
        for kind, which in ((SkipKind.BOX_WITHOUT_AREA, known & ~area),
                            (SkipKind.BOX_OUTSIDE, known & area & ~inside),
                            (SkipKind.BOX_CLIPPED, known & area & inside & changed)):
            for k in np.flatnonzero(which):
                image, written = int(images[k]), boxes[k] + self.offset
                number, size = k - np.searchsorted(images, image), self.sizes[image].tolist()
                annotation = self.annotations[image]
                detail = (f'{annotation}: object {number + 1} ("{annotation.names[number]}") '
                          f"({', '.join(f'{value:g}' for value in written)}) in {size[0]} x "
                          f"{size[1]}{self.hint(written, size)}")
                self.skipped.append(Skip(kind, image, tuple(boxes[k].tolist()), detail))
        kept = known & area & inside
        self.rows = np.hstack([clipped, labels[:, None]])[kept].astype(np.float32)
        self.offsets = np.append(0, np.cumsum(np.bincount(images[kept], minlength=len(self))))
        return kept

    def hint(self, box: np.ndarray, size: Sequence[int]) -> str:
        """Return what may be wrong with a box that is dropped or clipped, as in its file."""
        if (box[2:] < box[:2]).any():
            return ": swapped corners?"
        fractions = ((box >= 0) & (box <= 1)).all() and (box % 1).any()
        return ": fractions of the image where pixels belong?" if fractions else ""

    def image_path(self, index: int) -> Path:
        return self._paths[index]

    def pull_image(self, index: int) -> np.ndarray:
        """Return the image, BGR uint8 [H, W, 3].

        <size> may differ by a pixel of rounding, or have width and height swapped if all boxes lie
        inside the image. Raises UserError if the image cannot be read, <size> is of another image,
        or the boxes are for the image before its EXIF orientation.
        """
        path = self._paths[index]
        image = read_image(path)
        _checked_size(image, path, self.annotations[index])
        return image

    def _keep(self, kept: list[int]) -> None:
        self.annotations = [self.annotations[i] for i in kept]
        self._paths = [self._paths[i] for i in kept]

    def check_scorable(self) -> None:
        if len(set(self.ids)) < len(self):
            raise UserError(f"{self.root}: images of different years have the same id, and comp4 "
                            "files cannot tell them apart; evaluate the image sets one by one")

    def truth(self) -> Truth:
        return voc_truth(self.annotations, self.classes)

    def evaluate(self, detections: Sequence[dict], directory: str | Path,
                 name: str = "SSD") -> dict:
        """Write comp4 files into ``directory`` and score them with both VOC metrics.

        Arguments as in `data.DetectionData.evaluate`; comp4 files do not hold ``name``.

        Returns:
            {"metric", "value" (mean over classes), "interval", "per_class", "per_class_interval",
            "per_size" and "per_class_per_size" (of the metric), "iou", "image_set", "voc07_11point"
            and "area" (see `data.voc_eval.evaluate_voc`), "ground_truths" and "detections" (counts
            a class), "curves" (a file in ``directory``, see `data.curves`), "notes" (lines for the
            log)}. The metric is the 11-point one if all years are before 2010, else the area one.
            All numbers come from the written files.
        """
        if len(detections) != len(self):
            raise ValueError(f"{len(detections)} detections for {len(self)} images")
        self.check_scorable()
        image_set = comp4_set(self.image_sets)
        write_comp4(directory, image_set, self.classes, self.ids, detections)
        read, _ = read_comp4(directory, image_set, self.classes, self.ids)
        result = evaluate_voc(read, self.truth(), self.classes, len(self))
        years = [each.year for each in self.image_sets]
        old = all(year and year.isdigit() and int(year) < 2010 for year in years)
        main = "voc07_11point" if old else "area"
        write_voc_curves(Path(directory) / CURVES_FILE, result)
        of_main = {key: value for key, value in result[main].items() if key != "mean"}
        return {"metric": METRICS[main], "value": result[main]["mean"], **of_main,
                "image_set": image_set, **result, "curves": CURVES_FILE}


def _checked_size(image: np.ndarray, path: Path, annotation: Annotation) -> tuple[int, int]:
    """Return (width, height) of an image. Raises UserError if its annotation is for another one."""
    size, stated, corners = image.shape[1::-1], annotation.size, annotation.boxes[:, 2:]
    outside = (corners > size).any(1)  # size and not size - 1: a pixel is rounding
    if _near(stated, size) if stated else not outside.any():
        return size
    raw = read_image(path, orient=False).shape[1::-1]
    if _near(stated, raw) if stated else (outside & (corners <= raw).all(1)).any():
        raise UserError(f"{path}: an EXIF orientation tag turns the image to {size[0]} x "
                        f"{size[1]}, but the boxes in {annotation} are for {raw[0]} x {raw[1]}; "
                        "remove the tag (exiftool -Orientation= FILE) or annotate the turned image")
    if stated and (outside.any() or not _near(stated[::-1], size)):
        raise UserError(f"{annotation}: <size> says {stated[0]} x {stated[1]}, but the image "
                        f"{path.name} is {size[0]} x {size[1]}; restore the annotated image, or "
                        "remove <size> if the boxes are right for this one")
    return size


def _near(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return abs(a[0] - b[0]) <= 1 and abs(a[1] - b[1]) <= 1
