"""Non-maximum suppression in pixel convention: a box from x1 to x2 is x2 - x1 + 1 wide.

Two routines serve, with the same result to the last tie, because both take the same steps in
float32: the Cython extension `_cpu_nms` for CPU data where it is compiled (`./make.sh`), PyTorch
operations for everything else. `backend()` tells which.
"""

from __future__ import annotations

import functools
import importlib
import logging

import numpy as np
import torch
from torch import Tensor

__all__ = ["backend", "backend_reason", "class_nms", "nms", "soft_nms"]


def nms(dets: np.ndarray | Tensor, thresh: float) -> np.ndarray | Tensor:
    """Greedy suppression of one class.

    Args:
        dets: [N, 5] array, or tensor on any device: x1, y1, x2, y2 in pixels and score. IoU is
            computed in float32, scores are compared as they are. N may be 0.
        thresh: IoU in 0..1 above which (not at which) a box gives way to a better one.

    Returns:
        int64 indices [n] of the kept boxes, best first (of equal scores the earlier box is the
        better), as an array or a tensor on the device of `dets`, whichever `dets` was.

    Raises:
        ValueError: another shape, a NaN in `dets`, `thresh` outside 0..1.
    """
    table = _table(dets)
    same = torch.zeros(len(table), dtype=torch.int64, device=table.device)
    kept = class_nms(table[:, :4], table[:, 4], same, thresh, max(len(table), 1))
    return kept.numpy() if isinstance(dets, np.ndarray) else kept


def class_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, thresh: float, per_class: int
) -> Tensor:
    """The boxes of one image that `nms` keeps within each label, at most `per_class` of a label.

    Args:
        boxes: [N, 4] x1, y1, x2, y2 in pixels; IoU is computed in float32. N may be 0.
        scores: [N]. labels: integers [N]. All three on one device.
        thresh: IoU in 0..1 above which a box gives way to a better one of its label.
        per_class: the most boxes kept of one label, at least 1.

    Returns:
        int64 indices [n] on the device of `boxes`, best score first over all labels, of equal
        scores the earlier box first.

    Raises:
        ValueError: shapes that do not belong together, a NaN, `thresh` or `per_class` out of range.
    """
    count = len(boxes)
    if boxes.shape != (count, 4) or scores.shape != (count,) or labels.shape != (count,):
        raise ValueError(
            f"boxes {list(boxes.shape)}, scores {list(scores.shape)} and labels "
            f"{list(labels.shape)} should be [N, 4], [N] and [N]"
        )
    _check_thresh(thresh)
    if per_class < 1:
        raise ValueError(f"per_class is {per_class}, should be at least 1")
    if count == 0:
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    boxes, scores, labels = boxes.detach().float(), scores.detach(), labels.long()
    if (boxes.isnan().any() | scores.isnan().any()).item():
        raise ValueError(f"boxes {list(boxes.shape)} or scores contain NaN")

    ranked = scores.argsort(descending=True, stable=True)
    grouped = ranked[labels[ranked].argsort(stable=True)]
    columns, labels = boxes[grouped].t().contiguous(), labels[grouped]
    # The place for a CUDA kernel: one more branch on boxes.device, with the contract of the two.
    extension, _ = _extension()
    if extension is not None and boxes.device.type == "cpu":
        keep = torch.ones(count, dtype=torch.uint8)
        extension.mask(columns.numpy(), labels.numpy(), thresh, per_class, keep.numpy())
        keep = keep.bool()
    else:
        keep = _torch_mask(columns, labels, thresh, per_class)
    kept = torch.zeros_like(keep)
    kept[grouped] = keep
    return ranked[kept[ranked]]


def soft_nms(
    dets: np.ndarray | Tensor,
    thresh: float = 0.3,
    method: str = "linear",
    sigma: float = 0.5,
    min_score: float = 0.001,
) -> tuple[np.ndarray, np.ndarray] | tuple[Tensor, Tensor]:
    """Soft-NMS (Bodla et al., ICCV 2017, arXiv 1704.04503) of one class, in pixel convention.

    Again and again the box of the highest current score is selected and the scores of the rest
    decay with their IoU to it: "linear" multiplies by 1 - IoU where IoU > `thresh`, "gaussian" by
    exp(-IoU^2 / `sigma`) everywhere. It ends when the highest score left is below `min_score`.

    Args:
        dets: [N, 5] array, or tensor on any device: x1, y1, x2, y2 in pixels and score; computed
            in float32. N may be 0.

    Returns:
        int64 indices [n] in the order of selection (of equal scores the earlier box first) and
        float32 scores [n] as they were when selected; arrays or tensors, whichever `dets` was.

    Raises:
        ValueError: another shape, a NaN, `thresh` outside 0..1, unknown `method`, `sigma` <= 0.
    """
    _check_thresh(thresh)
    if method not in ("linear", "gaussian"):
        raise ValueError(f'method is {method!r}, should be "linear" or "gaussian"')
    if not sigma > 0:
        raise ValueError(f"sigma is {sigma}, should be positive")
    table = _table(dets).float()
    columns, scores = table[:, :4].t().contiguous(), table[:, 4].clone()
    taken = torch.zeros_like(scores, dtype=torch.bool)
    order, selected = [], []
    for _ in range(len(table)):
        best = int(scores.argmax())
        score = float(scores[best])
        if score < min_score:
            break
        order.append(best)
        selected.append(score)
        taken[best] = True
        iou = _iou(columns[:, best, None], columns).nan_to_num(0)  # 0 / 0 of boxes without area
        if method == "linear":
            scores *= torch.where(iou > thresh, 1 - iou, 1.0)
        else:
            scores *= torch.exp(-(iou * iou) / sigma)
        scores.masked_fill_(taken, -torch.inf)
    indices = torch.tensor(order, dtype=torch.int64, device=table.device)
    rescored = torch.tensor(selected, dtype=torch.float32, device=table.device)
    if isinstance(dets, np.ndarray):
        return indices.numpy(), rescored.numpy()
    return indices, rescored


