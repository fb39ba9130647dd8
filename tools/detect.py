"""Detect objects in images, folders, videos or a camera; draw them and write them to files.

    python -m tools.detect WEIGHTS SOURCE... [--out DIR] [--save json csv voc yolo coco] [--no-draw]

WEIGHTS is a checkpoint (.pth, .safetensors) or an exported network. SOURCE is an image, a folder, a
quoted pattern, a video, or a camera ("camera" or its number). docs/detect.md describes the results.

Exit status: 0 done; 1 an image could not be read or written (it is named, the rest is done), or an
unexpected failure; 2 bad usage or bad input; 130 interrupted (what was done is kept).
"""

import argparse
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from PIL.ImageFont import FreeTypeFont

from data.classes import parse_classes
from data.image import limit_pixels
from engine.options import Options, add_option
from inference.draw import draw_caption, escape, find_font, one_line
from inference.predictor import Predictor
from layers.detect import DetectConfig
from tools.annotations import ANNOTATIONS, Annotations
from tools.outputs import CsvFile, Drawings, Found, JsonFiles, Output, Writer, draw
from tools.sources import RESULTS, Frame, Reader, Source, find_sources
from utils.arguments import Parser, cores, fraction, positive
from utils.device import full_memory
from utils.errors import UserError, command, first_line
from utils.files import check_writable, locked, write_errors_named
from utils.logger import LOGGER, close_logging, setup_logging
from utils.signals import StopSignal

THRESHOLD = 0.4  # default of --score_threshold. That of an evaluation would draw too many boxes.
WINDOW = "detections (q: quit)"


class Window:
    """The window of --live."""

    def __init__(self) -> None:
        if not has_display():  # OpenCV's window would end the process
            raise UserError("--live needs a display, and there is none; leave it out")
        try:
            cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL)
        except cv2.error as error:
            raise UserError("--live needs an OpenCV with windows: pip uninstall "
                            "opencv-python-headless, then pip install opencv-python") from error
        self._shown, self._seconds = time.monotonic(), 0.0

    def show(self, image: np.ndarray) -> bool:
        """Show an image with the frames per second. Return False if the window was closed."""
        now = time.monotonic()
        took, self._shown = now - self._shown, now
        self._seconds = 0.9 * self._seconds + 0.1 * took if self._seconds else took
        draw_caption(image, f"{1 / max(self._seconds, 1e-3):.1f} fps")
        cv2.imshow(WINDOW, image)
        key = cv2.waitKey(1) & 0xFF
        is_open = cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE) >= 1
        return is_open and key not in (ord("q"), 27)

    def close(self) -> None:
        cv2.destroyAllWindows()


def has_display() -> bool:
    """Return whether this process can show a window."""
    return sys.platform in ("darwin", "win32") or any(
        name in os.environ for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )


def open_predictor(args: argparse.Namespace) -> Predictor:
    predictor = Predictor(args.weights, device=args.device, amp=args.amp,
                          classes=parse_classes(args.classes) if args.classes else None,
                          score_threshold=args.score_threshold, max_detections=args.top_k,
                          max_per_class=args.per_class, nms=args.nms,
                          class_agnostic=args.class_agnostic, tiles=args.tiles,
                          overlap=args.overlap, flip=args.flip, explain=args.explain)
    if args.score_threshold is None:  # an exported file may have a higher one inside
        least = max(THRESHOLD, predictor.config.conf_thresh)
        predictor.config = replace(predictor.config, conf_thresh=least)
    return predictor


def find_objects(predictor: Predictor, frames: Sequence[Frame]) -> list[Found]:
    """Return the detections of each frame; raise UserError if they are not finite."""
    try:
        detections = predictor([frame.image for frame in frames])
    except FloatingPointError as error:
        raise UserError(f"the network's output is not finite ({error}); its weights have diverged, "
                        "or their file is damaged") from error
    return [Found(frame, d["boxes"].double().numpy(), d["scores"].numpy(), d["labels"].numpy(),
                  d.get("origins", ()))
            for frame, d in zip(frames, detections, strict=True)]


def font_for(classes: Sequence[str], file: str | None) -> FreeTypeFont:
    """Return the font for the class names; warn of names that it cannot draw."""
    font = find_font(classes, file)
    drawn = {name: escape(name, font) for name in classes}
    if lacking := [f"{name} as {text}" for name, text in drawn.items() if text != one_line(name)]:
        LOGGER.warning("no font here has all letters of the class names, which are drawn with "
                       "escapes (%s); give a font that has them with --font", ", ".join(lacking))
    return font


