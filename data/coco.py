"""COCO detection data sets: an annotation JSON and the folder of pictures it names.

    root/annotations/instances_<set><year>.json    train2014 val2014 minival2014 valminusminival2014
                                                   train2017 val2017
    root/annotations/image_info_<set><year>.json   test2015 test-dev2015 test2017 test-dev2017
    root/images/<split>/COCO_<split>_<id>.jpg      pictures before 2017, <id> of 12 digits
    root/<split>/<id>.jpg                          pictures since

Own data are read alike, with or without a year: any set, categories and ids. A set counts as a test
split, without ground truth, if it has an image_info file alone. Format:
https://cocodataset.org/#format-data. The files may lie in root/original_annotations/, too. The
file's own `file_name` decides where it exists; it may have folders in it and start from
root/<split>/, root/images/<split>/, root/images/ or root/.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data.coco_eval import COCO_FIELDS, COCOResults, evaluate_coco, load_backend, notes
from data.coco_json import Annotations, read_annotations
from data.curves import CURVES_FILE
from data.detections import as_columns
from data.image import read_image, report_lines
from data.image_sets import ImageSet, first_with_objects, sets_name
from utils.errors import UserError
from utils.files import atomic_write

# Sets that are cut out of another split and have no picture folder of their own.
PICTURES_OF = {"minival": "val", "valminusminival": "val", "test-dev": "test"}
ANNOTATION_FOLDERS = ("annotations", "original_annotations")
ANNOTATION_KINDS = ("instances_", "image_info_")


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """x, y, w, h [m,4] -> x1, y1, x2, y2 [m,4] inside pictures of width, height [m,2], in pixels.

    As published: x2 = x1 + w - 1 from the x1 already clipped, so a box that starts left of the
    picture or above it is moved in, not cut. It is for boxes that overlap their picture: one wholly
    to the left or above would be moved in, too, one to the right or below gets x2 < x1 or y2 < y1.
    """
    start = np.maximum(boxes[:, :2], 0)
    return np.hstack([start, np.minimum(sizes - 1, start + np.maximum(boxes[:, 2:] - 1, 0))])


def _is_test_split(path: Path) -> bool:
    return path.name.startswith("image_info")


def _image_set(year: str | None, name: str) -> ImageSet:
    """("2017", "val") of that pair and of (None, "val2017")."""
    if not year and (match := re.fullmatch(r"(.+?)(20\d\d)", name)):
        name, year = match.groups()
    return ImageSet(year or None, name)


def list_image_sets(root: str | Path) -> list[ImageSet]:
    """The image sets under a root that have an annotation file."""
    root = Path(os.path.expanduser(root))
    found = [
        _image_set(None, path.stem.removeprefix(kind))
        for folder in ANNOTATION_FOLDERS
        for kind in ANNOTATION_KINDS
        for path in (root / folder).glob(f"{kind}?*.json")
    ]
    return sorted(set(found), key=lambda each: (each.year or "", each.name))


class COCODetection:
    """Pictures and boxes of COCO image sets, e.g. `COCODetection(root, [("2017", "val")])`.

    `ds[i]` is (BGR uint8 [H,W,3], float32 [n,5] of x1, y1, x2, y2 in pixels and the label, from 1),
    both after `transform(image, target)` if there is one. Labels follow the categories by id, or
    the order of `classes`, names of categories that are to be read alone: label k is
    `classes[k - 1]` and COCO's category `category_ids[k]` (80 labels to ids up to 90);
    `category_labels` is the way back. `ids` ascend within a set. Pictures without boxes are kept
    with [0,5], and those of a test split have nothing else. `crowds`: whether boxes around crowds
    are ordinary boxes, as published, or left out of the targets (a score always counts them as
    COCO does). Boxes without area or wholly outside their picture are dropped; `skipped` lists them
    by reason. The year of a set in own data may be None. `faults`: given a list, a missing image
    is told when it is read, for `tools.check`. `eval_backend` computes the score, one of
    `data.coco_eval.BACKENDS`.

    UserError: no annotation file of that name, a malformed one (see `read_annotations`), missing
    pictures, sets of different categories, a picture in two sets, no category of a name.
    """

    def __init__(
        self,
        root: str | Path,
        image_sets: Sequence[tuple[str | None, str]],
        transform: Callable | None = None,
        classes: Sequence[str] | None = None,
        crowds: bool = True,
        faults: list[str] | None = None,
        eval_backend: str = "pycocotools",
    ):
        if not image_sets:
            raise ValueError("image_sets is empty, wanted e.g. [('2017', 'val')]")
        self.root = Path(os.path.expanduser(root))
        self.image_sets = [_image_set(*each) for each in image_sets]
        self.transform = transform
        self._turned: set[Path] = set()
        self.crowds = crowds
        self.eval_backend = eval_backend
        self._faults = faults
        self.skipped: dict[str, list[str]] = {}
        files = [self._read(*each, classes) for each in self.image_sets]
        self._files = [file.path for file in files]
        known = dict(zip(files[0].classes, files[0].category_ids.tolist(), strict=True))
        for file in files[1:]:
            if dict(zip(file.classes, file.category_ids.tolist(), strict=True)) != known:
                raise UserError(f"{file.path}: its categories differ from {files[0].path.name}'s")
        self.classes = tuple(known if classes is None else classes)
        self.category_ids = {k: known[name] for k, name in enumerate(self.classes, 1)}
        self.category_labels = {id: label for label, id in self.category_ids.items()}
        # What follows goes to every loader process. Arrays are shared there, or copied whole where
        # processes are not forked; of a list each object would be copied when it is first used.
        self._folders, names = zip(*map(self._find_pictures, files, self.image_sets), strict=True)
        self._names = np.concatenate(names)
        self._set_of = np.repeat(np.arange(len(files)), [len(file.image_ids) for file in files])
        ids = np.concatenate([file.image_ids for file in files])
        once, counts = np.unique(ids, return_counts=True)
        if len(once) < len(ids):
            raise UserError(
                f"{' and '.join(map(str, self._files))}: image id {once[counts > 1][0]} is in more"
                " than one of them"
            )
        self.ids = ids.tolist()
        self._sizes = np.concatenate([file.sizes for file in files])
        targets, counts = zip(*map(self._targets, files), strict=True)
        self._boxes = np.concatenate(targets)
        self._offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int):
        image, target = self.pull_image(i), self.target(i)
        return (image, target) if self.transform is None else self.transform(image, target)

    list_image_sets = staticmethod(list_image_sets)

    def image_path(self, i: int) -> Path:
        return self._folders[self._set_of[i]] / str(self._names[i])

    def image_size(self, i: int) -> tuple[int, int]:
        """(width, height) in pixels, as the annotation file has it."""
        width, height = self._sizes[i].tolist()
        return width, height

    def pull_image(self, i: int) -> np.ndarray:
        """BGR uint8 [H,W,3], of the size that its boxes are for.

        A picture that an EXIF tag turns, but that was annotated as it is stored, is read as stored,
        and the log says so once. UserError if it is unreadable or of another size.
        """
        path, size = self.image_path(i), self.image_size(i)
        image = read_image(path)
        if (found := image.shape[1::-1]) == size:
            return image
        file = self._files[self._set_of[i]]
        stored = read_image(path, orient=False)
        if stored.shape[1::-1] != size:
            raise UserError(
                f"{path}: the picture is {found[0]} x {found[1]}, but {file} says {size[0]} x"
                f" {size[1]}; restore the annotated picture or correct the file"
            )
        if path not in self._turned:
            self._turned.add(path)
            logging.getLogger("ssd").warning(
                "%s: an EXIF orientation tag turns the picture to %d x %d, but %s says %d x %d; it "
                "is read as stored", path, *found, file, *size
            )  # fmt: skip
        return stored

    def target(self, i: int) -> np.ndarray:
        """float32 [n,5]: x1, y1, x2, y2 in pixels, label."""
        i = range(len(self))[i]
        return self._boxes[self._offsets[i] : self._offsets[i + 1]].copy()

    def report(self) -> list[str]:
        """A line for the log for every reason in `skipped`, with the count and an example."""
        return report_lines(self.skipped)

    def keep_first(self, n: int) -> None:
        """Restrict the data set, in place, to the first n pictures with an object in their target.

        `evaluate` then scores these pictures alone, and image sets without one of them are gone
        from `image_sets`; `skipped` is left as it is. UserError if there are fewer such pictures,
        as in a test split, ValueError for n below 1.
        """
        counts = np.diff(self._offsets)
        kept = first_with_objects(counts, n, f"{self.root}: {sets_name(self.image_sets)}")
        self._boxes = np.concatenate([self.target(i) for i in kept])
        self.ids = [self.ids[i] for i in kept]
        self._names, self._sizes = self._names[kept], self._sizes[kept]
        self._offsets = np.append(0, np.cumsum(counts[kept]))
        used, self._set_of = np.unique(self._set_of[kept], return_inverse=True)
        self.image_sets, self._files, self._folders = (
            [items[s] for s in used] for items in (self.image_sets, self._files, self._folders)
        )

    def annotation_files(self) -> list[Path]:
        """The annotation file of each image set."""
        return list(self._files)

    def check_scorable(self) -> None:
        """UserError if `evaluate` could not score: more than one set, or no such backend here."""
        if len(self.image_sets) > 1:
            sets = ", ".join(map(str, self.image_sets))
            raise UserError(f"{self.root}: COCO scores one image set at a time, not {sets}")
        if not _is_test_split(self._files[0]):
            load_backend(self.eval_backend)

    def evaluate(
        self,
        detections: Sequence[dict],
        directory: str | Path,
        name: str = "SSD",
    ) -> dict:
        """Write the results JSON into `directory` and score what it says.

        `detections`: for each picture, in this order, {"boxes": float32 [n,4] of x1, y1, x2, y2 in
        pixels, "scores": float32 [n], "labels": int64 [n] from 1}; n may be 0. As published a
        `bbox` is x1, y1, x2 - x1 + 1, y2 - y1 + 1. The file is detections_<split>_results.json; a
        test split's is detections_<split>_<name>_results.json, and it is packed into a .zip of the
        same stem, which is what the evaluation server takes.

        Returns {"metric", "value" (AP at [.5:.95]), "per_class" (the same of each class), "iou",
        "max_dets", "image_set", "results" and "curves" (files in `directory`, see `data.curves`),
        "stats" (the twelve numbers, see `data.coco_eval.STATS`), "per_size" and
        "per_class_per_size" (AP of small, medium and large objects), "backend" (name and version),
        "notes" (lines for the log)}; -1 is "no ground truth". A test split has "value" None,
        nothing per class or size, neither stats nor curves, and "archive" (the .zip, beside them).

        ValueError: as `data.detections.as_columns`, or a `name` that is more than letters, digits
        and . + - _. UserError: a file that cannot be written.
        """
        if not re.fullmatch(r"[\w.+-]+", name, re.ASCII):
            raise ValueError(f"{name!r} cannot be in the name of a submitted file")
        self.check_scorable()
        images, scores, labels, corners = as_columns(detections, self.ids, len(self.classes))
        [image_set], [truth] = self.image_sets, self._files
        test = _is_test_split(truth)
        sides = corners[:, 2:] - corners[:, :2] + 1
        boxes = np.hstack([corners[:, :2], sides]).round(4)
        categories = np.array(list(self.category_ids.values()))[labels - 1]
        results = COCOResults(np.array(self.ids)[images], categories, boxes, scores)
        rows = zip(*(column.tolist() for column in results), strict=True)
        split = image_set.name + (image_set.year or "") + (f"_{name}" if test else "")
        path = Path(directory) / f"detections_{split}_results.json"
        with atomic_write(path) as file:
            records = [dict(zip(COCO_FIELDS, row, strict=True)) for row in rows]
            file.write(json.dumps(records).encode())
        report = {
            "metric": "COCO AP",
            "value": None,
            "per_class": {},
            "iou": "0.50:0.95",
            "max_dets": 100,
            "image_set": str(image_set),
            "results": path.name,
        }
        if test:
            archive = path.with_suffix(".zip")
            with (
                atomic_write(archive) as file,
                zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as members,
            ):
                members.write(path, path.name)
            report["archive"] = archive.name
            report["notes"] = [
                f"{archive}: no score here, {truth.name} has no ground truth; the evaluation server"
                " takes this file"
            ]
            return report
        curves = path.with_name(CURVES_FILE)
        scored = evaluate_coco(results, truth, self.eval_backend, curves, self.classes, self.ids)
        return report | {
            "value": scored["stats"][0],
            "per_class": scored["per_category"],
            "per_size": scored["per_size"],
            "per_class_per_size": scored["per_category_per_size"],
            "stats": scored["stats"],
            "backend": scored["backend"],
            "curves": CURVES_FILE,
            "notes": notes(scored),
        }

    def _read(self, year, name, classes):
        paths = [
            self.root / folder / f"{kind}{name}{year or ''}.json"
            for folder in ANNOTATION_FOLDERS
            for kind in ANNOTATION_KINDS
        ]
        # False, too, for a name that no file system takes
        path = next((path for path in paths if os.path.isfile(path)), None)
        if path is None:
            there = ", ".join(map(str, list_image_sets(self.root)))
            if not there:
                files = sorted(p for glob in ("*.json", "*/*.json") for p in self.root.glob(glob))
                files = ", ".join(str(path.relative_to(self.root)) for path in files[:10])
                there = f"none; JSON files there: {files or 'none'}"
            raise UserError(
                f"{paths[0]}: no such annotation file, nor {paths[1].name}, nor one of them in"
                f" {ANNOTATION_FOLDERS[1]}/; image sets in {self.root}: {there} (--root,"
                " --train_sets, --test_sets; docs/own_data.md)"
            )
        file = read_annotations(path, boxes=not _is_test_split(path))
        if classes is None:
            return file
        part = file.of_classes(classes)
        if len(part.classes) < len(file.classes):
            self._skip(
                "set of which some classes are left out",
                file,
                f"{len(part.classes)} of {len(file.classes)} classes, {len(part.boxes)} of"
                f" {len(file.boxes)} boxes",
            )
        return part

    def _find_pictures(self, file, image_set):
        """The folder that has the pictures, and their names in it as an array."""
        year, name = image_set
        splits = [f"{PICTURES_OF.get(name, name)}{year or ''}", file.split]
        before_2017 = year in ("2014", "2015")
        folders = [
            self.root / place / split
            for split in filter(None, splits)
            for place in (("images", "") if before_2017 else ("", "images"))
        ]
        usual, found = folders[0], []
        for folder in dict.fromkeys([*folders, self.root / "images", self.root]):
            if os.path.isdir(folder):
                prefix = f"COCO_{folder.name}_" if before_2017 else ""
                names, missing = _names_in(folder, prefix, file)
                found.append((len(missing), folder, names, missing))
                if not missing:
                    break
        count, folder, names, missing = min(
            found, key=lambda item: item[0], default=(len(file.image_ids), usual, [], [])
        )
        if count == len(file.image_ids) and not os.path.isdir(usual):
            raise UserError(
                f"{usual}: no such folder, for the pictures of {file.path.name}, such as"
                f" {file.file_names[0] or file.image_ids[0]}; nor are they in"
                f" {', '.join(map(str, folders[1:]))}, {self.root / 'images'} or {self.root}"
            )
        if missing and self._faults is None:
            raise UserError(
                f"{folder}: {count} of the {len(names)} pictures in {file.path.name} are missing:"
                f" {', '.join(missing[:10])}" + (" ..." if count > 10 else "")
            )
        if folder != usual:
            detail = f"{folder}, they are not in {usual}"
            self._skip("set whose pictures are in another folder", file, detail)
        return folder, np.array(names)

    def _targets(self, file):
        """float32 [m,5] of the boxes kept, and int64 [N] how many a picture has."""
        picture = np.repeat(np.arange(len(file.image_ids)), np.diff(file.offsets))
        sizes = file.sizes[picture]
        corners = clip_boxes(file.boxes, sizes)
        # 0.01: what COCO's two decimals leave of a box that touches the border.
        outside = np.maximum(-file.boxes[:, :2], file.boxes[:, :2] + file.boxes[:, 2:] - sizes)
        # Clipping would move some of these in.
        absent = (file.boxes[:, :2] + file.boxes[:, 2:] <= 0) | (file.boxes[:, :2] >= sizes)
        absent = absent.any(1)
        # A box of one pixel has x2 = x1, and neither an IoU nor a logarithm of its width.
        flat = ~absent & (corners[:, 2:] <= corners[:, :2]).any(1)
        empty = ~absent & ~flat & (file.areas <= 0)
        kept = ~absent & ~flat & ~empty
        crowd = kept & file.crowds & (not self.crowds)
        kept &= ~crowd
        for reason, rows in {
            "box outside the picture, dropped": absent,
            "box without area in the picture, dropped": flat,
            "annotation of area 0 or less, dropped": empty,
            "crowd, left out": crowd,
            "box clipped to the picture": kept & (outside > 0.01).any(1),
        }.items():
            for n in np.flatnonzero(rows):
                self._skip(
                    reason,
                    file,
                    f"annotation {file.annotation_ids[n]} of image {file.image_ids[picture[n]]},"
                    f" bbox {file.boxes[n].tolist()}",
                )
        label_of = np.array([self.category_labels[id] for id in file.category_ids.tolist()])
        labels = label_of[file.labels - 1]
        target = np.hstack([corners, labels[:, None]])[kept].astype(np.float32)
        return target, np.bincount(picture[kept], minlength=len(file.image_ids))

    def _skip(self, reason, file, detail):
        self.skipped.setdefault(reason, []).append(f"{file.path.name}: {detail}")


def _names_in(folder: Path, prefix: str, file: Annotations) -> tuple[list[str], list[str]]:
    """The names of a file's pictures in a folder, and those of them that are not there."""
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
