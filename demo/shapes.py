"""Draw the demo's data set: images of three kinds of shapes, in the layout of PASCAL VOC.

    python -m demo.shapes DIR [--trainval N] [--test N] [--seed S]

Nothing is downloaded. A seed gives the same files with the same versions of OpenCV and NumPy.
"""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from tools.annotations import voc_annotation
from utils.arguments import Parser, count, positive
from utils.errors import UserError, command

CLASSES = ("disc", "square", "star")
CORNERS = {"disc": 72, "square": 4, "star": 10}
HUES = {"disc": 90, "square": 210, "star": 330}  # degrees; what lets a network learn in minutes
HUE_SPREAD = 12  # standard deviation
SPLITS = ("trainval", "test")
MIN_DIAMETER = 36  # pixels
EMPTY_EVERY = 25  # every 25th image of a split shows no object
MIN_VISIBLE = 0.3  # of an object's area; an object that shows less is not drawn
DIFFICULT_VISIBLE = 0.6  # an object that shows less is marked difficult


class Object(NamedTuple):
    """A shape in an image."""

    name: str
    coverage: np.ndarray
    """Covered part of each pixel, before other shapes hide it: float32 [H, W] in 0..1."""
    visible: float  # part of the whole shape's area that neither the border nor other shapes hide
    truncated: bool  # whether the border cuts it

    @property
    def box(self) -> tuple[int, int, int, int]:
        """All pixels that are covered to a quarter: (x1, y1, x2, y2), 0-based inclusive."""
        ys, xs = np.nonzero(self.coverage >= 0.25)
        return int(xs.min()), int(ys.min()), int(xs.max()), int(ys.max())

    @property
    def difficult(self) -> bool:
        return self.visible < DIFFICULT_VISIBLE


def outline(name: str, centre: Sequence[float], radius: float, angle: float = 0.0,
            squash: float = 1.0) -> np.ndarray:
    """Return the corners of a shape: float64 [k, 2], (x, y) in pixels; pixel k spans k..k+1.

    It is turned by ``angle`` radians. Then ``squash`` multiplies its width and divides its height.
    """
    k = np.arange(CORNERS[name])
    radii = radius * np.where(k % 2, 0.42, 1.0) if name == "star" else radius
    turns = angle + k * (2 * np.pi / len(k))
    return np.stack([radii * np.cos(turns) * squash, radii * np.sin(turns) / squash], 1) + centre


def fill(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return how much of each pixel a polygon covers: float32 [height, width] in 0..1."""
    coverage = np.zeros((height, width), np.float32)
    x1, y1 = np.floor(points.min(0)).astype(int).clip(0)
    x2, y2 = np.ceil(points.max(0)).astype(int).clip(None, (width, height))
    fine = np.zeros((4 * (y2 - y1), 4 * (x2 - x1)), np.uint8)
    # In 1/16 of a pixel; whole numbers are the centres of pixels.
    corners = np.round((4 * (points - (x1, y1)) - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(fine, [corners], 255, cv2.LINE_8, 4)
    part = cv2.resize(fine, (int(x2 - x1), int(y2 - y1)), interpolation=cv2.INTER_AREA)
    coverage[y1:y2, x1:x2] = part / np.float32(255)
    return coverage


def place(rng: np.random.Generator, width: int, height: int, number: int) -> list[Object]:
    """Return at most ``number`` shapes, the front one first. Each hides what is behind it."""
    taken = np.zeros((height, width), bool)
    placed: list[Object] = []
    for _ in range(20 * number):
        name = str(rng.choice(CLASSES))
        largest = max(MIN_DIAMETER, 0.42 * min(width, height))
        radius = np.exp(rng.uniform(np.log(MIN_DIAMETER), np.log(largest))) / 2
        margin = 1.2 * radius if rng.random() < 0.8 else 0  # without one the border may cut it
        centre = [rng.uniform(min(margin, side / 2), max(side - margin, side / 2))
                  for side in (width, height)]
        squash = np.exp(rng.uniform(-0.16, 0.16))
        points = outline(name, centre, radius, rng.uniform(0, 2 * np.pi), squash)
        coverage, area = fill(points, width, height), cv2.contourArea(points.astype(np.float32))
        visible = min(float(coverage[~taken].sum()) / area, 1.0)
        if visible >= MIN_VISIBLE:
            taken |= coverage > 0.5
            truncated = bool((points < 0).any() or (points > (width, height)).any())
            placed.append(Object(name, coverage, visible, truncated))
        if len(placed) == number:
            break
    return placed


def colour(rng: np.random.Generator, name: str | None = None) -> np.ndarray:
    """Return a vivid colour near a class's hue, or a muted one for the background: BGR 0..255."""
    if name:
        hsv = rng.normal(HUES[name], HUE_SPREAD) % 360, *rng.uniform((0.6, 0.45), 1.0)
    else:
        hsv = rng.uniform((0, 0, 0.15), (360, 0.3, 0.95))
    return cv2.cvtColor(np.array([[hsv]], np.float32), cv2.COLOR_HSV2BGR)[0, 0] * 255


def pattern(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Return clouds or stripes: float32 [height, width, 1] in 0..1."""
    if rng.random() < 0.6:
        cells = rng.random(rng.integers(2, 9, 2), np.float32)
        field = cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    else:
        across, down = rng.normal(0, 0.4, 2)
        y, x = np.mgrid[:height, :width].astype(np.float32)
        field = 0.5 + 0.5 * np.sin(np.float32(across) * x + np.float32(down) * y)
    return field[..., None]


def add_clutter(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Draw lines, arcs and dots, which are no objects, in place."""
    height, width = canvas.shape[:2]
    for _ in range(rng.integers(0, 9)):
        tint, thick = colour(rng).tolist(), int(rng.integers(1, 6))
        x, y = (int(v) for v in rng.uniform(0, (width, height)))
        reach = int(rng.uniform(0.06, 0.3) * min(width, height))
        kind, angle = rng.integers(3), rng.uniform(0, 360)
        if kind == 0:
            end = int(x + 3 * reach * np.cos(angle)), int(y + 3 * reach * np.sin(angle))
            cv2.line(canvas, (x, y), end, tint, thick, cv2.LINE_AA)
        elif kind == 1:
            sweep = rng.uniform(90, 200)
            cv2.ellipse(canvas, (x, y), (reach, reach), angle, 0, sweep, tint, thick, cv2.LINE_AA)
        else:
            for dot in rng.normal((x, y), reach / 2, (8, 2)).round().astype(int).tolist():
                cv2.circle(canvas, dot, thick, tint, -1, cv2.LINE_AA)


def draw_image(rng: np.random.Generator, width: int, height: int,
               number: int) -> tuple[np.ndarray, list[Object]]:
    """Return an image, BGR uint8 [height, width, 3], and its at most ``number`` objects."""
    objects = place(rng, width, height, number)
    first, second = colour(rng), colour(rng)
    canvas = first + rng.uniform(0.15, 0.6) * pattern(rng, width, height) * (second - first)
    canvas = np.ascontiguousarray(canvas, np.float32)
    add_clutter(rng, canvas)
    for item in reversed(objects):
        x1, y1, x2, y2 = item.box
        window = slice(y1, y2 + 1), slice(x1, x2 + 1)
        texture = 1 + rng.uniform(-0.4, 0.2) * pattern(rng, x2 - x1 + 1, y2 - y1 + 1)
        shade = (colour(rng, item.name) * texture).clip(0, 255)
        canvas[window] += item.coverage[window][..., None] * (shade - canvas[window])
    if rng.random() < 0.3:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.4, 1.0))
    grain = rng.uniform(1, 9) * rng.standard_normal((height, width, 1), np.float32)
    return np.clip(canvas + grain, 0, 255).astype(np.uint8), objects


