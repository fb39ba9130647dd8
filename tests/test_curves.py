import numpy as np
import pytest

from data.curves import load_curves, write_curves
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
    assert curves.classes == ("dog", "Kühe")
    assert curves.areas == ("all", "small", "medium", "large")
    curve = curves.curve("Kühe", "small", 0.75)
    assert np.array_equal(curve["precision"], precision[1, :, 1, 1])
    assert np.array_equal(curve["scores"], precision[1, :, 1, 1] / 2)
    assert curve["recall"].tolist() == [0, 0.5, 1]
    assert np.array_equal(curves.curve("dog")["precision"], precision[0, :, 0, 0])
    assert all(len(column) == 0 for column in curves.curve("Kühe", "large").values())


def test_curve_of_voc_is_its_part_of_the_points(tmp_path):
    ragged(tmp_path / "curves.npz")
    curves = load_curves(tmp_path / "curves.npz")
    parts = {("dog", "all"): [0, 1], ("dog", "small"): [], ("dog", "medium"): [2, 3],
             ("Kühe", "all"): [4], ("Kühe", "small"): [5], ("Kühe", "large"): []}  # fmt: skip
    for (name, area), scores in parts.items():
        assert curves.curve(name, area)["scores"].tolist() == scores


@pytest.mark.parametrize("call", [("cat",), ("dog", "tiny"), ("dog", "all", 0.6)])
def test_curve_that_is_not_there_is_refused(tmp_path, call):
    dense(tmp_path / "curves.npz")
    with pytest.raises(ValueError, match="there are dog, Kühe, all, small, .* IoU 0.5, 0.75"):
        load_curves(tmp_path / "curves.npz").curve(*call)


def test_file_that_is_no_curves_is_refused(tmp_path):
    path = tmp_path / "curves.npz"
    with pytest.raises(UserError, match="curves.npz: the curves cannot be read"):
        load_curves(path)
    for content in (b"", b"PK\x03\x04 cut off", b"text"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="curves.npz: not a file of curves"):
            load_curves(path)
    np.save(path.open("wb"), np.ones(3))
    with pytest.raises(UserError, match="not a file of curves"):
        load_curves(path)
    np.savez(path, precision=np.ones(3))
    with pytest.raises(UserError, match="not a file of curves"):
        load_curves(path)
    np.savez(path, classes=np.array([{}], object))  # a pickle is not opened
    with pytest.raises(UserError, match="not a file of curves"):
        load_curves(path)
    for change in ({"recall": np.ones(5)}, {"counts": np.ones((1, 2, 3), int)}):
        ragged(path, **change)
        with pytest.raises(UserError, match="its arrays do not belong together"):
            load_curves(path)
