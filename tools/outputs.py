"""What detection writes: COCO JSON, CSV, VOC XML, YOLO text, drawn images and videos.

Boxes are (x1, y1, x2, y2) in pixels, 0-based, both ends inside the box. JSON and CSV keep them as
the detector gives them, which may reach outside the image. VOC and YOLO files are annotations:
boxes are clipped to the image, and boxes outside it are dropped.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import cv2
import numpy as np
from PIL.ImageFont import FreeTypeFont

from data.config import COCO_CLASSES
from inference.draw import draw_detections, enlarge
from tools.sources import Frame, Source, real_path
from utils.errors import UserError
from utils.files import atomic_write, check_writable

# COCO numbers its 80 categories up to 90, without ten of these numbers.
COCO_IDS = tuple(sorted({*range(1, 91)} - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))
_NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
CSV_HEADER = ("file", "frame", "time", "class", "score", "x1", "y1", "x2", "y2")
DRAWN = frozenset(".jpg .jpeg .jpe .png .bmp .dib .webp .tif .tiff .ppm".split())
"""Suffixes that a drawn image keeps: every OpenCV can write colours to such files."""


class Found(NamedTuple):
    """The detections of a frame, best score first; n may be 0."""

    frame: Frame
    boxes: np.ndarray
    """float64 [n, 4]."""
    scores: np.ndarray
    """float32 [n]."""
    labels: np.ndarray
    """int64 [n], in 1..C."""

    @property
    def name(self) -> str:
        return self.frame.source.name

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.frame.image.shape[1::-1]


class Writer(Protocol):
    """One kind of result."""

    place: str
    """What it writes, relative to the results folder."""
    in_order: bool
    """Whether frames must be added one after the other."""

    def add(self, found: Found) -> None: ...


class Output:
    """Write results in ``workers`` threads, those of videos in order, until ``stack`` closes."""

    def __init__(self, writers: Sequence[Writer], workers: int, stack: ExitStack) -> None:
        self.writers = writers
        self._in_order = stack.enter_context(ThreadPoolExecutor(1))
        self._pool = stack.enter_context(ThreadPoolExecutor(workers))
        self._pending, self._most = deque[Future](), 2 * workers

    def add(self, found: Found) -> None:
        """Have the detections of a frame written. Wait if too many files are pending."""
        is_image = found.frame.number is None
        for writer in self.writers:
            pool = self._pool if is_image and not writer.in_order else self._in_order
            self._pending.append(pool.submit(writer.add, found))
        self.finish(self._most)

    def finish(self, most: int = 0) -> None:
        """Wait until at most ``most`` files are pending."""
        while len(self._pending) > most:
            self._pending.popleft().result()


def open_writers(
    folder: Path, kinds: Collection[str], sources: Sequence[Source], classes: Sequence[str],
    font: FreeTypeFont, stack: ExitStack,
) -> list[Writer]:  # fmt: skip
    """Return the writers of some kinds: json, csv, voc, yolo, drawn; ``stack`` closes their files.

    Raises:
        UserError: The folder cannot be written, or a writer refuses to replace files.
    """
    check_writable(folder / "detections")
    writers: list[Writer] = []
    # Those that refuse come first: the others replace the results of an earlier call.
    if "drawn" in kinds:
        writers.append(drawings := Drawings(folder, sources, classes, font))
        stack.callback(drawings.close)
    writers += [Annotations(folder, k, sources, classes) for k in ANNOTATIONS if k in kinds]
    if "csv" in kinds:
        writers.insert(0, CsvFile(folder, classes, stack))
    if "json" in kinds:
        writers.insert(0, JsonFiles(folder, sources, classes, stack))
    return writers


# ---------------------------------------------------------------- one file for all images


@contextmanager
def growing(path: Path, start: str, end: str) -> Iterator[BinaryIO]:
    """Open a file that begins with ``start``, ends with ``end``, and takes its place at the end.

    An exception does not discard it: what was detected before is kept.
    """
    with ExitStack() as stack:
        file = stack.enter_context(atomic_write(path))
        file.write(start.encode())
        try:
            yield file
        finally:
            file.write(end.encode())
            stack.close()


class JsonFiles:
    """detections.json in COCO's results format, and images.json with images and categories."""

    place = "detections.json"
    in_order = True

    def __init__(self, folder: Path, sources: Sequence[Source], classes: Sequence[str],
                 stack: ExitStack) -> None:
        self._categories, self._ids, self._count = category_ids(classes), image_ids(sources), 0
        pairs = zip(self._categories, classes, strict=True)
        head = json.dumps([{"id": k, "name": name} for k, name in pairs], ensure_ascii=False)
        head = f'{{"categories": {head},\n"images": ['
        images = growing(folder / "images.json", head, "\n]}\n")
        detections = growing(folder / "detections.json", "[", "\n]\n")
        self._images, self._detections = map(stack.enter_context, (images, detections))
        self._between = {self._images: "\n", self._detections: "\n"}

    def add(self, found: Found) -> None:
        self._count += 1
        number, about = self._ids.get(found.name, self._count), {"file_name": found.name}
        if found.frame.number is not None:
            about |= {"frame": found.frame.number, "time": round(found.frame.time, 3)}
        width, height = found.size
        self._append(self._images, {"id": number, **about, "width": width, "height": height})
        boxes = np.hstack([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2] + 1])
        for box, score, label in zip(boxes, found.scores, found.labels, strict=True):
            record = {"image_id": number, "category_id": self._categories[label - 1]}
            record["bbox"] = [round(float(v), 2) for v in box]
            self._append(self._detections, {**record, "score": round(float(score), 5), **about})

    def _append(self, file: BinaryIO, record: dict) -> None:
        file.write((self._between[file] + json.dumps(record, ensure_ascii=False)).encode())
        self._between[file] = ",\n"