def new_folder(path: Path) -> Path:
    """Create and return the first of ``path``, path-2, path-3, ... that does not exist yet."""
    with write_errors_named(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    for n in itertools.count(1):
        folder = path.with_name(f"{path.name}-{n}" if n > 1 else path.name)
        with write_errors_named(folder), suppress(FileExistsError):
            folder.mkdir()
            return folder


def open_writers(folder: Path, kinds: Collection[str], sources: Sequence[Source],
                 classes: Sequence[str], font: FreeTypeFont) -> list[Writer]:
    """Return the writers of some kinds: json, csv, drawn, and those of `ANNOTATIONS`.

    Raises UserError if a writer cannot write its files, or refuses to replace files.
    """
    earlier = [name for name in (*sorted(RESULTS), "drawn") if (folder / name).exists()]
    writers: list[Writer] = []
    if "json" in kinds:
        writers.append(JsonFiles(folder, sources, classes))
    if "csv" in kinds:
        writers.append(CsvFile(folder, classes))
    if "drawn" in kinds:
        writers.append(Drawings(folder, sources, classes, font))
    writers += [Annotations(folder, k, sources, classes) for k in ANNOTATIONS if k in kinds]
    if earlier:
        LOGGER.warning("%s holds results of an earlier call (%s): files of the same names are "
                       "replaced, others stay", folder, ", ".join(earlier))
    return writers


def detect(args: argparse.Namespace) -> int:
    """Do what the command line asks for, and return the exit status."""
    folder = Path(args.out or Path("runs", "detect", Path(args.weights).stem))
    sources = find_sources(args.sources or ["camera"], folder)
    if args.live and any(source.kind == "image" for source in sources):
        raise UserError("--live shows cameras and videos; leave it out for images")
    with ExitStack() as stack:
        window = stack.enter_context(closing(Window())) if args.live else None
        predictor = open_predictor(args)
        info, threshold = predictor.info, predictor.config.conf_thresh
        LOGGER.info("%s %d, %d classes, on %s, scores over %g", info.version, info.size,
                    len(info.classes), predictor.device, threshold)
        font, start = font_for(info.classes, args.font), time.monotonic()
        # Entered before the files: a signal does not end the process while they are written.
        stop = stack.enter_context(StopSignal(gentle=True))
        writers: list[Writer] = []
        if args.out or not args.live:
            kinds = {*args.save, "drawn"} if args.draw else {*args.save}
            folder = folder if args.out else new_folder(folder)
            check_writable(folder / "detections")
            stack.enter_context(locked(folder / ".detect.lock", "--out"))
            writers = open_writers(folder, kinds, sources, info.classes, font)
        output = stack.enter_context(Output(writers, args.workers))
        reader = Reader(sources, 1 if args.live else args.batch_size, args.workers)
        objects, is_open, maps = 0, True, Counter()
        with closing(reader.batches()) as batches:
            for batch in batches:
                for found in find_objects(predictor, batch):
                    objects += len(found.scores)
                    maps.update(origin.side for origin in found.origins)
                    output.add(found)
                    if window:
                        is_open = window.show(draw(found, info.classes, font))
                if stop.asked or not is_open:
                    break
    if stop.asked:
        print("interrupted", file=sys.stderr)
    skipped = "".join(f"; {count} could not be {done}" for count, done in (
        (reader.broken, "read"), (output.unwritten, "written")) if count)
    LOGGER.info("%d images, %d video frames: %d objects in %.1f s%s", reader.images, reader.frames,
                objects, time.monotonic() - start, skipped)
    if not objects and reader.images + reader.frames:
        LOGGER.info("no score is over %g; give a lower --score_threshold", threshold)
    if maps:
        LOGGER.info("objects by source map: %s", ", ".join(
            f"{side} x {side}: {count}" for side, count in sorted(maps.items(), reverse=True)))
    if writers:
        LOGGER.info("%s: %s", folder, ", ".join(writer.place for writer in writers))
    return 130 if stop.asked else int(reader.broken + output.unwritten > 0)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="python -m tools.detect", description=__doc__.splitlines()[0],
               allow_abbrev=False)
    p.add_argument("weights", metavar="WEIGHTS",
                   help="checkpoint (.pth, .safetensors) or exported network (.onnx, .xml)")
    p.add_argument("sources", metavar="SOURCE", nargs="*", help="image, folder (with all below "
                   "it), quoted pattern, video, or camera (or its number)")
    g = p.add_argument_group("results")
    g.add_argument("--out", metavar="DIR", help="results folder (default: runs/detect/NAME with "
                   "the name of the weights, then NAME-2, ...)")
    g.add_argument("--save", nargs="*", choices=["json", "csv", *ANNOTATIONS], metavar="KIND",
                   default=["json", "csv"],
                   help="json, csv; data sets: voc, yolo, coco (default: json csv)")
    g.add_argument("--draw", action=argparse.BooleanOptionalAction, default=True,
                   help="draw images and videos with their boxes")
    g.add_argument("--live", action="store_true",
                   help="show a camera or video in a window; results are written only with --out")
    g.add_argument("--explain", action="store_true",
                   help="tell and draw the prior box that found each object")
    g.add_argument("--font", metavar="FILE", help="font for class names that are not ASCII")
    g = p.add_argument_group("detections")
    g.add_argument("--score_threshold", type=fraction, metavar="X", help="lowest score of a "
                   f"detection (default: {THRESHOLD}, or the higher one of an exported file)")
    g.add_argument("--classes", metavar="NAMES", help="a,b,c or a file, for weights without names")
    for name in ("top_k", "per_class", "nms", "tiles", "overlap", "flip"):
        add_option(g, name)
    g.add_argument("--class_agnostic", action="store_true",
                   help="suppress boxes of different classes, too")
    g = p.add_argument_group("machine")
    for name in ("device", "amp", "max_pixels"):
        add_option(g, name)
    g.add_argument("-b", "--batch_size", "--batch", type=positive, default=8, metavar="N",
                   help="images at a time (default: 8)")
    g.add_argument("--workers", type=positive, default=min(4, cores()), metavar="N",
                   help="threads that read and write images (default: one per core, at most 4)")
    p.set_defaults(nms=DetectConfig.nms, tiles=0, flip=False, device="auto", amp=Options.amp)
    args = p.parse_args(argv)
    if not args.sources and not args.live:
        p.error("give a SOURCE: an image, a folder, a video or camera")
    if args.explain and not (args.draw or args.live or "json" in args.save):
        p.error("--explain adds to detections.json and to drawn images; give --draw or --save json")
    return args


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    setup_logging()
    limit_pixels(args.max_pixels)
    try:
        return detect(args)
    except (MemoryError, RuntimeError) as error:
        if not (memory := full_memory(error)):
            raise
        print(f"error: {memory} is full ({first_line(error)}); give a smaller --batch_size",
              file=sys.stderr)
        return 1
    finally:
        close_logging()


if __name__ == "__main__":
    sys.exit(main())
