"""The mistakes of a detector: listed, the worst of each kind and class chosen, and shown."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from data import DetectionData
from data.judge import ERRORS, KINDS, LOCALISATION, Judged
from inference.draw import GREEN, RED
from utils.errors import UserError

SIDE = 220
"""Pixels of the longer side of a drawn mistake."""
IMAGES = 12 * 2**20
"""Most bytes of all images in a page."""


@dataclass(frozen=True)
class Mistake:
    """A wrong detection, or a missed object (`score` and `box` None).

    kind: one of `ERRORS`. label: the class that the detection claims, or the object's, from 1.
    image: index in the data set. box: extents. object: row of the ground truth, -1 for none.
    overlap: the IoU with it, NaN for a missed object.
    """

    kind: str
    label: int
    image: int
    score: float | None
    box: np.ndarray | None
    object: int
    overlap: float


def list_mistakes(judged: Judged, score: float) -> list[Mistake]:
    """Return all mistakes of detections of at least `score`, the worst first.

    Wrong detections stand by falling score, then missed objects by falling area.
    """
    truth, found = judged.truth, judged.found
    wrong = np.flatnonzero(judged.counted(score) & (judged.kind >= LOCALISATION))
    wrong = wrong[np.argsort(-found.scores[wrong], kind="stable")]
    mistakes = [
        Mistake(KINDS[judged.kind[n]], int(found.labels[n]), int(found.images[n]),
                float(found.scores[n]), found.boxes[n], int(judged.objects[n]),
                float(judged.overlaps[n]))
        for n in wrong
    ]  # fmt: skip
    missed = np.flatnonzero(judged.missed(score))
    areas = (truth.boxes[missed, 2:] - truth.boxes[missed, :2]).prod(1)
    return mistakes + [
        Mistake(ERRORS[-1], int(truth.labels[n]), int(truth.images[n]), None, None, int(n),
                math.nan)
        for n in missed[np.argsort(-areas, kind="stable")]
    ]  # fmt: skip


def choose(mistakes: Sequence[Mistake], most: int) -> Iterator[Mistake]:
    """Yield the worst mistake of every kind and class, then the second worst, up to `most`."""
    groups: dict[tuple[str, int], list[Mistake]] = {}
    for mistake in mistakes:
        groups.setdefault((mistake.kind, mistake.label), []).append(mistake)
    for rank in range(most):
        yield from (group[rank] for group in groups.values() if rank < len(group))


def draw_mistake(image: np.ndarray, truth: np.ndarray | None, box: np.ndarray | None) -> np.ndarray:
    """Return the part of an image around a mistake, BGR uint8, its longer side `SIDE` pixels.

    truth, box: extents of the object, green, and of the detection, red and thinner, so that both
    are seen where they coincide; None for none.
    """
    boxes = np.array([b for b in (truth, box) if b is not None])
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    limit = np.array(image.shape[1::-1])
    reach = np.maximum(0.4 * (high - low).max(), 24)
    low = np.clip(np.floor(low - reach), 0, limit - 1).astype(int)
    high = np.clip(np.ceil(high + reach), low + 1, limit).astype(int)
    part = image[low[1] : high[1], low[0] : high[0]]
    scale = SIDE / max(part.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in part.shape[1::-1])
    part = cv2.resize(part, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    for corners, tone, width in ((truth, GREEN, 4), (box, RED, 2)):
        if corners is not None:
            x1, y1, x2, y2 = ((corners - np.tile(low, 2)) * scale).clip(-9, SIDE + 9).round()
            start, end = (int(x1), int(y1)), (int(x2) - 1, int(y2) - 1)
            cv2.rectangle(part, start, end, (0, 0, 0), width + 2)
            cv2.rectangle(part, start, end, tone, width)
    return part


@dataclass(frozen=True)
class Gallery:
    """All mistakes, those that are shown with their images, BGR uint8, and notes on them."""

    mistakes: list[Mistake]
    shown: list[tuple[Mistake, np.ndarray]]
    notes: tuple[str, ...]


def make_gallery(judged: Judged, dataset: DetectionData, score: float, most: int) -> Gallery:
    """Draw the worst mistakes, `most` of each kind and class, as many as a page has room for."""
    mistakes, shown, unread = list_mistakes(judged, score), [], set()
    room, left_out = IMAGES, 0
    for mistake in choose(mistakes, most):
        if room < 0:
            left_out += 1
            continue
        try:
            image = dataset.pull_image(mistake.image)
        except UserError as error:
            unread.add(str(error))
            continue
        there = judged.truth.boxes[mistake.object] if mistake.object >= 0 else None
        shown.append((mistake, draw_mistake(image, there, mistake.box)))
        room -= len(as_jpeg(shown[-1][1]))
    notes = sorted(unread)
    if left_out:
        notes.append(f"{left_out} images of mistakes are left out to keep the page small")
    return Gallery(mistakes, shown, tuple(notes))


def as_jpeg(image: np.ndarray) -> str:
    """Return an image as a JPEG in base64."""
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 80])
    return base64.b64encode(data).decode()
