"""Images for people: boxes with labels, judged detections, contact sheets.

Everywhere, images are BGR uint8 [H, W, 3] and are never changed; boxes are (x1, y1, x2, y2) in
pixels counted from 0; label k is names[k - 1], or the number itself without names. OpenCV's own
font has ASCII only. Other text needs a font file (`find_font`); what the font lacks is drawn as
escapes.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data import DetectionData
from data.judge import CORRECT, IGNORED, Found, Judged, found_of, judge
from utils.errors import UserError

FONT = cv2.FONT_HERSHEY_SIMPLEX
FONT_FILES = (
    "NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf",  # Linux
    "Arial Unicode.ttf", "msyh.ttc", "arial.ttf",  # macOS, Windows
)  # fmt: skip
"""Font files to look for in the system's folders, those with the most scripts first."""
GREEN, RED, ORANGE, GREY = (60, 180, 20), (40, 30, 230), (0, 140, 255), (160, 160, 160)
LEGIBLE = 256
"""Least pixels of an image's shorter side at which labels leave its objects in sight."""


def class_colour(label: int) -> tuple[int, int, int]:
    """Return a class's colour, BGR: always the same, and far in hue from its neighbours'."""
    hue = label * 0.618034 % 1 * 360  # the golden ratio spreads any number of hues evenly
    hsv = np.array([[[hue, (0.9, 0.55, 0.95)[label % 3], (1, 0.95, 0.65)[label % 3]]]], np.float32)
    b, g, r = (round(float(v) * 255) for v in cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0])
    return b, g, r


def draw_detections(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    scores: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    font: ImageFont.FreeTypeFont | None = None,
) -> np.ndarray:
    """Return a copy of the image with every box and its label, in the class's colour.

    The best score lies on top. Line width and text follow the image's size; a label never leaves
    the image.

    Args:
        image: BGR uint8 [H, W, 3].
        boxes: [n, 4], n may be 0.
        labels: [n], from 1.
        scores: [n], or None to leave them out.
        font: for the names, from `find_font`.

    Raises:
        ValueError: another image dtype or shape, lengths that differ, a coordinate that is NaN, or
            a label without a name.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    counts = [len(boxes), len(labels), len(boxes) if scores is None else len(scores)]
    if len(set(counts)) > 1:
        raise ValueError("{} boxes, {} labels and {} scores do not match".format(*counts))
    order = range(len(boxes)) if scores is None else np.argsort(np.asarray(scores), kind="stable")
    items = []
    for k in order:
        label = int(labels[k])
        text = _name(label, names) if scores is None else _scored(label, scores[k], names)
        items.append((boxes[k], class_colour(label), text, False))
    return _draw(image, items, font)


def enlarge(image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Enlarge a small image and its boxes [n, 4] by a whole factor, so that labels have room.

    The shorter side becomes at least `LEGIBLE` pixels if the longer one stays within 2048. An image
    that is large enough is returned as it is.
    """
    height, width = image.shape[:2]
    factor = min(-(-LEGIBLE // min(height, width)), 2048 // max(height, width))
    if factor <= 1:
        return image, boxes
    larger = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    # x2 and y2 are the last pixels of a box.
    return larger, np.asarray(boxes).reshape(-1, 4) * factor + (0, 0, factor - 1, factor - 1)


def draw_caption(image: np.ndarray, text: str) -> None:
    """Write a line of text, white on black, into the image's upper left corner."""
    _draw_tag(image, text, (0, 0, 0), (0, 0, 0), below=False, font=None)


def draw_comparison(
    image: np.ndarray,
    judged: Judged,
    index: int,
    names: Sequence[str] | None = None,
    score: float = 0.5,
) -> np.ndarray:
    """Return a copy of image `index` of a data set with its objects and judged detections.

    Green: a correct detection. Red, "wrong": an error. Orange, dashed, "missed": an object that
    nothing found. Grey: an ignored object, and detections of it. Detections below `score` are left
    out, and what they found is missed.
    """
    truth, found = judged.truth, judged.found
    rows = np.flatnonzero((found.images == index) & (found.scores >= score))
    rows = rows[np.argsort(found.scores[rows], kind="stable")]
    hit = judged.objects[rows[judged.kind[rows] <= IGNORED]]
    items = []
    for k in np.setdiff1d(np.flatnonzero(truth.images == index), hit):
        colour, prefix = (GREY, "ignored") if truth.ignored[k] else (ORANGE, "missed")
        text = f"{prefix} {_name(truth.labels[k], names)}"
        items.append((truth.boxes[k] - (0, 0, 1, 1), colour, text, True))
    for k in rows:
        text = _scored(found.labels[k], found.scores[k], names)
        colour = {CORRECT: GREEN, IGNORED: GREY}.get(judged.kind[k], RED)
        text = f"wrong {text}" if colour is RED else text
        items.append((found.boxes[k] - (0, 0, 1, 1), colour, text, False))
    return _draw(image, items, find_font(names or ()))


def draw_examples(
    dataset: DetectionData, detections: Sequence[dict], most: int = 8
) -> np.ndarray:
    """Return a contact sheet of images spread over a data set, with `draw_comparison`.

    detections: one dict an image with "boxes" [n, 4], "scores" [n] and "labels" [n].
    """
    chosen = np.linspace(0, len(dataset) - 1, min(most, len(dataset))).astype(int)
    found = found_of(detections, dataset.ids, len(dataset.classes))
    found = Found(*(column[np.isin(found.images, chosen)] for column in found))
    judged = judge(dataset.truth(), found)
    images = [
        draw_comparison(dataset.pull_image(i), judged, i, dataset.classes) for i in chosen
    ]
    return contact_sheet(images, 4)


def draw_batch(
    images: Tensor, targets: Sequence[Tensor], names: Sequence[str], most: int = 16
) -> np.ndarray:
    """Return a contact sheet of the first images of a training batch with their boxes.

    images: BGR uint8 [B, 3, S, S]. targets: an image each, [n, 5], corners in 0..1 and the label.
    """
    drawn, font = [], find_font(names)
    for image, target in zip(images[:most], targets, strict=False):
        boxes = target[:, :4].numpy() * image.shape[-1]
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        labels = target[:, 4].int().tolist()
        drawn.append(draw_detections(pixels, boxes, labels, names=names, font=font))
    return contact_sheet(drawn, 4)


def contact_sheet(
    images: Sequence[np.ndarray],
    columns: int,
    cell: tuple[int, int] = (320, 320),
    captions: Sequence[str] | None = None,
) -> np.ndarray:
    """Return images in rows of `columns`, each letterboxed into a cell of (width, height) pixels.

    captions: a line of text under each image, set smaller where it is too long for the cell.

    ValueError: no images, columns below 1, or another number of captions.
    """
    if not images or columns < 1:
        raise ValueError(f"cannot lay out {len(images)} images in {columns} columns")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(images)} images do not match {len(captions)} captions")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width, height = cell
    gap, strip = 8, 0 if captions is None else 26
    step_x, step_y = width + gap, height + strip + gap
    sheet = np.full((rows * step_y + gap, columns * step_x + gap, 3), 236, np.uint8)
    for k, image in enumerate(images):
        x, y = gap + k % columns * step_x, gap + k // columns * step_y
        scale = min(width / image.shape[1], height / image.shape[0])
        w, h = (max(1, round(side * scale)) for side in image.shape[1::-1])
        shrunk = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA if scale < 1
                            else cv2.INTER_LINEAR)  # fmt: skip
        sheet[y : y + height, x : x + width] = 216
        top, left = y + (height - h) // 2, x + (width - w) // 2
        sheet[top : top + h, left : left + w] = shrunk
        if captions is not None:
            _write(sheet[y + height : y + height + strip, x : x + width], captions[k])
    return sheet


