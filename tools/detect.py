"""Detect objects in pictures, folders, videos or before a camera; draw them, write them down.

    python -m tools.detect WEIGHTS SOURCE... [--out DIR] [--save json csv voc yolo] [--no-draw]

WEIGHTS is a checkpoint (.pth, .safetensors) or an exported network (.onnx, .xml). SOURCE is a
picture, a folder, a quoted pattern, a video, a camera ("camera" or its number), or - for a list of
files on standard input. docs/detect.md shows the way from weights to boxes.

Exit status: 0 done; 1 something could not be read (named; the rest is done), or unexpected failure;
2 bad usage or bad input; 130 interrupted (what was done is kept).
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice, repeat
from pathlib import Path

import cv2
import numpy as np
import torch

from data.classes import parse_classes
from data.image import read_image
from inference.draw import draw_caption, draw_detections, enlarge
from inference.fonts import Lettering
from inference.predictor import Predictor
from layers.detect import SUPPRESSION
from tools.outputs import Found, voc_xml, write_csv, write_json, yolo_txt
from tools.sources import Source, find_sources, image_ids, label_names, real_path
from utils.arguments import cores, count, fraction, positive
from utils.device import AMP_TYPES
from utils.errors import UserError, command
from utils.files import atomic_write, check_writable
from utils.logger import LOGGER, Progress, close_logging, setup_logging

THRESHOLD = 0.4
"""Default of --score_threshold: for people. A score is computed from nearly all boxes, 0.02."""
STREAMS = {"json": write_json, "csv": write_csv}
LABELS = {
    "voc": ("voc/Annotations", ".xml", voc_xml),
    "yolo": ("yolo/labels", ".txt", yolo_txt),
    "yolo_scored": ("yolo/labels", ".txt", partial(yolo_txt, scored=True)),
}
DRAWN = frozenset(".jpg .jpeg .jpe .png .bmp .dib .webp .tif .tiff .ppm".split())
"""Ends of names that a drawn picture keeps: every OpenCV writes colours to them."""
WINDOW = "detections (q: quit)"


@dataclass(frozen=True)
class Frame:
    """A picture of a source, decoded."""

    source: Source
    image: np.ndarray
    number: int | None = None
    time: float | None = None


class Stop:
    """Ctrl-C and SIGTERM as a wish that a loop sees where all it has written is whole.

    A second one does what it usually does.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Stop:
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        self.asked = True
        signal.signal(number, self._before[number])


@dataclass
class Counts:
    """What became of the sources."""

    pictures: int = 0
    videos: int = 0
    frames: int = 0
    objects: int = 0
    broken: int = 0


# ---------------------------------------------------------------- what goes in


def early(jobs: Iterable[Callable], pool: ThreadPoolExecutor, most: int) -> Iterator[Future]:
    """The futures of jobs, in their order; up to ``most`` are at work before they are asked for."""
    jobs, pending = iter(jobs), deque()
    try:
        while True:
            pending += [pool.submit(job) for job in islice(jobs, most - len(pending))]
            if not pending:
                return
            yield pending.popleft()
    finally:
        for future in pending:
            future.cancel()


def read_pictures(
    sources: Sequence[Source], pool: ThreadPoolExecutor, most: int, broken: Callable[[str], None]
) -> Iterator[Frame]:
    """The pictures that can be read; ``broken`` is told of the others."""
    with closing(early((partial(read_image, s.path) for s in sources), pool, most)) as futures:
        for source, future in zip(sources, futures, strict=True):
            try:
                image = future.result()
            except UserError as error:
                broken(str(error))
            else:
                yield Frame(source, image)


def open_video(source: Source) -> cv2.VideoCapture:
    """UserError where there is nothing to see."""
    capture = cv2.VideoCapture(source.path)
    if not capture.isOpened():
        if source.kind == "camera":
            raise UserError(
                f"{source.name} cannot be opened; is the camera connected, in use by another "
                "program, or has it another number or address?"
            )
        raise UserError(f"{source.path}: not a video that OpenCV can read")
    if source.kind == "camera":
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # where the driver can
    return capture


