"""NMS against published results and literal references, and its routines against each other.

The CUDA kernel runs on the CPU here (cuda_on_cpu.h); test_gpu.py runs it on a GPU.
"""

import functools
import math
import subprocess
import sys
import sysconfig
import types
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

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

from utils.nms import (
    METHODS,
    backend,
    backend_reason,
    backends,
    batched_nms,
    nms,
    reference,
    soft_nms,
)

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
def test_keeps_the_published_boxes_in_their_order(routine):
    golden = np.load(GOLDENS / "nms_pixel.npz")
    for percent in (30, 45, 70)[: 1 if routine == "cuda" else 3]:  # slow on the CPU
        with using(routine):
            kept = nms(golden["dets"], percent / 100)
        assert kept.dtype == np.int64
        assert np.array_equal(kept, golden[f"keep_{percent}"])


@functools.cache
def crowded(thresh, extra=1):
    """Crowded boxes, and those that the literal reference keeps."""
    dets = random_dets(120, span=90)
    return dets, literal_nms(dets, thresh, extra)


@every
@pytest.mark.parametrize("thresh", [0.0, 0.3, 0.5, 1.0])
def test_equals_the_literal_reference_on_crowded_boxes(routine, thresh):
    dets, expected = crowded(thresh)
    with using(routine):
        assert nms(dets, thresh).tolist() == expected


A = (0, 0, 9, 9)
FAR = (50, 50, 60, 60)
CASES = {
    # A shifted by 5: 50 pixels of 150; without the pixel it would be 36 of 126.
    "a pixel wider": ([(*A, 0.9), (5, 0, 14, 9, 0.8)], {0.33: [0], 0.34: [0, 1]}),
    "the threshold in float32": ([(*A, 0.9), (0, 0, 9, 2, 0.7)], {0.3: [0, 1]}),
    "at the threshold": ([(*A, 0.9), (0, 0, 9, 4, 0.8)], {0.5: [0, 1], 0.49: [0]}),
    "equal scores": ([(*FAR, 0.5), (*A, 0.5), (*A, 0.5), (100, 0, 110, 9, 0.5)], {0.5: [0, 1, 3]}),
    "minus zero": ([(*A, -0.0), (*A, 0.0)], {0.5: [0]}),
    "float64 scores": ([(*A, 0.5), (*A, 0.5 + 1e-12)], {0.5: [1]}),
    "identical": ([(*A, 0.5)] * 200, {0.99: [0]}),
    "touching": ([(*A, 0.9), (10, 0, 19, 9, 0.8), (0, 10, 9, 19, 0.7)], {0.0: [0, 1, 2]}),
    # They neither suppress nor are suppressed.
    "without area": (
        [(*A, 0.9), (5, 5, 4, 9, 0.8), (8, 8, 2, 2, 0.7), (8, 8, 2, 2, 0.6), (5, 0, 4, 9, 1)],
        {0.0: [4, 0, 1, 2, 3]},
    ),
    "none": (np.zeros((0, 5)), {0.5: []}), "one": ([(*A, 0.1)], {0.5: [0]}),
}


@every
@pytest.mark.parametrize("case", CASES)
def test_cases_by_hand(routine, case):
    dets, kept = CASES[case]
    with using(routine):
        for thresh, expected in kept.items():
            assert nms(np.array(dets), thresh).tolist() == expected


def test_the_result_is_the_container_that_came_in():
    dets = random_dets(50, span=100)
    before = dets.copy()
    array, tensor = nms(dets, 0.45), nms(torch.from_numpy(dets).requires_grad_(), 0.45)
    assert isinstance(array, np.ndarray) and array.dtype == np.int64
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int64
    assert array.tolist() == tensor.tolist()
    assert nms(dets[::-1], 0.45).tolist() == nms(dets[::-1].copy(), 0.45).tolist()
    nothing = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long()
    for empty in (nms(torch.zeros(0, 5), 0.45), *(batched_nms(*nothing, 0.45, 50, method=method)[0]
                                                  for method in METHODS)):
        assert empty.dtype == torch.int64 and empty.shape == (0,)
    assert np.array_equal(dets, before)


