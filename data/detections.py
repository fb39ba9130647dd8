"""The detections of a test run: as columns, and as one compressed file tied to what made them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import atomic_write, load_arrays

LARGEST = 1e100  # coordinate of a box: areas and sums of areas stay finite
# What detections were made with before there was a choice; their files do not say it.
FORMER_SUPPRESSION = {"nms": "hard", "class_agnostic": False, "background_shortcut": False}


def as_columns(
    detections: Sequence[dict], ids: Sequence, num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Detections (one dict an image: boxes [n, 4], scores [n], labels [n]) of all images in a row.

    Returns int64 [N] positions in ``ids``, float64 [N] scores, int64 [N] labels, float64 [N, 4]
    boxes.

    Raises:
        ValueError: not one dict an image, arrays of different lengths in one, a label outside of
            1..num_classes, a score or a box that is not finite, or a box beyond ``LARGEST``.
    """
    if len(detections) != len(ids):
        raise ValueError(f"{len(detections)} detections for {len(ids)} images")
    shapes = {"scores": (-1,), "labels": (-1,), "boxes": (-1, 4)}
    parts = [
        [np.asarray(found[key], np.float64).reshape(shape) for found in detections]
        for key, shape in shapes.items()
    ]
    for i, lengths in enumerate(zip(*([*map(len, part)] for part in parts), strict=True)):
        if len(set(lengths)) > 1:
            raise ValueError("image {}: {} scores, {} labels and {} boxes".format(ids[i], *lengths))
    scores, labels, boxes = (
        np.concatenate([np.empty((0, *shape[1:])), *part])
        for part, shape in zip(parts, shapes.values(), strict=True)
    )
    images = np.repeat(np.arange(len(ids)), [*map(len, parts[0])])
    good = np.isfinite(scores) & (np.abs(boxes) <= LARGEST).all(1)
    good &= (labels >= 1) & (labels <= num_classes)
    if not good.all():
        k = good.argmin()
        raise ValueError(
            f"image {ids[images[k]]}: detection with label {labels[k]:g} of {num_classes}, "
            f"score {scores[k]}, box {boxes[k]}"
        )
    return images, scores, labels.astype(np.int64), boxes


def save_detections(
    path: Path, ids: list, detections: list[dict[str, np.ndarray]], made_by: dict
) -> None:
    """Write detections (one dict an image: boxes [n, 4], scores [n], labels [n]) to an .npz.

    ``made_by`` is plain JSON data that says which checkpoint, image sets and limits they are of.
    """
    with atomic_write(path) as file:
        np.savez_compressed(
            file,
            ids=np.array([str(i) for i in ids], dtype=np.str_),
            counts=np.array([len(d["scores"]) for d in detections], np.int64),
            boxes=_join(detections, "boxes", np.zeros((0, 4), np.float32)),
            scores=_join(detections, "scores", np.zeros(0, np.float32)),
            labels=_join(detections, "labels", np.zeros(0, np.int64)),
            made_by=np.array(json.dumps(made_by)),
        )


def load_detections(
    path: Path, ids: list, made_by: dict
) -> tuple[list[dict[str, np.ndarray]], dict]:
    """Read back what ``save_detections`` wrote, if it was made by the same things.

    ``made_by`` may name fewer things than were saved; those named must be equal.

    Returns:
        The detections, and all that was saved of what made them.

    Raises:
        UserError: no such file, a damaged one, or one of another checkpoint, image set or limit.
    """
    again = "run the test without --retest"
    if not path.exists():
        raise UserError(f"{path} does not exist: no detections to score again; {again} first")
    try:
        saved = load_arrays(path)
        found = json.loads(str(saved["made_by"]))
        counts, columns = saved["counts"], [saved[k] for k in ("boxes", "scores", "labels")]
        total = int(counts.sum())
        shapes = [(total, 4), (total,), (total,)]
        if (counts < 0).any() or [c.shape for c in columns] != shapes or type(found) is not dict:
            raise ValueError("its arrays do not fit together")
        parts = [np.split(column, np.cumsum(counts)[:-1]) for column in columns]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); {again}") from error
    if "thresholds" in found:
        found.setdefault("suppression", FORMER_SUPPRESSION)
    for key, value in made_by.items():
        was, what = found.get(key), key
        if was != value:
            if isinstance(was, dict) and isinstance(value, dict):
                part = next(
                    k for k in {**value, **was}
                    if k not in was or k not in value or was[k] != value[k]
                )  # fmt: skip
                was, value, what = was.get(part), value.get(part), f"{key}: {part}"
            raise UserError(f"{path} was made with {what} {was!r}, not {value!r}; {again}")
    if saved["ids"].tolist() != [str(i) for i in ids]:
        raise UserError(f"{path} is of other pictures than the image set's; {again}")
    return [
        {"boxes": boxes, "scores": scores, "labels": labels}
        for boxes, scores, labels in zip(*parts, strict=True)
    ], found


def _join(detections: list[dict[str, np.ndarray]], key: str, empty: np.ndarray) -> np.ndarray:
    return np.concatenate([empty, *(d[key] for d in detections)])