def read_video(source: Source, capture: cv2.VideoCapture) -> Iterator[Frame]:
    """The frames that can be read; the next is decoded while one is looked at."""
    start, rate = time.monotonic(), frame_rate(capture)

    def read() -> tuple[np.ndarray | None, float]:
        good, image = capture.read()
        if source.kind == "camera":
            return image if good else None, time.monotonic() - start
        return image if good else None, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000

    # One thread, as a capture is no more than one position; a camera's frames are not to be old.
    with ThreadPoolExecutor(1) as pool:
        with closing(early(repeat(read), pool, 2 if source.kind == "camera" else 4)) as futures:
            before = -1.0
            for number, future in enumerate(futures):
                image, when = future.result()
                if image is None:
                    return
                # Some containers have no times, or just those of some frames.
                if not (math.isfinite(when) and when > before):
                    when = number / rate
                before = when
                yield Frame(source, image, number, when)


def frame_rate(capture: cv2.VideoCapture) -> float:
    """Of a video, 25 where it says none that could be."""
    rate = capture.get(cv2.CAP_PROP_FPS)
    return rate if math.isfinite(rate) and 0.01 < rate <= 1000 else 25.0


def batches(frames: Iterator[Frame], size: int, stop: Stop) -> Iterator[list[Frame]]:
    while not stop.asked and (batch := list(islice(frames, size))):
        yield batch


# ---------------------------------------------------------------- what comes out


class VideoFile:
    """A video that takes the place of ``path`` when it is closed; opened with the first frame.

    ``steady``: every frame is written once, whatever its time; else frames are repeated or left
    out to keep to their times, as a camera's must be: they come as fast as the network works.
    """

    def __init__(self, path: Path, rate: float, steady: bool) -> None:
        self.path = path
        self._part = path.with_name(f".part-{path.name}")  # OpenCV goes by the suffix
        # MPEG-4 counts time in 1/n of a second, and n below 2^16: few digits of a high rate.
        self._rate = round(rate, 3 if rate < 65 else 2 if rate < 655 else 0)
        self._steady = steady
        self._writer: cv2.VideoWriter | None = None
        self._count = 0

    def write(self, image: np.ndarray, when: float) -> None:
        # The codec takes even sides only.
        high, wide = (side % 2 for side in image.shape[:2])
        if high or wide:
            image = cv2.copyMakeBorder(image, 0, high, 0, wide, cv2.BORDER_REPLICATE)
        if self._writer is None:
            check_writable(self.path)
            codec = cv2.VideoWriter_fourcc(*"mp4v")
            self._size = image.shape[1::-1]
            writer = cv2.VideoWriter(str(self._part), codec, self._rate, self._size)
            if not writer.isOpened():
                raise UserError(f"{self.path}: this OpenCV cannot write mp4; give --no-draw")
            self._writer = writer
        if image.shape[1::-1] != self._size:
            image = cv2.resize(image, self._size)
        times = 1 if self._steady else max(int(when * self._rate) + 1 - self._count, 0)
        for _ in range(times):
            self._writer.write(image)
        self._count += times

    def close(self) -> None:
        if self._writer is not None:
            self._writer.release()
            os.replace(self._part, self.path)