def make_dataset(directory: str | os.PathLike, trainval: int = 200, test: int = 80,
                 size: tuple[int, int] = (320, 500), seed: int = 0) -> dict[str, Counter[str]]:
    """Draw a data set into a new or empty folder, and return its objects per split and class.

    Args:
        directory: Gets Annotations/, JPEGImages/, ImageSets/Main/ and classes.txt. It appears
            when the set is complete; it is drawn beside it, in a folder that ends in .part.
        trainval, test: Number of images. A larger set begins with the images of a smaller one.
        size: Range of an image's sides, in pixels.

    Raises UserError: the folder holds files, or cannot be made.
    """
    directory = Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory} holds files; name a new folder, or remove it")
    part, found = directory.with_name(f"{directory.name}.part"), {}
    shutil.rmtree(part, ignore_errors=True)
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (part / name).mkdir(parents=True)
    (part / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    for k, (split, number) in enumerate(zip(SPLITS, (trainval, test), strict=True)):
        ids, found[split] = [f"{split}_{i:04d}" for i in range(1, number + 1)], Counter()
        (part / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{i}\n" for i in ids))
        for index, name in enumerate(ids, 1):
            rng = np.random.default_rng((seed, k, index))
            width, height = (int(v) for v in rng.integers(size[0], size[1] + 1, 2))
            objects = 0 if index % EMPTY_EVERY == 0 else int(rng.integers(2, 9))
            image, drawn = draw_image(rng, width, height, objects)
            data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
            (part / "JPEGImages" / f"{name}.jpg").write_bytes(data.tobytes())
            xml = voc_annotation(f"{name}.jpg", (width, height), [
                (o.name, o.box, {"truncated": int(o.truncated), "difficult": int(o.difficult)})
                for o in drawn
            ])
            (part / "Annotations" / f"{name}.xml").write_bytes(xml)
            found[split].update(o.name for o in drawn)
    if directory.exists():
        directory.rmdir()
    part.rename(directory)
    return found


@command
def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m demo.shapes", description=__doc__.splitlines()[0])
    p.add_argument("directory", metavar="DIR", help="new folder")
    p.add_argument("--trainval", type=positive, default=200, help="images to train on (200)")
    p.add_argument("--test", type=positive, default=80, help="images to test on (80)")
    p.add_argument("--seed", type=count, default=0, help="another seed draws other images (0)")
    args = p.parse_args(argv)
    found = make_dataset(args.directory, args.trainval, args.test, seed=args.seed)
    for split, names in found.items():
        print(f"{args.directory}: {split}: {', '.join(f'{names[c]} {c}' for c in CLASSES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
