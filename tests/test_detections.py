"""Detections as columns, and kept in a file with what made them."""

import numpy as np
import pytest

from data.detections import as_columns, load_detections, save_detections
from utils.errors import UserError

FOUND = [
    {"boxes": np.ones((n, 4), np.float32), "scores": np.ones(n, np.float32), "labels": np.ones(n)}
    for n in (2, 0)
]
MADE_BY = {"sets": "test", "thresholds": {"score": 0.01, "nms": 0.45}}


def test_detections_are_read_back_if_they_were_made_by_the_same_things(tmp_path):
    path = tmp_path / "d.npz"
    save_detections(path, ["a", 7], FOUND, MADE_BY)
    for asked in ({}, {"sets": "test"}, MADE_BY):
        found, made_by = load_detections(path, ["a", 7], 1, asked)
        assert made_by == MADE_BY and len(found) == 2
        for one, other in zip(found, FOUND, strict=True):
            assert all(np.array_equal(one[key], other[key]) for key in one)
    for asked, message in (
        ({"sets": "val"}, "sets 'test', not 'val'"),
        ({"thresholds": {"score": 0.5, "nms": 0.45}}, "thresholds: score 0.01, not 0.5"),
        ({"thresholds": {"score": 0.01}}, "thresholds: nms 0.45, not None"),
        ({"classes": ["x"]}, r"classes None, not \['x'\]"),
    ):
        with pytest.raises(UserError, match=f"{path} .*{message}; .*without --retest"):
            load_detections(path, ["a", 7], 1, asked)
    with pytest.raises(UserError, match=f"{path} is of other images"):
        load_detections(path, ["a", "b"], 1, {})


def test_file_that_is_missing_or_damaged_is_refused(tmp_path):
    path = tmp_path / "d.npz"
    with pytest.raises(UserError, match=f"{path} does not exist: .*without --retest"):
        load_detections(path, [], 1, {})
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match=f"{path} is damaged"):
        load_detections(path, [], 1, {})
    save_detections(path, ["a", "b"], FOUND, MADE_BY)
    arrays = dict(np.load(path))
    for change in ({"counts": np.array([1, 0])}, {"counts": np.array([3, -1])},
                   {"made_by": np.array("[]")}, {"made_by": np.array("[" * 9999)},
                   {"counts": np.ones(2)}, {"labels": np.array(["a", "b"])}, {"ids": np.array(1)},
                   {"scores": np.array([{}, {}], object)}, {"boxes": np.ones((4, 2))}):  # fmt: skip
        np.savez(path, **arrays | change)
        with pytest.raises(UserError, match=f"{path} is damaged .*without --retest"):
            load_detections(path, ["a", "b"], 1, {})
    for change in ({"labels": np.array([1, 2])}, {"scores": np.array([1, np.nan])}):
        np.savez(path, **arrays | change)
        with pytest.raises(UserError, match=f"{path} does not fit .*image a.*without --retest"):
            load_detections(path, ["a", "b"], 1, {})


def test_columns_are_all_images_in_a_row():
    images, scores, labels, boxes = as_columns(FOUND[::-1], ["b", "a"], 1)
    assert images.tolist() == [1, 1] and labels.tolist() == [1, 1]
    assert (images.dtype, scores.dtype, labels.dtype) == (np.int64, np.float64, np.int64)
    assert boxes.shape == (2, 4) and as_columns([], [], 1)[3].shape == (0, 4)


@pytest.mark.parametrize(("change", "message"), [
    ({"labels": [0]}, "image x: .*label 0 of 1"), ({"labels": [2]}, "image x: .*label 2 of 1"),
    ({"scores": [np.nan]}, "image x: .*score nan"),
    ({"boxes": [[0, 0, np.inf, 1]]}, "image x: .*box .*inf"),
    ({"boxes": [[0, 0, 1e160, 1e160]]}, "image x: .*box .*e\\+160"),
    ({"boxes": np.zeros((2, 4))}, "image x: 1 scores, 1 labels and 2 boxes"),
])
def test_wrong_detections_are_refused(change, message):
    found = {"boxes": [[0, 0, 1, 1]], "scores": [0.5], "labels": [1]} | change
    with pytest.raises(ValueError, match=message):
        as_columns([found], ["x"], 1)


def test_arrays_of_an_image_have_one_length_though_the_sums_are_equal():
    found = [{"boxes": np.ones((n, 4)), "scores": np.ones(3 - n), "labels": np.ones(n)}
             for n in (1, 2)]  # fmt: skip
    with pytest.raises(ValueError, match="image a: 2 scores, 1 labels and 1 boxes"):
        as_columns(found, ["a", "b"], 1)
