"""Images for people: boxes with labels, judged detections, contact sheets.

Everywhere, images are BGR uint8 [H, W, 3] and are never changed; boxes are (x1, y1, x2, y2) in
pixels counted from 0; label k is names[k - 1], or the number itself without names. A font comes
from `find_font`; characters that it lacks are drawn as escapes.
"""

import functools
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont
from torch import Tensor

from data import DetectionData
from data.judge import CORRECT, IGNORED, Found, Judged, found_of, judge
from utils.errors import UserError

FONT_FILES = (
    "NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf",  # Linux
    "Arial Unicode.ttf", "msyh.ttc", "arial.ttf",  # macOS, Windows
)
"""Font files to look for in the system's folders, those with the most scripts first."""
GREEN, RED, ORANGE, GREY = (60, 180, 20), (40, 30, 230), (0, 140, 255), (160, 160, 160)
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
LEGIBLE = 256  # least pixels of an image's shorter side at which labels leave its objects in sight


def class_colour(label: int) -> tuple[int, int, int]:
    """Return a class's colour, BGR: always the same, and far in hue from its neighbours'."""
    hue = label * 0.618034 % 1 * 360  # the golden ratio spreads any number of hues evenly
    hsv = np.array([[[hue, (0.9, 0.55, 0.95)[label % 3], (1, 0.95, 0.65)[label % 3]]]], np.float32)
    b, g, r = (round(float(v) * 255) for v in cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0])
    return b, g, r