class CsvFile:
    """detections.csv: a line per box with `CSV_HEADER`; frame and time are empty for images."""

    place = "detections.csv"
    in_order = True

    def __init__(self, folder: Path, classes: Sequence[str], stack: ExitStack) -> None:
        head = ",".join(CSV_HEADER) + "\n"
        self._file = stack.enter_context(growing(folder / self.place, head, ""))
        self._classes = classes

    def add(self, found: Found) -> None:
        frame, text = found.frame, io.StringIO()
        when = ("", "") if frame.number is None else (frame.number, f"{frame.time:.3f}")
        csv.writer(text, lineterminator="\n").writerows(
            (found.name, *when, self._classes[k - 1], f"{score:.5f}", *(f"{v:.2f}" for v in box))
            for box, score, k in zip(found.boxes, found.scores, found.labels, strict=True)
        )
        self._file.write(text.getvalue().encode())


def category_ids(classes: Sequence[str]) -> tuple[int, ...]:
    """Return the COCO JSON number of each class: official for COCO's 80 classes, else 1..C."""
    return COCO_IDS if tuple(classes) == COCO_CLASSES else tuple(range(1, len(classes) + 1))


def image_ids(sources: Sequence[Source]) -> dict[str, int]:
    """Return the COCO JSON number of each image by name, or {} if there is a video or camera.

    Images that are named by different numbers, as COCO's are, have these. Others count from 1.
    """
    if any(source.kind != "image" for source in sources):
        return {}
    stems = [os.path.splitext(os.path.basename(source.name))[0] for source in sources]
    numbers = [int(stem) for stem in stems if stem.isdecimal() and len(stem) <= 15]
    if len(set(numbers)) < len(sources):
        numbers = list(range(1, len(sources) + 1))
    return {source.name: k for source, k in zip(sources, numbers, strict=True)}


# ---------------------------------------------------------------- one file per image


