"""Suppression by PyTorch operations, on any device; the compiled routines give the same result.

Every routine takes boxes float32 [N, 4] (x1, y1, x2, y2), scores float32 [N] without NaN, the
`Groups` of the boxes and a `Rule`. It returns int64 indices [n] of the selected boxes, by group and
within a group in the order of selection, and float32 scores [n] at the time of selection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

METHODS = ("hard", "linear", "gaussian")
"""Suppression, and the two decays of Soft-NMS. The compiled code knows their positions."""

_BLOCK = 64
"""The most boxes of a group that one round of `hard` compares with each other."""


@dataclass(frozen=True)
class Rule:
    """How boxes of one group suppress each other; see `utils.nms.batched_nms`."""

    thresh: float
    limit: int
    method: str
    sigma: float
    min_score: float
    extra: float
    """1 in the pixel convention, else 0."""

    def values(self) -> tuple[float, int, int, float, float, float]:
        """Return the arguments of the compiled routines."""
        method = METHODS.index(self.method)
        return self.thresh, self.limit, method, self.sigma, self.min_score, self.extra


@dataclass(frozen=True)
class Groups:
    """Boxes sorted by group; computed without waiting for a GPU."""

    of_box: Tensor
    """int64 [N]: the group of each box, counted from 0."""
    order: Tensor
    """int64 [N]: the boxes sorted by group; within a group in their own order."""
    starts: Tensor
    """int64 [N + 2]: group g is order[starts[g]:starts[g + 1]]; N after the last group."""
    count: Tensor
    """int64 [1]: the number of groups."""

    @classmethod
    def of(cls, groups: Tensor) -> Groups:
        """Sort boxes by their group ids, integers [N]."""
        ordered, order = groups.sort(stable=True)
        new = torch.ones_like(order, dtype=torch.bool)
        new[1:] = ordered[1:] != ordered[:-1]
        row = new.cumsum(0) - 1
        places = torch.arange(len(order), device=order.device)
        starts = torch.full((len(order) + 2,), len(order), device=order.device)
        # The first box of each group writes its place; the others write to an unused entry.
        starts.scatter_(0, torch.where(new, row, len(order) + 1), places)
        return cls(torch.empty_like(row).scatter_(0, order, row), order, starts, new.sum()[None])


def hard(boxes: Tensor, scores: Tensor, groups: Groups, rule: Rule) -> tuple[Tensor, Tensor]:
    """Select greedily in rounds, all groups at once.

    Each round settles the best boxes left of every group and drops the boxes that they suppress.
    """
    ranked = scores.argsort(descending=True, stable=True)
    ranked = ranked[groups.of_box[ranked].argsort(stable=True)]
    group, corners = groups.of_box[ranked], boxes[ranked].t()

    keep = torch.zeros_like(group, dtype=torch.bool)
    left = torch.arange(len(group), device=group.device)
    quota = torch.full((int(groups.count),), rule.limit, device=group.device)
    block = min(_BLOCK, int(torch.bincount(group, minlength=1).max()))
    while len(left):
        rank = rank_in_group(group)
        inside = rank < block
        row, place = group[inside], rank[inside]
        heads = corners.new_full((4, len(quota), block), torch.nan)  # NaN overlaps nothing
        heads[:, row, place] = corners[:, inside]
        kept = _greedy(heads, rule)
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


def rank_in_group(groups: Tensor) -> Tensor:
    """Return int64 [n]: how many earlier entries of `groups`, integers [n], have the same value."""
    ordered, order = groups.sort(stable=True)
    rank = torch.arange(len(groups), device=groups.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(rank).scatter_(0, order, rank)


def _greedy(heads: Tensor, rule: Rule) -> Tensor:
    """Return which boxes of each row greedy selection keeps.

    Greedy selection is the one fixed point of "kept = no kept earlier box overlaps it". Each step
    settles at least one more box (Cluster-NMS, arXiv 2005.03572).

    Args:
        heads: [4, groups, n] corners, best first; NaN where a row has fewer boxes.

    Returns:
        bool [groups, n].
    """
    over = _iou(heads[:, :, :, None], heads[:, :, None, :], rule.extra) > rule.thresh
    over &= torch.ones_like(over[0]).triu(1)  # only earlier boxes suppress
    there = ~heads[0].isnan()
    kept, before = there, None
    while before is None or not torch.equal(kept, before):
        kept, before = there & ~(over & kept[:, :, None]).any(1), kept
    return kept


def soft(boxes: Tensor, scores: Tensor, groups: Groups, rule: Rule) -> tuple[Tensor, Tensor]:
    """Select the best box left of every group and decay the scores of the others, in rounds."""
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
        score, best = current.max(1)  # the first of equal scores
        going = score > -torch.inf
        if not going.any():
            break
        lines, table, corners = lines[going], table[going], corners[:, going]
        current, score, best = current[going], score[going], best[going, None]
        lines_of.append(lines)
        indices.append(table.gather(1, best)[:, 0])
        selected.append(score)
        winner = corners.gather(2, best.expand(4, -1, -1))
        decay = _decay(_iou(winner, corners, rule.extra), rule)
        current = torch.where(current > -torch.inf, current * decay, -torch.inf)
        current.scatter_(1, best, -torch.inf)
    by_group = torch.cat(lines_of).argsort(stable=True)
    return torch.cat(indices)[by_group], torch.cat(selected)[by_group]


def _decay(iou: Tensor, rule: Rule) -> Tensor:
    if rule.method == "linear":
        return torch.where(iou > rule.thresh, 1 - iou, 1.0)
    # In float64, then rounded: exp differs in the last bits only.
    decay = (-(iou.double() ** 2) / rule.sigma).exp().float()
    return torch.where(iou > 0, decay, 1.0)


def _iou(a: Tensor, b: Tensor, extra: float) -> Tensor:
    """Return the IoU of boxes a [4, ...] and b [4, ...].

    The order of operations is that of the compiled code, for equal rounding.
    """
    width = (torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0]) + extra).clamp(min=0)
    height = (torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1]) + extra).clamp(min=0)
    inter = width * height
    return inter / (_area(a, extra) + _area(b, extra) - inter)


def _area(box: Tensor, extra: float) -> Tensor:
    return (box[2] - box[0] + extra) * (box[3] - box[1] + extra)
