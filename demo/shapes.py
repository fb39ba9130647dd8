"""The demo's data set: drawn pictures of six kinds of shapes, in the PASCAL VOC layout.

    python -m demo.shapes DIR [--trainval N] [--test N] [--seed S]

Nothing is downloaded: every picture is drawn from a seed. The same seed gives the same files with
the same OpenCV and NumPy; other versions may round a few pixels, rarely a box's side, differently.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError, command

CLASSES = ("cross", "disc", "ring", "square", "star", "triangle")
# A class's typical hue in degrees, and how far its objects stray from it (standard deviation)
HUES = dict(zip(CLASSES, (30, 90, 150, 210, 270, 330), strict=True))
HUE_SPREAD = 12
SPLITS = ("trainval", "test")
MIN_DIAMETER = 36  # pixels
EMPTY_EVERY = 25  # the last of every 25 pictures of a split shows no object
MIN_VISIBLE = 0.3  # of an object's area; with less it is not drawn
DIFFICULT_VISIBLE = 0.6  # with less it is marked difficult
SUPERSAMPLING = 4
VERSION = 2  # of the drawing: raise it to have existing sets drawn again


@dataclass(frozen=True)
class Shape:
    """One object: its coverage of a window of the picture's plane, which the border may cut.

    coverage: float32 [h, w] in 0..1 of the whole shape; x, y: the window's first column and row.
    """

    name: str
    x: int
    y: int
    coverage: np.ndarray

    def clip(self, width: int, height: int) -> tuple[tuple[slice, slice], np.ndarray]:
        """The part inside a picture: (rows, columns) there, and the coverage of these pixels."""
        h, w = self.coverage.shape
        x1, y1 = (min(max(v, 0), end) for v, end in ((self.x, width), (self.y, height)))
        x2, y2 = (min(max(v, 0), end) for v, end in ((self.x + w, width), (self.y + h, height)))
        part = self.coverage[y1 - self.y : y2 - self.y, x1 - self.x : x2 - self.x]
        return (slice(y1, y2), slice(x1, x2)), part

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """First and last column and row inside the picture, (x1, y1, x2, y2), 0-based inclusive.

        A pixel belongs to the shape when a quarter of it is covered; what hides the shape does
        not count. The shape must reach into the picture.
        """
        (rows, columns), part = self.clip(width, height)
        ys, xs = np.nonzero(part >= 0.25)
        return (
            int(columns.start + xs.min()),
            int(rows.start + ys.min()),
            int(columns.start + xs.max()),
            int(rows.start + ys.max()),
        )


def outline(name: str) -> np.ndarray:
    """Corners of a class's shape, float64 [k, 2], around (0, 0) with greatest radius 1."""
    count = {"square": 4, "triangle": 3, "star": 10, "cross": 12}.get(name, 72)
    angles = np.arange(count) * (2 * np.pi / count)
    if name == "cross":  # three corners an arm: two at its end, one between the arms
        arm, half = 0.96, 0.28
        end = np.array([[arm, -half], [arm, half], [half, half]])
        turns = [np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        return np.concatenate([end @ turn for turn in turns])
    radii = np.where(np.arange(count) % 2, 0.42, 1.0) if name == "star" else np.ones(count)
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def render(
    name: str,
    centre: tuple[float, float],
    radius: float,
    angle: float = 0.0,
    squash: float = 1.0,
    stroke: float = 0.0,
) -> Shape:
    """A shape with exact, anti-aliased coverage.

    centre and radius are pixels (pixel k spans k..k+1), angle is radians, squash divides the
    height and multiplies the width after turning, stroke > 0 draws the outline alone, that many
    pixels wide.
    """
    c, s = np.cos(angle), np.sin(angle)
    points = radius * outline(name) @ np.array([[c, s], [-s, c]]) * (squash, 1 / squash) + centre
    first = np.floor(points.min(axis=0) - stroke / 2 - 1).astype(int)
    last = np.ceil(points.max(axis=0) + stroke / 2 + 1).astype(int)
    width, height = last - first
    canvas = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    bits = 4  # OpenCV's fixed point; its integers are pixel centres, hence the half
    fixed = np.round(((points - first) * SUPERSAMPLING - 0.5) * 2**bits).astype(np.int32)
    if stroke:
        thickness = max(1, round(stroke * SUPERSAMPLING))
        cv2.polylines(canvas, [fixed], True, 255, thickness, cv2.LINE_8, bits)
    else:
        cv2.fillPoly(canvas, [fixed], 255, cv2.LINE_8, bits)
    coverage = cv2.resize(canvas, (int(width), int(height)), interpolation=cv2.INTER_AREA)
    return Shape(name, int(first[0]), int(first[1]), coverage.astype(np.float32) / 255)


def _random_shape(rng: np.random.Generator, width: int, height: int) -> Shape:
    name = str(rng.choice(CLASSES))
    largest = max(MIN_DIAMETER, 0.42 * min(width, height))
    radius = np.exp(rng.uniform(np.log(MIN_DIAMETER), np.log(largest))) / 2
    stroke = 0.0
    if name == "ring" or (name != "disc" and rng.random() < 0.3):
        stroke = max(2.5, radius * rng.uniform(0.14, 0.3))
        radius -= stroke / 2
    squash = np.exp(rng.uniform(-0.16, 0.16))
    margin = radius * 1.2 if rng.random() < 0.8 else 0.0  # without one the border may cut it
    centre = tuple(rng.uniform(min(margin, side / 2), max(side - margin, side / 2))
                   for side in (width, height))  # fmt: skip
    return render(name, centre, radius, rng.uniform(0, 2 * np.pi), squash, stroke)


def place(
    rng: np.random.Generator, width: int, height: int, count: int
) -> list[tuple[Shape, float]]:
    """At most `count` shapes, the front one first, each with the visible part of its area.

    A shape goes behind those before it, so what is seen of it is final: at least MIN_VISIBLE,
    counting what others hide and what the border cuts.
    """
    taken = np.zeros((height, width), bool)
    placed: list[tuple[Shape, float]] = []
    for _ in range(20 * count):
        shape = _random_shape(rng, width, height)
        window, part = shape.clip(width, height)
        visible = float(part[~taken[window]].sum() / shape.coverage.sum())
        if visible >= MIN_VISIBLE:
            taken[window] |= part > 0.5
            placed.append((shape, visible))
        if len(placed) == count:
            break
    return placed


def _muted(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random greyish colours, of all that is no object: float32 [count, 3], BGR 0..255."""
    hsv = rng.uniform((0, 0.0, 0.15), (360, 0.3, 0.95), (count, 3)).astype(np.float32)
    return cv2.cvtColor(hsv[None], cv2.COLOR_HSV2BGR)[0] * 255


def _vivid(rng: np.random.Generator, name: str, count: int) -> np.ndarray:
    """Random colours around a class's hue: float32 [count, 3], BGR 0..255.

    That the hue says much of the class is what lets a network from scratch learn in minutes.
    """
    hue = rng.normal(HUES[name], HUE_SPREAD, count) % 360
    saturation, value = rng.uniform(0.6, 1.0, count), rng.uniform(0.45, 1.0, count)
    hsv = np.stack([hue, saturation, value], 1).astype(np.float32)
    return cv2.cvtColor(hsv[None], cv2.COLOR_HSV2BGR)[0] * 255


def _field(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A pattern: slope, clouds, stripes or checks. float32 [height, width] in 0..1."""
    kind = rng.choice(("slope", "clouds", "stripes", "checks"), p=(0.4, 0.3, 0.15, 0.15))
    if kind == "clouds":
        cells = rng.random((int(rng.integers(3, 9)), int(rng.integers(3, 9))), np.float32)
        return cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    angle = rng.uniform(0, 2 * np.pi)
    x = np.arange(width, dtype=np.float32)[None]
    y = np.arange(height, dtype=np.float32)[:, None]
    u = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    if kind == "slope":
        return (u - u.min()) / max(float(np.ptp(u)), 1.0)
    period = np.float32(2 * np.pi / rng.uniform(6, 30))
    if kind == "stripes":
        return 0.5 + 0.5 * np.sin(period * u)
    v = np.float32(np.cos(angle)) * y - np.float32(np.sin(angle)) * x
    return np.clip(0.5 + 2 * np.sin(period * u) * np.sin(period * v), 0, 1)


def _blend(field: np.ndarray, colours: np.ndarray) -> np.ndarray:
    return colours[0] + field[..., None] * (colours[1] - colours[0])


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    base, other = _muted(rng, 2)
    near = base + rng.uniform(0.15, 0.6) * (other - base)
    canvas = _blend(_field(rng, width, height), np.stack([base, near]))
    x = np.arange(width, dtype=np.float32)[None]
    y = np.arange(height, dtype=np.float32)[:, None]
    for _ in range(rng.integers(0, 5)):  # soft blobs
        (cx, cy), (rx, ry) = rng.uniform(0, (width, height)), rng.uniform(8, 70, 2)
        blob = np.exp(-(((x - np.float32(cx)) / rx) ** 2) - ((y - np.float32(cy)) / ry) ** 2)
        colour = _muted(rng, 1)[0]
        canvas += (rng.uniform(0.2, 0.7) * blob)[..., None] * (colour - canvas)
    return canvas


def _clutter(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Draw what is no object, in place: lines, half arcs, squiggles and dots."""
    height, width = canvas.shape[:2]
    for _ in range(rng.integers(0, 9)):
        colour = _muted(rng, 1)[0]
        kind = rng.choice(("line", "arc", "squiggle", "dots"))
        start = rng.uniform((0, 0), (width, height))
        reach = rng.uniform(0.06, 0.3) * min(width, height)
        thickness = int(rng.integers(1, 6))
        if kind == "dots":
            for x, y in rng.normal(start, reach / 2, (int(rng.integers(4, 16)), 2)):
                cv2.circle(canvas, (round(x * 16), round(y * 16)), thickness * 10, colour.tolist(),
                           -1, cv2.LINE_AA, 4)  # fmt: skip
            continue
        t = np.linspace(0, 1, 40)
        if kind == "line":
            path = np.stack([t, 0 * t], axis=1) * 3 * reach
        elif kind == "arc":
            sweep = rng.uniform(0.5, 1.1) * np.pi * t
            path = np.stack([np.cos(sweep), np.sin(sweep)], axis=1) * reach / 1.5
        else:
            wave = np.sin(rng.uniform(8, 20) * t + rng.uniform(0, 6))
            path = np.stack([3 * t, rng.uniform(0.2, 0.5) * wave], axis=1) * reach
        angle = rng.uniform(0, 2 * np.pi)
        c, s = np.cos(angle), np.sin(angle)
        points = np.round((path @ np.array([[c, s], [-s, c]]) + start) * 16).astype(np.int32)
        cv2.polylines(canvas, [points], False, colour.tolist(), thickness, cv2.LINE_AA, 4)


def _paint(rng: np.random.Generator, canvas: np.ndarray, shape: Shape) -> None:
    """Draw one shape over the canvas in place: shadow, then a colour that stands out, textured."""
    height, width = canvas.shape[:2]
    window, part = shape.clip(width, height)
    if rng.random() < 0.4:
        offset = int(rng.integers(2, 7))
        shadow = np.zeros((height, width), np.float32)
        where, moved = replace(shape, x=shape.x + offset, y=shape.y + offset).clip(width, height)
        shadow[where] = 0.45 * moved
        canvas *= 1 - cv2.GaussianBlur(shadow, (0, 0), offset / 2)[..., None]
    under = canvas[window]
    mean = (under * part[..., None]).sum((0, 1)) / part.sum()
    candidates = _vivid(rng, shape.name, 4)
    colour = candidates[np.linalg.norm(candidates - mean, axis=1).argmax()]
    shade = colour * np.float32(rng.uniform(0.6, 1.2))
    fill = _blend(_field(rng, part.shape[1], part.shape[0]), np.stack([colour, shade]))
    if min(part.shape) > 50 and rng.random() < 0.4:  # a dark or light rim
        inner = cv2.erode(part, np.ones((3, 3), np.uint8))
        fill += (1 - inner[..., None]) * (rng.choice((0.0, 255.0)) - fill) * 0.7
    under += part[..., None] * (fill.clip(0, 255) - under)


def draw_picture(
    rng: np.random.Generator, width: int, height: int, count: int
) -> tuple[np.ndarray, list[dict]]:
    """One picture with at most `count` objects.

    Returns BGR uint8 [height, width, 3] and its objects, the front one first, as
    {"name", "box" (x1, y1, x2, y2) pixels 0-based inclusive, "truncated", "difficult"}.
    """
    placed = place(rng, width, height, count)
    canvas = np.ascontiguousarray(_background(rng, width, height), np.float32)
    _clutter(rng, canvas)
    for shape, _ in reversed(placed):
        _paint(rng, canvas, shape)
    if rng.random() < 0.3:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.4, 1.0))
    grain = rng.uniform(1, 9) * rng.standard_normal((height, width), np.float32)
    picture = np.clip(canvas + grain[..., None], 0, 255).astype(np.uint8)
    objects = []
    for shape, visible in placed:
        ys, xs = np.nonzero(shape.coverage >= 0.25)
        whole = (shape.x + xs.min(), shape.y + ys.min(), shape.x + xs.max(), shape.y + ys.max())
        box = shape.box(width, height)
        objects.append({"name": shape.name, "box": box, "truncated": box != whole,
                        "difficult": visible < DIFFICULT_VISIBLE})  # fmt: skip
    return picture, objects


def annotation(filename: str, width: int, height: int, objects: list[dict]) -> bytes:
    """The VOC XML of a picture: boxes become 1-based inclusive corners."""
    root = ET.Element("annotation")
    ET.SubElement(root, "folder").text = "shapes"
    ET.SubElement(root, "filename").text = filename
    ET.SubElement(ET.SubElement(root, "source"), "database").text = "drawn by demo.shapes"
    size = ET.SubElement(root, "size")
    for key, value in (("width", width), ("height", height), ("depth", 3)):
        ET.SubElement(size, key).text = str(value)
    ET.SubElement(root, "segmented").text = "0"
    for item in objects:
        element = ET.SubElement(root, "object")
        ET.SubElement(element, "name").text = item["name"]
        ET.SubElement(element, "pose").text = "Unspecified"
        for key in ("truncated", "difficult"):
            ET.SubElement(element, key).text = str(int(item[key]))
        bndbox = ET.SubElement(element, "bndbox")
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), item["box"], strict=True):
            ET.SubElement(bndbox, key).text = str(value + 1)
    ET.indent(root)
    return ET.tostring(root) + b"\n"


def _write_record(path: Path, record: dict) -> None:
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _read_record(directory: Path) -> dict | None:
    """The record of a set drawn here before, None for a new or empty folder."""
    path = directory / "dataset.json"
    if path.is_file():
        try:
            record = json.loads(path.read_bytes())
        except ValueError:  # JSON or UTF-8
            record = None
        if isinstance(record, dict) and record.get("generator") == "demo.shapes":
            return record
    elif not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return None
    raise UserError(f"{directory} holds files that demo.shapes did not write (no dataset.json of "
                    "its own): name a new or an empty folder")  # fmt: skip


def make_dataset(
    directory: str | os.PathLike,
    trainval: int = 300,
    test: int = 80,
    size: tuple[int, int] = (320, 500),
    seed: int = 0,
) -> dict:
    """Draw the data set into a folder, unless the same one is there already.

    directory gets Annotations/*.xml, JPEGImages/*.jpg, ImageSets/Main/{trainval,test}.txt,
    classes.txt and, complete only at the very end, dataset.json. size is the range of a picture's
    sides, in pixels. A picture depends on the seed, the size, its split and its number alone: a
    larger set begins with the pictures of a smaller one.

    Returns dataset.json's content: the parameters, "classes", "complete", "objects" (per split:
    class name -> number of objects, the difficult ones included).
    UserError: counts below 1 or above 9999, a negative seed, or a folder with foreign files.
    An unfinished set, or one with other parameters, is drawn anew; foreign files are left alone.
    """
    directory = Path(directory)
    low, high = size
    if not 64 <= low <= high:
        raise ValueError(f"size must be (low, high) with 64 <= low <= high, not ({low}, {high})")
    counts = {"trainval": trainval, "test": test}
    for split, count in counts.items():
        if not 1 <= count <= 9999:
            raise UserError(f"--{split} is {count}: give a number of pictures from 1 to 9999")
    if seed < 0:
        raise UserError(f"--seed is {seed}: give a number of at least 0")
    record = {"generator": "demo.shapes", "version": VERSION, **counts, "size": [low, high],
              "seed": seed, "classes": list(CLASSES)}  # fmt: skip
    folders = {"xml": directory / "Annotations", "jpg": directory / "JPEGImages"}
    lists = directory / "ImageSets" / "Main"
    ids = {split: [f"{split}_{k:04d}" for k in range(1, n + 1)] for split, n in counts.items()}

    existing = _read_record(directory)
    if (
        existing
        and existing.get("complete")
        and record.items() <= existing.items()
        and (directory / "classes.txt").is_file()
        and all((lists / f"{split}.txt").is_file() for split in SPLITS)
        and all((folder / f"{name}.{ext}").is_file()
                for ext, folder in folders.items() for split in SPLITS for name in ids[split])
    ):  # fmt: skip
        return existing

    try:
        for folder in (*folders.values(), lists):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {directory}: {error.strerror}") from error
    # claims the folder: an interrupted run is recognised as ours, and as incomplete
    _write_record(directory / "dataset.json", {**record, "complete": False})
    for ext, folder in folders.items():
        for split in SPLITS:
            for stale in folder.glob(f"{split}_[0-9][0-9][0-9][0-9].{ext}"):
                stale.unlink()

    (directory / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    objects = {split: dict.fromkeys(CLASSES, 0) for split in SPLITS}
    for number, split in enumerate(SPLITS):
        for index, name in enumerate(ids[split], 1):
            rng = np.random.default_rng((seed, number, index))
            width, height = (int(v) for v in rng.integers(low, high + 1, 2))
            count = 0 if index % EMPTY_EVERY == 0 else int(rng.integers(2, 9))
            picture, found = draw_picture(rng, width, height, count)
            encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
            (folders["jpg"] / f"{name}.jpg").write_bytes(encoded.tobytes())
            xml = annotation(f"{name}.jpg", width, height, found)
            (folders["xml"] / f"{name}.xml").write_bytes(xml)
            for item in found:
                objects[split][item["name"]] += 1
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids[split]))
    record = {**record, "complete": True, "objects": objects}
    _write_record(directory / "dataset.json", record)
    return record


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo.shapes",
        description="Draw the demo's data set (VOC layout). The same set again is left alone.",
    )
    parser.add_argument("directory", metavar="DIR", help="folder to draw into")
    parser.add_argument("--trainval", type=int, default=300, help="pictures to train on (300)")
    parser.add_argument("--test", type=int, default=80, help="pictures to test on (80)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other pictures (0)")
    args = parser.parse_args(argv)
    record = make_dataset(args.directory, args.trainval, args.test, seed=args.seed)
    for split in SPLITS:
        per_class = ", ".join(f"{n} {name}" for name, n in record["objects"][split].items())
        print(f"{args.directory}: {split}: {record[split]} pictures, {per_class}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
