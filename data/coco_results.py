"""COCO's results JSON, and the zip of one for the evaluation server.

Format: https://cocodataset.org/#format-results.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.coco_json import COCOAnnotations, Records, positions
from utils.errors import UserError
from utils.files import atomic_write

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
