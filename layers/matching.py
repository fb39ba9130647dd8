"""Matching of prior boxes to ground truth (SSD, section 2.2, "Matching strategy")."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from layers.boxes import encode, iou, to_corners


def pad_targets(targets: Sequence[Tensor], device: torch.device) -> Tensor:
    """Pad the targets of a batch: B tensors [n_i, 5] on the CPU -> float32 [B, G, 5] on ``device``.

    G is the largest n_i, at least 1. Padding rows are zeros; no box has label 0. The copy to a GPU
    is asynchronous.
    """
    least = torch.zeros(1, 5)
    padded = pad_sequence([least, *(t.float() for t in targets)], batch_first=True)[1:]
    if device.type == "cuda":
        padded = padded.pin_memory()
    return padded.to(device, non_blocking=True)


def match(targets: Tensor, priors: Tensor, threshold: float, variance: tuple[float, float],
          index: bool = False) -> tuple[Tensor, Tensor]:
    """Match the boxes of a batch to the priors.

    A prior is matched to the box that it overlaps most, if their IoU reaches the threshold. Each
    box also claims the prior that it overlaps most, whatever the IoU; if two boxes claim one prior,
    the later box wins. All other priors are background.

    Args:
        targets: [B, G, 5], corners relative to the image and a label from 1; padded with rows of
            zeros. G >= 1.
        priors: [P, 4], centre-size, relative.
        threshold: lowest IoU of a match without a claim.
        variance: of the encoding.
        index: gather the positive priors, which are few, and encode only these. It is faster on
            the CPU; a GPU would have to wait for their number.

    Returns:
        ``labels`` int64 [B, P], 0 = background, and ``offsets`` float32 [B, P, 4], the matched box
        encoded against its prior. Offsets of background priors are finite but have no meaning.
    """
    batch, boxes = targets.shape[:2]
    best_overlap, best_box, best_prior = _best(targets[..., :4], priors, 4 if index else batch)

    # A later box has a higher index, so the maximum index wins.
    order = torch.arange(boxes, device=targets.device).expand(batch, -1)
    order = order.masked_fill(targets[..., 4] == 0, -1)
    claims = torch.full((batch, len(priors)), -1, device=targets.device)
    claims.scatter_reduce_(1, best_prior, order, "amax")
    claimed = claims >= 0
    best_box = torch.where(claimed, claims, best_box)
    positive = claimed | (best_overlap >= threshold)

    if index:
        image, prior = positive.nonzero(as_tuple=True)
        matched = targets[image, best_box[image, prior]]
        labels = torch.zeros_like(best_box)
        labels[image, prior] = matched[:, 4].long()
        offsets = targets.new_zeros(batch, len(priors), 4)
        offsets[image, prior] = encode(matched[:, :4], priors[prior], variance)
        return labels, offsets
    matched = targets.gather(1, best_box[..., None].expand(-1, -1, 5))
    labels = torch.where(positive, matched[..., 4].long(), 0)
    return labels, encode(matched[..., :4], priors, variance)


def _best(boxes: Tensor, priors: Tensor, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the IoU [B, P] and index [B, P] of each prior's best box, and the index [B, G] of each
    box's best prior.

    Processes ``images`` images at a time, so that the table of IoUs fits into a CPU's cache.
    """
    corners = to_corners(priors).t().contiguous().t()  # the fastest layout for iou
    found = []
    for part in boxes.split(images):
        # Padding has an IoU of 0 and comes last, so no prior prefers it to a box.
        overlaps = iou(part, corners)
        found.append((*overlaps.max(1), overlaps.argmax(2)))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
