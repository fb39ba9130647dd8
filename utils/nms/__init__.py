"""Hard and soft non-maximum suppression (NMS), for one class or many groups of boxes in one call.

Two conventions of a box's size: in the pixel convention, the published one, a box from x1 to x2 is
x2 - x1 + 1 wide. In the plain one (`pixel=False`, torchvision's) it is x2 - x1 wide.

Four routines serve. On the CPU: the Cython extension `_cpu_nms`, else PyTorch. On a GPU: the CUDA
library `_cuda_nms`, else torchvision, else PyTorch. `./make.sh` or `python utils/build.py` compiles
the first of each; `backend()` names the routine in use.

All but torchvision take the same steps in float32 and keep the same boxes to the last tie. (The
scores of a Gaussian decay may differ in the last bit.) torchvision works in float64: it may differ
where an IoU is within float32's rounding of the threshold.
"""

import math
import operator

import numpy as np
import torch
from torch import Tensor

from utils.nms.backends import backend, backend_reason, routine
from utils.nms.reference import METHODS, Groups, Rule, rank_in_group

__all__ = ["METHODS", "backend", "backend_reason", "batched_nms", "nms", "rank_in_group",
           "soft_nms"]


def nms(dets: np.ndarray | Tensor, thresh: float, pixel: bool = True) -> np.ndarray | Tensor:
    """Suppress the boxes of one class greedily.

    Args:
        dets: [N, 5] array, or tensor on any device: x1, y1, x2, y2 in pixels, and score. IoU is
            computed in float32; scores are compared in their own precision. N may be 0.
        thresh: IoU in 0..1. A box is dropped if its IoU with a better kept box is above (not at)
            the threshold.
        pixel: whether a box from x1 to x2 is x2 - x1 + 1 wide, as published, or x2 - x1.

    Returns:
        int64 indices [n] of the kept boxes, best first; of equal scores the earlier box is better.
        An array, or a tensor on the device of `dets`, as `dets` is.

    Raises:
        ValueError: another shape, a NaN in `dets`, `thresh` outside 0..1.
    """
    kept, _ = _one_class(dets, thresh, pixel)
    return kept.numpy() if isinstance(dets, np.ndarray) else kept


def soft_nms(dets: np.ndarray | Tensor, thresh: float = 0.3, method: str = "linear",
             sigma: float = 0.5, min_score: float = 0.001,
             pixel: bool = True) -> tuple[np.ndarray, np.ndarray] | tuple[Tensor, Tensor]:
    """Apply Soft-NMS (Bodla et al., ICCV 2017, arXiv 1704.04503) to the boxes of one class.

    Each round selects the box of the highest current score. The scores of the other boxes decay
    with their IoU to it: "linear" multiplies by 1 - IoU where IoU > `thresh`, "gaussian" by
    exp(-IoU^2 / `sigma`) everywhere. It ends when the highest score left is below `min_score`.

    Args:
        dets: [N, 5] array, or tensor on any device: x1, y1, x2, y2 in pixels, and score. All is
            computed in float32. N may be 0.
        pixel: as in `nms`.

    Returns:
        int64 indices [n] in the order of selection (of equal scores the earlier box first), and
        float32 scores [n] at the time of selection. Arrays or tensors, as `dets` is.

    Raises:
        ValueError: another shape, a NaN, `thresh` outside 0..1, unknown `method`, `sigma` <= 0.
    """
    if method not in METHODS[1:]:
        raise ValueError(f"method is {method!r}, should be one of {', '.join(METHODS[1:])}")
    kept, scores = _one_class(dets, thresh, pixel, method, sigma, min_score)
    if isinstance(dets, np.ndarray):
        return kept.numpy(), scores.numpy()
    return kept, scores


def _one_class(dets: np.ndarray | Tensor, thresh: float, pixel: bool,
               *soft: str | float) -> tuple[Tensor, Tensor]:
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


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, thresh: float, limit: int,
                pixel: bool = True, method: str = "hard", sigma: float = 0.5,
                min_score: float = 0.001) -> tuple[Tensor, Tensor]:
    """Suppress within each of many groups of boxes, such as the classes of a batch's images.

    The PyTorch routine pads every group to the largest one, "hard" to at most 64 boxes.

    Args:
        boxes: [N, 4] x1, y1, x2, y2 in pixels; IoU is computed in float32. Sides of 0 or less
            (x2 < x1) enter the formulas as they are. N may be 0.
        scores: [N].
        groups: integers [N]; only boxes of equal group id suppress each other. All on one device.
        thresh: IoU in 0..1. Above it a box yields to a better one of its group ("hard"), or its
            score decays ("linear").
        limit: the most boxes selected per group, an integer of at least 1.
        pixel: as in `nms`.
        method: one of `METHODS`: "hard" as in `nms`, the others as in `soft_nms`.
        sigma, min_score: as in `soft_nms`; "hard" ignores them.

    Returns:
        int64 indices [n] and scores [n] ("hard": those of `scores`; else float32), without
        gradient, on the device of `boxes`. Sorted by score; ties: lower group id first, then
        earlier box.

    Raises:
        ValueError: shapes that do not match, a NaN, another argument out of range.
        TypeError: `limit` is no integer.
    """
    _check_shapes(boxes, scores, groups)
    _check_numbers(thresh, limit, method, sigma, min_score)
    limit = min(limit, max(len(boxes), 1))
    given, boxes = scores.detach(), boxes.detach().float().contiguous()
    # A GPU is asked at the end, when it has to be waited for in any case.
    nan = boxes.isnan().any() | given.isnan().any()
    if not boxes.is_cuda:
        _refuse_nan(nan)
    scores = _comparable(given) if method == "hard" else given.float().contiguous()
    rule = Rule(thresh, limit, method, sigma, min_score, extra=1.0 if pixel else 0.0)
    select = routine(boxes.device, method, len(boxes))
    kept, selected = select(boxes, scores, Groups.of(groups), rule)
    if boxes.is_cuda:
        _refuse_nan(nan)
    selected = given[kept] if method == "hard" else selected
    best = selected.argsort(descending=True, stable=True)
    return kept[best], selected[best]


def _check_shapes(boxes: Tensor, scores: Tensor, groups: Tensor) -> None:
    count = len(boxes)
    if boxes.shape != (count, 4) or scores.shape != (count,) or groups.shape != (count,):
        raise ValueError(f"boxes {list(boxes.shape)}, scores {list(scores.shape)} and groups "
                         f"{list(groups.shape)} should be [N, 4], [N] and [N]")


def _check_numbers(thresh: float, limit: int, method: str, sigma: float, min_score: float) -> None:
    if not 0 <= thresh <= 1:
        raise ValueError(f"IoU threshold is {thresh}, should be in 0..1")
    if operator.index(limit) < 1:
        raise ValueError(f"limit is {limit}, should be at least 1")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, should be one of {', '.join(METHODS)}")
    if not sigma > 0:
        raise ValueError(f"sigma is {sigma}, should be positive")
    if not math.isfinite(min_score):
        raise ValueError(f"min_score is {min_score}, should be finite")


def _refuse_nan(found: Tensor) -> None:
    if found:
        raise ValueError("boxes or scores contain NaN")


def _comparable(scores: Tensor) -> Tensor:
    """Return float32 [N] in the order of the scores.

    Only the order counts, and ranks keep what float32 would round away.
    """
    if scores.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return scores.float().contiguous()
    ranks = torch.empty(len(scores), device=scores.device)
    ranks[scores.argsort(descending=True, stable=True)] = -torch.arange(
        len(scores), dtype=torch.float32, device=scores.device
    )
    return ranks