def draw_detections(image: np.ndarray, boxes: np.ndarray, labels: Sequence[int],
                    scores: Sequence[float] | None = None, names: Sequence[str] | None = None,
                    font: FreeTypeFont | None = None,
                    origins: Sequence[np.ndarray] = ()) -> np.ndarray:
    """Return a copy of the image with every box and its label, in the class's colour.

    The best score lies on top. Line width and text follow the image's size; a label never leaves
    the image.

    boxes: [n, 4], n may be 0; labels: [n], from 1; scores: [n], or None to leave them out. font:
    for the names; None: Pillow's own, for ASCII. origins: [n, 2, 4], the prior box, drawn
    dashed, and the cell of each box; or none.

    Raises ValueError for another image dtype or shape, lengths that differ, a coordinate that is
    NaN, or a label without a name.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    values = [None] * len(boxes) if scores is None else scores
    groups = [[(box, class_colour(int(label)), _text(label, names, score), False)]
              for box, label, score in zip(boxes, labels, values, strict=True)]
    for group, (prior, cell) in zip(groups, origins, strict=len(origins) > 0):
        colour = group[0][1]
        group[:0] = [(prior, colour, "", True), (cell, colour, "", False)]
    order = range(len(groups)) if scores is None else np.argsort(np.asarray(scores), kind="stable")
    return _draw(image, [item for k in order for item in groups[k]], font or find_font())


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
    _draw_tag(image, text, (0, 0, 0), BLACK, below=False, font=find_font())


def draw_comparison(image: np.ndarray, judged: Judged, index: int,
                    names: Sequence[str] | None = None, score: float = 0.5) -> np.ndarray:
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
        text = f"{prefix} {_text(truth.labels[k], names)}"
        items.append((truth.boxes[k] - (0, 0, 1, 1), colour, text, True))
    for k in rows:
        colour = {CORRECT: GREEN, IGNORED: GREY}.get(judged.kind[k], RED)
        text = "wrong " * (colour is RED) + _text(found.labels[k], names, found.scores[k])
        items.append((found.boxes[k] - (0, 0, 1, 1), colour, text, False))
    return _draw(image, items, find_font(names or ()))


def draw_examples(dataset: DetectionData, detections: Sequence[dict], most: int = 8) -> np.ndarray:
    """Return a contact sheet of images spread over a data set, with `draw_comparison`.

    detections: one dict an image with "boxes" [n, 4], "scores" [n] and "labels" [n].
    """
    chosen = np.linspace(0, len(dataset) - 1, min(most, len(dataset))).astype(int)
    found = found_of(detections, dataset.ids, len(dataset.classes))
    found = Found(*(column[np.isin(found.images, chosen)] for column in found))
    judged = judge(dataset.truth(), found)
    images = [draw_comparison(dataset.pull_image(i), judged, i, dataset.classes) for i in chosen]
    return contact_sheet(images, 4)


def draw_batch(images: Tensor, targets: Sequence[Tensor], names: Sequence[str],
               most: int = 16) -> np.ndarray:
    """Return a contact sheet of the first images of a training batch with their boxes.

    images: BGR uint8 [B, 3, S, S]. targets: an image each, [n, 5], corners in 0..1 and the label.
    """
    drawn, font = [], find_font(names)
    for image, target in zip(images[:most], targets, strict=False):
        boxes, labels = target[:, :4].numpy() * image.shape[-1], target[:, 4].int().tolist()
        pixels = image.permute(1, 2, 0).numpy()
        drawn.append(draw_detections(pixels, boxes, labels, names=names, font=font))
    return contact_sheet(drawn, 4)


def contact_sheet(images: Sequence[np.ndarray], columns: int, cell: tuple[int, int] = (320, 320),
                  captions: Sequence[str] = ()) -> np.ndarray:
    """Return images in rows of `columns`, each letterboxed into a cell of (width, height) pixels.

    captions: none, or a line of text under each image, set smaller where the cell has no room.
    """
    columns = min(columns, len(images))
    width, height = cell
    gap, strip, font = 8, 26 if captions else 0, find_font(captions)
    step_x, step_y = width + gap, height + strip + gap
    rows = -(-len(images) // columns)
    sheet = np.full((rows * step_y + gap, columns * step_x + gap, 3), 236, np.uint8)
    for k, image in enumerate(images):
        x, y = gap + k % columns * step_x, gap + k // columns * step_y
        sheet[y : y + height, x : x + width] = 216
        image = resize(image, min(width / image.shape[1], height / image.shape[0]))
        h, w = image.shape[:2]
        top, left = y + (height - h) // 2, x + (width - w) // 2
        sheet[top : top + h, left : left + w] = image
        if captions:
            area = sheet[y + height : y + height + strip, x : x + width]
            _write(area, escape(captions[k], font), (40, 40, 40), font)
    return sheet


def resize(image: np.ndarray, scale: float) -> np.ndarray:
    """Return an image with its sides scaled, each at least 1 pixel."""
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def _text(label: float, names: Sequence[str] | None, score: float | None = None) -> str:
    if names is not None and not 1 <= label <= len(names):
        raise ValueError(f"label {label:g} does not fit {len(names)} names, 1 is the first")
    name = str(int(label)) if names is None else names[int(label) - 1]
    return name if score is None else f"{name} {score:.2f}"


def _draw(image: np.ndarray, items: Sequence[tuple[np.ndarray, tuple, str, bool]],
          font: FreeTypeFont) -> np.ndarray:
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
        for ink, thickness in ((BLACK, line + 2), (colour, line)):  # a rim, for any ground
            cv2.polylines(canvas, paths, not dashed, ink, thickness)
    for (_, colour, text, dashed), corner in zip(items, corners, strict=True):
        if text:
            _draw_tag(canvas, text, corner, colour, dashed, font)
    return canvas


def _dashes(ring: np.ndarray, length: int) -> list[np.ndarray]:
    """Cut the sides of a closed polygon into dashes and gaps of about `length`."""
    dashes = []
    for start, end in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        count = max(1, round(np.abs(end - start).max() / (2 * length)))
        ends = ((np.arange(count)[:, None] + (-0.25, 0.25)) / count).clip(0, 1)
        dashes += [*np.round(start + ends[..., None] * (end - start)).astype(np.int32)]
    return dashes


def _draw_tag(canvas: np.ndarray, text: str, corner: tuple[int, int, int],
              colour: tuple[int, int, int], below: bool, font: FreeTypeFont) -> None:
    """Write text on a filled tag at the corner (left, top, bottom) of a box.

    The tag stands on the box, or with `below` under it, if there is room, and opposite otherwise.
    It is moved and shrunk to stay inside the canvas.
    """
    height, width = canvas.shape[:2]
    h = min(max(round(min(height, width) / 19), 15), 60, max(1, height // 3))
    text = escape(text, font)
    w = min(round(_sized(font, h).getlength(text) + 0.5 * h) or 1, width)
    x, above, under = corner[0], corner[1] - h, corner[2]
    y = (under if under + h <= height else above) if below else (above if above >= 0 else under)
    x, y = max(0, min(x, width - w)), max(0, min(y, height - h))
    tag = canvas[y : y + h, x : x + w]
    tag[:] = colour
    _write(tag, text, BLACK if np.dot(colour, (0.114, 0.587, 0.299)) > 127 else WHITE, font)


def _write(area: np.ndarray, text: str, ink: tuple[int, int, int], font: FreeTypeFont) -> None:
    """Write text centred in an area (a view, changed in place), in the largest size that fits."""
    height, width = area.shape[:2]
    length = _sized(font, height).getlength(text)
    font = _sized(font, int(height * min(1, 0.94 * width / max(length, 1))))
    drawn = Image.fromarray(np.ascontiguousarray(area))
    ImageDraw.Draw(drawn).text((width / 2, height / 2), text, ink, font, anchor="mm")
    area[:] = drawn


# ---------------------------------------------------------------- fonts


def find_font(texts: Iterable[str] = (), file: str | Path | None = None) -> FreeTypeFont:
    """Return the font that has most of some texts' characters.

    texts: what will be drawn. file: a font file (.ttf, .otf, .ttc) to use whatever the texts are;
    None: Pillow's own font, which has no letters beyond ASCII, or one of `FONT_FILES`.

    UserError: ``file`` is not a font.
    """
    if file is not None:
        try:
            return ImageFont.truetype(str(Path(file).expanduser()))
        except OSError as error:
            raise UserError(f"{file} cannot be used as a font ({error}); give a .ttf, .otf or "
                            ".ttc") from error
    wanted = {character for text in texts for character in text if not character.isascii()}
    fonts = _fonts(FONT_FILES if wanted else ())
    return max(fonts, key=lambda font: sum(_has(font, c) for c in wanted))


@functools.cache
def _fonts(files: tuple[str, ...]) -> list[FreeTypeFont]:
    """Return Pillow's own font and those of the files that the system has."""
    fonts = [ImageFont.load_default(20)]
    for name in files:
        with suppress(OSError):
            fonts.append(ImageFont.truetype(name))
    return fonts


def escape(text: str, font: FreeTypeFont) -> str:
    """Return one line of text with escapes for what the font lacks: "caf\\xe9" for "café"."""
    return "".join(c if c.isascii() or _has(font, c) else c.encode("unicode_escape").decode()
                   for c in one_line(text))


def one_line(text: str) -> str:
    """Return text as it is drawn: composed characters, one space between words."""
    return " ".join(unicodedata.normalize("NFC", text).split())


@functools.cache
def _has(font: FreeTypeFont, character: str) -> bool:
    """Whether the font draws a character otherwise than one that no font has."""
    drawn, unknown = (font.getmask(c) for c in (character, "\uffff"))
    return (drawn.size, bytes(drawn)) != (unknown.size, bytes(unknown))


@functools.lru_cache(64)
def _sized(font: FreeTypeFont, height: int) -> FreeTypeFont:
    return font.font_variant(size=max(1, round(0.8 * height)))
