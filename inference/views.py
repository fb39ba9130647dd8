"""Detection in parts of an image: tiles for small objects in large images, and mirrored images."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from layers import Detect
from layers.boxes import intersections
from utils.errors import UserError

EDGE = 0.02
"""A box is cut off if it ends within this share of a tile's side from an edge of the tile."""
LEAST_SIDE = 32
"""Smallest side of a tile in pixels; a smaller number was meant as the number of tiles."""
COVERED = 0.5
"""A box that is cut off yields to a whole box of its class that covers this share of it."""


class View(NamedTuple):
    """A part of an image: BGR uint8 [h, w, 3], its corner in the image, whether it is mirrored."""

    image: np.ndarray
    left: int
    top: int
    mirrored: bool

    def place(self, boxes: Tensor) -> Tensor:
        """Return boxes of the view [n, 4], (x1, y1, x2, y2) in pixels, in the whole image."""
        if self.mirrored:
            x1, y1, x2, y2 = boxes.unbind(1)
            width = self.image.shape[1]
            boxes = torch.stack([width - x2, y1, width - x1, y2], 1)
        return boxes + boxes.new_tensor([self.left, self.top] * 2)

    def cut_off(self, boxes: Tensor, width: int, height: int) -> Tensor:
        """Return bool [n]: which placed boxes end at an edge that is not one of the image."""
        h, w = self.image.shape[:2]
        right, bottom = self.left + w, self.top + h
        x1, y1, x2, y2 = boxes.unbind(1)
        cut = torch.zeros(len(boxes), dtype=torch.bool)
        cut |= (x1 < self.left + EDGE * w) & (self.left > 0)
        cut |= (y1 < self.top + EDGE * h) & (self.top > 0)
        cut |= (x2 > right - EDGE * w) & (right < width)
        return cut | ((y2 > bottom - EDGE * h) & (bottom < height))


@dataclass(frozen=True)
class Views:
    """How an image is seen by a detector.

    tiles: side of square tiles in pixels, from 32, beside the whole image; 0: the whole image
        alone, as is an image that fits into a tile.
    overlap: share of a tile that the next one shows, too, at least; 0 or more, under 1.
    flip: whether every view is also seen mirrored.
    Raises UserError: another value.
    """

    tiles: int = 0
    overlap: float = 0.2
    flip: bool = False

    def __post_init__(self) -> None:
        if self.tiles and self.tiles < LEAST_SIDE or not 0 <= self.overlap < 1:
            raise UserError(f"tiles of {self.tiles} px a side that overlap by {self.overlap:g}; "
                            f"give a side of 0 (no tiles) or from {LEAST_SIDE} px, and an overlap "
                            "from 0 to under 1")

    def of(self, image: np.ndarray) -> list[View]:
        """Return the views of an image, the whole image first."""
        height, width = image.shape[:2]
        views = [View(image, 0, 0, False)]
        if 0 < self.tiles < max(height, width):
            views += [View(image[y : y + self.tiles, x : x + self.tiles], x, y, False)
                      for y in self._starts(height) for x in self._starts(width)]
        mirrored = [View(np.ascontiguousarray(v.image[:, ::-1]), v.left, v.top, True)
                    for v in views if self.flip]
        return views + mirrored

    def _starts(self, length: int) -> Iterator[int]:
        """Yield the start of each tile along a side, evenly spaced."""
        room = max(length - self.tiles, 0)
        steps = math.ceil(room / (self.tiles * (1 - self.overlap)))
        yield from np.linspace(0, room, steps + 1).round().astype(int).tolist()


def merge(views: Sequence[View], found: Sequence[dict[str, Tensor]],
          detect: Detect) -> dict[str, Tensor]:
    """Return the detections of an image, from those of its views.

    A box that is cut off by the edge of a tile yields to a box of its class that is whole and
    covers half of it. The rest are suppressed by the rule of ``detect``. One view is returned as it
    is.

    Args:
        views: as `Views.of` returns them.
        found: "boxes" float32 [n, 4] in pixels of the view, "scores" [n] and "labels" [n] of each.
    """
    if len(views) == 1:
        return found[0]
    height, width = views[0].image.shape[:2]
    placed = [view.place(each["boxes"]) for view, each in zip(views, found, strict=True)]
    pairs = zip(views, placed, strict=True)
    cut = torch.cat([view.cut_off(boxes, width, height) for view, boxes in pairs])
    boxes = torch.cat(placed)
    scores, labels = (torch.cat([each[key] for each in found]) for key in ("scores", "labels"))
    kept = ~_is_covered(boxes, labels, cut)
    boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
    classes = int(labels.max()) + 1 if len(labels) else 1
    index, scores = detect.suppress(boxes, scores, torch.zeros_like(labels), labels, classes)
    most = detect.config.top_k
    return {"boxes": boxes[index][:most], "scores": scores[:most], "labels": labels[index][:most]}


def _is_covered(boxes: Tensor, labels: Tensor, cut: Tensor) -> Tensor:
    """Return bool [n]: which boxes are cut off, and covered by a whole box of their class."""
    covered = torch.zeros_like(cut)
    for label in labels[cut].unique():
        parts, whole = cut & (labels == label), ~cut & (labels == label)
        areas = (boxes[parts, 2:] - boxes[parts, :2]).clamp(min=1e-6).prod(1)
        shared = intersections(boxes[parts], boxes[whole]) / areas[:, None]
        covered[parts] = (shared >= COVERED).any(1)
    return covered
