"""The detections of a test run: as columns, and as one compressed file tied to what made them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import atomic_write, load_arrays

LARGEST = 1e100
"""Largest coordinate of a box: areas and their sums stay finite."""


def undetected(detected: int, images: int) -> list[str]:
    """Return a line for people if some of the images that are scored have no detection."""
    return [f"{images - detected} of {images} images have no detection; if the test left them out, "
            "these scores are too low"] * (detected < images)


def as_columns(detections: Sequence[dict], ids: Sequence,
               num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Join the detections of all images, one dict an image: "boxes" [n, 4], "scores", "labels" [n].

    n may be 0. Returns int64 [N] positions in ``ids`` (the images' names), float64 [N] scores,
    int64 [N] labels and float64 [N, 4] boxes.

    Raises:
        ValueError: not one dict an image, arrays of different lengths in one, a label outside of
            1..num_classes, a score or a box that is not finite, or a box beyond `LARGEST`.
    """
    if len(detections) != len(ids):
        raise ValueError(f"{len(detections)} detections for {len(ids)} images")
    shapes = {"scores": (-1,), "labels": (-1,), "boxes": (-1, 4)}
    parts = [[np.asarray(found[key], np.float64).reshape(shape) for found in detections]
             for key, shape in shapes.items()]
    for i, lengths in enumerate(zip(*([*map(len, part)] for part in parts), strict=True)):
        if len(set(lengths)) > 1:
            raise ValueError("image {}: {} scores, {} labels and {} boxes".format(ids[i], *lengths))
    scores, labels, boxes = (np.concatenate([np.empty((0, *shape[1:])), *part])
                             for part, shape in zip(parts, shapes.values(), strict=True))
    images = np.repeat(np.arange(len(ids)), [*map(len, parts[0])])
    good = np.isfinite(scores) & (np.abs(boxes) <= LARGEST).all(1)
    good &= (labels >= 1) & (labels <= num_classes)
    if not good.all():
        k = good.argmin()
        raise ValueError(f"image {ids[images[k]]}: detection with label {labels[k]:g} of "
                         f"{num_classes}, score {scores[k]}, box {boxes[k]}")
    return images, scores, labels.astype(np.int64), boxes


def save_detections(path: Path, ids: Sequence, detections: Sequence[dict[str, np.ndarray]],
                    made_by: dict) -> None:
    """Write detections, as in `as_columns`, to an .npz file.

    made_by: plain JSON data that says which checkpoint, image sets and limits they are of.
    """
    arrays = {"ids": np.array([str(i) for i in ids], np.str_),
              "counts": np.array([len(each["scores"]) for each in detections], np.int64)}
    for key, empty in (("boxes", np.zeros((0, 4), np.float32)), ("scores", np.zeros(0, np.float32)),
                       ("labels", np.zeros(0, np.int64))):
        arrays[key] = np.concatenate([empty, *(each[key] for each in detections)])
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays, made_by=np.array(json.dumps(made_by)))


def load_detections(path: Path, ids: Sequence, num_classes: int,
                    made_by: dict) -> tuple[list[dict[str, np.ndarray]], dict]:
    """Return the detections that `save_detections` wrote, and the file's own ``made_by``.

    made_by: what the detections must have been made with; it may name fewer things than the file.
    Raises UserError for no such file, a damaged one, one of another checkpoint, image set or limit,
    or one with values that `as_columns` refuses.
    """
    again = "run the test again, without --retest"
    if not path.exists():
        raise UserError(f"{path} does not exist: no detections to score again; {again}")
    try:
        detections, found, names = _parse(path)
    except Exception as error:  # of any values
        raise UserError(f"{path} is damaged ({error!r:.200}); {again}") from error
    if difference := _difference(found, made_by):
        what, was, wanted = difference
        raise UserError(f"{path} was made with {what} {was!r}, not {wanted!r}; {again}")
    if names != [str(i) for i in ids]:
        raise UserError(f"{path} is of other images than the image set's; {again}")
    try:
        as_columns(detections, ids, num_classes)
    except ValueError as error:
        raise UserError(f"{path} does not fit the test ({error}); {again}") from error
    return detections, found


def _parse(path: Path) -> tuple[list[dict[str, np.ndarray]], dict, list[str]]:
    saved = load_arrays(path, ids=("U", 1), counts=("iu", 1), boxes=("f", 2), scores=("f", 1),
                        labels=("iuf", 1), made_by=("U", 0))
    found = json.loads(str(saved["made_by"]))
    counts, columns = saved["counts"], [saved[k] for k in ("boxes", "scores", "labels")]
    total = int(counts.sum())
    shapes = [(total, 4), (total,), (total,)]
    if (counts < 0).any() or [c.shape for c in columns] != shapes or type(found) is not dict:
        raise ValueError("its arrays do not fit together")
    parts = [np.split(column, np.cumsum(counts)[:-1]) for column in columns]
    detections = [dict(zip(("boxes", "scores", "labels"), columns, strict=True))
                  for columns in zip(*parts, strict=True)]
    return detections, found, saved["ids"].tolist()


def _difference(found: dict, wanted: dict) -> tuple[str, object, object] | None:
    """Return the first entry, or entry of an entry, of ``wanted`` that differs in ``found``."""
    for key, value in wanted.items():
        was = found.get(key)
        if was != value and isinstance(was, dict) and isinstance(value, dict):
            parts = {**value, **was}
            part = next(k for k in parts if (was.get(k), k in was) != (value.get(k), k in value))
            return f"{key}: {part}", was.get(part), value.get(part)
        if was != value:
            return key, was, value
    return None
