"""NMS against published results, literal references, and its routines against each other.

The CUDA kernel is run on the CPU, too (cuda_on_cpu.h); test_gpu.py runs it on a GPU.
"""

import math
import os
import subprocess
import sys
import sysconfig
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
from nms_routines import (
    EXACT,
    compiled,
    every,
    exact,
    kernel_on_the_cpu,
    needs_compiler,
    needs_torchvision,
    using,
)

import utils.nms as nms_module
from utils.nms import METHODS, backend, backend_reason, batched_nms, nms, soft_nms

ROOT = Path(__file__).parent.parent
GOLDENS = ROOT / "tests" / "goldens"


def literal_iou(a, b, extra=1):
    """IoU of boxes a and b [4 or more, ...] in float32; NaN where the union is empty."""
    extra = np.float32(extra)
    width = np.maximum(np.minimum(a[2], b[2]) - np.maximum(a[0], b[0]) + extra, 0)
    height = np.maximum(np.minimum(a[3], b[3]) - np.maximum(a[1], b[1]) + extra, 0)
    areas = [(box[2] - box[0] + extra) * (box[3] - box[1] + extra) for box in (a, b)]
    with np.errstate(all="ignore"):
        return width * height / (areas[0] + areas[1] - width * height)


def literal_nms(dets, thresh, extra=1):
    kept = []
    for i in sorted(range(len(dets)), key=lambda i: -dets[i][4]):
        if not any(literal_iou(dets[j], dets[i], extra) > np.float32(thresh) for j in kept):
            kept.append(i)
    return kept


def random_dets(count, span, seed=0):
    rng = np.random.default_rng(seed)
    corner, size = rng.uniform(0, span, (count, 2)), rng.uniform(5, 100, (count, 2))
    scores = rng.uniform(size=(count, 1))
    return np.hstack([corner, corner + size, scores]).astype(np.float32)


@every
@pytest.mark.parametrize("percent", [30, 45, 70])
def test_keeps_the_published_boxes_in_their_order(routine, percent):
    golden = np.load(GOLDENS / "nms_pixel.npz")
    with using(routine):
        kept = nms(golden["dets"], percent / 100)
    assert kept.dtype == np.int64
    assert np.array_equal(kept, golden[f"keep_{percent}"])


@every
def test_equals_the_literal_reference_on_crowded_boxes(routine):
    dets = random_dets(300, span=150)
    for thresh in (0.0, 0.3, 0.5, 1.0):
        with using(routine):
            assert nms(dets, thresh).tolist() == literal_nms(dets, thresh)


@every
def test_a_box_is_one_pixel_wider_than_the_difference_of_its_corners(routine):
    # 10x10 and the same shifted by 5: 50 pixels of 150; without the pixel it would be 36 of 126.
    dets = np.float32([[0, 0, 9, 9, 0.9], [5, 0, 14, 9, 0.8]])
    with using(routine):
        assert nms(dets, 0.33).tolist() == [0]
        assert nms(dets, 0.34).tolist() == [0, 1]


@exact
def test_an_overlap_equal_to_the_threshold_is_kept(routine):
    dets = np.float32([[0, 0, 9, 9, 0.9], [0, 0, 9, 4, 0.8], [0, 0, 9, 2, 0.7]])  # IoU 1/2, 3/10
    with using(routine):
        assert nms(dets[:2], 0.5).tolist() == [0, 1]
        assert nms(dets[:2], 0.49).tolist() == [0]
        assert nms(dets[[0, 2]], 0.3).tolist() == [0, 1]  # 0.3 is another number in float64


@every
def test_of_equal_scores_the_earlier_box_wins(routine):
    box = [0, 0, 9, 9, 0.5]
    dets = np.float32([[50, 50, 60, 60, 0.5], box, box, [100, 0, 110, 9, 0.5], box])
    with using(routine):
        assert nms(dets, 0.5).tolist() == [0, 1, 3]


@every
def test_scores_are_compared_in_their_own_precision(routine):
    dets = np.array([[0, 0, 9, 9, 0.5], [0, 0, 9, 9, 0.5 + 1e-12]])
    with using(routine):
        assert nms(dets, 0.5).tolist() == [1]


