"""Box geometry on tensors: pure functions, no state.

``corners`` are (x1, y1, x2, y2), ``centre-size`` is (cx, cy, w, h); both relative to the image
(0..1) unless a function says otherwise. Leading dimensions broadcast.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_corners(boxes: Tensor) -> Tensor:
    """Centre-size [..., 4] -> corners [..., 4]."""
    half = boxes[..., 2:] / 2
    return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1)


def to_centre_size(boxes: Tensor) -> Tensor:
    """Corners [..., 4] -> centre-size [..., 4]."""
    return torch.cat([(boxes[..., 2:] + boxes[..., :2]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of corner boxes: [..., N, 4] x [..., M, 4] -> [..., N, M].

    A pair without any area has an IoU of 0, not NaN.
    """
    low = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    high = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    area_a = (a[..., 2:] - a[..., :2]).prod(-1)[..., :, None]
    area_b = (b[..., 2:] - b[..., :2]).prod(-1)[..., None, :]
    union = area_a + area_b - intersection
    return torch.where(union > 0, intersection / union, torch.zeros_like(union))


def encode(corners: Tensor, priors: Tensor, variance: tuple[float, float]) -> Tensor:
    """Offsets of ``corners`` [..., P, 4] against centre-size ``priors`` [P, 4] (SSD, eq. 2).

    The sides must be positive; sides under 1e-6 of the image count as 1e-6, so that the result is
    finite for whatever a data set holds.
    """
    boxes = to_centre_size(corners)
    centre = (boxes[..., :2] - priors[..., :2]) / (variance[0] * priors[..., 2:])
    size = torch.log(boxes[..., 2:].clamp(min=1e-6) / priors[..., 2:]) / variance[1]
    return torch.cat([centre, size], -1)


def decode(loc: Tensor, priors: Tensor, variance: tuple[float, float]) -> Tensor:
    """The inverse of ``encode``: offsets [..., P, 4] -> corners [..., P, 4], not clipped.

    A box is at most e^10 times as wide or high as its prior, far beyond any trained network's, so
    that a network in its first steps has no infinite boxes.
    """
    centre = priors[..., :2] + loc[..., :2] * variance[0] * priors[..., 2:]
    size = priors[..., 2:] * torch.exp((loc[..., 2:] * variance[1]).clamp(max=10))
    return to_corners(torch.cat([centre, size], -1))