def _name(label: float, names: Sequence[str] | None) -> str:
    if names is None:
        return str(int(label))
    if not 1 <= label <= len(names):
        raise ValueError(f"label {label:g} does not fit {len(names)} names, 1 is the first")
    return names[int(label) - 1]


def _scored(label: float, score: float, names: Sequence[str] | None) -> str:
    return f"{_name(label, names)} {score:.2f}"


def _draw(
    image: np.ndarray,
    items: Sequence[tuple[np.ndarray, tuple, str, bool]],
    font: ImageFont.FreeTypeFont | None = None,
) -> np.ndarray:
    """Draw (box, colour, text, dashed) on a copy: the last on top, texts over all boxes."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    canvas = image.copy(order="C")
    size = np.array(image.shape[1::-1])
    line = max(1, round(size.min() / 220))
    # Sides beyond the border stay out of sight, and within the range of OpenCV's integers.
    low, high = np.full(4, -4 * line), np.tile(size + 4 * line, 2)
    corners = []
    for box, colour, _, dashed in items:
        if np.isnan(box).any():
            raise ValueError(f"box {np.asarray(box).tolist()} holds a NaN")
        x1, y1, x2, y2 = np.clip(box, low, high).round().astype(int).tolist()
        corners.append((x1, y1, y2))
        ring = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], np.int32)
        paths = _dashes(ring, 5 * line) if dashed else [ring]
        for ink, thickness in (((0, 0, 0), line + 2), (colour, line)):  # a rim, for any ground
            cv2.polylines(canvas, paths, not dashed, ink, thickness)
    for (_, colour, text, dashed), (x1, y1, y2) in zip(items, corners, strict=True):
        _draw_tag(canvas, text, (x1, y1, y2), colour, dashed, font)
    return canvas


def _dashes(ring: np.ndarray, length: int) -> list[np.ndarray]:
    """Cut the sides of a closed polygon into dashes and gaps of about `length`."""
    dashes = []
    for start, end in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        count = max(1, round(np.abs(end - start).max() / (2 * length)))
        for t in (np.arange(count)[:, None] + (-0.25, 0.25)) / count:
            t = np.clip(t, 0, 1)[:, None]
            dashes.append(np.round(start + t * (end - start)).astype(np.int32))
    return dashes


def _draw_tag(
    canvas: np.ndarray,
    text: str,
    corner: tuple[int, int, int],
    colour: tuple[int, int, int],
    below: bool,
    font: ImageFont.FreeTypeFont | None,
) -> None:
    """Write text on a filled tag at the corner (left, top, bottom) of a box.

    The tag stands on the box, or with `below` under it, if there is room, and opposite otherwise.
    It is moved and shrunk to stay inside the canvas.
    """
    height, width = canvas.shape[:2]
    h = min(max(round(min(height, width) / 19), 15), 60, max(1, height // 3))
    text = escape(text, font)
    if font is None:
        text_width, text_height = _text_size(text, 1, 1)
        w = round(h * (0.6 * text_width / text_height + 0.5))
    else:
        w = round(_sized(font, h).getlength(text) + 0.5 * h)
    w = max(1, min(w, width))
    x, above, under = corner[0], corner[1] - h, corner[2]
    y = (under if under + h <= height else above) if below else (above if above >= 0 else under)
    x, y = max(0, min(x, width - w)), max(0, min(y, height - h))
    tag = canvas[y : y + h, x : x + w]
    tag[:] = colour
    b, g, r = colour
    ink = (0, 0, 0) if 0.114 * b + 0.587 * g + 0.299 * r > 127 else (255, 255, 255)
    _write(tag, text, ink, font)


def _write(
    area: np.ndarray,
    text: str,
    ink: tuple[int, int, int] = (40, 40, 40),
    font: ImageFont.FreeTypeFont | None = None,
) -> None:
    """Write text centred in an area (a view, changed in place), in the largest size that fits."""
    height, width = area.shape[:2]
    text = escape(text, font)
    patch = np.ascontiguousarray(area)
    if font is not None:
        length = _sized(font, height).getlength(text)
        font = _sized(font, int(height * min(1, 0.94 * width / max(length, 1))))
        drawn = Image.fromarray(patch)
        ImageDraw.Draw(drawn).text((width / 2, height / 2), text, ink, font, anchor="mm")
        area[:] = drawn
        return
    w, h = _text_size(text, 1, 1)
    scale = min(0.58 * height / h, 0.94 * width / max(w, 1))
    thickness = max(1, round(1.2 * scale))
    w, h = _text_size(text, scale, thickness)
    start = ((width - w) // 2, (height + h) // 2)
    cv2.putText(patch, text, start, FONT, scale, ink, thickness, cv2.LINE_AA)
    area[:] = patch


def _text_size(text: str, scale: float, thickness: int) -> tuple[int, int]:
    """Return the width of a text and the height of a capital, which no text's letters change."""
    (width, _), _ = cv2.getTextSize(text, FONT, scale, thickness)
    (_, height), _ = cv2.getTextSize("X", FONT, scale, thickness)
    return width, height


