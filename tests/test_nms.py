"""NMS against published results, literal references, and its two routines against each other."""

import math
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import utils.nms as nms_module
from utils.nms import backend, backend_reason, class_nms, nms, soft_nms

GOLDENS = Path(__file__).parent / "goldens"
compiled = pytest.mark.skipif(backend() != "cython", reason=f"backend is torch: {backend_reason()}")
both = pytest.mark.parametrize("routine", ["torch", pytest.param("cython", marks=compiled)])


@contextmanager
def using(routine):
    if routine == "cython":
        assert backend() == "cython"
        yield
    else:
        with mock.patch.object(nms_module, "_extension", lambda: (None, "a test")):
            yield


def pixel_iou(a, b):
    """IoU of two boxes in float32, one number at a time; NaN where the union is empty."""
    one, zero = np.float32(1), np.float32(0)
    width = max(zero, min(a[2], b[2]) - max(a[0], b[0]) + one)
    height = max(zero, min(a[3], b[3]) - max(a[1], b[1]) + one)
    areas = [(box[2] - box[0] + one) * (box[3] - box[1] + one) for box in (a, b)]
    with np.errstate(all="ignore"):
        return width * height / (areas[0] + areas[1] - width * height)


def literal_nms(dets, thresh):
    kept = []
    for i in sorted(range(len(dets)), key=lambda i: -dets[i][4]):
        if not any(pixel_iou(dets[j], dets[i]) > np.float32(thresh) for j in kept):
            kept.append(i)
    return kept


def random_dets(count, span, seed=0):
    rng = np.random.default_rng(seed)
    corner, size = rng.uniform(0, span, (count, 2)), rng.uniform(5, 100, (count, 2))
    scores = rng.uniform(size=(count, 1))
    return np.hstack([corner, corner + size, scores]).astype(np.float32)


@both
@pytest.mark.parametrize("percent", [30, 45, 70])
def test_keeps_the_published_boxes_in_their_order(routine, percent):
    golden = np.load(GOLDENS / "nms_pixel.npz")
    with using(routine):
        kept = nms(golden["dets"], percent / 100)
    assert kept.dtype == np.int64
    assert np.array_equal(kept, golden[f"keep_{percent}"])


@both
def test_equals_the_literal_reference_on_crowded_boxes(routine):
    dets = random_dets(300, span=150)
    for thresh in (0.0, 0.3, 0.5, 1.0):
        with using(routine):
            assert nms(dets, thresh).tolist() == literal_nms(dets, thresh)


@both
def test_a_box_is_one_pixel_wider_than_the_difference_of_its_corners(routine):
    # 10x10 and the same shifted by 5: 50 pixels of 150; without the pixel it would be 36 of 126.
    dets = np.float32([[0, 0, 9, 9, 0.9], [5, 0, 14, 9, 0.8]])
    with using(routine):
        assert nms(dets, 0.33).tolist() == [0]
        assert nms(dets, 0.34).tolist() == [0, 1]


@both
def test_an_overlap_equal_to_the_threshold_is_kept(routine):
    dets = np.float32([[0, 0, 9, 9, 0.9], [0, 0, 9, 4, 0.8], [0, 0, 9, 2, 0.7]])  # IoU 1/2, 3/10
    with using(routine):
        assert nms(dets[:2], 0.5).tolist() == [0, 1]
        assert nms(dets[:2], 0.49).tolist() == [0]
        assert nms(dets[[0, 2]], 0.3).tolist() == [0, 1]  # 0.3 is another number in float64


@both
def test_of_equal_scores_the_earlier_box_wins(routine):
    box = [0, 0, 9, 9, 0.5]
    dets = np.float32([[50, 50, 60, 60, 0.5], box, box, [100, 0, 110, 9, 0.5], box])
    with using(routine):
        assert nms(dets, 0.5).tolist() == [0, 1, 3]


@both
def test_scores_are_compared_in_their_own_precision(routine):
    dets = np.array([[0, 0, 9, 9, 0.5], [0, 0, 9, 9, 0.5 + 1e-12]])
    with using(routine):
        assert nms(dets, 0.5).tolist() == [1]