@every
def test_identical_boxes_leave_one_and_touching_boxes_stay(routine):
    same = np.tile(np.float32([3, 3, 8, 8, 0.5]), (200, 1))
    touching = np.float32([[0, 0, 9, 9, 0.9], [10, 0, 19, 9, 0.8], [0, 10, 9, 19, 0.7]])
    with using(routine):
        assert nms(same, 0.99).tolist() == [0]
        assert nms(touching, 0.0).tolist() == [0, 1, 2]


@every
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


@every
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
            batched_nms(*columns_of(dets), torch.zeros(3).long(), 0.5, 10)
    boxes, scores, groups = torch.zeros(3, 4), torch.zeros(3), torch.zeros(3).long()
    with pytest.raises(ValueError, match=r"boxes \[3, 4\], scores \[2\] and groups \[3\]"):
        batched_nms(boxes, scores[:2], groups, 0.5, 10)
    with pytest.raises(ValueError, match="limit is 0"):
        batched_nms(boxes, scores, groups, 0.5, 0)
    with pytest.raises(TypeError):
        batched_nms(boxes, scores, groups, 0.5, 1.5)
    with pytest.raises(ValueError, match="min_score is -inf"):
        batched_nms(boxes, scores, groups, 0.5, 10, method="linear", min_score=-math.inf)
    with pytest.raises(ValueError, match="method is 'soft', should be one of hard, linear, gauss"):
        batched_nms(boxes, scores, groups, 0.5, 10, method="soft")


@every
@pytest.mark.parametrize("count", [10_000, 100_000])
def test_many_boxes(routine, count):
    if routine == "cuda" or (routine == "torchvision" and count > nms_module._TORCHVISION_MOST):
        pytest.skip("the GPU's routine, too slow on the CPU")
    dets = random_dets(count, span=400)
    with using(routine):
        kept = nms(dets, 0.45)
    head = dets[kept[:300]]
    assert (np.diff(dets[kept, 4]) <= 0).all()
    assert literal_nms(head, 0.45) == list(range(len(head)))
    # Whatever was dropped overlaps a better box that was kept.
    dropped = np.setdiff1d(np.arange(count), kept)[:: max(count // 500, 1)]
    for i in dropped:
        better = kept[dets[kept, 4] > dets[i, 4]]
        assert literal_iou(dets[better].T, dets[i, :, None]).max() > 0.45


@needs_torchvision
@every
def test_in_the_plain_convention_the_result_is_torchvisions(routine):
    from torchvision.ops import batched_nms as torchvisions

    dets = random_dets(600, span=150)
    boxes, scores = columns_of(dets)
    labels = torch.from_numpy(np.random.default_rng(2).integers(0, 4, 600))
    with using(routine):
        for thresh in (0.2, 0.45, 0.7):
            kept, values = batched_nms(boxes, scores, labels, thresh, 600, pixel=False)
            expected = torchvisions(boxes, scores, labels, thresh)
            assert kept.tolist() == expected.tolist()
            assert torch.equal(values, scores[expected])
        one = nms(dets, 0.45, pixel=False)
    assert one.tolist() == literal_nms(dets, 0.45, extra=0)
    assert one.tolist() != literal_nms(dets, 0.45, extra=1)


def columns_of(dets):
    dets = torch.from_numpy(dets)
    return dets[:, :4], dets[:, 4]


def by_group(dets, groups, thresh, limit):
    """Hard `batched_nms` spelled out with `literal_nms`."""
    kept = []
    for group in np.unique(groups):
        mine = np.flatnonzero(groups == group)
        kept.extend(mine[literal_nms(dets[mine], thresh)[:limit]].tolist())
    return sorted(kept, key=lambda i: -dets[i, 4])


@every
@pytest.mark.parametrize("far", [1e18, 1e20, math.inf])
def test_a_box_far_away_changes_nothing_for_the_others(routine, far):
    near = [[0, 0, 9, 9], [0, 0, 9, 9], [50, 50, 60, 60], [50, 50, 60, 60]]
    boxes = torch.tensor([*near, [-far, -far, far, far], [-far, 0, far, 9]])
    groups = torch.tensor([0, 0, 1, 1, 2, 3])
    with using(routine):
        kept, _ = batched_nms(boxes, torch.ones(6), groups, 0.5, 10)
    assert kept.tolist() == [0, 2, 4, 5]


@every
def test_zero_and_minus_zero_are_equal_scores(routine):
    dets = np.float32([[0, 0, 9, 9, -0.0], [0, 0, 9, 9, 0.0]])
    with using(routine):
        assert nms(dets, 0.5).tolist() == [0]


@every
@pytest.mark.parametrize("limit", [1, 7, 1000, 2**70])
def test_batched_nms_is_nms_of_each_group(routine, limit):
    dets = random_dets(400, span=100)
    dets[:, 4] = dets[:, 4].round(1)  # ties across and within groups
    groups = np.random.default_rng(1).choice([-7, 0, 3, 2**40, -(2**60)], 400)
    with using(routine):
        kept, scores = batched_nms(*columns_of(dets), torch.from_numpy(groups), 0.45, limit)
    assert kept.tolist() == by_group(dets, groups, 0.45, limit)
    assert scores.tolist() == dets[kept, 4].tolist()


@every
def test_batched_nms_of_one_group_is_nms(routine):
    dets = random_dets(1000, span=300)
    with using(routine):
        one, _ = batched_nms(*columns_of(dets), torch.full((1000,), 5), 0.45, 1000)
        assert one.tolist() == nms(dets, 0.45).tolist()


@every
@pytest.mark.parametrize("method", METHODS)
def test_batched_nms_of_nothing_is_nothing(routine, method):
    with using(routine):
        kept, scores = batched_nms(
            torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), 0.45, 50, method=method
        )
    assert kept.dtype == torch.int64 and kept.shape == scores.shape == (0,)


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


def results(routine, *arguments, **options):
    with using(routine):
        return [x.tolist() for x in batched_nms(*arguments, **options)]


@pytest.mark.parametrize("routine", EXACT[1:])
@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None)
@given(
    table=tables,
    thresh=thresholds,
    limit=st.sampled_from([1, 2, 5, 1000]),
    pixel=st.booleans(),
    sigma=st.sampled_from([0.1, 0.5]),
    min_score=st.sampled_from([-1.0, 0.0, 0.001, 0.25]),
)
def test_the_routines_agree(routine, method, table, thresh, limit, pixel, sigma, min_score):
    arguments = [*map(torch.from_numpy, table), thresh, limit, pixel, method, sigma, min_score]
    expected = results("torch", *arguments)
    measured = results(routine, *arguments)
    assert measured[0] == expected[0]
    assert measured[1] == pytest.approx(expected[1], rel=1e-6, abs=1e-9)