class Annotations:
    """One annotation file per image or frame, also without objects, and ``classes.txt``.

    Raises:
        UserError: The folder holds annotations already.
    """

    in_order = False

    def __init__(self, folder: Path, kind: str, sources: Sequence[Source],
                 classes: Sequence[str]) -> None:
        self.place, self._suffix, self._encode = ANNOTATIONS[kind]
        self._folder = folder / self.place
        if self._folder.is_dir() and any(self._folder.iterdir()):
            raise UserError(
                f"{self._folder} holds annotations, which may be corrected by hand; give another "
                "--out, or remove that folder"
            )
        self._classes, self._names = classes, label_names(sources)
        write(folder / kind / "classes.txt", "".join(f"{name}\n" for name in classes).encode())

    def add(self, found: Found) -> None:
        name = self._names[found.name]
        if found.frame.number is not None:
            name += f"/{found.frame.number:06d}"
        write(self._folder / f"{name}{self._suffix}", self._encode(found, self._classes))


def label_names(sources: Sequence[Source]) -> dict[str, str]:
    """Return the annotation file's name without suffix, for each source by name.

    It is the image's name without suffix, as readers expect. Videos keep the suffix, and so do
    images that would else share a file (``a.jpg`` and ``a.png``, ``a.jpg.png`` and ``a.jpg``).
    """
    stems = [os.path.splitext(source.name)[0] for source in sources]
    keys = [stem.casefold() for stem in stems]  # some file systems ignore case
    times = Counter(keys + [source.name.casefold() for source in sources])
    return {
        source.name: stem if source.kind == "image" and times[key] == 1 else source.name
        for source, stem, key in zip(sources, stems, keys, strict=True)
    }


def voc_xml(found: Found, classes: Sequence[str]) -> bytes:
    """Return a VOC annotation with a ``<score>`` per object.

    Boxes are rounded to whole pixels, and are at least two pixels wide and high: readers drop a
    box of one pixel as empty.
    """
    boxes, inside = _clipped(found)
    low = np.minimum(boxes[:, :2].round(), np.array(found.size) - 2)
    high = np.maximum(boxes[:, 2:].round(), low + 1)
    boxes = np.hstack([low, high]).astype(int)
    scores, labels = found.scores[inside], found.labels[inside]
    return voc_annotation(found.name, found.size, [
        (classes[label - 1], box, {"truncated": 0, "difficult": 0, "score": f"{score:.5f}"})
        for box, score, label in zip(boxes, scores, labels, strict=True)
    ])  # fmt: skip


def voc_annotation(
    name: str, size: tuple[int, int],
    objects: Iterable[tuple[str, Sequence[int], Mapping[str, object]]],
) -> bytes:  # fmt: skip
    """Return the VOC XML of an image.

    Args:
        name: The image file, relative, with "/".
        size: Width and height.
        objects: Class name, box in whole pixels, 0-based inclusive (VOC's are 1-based), and further
            tags. Characters that XML does not allow become U+FFFD.
    """
    root = ElementTree.Element("annotation")
    folder, _, file = name.rpartition("/")
    _put(root, folder=folder, filename=file)
    _put(ElementTree.SubElement(root, "size"), width=size[0], height=size[1], depth=3)
    _put(root, segmented=0)
    for label, box, tags in objects:
        element = ElementTree.SubElement(root, "object")
        _put(element, name=label, pose="Unspecified", **tags)
        corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        _put(ElementTree.SubElement(element, "bndbox"), **{key: v + 1 for key, v in corners})
    ElementTree.indent(root)
    return ElementTree.tostring(root, "utf-8") + b"\n"


def _put(parent: ElementTree.Element, **texts: object) -> None:
    for tag, text in texts.items():
        ElementTree.SubElement(parent, tag).text = _NOT_IN_XML.sub("\ufffd", str(text))


def yolo_txt(found: Found, classes: Sequence[str]) -> bytes:
    """Return a line per box: class from 0, then centre, width and height relative to the image."""
    boxes, inside = _clipped(found)
    low, high = boxes[:, :2], boxes[:, 2:] + 1
    relative = np.hstack([(low + high) / 2, high - low]) / (*found.size, *found.size)
    rows = zip(found.labels[inside], relative, strict=True)
    lines = [f"{label - 1} {' '.join(f'{value:.6f}' for value in box)}\n" for label, box in rows]
    return "".join(lines).encode()