class Output:
    """The folder of results: what is drawn, and what is written down, as asked for.

    A file that is there is replaced, but for annotations, which are not. Drawing and encoding go on
    in threads; ``finish`` waits.
    """

    def __init__(
        self, folder: Path, args: argparse.Namespace, predictor: Predictor,
        sources: Sequence[Source], pool: ThreadPoolExecutor, stack: ExitStack,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.draws = args.draw
        self.classes = predictor.info.classes
        self.letters = letters_for(self.classes, args.font)
        self._check_sources(sources)
        check_writable(folder / "detections")
        self._saved = [LABELS[kind] for kind in dict.fromkeys(args.save) if kind in LABELS]
        for place, *_ in self._saved:
            if (folder / place).is_dir() and any((folder / place).iterdir()):
                raise UserError(
                    f"{folder / place} holds annotations, which somebody may have corrected; give "
                    "another --out, or remove that folder"
                )
        self._labels, self._ids, self._next = label_names(sources), image_ids(sources), 1
        self._pool, self._pending = pool, deque()
        self._most = 2 * args.workers
        for place in {place.split("/")[0] for place, *_ in self._saved}:
            with atomic_write(folder / place / "classes.txt") as file:
                file.write("".join(f"{name}\n" for name in self.classes).encode())
        self._streams = [
            stack.enter_context(STREAMS[kind](folder, self.classes))
            for kind in dict.fromkeys(args.save)
            if kind in STREAMS
        ]
        # One after the other, unlike pictures.
        self._video_pool = stack.enter_context(ThreadPoolExecutor(1))
        self._video: VideoFile | None = None

    def _check_sources(self, sources: Sequence[Source]) -> None:
        """UserError where a drawn picture would take the place of one that is looked at, or of
        another drawn one (of a.pgm that of a.pgm.png)."""
        if not self.draws:
            return
        paths = {real_path(source.path) for source in sources if source.kind != "camera"}
        drawn: dict[Path, Source] = {}
        for source in sources:
            path = self._drawn(source)
            if real_path(path) in paths:
                raise UserError(f"{path} would be overwritten; give another --out")
            if (other := drawn.setdefault(path, source)) is not source:
                raise UserError(
                    f"{other.name} and {source.name} would both be drawn as {path}; detect them in "
                    "two calls, with two --out"
                )

    def _drawn(self, source: Source) -> Path:
        name = source.name
        if source.kind != "picture":
            name += "" if name.lower().endswith(".mp4") else ".mp4"
        elif Path(name).suffix.lower() not in DRAWN:
            name += ".png"
        return self.folder / "drawn" / name

    def add(self, frame: Frame, boxes: dict[str, np.ndarray]) -> None:
        """Write the detections of a picture down, and have it drawn."""
        source = frame.source
        number = self._ids.get(source.name, self._next)
        self._next += 1
        found = Found(
            source.name, number, frame.image.shape[1::-1], boxes["boxes"].astype(np.float64),
            boxes["scores"], boxes["labels"], frame.number, frame.time,
        )  # fmt: skip
        for add in self._streams:
            add(found)
        name = self._labels[source.name]
        if frame.number is not None:
            name += f"/{frame.number:06d}"
        for place, suffix, write in self._saved:
            path = self.folder / place / f"{name}{suffix}"
            self._later(self._pool, lambda p=path, w=write: _write(p, w(found, self.classes)))
        if not self.draws:
            return
        if frame.number is None:
            self._later(self._pool, lambda: self._draw_picture(self._drawn(source), frame, boxes))
        else:
            video = self._video
            self._later(
                self._video_pool,
                lambda: video.write(draw(frame, boxes, self.classes, self.letters), frame.time),
            )

    def _draw_picture(self, path: Path, frame: Frame, boxes: dict) -> None:
        good, data = cv2.imencode(path.suffix, draw(frame, boxes, self.classes, self.letters))
        if not good:
            raise UserError(f"{path}: OpenCV cannot write the picture; give --no-draw")
        _write(path, data.tobytes())

    def _later(self, pool: ThreadPoolExecutor, job: Callable) -> None:
        self._pending.append(pool.submit(job))
        while len(self._pending) > self._most:
            self._pending.popleft().result()

    def finish(self) -> None:
        """Wait for all that is under way."""
        while self._pending:
            self._pending.popleft().result()

    @contextmanager
    def video(self, source: Source, capture: cv2.VideoCapture) -> Iterator[None]:
        """Frames that are added inside belong to this source."""
        steady = source.kind == "video"
        self._video = VideoFile(self._drawn(source), frame_rate(capture), steady)
        try:
            yield
        finally:  # behind the frames that wait to be written
            self._video_pool.submit(self._video.close).result()

    def files(self, kinds: Sequence[str], videos: int, pictures: int) -> str:
        """Where results are, for the last line."""
        names = [f"detections.{kind}" for kind in kinds if kind in STREAMS]
        names += sorted({f"{place}/" for place, *_ in self._saved})
        names += ["drawn/"] if self.draws and videos + pictures else []
        return f"{self.folder}: {', '.join(names)}" if names else ""


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as file:
        file.write(data)


def letters_for(classes: Sequence[str], font: str | None) -> Lettering | None:
    """Fonts for names that are not ASCII; a warning if there are none."""
    if all(name.isascii() for name in classes):
        return None
    letters = Lettering(classes, font)
    if letters.missing:
        LOGGER.warning(
            'no font here has "%s" of the class names, drawn as ?; give one that does with --font',
            letters.missing,
        )
    return letters


def draw(
    frame: Frame, boxes: dict, classes: Sequence[str], letters: Lettering | None
) -> np.ndarray:
    """The picture, a small one enlarged, with its boxes."""
    image, at = enlarge(frame.image, boxes["boxes"])
    return draw_detections(image, at, boxes["labels"], boxes["scores"], classes, letters)


class Window:
    """What --live shows."""

    def __init__(self) -> None:
        desktop = sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & set(
            os.environ
        )
        if not desktop:  # OpenCV's window would end the process
            raise UserError("--live needs a display, and there is none; leave it out")
        try:
            cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL)
        except cv2.error as error:
            raise UserError(
                "--live needs an OpenCV with windows: pip uninstall opencv-python-headless, then "
                "pip install opencv-python"
            ) from error
        self._shown = time.monotonic()
        self._seconds = 0.0

    def show(self, image: np.ndarray) -> bool:
        """Show a picture and how many there are a second; False once it was closed."""
        now = time.monotonic()
        took, self._shown = now - self._shown, now
        self._seconds = 0.9 * self._seconds + 0.1 * took if self._seconds else took
        draw_caption(image, f"{1 / max(self._seconds, 1e-3):.1f} fps")
        cv2.imshow(WINDOW, image)
        key = cv2.waitKey(1) & 0xFF
        return key not in (ord("q"), 27) and (
            cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE) >= 1
        )

    def close(self) -> None:
        cv2.destroyAllWindows()


