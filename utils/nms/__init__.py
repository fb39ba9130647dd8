"""Hard and soft non-maximum suppression, of one class or of many groups of boxes in one call.

Two conventions of a box's size: in pixel convention, the published one, a box from x1 to x2 is
x2 - x1 + 1 wide; in the plain one (`pixel=False`, torchvision's) it is x2 - x1 wide.

Four routines serve. Data on the CPU go to the Cython extension `_cpu_nms`, else to PyTorch
operations; data on a GPU to the CUDA library `_cuda_nms`, else to torchvision, else to PyTorch.
All but torchvision take the same steps in float32 and so keep the same boxes to the last tie (the
scores of a Gaussian decay may differ in the last bit); torchvision, in float64, may differ where an
IoU is within float32's rounding of the threshold.
`./make.sh` or `python utils/build.py` compiles the first two; `backend()` tells which serves.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import math
import operator
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["METHODS", "backend", "backend_reason", "batched_nms", "nms", "soft_nms"]

METHODS = ("hard", "linear", "gaussian")
"""Suppression, and the two decays of Soft-NMS; their positions are known to the compiled code."""

_INTERFACE = 2
"""What both compiled files must say of themselves: others take other arguments."""

_TORCHVISION_MOST = 20_000
"""Its memory grows with the square: 50 MB for this many boxes."""

_WORTH_THREADS = 2000
"""Boxes of a call, from which on threads gain more than they cost to wake."""

_NAN = "boxes or scores contain NaN"


def nms(dets: np.ndarray | Tensor, thresh: float, pixel: bool = True) -> np.ndarray | Tensor:
    """Greedy suppression of one class.

    Args:
        dets: [N, 5] array, or tensor on any device: x1, y1, x2, y2 in pixels and score. IoU is
            computed in float32, scores are compared as they are. N may be 0.
        thresh: IoU in 0..1 above which (not at which) a box gives way to a better one.
        pixel: whether a box from x1 to x2 is x2 - x1 + 1 wide, as published, or x2 - x1.

    Returns:
        int64 indices [n] of the kept boxes, best first (of equal scores the earlier box is the
        better), as an array or a tensor on the device of `dets`, whichever `dets` was.

    Raises:
        ValueError: another shape, a NaN in `dets`, `thresh` outside 0..1.
    """
    kept, _ = _one_class(dets, thresh, pixel)
    return kept.numpy() if isinstance(dets, np.ndarray) else kept


def soft_nms(
    dets: np.ndarray | Tensor,
    thresh: float = 0.3,
    method: str = "linear",
    sigma: float = 0.5,
    min_score: float = 0.001,
    pixel: bool = True,
) -> tuple[np.ndarray, np.ndarray] | tuple[Tensor, Tensor]:
    """Soft-NMS (Bodla et al., ICCV 2017, arXiv 1704.04503) of one class.

    Again and again the box of the highest current score is selected and the scores of the rest
    decay with their IoU to it: "linear" multiplies by 1 - IoU where IoU > `thresh`, "gaussian" by
    exp(-IoU^2 / `sigma`) everywhere. It ends when the highest score left is below `min_score`.

    Args:
        dets: [N, 5] array, or tensor on any device: x1, y1, x2, y2 in pixels and score; computed
            in float32. N may be 0.
        pixel: as in `nms`.

    Returns:
        int64 indices [n] in the order of selection (of equal scores the earlier box first) and
        float32 scores [n] as they were when selected; arrays or tensors, whichever `dets` was.

    Raises:
        ValueError: another shape, a NaN, `thresh` outside 0..1, unknown `method`, `sigma` <= 0.
    """
    if method not in METHODS[1:]:
        raise ValueError(f"method is {method!r}, should be one of {', '.join(METHODS[1:])}")
    kept, scores = _one_class(dets, thresh, pixel, method, sigma, min_score)
    if isinstance(dets, np.ndarray):
        return kept.numpy(), scores.numpy()
    return kept, scores


def _one_class(dets: np.ndarray | Tensor, thresh: float, pixel: bool, *soft) -> tuple:
    if isinstance(dets, np.ndarray):
        dtype = np.float32 if dets.dtype == np.float32 else np.float64
        table = torch.from_numpy(np.array(dets, dtype, order="C"))
    else:
        table = dets
    if table.ndim != 2 or table.shape[1] != 5:
        raise ValueError(f"detections have shape {list(table.shape)}, should be [N, 5]")
    same = torch.zeros(len(table), dtype=torch.int64, device=table.device)
    limit = max(len(table), 1)
    return batched_nms(table[:, :4], table[:, 4], same, thresh, limit, pixel, *soft)


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    thresh: float,
    limit: int,
    pixel: bool = True,
    method: str = "hard",
    sigma: float = 0.5,
    min_score: float = 0.001,
) -> tuple[Tensor, Tensor]:
    """Suppression within each of many groups of boxes, such as the classes of a batch's images.

    Args:
        boxes: [N, 4] x1, y1, x2, y2 in pixels; IoU is computed in float32. Sides of 0 or less
            (x2 < x1) are taken as the formulas take them. N may be 0.
        scores: [N]. groups: integers [N]; boxes of different groups do not meet. All on one device.
            The PyTorch routine takes memory for as many boxes as the largest group has (hard: at
            most 64) in every group.
        thresh: IoU in 0..1 above which a box gives way to a better one of its group ("hard"), or
            its score decays ("linear").
        limit: the most boxes selected of one group, an integer of at least 1.
        pixel: as in `nms`.
        method: one of `METHODS`; "hard" is `nms`, the others are those of `soft_nms`.
        sigma, min_score: of `soft_nms`; not used by "hard".

    Returns:
        int64 indices [n] and scores [n] (float32; of "hard" as they came), without gradient, on the
        device of `boxes`, best score first over all groups; of equal scores that of the lower group
        first, within a group the one selected first, which is the earlier box.

    Raises:
        ValueError: shapes that do not belong together, a NaN, another argument out of range.
        TypeError: `limit` is no integer.
    """
    count = len(boxes)
    if boxes.shape != (count, 4) or scores.shape != (count,) or groups.shape != (count,):
        raise ValueError(
            f"boxes {list(boxes.shape)}, scores {list(scores.shape)} and groups "
            f"{list(groups.shape)} should be [N, 4], [N] and [N]"
        )
    if not 0 <= thresh <= 1:
        raise ValueError(f"IoU threshold is {thresh}, should be in 0..1")
    if operator.index(limit) < 1:
        raise ValueError(f"limit is {limit}, should be at least 1")
    limit = min(limit, max(count, 1))
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, should be one of {', '.join(METHODS)}")
    if not sigma > 0:
        raise ValueError(f"sigma is {sigma}, should be positive")
    if not math.isfinite(min_score):
        raise ValueError(f"min_score is {min_score}, should be finite")
    given, boxes = scores.detach(), boxes.detach().float().contiguous()
    nan = boxes.isnan().any() | given.isnan().any()
    if method == "hard" and given.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        # Only the order counts, and ranks keep what float32 would round away.
        scores = torch.empty(count, device=given.device)
        scores[given.argsort(descending=True, stable=True)] = -torch.arange(
            count, dtype=torch.float32, device=given.device
        )
    else:
        scores = given.float().contiguous()
    if not boxes.is_cuda and nan:  # a GPU is asked at the end, when it has to be waited for
        raise ValueError(_NAN)
    rule = _Rule(thresh, limit, method, sigma, min_score, 1.0 if pixel else 0.0)
    kept, selected = _routine(boxes.device, method, count)(boxes, scores, _Groups.of(groups), rule)
    if boxes.is_cuda and nan:
        raise ValueError(_NAN)
    selected = given[kept] if method == "hard" else selected
    best = selected.argsort(descending=True, stable=True)
    return kept[best], selected[best]


def backend(device: str | torch.device = "cpu") -> str:
    """The routine that serves data on "cpu" ("cython" or "torch") or on "cuda", "cuda:1", ....

    On a GPU: "cuda"; "torchvision", which leaves Soft-NMS, more than 20,000 boxes and coordinates
    of more than about 10^7 to PyTorch; "torch"; or "none" where PyTorch has no GPU.
    """
    return _backend(torch.device(device))[0]


def backend_reason(device: str | torch.device = "cpu") -> str:
    """Why `backend(device)` is what it is: the compiled file, or what keeps it from serving."""
    return _backend(torch.device(device))[1]


# ---------------------------------------------------------------- what the routines are given


@dataclass(frozen=True)
class _Rule:
    thresh: float
    limit: int
    method: str
    sigma: float
    min_score: float
    extra: float
    """1 in pixel convention, else 0."""

    def values(self) -> tuple:
        """As the compiled routines take them."""
        method = METHODS.index(self.method)
        return self.thresh, self.limit, method, self.sigma, self.min_score, self.extra


@dataclass(frozen=True)
class _Groups:
    """Boxes sorted by group, found without waiting for a GPU.

    of_box: int64 [N], the group of each box, counted from 0. order: int64 [N], the boxes by group,
    of a group in their own order. starts: int64 [N + 2]; group g is order[starts[g]:starts[g + 1]],
    behind the last one stands N. count: int64 [1], how many groups.
    """

    of_box: Tensor
    order: Tensor
    starts: Tensor
    count: Tensor

    @classmethod
    def of(cls, groups: Tensor) -> _Groups:
        ordered, order = groups.sort(stable=True)
        new = torch.ones_like(order, dtype=torch.bool)
        new[1:] = ordered[1:] != ordered[:-1]
        row = new.cumsum(0) - 1
        places = torch.arange(len(order), device=order.device)
        starts = torch.full((len(order) + 2,), len(order), device=order.device)
        # Each group's first box tells its place, the others tell it to an entry nobody reads.
        starts.scatter_(0, torch.where(new, row, len(order) + 1), places)
        return cls(torch.empty_like(row).scatter_(0, order, row), order, starts, new.sum()[None])


# ---------------------------------------------------------------- compiled routines


def _cython(boxes: Tensor, scores: Tensor, groups: _Groups, rule: _Rule) -> tuple[Tensor, Tensor]:
    kept, selected = torch.full_like(groups.order, -1), torch.empty_like(scores)
    _extension()[0].select(
        *(x.numpy() for x in (boxes, scores, groups.order, groups.starts)),
        int(groups.count),
        *rule.values(),
        kept.numpy(),
        selected.numpy(),
        np.empty(len(kept), np.uint64),
        np.empty(5 * len(kept), np.float32),
        _threads(len(kept), int(groups.count)),
    )
    return _taken(kept, selected)


def _threads(boxes: int, groups: int) -> int:
    if boxes < _WORTH_THREADS:
        return 1
    # OpenMP's threads do not survive a fork, and the child would wait for them.
    forked = _first_process() != os.getpid()
    return 1 if forked else min(torch.get_num_threads(), groups)


@functools.cache
def _first_process() -> int:
    """The process that used threads first; a forked one inherits the answer."""
    return os.getpid()


def _cuda(boxes: Tensor, scores: Tensor, groups: _Groups, rule: _Rule) -> tuple[Tensor, Tensor]:
    library, _ = _library(boxes.device.index)
    kept, selected = torch.full_like(groups.order, -1), torch.empty_like(scores)
    # Copies: aligned to 16 bytes, and free to be overwritten.
    boxes, scores = boxes.clone(), scores.clone()
    with torch.cuda.device(boxes.device):
        error = library.nms_select(
            *(x.data_ptr() for x in (boxes, scores, groups.order, groups.starts, groups.count)),
            len(scores),
            *rule.values(),
            kept.data_ptr(),
            selected.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
    if error:
        raise RuntimeError(f"NMS on {boxes.device}: {library.nms_error(error).decode()}")
    return _taken(kept, selected)


def _taken(kept: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    """The entries that a compiled routine has written; a GPU is waited for here."""
    taken = (kept >= 0).nonzero()[:, 0]
    return kept[taken], selected[taken]


@functools.cache
def _extension():
    """The Cython module or None, and its file or the reason; an unusable one is told once."""
    name = f"{__name__}._cpu_nms"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        return None, f"{name} is not compiled for this Python; ./make.sh compiles it"
    except ImportError as error:
        return None, _unusable(name, str(error), "PyTorch")
    if getattr(module, "INTERFACE", None) != _INTERFACE:
        return None, _unusable(name, "it was compiled from other sources", "PyTorch")
    return module, module.__file__


@functools.cache
def _library(index: int):
    """The CUDA library or None, and its file or the reason, for the GPU of that index."""
    path = Path(__file__).with_name("_cuda_nms" + sysconfig.get_config_var("EXT_SUFFIX"))
    name = f"{__name__}._cuda_nms"
    if not path.is_file():
        return None, f"{name} is not compiled; python utils/build.py compiles it"
    try:
        library = _load_library(path)
        if library.nms_interface() != _INTERFACE:
            raise AttributeError("it was compiled from other sources")
        with torch.cuda.device(index):
            error = library.nms_check()
    except (OSError, AttributeError) as broken:  # no library of ours, or one of before
        return None, _unusable(name, str(broken), "torchvision")
    if error:
        return None, _unusable(name, library.nms_error(error).decode(), "torchvision")
    return library, f"{path}, compiled for {library.nms_architectures().decode()}"


def _unusable(name: str, reason: str, instead: str) -> str:
    reason = f"{name} cannot be used here ({reason}); python utils/build.py compiles it anew"
    logging.getLogger("ssd").warning("NMS by %s: %s", instead, reason)
    return reason


def _load_library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    library.nms_select.argtypes = (
        *[pointer] * 5, integer, number, integer, ctypes.c_int, ctypes.c_double, number, number,
        *[pointer] * 3,
    )  # fmt: skip
    library.nms_error.argtypes = (ctypes.c_int,)
    library.nms_error.restype = library.nms_architectures.restype = ctypes.c_char_p
    return library


def _backend(device: torch.device) -> tuple[str, str]:
    if device.type != "cuda":
        module, reason = _extension()
        return ("torch" if module is None else "cython"), reason
    if not torch.cuda.is_available():
        return "none", f"PyTorch {torch.__version__} sees no GPU"
    index = torch.cuda.current_device() if device.index is None else device.index
    library, reason = _library(index)
    if library is not None:
        return "cuda", reason
    vision, error = _torchvision()
    if vision is not None:
        return "torchvision", reason
    return "torch", f"{reason}; {error}"


def _routine(device: torch.device, method: str, count: int):
    """The function that serves `count` boxes on a device."""
    if count and device.type in ("cpu", "cuda"):
        name = _backend(device)[0]
        if name in ("cython", "cuda"):
            return _cython if name == "cython" else _cuda
        if name == "torchvision" and method == "hard" and count <= _TORCHVISION_MOST:
            return _by_torchvision
    return _torch_hard if method == "hard" else _torch_soft


# ---------------------------------------------------------------- routines of other libraries


@functools.cache
def _torchvision():
    """torchvision.ops or None, and why it cannot be imported."""
    try:
        return importlib.import_module("torchvision.ops"), ""
    except (ImportError, RuntimeError, AttributeError) as error:  # one that fits another PyTorch
        return None, f"torchvision cannot be imported ({error})"


def _by_torchvision(
    boxes: Tensor, scores: Tensor, groups: _Groups, rule: _Rule
) -> tuple[Tensor, Tensor]:
    """Groups moved apart, in float64."""
    corners = boxes.double()
    low, high = corners.aminmax()
    apart = high - low + 2
    if not apart * groups.count < 2**28:  # also infinite; float64 then has a millionth pixel left
        return _torch_hard(boxes, scores, groups, rule)
    corners[:, 2:] += rule.extra
    corners += (groups.of_box * apart)[:, None]
    ranked = scores.argsort(descending=True, stable=True)
    falling = -torch.arange(len(ranked), dtype=torch.float64, device=ranked.device)
    kept = ranked[_torchvision()[0].nms(corners[ranked], falling, rule.thresh)]
    kept = kept[groups.of_box[kept].argsort(stable=True)]
    group = groups.of_box[kept]
    sizes = torch.bincount(group)
    place = torch.arange(len(kept), device=kept.device) - (sizes.cumsum(0) - sizes)[group]
    kept = kept[place < rule.limit]
    return kept, scores[kept]


def _torch_hard(
    boxes: Tensor, scores: Tensor, groups: _Groups, rule: _Rule
) -> tuple[Tensor, Tensor]:
    """In each round all groups at once settle a block of their best boxes left, and drop from the
    rest what overlaps a kept one."""
    ranked = scores.argsort(descending=True, stable=True)
    ranked = ranked[groups.of_box[ranked].argsort(stable=True)]
    group, corners = groups.of_box[ranked], boxes[ranked].t()

    keep = torch.zeros_like(group, dtype=torch.bool)
    left = torch.arange(len(group), device=group.device)
    quota = torch.full((int(groups.count),), rule.limit, device=group.device)
    block = min(64, int(torch.bincount(group, minlength=1).max()))
    earlier = torch.ones(block, block, dtype=torch.bool, device=group.device).triu(1)
    while len(left):
        sizes = torch.bincount(group, minlength=len(quota))
        rank = torch.arange(len(left), device=left.device) - (sizes.cumsum(0) - sizes)[group]
        inside = rank < block
        row, place = group[inside], rank[inside]
        heads = corners.new_full((4, len(quota), block), torch.nan)  # NaN overlaps nothing
        heads[:, row, place] = corners[:, inside]

        # Greedy selection is the one fixed point of "kept = no kept earlier box overlaps it";
        # each step settles at least one box more (Cluster-NMS, arXiv 2005.03572).
        over = _iou(heads[:, :, :, None], heads[:, :, None, :], rule.extra) > rule.thresh
        over &= earlier
        kept, before = ~heads[0].isnan(), None
        while before is None or not torch.equal(kept, before):
            kept, before = ~(heads[0].isnan() | (over & kept[:, :, None]).any(1)), kept
        kept &= kept.cumsum(1) <= quota[:, None]
        keep[left[inside]] = kept[row, place]
        quota -= kept.sum(1)

        rest = ~inside & (quota > 0)[group]
        corners, group, left = corners[:, rest], group[rest], left[rest]
        heads = heads.masked_fill(~kept, torch.nan)
        rivals = heads if len(quota) == 1 else heads[:, group]
        rest = ~(_iou(rivals, corners[:, :, None], rule.extra) > rule.thresh).any(1)
        corners, group, left = corners[:, rest], group[rest], left[rest]
    kept = ranked[keep]
    return kept, scores[kept]


def _torch_soft(
    boxes: Tensor, scores: Tensor, groups: _Groups, rule: _Rule
) -> tuple[Tensor, Tensor]:
    """In each round all groups at once select their best box left, and the others' scores decay."""
    lines = torch.arange(int(groups.count), device=boxes.device)
    row = groups.of_box[groups.order]
    place = torch.arange(len(scores), device=boxes.device) - groups.starts[row]
    width = int(place.max()) + 1 if len(place) else 0
    table = groups.order.new_zeros(len(lines), width)
    table[row, place] = groups.order
    corners = boxes[table].permute(2, 0, 1)
    current = scores.new_full(table.shape, -torch.inf)
    current[row, place] = scores[groups.order]

    lines_of, indices, selected = [lines[:0]], [groups.order[:0]], [scores[:0]]
    for _ in range(min(rule.limit, width)):
        current[~(current >= rule.min_score)] = -torch.inf
        score, best = current.max(1)  # of equal ones the first
        going = score > -torch.inf
        if not going.any():
            break
        lines, table, corners = lines[going], table[going], corners[:, going]
        current, score, best = current[going], score[going], best[going, None]
        lines_of.append(lines)
        indices.append(table.gather(1, best)[:, 0])
        selected.append(score)
        winner = corners.gather(2, best.expand(4, -1, -1))
        iou = _iou(winner, corners, rule.extra)
        if rule.method == "linear":
            decay = torch.where(iou > rule.thresh, 1 - iou, 1.0)
        else:
            # In double, then rounded: exponential functions differ in the last bits only.
            decay = (-(iou.double() ** 2) / rule.sigma).exp().float()
            decay = torch.where(iou > 0, decay, 1.0)
        current = torch.where(current > -torch.inf, current * decay, -torch.inf)
        current.scatter_(1, best, -torch.inf)
    by_group = torch.cat(lines_of).argsort(stable=True)
    return torch.cat(indices)[by_group], torch.cat(selected)[by_group]


def _iou(a: Tensor, b: Tensor, extra: float) -> Tensor:
    """IoU of boxes a [4, ...] and b [4, ...], in the order of operations of the compiled code."""
    width = (torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0]) + extra).clamp(min=0)
    height = (torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1]) + extra).clamp(min=0)
    inter = width * height
    return inter / (_area(a, extra) + _area(b, extra) - inter)


def _area(box: Tensor, extra: float) -> Tensor:
    return (box[2] - box[0] + extra) * (box[3] - box[1] + extra)