def backend() -> str:
    """The routine that serves CPU data: "cython" or "torch"."""
    return "torch" if _extension()[0] is None else "cython"


def backend_reason() -> str:
    """Why `backend()` is what it is: the extension's file, or what keeps it from serving."""
    return _extension()[1]


@functools.cache
def _extension():
    """The extension module or None, and its file or the reason; a broken one is told once."""
    name = f"{__name__}._cpu_nms"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        return None, f"{name} is not compiled for this Python; ./make.sh compiles it"
    except ImportError as error:
        reason = f"{name} cannot be loaded ({error}); ./make.sh compiles it anew"
        logging.getLogger("ssd").warning("NMS by PyTorch: %s", reason)
        return None, reason
    return module, module.__file__


def _torch_mask(columns: Tensor, labels: Tensor, thresh: float, per_class: int) -> Tensor:
    """bool [N], what is kept of columns [4, N], sorted by labels [N], within a label best first.

    In each round all labels at once settle a block of their best boxes left and drop from the
    rest what overlaps a kept one.
    """
    keep = torch.zeros_like(labels, dtype=torch.bool)
    left = torch.arange(len(labels), device=labels.device)
    _, group, sizes = labels.unique_consecutive(return_inverse=True, return_counts=True)
    quota = torch.full_like(sizes, per_class)
    block = min(64, int(sizes.max()))
    earlier = torch.ones(block, block, dtype=torch.bool, device=labels.device).triu(1)
    while len(left):
        sizes = torch.bincount(group, minlength=len(quota))
        rank = torch.arange(len(left), device=left.device) - (sizes.cumsum(0) - sizes)[group]
        inside = rank < block
        row, column = group[inside], rank[inside]
        heads = columns.new_full((4, len(quota), block), torch.nan)  # NaN overlaps nothing
        heads[:, row, column] = columns[:, inside]

        # Greedy selection is the one fixed point of "kept = no kept earlier box overlaps it";
        # each step settles at least one box more (Cluster-NMS, arXiv 2005.03572).
        over = (_iou(heads[:, :, :, None], heads[:, :, None, :]) > thresh) & earlier
        kept, before = ~heads[0].isnan(), None
        while before is None or not torch.equal(kept, before):
            kept, before = ~(heads[0].isnan() | (over & kept[:, :, None]).any(1)), kept
        kept &= kept.cumsum(1) <= quota[:, None]
        keep[left[inside]] = kept[row, column]
        quota -= kept.sum(1)

        rest = ~inside & (quota > 0)[group]
        columns, group, left = columns[:, rest], group[rest], left[rest]
        heads = heads.masked_fill(~kept, torch.nan)
        rivals = heads if len(quota) == 1 else heads[:, group]
        rest = ~(_iou(rivals, columns[:, :, None]) > thresh).any(1)
        columns, group, left = columns[:, rest], group[rest], left[rest]
    return keep


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes a [4, ...] and b [4, ...], in the order of operations of `_cpu_nms.pyx`."""
    width = (torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0]) + 1).clamp(min=0)
    height = (torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1]) + 1).clamp(min=0)
    inter = width * height
    return inter / (_area(a) + _area(b) - inter)


def _area(box: Tensor) -> Tensor:
    return (box[2] - box[0] + 1) * (box[3] - box[1] + 1)


def _table(dets: np.ndarray | Tensor) -> Tensor:
    """`dets` as a tensor without gradient, on its device."""
    if isinstance(dets, np.ndarray):
        dtype = np.float32 if dets.dtype == np.float32 else np.float64
        table = torch.from_numpy(np.array(dets, dtype, order="C"))
    else:
        table = dets.detach()
    if table.ndim != 2 or table.shape[1] != 5:
        raise ValueError(f"detections have shape {list(table.shape)}, should be [N, 5]")
    if table.isnan().any():
        raise ValueError(f"detections {list(table.shape)} contain NaN")
    return table


def _check_thresh(thresh: float) -> None:
    if not 0 <= thresh <= 1:
        raise ValueError(f"IoU threshold is {thresh}, should be in 0..1")