@both
def test_identical_boxes_leave_one_and_touching_boxes_stay(routine):
    same = np.tile(np.float32([3, 3, 8, 8, 0.5]), (200, 1))
    touching = np.float32([[0, 0, 9, 9, 0.9], [10, 0, 19, 9, 0.8], [0, 10, 9, 19, 0.7]])
    with using(routine):
        assert nms(same, 0.99).tolist() == [0]
        assert nms(touching, 0.0).tolist() == [0, 1, 2]


@both
def test_boxes_without_area_neither_suppress_nor_are_suppressed(routine):
    dets = np.float32(
        [
            [0, 0, 9, 9, 0.9],
            [5, 5, 4, 9, 0.8],
            [8, 8, 2, 2, 0.7],
            [8, 8, 2, 2, 0.6],
            [5, 0, 4, 9, 1],
        ]
    )
    with using(routine):
        assert nms(dets, 0.0).tolist() == [4, 0, 1, 2, 3]


@both
def test_no_box_and_one_box(routine):
    with using(routine):
        assert nms(np.zeros((0, 5), np.float32), 0.5).shape == (0,)
        assert nms(np.float32([[0, 0, 1, 1, 0.1]]), 0.5).tolist() == [0]


def test_the_result_is_the_container_that_came_in():
    dets = random_dets(50, span=100)
    before = dets.copy()
    array, tensor = nms(dets, 0.45), nms(torch.from_numpy(dets).requires_grad_(), 0.45)
    assert isinstance(array, np.ndarray) and array.dtype == np.int64
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int64
    assert array.tolist() == tensor.tolist()
    assert nms(dets[::-1], 0.45).tolist() == nms(dets[::-1].copy(), 0.45).tolist()
    empty = nms(torch.zeros(0, 5), 0.45)
    assert empty.dtype == torch.int64 and empty.shape == (0,)
    assert np.array_equal(dets, before)


def test_unusable_arguments_are_refused_with_their_values():
    with pytest.raises(ValueError, match=r"shape \[3, 4\], should be \[N, 5\]"):
        nms(np.zeros((3, 4), np.float32), 0.5)
    with pytest.raises(ValueError, match=r"shape \[5\]"):
        nms(torch.zeros(5), 0.5)
    with pytest.raises(ValueError, match="threshold is 1.5"):
        nms(np.zeros((3, 5), np.float32), 1.5)
    with pytest.raises(ValueError, match="threshold is nan"):
        nms(np.zeros((3, 5), np.float32), math.nan)
    for column in (0, 4):
        dets = np.zeros((3, 5), np.float32)
        dets[1, column] = np.nan
        for refused in (dets, torch.from_numpy(dets)):
            with pytest.raises(ValueError, match="contain NaN"):
                nms(refused, 0.5)
            with pytest.raises(ValueError, match="contain NaN"):
                soft_nms(refused)
        with pytest.raises(ValueError, match="contain NaN"):
            class_nms(*columns_of(dets), torch.zeros(3, dtype=torch.long), 0.5, 10)
    with pytest.raises(ValueError, match=r"boxes \[3, 4\], scores \[2\] and labels \[3\]"):
        class_nms(torch.zeros(3, 4), torch.zeros(2), torch.zeros(3, dtype=torch.long), 0.5, 10)
    with pytest.raises(ValueError, match="per_class is 0"):
        class_nms(torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, dtype=torch.long), 0.5, 0)


@both
def test_twenty_thousand_boxes(routine):
    dets = random_dets(20_000, span=400)
    with using(routine):
        kept = nms(dets, 0.45)
    head = dets[kept[:300]]
    assert (np.diff(dets[kept, 4]) <= 0).all()
    assert literal_nms(head, 0.45) == list(range(len(head)))


def columns_of(dets):
    dets = torch.from_numpy(dets)
    return dets[:, :4], dets[:, 4]


def by_class(dets, labels, thresh, per_class):
    """`class_nms` spelled out with `literal_nms`."""
    kept = []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        kept.extend(mine[literal_nms(dets[mine], thresh)[:per_class]].tolist())
    return sorted(kept, key=lambda i: (-dets[i, 4], i))


