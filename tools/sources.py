"""Find the sources of detection (images, videos, a camera), and read them ahead in threads."""

import glob
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import groupby, islice, repeat
from pathlib import Path
from typing import NamedTuple, TypeVar

import cv2
import numpy as np

from data.image import read_image
from utils.errors import UserError
from utils.logger import LOGGER, Progress

IMAGES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .bmp .dib .webp .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif".split()
)
VIDEOS = frozenset(
    ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .ts .mts .3gp .ogv .gif".split()
)
WEIGHTS = (".pth", ".safetensors", ".onnx", ".xml")
"""Suffixes of networks."""
RESULTS = {"detections.json", "detections.csv", "images.json"}
"""Files of an earlier call beside its folders of images."""
COPIES = {"drawn", "voc", "yolo", "coco"}
"""Folders of images that a call writes."""
LOG_EVERY = 1000  # images per log line where the output is not a terminal
T = TypeVar("T")


class Source(NamedTuple):
    """An image file, a video file or a camera."""

    path: str | int  # the file, or the number of the camera
    name: str  # unique name in results and messages: the relative path with "/", or "camera_N"
    kind: str  # one of "image", "video", "camera"


class Frame(NamedTuple):
    """An image, or a frame of a video or camera."""

    source: Source
    image: np.ndarray  # BGR uint8 [H, W, 3]
    number: int | None = None  # position in the video, from 0. None for an image.
    time: float = 0.0  # seconds since the start of the video
    rate: float = 0.0  # frames per second of the video


# ---------------------------------------------------------------- finding


def find_sources(words: Sequence[str], out: Path) -> list[Source]:
    """Return the sources that command-line words name: in order, each file once, a camera last.

    - A folder names all images and videos in it, sorted. Hidden files, links to folders, the
      results folder ``out`` and images that an earlier call has drawn are left out.
    - A pattern (``*``, ``?``, ``[``, ``**`` for any depth) names the images and videos it matches.
    - ``camera`` or a number names a camera.

    The suffix tells images and videos; OpenCV tells them for a named file of another suffix. Names
    are relative to the common folder of all files.
    Raises UserError: a word names nothing that can be read, or a second camera.
    """
    files: dict[str, str] = {}  # absolute path -> kind
    roots: set[str] = set()
    cameras: set[int] = set()
    for word in words:
        if not os.path.exists(word) and (word == "camera" or word.isdecimal() and len(word) < 5):
            cameras.add(0 if word == "camera" else int(word))
            continue
        found = {os.path.abspath(path): kind for path in _files(word, out) if (kind := _kind(path))}
        if not found and os.path.isfile(word):  # a named file of another suffix
            if cv2.haveImageReader(word):
                found = {os.path.abspath(word): "image"}
            elif cv2.VideoCapture(word).isOpened():
                found = {os.path.abspath(word): "video"}
        if not found:
            weights = word.lower().endswith(WEIGHTS)
            fix = ("the weights come first, then the images" if weights else
                   "give images (.jpg, .png, ...), videos (.mp4, ...) or a folder of them")
            raise UserError(f"{word} {'is' if weights else 'holds'} no image and no video; {fix}")
        files |= found
        is_folder = os.path.isdir(word)
        roots |= {os.path.abspath(word)} if is_folder else {*map(os.path.dirname, found)}
    if len(cameras) > 1:
        raise UserError(f"cameras {', '.join(map(str, sorted(cameras)))} are given; give one")
    try:
        base = os.path.commonpath(roots) if roots else os.sep
    except ValueError as error:  # Windows
        raise UserError(f"{', '.join(sorted(roots))} are on different drives; give one") from error
    sources = [Source(path, _name(path, base), kind) for path, kind in files.items()]
    return sources + [Source(number, f"camera_{number}", "camera") for number in cameras]


def real_path(path: str | Path) -> str:
    """Return one spelling for all paths to a file or folder, links included. It need not exist."""
    return os.path.normcase(os.path.realpath(path))


def _files(word: str, out: Path) -> Iterable[str]:
    if os.path.isdir(word):
        return _inside(word, out)
    if os.path.isfile(word):
        return [word]
    if os.path.exists(word):
        raise UserError(f"{word} is a pipe or a device; give images, folders, videos or camera")
    if not glob.has_magic(word):
        raise UserError(f"{word} does not exist; give images, folders, videos or camera")
    return sorted(filter(os.path.isfile, glob.glob(word, recursive=True)))


def _inside(folder: str, out: Path) -> Iterator[str]:
    results, told = real_path(out), partial(LOGGER.warning, "left out: %s")
    for place, folders, names in os.walk(folder, onerror=told):
        folders[:] = sorted(
            name for name in folders
            if not name.startswith(".") and real_path(os.path.join(place, name)) != results
        )
        for written in sorted(COPIES & {*folders}) if RESULTS & {*names} else ():
            LOGGER.warning("%s is left out: an earlier call has written it", Path(place, written))
            folders.remove(written)
        yield from (os.path.join(place, n) for n in sorted(names) if not n.startswith("."))


