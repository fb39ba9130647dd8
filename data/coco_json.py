"""COCO's JSON files, validated, as columns: https://cocodataset.org/#format-data."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.detections import LARGEST
from utils.errors import UserError


@dataclass(frozen=True)
class Annotations:
    """One annotation file as arrays: N pictures by id, K categories by id, M boxes by picture."""

    path: Path
    image_ids: np.ndarray  # int64 [N], ascending
    file_names: np.ndarray  # str [N], "" where the file has none
    split: str  # folder of the first picture in its coco_url, "" where it has none
    sizes: np.ndarray  # int64 [N, 2], width and height
    category_ids: np.ndarray  # int64 [K], ascending; label k is category_ids[k - 1]
    classes: tuple[str, ...]  # K names
    offsets: np.ndarray  # int64 [N + 1]; picture i owns the boxes offsets[i]:offsets[i + 1]
    boxes: np.ndarray  # float64 [M, 4], x, y, w, h in pixels as annotated
    labels: np.ndarray  # int64 [M], 1..K
    areas: np.ndarray  # float64 [M], of the segmentation; w * h where the file has none
    crowds: np.ndarray  # bool [M]
    annotation_ids: list  # M ids, None where the file has none

    def of_classes(self, classes: Sequence[str]) -> Annotations:
        """The same pictures with the boxes of these categories alone, in the order of the ids.

        UserError for a name that is not there. ValueError for one given twice.
        """
        if len(set(classes)) < len(classes):
            raise ValueError(f"classes must be unique, got {', '.join(classes)}")
        if unknown := [name for name in classes if name not in self.classes]:
            raise UserError(
                f"{self.path}: has no category {', '.join(unknown)}; it has"
                f" {', '.join(self.classes)}"
            )
        chosen = np.array([name in classes for name in self.classes])
        part = self._of_boxes(chosen[self.labels - 1])
        return replace(
            part,
            category_ids=self.category_ids[chosen],
            classes=tuple(name for name in self.classes if name in classes),
            labels=np.cumsum(chosen)[part.labels - 1],
        )

    def of_images(self, ids: Sequence[int]) -> Annotations:
        """The same categories with these pictures alone, in the order of their ids.

        UserError for an id that is not there.
        """
        ids = np.asarray(ids, np.int64)
        chosen = np.zeros(len(self.image_ids), bool)
        chosen[positions(self.path, "chosen", "image_id", ids, self.image_ids, self.path)] = True
        part = self._of_boxes(np.repeat(chosen, np.diff(self.offsets)))
        return replace(
            part,
            offsets=np.append(0, part.offsets[1:][chosen]),  # the others own no boxes now
            **{name: getattr(self, name)[chosen] for name in ("image_ids", "file_names", "sizes")},
        )

    def _of_boxes(self, kept: np.ndarray) -> Annotations:
        """The same pictures and categories with these boxes alone, `kept` bool [M]."""
        return replace(
            self,
            offsets=np.append(0, np.cumsum(kept))[self.offsets],
            annotation_ids=[self.annotation_ids[n] for n in np.flatnonzero(kept)],
            **{name: getattr(self, name)[kept] for name in ("boxes", "labels", "areas", "crowds")},
        )


def read_json(path: str | Path, object_hook: Callable[[dict], object] | None = None):
    """Parse a JSON file; UserError where it cannot be read or is no JSON."""
    collecting = gc.isenabled()
    gc.disable()  # it would look in vain through the growing records: half of the time
    try:
        data = Path(path).read_bytes()
        text = data.decode(json.detect_encoding(data), "surrogatepass")
        del data  # the two are most of what a large file takes
        return json.loads(text, object_hook=object_hook)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    finally:
        if collecting:
            gc.enable()


def column(source, kind: str, records, field: str, shape: tuple[int, ...] = (), dtype=np.float64):
    """One field of a list of JSON objects, `dtype` [n, *shape].

    UserError names the first object that lacks it or has another shape, type or a non-finite number
    there; an int64 column takes whole numbers only, also written as 96.0.
    """

    def valid(value, shape):
        try:
            array = np.array(value)
        except ValueError:  # ragged
            return False
        kinds = "i" if dtype is np.int64 else "iuf"
        return array.shape == shape and array.dtype.kind in kinds and np.isfinite(array).all()

    if not isinstance(records, list):
        raise UserError(f"{source}: has no list of {kind}")
    values = [record.get(field) if isinstance(record, dict) else None for record in records]
    if dtype is np.int64:
        values = [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]
    if values and not valid(values, (len(values), *shape)):
        n = next(n for n, value in enumerate(values) if not valid(value, shape))
        wanted = "a whole number" if dtype is np.int64 else "a finite number"
        wanted = f"{shape[0]} finite numbers" if shape else wanted
        raise _unfit(source, kind, records, n, field, wanted)
    return np.array(values, dtype).reshape(-1, *shape)


def box_column(source, kind: str, records):
    """The boxes x, y, w, h of a list of JSON objects, float64 [n, 4], as `column` reads them.

    UserError names the first with a number beyond `LARGEST`, too: its area may be infinite.
    """
    boxes = column(source, kind, records, "bbox", (4,))
    if (beyond := (np.abs(boxes) > LARGEST).any(1)).any():
        raise _unfit(source, kind, records, beyond.argmax(), "bbox", f"4 numbers up to {LARGEST:g}")
    return boxes


def _unfit(source, kind, records, n, field, wanted) -> UserError:
    record = records[n] if isinstance(records[n], dict) else {}
    where = f"{kind}[{n}]" + (f" (id {record['id']})" if "id" in record else "")
    value = f"{record.get(field)!r:.60}"
    return UserError(f"{source}: {where} needs {wanted} as '{field}', found {value}")


def positions(source, kind: str, field: str, values: np.ndarray, known: np.ndarray, path: Path):
    """int64 [n]: where `values` stand in `known`, the ascending ids of the annotation file `path`.

    UserError names the first that is not there and says how many are not.
    """
    index = np.searchsorted(known, values).clip(max=len(known) - 1)
    unknown = np.flatnonzero(known[index] != values)
    if len(unknown):
        n = unknown[0]
        raise UserError(
            f"{source}: {kind}[{n}] has the {field} {values[n]}, which {path} does not list, like"
            f" {len(unknown)} of {len(values)}; it lists {len(known)}, {known[0]} to {known[-1]}"
        )
    return index


def _without_outline(record: dict) -> dict:
    """Most of an annotation's memory, and of no use for boxes."""
    record.pop("segmentation", None)
    return record


