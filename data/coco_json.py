"""COCO's JSON files, validated, as columns: https://cocodataset.org/#format-data."""

from __future__ import annotations

import gc
import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.annotation import turned
from data.classes import check_classes, is_background, spelled
from data.detections import LARGEST
from data.truth import digest
from utils.errors import UserError, first_line
from utils.files import read_bytes

MOST_PIXELS = 10**6  # of an image's width or height


def read_json(path: str | Path, object_hook: Callable[[dict], object] | None = None) -> object:
    """Parse a JSON file. Raises UserError if it cannot be read or is not JSON."""
    data = read_bytes(path)
    collecting = gc.isenabled()
    gc.disable()  # half of the time goes to searching the growing records for garbage
    try:
        text = data.decode(json.detect_encoding(data), "surrogatepass")
        del data  # the two are most of the memory that a large file takes
        return json.loads(text, object_hook=object_hook)
    except Exception as error:
        fault = f"{path}: not a JSON file ({first_line(error)}); export it as one document in UTF-8"
        raise UserError(fault) from error
    finally:
        if collecting:
            gc.enable()


@dataclass(frozen=True)
class Records:
    """A list of n JSON objects, read by field.

    Every error is a UserError that names the first object with a wrong value, and the value.

    source: the file, or what else the objects come from, for messages.
    kind: the name of the list, such as "annotations".
    """

    source: object
    kind: str
    records: object

    def __post_init__(self) -> None:
        if not isinstance(self.records, list):
            raise UserError(f"{self.source}: has no list of {self.kind}")

    def integers(self, field: str) -> np.ndarray:
        """Return a field of whole numbers, also written as 96.0 or "96": int64 [n]."""
        values = [v if type(v) is int else _whole(v) for v in self._values(field)]
        return self._array(field, values, (), np.int64, "a whole number")

    def numbers(self, field: str) -> np.ndarray:
        """Return a field of finite numbers: float64 [n]."""
        return self._array(field, self._values(field), (), np.float64, "a finite number")

    def boxes(self) -> np.ndarray:
        """Return the field "bbox", 4 numbers up to `LARGEST`, so that areas are finite: [n, 4]."""
        boxes = self._array("bbox", self._values("bbox"), (4,), np.float64, "4 finite numbers")
        if (beyond := (np.abs(boxes) > LARGEST).any(1)).any():
            raise self.unfit(int(beyond.argmax()), "bbox", f"4 numbers up to {LARGEST:g}")
        return boxes

    def unfit(self, n: int, field: str, wanted: str) -> UserError:
        """Return the error that a field of object ``n`` is not what is ``wanted``."""
        record = self.records[n] if isinstance(self.records[n], dict) else {}
        id = f" (id {reprlib.repr(record['id'])})" if "id" in record else ""
        return UserError(f"{self.source}: {self.kind}[{n}]{id} needs {wanted} as '{field}', found"
                         f" {reprlib.repr(record.get(field))}")

    def _values(self, field: str) -> list:
        return [r.get(field) if isinstance(r, dict) else None for r in self.records]

    def _array(self, field: str, values: list, shape: tuple[int, ...], dtype: type,
               wanted: str) -> np.ndarray:
        if values and not _fits(values, (len(values), *shape), dtype):
            n = next(n for n, value in enumerate(values) if not _fits(value, shape, dtype))
            raise self.unfit(n, field, wanted)
        return np.array(values, dtype).reshape(-1, *shape)


def _whole(value: object) -> object:
    """Return the integer that a float or a string stands for; any other value as it is."""
    whole = isinstance(value, float) and value.is_integer() or (
        isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value))
    return int(value) if whole else value


def _fits(value: object, shape: tuple[int, ...], dtype: type) -> bool:
    try:
        array = np.array(value)
    except Exception:  # ragged, or nested too deeply
        return False
    kinds = "i" if dtype is np.int64 else "iuf"
    return array.shape == shape and array.dtype.kind in kinds and bool(np.isfinite(array).all())