@compiled
@pytest.mark.parametrize("seed", range(4))
def test_the_routines_agree_on_integer_boxes_over_many_blocks(seed):
    rng = np.random.default_rng(seed)
    count = 2000
    corner = rng.integers(0, 60, (count, 2))
    boxes = np.hstack([corner, corner + rng.integers(-2, 20, (count, 2))]).astype(np.float32)
    scores = rng.integers(0, 100, count).astype(np.float32)
    groups = rng.choice(4, count, p=[0.85, 0.1, 0.04, 0.01])
    arguments = [torch.from_numpy(x) for x in (boxes, scores, groups)]
    for thresh in (0.2, 0.5, 0.75):
        for limit in (3, 100, count):
            expected = results("torch", *arguments, thresh, limit)
            assert results("cython", *arguments, thresh, limit) == expected


@compiled
def test_the_number_of_threads_changes_nothing():
    dets = random_dets(3000, span=200)
    arguments = [*columns_of(dets), torch.arange(3000) % 37, 0.45, 20]
    before = torch.get_num_threads()
    try:
        by_threads = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            by_threads.append([results("cython", *arguments, method=m) for m in METHODS])
    finally:
        torch.set_num_threads(before)
    assert by_threads[0] == by_threads[1] == by_threads[2]


def literal_soft_nms(dets, thresh, method, sigma, min_score, extra=1):
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
            iou = float(literal_iou(dets[best], dets[i], extra))
            if method == "gaussian":
                left[i] *= math.exp(-iou * iou / sigma)
            elif iou > thresh:
                left[i] *= 1 - iou
    return order, scores


@exact
@pytest.mark.parametrize("pixel", [True, False])
@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_equals_the_literal_reference(routine, method, pixel):
    dets = random_dets(150, span=120)
    options = {"thresh": 0.3, "method": method, "sigma": 0.5, "min_score": 0.05}
    order, scores = literal_soft_nms(dets, **options, extra=int(pixel))
    assert 10 < len(order) < 150
    for given_dets in (dets, torch.from_numpy(dets)):
        with using(routine):
            indices, rescored = soft_nms(given_dets, **options, pixel=pixel)
        assert type(indices) is type(rescored) is type(given_dets)
        assert indices.tolist() == order
        assert rescored.tolist() == pytest.approx(scores, rel=1e-4)