def read_annotations(path: str | Path, boxes: bool = True) -> Annotations:
    """Read a COCO annotation file; without `boxes` an image_info file, which has none.

    UserError with the file and the id: no JSON, missing or malformed fields, ids that occur twice,
    annotations of a picture or a category that the file does not list.
    """
    document = read_json(path, _without_outline)
    if not isinstance(document, dict):
        raise UserError(f"{path}: not a COCO annotation file (its top level is no object)")

    def by_id(kind):
        ids = column(path, kind, document.get(kind), "id", dtype=np.int64)
        known, first, counts = np.unique(ids, return_index=True, return_counts=True)
        if not len(known):
            raise UserError(f"{path}: lists no {kind}")
        if len(known) < len(ids):
            raise UserError(f"{path}: {kind} id {known[counts > 1][0]} occurs twice")
        return known, [document[kind][n] for n in first]

    image_ids, images = by_id("images")
    sizes = [column(path, "images", images, side, dtype=np.int64) for side in ("width", "height")]
    sizes = np.stack(sizes, 1)
    if (sizes < 1).any():
        n = np.flatnonzero((sizes < 1).any(1))[0]
        raise UserError(f"{path}: image id {image_ids[n]} has the size {sizes[n].tolist()}")

    category_ids, categories = by_id("categories")
    classes = tuple(category.get("name") for category in categories)
    for n, name in enumerate(classes):
        if not isinstance(name, str) or not name.strip() or name in classes[:n]:
            raise UserError(
                f"{path}: category id {category_ids[n]} has no name of its own: {name!r:.60}"
            )

    records = document.get("annotations") if boxes else []
    box = box_column(path, "annotations", records)

    def owners(field, known):
        ids = column(path, "annotations", records, field, dtype=np.int64)
        return positions(path, "annotations", field, ids, known, path)

    image, category = owners("image_id", image_ids), owners("category_id", category_ids)
    area = [
        record if record.get("area") is not None else {"area": w * h}
        for record, (*_, w, h) in zip(records, box.tolist(), strict=True)
    ]
    crowds = [record.get("iscrowd", 0) for record in records]
    for n, crowd in enumerate(crowds):
        if crowd not in (0, 1):  # true and false are equal to them
            raise _unfit(path, "annotations", records, n, "iscrowd", "0 or 1")
    order = np.argsort(image, kind="stable")
    url = str(images[0].get("coco_url") or "")
    return Annotations(
        path=Path(path),
        image_ids=image_ids,
        file_names=np.array([str(image.get("file_name") or "") for image in images]),
        split=url.split("/")[-2] if "/" in url else "",
        sizes=sizes,
        category_ids=category_ids,
        classes=classes,
        offsets=np.searchsorted(image[order], np.arange(len(image_ids) + 1)),
        boxes=box[order],
        labels=category[order] + 1,
        areas=column(path, "annotations", area, "area")[order],
        crowds=np.array(crowds, bool)[order],
        annotation_ids=[records[n].get("id") for n in order],
    )