@both
@pytest.mark.parametrize("per_class", [1, 7, 1000])
def test_class_nms_is_nms_of_each_class(routine, per_class):
    dets = random_dets(400, span=100)
    dets[:, 4] = dets[:, 4].round(1)  # ties across and within labels
    labels = np.random.default_rng(1).integers(1, 6, 400)
    with using(routine):
        kept = class_nms(*columns_of(dets), torch.from_numpy(labels), 0.45, per_class)
    assert kept.tolist() == by_class(dets, labels, 0.45, per_class)


@both
def test_class_nms_of_one_class_is_nms(routine):
    dets = random_dets(2000, span=300)
    with using(routine):
        one = class_nms(*columns_of(dets), torch.ones(2000, dtype=torch.long), 0.45, 2000)
        assert one.tolist() == nms(dets, 0.45).tolist()


@both
def test_class_nms_of_nothing_is_nothing(routine):
    with using(routine):
        kept = class_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), 0.45, 50)
    assert kept.dtype == torch.int64 and kept.shape == (0,)


# Few distinct coordinates make touching, duplicated, empty and turned boxes, and threshold ties.
coordinates = st.one_of(
    st.integers(-3, 12).map(float), st.floats(-1e4, 1e4, width=32), st.floats(0, 12, width=32)
)
tables = st.integers(0, 150).flatmap(
    lambda count: st.tuples(
        hnp.arrays(np.float32, (count, 4), elements=coordinates),
        hnp.arrays(np.float32, count, elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])),
        hnp.arrays(np.int64, count, elements=st.integers(1, 3)),
    )
)
thresholds = st.one_of(
    st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 1 / 3, 0.45, 0.5, 0.6, 2 / 3, 1.0]), st.floats(0, 1)
)


@compiled
@settings(max_examples=150, deadline=None)
@given(table=tables, thresh=thresholds, per_class=st.sampled_from([1, 2, 5, 1000]))
def test_both_routines_agree(table, thresh, per_class):
    boxes, scores, labels = map(torch.from_numpy, table)
    cython = class_nms(boxes, scores, labels, thresh, per_class)
    with using("torch"):
        assert class_nms(boxes, scores, labels, thresh, per_class).tolist() == cython.tolist()


@compiled
@pytest.mark.parametrize("seed", range(4))
def test_both_routines_agree_on_integer_boxes_over_many_blocks(seed):
    rng = np.random.default_rng(seed)
    count = 2000
    corner = rng.integers(0, 60, (count, 2))
    boxes = np.hstack([corner, corner + rng.integers(-2, 20, (count, 2))]).astype(np.float32)
    scores = rng.integers(0, 100, count).astype(np.float32)
    labels = rng.choice(4, count, p=[0.85, 0.1, 0.04, 0.01])
    args = [torch.from_numpy(x) for x in (boxes, scores, labels)]
    for thresh in (0.2, 0.5, 0.75):
        for per_class in (3, 100, count):
            cython = class_nms(*args, thresh, per_class)
            with using("torch"):
                assert torch.equal(class_nms(*args, thresh, per_class), cython)


def literal_soft_nms(dets, thresh, method, sigma, min_score):
    left = {i: float(d[4]) for i, d in enumerate(dets)}
    order, scores = [], []
    while left:
        best = max(left, key=lambda i: (left[i], -i))
        score = left.pop(best)
        if score < min_score:
            break
        order.append(best)
        scores.append(score)
        for i in left:
            iou = float(pixel_iou(dets[best], dets[i]))
            if method == "gaussian":
                left[i] *= math.exp(-iou * iou / sigma)
            elif iou > thresh:
                left[i] *= 1 - iou
    return order, scores


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_equals_the_literal_reference(method):
    dets = random_dets(150, span=120)
    options = {"thresh": 0.3, "method": method, "sigma": 0.5, "min_score": 0.05}
    order, scores = literal_soft_nms(dets, **options)
    assert 10 < len(order) < 150
    for given_dets in (dets, torch.from_numpy(dets)):
        indices, rescored = soft_nms(given_dets, **options)
        assert type(indices) is type(rescored) is type(given_dets)
        assert indices.tolist() == order
        assert rescored.tolist() == pytest.approx(scores, rel=1e-4)


