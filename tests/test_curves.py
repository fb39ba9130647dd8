"""Precision-recall curves in a file, and curves of training logs in an image."""

import json

import cv2
import numpy as np
import pytest

from data.curves import load_curves, write_curves
from docs import curves as of_logs
from utils.errors import UserError


def dense(path):
    """COCO's kind: 2 thresholds, 3 recalls, 2 classes; the second has no large object."""
    precision = np.arange(2 * 3 * 2 * 4).reshape(2, 3, 2, 4) / 48
    precision[:, :, 1, 3] = -1
    recall = np.array([0, 0.5, 1])
    write_curves(path, ["dog", "Kühe"], [0.5, 0.75], recall=recall, precision=precision,
                 scores=precision / 2)  # fmt: skip
    return precision


def ragged(path, **change):
    """VOC's kind: the counts are those of (dog, Kühe) x (all, small, medium, large)."""
    counts = np.array([[[2, 0, 2, 0], [1, 1, 0, 0]]])
    arrays = {"recall": np.arange(6) / 6, "precision": np.ones(6), "scores": np.arange(6.0)}
    write_curves(path, ["dog", "Kühe"], [0.5], **{"counts": counts, **arrays, **change})


def test_curve_of_coco_is_a_line_through_the_array(tmp_path):
    precision = dense(tmp_path / "curves.npz")
    curves = load_curves(tmp_path / "curves.npz")
    curve = curves.curve("Kühe", "small", 0.75)
    assert np.array_equal(curve["precision"], precision[1, :, 1, 1])
    assert np.array_equal(curve["scores"], precision[1, :, 1, 1] / 2)
    assert curve["recall"].tolist() == [0, 0.5, 1]
    assert all(len(column) == 0 for column in curves.curve("Kühe", "large").values())
    for call in (("cat",), ("dog", "tiny"), ("dog", "all", 0.6)):
        with pytest.raises(ValueError, match="dog, Kühe, all, small, .* IoU 0.5, 0.75"):
            curves.curve(*call)


def test_curve_of_voc_is_its_part_of_the_points(tmp_path):
    ragged(tmp_path / "curves.npz")
    curves = load_curves(tmp_path / "curves.npz")
    parts = {("dog", "all"): [0, 1], ("dog", "small"): [], ("dog", "medium"): [2, 3],
             ("Kühe", "all"): [4], ("Kühe", "small"): [5], ("Kühe", "large"): []}  # fmt: skip
    for (name, area), scores in parts.items():
        assert curves.curve(name, area)["scores"].tolist() == scores


def test_file_that_is_no_curves_is_refused(tmp_path):
    path = tmp_path / "curves.npz"
    writers = [
        lambda: None,
        *(lambda content=content: path.write_bytes(content) for content in (b"", b"PK cut", b"a")),
        lambda: np.savez(path, precision=np.ones(3)),
        lambda: np.savez(path, classes=np.array([{}], object)),  # a pickle is not opened
        lambda: ragged(path, recall=np.ones(5)),
        lambda: ragged(path, counts=np.ones((1, 2, 3), int)),
        lambda: ragged(path, counts=np.array([[[3, -1, 2, 0], [1, 1, 0, 0]]])),
        lambda: ragged(path, scores=np.full(6, np.nan)),
        lambda: ragged(path, precision=np.full(6, "1")),
        lambda: write_curves(path, "dog", ["0.5"], recall=np.ones(1)),
    ]
    for write in writers:
        write()
        with pytest.raises(UserError, match="curves.npz: .*curves"):
            load_curves(path)


def test_curves_of_logs_are_drawn(tmp_path):
    log, out = tmp_path / "log.jsonl", tmp_path / "new" / "out.png"
    records = [{"epoch": e, "loss_loc": 1, "loss_conf": 4 / e, "value": e / 4} for e in (1, 2, 3)]
    log.write_text("\n".join(map(json.dumps, records)))
    assert of_logs.main([str(out), f"a={log}", f"b={log}"]) == 0
    assert cv2.imread(str(out)).std() > 5
    assert of_logs.main([str(out), f"a={tmp_path / 'none'}"]) == 2
