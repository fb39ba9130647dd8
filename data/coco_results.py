"""COCO's results JSON, and the zip of one that the evaluation server accepts.

Format: https://cocodataset.org/#format-results.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.coco_json import COCOAnnotations, Records, positions, read_annotations
from utils.errors import UserError, first_line
from utils.files import atomic_write, read_bytes

COCO_FIELDS = ("image_id", "category_id", "bbox", "score")


class COCOResults(NamedTuple):
    """The n detections of a results JSON as columns; n may be 0, all numbers are finite.

    image_ids, category_ids: int64 [n], as in the annotation file.
    boxes: float64 [n, 4], x, y, w, h in pixels, up to `data.detections.LARGEST`.
    scores: float64 [n]. Of equal scores the earlier one comes first.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray

    @classmethod
    def read(cls, source: object, content: object) -> COCOResults:
        """Read a parsed results JSON. Raises UserError, naming ``source``, if it is malformed."""
        if not isinstance(content, list):
            raise UserError(f"{source}: has no list of results; give a test's "
                            "detections_SET_results.json")
        records = Records(source, "results", content)
        image, category = (records.integers(field) for field in COCO_FIELDS[:2])
        return cls(image, category, records.boxes(), records.numbers("score"))

    def positions_in(self, truth: COCOAnnotations, source: object) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions of each detection's image and category, int64 [n] each.

        Raises UserError for ids that the annotation file does not list.
        """
        where = f"{source}: results"
        return (positions(where, "image_id", self.image_ids, truth.image_ids, truth.path),
                positions(where, "category_id", self.category_ids, truth.category_ids, truth.path))


def write_results(path: Path, results: COCOResults) -> None:
    """Write a results JSON. Raises UserError if the file cannot be written."""
    rows = zip(*(column.tolist() for column in results), strict=True)
    records = [dict(zip(COCO_FIELDS, row, strict=True)) for row in rows]
    with atomic_write(path) as file:
        file.write(json.dumps(records).encode())


def write_archive(path: Path) -> Path:
    """Pack a results JSON into a .zip of the same stem, and return that."""
    archive = path.with_suffix(".zip")
    with (atomic_write(archive) as file,
          zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as members):
        members.write(path, path.name)
    return archive


def check_submission(archive: str | Path, annotations_path: str | Path) -> int:
    """Return the number of detections in a zip that COCO's evaluation server accepts.

    Its rules (https://cocodataset.org/#upload, #format-results): the zip has one file, in no
    folder, detections_<split>_<name>_results.json. That is a list of objects of exactly four
    fields: image_id and category_id, integers that the split's image_info_<split>.json lists,
    bbox, four finite numbers, and score, a finite number.

    Raises:
        UserError: names the first rule that is broken.
    """
    split = Path(annotations_path).stem.removeprefix("image_info_")
    name, records = _read_archive(archive, split)
    source = f"{archive}: {name}"
    results = COCOResults.read(source, records)
    for n, record in enumerate(records):
        if record.keys() != set(COCO_FIELDS):
            raise UserError(f"{source}: results[{n}] has the fields {', '.join(record)}, where the"
                            f" server wants {', '.join(COCO_FIELDS)}")
        if not all(isinstance(record[field], int) for field in COCO_FIELDS[:2]):
            raise UserError(f"{source}: results[{n}] has an id that is not an integer: {record}")
    results.positions_in(read_annotations(annotations_path, boxes=False), source)
    return len(records)


def _read_archive(archive: str | Path, split: str) -> tuple[str, object]:
    data, content = read_bytes(archive, "archive"), b""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as members:
            names = members.namelist()
            if len(names) == 1:
                content = members.read(names[0])
    except Exception as error:
        raise UserError(f"{archive}: not a zip that can be read ({first_line(error)})") from error
    pattern = rf"detections_{re.escape(split)}_[\w.+-]+_results\.json"
    if len(names) != 1 or not re.fullmatch(pattern, names[0], re.ASCII):
        raise UserError(f"{archive}: holds {', '.join(names) or 'nothing'}, where the server wants"
                        f" only detections_{split}_<name>_results.json, in no folder")
    try:
        return names[0], json.loads(content)
    except Exception as error:
        raise UserError(f"{archive}: {names[0]} is not a JSON file ({error})") from error