def _kind(path: str) -> str | None:
    suffix = os.path.splitext(path)[1].lower()
    return "image" if suffix in IMAGES else "video" if suffix in VIDEOS else None


def _name(path: str, base: str) -> str:
    """Return the relative path, with escapes for bytes that are not UTF-8."""
    name = Path(path).relative_to(base).as_posix()
    return name.encode("utf-8", "backslashreplace").decode()


# ---------------------------------------------------------------- reading


class Reader:
    """Read sources in order, in batches; a camera always gives batches of one.

    ``workers`` threads read images ahead of their use. What cannot be read is reported, counted
    as ``broken`` and skipped. ``images`` and ``frames`` count those in the batches so far.
    """

    def __init__(self, sources: Sequence[Source], batch_size: int, workers: int) -> None:
        self.images = self.frames = self.broken = 0
        self._sources, self._size, self._workers = sources, batch_size, workers

    def batches(self) -> Iterator[list[Frame]]:
        """Yield batches of one or more frames. Images and videos do not mix in a batch.

        Raises UserError: the camera cannot be opened.
        """
        for is_image, group in groupby(self._sources, lambda source: source.kind == "image"):
            if is_image:
                yield from self._read_images(list(group))
            else:
                for source in group:
                    yield from self._read_video(source)

    def _read_images(self, sources: Sequence[Source]) -> Iterator[list[Frame]]:
        progress = Progress("detect", len(sources), LOG_EVERY)
        jobs = (partial(read_image, source.path) for source in sources)
        ahead = run_ahead(jobs, self._workers, self._size + self._workers)
        with closing(progress), closing(ahead) as futures:
            pairs = zip(sources, futures, strict=True)
            while group := list(islice(pairs, self._size)):
                batch = []
                for source, future in group:
                    try:
                        batch.append(Frame(source, future.result()))
                    except UserError as error:
                        progress.close()
                        self._skip(str(error))
                self.images += len(batch)
                if batch:
                    yield batch
                for _ in group:
                    progress.update(1)

    def _read_video(self, source: Source) -> Iterator[list[Frame]]:
        is_camera = source.kind == "camera"
        if not is_camera and not os.path.isfile(source.path):  # a pipe would block
            return self._skip(f"{source.path}: not a file")
        capture = cv2.VideoCapture(source.path)
        if is_camera and not capture.isOpened():
            why = "is it connected, in use by another program, or has it another number?"
            raise UserError(f"{source.name} cannot be opened; {why}")
        if is_camera:  # the frames must be new; not every driver obeys
            capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        stated, seen = capture.get(cv2.CAP_PROP_FRAME_COUNT), 0
        total = int(stated) if not is_camera and 0 < stated < 1e9 else 0
        progress = Progress(source.name, total, LOG_EVERY)
        try:
            with closing(read_frames(source, capture)) as frames:
                while batch := list(islice(frames, 1 if is_camera else self._size)):
                    seen += len(batch)
                    self.frames += len(batch)
                    yield batch
                    for _ in batch if total else ():
                        progress.update(1)
        finally:
            capture.release()
            progress.close()
        if not seen:
            self._skip(f"{source.path}: not a video of which OpenCV can read a frame")
        elif seen < total:
            LOGGER.warning("%s ends after %d of the %d frames it states", source.name, seen, total)

    def _skip(self, reason: str) -> None:
        self.broken += 1
        print(f"skipped: {reason}", file=sys.stderr)


def run_ahead(jobs: Iterable[Callable[[], T]], workers: int, most: int) -> Iterator[Future[T]]:
    """Run jobs in threads and yield their futures in order, with up to ``most`` jobs under way."""
    jobs, pending = iter(jobs), deque[Future[T]]()
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                pending += [pool.submit(job) for job in islice(jobs, most - len(pending))]
                if not pending:
                    return
                yield pending.popleft()
        finally:
            for future in pending:
                future.cancel()


def read_frames(source: Source, capture: cv2.VideoCapture) -> Iterator[Frame]:
    """Yield the frames of a video or camera until none is left."""
    rate, start = capture.get(cv2.CAP_PROP_FPS), time.monotonic()
    if not (math.isfinite(rate) and 0.01 < rate <= 1000):
        rate = 25.0
    before = -1.0
    # Only a file is decoded ahead of its use.
    ahead = 1 if source.kind == "camera" else 4
    with closing(run_ahead(repeat(partial(_read, capture)), 1, ahead)) as futures:
        for number, future in enumerate(futures):
            image, seconds = future.result()
            if image is None:
                return
            if source.kind == "camera":
                seconds = time.monotonic() - start
            elif not (math.isfinite(seconds) and seconds > before):
                seconds = number / rate  # some containers store no times, or not all
            before = seconds
            yield Frame(source, image, number, seconds, rate)


def _read(capture: cv2.VideoCapture) -> tuple[np.ndarray | None, float]:
    """Return the next frame, or None at the end, and its time in seconds."""
    good, image = capture.read()
    return image if good else None, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
