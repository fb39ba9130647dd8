"""The detections of a test run as one compressed file, tied to what made them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np

from utils.errors import UserError


def save_detections(
    path: Path, ids: list, detections: list[dict[str, np.ndarray]], made_by: dict
) -> None:
    """Write detections (one dict an image: boxes [n, 4], scores [n], labels [n]) to an .npz.

    ``made_by`` is plain JSON data that says which checkpoint, image sets and limits they are of.
    """
    with open(path, "wb") as file:
        np.savez_compressed(
            file,
            ids=np.array([str(i) for i in ids], dtype=np.str_),
            counts=np.array([len(d["scores"]) for d in detections], np.int64),
            boxes=_join(detections, "boxes", np.zeros((0, 4), np.float32)),
            scores=_join(detections, "scores", np.zeros(0, np.float32)),
            labels=_join(detections, "labels", np.zeros(0, np.int64)),
            made_by=np.array(json.dumps(made_by)),
        )


def load_detections(path: Path, ids: list, made_by: dict) -> list[dict[str, np.ndarray]]:
    """Read back what ``save_detections`` wrote, if it was made by the same things.

    Raises:
        UserError: no such file, a damaged one, or one of another checkpoint, image set or limit.
    """
    if not path.exists():
        raise UserError(
            f"{path} does not exist: there are no detections to score again; run "
            "the test without --retest first"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            saved = {name: file[name] for name in file.files}
        found = json.loads(str(saved["made_by"]))
        bounds = np.cumsum(saved["counts"])[:-1]
        columns = [np.split(saved[name], bounds) for name in ("boxes", "scores", "labels")]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); run the test without --retest") from error
    for key, value in made_by.items():
        if found.get(key) != value:
            raise UserError(
                f"{path} was made with {key} {found.get(key)!r}, not {value!r}; run the test "
                "without --retest"
            )
    if saved["ids"].tolist() != [str(i) for i in ids]:
        raise UserError(
            f"{path} is of other pictures than the image set's; run the test without --retest"
        )
    return [
        {"boxes": boxes, "scores": scores, "labels": labels}
        for boxes, scores, labels in zip(*columns, strict=True)
    ]


def _join(detections: list[dict[str, np.ndarray]], key: str, empty: np.ndarray) -> np.ndarray:
    return np.concatenate([empty, *(d[key] for d in detections)])
