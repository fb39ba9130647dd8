"""What detection writes: JSON and CSV, drawn images and videos.

Boxes are (x1, y1, x2, y2) in pixels, 0-based, both ends inside the box. They are those of the
detector, which may reach outside the image.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np
from PIL.ImageFont import FreeTypeFont

from data.config import COCO_CLASSES
from inference.draw import draw_detections, enlarge
from inference.origins import Origin
from tools.sources import Frame, Source, real_path
from utils.errors import UserError
from utils.files import atomic_write, check_writable, csv_bytes

# COCO numbers its 80 categories up to 90, without ten of these numbers.
COCO_IDS = tuple(sorted({*range(1, 91)} - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))
CSV_HEADER = ("file", "frame", "time", "class", "score", "x1", "y1", "x2", "y2")
DRAWN = frozenset(".jpg .jpeg .jpe .png .bmp .dib .webp .tif .tiff .ppm".split())
"""Suffixes that a drawn image keeps: every OpenCV can write colours to such files."""


class Found(NamedTuple):
    """The detections of a frame, best score first; n may be 0."""

    frame: Frame
    boxes: np.ndarray  # float64 [n, 4]
    scores: np.ndarray  # float32 [n]
    labels: np.ndarray  # int64 [n], in 1..C
    origins: Sequence[Origin] = ()  # n, or none if not asked for

    @property
    def name(self) -> str:
        return self.frame.source.name

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.frame.image.shape[1::-1]


class Writer(Protocol):
    """One kind of result."""

    place: str  # what it writes, relative to the results folder
    in_order = False
    """Whether it is one file for all images: frames must be added one after the other."""

    def add(self, found: Found) -> None: ...

    def close(self) -> None:
        """Finish the files that are being written."""


class Output:
    """A context in which results are written in ``workers`` threads, those of videos in order.

    A file of one image that cannot be written is reported, counted as ``unwritten`` and skipped.
    """

    def __init__(self, writers: Sequence[Writer], workers: int) -> None:
        self.writers, self.unwritten = writers, 0
        self._in_order, self._pool = ThreadPoolExecutor(1), ThreadPoolExecutor(workers)
        self._pending, self._most = deque[tuple[Writer, Future]](), 2 * workers

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            with self._in_order, self._pool:
                if kind is None:
                    self._finish()
        finally:  # what was done is kept, also if one writer fails
            with ExitStack() as stack:
                for writer in self.writers:  # closes the last first: a failed video leaves room
                    stack.callback(self._try, writer, writer.close)

    def add(self, found: Found) -> None:
        """Have the detections of a frame written. Wait if too many files are pending.

        Raises UserError if the disk is full, or a file of all images cannot be written.
        """
        is_image = found.frame.number is None
        for writer in self.writers:
            pool = self._pool if is_image and not writer.in_order else self._in_order
            self._pending.append((writer, pool.submit(writer.add, found)))
        self._finish(self._most)

    def _finish(self, most: int = 0) -> None:
        while len(self._pending) > most:
            writer, future = self._pending.popleft()
            self._try(writer, future.result)

    def _try(self, writer: Writer, do: Callable[[], None]) -> None:
        try:
            do()
        except UserError as error:
            if writer.in_order or getattr(error.__cause__, "errno", 0) == errno.ENOSPC:
                raise
            self.unwritten += 1
            print(f"not written: {error}", file=sys.stderr)


def inside(folder: Path, name: str) -> Path:
    """Return a path in the results folder; raise UserError if a link leads out of it."""
    path = folder / name
    if not Path(real_path(path.parent)).is_relative_to(real_path(folder)):
        raise UserError(f"{path} lies outside {folder}; remove the link, or give another --out")
    return path


def write(folder: Path, name: str, data: bytes) -> None:
    with atomic_write(inside(folder, name)) as file:
        file.write(data)


def write_image(folder: Path, name: str, image: np.ndarray) -> None:
    try:
        good, data = cv2.imencode(os.path.splitext(name)[1], image)
    except cv2.error:  # such as of more pixels than the format takes
        good = False
    if not good:
        raise UserError(f"{folder / name}: OpenCV cannot write this image; give --no-draw")
    write(folder, name, data.tobytes())


# ---------------------------------------------------------------- one file for all images


class JsonFiles(Writer):
    """detections.json in COCO's results format, and images.json with images and categories."""

    place, in_order = "detections.json", True

    def __init__(self, folder: Path, sources: Sequence[Source], classes: Sequence[str]) -> None:
        self._out, self._ids = folder, image_ids(sources)
        self._categories = categories(classes)
        # Texts need a quarter of the memory of the records.
        self._images: list[str] = []
        self._detections: list[str] = []
        for name in ("images.json", self.place):
            check_writable(folder / name)

    def add(self, found: Found) -> None:
        about = {"file_name": found.name}
        number = self._ids.get(found.name, len(self._images) + 1)
        if found.frame.number is not None:
            about |= {"frame": found.frame.number, "time": round(found.frame.time, 3)}
        width, height = found.size
        self._images.append(_json({"id": number, **about, "width": width, "height": height}))
        for k, label in enumerate(found.labels):
            record = {"image_id": number, "category_id": self._categories[label - 1]["id"],
                      "bbox": bbox(found.boxes[k]), "score": round(float(found.scores[k]), 5)}
            prior = {"prior": _prior(found.origins[k])} if found.origins else {}
            self._detections.append(_json({**record, **about, **prior}))

    def close(self) -> None:
        images, detections = map(",\n".join, (self._images, self._detections))
        head = f'{{"categories": {_json(self._categories)},\n"images": [\n'
        write(self._out, "images.json", f"{head}{images}\n]}}\n".encode())
        write(self._out, self.place, f"[\n{detections}\n]\n".encode())


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def bbox(box: Sequence[float], last: int = 1) -> list[float]:
    """Return a box as COCO's x, y, width and height, to two decimals; ``last`` is added to sides.

    As in the published results, the last pixel counts. A prior box has no last pixel.
    """
    x1, y1, x2, y2 = box
    return [round(float(v), 2) for v in (x1, y1, x2 - x1 + last, y2 - y1 + last)]