def _clipped(found: Found) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes clipped to the image [m, 4], and which of all n are in it: bool [n]."""
    width, height = found.size
    boxes = found.boxes.clip(0, np.array([width, height, width, height]) - 1)
    inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return boxes[inside], inside


ANNOTATIONS = {
    "voc": ("voc/Annotations/", ".xml", voc_xml),
    "yolo": ("yolo/labels/", ".txt", yolo_txt),
}
"""Kind -> folder, suffix, and the function that encodes a file."""


def write(path: Path, data: bytes) -> None:
    with atomic_write(path) as file:
        file.write(data)


# ---------------------------------------------------------------- images and videos with boxes


class Drawings:
    """Images with their boxes, and videos as .mp4, in folders as the sources are.

    Raises:
        UserError: A drawn file would overwrite a source, or another drawn file.
    """

    place = "drawn/"
    in_order = False

    def __init__(self, folder: Path, sources: Sequence[Source], classes: Sequence[str],
                 font: FreeTypeFont) -> None:
        self._folder, self._classes, self._font = folder / self.place, classes, font
        self._video: VideoFile | None = None
        inputs = {real_path(source.path) for source in sources if source.kind != "camera"}
        drawn: dict[Path, Source] = {}
        for source in sources:
            path = self._path(source)
            if real_path(path) in inputs:
                raise UserError(f"{path} would be overwritten; give another --out")
            if (other := drawn.setdefault(path, source)) is not source:
                raise UserError(
                    f"{other.name} and {source.name} would both be drawn as {path}; detect them in "
                    "two calls, with two --out"
                )

    def add(self, found: Found) -> None:
        path = self._path(found.frame.source)
        image = draw(found, self._classes, self._font)
        if found.frame.number is not None:
            if self._video is None or self._video.path != path:
                self.close()
                self._video = VideoFile(path, image.shape[1::-1], found.frame.rate)
            self._video.write(image)
            return
        good, data = cv2.imencode(path.suffix, image)
        if not good:
            raise UserError(f"{path}: OpenCV cannot write this image; give --no-draw")
        write(path, data.tobytes())

    def close(self) -> None:
        """Finish the video that is being written."""
        if self._video is not None:
            self._video.close()
        self._video = None

    def _path(self, source: Source) -> Path:
        name = source.name
        if source.kind != "image":
            name += "" if name.lower().endswith(".mp4") else ".mp4"
        elif Path(name).suffix.lower() not in DRAWN:
            name += ".png"
        return self._folder / name


def draw(found: Found, classes: Sequence[str], font: FreeTypeFont) -> np.ndarray:
    """Return the image with its boxes. A small image is enlarged so that labels are legible."""
    image, boxes = enlarge(found.frame.image, found.boxes)
    return draw_detections(image, boxes, found.labels, found.scores, classes, font)


class VideoFile:
    """An .mp4 file that takes the place of ``path`` when it is closed. Every frame counts once.

    Raises:
        UserError: The file cannot be written.
    """

    def __init__(self, path: Path, size: tuple[int, int], rate: float) -> None:
        self.path, self._size = path, size
        self._part = path.with_name(f".part-{path.name}")  # OpenCV needs the suffix
        check_writable(path)
        # MPEG-4 stores times in units of 1/n s with n below 2^16: a high rate gets few digits.
        rate = round(rate, 3 if rate < 65 else 2 if rate < 655 else 0)
        codec = cv2.VideoWriter_fourcc(*"mp4v")
        self._pad = size[0] % 2, size[1] % 2  # the codec takes no odd side
        even = size[0] + self._pad[0], size[1] + self._pad[1]
        self._writer = cv2.VideoWriter(str(self._part), codec, rate, even)
        if not self._writer.isOpened():
            raise UserError(f"{path}: this OpenCV cannot write mp4; give --no-draw")

    def write(self, image: np.ndarray) -> None:
        if image.shape[1::-1] != self._size:
            image = cv2.resize(image, self._size)
        right, bottom = self._pad
        self._writer.write(cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_REPLICATE))

    def close(self) -> None:
        self._writer.release()
        os.replace(self._part, self.path)