@exact
def test_soft_nms_by_hand(routine):
    dets = np.float32(
        [[0, 0, 9, 9, 0.8], [0, 0, 9, 4, 0.9], [0, 0, 9, 9, 0.7], [50, 0, 59, 9, 0.001]]
    )
    with using(routine):
        indices, scores = soft_nms(dets, min_score=0.002)  # the first overlaps the second by 1/2
        assert indices.tolist() == [1, 0]
        # the third then is 0.35, and 0.35 * 0 = 0
        assert scores.tolist() == pytest.approx([0.9, 0.4])
        assert scores.dtype == np.float32 and indices.dtype == np.int64
        indices, scores = soft_nms(dets[:2], method="gaussian", sigma=0.5)
        assert scores.tolist() == pytest.approx([0.9, 0.8 * math.exp(-0.5)])


@exact
def test_soft_nms_of_nothing_of_ties_and_of_boxes_without_area(routine):
    with using(routine):
        indices, scores = soft_nms(np.zeros((0, 5), np.float32))
        assert indices.shape == scores.shape == (0,)
        indices, scores = soft_nms(torch.tensor([[0, 0, 9, 9, 0.5], [20, 0, 29, 9, 0.5]]))
        assert indices.tolist() == [0, 1]
        flat = np.float32([[5, 5, 4, 4, 0.9], [5, 5, 4, 4, 0.8]])
        for method in ("linear", "gaussian"):
            indices, scores = soft_nms(flat, method=method)
            assert scores.tolist() == pytest.approx([0.9, 0.8])


@exact
def test_soft_nms_in_groups_is_soft_nms_of_each(routine):
    dets = random_dets(90, span=60)
    groups = torch.arange(90) % 3
    options = {"method": "gaussian", "sigma": 0.4, "min_score": 0.1}
    with using(routine):
        kept, scores = batched_nms(*columns_of(dets), groups, 0.3, 8, **options)
        for group in range(3):
            mine = torch.arange(group, 90, 3)
            one, values = soft_nms(dets[mine], 0.3, **options)
            of_group = groups[kept] == group
            assert kept[of_group].tolist() == mine[one][:8].tolist()
            assert scores[of_group].tolist() == values[:8].tolist()
    assert (scores.diff() <= 0).all()


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
    extension.INTERFACE = nms_module._INTERFACE
    with mock.patch.dict(sys.modules, {"utils.nms._cpu_nms": extension}):
        assert (backend(), backend_reason()) == ("cython", "/somewhere/_cpu_nms.so")


def test_an_extension_of_other_sources_does_not_serve(forget, caplog):
    extension = types.ModuleType("utils.nms._cpu_nms")
    with mock.patch.dict(sys.modules, {"utils.nms._cpu_nms": extension}):
        assert nms(random_dets(3, span=500), 0.5).shape == (3,)
        assert backend() == "torch"
    assert "it was compiled from other sources" in caplog.text


@needs_compiler
def test_both_compiled_routines_say_which_arguments_they_take():
    assert kernel_on_the_cpu().nms_interface() == nms_module._INTERFACE
    if backend() == "cython":
        assert nms_module._extension()[0].INTERFACE == nms_module._INTERFACE