FIVE = np.zeros((3, 5), np.float32)
THREE = (torch.zeros(3, 4), torch.zeros(3), torch.zeros(3).long())


@pytest.mark.parametrize(("call", "words"), [
    (lambda: nms(np.zeros((3, 4)), 0.5), r"shape \[3, 4\], should be \[N, 5\]"),
    (lambda: nms(torch.zeros(5), 0.5), r"shape \[5\]"),
    (lambda: nms(FIVE, 1.5), "threshold is 1.5"), (lambda: nms(FIVE, math.nan), "threshold is nan"),
    (lambda: soft_nms(FIVE, thresh=-1), "threshold is -1"),
    (lambda: soft_nms(FIVE, method="hard"), "method is 'hard', should be one of linear, gauss"),
    (lambda: soft_nms(FIVE, sigma=0), "sigma is 0"),
    (lambda: batched_nms(*THREE[:2], THREE[2][:2], 0.5, 10),
     r"boxes \[3, 4\], scores \[3\] and groups \[2\]"),
    (lambda: batched_nms(*THREE, 0.5, 0), "limit is 0"),
    (lambda: batched_nms(*THREE, 0.5, 1.5), "float"),
    (lambda: batched_nms(*THREE, 0.5, 10, method="linear", min_score=-math.inf),
     "min_score is -inf"),
    (lambda: batched_nms(*THREE, 0.5, 10, method="soft"), "method is 'soft', .* hard, linear")])
def test_unusable_arguments_are_refused_with_their_values(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


@pytest.mark.parametrize("column", [0, 4])
def test_nan_is_refused(column):
    dets = FIVE.copy()
    dets[1, column] = np.nan
    table = torch.from_numpy(dets)
    for call in (lambda: nms(dets, 0.5), lambda: nms(table, 0.5), lambda: soft_nms(table),
                 lambda: batched_nms(table[:, :4], table[:, 4], THREE[2], 0.5, 10)):
        with pytest.raises(ValueError, match="contain NaN"):
            call()


@pytest.mark.parametrize(("routine", "count"), [
    ("torch", 10_000), pytest.param("torch", 100_000, marks=pytest.mark.slow),
    pytest.param("cython", 100_000, marks=compiled),
    pytest.param("torchvision", 10_000, marks=needs_torchvision)])
def test_many_boxes(routine, count):
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

    dets, expected = crowded(0.45, extra=0)
    boxes, scores = columns_of(dets)
    labels = torch.from_numpy(np.random.default_rng(2).integers(0, 4, len(dets)))
    with using(routine):
        for thresh in (0.2, 0.7):
            kept, values = batched_nms(boxes, scores, labels, thresh, 600, pixel=False)
            by_torchvision = torchvisions(boxes, scores, labels, thresh)
            assert kept.tolist() == by_torchvision.tolist()
            assert torch.equal(values, scores[by_torchvision])
        assert nms(dets, 0.45, pixel=False).tolist() == expected != crowded(0.45)[1]


def columns_of(dets):
    dets = torch.from_numpy(dets)
    return dets[:, :4], dets[:, 4]


def by_group(dets, groups, thresh, limit):
    """Return what hard `batched_nms` keeps, by `literal_nms`."""
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
@pytest.mark.parametrize("limit", [1, 7, 1000, 2**70])
def test_batched_nms_is_nms_of_each_group(routine, limit):
    dets = random_dets(150, span=60)
    dets[:, 4] = dets[:, 4].round(1)  # ties across and within groups
    groups = np.random.default_rng(1).choice([-7, 0, 3, 2**40, -(2**60)], 150)
    with using(routine):
        kept, scores = batched_nms(*columns_of(dets), torch.from_numpy(groups), 0.45, limit)
    assert kept.tolist() == by_group(dets, groups, 0.45, limit)
    assert scores.tolist() == dets[kept, 4].tolist()


# Few distinct coordinates make touching, duplicated, empty and turned boxes, and threshold ties.
coordinates = st.one_of(st.integers(-3, 12).map(float), st.floats(-1e4, 1e4, width=32),
                        st.floats(0, 12, width=32))
tables = st.integers(0, 90).flatmap(lambda count: st.tuples(
    hnp.arrays(np.float32, (count, 4), elements=coordinates),
    hnp.arrays(np.float32, count, elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])),
    hnp.arrays(np.int64, count, elements=st.integers(1, 3)),
))
thresholds = st.one_of(
    st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 1 / 3, 0.45, 0.5, 0.6, 2 / 3, 1.0]), st.floats(0, 1)
)


