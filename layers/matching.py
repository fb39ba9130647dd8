"""Which prior box answers for which ground-truth box (SSD, section 2.2, "Matching strategy")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layers.boxes import encode, iou, to_corners


def pad_targets(targets: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Targets of a batch as one tensor: B tensors [n_i, 5] -> [B, G, 5] and a mask [B, G].

    G is the largest n_i, at least 1, so that a batch without any box has a well-formed shape.
    """
    counts = torch.tensor([len(t) for t in targets])
    padded = torch.zeros(len(targets), max(1, int(counts.max())), 5)
    for row, target in zip(padded, targets, strict=True):
        row[: len(target)] = target.reshape(-1, 5)
    mask = torch.arange(padded.shape[1]) < counts[:, None]
    return padded.to(device), mask.to(device)


def match(
    targets: Tensor,
    mask: Tensor,
    priors: Tensor,
    threshold: float,
    variance: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Match the boxes of a batch to the priors.

    A prior takes the box it overlaps most. Each box also claims the prior that it overlaps most,
    whatever the overlap; of two boxes that claim one prior, the later wins. A prior under the
    threshold that nobody claims is background.

    Args:
        targets: [B, G, 5], corners relative to the image, and the label (1-based).
        mask: bool [B, G], False for padding. A row of only padding is an image without objects.
        priors: [P, 4], centre-size, relative.
        threshold: least IoU that makes a prior positive without a claim.
        variance: of the encoding.

    Returns:
        ``labels`` int64 [B, P], 0 = background, and ``offsets`` float32 [B, P, 4], the matched box
        encoded against its prior. Offsets of background priors have no meaning (but are finite).
    """
    batch, boxes = mask.shape
    # Padding gets an IoU below any real one: it is never the best box of a prior.
    overlaps = iou(targets[..., :4], to_corners(priors))
    overlaps = overlaps.masked_fill(~mask[..., None], -1.0)
    best_overlap, best_box = overlaps.max(1)

    # Claims in box order: a later box has the higher index, so the maximum index wins.
    order = torch.arange(boxes, device=mask.device).expand(batch, -1)
    claims = torch.full((batch, len(priors)), -1, device=mask.device)
    claims.scatter_reduce_(1, overlaps.argmax(2), order.masked_fill(~mask, -1), "amax")
    claimed = claims >= 0
    best_box = torch.where(claimed, claims, best_box)

    matched = targets.gather(1, best_box[..., None].expand(-1, -1, 5))
    positive = claimed | (best_overlap >= threshold)
    labels = torch.where(positive, matched[..., 4].long(), 0)
    return labels, encode(matched[..., :4], priors, variance)