@compiled
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_process_that_is_forked_after_threads_ran_does_not_wait_for_them():
    program = """
import os, torch
from utils.nms import nms
torch.set_num_threads(2)
corners = torch.arange(5000.0)[:, None] % 700
dets = torch.cat([corners, corners, corners + 9, corners + 9, torch.rand(5000, 1)], 1).numpy()
from utils.nms import batched_nms
def run():
    return len(batched_nms(*(torch.from_numpy(x) for x in (dets[:, :4], dets[:, 4])),
                           torch.arange(5000) % 9, 0.5, 50)[0])
expected = run()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # of PyTorch's own operations
    nms_threads = torch.get_num_threads
    torch.get_num_threads = lambda: 2
    os._exit(0 if run() == expected else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], timeout=60, cwd=ROOT)
    assert done.returncode == 0


@compiled
def test_the_extension_refuses_arrays_that_do_not_belong_together():
    from utils.nms import _cpu_nms

    boxes, scores = np.zeros((3, 4), "f4"), np.zeros(2, "f4")
    order, starts, kept = np.arange(3), np.array([0, 3]), np.full(3, -1)
    with pytest.raises(ValueError, match="2 scores"):
        _cpu_nms.select(
            boxes, scores, order, starts, 1, 0.5, 3, 0, 0.5, 0.0, 1.0, kept, scores,
            np.zeros(2, "u8"), np.zeros(10, "f4"), 1,
        )  # fmt: skip


torchvision = nms_module._torchvision


class TestOnAGpu:
    """Which routine serves CUDA tensors, told without a GPU."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        self.current = []
        monkeypatch.setattr(torch.cuda, "device", self.use)
        monkeypatch.setattr(nms_module, "_torchvision", lambda: (types.ModuleType("ops"), ""))
        nms_module._library.cache_clear()
        yield
        nms_module._library.cache_clear()

    @contextmanager
    def use(self, index):
        self.current.append(index)
        yield
        self.current.pop()

    @pytest.fixture
    def library(self, monkeypatch, tmp_path):
        """The place of the compiled library, in a folder where there is none."""
        monkeypatch.setattr(nms_module, "__file__", str(tmp_path / "__init__.py"))
        return tmp_path / f"_cuda_nms{sysconfig.get_config_var('EXT_SUFFIX')}"

    def test_torchvision_serves_where_the_kernel_is_not_compiled(self, library):
        assert backend("cuda") == "torchvision"
        assert "utils.nms._cuda_nms is not compiled" in backend_reason("cuda")
        assert nms_module._routine(torch.device("cuda:0"), "hard", 10) is nms_module._by_torchvision
        assert nms_module._routine(torch.device("cuda:0"), "hard", 20_001) is nms_module._torch_hard
        assert nms_module._routine(torch.device("cuda:0"), "linear", 10) is nms_module._torch_soft

    def test_pytorch_serves_where_torchvision_fits_another_one(self, library, monkeypatch):
        error = RuntimeError("operator torchvision::nms does not exist")
        monkeypatch.setattr(nms_module, "_torchvision", torchvision.__wrapped__)
        monkeypatch.setattr(nms_module.importlib, "import_module", mock.Mock(side_effect=error))
        assert backend("cuda") == "torch"
        assert "operator torchvision::nms does not exist" in backend_reason("cuda")
        assert nms_module._routine(torch.device("cuda:0"), "hard", 10) is nms_module._torch_hard

    def test_a_library_that_cannot_be_loaded_is_told_once(self, library, caplog):
        library.write_text("not a library")
        for _ in range(2):
            assert backend("cuda") == "torchvision"
            assert "cannot be used here" in backend_reason("cuda")
        assert len(caplog.records) == 1

    def test_a_library_for_other_gpus_is_told(self, library, monkeypatch):
        library.touch()
        other = mock.Mock()
        other.nms_interface.return_value = nms_module._INTERFACE
        other.nms_architectures.return_value = b"9.0"
        other.nms_check = lambda: 209 if self.current == [1] else 0  # the second GPU is an old one
        other.nms_error.return_value = b"no kernel image is available for execution on the device"
        monkeypatch.setattr(nms_module, "_load_library", lambda path: other)
        assert backend("cuda:1") == "torchvision"
        assert "no kernel image is available" in backend_reason("cuda:1")
        assert backend("cuda:0") == backend("cuda") == "cuda"

    def test_a_library_of_other_sources_is_not_called(self, library, monkeypatch):
        library.touch()
        other = mock.Mock()
        other.nms_interface.return_value = nms_module._INTERFACE - 1
        monkeypatch.setattr(nms_module, "_load_library", lambda path: other)
        assert backend("cuda") == "torchvision"
        assert "it was compiled from other sources" in backend_reason("cuda")

    @needs_compiler
    def test_the_kernel_serves_where_it_is_compiled(self, library, monkeypatch):
        library.touch()
        monkeypatch.setattr(nms_module, "_load_library", lambda path: kernel_on_the_cpu())
        assert backend("cuda") == "cuda"
        assert backend_reason("cuda") == f"{library}, compiled for a CPU"
        assert nms_module._routine(torch.device("cuda:0"), "gaussian", 10) is nms_module._cuda


def test_without_a_gpu_nothing_serves_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend("cuda") == "none"
    assert "sees no GPU" in backend_reason("cuda")