def _prior(origin: Origin) -> dict[str, object]:
    values = origin._asdict()
    box, _ = values.pop("box"), values.pop("cell")
    return {**{key: round(value, 4) for key, value in values.items()}, "bbox": bbox(box, last=0)}


class CsvFile(Writer):
    """detections.csv: a line per box with `CSV_HEADER`; frame and time are empty for images."""

    place, in_order = "detections.csv", True

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self._out, self._classes, self._lines = folder, classes, [csv_bytes([CSV_HEADER])]
        check_writable(folder / self.place)

    def add(self, found: Found) -> None:
        frame = found.frame
        when = ("", "") if frame.number is None else (frame.number, f"{frame.time:.3f}")
        self._lines.append(csv_bytes(
            (found.name, *when, self._classes[k - 1], f"{score:.5f}", *(f"{v:.2f}" for v in box))
            for box, score, k in zip(found.boxes, found.scores, found.labels, strict=True)
        ))

    def close(self) -> None:
        write(self._out, self.place, b"".join(self._lines))


def categories(classes: Sequence[str]) -> list[dict]:
    """Return COCO's records of the classes: official numbers for COCO's 80, else from 1."""
    ids = COCO_IDS if tuple(classes) == COCO_CLASSES else range(1, len(classes) + 1)
    return [{"id": k, "name": name} for k, name in zip(ids, classes, strict=True)]


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


# ---------------------------------------------------------------- images and videos with boxes


class Drawings(Writer):
    """Images with their boxes, and videos as .mp4, in folders as the sources are.

    Raises UserError if a drawn file would overwrite a source, or another drawn file.
    """

    place = "drawn/"

    def __init__(self, folder: Path, sources: Sequence[Source], classes: Sequence[str],
                 font: FreeTypeFont) -> None:
        self._out, self._classes, self._font = folder, classes, font
        self._video: VideoFile | None = None
        self._refused: set[Path] = set()
        inputs = {real_path(source.path) for source in sources if source.kind != "camera"}
        drawn: dict[Path, Source] = {}
        for source in sources:
            path = folder / self._name(source)
            if real_path(path) in inputs:
                raise UserError(f"{path} would be overwritten; give another --out")
            if (other := drawn.setdefault(path, source)) is not source:
                raise UserError(f"{other.name} and {source.name} would both be drawn as {path}; "
                                "detect them in two calls, with two --out")

    def add(self, found: Found) -> None:
        name = self._name(found.frame.source)
        image, path = draw(found, self._classes, self._font), inside(self._out, name)
        if found.frame.number is None:
            write_image(self._out, name, image)
        elif path not in self._refused:
            if self._video is not None and self._video.path != path:
                self.close()
            try:
                size = image.shape[1::-1]
                self._video = self._video or VideoFile(path, size, found.frame.rate)
            except UserError:
                self._refused.add(path)
                raise
            self._video.write(image)

    def close(self) -> None:
        video, self._video = self._video, None
        if video is not None:
            video.close()

    def _name(self, source: Source) -> str:
        name = self.place + source.name
        if source.kind != "image":
            return name if name.lower().endswith(".mp4") else f"{name}.mp4"
        return name if Path(name).suffix.lower() in DRAWN else f"{name}.png"


def draw(found: Found, classes: Sequence[str], font: FreeTypeFont) -> np.ndarray:
    """Return the image with its boxes. A small image is enlarged so that labels are legible."""
    n = len(found.boxes)
    more = [box for origin in found.origins for box in (origin.box, origin.cell)]
    image, boxes = enlarge(found.frame.image, np.vstack([found.boxes, *more]))
    return draw_detections(image, boxes[:n], found.labels, found.scores, classes, font,
                           boxes[n:].reshape(-1, 2, 4))


class VideoFile:
    """An .mp4 file that takes the place of ``path`` when it is closed; UserError if it cannot."""

    def __init__(self, path: Path, size: tuple[int, int], rate: float) -> None:
        self.path, self._size = path, size
        check_writable(path)
        # OpenCV needs the suffix; the name of the video may be as long as the disk allows.
        self._part = path.with_name(f".part-{zlib.crc32(os.fsencode(path.name)):08x}.mp4")
        self._part.unlink(missing_ok=True)
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
        if not cv2.VideoCapture(str(self._part)).isOpened():  # OpenCV tells no failed write
            self._part.unlink(missing_ok=True)  # other results may need its room
            raise UserError(f"{self.path} could not be written whole; make room, or give --no-draw")
        os.replace(self._part, self.path)
