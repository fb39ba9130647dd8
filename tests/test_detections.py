"""Kept detections: damaged files, and files of before suppression could be chosen."""

import numpy as np
import pytest

from data.detections import as_columns, load_detections, save_detections
from utils.errors import UserError

FOUND = [
    {"boxes": np.ones((n, 4), np.float32), "scores": np.ones(n, np.float32), "labels": np.ones(n)}
    for n in (2, 0)
]
THRESHOLDS = {"score": 0.01, "nms": 0.45}


def test_file_that_says_nothing_of_suppression_had_the_published_one(tmp_path):
    path = tmp_path / "d.npz"
    published = {"nms": "hard", "class_agnostic": False, "background_shortcut": False}
    save_detections(path, ["a", "b"], FOUND, {"thresholds": THRESHOLDS})
    asked = {"thresholds": THRESHOLDS, "suppression": published}
    _, made_by = load_detections(path, ["a", "b"], asked)
    assert made_by == asked
    asked["suppression"] = {**published, "nms": "soft"}
    with pytest.raises(UserError, match="made with suppression: nms 'hard', not 'soft'"):
        load_detections(path, ["a", "b"], asked)
    save_detections(path, ["a", "b"], FOUND, asked)
    assert load_detections(path, ["a", "b"], asked)[1] == asked


def test_columns_are_all_images_in_a_row():
    images, scores, labels, boxes = as_columns(FOUND[::-1], ["b", "a"], 1)
    assert images.tolist() == [1, 1] and labels.tolist() == [1, 1]
    assert (images.dtype, scores.dtype, labels.dtype) == (np.int64, np.float64, np.int64)
    assert boxes.shape == (2, 4) and as_columns([], [], 1)[3].shape == (0, 4)


def test_arrays_of_an_image_have_one_length_though_the_sums_are_equal():
    found = [{"boxes": np.ones((n, 4)), "scores": np.ones(3 - n), "labels": np.ones(n)}
             for n in (1, 2)]  # fmt: skip
    with pytest.raises(ValueError, match="image a: 2 scores, 1 labels and 1 boxes"):
        as_columns(found, ["a", "b"], 1)
