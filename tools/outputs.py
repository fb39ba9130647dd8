"""What detections are written as: COCO JSON, CSV, VOC XML, YOLO text.

Boxes are (x1, y1, x2, y2) in pixels counted from 0, both ends inside the box, as everywhere here.
COCO JSON and CSV have them as the detector gives them, which may reach over the picture's border.
VOC and YOLO files are annotations: there a box is cut off at the border, and one that lies outside
the picture is left out. A picture without objects has a file without objects.
"""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.config import COCO_CLASSES
from utils.files import atomic_write

# COCO's categories have numbers up to 90, of which these are not in use.
_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = tuple(k for k in range(1, 91) if k not in _UNUSED)
_NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
CSV_HEADER = ("file", "frame", "time", "class", "score", "x1", "y1", "x2", "y2")


@dataclass(frozen=True)
class Found:
    """The detections of a picture, or of one frame of a video."""

    name: str
    """Of the file, relative, with /."""
    id: int
    """Its number in COCO JSON."""
    size: tuple[int, int]
    """Width, height."""
    boxes: np.ndarray
    """float64 [n, 4]"""
    scores: np.ndarray
    labels: np.ndarray
    """int64 [n], of 1..C"""
    frame: int | None = None
    """Of a video, counted from 0."""
    time: float | None = None
    """Of a frame, in seconds from the start."""


# ---------------------------------------------------------------- one file for all pictures


def category_ids(classes: Sequence[str]) -> tuple[int, ...]:
    """Numbers of the classes in COCO JSON: the official ones of COCO's classes, else 1..C."""
    return COCO_IDS if tuple(classes) == COCO_CLASSES else tuple(range(1, len(classes) + 1))


@contextmanager
def growing(path: Path, end: bytes) -> Iterator[BinaryIO]:
    """A file that takes its place, with ``end`` behind what was written, whatever ends the block:
    what has been detected before an error is not lost."""
    with ExitStack() as stack:
        file = stack.enter_context(atomic_write(path))
        try:
            yield file
        finally:
            file.write(end)
            stack.close()


@contextmanager
def write_json(folder: Path, classes: Sequence[str]) -> Iterator[Callable[[Found], None]]:
    """detections.json, COCO's results, and images.json, which tells its numbers: images (id,
    file_name, width, height; of a video also frame and time) and categories (id, name)."""
    ids = category_ids(classes)
    categories = [{"id": k, "name": name} for k, name in zip(ids, classes, strict=True)]
    head = json.dumps(categories, ensure_ascii=False)
    with (
        growing(folder / "detections.json", b"\n]\n") as detections,
        growing(folder / "images.json", b"\n]}\n") as images,
    ):
        detections.write(b"[")
        images.write(f'{{"categories": {head},\n"images": ['.encode())
        between = {detections: b"\n", images: b"\n"}

        def write(file, record: dict) -> None:
            file.write(between[file] + json.dumps(record, ensure_ascii=False).encode())
            between[file] = b",\n"

        def add(found: Found) -> None:
            when = (
                {} if found.frame is None else {"frame": found.frame, "time": round(found.time, 3)}
            )
            about = {"file_name": found.name, **when}
            width, height = found.size
            write(images, {"id": found.id, **about, "width": width, "height": height})
            extents = found.boxes[:, 2:] - found.boxes[:, :2] + 1
            for box, score, label in zip(
                np.hstack([found.boxes[:, :2], extents]), found.scores, found.labels, strict=True
            ):
                write(
                    detections,
                    {"image_id": found.id, "category_id": ids[label - 1],
                     "bbox": [round(float(v), 2) for v in box], "score": round(float(score), 5),
                     **about},
                )  # fmt: skip

        yield add


@contextmanager
def write_csv(folder: Path, classes: Sequence[str]) -> Iterator[Callable[[Found], None]]:
    """detections.csv: a line a box, with `CSV_HEADER`; frame and time are empty for pictures."""
    with growing(folder / "detections.csv", b"") as file:

        def write(rows: Sequence[Sequence]) -> None:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(rows)
            file.write(text.getvalue().encode())

        def add(found: Found) -> None:
            when = ("", "") if found.frame is None else (found.frame, f"{found.time:.3f}")
            boxes = zip(found.boxes, found.scores, found.labels, strict=True)
            write([
                (found.name, *when, classes[label - 1], f"{score:.5f}", *(f"{v:.2f}" for v in box))
                for box, score, label in boxes
            ])  # fmt: skip

        write([CSV_HEADER])
        yield add


# ---------------------------------------------------------------- a file a picture


def voc_xml(found: Found, classes: Sequence[str]) -> bytes:
    """An annotation of VOC, with a <score> an object. Its pixels count from 1 and are whole; a box
    has two or more a side, as readers take one of one pixel for a box without area. Characters
    that XML lacks become U+FFFD."""
    root = ElementTree.Element("annotation")

    def put(parent: ElementTree.Element, **texts: object) -> None:
        for tag, text in texts.items():
            ElementTree.SubElement(parent, tag).text = _NOT_IN_XML.sub("\ufffd", str(text))

    folder, _, name = found.name.rpartition("/")
    put(root, folder=folder, filename=name)
    width, height = found.size
    put(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
    put(root, segmented=0)
    boxes, inside = _cut(found)
    low = np.minimum(boxes[:, :2].round(), np.array(found.size) - 2)
    high = np.maximum(boxes[:, 2:].round(), low + 1)
    boxes = np.hstack([low, high]).astype(int) + 1
    scores, labels = found.scores[inside], found.labels[inside]
    for box, score, label in zip(boxes, scores, labels, strict=True):
        element = ElementTree.SubElement(root, "object")
        put(element, name=classes[label - 1], pose="Unspecified", truncated=0, difficult=0,
            score=f"{score:.5f}")  # fmt: skip
        corners = dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        put(ElementTree.SubElement(element, "bndbox"), **corners)
    ElementTree.indent(root)
    return ElementTree.tostring(root, "utf-8") + b"\n"


def yolo_txt(found: Found, classes: Sequence[str], scored: bool = False) -> bytes:
    """A line a box: class from 0, centre, width and height in shares of the picture, and
    ``scored`` the score, which programs that train on such files do not take."""
    boxes, inside = _cut(found)
    low, high = boxes[:, :2], boxes[:, 2:] + 1
    shares = np.hstack([(low + high) / 2, high - low]) / (*found.size, *found.size)
    lines = []
    for share, score, label in zip(shares, found.scores[inside], found.labels[inside], strict=True):
        values = [*share, score] if scored else share
        lines.append(" ".join([str(label - 1), *(f"{value:.6f}" for value in values)]) + "\n")
    return "".join(lines).encode()


def _cut(found: Found) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [m, 4] cut off at the picture's border, and which of the n lie in it: bool [n]."""
    width, height = found.size
    boxes = found.boxes.clip(0, np.array([width, height, width, height]) - 1)
    inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return boxes[inside], inside