def results(routine, *arguments, **options):
    with using(routine):
        return [x.tolist() for x in batched_nms(*arguments, **options)]


@pytest.mark.parametrize("routine", EXACT[1:])
@settings(deadline=None)
@given(
    table=tables, method=st.sampled_from(METHODS), thresh=thresholds,
    limit=st.sampled_from([1, 2, 5, 1000]),  # the last one by the kernel of many threads
    pixel=st.booleans(), sigma=st.sampled_from([0.1, 0.5]),
    min_score=st.sampled_from([-1.0, 0.0, 0.001, 0.25]),
)
def test_the_routines_agree(routine, table, method, thresh, limit, pixel, sigma, min_score):
    arguments = [*map(torch.from_numpy, table), thresh, limit, pixel, method, sigma, min_score]
    expected = results("torch", *arguments)
    measured = results(routine, *arguments)
    assert measured[0] == expected[0]
    close = pytest.approx(expected[1], rel=1e-6, abs=1e-9)  # exp differs in the last bits
    assert measured[1] == (close if method == "gaussian" else expected[1])


@exact
def test_linear_decay_is_computed_in_float32(routine):
    # The IoU is 2 / (8102 * 6213) = 4e-8. 1 - 4e-8 rounds down in float32; 0.75 * (1 - 4e-8),
    # computed in float64, would round to 0.75, and box 1 would keep its place.
    boxes = torch.tensor([[0.0, 0, 1, 2], [0, -6201, 8102, 12], [20, 20, 21, 21]])
    kept, scores = results(routine, boxes, torch.full((3,), 0.75), torch.zeros(3).long(), 0.0,
                           3, False, method="linear")
    assert kept == [0, 2, 1]
    assert scores == [0.75, 0.75, float(np.float32(0.75) * (np.float32(1) - np.float32(4e-8)))]


@compiled
def test_the_routines_agree_on_integer_boxes_over_many_blocks():
    rng = np.random.default_rng(0)
    count = 2000
    corner = rng.integers(0, 60, (count, 2))
    boxes = np.hstack([corner, corner + rng.integers(-2, 20, (count, 2))]).astype(np.float32)
    scores = rng.integers(0, 100, count).astype(np.float32)
    groups = rng.choice(4, count, p=[0.85, 0.1, 0.04, 0.01])
    arguments = [torch.from_numpy(x) for x in (boxes, scores, groups)]
    for thresh, limit in ((0.2, 3), (0.5, 100), (0.75, count)):
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
    dets = random_dets(80, span=90)
    options = {"thresh": 0.3, "method": method, "sigma": 0.5, "min_score": 0.05}
    order, scores = literal_soft_nms(dets, **options, extra=int(pixel))
    assert 10 < len(order) < 80
    with using(routine):
        indices, rescored = soft_nms(torch.from_numpy(dets), **options, pixel=pixel)
    assert isinstance(indices, torch.Tensor) and isinstance(rescored, torch.Tensor)
    assert indices.tolist() == order
    assert rescored.tolist() == pytest.approx(scores, rel=1e-4)