def test_soft_nms_by_hand():
    dets = np.float32(
        [[0, 0, 9, 9, 0.8], [0, 0, 9, 4, 0.9], [0, 0, 9, 9, 0.7], [50, 0, 59, 9, 0.001]]
    )
    indices, scores = soft_nms(dets, min_score=0.002)  # the first overlaps the second by 1/2
    assert indices.tolist() == [1, 0]
    assert scores.tolist() == pytest.approx([0.9, 0.4])  # the third then is 0.35, and 0.35 * 0 = 0
    assert scores.dtype == np.float32 and indices.dtype == np.int64
    indices, scores = soft_nms(dets[:2], method="gaussian", sigma=0.5)
    assert scores.tolist() == pytest.approx([0.9, 0.8 * math.exp(-0.5)])


def test_soft_nms_of_nothing_of_ties_and_of_boxes_without_area():
    indices, scores = soft_nms(np.zeros((0, 5), np.float32))
    assert indices.shape == scores.shape == (0,)
    indices, scores = soft_nms(torch.tensor([[0, 0, 9, 9, 0.5], [20, 0, 29, 9, 0.5]]))
    assert indices.tolist() == [0, 1]
    flat = np.float32([[5, 5, 4, 4, 0.9], [5, 5, 4, 4, 0.8]])
    for method in ("linear", "gaussian"):
        indices, scores = soft_nms(flat, method=method)
        assert scores.tolist() == pytest.approx([0.9, 0.8])


def test_soft_nms_refuses_unknown_options():
    dets = random_dets(3, span=10)
    with pytest.raises(ValueError, match="method is 'hard'"):
        soft_nms(dets, method="hard")
    with pytest.raises(ValueError, match="sigma is 0"):
        soft_nms(dets, sigma=0)
    with pytest.raises(ValueError, match="threshold is -1"):
        soft_nms(dets, thresh=-1)


@pytest.fixture
def forget():
    nms_module._extension.cache_clear()
    yield
    nms_module._extension.cache_clear()


def test_an_extension_that_is_not_compiled_is_reported(forget, caplog):
    missing = ModuleNotFoundError("No module named 'utils.nms._cpu_nms'")
    with mock.patch.object(nms_module.importlib, "import_module", side_effect=missing):
        assert backend() == "torch"
        assert "utils.nms._cpu_nms is not compiled" in backend_reason()
    assert not caplog.records


def test_a_broken_extension_falls_back_and_says_why_once(forget, caplog):
    broken = ImportError("undefined symbol: Py_Gone")
    with mock.patch.object(nms_module.importlib, "import_module", side_effect=broken):
        assert nms(random_dets(3, span=500), 0.5).shape == (3,)
        assert backend() == "torch"
        assert "undefined symbol: Py_Gone" in backend_reason()
    assert [(r.name, r.levelname) for r in caplog.records] == [("ssd", "WARNING")]
    assert "undefined symbol: Py_Gone" in caplog.text


def test_a_working_extension_serves_and_names_its_file(forget):
    extension = types.ModuleType("utils.nms._cpu_nms")
    extension.__file__ = "/somewhere/_cpu_nms.so"
    with mock.patch.dict(sys.modules, {"utils.nms._cpu_nms": extension}):
        assert (backend(), backend_reason()) == ("cython", "/somewhere/_cpu_nms.so")


@compiled
def test_the_extension_refuses_arrays_that_do_not_belong_together():
    from utils.nms import _cpu_nms

    columns, labels, keep = np.zeros((4, 3), "f4"), np.zeros(2, "i8"), np.ones(3, "u1")
    with pytest.raises(ValueError, match="2 labels"):
        _cpu_nms.mask(columns, labels, 0.5, 3, keep)


@pytest.mark.gpu
def test_cuda_tensors_give_the_result_of_the_cpu():
    dets = torch.from_numpy(random_dets(5000, span=300))
    labels = torch.from_numpy(np.random.default_rng(1).integers(1, 20, 5000))
    kept = class_nms(dets[:, :4].cuda(), dets[:, 4].cuda(), labels.cuda(), 0.45, 50)
    assert kept.is_cuda
    assert torch.equal(kept.cpu(), class_nms(dets[:, :4], dets[:, 4], labels, 0.45, 50))
    assert torch.equal(nms(dets.cuda(), 0.45).cpu(), nms(dets, 0.45))
    assert soft_nms(dets[:500].cuda())[0].is_cuda