def positions(where: str, field: str, values: np.ndarray, known: np.ndarray,
              path: Path) -> np.ndarray:
    """Return the positions of ``values`` in ``known``, the ascending ids of a file: int64 [n].

    where, field: what holds the values, such as "FILE: annotations", for the UserError that names
    the first value that is not known.
    """
    index = np.searchsorted(known, values).clip(max=len(known) - 1)
    unknown = np.flatnonzero(known[index] != values)
    if len(unknown):
        n = unknown[0]
        raise UserError(f"{where}[{n}] has the {field} {values[n]}, which {path} does not list,"
                        f" like {len(unknown)} of {len(values)}; it lists {len(known)}, {known[0]}"
                        f" to {known[-1]}")
    return index


def extents(boxes: np.ndarray) -> np.ndarray:
    """Convert x, y, w, h [n, 4] to x1, y1, x2, y2 [n, 4]."""
    return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])


@dataclass(frozen=True)
class COCOAnnotations:
    """One annotation file as arrays: N images by id, K categories by id, M boxes by image."""

    path: Path
    image_ids: np.ndarray  # int64 [N], ascending
    file_names: np.ndarray  # str [N], "" where the file has none
    split: str  # folder of the first image in its coco_url, "" where it has none
    sizes: np.ndarray  # int64 [N, 2], width and height; 0, 0 where the file has none
    category_ids: np.ndarray  # int64 [K], ascending; label k is category_ids[k - 1]
    classes: tuple[str, ...]  # K names
    offsets: np.ndarray  # int64 [N + 1]; image i owns the boxes offsets[i]:offsets[i + 1]
    boxes: np.ndarray  # float64 [M, 4], x, y, w, h in pixels as annotated
    labels: np.ndarray  # int64 [M], 1..K
    areas: np.ndarray  # float64 [M], of the segmentation; w * h where that is not positive
    crowds: np.ndarray  # bool [M]
    annotation_ids: list  # M ids, None where the file has none
    roots: frozenset[str] = frozenset()  # classes that are the supercategory of all others
    surplus: tuple[str, ...] = ()  # descriptions of categories that were left out

    def categories(self) -> dict[str, int]:
        """Return class name -> category id, by id."""
        return dict(zip(self.classes, self.category_ids.tolist(), strict=True))

    def digest(self) -> str:
        """Return the sha256 of everything that training and scoring depend on."""
        images = (self.image_ids, self.sizes, self.offsets)
        boxes = (self.boxes, self.labels, self.areas, self.crowds)
        return digest(self.categories(), *images, *boxes)

    def owners(self) -> np.ndarray:
        """Return the position of each box's image, int64 [M]."""
        return np.repeat(np.arange(len(self.image_ids)), np.diff(self.offsets))

    def of_classes(self, classes: Sequence[str]) -> COCOAnnotations:
        """Return these categories, in the order of their ids, all images, and their boxes.

        Raises UserError for an unknown name, ValueError for one given twice.
        """
        classes = [*map(spelled, classes)]
        if len(set(classes)) < len(classes):
            raise ValueError(f"classes must be unique, got {', '.join(classes)}")
        known, asked = set(self.classes), set(classes)
        if unknown := [name for name in classes if name not in known]:
            raise UserError(f"{self.path}: has no category {', '.join(unknown)}; it has "
                            f"{', '.join(self.classes)}; choose from these with --classes, or add "
                            "it to the file")
        if asked == known:
            return self
        chosen = np.array([name in asked for name in self.classes])
        part = self._of_boxes(chosen[self.labels - 1])
        return replace(part, category_ids=self.category_ids[chosen],
                       classes=tuple(name for name in self.classes if name in asked),
                       labels=np.cumsum(chosen)[part.labels - 1])

    def of_images(self, ids: Sequence[int]) -> COCOAnnotations:
        """Return these images by id, all categories, and their boxes; UserError: unknown id."""
        ids = np.asarray(ids, np.int64)
        chosen = np.zeros(len(self.image_ids), bool)
        chosen[positions(f"{self.path}: chosen", "image_id", ids, self.image_ids, self.path)] = True
        part = self._of_boxes(chosen[self.owners()])
        return replace(
            part,
            offsets=np.append(0, part.offsets[1:][chosen]),  # the others own no boxes now
            **{name: getattr(self, name)[chosen] for name in ("image_ids", "file_names", "sizes")})

    def _of_boxes(self, kept: np.ndarray) -> COCOAnnotations:
        """Return all images and categories with the boxes that are ``kept``, bool [M]."""
        return replace(
            self, offsets=np.append(0, np.cumsum(kept))[self.offsets],
            annotation_ids=[self.annotation_ids[n] for n in np.flatnonzero(kept)],
            **{name: getattr(self, name)[kept] for name in ("boxes", "labels", "areas", "crowds")})