@exact
@pytest.mark.parametrize(("dets", "options", "order", "expected"), [
    # The first overlaps the second by 1/2. The third then is 0.35, and 0.35 * 0 = 0.
    ([(*A, 0.8), (0, 0, 9, 4, 0.9), (*A, 0.7), (*FAR, 0.001)], {"min_score": 0.002}, [1, 0],
     [0.9, 0.4]),
    ([(*A, 0.8), (0, 0, 9, 4, 0.9)], {"method": "gaussian", "sigma": 0.5}, [1, 0],
     [0.9, 0.8 * math.exp(-0.5)]),
    ([(*A, 0.5), (*FAR, 0.5)], {}, [0, 1], [0.5, 0.5]),
    ([(5, 5, 4, 4, 0.9), (5, 5, 4, 4, 0.8)], {}, [0, 1], [0.9, 0.8]),
    ([(5, 5, 4, 4, 0.9), (5, 5, 4, 4, 0.8)], {"method": "gaussian"}, [0, 1], [0.9, 0.8]),
    (np.zeros((0, 5)), {}, [], []),
])
def test_soft_nms_by_hand(routine, dets, options, order, expected):
    with using(routine):
        indices, scores = soft_nms(np.array(dets), **options)
    assert indices.tolist() == order
    assert scores.tolist() == pytest.approx(expected)
    assert scores.dtype == np.float32 and indices.dtype == np.int64


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


@pytest.fixture
def imported(monkeypatch):
    """Make the import of the extension give a module, or raise an error."""

    def choose(outcome):
        answer = {"side_effect" if isinstance(outcome, Exception) else "return_value": outcome}
        monkeypatch.setattr(backends.importlib, "import_module", Mock(**answer))

    backends.extension.cache_clear()
    yield choose
    backends.extension.cache_clear()


def module(**members):
    return types.SimpleNamespace(__file__="/somewhere/_cpu_nms.so", **members)


@pytest.mark.parametrize(("outcome", "why", "warned"), [
    (ModuleNotFoundError("No module named 'utils.nms._cpu_nms'"), "is not compiled", 0),
    (ImportError("undefined symbol: Py_Gone"), "undefined symbol: Py_Gone", 1),
    (module(), "other sources", 1), (module(INTERFACE=backends.INTERFACE - 1), "other sources", 1)])
def test_an_unusable_extension_is_replaced_and_told_once(imported, caplog, outcome, why, warned):
    imported(outcome)
    assert nms(random_dets(3, span=500), 0.5).shape == (3,)
    assert backend() == "torch"
    assert why in backend_reason() and "compiles it" in backend_reason()
    told = [(r.name, r.levelname) for r in caplog.records]
    assert told == [("ssd", "WARNING")] * warned and (why in caplog.text) == bool(warned)


def test_a_working_extension_serves_and_names_its_file(imported):
    imported(module(INTERFACE=backends.INTERFACE))
    assert (backend(), backend_reason()) == ("cython", "/somewhere/_cpu_nms.so")


@needs_compiler
def test_both_compiled_routines_say_which_arguments_they_take():
    assert kernel_on_the_cpu().nms_interface() == backends.INTERFACE
    if backend() == "cython":
        assert backends.extension()[0].INTERFACE == backends.INTERFACE