# ---------------------------------------------------------------- in between


class Detector:
    """A predictor that tells in a sentence what is not finite, and gives arrays."""

    def __init__(self, args: argparse.Namespace) -> None:
        path = Path(args.weights)
        options = {
            "device": args.device,
            "amp": args.amp,
            "classes": parse_classes(args.classes) if args.classes else None,
            "max_detections": args.max_detections,
            "nms": args.nms,
            "class_agnostic": args.class_agnostic,
        }
        self.predictor = Predictor(path, score_threshold=args.score_threshold, **options)
        if args.score_threshold is None:  # to look at, fewer than to score; a file may want fewer
            config = self.predictor.config
            least = max(THRESHOLD, config.conf_thresh)
            self.predictor.config = replace(config, conf_thresh=least)

    def __call__(self, frames: Sequence[Frame]) -> list[dict[str, np.ndarray]]:
        try:
            found = self.predictor([frame.image for frame in frames])
        except FloatingPointError as error:
            raise UserError(
                f"the network's output is not finite ({error}); its weights have diverged, or "
                "their file is damaged"
            ) from error
        return [{key: each[key].numpy() for key in ("boxes", "scores", "labels")} for each in found]


def detect(args: argparse.Namespace) -> int:
    """Do what the command line asks for; the exit status."""
    # Of live pictures nothing is kept unless a folder for it is named.
    keeps = not args.live or args.out is not None
    folder = Path(args.out or Path("runs", "detect", Path(args.weights).stem))
    sources, repeated = find_sources(args.sources or (["camera"] if args.live else []), folder)
    if args.live and any(source.kind == "picture" for source in sources):
        raise UserError("--live shows cameras and videos; leave it out for pictures")
    counts = Counts()
    with ExitStack() as stack:
        window = stack.enter_context(closing(Window())) if args.live else None
        detector = Detector(args)
        info = detector.predictor.info
        LOGGER.info(
            "%s %d, %d classes, on %s, scores over %g: %s", info.version, info.size,
            len(info.classes), detector.predictor.device,
            detector.predictor.config.conf_thresh,
            ", ".join(_amounts(sources, repeated)),
        )  # fmt: skip
        start = time.monotonic()
        # Entered first: until all is written, Ctrl-C ends nothing by force.
        stop = stack.enter_context(Stop())
        files = stack.enter_context(ExitStack())
        pool = stack.enter_context(ThreadPoolExecutor(args.workers))
        output = None
        if keeps:
            output = Output(folder, args, detector.predictor, sources, pool, files)
        letters = output.letters if output else letters_for(info.classes, args.font)
        for pictures, group in groupby(sources, lambda source: source.kind == "picture"):
            if pictures:
                on_pictures(list(group), detector, args, pool, stop, output, counts)
                continue
            for source in group:
                if not stop.asked:
                    on_video(source, detector, args, stop, output, window, letters, counts)
        if output:
            output.finish()
    if stop.asked:
        print("interrupted", file=sys.stderr)
    done = [_amount(counts.pictures, "picture")] if counts.pictures or not counts.videos else []
    if counts.videos:
        done += [f"{_amount(counts.videos, 'video')} ({_amount(counts.frames, 'frame')})"]
    done += [f"{counts.broken} that could not be read"] if counts.broken else []
    LOGGER.info(
        "%s: %s in %.1f s",
        ", ".join(done),
        _amount(counts.objects, "object"),
        time.monotonic() - start,
    )
    if not counts.objects and counts.pictures + counts.frames and not stop.asked:
        LOGGER.info(
            "no score is over %g: --score_threshold says what counts",
            detector.predictor.config.conf_thresh,
        )
    if output and (where := output.files(args.save, counts.videos, counts.pictures)):
        LOGGER.info("%s", where)
    return 130 if stop.asked else int(counts.broken > 0)