def join(files: Sequence[COCOAnnotations]) -> COCOAnnotations:
    """Return files of the same categories as one, in their order."""
    columns = {name: np.concatenate([getattr(file, name) for file in files]) for name in (
        "image_ids", "file_names", "sizes", "boxes", "labels", "areas", "crowds")}
    counts = np.concatenate([np.diff(file.offsets) for file in files])
    return replace(files[0], offsets=np.append(0, np.cumsum(counts)),
                   annotation_ids=[id for file in files for id in file.annotation_ids], **columns)


def read_annotations(path: str | Path, boxes: bool = True) -> COCOAnnotations:
    """Read a COCO annotation file; without ``boxes`` an image_info file, which has no annotations.

    An annotation without "bbox" gets the enclosing box of its "segmentation". A box without
    "segmentation" is turned by the attribute "rotation" (`data.annotation.turned`). A category
    without boxes is left out if it is called background or has the name of another.

    Raises:
        UserError: not JSON, missing or malformed fields, an id that occurs twice, or an annotation
            of an image or a category that the file does not list. The message names file and id.
    """
    document = read_json(path, _without_outline)
    if not isinstance(document, dict):
        raise UserError(f"{path}: not a COCO annotation file (its top level is no object)")
    image_ids, images = _by_id(path, "images", document)
    sizes = _read_sizes(path, images, image_ids)
    category_ids, categories = _by_id(path, "categories", document)
    records = Records(path, "annotations", document.get("annotations") if boxes else [])
    for record in records.records:
        if isinstance(record, dict) and "segmentation" in record:
            record["bbox"] = _enclosing_box(record) or record.get("bbox")
    box = records.boxes()
    for n, record in enumerate(records.records):
        attributes = record.get("attributes")
        rotation = isinstance(attributes, dict) and attributes.get("rotation")
        if rotation and not record.get("segmentation"):
            x, y, w, h = box[n]
            x1, y1, x2, y2 = turned((x, y, x + w, y + h), rotation)
            box[n] = x1, y1, x2 - x1, y2 - y1
    where = f"{path}: annotations"
    image, category = (positions(where, field, records.integers(field), known, path)
                       for field, known in (("image_id", image_ids), ("category_id", category_ids)))
    counts = np.bincount(category, minlength=len(categories))
    classes, kept = _read_classes(path, categories, counts)
    order = np.argsort(image, kind="stable")
    url = str(images[0].get("coco_url") or "")
    return COCOAnnotations(
        path=Path(path), image_ids=image_ids,
        file_names=np.array([_file_name(image) for image in images]),
        split=url.split("/")[-2] if "/" in url else "", sizes=sizes,
        category_ids=category_ids[kept], classes=classes, roots=_find_roots(categories, classes),
        offsets=np.searchsorted(image[order], np.arange(len(image_ids) + 1)),
        boxes=box[order], labels=np.cumsum(kept)[category[order]],
        areas=_read_areas(records, box)[order], crowds=_read_crowds(records)[order],
        annotation_ids=[records.records[n].get("id") for n in order],
        surplus=tuple(f"{Path(path).name}: category id {category_ids[n]} ({categories[n]['name']})"
                      for n in np.flatnonzero(~kept)))


def _without_outline(record: dict) -> dict:
    """Drop most of an annotation's memory, which boxes do not need."""
    if record.get("bbox") and record.pop("segmentation", None):
        record.pop("attributes", None)  # the box encloses the outline: it is not to be turned
    return record


