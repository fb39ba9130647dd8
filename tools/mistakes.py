"""The mistakes of a detector: listed, the worst of each kind and class chosen, and drawn."""

import base64
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from data import DetectionData
from data.judge import ERRORS, KINDS, LOCALISATION, Judged
from inference.draw import BLACK, GREEN, RED, resize
from utils.errors import UserError

SIDE = 220
"""Pixels of the longer side of a drawn mistake."""
MOST = 1200
"""Most mistakes drawn in a page, which has then about 12 MB."""


class Mistake(NamedTuple):
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
    missed = np.flatnonzero(judged.missed(score))
    areas = (truth.boxes[missed, 2:] - truth.boxes[missed, :2]).prod(1)
    missed = missed[np.argsort(-areas, kind="stable")]
    listed = [Mistake(KINDS[judged.kind[n]], found.labels[n], found.images[n], found.scores[n],
                      found.boxes[n], judged.objects[n], judged.overlaps[n]) for n in wrong]
    return listed + [Mistake(ERRORS[-1], truth.labels[n], truth.images[n], None, None, n, math.nan)
                     for n in missed]


def choose(mistakes: Sequence[Mistake], most: int) -> list[Mistake]:
    """Return the worst mistake of every kind and class, then the second worst, up to `most`."""
    groups: dict[tuple[str, int], list[Mistake]] = {}
    for mistake in mistakes:
        groups.setdefault((mistake.kind, mistake.label), []).append(mistake)
    return [group[rank] for rank in range(most) for group in groups.values() if rank < len(group)]


def draw_worst(mistakes: Sequence[Mistake], judged: Judged, dataset: DetectionData,
               most: int) -> tuple[list[tuple[Mistake, np.ndarray]], list[str]]:
    """Draw the worst mistakes, `most` of each kind and class, at most `MOST` in all.

    Returns the drawn mistakes with their images, BGR uint8, and notes for people.
    """
    drawn, notes, chosen = [], set(), choose(mistakes, most)
    for mistake in chosen[:MOST]:
        there = judged.truth.boxes[mistake.object] if mistake.object >= 0 else None
        try:
            image = dataset.pull_image(mistake.image)
            drawn.append((mistake, draw_mistake(image, there, mistake.box)))
        except UserError as error:
            notes.add(str(error))
    if left_out := chosen[MOST:]:
        notes.add(f"{len(left_out)} images of mistakes are left out to keep the page small")
    return drawn, sorted(notes)


def draw_mistake(image: np.ndarray, truth: np.ndarray | None, box: np.ndarray | None,
                 others: Iterable[np.ndarray] = ()) -> np.ndarray:
    """Return the part of an image around a mistake, BGR uint8, its longer side `SIDE` pixels.

    truth, box: extents of the object, green, and of the detection, red and thinner, so that both
    are seen where they coincide; None for none. others: objects that may be in sight, green.
    """
    boxes = np.array([b for b in (truth, box) if b is not None])
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    limit = np.array(image.shape[1::-1])
    reach = np.maximum(0.4 * (high - low).max(), 24)
    low = np.clip(np.floor(low - reach), 0, limit - 1).astype(int)
    high = np.clip(np.ceil(high + reach), low + 1, limit).astype(int)
    scale = SIDE / (high - low).max()
    part = resize(image[low[1] : high[1], low[0] : high[0]], scale)
    for corners, tone, width in (*((other, GREEN, 2) for other in others), (truth, GREEN, 4),
                                 (box, RED, 2)):  # fmt: skip
        if corners is not None:
            ends = ((corners - np.tile(low, 2)) * scale).clip(-9, SIDE + 9).round().astype(int)
            start, end = ends[:2].tolist(), (ends[2:] - 1).tolist()
            cv2.rectangle(part, start, end, BLACK, width + 2)
            cv2.rectangle(part, start, end, tone, width)
    return part


def data_url(image: np.ndarray) -> str:
    """Return an image as the address of a JPEG that is in the page itself."""
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 80])
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