# ---------------------------------------------------------------- fonts


def find_font(
    texts: Iterable[str], file: str | Path | None = None
) -> ImageFont.FreeTypeFont | None:
    """Return a font for some texts; None stands for OpenCV's own, which has ASCII only.

    texts: what will be drawn. file: a font file (.ttf, .otf, .ttc) to use whatever the texts are;
    without it, the one of `FONT_FILES` that has most of their characters beyond ASCII.

    UserError: ``file`` is not a font.
    """
    if file is not None:
        try:
            return ImageFont.truetype(str(Path(file).expanduser()))
        except OSError as error:
            raise UserError(
                f"{file} cannot be used as a font ({error}); give a .ttf, .otf or .ttc"
            ) from error
    wanted = {character for text in texts for character in text if not character.isascii()}
    fonts: list[ImageFont.FreeTypeFont] = []
    for name in FONT_FILES if wanted else ():
        try:
            fonts.append(ImageFont.truetype(name))
        except OSError:
            continue
    return max(fonts, key=lambda font: sum(_has(font, c) for c in wanted), default=None)


def escape(text: str, font: ImageFont.FreeTypeFont | None = None) -> str:
    """Return one line of text with escapes for what the font lacks: "caf\\xe9" for "café"."""
    line = " ".join(unicodedata.normalize("NFC", text).split())
    return "".join(
        c if c.isascii() or (font and _has(font, c)) else c.encode("unicode_escape").decode()
        for c in line
    )


@functools.cache
def _has(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Whether the font draws a character otherwise than one that no font has."""
    drawn, unknown = (font.getmask(c) for c in (character, "\uffff"))
    return (drawn.size, bytes(drawn)) != (unknown.size, bytes(unknown))


@functools.lru_cache(64)
def _sized(font: ImageFont.FreeTypeFont, height: int) -> ImageFont.FreeTypeFont:
    """Return the font with lines of `height` pixels."""
    return font.font_variant(size=max(1, round(0.8 * height)))