def _enclosing_box(record: dict) -> list[float] | None:
    """Return the x, y, w, h around a segmentation: polygons or a run-length code; None: no such."""
    outline = record["segmentation"]
    try:
        if isinstance(outline, dict):
            height, width = outline["size"]
            if not 0 < height <= MOST_PIXELS or not 0 < width <= MOST_PIXELS:
                return None
            from pycocotools import mask

            code = outline if isinstance(outline["counts"], str) else mask.frPyObjects(
                outline, height, width)
            return mask.toBbox(code).tolist()
        points = np.concatenate([np.array(each, np.float64).reshape(-1, 2) for each in outline])
        return [*points.min(0).tolist(), *np.ptp(points, 0).tolist()]
    except Exception:  # the message for a wrong "bbox" follows
        return None


def _by_id(path: str | Path, kind: str, document: dict) -> tuple[np.ndarray, list[dict]]:
    records = Records(path, kind, document.get(kind))
    known, first, counts = np.unique(records.integers("id"), return_index=True, return_counts=True)
    if not len(known):
        raise UserError(f"{path}: lists no {kind}")
    if (counts > 1).any():
        raise UserError(f"{path}: {kind} id {known[counts > 1][0]} occurs twice")
    return known, [records.records[n] for n in first]


def _read_sizes(path: str | Path, images: list[dict], ids: np.ndarray) -> np.ndarray:
    sides = ("width", "height")
    stated = [each if all(map(each.get, sides)) else {**each, **dict.fromkeys(sides, 0)}
              for each in images]
    records = Records(path, "images", stated)
    sizes = np.stack([records.integers(side) for side in sides], 1)
    if len(wrong := np.flatnonzero(((sizes < 0) | (sizes > MOST_PIXELS)).any(1))):
        n = wrong[0]
        raise UserError(f"{path}: image id {ids[n]} has the size {sizes[n].tolist()}")
    sizes[(sizes == 0).any(1)] = 0
    return sizes


def _file_name(image: dict) -> str:
    """Return the file's name, else the end of its URL with a folder, as in LVIS; "" for none."""
    url = str(image.get("coco_url") or "")
    return str(image.get("file_name") or "/".join(url.split("/")[-2:]))


def _read_classes(path: str | Path, categories: list[dict],
                  counts: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of the categories that are read, and which these are, bool [K]."""
    names = [spelled(name) if isinstance(name := each.get("name"), str) else ""
             for each in categories]
    if "" in names:
        raise Records(path, "categories", categories).unfit(names.index(""), "name", "a text")
    kept = np.ones(len(names), bool)
    alike, first = Counter(names), {}
    for n, (category, name) in enumerate(zip(categories, names, strict=True)):
        if not counts[n] and len(names) > 1:
            kept[n] = alike[name] == 1 and not is_background(name)
            alike[name] -= not kept[n]
        elif (other := first.setdefault(name, category["id"])) != category["id"]:
            raise UserError(f"{path}: category ids {other} and {category['id']} have the same name "
                            f"{name!r}, and boxes; give them one id or two names")
    return check_classes([names[n] for n in np.flatnonzero(kept)], str(path)), kept


def _find_roots(categories: list[dict], classes: Sequence[str]) -> frozenset[str]:
    """Return what all other categories have above them; of itself only Roboflow's id 0 may be."""
    above = Counter(spelled(str(each.get("supercategory"))) for each in categories)
    own = {spelled(each["name"]): each["id"] for each in categories
           if each["name"] == each.get("supercategory")}
    others = len(categories) - 1
    return frozenset(n for n in classes if others and not own.get(n)
                     and above[n] == others + (n in own))


def _read_areas(records: Records, boxes: np.ndarray) -> np.ndarray:
    """Return the field "area", float64 [n]; w * h where it is no positive number."""
    return np.array([
        area if isinstance(area := record.get("area"), int | float) and 0 < area < LARGEST**2
        else w * h
        for record, (*_, w, h) in zip(records.records, boxes.tolist(), strict=True)], np.float64)


def _read_crowds(records: Records) -> np.ndarray:
    crowds = [record.get("iscrowd", 0) for record in records.records]
    for n, crowd in enumerate(crowds):
        if crowd not in (0, 1):  # true and false are equal to them
            raise records.unfit(n, "iscrowd", "0 or 1")
    return np.array(crowds, bool)