@compiled
@pytest.mark.parametrize("before", ["run()", "torch.rand(2000000).exp().sum()"])
def test_a_process_that_is_forked_after_threads_ran_does_not_wait_for_them(before):
    program = f"""
import os, torch
from utils.nms import batched_nms
torch.set_num_threads(2)
corners = torch.arange(5000.0)[:, None] % 700
boxes, groups = torch.cat([corners, corners, corners + 9, corners + 9], 1), torch.arange(5000) % 9
def run():
    return len(batched_nms(boxes, torch.linspace(0, 1, 5000), groups, 0.5, 50)[0])
{before}
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # of PyTorch's own operations
    torch.get_num_threads = lambda: 2
    os._exit(run() != 9 * 50)  # the most of each group
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
        _cpu_nms.select(boxes, scores, order, starts, 1, 0.5, 3, 0, 0.5, 0.0, 1.0, kept, scores,
                        np.zeros(2, "u8"), np.zeros(10, "f4"), 1)


class TestOnAGpu:
    """Which routine serves CUDA tensors, told without a GPU."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch, tmp_path):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        self.current = []
        monkeypatch.setattr(torch.cuda, "device", self.use)
        monkeypatch.setattr(backends, "torchvision", lambda: (types.ModuleType("ops"), ""))
        # The place of the compiled library: a folder where there is none.
        monkeypatch.setattr(backends, "__file__", str(tmp_path / "backends.py"))
        self.file = tmp_path / f"_cuda_nms{sysconfig.get_config_var('EXT_SUFFIX')}"
        backends.library.cache_clear()
        yield
        backends.library.cache_clear()

    @contextmanager
    def use(self, index):
        self.current.append(index)
        yield
        self.current.pop()

    def routine(self, method="hard", count=10):
        return backends.routine(torch.device("cuda:0"), method, count)

    def compile(self, monkeypatch, compiled):
        self.file.touch()
        monkeypatch.setattr(backends, "load_library", lambda path: compiled)

    def test_torchvision_serves_where_the_kernel_is_not_compiled(self):
        assert backend("cuda") == "torchvision"
        assert "utils.nms._cuda_nms is not compiled" in backend_reason("cuda")
        assert self.routine() is backends.by_torchvision
        assert self.routine(count=20_001) is self.routine(count=0) is reference.hard
        assert self.routine("linear") is reference.soft

    def test_pytorch_serves_where_torchvision_fits_another_one(self, monkeypatch):
        why = "torchvision cannot be imported (operator torchvision::nms does not exist)"
        monkeypatch.setattr(backends, "torchvision", lambda: (None, why))
        assert backend("cuda") == "torch" and why in backend_reason("cuda")
        assert self.routine() is reference.hard

    def test_a_library_that_cannot_be_loaded_is_told_once(self, caplog):
        self.file.write_text("not a library")
        for _ in range(2):
            assert backend("cuda") == "torchvision"
            assert "cannot be used here" in backend_reason("cuda")
        assert len(caplog.records) == 1

    def test_a_library_for_other_gpus_or_of_other_sources_is_not_called(self, monkeypatch):
        compiled = types.SimpleNamespace(
            nms_interface=lambda: backends.INTERFACE, nms_architectures=lambda: b"9.0",
            nms_check=lambda: 209 if self.current == [1] else 0,  # the second GPU is an old one
            nms_error=lambda code: b"no kernel image is available for execution on the device",
        )
        self.compile(monkeypatch, compiled)
        assert backend("cuda:1") == "torchvision"
        assert "no kernel image is available" in backend_reason("cuda:1")
        assert backend("cuda:0") == backend("cuda") == "cuda"
        backends.library.cache_clear()
        compiled.nms_interface = lambda: backends.INTERFACE - 1
        assert backend("cuda:0") == "torchvision"
        assert "other sources" in backend_reason("cuda:0")

    @needs_compiler
    def test_the_kernel_serves_where_it_is_compiled(self, monkeypatch):
        self.compile(monkeypatch, kernel_on_the_cpu())
        assert backend("cuda") == "cuda"
        assert backend_reason("cuda") == f"{self.file}, compiled for a CPU"
        assert self.routine("gaussian") is backends.cuda


def test_torchvision_that_fits_another_pytorch_is_told(imported):
    imported(RuntimeError("operator torchvision::nms does not exist"))
    module, why = backends.torchvision.__wrapped__()
    assert module is None and "operator torchvision::nms does not exist" in why


def test_without_a_gpu_nothing_serves_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend("cuda") == "none"
    assert "sees no GPU" in backend_reason("cuda")