def _amounts(sources: Sequence[Source], repeated: int) -> Iterator[str]:
    for kind in ("picture", "video", "camera"):
        if number := sum(source.kind == kind for source in sources):
            yield _amount(number, kind)
    if repeated:
        yield f"{repeated} named more than once"


def _amount(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def on_pictures(
    sources: Sequence[Source], detector: Detector, args: argparse.Namespace,
    pool: ThreadPoolExecutor, stop: Stop, output: Output, counts: Counts,
) -> None:  # fmt: skip
    progress = Progress("detect", len(sources), args.log_pictures)

    def broken(reason: str) -> None:
        counts.broken += 1
        progress.close()
        print(f"skipped: {reason}", file=sys.stderr)
        progress.update(1)

    most = args.batch + args.workers
    with closing(read_pictures(sources, pool, most, broken)) as frames:
        for batch in batches(frames, args.batch, stop):
            for frame, boxes in zip(batch, detector(batch), strict=True):
                output.add(frame, boxes)
                counts.pictures += 1
                counts.objects += len(boxes["scores"])
                progress.update(1)
    progress.close()


def on_video(
    source: Source, detector: Detector, args: argparse.Namespace, stop: Stop,
    output: Output | None, window: Window | None, letters: Lettering | None, counts: Counts,
) -> None:  # fmt: skip
    try:
        capture = open_video(source)
    except UserError as error:
        if source.kind == "camera":
            raise
        counts.broken += 1
        print(f"skipped: {error}", file=sys.stderr)
        return
    stated = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    total = int(stated) if source.kind == "video" and 0 < stated < 1e9 else 0
    progress = Progress(source.name, total, args.log_pictures) if total and not window else None
    size = 1 if window or source.kind == "camera" else args.batch
    before, closed = counts.frames, False
    with ExitStack() as stack:
        stack.callback(capture.release)
        frames = stack.enter_context(closing(read_video(source, capture)))
        if output:
            stack.enter_context(output.video(source, capture))
        for batch in batches(frames, size, stop):
            for frame, boxes in zip(batch, detector(batch), strict=True):
                if output:
                    output.add(frame, boxes)
                counts.frames += 1
                counts.objects += len(boxes["scores"])
                if progress:
                    progress.update(1)
                if window:
                    drawn = draw(frame, boxes, detector.predictor.info.classes, letters)
                    closed = not window.show(drawn)
            if closed:
                break
    if progress:
        progress.close()
    seen = counts.frames - before
    if not seen and not stop.asked:
        counts.broken += 1
        print(f"skipped: {source.name}: no frame of it can be read", file=sys.stderr)
        return
    counts.videos += 1
    if seen < total and not (stop.asked or closed):
        LOGGER.warning("%s ends after %d of the %d frames it states", source.name, seen, total)


# ---------------------------------------------------------------- command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m tools.detect", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    # fmt: off
    p.add_argument("weights", metavar="WEIGHTS",
                   help="a checkpoint (.pth, .safetensors) or an exported network (.onnx, .xml)")
    p.add_argument("sources", metavar="SOURCE", nargs="*",
                   help="picture, folder (with all in it), quoted pattern, video, camera or its "
                        "number, address of a stream, or - for a list on standard input")
    g = p.add_argument_group("results")
    g.add_argument("--out", metavar="DIR",
                   help="folder (default: runs/detect/NAME, as the weights are called)")
    g.add_argument("--save", nargs="*", choices=[*STREAMS, *LABELS], default=["json", "csv"],
                   metavar="KIND",
                   help="json (COCO), csv, voc, yolo, yolo_scored (default: json csv)")
    g.add_argument("--draw", action=argparse.BooleanOptionalAction, default=True,
                   help="draw pictures and videos with their boxes")
    g.add_argument("--live", action="store_true",
                   help="show a camera or a video in a window; kept only with --out")
    g.add_argument("--font", metavar="FILE", help="for class names (default: one that has them)")
    g = p.add_argument_group("detections")
    g.add_argument("--score_threshold", type=fraction, metavar="X",
                   help=f"lowest score of a detection (default: {THRESHOLD}, or more where an "
                        "exported file was made with more)")
    g.add_argument("--max_detections", type=positive, metavar="N",
                   help="most of a picture (default: 300 VOC, 200 COCO)")
    g.add_argument("--classes", metavar="NAMES", help="a,b,c or a file, for weights without names")
    g.add_argument("--nms", choices=SUPPRESSION, default="hard",
                   help="what becomes of overlapping boxes (default: hard)")
    g.add_argument("--class_agnostic", action="store_true",
                   help="boxes of different classes suppress each other, too")
    g = p.add_argument_group("machine")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    g.add_argument("--amp", choices=AMP_TYPES, default="off", help="precision (default: off)")
    g.add_argument("--batch", type=positive, default=8, metavar="N",
                   help="pictures at a time (default: 8)")
    g.add_argument("--workers", type=positive, default=min(4, cores()), metavar="N",
                   help="threads that read and write pictures (default: 4, or one a core)")
    g.add_argument("--log_pictures", type=count, default=1000, metavar="N",
                   help="pictures between lines where there is no terminal, 0: none")
    # fmt: on
    args = p.parse_args(argv)
    if not args.sources and not args.live:
        p.error("give a SOURCE: a picture, a folder, a video, camera or -")
    if {"yolo", "yolo_scored"} <= set(args.save):
        p.error("--save yolo and yolo_scored go to the same files; give one of them")
    return args


@command
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = parse(argv)
    setup_logging()
    try:
        return detect(args)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        print(
            f"error: the GPU's memory is full ({reason}); give a smaller --batch", file=sys.stderr
        )
        return 1
    finally:
        close_logging()


if __name__ == "__main__":
    sys.exit(main())
